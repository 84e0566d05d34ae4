"""Backbones: feature maps, any number of channels, and weights that are those of the original networks."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_cmx import layout
from torch import nn

from decur_core import backbones

STRIDES = {"small": (2, 4, 8), "medium": (2, 4, 8, 16)}


@pytest.fixture(scope="module", params=[name for name in backbones.BACKBONES if name != "mit_b5"])
def named(request):
    torch.manual_seed(0)
    network, features = backbones.build(request.param, 5)
    for module in network.modules():  # as after training: no block is the identity
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.1)
    return request.param, network.eval(), features


def test_feature_maps_lead_to_the_features(named):
    name, network, features = named
    images = torch.randn(2, 5, 75, 100)
    with torch.no_grad():
        maps, pooled = backbones.feature_maps(network, images), network(images)
    sizes = [(-(-75 // s), -(-100 // s)) for s in STRIDES.get(name, (4, 8, 16, 32))]
    assert [tuple(m.shape) for m in maps] == [(2, w, *s) for w, s in zip(backbones.widths(name), sizes, strict=True)]
    assert pooled.shape == (2, features) and features == backbones.widths(name)[-1] and network.widths[-1] == features
    torch.testing.assert_close(pooled, maps[-1].mean((2, 3)))
    assert len({m.data_ptr() for m in maps}) == len(maps) and all(m.std() > 0 for m in maps)


def test_feature_maps_of_a_resnet_are_torchvisions():
    torch.manual_seed(0)
    network, _ = backbones.build("resnet50", 3)
    plain = torchvision.models.resnet50()
    plain.fc = nn.Identity()
    plain.load_state_dict(network.state_dict())
    nodes = {f"layer{k}": str(k) for k in (1, 2, 3, 4)}
    extractor = torchvision.models.feature_extraction.create_feature_extractor(plain.eval(), nodes)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(
            backbones.feature_maps(network.eval(), images), extractor(images).values(), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["mit_b2", "mit_b5"])
def test_mix_transformers_have_the_names_and_shapes_of_the_release(name, monkeypatch):
    monkeypatch.setattr("segmentation_models_pytorch.encoders.mix_transformer.trunc_normal_", lambda *a, **k: None)
    network, features = backbones.build(name, 3)
    parts = ("patch_embed", "block", "norm")
    encoder = {k.removeprefix("backbone."): v for k, v in layout(name).items() if k.startswith("backbone.")}
    expected = {k: v for k, v in encoder.items() if k.startswith(parts)}
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == expected and features == 512
    assert "patch_embed1.proj.weight" in expected and "block1.0.attn.q.weight" in expected
    rates = [getattr(m, "drop_prob", 0.0) for k, m in network.named_modules() if k.endswith(".drop_path")]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, len(rates)), atol=1e-7, rtol=0)


def test_a_transformer_block_by_hand():
    """Attention to a grid reduced 4 times and a 3x3 depthwise convolution inside the MLP (Xie et al. 2021)."""
    torch.manual_seed(0)
    block = backbones.build("mit_b2", 3)[0].eval().block2[0]
    for p in block.parameters():
        nn.init.normal_(p, std=0.1)
    x, weights = torch.randn(2, 128, 8, 12), dict(block.named_parameters())

    def linear(t, name):
        return F.linear(t, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(t, name, eps=1e-6):
        return F.layer_norm(t, (128,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def grid(t, channels):
        return t.transpose(1, 2).reshape(2, channels, 8, 12)

    with torch.no_grad():
        tokens = x.flatten(2).transpose(1, 2)
        inside = norm(tokens, "norm1")
        few = F.conv2d(grid(inside, 128), weights["attn.sr.weight"], weights["attn.sr.bias"], stride=4)
        few = norm(few.flatten(2).transpose(1, 2), "attn.norm", 1e-5)
        heads = [
            t.view(2, -1, 2, 64).transpose(1, 2)
            for t in (linear(inside, "attn.q"), *linear(few, "attn.kv").chunk(2, 2))
        ]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 96, 128)
        tokens = tokens + linear(attended, "attn.proj")
        hidden = grid(linear(norm(tokens, "norm2"), "mlp.fc1"), 512)
        hidden = F.conv2d(
            hidden, weights["mlp.dwconv.dwconv.weight"], weights["mlp.dwconv.dwconv.bias"], padding=1, groups=512
        )
        tokens = tokens + linear(F.gelu(hidden).flatten(2).transpose(1, 2), "mlp.fc2")
        torch.testing.assert_close(block(x), grid(tokens, 128), atol=1e-4, rtol=1e-4)


def test_channels_last_and_bfloat16_change_nothing_but_rounding(named):
    _, network, _ = named
    images = torch.randn(2, 5, 64, 64)
    with torch.no_grad():
        exact = network(images)
        other = network(images.contiguous(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(images).float()
    for values, share in ((other, 1e-4), (rough, 0.05)):
        assert torch.linalg.vector_norm(values - exact) < share * torch.linalg.vector_norm(exact)


def test_gradients_reach_every_parameter(named):
    _, network, _ = named
    network(torch.randn(2, 5, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())
    network.zero_grad()


def test_images_too_small_for_a_transformer_are_refused():
    network, _ = backbones.build("mit_b0", 2)
    assert network.eval()(torch.rand(1, 2, 29, 40)).shape == (1, 256)
    for look in (network, lambda images: backbones.feature_maps(network, images)):
        with pytest.raises(ValueError, match=r"images of \(40, 28\) px; mit_b0 needs 29 or more: raise crop_size"):
            look(torch.rand(1, 2, 40, 28))


def test_settings_that_cannot_be_built():
    with pytest.raises(ValueError, match="'vgg'; allowed: resnet18, resnet50, small, medium, mit_b0, mit_b2, mit_b5"):
        backbones.build("vgg", 3)
    with pytest.raises(ValueError, match="in_channels = 0"):
        backbones.build("small", 0)


def test_misfit_names_keys_and_shapes():
    state = backbones.build("small", 2)[0].state_dict()
    assert backbones.misfit(state, dict(reversed(state.items()))) == ""
    other = {k: v for k, v in state.items() if k != "1.bias"} | {
        "0.weight": torch.zeros(32, 3, 3, 3),
        "9.x": torch.ones(1),
    }
    expected = "0.weight is (32, 3, 3, 3), expected (32, 2, 3, 3); has 9.x, which is unknown; misses 1.bias"
    assert backbones.misfit(state, other) == expected
    assert backbones.misfit(state, {}).endswith(f"; and {len(state) - 3} more differences")
