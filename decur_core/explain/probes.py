"""What an embedding's dimensions know: known factors read from blocks of them by linear and by kernel regression.

Only for the miniature worlds, whose factors are known. A linear probe sees what is decorrelated, a kernel probe what is
independent: DeCUR's loss asks for the first alone. The ceiling is what a network of the same size reads from the images
when it is told the factors.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from decur_core import backbones, config, pretrain
from decur_core.config import Settings
from decur_core.data.modality import PAIRS
from decur_core.data.store import Store
from decur_core.report import tables as results
from decur_core.running import folders as runs
from decur_core.transfer import encoders as inputs

PENALTIES = np.logspace(-4, 3, 15)
STEPS = 200  # from which on a small network reads every factor of the miniature worlds
# What a block may hold: twice what belongs there, then twice what does not.
HELD = (
    "common factors, common block",
    "own factors, unique block",
    "common factors, unique block",
    "own factors, common block",
)
WIDTHS = (0.3, 1.0, 3.0)  # of the radial kernel, in units of the median distance between samples


def _leave_one_out(gram: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge weights (n, F) in the dual for the penalty with the least leave-one-out error, and those errors (F,).

    With G = gram + penalty * I, the residual of a sample that the fit did not see is (G^-1 y)_i / (G^-1)_ii.
    """
    values, vectors = np.linalg.eigh(gram)
    values, rotated = values.clip(0), vectors.T @ y
    best, weights = np.full(y.shape[1], np.inf), np.zeros_like(y)
    for penalty in PENALTIES * values.mean():
        inverse = 1 / (values + penalty)
        dual = vectors @ (inverse[:, None] * rotated)
        error = ((dual / (vectors**2 @ inverse)[:, None]) ** 2).mean(0)
        better = error < best
        best[better], weights[:, better] = error[better], dual[:, better]
    return weights, best


def r2(features: np.ndarray, factors: np.ndarray, *, kernel: str = "linear", samples: int = 1000) -> np.ndarray:
    """R2 of each factor, on samples that the probe has not seen: (F,), 1 at best, 0 for a constant guess, or below.

    ``features``: (N, D), ``factors``: (N, F), both real; the first half trains (at most ``samples``), the second tests.
    ``kernel``: linear, or rbf (radial). Penalty and width are chosen by leave-one-out error in the training half. With
    no dimension (D = 0) the result is 0. A ValueError for less than 8 samples.
    """
    n = len(features)
    if n < 8 or len(factors) != n or kernel not in ("linear", "rbf"):
        found = f"{n} and {len(factors)} samples, kernel {kernel!r}"
        raise ValueError(f"found {found}; expected equally many, at least 8, and kernel 'linear' or 'rbf'")
    if features.shape[1] == 0:
        return np.zeros(factors.shape[1])
    train, test = slice(0, min(n // 2, samples)), slice(n // 2, n)
    x, y = features.astype(np.float64), factors.astype(np.float64)
    spread = x[train].std(0)
    x = (x - x[train].mean(0)) / np.where(spread > 1e-12, spread, 1) / np.sqrt(x.shape[1])
    centre, x_train, x_test = y[train].mean(0), x[train], x[test]
    if kernel == "linear":
        grams = [(x_train @ x_train.T + 1, x_test @ x_train.T + 1)]
    else:
        lengths = [(part**2).sum(1) for part in (x_train, x_test)]
        squares = [lengths[k][:, None] + lengths[0] - 2 * part @ x_train.T for k, part in enumerate((x_train, x_test))]
        median = np.median(squares[0])
        grams = [tuple(np.exp(-s.clip(0) / (2 * width**2 * median)) for s in squares) for width in WIDTHS]
    best, predicted = np.full(y.shape[1], np.inf), np.zeros_like(y[test])
    for inside, across in grams:
        weights, error = _leave_one_out(inside, y[train] - centre)
        better = error < best
        best[better], predicted[:, better] = error[better], (across @ weights + centre)[:, better]
    return 1 - ((y[test] - predicted) ** 2).mean(0) / ((y[test] - centre) ** 2).mean(0)


def blocks(z1: np.ndarray, z2: np.ndarray, dim_common: int) -> dict[str, np.ndarray]:
    """Common and unique dimensions of both modalities' N x K embeddings: ``common 1``, ``unique 1``, …"""
    made = {}
    for m, z in enumerate((z1, z2), start=1):
        made |= {f"common {m}": z[:, :dim_common], f"unique {m}": z[:, dim_common:]}
    return made


def matrix(
    parts: dict[str, np.ndarray], factors: dict[str, np.ndarray], *, kernel: str = "linear"
) -> dict[str, dict[str, float]]:
    """R2 of every factor from every block: block -> factor -> R2."""
    y = np.stack(list(factors.values()), 1)
    return {name: dict(zip(factors, r2(x, y, kernel=kernel).tolist(), strict=True)) for name, x in parts.items()}


def tables(
    embedded: dict[str, tuple], members: Sequence[Settings], factors: dict[str, np.ndarray]
) -> dict[str, dict[str, dict]]:
    """``matrix`` of every run, linear and rbf: run label -> kernel -> block -> factor -> R2.

    ``embedded``: of ``explain.embed_members``, in the order of ``members``; ``factors``: of the same samples, or more.
    Of methods that do not decouple every dimension is common.
    """
    made = {}
    for (label, (z1, z2)), member in zip(embedded.items(), members, strict=True):
        decoupled = member.method == "decur" and member.decoupling
        parts = blocks(z1.numpy(), z2.numpy(), member.dim_common if decoupled else z1.shape[1])
        known = {name: values[: len(z1)] for name, values in factors.items()}
        made[label] = {kernel: matrix(parts, known, kernel=kernel) for kernel in ("linear", "rbf")}
    return made


def supervised_r2(
    view: Callable[[Tensor, int, torch.Generator], Tensor],
    held_out: Tensor,
    target: Tensor,
    train: int,
    *,
    steps: int,
    backbone: str = "small",
    batch: int = 64,
    rate: float = 5e-3,
    seed: int = 0,
) -> np.ndarray:
    """R2 (F,) of every factor on held-out images, by a network that is trained with the factors as labels.

    ``view(rows, step, generator)``: float images (batch, C, H, W) of some of the first ``train`` samples, augmented;
    ``held_out``: those of all others, in order, float; ``target``: factors of all, (N, F). ``rate``: the highest of one
    cycle of AdamW.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # networks are made on the CPU
        torch.manual_seed(seed)
        encoder, width = backbones.build(backbone, held_out.shape[1])
        network = nn.Sequential(encoder, nn.Linear(width, target.shape[1]))
    network.to(held_out.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(train, (batch,), generator=generator)
        loss = (network(view(rows, step, generator)) - target[rows].to(held_out.device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        error = torch.cat([network(images).cpu() for images in held_out.split(batch)]) - target[train:]
    return (1 - error.square().mean(0) / target[train:].var(0, correction=0)).numpy()


def ceiling(
    settings: Settings, store_path: Path | str, factors: dict[str, np.ndarray], *, samples: int = 1024
) -> dict[str, dict[str, list[float]]]:
    """``supervised_r2`` of every modality: modality -> factor -> R2 of each seed of the profile.

    The network is the profile's backbone, trained for as many steps as a pretraining, at least STEPS, on whole images
    of all locations but those that probes of the first ``samples`` embeddings are tested on. ``factors``: of the
    store's locations, in order. What was computed with the same settings is read from the profile's ``ceiling``.
    """
    store, device = Store(store_path), pretrain.device_of(settings)
    size = min(samples, len(store))
    held, rows = range(size // 2, size), [*range(size // 2), *range(size, len(store))]
    target = torch.from_numpy(np.stack(list(factors.values()), 1)[[*rows, *held]])
    steps = max(STEPS, settings.epochs * (len(store) // settings.batch_size))
    seeds = sorted({member.seed for member in config.members(settings)})
    todo = [(m, seed) for m in PAIRS[settings.pair] for seed in seeds]
    found: dict[str, dict[str, list[float]]] = {}
    for m, seed in runs.progress(todo, desc=f"{settings.pair}, supervised"):
        about = {"backbone": settings.backbone, "steps": steps, "batch": settings.batch_size, "samples": size}
        about |= {"size": settings.crop_size, "store": store.sha256, "factors": list(factors)}
        file = runs.path(settings, "ceiling", f"{settings.pair}-{m.name}-seed{seed}.json")
        if not file.exists() or (kept := json.loads(file.read_text()))["settings"] != about:
            policy = inputs.plain(settings.crop_size)
            flips = replace(policy, p_hflip=m.policy.p_hflip, p_vflip=m.policy.p_vflip)

            def view(picked: Tensor, step: int, generator: torch.Generator, m=m, flips=flips) -> Tensor:
                seasons = torch.randint(store.seasons, (len(picked),), generator=generator).tolist()
                images = inputs.stored(store, m.name, [rows[k] for k in picked.tolist()], device, seasons=seasons)
                return m.view(images, size=flips.size, policy=flips, generator=generator)

            options = {"steps": steps, "backbone": settings.backbone, "batch": settings.batch_size, "seed": seed}
            (images,) = inputs.views(store, [m], held, policy, device=device)
            kept = {"settings": about, "r2": supervised_r2(view, images, target, len(rows), **options).tolist()}
            runs.write_json(file, kept)
        for name, value in zip(factors, kept["r2"], strict=True):
            found.setdefault(m.name, {}).setdefault(name, []).append(value)
    return found


def normalised(
    by_run: dict[str, dict[str, dict]],
    ceilings: dict[str, dict[str, Sequence[float]]],
    seen_by: dict[str, str],
    modalities: Sequence[str],
) -> dict[str, dict[str, dict]]:
    """``tables`` with each R2 divided by what a supervised network reads of the factor from the block's modality.

    ``ceilings``: of ``ceiling``, whose mean over seeds counts. 1 means that nothing readable is missing. What a
    modality does not carry is not there to be read either: such entries, the impossible ones, stay as they are.
    Not a number, with a warning, where the ceiling is too low (below 0.1) to measure against: too few images or steps.
    """
    top = {name: {f: float(np.mean(values)) for f, values in found.items()} for name, found in ceilings.items()}
    carried = [(m, f) for f, who in seen_by.items() for m in modalities if who in ("common", m)]
    if low := [(m, f) for m, f in carried if not top[m][f] >= 0.1]:
        listed = ", ".join(f"{f} from {m} with R2 = {top[m][f]:.2f}" for m, f in low)
        warnings.warn(f"a supervised network reads {listed}: no ceiling to measure against, left out", stacklevel=2)

    def share(block: str, factor: str, value: float) -> float:
        place = (modalities[int(block[-1]) - 1], factor)
        return np.nan if place in low else value / top[place[0]][factor] if place in carried else value

    return {
        label: {
            kernel: {block: {f: share(block, f, v) for f, v in row.items()} for block, row in table.items()}
            for kernel, table in by_kernel.items()
        }
        for label, by_kernel in by_run.items()
    }


def _empty(row: dict[str, float]) -> bool:
    """Whether a block has no dimension: exactly 0 for every factor (see ``r2``), or not a number without a ceiling."""
    return not np.nan_to_num(list(row.values())).any()


def panels(
    by_run: dict[str, dict[str, dict]],
    ceilings: dict[str, dict[str, Sequence[float]]],
    kernel: str = "linear",
    methods: Sequence[str] = ("DeCUR", "Barlow Twins", "Random initialisation"),
) -> dict[str, dict[str, dict[str, float]]]:
    """Means over seeds for ``plots.matrix``: the ceiling, a row per modality, then a table for each of some methods.

    Not a number where a block has no dimension to read from.
    """
    names = [results.NAMES[modality] for modality in ceilings]

    def mean(tables: Sequence[dict]) -> dict[str, dict[str, float]]:
        means = {row: {f: float(np.mean([t[row][f] for t in tables])) for f in tables[0][row]} for row in tables[0]}
        return {row: dict.fromkeys(v, np.nan) if _empty(v) else v for row, v in means.items()}

    panels = {"Supervised network: the ceiling, $R^2$": dict(zip(names, mean([ceilings]).values(), strict=True))}
    for method in methods:
        if found := [t[kernel] for label, t in by_run.items() if _method(label) == method]:
            panels[method] = {f"{row[:-2]}, {names[int(row[-1]) - 1]}": values for row, values in mean(found).items()}
    return panels


def over_shares(
    by_run: dict[str, dict[str, dict]],
    members: Sequence[Settings],
    seen_by: dict[str, str],
    modalities: Sequence[str],
) -> dict[str, dict[str, dict[float, list[float]]]]:
    """What each kind of block holds of each kind of factor, over the share of common dimensions.

    Kernel -> one of HELD, such as ``own factors, unique block`` -> percent -> mean R2 of each seed.
    """
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for by_kernel, member in zip(by_run.values(), members, strict=True):
        share = 100 * member.dim_common / member.projector[-1]
        for kernel, table in by_kernel.items():
            found = scores(table, seen_by, modalities)
            for name in HELD:
                panels.setdefault(kernel, {}).setdefault(name, {}).setdefault(share, []).append(found[name])
    return panels


def _method(label: str) -> str:
    """The part of a run's label (``runs.label``) before the seed."""
    return label.partition(", seed")[0]


def report(by_run: dict[str, dict[str, dict]], seen_by: dict[str, str], modalities: Sequence[str]) -> str:
    """``scores`` of every method, mean ± deviation over seeds, as a Markdown table.

    Below it: which methods have no unique dimensions, and so 0 there without a measurement.
    """
    found: dict[tuple, list[dict]] = {}
    whole = {}  # methods without unique dimensions, in order
    for label, table in by_run.items():
        for kernel, values in table.items():
            if all(_empty(values[f"unique {m}"]) for m in (1, 2)):
                whole[_method(label)] = None
            found.setdefault((_method(label), kernel), []).append(scores(values, seen_by, modalities))
    names = {"right": "right block", "wrong": "wrong block (leakage)", "block score": "block score"}
    names["impossible"] = "impossible"
    lines = []
    for (method, kernel), seeds in found.items():
        cells = [[each[name] for each in seeds] for name in names]
        spreads = [(np.mean(c), np.std(c, ddof=1) if len(c) > 1 else None) for c in cells]
        texts = ["–" if np.isnan(mean) else results.cell(mean, deviation, digits=2) for mean, deviation in spreads]
        lines.append([method, kernel, *texts])
    text = results.grid(["Method", "Probe", *names.values()], lines)
    note = "Without unique dimensions, where an $R^2$ of 0 stands by definition and is not measured: "
    return f"{text}\n\n{note}{'; '.join(whole)}." if whole else text


def scores(table: dict[str, dict[str, float]], seen_by: dict[str, str], modalities: Sequence[str]) -> dict[str, float]:
    """Summary of an R2 matrix, negative values counting as 0, what is not a number left out.

    ``seen_by``: factor -> "common" or the one modality that carries it. Keys: each of HELD, the mean R2 of common
    factors, or of a modality's own, in its common or unique block; ``right``: the mean of common factors in common
    blocks and own factors in unique ones; ``wrong``: of the same factors in the other block of the modality;
    ``block score``: right - wrong, 1 at best; ``impossible``: the largest R2 of a modality's own factor from the other
    modality's blocks, where nothing can be found; how far it lies above 0 is the error of the measurement.
    """
    held: dict[str, list[float]] = {name: [] for name in HELD}
    impossible = []
    for factor, who in seen_by.items():
        for m, modality in enumerate(modalities, start=1):
            for block in ("common", "unique"):
                value = table[f"{block} {m}"][factor]
                if who in ("common", modality):
                    kind = "common" if who == "common" else "own"
                    held[f"{kind} factors, {block} block"].append(np.maximum(0, value))
                else:
                    impossible.append(value)
    with warnings.catch_warnings():  # of what has no ceiling there may be nothing else
        warnings.filterwarnings("ignore", "Mean of empty slice")
        right, wrong = (np.nanmean(held[first] + held[second]) for first, second in (HELD[:2], HELD[2:]))
        found = {name: np.nanmean(values) for name, values in held.items()}
    found |= {"right": right, "wrong": wrong, "block score": right - wrong, "impossible": np.max(impossible)}
    return {name: float(value) for name, value in found.items()}
