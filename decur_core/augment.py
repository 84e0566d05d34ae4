"""Random views of image batches, on the device where the images are, for any number of channels.

In the published order: resized crop, brightness, contrast, grayscale, blur, solarize, flips (paper section 4; Grill et
al. 2020). Different on purpose: values stay in float and are clipped to [0, 1] after brightness and contrast, where 8
bits wrapped around; solarize inverts from 0.5 of the 0-1 scale upwards, where that threshold on the 0-255 scale touched
only zeros; flips are part of the crop, since every other step commutes with them.
Shapes: N samples, C channels, H x W pixels of an image, S x S of a view.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ATTEMPTS = 10  # at a crop that fits, before the central one is taken (as torchvision)
# Values rendered at once: for a CPU's cache, against the cost of a call, and to bound a GPU's memory.
CHUNK = {"cpu": 2**18, "device": 2**26}
SMALL = 48  # side of views, pixels, up to which a CPU too multiplies by whole matrices, many samples in one call
BLOCK = 16  # pixels of a larger view, along a side, that share a window of the image


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
    bands = kind == "cpu" and size > SMALL
    shape = (count, channels, size, size) if bands else (count, size, size, channels)
    # numpy asks Linux for huge pages: a page fault for each 4 KiB of fresh memory costs as much as a crop
    views = torch.from_numpy(np.empty(shape, np.float32)) if kind == "cpu" else torch.empty(shape, device=images.device)
    views = views if bands else views.permute(0, 3, 1, 2)
    with torch.autocast(kind, enabled=False):  # pixels keep their precision inside a training step
        plan = _plan(images.shape, policy, bands, generator=generator, part=part)
        (_render_each if bands else _render_all)(images, views, plan)
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


def _plan(shape: torch.Size, policy: Policy, bands: bool, *, generator: torch.Generator, part: tuple) -> dict:
    """All that the host draws and decides for images of ``shape``, so that it never has to ask the device."""
    (count, _, height, width), size = shape, policy.size
    drawn = draw(count * part[1], height, width, policy, generator=generator)
    p = {name: values[count * part[0] :][:count] for name, values in drawn.items()}
    late = p["blur"] & p["jitter"]  # without jitter, crop and blur are both linear, and one resampling does them
    chosen = {"jitter": p["jitter"], "gray": p["gray"], "late": late, "solarize": p["solarize"]}
    plan: dict = {name: on.nonzero()[:, 0] for name, on in chosen.items()}
    plan |= {"brightness": p["brightness"], "contrast": p["contrast"]}
    early, again = _kernels(p["sigma"], p["blur"] & ~late), _kernels(p["sigma"][late], late[late])
    axes = [[p[name] for name in axis] for axis in (("top", "height", "vflip"), ("left", "width", "hflip"))]
    if bands:  # a sample's box is cut out and flipped before it is resampled
        plan["boxes"] = torch.stack([*axes[0], *axes[1]], 1).tolist()
        axes = [(torch.zeros_like(start), side, torch.zeros_like(flip)) for start, side, flip in axes]
    rows, columns = (_positions(*axis, size) for axis in axes)
    same = torch.arange(size, dtype=torch.float64).expand(len(again), size)
    if bands:
        plan |= {"rows": _bands(rows, p["height"], early), "columns": _bands(columns, p["width"], early)}
        plan["again"] = _bands(same, torch.full((len(again),), size), again)
        reach = [max((tall for *_, tall in x), default=0) for x in (plan["rows"], plan["columns"], plan["again"])]
        return plan | {"room": max(reach[0] * reach[1], reach[2] ** 2)}
    mirrored = {"rows": (rows, early), "columns": (columns, early), "same": (same, again)}
    plan |= {name: x[:, _mirrored(size, 1, kernels)] for name, (x, kernels) in mirrored.items()}
    return plan | {"early": early, "again": again}


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


def _mirrored(size: int, blocks: int, kernels: Tensor) -> Tensor:
    """Numbers of the pixels of each block of a row, with a kernel's radius on either side, mirrored at the ends."""
    block, radius = -(-size // blocks), kernels.shape[1] // 2
    places = torch.arange(blocks)[:, None] * block + torch.arange(-radius, block + radius)
    return size - 1 - (size - 1 - places.abs()).abs()


def _send(values: Tensor, like: Tensor) -> Tensor:
    values = values.float() if values.is_floating_point() else values
    # only from pinned memory does the host not wait
    return values.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else values.to(like.device)


def _weights(positions: Tensor, kernels: Tensor, width: int) -> Tensor:
    """What pixels take from windows of ``width`` pixels, (N, blocks, pixels, width): linear interpolation, then a blur.

    positions: in the window, (N, blocks, pixels and, on either side, as many as the kernels' radius); kernels (N, k).
    """
    low = positions.long()[..., None]
    share, high = positions[..., None] - low, (low + 1).clamp_(max=width - 1)
    weights = positions.new_zeros(*positions.shape, width).scatter_(-1, high, share).scatter_(-1, low, 1 - share)
    (count, taps), length = kernels.shape, positions.shape[-1]
    if taps == 1:
        return weights
    rows = length - taps + 1
    blur = positions.new_zeros(count, 1, rows, length)  # the kernel in each row, one place further each time
    blur.as_strided((count, rows, taps), (rows * length, length + 1, 1)).copy_(kernels[:, None])
    return blur @ weights


def _render_all(images: Tensor, views: Tensor, plan: dict) -> None:
    """Write the views of many samples in each call. Who is spared an operation pays nothing."""
    sent, size = {name: _send(values, views) for name, values in plan.items()}, views.shape[-1]
    brightness, contrast = (sent[name][:, None, None, None] for name in ("brightness", "contrast"))
    rows = _weights(sent["rows"], sent["early"], images.shape[2])[:, 0]
    columns = _weights(sent["columns"], sent["early"], images.shape[3])[:, 0]
    again = _weights(sent["same"], sent["again"], size)[:, 0]
    where = [plan[name].tolist() for name in ("jitter", "gray", "late", "solarize")]
    step = max(1, CHUNK["cpu" if views.device.type == "cpu" else "device"] // (images.shape[1] * size**2))
    for first in range(0, len(images), step):
        part = slice(first, first + step)
        jitter, gray, late, solarize = (slice(bisect_left(x, first), bisect_left(x, first + step)) for x in where)
        x = _resample(images[part], rows[part], columns[part]).div_(255)
        if jitter.start < jitter.stop:
            centre = x.mul_(brightness[part]).clamp_(0, 1).mean(2, keepdim=True).mean(3, keepdim=True)
            x.mul_(contrast[part]).add_(centre * (1 - contrast[part])).clamp_(0, 1)
        if gray.start < gray.stop:
            at = sent["gray"][gray] - first
            x[at] = x[at].mean(1, keepdim=True)
        if late.start < late.stop:
            at = sent["late"][late] - first
            x[at] = _resample(x[at], again[late], again[late])
        if solarize.start < solarize.stop:
            at = sent["solarize"][solarize] - first
            x[at] = torch.minimum(x[at], 1 - x[at])
        torch.clamp(x, 0, 1, out=views[part])  # in any case: interpolation can overshoot by rounding errors


def _resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns.T for each channel: (N, C, H, W), (N, S, H), (N, S, W) -> float32 (N, C, S, S).

    In memory the result is (N, S, C, S), which takes two products for a sample, not two for each of its channels.
    """
    count, channels, height, width = images.shape
    images = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    made = images.view(count, height * channels, width) @ columns.mT
    return (rows @ made.view(count, height, -1)).view(count, -1, channels, columns.shape[1]).transpose(1, 2)


def _render_each(images: Tensor, views: Tensor, plan: dict) -> None:
    """The same for one sample after the other, which stays in the cache, and without most of what has no weight."""
    jitter, gray, solarize = (set(plan[name].tolist()) for name in ("jitter", "gray", "solarize"))
    again = dict(zip(plan["late"].tolist(), plan["again"], strict=True))
    brightness, contrast = plan["brightness"].tolist(), plan["contrast"].tolist()
    scratch = torch.zeros(views.shape[1] * plan["room"])
    for i, (top, height, vflip, left, width, hflip) in enumerate(plan["boxes"]):
        box, x = images[i, :, top : top + height, left : left + width], views[i]
        box = box.flip([axis for axis, flip in ((1, vflip), (2, hflip)) if flip]) if vflip or hflip else box
        _by_bands(box, plan["rows"][i], plan["columns"][i], 255, scratch, out=x)
        x.div_(255)
        if i in jitter:
            centre = x.mul_(brightness[i]).clamp_(0, 1).mean((1, 2), keepdim=True)
            x.mul_(contrast[i]).add_(centre * (1 - contrast[i])).clamp_(0, 1)
        if i in gray:
            x.copy_(x.mean(0))
        if i in again:
            _by_bands(x, again[i], again[i], 1, scratch, out=x)
        if i in solarize:
            x.sub_(0.5).abs_().neg_().add_(0.5)  # min(x, 1 - x), in place


def _bands(positions: Tensor, sides: Tensor, kernels: Tensor) -> list[tuple[Tensor, int, int, int]]:
    """Of each sample, along one axis: weights of windows, pixels from one to the next, before the box, and in all."""
    count, size = positions.shape
    blocks = -(-size // BLOCK)
    reached = positions[:, _mirrored(size, blocks, kernels)]
    steps = sides * -(-size // blocks) // size
    starts = steps[:, None] * torch.arange(blocks)
    before = (starts - reached.amin(2).long()).amax(1).clamp(min=0)
    inside = reached - (starts - before[:, None])[:, :, None]
    width = int(inside.amax()) + 2 if count else 0
    extent = (steps * (blocks - 1) + width).maximum(before + sides)
    weights = _weights(inside.float(), kernels.float(), width)
    return list(zip(weights, steps.tolist(), before.tolist(), extent.tolist(), strict=True))


def _by_bands(box: Tensor, rows: tuple, columns: tuple, most: float, scratch: Tensor, *, out: Tensor) -> None:
    """``_resample`` of one box (C, H, W) with values from 0 to ``most``, in blocks of pixels with a window of the box.

    The box stands in a larger one, so that windows can follow each other at equal steps. What is around it, in
    ``scratch``, has no weight and must be finite. ``out``: (C, S, S).
    """
    (rows, down, above, tall), (columns, right, before, broad), size = rows, columns, out.shape[-1]
    (channels, height, width), (blocks, block, high), wide = box.shape, rows.shape, columns.shape[2]
    line = channels * broad
    inside = scratch[: tall * line].view(tall, channels, broad)
    inside[above : above + height, :, before : before + width] = box.transpose(0, 1)
    lines = torch.bmm(rows, inside.as_strided((blocks, high, line), (down * line, line, 1))).view(-1, broad)
    pixels = torch.bmm(lines.as_strided((blocks, len(lines), wide), (right, broad, 1)), columns.mT)
    pixels = pixels.view(blocks, blocks * block, channels, block).permute(2, 1, 0, 3)
    if blocks * block == size:
        torch.clamp(pixels, 0, most, out=out.view(pixels.shape))  # interpolation can overshoot by rounding errors
    else:
        torch.clamp(pixels.flatten(2)[:, :size, :size], 0, most, out=out)
