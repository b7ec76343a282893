"""Which kind of image is this? Clusters and their variants, in the space of the teacher's global tokens.

A **cluster** is one product (or kind of scene): covariances and calibration are kept for each. Where images carry
class names, every class is a cluster; names are never needed at prediction. Without names, groups of images that a
gap separates are clusters. A **variant** is one look of a cluster (a design, a station): means of positions are kept
for each. Variants are groups within a cluster that a gap separates.

An image belongs to the variant whose centre is nearest after linear discriminant analysis: tokens are whitened by
their covariance within variants and projected to the directions in which the centres differ.

Shapes: B images, n good images, V variants, K clusters, E width of the tokens, P directions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twinspect.models.statistics import shrunk_directions

# Sums of standard deviations that the means of two groups lie apart by, or they are one. Two products: 5.5 and more;
# two designs of one product: 3.3 to 8; halves of one Gaussian: 1.3.
GAP_CLUSTERS, GAP_VARIANTS = 5.0, 3.2
SMALLEST_CLUSTER, SMALLEST = 6, 16  # images of a cluster where there are few, and of any group
_DIRECTIONS = 8  # principal directions that groups are looked for in; half as many as groups where those are many
_MOST = (16, 32, 64, 128)  # limits of the number of groups that are tried in turn
_JUDGED = 4096  # images that their number is chosen on
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)  # numbers that are tried
_FOLDS = 5  # that images are parted in, to see which class each is taken for
_STARTS = 4  # of k-means; one start in ten joins two products and cuts a third in halves


class Clusters(nn.Module):
    """Cluster and variant of images by their global tokens.

    Attributes:
        owner_V: cluster of every variant.
        link_K: how far a local deviation tells something, 0 to 1; see `repetition`.
        taken: after `fit` on several names: (class, class that a good image is taken for) to number of images.
    """

    project_EP: Tensor
    centres_VP: Tensor
    owner_V: Tensor
    link_K: Tensor

    def __init__(self, token_dims: int) -> None:
        super().__init__()
        self.register_buffer("project_EP", torch.zeros(token_dims, 1))
        self.register_buffer("centres_VP", torch.zeros(1, 1))
        self.register_buffer("owner_V", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("link_K", torch.ones(1))
        self.taken: Counter[tuple[str, str]] = Counter()

    @property
    def count(self) -> int:
        """Number of clusters."""
        return len(self.link_K)

    @property
    def variants(self) -> int:
        """Number of variants of all clusters together."""
        return len(self.owner_V)

    def forward(self, token_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Variant and cluster of each image (B each)."""
        point_BP = token_BE @ self.project_EP
        variant_B = (point_BP[:, None] - self.centres_VP[None]).square().sum(-1).argmin(1)
        return variant_B, self.owner_V.index_select(0, variant_B)

    def fit(
        self, token_nE: Tensor, embedding_nF: Tensor, names: Sequence[str], seed: int, divide: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Find variants and clusters of good images; which one each image belongs to (n each).

        With two class names or more, clusters are the classes; else they are found, or (without ``divide``) all
        images are one.
        """
        known = sorted(set(names))
        if len(known) > 1 or not divide:
            cluster_n = torch.tensor([known.index(name) for name in names], device=token_nE.device)
        else:
            smallest = max(SMALLEST_CLUSTER, min(SMALLEST, len(token_nE) // 8))
            cluster_n = groups(token_nE, smallest, GAP_CLUSTERS, seed)
        variant_n, owners = torch.zeros_like(cluster_n), list[int]()
        for k in range(int(cluster_n.max()) + 1):
            members = cluster_n == k
            group_m = groups(token_nE[members], SMALLEST, GAP_VARIANTS, seed)
            variant_n[members] = group_m + len(owners)
            owners += [k] * (int(group_m.max()) + 1)
        self._settle(token_nE, embedding_nF, variant_n, owners)
        if len(known) > 1:
            self._confuse(token_nE, variant_n, names, known, seed)
        return variant_n, cluster_n

    def extend(
        self,
        token_nE: Tensor,
        embedding_nF: Tensor,
        names: Sequence[str],
        before_m: Tensor,
        classes: list[str],
        seed: int,
    ) -> Tensor:
        """Take in further good images, of known classes or of new ones; the variant of every image, old ones first.

        A group of new images that a gap separates from all old ones of their class is a new variant, and so is every
        group of a new class. Other images join the nearest variant of their class.

        Tokens, embeddings and names are of the images that are known, then of the new ones; ``before_m`` are the
        variants of the known ones. New classes are added to ``classes``, which has the class of every cluster.
        """
        owners, old, device = self.owner_V.tolist(), len(before_m), token_nE.device
        variant_n = torch.cat([before_m, torch.full((len(token_nE) - old,), -1, device=device)])
        for name in dict.fromkeys(names[old:]):
            members = torch.tensor([of_image == name for of_image in names], device=device).nonzero()[:, 0]
            theirs = [v for v, k in enumerate(owners) if classes[k] == name]
            nearest_m = torch.full_like(members, -1)
            if theirs:
                apart = torch.cdist(token_nE[members] @ self.project_EP, self.centres_VP[theirs])
                nearest_m = torch.tensor(theirs, device=device)[apart.argmin(1)]
            else:
                classes.append(name)
            group_m = groups(token_nE[members], SMALLEST, GAP_VARIANTS, seed)
            for group in range(int(group_m.max()) + 1):
                inside = group_m == group
                if not theirs or bool((members[inside] >= old).all()):
                    variant_n[members[inside]] = len(owners)
                    owners.append(owners[int(nearest_m[inside].mode().values)] if theirs else len(classes) - 1)
                else:
                    fresh = inside & (members >= old)
                    variant_n[members[fresh]] = nearest_m[fresh]
        self._settle(token_nE, embedding_nF, variant_n, owners)
        if len(set(classes)) > 1:
            self._confuse(token_nE, variant_n, names, classes, seed)
        return variant_n

    def _settle(self, token_nE: Tensor, embedding_nF: Tensor, variant_n: Tensor, owners: list[int]) -> None:
        self.owner_V = torch.tensor(owners, device=token_nE.device)
        self.link_K = repetition(embedding_nF, self.owner_V[variant_n], max(owners) + 1)
        self._discriminate(token_nE, variant_n)

    def _confuse(
        self, token_nE: Tensor, variant_n: Tensor, names: Sequence[str], classes: Sequence[str], seed: int
    ) -> None:
        """Count which class good images are taken for, by centres that did not see them (or saw a whole variant)."""
        order = torch.randperm(len(token_nE), generator=torch.Generator().manual_seed(seed)).to(token_nE.device)
        fold_n, taken_n = torch.zeros_like(order), torch.zeros_like(order)
        fold_n[order] = torch.arange(len(order), device=order.device) % _FOLDS
        for fold in range(min(_FOLDS, len(order))):
            away, here = fold_n != fold, fold_n == fold
            away |= (torch.bincount(variant_n[away], minlength=self.variants) == 0)[variant_n]
            self._discriminate(token_nE[away], variant_n[away])
            taken_n[here] = self(token_nE[here])[1]
        self.taken = Counter((name, classes[k]) for name, k in zip(names, taken_n.tolist(), strict=True))
        self._discriminate(token_nE, variant_n)

    def _discriminate(self, token_nE: Tensor, variant_n: Tensor) -> None:
        centres = torch.stack([token_nE[variant_n == v].mean(0) for v in range(self.variants)])
        scale_E, basis, weight, rest = shrunk_directions(token_nE - centres[variant_n])
        # W = sqrt(rest) I + basis' (sqrt(weight) - sqrt(rest)) basis whitens standardised tokens.
        root = rest.sqrt()
        white = centres / scale_E
        white = root * white + (white @ basis.T) * (weight.sqrt() - root) @ basis
        differ = torch.linalg.svd(white - white.mean(0), full_matrices=False).Vh[: max(1, self.variants - 1)]
        project = root * differ + (differ @ basis.T) * (weight.sqrt() - root) @ basis
        self.project_EP = (project / scale_E).T.contiguous()
        self.centres_VP = centres @ self.project_EP


def groups(token_nE: Tensor, smallest: int, gap: float, seed: int) -> Tensor:
    """Group of each image (n): those that no gap separates are one.

    Tokens are standardised and projected to a few principal directions; k-means, its number by the likelihood of
    held-out images, gives centres, and centres that no gap separates are joined. So a product that varies stays one.
    """
    token, best = token_nE.double(), torch.zeros(len(token_nE), dtype=torch.int64, device=token_nE.device)
    room = len(token) // (2 * smallest)
    if room < 2:
        return best
    mean, scale = token.mean(0), token.std(0).clamp_min(1e-6)
    _, values, basis = torch.linalg.svd((token - mean) / scale, full_matrices=False)
    spread = (values / len(token) ** 0.5).clamp_min(1e-9)
    # Square root of the spread: between raw axes (one direction rules) and whitened ones (noise rules).
    project = basis.T / scale[:, None] / spread.sqrt()
    telling = max(1, int((values > 1e-6 * values[0]).sum()))
    for most in (_MOST[0], *(m for m in _MOST[1:] if m <= room)):
        further = most > _MOST[0]
        points = ((token - mean) @ project[:, : min(max(_DIRECTIONS, most // 2), telling)]).float()
        centres = choose_centres(points, min(most, room), seed, least=most // 4 if further else 1)
        centres = drop_small(points, centres, smallest)
        group_n = merge_centres(points, centres, gap)[torch.cdist(points, centres).argmin(1)]
        # Sixteen groups of forty products mix them all. More groups are better only if they tell more products apart
        # than the fewer could: else they cut products in pieces.
        if not further or 2 * (int(group_n.max()) + 1) > most:
            best = group_n
    return best


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


def best_k_means(points_NP: Tensor, count: int, seed: int) -> Tensor:
    """Centres (count x P) of the start that leaves the points nearest to them."""
    starts = [k_means(points_NP, count, seed + start) for start in range(_STARTS if count > 1 else 1)]
    return min(starts, key=lambda centres: float(torch.cdist(points_NP, centres).amin(1).square().sum()))


def k_means(points_NP: Tensor, count: int, seed: int, rounds: int = 50) -> Tensor:
    """Centres (count x P) by k-means++ seeding and Lloyd's rounds; deterministic for a seed."""
    generator = torch.Generator().manual_seed(seed)
    centres = points_NP[torch.randint(len(points_NP), (1,), generator=generator)]
    for _ in range(count - 1):
        nearest = torch.cdist(points_NP, centres).amin(1).square()
        # Drawn on the CPU, so that a seed means the same everywhere.
        pick = torch.multinomial(nearest.clamp_min(1e-12).cpu(), 1, generator=generator)
        centres = torch.cat([centres, points_NP[pick]])
    for _ in range(rounds):
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


def choose_centres(points_NP: Tensor, most: int, seed: int, least: int = 1) -> Tensor:
    """k-means centres, ``least`` to ``most``, as few as explain held-out points as well as any number does.

    The density is a mixture of Gaussians with one diagonal covariance each, shrunk to the pooled one, fitted
    on half the points and judged on the other half, both ways. The smallest count within one standard error
    of the best is taken: splitting one kind of scene costs data for every statistic and gains nothing.
    """
    order = torch.randperm(len(points_NP), generator=torch.Generator().manual_seed(seed))[:_JUDGED]
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    values: dict[int, Tensor] = {}
    for count in _COUNTS:
        if least <= count <= min(most, len(halves[0])):
            both = (halves, halves[::-1])
            parts = [_mixture_log_density(points_NP[a], points_NP[b], count, seed) for a, b in both]
            values[count] = torch.cat(parts)
    best = max(values, key=lambda count: float(values[count].mean()))
    for count, value in values.items():
        behind = values[best] - value  # not a number where all points are one
        if float(behind.mean()) <= float(behind.std()) / len(behind) ** 0.5:
            best = count
            break
    return best_k_means(points_NP[order], best, seed)


def _mixture_log_density(fit_NP: Tensor, held_MP: Tensor, count: int, seed: int) -> Tensor:
    """Log density of each held-out point (M) under the mixture fitted on the others."""
    centres = best_k_means(fit_NP, count, seed)
    owner = torch.cdist(fit_NP, centres).argmin(1)
    pooled = (fit_NP - centres[owner]).square().mean(0)
    terms = []
    for k in range(count):
        rows = fit_NP[owner == k]
        variance = ((rows - centres[k]).square().sum(0) + 10 * pooled) / (len(rows) + 10)
        log_density = -0.5 * ((held_MP - centres[k]).square() / variance + variance.log()).sum(1)
        terms.append(log_density + math.log(max(len(rows), 1) / len(fit_NP)))
    return torch.stack(terms).logsumexp(0)


def repetition(embedding_nF: Tensor, cluster_n: Tensor, clusters: int, most: int = 2000) -> Tensor:
    """How far the good images of each cluster repeat each other, 0 to 1 (K).

    On a production line every image has near-twins among the good ones: a small deviation means something. Where
    good images are as different as photographs of cats are, the place and grain of a patch mean nothing. Measured by
    r = d (d / D)^2: d the cosine distance of an image from its two nearest good images, D from any other of its
    cluster (medians). Products stay below 0.017, kinds of photographs above 0.04; 1 / (1 + (r / 0.022)^6).
    """
    unit = nn.functional.normalize(embedding_nF, dim=1)
    links = torch.ones(clusters, device=embedding_nF.device)
    for k in range(clusters):
        members = unit[cluster_n == k][:most]
        if len(members) < 4:
            continue  # too few to tell
        apart = (1.0 - members @ members.T).clamp_min(0.0)
        away = apart[~torch.eye(len(members), dtype=torch.bool, device=members.device)].reshape(len(members), -1)
        near = away.topk(2, dim=1, largest=False).values.mean(1).median()
        alike = near * (near / away.median().clamp_min(1e-9)).square()
        links[k] = 1.0 / (1.0 + (alike / 0.022) ** 6)
    return links
