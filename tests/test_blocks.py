"""The loss of several modalities against its formula written with loops, and against what the formula implies."""

import math
from itertools import combinations

import pytest
import torch
from test_losses import Largest

from decur_core import losses

TWO = {"a+b": 3, "a": 2, "b": 4}
THREE = {"a+b+c": 2, "a+b": 1, "a+c": 3, "b+c": 2, "a": 2, "b": 1, "c": 4}
FOUR = {"a": 2, "a+b+c+d": 2, "c+d": 1, "b+d": 2, "a+b+d": 1, "d": 1, "b": 1, "a+c": 2}  # in an order of its own
SCATTERED = {"a": 3, "b": 3, "c": 2}  # nothing in common
ONE = {"a+b+c": 5}  # nothing of one's own
UNUSED = {"a+b": 0, "a+b+c": 3, "a": 4, "b": 0, "c": 1}
BLOCKS = {"two": TWO, "three": THREE, "four": FOUR, "scattered": SCATTERED, "one": ONE, "unused": UNUSED}


def names_of(blocks):
    return sorted({name for block in blocks for name in block.split("+")})


def made(blocks, n, *, seed=0, dtype=torch.float64, times=1):
    """Views of each modality that share a signal, each dimension with its own scale and offset."""
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, times * sum(blocks.values()), generator=g)
    views = {}
    for m in names_of(blocks):
        k = times * sum(width for block, width in blocks.items() if m in block.split("+"))
        z = [signal[:, :k] + 0.7 * torch.randn(n, k, generator=g) for _ in range(2)]
        views[m] = tuple(
            (x * (0.2 + 3 * torch.rand(k, generator=g)) + torch.randn(k, generator=g)).to(dtype) for x in z
        )
    return views, {block: times * width for block, width in blocks.items()}


def masks(blocks, n, *, share=0.7, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {m: torch.rand(n, generator=g) < share for m in names_of(blocks)}


def correlation(x, y):
    """Eq. 1 of two columns."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / ((x * x).sum().sqrt() * (y * y).sum().sqrt())


def formula(views, blocks, *, lambd, present=None, minimum=2):
    """The sum over modalities and pairs of them, entry by entry, with lists of the dimensions' blocks and places."""
    n = len(next(iter(views.values()))[0])
    present = {m: torch.ones(n, dtype=torch.bool) for m in views} | (present or {})
    where = {m: [(s, i) for s, k in blocks.items() if m in s.split("+") for i in range(k)] for m in views}
    terms = {}
    for m, (z, other) in views.items():
        terms[f"intra/{m}"] = torch.zeros((), dtype=torch.float64)
        if other is None or present[m].sum() < minimum:
            continue
        for i in range(z.shape[1]):
            for j in range(z.shape[1]):
                c = correlation(z[present[m], i], other[present[m], j])
                terms[f"intra/{m}"] = terms[f"intra/{m}"] + ((1 - c) ** 2 if i == j else lambd * c**2)
    for m, o in combinations(views, 2):
        both = present[m] & present[o]
        common = rest = torch.zeros((), dtype=torch.float64)
        for i, (s, x) in enumerate(where[m] if both.sum() >= minimum else []):
            for j, (t, y) in enumerate(where[o]):
                c = correlation(views[m][0][both, i], views[o][0][both, j])
                if (s, x) == (t, y):
                    common = common + (1 - c) ** 2
                elif {m, o} <= set(s.split("+")) and {m, o} <= set(t.split("+")):
                    common = common + lambd * c**2
                else:
                    rest = rest + lambd * c**2
        terms[f"common/{m}+{o}"], terms[f"rest/{m}+{o}"] = (x / (len(views) - 1) for x in (common, rest))
    return terms


def evaluated(function, views, **options):
    """Values of the named terms, and the gradient of their sum with respect to every embedding."""
    leaves = {m: tuple(z if z is None else z.detach().clone().requires_grad_() for z in p) for m, p in views.items()}
    terms = function(leaves, **options)
    flat = [z for pair in leaves.values() for z in pair if z is not None]
    gradients = torch.autograd.grad(sum(terms.values()), flat, allow_unused=True, materialize_grads=True)
    return {name: value.detach() for name, value in terms.items()}, gradients


def ours(views, blocks, **options):
    found = losses.decur_blocks(views, blocks, **options)
    assert found.total.shape == ()
    torch.testing.assert_close(found.total, sum(found.terms.values()), rtol=1e-14, atol=0)
    return found.terms


@pytest.mark.parametrize("n", [3, 4, 5, 8, 30])  # widths are 3 to 9: all in the Gram form, a few, and none
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_values_and_gradients_are_those_of_the_formula(name, n, missing):
    views, blocks = made(BLOCKS[name], n, seed=n)
    options = {"blocks": blocks, "lambd": 0.3}
    if missing:
        options |= {"present": masks(blocks, n, seed=n), "minimum": 3}
    (wanted, wanted_gradients), (found, gradients) = (evaluated(f, views, **options) for f in (formula, ours))
    assert list(found) == list(wanted)
    for term in wanted:
        torch.testing.assert_close(found[term], wanted[term], rtol=1e-10, atol=1e-10)
    for g, w in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [12, 200])
def test_gradient_of_every_term_by_finite_differences(n):
    views, blocks = made(TWO if n > 100 else THREE, n if n < 100 else 15)
    flat = [z.requires_grad_() for pair in views.values() for z in pair]
    present = {"a": torch.arange(len(flat[0])) % 4 > 0}

    def terms(*z):
        pairs = dict(zip(views, zip(z[::2], z[1::2], strict=True), strict=True))
        return tuple(losses.decur_blocks(pairs, blocks, lambd=0.3, present=present).terms.values())

    assert torch.autograd.gradcheck(terms, flat)


@pytest.mark.parametrize("n", [6, 40], ids=["N x N", "K x K"])
def test_two_modalities_are_decur_but_for_the_rest(n):
    views, blocks = made({"a+b": 10, "a": 6, "b": 6}, n)
    found = losses.decur_blocks(views, blocks)
    wanted = losses.decur(*views["a"], *views["b"], dim_common=10)
    names = ("common/a+b", "intra/a", "intra/b")
    equal = [(found.terms[k], getattr(wanted, w)) for k, w in zip(names, ("common", "intra1", "intra2"), strict=True)]
    for f, w in equal:
        torch.testing.assert_close(f, w, rtol=1e-12, atol=0)
    c = losses.cross_correlation(views["a"][0], views["b"][0])
    between = c[:10, 10:].square().sum() + c[10:, :10].square().sum() + c[10:, 10:].square().sum()
    torch.testing.assert_close(found.terms["rest/a+b"], 0.0051 * between, rtol=1e-12, atol=0)
    alike, blocks = made({"a+b": 16}, n)
    whole = losses.decur_blocks({m: (a, None) for m, (a, _) in alike.items()}, blocks)
    twins = losses.barlow_twins(alike["a"][0], alike["b"][0])
    torch.testing.assert_close(whole.total, twins, rtol=1e-12, atol=0)
    assert whole.terms["rest/a+b"] == 0 == whole.terms["intra/a"] == whole.terms["intra/b"]


@pytest.mark.parametrize(("n", "times"), [(8, 30), (50, 4), (300, 8)])
@pytest.mark.parametrize("missing", [False, True])
def test_no_matrix_is_larger_than_the_embeddings(n, times, missing):
    views, blocks = made(THREE, n, times=times, dtype=torch.float32)
    for z in (z for pair in views.values() for z in pair):
        z.requires_grad_()
    with Largest() as largest:
        present = masks(blocks, n) if missing else None
        losses.decur_blocks(views, blocks, present=present).total.backward()
    assert largest.entries == max(a.numel() for a, _ in views.values())


@pytest.mark.parametrize(("n", "times"), [(8, 20), (60, 3)], ids=["N x N", "K x K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_precise_embeddings_and_autocast(n, times, dtype):
    views, blocks = made(FOUR, n, times=times, dtype=dtype)
    exact = {m: tuple(z.double() for z in pair) for m, pair in views.items()}
    (wanted, wanted_gradients), (found, gradients) = (evaluated(ours, v, blocks=blocks) for v in (exact, views))
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = evaluated(ours, views, blocks=blocks)
    assert inside == found
    for term, value in found.items():
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(float(wanted[term]), rel=1e-5), term
    for g, w in zip(gradients, wanted_gradients, strict=True):
        assert g.dtype == dtype
        assert float((g.double() - w).norm() / w.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("n", "times"), [(12, 10), (60, 2)], ids=["N x N", "K x K"])
class TestMissingSamples:
    def test_what_stands_in_their_rows_does_not_matter_and_gets_no_gradient(self, n, times):
        views, blocks = made(THREE, n, times=times)
        present = masks(blocks, n, share=0.8)
        wanted, gradients = evaluated(ours, views, blocks=blocks, present=present)
        for m, pair in views.items():
            for z in pair:
                z[~present[m]] = math.nan
        found, same = evaluated(ours, views, blocks=blocks, present=present)
        assert found == wanted and all(map(torch.equal, gradients, same))
        for g, m in zip(gradients, [m for m in views for _ in range(2)], strict=True):
            assert g[present[m]].any() and not g[~present[m]].any()

    def test_a_modality_that_every_sample_has_needs_no_mask(self, n, times):
        views, blocks = made(THREE, n, times=times)
        some, everywhere = masks(blocks, n), torch.ones(n, dtype=torch.bool)
        whole = {"a": some["a"], "b": everywhere, "c": everywhere}
        found, wanted = (losses.decur_blocks(views, blocks, present=p).terms for p in (whole, {"a": some["a"]}))
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
        full = losses.decur_blocks(views, blocks, present=dict.fromkeys(views, everywhere))
        torch.testing.assert_close(full.total, losses.decur_blocks(views, blocks).total, rtol=1e-13, atol=0)

    def test_too_few_samples_are_skipped(self, n, times):
        views, blocks = made(THREE, n, times=times)
        place = torch.arange(n)
        present = {"a": place < 5, "b": place >= 2, "c": place >= 5}  # a and b share 3, a and c none
        for minimum, skipped in ((4, ("a+b", "a+c")), (3, ("a+c",)), (0, ("a+c",)), (6, ("a+b", "a+c", "a"))):
            leaves = {m: tuple(z.clone().requires_grad_() for z in pair) for m, pair in views.items()}
            found = losses.decur_blocks(leaves, blocks, present=present, minimum=minimum)
            for name, term in found.terms.items():
                expected = name.split("/")[1] not in skipped
                assert (term != 0) == expected == term.requires_grad, (minimum, name)
        nobody = dict.fromkeys(views, torch.zeros(n, dtype=torch.bool))
        nothing = losses.decur_blocks(views, blocks, present=nobody)
        assert nothing.total == 0 and not nothing.total.requires_grad


def test_a_block_of_width_zero_changes_nothing():
    views, blocks = made(THREE, 8)
    four, own = views | made({"d": 3}, 8)[0], {"d": 3}
    with_zero, without = (losses.decur_blocks(four, blocks | more | own) for more in ({"a+d": 0}, {}))
    assert with_zero == without


def test_dimensions_may_be_renumbered_where_the_formula_says_so():
    """Within a shared block in all modalities at once, within an own block alone; elsewhere the loss rises."""
    views, blocks = made(THREE, 30, times=3)
    before = losses.decur_blocks(views, blocks)
    own = {m: slice(sum(k for s, k in blocks.items() if m in s.split("+")) - blocks[m], None) for m in views}
    moved = {m: tuple(z.clone() for z in pair) for m, pair in views.items()}
    for m, pair in moved.items():
        for z in pair:
            z[:, own[m]] = z[:, own[m]].flip(1)
            z[:, : blocks["a+b+c"]] = z[:, : blocks["a+b+c"]].roll(1, 1)
    torch.testing.assert_close(losses.decur_blocks(moved, blocks).total, before.total, rtol=1e-12, atol=0)
    for z in moved["a"]:
        z[:, : blocks["a+b+c"]] = z[:, : blocks["a+b+c"]].roll(1, 1)
    after = losses.decur_blocks(moved, blocks)
    assert after.terms["common/a+b"] > before.terms["common/a+b"] + 1
    torch.testing.assert_close(after.terms["intra/a"], before.terms["intra/a"], rtol=1e-12, atol=0)


def test_what_does_not_fit_is_refused_with_what_was_found():
    views, blocks = made(THREE, 8)

    def refused(match, *, views=views, blocks=blocks, **options):
        with pytest.raises(ValueError, match=match):
            losses.decur_blocks(views, blocks, **options)

    a, b, c = views.values()
    refused(r"block 'a\+x' of width 2: expected some of \['a', 'b', 'c'\]", blocks=blocks | {"a+x": 2})
    for name in ("b+a", "a+a", "", "a+", "a, b"):
        refused("in this order, joined by", blocks={name: 2} | blocks)
    refused("block 'a' of width -1", blocks=blocks | {"a": -1})
    refused(r"views of 'b' of shapes \[\(8, 6\), \(8, 6\)\].*two of \(8, 8\).*'b': 3", blocks=blocks | {"b": 3})
    refused(r"views of 'c' of shapes \[\(7, 11\), \(8, 11\)\]", views={"a": a, "b": b, "c": (c[0][1:], c[1])})
    refused(r"views of 'c' of shapes \[\(8, 11\), \(8, 10\)\]", views={"a": a, "b": b, "c": (c[0], c[1][:, 1:])})
    refused(r"views of 'b' of shapes \[None, \(8, 6\)\]", views={"a": a, "b": (None, b[1]), "c": c})
    refused(r"views of 'b' of shapes \[\(8, 6\)\]", views={"a": a, "b": b[:1], "c": c})
    refused(r"views of 'a' of shapes \[\(8, 8, 1\)", views={"a": tuple(z[..., None] for z in a), "b": b, "c": c})
    refused(r"block 'a\+b\+c'.*some of \['a', 'b'\]", views={"a": a, "b": b})
    refused(r"N = 8 samples of the modalities \['a'\]: expected 2", views={"a": a}, blocks={"a": 8})
    refused("N = 0 samples", views={}, blocks={})
    refused("N = 1 samples", views={m: tuple(z[:1] for z in pair) for m, pair in views.items()})
    everywhere = torch.ones(8, dtype=torch.bool)
    refused(r"present\['x'\] is torch.bool of shape \(8,\): expected .* one of \['a',", present={"x": everywhere})
    refused(r"present\['a'\] is torch.int64 of shape \(8,\)", present={"a": everywhere.long()})
    refused(r"present\['c'\] is torch.bool of shape \(7,\): expected .*\(8,\)", present={"c": everywhere[1:]})
