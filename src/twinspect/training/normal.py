"""Statistics of good images: before training the scales of the teacher's answers, after it what the scorer needs.

All good images are learnt from, also those that the students did not see. To calibrate, every image is then scored
as if it had not been learnt (cross-fitting): means of positions, scales and nearest images leave the image itself
out, covariances of patches its half of the images, those of tokens its fifth. So all good images count, and none for
itself or for a copy that was made of it (`training.copies`). Pictures of one part still vouch for each other:
leaving out whole runs of images costs more defects than it saves false alarms (`LOG.md`).

Shapes: n good images, B images of a batch, N positions, D channels, K clusters, R readings, G groups.
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

from twinspect.models.contract import AnomalyModel, Observed
from twinspect.models.scorer import TOP_SHARE
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
    channels = model.selection.channels
    sums = [torch.zeros(2, c, dtype=torch.float64, device=model.device) for c in channels]
    counts, tokens = [0] * len(channels), []
    for observed, _ in source.batches(chosen):
        tokens.append(observed.tokens[0])
        for i, map_BDhw in enumerate(observed.maps):
            wide = map_BDhw.double()
            sums[i] += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
            counts[i] += wide[:, 0].numel()
    for i, (total, count) in enumerate(zip(sums, counts, strict=True)):
        mean, square = total / count
        model.selection.fit(i, mean.float(), (square - mean.square()).clamp_min(0.0).sqrt().float())
    model.standardised.fit(torch.cat(tokens))
    model.initialise(lambda: source.batches(chosen[:_START_IMAGES]), seed)


class GoodImages(NamedTuple):
    """What the model says of the good images, each scored by statistics that did not see it; on the CPU.

    Attributes:
        score_n: joint scores.
        peak_n: highest values of the maps.
        distance_n: distances from the clusters.
        cluster_n: indices of the clusters.
        counted_n: whether the image counts for thresholds: with plain scoring only those held out.
        readings_nR: raw readings, as `Outputs` has them.
        tokens: global tokens, n x E a view.
        embedding_nF: what the teacher's own classifier would see.
    """

    score_n: Tensor
    peak_n: Tensor
    distance_n: Tensor
    cluster_n: Tensor
    counted_n: Tensor
    readings_nR: Tensor
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
    """Learn the statistics of a trained model's scorer and calibrate it.

    The students were trained on the images at ``train_at``, not on those at ``held_at``. Without ``students`` there
    are none that say anything. With ``divide`` images without class names may fall into several clusters.
    """
    model.eval()
    if students:
        model.fit_plain(lambda: source.batches(held_at))
    images, held = sorted([*train_at, *held_at]), set(held_at)
    held_n = torch.tensor([i in held for i in images], device=model.device)
    tokens, embedding_nF = source.vectors(images)
    names = [source.samples[i].class_name for i in images]
    cluster_n = model.scorer.clusters.fit(tokens[0], embedding_nF, names, seed, divide)
    seen = _Seen(cluster_n, held_n, tokens, embedding_nF)
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

    The model has scoring ``default`` and learnt from the images ``before``, of classes ``names_before``; ``classes``
    has the class of every cluster. Readings of global tokens are made anew for all images; those of patches stay
    what they were for the old ones.

    Returns:
        Old images, then new ones; and the class of every cluster.
    """
    model.eval()
    clusters, known = model.scorer.clusters, list(classes)
    fresh, embedding_nF = source.vectors(images)
    tokens = tuple(torch.cat(pair) for pair in zip(before.tokens, fresh, strict=True))
    embedding_nF = torch.cat([before.embedding_nF, embedding_nF])
    names = [*names_before, *(source.samples[i].class_name for i in images)]
    cluster_n = clusters.extend(tokens[0], embedding_nF, names, before.cluster_n, known, seed)
    seen = _Seen(cluster_n, torch.ones_like(cluster_n) > 0, tokens, embedding_nF)
    fitting = _Fitting(model, source, images, seen, progress, model.scorer.students_count(), before)
    return fitting.default(seed), tuple(known)


class _Seen(NamedTuple):
    """All good images: those learnt before, then those of the source."""

    cluster_n: Tensor
    held_n: Tensor
    tokens: tuple[Tensor, ...]
    embedding_nF: Tensor


class _Fitting:
    """The passes over the good images of a source, and what they share.

    Attributes:
        all: of all images, also of those learnt before.
        cluster_n, held_n: of the images of the source.
        images_K, known_K: images of every cluster: all together, and those learnt before.
        first_n: place of the image that an image of the source is a copy of, or its own.
        half_n: half (0 or 1) of an image, alternating within its cluster; copies are in that of their image.
        factor_n: see `left_out`.
        means: mean of every position, a group each, after the first pass: K x N x D.
    """

    def __init__(
        self,
        model: AnomalyModel,
        source: FeatureSource,
        images: Sequence[int],
        seen: _Seen,
        progress: Progress,
        asks_students: bool,
        before: GoodImages | None = None,
    ) -> None:
        self.model, self.scorer, self.source, self.images = model, model.scorer, source, images
        self.all, self.before, self.progress, self.asks_students = seen, before, progress, asks_students
        self.grids, self.gaussians = model.scorer.all_grids(), model.scorer.gaussians()
        self.clusters, self.old = model.scorer.clusters.count, len(seen.cluster_n) - len(images)
        self.cluster_n, self.held_n = (column[self.old :] for column in seen[:2])
        self.images_K = torch.bincount(seen.cluster_n, minlength=self.clusters).float()
        self.known_K = torch.bincount(seen.cluster_n[: self.old], minlength=self.clusters).float()
        self.first_n = torch.tensor(same_image([source.samples[i] for i in images]), device=model.device)
        _, own_n, count = torch.unique(
            torch.stack([self.first_n, self.cluster_n]), dim=1, return_inverse=True, return_counts=True
        )
        self.factor_n = left_out(self.images_K[self.cluster_n], count[own_n])
        half_n = torch.zeros_like(self.cluster_n)
        for k in range(self.clusters):
            members = (self.cluster_n == k).nonzero()[:, 0]
            half_n[members] = torch.arange(len(members), device=members.device) % 2
        self.half_n = half_n[self.first_n]
        self.means: list[Tensor] = []

    def plain(self) -> GoodImages:
        """The students' readings calibrate on the images held out, all clusters together."""
        readings, peaks = [], []
        for _, observed, small in self._batches(range(len(self.images)), "statistics"):
            plain = self.model.plain(observed, small)
            readings.append(torch.cat([plain.local_BR, plain.semantic_BR], 1))
            peaks.append(self._peaks(self.scorer.finish(plain.map_Bhw)))
        return self._calibrated(torch.cat(readings), torch.cat(peaks), self.held_n)

    def default(self, seed: int) -> GoodImages:
        """Everything: see the module."""
        scorer, before = self.scorer, self.before
        targets = self._means()
        halves = self._covariances()
        all_first_n = torch.cat([torch.arange(self.old, device=self.model.device), self.old + self.first_n])
        semantic = [self._tokens(g, token_nE, all_first_n, seed) for g, token_nE in enumerate(self.all.tokens)]
        assert scorer.nearest is not None
        semantic.append(scorer.nearest.fit(self.all.embedding_nF, seed, all_first_n))
        with tempfile.TemporaryFile() as file:
            fields = [(f"{g}", np.float16, (one.side, one.side)) for g, one in enumerate(self.gaussians)]
            stored = np.memmap(file, np.dtype(fields), "w+", shape=len(self.images))
            arrays = [stored[name] for name, *_ in fields]
            students, skills = self._distances(halves, targets, arrays)
            local, peak_n = self._scale(arrays)
        first, second = scorer.student_readings
        patches = torch.cat([students[:, :first], local, students[:, first:]], 1)
        counted_n = torch.ones_like(self.held_n)
        if before is None:
            scorer.weight_R[:first] = skills[0]
            scorer.weight_R[scorer.local_count : scorer.local_count + second] = skills[1]
        else:
            patches = torch.cat([before.readings_nR[:, : patches.shape[1]], patches])
            peak_n = torch.cat([before.peak_n, peak_n])
            counted_n = torch.cat([before.counted_n, counted_n])
        return self._calibrated(torch.cat([patches, torch.stack(semantic, 1)], 1), peak_n, counted_n)

    def _batches(self, which: Sequence[int], stage: str) -> Iterator[tuple[Tensor, Observed, Tensor]]:
        """(places among the good images, teacher's answer, shrunk pixels); says how far the work is."""
        start = 0
        for observed, small in self.source.batches([self.images[i] for i in which]):
            places = torch.tensor(which[start : start + len(small)], device=self.model.device)
            start += len(small)
            yield places, observed, small
            self.progress(stage, start, len(which))

    def _means(self) -> list[Tensor]:
        """First pass: means of every position, of groups and of what the students learn (K x N x D, K x D)."""
        sums: list[Tensor] = []
        for places, observed, _ in self._batches(range(len(self.images)), "statistics (means)"):
            rows = [one.rows(grid(observed)) for grid, one in zip(self.grids, self.gaussians, strict=True)]
            targets = self.model.targets(observed) if self.asks_students and self.before is None else []
            parts = [part.float() for part in (*rows, *targets)]
            sums = sums or [part.new_zeros(self.clusters, *part.shape[1:]) for part in parts]
            for total, part in zip(sums, parts, strict=True):
                total.index_add_(0, self.cluster_n[places], part)
        for one, total in zip(self.gaussians, sums, strict=False):
            if self.before is not None:
                known = one.sums(self.known_K[: len(one.centre_KD)])
                total[: len(known)] += known
            one.set_means(total, self.images_K)
        self.means = [one.means() for one in self.gaussians]
        return [total / self.images_K.reshape(-1, *[1] * (total.dim() - 1)) for total in sums[len(self.gaussians) :]]

    def _differences(self, places: Tensor, observed: Observed) -> Iterator[Tensor]:
        """Patches (B x N x D) minus the means of their positions, which each image is left out of; a group each."""
        cluster_B, factor_B11 = self.cluster_n[places], self.factor_n[places][:, None, None]
        for grid, one, mean_KND in zip(self.grids, self.gaussians, self.means, strict=True):
            yield (one.rows(grid(observed)) - mean_KND[cluster_B]) * factor_B11

    def _covariances(self) -> list[Tensor]:
        """Whitening matrices of both halves of some images of every cluster: 2 x K x D x D a group."""
        chosen: list[int] = []
        for k in range(self.clusters):
            members = (self.cluster_n == k).nonzero()[:, 0].tolist()
            step = max(1, len(members) // (2 * _HALF_IMAGES))
            chosen += members[::step][: 2 * _HALF_IMAGES]
        # Both halves know what was learnt before: images of the source are left out of their own half only.
        counts = self.known_K.double().clamp_max(2.0 * _HALF_IMAGES).repeat(2, 1)
        sums = [torch.zeros(2, self.clusters, one.dims, one.dims).to(counts) for one in self.gaussians]
        for one, total in zip(self.gaussians, sums if self.before is not None else [], strict=False):
            known = torch.stack([unwhitened(white) for white in one.whiten_KDD])
            total[:, : len(known)] += known * counts[:, : len(known), None, None]
        for places, observed, _ in self._batches(chosen, "statistics (covariances)"):
            at = list(zip(self.half_n[places].tolist(), self.cluster_n[places].tolist(), strict=True))
            for total, difference in zip(sums, self._differences(places, observed), strict=True):
                for rows, place in zip(difference, at, strict=True):
                    total[place] += (rows.T @ rows).double() / len(rows)
            for place in at:
                counts[place] += 1
        fresh_K = torch.bincount(self.cluster_n, minlength=self.clusters) > 0
        halves = []
        for one, total in zip(self.gaussians, sums, strict=True):
            both = total.sum(0) / counts.sum(0)[:, None, None]
            # A cluster with images in one half only is measured by all of them.
            each = torch.where((counts > 0)[..., None, None], total / counts.clamp_min(1)[..., None, None], both)
            vectors = torch.where(counts > 0, counts, counts.sum(0)) * one.side**2
            halves.append(torch.stack([_whitenings(*half) for half in zip(each, vectors, strict=True)]))
            white = _whitenings(both, counts.sum(0) * one.side**2)
            for k in (~fresh_K).nonzero()[:, 0].tolist():  # nothing new is known of it
                white[k] = one.whiten_KDD[k]
            one.whiten_KDD = white
        return halves

    def _tokens(self, view: int, token_nE: Tensor, all_first_n: Tensor, seed: int) -> Tensor:
        """Distances of the global tokens of a view (n), by the images of other folds."""
        order = torch.randperm(len(token_nE), generator=torch.Generator().manual_seed(seed)).to(token_nE.device)
        fold_n = torch.zeros_like(order)
        fold_n[order] = torch.arange(len(order), device=order.device) % _FOLDS
        self.scorer.token_gaussians()[view].fit(token_nE, self.all.cluster_n, self.clusters)
        return cross_fitted_tokens(token_nE, self.all.cluster_n, self.clusters, fold_n[all_first_n])

    def _distances(
        self, halves: list[Tensor], targets: list[Tensor], arrays: list[NDArray[np.float16]]
    ) -> tuple[Tensor, tuple[float, float]]:
        """Third pass: distances by the other half's covariances, into arrays; the students' readings and skills."""
        readings: list[Tensor] = []
        apart = torch.zeros(len(targets), 2, dtype=torch.float64)
        for places, observed, small in self._batches(range(len(self.images)), "statistics (distances)"):
            other = (1 - self.half_n[places]) * self.clusters + self.cluster_n[places]
            for g, difference in enumerate(self._differences(places, observed)):
                distance_Bhw = self.gaussians[g].distance(difference, halves[g].flatten(0, 1), other)
                arrays[g][places.cpu().numpy()] = distance_Bhw.cpu().numpy()
            if not self.asks_students:
                readings.append(torch.zeros(len(places), sum(self.scorer.student_readings), device=places.device))
                continue
            plain = self.model.plain(observed, small)
            readings.append(torch.cat([plain.local_BR, plain.semantic_BR], 1))
            if targets and self.held_n[places].any():
                apart += self._apart(places, observed, small, targets)
        skill = (1.0 - apart[:, 0] / apart[:, 1].clamp_min(1e-12)).clamp(0.0, 1.0)
        local = torch.tensor([target.dim() == 3 for target in targets], dtype=torch.bool)
        # To a hundredth: a student of less skill would change no answer, and is not asked at all.
        skills = [round(float(skill[at].mean()), 2) if bool(at.any()) else 0.0 for at in (local, ~local)]
        return self._raised(torch.cat(readings)), (skills[0], skills[1])

    def _apart(self, places: Tensor, observed: Observed, small: Tensor, targets: list[Tensor]) -> Tensor:
        """1 - cos of the teacher's answers from the student's, and from the mean of good images: targets x 2, sums.

        Of the images held out only, each left out of that mean.
        """
        held = self.held_n[places]
        cluster_B, apart = self.cluster_n[places][held], []
        pairs = zip(self.model.targets(observed), self.model.predictions(observed, small), targets, strict=True)
        for target, answer, mean in pairs:
            target, answer = target[held], answer[held]
            count = self.images_K[cluster_B].reshape(-1, *[1] * (target.dim() - 1))
            others = (count * mean[cluster_B] - target) / (count - 1).clamp_min(1.0)
            distances = (1.0 - F.cosine_similarity(target, other, dim=-1) for other in (answer, others))
            apart.append(torch.stack([distance.reshape(len(target), -1).mean(1).sum() for distance in distances]))
        return torch.stack(apart).double().cpu()

    def _raised(self, reading_nR: Tensor) -> Tensor:
        """Students' readings; those of images that they were trained on are raised to the level of the others."""
        raised = reading_nR.clone()
        for k in range(self.clusters):
            seen, unseen = (self.cluster_n == k) & ~self.held_n, (self.cluster_n == k) & self.held_n
            if seen.any() and unseen.any():
                raised[seen] += reading_nR[unseen].mean(0) - reading_nR[seen].mean(0)
        return raised

    def _scale(self, arrays: list[NDArray[np.float16]]) -> tuple[Tensor, Tensor]:
        """Scales of the distances: at every position, and over the whole map.

        Returns:
            Readings of the groups (n x G) by scales that leave the image out, and peaks of the maps (n).
        """
        device, scorer, readings = self.model.device, self.scorer, []
        level_KG, spread_KG = torch.zeros(2, self.clusters, len(arrays), device=device)
        for g, (one, array) in enumerate(zip(self.gaussians, arrays, strict=True)):
            reading_n, scales = torch.zeros(len(self.images)), []
            for k in range(self.clusters):
                places = (self.cluster_n == k).nonzero()[:, 0].cpu().numpy()
                if not len(places):  # smoothing what was learnt before again would wear it out
                    scales.append((one.level_Khw[k].cpu(), one.spread_Khw[k].cpu()))
                    continue
                total, square = _sums(array, places)
                if known := int(self.known_K[k]):
                    before = _unscaled(one.level_Khw[k], one.spread_Khw[k], known)
                    total, square = total + before[0], square + before[1]
                count = len(places) + known
                scales.append(_level_and_spread(total, square, count))
                for place in places if g in scorer.scored else ():
                    reading_n[place] = _reading(array[place], total, square, count)
            one.set_scale(*(torch.stack(column).to(device) for column in zip(*scales, strict=True)))
            for k in range(self.clusters):
                mean, square = self._whole(g, array, k)
                spread = (square - mean.square()).clamp_min(1e-12).sqrt().maximum(1e-3 * mean)
                level_KG[k, g], spread_KG[k, g] = mean.float(), spread.float()
            if g in scorer.scored:
                readings.append(reading_n)
        scorer.map_level_KG, scorer.map_spread_KG = level_KG, spread_KG
        peaks = []
        for start in range(0, len(self.images), 16):
            part = slice(start, start + 16)
            maps = [torch.from_numpy(array[part].astype(np.float32)).to(device) for array in arrays]
            peaks.append(self._peaks(scorer.map_of(maps, self.cluster_n[part])))
        return torch.stack(readings, 1).to(device), torch.cat(peaks)

    def _whole(self, g: int, array: NDArray[np.float16], k: int) -> tuple[Tensor, Tensor]:
        """Mean and mean square of the distances of a cluster's maps."""
        places = (self.cluster_n == k).nonzero()[:, 0].cpu().numpy()
        mean, square = (total.mean() / max(1, len(places)) for total in _sums(array, places))
        known = float(self.known_K[k])
        if known:
            level, spread = (
                one[k, g].double().cpu() for one in (self.scorer.map_level_KG, self.scorer.map_spread_KG)
            )
            share = len(places) / (len(places) + known)
            mean = (1 - share) * level + share * mean
            square = (1 - share) * (spread.square() + level.square()) + share * square
        return mean, square

    def _peaks(self, map_B1HW: Tensor) -> Tensor:
        return self.model.inside_map(map_B1HW).amax((1, 2, 3))

    def _calibrated(self, reading_nR: Tensor, peak_n: Tensor, counted_n: Tensor) -> GoodImages:
        """Fit the calibration on the images that count; what is said of all."""
        seen = self.all
        score_n, z_n2 = self.scorer.calibrate(reading_nR, seen.cluster_n, counted_n)
        distance_n = self.scorer.cluster_distance(reading_nR, z_n2)
        return GoodImages(
            score_n.cpu(), peak_n.cpu(), distance_n.cpu(), seen.cluster_n.cpu(), counted_n.cpu(), reading_nR.cpu(),
            tuple(token_nE.cpu() for token_nE in seen.tokens), seen.embedding_nF.cpu(),
        )  # fmt: skip


def _whitenings(covariance_KDD: Tensor, vectors_K: Tensor) -> Tensor:
    """`whitening` of every cluster's covariance, in fp16."""
    pairs = zip(covariance_KDD, vectors_K, strict=True)
    return torch.stack([whitening(covariance, count) for covariance, count in pairs]).half()


def _sums(array: NDArray[np.float16], places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares of some maps (h x w each)."""
    total, square = np.zeros(array.shape[1:]), np.zeros(array.shape[1:])
    for start in range(0, len(places), 64):
        part = array[places[start : start + 64]].astype(np.float64)
        total += part.sum(0)
        square += np.square(part).sum(0)
    return torch.from_numpy(total), torch.from_numpy(square)


def _level_and_spread(total_hw: Tensor, square_hw: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation at every position, over its 3 x 3 neighbours; variances are shrunk towards their
    average by `SPREAD_PRIOR` images, as a handful of images says little about one position.
    """
    mean = total_hw / count
    variance = (square_hw / count - mean.square()).clamp_min(0.0)
    mean, variance = average(mean[None], 3)[0], average(variance[None], 3)[0]
    typical = variance.mean()
    variance = (count * variance + SPREAD_PRIOR * typical) / (count + SPREAD_PRIOR)
    return mean, variance.sqrt().maximum(1e-3 * mean).clamp_min(1e-6)


def _reading(distance_hw: NDArray[np.float16], total_hw: Tensor, square_hw: Tensor, count: int) -> Tensor:
    """The local reading of an image by the scale of the others of its cluster; of an only one by its own."""
    d_hw = torch.from_numpy(distance_hw.astype(np.float64))
    if count > 1:
        total_hw, square_hw, count = total_hw - d_hw, square_hw - d_hw.square(), count - 1
    level, spread = _level_and_spread(total_hw, square_hw, count)
    return top_mean(((d_hw - level) / spread)[None], TOP_SHARE)[0]


def _unscaled(level_hw: Tensor, spread_hw: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares that `_level_and_spread` made these of, smoothed as they are."""
    mean, shrunk = level_hw.double().cpu(), spread_hw.double().cpu().square()
    variance = (((count + SPREAD_PRIOR) * shrunk - SPREAD_PRIOR * shrunk.mean()) / count).clamp_min(0.0)
    return count * mean, count * (variance + mean.square())
