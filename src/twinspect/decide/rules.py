"""Whose good images and which rule give a class its threshold. Numpy only.

A class goes by its own good images. Where they are enough for its budget, its threshold is conformal: a promise.
Where they are too few, the threshold lies just above the highest of them, which promises 1 / (n + 1) and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.decide.conformal import (
    FEWEST_TAIL,
    Floats,
    Threshold,
    conformal_threshold,
    extended_p_values,
    extended_threshold,
    images_needed,
    p_value,
)
from twinspect.errors import ConfigError

# What decided a threshold, as tables name it.
OWN, SESSIONS, EVERY, LABELS, HAND = "own images", "sessions", "every class", "labels", "set by hand"
MAX_FPR = 0.02  # share of good images that may be called bad, where nothing else is asked for
_FEWEST_DISTANCES = 19  # images of a class below which its distances are judged with those of all classes


@dataclass(frozen=True, slots=True)
class GoodScores:
    """Good images the thresholds are made from, one place per image in every field.

    Attributes:
        score: joint score.
        peak: highest value of the map; NaN where unknown.
        distance: to the nearest cluster; NaN where unknown.
        class_name: class as the data say.
        predicted: class of the nearest cluster.
        group: session or physical object; empty where unknown.
        key: `image_id` of the image; empty where unknown.
    """

    score: Floats
    peak: Floats
    distance: Floats
    class_name: tuple[str, ...]
    predicted: tuple[str, ...]
    group: tuple[str, ...] = ()
    key: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("group", "key"):
            if not getattr(self, name):
                object.__setattr__(self, name, ("",) * len(self.score))
        if len({len(getattr(self, name)) for name in self.__slots__}) != 1:
            raise ValueError("calibration columns of different lengths")

    def __len__(self) -> int:
        return len(self.score)

    def take(self, chosen: NDArray[np.bool_]) -> GoodScores:
        """The images where ``chosen`` is true."""
        numbers = {n: getattr(self, n)[chosen] for n in _NUMBERS}
        texts = {n: tuple(v for v, k in zip(getattr(self, n), chosen, strict=True) if k) for n in _TEXTS}
        return GoodScores.of_columns({**numbers, **texts})

    def join(self, other: GoodScores) -> GoodScores:
        """These images, then those of ``other``."""
        numbers = {n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in _NUMBERS}
        return GoodScores.of_columns({**numbers, **{n: getattr(self, n) + getattr(other, n) for n in _TEXTS}})

    def of_class(self, name: str, given: bool) -> NDArray[np.bool_]:
        """Which images are of a class, by the data or by prediction; an empty name takes all."""
        names = self.class_name if given else self.predicted
        return np.array([not name or one == name for one in names], dtype=np.bool_)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        numbers = {n: [None if v != v else v for v in getattr(self, n).tolist()] for n in _NUMBERS}
        return {**numbers, **{n: list(getattr(self, n)) for n in _TEXTS}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GoodScores:
        """Rebuild from `to_dict`."""
        numbers = {n: np.array([np.nan if v is None else v for v in values[n]], np.float64) for n in _NUMBERS}
        return cls.of_columns({**numbers, **{n: tuple(str(v) for v in values[n]) for n in _TEXTS}})

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[Any]]) -> GoodScores:
        """From the values of every image, in the order of the fields."""
        names = (*_NUMBERS, *_TEXTS)
        columns = dict(zip(names, list(zip(*rows, strict=True)) or [()] * len(names), strict=True))
        return cls.of_columns({**columns, **{n: np.array(columns[n], np.float64) for n in _NUMBERS}})

    @classmethod
    def of_columns(cls, columns: Mapping[str, Any]) -> GoodScores:
        """From a mapping with every field."""
        return cls(**{name: columns[name] for name in (*_NUMBERS, *_TEXTS)})


_NUMBERS, _TEXTS = ("score", "peak", "distance"), ("class_name", "predicted", "group", "key")


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked for.

    Attributes:
        max_fpr: share of good images that may be called bad.
        unsure: share of good images that may be called bad or unsure; None gives two answers only.
        region_fpr: share of good images that may show a region.
    """

    max_fpr: float = MAX_FPR
    unsure: float | None = None
    region_fpr: float = MAX_FPR

    def __post_init__(self) -> None:
        for name, rate in (("max-fpr", self.max_fpr), ("unsure", self.unsure), ("region-fpr", self.region_fpr)):
            if rate is not None and not 0.0 < rate < 1.0:
                raise ConfigError(f"--{name} {rate}: accepted a rate between 0 and 1, such as 0.01")
        if self.unsure is not None and self.unsure <= self.max_fpr:
            raise ConfigError(
                f"--unsure {self.max_fpr:g} {self.unsure:g}: the second rate is of good images called bad or "
                "unsure and must be the larger one, such as --unsure 0.01 0.05"
            )


@dataclass(frozen=True, slots=True)
class Rule:
    """How images of one class are judged.

    Attributes:
        class_name: empty for all classes together.
        images: good images behind it.
        basis: what decided the threshold of the score.
        image: threshold of the score.
        unsure: lower threshold of the score, where a third answer is wanted.
        region: threshold of map values.
        far: threshold of the distance to the nearest cluster; None where distances are unknown. By the tail of the
            distances where they are too few for the budget.
        references: sorted scores, one array a group (or one in all); a p-value is the largest among them.
        peaks, distances: sorted map maxima and distances.
    """

    class_name: str
    images: int
    basis: str
    image: Threshold
    unsure: Threshold | None
    region: Threshold | None
    far: Threshold | None
    references: tuple[Floats, ...]
    peaks: Floats
    distances: Floats

    def p_value(self, score: float) -> float:
        """Conformal p-value of a score."""
        return max(p_value(score, one) for one in self.references)

    def class_p(self, distance: float) -> float:
        """p-value of a distance to the nearest cluster; NaN where distances are unknown."""
        if self.far is None or distance != distance:
            return float("nan")
        if _has_tail(len(self.distances), self.far.max_fpr):
            return float(extended_p_values(np.array([distance]), self.distances)[0])
        return p_value(distance, self.distances)


def class_sentence(rule: Rule) -> str:
    """What is promised for a class, in words, for images, regions and the third answer."""
    parts = [rule.image.sentence]
    if rule.unsure is not None:
        parts.append(f"called bad or unsure: {rule.unsure.sentence}")
    if rule.region is not None and (rule.region.max_fpr != rule.image.max_fpr or not rule.region.guaranteed):
        parts.append(f"with a region: {rule.region.sentence}")
    return "; ".join(parts)


def make_rule(
    good: GoodScores, class_name: str, given: bool, budget: Budget, by_group: bool, fixed: Threshold | None
) -> Rule:
    """How images of a class are judged.

    Args:
        good: calibration images.
        class_name: empty for all classes together.
        given: whether the class of an image is known, or predicted.
        budget: of the class.
        by_group: whether every session must keep it.
        fixed: threshold chosen on labelled images, instead.
    """
    of_class = good.of_class(class_name, given)
    # A class without any image of its own can only be judged with the others.
    rows, basis = (good.take(of_class), OWN) if of_class.any() else (good, EVERY)
    references = _references(rows, images_needed(budget.max_fpr) if by_group else 0)
    image = _strictest(references, budget.max_fpr, len(rows))
    basis = SESSIONS if len(references) > 1 else basis
    unsure = None
    if fixed is not None:
        image, basis = fixed, HAND if fixed.sentence.startswith(HAND) else LABELS
    if budget.unsure is not None:
        unsure = _strictest(references, budget.unsure, len(rows))
        unsure = unsure if unsure.value <= image.value else None
    peaks, distances = _known(rows.peak), _known(_near(good, class_name, given).distance)
    return Rule(
        class_name, len(rows), basis, image, unsure,
        conformal_threshold(peaks, budget.region_fpr) if len(peaks) else None,
        _far(distances, budget.max_fpr) if len(distances) else None,
        references, peaks, distances,
    )  # fmt: skip


def _has_tail(count: int, max_fpr: float) -> bool:
    """Whether images are too few for a budget, and enough to go by their tail instead."""
    return FEWEST_TAIL <= count < images_needed(max_fpr)


def _far(distances: Floats, max_fpr: float) -> Threshold:
    threshold = conformal_threshold(distances, max_fpr)
    if not _has_tail(len(distances), max_fpr):
        return threshold
    return replace(threshold, value=extended_threshold(distances, max_fpr))


def _references(rows: GoodScores, smallest_group: int) -> tuple[Floats, ...]:
    """Scores of every group that is large enough alone, and of all images where one is not; or one array."""
    everything = np.sort(rows.score)
    names = sorted(set(rows.group))
    if not smallest_group or len(names) < 2:
        return (everything,)
    by_group = [np.sort(rows.score[np.array([g == name for g in rows.group])]) for name in names]
    large = [one for one in by_group if len(one) >= smallest_group]
    return tuple(large) if len(large) == len(by_group) else (*large, everything)


def _strictest(references: Sequence[Floats], max_fpr: float, images: int) -> Threshold:
    """The highest of the references' thresholds: it keeps the budget in each of them."""
    thresholds = [conformal_threshold(one, max_fpr) for one in references]
    best = max(thresholds, key=lambda one: one.value)
    if len(thresholds) == 1:
        return best
    called = sum(int((one >= best.value).sum()) for one in references if len(one) < images)
    sentence = (
        f"{called} of {images} good images would be called bad; the promised rate is {100 * max_fpr:g} % in every "
        f"session with images enough ({len(thresholds)} thresholds, the highest is taken); a new session is not "
        "covered"
    )
    return Threshold(best.value, max_fpr, all(one.guaranteed for one in thresholds), sentence)


def _near(good: GoodScores, class_name: str, given: bool) -> GoodScores:
    of_class = good.of_class(class_name, given)
    return good.take(of_class) if int(of_class.sum()) >= _FEWEST_DISTANCES else good


def _known(values: Floats) -> Floats:
    finite: Floats = np.sort(values[np.isfinite(values)])
    return finite
