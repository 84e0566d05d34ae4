"""What labels are, how a network's outputs are held against them, and how good a whole set of predictions is.

Shapes: N images, L classes, H x W pixels.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from decur_core.data.raster import DataError

IGNORE = -1  # target of pixels without a label


@dataclass(frozen=True)
class Task:
    """Labels of one kind; ``classes``: their names. A new kind of task is a subclass that says what differs.

    ``field``: what a store must hold, ``labels`` (uint8 N x L) or ``mask`` (uint8 N x H x W); ``dense``: networks
    answer for every pixel, not for every image; ``metric``: the score's name and unit, for tables; ``numbers``: the two
    entries of the score that tables show, the main one first, the higher the better.
    """

    classes: tuple[str, ...]
    field: ClassVar[str] = "labels"
    dense: ClassVar[bool] = False
    metric: ClassVar[str] = ""
    numbers: ClassVar[tuple[str, str]] = ("", "")

    @property
    def outputs(self) -> int:
        """Channels of a network's answer."""
        return len(self.classes)

    def check(self, labels: Tensor) -> None:
        """A DataError for stored labels that cannot be of these classes."""

    def target(self, labels: Tensor) -> Tensor:
        """Stored labels, on any device, as ``loss`` and ``score`` take them."""
        return labels

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """What training minimises for a batch: outputs float N x ``outputs`` (x H x W, if dense)."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def score(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
        """JSON-able entries, those of ``numbers`` among them, of a set that comes batch by batch: (predicted, target).

        Predicted are the outputs or, if dense, the most probable class of every pixel, int64 N x H x W.
        """
        raise NotImplementedError(f"{type(self).__name__} has no score")

    def picture(self, predicted: Tensor) -> Tensor:
        """One image's prediction as labels of this kind are stored; of dense tasks alone."""
        return predicted


class Scene(Task):
    """Several of the classes hold for an image: ``labels``, 0 or 1 for each; scored by mAP."""

    metric = "mAP (%)"
    numbers = ("micro", "macro")

    def check(self, labels: Tensor) -> None:
        if labels.shape[-1] != len(self.classes) or labels.max() > 1:
            found = f"{labels.shape[-1]} numbers up to {labels.max()}"
            raise DataError(f"labels of an image are {found}; expected 0 or 1 for each of {len(self.classes)} classes")

    def target(self, labels: Tensor) -> Tensor:
        return labels.float()

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.multilabel_soft_margin_loss(outputs, target)

    def score(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
        scores, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
        return mean_average_precision(scores, labels)


@dataclass(frozen=True)
class Masks(Task):
    """One class per pixel: ``mask``, uint8, where ``ignore`` means unlabelled and the other values are the classes in
    their order, from 0 or, where 0 is ignored, from 1 on; scored by mIoU.
    """

    ignore: int = 0
    field = "mask"
    dense = True
    metric = "mIoU (%)"
    numbers = ("miou", "accuracy")

    def check(self, labels: Tensor) -> None:
        last = len(self.classes) - (self.ignore >= len(self.classes))
        if len(wrong := labels[(labels > last) & (labels != self.ignore)]):
            known = f"{len(self.classes)} classes, up to {last}, and {self.ignore} for unlabelled"
            raise DataError(f"masks hold the value {wrong[0]}; expected {known}")

    def target(self, labels: Tensor) -> Tensor:
        """uint8 masks of any shape to int64 targets: IGNORE, 0 to L - 1."""
        if labels.dtype != torch.uint8:
            wanted = f"torch.uint8 with {self.ignore} = unlabelled; do not shift them before"
            raise DataError(f"masks are {labels.dtype}, expected {wanted}")
        values = labels.long()
        return torch.where(values == self.ignore, IGNORE, values - (values > self.ignore).long())

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of the labelled pixels; 0 where there are none."""
        total = F.cross_entropy(outputs.float(), target, ignore_index=IGNORE, reduction="sum")
        return total / (target != IGNORE).sum().clamp(min=1)

    def score(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict:
        return mean_iou(confusion(batches, len(self.classes)))

    def picture(self, predicted: Tensor) -> Tensor:
        return (predicted + (predicted >= self.ignore)).to(torch.uint8)


class Presence(Scene):
    """Which classes cover more than ``share`` of an image, told from its mask (as of ``Masks``); scored by mAP."""

    share = 0.01
    field = "mask"

    def check(self, labels: Tensor) -> None:
        Masks(self.classes).check(labels)

    def target(self, labels: Tensor) -> Tensor:
        found = Masks(self.classes).target(labels).flatten(1)
        return torch.stack([(found == k).float().mean(1) > self.share for k in range(self.outputs)], 1).float()


def mean_average_precision(scores: Tensor, labels: Tensor) -> dict:
    """mAP in percent over a whole set: ``micro``, ``macro`` and ``per_class`` (None where a class never occurs).

    ``scores``: N x L, any finite score, for its order alone counts; ``labels``: N x L of 0 and 1. Macro: of the classes
    that occur. Raises DataError where none does, ValueError for scores that are not finite.
    """
    from torchmetrics.functional.classification import binary_average_precision  # here: seconds, in every process

    if not labels.any():
        raise DataError("no positive label to score: every label is 0")
    if not scores.isfinite().all():
        raise ValueError("scores that are not finite numbers cannot be ranked")
    # Places in the order of all: of scores outside of 0 to 1 the metric takes a sigmoid, which makes large ones equal.
    order = scores.detach().flatten().unique(return_inverse=True)[1].view_as(scores).double() / scores.numel()
    columns = list(zip(order.T, labels.int().T, strict=True))
    per_class = [round(100 * float(binary_average_precision(o, y)), 4) if y.any() else None for o, y in columns]
    macro = statistics.fmean(v for v in per_class if v is not None)
    micro = 100 * float(binary_average_precision(order.flatten(), labels.int().flatten()))
    return {"micro": micro, "macro": macro, "per_class": per_class}


def confusion(batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> Tensor:
    """Pixel counts of a set, classes x classes int64 on the CPU: row = truth, column = prediction, IGNORE left out."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # as above

    several = max(classes, 2)  # as torchmetrics wants
    counts = torch.zeros(several, several, dtype=torch.int64)
    for found, truth in batches:
        counts += multiclass_confusion_matrix(found.flatten(), truth.flatten(), several, ignore_index=IGNORE).cpu()
    return counts[:classes, :classes]


def mean_iou(counts: Tensor) -> dict:
    """Percentages over a whole set: ``miou``, ``accuracy`` (of labelled pixels) and ``per_class``, the IoU of each.

    ``counts``: of ``confusion``. The convention of the published CMX: None, and left out of the mean, is a class that
    is neither in the truth nor predicted; one that is only predicted counts as 0. All are in the published test sets.
    """
    counts = counts.double()
    hits, union = counts.diag(), counts.sum(0) + counts.sum(1) - counts.diag()
    if not counts.any():
        raise DataError("no labelled pixel to score: every mask is unlabelled")
    iou = 100 * hits / union
    per_class = [None if u == 0 else round(v, 4) for u, v in zip(union.tolist(), iou.tolist(), strict=True)]
    accuracy = 100 * hits.sum() / counts.sum()
    return {"miou": float(iou[union > 0].mean()), "accuracy": float(accuracy), "per_class": per_class}
