"""Pure functions from distances to maps and scores; no parameters, traced and exported as they are.

Shapes: B images, h w grid positions, H W output pixels, S output side.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def top_mean(map_Bhw: Tensor, share: float) -> Tensor:
    """Mean of the largest ``share`` of positions of each map (B); at least one position."""
    flat = map_Bhw.flatten(1)
    count = max(1, int(flat.shape[1] * share))
    return flat.topk(count, dim=1).values.mean(1)


def gaussian_kernel(sigma: float) -> Tensor:
    """One-dimensional Gaussian, normalised, cut at three sigma."""
    radius = max(1, int(3 * sigma + 0.5))
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def smooth(map_B1hw: Tensor, kernel: Tensor) -> Tensor:
    """Separable Gaussian with edge values repeated, so that nothing fades at the rim."""
    radius = kernel.numel() // 2
    padded = F.pad(map_B1hw, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


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
