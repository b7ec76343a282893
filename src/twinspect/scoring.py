"""Pure functions from distances to maps and scores; no parameters, traced and exported as they are.

Shapes: B images, h w grid positions, H W output pixels, S output side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def top_mean(map_Bhw: Tensor, share: float) -> Tensor:
    """Mean of the largest ``share`` of positions of each map (B); at least one position."""
    flat = map_Bhw.flatten(1)
    count = max(1, int(flat.shape[1] * share))
    return flat.topk(count, dim=1).values.mean(1)


def gaussian_kernel(sigma: float, radius: int = 0) -> Tensor:
    """One-dimensional Gaussian, normalised, cut at ``radius`` positions from its middle; 0 takes three sigma."""
    radius = radius or max(1, int(3 * sigma + 0.5))
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def smooth(map_B1hw: Tensor, kernel: Tensor, rim: str = "replicate") -> Tensor:
    """Separable Gaussian by its kernel of one axis.

    ``rim`` is what stands outside the map. ``replicate``: its edge values, so that nothing fades at the rim;
    ``zeros``; ``mirror``: the map again, edge values included.
    """
    radius = kernel.numel() // 2
    if rim == "mirror":  # edge values included, which no mode of F.pad does
        for axis in (2, 3):
            low = map_B1hw.narrow(axis, 0, radius).flip(axis)
            high = map_B1hw.narrow(axis, map_B1hw.shape[axis] - radius, radius).flip(axis)
            map_B1hw = torch.cat([low, map_B1hw, high], axis)
    else:
        map_B1hw = F.pad(map_B1hw, (radius,) * 4, mode="constant" if rim == "zeros" else rim)
    return F.conv2d(F.conv2d(map_B1hw, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


class PublishedMap(NamedTuple):
    """How a public code turns distances of layer groups into a map and a score."""

    mean: bool  # whether the groups are averaged; they are summed otherwise
    side: int  # of the map; 0 leaves it at the input's
    radius: int  # of the Gaussian of sigma 4, in pixels
    rim: str  # see `smooth`
    share: float  # of the map's highest values, whose mean is the score; 0 takes the highest


# Dinomaly's blur is a kernel of 5 x 5, of which sigma 4 makes nearly a box. RD4AD's is scipy's, cut at four sigma.
PUBLISHED_MAPS = {
    "dinomaly": PublishedMap(True, 256, 2, "zeros", 0.01),
    "rd4ad": PublishedMap(False, 0, 16, "mirror", 0.0),
}


def published_map(distances: Sequence[Tensor], size: int, name: str) -> tuple[Tensor, Tensor]:
    """Map (B x 1 x S x S) and image score (B) as a public code, a key of `PUBLISHED_MAPS`, makes them.

    ``distances`` are 1 - cos of every layer group at every position, B x h x w each; ``size`` is the input's side.
    """
    how = PUBLISHED_MAPS[name]
    raised = torch.stack(
        [F.interpolate(d[:, None], size=(size, size), mode="bilinear", align_corners=True) for d in distances]
    )
    joined = raised.mean(0) if how.mean else raised.sum(0)
    if how.side:
        joined = F.interpolate(joined, size=(how.side, how.side), mode="bilinear", align_corners=False)
    map_B1SS = smooth(joined, gaussian_kernel(4.0, how.radius).to(joined), how.rim)
    return map_B1SS, top_mean(map_B1SS, how.share)


def upsample(map_Bhw: Tensor, side: int) -> Tensor:
    """Square maps B x h x h to B x 1 x side x side, bilinear."""
    here, map_B1hw = map_Bhw.shape[-1], map_Bhw[:, None]
    if here == side:
        return map_B1hw
    if side % here == 0:  # by a factor, which exports as a constant
        return F.interpolate(map_B1hw, scale_factor=float(side // here), mode="bilinear", align_corners=False)
    return F.interpolate(map_B1hw, size=(side, side), mode="bilinear", align_corners=False)


_LIMIT = 30.0  # standard deviations beyond which a surprise grows in proportion


def surprise(z: Tensor) -> Tensor:
    """-log(1 - Phi(z)) in nats: how surprising z standard deviations above the mean are. Any shape.

    In a Noisy-OR, P = 1 - product of (1 - p), surprises add up, and images whose P rounds to 1 keep their order.
    Far out the asymptote of Birnbaum is used, exact to 0.1 %, and beyond 30 its tangent, so that nothing overflows.
    """
    near = z.clamp_max(3.0)
    exact = -torch.log(0.5 * (1.0 - torch.erf(near / math.sqrt(2.0))))
    far = z.clamp(3.0, _LIMIT)
    asymptote = 0.5 * far.square() + torch.log(math.sqrt(math.pi / 2.0) * (far + (far.square() + 4.0).sqrt()))
    return torch.where(z < 3.0, exact, asymptote) + _LIMIT * (z - _LIMIT).clamp_min(0.0)
