"""CMX (Zhang et al. 2022): two Mix Transformers that correct each other after every stage, fused for one decoder.

Modules have the names of the published code (RGBX_Semantic_Segmentation), so its state dicts load directly. For 480 x
640 pixels and 40 classes, CMX-B2 has 66,581,424 parameters and takes 156.4 GFLOP, CMX-B5 181,074,864 and 391.9 GFLOP,
both as the published code (torch.utils.flop_counter; a multiplication and an addition count as two).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decur_core import backbones
from decur_core.data.raster import DataError

DECODER = 512  # channels to which the decoder brings every stage
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; published for both inputs


def normalize(images: Tensor) -> Tensor:
    """Float images N x 3 x H x W in [0, 1] as the published network takes both of its inputs."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def _tokens(maps: Tensor) -> Tensor:
    """N x C x H x W to N x HW x C."""
    return maps.flatten(2).transpose(1, 2)


def _initialise(module: nn.Module) -> None:
    """The rule of SegFormer, which the published encoder applies to all of its parts."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class Rectification(nn.Module):
    """FRM: each modality receives half of the other's map weighted by channel and half weighted by pixel."""

    def __init__(self, width: int):
        super().__init__()
        perceptron = [nn.Linear(4 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 2 * width), nn.Sigmoid()]
        pointwise = [nn.Conv2d(2 * width, width, 1), nn.ReLU(), nn.Conv2d(width, 2, 1), nn.Sigmoid()]
        self.channel_weights = nn.ModuleDict({"mlp": nn.Sequential(*perceptron)})
        self.spatial_weights = nn.ModuleDict({"mlp": nn.Sequential(*pointwise)})

    def forward(self, rgb: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Two maps N x C x H x W, corrected."""
        both = torch.cat([rgb, other], 1)
        summary = torch.cat([both.mean((2, 3)), both.flatten(2).max(2).values], 1)
        channels = self.channel_weights["mlp"](summary)[:, :, None, None].chunk(2, 1)
        pixels = self.spatial_weights["mlp"](both).chunk(2, 1)
        share_rgb, share_other = (0.5 * (c + p) for c, p in zip(channels, pixels, strict=True))
        return rgb + share_other * other, other + share_rgb * rgb


class Fusion(nn.Module):
    """FFM: linear attention in which each modality queries the other's context, then both maps mixed into one."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        pairs = {
            "channel_proj": lambda: nn.Linear(width, 2 * width),
            "end_proj": lambda: nn.Linear(2 * width, width),
            "norm": lambda: nn.LayerNorm(width),
        }
        self.cross = nn.ModuleDict({f"{name}{k}": make() for name, make in pairs.items() for k in (1, 2)})
        self.cross["cross_attn"] = nn.ModuleDict({f"kv{k}": nn.Linear(width, 2 * width, bias=False) for k in (1, 2)})
        depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        layers = [nn.Conv2d(2 * width, width, 1), depthwise, nn.ReLU(), nn.Conv2d(width, width, 1)]
        self.channel_emb = nn.ModuleDict(
            {
                "residual": nn.Conv2d(2 * width, width, 1, bias=False),
                "channel_embed": nn.Sequential(*layers, nn.BatchNorm2d(width)),
                "norm": nn.BatchNorm2d(width),
            }
        )

    def _split(self, tokens: Tensor) -> Tensor:
        """N x L x C to N x heads x L x C / heads."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _context(self, k: int, tokens: Tensor) -> Tensor:
        """Of modality k: N x heads x c x c, which value each key channel stands for; its size does not grow with L."""
        keys, values = (self._split(t) for t in self.cross["cross_attn"][f"kv{k}"](tokens).chunk(2, 2))
        return (keys.mT @ values * keys.shape[-1] ** -0.5).softmax(2)

    def forward(self, rgb: Tensor, other: Tensor) -> Tensor:
        """Two maps N x C x H x W to one."""
        tokens = {1: _tokens(rgb), 2: _tokens(other)}
        halves = {k: self.cross[f"channel_proj{k}"](x).relu().chunk(2, 2) for k, x in tokens.items()}
        fused = []
        for k, x in tokens.items():
            kept, query = halves[k]
            answer = self._split(query) @ self._context(3 - k, halves[3 - k][1])
            both = torch.cat([kept, answer.transpose(1, 2).flatten(2)], 2)
            fused.append(self.cross[f"norm{k}"](x + self.cross[f"end_proj{k}"](both)))
        maps = torch.cat(fused, 2).mT.unflatten(2, rgb.shape[2:]).contiguous()
        mixed = self.channel_emb["residual"](maps) + self.channel_emb["channel_embed"](maps)
        return self.channel_emb["norm"](mixed)


class DualEncoder(nn.Module):
    """Two Mix Transformers, the second's names with ``extra_``; what leaves a stage is rectified and also fused."""

    def __init__(self, backbone: str):
        super().__init__()
        widths = backbones.widths(backbone)
        for prefix in ("", "extra_"):
            for name, module in backbones.build(backbone, 3)[0].named_children():
                setattr(self, prefix + name, module)
        self.FRMs = nn.ModuleList([Rectification(width) for width in widths])
        self.FFMs = nn.ModuleList([Fusion(width, heads) for width, heads in zip(widths, (1, 2, 5, 8), strict=True)])
        self.FRMs.apply(_initialise)
        self.FFMs.apply(_initialise)
        # In the published encoder the rate of stochastic depth grows from block to block except within stage 2, where
        # RGB has that of the stage's first block and the other modality that of its second.
        rates = [self.block2[i].drop_path.drop_prob for i in (0, 1)]
        for stage, rate in zip((self.block2, self.extra_block2), rates, strict=True):
            for block in stage:
                block.drop_path.drop_prob = rate

    def _stage(self, prefix: str, k: int, maps: Tensor) -> Tensor:
        embed, blocks, norm = (getattr(self, f"{prefix}{part}{k}") for part in ("patch_embed", "block", "norm"))
        return norm(blocks(embed(maps)))

    def forward(self, rgb: Tensor, other: Tensor) -> list[Tensor]:
        """Two images N x 3 x H x W to the fused maps of four stages, strides 4, 8, 16 and 32."""
        if min(rgb.shape[2:]) < backbones.SMALLEST:
            raise ValueError(f"images of {tuple(rgb.shape[2:])} px; CMX needs {backbones.SMALLEST} or more")
        fused = []
        for k, (rectify, fuse) in enumerate(zip(self.FRMs, self.FFMs, strict=True), start=1):
            rgb, other = rectify(self._stage("", k, rgb), self._stage("extra_", k, other))
            fused.append(fuse(rgb, other))
        return fused


class Decoder(nn.Module):
    """SegFormer's: every stage linearly to 512 channels, all brought to stride 4, mixed per pixel, classified."""

    def __init__(self, widths: tuple[int, ...], classes: int):
        super().__init__()
        for k, width in enumerate(widths, start=1):
            setattr(self, f"linear_c{k}", nn.ModuleDict({"proj": nn.Linear(width, DECODER)}))
        norm = nn.BatchNorm2d(DECODER, eps=1e-3, momentum=0.1)
        self.linear_fuse = nn.Sequential(nn.Conv2d(len(widths) * DECODER, DECODER, 1), norm, nn.ReLU())
        self.linear_pred = nn.Conv2d(DECODER, classes, 1)
        self.dropout = nn.Dropout2d(0.1)
        for convolution in (self.linear_fuse[0], self.linear_pred):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")

    def forward(self, maps: list[Tensor]) -> Tensor:
        """The maps of the stages, finest first, to N x classes logits at the resolution of the first."""
        size, raised = maps[0].shape[2:], []
        for k, stage in enumerate(maps, start=1):
            wide = getattr(self, f"linear_c{k}")["proj"](_tokens(stage)).mT.unflatten(2, stage.shape[2:])
            raised.append(wide if k == 1 else F.interpolate(wide, size=size, mode="bilinear", align_corners=False))
        return self.linear_pred(self.dropout(self.linear_fuse(torch.cat(raised[::-1], 1))))


class CMX(nn.Module):
    """The whole network; ``backbone``: ``mit_b0``, ``mit_b2`` or ``mit_b5``; ``classes``: without the unlabelled one.

    A published checkpoint's ``model`` loads with ``load_state_dict``, strictly. Published evaluations build the network
    in a way that leaves the decoder's BatchNorm at an eps of 1e-5; here it has the 1e-3 of training in both.
    """

    def __init__(self, backbone: str = "mit_b2", *, classes: int):
        super().__init__()
        self.backbone = DualEncoder(backbone)
        self.decode_head = Decoder(backbones.widths(backbone), classes)

    def forward(self, rgb: Tensor, other: Tensor) -> Tensor:
        """Two float images N x 3 x H x W, RGB and e.g. HHA, to float32 logits N x classes x H x W."""
        logits = self.decode_head(self.backbone(rgb, other)).float()
        return F.interpolate(logits, size=rgb.shape[2:], mode="bilinear", align_corners=False)


def load_backbones(network: CMX, rgb: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Put the states of two Mix Transformers (``model.backbone_state``, ``export.load``) into the encoder, in place.

    A classification head (``head.*``, as in SegFormer's release) is left out. Raises DataError, and loads nothing, if
    a key is missing, unknown or of another shape.
    """
    encoder = network.backbone
    fusion = {k: v for k, v in encoder.state_dict().items() if k.startswith(("FRMs.", "FFMs."))}
    given = {prefix + k: v for prefix, s in (("", rgb), ("extra_", other)) for k, v in s.items() if k[:5] != "head."}
    if fault := backbones.misfit(encoder.state_dict(), fusion | given):
        raise DataError(f"these weights do not fit the encoder of CMX (extra_*: the second modality): {fault}")
    encoder.load_state_dict(fusion | given)
