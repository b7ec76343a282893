"""Which kind of image is this? Clusters of good images, in the space of the teacher's global tokens.

A **cluster** is one product, or kind of scene: statistics and calibration are kept for each. Where images carry class
names, every class is a cluster; names are never needed at prediction. Without names, groups of images that a gap
separates are clusters.

An image belongs to the cluster whose centre is nearest after linear discriminant analysis: tokens are whitened by
their covariance within clusters and projected to the directions in which the centres differ.

Shapes: B images, n good images, K clusters, E width of the tokens, P directions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twinspect.models.statistics import each_fold, random_folds, shrunk_directions

# Sums of standard deviations that the means of two groups lie apart by, or they are one. Two products: mostly 7 and
# more; two designs or lots of one product: 3 to 6.5; halves of one Gaussian: 1.3.
GAP = 7.0
SMALLEST, SMALLEST_OF_FEW = 16, 6  # images of a group, and of one where there are few
_DIRECTIONS = (8, 16, 32, 64)  # principal directions that groups are looked for in, by turns
_MOST_COMPARED = 2000  # images of a cluster, to see how far they repeat each other
_STARTS = 4  # of k-means; one start in ten joins two products and cuts a third in halves


class Clusters(nn.Module):
    """Cluster of images by their global tokens.

    Attributes:
        link_K: how far a local deviation tells something, 0 to 1; see `repetition`.
        taken: after `fit` on several names: (class, class that a good image is taken for) to number of images.
    """

    project_EP: Tensor
    centres_KP: Tensor
    link_K: Tensor

    def __init__(self, token_dims: int) -> None:
        super().__init__()
        self.register_buffer("project_EP", torch.zeros(token_dims, 1))
        self.register_buffer("centres_KP", torch.zeros(1, 1))
        self.register_buffer("link_K", torch.ones(1))
        self.taken: Counter[tuple[str, str]] = Counter()

    @property
    def count(self) -> int:
        """Number of clusters."""
        return len(self.link_K)

    def forward(self, token_BE: Tensor) -> Tensor:
        """Cluster of each image (B)."""
        point_BP = token_BE @ self.project_EP
        return (point_BP[:, None] - self.centres_KP[None]).square().sum(-1).argmin(1)

    def fit(
        self, token_nE: Tensor, embedding_nF: Tensor, names: Sequence[str], seed: int, divide: bool = True
    ) -> Tensor:
        """Find the clusters of good images; which one each image belongs to (n).

        With two class names or more, clusters are the classes; else they are found, or (without ``divide``) all
        images are one.
        """
        known = sorted(set(names))
        if len(known) > 1 or not divide:
            cluster_n = torch.tensor([known.index(name) for name in names], device=token_nE.device)
        else:
            cluster_n = groups(token_nE, seed)
        classes = known if len(known) > 1 else known * (int(cluster_n.max()) + 1)
        self._settle(token_nE, embedding_nF, cluster_n, names, classes, seed)
        return cluster_n

    def extend(
        self,
        token_nE: Tensor,
        embedding_nF: Tensor,
        names: Sequence[str],
        before_m: Tensor,
        classes: Sequence[str],
        seed: int,
    ) -> Tensor:
        """Take in further good images; the cluster of every image, known ones first, as in all that is given.

        Images join the nearest cluster of their class. ``classes`` has the class of every cluster, new ones last;
        ``before_m`` are the clusters of the known images.
        """
        fresh: list[int] = []
        for token_E, name in zip(token_nE[len(before_m) :], names[len(before_m) :], strict=True):
            theirs = [k for k, of_cluster in enumerate(classes) if of_cluster == name]
            if len(theirs) > 1:
                apart = (token_E @ self.project_EP - self.centres_KP[theirs]).square().sum(1)
                theirs = [theirs[int(apart.argmin())]]
            fresh += theirs
        cluster_n = torch.cat([before_m, torch.tensor(fresh, dtype=before_m.dtype, device=before_m.device)])
        self._settle(token_nE, embedding_nF, cluster_n, names, classes, seed)
        return cluster_n

    def _settle(
        self,
        token_nE: Tensor,
        embedding_nF: Tensor,
        cluster_n: Tensor,
        names: Sequence[str],
        classes: Sequence[str],
        seed: int,
    ) -> None:
        """Learn the centres, once it is known which class images are taken for by centres that did not see them."""
        self.link_K = repetition(embedding_nF, cluster_n, len(classes))
        if len(set(classes)) > 1:
            taken_n = torch.zeros_like(cluster_n)
            for away, here in each_fold(random_folds(len(cluster_n), seed).to(cluster_n.device), cluster_n):
                self._discriminate(token_nE[away], cluster_n[away])
                taken_n[here] = self(token_nE[here])
            self.taken = Counter((name, classes[k]) for name, k in zip(names, taken_n.tolist(), strict=True))
        self._discriminate(token_nE, cluster_n)

    def _discriminate(self, token_nE: Tensor, cluster_n: Tensor) -> None:
        centres = torch.stack([token_nE[cluster_n == k].mean(0) for k in range(self.count)])
        scale_E, basis, weight, rest = shrunk_directions(token_nE - centres[cluster_n])
        # W = sqrt(rest) I + basis' (sqrt(weight) - sqrt(rest)) basis whitens standardised tokens.
        root = rest.sqrt()
        white = centres / scale_E
        white = root * white + (white @ basis.T) * (weight.sqrt() - root) @ basis
        differ = torch.linalg.svd(white - white.mean(0), full_matrices=False).Vh[: max(1, self.count - 1)]
        project = root * differ + (differ @ basis.T) * (weight.sqrt() - root) @ basis
        self.project_EP = (project / scale_E).T.contiguous()
        self.centres_KP = centres @ self.project_EP


def groups(token_nE: Tensor, seed: int) -> Tensor:
    """Group of each image (n): those that no gap separates are one.

    Along a few principal directions k-means gives more centres than there are groups, and centres that no gap
    separates are joined. Every group is then divided in the same way, by directions of its own.
    """
    group_n = torch.zeros(len(token_nE), dtype=torch.int64, device=token_nE.device)
    smallest = max(SMALLEST_OF_FEW, min(SMALLEST, len(token_nE) // 8))
    room = len(token_nE) // (2 * smallest)
    for directions in _DIRECTIONS:
        if room < (2 if directions == _DIRECTIONS[0] else 2 * directions):
            return group_n
        points = principal(token_nE.double(), directions)
        starts = [k_means(points, min(2 * directions, room), seed + start) for start in range(_STARTS)]
        nearest = min(starts, key=lambda found: float(torch.cdist(points, found).amin(1).square().sum()))
        centres = drop_small(points, nearest, smallest)
        part_n = merge_centres(points, centres, GAP)[torch.cdist(points, centres).argmin(1)]
        parts = int(part_n.max()) + 1
        # A few directions mix thirty products. More of them are trusted only if they tell many apart: of one product
        # they show noise.
        if parts > (1 if directions == _DIRECTIONS[0] else directions // 2):
            break
    else:
        return group_n
    count = 0
    for part in range(parts):
        inside = part_n == part
        group_m = groups(token_nE[inside], seed)
        group_n[inside] = count + group_m
        count += int(group_m.max()) + 1
    return group_n


def principal(token_nE: Tensor, directions: int) -> Tensor:
    """Coordinates (n x P) along the leading principal directions of standardised tokens.

    They are divided by the square root of their spread: undivided, one direction would rule; divided by the spread,
    noise would.
    """
    mean, scale = token_nE.mean(0), token_nE.std(0).clamp_min(1e-6)
    _, values, basis = torch.linalg.svd((token_nE - mean) / scale, full_matrices=False)
    telling = max(1, int((values > 1e-6 * values[0]).sum()))
    basis = basis[: min(directions, telling)]
    spread = (values[: len(basis)] / len(token_nE) ** 0.5).clamp_min(1e-9)
    points: Tensor = (token_nE - mean) / scale @ basis.T / spread.sqrt()
    return points.float()


def merge_centres(points_NP: Tensor, centres_VP: Tensor, gap: float) -> Tensor:
    """Owner of each centre (V) after joining groups of points that no gap separates.

    Two groups stay apart when, along the line between their means, the means lie more than ``gap`` times
    the sum of both standard deviations apart. Halves of one Gaussian score 1.3, of a uniform bar 1.7.
    """
    label = torch.cdist(points_NP, centres_VP).argmin(1)
    members = {k: points_NP[label == k] for k in range(len(centres_VP))}
    owner = list(range(len(centres_VP)))
    apart = {(i, j): _separation(members[i], members[j]) for j in members for i in range(j)}
    while apart:
        i, j = min(apart, key=lambda pair: apart[pair])
        if apart[i, j] >= gap:
            break
        owner = [i if k == j else k for k in owner]
        members[i] = torch.cat([members[i], members.pop(j)])
        apart = {pair: value for pair, value in apart.items() if j not in pair}
        apart |= {(min(i, k), max(i, k)): _separation(members[i], members[k]) for k in members if k != i}
    names = sorted(members)
    return torch.tensor([names.index(k) for k in owner], device=points_NP.device)


def _separation(one_NP: Tensor, other_MP: Tensor) -> float:
    if min(len(one_NP), len(other_MP)) < 2:
        return 0.0
    line = other_MP.mean(0) - one_NP.mean(0)
    length = line.norm().clamp_min(1e-12)
    spread = (one_NP @ line).std() + (other_MP @ line).std()
    return float(length * length / spread.clamp_min(1e-12))


def k_means(points_NP: Tensor, count: int, seed: int) -> Tensor:
    """Centres (count x P) by k-means++ seeding and Lloyd's rounds; deterministic for a seed."""
    generator = torch.Generator().manual_seed(seed)
    centres = points_NP[torch.randint(len(points_NP), (1,), generator=generator)]
    for _ in range(count - 1):
        nearest = torch.cdist(points_NP, centres).amin(1).square()
        # Drawn on the CPU, so that a seed means the same everywhere.
        pick = torch.multinomial(nearest.clamp_min(1e-12).cpu(), 1, generator=generator)
        centres = torch.cat([centres, points_NP[pick]])
    for _ in range(50):
        owner = torch.cdist(points_NP, centres).argmin(1)
        new = torch.stack([points_NP[owner == k].mean(0) if (owner == k).any() else centres[k] for k in range(count)])
        if torch.equal(new, centres):
            break
        centres = new
    return centres


def drop_small(points_NP: Tensor, centres_KP: Tensor, smallest: int) -> Tensor:
    """Remove centres that own fewer than ``smallest`` points, smallest first; their points go elsewhere."""
    while len(centres_KP) > 1:
        sizes = torch.bincount(torch.cdist(points_NP, centres_KP).argmin(1), minlength=len(centres_KP))
        if int(sizes.min()) >= smallest:
            break
        keep = torch.arange(len(centres_KP), device=sizes.device) != sizes.argmin()
        centres_KP = centres_KP[keep]
    return centres_KP


def repetition(embedding_nF: Tensor, cluster_n: Tensor, clusters: int) -> Tensor:
    """How far the good images of each cluster repeat each other, 0 to 1 (K).

    On a production line every image has near-twins among the good ones: a small deviation means something. Where
    good images are as different as photographs of cats are, the place and grain of a patch mean nothing. Measured by
    r = d (d / D)^2: d the cosine distance of an image from its two nearest good images, D from any other of its
    cluster (medians). Products stay below 0.017, kinds of photographs above 0.04; 1 / (1 + (r / 0.022)^6).
    """
    unit = nn.functional.normalize(embedding_nF, dim=1)
    links = torch.ones(clusters, device=embedding_nF.device)
    for k in range(clusters):
        members = unit[cluster_n == k][:_MOST_COMPARED]
        if len(members) < 4:
            continue  # too few to tell
        apart = (1.0 - members @ members.T).clamp_min(0.0)
        away = apart[~torch.eye(len(members), dtype=torch.bool, device=members.device)].reshape(len(members), -1)
        near = away.topk(2, dim=1, largest=False).values.mean(1).median()
        alike = near * (near / away.median().clamp_min(1e-9)).square()
        links[k] = 1.0 / (1.0 + (alike / 0.022) ** 6)
    return links
