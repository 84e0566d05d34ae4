"""Scene classification with pretrained encoders: linear probe and fine-tuning, multi-label (paper, appendix B)."""

import hashlib
import itertools
import json
import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multilabel_average_precision

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

    ``scores``: N x L, any monotone score; ``labels``: N x L of 0 and 1, not all 0. Macro: of the classes that occur.
    """
    with warnings.catch_warnings():  # about classes that never occur
        warnings.filterwarnings("ignore", message=".*no positive samples.*")
        warnings.filterwarnings("ignore", message="Average precision score for one or more classes was `nan`.*")
        micro, each = (
            100 * multilabel_average_precision(scores.sigmoid(), labels.int(), labels.shape[1], average=average)
            for average in ("micro", "none")
        )
    occurs = labels.bool().any(0).tolist()
    per_class = [round(v, 4) if o else None for v, o in zip(each.tolist(), occurs, strict=True)]
    macro = statistics.fmean(v for v in per_class if v is not None)
    return {"micro": float(micro), "macro": macro, "per_class": per_class}


def evaluate(
    settings: Settings, folder: Path, stores: dict[str, Path], *, protocol: str, inputs: str = "both", fraction=1.0
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
    train, test = Store(stores["train"]), Store(stores["test"])
    for store in (train, test):
        if store.labels is None:
            raise config.ConfigError(f"{store.path}: holds no labels; convert labelled patches")
        store.check({modality: expected.to_dict() for modality, expected in preprocessing.items()})
    described = {"pretraining": pretraining, "transfer": config.to_dict(settings)["transfer"], **wanted}
    for key in ("protocols", "inputs", "fractions"):
        described["transfer"].pop(key)
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
    record = {"dataset": "BigEarthNet-MM", "run": Path(folder).name, "name": settings.name, **wanted}
    record |= {"method": pretraining["method"], "seed": pretraining["seed"], "metric": "mAP (%)", **result}
    record |= {"patches": {"train": len(chosen), "test": len(test)}, "settings": described, "settings_hash": digest}
    record["label_ids"] = [train.ids[i] for i in chosen] if fraction < 1 else "all"
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


def views(store: Store, names: Iterable[str], rows: Sequence[int], policy: Policy, *, seed=(), device="cpu") -> list:
    """Views of some of a store's images, first season: for each modality float N x C x size x size on ``device``.

    All modalities are drawn alike (``seed``: parts of ``pretrain.seeded``), so a pair is cropped and flipped as one.
    """
    made = []
    for name in names:
        images = torch.stack([torch.from_numpy(store.read(i, name, 0).copy()) for i in rows]).to(device)
        view = augment(images, policy, generator=pretrain.seeded(*seed))
        made.append(view.contiguous(memory_format=torch.channels_last))
    return made


def _names(settings: Settings, inputs: str) -> list[str]:
    return [PAIRS[settings.pair][m - 1].name for m in INPUTS[inputs]]


def _fit(classifier: Classifier, store: Store, chosen: list[int], settings: Settings, *, inputs, seed, desc) -> None:
    t, names = settings.transfer, _names(settings, inputs)
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
            images = views(store, names, rows, policy, seed=(seed, "transfer", epoch, k), device=device)
            loss = criterion(classifier(*images), labels[rows].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()


@torch.inference_mode()
def predict(classifier: Classifier, store: Store, settings: Settings, *, inputs: str) -> Tensor:
    """Logits of every patch of a store (N x classes, on the CPU); whole patches, resized, no augmentation."""
    device, policy = next(classifier.parameters()).device, plain(settings.transfer.crop_size)
    classifier.eval()
    scores = []
    for rows in torch.arange(len(store)).split(settings.transfer.batch_size):
        images = views(store, _names(settings, inputs), rows.tolist(), policy, device=device)
        scores.append(classifier(*images).float().cpu())
    return torch.cat(scores)
