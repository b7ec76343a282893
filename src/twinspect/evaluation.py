"""Any predictor against labelled samples: metrics per class and mean, rows per image, in constant memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.data.samples import has_pixel_truth, has_saturation, read_regions, read_sample_mask
from twinspect.errors import DataError
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result
from twinspect.metrics import Evaluator
from twinspect.types import TEST, Progress, Sample

STUDENTS = ("score_local", "score_semantic")
_Mask = NDArray[np.bool_]
_Truth = tuple[_Mask | None, list[tuple[_Mask, float]] | None]  # a mask, or regions with their saturation areas


@dataclass(slots=True)
class Evaluation:
    """What was measured."""

    joint: Evaluator  # of the joint score, for bootstrap intervals or to merge with others
    table: dict[str, Any] = field(default_factory=dict)  # `Evaluator.compute` of the joint score
    students: dict[str, dict[str, Any]] = field(default_factory=dict)  # the same of each student alone, images only
    rows: list[dict[str, Any]] = field(default_factory=list)  # columns of a result, and the labels
    decisions: dict[str, dict[str, float]] = field(default_factory=dict)  # at thresholds in use: `count_calls`
    seconds: float = 0.0  # wall time of decoding and prediction
    failed: list[str] = field(default_factory=list)  # images that could not be scored, with reasons
    masks: list[str] = field(default_factory=list)  # that could not be used: image metrics only, with reasons


def test_samples(samples: Sequence[Sample]) -> list[Sample]:
    """The labelled test images; a DataError where there are none."""
    labelled = [s for s in samples if s.split == TEST and s.label is not None]
    if not labelled:
        raise DataError(
            "no labelled test images found; eval needs images of defects (a folder such as bad/ beside good/, or "
            "test/good and test/scratch), or a table with labels. "
            "To score unlabelled images type: twinspect predict BUNDLE PATH"
        )
    return labelled


def evaluate(predictor: Predictor, samples: Sequence[Sample], progress: Progress, pooled: str = "") -> Evaluation:
    """Score labelled samples and compute every metric; pixel metrics at the images' own resolution.

    An image that cannot be read, and a mask that cannot be read or does not fit its image, is listed and left out.
    Where the data state saturation areas (MVTec LOCO) every mask file is one region and AU-sPRO is added.
    ``pooled`` is a name under which all classes count as one, for semantic protocols; empty gives metrics per class.
    A score or map that is not finite raises a DataError.
    """
    masked = {s.class_name for s in samples if s.masks and not pooled}
    evaluation, began = Evaluation(Evaluator(pixel=not pooled)), time.monotonic()
    students = {name: Evaluator(pixel=False) for name in STUDENTS}
    results = predictor.predict(samples, maps=bool(masked), pixels=False)
    for done, (sample, result) in enumerate(zip(samples, results, strict=True)):
        progress("evaluating", done + 1, len(samples))
        if result.error:
            evaluation.failed.append(f"{result.path}: {result.error}")
            continue
        class_name = pooled or sample.class_name
        truth: _Truth = (None, None)
        use_map = sample.class_name in masked and has_pixel_truth(sample)
        if use_map and sample.masks:
            try:
                truth = _truth_of_pixels(sample, result)
            except DataError as error:
                use_map = False
                evaluation.masks.append(str(error))
        evaluation.joint.update(
            result.score, sample.label, class_name, sample.defect_type, result.map if use_map else None, *truth,
            name=result.path, group=sample.group,
        )  # fmt: skip
        for name, evaluator in students.items():
            score = getattr(result, name)
            evaluator.update(score, sample.label, class_name, sample.defect_type, name=f"{result.path} ({name})")
        labels = {"true_class": sample.class_name, "label": sample.label, "defect_type": sample.defect_type}
        evaluation.rows.append({**result.row(), **labels})
    evaluation.table = evaluation.joint.compute()
    evaluation.students = {name: evaluator.compute() for name, evaluator in students.items()}
    evaluation.seconds = time.monotonic() - began
    evaluation.decisions = count_calls(
        (pooled or r["true_class"], r["label"], r["is_anomaly"]) for r in evaluation.rows
    )
    return evaluation


def _truth_of_pixels(sample: Sample, result: Result) -> _Truth:
    """The mask of an image, or its regions where the data set states saturation areas.

    A DataError where a mask cannot be used, or says another thing than the label.
    """
    shape = (result.height, result.width)
    names = ", ".join(str(path) for path in sample.masks)
    if sample.label == 1 and has_saturation(sample):
        regions = [(region.mask, region.saturation) for region in read_regions(sample, shape)]
        mask, marks = None, bool(regions)
    else:
        mask, regions = read_sample_mask(sample, shape), None
        marks = bool(mask.any())
        if sample.label == 1 and all(edge.all() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])):
            raise DataError(
                f"{names}: marks the whole border of {sample.image}; are good and defect exchanged in it?"
            )
    if marks and sample.label == 0:
        raise DataError(f"{names}: marks a defect, and {sample.image} is called good")
    if not marks and sample.label == 1:
        raise DataError(f"{names}: marks no pixel, and {sample.image} is called a defect")
    return mask, regions


def count_calls(rows: Iterable[tuple[str, int, bool]]) -> dict[str, dict[str, float]]:
    """What the thresholds in use make of labelled images, by class; a share of no images is absent.

    Every one of ``rows`` has class, label, and whether the image is called anomalous.
    """
    counts: dict[str, dict[str, float]] = {}
    for name, label, called in rows:
        counted = counts.setdefault(name, dict.fromkeys(("defects", "found", "good", "false_alarms"), 0))
        counted["defects" if label else "good"] += 1
        counted["found" if label else "false_alarms"] += called
    for counted in counts.values():
        for part, whole, rate in (("found", "defects", "found_rate"), ("false_alarms", "good", "false_alarm_rate")):
            if counted[whole]:
                counted[rate] = counted[part] / counted[whole]
    return dict(sorted(counts.items()))


def shared_defects(defects: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean over classes per defect type, if all classes have the same types (MVTec LOCO's two), else empty."""
    kinds = [tuple(sorted(row)) for row in defects.values()]
    if len(kinds) < 2 or len(set(kinds)) != 1 or len(kinds[0]) < 2:
        return {}
    return {kind: float(np.mean([row[kind] for row in defects.values()])) for kind in kinds[0]}
