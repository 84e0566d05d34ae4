"""Looking into trained encoders: embeddings of whole images and what correlates with what."""

from pathlib import Path

import numpy as np
import torch

from . import losses, transfer
from .augment import augment
from .data.store import Store


@torch.inference_mode()
def embeddings(folder: Path, store: Store, *, samples: int, batch_size: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the first ``samples`` pairs, one per modality, each samples x K float32.

    Encoders and projectors in eval mode, first season, whole images resized to the training crop, no augmentation.
    """
    model, preprocessing, settings = transfer.load_pretrained(folder)
    model.eval()
    size, n = settings["crop_size"], min(samples, len(store))
    embedded: list[list[torch.Tensor]] = [[], []]
    for k in range(0, n, batch_size):
        for modality, name in enumerate(preprocessing):
            rows = [torch.from_numpy(store.read(i, name, 0).copy()) for i in range(k, min(k + batch_size, n))]
            images = augment(torch.stack(rows), transfer.plain(size), generator=torch.Generator())
            embedded[modality].append(model.embed(modality + 1, images))
    return torch.cat(embedded[0]), torch.cat(embedded[1])


def cross_correlations(folders: dict[str, Path], store_path: Path, *, samples: int) -> dict[str, np.ndarray]:
    """The cross-modal matrix C (Eq. 1), K x K, of each run over ``samples`` pairs of a store."""
    store = Store(store_path)
    return {
        title: losses.cross_correlation(*embeddings(folder, store, samples=samples)).numpy()
        for title, folder in folders.items()
    }
