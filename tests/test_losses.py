"""The losses against Eq. 1-6 written out in float64, and against what the equations imply."""

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
