"""Looking at embeddings: which dimensions are common, how well they are aligned, how many directions they use.

Shapes: N samples, K embedding dimensions (K_m of modality m). Embeddings go by the name of their modality.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from decur_core import losses
from decur_core.data.store import Store
from decur_core.transfer.encoders import images, load_pretrained

__all__ = ["alignment", "blocks", "effective_rank", "embed_members", "neighbours", "retrieval", "tsne"]


@torch.inference_mode()
def embeddings(
    folder: Path, store: Store, *, samples: int, batch_size: int = 256, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Embeddings of the first ``samples`` items by a finished run: modality -> samples x K_m float32, on the CPU.

    Encoders and projectors in eval mode, whole images of the first season, resized to the training crop.
    """
    model, modalities, settings = load_pretrained(folder)
    model.eval().to(device)
    found: dict[str, list[Tensor]] = {name: [] for name in modalities}
    rows = range(min(samples, len(store)))
    for start in rows[::batch_size]:
        seen = images(store, modalities.values(), rows[start : start + batch_size], settings["crop_size"], device)
        for name, x in seen.items():
            found[name].append(model.embed(name, x).float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def embed_members(folders: Mapping[str, Path], store_path: Path, *, samples: int) -> dict[str, dict[str, Tensor]]:
    """``embeddings`` of every run of ``pretrain.run_members``: label -> modality -> samples x K_m."""
    store = Store(store_path)
    return {label: embeddings(folder, store, samples=samples) for label, folder in folders.items()}


def blocks(settings: Mapping, widths: Mapping[str, int]) -> dict[str, dict[str, slice]]:
    """Which dimensions of each modality belong to which block: modality -> block -> slice of its dimensions.

    A block is named by those who share it, joined by ``+``: ``sar+optical`` is common to both, ``sar`` is SAR's own.
    ``settings``: of the run, as in ``final.pt`` and ``config.identity``; ``widths``: modality -> K_m. With a setting
    ``blocks``, embedding m holds, in their order, those whose name contains m. Otherwise DeCUR's first ``dim_common``
    dimensions are common; those of other methods all are. Own blocks are always named, even if without dimensions.
    """
    declared, whole, made = losses.layout(settings.get("blocks") or {}, widths), "+".join(widths), {}
    decoupled = settings["method"] == "decur" and settings.get("decoupling", True) and not settings.get("blocks")
    if decoupled and settings["dim_common"] == "auto":
        raise ValueError("dim_common = 'auto'; the split that the run found is needed in its place (split.json)")
    for m, width in widths.items():
        common = settings["dim_common"] if decoupled else width
        sizes = declared[m] or {whole: common, m: width - common}
        sizes.setdefault(m, 0)
        if sum(sizes.values()) != width or min(sizes.values()) < 0:
            raise ValueError(f"the embedding of {m} has {width} dimensions; its blocks have {sizes}")
        ends = np.cumsum([0, *sizes.values()]).tolist()
        made[m] = {b: slice(start, stop) for b, start, stop in zip(sizes, ends, ends[1:], strict=False)}
    return made


def effective_rank(z_NK: Tensor) -> float:
    """How many independent directions an embedding uses, 1 to K: exp of the entropy of its correlation spectrum.

    (Roy and Vetterli 2007, with the eigenvalues of the dimensions' correlation matrix in place of singular values.)
    Dimensions that repeat one another lower it; constant ones do not count, and 0 says that all are. ValueError for
    values that are not finite.
    """
    if not z_NK.isfinite().all():
        raise ValueError("the embedding holds NaN or infinity; look at the loss of the run, which may have diverged")
    spectrum = torch.linalg.eigvalsh(losses.cross_correlation(z_NK, z_NK).detach().double()).clamp_min(0)
    if not spectrum.any():
        return 0.0
    share = spectrum / spectrum.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """How far each dimension is from being aligned across modalities: (1 - C_ii)^2 (Eq. 7), K values, 0 at best.

    ``z1, z2``: N x K embeddings of two modalities. An uncorrelated dimension has 1, an opposed one up to 4.
    """
    return (1 - (losses.standardise(z1) * losses.standardise(z2)).sum(0)).square()


def tsne(*z: Tensor, seed: int = 0, perplexity: float = 30.0) -> np.ndarray:
    """A map of embedding dimensions, one point each (Fig. 1): (K_1 + K_2 + …) x 2, modality after modality.

    ``z``: embeddings N x K_m of the same samples. Each dimension is described by its standardised values over the N
    samples, so dimensions that agree across modalities fall together, and constant ones do. The perplexity is lowered
    where there are few. ValueError for embeddings that have no map: unequal N, fewer than 4 dimensions in all or 2
    samples, values that are not finite, and nothing but constants or copies of one dimension.
    """
    if len({len(each) for each in z}) != 1 or len(z[0]) < 2 or sum(each.shape[1] for each in z) < 4:
        found = " and ".join(str(tuple(each.shape)) for each in z)
        raise ValueError(f"embeddings of shapes {found}; a map needs 2 samples or more, and 4 dimensions in all")
    if bad := sum(int((~each.isfinite()).any(0).sum()) for each in z):
        raise ValueError(f"{bad} dimensions hold NaN or infinity; look at the loss of the run, which may have diverged")
    points = torch.cat([losses.standardise(each.detach().cpu()) for each in z], dim=1).T.contiguous().numpy()
    if np.ptp(points, axis=0).max() < 1e-6:  # scikit-learn would divide by their spread, and its C code crash
        raise ValueError("every dimension has the same values, so there is no map: this embedding has collapsed")
    from sklearn.manifold import TSNE  # here: with scipy it takes a second

    return TSNE(perplexity=min(perplexity, (len(points) - 1) / 3), init="pca", random_state=seed).fit_transform(points)


def neighbours(z1: Tensor, z2: Tensor) -> Tensor:
    """For every sample of one modality all samples of the other, the nearest first: N x N positions.

    ``z1, z2``: N x K dimensions that the two share; nearest by the cosine of standardised embeddings.
    """
    a, b = (torch.nn.functional.normalize(losses.standardise(each), dim=1) for each in (z1, z2))
    return (a @ b.T).argsort(1, descending=True)


def retrieval(z1: Tensor, z2: Tensor) -> Tensor:
    """At which place among its ``neighbours`` every sample finds itself, from 0 on: N whole numbers."""
    return (neighbours(z1, z2) == torch.arange(len(z1), device=z1.device)[:, None]).int().argmax(1)
