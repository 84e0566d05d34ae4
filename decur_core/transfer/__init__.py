"""What encoders are worth on labelled images."""

from decur_core.data.tasks import mean_average_precision  # noqa: F401
from decur_core.transfer.encoders import load_pretrained  # noqa: F401
from decur_core.transfer.evaluation import chance, evaluate, evaluate_members, example_predictions, subset  # noqa: F401
