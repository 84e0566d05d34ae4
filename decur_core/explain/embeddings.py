"""Looking into trained encoders: alignment, t-SNE of dimensions, saliency in space and over bands (paper, section 7).

Attributions explain two numbers per image, the mean of its common and of its unique embedding dimensions (Algorithm 2).
The embedding is standardised with statistics of many images and not of the batch: in training mode the mean of a
standardised dimension is 0 in every batch, and one image's attribution would depend on its neighbours.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerGradCam
from sklearn.manifold import TSNE
from torch import Tensor, nn

from decur_core import config, losses, pretrain
from decur_core.data.modality import PAIRS
from decur_core.data.store import Store
from decur_core.model import MultimodalModel
from decur_core.running import folders as runs
from decur_core.transfer import encoders as inputs

PARTS = ("common", "unique")
FLOOR = math.log(1e-12)


def _images(settings: dict, store: Store, rows: Sequence[int], device) -> list[Tensor]:
    """Of both modalities, first season, resized to the training crop by ``inputs.plain``."""
    return inputs.views(store, PAIRS[settings["pair"]], rows, inputs.plain(settings["crop_size"]), device=device)


def _batches(settings: dict, store: Store, rows: Sequence[int], size: int, device) -> Iterator[tuple]:
    """Position of the first row, and ``_images``, of every ``size`` rows."""
    for k in range(0, len(rows), size):
        yield k, _images(settings, store, rows[k : k + size], device)


@torch.inference_mode()
def embeddings(
    folder: Path, store: Store, *, samples: int, batch_size: int = 256, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Embeddings of the first ``samples`` pairs, one per modality, each samples x K float32 on the CPU.

    Encoders and projectors in eval mode, first season, images resized to the training crop by ``inputs.plain``.
    """
    model, _, settings = inputs.load_pretrained(folder)
    model.eval().to(device)
    embedded = [
        [model.embed(m, x).float().cpu() for m, x in enumerate(images, start=1)]
        for _, images in _batches(settings, store, range(min(samples, len(store))), batch_size, device)
    ]
    return tuple(map(torch.cat, zip(*embedded, strict=True)))


def embed_members(folders: dict[str, Path], store_path: Path, *, samples: int) -> dict[str, tuple]:
    """``embeddings`` of every run of ``pretrain.run_members``: label to the two modalities' embeddings."""
    store = Store(store_path)
    return {label: embeddings(folder, store, samples=samples) for label, folder in folders.items()}


def effective_rank(z_NK: Tensor) -> float:
    """How many independent directions an embedding uses, 1 to K: exp of the entropy of its correlation spectrum.

    (Roy and Vetterli 2007, with the eigenvalues of the dimensions' correlation matrix in place of singular values.)
    Dimensions that repeat one another lower it; constant ones do not count, and 0 says that all are. ValueError for
    values that are not finite.
    """
    if not z_NK.isfinite().all():
        raise ValueError("the embedding holds NaN or infinity; look at the loss of the run, which may have diverged")
    spectrum = torch.linalg.eigvalsh(losses.cross_correlation(z_NK, z_NK).double()).clamp_min(0)
    if not spectrum.any():
        return 0.0
    share = spectrum / spectrum.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def alignment(z1: Tensor, z2: Tensor) -> Tensor:
    """How far each dimension is from being aligned across modalities: (1 - C_ii)^2 (Eq. 7), K values, 0 at best.

    ``z1, z2``: N x K embeddings of the two modalities. An uncorrelated dimension has 1, an opposed one up to 4.
    """
    return (1 - (losses.standardise(z1) * losses.standardise(z2)).sum(0)).square()


def tsne(z1: Tensor, z2: Tensor, *, seed: int = 0, perplexity: float = 30.0) -> np.ndarray:
    """A map of embedding dimensions, one point each (Fig. 1): 2K x 2, those of modality 1 first.

    ``z1, z2``: N x K. Each dimension is described by its standardised values over the N samples, so dimensions that
    agree across modalities fall together, and constant ones do. ValueError for embeddings that have no map: fewer than
    4 dimensions in all or 2 samples, values that are not finite, and nothing but constants or copies of one dimension.
    """
    if len(z1) < 2 or z1.shape[1] + z2.shape[1] < 4:
        found = f"{tuple(z1.shape)} and {tuple(z2.shape)}"
        raise ValueError(f"embeddings of shapes {found}; a map needs 2 samples or more, and 4 dimensions in all")
    if bad := sum(int((~z.isfinite()).any(0).sum()) for z in (z1, z2)):
        raise ValueError(f"{bad} dimensions hold NaN or infinity; look at the loss of the run, which may have diverged")
    points = torch.cat([losses.standardise(z) for z in (z1, z2)], dim=1).T.contiguous().numpy()
    if np.ptp(points, axis=0).max() < 1e-6:  # scikit-learn would divide by their spread, and its C code crash
        raise ValueError("every dimension has the same values, so there is no map: this embedding has collapsed")
    perplexity = min(perplexity, (len(points) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(points)


class CommonUnique(nn.Module):
    """Images of one modality to two numbers each: the means of the common and of the unique standardised dimensions.

    ``mean, std``: of each of the K dimensions over many images; constant dimensions count as 0.
    """

    def __init__(self, model: MultimodalModel, modality: int, dim_common: int, mean: Tensor, std: Tensor):
        super().__init__()
        self.model, self.modality, self.dim_common = model.eval(), modality, dim_common
        for module in self.model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # attribution needs what an in-place activation overwrites
        self.register_buffer("mean", mean)
        self.register_buffer("scale", torch.where(std > 1e-6 * mean.abs().max().clamp_min(1e-6), 1 / std, 0.0))

    def forward(self, images: Tensor) -> Tensor:
        """N x C x H x W in [0, 1] to N x 2; a part without dimensions gives 0."""
        z = (self.model.embed(self.modality, images).float() - self.mean) * self.scale
        parts = (z[:, : self.dim_common], z[:, self.dim_common :])
        return torch.stack([part.mean(1) if part.shape[1] else z.sum(1) * 0 for part in parts], 1)

    def last_convolution(self) -> nn.Conv2d:
        """The last convolution of the backbone, where saliency is looked at (section 7); of a Mix Transformer it is the
        depthwise one inside the last block.
        """
        backbone = getattr(self.model, f"backbone_{self.modality}")
        return [m for m in backbone.modules() if isinstance(m, nn.Conv2d)][-1]


def targets(folder: Path, store: Store, *, samples: int = 1024, device="cpu") -> tuple[list[CommonUnique], dict]:
    """What attributions explain: a ``CommonUnique`` for each modality of a finished run, and the run's settings."""
    made, (model, _, settings) = [], inputs.load_pretrained(folder)
    decoupled = settings["method"] == "decur" and settings.get("decoupling", True)
    for m, z in enumerate(embeddings(folder, store, samples=samples, device=device), start=1):
        dim_common = settings["dim_common"] if decoupled else z.shape[1]
        made.append(CommonUnique(model, m, dim_common, z.mean(0), z.std(0)).to(device))
    return made, settings


def gradcam(target: CommonUnique, images: Tensor, part: int) -> Tensor:
    """GradCAM (Selvaraju et al. 2017) of part 0 (common) or 1 (unique): N x H x W, at least 0, of the images' size.

    The map of the last convolution, weighted by its mean gradients, negative values cut, upsampled bilinearly.
    """
    maps = LayerGradCam(target, target.last_convolution()).attribute(images, target=part, relu_attributions=True)
    return F.interpolate(maps.detach().float(), size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def integrated_gradients(target: CommonUnique, images: Tensor, part: int, *, steps: int = 50) -> tuple[Tensor, Tensor]:
    """Integrated Gradients (Sundararajan et al. 2017) from a black image: attributions like ``images``, and the error.

    The error (N) is the sum of an image's attributions minus the change of the output, 0 for infinitely many steps.
    """
    method = IntegratedGradients(target)
    options = {"target": part, "n_steps": steps, "internal_batch_size": max(len(images), 64)}
    found, error = method.attribute(images, return_convergence_delta=True, **options)
    return found.detach().float(), error.detach().float()


def example_maps(settings: config.Settings, folder: Path, store_path: Path, *, count: int = 4) -> list[dict]:
    """Images and their GradCAM maps, for ``plots.saliency``: a row per pair, evenly taken from the store."""
    store, device, pair = Store(store_path), pretrain.device_of(settings), PAIRS[settings.pair]
    found, trained = targets(folder, store, device=device)
    rows = [round(k * (len(store) - 1) / max(count - 1, 1)) for k in range(count)]
    images = _images(trained, store, rows, device)
    columns: dict[str, list] = {}
    for m, target, x in zip(pair, found, images, strict=True):
        columns[m.name] = list(x.cpu().numpy())
        for k, part in enumerate(PARTS):
            maps = gradcam(target, x, k).cpu().numpy()
            columns[f"{m.name}, {part}"] = list(zip(columns[m.name], maps, strict=True))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _unit(maps: Tensor) -> Tensor:
    """Each map stretched to 0 to 1; a map of one value becomes 0."""
    low, high = (f(maps.flatten(1), 1)[:, None, None] for f in (torch.amin, torch.amax))
    return (maps - low) / (high - low).clamp_min(1e-12)


def overlap(map1: Tensor, map2: Tensor) -> Tensor:
    """How much two saliency maps of the same places agree: log of the mean product of the maps, each scaled to 0 to 1.

    ``map1, map2``: N x H x W; N values, at most 0, and FLOOR where the product vanishes, as for an empty map.
    """
    return (_unit(map1) * _unit(map2)).mean((1, 2)).clamp_min(math.exp(FLOOR)).log()


def _stream(file: Path, about: dict, rows: range, size: int, compute: Callable[[int, int], dict]) -> list[dict]:
    """Results of ``compute(start, stop)`` over all rows, kept line by line in ``file``: a killed call goes on there."""
    lines: list[dict] = []
    if file.exists():
        for line in file.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break  # torn by a kill
    if not lines or lines[0] != about:
        lines = [about]
    runs.write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
    starts = rows[(len(lines) - 1) * size :: size]
    with open(file, "a") as out:
        for start in runs.progress(
            starts, desc=file.stem, initial=len(lines) - 1, total=len(range(0, len(rows), size))
        ):
            lines.append(compute(start, min(start + size, len(rows))))
            out.write(json.dumps(lines[-1]) + "\n")
            out.flush()
    return lines[1:]


def statistics(
    settings: config.Settings, folder: Path, store_path: Path, *, samples: int, batch_size: int = 64, steps: int = 16
) -> dict[str, np.ndarray]:
    """Saliency over a whole data set (Fig. 5), with bounded memory; an interrupted call resumes, a finished one reads.

    Returns ``overlap common`` and ``overlap unique``: a score for each of the first ``samples`` pairs (``overlap``),
    scaled together to 0 to 1 (section 7), not a number where a map is empty; ``bands <modality> common|unique``: mean
    attribution of each input band by Integrated Gradients, as shares of the sum of absolute values; ``completeness``:
    the largest error of these attributions, relative to the change of the output over the data set.
    """
    store, device = Store(store_path), pretrain.device_of(settings)
    pair, samples = PAIRS[settings.pair], min(samples, len(store))
    found, trained = targets(folder, store, device=device)

    def compute(start: int, stop: int) -> dict:
        images = _images(trained, store, range(start, stop), device)
        line: dict = {}
        for k, part in enumerate(PARTS):
            maps = [gradcam(target, x, k) for target, x in zip(found, images, strict=True)]
            line[f"overlap {part}"] = overlap(*maps).tolist()
            for m, target, x in zip(pair, found, images, strict=True):
                attributions, error = integrated_gradients(target, x, k, steps=steps)
                bands = attributions.mean((2, 3)).sum(0).view(m.preprocessing.copies, -1).sum(0)
                line[f"bands {m.name} {part}"] = bands.tolist()
                change = (attributions.sum((1, 2, 3)) - error).abs()
                line[f"error {m.name} {part}"] = [float(error.abs().sum()), float(change.sum())]
        return line

    about = {"run": Path(folder).name, "settings": trained, "samples": samples, "batch": batch_size, "steps": steps}
    about["images"] = store.sha256
    file = runs.path(settings, "explain", f"{Path(folder).name}.jsonl")
    with runs.locked(file.parent):
        lines = _stream(file, about, range(samples), batch_size, compute)
    made = {f"overlap {part}": np.concatenate([line[f"overlap {part}"] for line in lines]) for part in PARTS}
    made = {name: np.where(values < FLOOR + 1, np.nan, values) for name, values in made.items()}
    every = np.concatenate(list(made.values()))  # which may be without any map
    low, high = np.nanmin(every, initial=np.inf), np.nanmax(every, initial=-np.inf)
    made = {name: (values - low) / max(high - low, 1e-12) for name, values in made.items()}
    worst = 0.0
    for name in (f"{m.name} {part}" for m in pair for part in PARTS):
        bands = np.sum([line[f"bands {name}"] for line in lines], 0)
        made[f"bands {name}"] = bands / max(np.abs(bands).sum(), 1e-12)
        error, change = np.sum([line[f"error {name}"] for line in lines], 0)
        worst = max(worst, float(error / max(change, 1e-12)))
    return made | {"completeness": np.array(worst)}
