"""Probes against cases whose answer is known, and against scikit-learn's ridge regression."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from decur_core import config
from decur_core.data import prepare
from decur_core.data.store import Store
from decur_core.explain import probes as probe
from decur_core.explain.embeddings import blocks
from decur_core.report import figures as plots
from decur_core.report import matrices
from decur_core.running import folders as runs

SEEN_BY = {"c": "common", "a": "sar", "b": "optical"}
ROWS = {
    f"{block} {k}": (m, b)
    for k, m in ((1, "sar"), (2, "optical"))
    for block, b in (("common", "sar+optical"), ("unique", m))
}


def table(held: dict[str, tuple]) -> dict:
    return {ROWS[block]: dict(zip("cab", values, strict=True)) for block, values in held.items()}


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
    _, error = probe.ridge(gram, y[train] - y[train].mean(0))
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


# R2 of `case` by ridge and kernel ridge regression written out by hand, which scikit-learn took the place of.
# (samples, features, of these constant, targets, kernel): R2 of each target
BY_HAND = {
    (120, 5, 0, 3, "linear"): [0.9980572747666415, -0.2916660244834304, -3.910672579765517e-05],
    (120, 5, 0, 3, "rbf"): [0.9969209407478306, 0.7738538282122127, 0.00021240369935293657],
    (40, 60, 0, 3, "linear"): [0.25742436332170826, -0.00019965090582196865, 7.08637086672681e-05],
    (40, 60, 0, 3, "rbf"): [0.25500447412896765, -3.3717511271902367e-07, -3.293020682360037e-06],
    (90, 12, 4, 3, "linear"): [0.910429082391844, 0.00048477969027582724, -0.00015873995053827805],
    (90, 12, 4, 3, "rbf"): [0.9060220033089964, 0.5495623629980595, 8.950045836020326e-05],
    (16, 3, 0, 1, "linear"): [0.9957503321334668],
    (16, 3, 0, 1, "rbf"): [0.9965604494312799],
    (300, 30, 29, 2, "linear"): [2.7345255458111062e-05, 0.00013790287036896665],
    (300, 30, 29, 2, "rbf"): [0.0005957102784290846, 0.01316427550004895],
}


def case(count, features, constant, targets):
    random = np.random.default_rng(7)
    x = random.normal(size=(count, features))
    y = [x @ random.normal(size=features), np.sin(2 * x[:, 0]) + x[:, 1] ** 2, random.normal(size=count)]
    y = np.stack(y, 1)[:, :targets]
    x[:, features - constant :] = 2.5
    return x, y + 0.1 * random.normal(size=y.shape)


@pytest.mark.parametrize("given", BY_HAND)
def test_probes_have_the_numbers_of_those_written_by_hand(given):
    *shape, kernel = given
    assert probe.r2(*case(*shape), kernel=kernel) == pytest.approx(BY_HAND[given], abs=1e-9)


def test_probes_of_fewer_samples_and_of_single_precision_have_the_numbers_of_those_written_by_hand():
    x, y = case(400, 8, 0, 3)
    expected = [0.9984954700560339, 0.7460924308599897, -3.132883053580393e-05]
    assert probe.r2(x, y, kernel="rbf", samples=100) == pytest.approx(expected, abs=1e-9)
    x, y = (part.astype(np.float32) for part in case(200, 6, 0, 3))
    assert probe.r2(x, y) == pytest.approx(
        [0.9984641244072006, 0.0010261790433432338, -0.00025300835130170896], abs=1e-9
    )


def test_collapsed_and_diverged_embeddings(random):
    y = random.normal(size=(40, 2))
    for kernel in ("linear", "rbf"):
        assert np.abs(probe.r2(np.full((40, 3), 2.5), y, kernel=kernel)).max() < 0.2
        with pytest.raises(ValueError, match="not finite; the run that made them has diverged"):
            probe.r2(np.full((40, 3), np.nan), y, kernel=kernel)


@pytest.mark.parametrize("value", [0.0, 0.1, 7.3])
def test_a_factor_that_never_varies_is_neither_known_nor_unknown(random, value):
    x, varied = random.normal(size=(40, 3)), random.normal(size=40)
    y = np.stack([np.full(40, value), varied], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for kernel in ("linear", "rbf"):
            for features in (x, x[:, :0]):
                found = probe.r2(features, y, kernel=kernel)
                assert np.isnan(found[0]) and found[1] == pytest.approx(probe.r2(features, y[:, 1:], kernel=kernel)[0])
        held = matrix(x, x, 1, {"c": varied, "a": y[:, 0], "b": varied})
        found = probe.scores(held, SEEN_BY)
    assert np.isfinite(list(found.values())).all(), "factors that vary have their scores"


def test_a_factor_that_varies_in_one_half_alone_has_no_score(random):
    x, y = random.normal(size=(40, 3)), random.normal(size=(40, 3))
    y[20:, 0], y[:20, 1] = 2.5, 0.1
    for features in (x, x[:, :0]):
        assert np.isnan(probe.r2(features, y)).tolist() == [True, True, False]


def test_scale_shift_and_useless_dimensions_do_not_matter(random):
    x = random.normal(size=(400, 4))
    y = x[:, :1] * 3
    changed = np.hstack([x * [1, 1e3, 1e-3, 5] + 7, np.full((400, 1), 2.0)])
    assert probe.r2(changed, y) == pytest.approx(probe.r2(x, y), abs=1e-3)
    assert probe.r2(x[:, :0], y) == 0


def matrix(z1, z2, dim_common, factors, kernel="linear"):
    settings = {"method": "decur", "dim_common": dim_common}
    z = {"sar": z1, "optical": z2}
    return probe.matrix(z, blocks(settings, {m: each.shape[1] for m, each in z.items()}), factors, kernel=kernel)


def test_scores_of_a_perfect_and_of_a_swapped_embedding(random):
    factors = {name: random.uniform(-1, 1, 400) for name in ("c", "a", "b")}
    c, a, b = (factors[k][:, None] for k in "cab")
    perfect = matrix(np.hstack([c, a]), np.hstack([c, b]), 1, factors)
    swapped = matrix(np.hstack([a, c]), np.hstack([b, c]), 1, factors)
    good, bad = (probe.scores(t, SEEN_BY) for t in (perfect, swapped))
    assert good["block score"] > 0.95 and bad["block score"] < -0.95
    assert abs(good["impossible"]) < 0.06
    mixed = matrix(np.hstack([c + a, c - a]), np.hstack([c, b]), 1, factors)
    assert 0.4 < mixed["sar", "sar+optical"]["c"] < 0.6 and 0.4 < mixed["sar", "sar"]["c"] < 0.6


def test_three_modalities_are_scored_by_the_block_of_those_who_carry_a_factor(random):
    factors = {name: random.uniform(-1, 1, 400) for name in ("all", "ab", "ac", "a", "c")}
    seen_by = {"all": "common", "ab": "a+b", "ac": "a+c", "a": "a", "c": "c"}
    f = {name: values[:, None] for name, values in factors.items()}
    z = {"a": np.hstack([f["all"], f["a"], f["ab"], f["ac"]])}
    z |= {"b": np.hstack([f["all"], f["ab"]]), "c": np.hstack([f["all"], f["c"], f["ac"]])}
    widths = {m: each.shape[1] for m, each in z.items()}
    settings = {"method": "decur", "blocks": {"a+b+c": 1, "a": 1, "c": 1, "a+b": 1, "a+c": 1}}
    table = probe.matrix(z, blocks(settings, widths), factors)
    assert table["a", "a+c"]["ac"] > 0.99 and table["b", "b"] == dict.fromkeys(factors, 0)
    found = probe.scores(table, seen_by)
    assert found["right"] > 0.99 and abs(found["wrong"]) < 0.1 and abs(found["impossible"]) < 0.1
    assert probe.scores(table, seen_by | {"ab": "b+a", "all": "c+b+a"}) == found  # in whatever order they are named
    settings["blocks"] = {"a+b+c": 1, "a": 1, "c": 1, "a+c": 1, "a+b": 1}  # in a, two blocks have changed places
    swapped = probe.scores(probe.matrix(z, blocks(settings, widths), factors), seen_by)
    values = 3 + 2 + 2 + 1 + 1  # entries of factors in their blocks, of which two are now 0
    assert swapped["right"] == pytest.approx((values - 2) / values, abs=0.05) and swapped["best block"] > 0.95
    whole = probe.matrix(z, blocks({"method": "barlow_twins"}, widths), factors)
    found = probe.scores(whole, seen_by)
    assert found["right"] == pytest.approx(3 / values, abs=0.01), "no block of just two, or of one"
    assert found["best block"] > 0.95


def test_what_cannot_be_probed_is_refused(random):
    with pytest.raises(ValueError, match="at least 8"):
        probe.r2(np.zeros((4, 2)), np.zeros((4, 1)))
    with pytest.raises(ValueError, match="kernel 'cubic'"):
        probe.r2(np.zeros((20, 2)), np.zeros((20, 1)), kernel="cubic")


def test_scores_follow_from_the_entries_one_by_one():
    found = probe.scores(
        table(
            {
                "common 1": (0.9, 0.5, 0.02),
                "unique 1": (0.1, 0.7, -0.04),
                "common 2": (0.8, 0.01, 0.4),
                "unique 2": (-0.3, 0.03, 0.6),
            }
        ),
        SEEN_BY,
    )
    assert found["common factors, common block"] == pytest.approx((0.9 + 0.8) / 2)
    assert found["common factors, unique block"] == pytest.approx((0.1 + 0) / 2)  # below 0 nothing is held
    assert found["own factors, unique block"] == pytest.approx((0.7 + 0.6) / 2)
    assert found["own factors, common block"] == pytest.approx((0.5 + 0.4) / 2)
    assert found["right"] == pytest.approx((0.9 + 0.8 + 0.7 + 0.6) / 4)
    assert found["wrong"] == pytest.approx((0.1 + 0 + 0.5 + 0.4) / 4)
    assert found["block score"] == pytest.approx(found["right"] - found["wrong"])
    assert found["best block"] == pytest.approx((0.9 + 0.8 + 0.7 + 0.6) / 4)
    swapped = table({"common 1": (0.2, 0.5, 0), "unique 1": (0.6, 0.1, 0), "common 2": (0.8, 0, -0.2)})
    assert probe.scores(swapped, SEEN_BY)["best block"] == pytest.approx((0.6 + 0.5 + 0.8 + 0) / 4)
    assert found["impossible"] == 0.03
    unread = {f"{block} {m}": (0.5, np.nan, np.nan) for block in ("common", "unique") for m in (1, 2)}
    found = probe.scores(table(unread), SEEN_BY)
    assert found["right"] == 0.5 and np.isnan(found["own factors, common block"])


def test_a_factor_without_a_ceiling_counts_nowhere_even_where_it_has_no_block():
    """Of three modalities: the factor of two of them, by a method whose embeddings have no block of just these."""
    whole = {m: {"all": 0.9, "ab": np.nan, "a": 0.9 * (m == "a")} for m in ("a", "b", "c")}
    blocks_of = {(m, "a+b+c"): values | {"a": 0.0} for m, values in whole.items()}
    blocks_of |= {(m, m): values | {"all": 0.0} for m, values in whole.items()}
    found = probe.scores(blocks_of, {"all": "common", "ab": "a+b", "a": "a"})
    assert found["right"] == found["best block"] == pytest.approx(0.9) and found["wrong"] == 0
    assert found["common factors, common block"] == pytest.approx(0.9)


def test_shares_of_the_ceiling_leave_alone_what_a_modality_does_not_carry():
    held = table({"common 1": (0.4, 0.3, 0.02), "unique 2": (0.4, 0.03, 0.3)})
    ceilings = {"sar": {"c": [0.7, 0.9], "a": [0.6], "b": [-0.1]}, "optical": {"c": [0.5], "a": [0.01], "b": [0.75]}}
    found = probe.normalised({"DeCUR, seed 0": {"linear": held}}, ceilings, SEEN_BY)
    shares = found["DeCUR, seed 0"]["linear"]
    assert shares[ROWS["common 1"]] == pytest.approx({"c": 0.5, "a": 0.5, "b": 0.02})
    assert shares[ROWS["unique 2"]] == pytest.approx({"c": 0.8, "a": 0.03, "b": 0.4})
    low = ceilings | {"sar": {"c": [1], "a": [0.05], "b": [0]}}
    with pytest.warns(UserWarning, match="reads a from sar with R2 = 0.05: no ceiling"):
        rest = probe.normalised({"x": {"linear": held}}, low, SEEN_BY)["x"]["linear"]
    common, unique = rest[ROWS["common 1"]], rest[ROWS["unique 2"]]
    assert np.isnan(common["a"]) and common["c"] == 0.4 and unique["a"] == 0.03
    panels = matrices.panels(found | {"DeCUR, seed 1": {"linear": held}}, ceilings)
    ceiling, decur = panels.values()
    assert list(panels)[1] == "DeCUR" and ceiling["SAR"] == pytest.approx({"c": 0.8, "a": 0.6, "b": -0.1})
    assert decur["common, SAR"]["c"] == pytest.approx((0.5 + 0.4) / 2)
    assert len(plots.matrix(panels, unit="").axes) == 3  # two panels and the scale


def test_panels_of_runs_that_found_other_blocks_hold_all_of_them():
    shared, own = {"f": 0.8}, {"f": 0.2}
    runs_of = [{("a", "a+b"): shared, ("a", "a"): own, ("b", "b"): own}, {("a", "a"): {"f": 0.4}, ("b", "b"): own}]
    for found in (runs_of, runs_of[::-1]):
        by_run = {f"DeCUR, seed {seed}": {"linear": table} for seed, table in enumerate(found)}
        rows = matrices.panels(by_run, {m: {"f": [1.0]} for m in ("a", "b", "c")})["DeCUR"]
        assert {name: row["f"] for name, row in rows.items()} == pytest.approx(
            {"a + b, a": 0.8, "unique, a": 0.3, "unique, b": 0.2}
        )


def test_variants_of_a_method_are_not_averaged_like_seeds():
    by_run = {
        f"DeCUR, seed {seed}, dim_common{k}": {"linear": table({"common 1": (held,) * 3, "unique 1": (held,) * 3})}
        for k, held in ((16, 0.2), (64, 0.6))
        for seed in (0, 1)
    }
    lines = matrices.table(by_run, {"c": "common"}).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| DeCUR, dim_common16", "| DeCUR, dim_common64"]
    shown = matrices.panels(by_run, {"sar": {"c": [1.0]}, "optical": {"c": [1.0]}})
    values = {name: rows["common, SAR"]["c"] for name, rows in shown.items() if name.startswith("DeCUR")}
    assert values == pytest.approx({"DeCUR, dim_common16": 0.2, "DeCUR, dim_common64": 0.6})


def test_over_shares_has_a_point_for_every_share_and_seed():
    settings = config.load("mini", {"sweep": {"dim_common": [16, 64], "seed": [0, 1]}})
    members = config.members(settings)
    by_run = {
        f"run {k}": {
            "linear": table({f"{b} {m}": (k / 10, k / 10, k / 10) for b in ("common", "unique") for m in (1, 2)})
        }
        for k in range(4)
    }
    lines = probe.over_shares(by_run, members, SEEN_BY)["linear"]
    assert list(lines) == list(probe.HELD)
    assert lines["own factors, common block"] == {25: pytest.approx([0, 0.1]), 100: pytest.approx([0.2, 0.3])}
    assert len(plots.curve_panels({"linear": lines, "rbf": lines}, xlabel="", ylabel="").axes) == 2


def test_a_supervised_network_reads_what_is_in_the_images_and_nothing_else():
    random = torch.Generator().manual_seed(0)
    target = torch.rand(600, 2, generator=random) * 2 - 1
    images = 0.5 + 0.3 * target[:, :1, None, None] + 0.05 * torch.randn(600, 3, 16, 16, generator=random)
    state = torch.get_rng_state()
    r2 = probe.supervised_r2(lambda rows, step, generator: images[rows], images[500:], target, 500, steps=80)
    assert r2[0] > 0.9 and r2[1] < 0.1
    assert torch.equal(torch.get_rng_state(), state)


def test_the_ceiling_is_computed_once_and_not_on_images_that_it_is_tested_on(tmp_path, monkeypatch):
    small = {"world": {"locations": 32, "train": 8, "test": 8, "through_files": 0}, "batch_size": 8, "epochs": 1}
    small |= {"runs": str(tmp_path / "runs"), "data.stores": str(tmp_path / "stores"), "data.processes": 0}
    settings = config.load("mini", small | {"sweep": {"seed": [0, 3]}})
    store = prepare.pretraining_store(settings)
    factors, _ = prepare.known_factors(settings)
    calls = []

    def spy(view, held_out, target, train, **options):
        calls.append((train, len(held_out), options["steps"], options["seed"]))
        wanted = np.stack(list(factors.values()), 1)
        assert np.array_equal(target[train:], wanted[8:16]) and np.array_equal(target[:8], wanted[:8])
        assert np.array_equal(target[8:train], wanted[16:])
        assert view(torch.arange(4), 0, torch.Generator()).shape == (4, held_out.shape[1], 32, 32)
        return np.full(len(factors), 0.5 + len(calls))

    monkeypatch.setattr(probe, "supervised_r2", spy)
    found = probe.ceiling(settings, store, factors, samples=16)
    assert calls == [(24, 8, 200, 0), (24, 8, 200, 3)] * 2 and list(found) == ["sar", "optical"]
    assert found["sar"]["water"] == [1.5, 2.5] and found["optical"]["ratio"] == [3.5, 4.5]
    assert probe.ceiling(settings, store, factors, samples=16) == found and len(calls) == 4  # from the files
    runs.path(settings, "ceiling", "sar_optical-sar-200steps-seed3.json").unlink()
    probe.ceiling(settings, store, factors, samples=16)
    assert len(calls) == 5 and len(Store(store)) == 32
    longer = config.load("mini", small | {"sweep": {"seed": [0, 3]}, "epochs": 51})  # 4 steps each
    probe.ceiling(longer, store, factors, samples=16)
    assert len(calls) == 9 and calls[-1][2] == 204
    assert probe.ceiling(settings, store, factors, samples=16)["sar"]["water"] == [1.5, 5.5] and len(calls) == 9


def test_blocks_without_dimensions_are_told_from_measured_ones(random):
    values = {name: random.uniform(-1, 1, 60) for name in "cab"}
    z, (member,) = torch.rand(60, 4), config.members(config.load("mini", {"sweep": {}, "method": "barlow_twins"}))
    by_run = probe.tables({"Barlow Twins, seed 0": {"sar": z, "optical": z}}, [member], values)
    x = random.normal(size=(60, 2))
    by_run["DeCUR, seed 0"] = {k: matrix(x, x, 1, values, kernel=k) for k in ("linear", "rbf")}
    ceilings = {m: {name: [1.0] for name in "cab"} for m in ("sar", "optical")}
    shown = matrices.panels(by_run, ceilings)
    assert np.isnan(list(shown["Barlow Twins"]["unique, SAR"].values())).all()
    assert np.isfinite([list(row.values()) for row in shown["DeCUR"].values()]).all()
    table, note = matrices.table(by_run, SEEN_BY).split("\n\n")
    assert len(table.splitlines()) == 2 + 4 and note.endswith("is not measured: Barlow Twins.")
    again = {k.replace("0", "1"): v for k, v in by_run.items()}
    spaced = matrices.table(by_run | again, SEEN_BY)
    assert "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.00" in spaced and " ± " not in spaced
    unread = {m: dict.fromkeys("cab", [0.0]) for m in ("sar", "optical")}
    with pytest.warns(UserWarning, match="no ceiling"):
        dashes = matrices.table(probe.normalised(by_run | again, unread, SEEN_BY), SEEN_BY)
    assert "| DeCUR | linear | – | – | – |" in dashes, "of several seeds, none of which could be measured"
