"""The split estimated from features, in worlds of vectors where the truth is known: random mixtures of factors."""

import warnings

import numpy as np
import pytest
import torch

from decur_core import losses
from decur_core.explain import split

DISTRIBUTIONS = {
    "normal": lambda g, size: g.normal(size=size),
    "uniform": lambda g, size: g.uniform(-1, 1, size),
    "binary": lambda g, size: g.choice([-1.0, 1.0], size),
    "heavy tails": lambda g, size: g.standard_t(2, size),
    "rare": lambda g, size: 10 * g.normal(size=size) * (g.random(size) < 0.02),
}


def mixtures(factors, *, n=4096, d=32, noise=0.3, nuisance=0, distribution="normal", seed=0):
    """Two views of each modality: its factors (``factors``: number per set of modalities, joined by +), mixed linearly
    into d features, with noise and nuisance factors that each view draws anew."""
    g, draw = np.random.default_rng(seed), DISTRIBUTIONS[distribution]
    drawn = {s: draw(g, (n, k)) for s, k in factors.items()}
    views = {}
    for m in sorted({name for s in factors for name in s.split("+")}):
        own = np.concatenate([f for s, f in drawn.items() if m in s.split("+")], 1)
        mixing, spoiling = g.normal(size=(own.shape[1], d)), g.normal(size=(nuisance, d))
        views[m] = tuple(
            own @ mixing + draw(g, (n, nuisance)) @ spoiling + noise * g.normal(size=(n, d)) for _ in range(2)
        )
    return views


def pair(shared, own=(None, None), **options):
    """Features of two modalities with ``shared`` factors and so many of their own, 16 in all if that is not said."""
    a, b = (16 - shared if k is None else k for k in own)
    views = mixtures({"1+2": shared, "1": a, "2": b}, **options)
    return *views["1"], *views["2"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shared", [0, 1, 3, 5, 8, 16])
def test_shared_and_own_content_are_found(shared, seed):
    found = split.estimate(*pair(shared, seed=seed), seed=seed)
    assert (found.shared, found.rank_1, found.rank_2) == (shared, 16, 16)
    assert found.dim_common(64) == 4 * shared and found.widths(64) == (64, 64)
    assert (found.spectrum_shared > found.threshold).sum() == shared
    assert len(found.spectrum_1) == len(found.spectrum_2) == 32 and len(found.spectrum_shared) == 16


OTHER = {
    "few features": {"d": 17, "noise": 0.1},
    "many features": {"d": 128, "noise": 1.0, "nuisance": 3},
    "few samples": {"n": 1024},
    "few samples for the features": {"n": 1024, "d": 128},
    "many samples": {"n": 8192},
    "little noise": {"noise": 0.01},
    "much noise": {"noise": 1.0},
    "nuisance": {"nuisance": 12, "d": 48},
    **{name: {"distribution": name} for name in DISTRIBUTIONS if name != "normal"},
}


@pytest.mark.parametrize("options", OTHER.values(), ids=OTHER)
@pytest.mark.parametrize(("shared", "own"), [(0, (16, 16)), (3, (13, 4)), (16, (0, 0))])
def test_whatever_the_mixture(options, shared, own):
    found = split.estimate(*pair(shared, own, seed=7, **options))
    assert found.shared == shared
    assert abs(found.rank_1 - shared - own[0]) <= 1 and abs(found.rank_2 - shared - own[1]) <= 1
    if not any(own):
        assert found.dim_common(8192) == 8192 and found.widths(100) == (100, 100)


@pytest.mark.parametrize("own", [(1, 12), (12, 1)])
def test_the_richer_modality_gets_more_dimensions(own):
    found = split.estimate(*pair(4, own))
    assert (found.shared, found.rank_1 - 4, found.rank_2 - 4) == (4, *own)
    assert found.widths(64) == (64 * (4 + own[0]) // 16, 64 * (4 + own[1]) // 16) and found.dim_common(64) == 16


def test_chance_alone_is_not_taken_for_content():
    """100 pairs that share nothing, few samples each; the largest correlation where it was fitted is far higher."""
    for seed in range(100):
        found = split.estimate(*pair(0, (8, 5), n=512, d=20, seed=seed), seed=seed)
        assert found.shared == 0, seed
        assert abs(found.spectrum_shared.mean()) < 0.1


def test_weak_content_that_is_shared_counts_as_content():
    """With as much noise as this, reproducibility is below 1/2 in every direction."""
    views = pair(6, (0, 0), d=12, noise=8.0, seed=3)
    found = split.estimate(*views)
    assert (found.spectrum_1 < 0.5).any() and 0 < found.shared <= found.rank_1
    assert (found.spectrum_shared > 0.5).sum() < found.shared


def same(one, other, tolerance=1e-6):
    assert (one.rank_1, one.rank_2, one.shared) == (other.rank_1, other.rank_2, other.shared)
    for name in ("spectrum_1", "spectrum_2", "spectrum_shared", "threshold"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=tolerance)


def test_units_and_what_carries_no_information_do_not_matter():
    views, g = pair(5, (3, 6), seed=1), np.random.default_rng(0)
    wanted = split.estimate(*views)
    scale, offset = 10 ** g.uniform(-6, 6, 32), g.normal(size=32)
    same(split.estimate(*((h + offset) * scale for h in views)), wanted)
    same(split.estimate(*(-1e150 * h for h in views)), wanted)
    constant = (np.concatenate([h, np.full((4096, 2), 3.7), np.zeros((4096, 1))], 1) for h in views)
    same(split.estimate(*constant), wanted)
    seldom = np.zeros((4096, 1))
    seldom[5] = 1
    same(split.estimate(*(np.concatenate([h, seldom], 1) for h in views)), wanted)
    repeated = split.estimate(*(np.concatenate([h, h @ g.normal(size=(32, 9))], 1) for h in views))
    assert (repeated.shared, repeated.rank_1, repeated.rank_2) == (5, 8, 11)


def test_tensors_arrays_and_seeds():
    views = pair(5, n=1024)
    wanted = split.estimate(*views, permutations=5)
    same(split.estimate(*map(torch.tensor, views), permutations=5), wanted, 0)
    tensors = [torch.tensor(h, dtype=torch.float32, requires_grad=True) for h in views]
    same(split.estimate(*tensors, permutations=5), wanted, 1e-4)
    assert split.estimate(*(t.bfloat16() for t in tensors), permutations=5).shared == 5
    same(split.estimate(*views, permutations=5), wanted, 0)
    other = split.estimate(*views, permutations=5, seed=1)
    assert other.shared == 5 and other.threshold != wanted.threshold


def test_spectra_are_the_correlations_of_samples_that_were_not_fitted():
    """Against canonical correlations of the population: that of n factors with noise is known for one feature each."""
    g = np.random.default_rng(0)
    levels = np.array([0.1, 0.3, 0.6, 1.0, 2.0])  # variance of the noise of each factor
    factors = g.normal(size=(60000, 5))
    views = [factors + levels**0.5 * g.normal(size=factors.shape) for _ in range(4)]
    found = split.estimate(*views, permutations=2)
    for spectrum in (found.spectrum_1, found.spectrum_2, found.spectrum_shared):
        np.testing.assert_allclose(spectrum, 1 / (1 + levels), atol=0.02)
    assert (found.spectrum_shared > 0.5).sum() == 3 or found.spectrum_shared[3] == pytest.approx(0.5, abs=0.02)


class TestStrata:
    """Each acquisition adds an offset of its own to all that was seen in it, in both modalities."""

    @staticmethod
    def leaking(shared, *, acquisitions, seed=0):
        views, g = pair(shared, (4, 4), seed=seed), np.random.default_rng(seed)
        place, offsets = g.integers(acquisitions, size=4096), g.normal(size=(acquisitions, 3))
        offsets = [3 * offsets @ g.normal(size=(3, 32)) for _ in range(2)]
        return [h + offsets[k // 2][place] for k, h in enumerate(views)], place

    @pytest.mark.parametrize("shared", [0, 3])
    @pytest.mark.parametrize("acquisitions", [4, 100, 1000])
    def test_what_only_they_share_does_not_count(self, shared, acquisitions):
        views, place = self.leaking(shared, acquisitions=acquisitions)
        assert split.estimate(*views).shared == shared + 3
        found = split.estimate(*views, strata=place)
        assert (found.shared, found.rank_1, found.rank_2) == (shared, shared + 4, shared + 4)
        named = [f"place {k}" for k in place]
        assert split.estimate(*views, strata=named).shared == shared

    def test_samples_without_company_are_left_out_and_too_few_refused(self):
        views, place = self.leaking(2, acquisitions=20)
        alone = np.where(np.arange(4096) < 1000, 1000 + np.arange(4096), place)
        assert split.estimate(*views, strata=alone).shared == 2
        with pytest.raises(ValueError, match=r"\d+ of 4096 samples can be compared with others: expected 64"):
            split.estimate(*views, strata=np.arange(4096) // 2)
        with pytest.raises(ValueError, match=r"strata has shape \(4095,\): expected one label for each of 4096"):
            split.estimate(*views, strata=place[1:])


THREE = {"a+b+c": 2, "a+b": 3, "a+c": 1, "b+c": 2, "a": 1, "b": 4, "c": 3}
CASES = {
    "three": THREE,
    "pairs alone": {"a+b": 2, "a+c": 2, "b+c": 3, "a": 3, "b": 2, "c": 2},
    "nothing": {"a": 5, "b": 6, "c": 7},
    "everything": {"a+b+c": 8},
    "two": {"a+b": 3, "a": 2, "b": 5},
    "four": {"a+b+c+d": 2, "a+b": 1, "c+d": 2, "b+d": 1, "a": 3, "b": 2, "c": 3, "d": 1},
}


@pytest.mark.parametrize("noise", [0.1, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_modalities(name, noise):
    truth = CASES[name]
    views = mixtures(truth, noise=noise, d=24, seed=len(truth))
    found = split.estimate_many(views)
    everyone = "+".join(views)
    assert found.ranks == {m: sum(k for s, k in truth.items() if m in s.split("+")) for m in views}
    assert found.joint == truth.get(everyone, 0)
    for p, count in found.shared.items():
        assert count == truth.get(everyone, 0) + (truth.get(p, 0) if p != everyone else 0), p
        assert count == (found.spectra[p] > found.thresholds[p]).sum()
    width = 10 * max(found.ranks.values())  # where nothing has to be rounded, the blocks are the truth
    assert found.blocks(width) == {s: 10 * k for s, k in truth.items()}


@pytest.mark.parametrize("width", [1, 7, 64, 100, 8192])
def test_blocks_fit_the_loss(width):
    counts = {"a+b": 5, "a+c": 3, "b+c": 4}
    found = split.Splits({"a": 7, "b": 11, "c": 9}, counts, 2, {}, {})
    blocks = found.blocks(width)
    widths = {m: sum(k for block, k in blocks.items() if m in block.split("+")) for m in "abc"}
    assert widths == {m: round(width * r / 11) for m, r in found.ranks.items()} and widths["b"] == width
    assert min(blocks.values()) > 0
    if 1 < width < 1000:
        losses.decur_blocks({m: (torch.randn(4, k), None) for m, k in widths.items()}, blocks)


def test_dimensions_by_hand():
    found = split.Split(20, 12, 5, *[np.array([0.9, 0.6, 0.5, 0.3, 0.2])] * 3, 0.1)
    assert (found.dim_common(64), found.widths(64), (found.spectrum_shared > 0.5).sum()) == (16, (64, 38), 2)
    assert found.dim_common(8192) == 2048


def test_what_cannot_be_estimated_is_refused_with_the_reason():
    a, b, c, d = pair(3, n=512)

    def refused(match, *views, **options):
        with pytest.raises(ValueError, match=match):
            split.estimate(*views, **options)

    bad = c.copy()
    bad[3, 4], bad[5, 6] = np.nan, np.inf
    refused("view a of 2: 2 of 16384 values are not finite", a, b, bad, d)
    refused(r"different numbers of samples: \{'1': \[512, 512\], '2': \[512, 511\]\}", a, b, c, d[1:])
    refused(r"view b of 1 has shape \(512,\)", a, b[:, 0], c, d)
    refused(r"view b of 1 has shape \(512, 0\)", a, b[:, :0], c, d)
    refused("view a of 1: each of the 32 features is constant", np.ones_like(a), b, c, d)
    refused("view b of 2: each of the 32 features is constant", a, b, c, np.broadcast_to(d[:1], d.shape))
    refused("63 of 63 samples can be compared with others: expected 64 or more", *(h[:63] for h in (a, b, c, d)))
    refused("0 of 0 samples", *(h[:0] for h in (a, b, c, d)))
    refused("the two views of 1 have nothing in common.*over 512 samples.*same samples", a, b[::-1], c, d)
    refused("permutations = 1: expected 2 or more", a, b, c, d, permutations=1)
    for views in ({"a": (a, b)}, {}, {"a+b": (a, b), "c": (c, d)}):
        with pytest.raises(ValueError, match="expected two or more names"):
            split.estimate_many(views)


def test_warnings_name_what_limits_the_estimate():
    views = pair(3, (5, 5), n=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split.estimate(*views)
        noiseless = split.estimate(*pair(3, (5, 2), n=1024, noise=0))
        assert (noiseless.shared, noiseless.rank_1, noiseless.rank_2) == (3, 8, 5)  # all that there is in 32 features
    with pytest.warns(UserWarning, match="512 of 1024 rows of 1 repeat others"):
        split.estimate(*(np.concatenate([h[:512], h[:512]]) for h in views))
    with pytest.warns(UserWarning, match="200 samples show no more than 10 directions of 1"):
        split.estimate(*pair(3, n=200))
