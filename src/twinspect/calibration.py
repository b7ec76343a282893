"""From scores of good images to p-values and thresholds with a stated false-alarm rate. Numpy only.

Split-conformal: if a new good image and the calibration images are exchangeable (same camera, light,
session), then P(p <= a) <= a for every a. It says nothing about another day; calibrate again there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twinspect.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Threshold:
    """A decision rule and what can honestly be said about it.

    Attributes:
        value: images scoring at or above this are called anomalous.
        max_fpr: the false-alarm budget that was asked for.
        guaranteed: whether the number of calibration images supports that budget.
        sentence: the promise in words and counts.
    """

    value: float
    max_fpr: float
    guaranteed: bool
    sentence: str


def p_values(score_N: NDArray[np.float64], calibration_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """Conformal p-value of each score: (1 + number of calibration scores >= score) / (M + 1)."""
    ordered = np.sort(calibration_M)
    at_least = len(ordered) - np.searchsorted(ordered, score_N, side="left")
    return (1.0 + at_least) / (len(ordered) + 1.0)


def conformal_threshold(calibration_M: NDArray[np.float64], max_fpr: float) -> Threshold:
    """Lowest threshold whose false-alarm rate on exchangeable good images is at most ``max_fpr``.

    With fewer than 1 / max_fpr - 1 images the budget cannot be promised: the threshold is then put just
    above the largest calibration score, ``guaranteed`` is False and the sentence says what is promised.

    Raises:
        ConfigError: a budget outside (0, 1).
        DataError: no scores, or one that is not finite.
    """
    if not 0.0 < max_fpr < 1.0:
        raise ConfigError(f"--max-fpr {max_fpr}: accepted a rate between 0 and 1, such as 0.01")
    scores = np.sort(np.asarray(calibration_M, dtype=np.float64))
    count = len(scores)
    if count == 0:
        raise DataError("no calibration scores; give at least 20 good images")
    if not np.isfinite(scores).all():
        raise DataError("a calibration score is not finite; the model or an image is damaged")
    # p <= max_fpr means: at most k - 1 calibration scores reach the image's score.
    allowed = math.floor(max_fpr * (count + 1) + 1e-9) - 1
    needed = math.ceil(1.0 / max_fpr) - 1
    value = float(np.nextafter(scores[count - 1 - max(allowed, 0)], np.inf))
    called = int((scores >= value).sum())
    if allowed < 0:
        sentence = (
            f"with {count} good images a rate under {100 / (count + 1):.2g} % cannot be promised; "
            f"for {100 * max_fpr:g} % at least {needed} are needed"
        )
    else:
        sentence = (
            f"{called} of {count} good images would be called bad; the promised rate is {100 * max_fpr:g} % "
            "on good images taken like these"
        )
    return Threshold(value, max_fpr, allowed >= 0, sentence)
