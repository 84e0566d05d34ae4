"""Both ways of each benchmark compute the same thing, and each command writes its record. No times are asserted."""

import importlib
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import common, lars, loss
from decur_core import config
from decur_core.data.batches import batches

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import records  # noqa: E402


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Records of tests go here, where the book's extension finds them too."""
    monkeypatch.setattr(common, "RECORDS", tmp_path / "benchmarks" / "records")
    return tmp_path


def module(name: str):
    if name in ("convert", "loader", "step"):
        pytest.importorskip("cv2", reason="opencv-python-headless is an extra of the benchmarks")
    return importlib.import_module(f"benchmarks.{name}")


def record(folder: Path, name: str) -> dict:
    """The record and that it says where it is from."""
    found = json.loads((folder / "benchmarks" / "records" / f"{name}.json").read_text())
    assert {"commit", "date", "hardware", "threads", "load_before"} <= found["provenance"].keys()
    return found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize(("k", "n"), [(64, 16), (16, 16)])
def test_losses_and_their_gradients_agree(k, n):
    results = []
    for way in loss.WAYS.values():
        z = loss.embeddings(k, n, "cpu")
        value = way(*z, round(loss.COMMON * k))
        value.backward()
        results.append([value.detach(), *(x.grad for x in z)])
    assert all(relative(a, b) < 1e-4 for a, b in zip(*results, strict=True))


def test_three_steps_of_both_lars_end_with_the_same_weights():
    made = lars.optimizers("small", 32, "cpu")
    published = made["published"]
    plain = lars.parameters(published)[-1]
    plain.grad = None
    lars.parameters(made["ours"])[-1].grad = None
    lars.parameters(published)[0].data.zero_()  # both norms have to be positive for adaptation
    lars.parameters(made["ours"])[0].data.zero_()
    before = [p.detach().clone() for p in lars.parameters(published)]
    plain.grad = lars.parameters(made["ours"])[-1].grad = torch.ones_like(plain)
    for _ in range(3):
        for optimizer in made.values():
            optimizer.step()
    assert lars.farthest(made) < 1e-6
    assert not any(torch.equal(a, b) for a, b in zip(before, lars.parameters(published), strict=True))


def test_loaders_deliver_the_same_pixels(folder):
    loader = module("loader")
    store = common.random_store(folder / "store", count=4, side=24, seasons=4)
    size = loader.write(store, folder / "published")
    assert size > 4 * 15 * 24**2
    random.seed(0)
    sample = loader.Published(folder / "published")[2]
    random.seed(0)
    seasons = [random.randrange(4) for _ in range(4)]
    assert len(set(seasons)) > 1
    for image, name, season in zip(sample, ("sar", "optical") * 2, seasons, strict=True):
        assert np.array_equal(image, store.read(2, name, season))
    batch = loader.collate([sample, sample])
    assert [tuple(x.shape) for x in batch] == [(2, c, 24, 24) for c in (2, 13, 2, 13)]
    assert all(x.dtype == torch.uint8 and np.array_equal(x[1], y) for x, y in zip(batch, sample, strict=True))
    settings = config.load("start", {"batch_size": 4, "workers": 0, "data.source": "published"})
    ours = [view for both in next(iter(batches(settings, store, range(1)))).values() for view in both]
    assert {tuple(x.shape) for x in ours} == {(4, 2, 24, 24), (4, 13, 24, 24)} and len(ours) == 4
    assert sum(x.nbytes for x in ours) == 2 * 15 * 24**2 * 4
    views = loader.collate([loader.Published(folder / "published", loader.Views(4, 24, 20))[i] for i in range(2)])
    assert all(x.shape[2:] == (20, 20) and x.dtype == torch.float32 and 0 < x.max() <= 1 for x in views)


SIZES = {"backbone": "small", "side": 24, "size": 20, "batch": 8, "k": 32, "threads": 1, "device": "cpu"}


def test_a_step_of_both_ways_gives_the_same_weights():
    step = module("step")
    made = {way: step.build(way=way, workers=0, **SIZES) for way in ("published", "ours")}
    shapes = {way: [tuple(x.shape) for x in parts["views"]()] for way, (_, _, parts) in made.items()}
    assert shapes["ours"] == shapes["published"] == [(8, c, 20, 20) for c in (2, 13, 2, 13)]
    views = [torch.rand(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes["ours"]]
    start = made["ours"][0].state_dict()
    made["published"][0].load_state_dict(start)
    start = {name: value.clone() for name, value in start.items()}
    for _, network, parts in made.values():
        network(views)
        parts["optimizer"]()
    theirs, ours = (made[way][0].state_dict() for way in ("published", "ours"))
    for name, value in ours.items():  # batch norm adds an epsilon to variances, which ours does without
        assert (value - start[name]).double().norm() > 0, name
        assert relative((value - start[name]).double(), (theirs[name] - start[name]).double()) < 5e-3, name


def test_a_step_can_be_shown_in_bfloat16(folder, monkeypatch, capsys):
    step = module("step")
    seen, autocast = [], torch.autocast

    def noted(*arguments, enabled):
        seen.append(enabled)
        return autocast(*arguments, enabled=enabled)

    monkeypatch.setattr(torch, "autocast", noted)
    for way, enabled in (("published", False), ("ours", False), (step.LOW, True)):
        seen.clear()
        step.build(way=way, workers=0, **SIZES)[2]["network + loss"]()
        assert any(seen) is enabled
    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(common, "cost", cost_here)
    step.main([*COMMANDS["step"].split(), "--bfloat16", "1"])
    found = record(folder, "step-bfloat16")
    assert [row["step"] for row in found["rows"]] == ["published", "ours", "ours, bfloat16"] and "AMX" in found[
        "settings"
    ]
    assert not (folder / "benchmarks" / "records" / "step.json").exists()
    assert "ours, bfloat16" in records.benchmark(SimpleNamespace(srcdir=folder), "step-bfloat16")
    assert all({"views ms", "network + loss ms", "optimizer ms"} <= row.keys() for row in found["rows"])


def test_arithmetic_counts_two_for_each_multiply_add():
    few, many = (module("step").arithmetic("small", 20, n, 32) for n in (2, 4))
    assert many == 2 * few
    widths, sides = (32, 64, 128), (10, 5, 3)
    features = sum(9 * a * b * s**2 for a, b, s in zip((0, *widths), widths, sides, strict=False))
    rest = features + 128 * 32 + 2 * 32 * 32
    first = [9 * c * 32 * 100 for c in (2, 13)]  # no gradient with respect to images
    assert few == 2 * sum(2 * (3 * 2 * rest + 2 * 2 * x) for x in first)


def test_peak_memory_is_that_of_a_fresh_process():
    sizes = {"k": 512, "n": 64, "threads": 1}
    assert common.peak_memory("benchmarks.loss", "prepare", way="published", **sizes) > 3 * 4 * 512**2


COMMANDS = {
    "explain": "--k 24 --samples 32 --pairs 4 --side 24 --steps 2",
    "convert": "--locations 2 --side 36 --count 4 --turns 1 --processes 1",
    "hha": "--height 60 --width 80 --repeats 1",
    "lars": "--backbone small --width 16 --repeats 1",
    "loader": "--locations 4 --side 24 --size 20 --batch 2 --seconds .05 --turns 1",
    "step": "--backbone small --side 24 --size 20 --batch 8 --k 32 --repeats 1 --workers 1",
    "scaling": "--backbone small --side 24 --size 20 --batch 8 --k 16 --steps 4 --processes 1",
}


def cost_here(name: str, prepare: str, **arguments) -> tuple[int, float]:
    """The work itself in this process, with made-up numbers."""
    getattr(module(name.rpartition(".")[2]), prepare)(**{"device": "cpu", **arguments})()
    return 2**20, 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_write_records_that_the_book_shows(name, folder, monkeypatch, capsys):
    monkeypatch.setattr(common, "cost", cost_here)
    module(name).main(COMMANDS[name].split())
    found = record(folder, name)
    assert str(folder) in capsys.readouterr().out
    table = records.benchmark(SimpleNamespace(srcdir=folder), name).splitlines()
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == list(found["rows"][0])
    assert len(table) == 2 + len(found["rows"]) + 2 and found["provenance"]["commit"] in table[-1]
    for k, v in found["settings"].items():
        text = f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
        assert k == "processes" or text in table[-1]


def test_a_second_device_has_other_defaults_and_its_own_record(folder):
    known = {"size": (64, 224, "of views"), "processes": ([1, 2], [1], "numbers")}
    assert common.arguments("", [], **known).size == 64
    options = common.arguments("", ["--device", "cuda", "--processes", "3", "4"], **known)
    assert (options.size, options.processes) == (224, [3, 4])
    assert common.save("step", settings={}, rows=[], device="cuda:0").name == "step-cuda.json"


def test_targets_without_a_record_are_open(folder):
    app = SimpleNamespace(srcdir=folder)
    lines = records.targets(app, "").splitlines()
    assert len(lines) == 2 + len(records.TARGETS) and all(line.endswith("| open |") for line in lines[2:])
    assert records.benchmark(app, "step-cuda") == "*Not measured.*"
    row = {"times faster": 36.0, "share of memory": 0.3}
    common.save("loss", settings={}, rows=[row])
    first, second = records.targets(app, "").splitlines()[2:4]
    assert first.endswith("| at least 35 | 36 | reached |") and second.endswith("| at most 0.2 | 0.3 | missed |")
