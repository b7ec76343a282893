"""From scores of good images to thresholds with a stated false-alarm rate, and from scores to answers. No torch.

Split-conformal: if a new good image and the calibration images are exchangeable (same camera, light, session), then
P(p <= a) <= a for every a. It says nothing about another day; calibrate again there.

A class goes by its own good images. Where its class is given, an image is ranked among the good images of that class;
where it is predicted, among the good images *predicted* to be of that class, so that the promise holds with wrong
predictions too. Where the images are enough for the class's budget, its threshold is conformal: a promise. Where they
are too few, the threshold lies just above the highest of them, which promises 1 / (n + 1) and no more. Labelled
images can set a threshold too (`labelled_threshold`); that is a measured choice, not a promise.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.errors import NONSENSE, BundleError, ConfigError, DataError, listed, unknown_name

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
GOOD, UNSURE, ANOMALY = "good", "unsure", "anomaly"
_FEWEST_TAKEN, _SHARE_TAKEN = 2, 0.05  # images and share of a class taken for another from which this is said
ROI_SIDE = 128  # of the grid that a region of interest is drawn from
KEY_BYTES = 8  # of an image's hash; enough to recognise it among a billion others


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
    """A sentence on the good images of a class that `suspicious_tail` points at, and their positions; or none."""
    odd = suspicious_tail(score_N)
    if not len(odd):
        return "", []
    count = f"{len(odd)} of {len(score_N)} good images {'scores' if len(odd) == 1 else 'score'} far above the others"
    above = f" (the threshold lies above {'it' if len(odd) == 1 else 'them'})" if score_N[odd[-1]] < threshold else ""
    return (
        f"class {class_name}: {count}{above}: {listed([f'{names[i]} ({score_N[i]:.4f})' for i in odd])}",
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
        for row in fields(self):
            column: Any = getattr(self, row.name)
            if row.name in ("score", "peak", "distance"):
                column = np.array(column, np.float64)  # None becomes NaN
            else:
                column = np.array([str(value) for value in column], np.object_)
            object.__setattr__(self, row.name, column)
        if len(set(map(len, self.columns()))) != 1:
            raise ValueError("calibration columns of different lengths")

    def __len__(self) -> int:
        return len(self.score)

    def columns(self) -> list[NDArray[Any]]:
        """In the order of the fields."""
        return [getattr(self, row.name) for row in fields(self)]

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
        lists = {row.name: getattr(self, row.name).tolist() for row in fields(self)}
        return {name: [None if v != v else v for v in values] for name, values in lists.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GoodScores:
        """Rebuild from `to_dict`."""
        return cls(*(values[row.name] for row in fields(cls)))


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


# ------------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """Everything between raw scores and answers; stored in the bundle as JSON."""

    good: GoodScores  # calibration images
    class_of_cluster: tuple[str, ...]  # most common training class of each cluster
    map_scale: tuple[float, float]  # low and high map value for colours, the same for all images
    budget: Budget = field(default_factory=Budget)  # of every class
    budgets: Mapping[str, Budget] = field(default_factory=dict)  # of single classes, instead
    fixed: Mapping[str, Threshold] = field(default_factory=dict)  # chosen on labelled images or by hand, by class
    model_id: str = ""  # of the model the scores belong to
    trained: frozenset[str] = frozenset()  # `image_id`s of the images that the model learnt from
    held: frozenset[str] = frozenset()  # those of the images that the students were not trained on
    bank: tuple[str, ...] = ()  # good images that `Outputs.nearest_B` counts; empty where scoring is plain
    thumbnails: tuple[bytes, ...] = ()  # small JPEGs of them, empty where one cannot be read; none if none are kept
    roi: NDArray[np.bool_] | None = None  # region of interest, ROI_SIDE x ROI_SIDE over the image; None: the whole
    tiles: tuple[int, int] = (1, 1)  # rows and columns that every picture is seen in; see `inference.decode`
    _rules: dict[tuple[str, bool], Rule] = field(init=False, repr=False, default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Classes that are known, sorted."""
        return sorted({*self.class_of_cluster, *self.good.class_name} - {""})

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
            budget, fixed = self.budget_of(class_name), self.fixed.get(class_name)
            self._rules[key] = Rule.of(self.good, class_name, given, budget, fixed)
        return self._rules[key]

    def judge(
        self, score: float, cluster: int, distance: float = float("nan"), class_name: str | None = None
    ) -> dict[str, Any]:
        """The answer for one image: those columns of a `Result` that follow from the good images.

        Its class is that of its nearest cluster where it is not given; the distance to that may be NaN.
        """
        predicted = self.class_of_cluster[cluster]
        rule, near = self.rule(class_name or predicted, class_name is not None), self.rule(predicted, given=False)
        class_p, unknown = float("nan"), None
        if near.far is not None and distance == distance:
            class_p, unknown = float(p_values(distance, near.distances)), distance >= near.far.value
        unsure = rule.unsure.value if rule.unsure is not None else float("nan")
        answer = ANOMALY if score >= rule.image.value else UNSURE if score >= unsure else GOOD
        return {
            "class_name": class_name or predicted, "predicted_class": predicted, "class_p": class_p,
            "unknown_class": unknown, "p_value": float(p_values(score, rule.scores)), "threshold": rule.image.value,
            "threshold_unsure": unsure, "answer": answer, "is_anomaly": answer == ANOMALY,
        }  # fmt: skip

    def nearest(self, place: int) -> tuple[str, bytes]:
        """Name and small JPEG of a good image of the bank; empty where they are not known."""
        name = self.bank[place] if 0 <= place < len(self.bank) else ""
        return name, self.thumbnails[place] if name and place < len(self.thumbnails) else b""

    def checked_class(self, class_name: str | None) -> str | None:
        """The class itself; a ConfigError for one that the bundle does not know."""
        if class_name is not None and class_name not in self.classes:
            raise ConfigError(unknown_name("class", class_name, self.classes))
        return class_name

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "good": self.good.to_dict(),
            "class_of_cluster": list(self.class_of_cluster),
            "map_scale": list(self.map_scale),
            "budget": asdict(self.budget),
            "budgets": {name: asdict(budget) for name, budget in self.budgets.items()},
            "fixed": {name: asdict(threshold) for name, threshold in self.fixed.items()},
            "model_id": self.model_id,
            "trained": _text(bytes.fromhex("".join(sorted(self.trained)))),
            "held": _text(bytes.fromhex("".join(sorted(self.held)))),
            "bank": list(self.bank),
            "thumbnails": [_text(thumbnail) for thumbnail in self.thumbnails],
            **({"roi": _text(np.packbits(self.roi).tobytes())} if self.roi is not None else {}),
            "tiles": list(self.tiles),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "the model") -> Decision:
        """Rebuild from a bundle's JSON; thresholds are computed again. Values that none has raise a BundleError."""
        try:
            if values.get("by_group"):
                raise BundleError(
                    f"{where}: its thresholds hold in every session, which twinspect 0.7 was the last to do; with "
                    "that version type: twinspect calibrate MODEL --group none"
                )
            (low, high), (rows, columns), roi = values["map_scale"], values["tiles"], None
            if values.get("roi"):
                bits = np.unpackbits(np.frombuffer(_bytes(values["roi"]), np.uint8))
                roi = bits.reshape(ROI_SIDE, ROI_SIDE).astype(np.bool_)
            decision = cls(
                good=GoodScores.from_dict(values["good"]),
                class_of_cluster=tuple(map(str, values["class_of_cluster"])),
                map_scale=(float(low), float(high)),
                budget=_budget(values["budget"]),
                budgets={str(name): _budget(row) for name, row in values["budgets"].items()},
                fixed={  # whatever the file says, a threshold that was chosen promises nothing
                    str(name): Threshold(float(t["value"]), float(t["max_fpr"]), False, str(t["sentence"]))
                    for name, t in values["fixed"].items()
                },
                model_id=str(values["model_id"]),
                trained=_keys(values["trained"]),
                held=_keys(values["held"]),
                bank=tuple(map(str, values["bank"])),
                thumbnails=tuple(map(_bytes, values["thumbnails"])),
                roi=roi,
                tiles=(int(rows), int(columns)),
            )
            if not np.isfinite([*decision.good.score, *decision.map_scale]).all():  # no image would be called bad
                raise ValueError("calibration scores that are not finite")
        except NONSENSE as error:
            raise BundleError(f"{where}: its thresholds are damaged ({error}); copy it again") from None
        return decision


def _budget(row: Mapping[str, Any]) -> Budget:
    """A budget of a bundle; those of twinspect 0.7 have a rate of regions as well, the same unless asked for."""
    if row.get("region_fpr", row["max_fpr"]) != row["max_fpr"]:
        raise BundleError(
            "this model has a rate of regions of its own (calibrate --region-fpr), which twinspect 0.7 was the last "
            "to read; with that version type: twinspect calibrate MODEL --max-fpr RATE"
        )
    return Budget(row["max_fpr"], row["unsure"])


def _text(body: bytes) -> str:
    return base64.b64encode(body).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _keys(text: str) -> frozenset[str]:
    digits, step = _bytes(text).hex(), 2 * KEY_BYTES
    return frozenset(digits[i : i + step] for i in range(0, len(digits), step))


def image_id(digest: bytes) -> str:
    """Short name of an image from its content hash."""
    return digest[:KEY_BYTES].hex()


def promises(decision: Decision) -> Iterator[tuple[str, Rule]]:
    """Every known class with its rule (class given); all classes together come last, where there are several."""
    for name in decision.classes:
        yield name, decision.rule(name)
    if len(decision.classes) > 1:
        yield "all classes", decision.rule("")


def mixed_up(taken: Mapping[tuple[str, str], int]) -> str:
    """One sentence on classes whose good images are taken for another's, and what to do; empty where none are.

    ``taken`` counts images by their class and the class that they are taken for.
    """
    images = Counter[str]()
    for (name, _), count in taken.items():
        images[name] += count
    pairs = [
        (count / images[name], f"{count} of {images[name]} good images of {name} are taken for {other}")
        for (name, other), count in sorted(taken.items())
        if name != other and count >= _FEWEST_TAKEN and count > _SHARE_TAKEN * images[name]
    ]
    if not pairs:
        return ""
    sentences = [sentence for _, sentence in sorted(pairs, key=lambda pair: -pair[0])]
    return (
        f"classes that look alike are mixed up: {listed(sentences)}. Name the class when you predict "
        "(--class NAME), or give what is one product one name"
    )
