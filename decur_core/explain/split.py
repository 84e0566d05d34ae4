"""How many dimensions should be common: read from encoders that were trained within each modality, without labels.

Content of a modality is what its two views repeat; content is shared where two modalities correlate. Both are counted
by canonical correlations: half of the samples find the directions, the other half scores them, and the halves swap.
What chance gives is known from samples paired at random. Nothing here depends on data sets or networks.

Shapes: N samples, D features of a modality. Where to be careful:

- What is counted are functions of the content, and a network with room computes many of one factor: take the ratio of
  shared to reproducible (``dim_common``, ``widths``, ``blocks``), never ``shared`` alone.
- Content that the encoders have not learnt (yet) is not seen: estimate again later in a run.
- Samples that know one another (the same acquisition, place or season) correlate through what they have in common:
  name it in ``strata``. Neighbours and repetitions on both sides of the halves look reproducible: leave them out.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from decur_core.losses import layout
from decur_core.running.sections import ConfigError

REPRODUCIBLE = 0.5  # correlation c costs (1 - c)^2 as a common and c^2 as a unique dimension: from 1/2 on it pays
FLOOR = 0.05  # correlations below it are not worth a dimension, however many samples prove them
RIDGE = 0.01  # added to variances, in units of the mean variance of the features
CHANCE = 0.001  # of one direction too many where nothing is shared
MINIMUM = 64  # samples


@dataclass(frozen=True, eq=False)
class Split:
    """What two modalities contain and share; ``estimate`` makes it."""

    rank_1: int  # directions of modality 1 that its views repeat: held-out correlation above 1/2, or shared
    rank_2: int
    shared: int  # directions in which the modalities correlate more than ``threshold``
    spectrum_1: np.ndarray  # held-out canonical correlations of the two views of modality 1
    spectrum_2: np.ndarray
    spectrum_shared: np.ndarray  # of the first views of both modalities, within what their views repeat
    threshold: float  # what ``spectrum_shared`` would reach by chance, by permutation, or ``FLOOR``

    def dim_common(self, width: int) -> int:
        """How many of ``width`` embedding dimensions, the same number for both modalities, should be common."""
        return _share(width, self.shared, max(self.rank_1, self.rank_2))

    def widths(self, width: int) -> tuple[int, int]:
        """Embedding dimensions for each modality: ``width`` for the one with more content, the other in proportion."""
        largest = max(self.rank_1, self.rank_2)
        return _share(width, self.rank_1, largest), _share(width, self.rank_2, largest)


@dataclass(frozen=True, eq=False)
class Splits:
    """What two or more modalities contain and share; ``estimate_many`` makes it. Pairs are named ``<m>+<n>``."""

    ranks: dict[str, int]  # as in ``Split``, by modality
    shared: dict[str, int]  # by pair, what all modalities share included
    joint: int  # directions that all modalities share
    spectra: dict[str, np.ndarray]  # held-out canonical correlations, by modality and by pair
    thresholds: dict[str, float]  # what chance would reach, by modality and by pair

    def blocks(self, width: int) -> dict[str, int]:
        """Widths for ``losses.decur_blocks``: for all modalities, each pair and each one; empty blocks are left out.

        The modality with most content gets ``width`` dimensions, the others in proportion. Content that some but not
        all of more than three modalities share is counted for each pair of them.
        """
        largest, everyone = max(self.ranks.values()), "+".join(self.ranks)
        blocks = {everyone: _share(width, self.joint, largest)}
        blocks |= {pair: width * (r - self.joint) // largest for pair, r in self.shared.items() if pair != everyone}
        for m, taken in layout(blocks, self.ranks).items():
            blocks[m] = _share(width, self.ranks[m], largest) - sum(taken.values())
        return {block: k for block, k in blocks.items() if k}


def estimate(
    h1_a: ArrayLike | Tensor,
    h1_b: ArrayLike | Tensor,
    h2_a: ArrayLike | Tensor,
    h2_b: ArrayLike | Tensor,
    *,
    permutations: int = 20,
    seed: int = 0,
    strata: Sequence | None = None,
) -> Split:
    """How much two modalities contain and share, from features of two views of each: ``h1_a``, ``h1_b`` (N x D_1),
    ``h2_a``, ``h2_b`` (N x D_2); row n of all four is sample n. Arrays or tensors; best 4,096 samples or more.

    ``permutations``: random pairings that tell what chance gives; ``seed``: of these and of the halves. ``strata``: N
    labels (an acquisition, a place); what varies between them only does not count. Raises ``ValueError`` for shapes
    that differ, values that are not finite, fewer than 64 samples, and features that are constant or that the other
    view does not repeat. Warns of repeated samples, and where the number of samples limits what can be found.
    """
    views = {"1": (h1_a, h1_b), "2": (h2_a, h2_b)}
    found = estimate_many(views, permutations=permutations, seed=seed, strata=strata)
    return Split(*found.ranks.values(), found.shared["1+2"], *found.spectra.values(), found.thresholds["1+2"])


def estimate_many(
    views: Mapping[str, tuple[ArrayLike | Tensor, ArrayLike | Tensor]],
    *,
    permutations: int = 20,
    seed: int = 0,
    strata: Sequence | None = None,
) -> Splits:
    """``estimate`` for any number of modalities: each one's name and the features of its two views, N x D_m.

    What all share is found by following it through them: directions shared by the first two, of these the ones that
    the third shares, and so on; the median over the modality that comes last.
    """
    if len(views) < 2 or any("+" in name for name in views):
        raise ValueError(f"modalities {list(views)}: expected two or more names without +")
    if permutations < 2:
        raise ValueError(f"permutations = {permutations}: expected 2 or more, since their spread is needed")
    arrays = {m: [_array(h, f"view {v} of {m}") for h, v in zip(pair, "ab", strict=True)] for m, pair in views.items()}
    lengths = {m: [len(h) for h in pair] for m, pair in arrays.items()}
    n = len(next(iter(arrays.values()))[0])
    if any(length != n for pair in lengths.values() for length in pair):
        raise ValueError(f"the views have different numbers of samples: {lengths}")
    folds = _folds(n, strata, permutations, seed)
    spectra, thresholds, content = {}, {}, {}
    for m, pair in arrays.items():
        _warn_of_repetition(pair[0], m)
        a, b = (_scaled(h, folds, f"view {v} of {m}") for h, v in zip(pair, "ab", strict=True))
        spectra[m], thresholds[m], sides = _canonical(*_reduced(a, b, folds), folds)
        content[m] = [x for x, _ in sides]
        if not content[m][0].shape[1]:
            raise ValueError(
                f"the two views of {m} have nothing in common: their largest held-out correlation over {n} samples is"
                f" {spectra[m].max():.3f}, chance gives {thresholds[m]:.3f}; are their rows the same samples?"
            )
    shared = {}
    for m, o in combinations(views, 2):
        pair = f"{m}+{o}"
        spectra[pair], thresholds[pair], sides = _canonical(content[m], content[o], folds)
        shared[pair] = sides[0][0].shape[1]
    names, joint = list(views), min(shared.values())
    if len(names) > 2:
        chains = [_followed(names[k:] + names[:k], content, folds) for k in range(len(names))]
        joint = min(joint, int(np.median(chains)))
    ranks = {}
    for m in names:  # what is shared is content, be it less reproducible than the rest
        pairs = [r - joint for pair, r in shared.items() if m in pair.split("+")]
        ranks[m] = max(int((spectra[m] > REPRODUCIBLE).sum()), joint + sum(pairs))
        if ranks[m] == len(spectra[m]) == len(folds.rows) // 20 < arrays[m][0].shape[1]:  # of ``_reduced``
            warnings.warn(f"{n} samples show no more than {ranks[m]} directions of {m}; maybe there are", stacklevel=2)
    return Splits(ranks, shared, joint, spectra, thresholds)


def found(views: Mapping[str, tuple[ArrayLike | Tensor, ArrayLike | Tensor]], width: int) -> dict:
    """What ``dim_common: auto`` takes from features, as JSON has it: ``estimate_many`` for embeddings of ``width``.

    ``dim_common`` for two modalities, else ``blocks``, where each modality's own block takes what is left of ``width``;
    beside it ``ranks``, ``shared``, ``joint``, ``spectra`` and ``thresholds``.
    """
    try:
        splits = estimate_many(views)
    except ValueError as error:
        way = "train longer before the estimate (epochs, auto_share), on more images, or set dim_common"
        raise ConfigError(f"dim_common = 'auto': {error}; {way}") from error
    if len(views) == 2:
        split = {"dim_common": _share(width, splits.joint, max(splits.ranks.values()))}
    else:
        blocks = {block: k for block, k in splits.blocks(width).items() if "+" in block}
        own = {m: width - sum(taken.values()) for m, taken in layout(blocks, views).items()}
        split = {"blocks": blocks | {m: k for m, k in own.items() if k}}
    about = {"ranks": splits.ranks, "shared": splits.shared, "joint": splits.joint, "thresholds": splits.thresholds}
    return split | about | {"spectra": {name: values.tolist() for name, values in splits.spectra.items()}}


def _share(width: int, part: int, whole: int) -> int:
    """width * part / whole, rounded."""
    return (2 * width * part + whole) // (2 * whole)


def _array(h: ArrayLike | Tensor, what: str) -> np.ndarray:
    h = h.detach().double().cpu().numpy() if isinstance(h, Tensor) else np.asarray(h, np.float64)
    if h.ndim != 2 or h.shape[1] == 0:
        raise ValueError(f"{what} has shape {h.shape}: expected N samples x D features")
    if not np.isfinite(h).all():
        raise ValueError(f"{what}: {(~np.isfinite(h)).sum()} of {h.size} values are not finite")
    return h


def _warn_of_repetition(h: np.ndarray, m: str) -> None:
    repeated = len(h) - len({row.tobytes() for row in h})
    if repeated > len(h) / 100:
        text = f"{repeated} of {len(h)} rows of {m} repeat others: what both halves hold looks reproducible and shared"
        warnings.warn(text, stacklevel=3)


@dataclass(frozen=True)
class _Folds:
    """Which rows are used; of these, a cell (half and stratum) each, two ways to fit and score, and random pairings."""

    rows: np.ndarray
    cells: np.ndarray
    halves: list[tuple[np.ndarray, np.ndarray]]
    shuffles: list[np.ndarray]  # orders that keep every row in its cell


def _folds(n: int, strata: Sequence | None, permutations: int, seed: int) -> _Folds:
    random = np.random.default_rng(seed)
    strata = np.zeros(n, int) if strata is None else np.asarray(strata)
    if strata.shape != (n,):
        raise ValueError(f"strata has shape {strata.shape}: expected one label for each of {n} samples")
    strata = np.unique(strata, return_inverse=True)[1]
    half = np.empty(n, int)
    half[np.lexsort((random.random(n), strata))] = np.arange(n) % 2  # every stratum in two equal halves
    cells = 2 * strata + half
    rows = np.flatnonzero(np.bincount(cells)[cells] > 1)  # alone in its cell, a sample has nothing to be compared with
    if len(rows) < MINIMUM:
        raise ValueError(f"{len(rows)} of {n} samples can be compared with others: expected {MINIMUM} or more")
    cells, half = np.unique(cells[rows], return_inverse=True)[1], half[rows]
    fit, score = np.flatnonzero(half == 0), np.flatnonzero(half == 1)
    place = np.argsort(np.argsort(cells, kind="stable"))  # of each row among all sorted by their cell
    shuffles = [np.lexsort((random.random(len(rows)), cells))[place] for _ in range(permutations)]
    return _Folds(rows, cells, [(fit, score), (score, fit)], shuffles)


def _scaled(h: np.ndarray, folds: _Folds, what: str) -> np.ndarray:
    """Features centred in each cell and scaled to variance 1; one that is constant in a half is dropped."""
    h, cells = h[folds.rows], folds.cells
    size = np.abs(h).max(0)
    h = h / np.where(size > 0, size, 1)
    counts = np.bincount(cells)
    sums = np.add.reduceat(h[np.argsort(cells, kind="stable")], np.cumsum(counts) - counts)
    h = h - (sums / counts[:, None])[cells]
    varies = np.min([h[half].std(0) for half in folds.halves[0]], axis=0) > 1e-12
    if not varies.any():
        raise ValueError(f"{what}: each of the {len(varies)} features is constant")
    return h[:, varies] / h[:, varies].std(0)


def _reduced(a: np.ndarray, b: np.ndarray, folds: _Folds) -> tuple[list, list]:
    """Both views for each way to fit; where samples are few, the directions in which the views covary most.

    With fewer than ten samples for a feature, whitening would turn the noise of the smallest variances up.
    """
    most = len(a) // 20
    if max(a.shape[1], b.shape[1]) <= most:
        return [a, a], [b, b]
    bases = [np.linalg.svd(a[fit].T @ b[fit], full_matrices=False) for fit, _ in folds.halves]
    return [a @ u[:, :most] for u, _, _ in bases], [b @ vt[:most].T for _, _, vt in bases]


def _canonical(x: list, y: list, folds: _Folds) -> tuple[np.ndarray, float, list[tuple[np.ndarray, np.ndarray]]]:
    """Held-out canonical correlations of x and y (N x D each, for each way to fit), the mean over both ways.

    Also what chance gives, and for each way the values of the directions above that: N x r of x and of y.
    """
    orders = [np.arange(len(folds.rows)), *folds.shuffles]
    ways = [_held_out(*z, *halves, orders) for *z, halves in zip(x, y, folds.halves, strict=True)]
    count = min(correlations.shape[1] for correlations, _, _ in ways)
    found, *chance = sum(correlations[:, :count] for correlations, _, _ in ways) / 2
    largest = np.max(chance, axis=1, initial=0)
    # Maxima follow a Gumbel distribution: its quantile, as the largest of 20 would be passed once in 21 times.
    quantile = -np.euler_gamma - np.log(-np.log1p(-CHANCE))
    threshold = max(FLOOR, largest.max(), largest.mean() + largest.std(ddof=1) * 6**0.5 / np.pi * quantile)
    above = found > threshold
    return found, float(threshold), [(x[:, :count][:, above], y[:, :count][:, above]) for _, x, y in ways]


def _held_out(x: np.ndarray, y: np.ndarray, fit: np.ndarray, score: np.ndarray, orders: list) -> tuple:
    """Correlations for each order of y's rows, found in ``fit`` and seen in ``score``; x and y along the first ones.

    Every direction is scored on what those before it leave over, so that a strong one is not counted twice.
    """
    x, y = (z @ _whitening(z[fit]) for z in (x, y))
    (q_x, r_x), (q_y, r_y) = (np.linalg.qr(z[score]) for z in (x, y))
    rows = np.zeros_like(y)
    rows[score] = q_y
    bases, correlations = [], []
    for order in orders:
        u, _, vt = np.linalg.svd(x[fit].T @ y[order[fit]], full_matrices=False)
        bases.append((u, vt.T))
        left, right = _orthonormal(r_x @ u), _orthonormal(r_y @ vt.T)
        correlations.append((left * (q_x.T @ rows[order[score]] @ right)).sum(0))
    return np.array(correlations), x @ bases[0][0], y @ bases[0][1]


def _whitening(z: np.ndarray) -> np.ndarray:
    """The map that makes the columns of z uncorrelated with variance 1, but for the ridge; D x (rank of z)."""
    values, vectors = np.linalg.eigh(z.T @ z / len(z))
    varies = values > 1e-10 * values[-1]
    return vectors[:, varies] / np.sqrt(values[varies] + RIDGE * values.mean())


def _orthonormal(z: np.ndarray) -> np.ndarray:
    """Each column less what those before explain, at length 1; 0 where nothing is left."""
    q, r = np.linalg.qr(z)
    return q * np.sign(np.diag(r))


def _followed(names: list[str], content: dict[str, list[np.ndarray]], folds: _Folds) -> int:
    """How many directions are shared by the first two modalities, of these by the third, and so on."""
    through = content[names[0]]
    for m in names[1:]:
        through = [x + y for x, y in _canonical(through, content[m], folds)[2]]
        if not through[0].shape[1]:
            return 0
    return through[0].shape[1]
