"""What an embedding's dimensions know: known factors read from blocks of them by linear and by kernel regression.

Only for the miniature worlds, whose factors are known. A linear probe sees what is decorrelated, a kernel probe what is
independent: DeCUR's loss asks for the first alone. The ceiling is what a network of the same size reads from the images
when it is told the factors.

Tables of R2 go by (modality, block), where a block is named by those who share it (``embeddings.blocks``), then by
factor. ``seen_by`` says of every factor who carries it: ``common`` (all) or names of modalities joined by ``+``.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from decur_core import backbones, config, pretrain
from decur_core.config import Settings
from decur_core.data.store import Store
from decur_core.explain.embeddings import blocks
from decur_core.running import folders as runs
from decur_core.running import history
from decur_core.transfer.encoders import images, plain, stored

PENALTIES = np.logspace(-4, 3, 15)  # of the weights, in units of the Gram matrix's mean eigenvalue
WIDTHS = (0.3, 1.0, 3.0)  # of the radial kernel, in units of the median distance between samples
STEPS = 200  # from which on a small network reads every factor of the miniature worlds
# What a block may hold: twice what belongs there, then twice what does not.
HELD = (
    "common factors, common block",
    "own factors, unique block",
    "common factors, unique block",
    "own factors, common block",
)
Table = dict[tuple[str, str], dict[str, float]]


def ridge(gram: np.ndarray, y: np.ndarray) -> tuple:
    """scikit-learn's KernelRidge of every target with its best penalty, and the leave-one-out errors (F,) behind it.

    ``gram``: (n, n), ``y``: (n, F). The errors come from features whose Gram matrix is the given one.
    """
    from sklearn.kernel_ridge import KernelRidge  # here: seconds, in every notebook
    from sklearn.linear_model import RidgeCV

    values, vectors = np.linalg.eigh(gram)
    some = values > 1e-12 * values[-1]  # what is left out is rounding, most columns for a block of few dimensions
    search = RidgeCV(PENALTIES * values.clip(0).mean(), fit_intercept=False, alpha_per_target=True)
    search.fit(vectors[:, some] * np.sqrt(values[some]), y)
    return KernelRidge(alpha=search.alpha_, kernel="precomputed").fit(gram, y), -search.best_score_


def r2(features: np.ndarray, factors: np.ndarray, *, kernel: str = "linear", samples: int = 1000) -> np.ndarray:
    """R2 of each factor, on samples that the probe has not seen: (F,), 1 at best, 0 for a constant guess, or below.

    ``features``: (N, D), ``factors``: (N, F), both real; the first half trains (at most ``samples``), the second tests.
    ``kernel``: linear, or rbf (radial). Penalty and width are chosen by leave-one-out error in the training half. With
    no dimension it is 0, for a factor constant in a half not a number. ValueError: below 8 samples, or not finite.
    """
    n = len(features)
    if n < 8 or len(factors) != n or kernel not in ("linear", "rbf"):
        found = f"{n} and {len(factors)} samples, kernel {kernel!r}"
        raise ValueError(f"found {found}; expected equally many, at least 8, and kernel 'linear' or 'rbf'")
    if not (np.isfinite(features).all() and np.isfinite(factors).all()):
        raise ValueError("features or factors hold values that are not finite; the run that made them has diverged")
    train, test = slice(0, min(n // 2, samples)), slice(n // 2, n)
    varies = np.where((np.ptp(factors[train], 0) > 0) & (np.ptp(factors[test], 0) > 0), 1, np.nan)
    if features.shape[1] == 0:
        return 0 * varies
    x, y = features.astype(np.float64), factors.astype(np.float64)
    spread = x[train].std(0)
    x = (x - x[train].mean(0)) / np.where(spread > 1e-12, spread, 1) / np.sqrt(x.shape[1])
    centre, both = y[train].mean(0), (x[train], x[test])
    if kernel == "linear":
        grams = [tuple(part @ x[train].T + 1 for part in both)]  # the 1: an intercept that is penalised too
    else:
        length = (x[train] ** 2).sum(1)
        squares = [((part**2).sum(1)[:, None] + length - 2 * part @ x[train].T).clip(0) for part in both]
        median = np.median(squares[0]) or 1.0  # samples that are all alike have none
        grams = [tuple(np.exp(-s / (2 * width**2 * median)) for s in squares) for width in WIDTHS]
    best, predicted = np.full(y.shape[1], np.inf), np.zeros_like(y[test])
    for inside, across in grams:
        model, error = ridge(inside, y[train] - centre)
        better = error < best
        best[better], predicted[:, better] = error[better], (model.predict(across) + centre)[:, better]
    return 1 - ((y[test] - predicted) ** 2).mean(0) / (varies * ((y[test] - centre) ** 2).mean(0))


def matrix(
    z: Mapping[str, np.ndarray],
    layout: Mapping[str, Mapping[str, slice]],
    factors: Mapping[str, np.ndarray],
    *,
    kernel: str = "linear",
) -> Table:
    """R2 of every factor from every block of every modality's N x K_m embedding; ``layout``: of ``blocks``."""
    y, made = np.stack(list(factors.values()), 1), {}
    for m, there in layout.items():
        for block, where in there.items():
            made[m, block] = dict(zip(factors, r2(z[m][:, where], y, kernel=kernel).tolist(), strict=True))
    return made


def tables(
    embedded: Mapping[str, Mapping[str, Tensor]], members: Sequence[Settings], factors: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Table]]:
    """``matrix`` of every run, linear and rbf: run label -> kernel -> (modality, block) -> factor -> R2.

    ``embedded``: of ``embed_members``, in the order of ``members``; ``factors``: of the same samples, or more.
    """
    made = {}
    for (label, tensors), member in zip(embedded.items(), members, strict=True):
        z = {m: each.numpy() for m, each in tensors.items()}
        if member.dim_common == "auto":
            member = pretrain.with_split(member, history.split(runs.path(member, "pretrain", runs.title(member))))
        layout = blocks(config.identity(member), {m: each.shape[1] for m, each in z.items()})
        known = {name: values[: len(next(iter(z.values())))] for name, values in factors.items()}
        made[label] = {kernel: matrix(z, layout, known, kernel=kernel) for kernel in ("linear", "rbf")}
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
    todo = [(m, seed) for m in config.modalities(settings) for seed in seeds]
    found: dict[str, dict[str, list[float]]] = {}
    for m, seed in runs.progress(todo, desc=f"{settings.pair}, supervised"):
        about = {"backbone": settings.backbone, "steps": steps, "batch": settings.batch_size, "samples": size}
        about |= {"size": settings.crop_size, "store": store.sha256, "factors": list(factors)}
        name = "-".join(filter(None, (settings.pair, m.name, f"{steps}steps", f"seed{seed}", settings.name)))
        file = runs.path(settings, "ceiling", f"{name}.json")
        if not file.exists() or (kept := json.loads(file.read_text()))["settings"] != about:
            flips = replace(plain(settings.crop_size), p_hflip=m.policy.p_hflip, p_vflip=m.policy.p_vflip)

            def view(picked: Tensor, step: int, generator: torch.Generator, m=m, flips=flips) -> Tensor:
                seasons = torch.randint(store.seasons, (len(picked),), generator=generator).tolist()
                seen = stored(store, m.name, [rows[k] for k in picked.tolist()], device, seasons=seasons)
                return m.view(seen, size=flips.size, policy=flips, generator=generator)

            options = {"steps": steps, "backbone": settings.backbone, "batch": settings.batch_size, "seed": seed}
            held_out = images(store, [m], held, settings.crop_size, device)[m.name]
            kept = {"settings": about, "r2": supervised_r2(view, held_out, target, len(rows), **options).tolist()}
            runs.write_json(file, kept)
        for name, value in zip(factors, kept["r2"], strict=True):
            found.setdefault(m.name, {}).setdefault(name, []).append(value)
    return found


def carries(who: str, modality: str) -> bool:
    """Whether a modality shows a factor that ``who`` carries."""
    return who == "common" or modality in who.split("+")


def normalised(
    by_run: Mapping[str, Mapping[str, Table]],
    ceilings: Mapping[str, Mapping[str, Sequence[float]]],
    seen_by: Mapping[str, str],
) -> dict[str, dict[str, Table]]:
    """``tables`` with each R2 divided by what a supervised network reads of the factor from the block's modality.

    ``ceilings``: of ``ceiling``, whose mean over seeds counts. 1 means that nothing readable is missing. What a
    modality does not carry is not there to be read either: such entries, the impossible ones, stay as they are.
    Not a number, with a warning, where the ceiling is too low (below 0.1) to measure against: too few images or steps.
    """
    top = {(m, f): float(np.mean(c[f])) for f, who in seen_by.items() for m, c in ceilings.items() if carries(who, m)}
    if low := {place: value for place, value in top.items() if not value >= 0.1}:
        listed = ", ".join(f"{f} from {m} with R2 = {value:.2f}" for (m, f), value in low.items())
        warnings.warn(f"a supervised network reads {listed}: no ceiling to measure against, left out", stacklevel=2)
    top |= dict.fromkeys(low, np.nan)

    def shares(table: Table) -> Table:
        return {(m, b): {f: v / top.get((m, f), 1.0) for f, v in row.items()} for (m, b), row in table.items()}

    return {label: {kernel: shares(table) for kernel, table in kinds.items()} for label, kinds in by_run.items()}


def over_shares(
    by_run: Mapping[str, Mapping[str, Table]], members: Sequence[Settings], seen_by: Mapping[str, str]
) -> dict[str, dict[str, dict[float, list[float]]]]:
    """What each kind of block holds of each kind of factor, over the share of common dimensions.

    Kernel -> one of HELD, such as ``own factors, unique block`` -> percent -> mean R2 of each seed.
    """
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for by_kernel, member in zip(by_run.values(), members, strict=True):
        share = 100 * member.dim_common / member.projector[-1]
        for kernel, table in by_kernel.items():
            found = scores(table, seen_by)
            for name in HELD:
                panels.setdefault(kernel, {}).setdefault(name, {}).setdefault(share, []).append(found[name])
    return panels


def scores(table: Table, seen_by: Mapping[str, str]) -> dict[str, float]:
    """Summary of an R2 matrix, negative values counting as 0, what is not a number left out.

    Keys: each of HELD, the mean R2 of factors that several modalities carry, or one alone, in the block of those who
    carry them or in another; ``right``: the mean of all factors in the block of just those who carry them, 0 where
    there is none; ``wrong``: of the same factors in the modality's other blocks; ``block score``: right - wrong, 1 at
    best; ``best block``: the mean of all factors in whichever block holds most of each, to compare methods that have
    other blocks; ``impossible``: the largest R2 of a factor from blocks of a modality that does not carry it, where
    nothing can be found; how far it lies above 0 is the error of the measurement.
    """
    held: dict[str, list[float]] = {name: [] for name in HELD}
    right, wrong, best, impossible = [], [], [], []
    everyone = list(dict.fromkeys(m for m, _ in table))
    for factor, who in seen_by.items():
        home = "+".join(m for m in everyone if carries(who, m))
        for m in everyone:
            there = {block: row[factor] for (other, block), row in table.items() if other == m}
            if not carries(who, m):
                impossible += [value for value in there.values() if value == value]
                continue
            best.append(np.maximum(0, max(there.values())))
            for block, value in ({home: 0 * best[-1]} | there).items():  # not a number stays so without a block too
                value = np.maximum(0, value)
                (right if block == home else wrong).append(value)
                if block in (home, m) or home == m:  # of several common blocks only the right one counts as common
                    kinds = ("own" if home == m else "common", "unique" if block == m else "common")
                    held["{} factors, {} block".format(*kinds)].append(value)
    with warnings.catch_warnings():  # of what has no ceiling there may be nothing else
        warnings.filterwarnings("ignore", "Mean of empty slice")
        lists = held | {"right": right, "wrong": wrong, "best block": best}
        found = {name: float(np.nanmean(values)) for name, values in lists.items()}
    return found | {"block score": found["right"] - found["wrong"], "impossible": max(impossible, default=np.nan)}
