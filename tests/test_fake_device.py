"""The step at the paper's size on tensors without values: nothing there may read what a GPU has computed.

A fake ``cuda`` device takes views, forward pass and loss, the ``meta`` device the whole step with its optimizer. A
read-back (``.item()``, ``nonzero``, a shape that depends on data), a mix of devices and a copy that the host would wait
for are errors, so that no step can wait for the one before.
"""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common
from benchmarks import memory as benchmark
from decur_core import augment, config, pretrain
from decur_core.data.modality import OPTICAL, SAR
from decur_core.model import MultimodalModel
from decur_core.running import memory, processes

PAPER = {"method": "decur", "data.source": "published", "optimizer": "lars"}
SENSORS = (SAR, OPTICAL)


class Unwaited(TorchDispatchMode):
    """Refuses copies that the host waits for: back from a device, or to one from memory that is not pinned."""

    def __init__(self):
        super().__init__()
        self.pinned, self.sent = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._pin_memory.default:  # needs a driver
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        out = function(*args, **kwargs)
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[function is torch.ops.aten.copy_.default]
            if source.device != out.device:
                assert source.device.type == "cpu", f"{function} from {source.device}: the host waits for it"
                assert kwargs.get("non_blocking") or any(a is True for a in args), f"{function}: a copy that blocks"
                assert any(source is x for x in self.pinned), f"{function}: a copy from memory that is not pinned"
                self.sent += 1
        return out


@pytest.fixture
def device(monkeypatch):
    """A fake device; what the host draws has values."""
    plan = augment._plan

    def drawn(*args, **options):
        with unset_fake_temporarily():
            return plan(*args, **options)

    monkeypatch.setattr(augment, "_plan", drawn)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield Unwaited()


def settings(**changes):
    return config.load("a100", {**PAPER, **changes})


def images(options, device):
    sides = {m.name: (options.batch_size, len(m.bands), 264, 264) for m in SENSORS}
    return {m: [torch.empty(s, dtype=torch.uint8, device=device) for _ in "ab"] for m, s in sides.items()}


def network(options, device):
    with torch.device(device):
        return MultimodalModel(options.backbone, {m.name: m.channels for m in SENSORS}, options.projector).train()


def test_views_forward_pass_and_loss_never_wait_for_a_gpu(device):
    options = settings()
    assert (options.backbone, options.crop_size, options.batch_size, options.projector[-1]) == (
        "resnet50",
        224,
        256,
        8192,
    )
    model, batch = network(options, "cuda"), images(options, "cuda")
    with device:
        views = pretrain.views(options, SENSORS, batch, step=1)
        sent = device.sent
        terms = pretrain.loss(options, model, views)
    for m in SENSORS:
        for x in views[m.name]:
            assert x.device.type == "cuda" and x.shape == (256, m.channels, 224, 224) and x.dtype == torch.float32
            assert x.is_contiguous(memory_format=torch.channels_last)
    assert sent >= 4 * 10  # what is drawn, for each batch of views
    assert all(t.device.type == "cuda" and t.shape == () for t in terms.values()) and device.sent == sent


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.nonzero, torch.Tensor.cpu, lambda x: x[x > 0]])
def test_a_read_back_is_an_error(device, read):
    x = torch.ones((), device="cuda")
    with device, pytest.raises((AssertionError, DynamicOutputShapeException, DataDependentOutputException)):
        read(x)


def test_a_blocking_copy_and_one_from_pageable_memory_are_errors(device):
    like = torch.ones(3, device="cuda")
    with device:
        augment._send(torch.ones(3), like)
    with device, pytest.raises(AssertionError, match="blocks"):
        torch.ones(3).pin_memory().to("cuda")
    with device, pytest.raises(AssertionError, match="not pinned"):
        torch.ones(3).to("cuda", non_blocking=True)


def test_backward_pass_and_optimizer_never_read_back(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # it knows no such device
    options, shapes = settings(), {m.name: (256, m.channels, 224, 224) for m in SENSORS}
    model = network(options, "meta")
    views = {name: [torch.empty(shape, device="meta") for _ in "ab"] for name, shape in shapes.items()}
    for name, steps in (("lars", 2), ("adamw", 1)):  # the second step finds a state
        update = pretrain.optimizer(settings(optimizer=name), model)
        for _ in range(steps):
            terms = pretrain.train_step(options, model, update, views, 1.0)
        assert all(p.grad.shape == p.shape and len(update.state[p]) for p in model.parameters())
        assert terms["total"].device.type == "meta"


def computed(options, **changes):
    shape = (options.crop_size, options.crop_size)
    views = {m.name: [(options.batch_size, m.channels, *shape)] * 2 for m in SENSORS}
    total = lambda model, views: pretrain.loss(options, model, views)["total"]  # noqa: E731
    return memory.peak(network(options, "cpu"), total, views, **changes)


def test_peak_is_what_the_tracker_of_torch_finds():
    options = settings(backbone="resnet18", batch_size=64, projector=[2048] * 3, dim_common=1792, crop_size=96)
    with FakeTensorMode():
        model = network(options, "cpu")
        update = pretrain.optimizer(options, model)
        for p in model.parameters():
            update.state[p]["momentum"] = torch.zeros_like(p)
        shapes = {m.name: (64, options.crop_size, options.crop_size, m.channels) for m in SENSORS}
        views = {name: [torch.empty(shape).permute(0, 3, 1, 2) for _ in "ab"] for name, shape in shapes.items()}
        tracker = MemTracker()
        tracker.track_external(model, update, *views["sar"], *views["optical"])
        with tracker:
            with torch.autocast("cpu", torch.bfloat16):
                total = pretrain.loss(options, model, views)["total"]
            total.backward()
    found = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert computed(options, low=True) == pytest.approx(found, rel=0.05)


def test_a_gpu_with_80_gb_holds_the_papers_batch_in_bfloat16_alone():
    card = 80e9
    assert computed(settings(), low=True) < 0.75 * card
    assert computed(settings(), low=False) > card
    assert computed(settings(batch_size=64), low=True) < 24e9


GPU = torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """Gives torch a card of so many GB."""

    def of(size: float) -> None:
        found = SimpleNamespace(name="Toy GPU", total_memory=int(size * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)

    return of


def test_a_step_that_cannot_fit_its_card_is_refused_with_the_ways_out(card, monkeypatch):
    options = settings(backbone="resnet18", batch_size=64, projector=[2048] * 3, dim_common=1792, crop_size=96)
    model = network(options, "cpu")
    before, (small, large) = model.state_dict(), (computed(options, low=low) / 1e9 for low in (True, False))
    asked = lambda **changes: memory.check(options.model_copy(update=changes), model, SENSORS, GPU)  # noqa: E731
    card(1.01 * small)
    asked()  # auto is bfloat16 on a GPU
    with pytest.raises(config.ConfigError) as refused:
        asked(precision="float32")
    told = f"a step needs {large:.1f} GB in each, but Toy GPU has {1.01 * small:.1f} GB"
    for part in (
        "batch_size = 64, precision = 'float32', processes = 1",
        told,
        "precision: bfloat16",
        "more processes",
    ):
        assert part in str(refused.value)
    card(0.99 * small)
    with pytest.raises(config.ConfigError, match="lower batch_size, or use more processes"):
        asked()
    with pytest.raises(config.ConfigError):  # keeps two numbers for a weight
        card(1.01 * small)
        asked(optimizer="adamw")
    asked(method="barlow_twins")  # looks at one view
    asked(method="random")  # trains nothing
    card(0)
    memory.check(options, model, SENSORS, torch.device("cpu"))
    asked(compile="default")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_each_process_judges_its_share_of_the_batch(card, monkeypatch):
    options = settings(backbone="small", batch_size=512, projector=[64], dim_common=56, crop_size=64)
    model, rows = network(options, "cpu"), {}
    for world in (1, 2, 4):
        monkeypatch.setattr(processes, "place", lambda world=world: (world - 1, world))
        with pytest.raises(config.ConfigError) as refused:
            card(0)
            memory.check(options, model, SENSORS, GPU)
        assert f"processes = {world}" in str(refused.value)
        rows[world] = float(str(refused.value).partition("needs ")[2].split()[0])
        card(rows[world] + 0.1)
        memory.check(options, model, SENSORS, GPU)
    assert rows[1] > 1.8 * rows[2] > 3.2 * rows[4] > 0


def test_nothing_is_moved_to_a_card_that_is_too_small(card, pair_store, tiny, monkeypatch):
    monkeypatch.setattr(pretrain, "device_of", lambda settings: GPU)
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args, **given: pytest.fail("moved before it was judged"))
    card(1e-4)
    with pytest.raises(config.ConfigError, match="Toy GPU has 0.0 GB"):
        pretrain.run(tiny(), pair_store)


def test_table_shares_the_batch_out_and_writes_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RECORDS", tmp_path)
    monkeypatch.setattr(benchmark, "CASES", [("small", 64, 32, 1), ("small", 64, 32, 2), ("small", 128, 32, 1)])
    benchmark.main(["--size", "32"])
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    one, two, large = (row["float32, GB"] for row in rows)
    assert 0.5 * one < two < 0.6 * one and 1.8 * one < large < 2 * one
    assert all(row["bfloat16, GB"] < row["float32, GB"] for row in rows)
    assert "bfloat16, GB" in capsys.readouterr().out
