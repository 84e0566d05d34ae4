"""Looking into trained encoders: their embeddings, where they look, what they know.

``explain.embeddings``, the function, stays in its module, whose name it has.
"""

from decur_core.explain import split  # noqa: F401
from decur_core.explain.embeddings import (  # noqa: F401
    alignment,
    blocks,
    effective_rank,
    embed_members,
    neighbours,
    retrieval,
    tsne,
)
from decur_core.explain.saliency import (  # noqa: F401
    PARTS,
    CommonUnique,
    example_maps,
    gradcam,
    integrated_gradients,
    overlap,
    statistics,
    targets,
)
