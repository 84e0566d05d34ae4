"""Backbones and projectors: shapes, separation of the modalities, weights that load elsewhere or come from there."""

import math

import pytest
import torch
import torchvision
from torch import nn

from decur_core import backbones, losses
from decur_core.lars import parameter_groups
from decur_core.model import MultimodalModel, backbone_state, build, load_published, mlp

CHANNELS = {"sar": 2, "optical": 13}
FEATURES = {"small": 128, "medium": 256, "resnet18": 512, "resnet50": 2048, "mit_b0": 256, "mit_b2": 512}
PROJECTOR = (24, 20, 16)


def images(channels, n=4, size=64, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def views(n=4, size=64):
    drawn = [images(c, n, size, seed) for seed, c in enumerate((2, 2, 13, 13))]
    return {"sar": tuple(drawn[:2]), "optical": tuple(drawn[2:])}


def flat(z):
    """The embeddings, or views, of both modalities in one list."""
    return [each for both in z.values() for each in both]


@pytest.fixture(scope="module", params=FEATURES)
def model(request):
    torch.manual_seed(0)
    made = MultimodalModel(request.param, CHANNELS, PROJECTOR)
    made.name = request.param
    return made


def test_every_backbone_is_tested():
    assert set(FEATURES) == set(backbones.BACKBONES) - {"mit_b5"}  # mit_b2 with more blocks


def test_embeddings_and_gradients(model):
    # A residual block's last norm starts at zero and would keep gradients from the layers before it.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    size = 32 if model.name in ("small", "medium") else 64
    z = model.train()(views(size=size))
    assert [*z] == ["sar", "optical"]
    z = flat(z)
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
        given = flat(views(n=2, size=32))
        before = flat(model(views(n=2, size=32)))
        assert torch.equal(model.embed("sar", given[1]), before[1])
        assert torch.equal(model.embed("optical", given[2]), before[2])
        assert model({"optical": (given[2], None)})["optical"][1] is None
        for i in range(4):
            changed = flat(views(n=2, size=32))
            changed[i] = 1 - changed[i]
            after = flat(model({"sar": tuple(changed[:2]), "optical": tuple(changed[2:])}))
            assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [j != i for j in range(4)]


def test_modalities_share_no_weight(model):
    parts = [
        {p.data_ptr() for module in modules for p in [*module.parameters(), *module.buffers()] if p.numel()}
        for modules in ((model.backbones[m], model.projectors[m]) for m in CHANNELS)
    ]
    assert parts[0].isdisjoint(parts[1])
    assert len(list(model.parameters())) == sum(len(list(m.parameters())) for m in model.children())
    assert not torch.equal(model.projectors["sar"][0].weight, model.projectors["optical"][0].weight)


def test_projector_is_that_of_the_paper(model):
    for projector in model.projectors.values():
        kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert [type(layer) for layer in projector] == kinds
        widths = [layer.out_features for layer in projector if isinstance(layer, nn.Linear)]
        assert tuple(widths) == PROJECTOR and projector[0].in_features == FEATURES[model.name]
        assert all(layer.bias is None for layer in projector if isinstance(layer, nn.Linear))
    assert [type(layer) for layer in mlp(3, [5])] == [nn.Linear]


def test_without_projector_embeddings_are_features():
    model = MultimodalModel("small", CHANNELS, []).eval()
    x = images(13, size=32)
    assert torch.equal(model.embed("optical", x), model.backbones["optical"](x))
    assert model.dimensions == {"sar": 128, "optical": 128} and model.features == 128
    assert not [name for name in model.state_dict() if "projector" in name]
    assert MultimodalModel("small", CHANNELS, [24, 16]).dimensions == {"sar": 16, "optical": 16}


def test_any_number_of_modalities_with_widths_of_their_own():
    channels, widths = {"sar": 2, "dem": 3, "optical": 13}, {"sar": 6, "dem": 4, "optical": 8}
    model = MultimodalModel("small", channels, [24, 16], dimensions=widths).eval()
    z = model({m: (images(c, size=32), None) for m, c in channels.items()})
    assert {m: first.shape[1] for m, (first, _) in z.items()} == widths == model.dimensions
    blocks = {"sar+dem+optical": 3, "sar+optical": 2, "sar": 1, "dem": 1, "optical": 3}
    settings = {"method": "decur", "backbone": "small", "projector": [24, 16], "blocks": blocks}
    assert build(settings, channels).dimensions == widths


def test_a_shared_projector_is_one_module_in_every_respect():
    model = MultimodalModel("small", CHANNELS, PROJECTOR, shared_projector=True)
    assert model.projectors["sar"] is model.projectors["optical"]
    state = model.state_dict()  # under both names, as in the published checkpoints
    assert state.keys() == MultimodalModel("small", CHANNELS, PROJECTOR).state_dict().keys()
    groups = parameter_groups(model, lr=1, lr_biases=1)
    assert sum(p is model.projectors["sar"][0].weight for group in groups for p in group["params"]) == 1
    before = model.projectors["sar"][0].weight.clone()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted.projectors["sar"] is converted.projectors["optical"]
    assert isinstance(converted.projectors["optical"][1], nn.SyncBatchNorm)
    model.load_state_dict({k: v + 1 for k, v in state.items()})
    assert torch.equal(model.projectors["optical"][0].weight, before + 1)


def test_the_scale_starts_at_that_of_clip_is_capped_and_takes_neither_decay_nor_adaptation():
    settings = {"method": "clip", "backbone": "small", "projector": [8]}
    model = build(settings, CHANNELS)
    assert model.scale().item() == pytest.approx(1 / 0.07)
    model.scale().backward()
    assert float(model.log_scale.grad) == pytest.approx(1 / 0.07)
    weights, biases = parameter_groups(model, lr=1, lr_biases=2)
    assert any(p is model.log_scale for p in biases["params"]) and biases["weight_decay"] == 0
    assert not any(p is model.log_scale for p in weights["params"])
    with torch.no_grad():
        model.log_scale.fill_(math.log(500))
    assert model.scale().item() == pytest.approx(100) and model.log_scale.item() == pytest.approx(math.log(100))
    model.log_scale.grad = None
    model.scale().backward()  # it can come back
    assert float(model.log_scale.grad) == pytest.approx(100)
    assert not hasattr(build({**settings, "method": "simclr"}, CHANNELS), "log_scale")
    assert build({**settings, "shared_projector": True}, CHANNELS).projectors["sar"][0].out_features == 8


def test_last_layer_needs_no_bias():
    """The loss centres each dimension, so a bias there could never receive a gradient."""
    z = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = torch.zeros(8, requires_grad=True, dtype=torch.float64)
    losses.decur(z[0] + bias, *z[1:], dim_common=4).total.backward()
    assert bias.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("modality", CHANNELS)
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
    plain.conv1 = nn.Conv2d(CHANNELS[modality], 64, kernel_size=7, stride=2, padding=3, bias=False)
    plain.fc = nn.Identity()
    plain.load_state_dict(backbone_state(model.state_dict(), modality), strict=True)
    x = images(CHANNELS[modality], n=2)
    with torch.no_grad():
        own = model.backbones[modality].eval()(x)
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
    assert not torch.equal(a["projectors.sar.0.weight"], c["projectors.sar.0.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet34", CHANNELS, PROJECTOR), "backbone = 'resnet34'; allowed: resnet18, resnet50, small"),
        (("small", {"sar": 2, "optical": 0}, PROJECTOR), "in_channels = 0; a backbone needs at least one channel"),
        (("small", {"sar": 2}, PROJECTOR), "in_channels = {'sar': 2}; a number for each of two or more modalities"),
        (("small", (2, 13), PROJECTOR), r"in_channels = \(2, 13\); a number for each of two or more modalities"),
        (("small", CHANNELS, (8, 0)), r"projector = \(8, 0\); each width must be 1 or more"),
    ],
)
def test_impossible_networks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultimodalModel(*arguments)


def test_backbone_state_of_a_modality_that_is_not_there():
    with pytest.raises(KeyError, match=r"no key starts with 'backbones.dem.'; modalities here: sar, optical"):
        backbone_state(MultimodalModel("small", CHANNELS, (4,)).state_dict(), "dem")


class Published(nn.Module):
    """The layout of zhu-xlab/DeCUR: both projectors are made of the same layers; a last normalisation without weights.

    ``heads``: the backbones end in a linear layer, as their Mix Transformers do.
    """

    def __init__(self, name: str, channels: tuple, widths: tuple, *, heads: int = 0):
        super().__init__()
        self.backbone_1, features = backbones.build(name, channels[0])
        self.backbone_2, _ = backbones.build(name, channels[1])
        if heads:
            self.backbone_1.head, self.backbone_2.head = nn.Linear(features, heads), nn.Linear(features, heads)
        layers, last = [], heads or features
        for width in widths[:-1]:
            layers += [nn.Linear(last, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            last = width
        layers.append(nn.Linear(last, widths[-1], bias=False))
        self.projector1, self.projector2 = nn.Sequential(*layers), nn.Sequential(*layers)
        self.bn = nn.BatchNorm1d(widths[-1], affine=False)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 2)

    def embed(self, modality: int, x):
        backbone, projector = getattr(self, f"backbone_{modality}"), getattr(self, f"projector{modality}")
        features = backbone(x)
        return projector(backbone.head(features) if hasattr(backbone, "head") else features)


def save_published(theirs: nn.Module, file, *, key: str | None = "model", prefix: str = "module.", **more):
    state = {prefix + k: v for k, v in theirs.state_dict().items()}
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1).state_dict()
    torch.save({"epoch": 100, key: state, "optimizer": optimizer, **more} if key else state, file)
    return file


@pytest.mark.parametrize(
    ("name", "channels", "heads"), [("resnet18", (2, 13), 0), ("resnet50", (3, 3), 0), ("mit_b2", (3, 3), 96)]
)
def test_published_checkpoints_give_the_embeddings_they_gave_there(tmp_path, name, channels, heads):
    torch.manual_seed(0)
    theirs = Published(name, channels, (48, 40, 32), heads=heads).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # no layer starts at zero and hides what is before it
            parameter.add_(0.02 * torch.randn_like(parameter))
    ours = load_published(save_published(theirs, tmp_path / "checkpoint_0099.pth"))
    assert not ours.training and (ours.projectors["first"] is ours.projectors["second"]) == (not heads)
    for number, (modality, c) in enumerate(zip(("first", "second"), channels, strict=True), start=1):
        x = images(c, n=3, size=32)
        with torch.no_grad():
            wanted, found = theirs.embed(number, x), ours.embed(modality, x)
        assert wanted.std(0).max() > 0
        if heads:  # two linear layers as one: other roundings
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        else:
            assert torch.equal(found, wanted)


@pytest.fixture(scope="module")
def published():
    return Published("resnet18", (2, 13), (8, 8))


@pytest.mark.parametrize(("key", "prefix"), [("state_dict", "module."), (None, "module."), (None, ""), ("model", "")])
def test_published_checkpoints_with_and_without_wrappings(published, tmp_path, key, prefix):
    ours = load_published(save_published(published, tmp_path / "a.pth", key=key, prefix=prefix))
    named = load_published(tmp_path / "a.pth", modalities=("sar", "optical"))
    assert named.dimensions == {"sar": 8, "optical": 8}
    assert torch.equal(ours.backbones["second"].layer4[1].conv2.weight, published.backbone_2.layer4[1].conv2.weight)
    assert ours.backbones["second"].conv1.in_channels == 13 and ours.dimensions == {"first": 8, "second": 8}


def test_published_projectors_that_differ_stay_apart(published, tmp_path):
    state = {**published.state_dict(), "projector2.0.weight": published.projector1[0].weight + 1}
    torch.save(state, tmp_path / "a.pth")
    ours = load_published(tmp_path / "a.pth")
    assert torch.equal(ours.projectors["second"][0].weight, ours.projectors["first"][0].weight + 1)


class Unknown:
    pass


def test_published_checkpoints_that_do_not_fit_are_refused_by_key_and_shape(published, tmp_path):
    state, file = published.state_dict(), tmp_path / "a.pth"

    def refused(content, match, **options):
        torch.save(content, file)
        with pytest.raises(ValueError, match=match):
            load_published(file, **options)

    without = {k: v for k, v in state.items() if k != "backbone_2.layer1.0.conv1.weight"}
    refused(without, r"a.pth: does not fit two networks resnet18 .*misses backbones.second.layer1.0.conv1.weight")
    wrong = {**state, "projector2.3.weight": torch.zeros(9, 8)}
    refused(wrong, r"projectors.second.3.weight is \(9, 8\), expected \(8, 8\)")
    refused({**state, "extra.weight": torch.zeros(1)}, "has extra.weight, which is unknown")
    refused(
        {k: v for k, v in state.items() if not k.startswith("backbone_2")}, "has no 'backbones.second.conv1.weight'"
    )
    plain = {k.removeprefix("backbone_1."): v for k, v in state.items() if k.startswith("backbone_1.")}
    refused(plain, r"expected the keys backbone_1.\* of mit_b5, .*; found conv1.weight, bn1.weight")
    refused({"module.backbone_1.cls_token": torch.zeros(1)}, "; found backbone_1.cls_token")
    refused({"epoch": 3}, "found no tensors")
    refused([1, 2], "holds a list; expected a dict of tensors")
    refused({"model": state, "arguments": Unknown()}, r"holds more than tensors.*weights_only=False")
    attention = {**state, "da1_l3.proj_q.weight": torch.zeros(2, 2), "da2_l4.proj_q.weight": torch.zeros(2, 2)}
    refused(attention, r"2 weights of deformable attention \(da1_l3.proj_q.weight, ...\) have no place")
    torch.save(attention, file)
    assert load_published(file, drop_attention=True).features == 512
