"""The batches of a pretraining run: bytes from a store, in an order that follows from the seed alone."""

import functools
import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from decur_core import config
from decur_core.config import Settings
from decur_core.data.modality import Modality
from decur_core.data.store import Store
from decur_core.losses import METHODS
from decur_core.running import folders as runs


def seeded(*parts) -> torch.Generator:
    """A generator that depends on ``parts`` alone, so that a resumed run draws what an uninterrupted one draws."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def batches(
    settings: Settings, store: Store, steps: range, device: torch.device | str = "cpu", part: tuple[int, int] = (0, 1)
) -> Iterator[dict]:
    """The batches of ``steps`` in order: modality -> (first, second or None), uint8 n x C x H x W, on ``device``.

    Which samples and seasons they hold follows from seed, epoch and position alone; process k of w, ``part``, reads its
    own rows. ``workers`` threads copy a few batches ahead. Copying lets go of the interpreter, so they get by without
    processes, which would have to hand every batch over through fresh shared memory.
    """
    rank, world = part
    size, per_epoch = settings.batch_size // world, len(store) // settings.batch_size
    names, trained = [m.name for m in config.modalities(settings)], runs.trained(settings)
    columns = [(m, v) for v in "ab" for m in names]
    used, pinned = "ab"[: METHODS[settings.method].views(settings)], torch.device(device).type == "cuda"

    @functools.lru_cache(2)
    def drawn(epoch: int) -> tuple[list, list]:
        order = torch.randperm(len(store), generator=seeded(settings.seed, "order", epoch))
        shape = (len(store), len(columns))
        seasons = torch.randint(store.seasons, shape, generator=seeded(settings.seed, "seasons", epoch))
        return order.tolist(), seasons.tolist()

    def read(step: int) -> dict:
        epoch, position = divmod(step, per_epoch)
        order, seasons = drawn(epoch)
        first = position * settings.batch_size + rank * size
        batch = {m: [None, None] for m in names if m in trained}
        for m in batch:
            for k, v in enumerate(used):
                batch[m][k] = torch.empty((size, *store.shapes[m]), dtype=torch.uint8, pin_memory=pinned)
                images, column = batch[m][k].numpy(), columns.index((m, v))
                for row, i in enumerate(order[first : first + size]):
                    images[row] = store.read(i, m, seasons[i][column])
        return batch

    def sent(batch: dict) -> dict:
        return {m: [x if x is None else x.to(device, non_blocking=True) for x in both] for m, both in batch.items()}

    if not settings.workers:
        yield from map(sent, map(read, steps))
        return
    pool, ahead = ThreadPoolExecutor(settings.workers), deque()
    try:
        for step in steps:
            ahead.append(pool.submit(read, step))
            if len(ahead) > 2 * settings.workers:
                yield sent(ahead.popleft().result())
        while ahead:
            yield sent(ahead.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)


def example_views(store: Store, modality: Modality, size: int, *, count: int = 8) -> np.ndarray:
    """Random views of a store's first pair, first season, as pretraining sees them: count x C x size x size."""
    image = torch.from_numpy(store.read(0, modality.name, 0).copy())
    generator = seeded("example", modality.name)
    return modality.view(image.expand(count, *image.shape), size=size, generator=generator).numpy()
