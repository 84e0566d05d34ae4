"""What labels are: several classes per scene, or one class per pixel."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """Labels of one kind; ``classes``: their names."""

    classes: tuple[str, ...]


class Scene(Task):
    """Several of the classes hold for an image: ``labels``, uint8 (n, classes) of 0 and 1; scored by mAP."""


class Masks(Task):
    """One class per pixel: ``mask``, uint8 with 0 for unlabelled and classes from 1 on; scored by mIoU."""
