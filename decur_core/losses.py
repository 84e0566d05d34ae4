"""The losses of all pretraining methods as pure functions of embeddings.

Shapes: N samples, K embedding dimensions. C is the cross-correlation matrix of two embeddings (Eq. 1), K x K.
Every loss takes embeddings in any float dtype and computes in float32 or better, outside autocast.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Terms(NamedTuple):
    """A loss with its named terms, each a scalar tensor that carries gradients; ``total`` is their sum (Eq. 6)."""

    total: Tensor
    common: Tensor  # Eq. 2: common dimensions, across modalities
    unique: Tensor  # Eq. 3: unique dimensions, across modalities
    intra1: Tensor  # Eq. 4: all dimensions, the two views of modality 1
    intra2: Tensor  # Eq. 5: all dimensions, the two views of modality 2


class VICRegTerms(NamedTuple):
    """The VICReg loss with its weighted terms (Bardes et al. 2021, Eq. 6); ``total`` is their sum."""

    total: Tensor
    invariance: Tensor  # both modalities embed a sample alike
    variance: Tensor  # every dimension varies over the batch
    covariance: Tensor  # no dimension repeats another


class ContrastiveTerms(NamedTuple):
    """A contrastive loss as the sum of what each modality's samples, as anchors, contribute."""

    total: Tensor
    anchor1: Tensor  # modality 1 looks for its partners
    anchor2: Tensor


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


def _precise(z: Tensor) -> Tensor:
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


def standardise(z_NK: Tensor) -> Tensor:
    """Each embedding dimension centred over the batch and scaled to norm 1, so that C = Z_a^T Z_b is Eq. 1.

    ``z_NK``: N x K, any float dtype; half precision is raised to float32. Returns N x K. Dimensions that are constant
    over the batch become 0: they correlate with nothing and pass no gradient.
    """
    return _Standardise.apply(_precise(z_NK))


def cross_correlation(z_a: Tensor, z_b: Tensor) -> Tensor:
    """The matrix C of Eq. 1 for two N x K embeddings: K x K, values in [-1, 1]. For looking at; the losses avoid it."""
    return standardise(z_a).T @ standardise(z_b)


def _check(*embeddings: Tensor) -> None:
    shapes = [tuple(z.shape) for z in embeddings]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"embeddings must share one shape (N, K); found {shapes}")
    if shapes[0][0] < 2:
        raise ValueError(f"a loss needs a batch of at least 2 samples; found N = {shapes[0][0]}")


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
    z1_b: Tensor | None,
    z2_a: Tensor,
    z2_b: Tensor | None,
    *,
    dim_common: int,
    lambd: float = 0.0051,
    squares: Callable[[Tensor, Tensor], Tensor] = squares,
) -> Terms:
    """The DeCUR loss (paper Eq. 2-6) of two modalities with two views each.

    ``z1_a, z1_b``: the two views of modality 1, ``z2_a, z2_b`` of modality 2; each N x K. The first ``dim_common`` of
    the K dimensions are common, the rest unique; 0 and K (no decoupling) are allowed. Cross-modal terms compare the
    first views, as Algorithm 1 does; without a second view (None) a modality's intra-modal term is 0. ``lambd`` weighs
    the off-diagonal entries of every term. ``squares`` forms the sums where 2N >= K; several processes, each with the
    embeddings of the global batch, pass ``distributed.squares``. Raises ``ValueError`` for unequal shapes, N < 2 or an
    impossible ``dim_common``.

    The sum over C's entries never needs C when N is small: ||A^T B||^2 = <A A^T, B B^T>. Each embedding's Gram matrix
    is formed once, that of the full embedding being the sum of its common and its unique part.
    """
    _check(*(z for z in (z1_a, z1_b, z2_a, z2_b) if z is not None))
    n, k = z1_a.shape
    if not 0 <= dim_common <= k:
        raise ValueError(f"dim_common = {dim_common}, but the embeddings have {k} dimensions; allowed: 0 to {k}")
    with torch.autocast(z1_a.device.type, enabled=False):
        a1, b1, a2, b2 = (None if z is None else standardise(z) for z in (z1_a, z1_b, z2_a, z2_b))
        sizes = (dim_common, k - dim_common)
        parts = list(zip(a1.split(sizes, 1), a2.split(sizes, 1), strict=True))
        grams = [tuple(map(_Gram.apply, part)) for part in parts] if 2 * n < k else []
        squares_common, squares_unique = [(g1 * g2).sum() for g1, g2 in grams] or [squares(*part) for part in parts]

        def intra(a: Tensor, b: Tensor | None, *grams: Tensor) -> Tensor:
            if b is None:
                return a.new_zeros(())
            total = (torch.add(*grams) * _Gram.apply(b)).sum() if grams else squares(a, b)
            return _invariance((a * b).sum(0), total, lambd)

        across = (a1 * a2).sum(0)
        on_common, on_unique = across[:dim_common], across[dim_common:].square().sum()
        common = _invariance(on_common, squares_common, lambd)
        unique = on_unique + lambd * (squares_unique - on_unique)
        intra1, intra2 = intra(a1, b1, *(g[0] for g in grams)), intra(a2, b2, *(g[1] for g in grams))
        return Terms(common + unique + intra1 + intra2, common, unique, intra1, intra2)


def vicreg(
    z1: Tensor,
    z2: Tensor,
    *,
    weights: tuple[float, float, float] = (25.0, 25.0, 1.0),
    eps: float = 1e-4,
    squares: Callable[[Tensor, Tensor], Tensor] = squares,
) -> VICRegTerms:
    """The VICReg loss (Bardes et al. 2021, Eq. 1-6) of two modalities, each N x K, not normalised.

    ``weights``: of invariance, variance and covariance; ``eps``: added to each variance. ``squares``: as in ``decur``.
    The weights belong to the scale of the authors' code, which is used here: the squared difference is averaged over
    dimensions, where Eq. 5 sums, and the variance term over the two embeddings, where Eq. 6 adds. zhu-xlab/DeCUR's
    vicreg.py means the same (it cannot run: it uses names it never imports), but divides the covariances of all
    processes' samples by the number of samples of one.
    """
    _check(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = _precise(z1), _precise(z2)
        n, k = z1.shape
        variance, covariance = z1.new_zeros(()), z1.new_zeros(())
        for z in (z1 - z1.mean(0), z2 - z2.mean(0)):
            energy = z.square().sum(0)  # n - 1 times the diagonal of the covariance matrix
            total = _Gram.apply(z).square().sum() if 2 * n < k else squares(z, z)
            variance = variance + F.relu(1 - (energy / (n - 1) + eps).sqrt()).mean() / 2
            covariance = covariance + (total - energy.square().sum()) / (k * (n - 1) ** 2)
        terms = [w * t for w, t in zip(weights, (F.mse_loss(z1, z2), variance, covariance), strict=True)]
        return VICRegTerms(sum(terms), *terms)


def _directions(z: Tensor) -> Tensor:
    """Each row scaled to norm 1; a row of zeros stays one and passes no gradient, one that overflows becomes NaN."""
    z = _precise(z)
    largest = z.detach().abs().amax(1, keepdim=True)
    return F.normalize(z / torch.where(largest == 0, torch.inf, largest), dim=1)


def clip(z1: Tensor, z2: Tensor, *, scale: Tensor | float) -> ContrastiveTerms:
    """The loss of CLIP (Radford et al. 2021, Figure 3) of two modalities, each N x K.

    Every sample looks for its partner among all samples of the other modality: the mean of two cross-entropies over
    cosines times ``scale``, the inverse temperature, which is learnt with the weights. zhu-xlab/DeCUR's clip.py (it
    cannot run) has the first of the two alone, a fixed scale of 1, and a projector of its own, 512-128 with a
    normalised output.
    """
    _check(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        logits, partner = scale * (_directions(z1) @ _directions(z2).T), torch.arange(len(z1), device=z1.device)
        anchor1, anchor2 = F.cross_entropy(logits, partner) / 2, F.cross_entropy(logits.T, partner) / 2
        return ContrastiveTerms(anchor1 + anchor2, anchor1, anchor2)


def simclr(z1: Tensor, z2: Tensor, *, temperature: float = 0.1) -> ContrastiveTerms:
    """NT-Xent (Chen et al. 2020, Eq. 1) with the two modalities as the two views; each N x K.

    Every one of the 2N samples looks for its partner among the 2N - 1 others, those of its own modality included:
    cross-entropy over cosines divided by ``temperature``. zhu-xlab/DeCUR's simclr.py (it cannot run) means the same
    with a temperature of 1 and the projector of its clip.py.
    """
    _check(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        n, z = len(z1), _directions(torch.cat([z1, z2]))
        others = ~torch.eye(2 * n, dtype=torch.bool, device=z.device)
        logits = (_Gram.apply(z) / temperature).where(others, -torch.inf)
        partner = torch.arange(2 * n, device=z.device).roll(n)
        anchor1, anchor2 = F.cross_entropy(logits, partner, reduction="none").view(2, n).sum(1) / (2 * n)
        return ContrastiveTerms(anchor1 + anchor2, anchor1, anchor2)


class Method(NamedTuple):
    """A pretraining method: its name for readers, how many views of a modality its loss looks at, and that loss.

    ``loss(z, settings, squares=…, scale=…)``: embeddings ``{modality: (first view, second or None)}`` of the global
    batch, each N x K, to named terms, of which ``total`` is minimised; None: nothing is trained. ``settings``: those of
    ``config.Settings`` that the loss needs. ``views(settings)``: 1 or 2. ``single``: trains one modality alone.
    ``scaled``: learns the scale that the loss is given.
    """

    title: str
    loss: Callable[..., dict[str, Tensor]] | None = None
    views: Callable[..., int] = lambda settings: 1
    single: bool = False
    scaled: bool = False


def _over_pairs(loss: Callable[..., tuple], z: dict[str, tuple]) -> dict[str, Tensor]:
    """Mean of a loss of two embeddings over all pairs of modalities, with its terms, named by the pair if several."""
    pairs, terms = list(itertools.combinations(z, 2)), {}
    for m, n in pairs:
        for name, value in loss(z[m][0], z[n][0])._asdict().items():
            name = name.replace("anchor1", f"anchor/{m}").replace("anchor2", f"anchor/{n}")
            terms[name] = terms.get(name, 0) + value / len(pairs)
    return terms


def _barlow_twins(z: dict[str, tuple], settings, *, squares: Callable, scale=None) -> dict[str, Tensor]:
    loss = functools.partial(barlow_twins, lambd=settings.lambd, squares=squares)
    pairs = [*itertools.combinations((first for first, _ in z.values()), 2)] or [*z.values()]
    return {"total": sum(loss(*pair) for pair in pairs) / len(pairs)}


def _decur(z: dict[str, tuple], settings, *, squares: Callable, scale=None) -> dict[str, Tensor]:
    options = {"lambd": settings.lambd, "squares": squares}
    if settings.blocks:
        found = decur_blocks(z, settings.blocks, **options)
        return {"total": found.total, **found.terms}
    (m, first), (n, second) = z.items()
    dim_common = settings.dim_common if settings.decoupling else first[0].shape[1]
    total, common, unique, intra1, intra2 = decur(*first, *second, dim_common=dim_common, **options)
    return {"total": total, "common": common, "unique": unique, f"intra/{m}": intra1, f"intra/{n}": intra2}


def _vicreg(z: dict[str, tuple], settings, *, squares: Callable, scale=None) -> dict[str, Tensor]:
    return _over_pairs(functools.partial(vicreg, weights=settings.vicreg_weights, squares=squares), z)


# In the order of the paper's tables.
METHODS: dict[str, Method] = {
    "random": Method("Random initialisation"),
    "supervised": Method("Supervised"),
    "simclr": Method(
        "SimCLR-cross",
        lambda z, settings, **_: _over_pairs(functools.partial(simclr, temperature=settings.temperature), z),
    ),
    "clip": Method(
        "CLIP",
        lambda z, _, *, scale, **__: _over_pairs(functools.partial(clip, scale=scale), z) | {"scale": scale},
        scaled=True,
    ),
    "barlow_twins": Method("Barlow Twins", _barlow_twins),
    "vicreg": Method("VICReg", _vicreg),
    "barlow_twins_single": Method("Barlow Twins, single modality", _barlow_twins, lambda settings: 2, single=True),
    "decur": Method("DeCUR", _decur, lambda settings: 1 + settings.intra),
}
