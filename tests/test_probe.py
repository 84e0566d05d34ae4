"""Probes against cases whose answer is known, and against scikit-learn's ridge regression."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from decur_core import probe


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_a_linear_factor_is_read_by_both_and_a_squared_one_by_the_kernel_alone(random):
    x = random.normal(size=(800, 6))
    factors = np.stack([x @ random.normal(size=6), x[:, 0] ** 2, random.normal(size=800)], 1)
    linear, radial = (probe.r2(x, factors, kernel=kernel) for kernel in ("linear", "rbf"))
    assert linear[0] > 0.999 and radial[0] > 0.95
    assert linear[1] < 0.05 and radial[1] > 0.7
    assert abs(linear[2]) < 0.05 and abs(radial[2]) < 0.1


def test_linear_probe_is_ridge_regression_with_the_best_leave_one_out_penalty(random):
    x, y = random.normal(size=(60, 5)), random.normal(size=(60, 1))
    y += x @ random.normal(size=(5, 1))
    train = slice(0, 30)
    z = (x - x[train].mean(0)) / x[train].std(0) / np.sqrt(5)
    gram = z[train] @ z[train].T + 1
    weights, error = probe._leave_one_out(gram, y[train] - y[train].mean(0))
    expected = []
    for penalty in probe.PENALTIES * np.linalg.eigvalsh(gram).clip(0).mean():
        left = []
        for i in range(30):
            kept = np.delete(np.arange(30), i)
            # The constant 1 in the Gram matrix is a penalised intercept: one more column of ones.
            wide = np.hstack([z[train], np.ones((30, 1))])
            model = Ridge(alpha=penalty, fit_intercept=False).fit(wide[kept], (y[train] - y[train].mean(0))[kept])
            left.append(((y[train] - y[train].mean(0))[i] - model.predict(wide[i : i + 1])[0]) ** 2)
        expected.append(np.mean(left))
    assert error[0] == pytest.approx(min(expected), rel=1e-8)


def test_scale_shift_and_useless_dimensions_do_not_matter(random):
    x = random.normal(size=(400, 4))
    y = x[:, :1] * 3
    changed = np.hstack([x * [1, 1e3, 1e-3, 5] + 7, np.full((400, 1), 2.0)])
    assert probe.r2(changed, y) == pytest.approx(probe.r2(x, y), abs=1e-3)
    assert probe.r2(x[:, :0], y) == 0


def test_scores_of_a_perfect_and_of_a_swapped_embedding(random):
    factors = {name: random.uniform(-1, 1, 400) for name in ("c", "a", "b")}
    seen_by = {"c": "common", "a": "sar", "b": "optical"}
    c, a, b = (factors[k][:, None] for k in "cab")
    perfect = probe.matrix(probe.blocks(np.hstack([c, a]), np.hstack([c, b]), 1), factors)
    swapped = probe.matrix(probe.blocks(np.hstack([a, c]), np.hstack([b, c]), 1), factors)
    good, bad = (probe.scores(t, seen_by, ("sar", "optical")) for t in (perfect, swapped))
    assert good["block score"] > 0.95 and bad["block score"] < -0.95
    assert abs(good["impossible"]) < 0.06
    mixed = probe.matrix(probe.blocks(np.hstack([c + a, c - a]), np.hstack([c, b]), 1), factors)
    assert 0.4 < mixed["common 1"]["c"] < 0.6 and 0.4 < mixed["unique 1"]["c"] < 0.6


def test_what_cannot_be_probed_is_refused(random):
    with pytest.raises(ValueError, match="at least 8"):
        probe.r2(np.zeros((4, 2)), np.zeros((4, 1)))
    with pytest.raises(ValueError, match="kernel 'cubic'"):
        probe.r2(np.zeros((20, 2)), np.zeros((20, 1)), kernel="cubic")
