"""The losses of all pretraining methods as pure functions of embeddings.

Shapes: N samples, K embedding dimensions. C is the cross-correlation matrix of two embeddings (Eq. 1), K x K.
Every loss takes embeddings in any float dtype and computes in float32 or better, outside autocast.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from decur_core.correlation import check, directions, gram, precise, squares, standardise
from decur_core.correlation import cross_correlation as cross_correlation  # for looking at; part of the public names


class Terms(NamedTuple):
    """A loss with its named terms, each a scalar tensor that carries gradients; ``total`` is their sum (Eq. 6)."""

    total: Tensor
    common: Tensor  # Eq. 2: common dimensions, across modalities
    unique: Tensor  # Eq. 3: unique dimensions, across modalities
    intra1: Tensor  # Eq. 4: all dimensions, the two views of modality 1
    intra2: Tensor  # Eq. 5: all dimensions, the two views of modality 2


class BlockTerms(NamedTuple):
    """The loss of any number of modalities; ``total`` is the sum of the named ``terms``, scalars as in ``Terms``.

    ``intra/<m>``: the two views of m (Eq. 4, 5); ``common/<m>+<n>``: within the blocks that m and n share (Eq. 2);
    ``rest/<m>+<n>``: every other pair of a dimension of m and one of n. The last two contain the weight 1 / (M - 1).
    """

    total: Tensor
    terms: dict[str, Tensor]


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


def _invariance(on_diagonal: Tensor, sum_of_squares: Tensor, lambd: float) -> Tensor:
    """Diagonal to 1, the rest to 0 (Eq. 2, 4, 5), from the diagonal of C and the sum of all its squared entries."""
    return (1 - on_diagonal).square().sum() + lambd * (sum_of_squares - on_diagonal.square().sum())


def barlow_twins(z_a: Tensor, z_b: Tensor, *, lambd: float = 0.0051, squares: Callable = squares) -> Tensor:
    """The Barlow Twins loss (Zbontar et al. 2021, Eq. 1) of two N x K embeddings; a scalar.

    Cross-modal Barlow Twins passes the two modalities, single-modal the two views. ``lambd`` weighs the off-diagonal.
    ``squares``: as in ``decur``.
    """
    check(z_a, z_b)
    with torch.autocast(z_a.device.type, enabled=False):
        a, b = standardise(z_a), standardise(z_b)
        n, k = a.shape
        total = (gram(a) * gram(b)).sum() if 2 * n < k else squares(a, b)
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
    embeddings of the global batch, pass ``processes.squares``. Raises ``ValueError`` for unequal shapes, N < 2 or an
    impossible ``dim_common``.

    The sum over C's entries never needs C when N is small: ||A^T B||^2 = <A A^T, B B^T>. Each embedding's Gram matrix
    is formed once, that of the full embedding being the sum of its common and its unique part.
    """
    check(*(z for z in (z1_a, z1_b, z2_a, z2_b) if z is not None))
    n, k = z1_a.shape
    if not 0 <= dim_common <= k:
        raise ValueError(f"dim_common = {dim_common}, but the embeddings have {k} dimensions; allowed: 0 to {k}")
    with torch.autocast(z1_a.device.type, enabled=False):
        a1, b1, a2, b2 = (None if z is None else standardise(z) for z in (z1_a, z1_b, z2_a, z2_b))
        sizes = (dim_common, k - dim_common)
        parts = list(zip(a1.split(sizes, 1), a2.split(sizes, 1), strict=True))
        grams = [tuple(map(gram, part)) for part in parts] if 2 * n < k else []
        squares_common, squares_unique = [(g1 * g2).sum() for g1, g2 in grams] or [squares(*part) for part in parts]

        def intra(a: Tensor, b: Tensor | None, *grams: Tensor) -> Tensor:
            if b is None:
                return a.new_zeros(())
            total = (torch.add(*grams) * gram(b)).sum() if grams else squares(a, b)
            return _invariance((a * b).sum(0), total, lambd)

        across = (a1 * a2).sum(0)
        on_common, on_unique = across[:dim_common], across[dim_common:].square().sum()
        common = _invariance(on_common, squares_common, lambd)
        unique = on_unique + lambd * (squares_unique - on_unique)
        intra1, intra2 = intra(a1, b1, *(g[0] for g in grams)), intra(a2, b2, *(g[1] for g in grams))
        return Terms(common + unique + intra1 + intra2, common, unique, intra1, intra2)


def layout(blocks: Mapping[str, int], modalities: Iterable[str]) -> dict[str, dict[str, int]]:
    """Widths of the blocks of each modality, in the order of its columns: of those that name it (names joined by +)."""
    return {m: {block: k for block, k in blocks.items() if m in block.split("+")} for m in modalities}


def _checked(views: Mapping, blocks: Mapping[str, int], present: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """The ``layout``; ValueError for what does not fit together."""
    names, widths = list(views), layout(blocks, views)
    for block, width in blocks.items():
        members = block.split("+")
        if members != [m for m in names if m in members] or width < 0:
            form = f"some of {names}, in this order, joined by +, and a width of 0 or more"
            raise ValueError(f"block {block!r} of width {width}: expected {form}")
    shapes = {m: [None if z is None else tuple(z.shape) for z in pair] for m, pair in views.items()}
    n = max((shape[0] for pair in shapes.values() for shape in pair if shape), default=0)
    if len(names) < 2 or n < 2:
        raise ValueError(f"found N = {n} samples of the modalities {names}: expected 2 or more of each")
    for m, found in shapes.items():
        wanted = (n, sum(widths[m].values()))
        if found not in ([wanted, wanted], [wanted, None]):
            form = f"two of {wanted}, the second may be None: N = {n}, and the widths of its blocks are {widths[m]}"
            raise ValueError(f"views of {m!r} of shapes {found}: expected {form}")
    for m, mask in present.items():
        if m not in names or mask.dtype != torch.bool or mask.shape != (n,):
            form = f"torch.bool of shape {(n,)} for one of {names}"
            raise ValueError(f"present[{m!r}] is {mask.dtype} of shape {tuple(mask.shape)}: expected {form}")
    return widths


def decur_blocks(
    views: Mapping[str, tuple[Tensor, Tensor | None]],
    blocks: Mapping[str, int],
    *,
    lambd: float = 0.0051,
    squares: Callable[[Tensor, Tensor], Tensor] = squares,
    present: Mapping[str, Tensor] | None = None,
    minimum: int = 2,
) -> BlockTerms:
    """DeCUR for M >= 2 modalities, with a block of dimensions for every set of modalities that shares something.

    ``views``: of each modality m two views, N x K_m; None for the second drops the term between them. ``blocks``: the
    width of each set, its names joined by + in the order of ``views``. The columns of m are the blocks that name it, in
    the order of ``blocks``. The two views of one modality meet Eq. 4. In the first views of two modalities, the same
    coordinate of a block that both have is to be equal and everything else uncorrelated. For two modalities this is
    DeCUR, but for Eq. 3: that privileges an arbitrary diagonal and leaves out common beside unique dimensions.

    ``present``: N booleans for each modality that some samples lack; what stands in their rows does not matter. A term
    is over the samples that have what it compares, and 0 without gradient if they are fewer than ``minimum`` (or 2).
    ``lambd``, ``squares``: as in ``decur``; several processes gather the embeddings and ``present``. Raises
    ``ValueError`` for names, widths, shapes or masks that do not fit together.
    """
    present = present or {}
    widths = _checked(views, blocks, present)
    first = precise(next(iter(views.values()))[0])
    zero = first.new_zeros(())

    @cache
    def rows(masks: tuple[str, ...]) -> Tensor:
        return torch.stack([present[m] for m in masks]).all(0).nonzero()[:, 0]

    @cache
    def columns(m: str, view: int, masks: tuple[str, ...]) -> dict[str, Tensor]:
        z = standardise(views[m][view][rows(masks)] if masks else views[m][view])
        return dict(zip(widths[m], z.split(list(widths[m].values()), 1), strict=True))

    @cache
    def grams(m: str, view: int, masks: tuple[str, ...]) -> dict[str, Tensor]:
        return {block: gram(z) for block, z in columns(m, view, masks).items()}

    def compare(m: str, o: str, view: int) -> tuple[Tensor, Tensor]:
        """The first view of m with a view of o: the cost within the blocks that they share, and that of the rest."""
        masks = tuple(name for name in present if name in (m, o))
        n = len(rows(masks)) if masks else len(first)
        if n < max(minimum, 2):
            return zero, zero
        shared = [block for block in widths[m] if block in widths[o]]
        a, b = columns(m, 0, masks), columns(o, view, masks)
        on = torch.cat([zero.expand(0), *((a[block] * b[block]).sum(0) for block in shared)])
        k_a, k_b = (sum(widths[name].values()) for name in (m, o))
        if n * (k_a + k_b) < k_a * k_b:  # the squares of several blocks are the product of sums of Gram matrices
            a, b, join, multiply = grams(m, 0, masks), grams(o, view, masks), sum, lambda g, h: (g * h).sum()
        else:
            join, multiply = lambda parts: torch.cat(parts, 1), squares

        def part(side: dict[str, Tensor], inside: bool) -> Tensor | None:
            pieces = [piece for block, piece in side.items() if (block in shared) == inside]
            return join(pieces) if pieces else None

        def cost(x: Tensor | None, y: Tensor | None) -> Tensor:
            return zero if x is None or y is None else multiply(x, y)

        (a_in, a_out), (b_in, b_out) = ((part(side, True), part(side, False)) for side in (a, b))
        rest = cost(a_in, b_out) + cost(a_out, b_in) + cost(a_out, b_out)
        return _invariance(on, cost(a_in, b_in), lambd), lambd * rest

    with torch.autocast(first.device.type, enabled=False):
        terms = {f"intra/{m}": zero if b is None else compare(m, m, 1)[0] for m, (_, b) in views.items()}
        for m, o in combinations(views, 2):
            common, rest = compare(m, o, 0)
            terms |= {f"common/{m}+{o}": common / (len(views) - 1), f"rest/{m}+{o}": rest / (len(views) - 1)}
        return BlockTerms(sum(terms.values()), terms)


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
    check(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = precise(z1), precise(z2)
        n, k = z1.shape
        variance, covariance = z1.new_zeros(()), z1.new_zeros(())
        for z in (z1 - z1.mean(0), z2 - z2.mean(0)):
            energy = z.square().sum(0)  # n - 1 times the diagonal of the covariance matrix
            total = gram(z).square().sum() if 2 * n < k else squares(z, z)
            variance = variance + F.relu(1 - (energy / (n - 1) + eps).sqrt()).mean() / 2
            covariance = covariance + (total - energy.square().sum()) / (k * (n - 1) ** 2)
        terms = [w * t for w, t in zip(weights, (F.mse_loss(z1, z2), variance, covariance), strict=True)]
        return VICRegTerms(sum(terms), *terms)


def clip(z1: Tensor, z2: Tensor, *, scale: Tensor | float) -> ContrastiveTerms:
    """The loss of CLIP (Radford et al. 2021, Figure 3) of two modalities, each N x K.

    Every sample looks for its partner among all samples of the other modality: the mean of two cross-entropies over
    cosines times ``scale``, the inverse temperature, which is learnt with the weights. zhu-xlab/DeCUR's clip.py (it
    cannot run) has the first of the two alone, a fixed scale of 1, and a projector of its own, 512-128 with a
    normalised output.
    """
    check(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        logits, partner = scale * (directions(z1) @ directions(z2).T), torch.arange(len(z1), device=z1.device)
        anchor1, anchor2 = F.cross_entropy(logits, partner) / 2, F.cross_entropy(logits.T, partner) / 2
        return ContrastiveTerms(anchor1 + anchor2, anchor1, anchor2)


def simclr(z1: Tensor, z2: Tensor, *, temperature: float = 0.1) -> ContrastiveTerms:
    """NT-Xent (Chen et al. 2020, Eq. 1) with the two modalities as the two views; each N x K.

    Every one of the 2N samples looks for its partner among the 2N - 1 others, those of its own modality included:
    cross-entropy over cosines divided by ``temperature``. zhu-xlab/DeCUR's simclr.py (it cannot run) means the same
    with a temperature of 1 and the projector of its clip.py.
    """
    check(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        n, z = len(z1), directions(torch.cat([z1, z2]))
        others = ~torch.eye(2 * n, dtype=torch.bool, device=z.device)
        logits = (gram(z) / temperature).where(others, -torch.inf)
        partner = torch.arange(2 * n, device=z.device).roll(n)
        anchor1, anchor2 = F.cross_entropy(logits, partner, reduction="none").view(2, n).sum(1) / (2 * n)
        return ContrastiveTerms(anchor1 + anchor2, anchor1, anchor2)


class Method(NamedTuple):
    """A pretraining method: its name for readers, its loss, and how many views of a modality that looks at (1 or 2).

    ``loss(z, settings, squares=…, scale=…)``: embeddings ``{modality: (first view, second or None)}`` of the global
    batch, each N x K, to named terms, of which ``total`` is minimised; None: nothing is trained. ``settings``: those of
    ``config.Settings`` that the loss needs. ``single``: trains one modality alone. ``scaled``: learns ``scale``.
    """

    title: str
    loss: Callable[..., dict[str, Tensor]] | None = None
    views: Callable[..., int] = lambda settings: 1
    single: bool = False
    scaled: bool = False


def _pairwise(make: Callable[..., Callable[[Tensor, Tensor], tuple]]) -> Callable[..., dict[str, Tensor]]:
    """The mean over all pairs of modalities of the loss of two embeddings that ``make`` gives."""

    def loss(z: dict[str, tuple], settings, *, scale: Tensor | None = None, **options) -> dict[str, Tensor]:
        of_two, pairs = make(settings, scale=scale, **options), list(combinations(z, 2))
        terms: dict[str, Tensor] = {}
        for m, n in pairs:
            for name, value in of_two(z[m][0], z[n][0])._asdict().items():
                name = name.replace("anchor1", f"anchor/{m}").replace("anchor2", f"anchor/{n}")
                terms[name] = terms.get(name, 0) + value / len(pairs)
        return terms if scale is None else terms | {"scale": scale}

    return loss


def _barlow_twins(z: dict[str, tuple], settings, *, squares: Callable, **_) -> dict[str, Tensor]:
    pairs = [*combinations((first for first, _ in z.values()), 2)] or [*z.values()]  # of one modality its two views
    return {"total": sum(barlow_twins(*two, lambd=settings.lambd, squares=squares) for two in pairs) / len(pairs)}


def _decur(z: dict[str, tuple], settings, *, squares: Callable, **_) -> dict[str, Tensor]:
    options = {"lambd": settings.lambd, "squares": squares}
    if settings.dim_common == "auto" and not settings.blocks:  # not known yet: the intra-modal terms alone
        terms = {f"intra/{m}": barlow_twins(*both, **options) for m, both in z.items()}
        return {"total": sum(terms.values()), **terms}
    if settings.blocks:
        total, terms = decur_blocks(z, settings.blocks, **options)
        return {"total": total, **terms}
    (m, first), (n, second) = z.items()
    dim_common = settings.dim_common if settings.decoupling else first[0].shape[1]
    total, common, unique, intra1, intra2 = decur(*first, *second, dim_common=dim_common, **options)
    return {"total": total, "common": common, "unique": unique, f"intra/{m}": intra1, f"intra/{n}": intra2}


# In the order of the paper's tables.
METHODS: dict[str, Method] = {
    "random": Method("Random initialisation"),
    "supervised": Method("Supervised"),
    "simclr": Method("SimCLR-cross", _pairwise(lambda s, **_: partial(simclr, temperature=s.temperature))),
    "clip": Method("CLIP", _pairwise(lambda s, scale, **_: partial(clip, scale=scale)), scaled=True),
    "barlow_twins": Method("Barlow Twins", _barlow_twins),
    "vicreg": Method(
        "VICReg", _pairwise(lambda s, squares, **_: partial(vicreg, weights=s.vicreg_weights, squares=squares))
    ),
    "barlow_twins_single": Method("Barlow Twins, single modality", _barlow_twins, lambda settings: 2, single=True),
    "decur": Method("DeCUR", _decur, lambda settings: 1 + settings.intra),
}
