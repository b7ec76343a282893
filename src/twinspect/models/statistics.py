"""Statistics of what is normal, learnt in closed form from good images only; buffers, nothing here has a gradient.

* `PositionGaussian`: Mahalanobis distance of patch features from the mean of good images at the same position.
* `TokenGaussian`: Mahalanobis distance of an image's global tokens from those of good images.
* `NearestImages`: cosine distance of an image's embedding from the nearest good images.
* `Standardiser`: readings in standard deviations above their mean on good images.

Shapes: B images, N positions of a square grid (h w), D channels, E width of tokens, F of the embedding, R kept
directions, K clusters (see `models.clusters`), n good images.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.models.layers import in_fp16

PLACE_PRIOR = 4.0  # images that the mean of a position is shrunk towards its cluster's mean by
SPREAD_PRIOR = 8.0  # images that the variance of the distance at a position is shrunk towards its average by
RIDGE = 3e-3  # added to a correlation matrix, so that directions without variance do not rule
FOLDS = 5  # that good images are parted in, each measured by statistics of the others
NEIGHBOURS = 5  # good images that an image is compared with
MOST_CHANNELS, MOST_DIRECTIONS, MOST_BANK = 512, 192, 2048  # limits of size, for wide teachers and large sets
_STEPS = 127.0  # of int8


class PositionGaussian(nn.Module):
    """Mahalanobis distance of patch features from the mean of good images at the same position.

    Every cluster has a mean for every position, and a covariance over all positions. Means of positions are kept as
    int8 multiples of a step per channel. More than ``MOST_CHANNELS`` channels are first rotated at random to that
    many, which changes distances little. ``side`` is that of the grid. ``window`` is the side, odd, of the windows
    that squared distances are averaged over.
    """

    rotate_DR: Tensor
    centre_KD: Tensor
    place_KND: Tensor
    step_KD: Tensor
    whiten_KDD: Tensor
    level_Khw: Tensor  # mean of the distance on good images, which `training.normal` measures
    spread_Khw: Tensor  # its standard deviation

    def __init__(self, dims: int, side: int, window: int = 1) -> None:
        super().__init__()
        rotate_DR = torch.zeros(0)
        if dims > MOST_CHANNELS:
            noise = torch.randn(dims, MOST_CHANNELS, generator=torch.Generator().manual_seed(0))
            rotate_DR = torch.linalg.qr(noise).Q
        self.side, self.window, self.dims = side, window, min(dims, MOST_CHANNELS)
        self.register_buffer("rotate_DR", rotate_DR)
        self.register_buffer("centre_KD", torch.zeros(1, self.dims))
        self.register_buffer("place_KND", torch.zeros(1, side * side, self.dims, dtype=torch.int8))
        self.register_buffer("step_KD", torch.ones(1, self.dims))
        self.register_buffer("whiten_KDD", torch.eye(self.dims)[None].half())
        self.register_buffer("level_Khw", torch.zeros(1, side, side))
        self.register_buffer("spread_Khw", torch.ones(1, side, side))

    def rows(self, features_BND: Tensor) -> Tensor:
        """Features with as many channels as the statistics have."""
        return features_BND @ self.rotate_DR if self.rotate_DR.numel() else features_BND

    def means(self, cluster_B: Tensor | None = None) -> Tensor:
        """Mean of every position, K x N x D: of every cluster, or of the cluster of each image (B x N x D)."""
        centre, place, step = self.centre_KD, self.place_KND, self.step_KD
        if cluster_B is not None:  # before they are unpacked: an exported graph then keeps them as int8
            centre, place, step = (t.index_select(0, cluster_B) for t in (centre, place, step))
        return centre[:, None] + place.float() * step[:, None]

    def forward(self, rows_BND: Tensor, cluster_B: Tensor) -> Tensor:
        """Root mean square of the whitened difference from the mean of the position: B x h x w, near 1 if good."""
        mean = self.means(cluster_B if len(self.centre_KD) > 1 else None)
        return self.distance(rows_BND - mean, self.whiten_KDD, cluster_B)

    def distance(self, difference_BND: Tensor, whiten_KDD: Tensor, cluster_B: Tensor) -> Tensor:
        """The same for differences from the mean, by other matrices."""
        if len(whiten_KDD) == 1:  # one product of all rows
            white = (difference_BND.flatten(0, 1) @ whiten_KDD[0].float()).reshape(difference_BND.shape)
        else:
            white = difference_BND @ whiten_KDD.index_select(0, cluster_B).float()
        square_Bhw = (white.square().sum(2) / self.dims).reshape(-1, self.side, self.side)
        return average(square_Bhw, self.window).sqrt()

    def scaled(self, distance_Bhw: Tensor, cluster_B: Tensor) -> Tensor:
        """Distances in standard deviations above their level at the same position on good images."""
        level, spread = (t_Khw.index_select(0, cluster_B) for t_Khw in (self.level_Khw, self.spread_Khw))
        return (distance_Bhw - level) / spread

    def set_means(self, sum_KND: Tensor, images_K: Tensor) -> None:
        """Take the means from sums over good images; those of positions are shrunk towards the cluster's."""
        images = images_K[:, None, None]
        self.centre_KD = (sum_KND.mean(1) / images_K[:, None]).float()
        away_KND = (sum_KND - images * self.centre_KD[:, None]) / (images + PLACE_PRIOR)
        self.step_KD = (away_KND.abs().amax(1) / _STEPS).clamp_min(1e-12).float()
        self.place_KND = (away_KND / self.step_KD[:, None]).round().to(torch.int8)

    def sums(self, images_K: Tensor) -> Tensor:
        """The sums that `set_means` took these means from: K x N x D."""
        images = images_K[:, None, None]
        away_KND = self.place_KND.float() * self.step_KD[:, None] * (images + PLACE_PRIOR)
        return away_KND + images * self.centre_KD[:, None]


def average(map_Bhw: Tensor, window: int) -> Tensor:
    """Mean over an odd window around every position; the rim is repeated outwards."""
    if window == 1:
        return map_Bhw
    padded = F.pad(map_Bhw[:, None], (window // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, window, 1)[:, 0]


def left_out(images_n: Tensor, copies_n: Tensor) -> Tensor:
    """How much longer a difference from a position's mean is once its own image is left out of that mean (n).

    Exact for one of a cluster's ``images_n`` images, or for ``copies_n`` equal ones, and means as
    `PositionGaussian.set_means` shrinks them.
    """
    return (images_n + PLACE_PRIOR) / (images_n + PLACE_PRIOR - copies_n.minimum(images_n))


def shrinkage(trace: Tensor, square: Tensor, count: Tensor | float, dims: int) -> Tensor:
    """Weight of the identity that a covariance is shrunk by: oracle-approximating shrinkage (Chen et al., 2010).

    ``trace`` is that of the covariance, ``square`` that of its square; it was learnt from ``count`` vectors.
    """
    top = (1 - 2 / dims) * square + trace.square()
    below = (count + 1 - 2 / dims) * (square - trace.square() / dims)
    weight: Tensor = (top / below.clamp_min(1e-12)).clamp(0.0, 1.0)
    return weight


def whitening(covariance_DD: Tensor, count: Tensor | float) -> Tensor:
    """D x D matrix W with x W of identity covariance; the correlations are shrunk first, and get ``RIDGE`` added.

    Without the shrinkage a covariance of few (``count``) vectors is too small along most directions, and images that
    it was not learnt from lie too far away. Standard deviations are at least what keeps W finite in fp16: a ReLU can
    be silent on all good images.
    """
    scale_D = covariance_DD.diagonal().sqrt().clamp_min(RIDGE**-0.5 / torch.finfo(torch.float16).max)
    correlation = covariance_DD / scale_D / scale_D[:, None]
    weight = shrinkage(correlation.trace(), correlation.square().sum(), count, len(scale_D))
    eye = torch.eye(len(scale_D), dtype=correlation.dtype, device=correlation.device)
    lower = torch.linalg.cholesky((1 - weight) * correlation + (weight + RIDGE) * eye)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse.T / scale_D[:, None]


def unwhitened(whiten_DD: Tensor) -> Tensor:
    """The covariance that `whitening` made a matrix of, shrunk as it was, as exactly as fp16 keeps it."""
    inverse = torch.linalg.inv(whiten_DD.double())
    ridged = inverse.T @ inverse
    variance_D = ridged.diagonal() / (1.0 + RIDGE)
    covariance: Tensor = ridged - RIDGE * torch.diag(variance_D)
    return covariance


class TokenGaussian(nn.Module):
    """Mahalanobis distance of global tokens from those of good images: B x E to B.

    Every cluster has a mean and a covariance of standardised tokens, shrunk towards a scaled identity
    (oracle-approximating shrinkage: Chen et al., 2010). Kept are the leading directions; all others count alike.
    """

    centre_KE: Tensor
    scale_KE: Tensor
    basis_KRE: Tensor
    weight_KR: Tensor
    rest_K: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("centre_KE", torch.zeros(1, dims))
        self.register_buffer("scale_KE", torch.ones(1, dims))
        self.register_buffer("basis_KRE", torch.zeros(1, 1, dims).half())
        self.register_buffer("weight_KR", torch.zeros(1, 1))
        self.register_buffer("rest_K", torch.ones(1))

    def forward(self, token_BE: Tensor, cluster_B: Tensor) -> Tensor:
        """Root mean square of the whitened difference from the cluster's mean (B), near 1 on good images."""
        scaled = token_BE - self.centre_KE.index_select(0, cluster_B)
        scaled = scaled / self.scale_KE.index_select(0, cluster_B)
        along = (self.basis_KRE.index_select(0, cluster_B).float() @ scaled[:, :, None])[:, :, 0].square()
        beside = (scaled.square().sum(1) - along.sum(1)).clamp_min(0.0) * self.rest_K.index_select(0, cluster_B)
        inside = (along * self.weight_KR.index_select(0, cluster_B)).sum(1)
        return ((inside + beside) / token_BE.shape[1]).sqrt()

    def fit(self, token_nE: Tensor, cluster_n: Tensor, clusters: int) -> None:
        """Learn from good images of every cluster."""
        self.centre_KE = torch.stack([token_nE[cluster_n == k].mean(0) for k in range(clusters)])
        centred = token_nE - self.centre_KE[cluster_n]
        parts = [shrunk_directions(centred[cluster_n == k]) for k in range(clusters)]
        most = max(len(weight) for _, _, weight, _ in parts)
        scale, basis, weight, rest = zip(*parts, strict=True)
        self.scale_KE, self.rest_K = torch.stack(scale), torch.stack(rest)
        self.basis_KRE = torch.stack([F.pad(rows, (0, 0, 0, most - len(rows))) for rows in basis]).half()
        self.weight_KR = torch.stack([F.pad(row, (0, most - len(row))) for row in weight])


def shrunk_directions(centred_nE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale of every dimension, leading directions (R x E), weight of each squared length along them, of the rest."""
    count, dims = centred_nE.shape
    scale_E = centred_nE.square().mean(0).sqrt().clamp_min(1e-6)
    _, singular, basis = torch.linalg.svd(centred_nE / scale_E, full_matrices=False)
    variance = singular.square() / max(1, count)
    trace = variance.sum()
    rho = shrinkage(trace, variance.square().sum(), count, dims).clamp_min(1e-3)
    kept = min(MOST_DIRECTIONS, len(variance))
    floor = rho * trace / dims
    beside = (1 - rho) * variance[kept:].sum() / max(1, dims - kept)
    tiny = 1e-6  # images without any variance
    return scale_E, basis[:kept], 1 / ((1 - rho) * variance[:kept] + floor + tiny), 1 / (floor + beside + tiny)


def random_folds(count: int, seed: int) -> Tensor:
    """Fold of every image (n), drawn by chance; all of about one size."""
    fold_n = torch.zeros(count, dtype=torch.int64)
    fold_n[torch.randperm(count, generator=torch.Generator().manual_seed(seed))] = torch.arange(count) % FOLDS
    return fold_n


def each_fold(fold_n: Tensor, cluster_n: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Masks of the images of the other folds, to learn from, and of those of the fold (n each), fold by fold.

    A cluster that has no image in another fold is learnt from all of its images.
    """
    for fold in sorted(set(fold_n.tolist())):
        here = fold_n == fold
        yield ~here | ~torch.isin(cluster_n, cluster_n[~here]), here


def cross_fitted_tokens(token_nE: Tensor, cluster_n: Tensor, clusters: int, fold_n: Tensor) -> Tensor:
    """`TokenGaussian` distances (n) of good images, each by statistics that did not see its fold; see `each_fold`."""
    distance = token_nE.new_zeros(len(token_nE))
    gaussian = TokenGaussian(token_nE.shape[1]).to(token_nE.device)
    for away, here in each_fold(fold_n, cluster_n):
        gaussian.fit(token_nE[away], cluster_n[away], clusters)
        distance[here] = gaussian(token_nE[here], cluster_n[here])
    return distance


class NearestImages(nn.Module):
    """Cosine distance of an embedding from the nearest good images: B x F to B; the mean of `NEIGHBOURS`.

    Attributes:
        kept: which of the images given to `fit` are in the bank, in its order; empty in a model that was loaded.
    """

    bank_nF: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("bank_nF", torch.zeros(1, dims).half())
        self.kept: list[int] = []

    def forward(self, embedding_BF: Tensor) -> Tensor:
        """Mean of 1 - cos (B)."""
        return 1.0 - self._similar(embedding_BF).topk(min(NEIGHBOURS, len(self.bank_nF)), dim=1).values.mean(1)

    def first(self, embedding_BF: Tensor) -> Tensor:
        """Place of the most similar image in the bank (B)."""
        return self._similar(embedding_BF).argmax(1)

    def _similar(self, embedding_BF: Tensor) -> Tensor:
        return F.normalize(embedding_BF, dim=1) @ self.bank_nF.float().T

    def fit(self, embedding_nF: Tensor, seed: int, image_n: Tensor | None = None) -> Tensor:
        """Keep the good images, or a random choice of many; each one's distance from the others (n).

        ``image_n`` is the same for an image and its copies, which do not count as others.
        """
        unit = F.normalize(embedding_nF, dim=1)
        kept = torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))[:MOST_BANK].sort().values
        kept = kept.to(unit.device)
        self.bank_nF, self.kept = in_fp16(unit[kept]), kept.tolist()
        similar = unit @ self.bank_nF.float().T
        own_n = torch.arange(len(unit), device=kept.device) if image_n is None else image_n
        other_nk = own_n[:, None] != own_n[kept]
        count = max(1, min(NEIGHBOURS, int(other_nk.sum(1).min())))
        return 1.0 - similar.masked_fill(~other_nk, -1.0).topk(count, dim=1).values.mean(1)


class Standardiser(nn.Module):
    """Readings in standard deviations above their mean on good images of the cluster: B x R to B x R."""

    mean_KR: Tensor
    spread_KR: Tensor

    def __init__(self, readings: int) -> None:
        super().__init__()
        self.register_buffer("mean_KR", torch.zeros(1, readings))
        self.register_buffer("spread_KR", torch.ones(1, readings))

    def forward(self, reading_BR: Tensor, cluster_B: Tensor) -> Tensor:
        """The same readings, mean 0 and standard deviation 1 on good images."""
        return (reading_BR - self.mean_KR.index_select(0, cluster_B)) / self.spread_KR.index_select(0, cluster_B)

    def fit(self, reading_nR: Tensor, cluster_n: Tensor, clusters: int) -> None:
        """Learn from readings of good images that were scored by statistics that did not see them.

        A cluster's variance is shrunk towards that of all clusters by ``SPREAD_PRIOR`` images. It is never below a
        thousandth of the mean: copies of one image would make any other infinitely far.
        """
        reading = reading_nR.double()
        counts = torch.bincount(cluster_n, minlength=clusters).double()[:, None]
        total = torch.zeros(clusters, reading.shape[1], dtype=torch.float64, device=reading.device)
        mean = total.index_add(0, cluster_n, reading) / counts.clamp_min(1.0)
        square = total.index_add(0, cluster_n, (reading - mean[cluster_n]).square())
        pooled = square.sum(0) / counts.sum().clamp_min(1.0)
        spread = ((square + SPREAD_PRIOR * pooled) / (counts + SPREAD_PRIOR)).sqrt()
        self.mean_KR = mean.float()
        self.spread_KR = spread.clamp_min(1e-6).maximum(1e-3 * mean.abs()).float()
