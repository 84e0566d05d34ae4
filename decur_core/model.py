"""Two backbones and two projectors, one of each per modality."""

from collections.abc import Sequence

from torch import Tensor, nn

from . import backbones


def mlp(features: int, widths: Sequence[int]) -> nn.Sequential:
    """Linear-BatchNorm-ReLU for every width but the last, then Linear (paper, appendix B: three layers).

    The linear layers carry no bias: the normalisation that follows each (in the loss, for the last) removes it.
    """
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, widths[-1], bias=False))


class MultimodalModel(nn.Module):
    """One backbone and one projector per modality; no weight is shared (paper, section 4).

    ``backbone``: a name of ``backbones.BACKBONES``; ``in_channels``: channels of modality 1 and 2, e.g. (2, 13) for
    SAR and optical; ``projector``: output widths of the projector's layers, e.g. (8192, 8192, 8192). Attributes
    ``backbone_1, backbone_2, projector_1, projector_2``; ``features``: width of a backbone's output.
    """

    def __init__(self, backbone: str, in_channels: Sequence[int], projector: Sequence[int]):
        super().__init__()
        if len(in_channels) != 2:
            raise ValueError(f"in_channels = {tuple(in_channels)}; one number for each of the two modalities is needed")
        if not projector or min(projector) < 1:
            raise ValueError(f"projector = {tuple(projector)}; at least one width of 1 or more is needed")
        self.backbone_1, self.features = backbones.build(backbone, in_channels[0])
        self.backbone_2, _ = backbones.build(backbone, in_channels[1])
        self.projector_1 = mlp(self.features, projector)
        self.projector_2 = mlp(self.features, projector)

    def forward(
        self, views1_a: Tensor | None, views1_b: Tensor | None, views2_a: Tensor | None, views2_b: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Four batches of float images (N x C x H x W in [0, 1]) to four embeddings, each N x K, in the same order.

        Every batch of views passes on its own, so that BatchNorm sees one view at a time, as in Algorithm 1. For views
        that a loss does not look at, it passes None and gets None.
        """
        four = ((1, views1_a), (1, views1_b), (2, views2_a), (2, views2_b))
        return tuple(None if views is None else self.embed(modality, views) for modality, views in four)

    def embed(self, modality: int, views: Tensor) -> Tensor:
        """One batch of views of ``modality`` (1 or 2) to its N x K embedding."""
        if modality == 1:
            return self.projector_1(self.backbone_1(views))
        return self.projector_2(self.backbone_2(views))


def backbone_state(state: dict[str, Tensor], modality: int) -> dict[str, Tensor]:
    """The weights of one backbone from a model's state dict, under the keys of the plain network.

    For a ResNet they load, strictly, into ``torchvision.models.resnet50()`` whose ``fc`` is ``torch.nn.Identity()``
    and whose ``conv1`` has the modality's number of channels.
    """
    prefix = f"backbone_{modality}."
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not found:
        raise KeyError(f"no key starts with {prefix!r}; modality must be 1 or 2")
    return found
