"""Classes of a few good images: statistics learnt with copies, scores of images that were left out.

Copies of a picture vouch for it, so cross-fitting as for other classes would flatter: of such a class every image is
left out together with its copies, one after another, and scored by what is learnt from the rest. These scores
calibrate the class. One image alone cannot be left out; it goes by the highest score of its copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from twinspect.models.contract import AnomalyModel
from twinspect.training.copies import Copy
from twinspect.training.normal import GoodImages, fit_statistics
from twinspect.training.source import FeatureSource
from twinspect.types import Progress, silent

_Classes = list[list[list[int]]]  # of every class for each image the positions of the image and its copies


@torch.no_grad()
def fit_few(
    model: AnomalyModel,
    source: FeatureSource,
    train_at: Sequence[int],
    held_at: Sequence[int],
    few: frozenset[str],
    seed: int,
    progress: Progress,
    students: bool,
) -> GoodImages:
    """`fit_statistics`, with classes of a few images (``few``) calibrated on images left out.

    Copies count for no threshold.
    """
    classes = _by_image(source, [i for i in train_at if source.samples[i].class_name in few])
    seen = _left_out(model, source, classes, seed, progress)
    divide = {s.class_name for s in source.samples} != few
    good = fit_statistics(model, source, train_at, held_at, seed, progress, students, divide)
    if not classes:
        return good
    place_of = {i: place for place, i in enumerate(sorted([*train_at, *held_at]))}
    readings_nR, counted_n = good.readings_nR.clone(), good.counted_n.clone()
    local, semantic = model.scorer.student_readings
    theirs = torch.ones(readings_nR.shape[1], dtype=torch.bool)  # the students' own stay as they are
    theirs[:local] = theirs[model.scorer.local_count : model.scorer.local_count + semantic] = False
    peak_n, distance_n = good.peak_n.clone(), good.distance_n.clone()
    for i, (reading_R, peak, distance) in seen.items():
        readings_nR[place_of[i], theirs] = reading_R[theirs]
        peak_n[place_of[i]], distance_n[place_of[i]] = peak, distance
    columns = (readings_nR, good.cluster_n, torch.ones_like(counted_n))
    score_n = model.scorer.calibrate(*(column.to(model.device) for column in columns))[0].cpu()
    for members in classes:
        for i in (i for copies in members for i in copies):
            sample = source.samples[i]
            counted_n[place_of[i]] &= not isinstance(sample, Copy) or sample.tolerated
        if len(members) == 1:
            together = [place_of[i] for i in members[0]]
            for column in (score_n, peak_n, distance_n):
                column[together] = column[together].amax()
    return good._replace(
        score_n=score_n, peak_n=peak_n, distance_n=distance_n, counted_n=counted_n, readings_nR=readings_nR
    )


def _by_image(source: FeatureSource, positions: Sequence[int]) -> _Classes:
    by_class: dict[str, dict[object, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in positions:
        sample = source.samples[i]
        by_class[sample.class_name][sample.image, sample.record].append(i)
    return [list(images.values()) for images in by_class.values()]


def _left_out(
    model: AnomalyModel, source: FeatureSource, classes: _Classes, seed: int, progress: Progress
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Position -> raw readings, peak and distance by statistics that saw neither the image nor its copies."""
    answers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    several = [members for members in classes if len(members) > 1]
    everything = {i for members in classes for copies in members for i in copies}
    turns = max((len(members) for members in several), default=0)
    for turn in range(turns):
        progress("leaving images out", turn + 1, turns)
        away = [i for members in several for copies in members[turn : turn + 1] for i in copies]
        fit_statistics(model, source, sorted(everything - set(away)), [], seed, silent, students=False, divide=False)
        model.scorer.asks_students = False
        outs = [model.score(*batch) for batch in source.batches(away)]
        model.scorer.asks_students = True
        readings = torch.cat([out.readings_BR for out in outs]).cpu()
        peaks = torch.cat([out.map_B1HW.amax((1, 2, 3)) for out in outs]).cpu()
        distances = torch.cat([out.cluster_distance_B for out in outs]).cpu()
        answers.update(zip(away, zip(readings, peaks, distances, strict=True), strict=True))
    return answers
