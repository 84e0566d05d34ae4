"""CMX: names, shapes, counts and logits of the published network; pretrained backbones; training on a real image.

``cmx_layout.json`` was made with the published code: names and shapes of its state dict (``*`` for the number of a
block), counts at 480 x 640 pixels with 40 classes, rates of stochastic depth, and some logits for the weights that
``fill`` makes.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decur_core import backbones
from decur_core.data.nyuv2 import CLASSES_40
from decur_core.data.raster import DataError
from decur_core.data.tasks import Masks
from decur_core.transfer import cmx

TASK = Masks(CLASSES_40)
PUBLISHED = json.loads((Path(__file__).parent / "cmx_layout.json").read_text())
SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "nyu_rgbd_sample"


def layout(backbone):
    """Name -> shape of every entry of a published state dict."""
    shapes = {}
    for name, shape in PUBLISHED["shapes"].items():
        blocks = PUBLISHED["depths"][backbone][int(name.split("block")[1][0]) - 1] if "*" in name else 1
        shapes |= {name.replace("*", str(i)): tuple(shape) for i in range(blocks)}
    return shapes


def fill(shapes):
    """Weights that depend on names and shapes alone, of a size that keeps activations in range."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
            continue
        noise = np.random.RandomState(zlib.crc32(name.encode())).bytes(math.prod(shape))
        value = torch.from_numpy(np.frombuffer(noise, np.uint8).astype(np.float32) / 127.5 - 1).reshape(shape)
        if len(shape) > 1:
            value = value * 2 / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("running_var"):
            value = value.abs() + 0.5
        else:
            value = 0.2 * value + (1.0 if name.endswith("weight") else 0.0)
        state[name] = value
    return state


def pattern(height, width):
    """Two images N x 3 x H x W between -1 and 1."""
    y, x, c = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(3), indexing="ij")
    made = [torch.sin(a * y + b * x + c) for a, b in ((0.31, 0.17), (0.07, 0.43))]
    return [m.float().permute(2, 0, 1)[None] for m in made]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return cmx.CMX("mit_b2", classes=40)


@pytest.fixture
def unfilled(monkeypatch):
    """Building takes most of its time for drawing weights, which tests of shapes do not need."""
    monkeypatch.setattr("segmentation_models_pytorch.encoders.mix_transformer.trunc_normal_", lambda *a, **k: None)


@pytest.mark.parametrize("backbone", ["mit_b2", "mit_b5"])
def test_names_shapes_and_counts_are_the_published(backbone, unfilled):
    made = cmx.CMX(backbone, classes=40)
    assert {k: tuple(v.shape) for k, v in made.state_dict().items()} == layout(backbone)
    made.eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = made(*torch.zeros(2, 1, 3, 480, 640, device="meta"))
    assert logits.shape == (1, 40, 480, 640)
    assert sum(p.numel() for p in made.parameters()) == PUBLISHED["parameters"][backbone]
    assert counter.get_total_flops() == PUBLISHED["flop"][backbone]


def test_published_weights_load_and_give_the_published_logits():
    made = cmx.CMX("mit_b2", classes=5).eval()
    shapes = layout("mit_b2")
    shapes |= {
        f"decode_head.linear_pred.{k}": (5, *shapes[f"decode_head.linear_pred.{k}"][1:]) for k in ("weight", "bias")
    }
    made.load_state_dict(fill(shapes))
    with torch.no_grad():
        logits = made(*pattern(93, 70))[0, :, 5::40, 3::30]
    expected = torch.tensor(PUBLISHED["logits"])
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)


def test_stochastic_depth_and_normalisation_as_published(network):
    found = [getattr(m, "drop_prob", 0.0) for k, m in network.named_modules() if k.endswith(".drop_path")]
    assert np.allclose(found, PUBLISHED["drop_path"]["mit_b2"], atol=1e-7)
    norms = {k: (m.eps, m.momentum) for k, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms.pop("decode_head.linear_fuse.1") == (1e-3, 0.1)
    assert set(norms.values()) == {(1e-5, 0.1)} and len(norms) == 8


def test_rectification_by_hand():
    torch.manual_seed(0)
    module, (a, b) = cmx.Rectification(4), torch.randn(2, 2, 4, 5, 6)
    both = torch.cat([a, b], 1)
    channel = module.channel_weights["mlp"](torch.cat([both.mean((2, 3)), both.amax((2, 3))], 1)).view(2, 2, 4, 1, 1)
    pixel = module.spatial_weights["mlp"](both).view(2, 2, 1, 5, 6)
    expected = a + (channel[:, 1] + pixel[:, 1]) * b / 2, b + (channel[:, 0] + pixel[:, 0]) * a / 2
    torch.testing.assert_close(module(a, b), expected)


def test_modalities_are_told_apart_and_keep_their_place(network):
    network.eval()
    rgb, hha = pattern(64, 64)
    with torch.no_grad():
        before = network(rgb, hha)
        assert not torch.allclose(network(hha, rgb), before, atol=1e-3)
        assert network(rgb[..., :50, :37], hha[..., :50, :37]).shape == (1, 40, 50, 37)
        assert network(rgb[..., :29, :37], hha[..., :29, :37]).shape == (1, 40, 29, 37)
        with pytest.raises(ValueError, match=r"images of \(28, 64\) px; CMX needs 29 or more"):
            network(rgb[..., :28, :], hha[..., :28, :])


def test_pretrained_backbones_go_into_both_branches(network):
    torch.manual_seed(1)
    states = [backbones.build("mit_b2", 3)[0].state_dict() for _ in range(2)]
    decoder = {k: v.clone() for k, v in network.state_dict().items() if "FRM" in k or "FFM" in k or "decode" in k}
    cmx.load_backbones(network, states[0] | {"head.weight": torch.zeros(9, 512)}, states[1])
    after = network.state_dict()
    for prefix, state in zip(("backbone.", "backbone.extra_"), states, strict=True):
        assert all(torch.equal(after[prefix + k], v) for k, v in state.items())
    assert all(torch.equal(after[k], v) for k, v in decoder.items())
    # The encoder's first stage is the backbone's own, before the modalities meet.
    image = pattern(64, 64)[1]
    alone = backbones.build("mit_b2", 3)[0]
    alone.load_state_dict(states[1])
    with torch.no_grad():
        torch.testing.assert_close(
            network.eval().backbone._stage("extra_", 1, image), backbones.feature_maps(alone.eval(), image)[0]
        )


@pytest.mark.parametrize("change", ["prefix", "missing", "shape"])
def test_backbones_that_do_not_fit_are_refused_and_change_nothing(network, change, unfilled):
    good = backbones.build("mit_b2", 3)[0].state_dict()
    bad = {
        "prefix": {f"backbone_1.{k}": v for k, v in good.items()},
        "missing": {k: v for k, v in good.items() if k != "norm4.bias"},
        "shape": good | {"patch_embed1.proj.weight": torch.zeros(64, 2, 7, 7)},
    }[change]
    named = {"prefix": "backbone_1.", "missing": "misses extra_norm4.bias", "shape": r"\(64, 2, 7, 7\)"}[change]
    before = network.backbone.block1[0].attn.q.weight.clone()
    with pytest.raises(DataError, match=named) as error:
        cmx.load_backbones(network, good, bad)
    assert torch.equal(network.backbone.block1[0].attn.q.weight, before) and len(str(error.value)) < 600


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no sample of NYU Depth v2 beside the repository")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_training_steps_on_a_real_image(network, precision):
    images = [np.asarray(Image.open(SAMPLE / name / "0.jpg")) for name in ("RGB", "HHA")]
    images = [cmx.normalize(torch.from_numpy(x.copy()).permute(2, 0, 1)[None] / 255) for x in images]
    truth = TASK.target(torch.from_numpy(np.asarray(Image.open(SAMPLE / "Label" / "0.png")).copy()))[None]
    assert images[0].shape == images[1].shape == (1, 3, 480, 640) and truth.shape == (1, 480, 640)
    images = [F.interpolate(x, size=(60, 80), mode="bilinear") for x in images]
    truth = truth[:, 4::8, 4::8]
    network.train()
    network.backbone.requires_grad_(True)
    optimizer, losses = torch.optim.AdamW(network.parameters(), lr=2e-4), []
    for _ in range(3):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            losses.append(TASK.loss(network(*images), truth))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
    losses = [float(x.detach()) for x in losses]
    assert all(math.isfinite(x) for x in losses) and losses[-1] < losses[0]
