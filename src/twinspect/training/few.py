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

from twinspect.models.contract import AnomalyModel, Outputs
from twinspect.training.derived import Copy
from twinspect.training.normal import fit_statistics
from twinspect.training.outcome import GoodImages
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
    """`fit_statistics` of all images of a source, with classes of a few (``few``) calibrated on images left out.

    Copies count for no threshold.
    """
    by_class: dict[str, dict[object, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in train_at:
        sample = source.samples[i]
        if sample.class_name in few:
            by_class[sample.class_name][sample.image, sample.record].append(i)
    classes = [list(images.values()) for images in by_class.values()]  # of each for every image: it and its copies
    away, outs = _left_out(model, source, classes, seed, progress)
    divide = {s.class_name for s in source.samples} != few
    good = fit_statistics(model, source, train_at, held_at, seed, progress, students, divide)
    if not classes:
        return good
    readings_nR, peak_n, distance_n = good.readings_nR.clone(), good.peak_n.clone(), good.distance_n.clone()
    local, semantic = model.scorer.student_readings
    theirs = torch.ones(readings_nR.shape[1], dtype=torch.bool)  # the students' own stay as they are
    theirs[:local] = theirs[model.scorer.local_count : model.scorer.local_count + semantic] = False
    for out in outs:
        here, away = away[: len(out.score_B)], away[len(out.score_B) :]
        readings_nR[here] = torch.where(theirs, out.readings_BR.cpu(), readings_nR[here])
        peak_n[here] = out.map_B1HW.amax((1, 2, 3)).cpu()
        distance_n[here] = out.cluster_distance_B.cpu()
    columns = (readings_nR, good.cluster_n, torch.ones_like(good.counted_n))
    score_n: Tensor = model.scorer.calibrate(*(column.to(model.device) for column in columns))[0].cpu()
    counted_n = good.counted_n.clone()
    for images in classes:
        for i in (i for copies in images for i in copies):
            sample = source.samples[i]
            counted_n[i] &= not isinstance(sample, Copy) or sample.tolerated
        if len(images) == 1:
            for column in (score_n, peak_n, distance_n):
                column[images[0]] = column[images[0]].amax()
    return good._replace(
        score_n=score_n, peak_n=peak_n, distance_n=distance_n, counted_n=counted_n, readings_nR=readings_nR
    )


def _left_out(
    model: AnomalyModel, source: FeatureSource, classes: list[list[list[int]]], seed: int, progress: Progress
) -> tuple[list[int], list[Outputs]]:
    """Positions of images and copies, and what is said of them in batches by statistics that saw neither."""
    several = [images for images in classes if len(images) > 1]
    everything = {i for images in classes for copies in images for i in copies}
    turns, gone, outs = max((len(images) for images in several), default=0), list[int](), list[Outputs]()
    for turn in range(turns):
        progress("leaving images out", turn + 1, turns)
        away = [i for images in several for copies in images[turn : turn + 1] for i in copies]
        fit_statistics(model, source, sorted(everything - set(away)), [], seed, silent, students=False, divide=False)
        model.scorer.asks_students = False
        outs += [model.score(*batch) for batch in source.batches(away)]
        model.scorer.asks_students = True
        gone += away
    return gone, outs
