"""From raw scores to answers: whose good images, which budget, which threshold. No torch.

Calibration is done per class. Where the class of an image is given, its score is ranked among the good images of that
class; where it is predicted, among the good images *predicted* to be of that class, so that the promise holds with
wrong predictions too. What becomes of classes with too few images: see `conformal`.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.decide.conformal import Budget, GoodScores, Rule, Threshold, p_values
from twinspect.errors import NONSENSE, BundleError, ConfigError, listed, unknown_name

GOOD, UNSURE, ANOMALY = "good", "unsure", "anomaly"
_FEWEST_TAKEN, _SHARE_TAKEN = 2, 0.05  # images and share of a class taken for another from which this is said
ROI_SIDE = 128  # of the grid that a region of interest is drawn from
KEY_BYTES = 8  # of an image's hash; enough to recognise it among a billion others


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
