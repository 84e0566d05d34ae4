"""Correlations between the dimensions of embeddings, and sums over them that need no K x K matrix (torch alone).

Shapes: N samples, K embedding dimensions. C is the cross-correlation matrix of two embeddings (Eq. 1), K x K.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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


def precise(z: Tensor) -> Tensor:
    """Half precision raised to float32."""
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


def gram(z_NK: Tensor) -> Tensor:
    """Z Z^T, N x N: for standardised A and B, the squared entries of C add up to <A A^T, B B^T>."""
    return _Gram.apply(z_NK)


def standardise(z_NK: Tensor) -> Tensor:
    """Each embedding dimension centred over the batch and scaled to norm 1, so that C = Z_a^T Z_b is Eq. 1.

    ``z_NK``: N x K, any float dtype; half precision is raised to float32. Returns N x K. Dimensions that are constant
    over the batch become 0: they correlate with nothing and pass no gradient.
    """
    return _Standardise.apply(precise(z_NK))


def cross_correlation(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The matrix C of Eq. 1 for two N x K embeddings: K x K, values in [-1, 1]. For looking at; the losses avoid it."""
    return standardise(z_a).T @ standardise(z_b)


def squares(a_NK: Tensor, b_NK: Tensor) -> Tensor:
    """Sum of the squared entries of A^T B, formed K x K: the cheaper way when the batch is large (2N >= K)."""
    return (a_NK.T @ b_NK).square().sum()


def check(*embeddings: Tensor) -> None:
    """Refuse, with a ValueError, embeddings that differ in shape, or of fewer than two samples."""
    shapes = [tuple(z.shape) for z in embeddings]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"embeddings must share one shape (N, K); found {shapes}")
    if shapes[0][0] < 2:
        raise ValueError(f"a loss needs a batch of at least 2 samples; found N = {shapes[0][0]}")


def directions(z: Tensor) -> Tensor:
    """Each row scaled to norm 1; a row of zeros stays one and passes no gradient, one that overflows becomes NaN."""
    z = precise(z)
    largest = z.detach().abs().amax(1, keepdim=True)
    return F.normalize(z / torch.where(largest == 0, torch.inf, largest), dim=1)
