"""What encoders are worth on labelled images."""

from decur_core.transfer.encoders import load_pretrained
from decur_core.transfer.evaluation import chance, evaluate, evaluate_members, example_predictions

__all__ = [
    "chance",
    "evaluate",
    "evaluate_members",
    "example_predictions",
    "load_pretrained",
]
