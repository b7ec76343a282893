"""Exact ranking metrics for one score per item (image or sample).

Scores are compared, never transformed: any float range, ties count as ties. Definitions agree with
scikit-learn's ``roc_auc_score``, ``average_precision_score`` and ``roc_curve(drop_intermediate=False)``.
With one label only, nothing can be ranked: the answer is nan ("undefined"), never 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twinspect.errors import DataError

Floats = NDArray[np.float64]
Metric = Callable[[Floats, NDArray[np.int64]], float]


def check_scores(
    scores: ArrayLike, labels: ArrayLike, names: Sequence[str] | None = None
) -> tuple[Floats, NDArray[np.int64]]:
    """Scores as float64 and labels as int64, both of length N.

    Raises:
        DataError: no numbers, lengths differ, a label is not 0 or 1, or a score is not finite (names the item).
    """
    try:
        values, truth = np.asarray(scores, np.float64), np.asarray(labels)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"scores and labels must be two lists of numbers ({error})") from None
    if values.ndim != 1 or values.shape != truth.shape:
        raise DataError(f"scores {values.shape} and labels {truth.shape} must be two lists of the same length")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        who = names[bad[0]] if names is not None else f"item number {bad[0]}"
        raise DataError(f"score of {who} is {values[bad[0]]}; accepted: finite numbers ({len(bad)} are not)")
    if not np.isin(truth, (0, 1)).all():
        wrong = [label for label in truth.tolist() if label not in (0, 1)]
        raise DataError(f"labels hold {str(wrong[:5])[1:-1]}; accepted: 0 (normal) and 1 (anomaly)")
    return values, truth.astype(np.int64)


def _cumulative(scores: Floats, labels: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """True and false positives at every distinct score, descending, and those scores; each of length K."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.zeros(0, int)
    tp = np.cumsum(labels[order])[last].astype(np.float64)
    return tp, 1.0 + last - tp, ranked[last]


def _one_label(labels: NDArray[np.int64]) -> bool:
    return not 0 < int(labels.sum()) < len(labels)


def roc_curve(
    scores: ArrayLike, labels: ArrayLike, names: Sequence[str] | None = None
) -> tuple[Floats, Floats, Floats]:
    """ROC curve at every distinct score.

    Args:
        scores: N numbers, higher means more anomalous.
        labels: N values, 1 anomaly, 0 normal.
        names: N names for error messages.

    Returns:
        False positive rates, true positive rates and thresholds, K + 1 each, from (0, 0) at threshold inf
        ascending to (1, 1); an item is predicted anomalous where score >= threshold. A rate whose label does
        not occur is nan.

    Raises:
        DataError: see ``check_scores``.
    """
    values, truth = check_scores(scores, labels, names)
    tp, fp, thresholds = (np.concatenate(([0.0], c)) for c in _cumulative(values, truth))
    thresholds[0] = math.inf
    with np.errstate(invalid="ignore"):
        return fp / fp[-1], tp / tp[-1], thresholds


def auroc(scores: ArrayLike, labels: ArrayLike, names: Sequence[str] | None = None) -> float:
    """Probability that an anomaly scores above a normal item, ties counting half; nan with one label only.

    Args:
        scores: N numbers, higher means more anomalous.
        labels: N values, 1 anomaly, 0 normal.
        names: N names for error messages.

    Raises:
        DataError: see ``check_scores``.
    """
    values, truth = check_scores(scores, labels, names)
    if _one_label(truth):
        return math.nan
    tp, fp, _ = _cumulative(values, truth)
    # Twice the area, in integers that float64 holds exactly below 9e15 pairs.
    twice = np.sum(np.diff(fp, prepend=0) * (tp + np.concatenate(([0.0], tp[:-1]))))
    return float(twice / (2 * tp[-1] * fp[-1]))


def average_precision(scores: ArrayLike, labels: ArrayLike, names: Sequence[str] | None = None) -> float:
    """Sum over distinct scores of (recall gained) x (precision there), no interpolation; nan with one label.

    Args:
        scores: N numbers, higher means more anomalous.
        labels: N values, 1 anomaly, 0 normal.
        names: N names for error messages.

    Raises:
        DataError: see ``check_scores``.
    """
    values, truth = check_scores(scores, labels, names)
    if _one_label(truth):
        return math.nan
    tp, fp, _ = _cumulative(values, truth)
    return float(np.sum(np.diff(tp, prepend=0) * tp / (tp + fp)) / tp[-1])


def f1_max(scores: ArrayLike, labels: ArrayLike, names: Sequence[str] | None = None) -> tuple[float, float]:
    """Best F1 over all thresholds, and the highest threshold that reaches it; (nan, nan) with one label only.

    The threshold is one of the scores: an item is predicted anomalous where score >= threshold.

    Args:
        scores: N numbers, higher means more anomalous.
        labels: N values, 1 anomaly, 0 normal.
        names: N names for error messages.

    Raises:
        DataError: see ``check_scores``.
    """
    values, truth = check_scores(scores, labels, names)
    if _one_label(truth):
        return math.nan, math.nan
    tp, fp, thresholds = _cumulative(values, truth)
    f1 = 2 * tp / (tp + fp + tp[-1])
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[best])


def bootstrap_interval(
    scores: ArrayLike, labels: ArrayLike, metric: Metric, n: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric; (nan, nan) with one label only.

    Normal items and anomalies are drawn separately, with replacement, so every draw has both. Items are
    sorted first: the interval does not depend on their order.

    Args:
        scores: N numbers, higher means more anomalous.
        labels: N values, 1 anomaly, 0 normal.
        metric: function of (scores, labels), such as ``auroc``.
        n: number of draws.
        seed: of the random numbers.
        level: share of draws inside the interval.

    Raises:
        DataError: see ``check_scores``; or ``n`` below 1; or ``level`` outside (0, 1).
    """
    values, truth = check_scores(scores, labels)
    if n < 1 or not 0 < level < 1:
        raise DataError(f"bootstrap needs n >= 1 and a level between 0 and 1; got n={n}, level={level}")
    if _one_label(truth):
        return math.nan, math.nan
    normal, anomaly = np.sort(values[truth == 0]), np.sort(values[truth == 1])
    drawn_truth = np.repeat((0, 1), (len(normal), len(anomaly))).astype(np.int64)
    rng = np.random.default_rng(seed)
    draws = [
        metric(np.concatenate((rng.choice(normal, len(normal)), rng.choice(anomaly, len(anomaly)))), drawn_truth)
        for _ in range(n)
    ]
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
