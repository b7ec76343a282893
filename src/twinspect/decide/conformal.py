"""From scores of good images to thresholds with a stated false-alarm rate. Numpy only.

Split-conformal: if a new good image and the calibration images are exchangeable (same camera, light, session), then
P(p <= a) <= a for every a. It says nothing about another day; calibrate again there.

A class goes by its own good images. Where they are enough for its budget, its threshold is conformal: a promise.
Where they are too few, the threshold lies just above the highest of them, which promises 1 / (n + 1) and no more.
Labelled images can set a threshold too (`labelled_threshold`); that is a measured choice, not a promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.errors import ConfigError, DataError, listed

Floats = NDArray[np.float64]
Texts = NDArray[np.object_]

FEWEST = 20  # good images below which `twinspect calibrate` refuses
MAX_FPR = 0.02  # share of good images that may be called bad, where nothing else is asked for
# What decided a threshold, as tables name it.
OWN, EVERY, LABELS, HAND = "own images", "every class", "labels", "set by hand"
_FEWEST_DISTANCES = 19  # images of a class below which its distances are judged with those of all classes
_GAP_FALSE_WARNING = 1e-4  # chance that `suspicious_tail` speaks up on a clean exponential tail, scale known
_FEWEST_TAIL = 5  # scores of the upper half, without which nothing is said of the highest
_TAIL_SHARE = 0.3  # largest share of a good folder that is looked at as possible anomalies


# ------------------------------------------------------------------------------------------- one list of scores


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


def checked_rate(rate: float, option: str = "--max-fpr") -> float:
    """The rate itself; a ConfigError outside of (0, 1)."""
    if not 0.0 < rate < 1.0:
        raise ConfigError(f"{option} {rate}: accepted a rate between 0 and 1, such as 0.01")
    return rate


def images_needed(max_fpr: float) -> int:
    """Fewest calibration images that can support a false-alarm budget: the smallest p-value is 1 / (n + 1)."""
    return max(1, math.ceil(1.0 / checked_rate(max_fpr) - 1e-9) - 1)


def refuse_unsupported(count: int, max_fpr: float, option: str = "--max-fpr") -> None:
    """Refuse, by a ConfigError, a rate that so many good images cannot support; it says which they can."""
    needed, lowest = images_needed(max_fpr), math.ceil(1e4 / (count + 1)) / 1e4
    if count < needed:
        raise ConfigError(
            f"{option} {max_fpr:g}: {count} good images cannot support it, at least {needed} are needed "
            f"({needed - count} more); with {count} the lowest rate is {lowest:g}"
        )


def conformal_threshold(calibration_M: Floats, max_fpr: float) -> Threshold:
    """Lowest threshold whose false-alarm rate on exchangeable good images is at most ``max_fpr``.

    With fewer than 1 / max_fpr - 1 images the budget cannot be promised: the threshold is then put just
    above the largest calibration score, ``guaranteed`` is False and the sentence says what is promised. No scores, or
    one that is not finite, raise a DataError.
    """
    needed = images_needed(max_fpr)
    scores = np.sort(np.asarray(calibration_M, dtype=np.float64))
    count = len(scores)
    if count == 0:
        raise DataError(f"no calibration scores; give at least {FEWEST} good images")
    if not np.isfinite(scores).all():
        raise DataError("a calibration score is not finite; the model or an image is damaged")
    # p <= max_fpr means: at most k - 1 calibration scores reach the image's score.
    allowed = math.floor(max_fpr * (count + 1) + 1e-9) - 1
    value = float(np.nextafter(scores[count - 1 - max(allowed, 0)], np.inf))
    share = f"{100 * max_fpr:g} %"
    if allowed >= 0:
        sentence = f"from {count} good images: about {share} of the next ones, taken like these, will be called bad"
    elif count == 1:
        sentence = f"from 1 good image: nothing is promised; for {share} at least {needed} are needed"
    else:
        sentence = (
            f"from {count} good images: about 1 good image in {count + 1} will be called bad, at best; for "
            f"{share} at least {needed} good images are needed"
        )
    return Threshold(value, max_fpr, allowed >= 0, sentence)


def labelled_threshold(
    score_N: Floats, label_N: Sequence[int] | NDArray[np.int64], rule: str, miss_cost: float = 1.0
) -> Threshold:
    """Threshold chosen on labelled images by a rule of `config.RULES`.

    It lies half-way to the next lower score; ``max_fpr`` is the share of labelled good images that it calls bad.
    ``miss_cost`` is the cost of a missed defect, where a false alarm costs 1 (``min-cost`` only). A cost that is not
    positive raises a ConfigError; a DataError, if not both kinds are there, or a score is not finite.
    """
    if not (miss_cost > 0 and math.isfinite(miss_cost)):
        raise ConfigError(f"--miss-cost {miss_cost:g}: accepted a number above 0 (a false alarm costs 1)")
    scores, labels = np.asarray(score_N, dtype=np.float64), np.asarray(label_N)
    if not np.isfinite(scores).all():
        raise DataError("a score of a labelled image is not finite; the model or an image is damaged")
    bad, good = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if not len(bad) or not len(good):
        raise DataError(
            f"{len(bad)} defects and {len(good)} good images are labelled; a threshold needs some of both"
        )
    distinct = np.unique(scores)
    middle = distinct[:-1] + np.diff(distinct) / 2.0
    middle = np.where(middle > distinct[:-1], middle, distinct[1:])  # neighbours in the last bit have no half-way
    values = np.concatenate([distinct[:1], middle, [np.nextafter(distinct[-1], np.inf)]])
    missed, alarms = np.searchsorted(bad, values), len(good) - np.searchsorted(good, values)
    hits = len(bad) - missed
    merit = {
        "f1-max": 2.0 * hits / np.maximum(hits + alarms + len(bad), 1),
        "min-cost": -(miss_cost * missed + alarms),
        "zero-miss": np.where(missed == 0, -alarms, -np.inf),
    }
    best = int(np.argmax(merit[rule]))
    sentence = (
        f"chosen by {rule}{f' ({miss_cost:g} per miss)' if rule == 'min-cost' else ''} on {len(scores)} labelled "
        f"images: {missed[best]} of {len(bad)} defects missed, {alarms[best]} of {len(good)} good images called bad; "
        "expect worse on others, nothing is promised"
    )
    return Threshold(float(values[best]), float(alarms[best] / len(good)), False, sentence)


def suspicious_tail(score_N: Floats) -> NDArray[np.intp]:
    """Positions of scores that look like anomalies among good images; empty when nothing stands apart.

    In an exponential tail (which the surprise score has by construction) the gap between the j-th and the next
    largest score, times j, is exponential with one scale for all j (Renyi). A gap far above that scale, which the
    upper half gives robustly, separates a second group. Anomalies that score like good images cannot be seen this
    way, nor more than three in ten. Of clean sets of 8 to 20, 1 in 100 is suspected: a rough scale.
    """
    order = np.argsort(score_N)[::-1]
    upper = np.asarray(score_N, dtype=np.float64)[order][: len(order) // 2 + 1]
    scaled_gap = -np.diff(upper) * np.arange(1, len(upper))
    if len(upper) < _FEWEST_TAIL or np.median(scaled_gap) <= 0.0:  # too few, or more than half of them are ties
        return order[:0]
    looked_at = max(1, int(_TAIL_SHARE * len(order)))
    limit = np.median(scaled_gap) / math.log(2.0) * math.log(looked_at / _GAP_FALSE_WARNING)
    wide = np.flatnonzero(scaled_gap[:looked_at] > limit)  # anomalies differ among themselves: the lowest counts
    return order[: wide[-1] + 1] if len(wide) else order[:0]


def odd_images(class_name: str, score_N: Floats, names: Sequence[str], threshold: float) -> tuple[str, list[int]]:
    """What to say of the good images of a class that `suspicious_tail` points at, and their positions.

    The text is empty where it points at none. It says so where the threshold is set by one of them.
    """
    odd = suspicious_tail(score_N)
    if not len(odd):
        return "", []
    highest, rest = score_N[odd[0]], np.delete(score_N, odd).max()
    if len(odd) == 1 and rest > 0.0 and np.nextafter(highest, np.inf) == threshold:
        times = f"{highest / rest:.1f} times the next one"
        return f"the threshold of {class_name} is set by {names[odd[0]]}, which scores {times}", odd.tolist()
    named = listed([f"{names[i]} ({score_N[i]:.1f})" for i in odd])
    raising = "; they raise the threshold" if score_N[odd[-1]] < threshold else ""
    return (
        f"{class_name}: {len(odd)} of {len(score_N)} images score far above the others, as if anomalies were among "
        f"the good ones{raising}: {named}",
        odd.tolist(),
    )


# ------------------------------------------------------------------------------------------------------ classes


@dataclass(frozen=True, slots=True, eq=False)
class GoodScores:
    """Good images that thresholds are made from: an array for each column, a place for each image.

    Numbers that are not known are NaN, texts are empty. Columns of different lengths raise a ValueError.
    """

    score: Floats  # joint score
    peak: Floats  # highest value of the map
    distance: Floats  # to the nearest cluster
    class_name: Texts  # as the data say
    predicted: Texts  # class of the nearest cluster
    group: Texts  # session or physical object
    key: Texts  # `image_id`

    def __post_init__(self) -> None:
        for field in fields(self):
            column: Any = getattr(self, field.name)
            if field.name in ("score", "peak", "distance"):
                column = np.array(column, np.float64)  # None becomes NaN
            else:
                column = np.array([str(value) for value in column], np.object_)
            object.__setattr__(self, field.name, column)
        if len(set(map(len, self.columns()))) != 1:
            raise ValueError("calibration columns of different lengths")

    def __len__(self) -> int:
        return len(self.score)

    def columns(self) -> list[NDArray[Any]]:
        """In the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def take(self, chosen: NDArray[Any]) -> GoodScores:
        """The images where ``chosen`` is true, or at these positions."""
        return GoodScores(*(column[chosen] for column in self.columns()))

    def join(self, other: GoodScores) -> GoodScores:
        """These images, then those of ``other``."""
        return GoodScores(*map(np.concatenate, zip(self.columns(), other.columns(), strict=True)))

    def of_class(self, name: str, given: bool = True) -> NDArray[np.bool_]:
        """Which images are of a class, by the data or by prediction; an empty name takes all."""
        names = self.class_name if given else self.predicted
        return np.asarray(names == name) if name else np.ones(len(self), np.bool_)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        lists = {field.name: getattr(self, field.name).tolist() for field in fields(self)}
        return {name: [None if v != v else v for v in values] for name, values in lists.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GoodScores:
        """Rebuild from `to_dict`."""
        return cls(*(values[field.name] for field in fields(cls)))


@dataclass(frozen=True, slots=True)
class Budget:
    """Shares of good images that were asked for."""

    max_fpr: float = MAX_FPR  # that may be called bad, and that may show a region
    unsure: float | None = None  # that may be called bad or unsure; None gives two answers only

    def __post_init__(self) -> None:
        checked_rate(self.max_fpr)
        if self.unsure is not None and checked_rate(self.unsure, "--unsure") <= self.max_fpr:
            raise ConfigError(
                f"--unsure {self.max_fpr:g} {self.unsure:g}: the second rate is of good images called bad or "
                "unsure and must be the larger one, such as --unsure 0.01 0.05"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """How images of one class are judged."""

    class_name: str  # empty for all classes together
    basis: str  # what decided the threshold of the score
    image: Threshold  # of the score
    unsure: Threshold | None  # lower one of the score, where a third answer is wanted
    region: Threshold | None  # of map values; None where no peak is known
    far: Threshold | None  # of the distance to the nearest cluster; None where distances are unknown
    scores: Floats  # this and the next two: what is known of the good images behind it
    peaks: Floats
    distances: Floats

    @classmethod
    def of(cls, good: GoodScores, class_name: str, given: bool, budget: Budget, fixed: Threshold | None) -> Rule:
        """The rule of a class, whether it is given or predicted; an empty name is for all classes together.

        ``fixed`` is a threshold to use instead of that from good images.
        """
        of_class = good.of_class(class_name, given)
        # A class without any image of its own can only be judged with the others.
        rows, basis = (good.take(of_class), OWN) if of_class.any() else (good, EVERY)
        image, unsure = conformal_threshold(rows.score, budget.max_fpr), None
        if fixed is not None:
            image, basis = fixed, HAND if fixed.sentence.startswith(HAND) else LABELS
        if budget.unsure is not None:
            unsure = conformal_threshold(rows.score, budget.unsure)
            unsure = unsure if unsure.value <= image.value else None
        near = rows if len(rows) >= _FEWEST_DISTANCES else good
        peaks, distances = (column[np.isfinite(column)] for column in (rows.peak, near.distance))
        region = conformal_threshold(peaks, budget.max_fpr) if len(peaks) else None
        far = conformal_threshold(distances, budget.max_fpr) if len(distances) else None
        return cls(class_name, basis, image, unsure, region, far, rows.score, peaks, distances)

    def sentence(self) -> str:
        """What is promised, in words, for images, regions and the third answer."""
        parts = [self.image.sentence]
        if self.unsure is not None:
            parts.append(f"called bad or unsure: {self.unsure.sentence}")
        if self.region is not None and self.region.sentence != self.image.sentence:
            parts.append(f"with a region: {self.region.sentence}")
        return "; ".join(parts)
