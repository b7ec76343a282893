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
    places = {i: place for place, i in enumerate(sorted([*train_at, *held_at]))}
    originals = _originals(source, [i for i in train_at if source.samples[i].class_name in few])
    seen = _left_out(model, source, originals, seed, progress)
    divide = {s.class_name for s in source.samples} != few
    good = fit_statistics(model, source, train_at, held_at, seed, progress, students, divide)
    if not originals:
        return good
    readings_nR, peak_n, distance_n = good.readings_nR.clone(), good.peak_n.clone(), good.distance_n.clone()
    theirs = ~_students_columns(model)
    for i, (reading_R, peak, distance) in seen.items():
        readings_nR[places[i], theirs] = reading_R[theirs]
        peak_n[places[i]], distance_n[places[i]] = peak, distance
    everything = torch.ones_like(good.counted_n)
    score_n, _ = model.scorer.calibrate(
        readings_nR.to(model.device), good.cluster_n.to(model.device), everything.to(model.device)
    )
    score_n, counted_n = score_n.cpu(), good.counted_n.clone()
    for i in (i for members in originals.values() for copies in members for i in copies):
        sample = source.samples[i]
        counted_n[places[i]] &= not isinstance(sample, Copy) or sample.tolerated
    for members in (images for images in originals.values() if len(images) == 1):
        together = [places[i] for i in members[0]]
        for column in (score_n, peak_n, distance_n):
            column[together] = column[together].amax()
    return good._replace(
        score_n=score_n, peak_n=peak_n, distance_n=distance_n, counted_n=counted_n, readings_nR=readings_nR
    )


def _originals(source: FeatureSource, positions: Sequence[int]) -> dict[str, list[list[int]]]:
    """Class -> for each of its images the positions of the image and its copies."""
    by_class: dict[str, dict[object, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in positions:
        sample = source.samples[i]
        by_class[sample.class_name][sample.image, sample.record].append(i)
    return {name: list(images.values()) for name, images in by_class.items()}


def _left_out(
    model: AnomalyModel,
    source: FeatureSource,
    originals: dict[str, list[list[int]]],
    seed: int,
    progress: Progress,
) -> dict[int, tuple[Tensor, float, float]]:
    """Position -> raw readings, peak and distance by statistics that saw neither the image nor its copies."""
    answers: dict[int, tuple[Tensor, float, float]] = {}
    several = [members for members in originals.values() if len(members) > 1]
    turns = max((len(members) for members in several), default=0)
    for turn in range(turns):
        progress("leaving images out", turn + 1, turns)
        away = [i for members in several for copies in members[turn : turn + 1] for i in copies]
        known = sorted({i for members in originals.values() for copies in members for i in copies} - set(away))
        fit_statistics(model, source, known, [], seed, silent, students=False, divide=False)
        model.scorer.asks_students = False
        for part, observed, small in source.batches(away):
            out = model.score(observed, small)
            for i, *values in zip(part, out.readings_BR, out.map_B1HW, out.cluster_distance_B, strict=True):
                answers[i] = (values[0].cpu(), float(values[1].amax()), float(values[2]))
        model.scorer.asks_students = True
    return answers


def _students_columns(model: AnomalyModel) -> Tensor:
    """Which readings are the students' own."""
    scorer = model.scorer
    local, semantic = scorer.student_readings
    column_R = torch.zeros(len(scorer.weight_R), dtype=torch.bool)
    column_R[:local] = column_R[scorer.local_count : scorer.local_count + semantic] = True
    return column_R
