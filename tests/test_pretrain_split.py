"""Runs that find their split, of three modalities, of measured ones; and what earlier versions have left."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_store
from test_distributed import LOOP, assert_same_run, result
from test_pretrain import final, same_weights, stop_after

from decur_core import config, export, pretrain
from decur_core.data import prepare
from decur_core.data.arrays import load
from decur_core.data.modality import DEM, OPTICAL, SAR, Modality
from decur_core.data.raster import DataError
from decur_core.data.store import Store
from decur_core.explain import split
from decur_core.running import checkpoints, history
from decur_core.running import folders as runs

BLOCKS = {"sar+optical+dem": 3, "sar+optical": 2, "sar": 2, "optical": 1, "dem": 4}
LAST = 5  # of 16 steps that come before the split: auto_share 0.3


@pytest.fixture
def halves(monkeypatch):
    """An estimate that asks for less than 64 samples: half of the width is common; what it was given is noted."""
    given = []

    def found(z, width):
        given.append({m: [h.clone() for h in both] for m, both in z.items()})
        common = {"dim_common": width // 2} if len(z) == 2 else {"blocks": BLOCKS}
        return common | {"spectra": {m: [float(h.sum()) for h in both] for m, both in z.items()}}

    monkeypatch.setattr(split, "found", found)
    return given


def folder_of(settings) -> Path:
    return runs.path(settings, "pretrain", runs.title(settings))


def test_the_split_is_found_on_the_way_and_used_from_then_on(tiny, pair_store, halves):
    folder = pretrain.run(tiny(dim_common="auto"), pair_store)
    lines, end = history.read(folder), final(folder)
    intra = {"intra/sar", "intra/optical", "total"}
    named = [{*line} - {"step", "learning_rate", "pairs_per_second"} for line in lines]
    assert named == [intra] * LAST + [intra | {"common", "unique"}] * (16 - LAST)
    for line in lines:
        terms = {*line} & {"intra/sar", "intra/optical", "common", "unique"}
        assert line["total"] == pytest.approx(sum(line[t] for t in terms), rel=1e-5)
    assert end["settings"]["dim_common"] == "auto" and end["split"] == json.loads((folder / "split.json").read_text())
    assert end["split"]["dim_common"] == 4 and end["split"]["samples"] == 32
    (features,) = halves
    assert {m: [tuple(h.shape) for h in both] for m, both in features.items()} == {
        m: [(32, 128)] * 2 for m in ("sar", "optical")
    }
    # The first five steps are those of the weights, views and rates that a run with a known split has.
    known = history.read(pretrain.run(tiny(dim_common=4, name="known"), pair_store))
    assert lines[0]["intra/sar"] == known[0]["intra/sar"] and lines[LAST]["total"] != known[LAST]["total"]


@pytest.mark.parametrize("step", [2, LAST - 1, LAST, LAST + 1, 12])
def test_interrupted_around_the_split_a_run_ends_bit_for_bit_as_without(tiny, pair_store, halves, monkeypatch, step):
    whole = pretrain.run(tiny(dim_common="auto", name="whole"), pair_store)
    settings, calls = tiny(dim_common="auto", name="stopped"), stop_after(step, monkeypatch)
    with pytest.raises(pretrain.Interrupted, match=f"after step {step} of 16"):
        pretrain.run(settings, pair_store)
    kept = torch.load(folder_of(settings) / f"checkpoint-{step:09d}.pt", weights_only=True)
    assert (kept["split"] is not None) == (folder_of(settings) / "split.json").exists() == (step >= LAST)
    again = pretrain.run(settings, pair_store)
    assert len(calls) == 16 and len(halves) == 2, "it is looked for once in a run"
    assert same_weights(final(whole), final(again)) and final(whole)["split"] == final(again)["split"]
    assert (whole / "split.json").read_text() == (again / "split.json").read_text()


def test_killed_between_the_split_and_the_next_checkpoint_it_is_found_again(tiny, pair_store, halves, monkeypatch):
    whole = pretrain.run(tiny(dim_common="auto", name="whole"), pair_store)
    settings, real, calls = tiny(dim_common="auto", name="killed"), pretrain.loss, []

    def killed_in_step_6(*arguments):
        calls.append(1)
        if len(calls) == LAST + 1:
            raise KeyError("killed")
        return real(*arguments)

    monkeypatch.setattr(pretrain, "loss", killed_in_step_6)
    with pytest.raises(KeyError):
        pretrain.run(settings, pair_store)
    assert (folder_of(settings) / "split.json").exists()
    again = pretrain.run(settings, pair_store)
    assert len(calls) == 6 + 13 and len(halves) == 3  # from the checkpoint of step 3 on
    assert same_weights(final(whole), final(again)) and final(whole)["split"] == final(again)["split"]


def test_the_last_step_at_the_latest_has_a_split_and_a_run_of_one_step_is_refused(tiny, pair_store, halves):
    folder = pretrain.run(tiny(dim_common="auto", auto_share=0.99), pair_store)
    assert "common" not in history.read(folder)[14] and "common" in history.read(folder)[15]
    with pytest.raises(config.ConfigError, match="dim_common = 'auto' in 1 step; it needs one before and one after"):
        pretrain.run(tiny(dim_common="auto", epochs=1, batch_size=32, name="short"), pair_store)


def test_one_batch_at_least_is_looked_at(tiny, pair_store, halves, monkeypatch):
    monkeypatch.setattr(pretrain, "ESTIMATED", 4)
    assert final(pretrain.run(tiny(dim_common="auto"), pair_store))["split"]["samples"] == 8


def test_methods_without_a_split_look_for_none(tiny, pair_store, halves):
    folder = pretrain.run(tiny(dim_common="auto", method="barlow_twins"), pair_store)
    assert not halves and final(folder)["split"] is None and not (folder / "split.json").exists()


def test_the_estimate_itself_takes_what_a_run_gives(tiny, tmp_path):
    store = make_store(tmp_path / "store", count=96, seasons=2, labels=False)
    folder = pretrain.run(tiny(dim_common="auto", epochs=1, batch_size=16), store)
    found = final(folder)["split"]
    assert 0 <= found["dim_common"] <= 8 and found["samples"] == 96
    assert {*found["spectra"]} == {"sar", "optical", "sar+optical"}


@pytest.fixture(scope="module")
def three_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    return make_store(folder / "store", count=32, seasons=2, labels=False, modalities=(SAR, OPTICAL, DEM))


THREE = {"pair": "sar_optical_dem", "blocks": BLOCKS, "transfer.inputs": ["both"]}


def test_three_modalities_train_with_their_blocks_and_resume(tiny, three_store, monkeypatch):
    whole = pretrain.run(tiny(**THREE, name="whole"), three_store)
    lines, end = history.read(whole), final(whole)
    pairs = ("sar+optical", "sar+dem", "optical+dem")
    terms = {f"intra/{m}" for m in ("sar", "optical", "dem")} | {f"{t}/{p}" for t in ("common", "rest") for p in pairs}
    assert {*lines[0]} == {"step", "learning_rate", "pairs_per_second", "total", *terms}
    for line in lines:
        assert line["total"] == pytest.approx(sum(line[t] for t in terms), rel=1e-5)
    last = {m: end["model"][f"projectors.{m}.6.weight"].shape[0] for m in ("sar", "optical", "dem")}
    assert last == {"sar": 7, "optical": 6, "dem": 7}
    assert end["model"]["backbones.dem.0.weight"].shape[1] == 3 and end["trained"] == ["sar", "optical", "dem"]
    stop_after(7, monkeypatch)
    with pytest.raises(pretrain.Interrupted):
        pretrain.run(tiny(**THREE, name="stopped"), three_store)
    assert same_weights(end, final(pretrain.run(tiny(**THREE, name="stopped"), three_store)))


def test_blocks_in_another_order_are_other_columns_and_refused(tiny, pair_store, monkeypatch):
    blocks = {"sar+optical": 4, "sar": 2, "optical": 3}
    stop_after(7, monkeypatch)
    with pytest.raises(pretrain.Interrupted):
        pretrain.run(tiny(blocks=blocks), pair_store)
    for _ in ("on the way", "at the end"):
        with pytest.raises(config.ConfigError, match=r"other settings \(blocks: .*'sar\+optical': 4.* there, .* now\)"):
            pretrain.run(tiny(blocks=dict(reversed(blocks.items()))), pair_store)
        pretrain.run(tiny(blocks=blocks), pair_store)


def test_three_modalities_find_their_blocks(tiny, three_store, halves, monkeypatch):
    settings = {"pair": "sar_optical_dem", "blocks": {}, "dim_common": "auto", "transfer.inputs": ["both"]}
    wide = BLOCKS | {"sar": 3, "optical": 3, "dem": 5}  # each modality's widths add up to 8
    monkeypatch.setattr(split, "found", lambda z, width: {"blocks": wide, "spectra": {}})
    folder = pretrain.run(tiny(**settings), three_store)
    lines = history.read(folder)
    assert "common/sar+dem" not in lines[LAST - 1] and "common/sar+dem" in lines[LAST]
    assert final(folder)["split"]["blocks"] == wide


def test_every_method_takes_three_modalities(tiny, three_store):
    for method in ("barlow_twins", "vicreg", "clip", "simclr", "barlow_twins_single", "random"):
        folder = pretrain.run(tiny(method=method, pair="sar_optical_dem", epochs=1), three_store)
        trained = {"random": [], "barlow_twins_single": ["sar"]}.get(method, ["sar", "optical", "dem"])
        assert final(folder)["trained"] == trained
        assert all(math.isfinite(line["total"]) for line in history.read(folder))


def test_two_processes_train_three_modalities_as_one_does(tiny, three_store):
    # LARS, as AdamW makes of a gradient that is 0 but for rounding a whole step in one direction or the other.
    options = THREE | LOOP | {"epochs": 1, "optimizer": "lars", "learning_rate": 0.2, "learning_rate_biases": 0.005}
    one = result(pretrain.run(tiny(**options, name="one"), three_store))
    two = result(pretrain.run(tiny(**options, name="two", processes=2), three_store))
    terms = [name for name in one[1][0] if "/" in name]
    assert_same_run(two, one, tolerance=1e-4, names=["total", *terms])


def test_two_processes_find_the_split_that_one_finds(tmp_path, tiny):
    store = make_store(tmp_path / "store", count=96, seasons=2, labels=False)
    options = LOOP | {"dim_common": "auto", "epochs": 1}
    one, two = (pretrain.run(tiny(**options, name=f"of{n}", processes=n), store) for n in (1, 2))
    a, b = final(one)["split"], final(two)["split"]
    assert a["dim_common"] == b["dim_common"] and a["samples"] == b["samples"] == 96
    for name, values in a["spectra"].items():
        np.testing.assert_allclose(b["spectra"][name], values, atol=1e-3)
    assert_same_run(result(two), result(one), names=["total"])


LIDAR = {"bands": ["height", "strength"], "unit": "metres and counts"}
MEASURED = {"modalities": {"lidar": LIDAR}, "datasets": {"town": {"modalities": ["sar", "lidar"]}}, "pair": "town"}


def test_a_measured_mapping_of_the_store_goes_with_the_run(tiny, tmp_path):
    lidar = Modality(
        name="lidar", **LIDAR, valid_range=(-3.4e38, 3.4e38), scheme="range_8bit", low=(0.0, 1.0), high=(30.0, 9.0)
    )
    store = make_store(tmp_path / "store", count=32, seasons=1, labels=False, modalities=(SAR, lidar))
    settings = tiny(**MEASURED, **{"transfer.inputs": ["both"], "epochs": 1})
    assert config.modalities(settings)[1].scheme == "measured"
    folder = pretrain.run(settings, store)
    assert final(folder)["preprocessing"] == {"sar": SAR.mapping(), "lidar": json.loads(json.dumps(lidar.mapping()))}
    _, metadata = export.load(export.write(folder, tmp_path / "out", "lidar"))
    assert metadata["preprocessing"]["low"] == [0.0, 1.0]
    assert "per band, 0 to 30, 1 to 9 becomes 0 to 255" in (tmp_path / "out" / "README.md").read_text()


def test_own_folders_are_measured_converted_and_trained(tmp_path):
    random, root = np.random.default_rng(0), tmp_path / "town"
    for sensor, bands in (("sar", 2), ("lidar", 2)):
        (root / sensor).mkdir(parents=True)
        for i in range(8):
            values = random.normal(-12 if sensor == "sar" else 20, 3, (bands, 24, 24)).astype(np.float32)
            np.save(root / sensor / f"{i}.npy", values)
    places = {"data.roots": {"town": str(root)}, "data.stores": str(tmp_path / "stores"), "data.processes": 0}
    options = {**TINY, **MEASURED, **places, "runs": str(tmp_path / "runs"), "transfer.inputs": ["both"], "epochs": 1}
    settings = config.load("start", options)
    path = prepare.pretraining_store(settings)
    mapping = Store(path).meta["preprocessing"]["lidar"]
    assert mapping["scheme"] == "range_8bit"
    state = final(pretrain.run(settings, path))
    assert state["preprocessing"]["lidar"] == mapping and state["data"]["name"] == "town"


def test_what_the_store_says_of_its_data_is_in_every_file_of_a_run(tiny, pair_store, monkeypatch):
    settings, said = tiny(), {"name": "noise", "title": "Noise", "drawn": False, "source": "own"}
    stop_after(7, monkeypatch)
    with pytest.raises(pretrain.Interrupted):
        pretrain.run(settings, pair_store)
    folder = folder_of(settings)
    assert torch.load(checkpoints.files(folder)[-1], weights_only=True)["data"] == said
    pretrain.run(settings, pair_store)
    assert final(folder)["data"] == json.loads((folder / "run.json").read_text())["data"] == said


@pytest.mark.parametrize("where", ["final.pt", "checkpoint-000000003.pt"])
def test_a_run_of_an_earlier_version_is_refused_by_name(tiny, pair_store, where):
    settings = tiny()
    folder = folder_of(settings)
    folder.mkdir(parents=True)
    state = {"model": {"backbone_1.0.weight": torch.zeros(2)}, "settings": config.identity(settings), "step": 3}
    torch.save(state, folder / where)
    with pytest.raises(
        config.ConfigError, match=rf"{where}: of an earlier version.*\(backbone_1.0.weight\).*another `name`"
    ):
        pretrain.run(settings, pair_store)
    assert {f.name for f in folder.iterdir()} <= {".lock", where}
    (folder / "run.json").write_text("{}")
    if where == "final.pt":
        with pytest.raises(SystemExit, match="not exported: .*final.pt: of an earlier version"):
            export.main([str(folder), str(folder / "out")])


def test_a_store_of_an_earlier_version_is_refused_by_name(tiny, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "data.mdb").write_bytes(b"lmdb")
    with pytest.raises(DataError, match=r"store: a store of an earlier version \(data.mdb\); remove it and convert"):
        pretrain.run(tiny(), tmp_path / "store")
    with pytest.raises(DataError, match="of an earlier version"):
        load(tmp_path / "store")
