"""What encoders are worth on labelled images."""

from decur_core.data.tasks import mean_average_precision
from decur_core.transfer.encoders import load_pretrained
from decur_core.transfer.evaluation import chance, evaluate, evaluate_members, example_predictions, subset

__all__ = [
    "chance",
    "evaluate",
    "evaluate_members",
    "example_predictions",
    "load_pretrained",
    "mean_average_precision",
    "subset",
]
