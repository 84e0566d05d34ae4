"""What pretrained encoders are worth on labelled images: linear probe and fine-tuning (paper, section 5)."""

import hashlib
import itertools
import json
import signal
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_average_precision, multiclass_confusion_matrix

from decur_core import config, model, pretrain
from decur_core.config import Settings
from decur_core.data.bigearthnet import CLASSES_19
from decur_core.data.geonrw import CLASSES as CLASSES_GEONRW
from decur_core.data.modality import PAIRS, Preprocessing
from decur_core.data.nyuv2 import CLASSES_40
from decur_core.data.raster import DataError
from decur_core.data.store import Store
from decur_core.data.sunrgbd import CLASSES_37
from decur_core.model import MultimodalModel, OnEncoders
from decur_core.report.tables import ONLY
from decur_core.running import checkpoints
from decur_core.running import folders as runs
from decur_core.transfer import cmx
from decur_core.transfer import fcn as segmentation
from decur_core.transfer.encoders import given, load_pretrained, plain, stored, views

# Data set: its name in tables, and its classes (of masks: those of the values from 1 on).
DATASETS = {
    "bigearthnet": ("BigEarthNet-MM", CLASSES_19),
    "geonrw": ("GeoNRW", CLASSES_GEONRW[1:]),
    "sunrgbd": ("SUN RGB-D", CLASSES_37),
    "nyuv2": ("NYU Depth v2", CLASSES_40),
}
SAVE_SECONDS = 60.0  # between two checkpoints of an evaluation
SWEPT = ("protocols", "inputs", "fractions")  # lists in the settings, of which an evaluation is one combination
EXAMPLES = 8  # test images whose predicted masks are kept for pictures


class Classifier(OnEncoders):
    """Late fusion: the features of the given encoders side by side, then one linear layer (paper, section 5.1).

    ``branches``: 1, 2 or both, the modalities given. With ``frozen`` encoders only ``head`` is trained.
    """

    def __init__(self, model: MultimodalModel, *, branches: Iterable[int] = (1, 2), classes: int, frozen: bool):
        super().__init__([getattr(model, f"backbone_{m}") for m in branches], frozen=frozen)
        self.head = nn.Linear(model.features * len(self.encoders), classes)

    def forward(self, *images: Tensor) -> Tensor:
        """Float images of each given modality (N x C x H x W) to N x classes logits."""
        with self.encoding():
            features = torch.cat([e(x) for e, x in zip(self.encoders, images, strict=True)], dim=1)
        return self.head(features)


def subset(n: int, fraction: float, *, seed: int) -> list[int]:
    """``fraction`` of ``n`` positions, drawn without replacement; sorted, at least one, the same for the same seed."""
    order = torch.randperm(n, generator=pretrain.seeded(seed, "labels"))
    return sorted(order[: max(1, round(fraction * n))].tolist())


def mean_average_precision(scores: Tensor, labels: Tensor) -> dict:
    """mAP in percent over a whole set: ``micro``, ``macro`` and ``per_class`` (None where a class never occurs).

    ``scores``: N x L, any finite score, for its order alone counts; ``labels``: N x L of 0 and 1. Macro: of the classes
    that occur. Raises DataError where none does, ValueError for scores that are not finite.
    """
    if not labels.any():
        raise DataError("no positive label to score: every label is 0")
    if not scores.isfinite().all():
        raise ValueError("scores that are not finite numbers cannot be ranked")
    # Places in the order of all: of scores outside of 0 to 1 the metric takes a sigmoid, which makes large ones equal.
    order = scores.detach().flatten().unique(return_inverse=True)[1].view_as(scores).double() / scores.numel()
    labels = labels.int()
    micro, *each = (
        100 * float(binary_average_precision(ranked, true)) if true.any() else None
        for ranked, true in [(order.flatten(), labels.flatten()), *zip(order.T, labels.T, strict=True)]
    )
    per_class = [v if v is None else round(v, 4) for v in each]
    macro = statistics.fmean(v for v in per_class if v is not None)
    return {"micro": micro, "macro": macro, "per_class": per_class}


def evaluate(
    settings: Settings,
    folder: Path,
    stores: dict[str, Path],
    *,
    dataset: str = "bigearthnet",
    protocol: str,
    inputs: str = "both",
    fraction: float = 1.0,
) -> dict:
    """Train on labels from a finished pretraining, score the test images; returns the saved record.

    ``folder``: of ``pretrain.run``; ``stores``: ``train`` and ``test`` stores of ``dataset``, a key of DATASETS, with
    labels (a linear classifier, mAP) or masks (FCN or CMX, mIoU); ``protocol``: ``linear`` (frozen encoders in eval
    mode) or ``finetune``; ``inputs``: ``both`` or one modality; ``fraction``: share of the training labels, drawn
    without replacement. An evaluation on record with the same settings and images is not run again; an interrupted one
    goes on. Raises ConfigError (request, stores), DataError (stores; no positive label), FileNotFoundError or OSError
    (no or damaged encoders), and pretraining's ``NonFinite`` (loss) and ``Interrupted`` (signal).
    """
    _check_request(settings, dataset=dataset, protocol=protocol, inputs=inputs)
    wanted = {"protocol": protocol, "inputs": inputs, "fraction": fraction}
    name = _name(dataset, Path(folder).name, **wanted)
    pretrained, preprocessing, pretraining = load_pretrained(folder)
    scene = dataset == "bigearthnet"
    train, test = (_labelled(stores[part], preprocessing, scene=scene) for part in ("train", "test"))
    how = {k: v for k, v in config.to_dict(settings)["transfer"].items() if k not in SWEPT}
    described = {"pretraining": pretraining, "transfer": how, **wanted, "patches": [len(train), len(test)]}
    images = [store.sha256 for store in (train, test)]
    digest = hashlib.sha256(json.dumps([described, images], sort_keys=True).encode()).hexdigest()[:16]
    existing = runs.path(settings, "records", f"{name}.json")
    if existing.exists() and (record := json.loads(existing.read_text()))["settings_hash"] == digest:
        return record

    seed = pretraining["seed"]
    chosen = subset(len(train), fraction, seed=seed)
    if protocol == "finetune" and (size := min(len(chosen), settings.transfer.batch_size)) < 2:
        limits = f"{len(chosen)} labelled images, transfer.batch_size = {settings.transfer.batch_size}"
        raise config.ConfigError(f"{name}: BatchNorm cannot train on batches of {size} ({limits}); allowed: 2 or more")
    torch.manual_seed(seed)
    network = _network(settings, pretrained, dataset, train, inputs=inputs, frozen=protocol == "linear")
    network.to(pretrain.device_of(settings), memory_format=torch.channels_last)
    file = runs.path(settings, "transfer", f"{name}.pt")
    _fit(network, train, chosen, settings, inputs=inputs, seed=seed, desc=name, file=file, digest=digest)
    title, classes = DATASETS[dataset]
    if scene:
        scores = predict(network, test, settings, inputs=inputs)
        result = {"metric": "mAP (%)", **mean_average_precision(scores, torch.from_numpy(test.labels.copy()))}
    else:
        examples: list[Tensor] = []
        counts = confusion(network, test, settings, classes=len(classes), inputs=inputs, examples=examples)
        result = {"metric": "mIoU (%)", **segmentation.scores(counts)}
        runs.write_json(runs.path(settings, "predictions", f"{name}.json"), [(x + 1).tolist() for x in examples])
    record = {"dataset": title, "run": Path(folder).name, "name": settings.name, **wanted}
    record |= {"pair": settings.pair, "variant": settings.variant, "network": type(network).__name__}
    record |= {"method": pretraining["method"], "seed": seed, **result}
    record |= {"patches": {"train": len(chosen), "test": len(test)}, "settings": described, "settings_hash": digest}
    record["label_ids"] = [train.ids[i] for i in chosen] if fraction < 1 else "all"
    record = runs.write_record(settings, name, record)
    file.unlink(missing_ok=True)
    return record


def _name(dataset: str, run: str, protocol: str, inputs: str, fraction: float) -> str:
    """Of an evaluation's files."""
    return f"{dataset}-{run}-{protocol}-{inputs}-{fraction:g}"


def _check_request(settings: Settings, **asked: str) -> None:
    """Refuse a misspelt request, which would pass for another."""
    allowed = {"dataset": DATASETS, "protocol": ("linear", "finetune")}
    allowed["inputs"] = ("both", *config.MODALITIES[settings.pair])
    for name, value in asked.items():
        if value not in allowed[name]:
            raise config.ConfigError(f"{name} = {value!r}; allowed: {', '.join(allowed[name])}")


def _labelled(path: Path, preprocessing: dict[str, Preprocessing], *, scene: bool) -> Store:
    """A store, checked to hold labels of scenes, or masks, and images as the encoders were trained on."""
    store = Store(path)
    if (store.labels is None) if scene else ("mask" not in store.shapes):
        raise config.ConfigError(f"{path}: holds no {'labels' if scene else 'masks'}; convert labelled images")
    store.check({modality: expected.to_dict() for modality, expected in preprocessing.items()})
    return store


def evaluate_members(
    settings: Settings, folders: dict[str, Path], stores: dict[str, Path], *, dataset: str = "bigearthnet"
) -> list[dict]:
    """``evaluate`` for every run, inputs, label fraction and protocol of the profile; the records, in that order.

    Left out is what says nothing: fine-tuning of a random start and probing of what is to be trained from scratch
    (rows of their own, ``supervised`` and ``random``), and inputs that a single-modality run was not trained on.
    """
    t, todo = settings.transfer, []
    for folder in folders.values():
        about = json.loads((Path(folder) / "run.json").read_text())
        only = ONLY.get(about["settings"]["method"])
        trained = set(about.get("trained") or config.MODALITIES[settings.pair])  # without pretraining any will do
        for inputs, fraction, protocol in itertools.product(t.inputs, t.fractions, t.protocols):
            names = {m.name for m in given(settings.pair, inputs).values()}
            if protocol == (only or protocol) and names <= trained:
                todo.append({"protocol": protocol, "inputs": inputs, "fraction": fraction, "folder": folder})
    common = {"stores": stores, "dataset": dataset}
    return [evaluate(settings, **one, **common) for one in runs.progress(todo, desc="evaluations")]


def example_predictions(record: dict, settings: Settings, stores: dict[str, Path], *, count: int = 6) -> list[dict]:
    """The first test images with true and predicted masks of a segmentation on record, for ``plots.scenes``.

    Items: ``id``, the modalities' stored uint8 images (C x H x W), ``mask`` and ``predicted`` uint8 (H x W).
    """
    names = {name: key for key, (name, _) in DATASETS.items()}
    about = (record[key] for key in ("run", "protocol", "inputs", "fraction"))
    file = runs.path(settings, "predictions", f"{_name(names[record['dataset']], *about)}.json")
    predicted, test = json.loads(file.read_text()), Store(stores["test"])
    items = []
    for i, found in enumerate(predicted[:count]):
        images = {m.name: test.read(i, m.name, 0) for m in PAIRS[settings.pair]}
        masks = {"mask": test.read(i, "mask", 0)[0], "predicted": np.array(found, np.uint8)}
        items.append({"id": test.ids[i], **images, **masks})
    return items


def chance(store_path: Path) -> float:
    """mAP micro in percent of a random ranking: the share of positive labels among all."""
    return 100 * float(Store(store_path).labels.mean())


def _network(
    settings, pretrained: MultimodalModel, dataset: str, train: Store, *, inputs: str, frozen: bool
) -> nn.Module:
    """The network that is trained on labels, encoders from ``pretrained``."""
    branches = list(given(settings.pair, inputs))
    if dataset == "bigearthnet":
        return Classifier(pretrained, branches=branches, classes=train.labels.shape[1], frozen=frozen)
    classes = len(DATASETS[dataset][1])
    if settings.transfer.segmenter == "fcn":
        return segmentation.FCN(pretrained, branches=branches, classes=classes, frozen=frozen)
    if frozen or inputs != "both":
        asked = f"protocol {'linear' if frozen else 'finetune'} with inputs {inputs!r}"
        raise config.ConfigError(f"transfer: segmenter = 'cmx', but asked for is {asked}; it needs finetune and both")
    network = cmx.CMX(settings.backbone, classes=classes)
    cmx.load_backbones(network, *(model.backbone_state(pretrained.state_dict(), m) for m in (1, 2)))
    return network


def _samples(network: nn.Module, store: Store, rows: list[int], settings: Settings, *, inputs, device, seed=None):
    """What the network takes of these rows, and the truth: augmented with a ``seed``, else whole images."""
    t, modalities = settings.transfer, given(settings.pair, inputs).values()
    if isinstance(network, Classifier):
        policy = plain(t.crop_size)
        if seed is not None:
            policy = replace(policy, crop_scale=(t.crop_scale, 1.0), crop_ratio=(3 / 4, 4 / 3), p_hflip=0.5)
        truth = torch.from_numpy(store.labels[rows]).float().to(device)
        return views(store, modalities, rows, policy, seed=seed or (), device=device), truth
    images, masks = [stored(store, m.name, rows, device) for m in modalities], stored(store, "mask", rows, device)[:, 0]
    copies = [m.preprocessing.copies for m in modalities]
    if isinstance(network, segmentation.FCN) and seed is not None:
        options = {"size": t.crop_size, "scale": (t.crop_scale, 1.0), "generator": pretrain.seeded(*seed)}
        cut, truth = segmentation.crop(images, masks, **options)
    else:
        cut, truth = [x.float() / 255 for x in images], segmentation.targets(masks)
    cut = [x.repeat(1, k, 1, 1).contiguous(memory_format=torch.channels_last) for x, k in zip(cut, copies, strict=True)]
    if isinstance(network, cmx.CMX):
        cut = [cmx.normalize(x) for x in cut]
        if seed is not None:
            options = {"size": tuple(masks.shape[1:]), "generator": pretrain.seeded(*seed)}
            cut, truth = segmentation.rescaled_crop(cut, truth, **options)
    return cut, truth


def _rate(settings: Settings, step: int, per_epoch: int, total: int) -> float:
    """Share of the starting learning rate at a step."""
    t = settings.transfer
    if t.schedule == "constant":
        return 1.0
    if t.schedule == "steps":
        return 0.1 ** sum(step >= milestone * per_epoch for milestone in t.milestones)
    warm = t.warmup_epochs * per_epoch
    return step / warm if step < warm else (1 - step / total) ** 0.9


def _optimizer(network: nn.Module, settings: Settings, rate: float) -> torch.optim.Optimizer:
    t = settings.transfer
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [{"params": trained, "weight_decay": t.weight_decay}]
    if isinstance(network, cmx.CMX):  # which, as published, decays neither biases nor normalisation
        flat, decayed = ([p for p in trained if (p.ndim > 1) == k] for k in (False, True))
        groups = [{"params": flat, "weight_decay": 0.0}, {"params": decayed, "weight_decay": t.weight_decay}]
    if t.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=rate)


def _fit(network, store: Store, chosen: list[int], settings: Settings, *, inputs, seed, desc, file, digest) -> None:
    """Train on the chosen items; ``file`` holds a checkpoint from which another call goes on, renewed where an epoch
    ends, once a minute at most.
    """
    t, device = settings.transfer, next(network.parameters()).device
    frozen = getattr(network, "frozen", False)
    setting = f"learning_rate_{'linear' if frozen else 'finetune'}"
    rate = getattr(t, setting)
    optimizer = _optimizer(network, settings, rate)
    criterion = F.multilabel_soft_margin_loss if isinstance(network, Classifier) else segmentation.loss
    per_epoch = -(-len(chosen) // t.batch_size)
    total = t.iterations or t.epochs * per_epoch
    epochs, first, state = -(-total // per_epoch), 0, {}
    if file.exists():
        try:
            state = checkpoints.load(file)
        except checkpoints.Damaged as error:
            print(f"{error}; {desc} begins again")
    if state.get("digest") == digest:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    network.train()
    saved = time.monotonic()
    with runs.stop_signals() as received:
        for epoch in runs.progress(range(first, epochs), desc=desc, leave=False, initial=first, total=epochs):
            torch.manual_seed(pretrain.seeded(seed, "transfer", epoch).initial_seed())  # for what drops connections
            order = torch.randperm(len(chosen), generator=pretrain.seeded(seed, "transfer", epoch)).tolist()
            for step, k in enumerate(range(0, len(order), t.batch_size), start=epoch * per_epoch):
                rows = [chosen[i] for i in order[k : k + t.batch_size]]
                if step >= total or (len(rows) < 2 and not frozen):
                    continue  # BatchNorm cannot train on a single image
                parts = {"inputs": inputs, "device": device, "seed": (seed, "transfer", epoch, k)}
                images, truth = _samples(network, store, rows, settings, **parts)
                for group in optimizer.param_groups:
                    group["lr"] = rate * _rate(settings, step, per_epoch, total)
                loss = criterion(network(*images), truth)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if received and step + 1 < total:
                    name, at = signal.Signals(received[0]).name, f"epoch {epoch + 1} of {epochs}"
                    raise pretrain.Interrupted(
                        f"{desc}: {name} in {at}; the same call goes on from its last checkpoint"
                    )
            if not loss.isfinite():
                raise pretrain.NonFinite(
                    f"{desc}: loss {loss:g} in epoch {epoch + 1}; lower transfer.{setting} = {rate:g}"
                )
            if time.monotonic() - saved > SAVE_SECONDS and epoch + 1 < epochs:
                state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "digest": digest}
                checkpoints.save_or_say({**state, "epoch": epoch + 1}, file, f"{desc}, epoch {epoch + 1}")
                saved = time.monotonic()


def _whole(network: nn.Module, store: Store, settings: Settings, *, inputs: str) -> Iterator[tuple[list, Tensor]]:
    device = next(network.parameters()).device
    for rows in torch.arange(len(store)).split(settings.transfer.batch_size):
        yield _samples(network, store, rows.tolist(), settings, inputs=inputs, device=device)


@torch.inference_mode()
def predict(classifier: Classifier, store: Store, settings: Settings, *, inputs: str) -> Tensor:
    """Logits of every image of a store (N x classes, on the CPU); whole images, resized, no augmentation."""
    classifier.eval()
    batches = _whole(classifier, store, settings, inputs=inputs)
    return torch.cat([classifier(*images).float().cpu() for images, _ in batches])


def _predicted(network: nn.Module, images: list[Tensor], settings: Settings) -> Tensor:
    """Class of every pixel; CMX looks, as published, through windows of an image's own size."""
    t = settings.transfer
    window = tuple(images[0].shape[2:]) if isinstance(network, cmx.CMX) else None
    return segmentation.predict(network, images, scales=t.scales, flip=t.flip, window=window)


@torch.inference_mode()
def confusion(
    network: nn.Module,
    store: Store,
    settings: Settings,
    *,
    classes: int,
    inputs: str,
    examples: list[Tensor] | None = None,
) -> Tensor:
    """Pixel counts of a segmentation over a whole store: classes x classes, row = truth, column = prediction.

    To a list ``examples`` the predictions (int64 H x W, on the CPU) of the first EXAMPLES images are added.
    """
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    shared = {"num_classes": classes, "ignore_index": segmentation.IGNORE}
    for images, truth in _whole(network, store, settings, inputs=inputs):
        found = _predicted(network, images, settings)
        counts += multiclass_confusion_matrix(found.flatten(), truth.flatten(), **shared).cpu()
        if examples is not None:
            examples += found[: EXAMPLES - len(examples)].cpu()
    return counts
