"""What an embedding's dimensions know: known factors read from blocks of them by linear and by kernel regression.

Only for the miniature worlds, whose factors are known. A linear probe sees what is decorrelated, a kernel probe what is
independent: DeCUR's loss asks for the first alone.
"""

from collections.abc import Sequence

import numpy as np

from .config import Settings

PENALTIES = np.logspace(-4, 3, 15)
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


def first(
    by_run: dict[str, dict[str, dict]], kernel: str, methods: Sequence[str] = ("DeCUR", "Barlow Twins", "Random")
) -> dict[str, dict]:
    """The R2 matrices of the first seed of some methods, by run label."""
    return {k: v[kernel] for k, v in by_run.items() if k.startswith(tuple(methods)) and k.endswith("seed 0")}


def over_shares(
    by_run: dict[str, dict[str, dict]],
    members: Sequence[Settings],
    seen_by: dict[str, str],
    modalities: Sequence[str],
) -> dict[str, dict[float, list[float]]]:
    """Mean R2 of the right and of the wrong block over the share of common dimensions: series -> percent -> seeds."""
    series: dict[str, dict[float, list[float]]] = {}
    for table, member in zip(by_run.values(), members, strict=True):
        share = 100 * member.dim_common / member.projector[-1]
        for kernel, values in table.items():
            found = scores(values, seen_by, modalities)
            for side in ("right", "wrong"):
                series.setdefault(f"{side} block, {kernel}", {}).setdefault(share, []).append(found[side])
    return series


def report(by_run: dict[str, dict[str, dict]], seen_by: dict[str, str], modalities: Sequence[str]) -> str:
    """``scores`` of every method, mean ± deviation over seeds, as a Markdown table."""
    found: dict[tuple, list[dict]] = {}
    for label, table in by_run.items():
        for kernel, values in table.items():
            found.setdefault((label.partition(", seed")[0], kernel), []).append(scores(values, seen_by, modalities))
    names = ("right", "wrong", "block score", "impossible")
    lines = ["| Method | Probe | " + " | ".join(names) + " |", "|---" * 6 + "|"]
    for (method, kernel), runs in found.items():
        cells = [[run[name] for run in runs] for name in names]
        texts = [f"{np.mean(c):.2f}" + (f" ± {np.std(c, ddof=1):.2f}" if len(c) > 1 else "") for c in cells]
        lines.append(f"| {method} | {kernel} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def scores(table: dict[str, dict[str, float]], seen_by: dict[str, str], modalities: Sequence[str]) -> dict[str, float]:
    """Summary of an R2 matrix: mean R2 of the ``right`` and of the ``wrong`` block, their difference, the impossible.

    ``seen_by``: factor -> "common" or the one modality that carries it. Right: common factors from common dimensions,
    a modality's own factors from its unique dimensions; wrong: the same factors from the modality's other block.
    ``block score`` is right - wrong, 1 at best. ``impossible``: the largest R2 of a modality's own factor from the
    other modality's blocks, where nothing can be found; how far it lies above 0 is the error of the measurement.
    """
    right, wrong, impossible = [], [], []
    for factor, who in seen_by.items():
        for m, name in enumerate(modalities, start=1):
            common, unique = max(0, table[f"common {m}"][factor]), max(0, table[f"unique {m}"][factor])
            if who == "common":
                right.append(common)
                wrong.append(unique)
            elif who == name:
                right.append(unique)
                wrong.append(common)
            else:
                impossible += [table[f"common {m}"][factor], table[f"unique {m}"][factor]]
    found = {"right": np.mean(right), "wrong": np.mean(wrong), "impossible": np.max(impossible)}
    return {k: float(v) for k, v in found.items()} | {"block score": float(np.mean(right) - np.mean(wrong))}
