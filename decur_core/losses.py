"""The DeCUR loss and the Barlow Twins loss as pure functions of embeddings.

Shapes: N samples, K embedding dimensions. C is the cross-correlation matrix of two embeddings (Eq. 1), K x K.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Terms(NamedTuple):
    """A loss with its named terms, each a scalar tensor that carries gradients; ``total`` is their sum (Eq. 6)."""

    total: Tensor
    common: Tensor  # Eq. 2: common dimensions, across modalities
    unique: Tensor  # Eq. 3: unique dimensions, across modalities
    intra1: Tensor  # Eq. 4: all dimensions, the two views of modality 1
    intra2: Tensor  # Eq. 5: all dimensions, the two views of modality 2


class _Gram(torch.autograd.Function):
    """Z Z^T. The backward pass uses the symmetry that autograd does not know of: one product instead of two."""

    @staticmethod
    def forward(ctx, z_NK: Tensor) -> Tensor:
        ctx.save_for_backward(z_NK)
        return z_NK @ z_NK.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NN: Tensor) -> Tensor:
        (z_NK,) = ctx.saved_tensors
        return (grad_NN + grad_NN.T) @ z_NK


class _Standardise(torch.autograd.Function):
    """Columns to mean 0 and norm 1, keeping one matrix for the backward pass where autograd would keep four."""

    @staticmethod
    def forward(ctx, z_NK: Tensor) -> Tensor:
        centred = z_NK - z_NK.mean(0)
        norm = centred.square().sum(0).sqrt()  # many times faster than vector_norm along this dimension
        # A constant dimension leaves only rounding noise: correlation 0 and no gradient, not noise blown up to norm 1.
        noise = 8 * torch.finfo(z_NK.dtype).eps * len(z_NK) ** 0.5 * z_NK.abs().amax(0)
        # An overflowing one has to end in a loss that is not a number, not pass for a constant: 1/inf would be 0.
        scale = torch.where(norm > noise, torch.where(norm.isinf(), torch.nan, norm.reciprocal()), 0.0)
        unit = centred.mul_(scale)
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NK: Tensor) -> Tensor:
        unit, scale = ctx.saved_tensors
        # (grad - mean(grad) - unit * <grad, unit>) * scale, in one buffer
        out = grad_NK * unit
        torch.mul(unit, out.sum(0), out=out)
        return out.add_(grad_NK.mean(0)).neg_().add_(grad_NK).mul_(scale)


def standardise(z_NK: Tensor) -> Tensor:
    """Each embedding dimension centred over the batch and scaled to norm 1, so that C = Z_a^T Z_b is Eq. 1.

    ``z_NK``: N x K, any float dtype; half precision is raised to float32. Returns N x K. Dimensions that are constant
    over the batch become 0: they correlate with nothing and pass no gradient.
    """
    return _Standardise.apply(z_NK if z_NK.dtype in (torch.float32, torch.float64) else z_NK.float())


def cross_correlation(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The matrix C of Eq. 1 for two N x K embeddings: K x K, values in [-1, 1]. For looking at; the losses avoid it."""
    return standardise(z_a).T @ standardise(z_b)


def _check(*embeddings: Tensor) -> None:
    shapes = [tuple(z.shape) for z in embeddings]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"embeddings must share one shape (N, K); found {shapes}")
    if shapes[0][0] < 2:
        raise ValueError(f"correlations need a batch of at least 2 samples; found N = {shapes[0][0]}")


def _invariance(on_diagonal: Tensor, sum_of_squares: Tensor, lambd: float) -> Tensor:
    """Diagonal to 1, the rest to 0 (Eq. 2, 4, 5), from the diagonal of C and the sum of all its squared entries."""
    return (1 - on_diagonal).square().sum() + lambd * (sum_of_squares - on_diagonal.square().sum())


def squares(a_NK: Tensor, b_NK: Tensor) -> Tensor:
    """Sum of the squared entries of A^T B, formed K x K: the cheaper way when the batch is large (2N >= K)."""
    return (a_NK.T @ b_NK).square().sum()


def barlow_twins(z_a: Tensor, z_b: Tensor, *, lambd: float = 0.0051, squares: Callable = squares) -> Tensor:
    """The Barlow Twins loss (Zbontar et al. 2021, Eq. 1) of two N x K embeddings; a scalar.

    Cross-modal Barlow Twins passes the two modalities, single-modal the two views. ``lambd`` weighs the off-diagonal.
    ``squares``: as in ``decur``.
    """
    _check(z_a, z_b)
    with torch.autocast(z_a.device.type, enabled=False):
        a, b = standardise(z_a), standardise(z_b)
        n, k = a.shape
        total = (_Gram.apply(a) * _Gram.apply(b)).sum() if 2 * n < k else squares(a, b)
        return _invariance((a * b).sum(0), total, lambd)


def decur(
    z1_a: Tensor,
    z1_b: Tensor,
    z2_a: Tensor,
    z2_b: Tensor,
    *,
    dim_common: int,
    lambd: float = 0.0051,
    squares: Callable[[Tensor, Tensor], Tensor] = squares,
) -> Terms:
    """The DeCUR loss (paper Eq. 2-6) of two modalities with two views each.

    ``z1_a, z1_b``: the two views of modality 1, ``z2_a, z2_b`` of modality 2; each N x K in any float dtype (the loss
    computes in float32 or better, outside autocast). The first ``dim_common`` of the K dimensions are common, the rest
    unique; 0 and K are allowed. ``lambd`` weighs the off-diagonal entries of every term. Cross-modal terms compare the
    first views, as Algorithm 1 does. ``squares`` forms the sums where 2N >= K; several processes, each with the
    embeddings of the global batch, pass ``distributed.squares``. Raises ``ValueError`` for unequal shapes, N < 2 or an
    impossible ``dim_common``.

    The sum over C's entries never needs C when N is small: ||A^T B||^2 = <A A^T, B B^T>. Each embedding's Gram matrix
    is formed once, that of the full embedding being the sum of its common and its unique part.
    """
    _check(z1_a, z1_b, z2_a, z2_b)
    n, k = z1_a.shape
    if not 0 <= dim_common <= k:
        raise ValueError(f"dim_common = {dim_common}, but the embeddings have {k} dimensions; allowed: 0 to {k}")
    with torch.autocast(z1_a.device.type, enabled=False):
        a1, b1, a2, b2 = (standardise(z) for z in (z1_a, z1_b, z2_a, z2_b))
        sizes = (dim_common, k - dim_common)
        parts = list(zip(a1.split(sizes, 1), a2.split(sizes, 1), strict=True))
        if 2 * n < k:
            (common1, common2), (unique1, unique2) = [(_Gram.apply(p1), _Gram.apply(p2)) for p1, p2 in parts]
            squares_common, squares_unique = (common1 * common2).sum(), (unique1 * unique2).sum()
            squares1 = ((common1 + unique1) * _Gram.apply(b1)).sum()
            squares2 = ((common2 + unique2) * _Gram.apply(b2)).sum()
        else:
            squares_common, squares_unique = (squares(p1, p2) for p1, p2 in parts)
            squares1, squares2 = squares(a1, b1), squares(a2, b2)

        across = (a1 * a2).sum(0)
        on_common, on_unique = across[:dim_common], across[dim_common:].square().sum()
        common = _invariance(on_common, squares_common, lambd)
        unique = on_unique + lambd * (squares_unique - on_unique)
        intra1 = _invariance((a1 * b1).sum(0), squares1, lambd)
        intra2 = _invariance((a2 * b2).sum(0), squares2, lambd)
        return Terms(common + unique + intra1 + intra2, common, unique, intra1, intra2)
