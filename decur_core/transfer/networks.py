"""The networks that are trained on labels: how each is built on encoders, what it is given, how it predicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from decur_core import config, model
from decur_core.augment import Policy
from decur_core.data.batches import seeded
from decur_core.data.modality import Modality
from decur_core.data.store import Store
from decur_core.data.tasks import Task
from decur_core.model import MultimodalModel
from decur_core.transfer import cmx, fcn
from decur_core.transfer.encoders import OnEncoders, alike, plain, stored


class Classifier(OnEncoders):
    """Late fusion: the features of the given encoders side by side, then one linear layer (paper, section 5.1)."""

    def __init__(self, encoders: Mapping[str, nn.Module], *, classes: int, frozen: bool = False):
        super().__init__(encoders, frozen=frozen)
        self.head = nn.Linear(sum(encoder.widths[-1] for encoder in self.encoders.values()), classes)

    def forward(self, *images: Tensor) -> Tensor:
        """Float images of each encoder's modality (N x C x H x W) to N x classes outputs."""
        with self.encoding():
            features = [encoder(x) for encoder, x in zip(self.encoders.values(), images, strict=True)]
        return self.head(torch.cat(features, 1))


@dataclass(frozen=True, kw_only=True)
class Network:
    """A kind of network. ``modalities``: those given, in order; ``images``: of each, uint8 N x C x H x W as stored,
    or, for ``predict``, what ``whole`` makes of them; ``t``: the section ``transfer`` of the settings.
    """

    build: Callable[..., nn.Module]  # (pretrained model, its settings, modalities, outputs, frozen) -> the network
    whole: Callable  # (modalities, images, t) -> float images as the network takes them, nothing changed or cut off
    train: Callable  # (modalities, images, target, t, seed) -> the same of random views or crops, and their target
    predict: Callable  # (network, float images, t) -> what the task's score takes
    decays: Callable[[Tensor], bool] = lambda parameter: True  # whether transfer.weight_decay is for a parameter


def _late(kind: type[OnEncoders], model: MultimodalModel, settings, modalities: Sequence[Modality], outputs, frozen):
    encoders = {}
    for m in modalities:  # one encoder for all seasons of a modality
        encoders[f"{m.name}_{len(encoders)}" if m.name in encoders else m.name] = model.backbones[m.name]
    return kind(encoders, classes=outputs, frozen=frozen)


def _cmx(pretrained: MultimodalModel, settings: dict, modalities: Sequence[Modality], outputs: int, frozen: bool):
    backbone, names = settings["backbone"], dict.fromkeys(m.name for m in modalities)
    if frozen or len(names) != 2 or [m.channels for m in modalities] != [3, 3] or not backbone.startswith("mit_"):
        found = ", ".join(f"{m.name} of {m.channels}" for m in modalities)
        asked = f"protocol {'linear' if frozen else 'finetune'} with inputs {found} channels and backbone {backbone}"
        needs = "it needs finetune and both of two modalities, each once with 3 channels, and a Mix Transformer (mit_*)"
        raise config.ConfigError(f"transfer: segmenter = 'cmx', but asked for is {asked}; {needs}")
    network, state = cmx.CMX(backbone, classes=outputs), pretrained.state_dict()
    cmx.load_backbones(network, *(model.backbone_state(state, name) for name in names))
    return network


def _policy(t) -> Policy:
    return replace(plain(t.crop_size), crop_scale=(t.crop_scale, 1.0), crop_ratio=(3 / 4, 4 / 3), p_hflip=0.5)


def _floats(modalities: Sequence[Modality], images: list[Tensor], t) -> list[Tensor]:
    return [m.copied(m.to_float(x)) for m, x in zip(modalities, images, strict=True)]


def _crops(modalities: Sequence[Modality], images: list[Tensor], target: Tensor, t, seed: tuple):
    return alike(modalities, images, _policy(t), seed=seed), fcn.crop(target, _policy(t), generator=seeded(*seed))


def _normalized(modalities: Sequence[Modality], images: list[Tensor], t) -> list[Tensor]:
    return [cmx.normalize(x) for x in _floats(modalities, images, t)]


def _rescaled(modalities: Sequence[Modality], images: list[Tensor], target: Tensor, t, seed: tuple):
    images, size = _normalized(modalities, images, t), tuple(target.shape[1:])
    return fcn.rescaled_crop(images, target, size=size, generator=seeded(*seed))


NETWORKS = {
    "linear": Network(  # for one answer per image
        build=partial(_late, Classifier),
        whole=lambda modalities, images, t: alike(modalities, images, plain(t.crop_size)),
        train=lambda modalities, images, target, t, seed: (alike(modalities, images, _policy(t), seed=seed), target),
        predict=lambda network, images, t: network(*images).float(),
    ),
    "fcn": Network(  # for one per pixel, as transfer.segmenter says
        build=partial(_late, fcn.FCN),
        whole=_floats,
        train=_crops,
        predict=lambda network, images, t: fcn.predict(network, images, scales=t.scales, flip=t.flip),
    ),
    "cmx": Network(  # as published: predicts through windows of an image's size, decays no biases and normalisation
        build=_cmx,
        whole=_normalized,
        train=_rescaled,
        predict=lambda network, images, t: fcn.predict(
            network, images, scales=t.scales, flip=t.flip, window=images[0].shape[2:]
        ),
        decays=lambda parameter: parameter.ndim > 1,
    ),
}


def labels_of(store: Store, task: Task, rows: Sequence[int], device="cpu") -> Tensor:
    """What a store holds for a task: uint8 N x L, or N x H x W."""
    if task.field == "mask":
        return stored(store, "mask", rows, device)[:, 0]
    return torch.from_numpy(store.labels[rows]).to(device)


def samples(
    kind: Network, task: Task, looks: Sequence[tuple[Modality, int]], t, store: Store, rows: list, *, device, seed=None
) -> tuple[list[Tensor], Tensor]:
    """What a network takes of these rows, an image of each (modality, season), and the target.

    Random views or crops with a ``seed``, else whole images.
    """
    modalities = [m for m, _ in looks]
    images = [stored(store, m.name, rows, device, seasons=[season] * len(rows)) for m, season in looks]
    target = task.target(labels_of(store, task, rows, device))
    if seed is None:
        return kind.whole(modalities, images, t), target
    return kind.train(modalities, images, target, t, seed)
