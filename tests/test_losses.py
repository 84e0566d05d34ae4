"""The losses against their papers' formulas written out in float64, and against what the formulas imply."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decur_core import losses

TERMS = ("common", "unique", "intra1", "intra2")
LAMBD = 0.0051


def correlation(a, b):
    """Eq. 1: sum_b a_bi b_bj / (sqrt(sum_b a_bi^2) sqrt(sum_b b_bj^2)) of embeddings centred over the batch."""
    a, b = a - a.mean(dim=0, keepdim=True), b - b.mean(dim=0, keepdim=True)
    return torch.einsum("bi,bj->ij", a, b) / torch.outer(a.pow(2).sum(dim=0).sqrt(), b.pow(2).sum(dim=0).sqrt())


def redundancy(c):
    """sum_i sum_{j != i} C_ij^2"""
    return c[~torch.eye(len(c), dtype=torch.bool)].pow(2).sum()


def formula(z1_a, z1_b, z2_a, z2_b, *, dim_common, lambd=LAMBD):
    """Eq. 2-5, one tensor per term, in the precision of the input; 0 / 0 (a constant dimension) counts as 0."""
    across, c1, c2 = (correlation(a, b).nan_to_num(0) for a, b in ((z1_a, z2_a), (z1_a, z1_b), (z2_a, z2_b)))
    c, u = across[:dim_common, :dim_common], across[dim_common:, dim_common:]
    return {
        "common": (1 - c.diagonal()).pow(2).sum() + lambd * redundancy(c),
        "unique": u.diagonal().pow(2).sum() + lambd * redundancy(u),
        "intra1": (1 - c1.diagonal()).pow(2).sum() + lambd * redundancy(c1),
        "intra2": (1 - c2.diagonal()).pow(2).sum() + lambd * redundancy(c2),
    }


def embeddings(n, k, *, seed=0, dtype=torch.float32):
    """Four embeddings that share a signal, each dimension with its own scale and offset."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, k, generator=g)
    made = []
    for _ in range(4):
        z = shared + 0.7 * torch.randn(n, k, generator=g)
        made.append((z * (0.2 + 3 * torch.rand(k, generator=g)) + 2 * torch.randn(k, generator=g)).to(dtype))
    return made


def with_gradients(function, z, dtype):
    """Values of the named terms, and the gradient of their sum with respect to each embedding."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in z]
    terms = function(*leaves)
    return {name: value.detach() for name, value in terms.items()}, torch.autograd.grad(sum(terms.values()), leaves)


def assert_close(found, wanted, tolerance, what):
    """Relative to the norm, and no single entry further off than that share of the largest one."""
    found, wanted = found.double(), wanted.double()
    norm = (found - wanted).norm() / wanted.norm()
    entry = (found - wanted).abs().max() / wanted.abs().max()
    assert norm <= tolerance and entry <= tolerance, f"{what}: off by {norm:.1e} (norm), {entry:.1e} (largest entry)"


SIZES = [(n, k) for k in (8, 64, 512) for n in (4, 32, 300)]
BOUNDARY = [(16, 31), (16, 32), (16, 33), (2, 4), (2, 5)]  # 2N = K is where the way of computing changes


@pytest.mark.parametrize("share", [0, 0.875, 0.3, 1])
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_value_and_gradient_are_those_of_the_paper(n, k, share, dtype, tolerance):
    z, dim = embeddings(n, k, seed=n * k, dtype=dtype), round(share * k)
    wanted, wanted_gradients = with_gradients(lambda *x: formula(*x, dim_common=dim), z, torch.float64)

    def ours(*x):
        terms = losses.decur(*x, dim_common=dim)
        assert terms.total.dtype == dtype
        return {name: getattr(terms, name) for name in TERMS}

    found, gradients = with_gradients(ours, z, dtype)
    for name in TERMS:
        assert found[name].shape == ()
        assert found[name].item() == pytest.approx(wanted[name].item(), rel=tolerance), name
    for i, (g, w) in enumerate(zip(gradients, wanted_gradients, strict=True)):
        assert_close(g, w, tolerance, f"gradient of embedding {i}")


@pytest.mark.parametrize(("n", "k"), BOUNDARY)
def test_where_the_way_of_computing_changes(n, k):
    z, dim = embeddings(n, k, dtype=torch.float64), k - 2
    wanted = formula(*z, dim_common=dim)
    found = losses.decur(*z, dim_common=dim)
    for name in TERMS:
        torch.testing.assert_close(getattr(found, name), wanted[name], rtol=1e-10, atol=1e-12)
    assert float(losses.barlow_twins(z[0], z[1], lambd=LAMBD)) == pytest.approx(float(wanted["intra1"]), rel=1e-10)


class Largest(TorchDispatchMode):
    """The most entries that any tensor made under this mode has, gradients included."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
        self.entries = max([self.entries, *(t.numel() for t in made)])
        return out


@pytest.mark.parametrize(("n", "k"), [(8, 200), (99, 200), (200, 8)])
def test_no_matrix_is_larger_than_the_embeddings(n, k):
    """K x K is formed only where N is large, N x N only where K is; the embeddings are larger than either."""
    z = [x.requires_grad_() for x in embeddings(n, k)]
    with Largest() as largest:
        losses.decur(*z, dim_common=3 * k // 4).total.backward()
        losses.barlow_twins(z[0], z[1]).backward()
        losses.vicreg(z[0], z[2]).total.backward()
    assert largest.entries == n * k


@pytest.mark.parametrize("share", [0, 0.6, 1])
@pytest.mark.parametrize(("n", "k"), [(4, 9), (6, 5)], ids=["N x N", "K x K"])
def test_gradient_of_every_term_by_finite_differences(n, k, share):
    z = [x.requires_grad_() for x in embeddings(n, k, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: tuple(losses.decur(*x, dim_common=round(share * k), lambd=0.3)), z)


@pytest.mark.parametrize(("n", "k"), [(4, 9), (6, 5)], ids=["N x N", "K x K"])
def test_gradient_of_barlow_twins_by_finite_differences(n, k):
    z = [x.requires_grad_() for x in embeddings(n, k, dtype=torch.float64)[:2]]
    assert torch.autograd.gradcheck(lambda a, b: losses.barlow_twins(a, b, lambd=0.3), z)


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("lambd", [0.0, 0.0051, 1.0])
def test_barlow_twins_equals_its_formula(n, k, lambd):
    a, b = embeddings(n, k)[:2]
    c = correlation(a.double(), b.double())
    wanted = (1 - c.diagonal()).pow(2).sum() + lambd * (c.pow(2).sum() - c.diagonal().pow(2).sum())
    assert float(losses.barlow_twins(a, b, lambd=lambd)) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(("n", "k"), [(8, 40), (40, 8)])
def test_all_dimensions_common_is_cross_modal_barlow_twins(n, k):
    z = embeddings(n, k, dtype=torch.float64)
    terms = losses.decur(*z, dim_common=k)
    assert float(terms.unique) == 0
    assert float(terms.common) == pytest.approx(float(losses.barlow_twins(z[0], z[2])), rel=1e-12)
    assert float(terms.intra1) == pytest.approx(float(losses.barlow_twins(z[0], z[1])), rel=1e-12)
    assert float(terms.intra2) == pytest.approx(float(losses.barlow_twins(z[2], z[3])), rel=1e-12)
    assert float(losses.decur(*z, dim_common=0).common) == 0


@pytest.mark.parametrize(("n", "k"), [(8, 40), (40, 8)])
def test_without_second_views_the_intra_modal_terms_are_zero_and_the_others_as_before(n, k):
    z = [x.requires_grad_() for x in embeddings(n, k, dtype=torch.float64)]
    for dim in (0, k // 2, k):
        whole, crossed = losses.decur(*z, dim_common=dim), losses.decur(z[0], None, z[2], None, dim_common=dim)
        assert tuple(crossed) == (whole.common + whole.unique, whole.common, whole.unique, 0, 0)
    without_both = losses.decur(z[0], None, z[2], None, dim_common=k).total
    barlow_twins = losses.barlow_twins(z[0], z[2])
    torch.testing.assert_close(without_both, barlow_twins, rtol=1e-14, atol=0)
    found, wanted = (torch.autograd.grad(loss, (z[0], z[2])) for loss in (without_both, barlow_twins))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    one = losses.decur(*z[:3], None, dim_common=k)
    assert one.intra1 == losses.decur(*z, dim_common=k).intra1 and one.intra2 == 0


def test_terms_sum_to_the_total_and_lambd_scales_only_the_off_diagonal():
    z = embeddings(10, 50, dtype=torch.float64)
    with_0, with_1, with_3 = (losses.decur(*z, dim_common=40, lambd=v) for v in (0.0, 1.0, 3.0))
    for terms in (with_0, with_1, with_3):
        assert float(terms.total) == pytest.approx(sum(float(getattr(terms, name)) for name in TERMS), rel=1e-14)
    for name in ("total", *TERMS):
        at_0, at_1, at_3 = (float(getattr(terms, name)) for terms in (with_0, with_1, with_3))
        assert at_3 - at_0 == pytest.approx(3 * (at_1 - at_0), rel=1e-10) and at_1 > at_0


@pytest.mark.parametrize(("n", "k"), [(8, 40), (40, 8)], ids=["N x N", "K x K"])
class TestInvariance:
    def test_scale_and_shift_of_any_dimension(self, n, k):
        z = embeddings(n, k, dtype=torch.float64)
        wanted = losses.decur(*z, dim_common=k // 2)
        g = torch.Generator().manual_seed(3)
        for which in range(4):
            moved = list(z)
            scale = 10 ** (6 * torch.rand(k, generator=g, dtype=torch.float64) - 3)
            moved[which] = z[which] * scale + 5 * scale * torch.randn(k, generator=g, dtype=torch.float64)
            torch.testing.assert_close(tuple(losses.decur(*moved, dim_common=k // 2)), tuple(wanted), rtol=1e-9, atol=0)

    @pytest.mark.parametrize("factor", [1e-12, 1e12])
    def test_very_small_and_very_large_embeddings_in_float32(self, n, k, factor):
        z = embeddings(n, k)
        moved = losses.decur(*(x * factor for x in z), dim_common=k // 2)
        torch.testing.assert_close(tuple(moved), tuple(losses.decur(*z, dim_common=k // 2)), rtol=1e-5, atol=1e-6)

    def test_sign(self, n, k):
        """The sign of a unique dimension is free per modality; that of a common one is tied across modalities."""
        z, dim = embeddings(n, k, dtype=torch.float64), k // 2
        before = losses.decur(*z, dim_common=dim)
        on_diagonal = correlation(z[0], z[2]).diagonal()[:dim].sum()

        def flipped(dimensions, which):
            sign = torch.ones(k, dtype=torch.float64)
            sign[dimensions] = -1
            return losses.decur(*(x * sign if i in which else x for i, x in enumerate(z)), dim_common=dim)

        unique_of_one, common_of_both = flipped(slice(dim, k), (0, 1)), flipped(slice(0, dim), (0, 1, 2, 3))
        torch.testing.assert_close(tuple(unique_of_one), tuple(before), rtol=1e-12, atol=0)
        torch.testing.assert_close(tuple(common_of_both), tuple(before), rtol=1e-12, atol=0)
        common_of_one = flipped(slice(0, dim), (0, 1))  # (1 + c)^2 in place of (1 - c)^2
        assert float(common_of_one.common - before.common) == pytest.approx(4 * float(on_diagonal), rel=1e-9)
        assert float(common_of_one.intra1) == pytest.approx(float(before.intra1), rel=1e-12)

    def test_order_of_samples_and_of_dimensions_within_a_part(self, n, k):
        z, dim = embeddings(n, k, dtype=torch.float64), k // 2
        before = losses.decur(*z, dim_common=dim)
        samples = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        columns = torch.cat([torch.randperm(dim), dim + torch.randperm(k - dim)])
        for moved in ([x[samples] for x in z], [x[:, columns] for x in z]):
            torch.testing.assert_close(tuple(losses.decur(*moved, dim_common=dim)), tuple(before), rtol=1e-12, atol=0)
        unpaired = losses.decur(z[0][samples], *z[1:], dim_common=dim)
        assert float(unpaired.intra1) > 1.01 * float(before.intra1)

    def test_identical_views_leave_nothing_on_the_diagonal(self, n, k):
        a, _, b, _ = embeddings(n, k)
        terms = losses.decur(a, a, b, b, dim_common=k // 2, lambd=0.0)
        assert float(terms.intra1) < 1e-10 and float(terms.intra2) < 1e-10
        assert float(losses.barlow_twins(a, 3 * a + 1, lambd=0.0)) < 1e-9

    def test_inputs_stay_as_they_are(self, n, k):
        z = [x.requires_grad_() for x in embeddings(n, k)]
        copies = [x.detach().clone() for x in z]
        losses.decur(*z, dim_common=k // 2).total.backward()
        assert all(torch.equal(x, copy) for x, copy in zip(z, copies, strict=True))


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e3, 1e-6])
@pytest.mark.parametrize(("n", "k"), [(8, 40), (300, 40)], ids=["N x N", "K x K"])
def test_a_constant_dimension_correlates_with_nothing(n, k, constant):
    z = embeddings(n, k)
    z[0][:, [1, k - 1]] = constant
    z = [x.requires_grad_() for x in z]
    c = losses.cross_correlation(z[0], z[2])
    assert (c[[1, k - 1]] == 0).all() and torch.isfinite(c).all()
    terms = losses.decur(*z, dim_common=k // 2)
    terms.total.backward()
    assert all(torch.isfinite(x.grad).all() for x in z)
    assert (z[0].grad[:, [1, k - 1]] == 0).all()
    exact = [x.detach().double() for x in z]
    exact[0][:, [1, k - 1]] = 0  # whatever the constant is, without its rounding
    for name, wanted in formula(*exact, dim_common=k // 2).items():
        assert getattr(terms, name).item() == pytest.approx(wanted.item(), rel=1e-5), name


def test_a_collapsed_network_has_a_finite_loss():
    z = [torch.full((16, 64), v).requires_grad_() for v in (0.1, 0.2, 0.3, 0.4)]
    terms = losses.decur(*z, dim_common=48)
    terms.total.backward()
    assert [t.item() for t in terms] == [48 + 64 + 64, 48, 0, 64, 64]
    assert all((x.grad == 0).all() for x in z)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [8, 40])
def test_a_non_finite_embedding_is_not_hidden(n, bad):
    z = embeddings(n, 20)
    z[0][2, 3] = bad
    assert torch.isnan(losses.decur(*z, dim_common=10).total)


@pytest.mark.parametrize(("mean", "tolerance"), [(1e1, 1e-5), (1e3, 1e-4)])
@pytest.mark.parametrize(("n", "k"), [(32, 512), (300, 64)], ids=["N x N", "K x K"])
def test_embeddings_far_from_zero(n, k, mean, tolerance):
    """float32 embeddings with standard deviation 1 around ``mean``: centring costs the gradient some digits."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(n, k, generator=g)
    z = [mean + (shared + torch.randn(n, k, generator=g)) / 2**0.5 for _ in range(4)]
    wanted, wanted_gradients = with_gradients(lambda *x: formula(*x, dim_common=k // 2), z, torch.float64)
    found, gradients = with_gradients(
        lambda *x: {t: getattr(losses.decur(*x, dim_common=k // 2), t) for t in TERMS}, z, torch.float32
    )
    for name in TERMS:
        assert float(found[name]) == pytest.approx(float(wanted[name]), rel=1e-6), name
    for g, w in zip(gradients, wanted_gradients, strict=True):
        assert_close(g, w, tolerance, "gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(32, 256), (256, 32)], ids=["N x N", "K x K"])
def test_half_precision_is_raised_to_float32(n, k, dtype):
    z = [x.to(dtype).requires_grad_() for x in embeddings(n, k)]
    raised = [x.detach().float().requires_grad_() for x in z]
    terms, wanted = losses.decur(*z, dim_common=k // 2), losses.decur(*raised, dim_common=k // 2)
    assert all(t.dtype == torch.float32 for t in terms) and tuple(terms) == tuple(wanted)
    terms.total.backward()
    wanted.total.backward()
    for x, y in zip(z, raised, strict=True):
        assert x.grad.dtype == dtype and torch.equal(x.grad, y.grad.to(dtype))


@pytest.mark.parametrize(("n", "k"), [(32, 256), (256, 32)], ids=["N x N", "K x K"])
def test_autocast_changes_nothing(n, k):
    z = [x.requires_grad_() for x in embeddings(n, k)]
    outside = losses.decur(*z, dim_common=k // 2)
    wanted = torch.autograd.grad(outside.total, z)
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses.decur(*z, dim_common=k // 2)
        assert tuple(inside) == tuple(outside)
        assert losses.barlow_twins(z[0], z[1]) == outside.intra1
    assert all(torch.equal(g, w) for g, w in zip(torch.autograd.grad(inside.total, z), wanted, strict=True))


def test_one_embedding_may_be_frozen():
    z = embeddings(8, 40)
    z[1].requires_grad_()
    losses.decur(*z, dim_common=20).total.backward()
    wanted = torch.autograd.grad(losses.barlow_twins(z[0], z[1]), z[1])[0]
    torch.testing.assert_close(z[1].grad, wanted)


def test_impossible_input_is_refused_with_what_was_found():
    a, b, c, d = embeddings(8, 40)
    with pytest.raises(ValueError, match=r"share one shape.*\(8, 40\), \(8, 40\), \(8, 39\), \(8, 40\)"):
        losses.decur(a, b, c[:, 1:], d, dim_common=3)
    with pytest.raises(ValueError, match=r"share one shape.*\(7, 40\)"):
        losses.barlow_twins(a, b[1:])
    with pytest.raises(ValueError, match=r"\(8, 40, 1\)"):
        losses.barlow_twins(a[..., None], b[..., None])
    with pytest.raises(ValueError, match="at least 2 samples; found N = 1"):
        losses.decur(*(z[:1] for z in (a, b, c, d)), dim_common=3)
    with pytest.raises(ValueError, match="at least 2 samples; found N = 1"):
        losses.barlow_twins(a[:1], b[:1])
    for dim in (-1, 41):
        with pytest.raises(ValueError, match=f"dim_common = {dim}, .*40 dimensions; allowed: 0 to 40"):
            losses.decur(a, b, c, d, dim_common=dim)


def test_cross_correlation_is_that_of_numpy():
    a, b = embeddings(30, 6, dtype=torch.float64)[:2]
    wanted = torch.from_numpy(np.corrcoef(a.T, b.T)[:6, 6:])
    torch.testing.assert_close(losses.cross_correlation(a, b), wanted, rtol=1e-10, atol=1e-12)


def test_overflowing_embeddings_are_not_taken_for_constant():
    z = [torch.randn(8, 40, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    assert not torch.isfinite(losses.decur(*(1e20 * x for x in z), dim_common=20).total)


def test_second_derivatives_are_refused():
    z = [torch.randn(4, 9, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    (first,) = torch.autograd.grad(losses.decur(*z, dim_common=5).total, z[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def vicreg_formula(z1, z2, eps=1e-4):
    """Bardes et al. 2021, Eq. 1-6, sample by sample and dimension by dimension, on the scale of the authors' code."""
    n, k = z1.shape
    invariance = sum((z1[b, j] - z2[b, j]) ** 2 for b in range(n) for j in range(k)) / (n * k)
    variance = covariance = 0.0
    for z in (z1, z2):
        centred = z - sum(z[b] for b in range(n)) / n
        c = [[sum(centred[b, i] * centred[b, j] for b in range(n)) / (n - 1) for j in range(k)] for i in range(k)]
        variance += sum(max(0.0, 1 - (c[j][j] + eps) ** 0.5) for j in range(k)) / k / 2
        covariance += sum(c[i][j] ** 2 for i in range(k) for j in range(k) if i != j) / k
    return {"invariance": 25 * invariance, "variance": 25 * variance, "covariance": covariance}


def cosine(a, b):
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def clip_formula(z1, z2, scale=50.0):
    """Radford et al. 2021, Figure 3: each sample's share of exp(scale * cosine) that its partner has, both ways."""
    n, terms = len(z1), []
    for anchors, others in ((z1, z2), (z2, z1)):
        similar = [[torch.exp(scale * cosine(a, b)) for b in others] for a in anchors]
        terms.append(sum(-torch.log(similar[i][i] / sum(similar[i])) for i in range(n)) / n / 2)
    return {"anchor1": terms[0], "anchor2": terms[1]}


def simclr_formula(z1, z2, temperature=0.1):
    """Chen et al. 2020, Eq. 1, and its mean over all 2N positive pairs (Algorithm 1)."""
    n, z = len(z1), [*z1, *z2]
    terms = [0.0, 0.0]
    for i in range(2 * n):
        j = i + n if i < n else i - n
        similar = {k: torch.exp(cosine(z[i], z[k]) / temperature) for k in range(2 * n) if k != i}
        terms[i // n] += -torch.log(similar[j] / sum(similar.values())) / (2 * n)
    return {"anchor1": terms[0], "anchor2": terms[1]}


OTHERS = {
    "vicreg": (losses.vicreg, vicreg_formula, {}),
    "clip": (losses.clip, clip_formula, {"scale": 50.0}),
    "clip, coldest": (losses.clip, clip_formula, {"scale": 100.0}),
    "simclr": (losses.simclr, simclr_formula, {"temperature": 0.1}),
    "simclr, cold": (losses.simclr, simclr_formula, {"temperature": 0.01}),
    "simclr, hot": (losses.simclr, simclr_formula, {"temperature": 1.0}),
}


def two(n, k, *, dtype=torch.float32, std=0.4):
    """Embeddings of two modalities with standard deviations on both sides of VICReg's hinge at 1.

    Partners are alike, but not more so than others: no contrastive loss is nearly zero.
    """
    z = embeddings(n, k, seed=n * k, dtype=torch.float64)
    return [(std * x).to(dtype) for x in (z[0], (z[2] + 1.5 * z[0].roll(1, 0)) / 2)]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("n", "k"), [(2, 3), (2, 9), (5, 11), (7, 4), (12, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_value_and_gradient_are_those_of_the_other_papers(name, n, k, dtype, tolerance):
    function, formula, options = OTHERS[name]
    z = two(n, k, dtype=dtype)
    wanted, wanted_gradients = with_gradients(lambda *x: formula(*x, **options), z, torch.float64)
    whole = []

    def ours(*x):
        whole.append(function(*x, **options))
        return {term: value for term, value in whole[0]._asdict().items() if term != "total"}

    found, gradients = with_gradients(ours, z, dtype)
    assert whole[0].total.dtype == dtype and found.keys() == wanted.keys()
    assert whole[0].total.item() == pytest.approx(sum(map(float, found.values())), rel=1e-6)
    size = sum(map(abs, map(float, wanted.values())))
    for term in wanted:  # in float32 a term that is nearly zero has fewer digits than the total
        assert found[term].item() == pytest.approx(wanted[term].item(), rel=tolerance, abs=tolerance * size / 10), term
    for i, (g, w) in enumerate(zip(gradients, wanted_gradients, strict=True)):
        assert_close(g, w, tolerance * (10 if "cold" in name else 1), f"gradient of embedding {i}")


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("n", "k"), [(256, 1024), (256, 64), (128, 256), (128, 257)])
def test_float32_is_close_to_float64_at_real_sizes(name, n, k):
    function, _, options = OTHERS[name]
    z = two(n, k)
    wanted, wanted_gradients = with_gradients(lambda *x: function(*x, **options)._asdict(), z, torch.float64)
    found, gradients = with_gradients(lambda *x: function(*x, **options)._asdict(), z, torch.float32)
    for term in wanted:
        assert float(found[term]) == pytest.approx(float(wanted[term]), rel=1e-4 if "cold" in name else 1e-5), term
    for g, w in zip(gradients, wanted_gradients, strict=True):
        assert_close(g, w, 1e-4, "gradient")


def test_vicreg_is_that_of_numpy_in_either_way_of_computing():
    for n, k in ((40, 30), (16, 32), (16, 33), (10, 50)):
        z = two(n, k, dtype=torch.float64)
        wanted = np.mean((z[0] - z[1]).numpy() ** 2) * 25
        for x in z:
            c = np.cov(x.numpy().T)
            wanted += 12.5 * np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4)).mean()
            wanted += (c**2)[~np.eye(k, dtype=bool)].sum() / k
        assert float(losses.vicreg(*z).total) == pytest.approx(wanted, rel=1e-12)


def test_vicreg_weighs_its_terms():
    z = two(6, 20, dtype=torch.float64)
    one = torch.stack(losses.vicreg(*z, weights=(1, 1, 1)))
    for weights, options in (((2, 3, 5), {"weights": (2, 3, 5)}), ((25, 25, 1), {})):
        torch.testing.assert_close(torch.stack(losses.vicreg(*z, **options))[1:], one[1:] * torch.tensor(weights))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("n", "k"), [(32, 256), (256, 32)])
def test_the_other_losses_in_half_precision_and_under_autocast(name, n, k):
    function, _, options = OTHERS[name]
    z = [x.bfloat16().requires_grad_() for x in two(n, k)]
    raised = [x.detach().float().requires_grad_() for x in z]
    with torch.autocast("cpu", torch.bfloat16):
        terms = function(*z, **options)
    wanted = function(*raised, **options)
    assert all(t.dtype == torch.float32 for t in terms) and tuple(terms) == tuple(wanted)
    terms.total.backward()
    wanted.total.backward()
    assert all(torch.equal(x.grad, y.grad.bfloat16()) for x, y in zip(z, raised, strict=True))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("constant", [0.0, -7.3, 1e3])
def test_the_other_losses_with_constant_dimensions_and_collapsed(name, constant):
    function, _, options = OTHERS[name]
    z = two(8, 40)
    z[0][:, [1, 39]] = constant
    for made in (z, [torch.full((8, 40), constant), torch.full((8, 40), 0.1)]):
        leaves = [x.clone().requires_grad_() for x in made]
        terms = function(*leaves, **options)
        terms.total.backward()
        exact = function(*(x.double() for x in made), **options)
        torch.testing.assert_close([t.double() for t in terms], list(exact), rtol=1e-4, atol=1e-6)
        assert all(torch.isfinite(x.grad).all() for x in leaves)


def test_a_collapsed_contrastive_network_guesses():
    z = torch.full((16, 64), 0.3), torch.full((16, 64), -0.2)
    assert float(losses.clip(*z, scale=14.0).total) == pytest.approx(math.log(16), rel=1e-6)
    same = torch.full((16, 64), 0.3)
    assert float(losses.simclr(same, same).total) == pytest.approx(math.log(31), rel=1e-6)


def test_an_embedding_of_zeros_has_no_direction_and_passes_no_gradient():
    z = two(8, 40)
    z[0][3] = 0
    leaves = [x.requires_grad_() for x in z]
    for terms in (losses.clip(*leaves, scale=100.0), losses.simclr(*leaves, temperature=0.01)):
        first, second = torch.autograd.grad(terms.total, leaves)
        assert (first[3] == 0).all() and torch.isfinite(first).all() and torch.isfinite(second).all()
        assert first.any() and second.any()


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("n", [8, 40])
def test_the_other_losses_do_not_hide_what_is_not_finite(name, bad, n):
    function, _, options = OTHERS[name]
    z = two(n, 20)
    z[1][2, 3] = bad
    assert not torch.isfinite(function(*z, **options).total)


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1e30])
def test_contrastive_losses_look_at_directions_alone(factor):
    z = two(9, 30)
    sizes = factor * (1 + torch.arange(9.0)[:, None])
    for name in ("clip", "simclr"):
        function, _, options = OTHERS[name]
        torch.testing.assert_close(function(z[0] * sizes, z[1], **options), function(*z, **options), rtol=1e-5, atol=0)


def test_contrastive_losses_treat_modalities_alike():
    z = two(9, 30, dtype=torch.float64)
    for name in ("clip", "simclr"):
        function, _, options = OTHERS[name]
        there, back = function(*z, **options), function(*z[::-1], **options)
        torch.testing.assert_close((there.anchor1, there.anchor2), (back.anchor2, back.anchor1), rtol=1e-12, atol=0)


def test_the_scale_of_clip_is_learnt():
    z = two(9, 30, dtype=torch.float64)
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: losses.clip(*z, scale=s).total, scale)


@pytest.mark.parametrize("name", OTHERS)
def test_impossible_input_of_the_other_losses_is_refused(name):
    function, _, options = OTHERS[name]
    a, b = two(8, 40)
    with pytest.raises(ValueError, match=r"share one shape.*\(8, 40\), \(7, 40\)"):
        function(a, b[1:], **options)
    with pytest.raises(ValueError, match="at least 2 samples; found N = 1"):
        function(a[:1], b[:1], **options)
