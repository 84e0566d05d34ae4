"""Random views of image batches, on the device where the images are, for any number of channels.

In the published order: resized crop, brightness, contrast, grayscale, blur, solarize, flips (paper section 4; Grill et
al. 2020). Different on purpose: values stay in float and are clipped to [0, 1] after brightness and contrast, where 8
bits wrapped around; solarize inverts from 0.5 of the 0-1 scale upwards, where that threshold on the 0-255 scale touched
only zeros; flips are part of the crop, since every other step commutes with them.
Shapes: N samples, C channels, H x W pixels of an image, S x S of a view.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ATTEMPTS = 10  # at a crop that fits, before the central one is taken (as torchvision)
# Values rendered at once: for a CPU's cache, against the cost of a call, and to bound a GPU's memory.
CHUNK = {"matrices": 2**19, "device": 2**26}
SMALL = 48  # side of views, pixels, up to which a CPU too multiplies by whole matrices, many samples in one call
BLOCK = 32  # pixels of a larger view, along a side, that share a window of the image


def _radius(sigma: Tensor) -> Tensor:
    """Kernels have 2 * radius + 1 weights: odd, about 6 sigma; OpenCV's rule for 8-bit images, as published."""
    return ((6 * sigma + 1).round().long() | 1) // 2


def _within(low: float, high: float, u: Tensor) -> Tensor:
    return low + (high - low) * u


@dataclass(frozen=True)
class Policy:
    """What may happen to an image; a probability of 0 leaves the operation out. Defaults: optical and RGB images."""

    size: int = 224  # side of the square view, pixels
    crop_scale: tuple[float, float] = (0.2, 1.0)  # the crop's share of the area, uniform
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # the crop's width / height, log-uniform
    brightness: float = 0.4  # values are multiplied by a factor uniform in 1 ± this
    contrast: float = 0.4  # distances from each channel's mean over the crop likewise
    p_jitter: float = 0.8  # probability of brightness and contrast, together
    p_gray: float = 0.2  # of every channel becoming the mean of all
    p_blur: float = 0.5  # of a Gaussian blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # its standard deviation, pixels of the view, uniform
    p_solarize: float = 0.2  # of values from 0.5 upwards being inverted
    p_hflip: float = 0.5  # of exchanging left and right
    p_vflip: float = 0.5  # of exchanging top and bottom

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "p_jitter", "p_gray", "p_blur", "p_solarize", "p_hflip", "p_vflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Policy.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        for name, top in (("crop_scale", 1), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            if not 0 < getattr(self, name)[0] <= getattr(self, name)[1] <= top:
                raise ValueError(f"Policy.{name} is {getattr(self, name)}; it must be 0 < low <= high <= {top}")
        least = int(_radius(torch.tensor(self.blur_sigma[1]).double())) if self.p_blur else 0
        if self.size <= least:
            raise ValueError(f"Policy.size is {self.size}, a blur reaches {least} px: raise size or lower blur_sigma")


OPTICAL = Policy()
SAR = Policy(p_jitter=0.0, p_solarize=0.0)


def augment(images: Tensor, policy: Policy, *, generator: torch.Generator, part: tuple[int, int] = (0, 1)) -> Tensor:
    """One random view of each image; every sample has its own parameters.

    images: uint8 (N, C, H, W) on any device; with part (k, w) the k-th of w equal parts of a batch, which gets the
    parameters that it gets in the whole batch. Returns float32 (N, C, size, size) in [0, 1] on that device. Parameters
    are drawn from `generator` on the CPU, so the same seed gives the same views on every device, and a GPU is never
    waited for. Raises ValueError for images or a generator that do not fit.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
        found = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"augment takes torch.uint8 (N, C, H, W), got {found}; Modality.encode makes such images")
    kind, (count, channels), size = images.device.type, images.shape[:2], policy.size
    way = "device" if kind != "cpu" else "matrices" if size <= SMALL else "bands"
    shape = (count, channels, size, size) if way == "bands" else (count, size, size, channels)
    # numpy asks Linux for huge pages: a page fault for each 4 KiB of fresh memory costs as much as a crop
    views = torch.from_numpy(np.empty(shape, np.float32)) if kind == "cpu" else torch.empty(shape, device=images.device)
    views = views if way == "bands" else views.permute(0, 3, 1, 2)
    with torch.autocast(kind, enabled=False):  # pixels keep their precision inside a training step
        for plan in _plans(images.shape, policy, way, generator=generator, part=part) if count else ():
            _render(images[plan["samples"]], views[plan["samples"]], plan)
    return views


def draw(count: int, height: int, width: int, policy: Policy, *, generator: torch.Generator) -> dict[str, Tensor]:
    """Parameters of `count` views of height x width images: name -> CPU tensor (count,).

    int64 top, left, height, width: the crop, pixels. Area and ratio are drawn until a crop fits, at most 10 times, else
    it is the largest central one with a permitted ratio (torchvision's RandomResizedCrop). bool hflip, vflip, jitter,
    gray, blur, solarize: what happens. float64 brightness, contrast (factors, 1 without jitter), sigma (pixels).
    Every policy takes equally many random numbers: switching one operation off leaves the others as they were.
    """
    if generator.device.type != "cpu":
        raise ValueError(f"the generator lives on {generator.device}; torch.Generator() makes one for every device")
    (low, high), full = policy.crop_ratio, torch.tensor([[height], [width]], dtype=torch.float64)
    if (least := math.sqrt(policy.crop_scale[0] * height * width * min(low, 1 / high))) < 2:
        found = f"images of {height} x {width} px with crop_scale {policy.crop_scale} give crops {least:.1f} px wide"
        raise ValueError(f"{found}; 2 px are the least: take larger images or raise crop_scale")
    u = torch.rand(2 * ATTEMPTS + 11, count, dtype=torch.float64, generator=generator)
    area = height * width * _within(*policy.crop_scale, u[:ATTEMPTS])
    ratio = _within(math.log(low), math.log(high), u[ATTEMPTS : 2 * ATTEMPTS]).exp()
    central = torch.tensor([min(height, round(width / low)), min(width, round(height * high))]).expand(1, count, 2)
    sides = torch.cat([torch.stack([area / ratio, area * ratio], 2).sqrt().round(), central])  # (11, count, 2)
    first = (sides <= full[:, 0]).all(2).int().argmax(0)
    sides = sides[first, torch.arange(count)].T
    place, rest = u[2 * ATTEMPTS : 2 * ATTEMPTS + 2], iter(u[2 * ATTEMPTS + 2 :])
    corner = torch.where(first < ATTEMPTS, place * (full - sides + 1), (full - sides) / 2).floor()
    drawn = dict(zip(("top", "left", "height", "width"), torch.cat([corner, sides]).long(), strict=True))
    for name in ("hflip", "vflip", "jitter", "gray", "blur", "solarize"):
        drawn[name] = next(rest) < getattr(policy, f"p_{name}")
    for name, most in (("brightness", policy.brightness), ("contrast", policy.contrast)):
        drawn[name] = _within(1 - most, 1 + most, next(rest)).where(drawn["jitter"], 1.0)
    return drawn | {"sigma": _within(*policy.blur_sigma, next(rest))}


def _plans(shape: torch.Size, policy: Policy, way: str, *, generator: torch.Generator, part: tuple) -> list[dict]:
    """All that the host draws and decides for images of ``shape``, for each part of them that is rendered at once."""
    (count, channels, height, width), size = shape, policy.size
    drawn = draw(count * part[1], height, width, policy, generator=generator)
    p = {name: values[count * part[0] :][:count] for name, values in drawn.items()}
    late = p["blur"] & p["jitter"]  # without jitter, crop and blur are both linear, and one resampling does them
    axes = [[p[name] for name in axis] for axis in (("top", "height", "vflip"), ("left", "width", "hflip"))]
    kernels = {"early": _kernels(p["sigma"], p["blur"] & ~late), "late": _kernels(p["sigma"], late)}
    if way == "bands":  # a sample's box is cut out and flipped before it is resampled
        parts = {"box": torch.stack([*axes[0], *axes[1]], 1).tolist()}
        for name, (start, side, flip) in zip(("rows", "columns"), axes, strict=True):
            places = _positions(torch.zeros_like(start), side, torch.zeros_like(flip), size)
            parts[name] = _bands(places, side, kernels["early"])
        places = torch.arange(size, dtype=torch.float64).expand(count, size)
        parts["again"] = _bands(places, torch.full_like(late, size, dtype=torch.int64), kernels["late"])
    else:
        parts = kernels | {name: _positions(*axis, size) for name, axis in zip(("rows", "columns"), axes, strict=True)}
    parts |= {name: p[name] for name in ("brightness", "contrast")}
    chosen = {name: p[name].tolist() for name in ("jitter", "gray", "solarize")} | {"blur": late.tolist()}
    plans, step = [], 1 if way == "bands" else max(1, CHUNK[way] // (channels * size**2))
    for first in range(0, count, step):
        samples = slice(first, first + step)
        plan = {name: [i for i, on in enumerate(values[samples]) if on] for name, values in chosen.items()}
        plans.append(plan | {name: values[samples] for name, values in parts.items()} | {"samples": samples})
    return plans


def _positions(start: Tensor, side: Tensor, flip: Tensor, size: int) -> Tensor:
    """Where in the image, pixels, the centres of a view's pixels lie along one axis: (N, S), never outside the crop."""
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    inside = torch.where(flip[:, None], 1 - centres, centres) * side[:, None] - 0.5
    return inside.clamp(min=0).minimum(side[:, None] - 1) + start[:, None]


def _kernels(sigma: Tensor, chosen: Tensor) -> Tensor:
    """Weights of a blur along one axis: (N, 2 * largest radius + 1); who is not chosen keeps its pixels."""
    radius = _radius(sigma) * chosen
    most = max(radius.tolist(), default=0)
    distance = torch.arange(-most, most + 1)
    weights = torch.exp(-((distance / sigma[:, None]) ** 2) / 2) * (distance.abs() <= radius[:, None])
    return weights / weights.sum(1, keepdim=True)


def _render(images: Tensor, views: Tensor, plan: dict) -> None:
    """Write the views of a part of the batch. What is drawn is known on the host: who is spared pays nothing."""
    if bands := "box" in plan:  # one sample, which stays in the cache
        at, x = dict.fromkeys(("gray", "blur", "solarize"), slice(None)), views
        _by_bands(_box(images[0], *plan["box"][0]), plan["rows"][0], plan["columns"][0], views[0])
        views.div_(255)
    else:
        at = {name: _send(torch.tensor(plan[name]), views) for name in ("gray", "blur", "solarize") if plan[name]}
        x = _by_matrices(images, plan["rows"], plan["columns"], plan["early"]).div_(255)
    if plan["jitter"]:
        brightness, contrast = (_send(plan[k], views)[:, None, None, None] for k in ("brightness", "contrast"))
        centre = x.mul_(brightness).clamp_(0, 1).mean(2, keepdim=True).mean(3, keepdim=True)
        x.mul_(contrast).add_(centre * (1 - contrast)).clamp_(0, 1)
    if plan["gray"]:
        x[at["gray"]] = x[at["gray"]].mean(1, keepdim=True)
    if plan["blur"] and bands:
        _by_bands(x[0], plan["again"][0], plan["again"][0], x[0])
    elif plan["blur"]:
        places = torch.arange(x.shape[-1], dtype=torch.float64).expand(len(plan["blur"]), -1)
        x[at["blur"]] = _by_matrices(x[at["blur"]], places, places, plan["late"][plan["blur"]])
    if plan["solarize"]:
        x[at["solarize"]] = torch.minimum(x[at["solarize"]], 1 - x[at["solarize"]])
    torch.clamp(x, 0, 1, out=views)  # also where nothing was changed: interpolation can overshoot by rounding errors


def _send(values: Tensor, like: Tensor) -> Tensor:
    values = values.float() if values.is_floating_point() else values
    # only from pinned memory does the host not wait
    return values.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else values.to(like.device)


def _weights(positions: Tensor, kernels: Tensor, width: int) -> Tensor:
    """What pixels take from windows of ``width`` pixels, (N, blocks, pixels, width): linear interpolation, then a blur.

    positions: in the window, (N, blocks, pixels and, on either side, as many as the kernels' radius); kernels (N, k).
    """
    weights = torch.arange(width, device=positions.device) - positions[..., None]
    weights = weights.abs_().neg_().add_(1).clamp_(min=0)
    (count, taps), length = kernels.shape, positions.shape[-1]
    if taps == 1:
        return weights
    rows = length - taps + 1
    blur = positions.new_zeros(count, 1, rows, length)  # the kernel in each row, one place further each time
    blur.as_strided((count, rows, taps), (rows * length, length + 1, 1)).copy_(kernels[:, None])
    return blur @ weights


def _reflected(size: int, blocks: int, radius: int) -> Tensor:
    """Numbers of the pixels of each block of a row, with ``radius`` on either side, mirrored at the row's ends."""
    block = -(-size // blocks)
    places = torch.arange(blocks)[:, None] * block + torch.arange(-radius, block + radius)
    return size - 1 - (size - 1 - places.abs()).abs()


def _by_matrices(images: Tensor, rows: Tensor, columns: Tensor, kernels: Tensor) -> Tensor:
    """rows @ image @ columns.T with the weights of ``_weights``, all samples in one call; rows and columns: positions.

    images: (N, C, H, W); returns float32 (N, C, S, S), in memory (N, S, C, S).
    """
    (count, channels, height, width), size = images.shape, rows.shape[1]
    reflected, kernels = _reflected(size, 1, kernels.shape[1] // 2), _send(kernels, images)
    rows, columns = (_send(x[:, reflected], images) for x in (rows, columns))
    images = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    made = images.view(count, height * channels, width) @ _weights(columns, kernels, width)[:, 0].mT
    made = _weights(rows, kernels, height)[:, 0] @ made.view(count, height, channels * size)
    return made.view(count, size, channels, size).transpose(1, 2)


def _bands(positions: Tensor, sides: Tensor, kernels: Tensor) -> list[tuple[Tensor, int, int]]:
    """For each sample and one axis: weights of windows, pixels from one to the next, and pixels before the box."""
    size = positions.shape[1]
    blocks = -(-size // BLOCK)
    reached = positions[:, _reflected(size, blocks, kernels.shape[1] // 2)]
    steps = sides * -(-size // blocks) // size
    starts = steps[:, None] * torch.arange(blocks)
    before = (starts - reached.amin(2).long()).amax(1).clamp(min=0)
    inside = reached - (starts - before[:, None])[:, :, None]
    weights = _weights(inside.float(), kernels.float(), int(inside.amax()) + 2)
    return list(zip(weights, steps.tolist(), before.tolist(), strict=True))


def _box(image: Tensor, top: int, height: int, vflip: int, left: int, width: int, hflip: int) -> Tensor:
    box = image[:, top : top + height, left : left + width]
    return box.flip([axis for axis, flip in ((1, vflip), (2, hflip)) if flip]) if vflip or hflip else box


def _by_bands(box: Tensor, rows: tuple, columns: tuple, out: Tensor) -> None:
    """The same for one box (C, H, W), written to ``out`` (C, S, S), without most of what has no weight.

    Blocks of pixels have a window of the box each; the box stands in zeros, which the windows may reach into.
    """
    (rows, down, above), (columns, right, before), size = rows, columns, out.shape[-1]
    (channels, height, width), (blocks, block, high), wide = box.shape, rows.shape, columns.shape[2]
    tall, broad = (max(above + height, down * (blocks - 1) + high), max(before + width, right * (blocks - 1) + wide))
    inside, line = torch.zeros(tall, channels, broad), channels * broad
    inside[above : above + height, :, before : before + width] = box.transpose(0, 1)
    lines = torch.bmm(rows, inside.as_strided((blocks, high, line), (down * line, line, 1))).view(-1, broad)
    pixels = torch.bmm(lines.as_strided((blocks, len(lines), wide), (right, broad, 1)), columns.mT)
    pixels = pixels.view(blocks, blocks * block, channels, block).permute(2, 1, 0, 3)
    if blocks * block == size:
        out.view(pixels.shape).copy_(pixels)
    else:
        out.copy_(pixels.flatten(2)[:, :size, :size])
