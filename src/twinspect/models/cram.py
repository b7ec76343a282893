"""Central residual aggregation (our reading of the CRAM of arXiv 2402.17091; NetVLAD is among its references).

Shapes: B images, D channels, h w grid, K centres, N vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from twinspect.models.clusters import k_means

_ONE_TO_NEXT = 100.0  # how much more the nearest centre weighs than the second nearest, for a typical vector


class Cram(nn.Module):
    """Pulls features to K learnt centres of what is normal: B x D x h x w to the same shape.

    With soft assignments a_k(x) that sum to one, residuals r_k = x - c_k give

        y = sum_k a_k c_k + g(sum_k a_k r_k),    sum_k a_k r_k = x - sum_k a_k c_k,

    so that with g = identity y = x and the module does nothing. What makes it a bottleneck is g: a 1 x 1
    convolution, normalised, and a ReLU that lets only part of a residual pass. The paper speaks of residuals only;
    that the centres are added back is our reading, and without it y = g(sum_k a_k r_k).

    Args:
        width: D.
        centres: K.
        add_back: whether the centres are added back.
    """

    def __init__(self, width: int, centres: int, add_back: bool = True) -> None:
        super().__init__()
        self.add_back = add_back
        self.centres_KD = nn.Parameter(torch.randn(centres, width) * width**-0.5)
        self.assign = nn.Conv2d(width, centres, 1)
        self.mix = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """What of the residuals passes, with the centres or alone."""
        weight_BKhw = self.assign(x_BDhw).softmax(1)
        central = (self.centres_KD.T @ weight_BKhw.flatten(2)).reshape(x_BDhw.shape)
        passed: Tensor = self.mix(x_BDhw - central)
        return central + passed if self.add_back else passed

    @torch.no_grad()
    def initialise(self, rows_ND: Tensor, seed: int) -> None:
        """Centres by k-means on features of normal images, assignments by distance to them.

        a_k ~ exp(-alpha |x - c_k|^2) is a linear layer: its |x|^2 is the same for all k. ``alpha`` makes the
        nearest centre of a typical vector weigh a hundred times more than the second nearest.
        """
        count = len(self.centres_KD)
        centres = k_means(rows_ND, min(count, len(rows_ND)), seed)
        if len(centres) < count:
            # Fewer vectors than centres: the others stay where chance put them.
            centres = torch.cat([centres, self.centres_KD[len(centres) :]])
        nearest = torch.cdist(rows_ND, centres).square().topk(min(2, count), dim=1, largest=False).values
        gap = (nearest[:, -1] - nearest[:, 0]).mean().clamp_min(1e-6)
        alpha = math.log(_ONE_TO_NEXT) / gap
        self.centres_KD.copy_(centres)
        self.assign.weight.copy_((2 * alpha * centres)[:, :, None, None])
        assert self.assign.bias is not None
        self.assign.bias.copy_(-alpha * centres.square().sum(1))
