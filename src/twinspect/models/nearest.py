"""How far an image is from any normal image: what finds the unfamiliar where no two normal images are alike.

Shapes: B images, N normal images kept, F width of the teacher's embedding, R kept directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_RIDGE = 5.0  # mean variances; 1 to 20 are within a point of each other
_NEIGHBOURS = 5  # normal images that an image is compared with
_TWINS = 2  # normal images that a normal image is compared with, to learn how densely they lie around it
_COSINE_SHARE = 2.0 / 3.0  # of the plain distance in the answer; the rest is the whitened one's


class DensityDistance(nn.Module):
    """Log distance to the nearest normal images, in one space, corrected by how densely they lie there.

    Where kinds of images differ in variety, a distance that is large among one kind is common in another. Half of
    that (the square root) is corrected: the full ratio would excuse whatever lies near an odd normal image.
    """

    bank_NR: Tensor
    rest_N: Tensor
    apart_N: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank_NR", torch.zeros(1, 1))
        self.register_buffer("rest_N", torch.zeros(1))
        self.register_buffer("apart_N", torch.ones(1))

    def forward(self, point_BR: Tensor, rest_B: Tensor) -> Tensor:
        """From coordinates and the squared length of what they leave out, to log distance (B)."""
        away_BM, nearest_BM = self._nearest(point_BR, rest_B, _NEIGHBOURS)
        around_B = self.apart_N[nearest_BM].mean(1)
        distance: Tensor = away_BM.mean(1).log() - 0.5 * around_B.log()
        return distance

    def fit(self, point_NR: Tensor, rest_N: Tensor) -> None:
        """Keep the coordinates of normal images, and each one's distance from its own nearest."""
        self.bank_NR, self.rest_N = point_NR, rest_N
        away_NM, _ = self._nearest(point_NR, rest_N, _TWINS + 1)
        self.apart_N = away_NM[:, 1:].mean(1) if len(point_NR) > 1 else torch.ones_like(rest_N)

    def _nearest(self, point_BR: Tensor, rest_B: Tensor, count: int) -> tuple[Tensor, Tensor]:
        # As a norm, which needs no second bank in memory for the squares.
        kept_N = torch.linalg.vector_norm(self.bank_NR, dim=1).square() + self.rest_N
        square_BN = (point_BR.square().sum(1) + rest_B)[:, None] + kept_N
        square_BN = square_BN - 2.0 * point_BR @ self.bank_NR.T
        found = torch.topk(square_BN, min(count, len(self.rest_N)), dim=1, largest=False)
        return found.values.clamp_min(1e-9).sqrt(), found.indices


class NearestNormal(nn.Module):
    """Log distance of the teacher's embedding from the nearest normal images: B x F to B.

    Two distances between directions (unit vectors), as a geometric mean: the plain one (cosine), and one whitened by
    the covariance within the variants of normal images plus a ridge, so that neither the few directions that all of
    them vary in nor the many that hold noise rule it. Neither is the better one everywhere: photographs of places ask
    for the first, of objects for the second. State: two short rows per normal image, ``most`` images at the most.
    """

    mean_F: Tensor
    basis_FR: Tensor
    whiten_RR: Tensor
    ridge: Tensor

    def __init__(self, dims: int, most: int = 2048, most_dims: int = 512) -> None:
        super().__init__()
        self.most, self.most_dims = most, most_dims
        self.register_buffer("mean_F", torch.zeros(dims))
        self.register_buffer("basis_FR", torch.zeros(dims, 1))
        self.register_buffer("whiten_RR", torch.ones(1, 1))
        self.register_buffer("ridge", torch.ones(()))
        self.plain, self.whitened = DensityDistance(), DensityDistance()

    def embed(self, embedding_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates along the kept directions (B x R), and the squared length of what they leave out (B)."""
        centred_BF = nn.functional.normalize(embedding_BF, dim=1) - self.mean_F
        along_BR = centred_BF @ self.basis_FR
        return along_BR, (centred_BF.square().sum(1) - along_BR.square().sum(1)).clamp_min(0.0)

    def forward(self, embedding_BF: Tensor) -> Tensor:
        """Log of the mean distance (B); a higher one is more unusual."""
        along_BR, rest_B = self.embed(embedding_BF)
        plain_B = self.plain(along_BR, rest_B)
        whitened_B = self.whitened(along_BR @ self.whiten_RR, rest_B / self.ridge)
        distance: Tensor = _COSINE_SHARE * plain_B + (1.0 - _COSINE_SHARE) * whitened_B
        return distance

    def fit(self, embedding_NF: Tensor, variant_N: Tensor, seed: int) -> None:
        """Learn the directions and their scatter within variants, and keep (a random choice of) the images."""
        unit = nn.functional.normalize(embedding_NF.double(), dim=1)
        self.mean_F = unit.mean(0).float()
        _, singular, rows = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
        kept = min(self.most_dims, max(1, int((singular > 3e-5 * singular[0]).sum())))
        self.basis_FR = rows[:kept].T.float().contiguous()
        scatter = _within(unit, variant_N)
        variance = scatter.square().sum() / len(unit) / unit.shape[1]
        ridge = (_RIDGE * variance).clamp_min(1e-12)
        along = scatter @ rows[:kept].T
        covariance = along.T @ along / len(unit) + ridge * torch.eye(kept, dtype=torch.float64, device=along.device)
        self.whiten_RR = torch.linalg.inv(torch.linalg.cholesky(covariance)).T.float().contiguous()
        self.ridge = ridge.float()
        order = torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))[: self.most]
        along_NR, rest_N = self.embed(embedding_NF[order.sort().values])
        self.plain.fit(along_NR, rest_N)
        self.whitened.fit(along_NR @ self.whiten_RR, rest_N / self.ridge)


def _within(point_NF: Tensor, variant_N: Tensor) -> Tensor:
    """Every point minus the mean of its variant."""
    centred = point_NF.clone()
    for k in sorted(set(variant_N.tolist())):
        centred[variant_N == k] -= point_NF[variant_N == k].mean(0)
    return centred
