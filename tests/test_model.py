"""Backbones and projectors: shapes, separation of the modalities, and weights that load into plain networks."""

import pytest
import torch
import torchvision
from torch import nn

from decur_core import backbones, losses
from decur_core.model import MultimodalModel, backbone_state, mlp

CHANNELS = (2, 13)
FEATURES = {"small": 128, "resnet18": 512, "resnet50": 2048}
PROJECTOR = (24, 20, 16)


def images(channels, n=4, size=64, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def views(n=4, size=64):
    return [images(c, n, size, seed) for seed, c in enumerate((2, 2, 13, 13))]


@pytest.fixture(scope="module", params=backbones.BACKBONES)
def model(request):
    torch.manual_seed(0)
    made = MultimodalModel(request.param, CHANNELS, PROJECTOR)
    made.name = request.param
    return made


def test_every_backbone_is_tested():
    assert set(FEATURES) == set(backbones.BACKBONES)


def test_embeddings_and_gradients(model):
    # A residual block's last norm starts at zero and would keep gradients from the layers before it.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    size = 32 if model.name == "small" else 64
    z = model.train()(*views(size=size))
    assert model.features == FEATURES[model.name]
    assert [tuple(x.shape) for x in z] == [(4, PROJECTOR[-1])] * 4
    assert all(torch.isfinite(x).all() and x.dtype == torch.float32 for x in z)
    losses.decur(*z, dim_common=12).total.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), name
    model.zero_grad()


def test_each_embedding_depends_on_its_own_view_only(model):
    model.eval()
    with torch.no_grad():
        before = model(*views(n=2, size=32))
        assert torch.equal(model.embed(1, views(n=2, size=32)[1]), before[1])
        assert torch.equal(model.embed(2, views(n=2, size=32)[2]), before[2])
        for i in range(4):
            changed = views(n=2, size=32)
            changed[i] = 1 - changed[i]
            after = model(*changed)
            assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [j != i for j in range(4)]


def test_modalities_share_no_weight(model):
    parts = [
        {p.data_ptr() for module in modules for p in [*module.parameters(), *module.buffers()] if p.numel()}
        for modules in ((model.backbone_1, model.projector_1), (model.backbone_2, model.projector_2))
    ]
    assert parts[0].isdisjoint(parts[1])
    assert len(list(model.parameters())) == sum(len(list(m.parameters())) for m in model.children())
    assert not torch.equal(model.projector_1[0].weight, model.projector_2[0].weight)


def test_projector_is_that_of_the_paper(model):
    for projector in (model.projector_1, model.projector_2):
        kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert [type(layer) for layer in projector] == kinds
        widths = [layer.out_features for layer in projector if isinstance(layer, nn.Linear)]
        assert tuple(widths) == PROJECTOR and projector[0].in_features == FEATURES[model.name]
        assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))
    assert [type(layer) for layer in mlp(3, [5])] == [nn.Linear]


def test_last_layer_needs_no_bias():
    """The loss centres each dimension, so a bias there could never receive a gradient."""
    z = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = torch.zeros(8, requires_grad=True, dtype=torch.float64)
    losses.decur(z[0] + bias, *z[1:], dim_common=4).total.backward()
    assert bias.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("modality", [1, 2])
def test_backbone_loads_into_plain_torchvision(name, modality):
    torch.manual_seed(1)
    model = MultimodalModel(name, CHANNELS, (4,))
    for module in model.modules():  # away from their starting values, so that a forgotten buffer shows
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.bias, 0, 0.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    plain = getattr(torchvision.models, name)()
    plain.conv1 = nn.Conv2d(CHANNELS[modality - 1], 64, kernel_size=7, stride=2, padding=3, bias=False)
    plain.fc = nn.Identity()
    plain.load_state_dict(backbone_state(model.state_dict(), modality), strict=True)
    x = images(CHANNELS[modality - 1], n=2)
    with torch.no_grad():
        own = (model.backbone_1, model.backbone_2)[modality - 1].eval()(x)
        assert own.shape == (2, FEATURES[name]) and own.std() > 0 and not torch.equal(own[0], own[1])
        assert torch.equal(plain.eval()(x), own)


def test_three_channels_keep_the_stem_and_blocks_start_as_identity():
    network, features = backbones.build("resnet18", 3)
    assert features == 512 and network.conv1.weight.shape == (64, 3, 7, 7)
    assert not network.layer1[0].bn2.weight.any()


def test_same_seed_same_weights():
    def state(seed):
        torch.manual_seed(seed)
        return MultimodalModel("small", CHANNELS, PROJECTOR).state_dict()

    a, b, c = state(0), state(0), state(1)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["projector_1.0.weight"], c["projector_1.0.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet34", CHANNELS, PROJECTOR), "backbone = 'resnet34'; allowed: resnet18, resnet50, small"),
        (("small", (2, 0), PROJECTOR), "in_channels = 0; a backbone needs at least one channel"),
        (("small", (2,), PROJECTOR), r"in_channels = \(2,\); one number for each of the two"),
        (("small", CHANNELS, ()), r"projector = \(\); at least one width"),
        (("small", CHANNELS, (8, 0)), r"projector = \(8, 0\); at least one width of 1"),
    ],
)
def test_impossible_networks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultimodalModel(*arguments)


def test_backbone_state_of_a_modality_that_is_not_there():
    with pytest.raises(KeyError, match="backbone_3.*modality must be 1 or 2"):
        backbone_state(MultimodalModel("small", CHANNELS, (4,)).state_dict(), 3)
