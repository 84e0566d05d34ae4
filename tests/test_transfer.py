"""Classification transfer: frozen means frozen, the score is the whole set's, subsets hold no patch twice."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from decur_core import config, pretrain
from decur_core.data.raster import DataError
from decur_core.data.store import Store
from decur_core.running import folders as runs
from decur_core.transfer import evaluation as transfer


@pytest.fixture
def pretrained(tiny, pair_store):
    settings = tiny(epochs=1, **{"transfer.epochs": 6, "transfer.milestones": [5], "transfer.batch_size": 16})
    settings = config.load("start", {**{k: v for k, v in config.to_dict(settings).items() if k != "profile"}})
    return settings, pretrain.run(settings, pair_store)


def test_map_equals_scikit_learn_on_the_whole_set():
    random = np.random.default_rng(0)
    labels = (random.random((200, 5)) < 0.3).astype(int)
    labels[:, 4] = 0
    scores = random.normal(size=(200, 5)) + labels
    found = transfer.mean_average_precision(torch.tensor(scores), torch.tensor(labels))
    per_class = [100 * average_precision_score(labels[:, k], scores[:, k]) for k in range(4)]
    assert found["per_class"][:4] == pytest.approx(per_class, abs=1e-3) and found["per_class"][4] is None
    assert found["macro"] == pytest.approx(np.mean(per_class), abs=1e-3)
    assert found["micro"] == pytest.approx(100 * average_precision_score(labels.ravel(), scores.ravel()), abs=1e-3)


def test_only_the_order_of_scores_counts_and_ties_count_as_one_threshold():
    random = np.random.default_rng(0)
    labels = (random.random((300, 4)) < 0.3).astype(int)
    ranks = random.integers(0, 40, (300, 4)) + 4 * labels
    expected = [100 * average_precision_score(labels[:, k], ranks[:, k]) for k in range(4)]
    for scores in (ranks, 2 * ranks + 20, ranks - 200, 1e-6 * ranks):  # where a sigmoid would round them to one value
        found = transfer.mean_average_precision(torch.tensor(scores, dtype=torch.float32), torch.tensor(labels))
        assert found["per_class"] == pytest.approx(expected, abs=1e-3)
        assert found["micro"] == pytest.approx(100 * average_precision_score(labels.ravel(), ranks.ravel()), abs=1e-4)
    with pytest.raises(DataError, match="no positive label"):
        transfer.mean_average_precision(torch.rand(5, 2), torch.zeros(5, 2))


def test_one_class_and_one_image_have_a_score():
    scores, labels = torch.tensor([[0.9], [0.1], [0.8], [0.3]]), torch.tensor([[1], [0], [0], [1]])
    expected = 100 * average_precision_score(labels.numpy(), scores.numpy())
    found = transfer.mean_average_precision(scores, labels)
    assert found == {"micro": pytest.approx(expected), "macro": pytest.approx(expected), "per_class": [found["macro"]]}
    assert transfer.mean_average_precision(torch.rand(1, 3), torch.tensor([[1, 0, 1]]))["per_class"] == [100, None, 100]
    assert transfer.mean_average_precision(torch.ones(4, 1), labels)["micro"] == pytest.approx(50)  # a constant score


def test_subset_has_no_duplicates_and_follows_the_seed():
    chosen = transfer.subset(1000, 0.01, seed=3)
    assert len(chosen) == len(set(chosen)) == 10 and chosen == sorted(chosen)
    assert chosen == transfer.subset(1000, 0.01, seed=3) != transfer.subset(1000, 0.01, seed=4)
    assert transfer.subset(1000, 1.0, seed=0) == list(range(1000))
    assert len(transfer.subset(20, 0.01, seed=0)) == 1


def fitted(settings, folder, stores, **kinds):
    """The classifier after training, caught on its way to prediction."""
    caught = []
    real = transfer.predict

    def catch(classifier, *arguments, **options):
        caught.append(classifier)
        return real(classifier, *arguments, **options)

    transfer.predict = catch
    try:
        record = transfer.evaluate(settings, folder, stores, **kinds)
    finally:
        transfer.predict = real
    return record, caught[0]


def test_frozen_encoders_do_not_move(pretrained, patch_stores):
    settings, folder = pretrained
    before = transfer.load_pretrained(folder)[0]
    record, classifier = fitted(settings, folder, patch_stores, protocol="linear")
    for k, encoder in enumerate(classifier.encoders, start=1):
        expected = getattr(before, f"backbone_{k}").state_dict()
        assert all(torch.equal(v, expected[name]) for name, v in encoder.state_dict().items())
    assert record["micro"] > transfer.chance(patch_stores["test"])


def test_finetuning_moves_every_weight(pretrained, patch_stores):
    settings, folder = pretrained
    before = transfer.load_pretrained(folder)[0]
    record, classifier = fitted(settings, folder, patch_stores, protocol="finetune", inputs="optical")
    expected = dict(before.backbone_2.named_parameters())
    assert len(classifier.encoders) == 1
    assert all(not torch.equal(v, expected[name]) for name, v in classifier.encoders[0].named_parameters())
    assert record["inputs"] == "optical"


def test_score_does_not_depend_on_the_batch_size(pretrained, patch_stores):
    settings, folder = pretrained
    model, _, _ = transfer.load_pretrained(folder)
    classifier = transfer.Classifier(model, classes=3, frozen=True)
    test = Store(patch_stores["test"])
    small = config.load("start", {"transfer.batch_size": 7, "transfer.crop_size": 20})
    large = config.load("start", {"transfer.batch_size": 64, "transfer.crop_size": 20})
    one = transfer.predict(classifier, test, small, inputs="both")
    two = transfer.predict(classifier, test, large, inputs="both")
    assert one.shape == (30, 3)
    torch.testing.assert_close(one, two)


def test_record_is_complete_and_reused(pretrained, patch_stores, monkeypatch):
    settings, folder = pretrained
    record = transfer.evaluate(settings, folder, patch_stores, protocol="linear", fraction=0.25)
    assert record["patches"] == {"train": 12, "test": 30} and len(set(record["label_ids"])) == 12
    for key in ("dataset", "method", "seed", "protocol", "inputs", "fraction", "world", "profile", "settings_hash"):
        assert key in record
    assert {"commit", "date", "hardware", "versions"} <= record["provenance"].keys()
    monkeypatch.setattr(transfer, "_fit", lambda *a, **k: pytest.fail("an evaluation on record was run again"))
    assert transfer.evaluate(settings, folder, patch_stores, protocol="linear", fraction=0.25) == record


def test_unlabelled_store_and_missing_run_are_refused(pretrained, pair_store, patch_stores, tmp_path):
    settings, folder = pretrained
    with pytest.raises(config.ConfigError, match="holds no labels"):
        transfer.evaluate(settings, folder, {"train": pair_store, "test": pair_store}, protocol="linear")
    with pytest.raises(FileNotFoundError, match="no finished pretraining"):
        transfer.evaluate(settings, tmp_path, patch_stores, protocol="linear")


@pytest.mark.parametrize(("asked", "allowed"), [("protocol", "linear, finetune"), ("inputs", "both, sar, optical")])
def test_a_misspelt_request_is_refused(pretrained, patch_stores, asked, allowed):
    settings, folder = pretrained
    with pytest.raises(config.ConfigError, match=f"{asked} = 'lineal'; allowed: {allowed}"):
        transfer.evaluate(settings, folder, patch_stores, **{"protocol": "linear", asked: "lineal"})
    with pytest.raises(config.ConfigError, match="dataset = 'bigearth'; allowed: bigearthnet, geonrw"):
        transfer.evaluate(settings, folder, patch_stores, dataset="bigearth", protocol="linear")


def test_fine_tuning_that_could_not_take_a_step_is_refused(pretrained, patch_stores):
    settings, folder = pretrained
    with pytest.raises(config.ConfigError, match="batches of 1 .1 labelled images, transfer.batch_size = 16"):
        transfer.evaluate(settings, folder, patch_stores, protocol="finetune", fraction=0.02)
    assert transfer.evaluate(settings, folder, patch_stores, protocol="linear", fraction=0.02)["patches"]["train"] == 1


def test_a_diverged_training_is_not_scored(pretrained, patch_stores):
    settings, folder = pretrained
    wild = replace(settings, transfer=replace(settings.transfer, learning_rate_finetune=1e30))
    with pytest.raises(
        pretrain.NonFinite, match="finetune-both-1: loss nan in epoch 1; lower transfer.learning_rate_f"
    ):
        transfer.evaluate(wild, folder, patch_stores, protocol="finetune")


def test_other_images_are_scored_anew(pretrained, patch_stores, monkeypatch):
    settings, folder = pretrained
    first = transfer.evaluate(settings, folder, patch_stores, protocol="linear")
    read = Store.__init__

    def other(self, path):
        read(self, path)
        self.meta["summary"]["sha256"] = "of other images, of which there are as many"

    monkeypatch.setattr(Store, "__init__", other)
    again = transfer.evaluate(settings, folder, patch_stores, protocol="linear")
    assert again["settings_hash"] != first["settings_hash"] and again["settings"] == first["settings"]


def test_an_interrupt_says_where_it_came_and_the_same_call_gives_the_same_record(pretrained, patch_stores, monkeypatch):
    settings, folder = pretrained
    monkeypatch.setattr(transfer, "SAVE_SECONDS", 0.0)
    real, steps = transfer._samples, []

    def signalled(*arguments, **options):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(transfer, "_samples", signalled)
    with pytest.raises(pretrain.Interrupted, match="SIGINT in epoch . of .; the same call goes on"):
        transfer.evaluate(settings, folder, patch_stores, protocol="linear")
    assert list(runs.path(settings, "transfer").glob("*.pt")) and not list(runs.path(settings, "records").glob("*"))
    record = transfer.evaluate(settings, folder, patch_stores, protocol="linear")
    monkeypatch.setattr(transfer, "_samples", real)
    whole = transfer.evaluate(replace(settings, profile="whole"), folder, patch_stores, protocol="linear")
    assert record["per_class"] == whole["per_class"] and record["micro"] == whole["micro"]
