"""Records of the scoring path, and which of the teacher's maps are kept.

Shapes: B images, D channels, h w grid, M kept maps, P class and register tokens, E width of all global tokens
together, F of the embedding, R readings, H W map.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from twinspect.models.layers import Resample, standardise, whole_divisor
from twinspect.models.teachers import BackboneInfo
from twinspect.types import Features

_RECOGNISED_AT = 256  # pixels at which a CNN recognises objects; small defects need more than that


class Observed(NamedTuple):
    """What is kept of the teacher's answer.

    Attributes:
        maps: the kept maps (see `Selection`), B x D x h x w each.
        coarse: the maps of a view of half the side (CNN only), which sees what is large.
        tokens: all global tokens joined, raw, of one or two views: B x E each.
        embedding_BF: what the teacher's own classifier would see.
        prefix_BMPD: class and register tokens of the kept maps, averaged as the maps are. No maps and no tokens
            (B x 0 x 0 x 0) for a CNN.
    """

    maps: tuple[Tensor, ...]
    coarse: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]
    embedding_BF: Tensor
    prefix_BMPD: Tensor


class Plain(NamedTuple):
    """What a family's students say without any further statistics.

    Attributes:
        map_Bhw: anomaly map, as coarse as it is.
        local_BR: readings of what sees small defects.
        semantic_BR: readings of what sees wrong scenes; none (B x 0) in a family without a semantic student.
    """

    map_Bhw: Tensor
    local_BR: Tensor
    semantic_BR: Tensor


class Outputs(NamedTuple):
    """What the model says about a batch; higher is more anomalous.

    Attributes:
        map_B1HW: anomaly map at a quarter of the input side: in standard deviations of good images, or the students'
            own distances when scoring is plain.
        score_B: joint score, the surprise in nats of the Noisy-OR.
        score_local_B, score_semantic_B: what sees small defects and what sees wrong scenes, each alone, in standard
            deviations above the mean of good images.
        cluster_B: index of the nearest cluster.
        cluster_distance_B: how far the whole image is from that cluster; large means that it shows none of the kinds
            of image that the model knows.
        readings_BR: raw readings that the scores are made of, local ones first; see `Scorer`.
        nearest_B: place of the most similar good image in the bank (see `NearestImages`); 0 when scoring is plain.
    """

    map_B1HW: Tensor
    score_B: Tensor
    score_local_B: Tensor
    score_semantic_B: Tensor
    cluster_B: Tensor
    cluster_distance_B: Tensor
    readings_BR: Tensor
    nearest_B: Tensor


class Selection(nn.Module):
    """Which of the teacher's maps are kept, in which views, and their channel statistics on good images.

    CNN: every level, and a coarse view of half the side with the last levels of stride 16 and 32. ViT: its levels
    averaged in ``parts`` parts (Dinomaly: two).

    Attributes:
        levels: members of every map, as indices of the teacher's levels.
        channels, map_sides: of every map.
        coarse_levels, coarse_channels, coarse_sides: of every map of the coarse view.
        prefix_shape: M x P x D of the kept class and register tokens; zeros for a CNN.
        shrinks: factors by which the views are smaller that tokens are taken of.
        coarse_shrink: the same for the coarse maps; 0 without.
    """

    def __init__(self, info: BackboneInfo, size: int, parts: int) -> None:
        super().__init__()
        vit, count = info.kind == "vit", len(info.channels)
        self.levels = _parts(count, parts) if vit else [[i] for i in range(count)]
        self.map_sides = [-(-size // info.strides[members[0]]) for members in self.levels]
        self.channels = [info.channels[members[0]] for members in self.levels]
        self.prefix_shape = (
            (len(self.levels), info.prefix_tokens, self.channels[0]) if info.prefix_tokens else (0, 0, 0)
        )
        first = 1 if vit else whole_divisor(size, round(size / _RECOGNISED_AT), 1)
        second = first if first == 1 else whole_divisor(size, 2 * first, 1)  # a small input has no view to spare
        self.shrinks = (first,) if second == first else (first, second)
        self.coarse_shrink = next((s for s in self.shrinks if s > 1), 0)
        last = [max((i for i, s in enumerate(info.strides) if s == stride), default=count - 1) for stride in (16, 32)]
        self.coarse_levels = sorted(set(last)) if self.coarse_shrink else []
        self.coarse_channels = [info.channels[i] for i in self.coarse_levels]
        self.coarse_sides = [-(-(size // self.coarse_shrink) // info.strides[i]) for i in self.coarse_levels]
        for i, channels in enumerate(self.channels):
            self.register_buffer(f"mean_{i}", torch.zeros(channels))
            self.register_buffer(f"scale_{i}", torch.ones(channels))

    @property
    def second_view(self) -> bool:
        """Whether tokens are taken of two views."""
        return len(self.shrinks) > 1

    def select(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The maps that are kept of the teacher's."""
        joined = [self._mean(maps, members) for members in self.levels]
        return tuple(_at_side(mean, side) for mean, side in zip(joined, self.map_sides, strict=True))

    def select_coarse(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The maps that are kept of the coarse view's."""
        return tuple(_at_side(maps[i], side) for i, side in zip(self.coarse_levels, self.coarse_sides, strict=True))

    def select_prefix(self, features: Features) -> Tensor:
        """Class and register tokens of the kept maps: B x M x P x D."""
        if 0 in self.prefix_shape:
            return features.maps[0].new_zeros(features.maps[0].shape[0], *self.prefix_shape)  # `len` fixes an export
        return torch.stack([self._mean(features.prefix, members) for members in self.levels], 1)

    @staticmethod
    def _mean(levels: tuple[Tensor, ...], members: list[int]) -> Tensor:
        return torch.stack([levels[i] for i in members]).mean(0) if len(members) > 1 else levels[members[0]]

    def standardise(self, map_BDhw: Tensor, i: int) -> Tensor:
        """The i-th kept map with channels of mean 0 and standard deviation 1 on good images."""
        return standardise(map_BDhw, self.get_buffer(f"mean_{i}"), self.get_buffer(f"scale_{i}"))

    def fit(self, i: int, mean_D: Tensor, scale_D: Tensor) -> None:
        """Take a kept map's channel statistics on good images."""
        self.get_buffer(f"mean_{i}").copy_(mean_D)
        self.get_buffer(f"scale_{i}").copy_(scale_D.clamp_min(1e-4))


class TokenScale(nn.Module):
    """Standardises joined global tokens by their statistics on good images: B x E."""

    mean_E: Tensor
    scale_E: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("mean_E", torch.zeros(dims))
        self.register_buffer("scale_E", torch.ones(dims))

    def forward(self, token_BE: Tensor) -> Tensor:
        """Joined raw tokens to standardised ones, B x E."""
        return (token_BE - self.mean_E) / self.scale_E

    def fit(self, token_nE: Tensor) -> None:
        """Take mean and standard deviation of raw joined tokens of good images."""
        self.mean_E, self.scale_E = token_nE.mean(0), token_nE.std(0).clamp_min(1e-3)


def _parts(count: int, parts: int) -> list[list[int]]:
    """Levels in so many parts of about equal length; a part repeats the last level where there are too few."""
    bounds = [i * count // parts for i in range(parts + 1)]
    return [list(range(a, b)) or [min(a, count - 1)] for a, b in zip(bounds, bounds[1:], strict=False)]


def _at_side(map_BDhw: Tensor, side: int) -> Tensor:
    here = map_BDhw.shape[-1]
    return map_BDhw if here == side else cast(Tensor, Resample(here, side).to(map_BDhw.device)(map_BDhw))
