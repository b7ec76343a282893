"""Everything between raw scores and answers: whose good images, which budget, which threshold. No torch.

Conformal calibration is done per class. Where the class of an image is given, its score is ranked among the
good images of that class; where it is predicted, among the good images *predicted* to be of that class, so
that the promise holds with wrong predictions too. Classes with too few images are judged together; if that is
too few still, by the images of all classes, and then nothing is promised for them alone.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinspect.calibration import Floats, Threshold, conformal_threshold, images_needed, p_value
from twinspect.errors import BundleError, ConfigError, unknown_name

GOOD, UNSURE, ANOMALY = "good", "unsure", "anomaly"
KEY_BYTES = 8  # of an image's hash; enough to recognise it among a billion others
_NAMED = 4  # small classes that a sentence lists
_FEWEST_DISTANCES = 19  # images of a class below which its distances are judged with those of all classes


@dataclass(frozen=True, slots=True)
class GoodScores:
    """Good images the thresholds are made from, one place per image in every field.

    Attributes:
        score: joint score.
        peak: highest value of the map; NaN where unknown.
        distance: to the nearest scene prototype; NaN where unknown.
        class_name: class as the data say.
        predicted: class of the nearest prototype.
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

    def take(self, kept: NDArray[np.bool_]) -> GoodScores:
        """The images where ``kept`` is true."""
        numbers = {n: getattr(self, n)[kept] for n in _NUMBERS}
        texts = {n: tuple(v for v, k in zip(getattr(self, n), kept, strict=True) if k) for n in _TEXTS}
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

    max_fpr: float = 0.01
    unsure: float | None = None
    region_fpr: float = 0.01

    def __post_init__(self) -> None:
        for name, rate in (("max-fpr", self.max_fpr), ("unsure", self.unsure), ("region-fpr", self.region_fpr)):
            if rate is not None and not 0.0 < rate < 1.0:
                raise ConfigError(f"--{name} {rate}: accepted a rate between 0 and 1, such as 0.01")
        if self.unsure is not None and self.unsure <= self.max_fpr:
            raise ConfigError(
                f"--unsure {self.max_fpr:g} {self.unsure:g}: the second rate is of good images called bad or "
                "unsure and must be the larger one, such as --unsure 0.01 0.05"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"max_fpr": self.max_fpr, "unsure": self.unsure, "region_fpr": self.region_fpr}


@dataclass(frozen=True, slots=True)
class Rule:
    """How images of one class are judged.

    Attributes:
        class_name: empty for all classes together.
        images: good images behind it.
        pooled: whether the class had too few and those of other classes are used as well.
        image: threshold of the score.
        unsure: lower threshold of the score, where a third answer is wanted.
        region: threshold of map values.
        far: threshold of the distance to the nearest prototype; None where distances are unknown.
        references: sorted scores, one array a group (or one in all); a p-value is the largest among them.
        peaks, distances: sorted map maxima and distances.
    """

    class_name: str
    images: int
    pooled: bool
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


class Verdict(NamedTuple):
    """What a decision says about one image; see `Result` for the meaning of the fields."""

    class_name: str
    predicted_class: str
    class_p: float
    unknown_class: bool | None
    p_value: float
    threshold: float
    threshold_unsure: float
    answer: str
    rule: Rule


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """Everything between raw scores and answers; stored in the bundle as JSON.

    Attributes:
        good: calibration images.
        class_of_prototype: most common training class of each scene prototype.
        map_scale: (low, high) of map values for colours, one for all images.
        budget: error budgets of every class.
        budgets: of single classes, instead.
        by_group: whether every group (session) must keep the budget, not only all together.
        fixed: thresholds chosen on labelled images, by class.
        model_id: of the model the scores belong to.
        trained: sorted `image_id`s of the training images.
    """

    good: GoodScores
    class_of_prototype: tuple[str, ...]
    map_scale: tuple[float, float]
    budget: Budget = field(default_factory=Budget)
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    by_group: bool = False
    fixed: Mapping[str, Threshold] = field(default_factory=dict)
    model_id: str = ""
    trained: tuple[str, ...] = ()
    _rules: dict[tuple[str, bool], Rule] = field(init=False, repr=False, default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Classes that are known, sorted."""
        return sorted({*self.class_of_prototype, *self.good.class_name} - {""})

    @property
    def threshold(self) -> Threshold:
        """Image threshold of the only class, or of all classes together."""
        classes = self.classes
        return self.rule(classes[0] if len(classes) == 1 else "").image

    def budget_of(self, class_name: str) -> Budget:
        """Error budgets of a class."""
        return self.budgets.get(class_name, self.budget)

    def rule(self, class_name: str, given: bool = True) -> Rule:
        """How images of a class are judged; ``given`` says whether the class is known or predicted."""
        key = (class_name, given)
        if key not in self._rules:
            self._rules[key] = _make_rule(self, class_name, given)
        return self._rules[key]

    def judge(
        self, score: float, prototype: int, distance: float = float("nan"), class_name: str | None = None
    ) -> Verdict:
        """The answer for one image.

        Args:
            score: joint score.
            prototype: index of the nearest scene prototype.
            distance: to it; NaN where the model does not say.
            class_name: class of the image, if known; else the prototype's class is taken.
        """
        predicted = self.class_of_prototype[prototype]
        rule = self.rule(class_name or predicted, class_name is not None)
        near = self.rule(predicted, given=False)
        known = near.far is not None and distance == distance
        unsure = rule.unsure.value if rule.unsure is not None else float("nan")
        answer = ANOMALY if score >= rule.image.value else UNSURE if score >= unsure else GOOD
        return Verdict(
            class_name or predicted, predicted,
            p_value(distance, near.distances) if known else float("nan"),
            bool(distance >= near.far.value) if known and near.far is not None else None,
            rule.p_value(score), rule.image.value, unsure, answer, rule,
        )  # fmt: skip

    def checked_class(self, class_name: str | None) -> str | None:
        """The class itself.

        Raises:
            ConfigError: it is not one that the bundle knows.
        """
        if class_name is not None and class_name not in self.classes:
            raise ConfigError(unknown_name("class", class_name, self.classes))
        return class_name

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        fixed = {n: {"value": t.value, "max_fpr": t.max_fpr, "sentence": t.sentence} for n, t in self.fixed.items()}
        return {
            "good": self.good.to_dict(),
            "class_of_prototype": list(self.class_of_prototype),
            "map_scale": list(self.map_scale),
            "budget": self.budget.to_dict(),
            "budgets": {name: one.to_dict() for name, one in self.budgets.items()},
            "by_group": self.by_group,
            "fixed": fixed,
            "model_id": self.model_id,
            "trained": base64.b64encode(bytes.fromhex("".join(self.trained))).decode("ascii"),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """Rebuild from a bundle's JSON; thresholds are computed again from the calibration scores."""
        low, high = values["map_scale"]
        packed = base64.b64decode(values["trained"], validate=True).hex()
        step = 2 * KEY_BYTES
        return cls(
            GoodScores.from_dict(values["good"]),
            tuple(str(name) for name in values["class_of_prototype"]),
            (float(low), float(high)),
            Budget(**values["budget"]),
            {str(name): Budget(**one) for name, one in values["budgets"].items()},
            bool(values["by_group"]),
            {
                str(name): Threshold(float(t["value"]), float(t["max_fpr"]), False, str(t["sentence"]))
                for name, t in values["fixed"].items()
            },
            str(values["model_id"]),
            tuple(packed[i : i + step] for i in range(0, len(packed), step)),
        )


def image_id(digest: bytes) -> str:
    """Short name of an image from its content hash."""
    return digest[:KEY_BYTES].hex()


def refuse_other_model(decision: Decision, model_id: str, where: str) -> None:
    """Refuse thresholds whose scores another model gave.

    Raises:
        BundleError: the ids differ.
    """
    if decision.model_id != model_id:
        raise BundleError(
            f"{where}: its thresholds were made with another model (id {decision.model_id or 'unknown'}, this one "
            f"is {model_id}); scores of two models cannot be compared. Type: twinspect calibrate BUNDLE GOOD"
        )


def class_sentence(rule: Rule) -> str:
    """What is promised for a class, in words, for images, regions and the third answer."""
    parts = [rule.image.sentence]
    if rule.unsure is not None:
        parts.append(f"called bad or unsure: {rule.unsure.sentence}")
    if rule.region is not None and (rule.region.max_fpr != rule.image.max_fpr or not rule.region.guaranteed):
        parts.append(f"with a region: {rule.region.sentence}")
    return "; ".join(parts)


def promises(decision: Decision) -> Iterator[tuple[str, Rule]]:
    """Every known class with its rule (class given); all classes together come last, where there are several."""
    for name in decision.classes:
        yield name, decision.rule(name)
    if len(decision.classes) > 1:
        yield "all classes", decision.rule("")


def _make_rule(decision: Decision, class_name: str, given: bool) -> Rule:
    good, budget = decision.good, decision.budget_of(class_name)
    own = good.of_class(class_name, given)
    needed = images_needed(budget.max_fpr)
    pooled = bool(class_name) and int(own.sum()) < needed and int(own.sum()) < len(good)
    rows, names = _lenders(good, needed, given) if pooled else (good.take(own), [])
    references = _references(rows, needed if decision.by_group else 0)
    image = _strictest(references, budget.max_fpr, len(rows))
    if pooled:
        image = _say_pooled(image, class_name, int(own.sum()), needed, names)
    image = decision.fixed.get(class_name, image)
    unsure = None
    if budget.unsure is not None:
        unsure = _strictest(references, budget.unsure, len(rows))
        unsure = unsure if unsure.value <= image.value else None
    peaks, distances = _known(rows.peak), _known(_near(good, class_name, given).distance)
    return Rule(
        class_name, len(rows), pooled, image, unsure,
        conformal_threshold(peaks, budget.region_fpr) if len(peaks) else None,
        conformal_threshold(distances, budget.max_fpr) if len(distances) else None,
        references, peaks, distances,
    )  # fmt: skip


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
    found = [conformal_threshold(one, max_fpr) for one in references]
    best = max(found, key=lambda one: one.value)
    if len(found) == 1:
        return best
    called = sum(int((one >= best.value).sum()) for one in references if len(one) < images)
    sentence = (
        f"{called} of {images} good images would be called bad; the promised rate is {100 * max_fpr:g} % in every "
        f"session with images enough ({len(found)} thresholds, the highest is taken); a new session is not covered"
    )
    return Threshold(best.value, max_fpr, all(one.guaranteed for one in found), sentence)


def _lenders(good: GoodScores, needed: int, given: bool) -> tuple[GoodScores, list[str]]:
    """Images of all classes that are too small alone, with their names; of all classes if they are too few still."""
    owners = np.array(good.class_name if given else good.predicted)
    names, counts = np.unique(owners, return_counts=True)
    small = names[counts < needed]
    together = np.isin(owners, small)
    if int(together.sum()) < needed:
        return good, []
    return good.take(together), [str(name) for name in small]


def _say_pooled(image: Threshold, class_name: str, own: int, needed: int, names: Sequence[str]) -> Threshold:
    images = "image of" if own == 1 else "images of"
    head = f"{own} good {images} {class_name} {'is' if own == 1 else 'are'} too few for a promise of its own"
    head += f" ({needed} are needed)"
    if names:
        listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        whose = f"so it is judged with the other small classes ({listed}): {image.sentence}, over these together"
    else:
        whose = f"so the threshold of all classes is used ({image.sentence}) and nothing is promised for it alone"
    return Threshold(image.value, image.max_fpr, image.guaranteed and bool(names), f"{head}, {whose}")


def _near(good: GoodScores, class_name: str, given: bool) -> GoodScores:
    own = good.of_class(class_name, given)
    return good.take(own) if int(own.sum()) >= _FEWEST_DISTANCES else good


def _known(values: Floats) -> Floats:
    found: Floats = np.sort(values[np.isfinite(values)])
    return found


def kept_keys(good: GoodScores, keys: Iterable[str]) -> NDArray[np.bool_]:
    """Which of these images are not among the calibration images yet."""
    present = set(good.key) - {""}
    return np.array([key not in present for key in keys], dtype=np.bool_)
