"""Looking into trained encoders: their embeddings, where they look, what they know.

``explain.embeddings``, the function, stays in its module, whose name it has.
"""

from decur_core.explain import split
from decur_core.explain.embeddings import alignment, blocks, effective_rank, embed_members, neighbours, retrieval, tsne
from decur_core.explain.saliency import (
    PARTS,
    CommonUnique,
    example_maps,
    gradcam,
    integrated_gradients,
    overlap,
    statistics,
    targets,
)

__all__ = [
    "PARTS",
    "CommonUnique",
    "alignment",
    "blocks",
    "effective_rank",
    "embed_members",
    "example_maps",
    "gradcam",
    "integrated_gradients",
    "neighbours",
    "overlap",
    "retrieval",
    "split",
    "statistics",
    "targets",
    "tsne",
]
