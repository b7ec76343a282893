"""Whose good images and which rule give a class its threshold. Numpy only.

A class goes by its own good images. Where they are enough for its budget, its threshold is conformal: a promise.
Where they are too few, the threshold lies just above the highest of them, which promises 1 / (n + 1) and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.decide.conformal import Floats, Threshold, checked_rate, conformal_threshold, images_needed, p_values
from twinspect.errors import ConfigError

# What decided a threshold, as tables name it.
OWN, SESSIONS, EVERY, LABELS, HAND = "own images", "sessions", "every class", "labels", "set by hand"
MAX_FPR = 0.02  # share of good images that may be called bad, where nothing else is asked for
_FEWEST_DISTANCES = 19  # images of a class below which its distances are judged with those of all classes
_NUMBERS = ("score", "peak", "distance")  # columns that are no texts
Texts = NDArray[np.object_]


@dataclass(frozen=True, slots=True, eq=False)
class GoodScores:
    """Good images that thresholds are made from: an array for each column, a place for each image.

    Numbers that are not known are NaN, texts are empty.

    Raises:
        ValueError: columns of different lengths.
    """

    score: Floats  # joint score
    peak: Floats  # highest value of the map
    distance: Floats  # to the nearest cluster
    class_name: Texts  # as the data say
    predicted: Texts  # class of the nearest cluster
    group: Texts = ()  # type: ignore[assignment]  # session or physical object
    key: Texts = ()  # type: ignore[assignment]  # `image_id`

    def __post_init__(self) -> None:
        for field in fields(self):
            values: Any = getattr(self, field.name)
            if field.name in _NUMBERS:
                column = np.array(values, np.float64)  # None becomes NaN
            elif field.default == () and not len(values):
                column = np.full(len(self.score), "", np.object_)
            else:
                column = np.array([str(value) for value in values], np.object_)
            object.__setattr__(self, field.name, column)
        if len({len(column) for column in self.columns()}) != 1:
            raise ValueError("calibration columns of different lengths")

    def __len__(self) -> int:
        return len(self.score)

    def columns(self) -> list[NDArray[Any]]:
        """All columns, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def take(self, chosen: NDArray[np.bool_]) -> GoodScores:
        """The images where ``chosen`` is true."""
        return GoodScores(*(column[chosen] for column in self.columns()))

    def join(self, other: GoodScores) -> GoodScores:
        """These images, then those of ``other``."""
        return GoodScores(*map(np.concatenate, zip(self.columns(), other.columns(), strict=True)))

    def of_class(self, name: str, given: bool) -> NDArray[np.bool_]:
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

    max_fpr: float = MAX_FPR  # that may be called bad
    unsure: float | None = None  # that may be called bad or unsure; None gives two answers only
    region_fpr: float = MAX_FPR  # that may show a region

    def __post_init__(self) -> None:
        checked_rate(self.max_fpr)
        checked_rate(self.region_fpr, "--region-fpr")
        if self.unsure is not None:
            checked_rate(self.unsure, "--unsure")
        if self.unsure is not None and self.unsure <= self.max_fpr:
            raise ConfigError(
                f"--unsure {self.max_fpr:g} {self.unsure:g}: the second rate is of good images called bad or "
                "unsure and must be the larger one, such as --unsure 0.01 0.05"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """How images of one class are judged."""

    class_name: str  # empty for all classes together
    images: int  # good images behind it
    basis: str  # what decided the threshold of the score
    image: Threshold  # of the score
    unsure: Threshold | None  # lower one of the score, where a third answer is wanted
    region: Threshold | None  # of map values; None where no peak is known
    far: Threshold | None  # of the distance to the nearest cluster; None where distances are unknown
    references: tuple[Floats, ...]  # scores of good images, by session or of all; a p-value is the largest of theirs
    peaks: Floats  # those of good images that are known
    distances: Floats

    def p_value(self, score: float) -> float:
        """Conformal p-value of a score."""
        return max(float(p_values(score, scores)) for scores in self.references)

    def sentence(self) -> str:
        """What is promised, in words, for images, regions and the third answer."""
        parts = [self.image.sentence]
        if self.unsure is not None:
            parts.append(f"called bad or unsure: {self.unsure.sentence}")
        if self.region is not None and (self.region.max_fpr != self.image.max_fpr or not self.region.guaranteed):
            parts.append(f"with a region: {self.region.sentence}")
        return "; ".join(parts)


def make_rule(
    good: GoodScores, class_name: str, given: bool, budget: Budget, by_group: bool, fixed: Threshold | None
) -> Rule:
    """How images of a class are judged, whether it is given or predicted; an empty name is for all classes together.

    ``by_group`` says whether every session must keep the budget; ``fixed`` is a threshold that was chosen instead.
    """
    of_class = good.of_class(class_name, given)
    # A class without any image of its own can only be judged with the others.
    rows, basis = (good.take(of_class), OWN) if of_class.any() else (good, EVERY)
    references = _sessions(rows, images_needed(budget.max_fpr)) if by_group else (rows.score,)
    if len(references) > 1:
        basis = SESSIONS
    image, unsure = _strictest(references, budget.max_fpr, len(rows)), None
    if fixed is not None:
        image, basis = fixed, HAND if fixed.sentence.startswith(HAND) else LABELS
    if budget.unsure is not None:
        unsure = _strictest(references, budget.unsure, len(rows))
        unsure = unsure if unsure.value <= image.value else None
    near = rows if len(rows) >= _FEWEST_DISTANCES else good
    peaks, distances = (column[np.isfinite(column)] for column in (rows.peak, near.distance))
    return Rule(
        class_name, len(rows), basis, image, unsure,
        conformal_threshold(peaks, budget.region_fpr) if len(peaks) else None,
        conformal_threshold(distances, budget.max_fpr) if len(distances) else None,
        references, peaks, distances,
    )  # fmt: skip


def _sessions(rows: GoodScores, smallest: int) -> tuple[Floats, ...]:
    """Scores of every session that is large enough alone, and of all images where one is not."""
    sessions = [rows.score[rows.group == name] for name in sorted(set(rows.group))]
    large = [scores for scores in sessions if len(scores) >= smallest]
    return tuple(large) if len(large) == len(sessions) else (*large, rows.score)


def _strictest(references: Sequence[Floats], max_fpr: float, images: int) -> Threshold:
    """The highest of the references' thresholds: it keeps the budget in each of them."""
    thresholds = [conformal_threshold(scores, max_fpr) for scores in references]
    best = max(thresholds, key=lambda threshold: threshold.value)
    if len(thresholds) == 1:
        return best
    called = sum(int((scores >= best.value).sum()) for scores in references if len(scores) < images)
    sentence = (
        f"{called} of {images} good images would be called bad; the promised rate is {100 * max_fpr:g} % in every "
        f"session with images enough ({len(thresholds)} thresholds, the highest is taken); a new session is not "
        "covered"
    )
    return Threshold(best.value, max_fpr, all(threshold.guaranteed for threshold in thresholds), sentence)
