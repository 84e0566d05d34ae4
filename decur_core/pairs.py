"""The modality pairs as data: what each modality measures, how it is brought to 8 bit, how its views are made."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import augment
from .augment import Policy
from .preprocess import DEM, HHA, OPTICAL, RGB, SAR, Preprocessing


@dataclass(frozen=True)
class Modality:
    """One sensor: its name in a sample, its preprocessing (bands, units, statistics) and its augmentations."""

    name: str
    preprocessing: Preprocessing
    policy: Policy

    @property
    def channels(self) -> int:
        """Of a network's input."""
        return self.preprocessing.copies * len(self.preprocessing.bands)

    def view(self, images: Tensor, *, size: int, policy: Policy | None = None, **options) -> Tensor:
        """One random view of each image, as a network takes it: float32 N x channels x size x size, channels last.

        ``images``: uint8 N x bands x H x W on any device; ``policy``: the modality's own unless given; ``options``: of
        ``augment.augment``.
        """
        views = augment.augment(images, replace(policy or self.policy, size=size), **options)
        copies = views.repeat(1, self.preprocessing.copies, 1, 1) if self.preprocessing.copies > 1 else views
        return copies.contiguous(memory_format=torch.channels_last)


UPRIGHT = Policy(p_vflip=0.0)  # rooms have a floor and a ceiling
# What keeps the values: a grey or brighter radar image would be another measurement (paper, section 4).
GEOMETRY = {"p_jitter": 0.0, "p_gray": 0.0, "p_blur": 0.0, "p_solarize": 0.0}

PAIRS: dict[str, tuple[Modality, Modality]] = {
    "sar_optical": (Modality("sar", SAR, augment.SAR), Modality("optical", OPTICAL, augment.OPTICAL)),
    "rgb_dem": (Modality("rgb", RGB, augment.OPTICAL), Modality("dem", DEM, Policy(**GEOMETRY))),
    "rgb_depth": (Modality("rgb", RGB, UPRIGHT), Modality("hha", HHA, Policy(**GEOMETRY, p_vflip=0.0))),
}
