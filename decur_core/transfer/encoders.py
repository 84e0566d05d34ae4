"""What trained networks are given: the encoders of a finished run, and whole images or views from a store."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from decur_core import config, model
from decur_core.augment import Policy
from decur_core.data.batches import seeded
from decur_core.data.modality import GEOMETRY, Modality
from decur_core.data.store import Store
from decur_core.model import MultimodalModel
from decur_core.running import checkpoints


class OnEncoders(nn.Module):
    """What networks on pretrained encoders (of ``backbones.build``, by name of their modality) share. Frozen encoders
    get no gradients and stay in eval mode, so that their BatchNorm statistics keep still: only what is on top learns.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], *, frozen: bool):
        super().__init__()
        self.encoders, self.frozen = nn.ModuleDict(encoders), frozen
        self.encoders.requires_grad_(not frozen)
        self.train(self.training)  # which puts frozen encoders into eval mode from the start

    def train(self, mode: bool = True) -> "OnEncoders":
        super().train(mode)
        if self.frozen:
            self.encoders.eval()
        return self

    def encoding(self) -> torch.set_grad_enabled:
        """The context in which the encoders run."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen)


def plain(size: int) -> Policy:
    """The augmentation that changes nothing: whole images, or their central squares, resized to ``size`` px."""
    return Policy(size=size, crop_scale=(1, 1), crop_ratio=(1, 1), **GEOMETRY, p_hflip=0.0, p_vflip=0.0)


def load_pretrained(folder: Path | str) -> tuple[MultimodalModel, dict[str, Modality], dict]:
    """The model of a finished run, its modalities by name (8-bit mappings, without a policy) and its settings.

    The model is in eval mode. In the place of ``dim_common: auto`` the settings hold the split that the run found.
    FileNotFoundError: it is not finished; OSError: its weights are damaged; ConfigError: they are of an earlier
    version.
    """
    file = Path(folder) / "final.pt"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no finished pretraining; run the pretraining notebook of this profile first")
    state = checkpoints.load(file, "remove it and run the pretraining notebook of this profile again")
    modalities = {name: Modality.from_mapping(mapping) for name, mapping in state["preprocessing"].items()}
    network = model.build(state["settings"], {name: m.channels for name, m in modalities.items()})
    network.load_state_dict(state["model"])
    found = {k: v for k, v in (state.get("split") or {}).items() if k in ("dim_common", "blocks")}  # dim_common: auto
    return network.eval(), modalities, {**state["settings"], **found}


def given(modalities: Iterable[Modality], inputs: str) -> list[Modality]:
    """Those of the modalities that ``inputs`` names, in their order: ``both`` (all) or names joined by ``+``.

    Raises ConfigError for other names.
    """
    modalities, wanted = list(modalities), inputs.split("+")
    names = [m.name for m in modalities]
    if inputs == "both":
        return modalities
    if not set(wanted) <= set(names):
        raise config.ConfigError(f"inputs = {inputs!r}; allowed: both, {', '.join(names)}, or several joined by '+'")
    return [m for m in modalities if m.name in wanted]


def stored(store: Store, name: str, rows: Sequence[int], device="cpu", *, seasons: Sequence[int] = ()) -> Tensor:
    """Images of some of a store's items, of these seasons or else the first: uint8 N x C x H x W on ``device``."""
    pairs = zip(rows, seasons or [0] * len(rows), strict=True)
    return torch.stack([torch.from_numpy(store.read(i, name, season).copy()) for i, season in pairs]).to(device)


def alike(modalities: Iterable[Modality], images: Iterable[Tensor], policy: Policy, *, seed=()) -> list[Tensor]:
    """A view of every uint8 image, all modalities drawn alike, so that what belongs together is cropped and flipped as
    one: for each modality float N x C x size x size. ``seed``: parts of ``seeded``.
    """
    return [
        m.view(x, size=policy.size, policy=policy, generator=seeded(*seed))
        for m, x in zip(modalities, images, strict=True)
    ]


def images(store: Store, modalities: Collection[Modality], rows: Sequence[int], size: int, device="cpu") -> dict:
    """Of every modality, by name, float N x channels x size x size: whole images of the first season (``plain``).
    DataError: the store was converted with another preprocessing than theirs.
    """
    store.check({m.name: m.mapping() for m in modalities})
    return {m.name: alike([m], [stored(store, m.name, rows, device)], plain(size))[0] for m in modalities}
