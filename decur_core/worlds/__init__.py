"""Miniature worlds with known factors, and their files in the published layouts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Miniature:
    """The drawn twin of a data set; ``world`` below: the section of the settings.

    ``make(world, split)``: a reader of the whole world behind a split, whose ``.factors`` are known (name -> float32
    (n,), uniform in [-1, 1]); ``parts(world)``: which of its items make up each split; ``write(root, world, parts)``:
    these items as files in the published layout, None where there is none. ``factors``: name -> who sees it, ``common``
    or names of modalities joined by ``+``, without those that the 8-bit mapping removes. ``whole``: items that share
    files; ``size``: (height, width) of stored images, where they are not stored as they are read. ``title``: for
    readers.
    """

    title: str
    make: Callable
    parts: Callable[..., dict[str, range]]
    write: Callable[[Path, object, dict[str, range]], None] | None
    factors: dict[str, str]
    whole: int = 1
    size: Callable[..., tuple[int, int]] | None = None


def apart(train: str) -> Callable[..., dict[str, range]]:
    """``parts`` of a world whose test items follow those of training, whose number is a setting called ``train``."""

    def parts(world) -> dict[str, range]:
        count = getattr(world, train)
        return {"train": range(count), "test": range(count, count + world.test)}

    return parts
