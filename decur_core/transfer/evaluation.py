"""What pretrained encoders are worth on labelled images: linear probe and fine-tuning (paper, section 5)."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from decur_core import config, pretrain
from decur_core.config import Settings
from decur_core.data import datasets
from decur_core.data.batches import seeded
from decur_core.data.modality import Modality
from decur_core.data.store import Store
from decur_core.data.tasks import Masks, Scene, Task
from decur_core.running import folders as runs
from decur_core.transfer import fitting
from decur_core.transfer.encoders import given, load_pretrained
from decur_core.transfer.networks import NETWORKS, labels_of, samples

SWEPT = ("protocols", "inputs", "fractions", "seasons")  # lists in settings; an evaluation is one combination of them
EXAMPLES = 8  # test images whose predicted masks are kept for pictures
# A run without pretraining is one protocol: the frozen random encoder, or everything trained from scratch.
ONLY = {"random": "linear", "supervised": "finetune"}


def subset(n: int, fraction: float, *, seed: int) -> list[int]:
    """``fraction`` of ``n`` positions, drawn without replacement; sorted, at least one, the same for the same seed."""
    return sorted(torch.randperm(n, generator=seeded(seed, "labels"))[: max(1, round(fraction * n))].tolist())


def evaluate(
    settings: Settings,
    folder: Path | str,
    stores: Mapping[str, Path | str],
    *,
    dataset: str | None = None,
    protocol: str,
    inputs: str = "both",
    fraction: float = 1.0,
    seasons: str = "",
) -> dict:
    """Train on labels from a finished pretraining, score the test images; returns the saved record.

    ``folder``: of ``pretrain.run``; ``stores``: with labels or masks, ``train``, ``test`` and maybe further ones, whose
    scores are the record's ``further``; ``dataset``: whose task it is, a name of ``datasets.names``, by default the
    data set that the stores name; ``protocol``: ``linear`` (frozen encoders in eval mode) or ``finetune``; ``inputs``:
    ``both`` (every modality of the run) or names joined by ``+``; ``fraction``: share of the training labels, drawn
    without replacement; ``seasons``: whose images are given side by side, numbers joined by ``+``, by default those
    that the labels are about. With ``transfer.validation`` the last training images, of which none is learnt from, are
    scored in the place of the test images. An evaluation on record with the same settings and images is not run again;
    an interrupted one goes on. Raises ConfigError (request, stores), DataError
    (stores; no positive label), FileNotFoundError or OSError (no or damaged encoders), and pretraining's ``NonFinite``
    (loss) and ``Interrupted`` (signal).
    """
    if protocol not in ("linear", "finetune"):
        raise config.ConfigError(f"protocol = {protocol!r}; allowed: linear, finetune")
    if not 0 < fraction <= 1:
        raise config.ConfigError(f"fraction = {fraction!r}; allowed: a share above 0, up to 1")
    needed = ["train"] if settings.transfer.validation else ["train", "test"]
    if not stores.keys() >= {*needed}:
        raise config.ConfigError(f"stores: {', '.join(stores) or 'none'}; needed: {', '.join(needed)}")
    pretrained, everything, pretraining = load_pretrained(folder)
    modalities = given(everything.values(), inputs)
    inputs = "both" if len(modalities) == len(everything) else "+".join(m.name for m in modalities)
    t, opened = settings.transfer, {part: Store(path) for part, path in stores.items()}
    train = opened.pop("train")
    key, title, task = _task(dataset, train)
    looks = [(m, season) for m in modalities for season in _seasons(seasons, key, train)]
    for store in (train, *opened.values()):
        _check(store, key, task, modalities)
    learnt = len(train) - round(t.validation * len(train))
    if t.validation and not 0 < learnt < len(train):
        found = f"transfer.validation = {t.validation:g} of {len(train)} images: {learnt} are learnt from"
        raise config.ConfigError(f"{train.path}: {found}; at least one must be, and at least one scored")
    scored = {part: (store, range(len(store))) for part, store in opened.items()}
    if t.validation:
        scored = {"test": (train, range(learnt, len(train)))}
    test, rows = scored.pop("test")
    wanted = {"protocol": protocol, "inputs": inputs, "fraction": fraction, "seasons": seasons}
    name = f"{key}-{Path(folder).name}-{protocol}-{inputs}-{fraction:g}"
    name += f"-seasons{seasons}" * bool(seasons) + f"-validation{t.validation:g}" * bool(t.validation)
    how = {k: v for k, v in config.to_dict(settings)["transfer"].items() if k not in SWEPT}
    described = {"pretraining": pretraining, "transfer": how, **wanted, "patches": [learnt, len(rows)]}
    described["task"] = type(task).__name__
    content = [described, task.classes, train.sha256, test.sha256, *(store.sha256 for store, _ in scored.values())]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    existing = runs.path(settings, "records", f"{name}.json")
    if existing.exists() and (record := json.loads(existing.read_text()))["settings_hash"] == digest:
        return record

    seed, device = pretraining["seed"], pretrain.device_of(settings)
    chosen = subset(learnt, fraction, seed=seed)
    if protocol == "finetune" and (size := min(len(chosen), t.batch_size)) < 2:
        limits = f"{len(chosen)} labelled images, transfer.batch_size = {t.batch_size}"
        raise config.ConfigError(f"{name}: BatchNorm cannot train on batches of {size} ({limits}); allowed: 2 or more")
    for store, used in ((train, chosen), (test, rows), *scored.values()):  # before the training, not after all of it
        for k in range(0, len(used), t.batch_size):
            task.check(labels_of(store, task, used[k : k + t.batch_size]))
    torch.manual_seed(seed)
    kind = NETWORKS[t.segmenter if task.dense else "linear"]
    network = kind.build(pretrained, pretraining, [m for m, _ in looks], task.outputs, protocol == "linear")
    network.to(device, memory_format=torch.channels_last)
    batch = partial(samples, kind, task, looks, t, device=device)
    file = runs.path(settings, "transfer", f"{name}.pt")
    about = {"protocol": protocol, "loss": task.loss, "autocast": pretrain.autocast(settings, device)}
    about |= {"seed": seed, "desc": name, "file": file, "digest": digest}
    steps = fitting.fit(network, kind, partial(batch, train), chosen, t, **about)
    examples: list[Tensor] = []
    answers = partial(fitting.predictions, network, kind)
    found = answers(partial(batch, test), rows, t)
    result = {"metric": task.metric, "numbers": list(task.numbers), **task.score(_noting(found, examples))}
    further = {part: task.score(answers(partial(batch, store), used, t)) for part, (store, used) in scored.items()}
    if task.dense:
        pictures = [task.picture(x).tolist() for x in examples]
        runs.write_json(_predicted(settings, name), pictures)
    facts = test.meta.get("data") or {}
    record = {"dataset": title, "evaluation": name, "run": Path(folder).name, "name": settings.name, **wanted}
    record |= {"pair": pretraining["pair"], "variant": settings.variant, "network": type(network).__name__}
    record |= {"method": pretraining["method"], "seed": seed, **result, "classes": list(task.classes), "steps": steps}
    record |= {"given": [[m.name, season] for m, season in looks], "further": further}
    record |= {"split": "validation" if t.validation else "test"}
    record |= {"patches": {"train": len(chosen), "test": len(rows)}, "settings": described, "settings_hash": digest}
    record["patches"] |= {part: len(used) for part, (_, used) in scored.items()}
    record |= {"data": facts, "drawn": facts.get("drawn", settings.data.source == "world")}
    record["label_ids"] = [train.ids[i] for i in chosen] if fraction < 1 else "all"
    record |= {"profile": settings.profile, "world": settings.data.source, "provenance": runs.provenance()}
    runs.write_json(existing, record)
    for left in (file, *file.parent.glob(f".{file.name}.*")):  # also by a process that was killed while it wrote one
        left.unlink(missing_ok=True)
    return record


def _predicted(settings: Settings, name: str) -> Path:
    return runs.path(settings, "predictions", f"{name}.json")


def _task(dataset: str | None, store: Store) -> tuple[str, str, Task]:
    """Name and title of the labelled data set in a store, and its task, which is that of ``dataset`` if given."""
    facts = store.meta.get("data") or {}
    known = {name: found for name in datasets.names() if (found := datasets.find(name)).task}
    own, classes, labels = facts.get("name", ""), tuple(facts.get("classes", ())), store.labels is not None
    key, allowed = dataset or own, ", ".join(dict.fromkeys(filter(None, [*known, own])))
    if key not in known and key != own:
        raise config.ConfigError(f"dataset = {dataset!r}; allowed: {allowed}")
    if key in known:
        title = known[own].title if own in known else facts.get("title") or own or known[key].title
        return key, title, known[key].task
    if not labels and "mask" not in store.shapes:
        raise config.ConfigError(f"{store.path}: holds no labels or masks; convert labelled images")
    if not own or not classes:
        found = f"{store.path}: does not say {'of which classes its labels are' if own else 'what it holds'}"
        raise config.ConfigError(f"{found}; convert it with `about` (name, classes), or name the dataset: {allowed}")
    return key, facts.get("title") or own, Scene(classes) if labels else Masks(classes)


def _seasons(asked: str, key: str, store: Store) -> list[int]:
    """Whose images a network is given: those that are asked for, or those that the data set's labels are about."""
    parts = asked.split("+") if asked else map(str, datasets.find(key).seasons if key in datasets.names() else (0,))
    chosen = {part: int(part) if part.isdecimal() else store.seasons for part in parts}
    if wrong := [part for part, season in chosen.items() if season >= store.seasons]:
        allowed = f"numbers below {store.seasons} joined by '+', the seasons of {store.path}"
        raise config.ConfigError(f"transfer.seasons = {asked!r}: {wrong[0]!r}; allowed: {allowed}")
    return [*chosen.values()]


def _check(store: Store, key: str, task: Task, modalities: Sequence[Modality]) -> None:
    """Refuse a store without labels for the task, of other classes, or of images that the encoders do not know."""
    if (store.labels is None) if task.field == "labels" else ("mask" not in store.shapes):
        raise config.ConfigError(f"{store.path}: holds no {task.field.rstrip('s')}s; convert labelled images")
    if not len(store):
        raise config.ConfigError(f"{store.path}: holds no image; convert labelled images")
    facts = store.meta.get("data") or {}
    named = facts.get("classes") or task.classes
    counts = [len(named), *(store.labels.shape[1:] if task.field == "labels" else ())]
    if wrong := [count for count in counts if count != len(task.classes)]:
        whose = f"{store.path} ({facts.get('title') or 'which does not say what it holds'}) has {wrong[0]} classes"
        way = "leave dataset out, or name the one that it holds"
        raise config.ConfigError(f"{whose}, {key} has {len(task.classes)}; {way}")
    if any(c != own and c in task.classes for c, own in zip(named, task.classes, strict=True)):
        way = f"{key} has another order; declare this one, or remove the store and convert again"
        raise config.ConfigError(f"{store.path}: its classes are {', '.join(named)}; {way}")
    store.check({m.name: m.mapping() for m in modalities})
    sizes = {name: store.shapes[name][1:] for name in (*(m.name for m in modalities), "mask") if task.dense}
    if len({*sizes.values()}) > 1:
        raise config.ConfigError(f"{store.path}: {sizes} pixels; images and masks must lie on one grid")


def _noting(batches: Iterator[tuple[Tensor, Tensor]], examples: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; to ``examples`` the predictions (on the CPU) of the first EXAMPLES images are added."""
    for found, target in batches:
        examples += found[: EXAMPLES - len(examples)].cpu()
        yield found, target


def evaluate_members(
    settings: Settings, folders: Mapping[str, Path], stores: Mapping[str, Path], *, dataset: str | None = None
) -> list[dict]:
    """``evaluate`` for every run, inputs, label fraction and protocol of the profile; the records, in that order.

    Left out is what says nothing: fine-tuning of a random start and probing of what is to be trained from scratch
    (rows of their own, ``supervised`` and ``random``), and inputs that a single-modality run was not trained on.
    """
    t, todo = settings.transfer, []
    for folder in folders.values():
        about = json.loads((Path(folder) / "run.json").read_text())
        only, pair = ONLY.get(about["settings"]["method"]), datasets.modalities_of(about["settings"]["pair"])
        trained = set(about["trained"] or [m.name for m in pair])  # without pretraining any will do
        for values in itertools.product(t.inputs, t.fractions, t.protocols, t.seasons):
            one = dict(zip(("inputs", "fraction", "protocol", "seasons"), values, strict=True), folder=folder)
            if one["protocol"] == (only or one["protocol"]) and {m.name for m in given(pair, one["inputs"])} <= trained:
                todo.append(one)
    common = {"stores": stores, "dataset": dataset}
    return [evaluate(settings, **one, **common) for one in runs.progress(todo, desc="evaluations")]


def example_predictions(record: dict, settings: Settings, stores: Mapping[str, Path], *, count: int = 6) -> list[dict]:
    """The first test images with true and predicted masks of a segmentation on record, for ``pictures.scenes``.

    Items: ``id``, the modalities' stored uint8 images (C x H x W), ``mask`` and ``predicted`` uint8 (H x W).
    """
    predicted = json.loads(_predicted(settings, record["evaluation"]).read_text())
    held = record.get("split") == "validation"  # the last training images were scored
    test, items = Store(stores["train" if held else "test"]), []
    first, season = record["settings"]["patches"][0] * held, record["given"][-1][1]
    for i, found in enumerate(predicted[:count], start=first):
        images = {name: test.read(i, name, season) for name in test.shapes}
        name = f"drawn {i + 1}" if record["drawn"] else test.ids[i]
        items.append({"id": name, **images, "mask": images["mask"][0], "predicted": np.array(found, np.uint8)})
    return items


def chance(store_path: Path | str) -> float:
    """mAP micro in percent of a random ranking: the share of positive labels among all."""
    return 100 * float(Store(store_path).labels.mean())
