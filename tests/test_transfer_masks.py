"""Segmentation transfer: the right network for every request, exact scores, evaluations that survive a kill."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from decur_core import config, model, pretrain, transfer
from decur_core.data import datasets, tasks
from decur_core.data.datasets import modalities_of
from decur_core.data.geonrw import CLASSES
from decur_core.data.raster import DataError
from decur_core.data.store import Store, StoreWriter
from decur_core.data.tasks import Masks
from decur_core.running import folders as runs
from decur_core.transfer import encoders, evaluation, fitting, networks
from decur_core.transfer import fcn as segmentation

SMALL = {"projector": [16, 8], "dim_common": 6, "crop_size": 20, "batch_size": 8, "epochs": 1, "device": "cpu"}
TRANSFER = {"epochs": 3, "batch_size": 8, "crop_size": 20, "optimizer": "adamw", "learning_rate_finetune": 0.01}


def make(path, pair, count, seed):
    """Images whose mask follows their brightness; a border of unlabelled pixels."""
    random, modalities, k = np.random.default_rng(seed), modalities_of(pair), 12 if pair == "rgb_depth" else 8
    bands = {m.name: (len(m.bands), 3 * k, 4 * k) for m in modalities}
    meta = {"preprocessing": {m.name: m.mapping() for m in modalities}}
    shapes, ids = bands | {"mask": (1, 3 * k, 4 * k)}, [f"{i}" for i in range(count)]
    with StoreWriter(path, ids=ids, shapes=shapes, seasons=1, meta=meta) as writer:
        for name in ids:
            truth = np.kron(random.integers(1, 5, (3, 4)), np.ones((k, k))).astype(np.uint8)
            images = {m: (40 * truth + random.integers(0, 40, shape)).astype(np.uint8) for m, shape in bands.items()}
            truth[0] = truth[:, 0] = 0
            writer.put(name, {m: x[None] for m, x in images.items()} | {"mask": truth[None, None]})
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    return {
        pair: {s: make(folder / f"{pair}-{s}", pair, 24, k) for k, s in enumerate(("train", "test"))}
        for pair in ("rgb_dem", "rgb_depth")
    }


@pytest.fixture
def settings(tmp_path):
    def load(pair="rgb_dem", **overrides):
        base = {**SMALL, "runs": str(tmp_path / "runs"), "transfer": TRANSFER}
        return config.load("start", {**base, **overrides}, pair=pair)

    return load


def test_pixels_of_a_training_that_diverges_in_its_last_step_are_not_taken_for_the_first_class(settings, stores):
    wild = settings(transfer={**TRANSFER, "epochs": 1, "batch_size": 24, "learning_rate_finetune": 1e30})
    folder = pretrain.run(wild, stores["rgb_dem"]["train"])
    with pytest.raises(pretrain.NonFinite, match="not finite after the last step"):
        transfer.evaluate(wild, folder, stores["rgb_dem"], dataset="geonrw", protocol="finetune")


def test_a_frozen_and_a_fine_tuned_fcn_learn_and_are_scored_over_the_whole_set(settings, stores, monkeypatch):
    chosen, paths = settings(transfer={**TRANSFER, "epochs": 30}), stores["rgb_dem"]
    folder, caught = pretrain.run(chosen, paths["train"]), []
    predicted = fitting.predictions
    monkeypatch.setattr(fitting, "predictions", lambda n, *a: caught.append(n) or predicted(n, *a))
    for protocol, inputs in (("linear", "both"), ("finetune", "dem")):
        record = transfer.evaluate(chosen, folder, paths, dataset="geonrw", protocol=protocol, inputs=inputs)
        network, test = caught[-1], Store(paths["test"])
        assert isinstance(network, segmentation.FCN) and len(network.encoders) == (2 if inputs == "both" else 1)
        assert record["network"] == "FCN" and record["metric"] == "mIoU (%)" and record["dataset"] == "GeoNRW"
        modalities = encoders.given(modalities_of("rgb_dem"), inputs)
        whole = [encoders.stored(test, m.name, range(24)).float() / 255 for m in modalities]
        whole = [x.repeat(1, m.copies, 1, 1) for x, m in zip(whole, modalities, strict=True)]
        with torch.inference_mode():
            found = network.eval()(*whole).argmax(1)
        truth = encoders.stored(test, "mask", range(24))[:, 0].long() - 1
        kinds = {"num_classes": 10, "ignore_index": -1}
        seen = sorted(set(found[truth >= 0].tolist()) | set(truth[truth >= 0].tolist()))
        iou = 100 * MulticlassJaccardIndex(average="none", **kinds)(found, truth)
        assert record["miou"] == pytest.approx(float(iou[seen].mean()), abs=1e-3)
        accuracy = 100 * MulticlassAccuracy(average="micro", **kinds)(found, truth)
        assert record["accuracy"] == pytest.approx(float(accuracy), abs=1e-3)
    assert record["accuracy"] > 60, "brightness tells the class"
    start = transfer.load_pretrained(folder)[0].backbones["rgb"].state_dict()
    assert all(torch.equal(v, start[k]) for k, v in caught[0].encoders["rgb"].state_dict().items())
    examples = transfer.example_predictions(record, chosen, paths, count=3)
    assert [e["predicted"].shape for e in examples] == [(24, 32)] * 3 and examples[0]["predicted"].min() >= 1


def predictions(network, path, t):
    """Batches of predictions and targets of every image of a store of the pair."""
    kind, store = networks.NETWORKS["fcn"], Store(path)

    def samples(rows):
        looks = [(m, 0) for m in modalities_of("rgb_dem")]
        return networks.samples(kind, Masks(CLASSES[1:]), looks, t, store, rows, device="cpu")

    return fitting.predictions(network, kind, samples, range(len(store)), t)


def test_scores_do_not_depend_on_the_batch(settings, stores):
    network = segmentation.FCN(model.build(config.identity(settings()), {"rgb": 3, "dem": 3}).backbones, classes=10)
    counts = []
    for size in (5, 24):
        t = settings(transfer={**TRANSFER, "batch_size": size}).transfer
        counts.append(tasks.confusion(predictions(network, stores["rgb_dem"]["test"], t), 10))
    assert torch.equal(*counts) and counts[0].sum() == 24 * 23 * 31


def test_every_image_is_predicted_once(settings, stores, monkeypatch):
    chosen, paths, seen = settings(transfer={**TRANSFER, "epochs": 1}), stores["rgb_dem"], []
    folder, predict = pretrain.run(chosen, paths["train"]), segmentation.predict

    def counted(network, images, **options):
        seen.append(predict(network, images, **options))
        return seen[-1]

    monkeypatch.setattr(segmentation, "predict", counted)
    record = transfer.evaluate(chosen, folder, paths, dataset="geonrw", protocol="linear")
    assert [len(x) for x in seen] == [8, 8, 8]
    found = transfer.example_predictions(record, chosen, paths, count=99)
    assert len(found) == evaluation.EXAMPLES
    for example, predicted in zip(found, seen[0], strict=True):
        np.testing.assert_array_equal(example["predicted"], predicted.numpy() + 1)
    network = segmentation.FCN(transfer.load_pretrained(folder)[0].backbones, classes=10)
    few, examples = settings(transfer={**TRANSFER, "batch_size": 5}), []
    list(evaluation._noting(predictions(network, paths["test"], few.transfer), examples))
    assert len(examples) == evaluation.EXAMPLES


def test_a_damaged_checkpoint_of_an_evaluation_is_named_and_replaced(settings, stores, capsys):
    chosen, paths = settings(transfer={**TRANSFER, "epochs": 1}), stores["rgb_dem"]
    folder, kinds = pretrain.run(chosen, paths["train"]), {"dataset": "geonrw", "protocol": "linear"}
    whole = transfer.evaluate(chosen, folder, paths, **kinds)
    (file,) = runs.path(chosen, "records").glob("*.json")
    runs.write_text(runs.path(chosen, "transfer", f"{file.stem}.pt"), "torn")
    runs.write_text(runs.path(chosen, "transfer", f".{file.stem}.pt.123"), "of a process that was killed")
    file.unlink()
    assert transfer.evaluate(chosen, folder, paths, **kinds)["per_class"] == whole["per_class"]
    assert f"{file.stem}.pt cannot be read (BadZipFile" in capsys.readouterr().out
    assert not list(runs.path(chosen, "transfer").iterdir())


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_score(settings, stores, monkeypatch):
    chosen, paths = settings(), stores["rgb_dem"]
    folder, kinds = pretrain.run(chosen, paths["train"]), {"dataset": "geonrw", "protocol": "finetune"}
    whole = transfer.evaluate(chosen, folder, paths, **kinds)
    (file,) = runs.path(chosen, "records").glob("*.json")
    file.unlink()

    loss, calls = Masks.loss, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 8:  # in the third epoch of three steps each
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(fitting, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(Masks, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        transfer.evaluate(chosen, folder, paths, **kinds)
    again = transfer.evaluate(chosen, folder, paths, **kinds)
    assert len(calls) == 8 + 3, "the first two epochs are not repeated"
    assert [again[k] for k in ("miou", "accuracy", "per_class")] == [
        whole[k] for k in ("miou", "accuracy", "per_class")
    ]
    assert not list(runs.path(chosen, "transfer").glob("*.pt"))


def test_cmx_starts_from_the_pretrained_transformers_and_refuses_what_it_cannot_do(settings, stores, monkeypatch):
    options = {"backbone": "mit_b0", "method": "random", "transfer": {**TRANSFER, "segmenter": "cmx", "epochs": 1}}
    chosen, paths, built = settings("rgb_depth", **options), stores["rgb_depth"], []
    folder = pretrain.run(chosen, paths["train"])
    fit = fitting.fit
    monkeypatch.setattr(
        fitting,
        "fit",
        lambda n, *a, **k: built.append({k: v.clone() for k, v in n.state_dict().items()}) or fit(n, *a, **k),
    )
    record = transfer.evaluate(chosen, folder, paths, dataset="sunrgbd", protocol="finetune")
    assert record["network"] == "CMX" and 0 <= record["miou"] <= 100
    start = transfer.load_pretrained(folder)[0].backbones["hha"].state_dict()
    assert all(torch.equal(built[0][f"backbone.extra_{k}"], v) for k, v in start.items())
    for kinds in ({"protocol": "linear"}, {"protocol": "finetune", "inputs": "rgb"}):
        with pytest.raises(config.ConfigError, match="segmenter = 'cmx'.*needs finetune and both"):
            transfer.evaluate(chosen, folder, paths, dataset="nyuv2", **kinds)
    two = [*config.modalities(chosen)] * 2  # of two seasons
    for given in (two, two[::2]):
        with pytest.raises(config.ConfigError, match="both of two modalities, each once with 3 channels"):
            networks.NETWORKS["cmx"].build(None, {"backbone": "mit_b0"}, given, 38, False)
    others = settings(
        "rgb_depth", name="small", method="random", backbone="small", transfer={**TRANSFER, "segmenter": "cmx"}
    )
    folder = pretrain.run(others, paths["train"])
    with pytest.raises(config.ConfigError, match="backbone small; it needs finetune and both of two .*Mix Transformer"):
        transfer.evaluate(others, folder, paths, dataset="nyuv2", protocol="finetune")


def test_rows_that_say_nothing_are_left_out(settings, stores):
    sweep = {"method": ["decur", "random", "supervised", "barlow_twins_single"]}
    both = {**TRANSFER, "protocols": ["linear", "finetune"], "inputs": ["both", "rgb"], "epochs": 1}
    chosen = settings(sweep=sweep, transfer=both)
    folders = pretrain.run_members(chosen, stores["rgb_dem"]["train"])
    records = transfer.evaluate_members(chosen, folders, stores["rgb_dem"], dataset="geonrw")
    found = {(r["method"], r["protocol"], r["inputs"]) for r in records}
    expected = {("decur", p, i) for p in ("linear", "finetune") for i in ("both", "rgb")}
    expected |= {("random", "linear", i) for i in ("both", "rgb")} | {
        ("supervised", "finetune", i) for i in ("both", "rgb")
    }
    assert found == expected | {("barlow_twins_single", p, "rgb") for p in ("linear", "finetune")}


@pytest.mark.parametrize("ignore", [0, 2, 3, 255])
def test_any_value_may_mean_unlabelled(ignore):
    task, values = Masks(("a", "b", "c"), ignore=ignore), [v for v in range(5) if v != ignore][:3]
    masks = torch.tensor([[*values, ignore]], dtype=torch.uint8)
    task.check(masks)
    assert task.target(masks).tolist() == [[0, 1, 2, tasks.IGNORE]]
    assert torch.equal(task.picture(torch.tensor([0, 1, 2])), masks[0, :3])
    beyond = next(v for v in range(max(values) + 1, 9) if v != ignore)
    with pytest.raises(DataError, match=f"hold the value {beyond}; expected 3 classes"):
        task.check(torch.tensor([[0, beyond]], dtype=torch.uint8))


def test_masks_of_other_classes_are_refused_before_any_training(settings, stores, monkeypatch):
    chosen, paths = settings(), stores["rgb_dem"]
    folder = pretrain.run(chosen, paths["train"])
    monkeypatch.setattr(fitting, "fit", lambda *a, **k: pytest.fail("trained on masks of other classes"))
    few = replace(datasets.find("geonrw"), name="few", task=Masks(("a", "b", "c")))
    monkeypatch.setitem(datasets._TABLE, "few", few)
    with pytest.raises(DataError, match="masks hold the value 4; expected 3 classes, up to 3, and 0 for unlabelled"):
        transfer.evaluate(chosen, folder, paths, dataset="few", protocol="linear")


def test_rates_follow_the_schedules_of_the_paper_and_of_cmx():
    def rates(**transfer_settings):
        t = config.load("start", {"transfer": transfer_settings}).transfer
        return [fitting.share(t, step, 10, 100) for step in (0, 5, 59, 60, 80, 99)]

    assert rates(schedule="steps", milestones=[6, 8]) == pytest.approx([1, 1, 1, 0.1, 0.01, 0.01])
    assert rates(schedule="constant") == [1] * 6
    expected = [0, 0.5, 0.41**0.9, 0.4**0.9, 0.2**0.9, 0.01**0.9]
    assert rates(schedule="polynomial", warmup_epochs=1) == pytest.approx(expected)


def test_a_store_without_masks_is_refused_before_any_work(settings, stores, pair_store, tiny):
    chosen = tiny(epochs=1)
    folder = pretrain.run(chosen, pair_store)
    with pytest.raises(config.ConfigError, match="holds no masks"):
        transfer.evaluate(
            chosen, folder, {"train": pair_store, "test": pair_store}, dataset="geonrw", protocol="linear"
        )


def test_presence_tells_from_masks_which_classes_cover_enough_of_an_image():
    mask = torch.zeros(2, 10, 10, dtype=torch.uint8)  # 0 is unlabelled
    mask[0, 0, :2], mask[0, 1, :1], mask[1] = 1, 2, 3
    task = tasks.Presence(("a", "b", "c"))
    assert task.target(mask).tolist() == [[1, 0, 0], [0, 0, 1]], "2 % and all of it, not 1 %"
    assert task.numbers == ("micro", "macro") and task.outputs == 3 and not task.dense
    with pytest.raises(DataError, match="value 4"):
        task.check(torch.full_like(mask, 4))


def test_images_held_out_of_training_are_scored_and_further_sets_too(settings, stores):
    paths = {**stores["rgb_dem"], "elsewhere": stores["rgb_dem"]["test"]}
    chosen = settings(transfer={**TRANSFER, "epochs": 1})
    folder, how = pretrain.run(chosen, paths["train"]), {"dataset": "geonrw", "protocol": "linear"}
    record = transfer.evaluate(chosen, folder, paths, **how)
    assert record["further"]["elsewhere"]["miou"] == record["miou"] and record["split"] == "test"
    held = transfer.evaluate(settings(transfer={**TRANSFER, "epochs": 1, "validation": 0.25}), folder, paths, **how)
    whole = len(Store(paths["train"]))
    assert held["patches"] == {"train": whole - round(whole / 4), "test": round(whole / 4)}
    assert held["split"] == "validation" and not held["further"] and held["evaluation"] != record["evaluation"]
    shown, train = transfer.example_predictions(held, chosen, paths), Store(paths["train"])
    assert [example["id"] for example in shown] == [f"drawn {19 + i}" for i in range(6)]
    for i, example in enumerate(shown, start=held["patches"]["train"]):
        np.testing.assert_array_equal(example["mask"], train.read(i, "mask", 0)[0])
    few = transfer.evaluate(
        settings(transfer={**TRANSFER, "epochs": 1, "validation": 0.25}), folder, paths, **how, fraction=0.5
    )
    assert set(few["label_ids"]) <= set(Store(paths["train"]).ids[: held["patches"]["train"]])


def test_masks_of_another_grid_than_the_images_are_refused_before_training(settings, stores, tmp_path):
    folder = pretrain.run(chosen := settings(), stores["rgb_dem"]["train"])
    sizes = {"rgb": (3, 24, 32), "dem": (1, 24, 31), "mask": (1, 24, 32)}
    meta = Store(stores["rgb_dem"]["test"]).meta
    with StoreWriter(tmp_path / "odd", ids=["0"], shapes=sizes, seasons=1, meta=meta) as writer:
        writer.put("0", {name: np.ones((1, *size), np.uint8) for name, size in sizes.items()})
    paths = {**stores["rgb_dem"], "test": tmp_path / "odd"}
    with pytest.raises(config.ConfigError, match=r"odd: .*'dem': \(24, 31\), 'mask': \(24, 32\).*one grid"):
        transfer.evaluate(chosen, folder, paths, dataset="geonrw", protocol="linear")


def test_networks_see_the_seasons_that_are_asked_for(settings, tmp_path):
    random, paths = np.random.default_rng(0), {part: tmp_path / part for part in ("train", "test")}
    bands = {m.name: (len(m.bands), 24, 24) for m in modalities_of("rgb_dem")}
    meta = {"preprocessing": {m.name: m.mapping() for m in modalities_of("rgb_dem")}}
    meta["data"] = {"name": "floods", "title": "floods", "classes": ["dry", "flooded"]}
    for path in paths.values():
        shapes, ids = bands | {"mask": (1, 24, 24)}, [f"{i}" for i in range(24)]
        with StoreWriter(path, ids=ids, shapes=shapes, seasons=2, meta=meta) as writer:
            for i, name in enumerate(ids):
                images = {m: random.integers(0, 60, (2, *shape), np.uint8) for m, shape in bands.items()}
                mask = np.ones((2, 1, 24, 24), np.uint8)
                mask[:, :, :12] += i % 2
                images["rgb"][1, :, :12] += 180 * (i % 2)  # what is flooded is bright, after the flood alone
                writer.put(name, images | {"mask": mask})
    chosen = settings(transfer={**TRANSFER, "epochs": 40, "learning_rate_linear": 0.05})
    folder, scores = pretrain.run(chosen, paths["train"]), {}
    for seasons in ("", "1", "0+1"):
        record = transfer.evaluate(chosen, folder, paths, protocol="linear", inputs="rgb", seasons=seasons)
        scores[seasons] = record["miou"]
        assert record["given"] == [["rgb", int(s)] for s in (seasons or "0").split("+")]
    assert scores["1"] > scores[""] + 20 and scores["0+1"] > scores[""] + 20, scores
    with pytest.raises(config.ConfigError, match="transfer.seasons = '2'"):
        transfer.evaluate(chosen, folder, paths, protocol="linear", seasons="2")
