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
import torch.nn.functional as F
from torch import Tensor

ATTEMPTS = 10  # at a crop that fits, before the central one is taken (as torchvision)
# Values rendered at once: for a CPU's cache, against the cost of a call where samples go one by one, and to bound a
# GPU's memory.
CHUNK = {"matrices": 2**18, "one by one": 2**21, "cuda": 2**26}
SMALL = 48  # side of views, pixels, up to which a CPU too is faster with matrices for many samples than with a loop


def _radius(sigma: float) -> int:
    """Kernels have 2 * radius + 1 weights: odd, about 6 sigma; OpenCV's rule for 8-bit images, as published."""
    return (round(6 * sigma + 1) | 1) // 2


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
        if self.size <= (least := _radius(self.blur_sigma[1]) if self.p_blur else 0):
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
        raise ValueError(f"augment takes torch.uint8 (N, C, H, W), got {found}; Preprocessing.encode makes such images")
    count, channels, height, width = images.shape
    drawn = draw(count * part[1], height, width, policy, generator=generator)
    drawn = {name: values[count * part[0] :][:count] for name, values in drawn.items()}
    drawn["rows"] = _positions(drawn["top"], drawn["height"], drawn["vflip"], policy.size)
    drawn["columns"] = _positions(drawn["left"], drawn["width"], drawn["hflip"], policy.size)
    shape, on_cpu, scratch = (count, channels, policy.size, policy.size), images.device.type == "cpu", None
    # numpy asks Linux for huge pages: a page fault for each 4 KiB of fresh memory costs as much as a crop
    views = torch.from_numpy(np.empty(shape, np.float32)) if on_cpu else torch.empty(shape, device=images.device)
    way = "matrices" if on_cpu else "cuda"
    if on_cpu and policy.size > SMALL:  # large temporaries would cost more in page faults than in arithmetic
        way = "one by one"
        side = max(policy.size + 2 * _radius(policy.blur_sigma[1]), height, width)
        scratch = torch.empty(3, channels * side**2)
    step = max(1, CHUNK[way] // (channels * policy.size**2))
    with torch.autocast(images.device.type, enabled=False):  # pixels keep their precision inside a training step
        for i in range(0, count, step):
            _render(images[i : i + step], views[i : i + step], {k: v[i : i + step] for k, v in drawn.items()}, scratch)
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


def _positions(start: Tensor, side: Tensor, flip: Tensor, size: int) -> Tensor:
    """Where in the image, pixels, the centres of a view's pixels lie along one axis: (N, S), never outside the crop."""
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    inside = torch.where(flip[:, None], 1 - centres, centres) * side[:, None] - 0.5
    return inside.clamp(min=0).minimum(side[:, None] - 1) + start[:, None]


def _render(images: Tensor, views: Tensor, drawn: dict[str, Tensor], scratch: Tensor | None) -> None:
    """Write the views of a part of the batch. What is drawn is known on the host: who is spared pays nothing."""
    crop, blur = (_crop_all, _blur_all) if scratch is None else (_crop_each, _blur_each)
    crop(images, views, drawn, scratch)
    jitter, gray, chosen, solarize = (drawn[k].nonzero()[:, 0] for k in ("jitter", "gray", "blur", "solarize"))
    if len(jitter):
        brightness, contrast = (_send(drawn[k], views)[:, None, None, None] for k in ("brightness", "contrast"))
        centre = views.mul_(brightness).clamp_(0, 1).mean((2, 3), keepdim=True)
        views.mul_(contrast).add_(centre * (1 - contrast))
    views.clamp_(0, 1)  # also without jitter: interpolation can overshoot by a rounding error
    for i in gray.tolist():
        views[i] = views[i].mean(0)
    if len(chosen):
        blur(views, chosen, drawn["sigma"][chosen], scratch)
    for i in solarize.tolist():
        views[i].sub_(0.5).abs_().neg_().add_(0.5)  # min(x, 1 - x), in place


def _send(values: Tensor, like: Tensor) -> Tensor:
    values = values.float() if values.is_floating_point() else values
    # only from pinned memory does the host not wait
    return values.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else values.to(like.device)


def _resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns.T for each channel: (N, C, H, W), (N, S, H), (N, S, W) -> (N, C, S, S)."""
    count, channels, height, width = images.shape
    images = torch.bmm(images.reshape(count, channels * height, width), columns.mT)
    return rows[:, None] @ images.view(count, channels, height, -1)


def _crop_all(images: Tensor, views: Tensor, drawn: dict[str, Tensor], _: None) -> None:
    """Bilinear resampling by matrices with two weights in a row, hat functions of the distance in pixels."""
    weights = []
    for name, full in zip(("rows", "columns"), images.shape[2:], strict=True):
        distance = _send(drawn[name], views)[:, :, None] - torch.arange(full, device=views.device)
        weights.append((1 - distance.abs_()).clamp_(min=0))
    views.copy_(_resample(images.float().div_(255), *weights))


def _crop_each(images: Tensor, views: Tensor, drawn: dict[str, Tensor], scratch: Tensor) -> None:
    """The same from each sample's own box: rows first, which lie together in memory, then columns."""
    boxes = torch.stack([drawn[name] for name in ("top", "left", "height", "width", "hflip")], 1).tolist()
    inside = drawn["rows"] - drawn["top"][:, None]
    upper = inside.long()
    lower, share = (upper + 1).minimum(drawn["height"][:, None] - 1), (inside - upper).float()[:, :, None]
    for i, (top, left, height, width, flip) in enumerate(boxes):
        source, channels, size = images[i, :, top : top + height, left : left + width], *views.shape[1:3]
        box = scratch[0, : source.numel()].view(source.shape)
        above, below = scratch[1:, : channels * size * width].view(2, channels, size, width)
        torch.div(source.flip(2) if flip else source, 255, out=box)
        torch.index_select(box, 1, upper[i], out=above)
        torch.index_select(box, 1, lower[i], out=below)
        torch.ops.aten.upsample_linear1d.out(above.lerp_(below, share[i]), [size], False, None, out=views[i])


def _blur_all(views: Tensor, chosen: Tensor, sigma: Tensor, _: None) -> None:
    """Matrices with a sample's kernel in each row, at the place of the pixel it gives."""
    size, radius = views.shape[-1], torch.tensor([_radius(value) for value in sigma.tolist()])
    pad = int(radius.max())
    distance = torch.arange(-pad, size + pad, device=views.device) - torch.arange(size, device=views.device)[:, None]
    sigma, radius, at = _send(sigma, views)[:, None, None], _send(radius, views)[:, None, None], _send(chosen, views)
    weights = torch.exp(-((distance / sigma) ** 2) / 2) * (distance.abs() <= radius)
    weights /= weights.sum(2, keepdim=True)
    views[at] = _resample(F.pad(views[at], (pad,) * 4, mode="reflect"), weights, weights).clamp_(0, 1)


def _blur_each(views: Tensor, chosen: Tensor, sigmas: Tensor, scratch: Tensor) -> None:
    """Shifted copies of the padded image, added up as one long row of values: what runs over an edge stays in the
    padding, and additions of long rows are what a CPU does best."""
    for i, sigma in zip(chosen.tolist(), sigmas.tolist(), strict=True):
        view, radius = views[i], _radius(sigma)
        kernel = [math.exp(-((k / sigma) ** 2) / 2) for k in range(-radius, radius + 1)]
        kernel = [weight / math.fsum(kernel) for weight in kernel]
        side = view.shape[-1] + 2 * radius
        row, other = scratch[:2, : view.shape[0] * side**2]
        torch.ops.aten.reflection_pad2d.out(view, (radius,) * 4, out=row.view(-1, side, side))
        for stride in (side, 1):
            length = len(row) - 2 * radius * stride
            other = torch.mul(row[:length], kernel[0], out=other[:length])
            for k in range(1, 2 * radius + 1):
                other.add_(row[k * stride : k * stride + length], alpha=kernel[k])
            row, other = other, row
        torch.clamp(row.as_strided(view.shape, (side**2, side, 1)), 0, 1, out=view)
