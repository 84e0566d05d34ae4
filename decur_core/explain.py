"""Looking into trained encoders: embeddings of whole images and what correlates with what."""

from pathlib import Path

import torch

from . import losses, transfer
from .data.store import Store


@torch.inference_mode()
def embeddings(folder: Path, store: Store, *, samples: int, batch_size: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the first ``samples`` pairs, one per modality, each samples x K float32.

    Encoders and projectors in eval mode, first season, whole images resized to the training crop, no augmentation.
    """
    model, preprocessing, settings = transfer.load_pretrained(folder)
    model.eval()
    policy, embedded = transfer.plain(settings["crop_size"]), []
    for rows in torch.arange(min(samples, len(store))).split(batch_size):
        images = transfer.views(store, preprocessing, rows.tolist(), policy)
        embedded.append([model.embed(modality, x) for modality, x in enumerate(images, start=1)])
    return tuple(map(torch.cat, zip(*embedded, strict=True)))


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
