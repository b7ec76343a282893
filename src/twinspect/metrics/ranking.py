"""Exact metrics of one score per image (or sample); ``IMAGE_METRICS`` lists those of every results table.

All of them take N scores (higher means more anomalous) and N labels (1 anomaly, 0 normal). Scores are compared,
never transformed: any range will do, and ties count as ties. Definitions agree with scikit-learn's
``roc_auc_score``, ``average_precision_score`` and ``roc_curve(drop_intermediate=False)``. With one label only,
nothing can be ranked, and the answer is nan ("undefined"), never 0.5. A DataError says which score is not finite or
which label is neither 0 nor 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twinspect.errors import DataError

Floats = NDArray[np.float64]
Metric = Callable[[Floats, NDArray[np.int64]], float]


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    try:
        values, truth = np.asarray(scores, np.float64), np.asarray(labels)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"scores and labels must be two lists of numbers ({error})") from None
    if values.ndim != 1 or values.shape != truth.shape:
        raise DataError(f"scores {values.shape} and labels {truth.shape} must be two lists of the same length")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(
            f"score of item number {bad[0]} is {values[bad[0]]}; accepted: finite numbers ({len(bad)} are not)"
        )
    if not np.isin(truth, (0, 1)).all():
        wrong = [label for label in truth.tolist() if label not in (0, 1)]
        raise DataError(f"labels hold {str(wrong[:5])[1:-1]}; accepted: 0 (normal) and 1 (anomaly)")
    return values, truth.astype(np.int64)


def _cumulative(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """True and false positives at every distinct score, descending, and those scores; each of length K."""
    values, truth = _checked(scores, labels)
    order = np.argsort(-values, kind="stable")
    ranked = values[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.zeros(0, int)
    tp = np.cumsum(truth[order])[last].astype(np.float64)
    return tp, 1.0 + last - tp, ranked[last]


def _one_label(tp: Floats, fp: Floats) -> bool:
    return not len(tp) or not tp[-1] or not fp[-1]


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """ROC curve at every distinct score.

    Returns:
        False positive rates, true positive rates and thresholds, K + 1 each, from (0, 0) at threshold inf
        ascending to (1, 1); an item is predicted anomalous where score >= threshold. A rate whose label does
        not occur is nan.
    """
    tp, fp, thresholds = (np.concatenate(([0.0], column)) for column in _cumulative(scores, labels))
    thresholds[0] = math.inf
    with np.errstate(invalid="ignore"):
        return fp / fp[-1], tp / tp[-1], thresholds


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that an anomaly scores above a normal item, ties counting half."""
    tp, fp, _ = _cumulative(scores, labels)
    if _one_label(tp, fp):
        return math.nan
    # Twice the area, in integers that float64 holds exactly below 9e15 pairs.
    twice = np.sum(np.diff(fp, prepend=0) * (tp + np.concatenate(([0.0], tp[:-1]))))
    return float(twice / (2 * tp[-1] * fp[-1]))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Sum over distinct scores of (recall gained) x (precision there), without interpolation."""
    tp, fp, _ = _cumulative(scores, labels)
    if _one_label(tp, fp):
        return math.nan
    return float(np.sum(np.diff(tp, prepend=0) * tp / (tp + fp)) / tp[-1])


def f1_max(scores: ArrayLike, labels: ArrayLike) -> float:
    """Best F1 over all thresholds."""
    tp, fp, _ = _cumulative(scores, labels)
    return math.nan if _one_label(tp, fp) else float(np.max(2 * tp / (tp + fp + tp[-1])))


IMAGE_METRICS: dict[str, Metric] = {
    "image_auroc": auroc,
    "image_ap": average_precision,
    "image_f1max": f1_max,
}
