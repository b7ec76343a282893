"""Statistics of good images: before training the scales of the teacher's answers, after it what the scorer needs.

All good images are learnt from, also those that the students did not see. To calibrate, every image is then scored
as if it had not been learnt (cross-fitting): means of positions, scales and nearest images leave the image itself
out, covariances of patches its half of the images, those of tokens its fifth. So all good images count, and none for
itself or for a copy that was made of it (`training.copies`). Pictures of one part still vouch for each other:
leaving out whole runs of images costs more defects than it saves false alarms (`LOG.md`).

Shapes: n good images, B images of a batch, N positions, D channels, V variants, K clusters, R readings, G groups.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from twinspect.models.contract import AnomalyModel
from twinspect.models.observed import Observed
from twinspect.models.scorer import TOP_SHARE, Scorer
from twinspect.models.statistics import (
    SPREAD_PRIOR,
    average,
    cross_fitted_tokens,
    left_out,
    unwhitened,
    whitening,
)
from twinspect.scoring import top_mean
from twinspect.training.source import FeatureSource, same_image
from twinspect.types import Progress

_INIT_IMAGES = 256  # images that channel statistics are taken from; more change the third digit
_START_IMAGES = 64  # images that a student is started from
_FOLDS = 5  # of the covariances of tokens
_HALF_IMAGES = 64  # images of a cluster that each of the two covariances of patches is learnt from


@torch.no_grad()
def fit_scales(model: AnomalyModel, source: FeatureSource, indices: Sequence[int], seed: int) -> None:
    """Before training: channel statistics of the teacher's maps and tokens, then the student's own start."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [indices[i] for i in order[:_INIT_IMAGES]]
    tokens: list[Tensor] = []
    selection = model.selection
    sums = [torch.zeros(c, dtype=torch.float64, device=model.device) for c in selection.channels]
    squares = [torch.zeros_like(total) for total in sums]
    counts = [0 for _ in sums]
    for _, observed, _ in source.batches(chosen):
        tokens.append(observed.tokens[0])
        for i, map_BDhw in enumerate(observed.maps):
            sums[i] += map_BDhw.double().sum((0, 2, 3))
            squares[i] += map_BDhw.double().square().sum((0, 2, 3))
            counts[i] += map_BDhw.shape[0] * map_BDhw.shape[2] * map_BDhw.shape[3]
    for i, (total, square, count) in enumerate(zip(sums, squares, counts, strict=True)):
        mean = total / count
        variance = (square / count - mean.square()).clamp_min(0.0)
        selection.fit(i, mean.float(), variance.sqrt().float())
    model.standardised.fit(torch.cat(tokens))
    few = chosen[:_START_IMAGES]
    model.initialise(lambda: ((observed, small) for _, observed, small in source.batches(few)), seed)


class GoodImages(NamedTuple):
    """What the model says of the good images, each scored by statistics that did not see it; on the CPU.

    Attributes:
        score_n: joint scores.
        peak_n: highest values of the maps.
        distance_n: distances from the clusters.
        cluster_n: indices of the clusters.
        counted_n: whether the image counts for thresholds: with plain scoring only those held out.
        readings_nR: raw readings, as `Outputs` has them.
        variant_n: indices of the variants.
        tokens: global tokens, n x E a view.
        embedding_nF: what the teacher's own classifier would see.
    """

    score_n: Tensor
    peak_n: Tensor
    distance_n: Tensor
    cluster_n: Tensor
    counted_n: Tensor
    readings_nR: Tensor
    variant_n: Tensor
    tokens: tuple[Tensor, ...]
    embedding_nF: Tensor


@torch.no_grad()
def fit_statistics(
    model: AnomalyModel,
    source: FeatureSource,
    train_at: Sequence[int],
    held_at: Sequence[int],
    seed: int,
    progress: Progress,
    students: bool = True,
    divide: bool = True,
) -> GoodImages:
    """Learn the scorer's statistics and calibrate it.

    Args:
        model: trained.
        source: images.
        train_at: positions of the images that the students were trained on.
        held_at: positions of the others.
        seed: of whatever is drawn.
        progress: called with (stage, done, total).
        students: whether there are students that say anything; else they are not asked.
        divide: whether images without class names may fall into several clusters.
    """
    model.eval()
    if students:
        model.fit_plain(lambda: ((observed, small) for _, observed, small in source.batches(held_at)))
    images = sorted([*train_at, *held_at])
    held = set(held_at)
    held_n = torch.tensor([i in held for i in images], device=model.device)
    tokens, embedding_nF = source.vectors(images)
    names = [source.samples[i].class_name for i in images]
    variant_n, cluster_n = model.scorer.clusters.fit(tokens[0], embedding_nF, names, seed, divide)
    seen = _Seen(variant_n, cluster_n, held_n, tokens, embedding_nF)
    fitting = _Fitting(model, source, images, seen, progress, students)
    return fitting.plain() if model.scorer.plain else fitting.default(seed)


@torch.no_grad()
def add_statistics(
    model: AnomalyModel,
    source: FeatureSource,
    images: Sequence[int],
    before: GoodImages,
    names_before: Sequence[str],
    classes: Sequence[str],
    seed: int,
    progress: Progress,
) -> tuple[GoodImages, tuple[str, ...]]:
    """Learn further good images: sums that the statistics are made of grow, nothing old is read again.

    Of the images before, readings of global tokens are made anew; those of patches stay what they were.

    Args:
        model: trained, with scoring ``default``.
        source: has the new images, with their classes.
        images: positions of those to learn.
        before: what it learnt from.
        names_before: classes of those images.
        classes: class of every cluster.
        seed: of whatever is drawn.
        progress: called with (stage, done, total).

    Returns:
        Old images, then new ones; and the class of every cluster.
    """
    model.eval()
    scorer = model.scorer
    fresh, embedding_nF = source.vectors(images)
    tokens = tuple(torch.cat(pair) for pair in zip(before.tokens, fresh, strict=True))
    embedding_nF = torch.cat([before.embedding_nF, embedding_nF])
    names = [*names_before, *(source.samples[i].class_name for i in images)]
    known, sums = list(classes), _Sums.of(scorer, before.variant_n)
    variant_n = scorer.clusters.extend(tokens[0], embedding_nF, names, before.variant_n, known, seed)
    seen = _Seen(variant_n, scorer.clusters.owner_V[variant_n], torch.ones_like(variant_n) > 0, tokens, embedding_nF)
    fitting = _Fitting(model, source, images, seen, progress, scorer.students_count(), sums, before)
    return fitting.default(seed), tuple(known)


class _Seen(NamedTuple):
    """All good images: those learnt before, then those of the source."""

    variant_n: Tensor
    cluster_n: Tensor
    held_n: Tensor
    tokens: tuple[Tensor, ...]
    embedding_nF: Tensor


class _Sums(NamedTuple):
    """What the statistics of a scorer were made of, read off them.

    Attributes:
        images_V: images of every variant.
        rows: sums of features, a group each: V x N x D.
        covariance: of every cluster, a group each: K x D x D.
        distances: sum and sum of squares at every position, a scored group each: V x h x w.
        maps: mean and mean square of the distances of a whole map: K x G each.
    """

    images_V: Tensor
    rows: list[Tensor]
    covariance: list[Tensor]
    distances: list[tuple[Tensor, Tensor]]
    maps: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, scorer: Scorer, variant_n: Tensor) -> _Sums:
        images_V = torch.bincount(variant_n, minlength=scorer.clusters.variants).float()
        gaussians = scorer.gaussians()
        level_KG, spread_KG = scorer.map_level_KG.double(), scorer.map_spread_KG.double()
        return cls(
            images_V,
            [gaussian.sums(images_V) for gaussian in gaussians],
            [torch.stack([unwhitened(white) for white in gaussian.whiten_KDD]) for gaussian in gaussians],
            [_unscaled(gaussian.level_Vhw, gaussian.spread_Vhw, images_V) for gaussian in gaussians],
            (level_KG, spread_KG.square() + level_KG.square()),
        )


def _unscaled(level_Vhw: Tensor, spread_Vhw: Tensor, images_V: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares that `_level_and_spread` made these of, smoothed as they are."""
    count, mean = images_V.double()[:, None, None], level_Vhw.double()
    shrunk = spread_Vhw.double().square()
    typical = shrunk.mean((1, 2), keepdim=True)
    variance = (((count + SPREAD_PRIOR) * shrunk - SPREAD_PRIOR * typical) / count.clamp_min(1.0)).clamp_min(0.0)
    return (count * mean).cpu(), (count * (variance + mean.square())).cpu()


class _Fitting:
    """The passes over the good images of a source, and what they share.

    Attributes:
        variant_n, cluster_n, held_n: of the images of the source.
        all: also of those learnt before.
        images_V: images of every variant, all together.
        first_n: place of the image that an image of the source is a copy of, or its own; ``all_first_n``: of all.
    """

    def __init__(
        self,
        model: AnomalyModel,
        source: FeatureSource,
        images: Sequence[int],
        seen: _Seen,
        progress: Progress,
        asks_students: bool,
        sums: _Sums | None = None,
        before: GoodImages | None = None,
    ) -> None:
        self.model, self.scorer, self.source, self.images = model, model.scorer, source, images
        self.all, self.sums, self.before, self.progress = seen, sums, before, progress
        old = len(seen.variant_n) - len(images)
        self.variant_n, self.cluster_n, self.held_n = seen.variant_n[old:], seen.cluster_n[old:], seen.held_n[old:]
        self.owner_V = model.scorer.clusters.owner_V
        self.images_V = torch.bincount(seen.variant_n, minlength=len(self.owner_V)).to(torch.float32)
        self.first_n = torch.tensor(same_image([source.samples[i] for i in images]), device=model.device)
        self.all_first_n = torch.cat([torch.arange(old, device=model.device), old + self.first_n])
        _, own_n, count = torch.unique(
            torch.stack([self.first_n, self.variant_n]), dim=1, return_inverse=True, return_counts=True
        )
        self.factor_n = left_out(self.images_V[self.variant_n], count[own_n])
        self.passes, self.gone, self.asks_students = (1 if model.scorer.plain else 3), 0, asks_students

    def plain(self) -> GoodImages:
        """The students' readings calibrate on the images held out, all clusters together."""
        readings, peaks = [], []
        for _, observed, small in self._batches():
            plain = self.model.plain(observed, small)
            readings.append(torch.cat([plain.local_BR, plain.semantic_BR], 1))
            peaks.append(self._peaks(self.scorer.finish(plain.map_Bhw)))
        return self._calibrated(torch.cat(readings), torch.cat(peaks), self.held_n)

    def default(self, seed: int) -> GoodImages:
        """Everything: see the module."""
        scorer = self.scorer
        targets = self._means()
        halves = self._covariances()
        semantic = [self._tokens(g, token_nE, seed) for g, token_nE in enumerate(self.all.tokens)]
        assert scorer.nearest is not None
        semantic.append(scorer.nearest.fit(self.all.embedding_nF, seed, self.all_first_n))
        with tempfile.TemporaryFile() as file:
            stored, students, skills = self._distances(halves, targets, file)
            self._scale(stored)
            local, peak_n = self._local(stored)
        count = scorer.student_readings
        patches = torch.cat([students[:, : count[0]], local, students[:, count[0] :]], 1)
        counted_n = torch.ones_like(self.held_n)
        if self.before is None:
            scorer.weight_R[: count[0]] = skills[0]
            scorer.weight_R[scorer.local_count : scorer.local_count + count[1]] = skills[1]
        else:
            patches = torch.cat([self.before.readings_nR[:, : patches.shape[1]], patches])
            peak_n = torch.cat([self.before.peak_n, peak_n])
            counted_n = torch.cat([self.before.counted_n, counted_n])
        return self._calibrated(torch.cat([patches, torch.stack(semantic, 1)], 1), peak_n, counted_n)

    def _batches(self, which: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Observed, Tensor]]:
        """(places among the good images, teacher's answer, shrunk pixels); says how far the work is."""
        places = list(range(len(self.images))) if which is None else list(which)
        start = 0
        for part, observed, small in self.source.batches([self.images[i] for i in places]):
            yield torch.tensor(places[start : start + len(part)], device=self.model.device), observed, small
            start += len(part)
            done = self.gone + start if which is None else self.gone
            self.progress("statistics", done, self.passes * len(self.images))
        self.gone += len(self.images) if which is None else 0

    def _means(self) -> list[Tensor]:
        """First pass: means of every position, of groups and of what the students learn (V x N x D, V x D)."""
        groups: list[Tensor] = []
        targets: list[Tensor] = []
        for places, observed, _ in self._batches():
            pairs = zip(self.scorer.all_grids(), self.scorer.gaussians(), strict=True)
            rows = [gaussian.rows(grid(observed)) for grid, gaussian in pairs]
            _add(groups, rows, self.variant_n[places], len(self.owner_V))
            if self.asks_students and self.before is None:
                _add(targets, self.model.targets(observed), self.variant_n[places], len(self.owner_V))
        for g, (gaussian, total) in enumerate(zip(self.scorer.gaussians(), groups, strict=True)):
            if self.sums is not None:
                total[: len(self.sums.images_V)] += self.sums.rows[g]
            gaussian.set_means(total, self.images_V)
        return [total / self.images_V.reshape(-1, *[1] * (total.dim() - 1)) for total in targets]

    def _covariances(self) -> list[Tensor]:
        """Whitening matrices of both halves of some images of every cluster: 2 x K x D x D a group."""
        chosen: list[int] = []
        for k in range(self.scorer.clusters.count):
            members = (self.cluster_n == k).nonzero()[:, 0].tolist()
            step = max(1, len(members) // (2 * _HALF_IMAGES))
            chosen += members[::step][: 2 * _HALF_IMAGES]
        half_n = self._halves()
        clusters = self.scorer.clusters.count
        sums = [
            torch.zeros(2, clusters, gaussian.dims, gaussian.dims, dtype=torch.float64, device=self.model.device)
            for gaussian in self.scorer.gaussians()
        ]
        counts = torch.zeros(2, clusters, dtype=torch.float64, device=self.model.device)
        if self.sums is not None:
            # Both halves know what was learnt before: images of the source are left out of their own half only.
            old_K = torch.zeros(len(self.sums.covariance[0]), dtype=torch.float64, device=self.model.device)
            old_K.index_add_(0, self.owner_V[: len(self.sums.images_V)], self.sums.images_V.double())
            counts[:, : len(old_K)] += old_K.clamp_max(2.0 * _HALF_IMAGES)
            for total, covariance in zip(sums, self.sums.covariance, strict=True):
                total[:, : len(old_K)] += covariance.double() * counts[:, : len(old_K), None, None]
        means = [gaussian.means() for gaussian in self.scorer.gaussians()]
        for places, observed, _ in self._batches(chosen):
            for g, (grid, gaussian) in enumerate(zip(self.scorer.all_grids(), self.scorer.gaussians(), strict=True)):
                difference = gaussian.rows(grid(observed)) - means[g][self.variant_n[places]]
                difference = difference * self.factor_n[places][:, None, None]
                for rows, place in zip(difference, places.tolist(), strict=True):
                    sums[g][half_n[place], self.cluster_n[place]] += (rows.T @ rows).double() / len(rows)
            for place in places.tolist():
                counts[half_n[place], self.cluster_n[place]] += 1
        halves = []
        for gaussian, total in zip(self.scorer.gaussians(), sums, strict=True):
            both = total.sum(0) / counts.sum(0)[:, None, None]
            # A cluster with images in one half only is measured by all of them.
            each = torch.where((counts > 0)[..., None, None], total / counts.clamp_min(1)[..., None, None], both)
            vectors = torch.where(counts > 0, counts, counts.sum(0)) * gaussian.side**2
            halves.append(torch.stack([_whitenings(*half) for half in zip(each, vectors, strict=True)]))
            white = _whitenings(both, counts.sum(0) * gaussian.side**2)
            for k in range(len(gaussian.whiten_KDD) if self.before is not None else 0):
                if not (self.cluster_n == k).any():  # nothing new is known of it
                    white[k] = gaussian.whiten_KDD[k]
            gaussian.whiten_KDD = white
        return halves

    def _halves(self) -> Tensor:
        """Half (0 or 1) of every image, alternating within its cluster."""
        half_n = torch.zeros_like(self.cluster_n)
        for k in range(self.scorer.clusters.count):
            members = (self.cluster_n == k).nonzero()[:, 0]
            half_n[members] = torch.arange(len(members), device=members.device) % 2
        return half_n[self.first_n]

    def _tokens(self, view: int, token_nE: Tensor, seed: int) -> Tensor:
        order = torch.randperm(len(token_nE), generator=torch.Generator().manual_seed(seed)).to(token_nE.device)
        fold_n = torch.zeros_like(order)
        fold_n[order] = torch.arange(len(order), device=order.device) % _FOLDS
        fold_n = fold_n[self.all_first_n]
        self.scorer.token_gaussians()[view].fit(token_nE, self.all.variant_n, self.owner_V)
        return cross_fitted_tokens(token_nE, self.all.variant_n, self.owner_V, fold_n)

    def _distances(
        self, halves: list[Tensor], targets: list[Tensor], file: object
    ) -> tuple[list[NDArray[np.float16]], Tensor, tuple[float, float]]:
        """Third pass: distances by the other half's covariances, kept on disk; the students' readings and skills."""
        gaussians, half_n = self.scorer.gaussians(), self._halves()
        sides = [gaussian.side for gaussian in gaussians]
        stored = _arrays(file, len(self.images), sides)
        means = [gaussian.means() for gaussian in gaussians]
        readings: list[Tensor] = []
        apart = torch.zeros(len(targets), 2, dtype=torch.float64)
        for places, observed, small in self._batches():
            variant_B, cluster_B = self.variant_n[places], self.cluster_n[places]
            for g, (grid, gaussian) in enumerate(zip(self.scorer.all_grids(), gaussians, strict=True)):
                difference = gaussian.rows(grid(observed)) - means[g][variant_B]
                difference = difference * self.factor_n[places][:, None, None]
                by_half = halves[g].flatten(0, 1)
                other = (1 - half_n[places]) * self.scorer.clusters.count + cluster_B
                stored[g][places.cpu().numpy()] = gaussian.distance(difference, by_half, other).cpu().numpy()
            if not self.asks_students:
                readings.append(torch.zeros(len(places), sum(self.scorer.student_readings), device=places.device))
                continue
            plain = self.model.plain(observed, small)
            readings.append(torch.cat([plain.local_BR, plain.semantic_BR], 1))
            if self.before is None and self.held_n[places].any():
                apart += self._apart(places, observed, small, targets)
        skill = (1.0 - apart[:, 0] / apart[:, 1].clamp_min(1e-12)).clamp(0.0, 1.0)
        local = torch.tensor([target.dim() == 3 for target in targets], dtype=torch.bool)
        # To a hundredth: a student of less skill would change no answer, and is not asked at all.
        skills = tuple(round(float(skill[at].mean()), 2) if bool(at.any()) else 0.0 for at in (local, ~local))
        return stored, self._shifted(torch.cat(readings)), (skills[0], skills[1])

    def _apart(self, places: Tensor, observed: Observed, small: Tensor, targets: list[Tensor]) -> Tensor:
        """1 - cos of the teacher's answers from the student's, and from the mean of good images: targets x 2, sums.

        Of the images held out only, each left out of that mean.
        """
        held = self.held_n[places]
        apart = []
        pairs = zip(self.model.targets(observed), self.model.predictions(observed, small), targets, strict=True)
        for target, answer, mean in pairs:
            target, answer = target[held], answer[held]
            count = self.images_V[self.variant_n[places][held]].reshape(-1, *[1] * (target.dim() - 1))
            others = (count * mean[self.variant_n[places][held]] - target) / (count - 1).clamp_min(1.0)
            distances = (1.0 - F.cosine_similarity(target, other, dim=-1) for other in (answer, others))
            apart.append(torch.stack([distance.reshape(len(target), -1).mean(1).sum() for distance in distances]))
        return torch.stack(apart).double().cpu()

    def _shifted(self, reading_nR: Tensor) -> Tensor:
        """Students' readings; those of images that they were trained on are raised to the level of the others."""
        shifted = reading_nR.clone()
        for k in range(self.scorer.clusters.count):
            seen, unseen = (self.cluster_n == k) & ~self.held_n, (self.cluster_n == k) & self.held_n
            if seen.any() and unseen.any():
                shifted[seen] += reading_nR[unseen].mean(0) - reading_nR[seen].mean(0)
        return shifted

    def _scale(self, stored: list[NDArray[np.float16]]) -> None:
        """Level and standard deviation of the distances: at every position, and over the whole map."""
        clusters = self.scorer.clusters.count
        levels, spreads = [], []
        for g, (gaussian, array) in enumerate(zip(self.scorer.gaussians(), stored, strict=True)):
            scales = [self._level_and_spread(g, array, v) for v in range(len(self.owner_V))]
            columns = zip(*scales, strict=True)
            gaussian.set_scale(*(torch.stack(column).to(self.model.device) for column in columns))
            whole = [self._whole(g, array, k) for k in range(clusters)]
            mean, square = (torch.stack(column) for column in zip(*whole, strict=True))
            levels.append(mean)
            spreads.append((square - mean.square()).clamp_min(1e-12).sqrt().maximum(1e-3 * mean))
        self.scorer.map_level_KG = torch.stack(levels, 1).float().to(self.model.device)
        self.scorer.map_spread_KG = torch.stack(spreads, 1).float().to(self.model.device)

    def _level_and_spread(self, g: int, array: NDArray[np.float16], v: int) -> tuple[Tensor, Tensor]:
        gaussian = self.scorer.gaussians()[g]
        if self.sums is not None and v < len(self.sums.images_V) and not (self.variant_n == v).any():
            return gaussian.level_Vhw[v].cpu(), gaussian.spread_Vhw[v].cpu()  # smoothing it again would wear it out
        return _level_and_spread(*self._distance_sums(g, array, v))

    def _distance_sums(self, g: int, array: NDArray[np.float16], v: int) -> tuple[Tensor, Tensor, int]:
        """Sum and sum of squares of a variant's distances, and its images, those learnt before among them."""
        total, square, count = _sums(array, (self.variant_n == v).cpu().numpy())
        if self.sums is not None and v < len(self.sums.images_V):
            before = [known[v] for known in self.sums.distances[g]]
            total, square, count = total + before[0], square + before[1], count + int(self.sums.images_V[v])
        return total, square, count

    def _whole(self, g: int, array: NDArray[np.float16], k: int) -> tuple[Tensor, Tensor]:
        """Mean and mean square of the distances of a cluster's maps."""
        total, square, count = _sums(array, (self.cluster_n == k).cpu().numpy())
        mean, of_squares = total.mean() / max(1, count), square.mean() / max(1, count)
        if self.sums is None or k >= len(self.sums.maps[0]):
            return mean, of_squares
        old = float(self.sums.images_V[self.owner_V[: len(self.sums.images_V)] == k].sum())
        before = [known[k, g].cpu() for known in self.sums.maps]
        share = count / (count + old)
        return (1 - share) * before[0] + share * mean, (1 - share) * before[1] + share * of_squares

    def _local(self, stored: list[NDArray[np.float16]]) -> tuple[Tensor, Tensor]:
        """Readings of the groups (n x G) by scales that leave the image out, and peaks of the maps (n)."""
        readings, peak_n = [], torch.zeros(len(self.images), device=self.model.device)
        for g in self.scorer.scored:
            array = stored[g]
            reading_n = torch.zeros(len(self.images))
            for v in range(len(self.owner_V)):
                places = (self.variant_n == v).nonzero()[:, 0].cpu().numpy()
                total, square, count = self._distance_sums(g, array, v)
                for place in places:
                    d_hw = torch.from_numpy(array[place].astype(np.float64))
                    others = (
                        (total - d_hw, square - d_hw.square(), count - 1) if count > 1 else (total, square, count)
                    )
                    level, spread = _level_and_spread(*others)
                    reading_n[place] = top_mean(((d_hw - level) / spread)[None], TOP_SHARE)[0]
            readings.append(reading_n)
        for start in range(0, len(self.images), 16):
            part = slice(start, start + 16)
            maps = [torch.from_numpy(array[part].astype(np.float32)).to(self.model.device) for array in stored]
            peak_n[part] = self._peaks(self.scorer.map_of(maps, self.variant_n[part], self.cluster_n[part]))
        return torch.stack(readings, 1).to(self.model.device), peak_n

    def _peaks(self, map_B1HW: Tensor) -> Tensor:
        return self.model.inside_map(map_B1HW).amax((1, 2, 3))

    def _calibrated(self, reading_nR: Tensor, peak_n: Tensor, counted_n: Tensor) -> GoodImages:
        """Fit the calibration on the images that count; what is said of all."""
        seen = self.all
        score_n, z_n2 = self.scorer.calibrate(reading_nR, seen.cluster_n, counted_n)
        distance_n = self.scorer.cluster_distance(reading_nR, z_n2)
        return GoodImages(
            score_n.cpu(),
            peak_n.cpu(),
            distance_n.cpu(),
            seen.cluster_n.cpu(),
            counted_n.cpu(),
            reading_nR.cpu(),
            seen.variant_n.cpu(),
            tuple(token_nE.cpu() for token_nE in seen.tokens),
            seen.embedding_nF.cpu(),
        )


def _whitenings(covariance_KDD: Tensor, vectors_K: Tensor) -> Tensor:
    """`whitening` of every cluster's covariance, in fp16."""
    pairs = zip(covariance_KDD, vectors_K, strict=True)
    return torch.stack([whitening(covariance, count) for covariance, count in pairs]).half()


def _add(totals: list[Tensor], parts: list[Tensor], variant_B: Tensor, variants: int) -> None:
    """Add the images of a batch to the sums of their variants, of every part."""
    if not totals:
        totals += [torch.zeros(variants, *part.shape[1:], device=part.device) for part in parts]
    for total, part in zip(totals, parts, strict=True):
        total.index_add_(0, variant_B, part.float())


def _arrays(file: object, images: int, sides: Sequence[int]) -> list[NDArray[np.float16]]:
    """One array of maps a group, in a file: n x h x w each."""
    offset, arrays = 0, []
    for side in sides:
        shape = (images, side, side)
        arrays.append(np.memmap(file, np.float16, "w+", offset, shape))  # type: ignore[call-overload]
        offset += 2 * images * side * side
    return arrays


def _sums(array: NDArray[np.float16], at: NDArray[np.bool_] | NDArray[np.int64]) -> tuple[Tensor, Tensor, int]:
    """Sum and sum of squares of some maps (h x w each), and their number."""
    places = np.flatnonzero(at) if at.dtype == bool else at
    total, square = np.zeros(array.shape[1:]), np.zeros(array.shape[1:])
    for start in range(0, len(places), 64):
        part = array[places[start : start + 64]].astype(np.float64)
        total += part.sum(0)
        square += np.square(part).sum(0)
    return torch.from_numpy(total), torch.from_numpy(square), len(places)


def _level_and_spread(total_hw: Tensor, square_hw: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation at every position, over its 3 x 3 neighbours; variances are shrunk towards their
    average by `SPREAD_PRIOR` images, as a handful of images says little about one position.
    """
    count = max(1, count)
    mean = total_hw / count
    variance = (square_hw / count - mean.square()).clamp_min(0.0)
    mean, variance = average(mean[None], 3)[0], average(variance[None], 3)[0]
    typical = variance.mean()
    variance = (count * variance + SPREAD_PRIOR * typical) / (count + SPREAD_PRIOR)
    return mean, variance.sqrt().maximum(1e-3 * mean).clamp_min(1e-6)
