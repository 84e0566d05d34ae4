"""What a sensor measures and how networks get to see it: bands, unit, 8-bit mapping, augmentations, each told once.

The mapping (paper, section 4 and appendix B) travels with the weights: stores and checkpoints carry it, so that no one
has to guess which bands, unit and scaling a set of weights expects.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
import pydantic
import torch
from torch import Tensor

from decur_core import augment
from decur_core.augment import Policy
from decur_core.data.raster import DataError


@dataclass(frozen=True, kw_only=True)
class Modality:
    """One sensor. Input that does not fit its bands, unit and range is refused, never rescaled by guess."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str  # in errors; key in samples, stores, views and embeddings
    bands: tuple[str, ...]  # in the order of the channel axis
    unit: str  # of the physical input, in words
    valid_range: tuple[float, float]  # in `unit`; values outside it mean another unit
    scheme: str = "measured"  # of the 8-bit mapping, see `encode`; "measured": not known before the data are looked at
    scale: float | None = None  # reflectance_8bit: the value that becomes 255
    outliers: float | None = None  # outliers_*: share of pixels cut per image and band, half at each end
    mean: tuple[float, ...] | None = None  # outliers_mean_std_8bit: per band over the data set, in `unit`
    std: tuple[float, ...] | None = None
    low: tuple[float, ...] | None = None  # range_8bit: per band, the value that becomes 0
    high: tuple[float, ...] | None = None  # and the one that becomes 255
    copies: int = 1  # of the bands, one after the other, that a network gets (the paper triples the elevation)
    policy: Policy = augment.OPTICAL  # what may happen to an image, see augment.py
    title: str = ""  # for readers; the name, unless given
    colour: str = ""  # of its lines in figures

    def __post_init__(self) -> None:
        needs = {
            "measured": True,
            "bytes": True,
            "range_8bit": self._per_band("low", "high")
            and all(a < b for a, b in zip(self.low, self.high, strict=True)),
            "reflectance_8bit": (self.scale or 0) > 0,
            "outliers_range_8bit": (share := self.outliers is not None and 0 <= self.outliers < 1),
            "outliers_mean_std_8bit": share and self._per_band("mean", "std"),
        }
        if not re.fullmatch(r"[A-Za-z]\w*", self.name):  # it is part of keys, paths and of names joined by "+"
            raise ValueError(f"modality {self.name!r}: a name of letters, digits and _ is needed")
        if not self.bands or not needs.get(self.scheme) or self.copies < 1:
            known = "reflectance_8bit, with scale > 0, range_8bit, with low < high per band, outliers_*_8bit, with "
            known += "outliers in [0, 1) (and, for mean_std, one mean and std per band)"
            raise ValueError(f"{self}: scheme must be bytes, measured, {known}; bands and copies at least 1")

    def _per_band(self, *names: str) -> bool:
        return all(len(getattr(self, name) or ()) == len(self.bands) for name in names)

    @property
    def channels(self) -> int:
        """Of a network's input."""
        return self.copies * len(self.bands)

    def view(self, images: Tensor, *, size: int, policy: Policy | None = None, **options) -> Tensor:
        """One random view of each image, as a network takes it: float32 N x channels x size x size, channels last.

        ``images``: uint8 N x bands x H x W on any device; ``policy``: the modality's own unless given; ``options``: of
        ``augment.augment``.
        """
        return self.copied(augment.augment(images, replace(policy or self.policy, size=size), **options))

    def copied(self, images: Tensor) -> Tensor:
        """Float images N x bands x H x W as a network takes them: N x channels x H x W, channels last."""
        copies = images.repeat(1, self.copies, 1, 1) if self.copies > 1 else images
        return copies.contiguous(memory_format=torch.channels_last)

    def check(self, images: np.ndarray) -> None:
        """Refuse (…, C, H, W) arrays that cannot be `unit` in these bands.

        DataError: wrong band count, 8-bit or non-finite values, values outside `valid_range`, or an image (one season
        of one place) that as a whole belongs to another unit. An image of one value (no data) passes.
        """
        expected = f"{self.name}: expected {self.unit} of {len(self.bands)} bands ({' '.join(self.bands)})"
        if images.ndim < 3 or images.shape[-3] != len(self.bands) or not images.size:
            raise DataError(f"{expected}, shape (…, {len(self.bands)}, H, W); found shape {images.shape}")
        if images.dtype.kind not in "fui" or (images.dtype == np.uint8) != (self.scheme == "bytes"):
            raise DataError(f"{expected}; found {images.dtype} values")
        if self.scheme == "bytes":
            return
        lows, highs = images.min(axis=(-2, -1)), images.max(axis=(-2, -1))  # per band; not-a-number spreads to both
        low, high = lows.min(axis=-1), highs.max(axis=-1)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise DataError(f"{expected}; found non-finite pixels (fill them or leave the image out)")
        found, textured = f"found {low.min():g} to {high.max():g}", high > low
        if low.min() < self.valid_range[0] or high.max() > self.valid_range[1]:
            raise DataError(f"{expected}, within {self.valid_range[0]:g} to {self.valid_range[1]:g}; {found}")
        if self.mean and max(self.mean) < 0 and (textured & (low >= 0)).any():
            raise DataError(f"{expected}; {found}: without a negative value this is amplitude or power, not decibels")
        if self.scheme in ("range_8bit", "measured"):
            return
        present = (lows != 0) | (highs != 0)  # 0 means "no data"; only B10 is absent on purpose (level 2A)
        absent = (~present & present.any(axis=-1, keepdims=True)).reshape(-1, len(self.bands)).any(axis=0)
        if names := [band for band, gone in zip(self.bands, absent, strict=True) if gone and band != "B10"]:
            raise DataError(f"{expected}; {', '.join(names)} all zero beside other bands that are not: no data in it")
        if self.scheme == "reflectance_8bit":
            if (textured & (high <= 1.5)).any():
                raise DataError(f"{expected}; {found}: looks like reflectance in 0 to 1, multiply by {self.scale:g}")
            # Dark water can stay below 255 at the ground (L2A, B10 empty), never at the top of the atmosphere.
            if (textured & (high <= 255) & present.all(axis=-1)).any():
                raise DataError(f"{expected}; {found}: looks like images already scaled to 8 bits")

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Map physical values (…, C, H, W), one image per leading index, to uint8 of the same shape, after `check`.

        reflectance_8bit: x / scale * 255, clipped to 0..255. range_8bit: low to high of a band becomes 0 to 255,
        clipped. outliers_mean_std_8bit: per image and band, values beyond the outlier quantiles are set to them, then
        (x - (mean - 2 std)) / (4 std) * 255, clipped. outliers_range_8bit: per image and band, the range between the
        outlier quantiles becomes 0 to 255; a band of one value becomes 0. bytes: as they are. Fractions are cut off, as
        in the published converters, so that the bytes are those that the released weights saw.
        """
        self.check(images)
        if self.scheme == "measured":
            raise DataError(f"{self.name}: its 8-bit mapping is not known; measure it first, or declare a scheme")
        if self.scheme == "bytes":
            return images
        if self.scheme == "reflectance_8bit":
            values = np.multiply(images, np.float32(255), dtype=np.float32)  # exact for whole numbers below 65793,
            values /= np.float32(self.scale)  # so a value on a step of the 8-bit scale stays on it
        elif self.scheme == "range_8bit":
            low, high = (np.array(v, dtype=np.float32)[:, None, None] for v in (self.low, self.high))
            values = (images.astype(np.float32) - low) * (255 / (high - low))
        else:
            tails = (self.outliers / 2, 1 - self.outliers / 2)
            low, high = (quantile.astype(np.float32) for quantile in _quantiles(images, tails))
            values = np.clip(images, low, high, dtype=np.float32)
            if self.scheme == "outliers_range_8bit":
                values -= low
                values *= np.divide(255, high - low, out=np.zeros_like(low), where=high > low)
            else:
                mean, std = (np.array(v, dtype=np.float32)[:, None, None] for v in (self.mean, self.std))
                values -= mean - 2 * std
                values *= 255 / (4 * std)
        return np.clip(values, 0, 255, out=values).astype(np.uint8)

    def to_float(self, encoded: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 of any shape, of ``encode`` or a tensor -> float32 in [0, 1]; encoders take that ``copied``."""
        if (encoded := torch.as_tensor(encoded)).dtype != torch.uint8:
            raise DataError(f"{self.name}: expected the uint8 images that encode() makes, found {encoded.dtype}")
        return encoded.float() / 255

    def mapping(self) -> dict:
        """What stores and weights carry, as JSON has it: all that decides the bytes a network gets."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("policy", "title", "colour")}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}

    @classmethod
    def from_mapping(cls, values: Mapping) -> "Modality":
        """Inverse of ``mapping``; also what a profile declares. A ValueError names fields that do not fit."""
        try:
            return _ADAPTER.validate_python(dict(values))
        except pydantic.ValidationError as error:
            found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            known = ", ".join(f.name for f in fields(cls))
            raise ValueError(f"modality {values.get('name', '?')!r}: {found}; fields are {known}") from None

    def mapped(self, values: Mapping) -> "Modality":
        """This sensor with the mapping that a store or a set of weights carries."""
        return replace(Modality.from_mapping(values), policy=self.policy, title=self.title, colour=self.colour)


def _quantiles(images: np.ndarray, shares: tuple[float, ...]) -> Iterator[np.ndarray]:
    """What `numpy.quantile` gives per image and band, bit for bit, from a sort, which is four times as fast."""
    values = np.sort(images.reshape(*images.shape[:-2], -1), axis=-1)
    for share in shares:
        below, part = divmod(np.float64(share) * (values.shape[-1] - 1), 1)
        low, high = (values[..., min(int(below) + k, values.shape[-1] - 1), None, None] for k in (0, 1))
        yield high - (high - low) * (1 - part) if part >= 0.5 else low + (high - low) * part


_ADAPTER = pydantic.TypeAdapter(Modality)


def declared(name: str, spec: Mapping) -> Modality:
    """The sensor that a profile declares: fields of ``Modality``, at least ``bands`` and ``unit``.

    Without a ``scheme`` its 8-bit mapping is measured on the data, and any value is valid. ValueError as above.
    """
    anything = {} if "scheme" in spec else {"valid_range": (-3.4e38, 3.4e38)}
    return Modality.from_mapping(anything | {**spec, "name": name})


# What keeps the values: a grey or brighter radar image would be another measurement (paper, section 4).
GEOMETRY = {"p_jitter": 0.0, "p_gray": 0.0, "p_blur": 0.0, "p_solarize": 0.0}

# Range: point targets reach about 30 dB, edge noise goes far below the noise floor, and detector counts of uncalibrated
# products run into the hundreds. Statistics of SSL4EO-S12, published with its converter.
SAR = Modality(
    name="sar",
    bands=("VV", "VH"),
    unit="backscatter in dB",
    valid_range=(-100.0, 50.0),
    scheme="outliers_mean_std_8bit",
    outliers=0.02,
    mean=(-12.54847273, -20.19237134),
    std=(5.25697717, 5.91150917),
    policy=augment.SAR,
    title="SAR",
    colour="#0072B2",
)
OPTICAL = Modality(
    name="optical",
    bands=("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"),
    unit="reflectance x 10000",
    valid_range=(0.0, 65536.0),  # of 16-bit files; interpolation can round 65535 up
    scheme="reflectance_8bit",
    scale=10000.0,
    colour="#D55E00",
)
RGB = Modality(
    name="rgb",
    bands=("red", "green", "blue"),
    unit="8-bit colour",
    valid_range=(0.0, 255.0),
    scheme="bytes",
    title="RGB",
    colour="#D55E00",
)
# Lowest and highest places on land, with room for basins below the sea and for errors of the geoid.
DEM = Modality(
    name="dem",
    bands=("elevation",),
    unit="elevation in metres",
    valid_range=(-1000.0, 9000.0),
    scheme="outliers_range_8bit",
    outliers=0.02,
    copies=3,
    policy=Policy(**GEOMETRY),
    title="elevation",
    colour="#0072B2",
)
HHA = Modality(
    name="hha",
    bands=("disparity", "height", "angle"),
    unit="8-bit codes of decur_core.data.hha",
    valid_range=(0.0, 255.0),
    scheme="bytes",
    policy=Policy(**GEOMETRY, p_vflip=0.0),
    title="HHA",
    colour="#0072B2",
)

INDOORS = (replace(RGB, policy=Policy(p_vflip=0.0)), HHA)  # rooms have a floor and a ceiling
