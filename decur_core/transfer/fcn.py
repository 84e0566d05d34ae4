"""Semantic segmentation: a simple network on pretrained encoders, crops, and multi-scale prediction.

Targets and predictions are int64, the number of a class or IGNORE = unlabelled, see ``data/tasks.py``.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decur_core import augment, backbones
from decur_core.data.tasks import IGNORE
from decur_core.transfer.encoders import OnEncoders

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of images in the training of the published CMX


class FCN(OnEncoders):
    """A fully convolutional network on the last three feature maps of each encoder (paper, appendix B).

    For each of the three stages, the maps of the encoders side by side, a 1x1 convolution to ``classes`` channels, and
    upsampling to the input size; the sum of the three are the logits. (The paper upsamples first; the two commute.)

    The published script has another linear layer (128, 256, 512 channels) before each classifier and a channel for the
    unlabelled; it classifies the upsampled maps. On two ResNet-50s and 224 x 224 pixels it has 49,779,361 parameters in
    use and takes 17.95 GFLOP; one layer, as in the paper, 47,087,774 and 16.38. Where the paper is silent this follows
    the script: the upsampling is bilinear and keeps the corners aligned.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], *, classes: int, frozen: bool = False):
        super().__init__(encoders, frozen=frozen)
        widths = zip(*(encoder.widths[-3:] for encoder in self.encoders.values()), strict=True)
        self.heads = nn.ModuleList([nn.Conv2d(sum(each), classes, 1) for each in widths])

    def forward(self, *images: Tensor) -> Tensor:
        """Float images of each encoder's modality (N x C x H x W) to float32 logits, N x classes x H x W."""
        with self.encoding():
            given = zip(self.encoders.values(), images, strict=True)
            pyramids = [backbones.feature_maps(encoder, x)[-3:] for encoder, x in given]
        logits = 0
        for head, maps in zip(self.heads, zip(*pyramids, strict=True), strict=True):
            coarse = head(torch.cat(maps, 1)).float()
            logits = logits + F.interpolate(coarse, size=images[0].shape[2:], mode="bilinear", align_corners=True)
        return logits


@torch.inference_mode()
def predict(
    network: nn.Module, images: Sequence[Tensor], *, scales: Sequence[float] = (1.0,), flip: bool = False, window=None
) -> Tensor:
    """The class of every pixel, int64 N x H x W; in eval mode, so the samples of a batch do not influence each other.

    ``images``: what the network takes, each float N x C x H x W. Votes are added up over ``scales`` of the images and,
    with ``flip``, logits with those of the mirrored images, as the published CMX does: a vote is exp(logit), resized to
    the image. With ``window`` (height, width in pixels), also as published, an image no larger than it in one direction
    is padded with zeros to it and seen whole, any other through windows that advance by two thirds and whose votes add
    up. Different from there: images are not rounded to 8 bits after resizing, and height and width of a window are not
    exchanged where windows slide (of 600 x 800 pixels, that left all rows but the last 40 without a vote).
    """
    training, size, votes = network.training, images[0].shape[2:], 0
    network.eval()
    for scale in scales:
        shape = [round(scale * side) for side in size]
        scaled = [F.interpolate(x, size=shape, mode="bilinear") for x in images]
        votes = votes + F.interpolate(_votes(network, scaled, flip, window or shape), size=size, mode="bilinear")
    network.train(training)
    return votes.argmax(1)


def _votes(network: nn.Module, images: list[Tensor], flip: bool, window: Sequence[int]) -> Tensor:
    def seen(parts: list[Tensor]) -> Tensor:
        logits = network(*parts).double()  # whose exp would overflow in float32 from 89
        if flip:
            logits += network(*(x.flip(3) for x in parts)).flip(3)
        return logits.exp()

    (height, width), total = images[0].shape[2:], 0
    if height <= window[0] or width <= window[1]:
        left, _, top, _ = margins = _margins((height, width), window)
        return seen([F.pad(x, margins) for x in images])[:, :, top : top + height, left : left + width]
    for top, left in itertools.product(_starts(height, window[0]), _starts(width, window[1])):
        part = seen([x[:, :, top : top + window[0], left : left + window[1]] for x in images])
        total = total + F.pad(part, (left, width - left - window[1], top, height - top - window[0]))
    return total


def _margins(shape: Sequence[int], size: Sequence[int]) -> tuple[int, int, int, int]:
    """What to pad an image with, left, right, top and bottom, so that it is at least of ``size`` (height, width)."""
    rows, columns = (max(want - have, 0) for have, want in zip(shape, size, strict=True))
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2


def _starts(side: int, window: int) -> list[int]:
    """Where windows begin along one axis: every two thirds of a window, the last one at the border."""
    step = math.ceil(window * 2 / 3)
    return [min(k * step, side - window) for k in range(math.ceil((side - window) / step) + 1)]


def crop(truth: Tensor, policy: augment.Policy, *, generator: torch.Generator) -> Tensor:
    """What of targets N x H x W lies next to the pixels of the views that ``augment`` makes of their images with this
    policy and such a generator: N x size x size.
    """
    drawn = augment.draw(len(truth), *truth.shape[1:], policy, generator=generator)
    rows = augment._positions(drawn["top"], drawn["height"], drawn["vflip"], policy.size)
    columns = augment._positions(drawn["left"], drawn["width"], drawn["hflip"], policy.size)
    rows, columns = ((p + 0.5).long().to(truth.device) for p in (rows, columns))
    samples = torch.arange(len(truth), device=truth.device)[:, None, None]
    return truth[samples, rows[:, :, None], columns[:, None, :]]


def rescaled_crop(
    images: Sequence[Tensor], truth: Tensor, *, size: tuple[int, int], generator, scales=SCALES, flip: float = 0.5
) -> tuple[list[Tensor], Tensor]:
    """The augmentation of the published CMX: one of ``scales``, a crop of ``size`` = (H, W), perhaps mirrored.

    ``images``: of each modality float N x C x H x W as the network takes them; ``truth``: int64 targets N x H x W.
    Where an image is smaller than the crop, it lies in its middle, surrounded by 0 and IGNORE.
    """
    made = []
    for i, u in enumerate(torch.rand(len(truth), 4, generator=generator, dtype=torch.float64).tolist()):
        scaled = [int(side * scales[int(u[0] * len(scales))]) for side in truth.shape[1:]]
        spare = [max(have - want, 0) for have, want in zip(scaled, size, strict=True)]
        top, left = (int(v * (s + 1)) for v, s in zip(u[2:], spare, strict=True))
        sample = [x[i : i + 1] for x in (*images, truth[:, None].float())]
        for k, x in enumerate(sample):
            mode, fill = ("nearest-exact", IGNORE) if k == len(images) else ("bilinear", 0)
            x = F.pad(F.interpolate(x, size=scaled, mode=mode), _margins(scaled, size), value=fill)
            x = x[:, :, top : top + size[0], left : left + size[1]]
            sample[k] = x.flip(3) if u[1] < flip else x
        made.append(sample)
    *views, cut = (torch.cat(parts) for parts in zip(*made, strict=True))
    return views, cut[:, 0].long()
