"""Two backbones and two projectors, one of each per modality."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from decur_core import backbones
from decur_core.losses import METHODS, layout
from decur_core.running.checkpoints import read_weights


def mlp(features: int, widths: Sequence[int]) -> nn.Sequential:
    """Linear-BatchNorm-ReLU for every width but the last, then Linear (paper, appendix B: three layers).

    The linear layers carry no bias: the normalisation that follows each (in the loss, for the last) removes it.
    Without widths it hands the features through.
    """
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, *(nn.Linear(features, width, bias=False) for width in widths[-1:]))


class MultimodalModel(nn.Module):
    """One backbone and one projector per modality; no weight is shared (paper, section 4).

    ``backbone``: a name of ``backbones.BACKBONES``; ``in_channels``: modality to channels of its images, e.g. ``{"sar":
    2, "optical": 13}``; ``projector``: output widths of the projector's layers, e.g. (8192, 8192, 8192), or none: then
    embeddings are features. ``dimensions``: modality to width of its embedding, where it is not the last of
    ``projector``. ``shared_projector``: all modalities take the same, as in the published code; ``scaled``: with the
    scale that the CLIP loss learns. Attributes, by name of the modality: ``backbones``, ``projectors`` and
    ``dimensions``, the widths of embeddings; ``features`` is the width of a backbone's output.
    """

    def __init__(
        self,
        backbone: str,
        in_channels: Mapping[str, int],
        projector: Sequence[int],
        *,
        dimensions: Mapping[str, int] | None = None,
        shared_projector: bool = False,
        scaled: bool = False,
    ):
        super().__init__()
        if not isinstance(in_channels, Mapping) or len(in_channels) < 2:
            raise ValueError(f"in_channels = {in_channels}; a number for each of two or more modalities is needed")
        if min(projector, default=1) < 1:
            raise ValueError(f"projector = {tuple(projector)}; each width must be 1 or more")
        made = {name: backbones.build(backbone, channels) for name, channels in in_channels.items()}
        self.backbones = nn.ModuleDict({name: network for name, (network, _) in made.items()})
        self.features = next(features for _, features in made.values())
        self.projectors, self.dimensions = nn.ModuleDict(), {}
        for name in in_channels:
            widths = [*projector[:-1], (dimensions or {}).get(name, projector[-1])] if projector else []
            shared = next(iter(self.projectors.values())) if shared_projector and self.projectors else None
            self.projectors[name] = shared or mlp(self.features, widths)
            self.dimensions[name] = [self.features, *widths][-1]
        if scaled:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(0.07)))

    def forward(self, views: Mapping[str, Sequence[Tensor | None]]) -> dict[str, tuple[Tensor | None, ...]]:
        """Views of each modality, float images N x C x H x W in [0, 1], to their embeddings N x K, likewise.

        Every batch of views passes on its own, so that BatchNorm sees one view at a time, as in Algorithm 1. For a view
        that is None it gives None.
        """
        return {
            name: tuple(None if each is None else self.embed(name, each) for each in several)
            for name, several in views.items()
        }

    def embed(self, modality: str, views: Tensor) -> Tensor:
        """One batch of views of a modality to its N x K embedding."""
        return self.projectors[modality](self.backbones[modality](views))

    def scale(self) -> Tensor:
        """The inverse temperature of the CLIP loss: from 1 / 0.07 on it is learnt, up to 100 (Radford et al. 2021)."""
        with torch.no_grad():  # kept on the parameter, since beyond the limit it would get no gradient and never return
            self.log_scale.clamp_(max=math.log(100))
        return self.log_scale.exp()


def build(settings: Mapping, in_channels: Mapping[str, int]) -> MultimodalModel:
    """The randomly initialised model of a run, whose settings are as in ``config.identity`` and ``final.pt``."""
    blocks = settings.get("blocks") or {}
    widths = {m: sum(own.values()) for m, own in layout(blocks, in_channels).items() if blocks}
    options = {"shared_projector": settings.get("shared_projector", False), "dimensions": widths}
    options["scaled"] = METHODS[settings["method"]].scaled
    return MultimodalModel(settings["backbone"], in_channels, settings["projector"], **options)


def backbone_state(state: dict[str, Tensor], modality: str) -> dict[str, Tensor]:
    """The weights of one backbone from a model's state dict, under the keys of the plain network.

    For a ResNet they load, strictly, into ``torchvision.models.resnet50()`` whose ``fc`` is ``torch.nn.Identity()``
    and whose ``conv1`` has the modality's number of channels.
    """
    prefix = f"backbones.{modality}."
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not found:
        known = dict.fromkeys(k.split(".")[1] for k in state if k.startswith("backbones."))
        raise KeyError(f"no key starts with {prefix!r}; modalities here: {', '.join(known) or 'none'}")
    return found


# A key that only this backbone's state dict has, the one that tells its depth.
_SIGNS = {
    "mit_b5": "block3.39.norm1.weight",
    "mit_b2": "block3.5.norm1.weight",
    "resnet50": "layer3.5.conv3.weight",
    "resnet18": "layer1.1.conv2.weight",
}


def _fold_heads(state: dict[str, Tensor]) -> None:
    """Make a linear head of the backbones part of the first layer of the projectors; the norm there takes its bias."""
    for m in [k.split(".")[1] for k in state if k.endswith(".head.weight")]:
        first, mean = state[f"projectors.{m}.0.weight"], state[f"projectors.{m}.1.running_mean"]
        state[f"projectors.{m}.1.running_mean"] = mean - first @ state.pop(f"backbones.{m}.head.bias")
        state[f"projectors.{m}.0.weight"] = first @ state.pop(f"backbones.{m}.head.weight")


def load_published(
    path: Path | str, *, modalities: Sequence[str] = ("first", "second"), drop_attention: bool = False
) -> MultimodalModel:
    """The model of a checkpoint that zhu-xlab/DeCUR published ("full checkpoint"), in eval mode.

    ``modalities``: what the two are to be called, e.g. ("sar", "optical"); the file does not say. Backbone, channels
    and projector widths follow from the shapes. Backbones: ``resnet18``, ``resnet50``, ``mit_b2``, ``mit_b5``; the
    linear head of the latter two becomes part of the projector's first layer, which gives the same embeddings in eval
    mode. The normalisation before their loss is left out, as ours is in the loss. Their networks with deformable
    attention (``rda``) have layers that ours lack and are refused, unless ``drop_attention`` takes the rest as a start
    for training: its features are not theirs.

    Raises ``ValueError`` naming what does not fit by key and shape, and for files that only unpickling could open.
    """
    content = read_weights(path)
    state = next((content[k] for k in ("model", "state_dict") if isinstance(content.get(k), dict)), content)
    state = {k.removeprefix("module."): v for k, v in state.items() if torch.is_tensor(v)}
    keys = ", ".join([*state][:3]) or "no tensors"
    names = dict(zip("12", modalities, strict=True))
    theirs = re.compile(r"(backbone|projector)_?([12])\.")
    state = {theirs.sub(lambda m: f"{m[1]}s.{names[m[2]]}.", k, count=1): v for k, v in state.items()}
    attention = {k for k in state if k.startswith(("da1_", "da2_"))}
    if attention and not drop_attention:
        found = f"{len(attention)} weights of deformable attention ({min(attention)}, ...)"
        raise ValueError(f"{path}: {found} have no place")
    state = {k: v for k, v in state.items() if k not in attention and not k.startswith("bn.")}
    name = next((name for name, sign in _SIGNS.items() if f"backbones.{modalities[0]}.{sign}" in state), None)
    if name is None:
        raise ValueError(f"{path}: expected the keys backbone_1.* of {', '.join(_SIGNS)}; found {keys}")
    try:
        _fold_heads(state)
        first = "conv1.weight" if name.startswith("resnet") else "patch_embed1.proj.weight"
        channels = {m: state[f"backbones.{m}.{first}"].shape[1] for m in modalities}
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}") from None
    heads = [f"projectors.{m}." for m in modalities]
    projectors = [{k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in heads]
    widths = [len(v) for v in projectors[0].values() if v.ndim == 2]
    shared = all(k in projectors[1] and torch.equal(v, projectors[1][k]) for k, v in projectors[0].items())
    model = MultimodalModel(name, channels, widths, shared_projector=shared)
    if fault := backbones.misfit(model.state_dict(), state):
        raise ValueError(f"{path}: does not fit two networks {name} with projector {widths}: {fault}")
    model.load_state_dict(state)
    return model.eval()
