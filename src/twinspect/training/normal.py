"""Statistics of good images: what the scorer needs of them once the students are trained.

All good images are learnt from, also those that the students did not see. To calibrate, every image is then scored
as if it had not been learnt (cross-fitting): means of positions, scales and nearest images leave the image itself
out, covariances of patches its half of the images, those of tokens its fifth. So all good images count, and none for
itself or for a copy that was made of it (`training.derived`). Pictures of one part still vouch for each other:
leaving out whole runs of images costs more defects than it saves false alarms (`LOG.md`).

Shapes: n good images, B images of a batch, N positions, D channels, K clusters, R readings, G groups.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from twinspect.decide.decision import GoodScores, image_id
from twinspect.models.contract import AnomalyModel, Observed
from twinspect.models.layers import in_fp16, top_mean
from twinspect.models.scorer import LEAST_SKILL, TOP_SHARE, LayerGroup
from twinspect.models.statistics import (
    SPREAD_PRIOR,
    average,
    cross_fitted_tokens,
    left_out,
    random_folds,
    unwhitened,
    whitening,
)
from twinspect.training.derived import picture_of, same_image
from twinspect.training.source import FeatureSource
from twinspect.types import Progress

_TEXTS = ("class_name", "group", "key")
_HALF_IMAGES = 256  # at most, images of a cluster that each of the two covariances of patches is learnt from


class GoodImages(NamedTuple):
    """What the model says of the good images, each scored by statistics that did not see it; on the CPU."""

    score_n: Tensor  # joint scores
    peak_n: Tensor  # highest values of the maps
    distance_n: Tensor  # from the clusters
    cluster_n: Tensor  # indices of the clusters
    counted_n: Tensor  # whether the image counts for thresholds: with plain scoring only those held out
    readings_nR: Tensor  # raw, as `Outputs` has them
    tokens: tuple[Tensor, ...]  # global tokens, n x E a view
    embedding_nF: Tensor  # what the teacher's own classifier would see
    class_name: tuple[str, ...] = ()  # this and the next two: as in `GoodScores`
    group: tuple[str, ...] = ()
    key: tuple[str, ...] = ()

    @classmethod
    def none(cls, model: AnomalyModel) -> GoodImages:
        """No images, on the model's device: what a model has learnt before its first fit."""
        empty = torch.zeros(0, device=model.device)
        views = (empty,) * len(model.selection.shrinks)
        readings_nR = empty.new_zeros(0, len(model.scorer.weight_R))
        return cls(empty, empty, empty, empty.long(), empty.bool(), readings_nR, views, empty)

    def scores(self, classes: Sequence[str]) -> GoodScores:
        """The images that count for thresholds; ``classes`` is the class of every cluster."""
        score, peak, distance = (column.double().numpy() for column in self[:3])
        predicted = [classes[k] for k in self.cluster_n.tolist()]
        texts = (np.array(column) for column in (self.class_name, predicted, self.group, self.key))
        return GoodScores(score, peak, distance, *texts).take(self.counted_n.numpy())

    def to_bytes(self) -> bytes:
        """As safetensors, with the texts as JSON in its header."""
        tensors = self._asdict()
        texts = {name: tensors.pop(name) for name in _TEXTS}
        views = {f"tokens.{view}": in_fp16(token_nE) for view, token_nE in enumerate(tensors.pop("tokens"))}
        tensors |= views | {"embedding_nF": in_fp16(self.embedding_nF)}
        return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"texts": json.dumps(texts)})

    @classmethod
    def from_bytes(cls, body: bytes) -> GoodImages:
        """Rebuild from `to_bytes`."""
        head: dict[str, Any] = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        texts = json.loads(head["__metadata__"]["texts"])
        columns: dict[str, Any] = load(body)
        columns["tokens"] = tuple(columns.pop(name).float() for name in sorted(columns) if name.startswith("tokens."))
        columns["embedding_nF"] = columns["embedding_nF"].float()
        return cls(**columns | {name: tuple(texts[name]) for name in _TEXTS})


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
    images, clusters = sorted([*train_at, *held_at]), partial(model.scorer.clusters.fit, seed=seed, divide=divide)
    fitting = _Fitting(model, source, images, held_at, GoodImages.none(model), clusters, seed, progress, students)
    return fitting.plain() if model.scorer.plain else fitting.default()


@torch.no_grad()
def add_statistics(
    model: AnomalyModel,
    source: FeatureSource,
    images: Sequence[int],
    before: GoodImages,
    classes: tuple[str, ...],
    seed: int,
    progress: Progress,
) -> tuple[GoodImages, tuple[str, ...]]:
    """Learn further good images: sums that the statistics are made of grow, nothing old is read again.

    The model has scoring ``default`` and learnt from the images ``before``; ``classes`` has the class of every
    cluster. Readings of global tokens are made anew for all images; those of patches stay what they were for the old
    ones.

    Returns:
        Old images, then new ones; and the class of every cluster.
    """
    model.eval()
    names = dict.fromkeys(source.samples[i].class_name for i in images)
    classes = (*classes, *(name for name in names if name not in classes))
    clusters = partial(model.scorer.clusters.extend, before_m=before.cluster_n, classes=classes, seed=seed)
    students = model.scorer.students_count()
    fitting = _Fitting(model, source, images, images, before, clusters, seed, progress, students)
    return fitting.default(), classes


@dataclass(slots=True)
class _Group:
    """A layer group, and what the passes find out about it.

    Attributes:
        mean_KND: means of every position, after the first pass.
        half_2KDD: whitening matrices of both halves of every cluster, after the second.
        distance_nhw: distances by the other half's matrix, after the third; in a file.
    """

    gaussian: LayerGroup
    mean_KND: Tensor = field(init=False)
    half_2KDD: Tensor = field(init=False)
    distance_nhw: NDArray[np.float16] = field(init=False)


class _Fitting:
    """The passes over the good images of a source, and what they share.

    Attributes:
        before: images learnt before; none in a first fit.
        groups: layer groups that patches are judged on.
        tokens, embedding_nF, all_cluster_n: of all images, those learnt before first.
        cluster_n, held_n: of the images of the source; held out are those that no student was trained on.
        images_K, known_K: images of every cluster: all together, and those learnt before.
        first_n: place of the image that an image of the source is a copy of, or its own.
        half_n: half (0 or 1) of an image, alternating within its cluster; copies are in that of their image.
        factor_n: see `left_out`.
    """

    def __init__(
        self,
        model: AnomalyModel,
        source: FeatureSource,
        images: Sequence[int],
        held: Collection[int],
        before: GoodImages,
        clusters: Callable[[Tensor, Tensor, list[str]], Tensor],
        seed: int,
        progress: Progress,
        asks_students: bool,
    ) -> None:
        self.model, self.scorer, self.source, self.images = model, model.scorer, source, images
        self.seed, self.progress, self.asks_students, self.before = seed, progress, asks_students, before
        self.groups, held = [_Group(gaussian) for gaussian in model.scorer.gaussians()], set(held)
        self.held_n = torch.tensor([i in held for i in images], device=model.device)
        samples = [source.samples[i] for i in images]
        names = [*before.class_name, *(sample.class_name for sample in samples)]
        tokens, embedding_nF = source.vectors(images)
        self.tokens = tuple(torch.cat(views) for views in zip(before.tokens, tokens, strict=True))
        self.embedding_nF = torch.cat([before.embedding_nF, embedding_nF])
        self.all_cluster_n = cluster_n = clusters(self.tokens[0], self.embedding_nF, names)
        self.clusters, self.old = model.scorer.clusters.count, len(before.cluster_n)
        self.cluster_n = cluster_n[self.old :]
        self.images_K = torch.bincount(cluster_n, minlength=self.clusters).float()
        self.known_K = torch.bincount(before.cluster_n, minlength=self.clusters).float()
        self.first_n = torch.tensor(same_image(samples), device=model.device)
        copies = torch.stack([self.first_n, self.cluster_n])
        _, group_n, count = torch.unique(copies, dim=1, return_inverse=True, return_counts=True)
        self.factor_n = left_out(self.images_K[self.cluster_n], count[group_n])
        half_n = torch.zeros_like(self.cluster_n)
        for k in range(self.clusters):
            members = (self.cluster_n == k).nonzero()[:, 0]
            half_n[members] = torch.arange(len(members), device=members.device) % 2
        self.half_n = half_n[self.first_n]

    def plain(self) -> GoodImages:
        """The students' readings calibrate on the images held out, all clusters together."""
        readings, peaks = [], []
        for _, observed, small in self._batches(range(len(self.images)), "statistics"):
            plain = self.model.plain(observed, small)
            readings.append(torch.cat([plain.local_BR, plain.semantic_BR], 1))
            peaks.append(self._peaks(self.scorer.finish(plain.map_Bhw)))
        return self._calibrated(torch.cat(readings), torch.cat(peaks), self.held_n)

    def default(self) -> GoodImages:
        """Everything: see the module."""
        scorer, before = self.scorer, self.before
        targets = self._means()
        self._covariances()
        semantic = self._semantic()
        with tempfile.TemporaryFile() as file:
            sides = [group.gaussian.side for group in self.groups]
            maps = np.dtype([(f"{g}", np.float16, (side, side)) for g, side in enumerate(sides)])
            stored = np.memmap(file, maps, "w+", shape=len(self.images))
            for g, group in enumerate(self.groups):
                group.distance_nhw = stored[f"{g}"]
            students, weights = self._distances(targets)
            local, peak_n = self._scale()
        first, second = scorer.student_readings
        patches = torch.cat([students[:, :first], local, students[:, first:]], 1)
        if not self.old:
            scorer.weight_R[:first] = weights[0]
            scorer.weight_R[scorer.local_count : scorer.local_count + second] = weights[1]
        patches = torch.cat([before.readings_nR[:, : patches.shape[1]], patches])
        peak_n = torch.cat([before.peak_n, peak_n])
        counted_n = torch.cat([before.counted_n, torch.ones_like(self.held_n)])
        return self._calibrated(torch.cat([patches, semantic], 1), peak_n, counted_n)

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
            targets = self.model.targets(observed) if self.asks_students and not self.old else []
            patches = (group.gaussian.patches(observed) for group in self.groups)
            parts = [part.float() for part in (*patches, *targets)]
            sums = sums or [part.new_zeros(self.clusters, *part.shape[1:]) for part in parts]
            for total, part in zip(sums, parts, strict=True):
                total.index_add_(0, self.cluster_n[places], part)
        for group, total in zip(self.groups, sums, strict=False):
            gaussian = group.gaussian
            if self.old:
                known = gaussian.sums(self.known_K[: len(gaussian.centre_KD)])
                total[: len(known)] += known
            gaussian.set_means(total, self.images_K)
            group.mean_KND = gaussian.means()
        return [total / self.images_K.reshape(-1, *[1] * (total.dim() - 1)) for total in sums[len(self.groups) :]]

    def _difference(self, group: _Group, places: Tensor, observed: Observed) -> Tensor:
        """Patches (B x N x D) minus the means of their positions, which each image is left out of."""
        difference_BND = group.gaussian.patches(observed) - group.mean_KND[self.cluster_n[places]]
        return difference_BND * self.factor_n[places][:, None, None]

    def _covariances(self) -> None:
        """Second pass, over some images of every cluster: whitening matrices of both halves and of all."""
        chosen: list[int] = []
        for half, k in itertools.product((0, 1), range(self.clusters)):
            members = ((self.half_n == half) & (self.cluster_n == k)).nonzero()[:, 0].tolist()
            step = max(1.0, len(members) / _HALF_IMAGES)  # spread over all: names often tell the lot or the hour
            chosen += [members[int(i * step)] for i in range(min(len(members), _HALF_IMAGES))]
        # Both halves know what was learnt before: images of the source are left out of their own half only.
        counts = self.known_K.double().clamp_max(2.0 * _HALF_IMAGES).repeat(2, 1)
        sums = []
        for gaussian in (group.gaussian for group in self.groups):
            total = torch.zeros(2, self.clusters, gaussian.dims, gaussian.dims).to(counts)
            if self.old:
                known = torch.stack([unwhitened(white) for white in gaussian.whiten_KDD])
                total[:, : len(known)] += known * counts[:, : len(known), None, None]
            sums.append(total)
        for places, observed, _ in self._batches(chosen, "statistics (covariances)"):
            at = list(zip(self.half_n[places].tolist(), self.cluster_n[places].tolist(), strict=True))
            for group, total in zip(self.groups, sums, strict=True):
                for rows, place in zip(self._difference(group, places, observed), at, strict=True):
                    total[place] += (rows.T @ rows).double() / len(rows)
            for place in at:
                counts[place] += 1
        fresh_K = torch.bincount(self.cluster_n, minlength=self.clusters) > 0
        for group, total in zip(self.groups, sums, strict=True):
            positions = group.gaussian.side**2
            both = total.sum(0) / counts.sum(0)[:, None, None]
            # A cluster with images in one half only is measured by all of them.
            each = torch.where((counts > 0)[..., None, None], total / counts.clamp_min(1)[..., None, None], both)
            vectors = torch.where(counts > 0, counts, counts.sum(0)) * positions
            group.half_2KDD = torch.stack([_whitenings(*half) for half in zip(each, vectors, strict=True)])
            white = _whitenings(both, counts.sum(0) * positions)
            for k in (~fresh_K).nonzero()[:, 0].tolist():  # nothing new is known of it
                white[k] = group.gaussian.whiten_KDD[k]
            group.gaussian.whiten_KDD = white

    def _semantic(self) -> Tensor:
        """Readings of all images: distances of the global tokens by images of other folds, of the nearest images."""
        fold_n = random_folds(len(self.embedding_nF), self.seed).to(self.model.device)
        first_n = torch.cat([torch.arange(self.old, device=fold_n.device), self.old + self.first_n])
        readings = []
        for gaussian, token_nE in zip(self.scorer.token_gaussians(), self.tokens, strict=True):
            gaussian.fit(token_nE, self.all_cluster_n, self.clusters)
            readings.append(cross_fitted_tokens(token_nE, self.all_cluster_n, self.clusters, fold_n[first_n]))
        assert self.scorer.nearest is not None
        readings.append(self.scorer.nearest.fit(self.embedding_nF, self.seed, first_n))
        return torch.stack(readings, 1)

    def _distances(self, targets: list[Tensor]) -> tuple[Tensor, tuple[float, float]]:
        """Third pass: distances by the other half's covariances; the students' readings and weights.

        ``targets`` are the means of what the students learn.
        """
        readings: list[Tensor] = []
        apart = torch.zeros(len(targets), 2, dtype=torch.float64)
        for places, observed, small in self._batches(range(len(self.images)), "statistics (distances)"):
            other = (1 - self.half_n[places]) * self.clusters + self.cluster_n[places]
            for group in self.groups:
                difference = self._difference(group, places, observed)
                distance_Bhw = group.gaussian.distance(difference, group.half_2KDD.flatten(0, 1), other)
                group.distance_nhw[places.cpu().numpy()] = distance_Bhw.cpu().numpy()
            if not self.asks_students:
                readings.append(torch.zeros(len(places), sum(self.scorer.student_readings), device=places.device))
                continue
            plain = self.model.plain(observed, small)
            readings.append(torch.cat([plain.local_BR, plain.semantic_BR], 1))
            if targets and self.held_n[places].any():
                apart += self._apart(places, observed, small, targets)
        skill = (1.0 - apart[:, 0] / apart[:, 1].clamp_min(1e-12)).clamp(0.0, 1.0)
        local = torch.tensor([target.dim() == 3 for target in targets], dtype=torch.bool)
        means = (float(skill[at].mean()) if bool(at.any()) else 0.0 for at in (local, ~local))
        # To a hundredth: a student of less weight would change no answer, and is not asked at all.
        weights = [round(max(0.0, (mean - LEAST_SKILL) / (1 - LEAST_SKILL)), 2) for mean in means]
        return self._raised(torch.cat(readings)), (weights[0], weights[1])

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

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Scales of the distances: at every position, and over the whole map.

        Returns:
            Readings of the groups (n x G) by scales that leave the image out, and peaks of the maps (n).
        """
        device, scorer, readings = self.model.device, self.scorer, []
        level_KG, spread_KG = torch.zeros(2, self.clusters, len(self.groups), device=device)
        for g, (gaussian, distance_nhw) in enumerate((group.gaussian, group.distance_nhw) for group in self.groups):
            reading_n, scales = torch.zeros(len(self.images)), []
            for k in range(self.clusters):
                places = (self.cluster_n == k).nonzero()[:, 0].cpu().numpy()
                if not len(places):  # nothing new, and smoothing what was learnt before again would wear it out
                    scales.append((gaussian.level_Khw[k].cpu(), gaussian.spread_Khw[k].cpu()))
                    level_KG[k, g], spread_KG[k, g] = scorer.map_level_KG[k, g], scorer.map_spread_KG[k, g]
                    continue
                total, square = _sums(distance_nhw, places)
                level_KG[k, g], spread_KG[k, g] = self._whole(g, k, total.mean(), square.mean(), len(places))
                if known := int(self.known_K[k]):
                    before = _unscaled(gaussian.level_Khw[k], gaussian.spread_Khw[k], known)
                    total, square = total + before[0], square + before[1]
                count = len(places) + known
                scales.append(_level_and_spread(total, square, count))
                for place in places if g in scorer.scored else ():
                    reading_n[place] = _reading(distance_nhw[place], total, square, count)
            columns = (torch.stack(column).to(device).float() for column in zip(*scales, strict=True))
            gaussian.level_Khw, gaussian.spread_Khw = columns
            if g in scorer.scored:
                readings.append(reading_n)
        scorer.map_level_KG, scorer.map_spread_KG = level_KG, spread_KG
        peaks = []
        for start in range(0, len(self.images), 16):
            part = slice(start, start + 16)
            maps = [torch.from_numpy(group.distance_nhw[part].astype(np.float32)).to(device) for group in self.groups]
            peaks.append(self._peaks(scorer.map_of(maps, self.cluster_n[part])))
        return torch.stack(readings, 1).to(device), torch.cat(peaks)

    def _whole(self, g: int, k: int, total: Tensor, square: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Level and spread over whole maps of a group and a cluster: of those learnt before and ``count`` others.

        ``total`` and ``square`` are sums of the others' distances, means over the positions.
        """
        mean, square = total / count, square / count
        if known := float(self.known_K[k]):
            columns = self.scorer.map_level_KG, self.scorer.map_spread_KG
            level, spread = (column_KG[k, g].double().cpu() for column_KG in columns)
            share = count / (count + known)
            mean = (1 - share) * level + share * mean
            square = (1 - share) * (spread.square() + level.square()) + share * square
        spread = (square - mean.square()).clamp_min(1e-12).sqrt().maximum(1e-3 * mean)
        return mean.float(), spread.float()

    def _peaks(self, map_B1HW: Tensor) -> Tensor:
        return self.model.inside_map(map_B1HW).amax((1, 2, 3))

    def _calibrated(self, reading_nR: Tensor, peak_n: Tensor, counted_n: Tensor) -> GoodImages:
        """Fit the calibration on the images that count; what is said of all."""
        score_n, z_n2 = self.scorer.calibrate(reading_nR, self.all_cluster_n, counted_n)
        distance_n = self.scorer.cluster_distance(reading_nR, z_n2)
        before, pictures = self.before, [picture_of(self.source.samples[i]) for i in self.images]
        return GoodImages(
            score_n.cpu(), peak_n.cpu(), distance_n.cpu(), self.all_cluster_n.cpu(), counted_n.cpu(),
            reading_nR.cpu(), tuple(token_nE.cpu() for token_nE in self.tokens),
            self.embedding_nF.cpu(),
            (*before.class_name, *(picture.class_name for picture in pictures)),
            (*before.group, *(picture.group for picture in pictures)),
            (*before.key, *(image_id(self.source.keys[i]) for i in self.images)),
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
