"""Backbones with any number of input channels: torchvision's ResNets, and a small network for CPUs."""

import torchvision
from torch import nn


def _small(channels: int) -> tuple[nn.Module, int]:
    """Three strided 3x3 convolutions (32, 64, 128 channels) and global average pooling; 128 features."""
    layers, width = [], channels
    for out in (32, 64, 128):
        layers += [nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width


def _resnet(name: str, channels: int) -> tuple[nn.Module, int]:
    # zero_init_residual as in Barlow Twins: each block starts as the identity.
    network = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
    if channels != 3:
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    features = network.fc.in_features
    network.fc = nn.Identity()
    return network, features


BACKBONES = ("resnet18", "resnet50", "small")


def build(name: str, channels: int) -> tuple[nn.Module, int]:
    """A randomly initialised backbone for ``channels`` x H x W images and the number of features it returns.

    ``name``: one of ``BACKBONES``. ResNets are torchvision's own, with ``fc`` an identity and, unless ``channels`` is
    3, a first convolution for that many channels: their state dict loads into ``torchvision.models`` under its keys.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone = {name!r}; allowed: {', '.join(BACKBONES)}")
    if channels < 1:
        raise ValueError(f"in_channels = {channels}; a backbone needs at least one channel")
    return _small(channels) if name == "small" else _resnet(name, channels)
