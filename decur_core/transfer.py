"""Scene classification with pretrained encoders: linear probe and fine-tuning, multi-label (paper, appendix B)."""

import hashlib
import itertools
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.classification import MultilabelAveragePrecision

from . import config, pretrain, runs
from .augment import Policy, augment
from .config import Settings
from .data.store import Store
from .model import MultimodalModel
from .pairs import PAIRS
from .preprocess import Preprocessing

INPUTS = {"sar": (1,), "optical": (2,), "both": (1, 2)}


def plain(size: int) -> Policy:
    """The augmentation that changes nothing: whole images resized to ``size`` px."""
    off = dict.fromkeys(("p_jitter", "p_gray", "p_blur", "p_solarize", "p_hflip", "p_vflip"), 0.0)
    return Policy(size=size, crop_scale=(1, 1), crop_ratio=(1, 1), **off)


class Classifier(nn.Module):
    """Late fusion: the features of the given encoders side by side, then one linear layer (paper, section 5.1).

    ``inputs``: a key of ``INPUTS``. Frozen encoders stay in eval mode, so that their BatchNorm statistics keep still;
    only ``head`` is trained.
    """

    def __init__(self, model: MultimodalModel, *, inputs: str, classes: int, frozen: bool):
        super().__init__()
        self.encoders = nn.ModuleList([getattr(model, f"backbone_{m}") for m in INPUTS[inputs]])
        self.head = nn.Linear(model.features * len(self.encoders), classes)
        self.frozen = frozen
        self.encoders.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.frozen:
            self.encoders.eval()
        return self

    def forward(self, *images: Tensor) -> Tensor:
        """Float images of each given modality (N x C x H x W) to N x classes logits."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = torch.cat([e(x) for e, x in zip(self.encoders, images, strict=True)], dim=1)
        return self.head(features)


def load_pretrained(folder: Path) -> tuple[MultimodalModel, dict[str, Preprocessing], dict]:
    """The model, the preprocessing of each modality and the settings of a finished pretraining run."""
    file = Path(folder) / "final.pt"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no finished pretraining; run the pretraining notebook of this profile first")
    state = torch.load(file, map_location="cpu", weights_only=True)
    preprocessing = {name: Preprocessing.from_dict(d) for name, d in state["preprocessing"].items()}
    settings = state["settings"]
    channels = [len(p.bands) for p in preprocessing.values()]
    model = MultimodalModel(settings["backbone"], channels, settings["projector"])
    model.load_state_dict(state["model"])
    return model, preprocessing, settings


def subset(n: int, fraction: float, *, seed: int) -> list[int]:
    """``fraction`` of ``n`` positions, drawn without replacement; sorted, at least one, the same for the same seed."""
    order = torch.randperm(n, generator=pretrain.seeded(seed, "labels"))
    return sorted(order[: max(1, round(fraction * n))].tolist())


def mean_average_precision(scores: Tensor, labels: Tensor) -> dict:
    """mAP in percent over a whole set: ``micro``, ``macro`` and ``per_class`` (None where a class never occurs).

    ``scores``: N x L, any monotone score; ``labels``: N x L of 0 and 1. Macro averages the classes that occur.
    """
    found = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no positive samples.*")
        warnings.filterwarnings("ignore", message="Average precision score for one or more classes was `nan`.*")
        for average in ("micro", "none"):
            metric = MultilabelAveragePrecision(labels.shape[1], average=average)
            found[average] = 100 * metric(scores.sigmoid(), labels.int())
    occurs = labels.bool().any(0)
    per_class = [round(v, 4) if o else None for v, o in zip(found["none"].tolist(), occurs.tolist(), strict=True)]
    kept = [v for v in per_class if v is not None]
    micro = float(found["micro"])
    return {"micro": micro if math.isfinite(micro) else None, "macro": sum(kept) / len(kept), "per_class": per_class}


def evaluate(
    settings: Settings,
    folder: Path,
    stores: dict[str, Path],
    *,
    protocol: str,
    inputs: str = "both",
    fraction: float = 1.0,
) -> dict:
    """Train a classifier on a finished pretraining and measure mAP on the test patches; returns the saved record.

    ``folder``: of ``pretrain.run``; ``stores``: ``train`` and ``test`` stores of labelled patches; ``protocol``:
    ``linear`` (frozen encoders in eval mode) or ``finetune``; ``inputs``: ``both``, ``sar`` or ``optical``;
    ``fraction``: share of the training labels, drawn without replacement. An evaluation that is on record with the
    same settings is not run again.
    """
    wanted = {"protocol": protocol, "inputs": inputs, "fraction": fraction}
    name = f"bigearthnet-{Path(folder).name}-{protocol}-{inputs}-{fraction:g}"
    model, preprocessing, pretraining = load_pretrained(folder)
    described = {"pretraining": pretraining, "transfer": config.to_dict(settings)["transfer"], **wanted}
    for key in ("protocols", "inputs", "fractions"):
        described["transfer"].pop(key)
    train, test = Store(stores["train"]), Store(stores["test"])
    for store in (train, test):
        _check_store(store, preprocessing)
    described["patches"] = [len(train), len(test)]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    existing = runs.path(settings, "records", f"{name}.json")
    if existing.exists() and (record := json.loads(existing.read_text()))["settings_hash"] == digest:
        return record

    device = pretrain.device_of(settings)
    torch.manual_seed(pretraining["seed"])
    classifier = Classifier(model, inputs=inputs, classes=train.labels.shape[1], frozen=protocol == "linear")
    classifier.to(device, memory_format=torch.channels_last)
    chosen = subset(len(train), fraction, seed=pretraining["seed"])
    _fit(classifier, train, chosen, settings, inputs=inputs, seed=pretraining["seed"], desc=name)
    scores = predict(classifier, test, settings, inputs=inputs)
    result = mean_average_precision(scores, torch.from_numpy(test.labels.copy()))
    ids = [train.ids[i] for i in chosen] if fraction < 1 else "all"
    record = {
        "dataset": "BigEarthNet-MM",
        "run": Path(folder).name,
        "name": settings.name,
        "method": pretraining["method"],
        "seed": pretraining["seed"],
        **wanted,
        "metric": "mAP (%)",
        **result,
        "patches": {"train": len(chosen), "test": len(test)},
        "label_ids": ids,
        "settings": described,
        "settings_hash": digest,
    }
    return runs.write_record(settings, name, record)


def evaluate_members(settings: Settings, folders: dict[str, Path], stores: dict[str, Path]) -> list[dict]:
    """``evaluate`` for every run, protocol, inputs and label fraction of the profile; the records, in that order."""
    t = settings.transfer
    todo = list(itertools.product(folders.values(), t.inputs, t.fractions, t.protocols))
    return [
        evaluate(settings, folder, stores, protocol=protocol, inputs=inputs, fraction=fraction)
        for folder, inputs, fraction, protocol in runs.progress(todo, desc="evaluations")
    ]


def chance(store_path: Path) -> float:
    """mAP micro in percent of a random ranking: the share of positive labels among all."""
    return 100 * float(Store(store_path).labels.mean())


def _check_store(store: Store, preprocessing: dict[str, Preprocessing]) -> None:
    if store.labels is None:
        raise config.ConfigError(f"{store.path}: holds no labels; convert labelled patches")
    for name, expected in preprocessing.items():
        if store.meta["preprocessing"].get(name) != expected.to_dict():
            raise config.ConfigError(
                f"{store.path}: {name} was converted as {store.meta['preprocessing'].get(name)}, but the pretrained"
                f" encoder expects {expected.to_dict()}. Convert the patches with the encoder's preprocessing."
            )


def _read(store: Store, rows: list[int], settings: Settings, inputs: str) -> list[Tensor]:
    names = [PAIRS[settings.pair][m - 1].name for m in INPUTS[inputs]]
    return [torch.stack([torch.from_numpy(store.read(i, n, 0).copy()) for i in rows]) for n in names]


def _fit(classifier: Classifier, store: Store, chosen: list[int], settings: Settings, *, inputs, seed, desc) -> None:
    t = settings.transfer
    device = next(classifier.parameters()).device
    labels = torch.from_numpy(store.labels.copy()).float()
    rate = t.learning_rate_linear if classifier.frozen else t.learning_rate_finetune
    trained = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(t.milestones), gamma=0.1)
    criterion = nn.MultiLabelSoftMarginLoss()
    policy = replace(plain(t.crop_size), crop_scale=(t.crop_scale, 1.0), crop_ratio=(3 / 4, 4 / 3), p_hflip=0.5)
    classifier.train()
    for epoch in runs.progress(range(t.epochs), desc=desc, leave=False):
        order = torch.randperm(len(chosen), generator=pretrain.seeded(seed, "transfer", epoch)).tolist()
        for k in range(0, len(order), t.batch_size):
            rows = [chosen[i] for i in order[k : k + t.batch_size]]
            if len(rows) < 2 and not classifier.frozen:
                continue  # BatchNorm cannot train on a single patch
            # One generator for all modalities, in the same state for each: a pair is cropped and flipped as one.
            images = [
                augment(x.to(device), policy, generator=pretrain.seeded(seed, "transfer", epoch, k))
                for x in _read(store, rows, settings, inputs)
            ]
            loss = criterion(classifier(*_channels_last(images)), labels[rows].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()


@torch.inference_mode()
def predict(classifier: Classifier, store: Store, settings: Settings, *, inputs: str) -> Tensor:
    """Logits of every patch of a store (N x classes, on the CPU); whole patches, resized, no augmentation."""
    device = next(classifier.parameters()).device
    policy = plain(settings.transfer.crop_size)
    classifier.eval()
    scores = []
    for k in range(0, len(store), settings.transfer.batch_size):
        rows = list(range(k, min(k + settings.transfer.batch_size, len(store))))
        images = [
            augment(x.to(device), policy, generator=torch.Generator()) for x in _read(store, rows, settings, inputs)
        ]
        scores.append(classifier(*_channels_last(images)).float().cpu())
    return torch.cat(scores)


def _channels_last(images: list[Tensor]) -> list[Tensor]:
    return [x.contiguous(memory_format=torch.channels_last) for x in images]
