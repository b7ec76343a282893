"""Scene prototypes: which kinds of image the normal ones are, found without class names.

Shapes: B images, N training images, K prototypes, V variants, E width of the tokens, F of the embedding,
P directions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_DIRECTIONS = 8  # principal directions at least; half as many as variants where those are many
_MOST = (16, 32, 64, 128)  # limits of the number of variants that are tried in turn
_JUDGED = 4096  # points that their number is chosen on
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)  # numbers of variants that are tried
_STARTS = 4  # of k-means; one start in ten joins two products and cuts a third in halves


class Prototypes(nn.Module):
    """Scene prototypes in the space of the teacher's global tokens: which kind of image is this?

    Tokens are standardised and projected to a few principal directions. k-means finds *variants* (their number
    by the held-out likelihood); variants that no gap separates are one *prototype*. Global statistics are kept
    per variant, residual statistics per prototype: two products must not share them, while splitting one
    product gives each part too little data and makes its images incomparable. No class names are used.
    """

    mean_E: Tensor
    project_EP: Tensor
    centres_VP: Tensor
    owner_V: Tensor

    def __init__(self, token_dims: int, most: int = 0) -> None:
        super().__init__()
        self.most = most
        self.register_buffer("mean_E", torch.zeros(token_dims))
        self.register_buffer("project_EP", torch.zeros(token_dims, 1))
        self.register_buffer("centres_VP", torch.zeros(1, 1))
        self.register_buffer("owner_V", torch.zeros(1, dtype=torch.int64))

    @property
    def count(self) -> int:
        """Number of prototypes."""
        return int(self.owner_V.max()) + 1

    @property
    def variants(self) -> int:
        """Number of variants of all prototypes together."""
        return len(self.centres_VP)

    def embed(self, token_BE: Tensor) -> Tensor:
        """Standardised principal coordinates, B x P."""
        return (token_BE - self.mean_E) @ self.project_EP

    def variant(self, token_BE: Tensor) -> Tensor:
        """Index of the nearest variant for each image (B)."""
        point = self.embed(token_BE)
        distance = (point[:, None] - self.centres_VP[None]).square().sum(-1)
        return distance.argmin(1)

    def join_varied(self, token_NE: Tensor, embedding_NF: Tensor) -> Tensor:
        """Make one prototype of all whose images do not repeat each other; how far each then repeats (K).

        Products need rulers of their own. Kinds of photographs do not: an odd photograph lies between them, and
        would be excused by the widest. What they share repeats as little as they do: measured on all of them
        together it would seem to repeat more, as images of other kinds are far away.
        """
        owner_N = self(token_NE)
        link_K = repetition(embedding_NF, owner_N, self.count)
        products, varied = link_K >= 0.5, link_K < 0.5
        names = torch.where(products, products.cumsum(0) - 1, products.sum())
        self.owner_V = names[self.owner_V]
        if not varied.any():
            return link_K
        images_K = torch.bincount(owner_N, minlength=len(link_K))[varied].float()
        return torch.cat([link_K[products], ((link_K[varied] * images_K).sum() / images_K.sum())[None]])

    def forward(self, token_BE: Tensor) -> Tensor:
        """Index of the prototype for each image (B)."""
        return self.owner_V.index_select(0, self.variant(token_BE))

    def fit(self, token_NE: Tensor, seed: int, smallest: int = 16) -> None:
        """Find directions, variants and prototypes from the tokens of normal training images."""
        token = token_NE.double()
        mean, scale = token.mean(0), token.std(0).clamp_min(1e-6)
        _, values, basis = torch.linalg.svd((token - mean) / scale, full_matrices=False)
        spread = (values / len(token) ** 0.5).clamp_min(1e-9)
        # Square root of the spread: between raw axes (one direction rules) and whitened ones (noise rules).
        project = basis.T / scale[:, None] / spread.sqrt()
        telling = int((values > 1e-6 * values[0]).sum())
        self.mean_E = mean.float()
        room = max(1, len(token) // (2 * smallest))
        for most in [self.most] if self.most else [_MOST[0], *(m for m in _MOST[1:] if m <= room)]:
            further = most > _MOST[0] and not self.most
            project_EP = project[:, : min(max(_DIRECTIONS, most // 2), telling)].float()
            points = (token_NE - self.mean_E) @ project_EP
            centres = choose_centres(points, min(most, room), seed, least=most // 4 if further else 1)
            centres_VP = drop_small(points, centres, smallest)
            owner_V = merge_centres(points, centres_VP)
            # Sixteen variants of forty products mix them all, and a few are seen. More variants are better only if
            # they tell more products apart than the fewer could: else they cut products in pieces.
            if not further or 2 * (int(owner_V.max()) + 1) > most:
                self.project_EP, self.centres_VP, self.owner_V = project_EP, centres_VP, owner_V


def merge_centres(points_NP: Tensor, centres_VP: Tensor, gap: float = 3.2) -> Tensor:
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
        owner = [i if one == j else one for one in owner]
        members[i] = torch.cat([members[i], members.pop(j)])
        apart = {pair: value for pair, value in apart.items() if j not in pair}
        apart |= {(min(i, k), max(i, k)): _separation(members[i], members[k]) for k in members if k != i}
    names = sorted(members)
    return torch.tensor([names.index(one) for one in owner], device=points_NP.device)


def _separation(one_NP: Tensor, other_MP: Tensor) -> float:
    if min(len(one_NP), len(other_MP)) < 2:
        return 0.0
    line = other_MP.mean(0) - one_NP.mean(0)
    length = line.norm().clamp_min(1e-12)
    spread = (one_NP @ line).std() + (other_MP @ line).std()
    return float(length * length / spread.clamp_min(1e-12))


def best_k_means(points_NP: Tensor, count: int, seed: int) -> Tensor:
    """Centres (count x P) of the start that leaves the points nearest to them."""
    found = [k_means(points_NP, count, seed + start) for start in range(_STARTS if count > 1 else 1)]
    return min(found, key=lambda centres: float(torch.cdist(points_NP, centres).amin(1).square().sum()))


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
        behind = values[best] - value
        if float(behind.mean()) <= float(behind.std()) / len(behind) ** 0.5:
            return best_k_means(points_NP[order], count, seed)
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


def repetition(embedding_NF: Tensor, prototype_N: Tensor, prototypes: int, most: int = 2000) -> Tensor:
    """How far the normal images of each prototype repeat each other, 0 to 1 (K).

    On a production line every image has near-twins among the normal ones: a small deviation means something. Where
    normal images are as different as photographs of cats are, the place and grain of a patch mean nothing.
    Measured by d (d / D)^2: d the cosine distance of an image from its two nearest normal images (itself left out),
    D from any other of its kind. Neither d (few images are far apart) nor d / D (a texture has no twins, and needs
    none) says it alone. Products stay below 0.013, object classes above 0.035; half the weight is lost at 0.022.
    """
    unit = nn.functional.normalize(embedding_NF, dim=1)
    links = torch.ones(prototypes, device=embedding_NF.device)
    for k in range(prototypes):
        own = unit[prototype_N == k][:most]
        if len(own) < 4:
            continue  # too few to tell
        apart = (1.0 - own @ own.T).clamp_min(0.0)
        away = apart[~torch.eye(len(own), dtype=torch.bool, device=own.device)].reshape(len(own), -1)
        near = away.topk(2, dim=1, largest=False).values.mean(1).median()
        alike = near * (near / away.median().clamp_min(1e-9)).square()
        links[k] = 1.0 / (1.0 + (alike / 0.022) ** 6)
    return links
