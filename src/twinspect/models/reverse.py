"""Reverse distillation: a bottleneck that forgets, and a decoder that rebuilds the teacher's stages from it.

For a CNN teacher it is RD4AD's student (Deng, Li, CVPR 2022): multi-scale fusion, one-class embedding, and a decoder
of ResNet's blocks that rises by transposed convolutions. With a WideResNet-50-2 it is that network to the digit: see
docs/papers.md and benchmarks/parity.py. For a ViT, whose layers share one grid, the same with transformer blocks.

Shapes: B images, D channels, h w grid, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.models.layers import DecoderBlock, to_map, to_tokens

RD4AD_DEPTHS = (6, 4, 3)  # blocks of the decoder's stages, fine to coarse; the embedding has as many as the last


def conv_norm(width_in: int, width: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Convolution and batch norm."""
    conv = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(width)]


def rise_norm(width_in: int, width: int, factor: int) -> list[nn.Module]:
    """Transposed convolution that makes a square of every position, and batch norm."""
    return [nn.ConvTranspose2d(width_in, width, factor, factor, bias=False), nn.BatchNorm2d(width)]


class WideBottleneck(nn.Module):
    """ResNet's block of three convolutions around a shortcut, half as wide inside (WideResNet-50-2).

    Args:
        width_in, width: channels.
        stride: of the middle convolution.
        rise: factor by which a transposed convolution in its place enlarges the grid.
    """

    def __init__(self, width_in: int, width: int, stride: int = 1, rise: int = 1) -> None:
        super().__init__()
        inner = width // 2
        middle = conv_norm(inner, inner, stride=stride) if rise == 1 else rise_norm(inner, inner, rise)
        self.body = nn.Sequential(
            *conv_norm(width_in, inner, 1), nn.ReLU(), *middle, nn.ReLU(), *conv_norm(inner, width, 1)
        )
        self.shortcut = nn.Sequential()
        if rise > 1:
            self.shortcut.extend(rise_norm(width_in, width, rise))
        elif stride > 1 or width_in != width:
            self.shortcut.extend(conv_norm(width_in, width, 1, stride))

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """B x D x h x w to B x D_out x h_out x w_out."""
        return F.relu(self.body(x_BDhw) + self.shortcut(x_BDhw))


class ConvReverse(nn.Module):
    """Stages on falling grids to predictions of the same shapes, through a grid half as fine as the coarsest.

    Args:
        channels, sides: of the stages, fine to coarse.
        width: of the finest stage, doubled at every coarser one; 0 takes each stage's own, at least 64.
        depth: blocks of the embedding and of every stage of the decoder; 0 takes RD4AD's for a rectified teacher,
            else 3.
        rectified: whether the teacher's stages end in a ReLU, as ResNet's do. The decoder's last ReLU can then give
            them; other stages are given by a linear head.
        at_bottleneck: made for the bottleneck's width; sits between bottleneck and decoder.
    """

    def __init__(
        self,
        channels: Sequence[int],
        sides: Sequence[int],
        width: int,
        depth: int,
        rectified: bool,
        at_bottleneck: nn.Module | None,
    ) -> None:
        super().__init__()
        self.sides = tuple(sides)
        widths = reverse_widths(channels, width)
        depths = RD4AD_DEPTHS[-len(widths) :] if rectified and not depth else (depth or 3,) * len(widths)
        embedded = bottleneck_width(channels, width)
        self.fuse = nn.ModuleList(_downwards([channels[i], *widths[i + 1 :]], sides[i:]) for i in range(len(widths)))
        fused = sum(widths[-1] for _ in channels[:-1]) + channels[-1]
        self.embed = nn.Sequential(
            WideBottleneck(fused, embedded, stride=2),
            *(WideBottleneck(embedded, embedded) for _ in range(depths[-1] - 1)),
        )
        self.at_bottleneck = at_bottleneck or nn.Identity()
        self.rise, self.heads = nn.ModuleList(), nn.ModuleList()
        above, here = embedded, -(-sides[-1] // 2)
        for w, c, side, blocks in zip(*(reversed(x) for x in (widths, channels, sides, depths)), strict=True):
            first = WideBottleneck(above, w, rise=-(-side // here))
            self.rise.append(nn.Sequential(first, *(WideBottleneck(w, w) for _ in range(blocks - 1))))
            self.heads.append(nn.Identity() if rectified and w == c else nn.Conv2d(w, c, 1))
            above, here = w, side

    def forward(self, stages: Sequence[Tensor], pixels_B3ss: Tensor) -> list[Tensor]:
        """Predictions of the stages, fine to coarse; pixels are not looked at."""
        x = self.at_bottleneck(self.embed(torch.cat([f(s) for f, s in zip(self.fuse, stages, strict=True)], 1)))
        predictions = []
        for rise, head, side in zip(self.rise, self.heads, reversed(self.sides), strict=True):
            x = rise(x)[..., :side, :side]  # of an odd side a row too many was made
            predictions.append(head(x))
        return predictions[::-1]


class TokenReverse(nn.Module):
    """The same for stages on one grid (ViT): an MLP bottleneck and transformer blocks, deep stages first."""

    def __init__(
        self, channels: Sequence[int], width: int, depth: int, heads: int, at_bottleneck: nn.Module | None
    ) -> None:
        super().__init__()
        count = len(channels)
        self.embed = nn.Sequential(nn.Linear(sum(channels), width), nn.GELU(), nn.Linear(width, width))
        self.at_bottleneck = at_bottleneck or nn.Identity()
        self.rise = nn.ModuleList(
            nn.Sequential(*(DecoderBlock(width, heads) for _ in range(max(1, depth // count)))) for _ in channels
        )
        self.heads = nn.ModuleList(nn.Linear(width, c) for c in reversed(channels))

    def forward(self, stages: Sequence[Tensor], pixels_B3ss: Tensor) -> list[Tensor]:
        """Predictions of the stages; pixels are not looked at."""
        x_BND = self.embed(to_tokens(torch.cat(list(stages), 1)))
        x_BND = to_tokens(self.at_bottleneck(to_map(x_BND)))
        predictions = []
        for rise, head in zip(self.rise, self.heads, strict=True):
            x_BND = rise(x_BND)
            predictions.append(to_map(head(x_BND)))
        return predictions[::-1]


def reverse_widths(channels: Sequence[int], width: int) -> list[int]:
    """Width of the decoder at every stage, fine to coarse."""
    return [width * 2**i for i in range(len(channels))] if width else [max(64, c) for c in channels]


def bottleneck_width(channels: Sequence[int], width: int) -> int:
    """Channels of the bottleneck: twice those of the coarsest stage, on half its grid."""
    return 2 * reverse_widths(channels, width)[-1]


def _downwards(widths: Sequence[int], sides: Sequence[int]) -> nn.Module:
    """Convolutions that bring a stage to the coarsest one's grid, one for every stage between."""
    steps: list[nn.Module] = []
    for i in range(len(sides) - 1):
        steps += [*conv_norm(widths[i], widths[i + 1], stride=round(sides[i] / sides[i + 1])), nn.ReLU()]
    return nn.Sequential(*steps)
