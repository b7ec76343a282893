"""Compact statistics of what is normal, beside the students: whitening, position scale, score tails.

A student's residual (teacher minus student) is not equally surprising in every direction, at every
position, for every kind of scene. These modules learn the scale of *normal* residuals, once, after
training, from normal images only; buffers only, nothing here has a gradient.

Shapes: B images, K scene prototypes, D channels, h w grid positions, n images of a statistic.
Why each part: full covariance makes stochastic texture comparable with smooth surfaces; the position scale
removes the rim that zero padding leaves in every CNN (without it the rim wins every maximum); prototypes
keep one product's spread from excusing another's defects; the mean of a position sees a part that is
whole but elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twinspect.models.layers import from_rows, in_fp16

PLACE_PRIOR = 4.0  # pseudo-images that the mean of a position is drawn to the prototype's own by
_FEWEST = 8  # images that a spread is taken from
_TAIL_QUANTILES = (0.1, 0.25, 0.5, 0.65, 0.8)


class Moments:
    """Running count, sum and outer product of vectors, one set per prototype (float64)."""

    def __init__(self, prototypes: int, dims: int, device: torch.device | None = None) -> None:
        self.count_K = torch.zeros(prototypes, dtype=torch.float64, device=device)
        self.sum_KD = torch.zeros(prototypes, dims, dtype=torch.float64, device=device)
        self.outer_KDD = torch.zeros(prototypes, dims, dims, dtype=torch.float64, device=device)

    def update(self, rows_ND: Tensor, prototype: int) -> None:
        """Add N vectors of one prototype."""
        self.count_K[prototype] += len(rows_ND)
        rows = rows_ND.double()  # in fp32, rows far from zero would lose their small variance
        self.sum_KD[prototype] += rows.sum(0)
        self.outer_KDD[prototype] += rows.T @ rows

    def mean_and_covariance(self, prior: float) -> tuple[Tensor, Tensor]:
        """Per prototype; covariances are drawn to the pooled one by ``prior`` pseudo-vectors."""
        count = self.count_K.clamp_min(1.0)
        mean_KD = self.sum_KD / count[:, None]
        centred_KDD = self.outer_KDD - count[:, None, None] * mean_KD[:, :, None] * mean_KD[:, None, :]
        return mean_KD, drawn_to_pooled(centred_KDD, count, prior)


class PlaceMoments:
    """Running sums of rows at every position and their outer products, one set per prototype.

    An image is compared with the mean of its own position: what stands there on a product that is always placed
    alike is known better than what stands anywhere on it. Outer products are kept in float64, as rows far from zero
    would lose their small variance; sums of positions in float32, as there are millions of them.
    """

    def __init__(self, prototypes: int, positions: int, dims: int, device: torch.device | None = None) -> None:
        self.images_K = torch.zeros(prototypes, dtype=torch.float64, device=device)
        self.origin_D: Tensor | None = None  # any point near the rows: sums of differences from it keep their digits
        self.sum_KND = torch.zeros(prototypes, positions, dims, device=device)
        self.outer_KDD = torch.zeros(prototypes, dims, dims, dtype=torch.float64, device=device)

    def update(self, rows_ND: Tensor, prototype: int) -> None:
        """Add the rows of one image of a prototype, in the order of positions."""
        if self.origin_D is None:
            self.origin_D = rows_ND.mean(0)
        rows_ND = rows_ND - self.origin_D
        self.images_K[prototype] += 1
        self.sum_KND[prototype] += rows_ND
        rows = rows_ND.double()
        self.outer_KDD[prototype] += rows.T @ rows

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean of every prototype (K x D), and what the mean of every position differs from it by (K x N x D).

        The mean of a position is drawn to the prototype's own by a few pseudo-images.
        """
        assert self.origin_D is not None
        images = self.images_K.float()[:, None, None]
        own = self.sum_KND.mean(1, keepdim=True) / images.clamp_min(1.0)
        away = (self.sum_KND - images * own) / (images + PLACE_PRIOR)
        return self.origin_D + own[:, 0], away

    def covariance(self, mean_KD: Tensor, away_KND: Tensor, prior: float) -> Tensor:
        """K x D x D around given means, drawn to the pooled one by ``prior`` pseudo-vectors."""
        origin_D, scattered = self.origin_D, torch.zeros_like(self.outer_KDD)
        assert origin_D is not None
        for k, images in enumerate(self.images_K.tolist()):
            total = self.sum_KND[k].double()
            mean = (mean_KD[k] - origin_D).double() + away_KND[k].double()
            cross = total.T @ mean
            around = self.outer_KDD[k] - cross - cross.T + images * (mean.T @ mean)
            scattered[k] = around * left_out(images) ** 2
        return drawn_to_pooled(scattered, (self.images_K * away_KND.shape[1]).clamp_min(1.0), prior)


def drawn_to_pooled(scattered_KDD: Tensor, count_K: Tensor, prior: float) -> Tensor:
    """Covariances (K x D x D) from sums of outer products, drawn to the pooled one by ``prior`` pseudo-vectors."""
    pooled_DD = scattered_KDD.sum(0) / count_K.sum()
    weight = (count_K / (count_K + prior))[:, None, None]
    return weight * scattered_KDD / count_K[:, None, None] + (1 - weight) * pooled_DD


def left_out(images: float) -> float:
    """How much longer a row's distance from the mean of its position is once its own image is left out of that mean.

    Exact for one of ``images`` training images and means as `PlaceMoments.means` draws them.
    """
    return (images + PLACE_PRIOR) / (images + PLACE_PRIOR - 1.0)


def whitening(covariance_KDD: Tensor, ridge: float) -> Tensor:
    """K x D x D maps W with W C W^T = I, after adding ``ridge`` times the mean variance to the diagonal."""
    dims = covariance_KDD.shape[-1]
    scale = covariance_KDD.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(dims, dtype=covariance_KDD.dtype, device=covariance_KDD.device)
    lower = torch.linalg.cholesky(covariance_KDD + (ridge * scale)[:, None, None] * eye)
    whiten: Tensor = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return whiten


class LengthMap(nn.Module):
    """Lengths of whitened residuals at every position, as spreads above the normal level there.

    Squared lengths are averaged over windows of several sides (in positions), each with a scale of its own, and the
    most unusual counts: a thin scratch is seen by the small window, a patch of another texture by the large one.
    Lengths come in the order of `layers.to_rows` in blocks of side ``factor``.
    """

    level_KWhw: Tensor
    spread_KWhw: Tensor

    def __init__(self, windows: tuple[int, ...], factor: int, side: int) -> None:
        super().__init__()
        self.windows, self.factor = windows, factor
        self.register_buffer("level_KWhw", torch.zeros(1, len(windows), side, side))
        self.register_buffer("spread_KWhw", torch.ones(1, len(windows), side, side))

    def in_windows(self, length_BN: Tensor) -> Tensor:
        """Root mean square length in every window: B x W x h x w."""
        if self.windows == (1,):
            return from_rows(length_BN, self.factor)[:, None]
        square = from_rows(length_BN.square(), self.factor)[:, None]
        return torch.cat([_pooled(square, window) for window in self.windows], 1).sqrt()

    def z_map(self, length_BWhw: Tensor, prototype_B: Tensor) -> Tensor:
        """How many normal spreads the length at a position lies above its normal level: B x h x w."""
        level, spread = (one.index_select(0, prototype_B) for one in (self.level_KWhw, self.spread_KWhw))
        return ((length_BWhw - level) / spread).amax(1)


class ResidualMap(LengthMap):
    """Whitened, position-scaled length of residual vectors: rows B x N x D (N = h * w) to a z-map B x h x w.

    Residuals of more than ``most_dims`` channels are first projected by a fixed random rotation, which keeps
    the state small for a ViT (D = 768) and changes distances little. What is whitened is what a residual differs by
    from the mean of its position.
    """

    mean_KD: Tensor
    away_KND: Tensor
    whiten_KDD: Tensor
    rotate_DR: Tensor

    def __init__(
        self,
        dims: int,
        side: int,
        windows: tuple[int, ...] = (1,),
        factor: int = 1,
        seed: int = 0,
        most_dims: int = 512,
        ridge: float = 3e-3,
    ) -> None:
        super().__init__(windows, factor, side)
        self.ridge, self.dims = ridge, min(dims, most_dims)
        self.positions = side * side
        self.register_buffer("rotate_DR", _rotation(dims, most_dims, seed))
        self.register_buffer("mean_KD", torch.zeros(1, self.dims))
        # By far the most of the state, and small differences: fp16 costs a thousandth of a spread.
        self.register_buffer("away_KND", torch.zeros(1, self.positions, self.dims, dtype=torch.float16))
        self.register_buffer("whiten_KDD", torch.eye(self.dims)[None])

    def rows(self, residual_BND: Tensor) -> Tensor:
        """B x N x D to B x N x R rows, rotated where the width asks for it."""
        return residual_BND @ self.rotate_DR if self.rotate_DR.numel() else residual_BND

    def length(self, residual_BND: Tensor, prototype_B: Tensor) -> Tensor:
        """Root mean square of the whitened residual in every window: B x W x h x w, near 1 on normal images."""
        rows = self.rows(residual_BND)
        if len(self.mean_KD) == 1:  # one matrix for all images: one product of all rows
            differing = rows - (self.away_KND.float() + self.mean_KD[:, None])
            white = nn.functional.linear(differing.flatten(0, 1), self.whiten_KDD[0]).reshape(-1, *rows.shape[1:])
        else:
            away_BND, mean_BD = (one.index_select(0, prototype_B) for one in (self.away_KND, self.mean_KD))
            differing = rows - (away_BND.float() + mean_BD[:, None])
            white = differing @ self.whiten_KDD.index_select(0, prototype_B).transpose(1, 2)
        return self.in_windows(torch.linalg.vector_norm(white, dim=2) / self.dims**0.5)

    def forward(self, residual_BND: Tensor, prototype_B: Tensor) -> Tensor:
        """How many normal spreads the residual at a position lies above its normal level: B x h x w."""
        return self.z_map(self.length(residual_BND, prototype_B), prototype_B)

    def set_moments(self, moments: PlaceMoments) -> None:
        """Take means and covariances gathered over the training images."""
        self.mean_KD, away_KND = moments.means()
        self.away_KND = in_fp16(away_KND)
        covariance = moments.covariance(self.mean_KD, self.away_KND, prior=2.0 * self.dims)
        self.whiten_KDD = whitening(covariance, self.ridge).float()

    def set_scale(self, scale: PositionScale) -> None:
        """Take the normal level and spread of the length at every position."""
        self.level_KWhw, self.spread_KWhw = scale.level_and_spread()


def _rotation(dims: int, most_dims: int, seed: int) -> Tensor:
    """Fixed random orthonormal columns, dims x most_dims; empty where no reduction is needed."""
    if dims <= most_dims:
        return torch.zeros(0)
    noise = torch.randn(dims, most_dims, generator=torch.Generator().manual_seed(seed))
    columns: Tensor = torch.linalg.qr(noise).Q
    return columns


class PositionScale:
    """Running mean and spread of W maps at every position, one set per prototype."""

    def __init__(self, prototypes: int, windows: int, side: int, device: torch.device | None = None) -> None:
        self.count_K = torch.zeros(prototypes, dtype=torch.float64, device=device)
        self.sum_KWhw = torch.zeros(prototypes, windows, side, side, dtype=torch.float64, device=device)
        self.square_KWhw = torch.zeros_like(self.sum_KWhw)

    def update(self, map_BWhw: Tensor, prototype_B: Tensor) -> None:
        """Add the maps of a batch."""
        for one, k in zip(map_BWhw.double(), prototype_B.tolist(), strict=True):
            self.count_K[k] += 1
            self.sum_KWhw[k] += one
            self.square_KWhw[k] += one.square()

    def level_and_spread(self, prior: float = 8.0, floor: float = 0.1) -> tuple[Tensor, Tensor]:
        """K x W x h x w each, shrunk to the prototype's own average scene by ``prior`` pseudo-images.

        Neighbouring positions are pooled (3 x 3), as a handful of images says little about one position.
        """
        count = self.count_K.clamp_min(1.0)[:, None, None, None]
        mean = self.sum_KWhw / count
        variance = (self.square_KWhw / count - mean.square()).clamp_min(0.0)
        mean, variance = _pooled(mean, 3), _pooled(variance, 3)
        typical = variance.mean((2, 3), keepdim=True)
        variance = (count * variance + prior * typical) / (count + prior)
        spread = variance.sqrt() + floor * typical.sqrt() + 1e-6
        return mean.float(), spread.float()


def _pooled(map_BDhw: Tensor, window: int) -> Tensor:
    """Mean over an odd window around every position; the rim is repeated outwards."""
    if window == 1:
        return map_BDhw
    padded = nn.functional.pad(map_BDhw, (window // 2,) * 4, mode="replicate")
    return nn.functional.avg_pool2d(padded, window, 1)


class TokenDistance(nn.Module):
    """Mahalanobis length of a vector within its prototype: B x E to B."""

    mean_KE: Tensor
    whiten_KEE: Tensor
    scale_E: Tensor
    rotate_EF: Tensor

    def __init__(self, dims: int, seed: int = 0, most_dims: int = 768) -> None:
        super().__init__()
        kept = min(dims, most_dims)
        self.register_buffer("rotate_EF", _rotation(dims, most_dims, seed))
        self.register_buffer("scale_E", torch.ones(dims))
        self.register_buffer("mean_KE", torch.zeros(1, kept))
        self.register_buffer("whiten_KEE", torch.eye(kept)[None])

    def scaled(self, vector_BE: Tensor) -> Tensor:
        """Standardised, and rotated down where the width asks for it: B x F."""
        scaled = vector_BE / self.scale_E
        return scaled @ self.rotate_EF if self.rotate_EF.numel() else scaled

    def forward(self, vector_BE: Tensor, prototype_B: Tensor) -> Tensor:
        """Root mean square of the whitened vector (B), near 1 on normal images."""
        centred = self.scaled(vector_BE) - self.mean_KE.index_select(0, prototype_B)
        white = (self.whiten_KEE.index_select(0, prototype_B) @ centred[:, :, None])[:, :, 0]
        length: Tensor = torch.linalg.vector_norm(white, dim=1) / white.shape[1] ** 0.5
        return length

    def fit(self, vector_NE: Tensor, prototype_N: Tensor, prototypes: int) -> None:
        """Means and shrunk covariances of normal vectors."""
        self.scale_E = vector_NE.std(0).clamp_min(1e-6)
        scaled = self.scaled(vector_NE)
        moments = Moments(prototypes, scaled.shape[1], scaled.device)
        for k in range(prototypes):
            moments.update(scaled[prototype_N == k], k)
        mean, covariance = moments.mean_and_covariance(prior=100.0)
        shrunk = shrink_to_identity(covariance, moments.count_K.sum())
        self.mean_KE, self.whiten_KEE = mean.float(), whitening(shrunk, 1e-3).float()


def evenness(distance_N: Tensor, prototype_N: Tensor, prototypes: int) -> Tensor:
    """How evenly far normal images lie from the centre of their kind, 0 to 1 (K).

    In many directions the draws of one Gaussian all lie about as far from its mean: the same parts in any order, or a
    texture. Then its distance says all, however little images repeat each other. Photographs of many things, some
    near and some far, are no such draws. Measured by the spread of the log distance of held-out images: arrangements
    and textures stay below 0.08, photographs above 0.12; half at 0.09.
    """
    even = torch.zeros(prototypes, device=distance_N.device)
    for k in range(prototypes):
        own = distance_N[prototype_N == k].clamp_min(1e-12).log()
        if len(own) >= _FEWEST:
            even[k] = 1.0 / (1.0 + (own.std() / 0.09) ** 8)
    return even


def shrink_to_identity(covariance_KDD: Tensor, count: Tensor) -> Tensor:
    """Oracle-approximating shrinkage towards a scaled identity (Chen et al., 2010), n = ``count`` vectors."""
    dims = covariance_KDD.shape[-1]
    trace = covariance_KDD.diagonal(dim1=1, dim2=2).sum(1)
    square = covariance_KDD.square().sum((1, 2))
    top = (1 - 2 / dims) * square + trace.square()
    rho = (top / ((count + 1 - 2 / dims) * (square - trace.square() / dims)).clamp_min(1e-12)).clamp(0.0, 1.0)
    eye = torch.eye(dims, dtype=covariance_KDD.dtype, device=covariance_KDD.device)
    target = (trace / dims)[:, None, None] * eye
    return (1 - rho)[:, None, None] * covariance_KDD + rho[:, None, None] * target


class Surprise(nn.Module):
    """-log(1 - p) of a raw score, p = the probability that a normal image of this scene scores lower.

    Scores are standardised per prototype (shrunk to all held-out images), then mapped by a piecewise
    linear curve: empirical up to the 0.8 quantile, an exponential tail beyond it, so that it never
    saturates and two clear anomalies keep their order. Surprises of normal images are exponential with mean 1;
    a rate per prototype makes them so for each, as one product's tail may be much heavier than another's.
    Fitted on held-out normal images only.
    """

    centre_K: Tensor
    width_K: Tensor
    rate_K: Tensor
    knots_M: Tensor
    bends_M: Tensor
    start: Tensor

    def __init__(self) -> None:
        super().__init__()
        knots = len(_TAIL_QUANTILES)
        for name, size in (("centre_K", 1), ("knots_M", knots), ("bends_M", knots), ("start", 1)):
            self.register_buffer(name, torch.zeros(size))
        for name in ("width_K", "rate_K"):
            self.register_buffer(name, torch.ones(1))

    def forward(self, score_B: Tensor, prototype_B: Tensor) -> Tensor:
        """Surprise in nats (B); strictly rising with the raw score."""
        return surprises([self], score_B[:, None], prototype_B)[:, 0]

    def reset(self, prototypes: int) -> None:
        """Forget everything; scores pass unscaled until `fit`."""
        self.centre_K = torch.zeros(prototypes, device=self.centre_K.device)
        self.width_K, self.rate_K = (torch.ones_like(self.centre_K) for _ in range(2))

    def fit(self, score_N: Tensor, prototype_N: Tensor, prototypes: int, prior: float = 5.0) -> None:
        """Learn centre, width and rate per prototype, and the common curve, from held-out normal scores.

        What a prototype's few images say is drawn to what all say by ``prior`` pseudo-images.
        """
        score = score_N.double()
        centre, width = score.median(), (score - score.median()).abs().mean().clamp_min(1e-9)
        centres, widths = [], []
        for k in range(prototypes):
            own = score[prototype_N == k]
            mine = own.median() if len(own) else centre
            spread = (own - mine).abs().mean() if len(own) else width
            weight = len(own) / (len(own) + prior)
            centres.append(weight * mine + (1 - weight) * centre)
            widths.append((weight * spread + (1 - weight) * width).clamp_min(1e-9))
        self.centre_K, self.width_K = torch.stack(centres).float(), torch.stack(widths).float()
        z = (score - self.centre_K[prototype_N].double()) / self.width_K[prototype_N].double()
        self._fit_curve(z)
        self.rate_K = torch.ones_like(self.centre_K)
        said = self(score_N.float(), prototype_N).clamp_min(0.0)
        counts = torch.bincount(prototype_N, minlength=prototypes)
        sums = torch.bincount(prototype_N, said.double(), minlength=prototypes)
        self.rate_K = ((counts + prior) / (sums + prior)).float()

    def _fit_curve(self, z_N: Tensor) -> None:
        levels = torch.tensor(_TAIL_QUANTILES, dtype=torch.float64, device=z_N.device)
        knots = torch.quantile(z_N, levels)
        knots = (
            knots + torch.arange(len(knots), dtype=torch.float64, device=z_N.device) * 1e-6
        )  # strictly rising with ties
        heights = -torch.log1p(-levels)
        excess = (z_N[z_N > knots[-1]] - knots[-1]).mean() if (z_N > knots[-1]).any() else z_N.std()
        tail = 1.0 / excess.clamp_min(1e-3)
        slopes = torch.cat([(heights[1:] - heights[:-1]) / (knots[1:] - knots[:-1]), tail[None]])
        self.knots_M, self.start = knots.float(), heights[:1].float()
        self.bends_M = torch.cat([slopes[:1], slopes[1:] - slopes[:-1]]).float()


def surprises(curves: Sequence[Surprise], score_BR: Tensor, prototype_B: Tensor) -> Tensor:
    """Surprise in nats of R readings (B x R), each by its own curve, all at once."""
    centre_BR, width_BR, rate_BR = (
        torch.stack(columns, 1).index_select(0, prototype_B)
        for columns in zip(*((c.centre_K, c.width_K, c.rate_K) for c in curves), strict=True)
    )
    knots_MR, bends_MR = torch.stack([c.knots_M for c in curves], 1), torch.stack([c.bends_M for c in curves], 1)
    start_R = torch.cat([c.start for c in curves])
    # Beyond anything real; without the limit, copies of one image would overflow.
    z_BR = ((score_BR - centre_BR) / width_BR).clamp(-1e12, 1e12)
    # Knots not last: OpenVINO 2026.4 sums five values of a last axis wrongly where other axes are short.
    bent_BR = start_R + ((z_BR[:, None] - knots_MR).clamp_min(0.0) * bends_MR).sum(1)
    # Below the first knot the curve goes on with a small slope, so that no two scores tie.
    return rate_BR * (bent_BR - 0.05 * (knots_MR[0] - z_BR).clamp_min(0.0))
