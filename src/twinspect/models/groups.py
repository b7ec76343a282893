"""Which of the teacher's levels form the layer groups of system A, and how the map of each is read.

Shapes: B images, D channels, h w grid, T positions of the decoder's grid, N rows of a group: see `layers.to_rows`;
P class and register tokens of a ViT.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.errors import ConfigError
from twinspect.models.contract import Observed, Selection
from twinspect.models.layers import Resample, to_rows
from twinspect.models.teachers import BackboneInfo

TOP_SHARE = 0.005  # share of positions whose mean is a layer group's score
GRAIN_WINDOWS, FINE_WINDOWS = (3, 5), (1, 3)  # a position of stride 4 is too small to judge alone
GRAIN_SHARE = 0.0005  # the same for the grain group, which has four times the positions of the next
LAYER_NORM_EPS = 1e-8  # Dinomaly's, in the decoder of a ViT and of recentred groups
GRAIN_WEIGHT = 0.25  # in the anomaly map: most defects are coarser, and its noise is the finest


class GroupPlan(NamedTuple):
    """A layer group: indices of the teacher's levels, its grid in pixels a step, and how its map is read.

    Attributes:
        windows: sides, in positions, over which squared lengths of residuals are averaged.
        share: of positions, the highest, whose mean is the group's score.
        on_surface: whether its map says where on a surface a defect is; such maps are also read together.
        weight: in the anomaly map.
    """

    levels: tuple[int, ...]
    stride: int
    windows: tuple[int, ...] = (1,)
    share: float = TOP_SHARE
    on_surface: bool = True
    weight: float = 1.0


class LevelGroups(Selection):
    """Forms the teacher's layer groups and the decoder's input from its levels.

    ViT (Dinomaly): the mean of each half of the levels, untouched. The decoder's input is the mean of all levels,
    with their class and register tokens in front. Recentred (Dinomaly2), a group is the layer norm of its patches
    minus its class token; the decoder's input stays as it is.

    CNN: every channel standardised by its
    statistics on normal images, in four groups: grain (stride 4 alone, on its own grid: what a surface is made
    of), fine (strides 4 and 8, first stage of 16, on the grid of 8), middle (last stage of 16) and deep (last
    stages of 16 and 32, on the grid of 16).

    Args:
        info: the teacher.
        size: input side in pixels.
        recentre: whether a ViT's groups are recentred.

    Raises:
        ConfigError: recentred groups of a teacher that has no class token.
    """

    def __init__(self, info: BackboneInfo, size: int, recentre: bool = False) -> None:
        if recentre and not info.class_token:
            raise ConfigError(f"recentre: {info.arch} has no class token; take a ViT such as --teacher dinov2-base")
        self.averaged, self.recentre = info.kind == "vit", recentre
        plans = _vit_groups(info.strides) if self.averaged else _cnn_groups(info.strides)
        singles = sorted({i for plan in plans for i in plan.levels})
        levels = [list(plan.levels) for plan in plans] if self.averaged else [[i] for i in singles]
        sides = [-(-size // info.strides[members[0]]) for members in levels]
        super().__init__(info, levels, sides, not self.averaged)
        self.plans = plans
        self.prefix_tokens = info.prefix_tokens
        self.members = [[0], [1]] if self.averaged else [[singles.index(i) for i in p.levels] for p in plans]
        self.sides = [-(-size // plan.stride) for plan in plans]
        self.dims = [sum(self.channels[i] for i in group) for group in self.members]
        self.trunk_side = min(self.sides)
        self.trunk_dims = self.channels[0] if self.averaged else sum(self.channels)
        self.factors = [side // self.trunk_side for side in self.sides]
        self.steps = [(i, *step) for i, side in enumerate(sides) for step in _resampling(side, self._sides_of(i))]
        self.moves = nn.ModuleList(Resample(here, side) for _, here, side in self.steps)

    def _averaged(self, observed: Observed) -> tuple[list[Tensor], Tensor]:
        groups = [to_rows(one.permute(0, 2, 3, 1)) for one in observed.maps]
        prefixes = observed.prefix_BMPD.unbind(1)
        total = sum(len(members) for members in self.levels)
        each = zip(prefixes, groups, self.levels, strict=True)
        trunk = torch.stack([torch.cat([p, one], 1) * (len(members) / total) for p, one, members in each]).sum(0)
        if self.recentre:
            away = (one - prefix[:, :1] for one, prefix in zip(groups, prefixes, strict=True))
            groups = [F.layer_norm(one, one.shape[-1:], eps=LAYER_NORM_EPS) for one in away]
        return groups, trunk

    def _sides_of(self, i: int) -> set[int]:
        """Sides of the grids that a selected map is needed on."""
        return {self.trunk_side, *(s for s, own in zip(self.sides, self.members, strict=True) if i in own)}

    def forward(self, observed: Observed) -> tuple[list[Tensor], Tensor]:
        """The teacher's answer to (groups as rows B x N x D, decoder input B x T x D_in, of a ViT B x P+T x D)."""
        if self.averaged:
            return self._averaged(observed)
        maps = [self.standardise(one, i) for i, one in enumerate(observed.maps)]
        found = {(i, side): one for i, (one, side) in enumerate(zip(maps, self.map_sides, strict=True))}
        for (i, here, side), move in zip(self.steps, self.moves, strict=True):
            found[i, side] = move(found[i, here])
        groups = [
            to_rows(_joined([found[i, side] for i in group]), factor)
            for group, side, factor in zip(self.members, self.sides, self.factors, strict=True)
        ]
        return groups, to_rows(_joined([found[i, self.trunk_side] for i in range(len(maps))]))


def _joined(maps: list[Tensor]) -> Tensor:
    """Maps of one side as one grid, B x h x w x D."""
    return torch.cat([one.permute(0, 2, 3, 1) for one in maps], 3)


def _resampling(own: int, wanted: set[int]) -> list[tuple[int, int]]:
    """(from side, to side) in an order that can be followed; means are taken of the smallest grid of means."""
    steps, here = [], own
    for side in sorted(wanted - {own}, reverse=True):
        steps.append((here if here % side == 0 else own, side))
        here = side if own % side == 0 else here
    return steps


def _vit_groups(strides: tuple[int, ...]) -> list[GroupPlan]:
    levels, half = len(strides), max(1, len(strides) // 2)
    parts = tuple(range(half)), tuple(range(half, levels)) or (levels - 1,)
    return [GroupPlan(part, strides[0]) for part in parts]


def _cnn_groups(strides: tuple[int, ...]) -> list[GroupPlan]:
    """The grain, fine, middle and deep group; a CNN without a stride repeats the next, or has no grain."""
    last = {stride: max(i for i, s in enumerate(strides) if s == stride) for stride in set(strides)}
    first_16 = min((i for i, s in enumerate(strides) if s == 16), default=len(strides) - 1)
    middle, deep = last.get(16, len(strides) - 1), last.get(32, len(strides) - 1)
    fine = sorted({last[stride] for stride in (4, 8) if stride in last} | {first_16})
    plans = [
        GroupPlan(tuple(fine), max(8, strides[fine[0]]), FINE_WINDOWS),
        GroupPlan((middle,), strides[middle]),
        GroupPlan(tuple(sorted({middle, deep})), strides[middle], on_surface=False),
    ]
    grain = [GroupPlan((last[4],), 4, GRAIN_WINDOWS, GRAIN_SHARE, weight=GRAIN_WEIGHT)] if 4 in last else []
    return grain + plans
