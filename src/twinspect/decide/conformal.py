"""From scores of good images to p-values and thresholds with a stated false-alarm rate. Numpy only.

Split-conformal: if a new good image and the calibration images are exchangeable (same camera, light,
session), then P(p <= a) <= a for every a. It says nothing about another day; calibrate again there.

Labelled images can set a threshold too (`labelled_threshold`); that is a measured choice, not a promise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twinspect.config import RULES
from twinspect.errors import ConfigError, DataError, unknown_name

Floats = NDArray[np.float64]

FEWEST = 20  # good images below which `twinspect calibrate` refuses
_GAP_FALSE_WARNING = 1e-4  # chance that `suspicious_tail` speaks up on a clean exponential tail, scale known
_TAIL_SHARE = 0.3  # largest share of a good folder that is looked at as possible anomalies


@dataclass(frozen=True, slots=True)
class Threshold:
    """A decision rule and what can honestly be said about it."""

    value: float  # images scoring at or above this are called anomalous
    max_fpr: float  # the false-alarm budget that was asked for
    guaranteed: bool  # whether the number of calibration images supports that budget
    sentence: str  # the promise in words and counts


def p_values(score_N: Floats | float, calibration_M: Floats) -> Floats:
    """Conformal p-value of each score: (1 + number of calibration scores >= score) / (M + 1)."""
    ordered = np.sort(calibration_M)
    at_least = len(ordered) - np.searchsorted(ordered, score_N, side="left")
    return np.asarray((1.0 + at_least) / (len(ordered) + 1.0), dtype=np.float64)


def images_needed(max_fpr: float) -> int:
    """Fewest calibration images that can support a false-alarm budget: the smallest p-value is 1 / (n + 1)."""
    return max(1, math.ceil(1.0 / checked_rate(max_fpr) - 1e-9) - 1)


def checked_rate(rate: float, option: str = "--max-fpr") -> float:
    """The rate itself.

    Raises:
        ConfigError: outside (0, 1).
    """
    if not 0.0 < rate < 1.0:
        raise ConfigError(f"{option} {rate}: accepted a rate between 0 and 1, such as 0.01")
    return rate


def conformal_threshold(calibration_M: Floats, max_fpr: float) -> Threshold:
    """Lowest threshold whose false-alarm rate on exchangeable good images is at most ``max_fpr``.

    With fewer than 1 / max_fpr - 1 images the budget cannot be promised: the threshold is then put just
    above the largest calibration score, ``guaranteed`` is False and the sentence says what is promised.

    Raises:
        ConfigError: a budget outside (0, 1).
        DataError: no scores, or one that is not finite.
    """
    checked_rate(max_fpr)
    scores = np.sort(np.asarray(calibration_M, dtype=np.float64))
    count = len(scores)
    if count == 0:
        raise DataError(f"no calibration scores; give at least {FEWEST} good images")
    if not np.isfinite(scores).all():
        raise DataError("a calibration score is not finite; the model or an image is damaged")
    # p <= max_fpr means: at most k - 1 calibration scores reach the image's score.
    allowed = math.floor(max_fpr * (count + 1) + 1e-9) - 1
    value = float(np.nextafter(scores[count - 1 - max(allowed, 0)], np.inf))
    share, needed = f"{100 * max_fpr:g} %", images_needed(max_fpr)
    if allowed >= 0:
        sentence = f"from {count} good images: at most {share} of the next ones, taken like these, will be called bad"
    elif count == 1:
        sentence = f"from 1 good image: nothing is promised; for {share} at least {needed} are needed"
    else:
        sentence = (
            f"from {count} good images: about 1 good image in {count + 1} will be called bad, at best; for "
            f"{share} at least {needed} good images are needed"
        )
    return Threshold(value, max_fpr, allowed >= 0, sentence)


def refuse_unsupported(count: int, max_fpr: float, what: str = "--max-fpr") -> None:
    """Refuse a budget that this many good images cannot support.

    Raises:
        ConfigError: says how many are needed, and what these support.
    """
    needed = images_needed(max_fpr)
    if count < needed:
        raise ConfigError(
            f"{what} {max_fpr:g}: {count} good images cannot support it, at least {needed} are needed "
            f"({needed - count} more); with {count} the lowest rate is {what} {math.ceil(1e4 / (count + 1)) / 1e4:g}"
        )


def suspicious_tail(score_N: Floats) -> NDArray[np.intp]:
    """Positions of scores that look like anomalies among good images; empty when nothing stands apart.

    In an exponential tail (which the surprise score has by construction) the gap between the j-th and the next
    largest score, times j, is exponential with one scale for all j (Renyi). A gap far above that scale, which the
    upper half gives robustly, separates a second group. Anomalies that score like good images cannot be seen this
    way, nor more than three in ten. Of clean sets of 20, 1 in 100 is suspected, as few images give a rough scale.
    """
    order = np.argsort(score_N)[::-1]
    upper = np.asarray(score_N, dtype=np.float64)[order][: len(order) // 2 + 1]
    scaled_gap = -np.diff(upper) * np.arange(1, len(upper))
    if len(upper) < FEWEST // 2 or np.median(scaled_gap) <= 0.0:  # too few, or more than half of them are ties
        return order[:0]
    looked_at = max(1, int(_TAIL_SHARE * len(order)))
    limit = np.median(scaled_gap) / math.log(2.0) * math.log(looked_at / _GAP_FALSE_WARNING)
    wide = np.flatnonzero(scaled_gap[:looked_at] > limit)  # anomalies differ among themselves: the lowest counts
    return order[: wide[-1] + 1] if len(wide) else order[:0]


def labelled_threshold(
    score_N: Floats, label_N: Sequence[int] | NDArray[np.int64], rule: str, miss_cost: float = 1.0
) -> Threshold:
    """Threshold chosen on labelled images: best F1, lowest cost, or no labelled defect missed.

    It lies half-way to the next lower score; ``max_fpr`` is the share of labelled good images that it calls bad.
    ``miss_cost`` is the cost of a missed defect, where a false alarm costs 1 (``min-cost`` only).

    Raises:
        ConfigError: an unknown rule or a cost that is not positive.
        DataError: not both kinds, or a score that is not finite.
    """
    if rule not in RULES:
        raise ConfigError(unknown_name("rule", rule, RULES))
    if not (miss_cost > 0 and math.isfinite(miss_cost)):
        raise ConfigError(f"--miss-cost {miss_cost:g}: accepted a number above 0 (a false alarm costs 1)")
    scores, labels = np.asarray(score_N, dtype=np.float64), np.asarray(label_N)
    if not np.isfinite(scores).all():
        raise DataError("a score of a labelled image is not finite; the model or an image is damaged")
    bad, good = int((labels == 1).sum()), int((labels == 0).sum())
    if not bad or not good:
        raise DataError(f"{bad} defects and {good} good images are labelled; a threshold needs some of both")
    values, missed, alarms = _sweep(scores, labels)
    hits = bad - missed
    if rule == "zero-miss":
        best = int(np.flatnonzero(missed == 0)[-1])
    elif rule == "min-cost":
        best = int(np.argmin(miss_cost * missed + alarms))
    else:
        best = int(np.argmax(2.0 * hits / np.maximum(hits + alarms + bad, 1)))
    sentence = (
        f"chosen by {rule}{f' ({miss_cost:g} per miss)' if rule == 'min-cost' else ''} on {bad + good} labelled "
        f"images: {missed[best]} of {bad} defects missed, {alarms[best]} of {good} good images called bad; "
        "expect worse on others, nothing is promised"
    )
    return Threshold(float(values[best]), float(alarms[best] / good), False, sentence)


def _sweep(scores: Floats, labels: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Every useful threshold, rising, with missed defects and false alarms at each."""
    distinct = np.unique(scores)
    middle = distinct[:-1] + np.diff(distinct) / 2.0
    # Half-way between neighbouring scores; two that differ in the last bit have no half-way.
    middle = np.where(middle > distinct[:-1], middle, distinct[1:])
    values = np.concatenate([distinct[:1], middle, [np.nextafter(distinct[-1], np.inf)]])
    bad, good = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    missed = np.searchsorted(bad, values, side="left")
    alarms = len(good) - np.searchsorted(good, values, side="left")
    return values, missed, alarms
