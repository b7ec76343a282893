"""Any predictor against labelled samples: metrics per class and mean, rows per image, in constant memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twinspect.data.samples import has_pixel_truth, read_sample_mask
from twinspect.errors import DataError
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result
from twinspect.metrics import Evaluator
from twinspect.types import TEST, Sample

SCORES = ("score", "score_local", "score_semantic")
Progress = Callable[[str, int, int], None]
Visit = Callable[[Sample, Result], None]


@dataclass(slots=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        table: ``classes``, ``mean``, ``defects``, ``images`` of the joint score, ready for JSON.
        students: mean and per-class image metrics of each student alone.
        rows: one plain dict per image.
        seconds: wall time of decoding and prediction.
        failed: images that could not be scored, with reasons.
    """

    table: dict[str, Any]
    students: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)


def test_samples(samples: Sequence[Sample]) -> list[Sample]:
    """The labelled test images.

    Raises:
        DataError: there are none.
    """
    found = [s for s in samples if s.split == TEST and s.label is not None]
    if not found:
        raise DataError(
            "no labelled test images found; eval needs test/good and test/<defect> folders (MVTec layout) or "
            "a manifest with the split 'test'. To score unlabelled images type: twinspect predict BUNDLE PATH"
        )
    return found


def evaluate(
    predictor: Predictor, samples: Sequence[Sample], progress: Progress, visit: Visit | None = None
) -> Evaluation:
    """Score labelled samples and compute every metric; pixel metrics at the images' own resolution.

    Args:
        predictor: any loaded model.
        samples: with labels; masks where there are some.
        progress: called with (stage, done, total).
        visit: called with every sample and result (with map and image), for reports.
    """
    joint = Evaluator()
    students = {name: Evaluator(pixel=False) for name in SCORES[1:]}
    masked = {s.class_name for s in samples if s.masks}
    rows, failed, began = [], [], time.monotonic()
    results = predictor.predict(samples)
    for done, (sample, result) in enumerate(zip(samples, results, strict=True)):
        result.path = str(sample.image)
        progress("evaluating", done + 1, len(samples))
        if result.error:
            failed.append(f"{sample.image}: {result.error}")
            continue
        _update(joint, sample, result, sample.class_name in masked)
        for name, evaluator in students.items():
            evaluator.update(getattr(result, name), sample.label, sample.class_name, sample.defect_type)
        rows.append({**result.row(), **_truth(sample)})
        if visit is not None:
            visit(sample, result)
    table = _plain(joint.compute())
    alone = {name: _plain(evaluator.compute()) for name, evaluator in students.items()}
    return Evaluation(table, alone, rows, time.monotonic() - began, failed)


def _update(evaluator: Evaluator, sample: Sample, result: Result, masked: bool) -> None:
    use_map = masked and has_pixel_truth(sample)
    mask = read_sample_mask(sample, (result.height, result.width)) if use_map and sample.masks else None
    evaluator.update(
        result.score, sample.label, sample.class_name, sample.defect_type,
        map_HW=result.map if use_map else None, mask_HW=mask, name=str(sample.image), group=sample.group,
    )  # fmt: skip


def _truth(sample: Sample) -> dict[str, Any]:
    return {"true_class": sample.class_name, "label": sample.label, "defect_type": sample.defect_type}


def _plain(values: Any) -> Any:
    """Numpy numbers to Python's, so that json takes them."""
    if isinstance(values, dict):
        return {str(k): _plain(v) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return [_plain(v) for v in values]
    return values.item() if isinstance(values, np.generic) else values
