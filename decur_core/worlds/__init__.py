"""Miniature worlds with known factors, and their files in the published layouts.

Factors (`FACTORS` of each world: name -> who sees it) are independent, uniform in [-1, 1], and statistics of a whole
scene, not positions in it, so that crops and flips keep them. Everything else is nuisance, drawn for every location.
Tests decide which factors may be used: a supervised network must read each with R2 >= 0.85 from the sensors that carry
it, and not at all from the others. A location depends on seed, stream, its number and the settings of its world, never
on how many there are or in which order they are asked for; worlds of other streams have other locations. Of files that
are written here the data set's reader gives exactly the items that the world gives.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from decur_core.config import ConfigError
from decur_core.data.raster import Reader
from decur_core.worlds.sar_optical import factors

OWN = 1000  # added to a world's stream: random numbers of the factors that its second sensor draws for itself


@dataclass(frozen=True)
class Miniature:
    """The drawn twin of a data set; ``world`` below: the section of the settings.

    ``make(world, split, count)``: a reader of so many items, whose ``.factors`` are known (name -> float32 (n,));
    ``splits``: name -> setting that says how many items it has. They follow one another in one world or, where they are
    ``alone``, each has a world of its own. ``writer(root, made, parts)``: some items of splits of one world as files in
    the published layout, None where there is none. ``factors``: name -> who sees it, ``common`` or names of modalities
    joined by ``+``, without those that the 8-bit mapping removes. ``whole``: items that share files; ``size``: (height,
    width) of stored images, where they are not stored as they are read. ``title``: for readers. ``sensors``: names of
    both, then the keys of items that show the second; without, all stays common.
    """

    title: str
    make: Callable[..., Reader]
    splits: dict[str, str]
    factors: dict[str, str]
    writer: Callable[[Path, Reader, dict[str, range]], None] | None = None
    alone: bool = False
    whole: int = 1
    size: Callable[..., tuple[int, int]] | None = None
    sensors: tuple[str, str, tuple[str, ...]] = ("", "", ())

    def unshared(self, world) -> dict[str, str]:
        """The common factors that the sensors do not share, ``world.common`` being below 2: name -> of the second's."""
        names = [name for name, who in self.factors.items() if who == "common"][world.common :] * (world.common < 2)
        if names and not self.sensors[0]:
            raise ConfigError(f"world.common = {world.common}; the {self.title} shares what it shares: 2")
        return {name: f"{name}, {self.sensors[1]}" for name in names}

    def parts(self, world) -> dict[str, range]:
        """Which items of the world behind a split make it up."""
        found: dict[str, range] = {}
        for split, setting in self.splits.items():
            start = 0 if self.alone else sum(map(len, found.values()))
            found[split] = range(start, start + getattr(world, setting))
        return found

    def behind(self, world, split: str) -> Reader:
        """The whole world behind a split."""
        parts = self.parts(world)
        return self.make(world, split, len(parts[split]) if self.alone else sum(map(len, parts.values())))

    def write(self, root: Path, world, parts: dict[str, range]) -> None:
        """Some items of every split as files."""
        for chosen in [{split: part} for split, part in parts.items()] if self.alone else [parts]:
            self.writer(root, self.behind(world, next(iter(chosen))), chosen)

    def drawn(self, world, split: str) -> Reader:
        """``behind``, with as many factors in common as ``world.common`` says."""
        names, made = self.unshared(world), self.behind(world, split)
        return Unshared(made, names, self.sensors[2]) if names else made

    def seen_by(self, world) -> dict[str, str]:
        """``factors`` of ``drawn``."""
        own, (first, second, _) = self.unshared(world), self.sensors
        return self.factors | dict.fromkeys(own, first) | dict.fromkeys(own.values(), second)


class Unshared(Reader):
    """A world whose sensors share less: of some common factors the second sensor, ``keys`` of the items, has its own.

    Each sensor's images are those of the world with its factors; places and nuisance are drawn as before. What belongs
    to both, labels and masks, follows the first sensor.
    """

    def __init__(self, world: Reader, names: dict[str, str], keys: tuple[str, ...]):
        own = factors(len(world), seed=world.seed, stream=world.stream + OWN, names=names)
        self.world, self.other, self.keys, self.ids = world, copy.copy(world), keys, world.ids
        self.other.factors = world.factors | own
        self.factors = world.factors | {names[name]: values for name, values in own.items()}

    def __getitem__(self, i: int) -> dict:
        return self.world[i] | {key: image for key, image in self.other[i].items() if key in self.keys}
