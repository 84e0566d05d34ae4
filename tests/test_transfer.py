"""Classification transfer: frozen means frozen, the score is the whole set's, subsets hold no patch twice."""

import copy
import errno
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_store
from sklearn.metrics import average_precision_score

from decur_core import config, pretrain, transfer
from decur_core.data import datasets
from decur_core.data.datasets import modalities_of
from decur_core.data.raster import DataError
from decur_core.data.store import Store
from decur_core.data.tasks import Scene
from decur_core.model import MultimodalModel
from decur_core.running import checkpoints
from decur_core.running import folders as runs
from decur_core.transfer import evaluation, fitting, networks


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


def changed(settings, **values):
    """Other settings of the section ``transfer``."""
    return settings.model_copy(update={"transfer": settings.transfer.model_copy(update=values)})


def fitted(settings, folder, stores, **kinds):
    """The classifier after training, caught on its way to prediction."""
    caught = []
    real = fitting.predictions

    def catch(classifier, *arguments, **options):
        caught.append(classifier)
        return real(classifier, *arguments, **options)

    fitting.predictions = catch
    try:
        record = transfer.evaluate(settings, folder, stores, **kinds)
    finally:
        fitting.predictions = real
    return record, caught[0]


def predicted(classifier, path, t):
    """Outputs for every image of a store of the pair."""
    task, kind, store = Scene(("high", "medium", "low")), networks.NETWORKS["linear"], Store(path)

    def samples(rows):
        looks = [(m, 0) for m in modalities_of("sar_optical")]
        return networks.samples(kind, task, looks, t, store, rows, device="cpu")

    return torch.cat([found for found, _ in fitting.predictions(classifier, kind, samples, range(len(store)), t)])


def test_encoders_that_are_loaded_see_every_image_alone_and_keep_their_statistics(pretrained, patch_stores):
    _, folder = pretrained
    model, sensors, _ = transfer.load_pretrained(folder)
    encoder, sar = model.backbones["sar"], sensors["sar"]
    images = sar.copied(sar.to_float(np.stack([Store(patch_stores["test"]).read(i, "sar", 0) for i in range(6)])))
    before = copy.deepcopy(encoder.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(encoder(images)[:2], encoder(images[:2]))
    assert all(torch.equal(v, before[name]) for name, v in encoder.state_dict().items())


def test_frozen_encoders_do_not_move(pretrained, patch_stores):
    settings, folder = pretrained
    before = transfer.load_pretrained(folder)[0]
    record, classifier = fitted(settings, folder, patch_stores, protocol="linear")
    assert list(classifier.encoders) == ["sar", "optical"]
    for modality, encoder in classifier.encoders.items():
        expected = before.backbones[modality].state_dict()
        assert all(torch.equal(v, expected[name]) for name, v in encoder.state_dict().items())
    assert record["micro"] > transfer.chance(patch_stores["test"])


def test_finetuning_moves_every_weight(pretrained, patch_stores):
    settings, folder = pretrained
    before = transfer.load_pretrained(folder)[0]
    record, classifier = fitted(settings, folder, patch_stores, protocol="finetune", inputs="optical")
    expected = dict(before.backbones["optical"].named_parameters())
    assert len(classifier.encoders) == 1
    encoder = classifier.encoders["optical"]
    assert all(not torch.equal(v, expected[name]) for name, v in encoder.named_parameters())
    assert record["inputs"] == "optical"


def test_score_does_not_depend_on_the_batch_size(pretrained, patch_stores):
    settings, folder = pretrained
    model, _, _ = transfer.load_pretrained(folder)
    classifier = networks.Classifier(model.backbones, classes=3, frozen=True)
    small = config.load("start", {"transfer.batch_size": 7, "transfer.crop_size": 20})
    large = config.load("start", {"transfer.batch_size": 64, "transfer.crop_size": 20})
    one, two = (predicted(classifier, patch_stores["test"], s.transfer) for s in (small, large))
    assert one.shape == (30, 3)
    torch.testing.assert_close(one, two)


def test_record_is_complete_and_reused(pretrained, patch_stores, monkeypatch):
    settings, folder = pretrained
    record = transfer.evaluate(settings, folder, patch_stores, protocol="linear", fraction=0.25)
    assert record["patches"] == {"train": 12, "test": 30} and len(set(record["label_ids"])) == 12
    for key in ("dataset", "method", "seed", "protocol", "inputs", "fraction", "world", "profile", "settings_hash"):
        assert key in record
    assert {"commit", "date", "hardware", "versions"} <= record["provenance"].keys()
    assert record["steps"] == 6 and record["numbers"] == ["micro", "macro"] and record["drawn"] is True
    assert record["dataset"] == "Levels" and record["classes"] == ["high", "medium", "low"]
    monkeypatch.setattr(fitting, "fit", lambda *a, **k: pytest.fail("an evaluation on record was run again"))
    assert transfer.evaluate(settings, folder, patch_stores, protocol="linear", fraction=0.25) == record


def test_unlabelled_store_and_missing_run_are_refused(pretrained, pair_store, patch_stores, tmp_path):
    settings, folder = pretrained
    with pytest.raises(config.ConfigError, match="holds no labels"):
        transfer.evaluate(settings, folder, {"train": pair_store, "test": pair_store}, protocol="linear")
    for some, told in (({}, "none"), ({"train": patch_stores["train"]}, "train")):
        with pytest.raises(config.ConfigError, match=f"stores: {told}; needed: train, test"):
            transfer.evaluate(settings, folder, some, protocol="linear")
    with pytest.raises(FileNotFoundError, match="no finished pretraining"):
        transfer.evaluate(settings, tmp_path, patch_stores, protocol="linear")


@pytest.mark.parametrize(("asked", "allowed"), [("protocol", "linear, finetune"), ("inputs", "both, sar, optical")])
def test_a_misspelt_request_is_refused(pretrained, patch_stores, asked, allowed):
    settings, folder = pretrained
    with pytest.raises(config.ConfigError, match=f"{asked} = 'lineal'; allowed: {allowed}"):
        transfer.evaluate(settings, folder, patch_stores, **{"protocol": "linear", asked: "lineal"})
    with pytest.raises(config.ConfigError, match="dataset = 'bigearth'; allowed: bigearthnet, geonrw.*, levels"):
        transfer.evaluate(settings, folder, patch_stores, dataset="bigearth", protocol="linear")


def test_fine_tuning_that_could_not_take_a_step_is_refused(pretrained, patch_stores):
    settings, folder = pretrained
    with pytest.raises(config.ConfigError, match="batches of 1 .1 labelled images, transfer.batch_size = 16"):
        transfer.evaluate(settings, folder, patch_stores, protocol="finetune", fraction=0.02)
    assert transfer.evaluate(settings, folder, patch_stores, protocol="linear", fraction=0.02)["patches"]["train"] == 1


@pytest.mark.parametrize("fraction", [0, -0.5, 10, float("nan")])
def test_a_share_of_labels_that_is_none_is_refused(pretrained, patch_stores, fraction):
    settings, folder = pretrained
    with pytest.raises(config.ConfigError, match=f"fraction = {fraction}; allowed: a share above 0, up to 1"):
        transfer.evaluate(settings, folder, patch_stores, protocol="linear", fraction=fraction)


@pytest.mark.parametrize("validation, learnt", [(0.01, 48), (0.9, 0)])
def test_images_held_out_must_be_some_and_not_all(pretrained, patch_stores, tmp_path, validation, learnt):
    settings, folder = pretrained
    paths = dict(patch_stores)
    if not learnt:
        paths["train"] = make_store(tmp_path / "one", count=1, seasons=1, labels=True)
    with pytest.raises(
        config.ConfigError, match=f"validation = {validation} of .*: {learnt} are learnt from; at least"
    ):
        transfer.evaluate(changed(settings, validation=validation), folder, paths, protocol="linear")


def test_a_diverged_training_is_not_scored(pretrained, patch_stores):
    settings, folder = pretrained
    wild = changed(settings, learning_rate_finetune=1e30)
    with pytest.raises(
        pretrain.NonFinite, match="finetune-both-1: loss nan in epoch 1; lower transfer.learning_rate_f"
    ):
        transfer.evaluate(wild, folder, patch_stores, protocol="finetune")


def test_a_training_that_diverges_in_its_last_step_is_not_scored(pretrained, patch_stores):
    """No loss is computed after that step, so none tells."""
    settings, folder = pretrained
    wild = changed(settings, learning_rate_finetune=1e30, epochs=1, batch_size=48)
    with pytest.raises(pretrain.NonFinite, match="not finite after the last step; lower transfer.learning_rate_finet"):
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
    monkeypatch.setattr(fitting, "SAVE_SECONDS", 0.0)
    real, steps = evaluation.samples, []

    def signalled(*arguments, **options):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(evaluation, "samples", signalled)
    with pytest.raises(pretrain.Interrupted, match="SIGINT in epoch . of .; the same call goes on"):
        transfer.evaluate(settings, folder, patch_stores, protocol="linear")
    assert list(runs.path(settings, "transfer").glob("*.pt")) and not list(runs.path(settings, "records").glob("*"))
    record = transfer.evaluate(settings, folder, patch_stores, protocol="linear")
    monkeypatch.setattr(evaluation, "samples", real)
    whole = transfer.evaluate(settings.model_copy(update={"profile": "whole"}), folder, patch_stores, protocol="linear")
    assert record["per_class"] == whole["per_class"] and record["micro"] == whole["micro"]


def test_a_signal_in_the_last_step_of_an_evaluation_stops_those_that_follow(pretrained, patch_stores, monkeypatch):
    settings, folder = pretrained
    few = {"protocols": ("linear",), "inputs": ("both",), "fractions": (0.1, 1.0), "epochs": 1}
    settings = settings.model_copy(update={"transfer": settings.transfer.model_copy(update=few)})
    real, signals = evaluation.samples, [signal.SIGTERM]

    def signalled(*arguments, **options):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return real(*arguments, **options)

    monkeypatch.setattr(evaluation, "samples", signalled)
    with pytest.raises(pretrain.Interrupted, match=r"linear-both-0.1: SIGTERM in epoch 1 of 1; the same call goes on"):
        transfer.evaluate_members(settings, {"run": folder}, patch_stores)
    assert len(transfer.evaluate_members(settings, {"run": folder}, patch_stores)) == 2


def test_a_full_disk_costs_the_checkpoint_and_not_the_evaluation(pretrained, patch_stores, monkeypatch, capsys):
    settings, folder = pretrained
    whole = transfer.evaluate(settings.model_copy(update={"profile": "whole"}), folder, patch_stores, protocol="linear")
    monkeypatch.setattr(fitting, "SAVE_SECONDS", 0.0)
    tried = []

    def full(state, file):
        tried.append(file)
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(checkpoints, "save", full)
    record = transfer.evaluate(settings, folder, patch_stores, protocol="linear")
    assert record["per_class"] == whole["per_class"] and len(tried) == 5
    assert "checkpoint not written" in capsys.readouterr().out


def test_own_data_have_their_own_name_and_other_classes_are_refused(pretrained, patch_stores, pair_store, monkeypatch):
    settings, folder = pretrained
    record = transfer.evaluate(settings, folder, patch_stores, dataset="levels", protocol="linear")
    assert record["dataset"] == record["data"]["title"] == "Levels"
    with pytest.raises(config.ConfigError, match="Levels. has 3 classes, bigearthnet has 19; leave dataset out"):
        transfer.evaluate(settings, folder, patch_stores, dataset="bigearthnet", protocol="linear")
    read = Store.__init__

    def silent(self, path):
        read(self, path)
        self.meta.pop("data")

    monkeypatch.setattr(Store, "__init__", silent)
    with pytest.raises(config.ConfigError, match="does not say what it holds; .* name the dataset: bigearthnet"):
        transfer.evaluate(settings, folder, patch_stores, protocol="linear")
    with pytest.raises(config.ConfigError, match="which does not say what it holds. has 3 classes"):
        transfer.evaluate(settings, folder, patch_stores, dataset="bigearthnet", protocol="linear")


def test_classes_in_another_order_are_refused(pretrained, patch_stores, monkeypatch):
    """Their numbers would be written beside other names."""
    settings, folder = pretrained
    monkeypatch.setattr(datasets, "_TABLE", dict(datasets._TABLE))
    like = datasets.find("bigearthnet")
    for classes in (("high", "medium", "low"), ("tall", "medium", "flat")):  # other names for them are no harm
        datasets.register(replace(like, name="levels", task=Scene(classes)))
        record = transfer.evaluate(settings, folder, patch_stores, dataset="levels", protocol="linear")
        assert record["classes"] == [*classes]
    datasets.register(replace(like, name="levels", task=Scene(("medium", "high", "low"))))
    with pytest.raises(config.ConfigError, match="train: its classes are high, medium, low; levels has another order"):
        transfer.evaluate(settings, folder, patch_stores, dataset="levels", protocol="linear")


def test_labels_that_are_none_are_refused_before_any_training(pretrained, patch_stores, monkeypatch):
    settings, folder = pretrained
    read = Store.__init__

    def indices(self, path):
        read(self, path)
        self.labels = self.labels * 2

    monkeypatch.setattr(Store, "__init__", indices)
    monkeypatch.setattr(fitting, "fit", lambda *a, **k: pytest.fail("trained on what are no labels"))
    with pytest.raises(DataError, match="labels of an image are 3 numbers up to 2; expected 0 or 1"):
        transfer.evaluate(settings, folder, patch_stores, protocol="linear")


class Count(Scene):
    """Not which, but how many: another number of outputs, another loss, another score."""

    outputs, metric, numbers = 1, "within one half (%)", ("within", "within")

    def loss(self, outputs, target):
        return torch.nn.functional.mse_loss(outputs[:, 0], target.sum(1))

    def score(self, batches):
        return {"within": 100 * float(torch.cat([(o[:, 0] - y.sum(1)).abs() < 0.5 for o, y in batches]).float().mean())}


def test_a_task_from_outside_is_trained_and_scored(pretrained, patch_stores, monkeypatch):
    settings, folder = pretrained
    known = datasets.find("bigearthnet")
    classes = ("high", "medium", "low")
    monkeypatch.setitem(datasets._TABLE, "counts", replace(known, name="counts", task=Count(classes)))
    longer = changed(settings, epochs=40, milestones=(30,))
    record, classifier = fitted(longer, folder, patch_stores, dataset="counts", protocol="linear")
    assert classifier.head.out_features == 1 and record["metric"] == "within one half (%)" and record["within"] > 60
    assert record["settings"]["task"] == "Count"


def test_runs_with_numbered_modalities_are_refused_by_name(pretrained, patch_stores, tmp_path):
    settings, folder = pretrained
    state = checkpoints.load(folder / "final.pt")
    state["model"] = {k.replace("backbones.sar.", "backbone_1."): v for k, v in state["model"].items()}
    checkpoints.save(state, tmp_path / "old" / "final.pt")
    with pytest.raises(config.ConfigError, match=r"old/final.pt: of an earlier version, .*numbers.*backbone_1.*remove"):
        transfer.evaluate(settings, tmp_path / "old", patch_stores, protocol="linear")


def test_any_modalities_of_several_are_given_by_name(pretrained, patch_stores, tmp_path):
    """A run on three, of which the stores hold two."""
    settings, folder = pretrained
    state = checkpoints.load(folder / "final.pt")
    sar = state["preprocessing"]["sar"]
    state["preprocessing"] = {"more": {**sar, "name": "more"}, **state["preprocessing"]}
    channels = {"more": 2, "sar": 2, "optical": 13}
    state["model"] = MultimodalModel("small", channels, settings.projector).state_dict()
    checkpoints.save(state, tmp_path / "three" / "final.pt")
    record, classifier = fitted(settings, tmp_path / "three", patch_stores, protocol="linear", inputs="optical+sar")
    assert record["inputs"] == "sar+optical" and list(classifier.encoders) == ["sar", "optical"]
    for inputs in ("both", "more+sar"):
        with pytest.raises(DataError, match="more"):
            transfer.evaluate(settings, tmp_path / "three", patch_stores, protocol="linear", inputs=inputs)
    with pytest.raises(config.ConfigError, match="inputs = 'sar.dem'; allowed: both, more, sar, optical, or several"):
        transfer.evaluate(settings, tmp_path / "three", patch_stores, protocol="linear", inputs="sar+dem")


def test_few_labels_get_as_many_updates_as_asked_for_and_the_schedule_stretches():
    t = SimpleNamespace(iterations=0, epochs=10, min_updates=300, schedule="steps", milestones=(6, 8))
    assert fitting.length(t, batches=100) == (1000, 100)
    total, per_epoch = fitting.length(t, batches=7)
    assert total == 301 and total % 7 == 0
    rates = [fitting.share(t, step, per_epoch, total) for step in range(total)]
    assert rates.count(1) == 181 and rates.count(pytest.approx(0.1)) == 60  # 60, 20 and 20 %
    assert fitting.length(SimpleNamespace(iterations=50, epochs=10, min_updates=0), batches=7) == (50, 7)


def test_an_evaluation_of_few_labels_takes_them(pretrained, patch_stores):
    settings, folder = pretrained
    more = changed(settings, min_updates=13)
    record = transfer.evaluate(more, folder, patch_stores, protocol="linear", fraction=0.4)
    assert record["patches"]["train"] == 19 and record["steps"] == 14 >= more.transfer.min_updates
