"""Looking into trained encoders: embeddings of whole images and what correlates with what."""

from pathlib import Path

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


def embed_members(folders: dict[str, Path], store_path: Path, *, samples: int) -> dict[str, tuple]:
    """``embeddings`` of every run of ``pretrain.run_members``: label to the two modalities' embeddings."""
    store = Store(store_path)
    return {label: embeddings(folder, store, samples=samples) for label, folder in folders.items()}


def effective_rank(z_NK: torch.Tensor) -> float:
    """How many independent directions an embedding uses, 1 to K: exp of the entropy of its correlation spectrum.

    (Roy and Vetterli 2007, with the eigenvalues of the dimensions' correlation matrix in place of singular values.)
    Dimensions that repeat one another lower it.
    """
    spectrum = torch.linalg.eigvalsh(losses.cross_correlation(z_NK, z_NK).double()).clamp_min(0)
    share = spectrum / spectrum.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))
