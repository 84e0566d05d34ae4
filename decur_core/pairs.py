"""The modality pairs as data: what each modality measures, how it is brought to 8 bit, how its views are made."""

from dataclasses import dataclass

from .augment import OPTICAL as OPTICAL_VIEWS
from .augment import SAR as SAR_VIEWS
from .augment import Policy
from .preprocess import OPTICAL, SAR, Preprocessing


@dataclass(frozen=True)
class Modality:
    """One sensor: its name in a sample, its preprocessing (bands, units, statistics) and its augmentations."""

    name: str
    preprocessing: Preprocessing
    views: Policy

    @property
    def channels(self) -> int:
        return len(self.preprocessing.bands)


PAIRS: dict[str, tuple[Modality, Modality]] = {
    "sar_optical": (Modality("sar", SAR, SAR_VIEWS), Modality("optical", OPTICAL, OPTICAL_VIEWS)),
}
