"""Backbones with any number of input channels: ResNets, SegFormer's Mix Transformers, and a small network for CPUs."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

SMALLEST = 29  # px of a Mix Transformer's images: its first attention looks at 8 x 8 positions at once, 4 px apart


def _mix_transformer(name: str, channels: int, *, depths: Sequence[int]) -> nn.Module:
    """SegFormer's encoder (Xie et al. 2021): N x C x H x W images to the mean over the last stage's map.

    Parameters have the names of the original release (``patch_embed1.proj.weight``, ``block1.0.attn.q.weight``), whose
    classification head is left out. The published DeCUR keeps one, linear with 2048 outputs, and discards it with the
    projector; the projector's first layer is linear too, and two in a row can do no more than one.
    """
    from segmentation_models_pytorch.encoders.mix_transformer import LayerNorm, MixVisionTransformer  # as below

    class MixTransformer(MixVisionTransformer):
        def forward_features(self, images: Tensor) -> list[Tensor]:
            size = tuple(images.shape[2:])
            if min(size) < SMALLEST:
                raise ValueError(f"images of {size} px; {name} needs {SMALLEST} or more: raise crop_size")
            return super().forward_features(images)

        def forward(self, images: Tensor) -> Tensor:
            return self.forward_features(images)[-1].mean((2, 3))

    return MixTransformer(
        in_chans=channels,
        embed_dims=widths(name),
        num_heads=(1, 2, 5, 8),
        depths=depths,
        qkv_bias=True,
        norm_layer=functools.partial(LayerNorm, eps=1e-6),
        drop_path_rate=0.1,
    )


class _Mean(nn.Module):
    """The mean over a map's positions, N x C. Channels last is how maps lie in memory, and so its gradient does too:
    pooling layers give one across it, through which a CPU is several times slower."""

    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


def _small(name: str, channels: int) -> nn.Module:
    """Strided 3x3 convolutions (32, 64, 128 channels) and global average pooling."""
    layers = []
    for out in widths(name):
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(True)]
        channels = out
    return nn.Sequential(*layers, _Mean())


def _small_maps(network: nn.Sequential, images: Tensor) -> list[Tensor]:
    return _one_by_one([network[i : i + 3] for i in range(0, len(network) - 2, 3)], images)


def _resnet(name: str, channels: int) -> nn.Module:
    import torchvision  # here, as it takes seconds, in every notebook and process

    # zero_init_residual as in Barlow Twins: each block starts as the identity.
    network = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
    if channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.fc = nn.Identity()
    return network


def _resnet_maps(network: nn.Module, images: Tensor) -> list[Tensor]:
    stem = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    return _one_by_one([network.layer1, network.layer2, network.layer3, network.layer4], stem)


def _one_by_one(stages: Sequence[nn.Module], images: Tensor) -> list[Tensor]:
    return [images := stage(images) for stage in stages]


class Backbone(NamedTuple):
    """A kind of network: ``build(name, channels)`` makes one that takes images, N x channels x H x W, to features;
    ``widths``: channels of its maps, finest first, of which the last is also the number of features; ``maps(network,
    images)``: those maps.
    """

    build: Callable[[str, int], nn.Module]
    widths: tuple[int, ...]
    maps: Callable[[nn.Module, Tensor], list[Tensor]]


def _mit(widths: tuple[int, ...], depths: tuple[int, ...]) -> Backbone:
    build = functools.partial(_mix_transformer, depths=depths)
    return Backbone(build, widths, lambda network, images: network.forward_features(images))


BACKBONES: dict[str, Backbone] = {
    "resnet18": Backbone(_resnet, (64, 128, 256, 512), _resnet_maps),
    "resnet50": Backbone(_resnet, (256, 512, 1024, 2048), _resnet_maps),
    "small": Backbone(_small, (32, 64, 128), _small_maps),
    "medium": Backbone(_small, (32, 64, 128, 256), _small_maps),
    "mit_b0": _mit((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b2": _mit((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b5": _mit((64, 128, 320, 512), (3, 6, 40, 3)),
}


def build(name: str, channels: int) -> tuple[nn.Module, int]:
    """A randomly initialised backbone for ``channels`` x H x W images and the number of features it returns.

    ``name``: a key of ``BACKBONES``. ResNets are torchvision's own, with ``fc`` an identity and, unless ``channels`` is
    3, a first convolution for that many channels: their state dict loads into ``torchvision.models`` under its keys.
    """
    features = widths(name)[-1]
    if channels < 1:
        raise ValueError(f"in_channels = {channels}; a backbone needs at least one channel")
    network = BACKBONES[name].build(name, channels)
    network.kind, network.widths = name, widths(name)  # for what is built on top of the maps
    return network, features


def widths(name: str) -> tuple[int, ...]:
    """Channels of each of a backbone's ``feature_maps``."""
    if name not in BACKBONES:
        raise ValueError(f"backbone = {name!r}; allowed: {', '.join(BACKBONES)}")
    return BACKBONES[name].widths


def feature_maps(network: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps after each stage of a network of ``build``, finest first: N x channels x H / stride x W / stride.

    Strides are 4, 8, 16, 32 (ResNets: ``layer1`` to ``layer4``) or, for ``small`` and ``medium``, 2, 4, 8, 16; sizes
    are rounded up. The mean of the last map over its positions is what the network returns.
    """
    return BACKBONES[network.kind].maps(network, images)


def misfit(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """How a state dict differs from the one that a network expects, by key and shape; empty where it fits."""
    faults = [f"misses {k}" for k in expected.keys() - found.keys()]
    faults += [f"has {k}, which is unknown" for k in found.keys() - expected.keys()]
    for k in expected.keys() & found.keys():
        if expected[k].shape != found[k].shape:
            faults.append(f"{k} is {tuple(found[k].shape)}, expected {tuple(expected[k].shape)}")
    rest = f"; and {len(faults) - 3} more differences" if len(faults) > 3 else ""
    return "; ".join(sorted(faults)[:3]) + rest
