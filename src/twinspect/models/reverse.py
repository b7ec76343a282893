"""Reverse distillation: a bottleneck that forgets, and a decoder that rebuilds the teacher's stages from it.

For a CNN teacher after RD4AD (Deng, Li, CVPR 2022: multi-scale fusion, one-class embedding, mirrored decoder);
for a ViT, whose layers share one grid, the same with transformer blocks.

Shapes: B images, D channels, h w grid, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.models.layers import DecoderBlock, to_map, to_tokens


def conv_norm(width_in: int, width: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    )


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv_norm(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """B x D x h x w to the same shape."""
        return F.relu(x_BDhw + self.second(self.first(x_BDhw)))


class ConvReverse(nn.Module):
    """Stages on falling grids to predictions of the same shapes, through a grid half as fine as the coarsest.

    Args:
        channels, sides: of the stages, fine to coarse.
        width: of the finest stage, doubled at every coarser one; 0 takes each stage's own, at least 64.
        depth: residual blocks per stage.
        at_bottleneck: made for the bottleneck's width; sits between bottleneck and decoder.
    """

    def __init__(
        self, channels: Sequence[int], sides: Sequence[int], width: int, depth: int, at_bottleneck: nn.Module | None
    ) -> None:
        super().__init__()
        self.sides = tuple(sides)
        widths = reverse_widths(channels, width)
        deepest, embedded = widths[-1], bottleneck_width(channels, width)
        self.fuse = nn.ModuleList(
            _downwards(c, deepest, side // sides[-1]) for c, side in zip(channels, sides, strict=True)
        )
        self.embed = nn.Sequential(
            conv_norm(deepest * len(channels), embedded, stride=2), *(ResidualBlock(embedded) for _ in range(depth))
        )
        self.at_bottleneck = at_bottleneck or nn.Identity()
        self.rise, self.heads = nn.ModuleList(), nn.ModuleList()
        above = embedded
        for own, c in zip(reversed(widths), reversed(channels), strict=True):
            self.rise.append(nn.Sequential(conv_norm(above, own), *(ResidualBlock(own) for _ in range(depth))))
            self.heads.append(nn.Conv2d(own, c, 1))
            above = own

    def forward(self, stages: Sequence[Tensor], pixels_B3ss: Tensor) -> list[Tensor]:
        """Predictions of the stages, fine to coarse; pixels are not looked at."""
        x = self.at_bottleneck(self.embed(torch.cat([f(s) for f, s in zip(self.fuse, stages, strict=True)], 1)))
        found = []
        for rise, head, side in zip(self.rise, self.heads, reversed(self.sides), strict=True):
            x = rise(F.interpolate(x, size=(side, side), mode="nearest"))
            found.append(head(x))
        return found[::-1]


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
        found = []
        for rise, head in zip(self.rise, self.heads, strict=True):
            x_BND = rise(x_BND)
            found.append(to_map(head(x_BND)))
        return found[::-1]


def reverse_widths(channels: Sequence[int], width: int) -> list[int]:
    """Width of the decoder at every stage, fine to coarse."""
    return [width * 2**i for i in range(len(channels))] if width else [max(64, c) for c in channels]


def bottleneck_width(channels: Sequence[int], width: int) -> int:
    """Channels of the bottleneck: twice those of the coarsest stage, on half its grid."""
    return 2 * reverse_widths(channels, width)[-1]


def _downwards(width_in: int, width: int, factor: int) -> nn.Module:
    """Strided convolutions that bring a stage to the coarsest one's grid."""
    if factor == 1:
        return conv_norm(width_in, width, kernel=1)
    steps, here = [], width_in
    for _ in range(factor.bit_length() - 1):
        steps.append(conv_norm(here, width, stride=2))
        here = width
    return nn.Sequential(*steps)
