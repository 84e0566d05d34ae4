"""Where and in which bands encoders look for what is common and what is unique (paper, section 7).

Attributions explain two numbers per image, the mean of its common and of its unique embedding dimensions (Algorithm 2).
The embedding is standardised with statistics of many images and not of the batch: in training mode the mean of a
standardised dimension is 0 in every batch, and one image's attribution would depend on its neighbours.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decur_core import config, pretrain
from decur_core.data.store import Store
from decur_core.explain.embeddings import blocks, embeddings
from decur_core.model import MultimodalModel
from decur_core.running import folders as runs
from decur_core.running import history
from decur_core.running.files import disk
from decur_core.transfer.encoders import images, load_pretrained

__all__ = ["CommonUnique", "PARTS", "example_maps", "gradcam", "integrated_gradients", "overlap"]
__all__ += ["statistics", "targets"]
PARTS = ("common", "unique")
FLOOR = math.log(1e-12)


class CommonUnique(nn.Module):
    """Images of one modality to two numbers each: the means of the common and of the unique standardised dimensions.

    ``parts``: which of the K dimensions are common, and which unique; ``mean, std``: of each dimension over many
    images; constant dimensions count as 0.
    """

    def __init__(self, model: MultimodalModel, modality: str, parts: Sequence[list[int]], mean: Tensor, std: Tensor):
        super().__init__()
        self.model, self.modality = model.eval(), modality
        scale = torch.where(std > 1e-6 * mean.abs().max().clamp_min(1e-6), 1 / std, 0.0)
        weights = torch.zeros(len(mean), len(parts))
        for k, part in enumerate(parts):
            weights[list(part), k] = 1 / max(len(part), 1)
        self.register_buffer("mean", mean)
        self.register_buffer("weights", scale[:, None] * weights)

    def forward(self, images: Tensor) -> Tensor:
        """N x C x H x W in [0, 1] to N x 2; a part without dimensions gives 0."""
        return (self.model.embed(self.modality, images).float() - self.mean) @ self.weights

    def last_convolution(self) -> nn.Conv2d:
        """The backbone's last, where saliency is looked at (section 7); in a Mix Transformer a depthwise one."""
        found = [m for m in self.model.backbones[self.modality].modules() if isinstance(m, nn.Conv2d)]
        if not found:
            raise ValueError(f"the backbone of {self.modality} has no convolution to look at; gradcam needs one")
        return found[-1]


def targets(folder: Path, store: Store, *, samples: int = 1024, device="cpu") -> tuple[dict, dict, dict]:
    """What attributions explain, a ``CommonUnique`` for each modality of a finished run; its modalities and settings.

    Common is what a modality shares with any other, unique what it shares with none (``embeddings.blocks``).
    """
    model, modalities, settings = load_pretrained(folder)
    embedded, made = embeddings(folder, store, samples=samples, device=device), {}
    for m, there in blocks(settings, {m: z.shape[1] for m, z in embedded.items()}).items():
        parts: tuple[list[int], list[int]] = ([], [])
        for block, where in there.items():
            parts[block == m].extend(range(where.start, where.stop))
        z = embedded[m]
        made[m] = CommonUnique(model, m, parts, z.mean(0), z.std(0)).to(device)
    return made, modalities, settings


def gradcam(target: CommonUnique, images: Tensor, part: int) -> Tensor:
    """GradCAM (Selvaraju et al. 2017) of part 0 (common) or 1 (unique): N x H x W, at least 0, of the images' size.

    The map of the last convolution, weighted by its mean gradients, negative values cut, upsampled bilinearly.
    """
    from captum.attr import LayerGradCam  # here: with what it imports it takes a second

    maps = LayerGradCam(target, target.last_convolution()).attribute(images, target=part, relu_attributions=True)
    return F.interpolate(maps.detach().float(), size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def integrated_gradients(target: CommonUnique, images: Tensor, part: int, *, steps: int = 50) -> tuple[Tensor, Tensor]:
    """Integrated Gradients (Sundararajan et al. 2017) from a black image: attributions like ``images``, and the error.

    The error (N) is the sum of an image's attributions minus the change of the output, 0 for infinitely many steps.
    """
    from captum.attr import IntegratedGradients  # as above

    options = {"target": part, "n_steps": steps, "internal_batch_size": max(len(images), 64)}
    found, error = IntegratedGradients(target).attribute(images, return_convergence_delta=True, **options)
    return found.detach().float(), error.detach().float()


def example_maps(settings: config.Settings, folder: Path, store_path: Path, *, count: int = 4) -> list[dict]:
    """Images and their GradCAM maps, for ``pictures.saliency``: a row per item, evenly taken from the store."""
    store, device = Store(store_path), pretrain.device_of(settings)
    found, modalities, trained = targets(folder, store, device=device)
    rows = [round(k * (len(store) - 1) / max(count - 1, 1)) for k in range(count)]
    columns: dict[str, list] = {}
    for name, x in images(store, modalities.values(), rows, trained["crop_size"], device).items():
        columns[name] = list(x.cpu().numpy())
        for k, part in enumerate(PARTS):
            maps = gradcam(found[name], x, k).cpu().numpy()
            columns[f"{name}, {part}"] = list(zip(columns[name], maps, strict=True))
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


def _stream(file: Path, about: dict, rows: range, size: int, compute: Callable[[range], dict]) -> list[dict]:
    """Results of ``compute`` over all rows, kept line by line in ``file``: a killed call goes on there."""
    lines = history.read(file.parent, file.name)
    if lines[:1] != [about]:
        lines = [about]
    runs.write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
    starts = rows[(len(lines) - 1) * size :: size]
    total = len(range(0, len(rows), size))
    for start in runs.progress(starts, desc=file.stem, initial=len(lines) - 1, total=total):
        lines.append(compute(rows[start : start + size]))
        with disk(file), open(file, "a") as out:
            out.write(json.dumps(lines[-1]) + "\n")
    return lines[1:]


def statistics(
    settings: config.Settings, folder: Path, store_path: Path, *, samples: int, batch_size: int = 64, steps: int = 16
) -> dict[str, np.ndarray]:
    """Saliency over a whole data set (Fig. 5), with bounded memory; an interrupted call resumes, a finished one reads.

    Returns ``overlap common`` and ``overlap unique``: a score for each of the first ``samples`` items (``overlap``),
    scaled together to 0 to 1 (section 7), not a number where a map is empty; of more than two modalities for every two
    of them, ``overlap <m>+<n> common|unique``. ``bands <m> common|unique``: mean attribution of each input band by
    Integrated Gradients, as shares of the sum of absolute values; ``completeness``: the largest error of these
    attributions, relative to the change of the output over the data set.
    """
    store, device = Store(store_path), pretrain.device_of(settings)
    found, modalities, trained = targets(folder, store, device=device)
    pairs = list(itertools.combinations(modalities, 2))
    names = {pair: f"overlap {'+'.join(pair)}" if len(pairs) > 1 else "overlap" for pair in pairs}

    def compute(rows: range) -> dict:
        seen = images(store, modalities.values(), rows, trained["crop_size"], device)
        line: dict = {}
        for k, part in enumerate(PARTS):
            maps = {m: gradcam(found[m], x, k) for m, x in seen.items()}
            for (m, n), name in names.items():
                line[f"{name} {part}"] = overlap(maps[m], maps[n]).tolist()
            for m, x in seen.items():
                attributions, error = integrated_gradients(found[m], x, k, steps=steps)
                bands = attributions.mean((2, 3)).sum(0).view(modalities[m].copies, -1).sum(0)
                line[f"bands {m} {part}"] = bands.tolist()
                change = (attributions.sum((1, 2, 3)) - error).abs()
                line[f"error {m} {part}"] = [float(error.abs().sum()), float(change.sum())]
        return line

    rows = range(min(samples, len(store)))
    about = {"run": Path(folder).name, "settings": trained, "samples": len(rows), "batch": batch_size, "steps": steps}
    about["images"] = store.sha256
    file = runs.path(settings, "explain", f"{Path(folder).name}.jsonl")
    with runs.locked(file.parent, name=f".{file.name}.lock"):
        lines = _stream(file, about, rows, batch_size, compute)
    overlaps = [f"{name} {part}" for name in names.values() for part in PARTS]
    made = {name: np.concatenate([line[name] for line in lines]) for name in overlaps}
    made = {name: np.where(values < FLOOR + 1, np.nan, values) for name, values in made.items()}
    every = np.concatenate(list(made.values()))  # which may be without any map
    low, high = np.nanmin(every, initial=np.inf), np.nanmax(every, initial=-np.inf)
    made = {name: (values - low) / max(high - low, 1e-12) for name, values in made.items()}
    worst = 0.0
    for name in (f"{m} {part}" for m in modalities for part in PARTS):
        bands = np.sum([line[f"bands {name}"] for line in lines], 0)
        made[f"bands {name}"] = bands / max(np.abs(bands).sum(), 1e-12)
        error, change = np.sum([line[f"error {name}"] for line in lines], 0)
        worst = max(worst, float(error / max(change, 1e-12)))
    return made | {"completeness": np.array(worst)}
