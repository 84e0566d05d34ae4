"""What trained networks are given: the encoders of a finished run, and whole images or views from a store."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from decur_core import model, pretrain
from decur_core.augment import Policy
from decur_core.data.modality import GEOMETRY, PAIRS, Modality, Preprocessing
from decur_core.data.store import Store
from decur_core.model import MultimodalModel
from decur_core.running import checkpoints


def plain(size: int) -> Policy:
    """The augmentation that changes nothing: whole images, or their central squares, resized to ``size`` px."""
    return Policy(size=size, crop_scale=(1, 1), crop_ratio=(1, 1), **GEOMETRY, p_hflip=0.0, p_vflip=0.0)


def load_pretrained(folder: Path) -> tuple[MultimodalModel, dict[str, Preprocessing], dict]:
    """The model, the preprocessing of each modality and the settings of a finished pretraining run."""
    file = Path(folder) / "final.pt"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no finished pretraining; run the pretraining notebook of this profile first")
    state = checkpoints.load(file, "remove it and run the pretraining notebook of this profile again")
    preprocessing = {name: Preprocessing.from_dict(d) for name, d in state["preprocessing"].items()}
    settings = state["settings"]
    network = model.build(settings, [p.copies * len(p.bands) for p in preprocessing.values()])
    network.load_state_dict(state["model"])
    return network, preprocessing, settings


def given(pair: str, inputs: str) -> dict[int, Modality]:
    """The modalities that ``inputs`` names, ``both`` or one of them: branch of the model (1, 2) to modality."""
    return {k: m for k, m in enumerate(PAIRS[pair], start=1) if inputs in ("both", m.name)}


def stored(store: Store, name: str, rows: Sequence[int], device="cpu", *, seasons: Sequence[int] = ()) -> Tensor:
    """Images of some of a store's items, of these seasons or else the first: uint8 N x C x H x W on ``device``."""
    pairs = zip(rows, seasons or [0] * len(rows), strict=True)
    return torch.stack([torch.from_numpy(store.read(i, name, season).copy()) for i, season in pairs]).to(device)


def views(
    store: Store, modalities: Iterable[Modality], rows: Sequence[int], policy: Policy, *, seed=(), device="cpu"
) -> list[Tensor]:
    """Views of some of a store's images, first season: for each modality float N x C x size x size on ``device``.

    All modalities are drawn alike (``seed``: parts of ``pretrain.seeded``), so a pair is cropped and flipped as one.
    """
    return [
        m.view(stored(store, m.name, rows, device), size=policy.size, policy=policy, generator=pretrain.seeded(*seed))
        for m in modalities
    ]
