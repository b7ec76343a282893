"""Four classical detectors on a frozen teacher's features, to compare with; tensors in, distances out.

- ``PatchMemory``: distance of every patch to its nearest in a memory of normal patches (the idea of PatchCore).
- ``PositionGaussian``: Mahalanobis distance of every patch to a Gaussian of its position (the idea of PaDiM).
- ``nearest_distance``: cosine distance of pooled embeddings to the nearest normal ones.
- ``gaussian_distance``: Mahalanobis distance of pooled embeddings, one Gaussian or one mean per class.

B images, N normal images, P positions (h x w), D channels, M patches of a memory, F channels of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from sklearn.covariance import OAS
from torch import Tensor
from torch.nn import functional

Batches = Callable[[], Iterable[Tensor]]  # every call goes through all normal images, B x P x D at a time
READINGS = ("max", "max of 3 x 3 means", "top 1 %", "mean")


class PatchMemory:
    """A subset of the normal patches, chosen at random or greedily for coverage.

    Args:
        size: M.
        candidates: random patches that a greedy choice is made from.
        greedy: k-centre choice (each next patch is the one furthest from those chosen), else a random one.
        scaled: divide every channel by its spread on normal patches first.
        seed: of the random parts.
    """

    def __init__(self, size: int, candidates: int, greedy: bool, scaled: bool = False, seed: int = 0) -> None:
        self.size, self.candidates, self.greedy, self.scaled = size, candidates, greedy, scaled
        self.random = torch.Generator().manual_seed(seed)

    def fit(self, batches: Batches, images: int) -> PatchMemory:
        """Gather as many random patches of each of the N ``images``, then choose."""
        share, found = math.ceil(self.candidates / images), []
        for patches_BPD in batches():
            for patches_PD in patches_BPD:
                found.append(patches_PD[torch.randperm(len(patches_PD), generator=self.random)[:share]])
        pool_ND = torch.cat(found)
        self.scale_D = pool_ND.std(0).clamp_min(1e-6) if self.scaled else torch.ones(pool_ND.shape[1])
        pool_ND = pool_ND / self.scale_D
        choose = greedy_subset if self.greedy else random_subset
        self.memory_MD = pool_ND[choose(pool_ND, self.size, self.random)]
        return self

    def distance(self, patches_BPD: Tensor) -> Tensor:
        """Euclidean distance to the nearest patch of the memory: B x P."""
        rows = (patches_BPD / self.scale_D).flatten(0, 1)
        length_M = self.memory_MD.square().sum(1)
        # |x|^2 is the same for every patch of the memory and joins after the minimum; blocks stay in the CPU's cache.
        least = [torch.addmm(length_M, part, self.memory_MD.T, alpha=-2.0).amin(1) for part in rows.split(1024)]
        return (torch.cat(least) + rows.square().sum(1)).clamp_min(0.0).sqrt().reshape(patches_BPD.shape[:2])


def random_subset(points_ND: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Indices of ``count`` points, or of all."""
    return torch.randperm(len(points_ND), generator=random)[:count]


def greedy_subset(points_ND: Tensor, count: int, random: torch.Generator, dims: int = 64) -> Tensor:
    """Indices of a k-centre choice, made in a random projection to ``dims`` directions."""
    count, width = min(count, len(points_ND)), points_ND.shape[1]
    if width > dims:
        points_ND = points_ND @ torch.randn(width, dims, generator=random) / dims**0.5
    square_N = points_ND.square().sum(1)
    chosen = [int(torch.randint(len(points_ND), (1,), generator=random))]
    least_N = torch.full_like(square_N, torch.inf)
    while len(chosen) < count:
        last = chosen[-1]
        # Smallest squared distance to any chosen point.
        apart_N = torch.addmv(square_N + square_N[last], points_ND, points_ND[last], alpha=-2.0)
        torch.minimum(least_N, apart_N, out=least_N)
        least_N[last] = -torch.inf  # rounding must not choose a point twice
        chosen.append(int(least_N.argmax()))
    return torch.tensor(chosen)


class PositionGaussian:
    """Mean and covariance of normal patches at every position, in a random choice of channels.

    Args:
        dims: channels that are kept; the covariances take P x dims^2 numbers.
        ridge: added to the diagonal, in mean variances.
        seed: of the choice of channels.
    """

    def __init__(self, dims: int, ridge: float = 0.01, seed: int = 0) -> None:
        self.dims, self.ridge, self.random = dims, ridge, torch.Generator().manual_seed(seed)

    def fit(self, batches: Batches, images: int) -> PositionGaussian:
        """Two passes over the N ``images``: means, then covariances around them."""
        width = next(iter(batches())).shape[2]
        self.kept = torch.randperm(width, generator=self.random)[: self.dims].sort().values
        self.mean_PD = torch.stack([part[:, :, self.kept].sum(0) for part in batches()]).sum(0) / images
        positions, dims = self.mean_PD.shape
        covariance_PDD = torch.zeros(positions, dims, dims)
        for patches_BPD in batches():
            centred_PBD = self._centred(patches_BPD)
            covariance_PDD.baddbmm_(centred_PBD.transpose(1, 2), centred_PBD, alpha=1 / max(1, images - 1))
        spread = covariance_PDD.diagonal(dim1=1, dim2=2)
        spread += self.ridge * spread.mean().clamp_min(1e-12)
        lower_PDD = torch.linalg.cholesky(covariance_PDD)
        eye = torch.eye(dims).expand_as(lower_PDD)
        self.whiten_PDD = torch.linalg.solve_triangular(lower_PDD, eye, upper=False)
        return self

    def distance(self, patches_BPD: Tensor) -> Tensor:
        """Mahalanobis distance at every position: B x P."""
        white_PBD = self._centred(patches_BPD) @ self.whiten_PDD.transpose(1, 2)
        return white_PBD.square().sum(2).sqrt().T

    def _centred(self, patches_BPD: Tensor) -> Tensor:
        return (patches_BPD[:, :, self.kept] - self.mean_PD).transpose(0, 1)


def nearest_distance(known_NF: Tensor, tested_BF: Tensor, count: int) -> Tensor:
    """Mean cosine distance to the ``count`` nearest known embeddings: B."""
    similar_BN = functional.normalize(tested_BF, dim=1) @ functional.normalize(known_NF, dim=1).T
    return 1 - similar_BN.topk(min(count, len(known_NF)), dim=1).values.mean(1)


def gaussian_distance(known_NF: Tensor, tested_BF: Tensor, classes: Sequence[str] | None = None) -> Tensor:
    """Mahalanobis distance with a shrunk covariance: B.

    Args:
        known_NF: normal embeddings.
        tested_BF: embeddings to judge.
        classes: of the normal ones; then every class has its own mean, all share one covariance, and the nearest
            class counts.
    """
    known, tested = known_NF.double(), tested_BF.double()
    names = classes if classes is not None else [""] * len(known)
    owners = {name: [i for i, own in enumerate(names) if own == name] for name in sorted(set(names))}
    means = {name: known[at].mean(0) for name, at in owners.items()}
    centred = torch.cat([known[at] - means[name] for name, at in owners.items()])
    shrunk = torch.from_numpy(OAS(assume_centered=True).fit(centred.numpy()).covariance_)
    shrunk += 1e-6 * shrunk.diagonal().mean().clamp_min(1e-12) * torch.eye(len(shrunk), dtype=shrunk.dtype)
    lower = torch.linalg.cholesky(shrunk)
    whiten = [torch.linalg.solve_triangular(lower, (tested - mean).T, upper=False) for mean in means.values()]
    return torch.stack([white.square().sum(0).sqrt() for white in whiten]).amin(0).float()


def image_scores(map_Bhw: Tensor) -> dict[str, Tensor]:
    """Every way of ``READINGS`` to make one score of a map: B each."""
    flat = map_Bhw.flatten(1)
    top = max(1, flat.shape[1] // 100)
    smooth = functional.avg_pool2d(map_Bhw[:, None], 3, 1, 1, count_include_pad=False)
    values = (flat.amax(1), smooth.flatten(1).amax(1), flat.topk(top, dim=1).values.mean(1), flat.mean(1))
    return dict(zip(READINGS, values, strict=True))
