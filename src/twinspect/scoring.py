"""Pure functions from distances to maps and scores; no parameters, traced and exported as they are.

Shapes: B images, h w grid positions, H W output pixels, S output side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def top_mean(map_Bhw: Tensor, share: float) -> Tensor:
    """Mean of the largest ``share`` of positions of each map (B); at least one position."""
    flat = map_Bhw.flatten(1)
    count = max(1, int(flat.shape[1] * share))
    return flat.topk(count, dim=1).values.mean(1)


def published_map(distances: Sequence[Tensor], size: int, name: str) -> tuple[Tensor, Tensor]:
    """Map (B x 1 x S x S) and image score (B) as the public code of ``dinomaly`` or ``rd4ad`` makes them.

    ``distances`` are 1 - cos of every layer group at every position, B x h x w each; ``size`` is the input's side.
    """
    raised = torch.stack(
        [F.interpolate(d[:, None], size=(size, size), mode="bilinear", align_corners=True) for d in distances]
    )
    if name == "rd4ad":  # scipy's blur, which is cut at four sigma
        map_B1SS = smooth(raised.sum(0), 16, mirrored=True)
        return map_B1SS, top_mean(map_B1SS, 0.0)
    joined = F.interpolate(raised.mean(0), size=(256, 256), mode="bilinear", align_corners=False)
    map_B1SS = smooth(joined, 2, mirrored=False)  # 5 x 5, of which sigma 4 makes nearly a box
    return map_B1SS, top_mean(map_B1SS, 0.01)


def smooth(map_B1hw: Tensor, radius: int, mirrored: bool) -> Tensor:
    """Gaussian of sigma 4, cut at ``radius`` positions; outside stand zeros, or the map again, edges included."""
    weight = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float32) ** 2) / 32.0)
    kernel = (weight / weight.sum()).to(map_B1hw)
    for axis in (2, 3) if mirrored else ():  # edges included, which no mode of F.pad does
        low = map_B1hw.narrow(axis, 0, radius).flip(axis)
        high = map_B1hw.narrow(axis, map_B1hw.shape[axis] - radius, radius).flip(axis)
        map_B1hw = torch.cat([low, map_B1hw, high], axis)
    map_B1hw = map_B1hw if mirrored else F.pad(map_B1hw, (radius,) * 4)
    return F.conv2d(F.conv2d(map_B1hw, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


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
