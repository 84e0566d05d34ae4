"""Looking into trained encoders: their embeddings, where they look, what they know.

``explain.embeddings``, the function, stays in its module, whose name it has.
"""

from decur_core.explain import split  # noqa: F401
from decur_core.explain.embeddings import *  # noqa: F403
from decur_core.explain.saliency import *  # noqa: F403
