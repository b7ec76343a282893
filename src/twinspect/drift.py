"""Has something changed since calibration? A conformal test over the stream of predictions. No torch.

Every new score is ranked, within its class, among the calibration scores *and all scores seen since*, ties
broken at random. As long as nothing changes (the scores of a class are exchangeable) these ranks are
independent and uniform, whatever the scores are distributed like: this is exact, and small calibration sets
or unequal mixes of products raise no alarm. Bets against uniform ranks then multiply; a capital of 1 / a is
reached with probability at most a, at any time, ever (Ville). Averaging over the image at which the change
began costs little and keeps the delay short after a long quiet time.

Three things are bet on: the *bulk* of the scores (ranks outside the top 5 %), their *tail* (how many are in
the top 5 %, and how deep), and the *scene* (distance to the nearest cluster). A change of light or camera
moves the bulk; more defects move the tail only; another product or background moves the scene.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.calibration import Floats, p_values
from twinspect.errors import ConfigError, DataError
from twinspect.rules import GoodScores

TAIL = 0.05  # share of ranks that counts as the tail
KEPT = 2000  # latest images kept for saying what changed
_HALF_MAX = 65504.0
_TILTS = np.array([-1.8, -0.9, -0.4, 0.4, 0.9, 1.8])
_SPREADS = np.array([-0.9, 0.9])
_POWERS = np.array([0.3, 0.6])
_RATES = np.array([0.05, 0.1, 0.2, 0.5, 0.9])  # shares in the tail that are bet on; 0.05 is no change
_DEPTHS = np.array([1.0, 0.5])
NONE, SHIFT, DEFECTS, SCENE = "none", "calibration shift", "more defects", "another scene"


@dataclass(frozen=True, slots=True)
class Alarm:
    """Evidence that something changed.

    Attributes:
        test: ``bulk``, ``tail`` or ``scene``.
        image: number of the image (from 1) at which the alarm was raised.
        since: number of the image at which the change began, as far as can be told.
    """

    test: str
    image: int
    since: int


@dataclass(frozen=True, slots=True)
class ClassDrift:
    """One class's latest images against its calibration images.

    Attributes:
        class_name: predicted class.
        images: latest images of this class, since the change where there is an alarm.
        median_p: median p-value of their scores; 0.5 is usual, lower means higher scores.
        tail: share of p-values up to 0.05; 0.05 is usual.
        median_scene_p: median p-value of their distances to the cluster; NaN where unknown.
        moved: whether scores or distances differ from the calibration's (two-sample Kolmogorov-Smirnov,
            1 % over all classes together).
    """

    class_name: str
    images: int
    median_p: float
    tail: float
    median_scene_p: float
    moved: bool


@dataclass(frozen=True, slots=True)
class DriftReport:
    """What the monitor says.

    Attributes:
        kind: ``none``, ``calibration shift``, ``more defects`` or ``another scene``.
        message: the same for people, with the chance of a false alarm.
        images: predictions seen.
        false_alarm_rate: largest chance of any alarm, ever, while nothing changes.
        alarms: raised so far.
        evidence: capital of each test, as a factor against "nothing changed".
        classes: latest images by class.
    """

    kind: str
    message: str
    images: int
    false_alarm_rate: float
    alarms: tuple[Alarm, ...]
    evidence: Mapping[str, float]
    classes: tuple[ClassDrift, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is unknown becomes None."""
        rows = [{n: getattr(one, n) for n in ClassDrift.__slots__} for one in self.classes]
        return {
            "kind": self.kind, "message": self.message, "images": self.images,
            "false_alarm_rate": self.false_alarm_rate, "evidence": dict(self.evidence),
            "alarms": [{n: getattr(one, n) for n in Alarm.__slots__} for one in self.alarms],
            "classes": [{k: None if v != v else v for k, v in row.items()} for row in rows],
        }  # fmt: skip


class Bag:
    """Counts of values seen, in steps of half-precision floats: constant memory, exact ranks with ties."""

    def __init__(self, values: Floats | Sequence[float] = ()) -> None:
        rounded, counts = np.unique(_rounded(np.asarray(values, dtype=np.float64)), return_counts=True)
        self.values: list[float] = rounded.tolist()
        self.counts: list[int] = counts.tolist()
        self.total = int(counts.sum())

    def rank(self, value: float, chance: float) -> float:
        """Add a value; its smoothed p-value among all values including itself. ``chance`` is uniform."""
        one = float(_rounded(np.array(value)))
        place = bisect.bisect_left(self.values, one)
        if place == len(self.values) or self.values[place] != one:
            self.values.insert(place, one)
            self.counts.insert(place, 0)
        self.counts[place] += 1
        self.total += 1
        above = sum(self.counts[place + 1 :])
        return (above + chance * self.counts[place]) / self.total


class ChangeTest:
    """Mixture of bets, each started at every image in turn: P(capital ever reaches 1 / a) <= a.

    Args:
        bets: how many bets `update` is given.
        level: a.
    """

    def __init__(self, bets: int, level: float) -> None:
        self.level, self.seen, self.alarm_at, self.since = level, 0, 0, 0
        self._stake = np.zeros(bets)
        self._run = np.zeros(bets)
        self._start = np.ones(bets, dtype=np.int64)

    @property
    def capital(self) -> float:
        """Factor by which the data speak against "nothing changed", at the latest image."""
        return float(self._stake.sum()) + _not_yet(self.seen)

    def update(self, factor_b: Floats, image: int) -> bool:
        """Take every bet's factor (expectation 1 while nothing changes); True when the alarm is raised."""
        if self.alarm_at:
            return False
        begun = _not_yet(self.seen) - _not_yet(self.seen + 1)
        self.seen += 1
        self._stake = (self._stake + begun / len(factor_b)) * factor_b
        fresh = self._run <= 0.0
        self._start[fresh] = image
        self._run = np.maximum(self._run, 0.0) + np.log(factor_b)
        if self.capital < 1.0 / self.level:
            return False
        self.alarm_at, self.since = image, int(self._start[np.argmax(self._run)])
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {"stake": self._stake.tolist(), "run": self._run.tolist(), "start": self._start.tolist()}
        return {"seen": self.seen, "alarm_at": self.alarm_at, "since": self.since, **plain}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take up what `to_dict` gave."""
        self.seen, self.alarm_at, self.since = (int(values[n]) for n in ("seen", "alarm_at", "since"))
        self._stake, self._run = np.array(values["stake"], float), np.array(values["run"], float)
        self._start = np.array(values["start"], np.int64)


def _not_yet(images: int) -> float:
    """Prior probability that the change begins after so many images: 1 at 0, falling like 1 / log."""
    return 1.0 / (1.0 + math.log1p(images))


def bulk_bets(u: float) -> Floats:
    """Factors for a uniform rank in (0, 1): moved, spread or narrowed, and far moved either way."""
    u = min(max(u, 1e-12), 1.0 - 1e-12)
    legendre = 6.0 * u * u - 6.0 * u + 1.0
    return np.concatenate(
        [
            1.0 + _TILTS * (u - 0.5), 1.0 + _SPREADS * legendre,
            _POWERS * u ** (_POWERS - 1.0), _POWERS * (1.0 - u) ** (_POWERS - 1.0),
        ]
    )  # fmt: skip


def tail_bets(u: float) -> Floats:
    """Factors for a uniform rank: more of them in the tail, and deeper in it."""
    if u >= TAIL:
        return np.repeat((1.0 - _RATES) / (1.0 - TAIL), len(_DEPTHS))
    inside = max(u / TAIL, 1e-12)
    return np.asarray(((_RATES / TAIL)[:, None] * (_DEPTHS * inside ** (_DEPTHS - 1.0))[None]).ravel())


@dataclass(slots=True)
class _Recent:
    """Latest images: number, class, score, distance."""

    rows: deque[tuple[int, str, float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))

    def since(self, image: int) -> dict[str, NDArray[np.float64]]:
        """Scores and distances (n x 2) by class, from an image on."""
        found: dict[str, list[tuple[float, float]]] = {}
        for number, name, score, distance in self.rows:
            if number >= image:
                found.setdefault(name, []).append((score, distance))
        return {name: np.array(values) for name, values in sorted(found.items())}


class DriftMonitor:
    """Accumulates predictions in constant memory and says when, and how, they stopped looking like calibration.

    Args:
        good: calibration images of the bundle.
        false_alarm_rate: largest chance of any alarm, ever, while nothing changes.
        seed: of the random breaking of ties.

    Raises:
        ConfigError: a rate outside (0, 1).

    Example:
        >>> monitor = DriftMonitor(detector.fitted.decision.good)
        >>> for result in detector.predict("today/", stream=True):
        ...     if monitor.update(result.score, result.predicted_class, result.cluster_distance):
        ...         print(monitor.report().message)
    """

    def __init__(self, good: GoodScores, false_alarm_rate: float = 0.01, seed: int = 0) -> None:
        if not 0.0 < false_alarm_rate < 1.0:
            raise ConfigError(f"--false-alarm-rate {false_alarm_rate}: accepted between 0 and 1, such as 0.01")
        self.false_alarm_rate, self.images = false_alarm_rate, 0
        self._good, self._rng = good, np.random.default_rng(seed)
        names = sorted(set(good.predicted))
        rows = {name: good.of_class(name, given=False) for name in names}
        self._scores = {name: Bag(good.score[kept]) for name, kept in rows.items()}
        self._distances = {name: Bag(_finite(good.distance[kept])) for name, kept in rows.items()}
        level = false_alarm_rate / 3
        bulk = len(bulk_bets(0.5))
        self.tests = {
            "bulk": ChangeTest(bulk, level),
            "tail": ChangeTest(len(tail_bets(0.5)), level),
            "scene": ChangeTest(bulk, level),
        }
        self._recent = _Recent()

    def update(self, score: float, predicted_class: str, distance: float = float("nan")) -> list[Alarm]:
        """Take one prediction; the alarms it raised (each test raises one, once).

        Raises:
            DataError: the score is not finite.
        """
        if not math.isfinite(score):
            raise DataError(f"a score of {score} cannot be watched; leave images with an error out")
        self.images += 1
        self._recent.rows.append((self.images, predicted_class, score, distance))
        u = self._scores.setdefault(predicted_class, Bag()).rank(score, self._chance())
        raised = [self._bet("tail", tail_bets(u))]
        if u >= TAIL:
            raised.append(self._bet("bulk", bulk_bets((u - TAIL) / (1.0 - TAIL))))
        if math.isfinite(distance):
            bag = self._distances.setdefault(predicted_class, Bag())
            raised.append(self._bet("scene", bulk_bets(bag.rank(distance, self._chance()))))
        return [one for one in raised if one is not None]

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """All alarms so far, in the order raised."""
        found = [Alarm(n, t.alarm_at, t.since) for n, t in self.tests.items() if t.alarm_at]
        return tuple(sorted(found, key=lambda one: one.image))

    def report(self) -> DriftReport:
        """What can be said now."""
        alarms = self.alarms
        since = min((one.since for one in alarms), default=1)
        recent = self._recent.since(since)
        classes = _class_rows(self._good, recent)
        kind = _kind({one.test for one in alarms}, classes, _bulk_moved(self._good, recent))
        evidence = {name: test.capital for name, test in self.tests.items()}
        message = _message(kind, alarms, classes, self.images, self.false_alarm_rate)
        return DriftReport(kind, message, self.images, self.false_alarm_rate, alarms, evidence, classes)

    def to_dict(self) -> dict[str, Any]:
        """State as plain values for JSON, so that a server that restarts forgets nothing."""
        bags = {"scores": self._scores, "distances": self._distances}
        return {
            "images": self.images,
            "false_alarm_rate": self.false_alarm_rate,
            "bags": {k: {n: [b.values, b.counts] for n, b in found.items()} for k, found in bags.items()},
            "tests": {name: test.to_dict() for name, test in self.tests.items()},
            "recent": [[n, name, s, None if d != d else d] for n, name, s, d in self._recent.rows],
            "random": self._rng.bit_generator.state,
        }

    @classmethod
    def from_dict(cls, good: GoodScores, values: Mapping[str, Any]) -> DriftMonitor:
        """Take up the state of a monitor over the same calibration images."""
        monitor = cls(good, float(values["false_alarm_rate"]))
        monitor.images = int(values["images"])
        for name, found in values["bags"].items():
            setattr(monitor, f"_{name}", {n: _bag(*pair) for n, pair in found.items()})
        for name, test in monitor.tests.items():
            test.restore(values["tests"][name])
        for number, name, score, distance in values["recent"]:
            row = (int(number), str(name), float(score), math.nan if distance is None else float(distance))
            monitor._recent.rows.append(row)
        monitor._rng.bit_generator.state = values["random"]
        return monitor

    def _chance(self) -> float:
        return float(self._rng.random())

    def _bet(self, name: str, factors: Floats) -> Alarm | None:
        test = self.tests[name]
        return Alarm(name, self.images, test.since) if test.update(factors, self.images) else None


def _bag(values: list[float], counts: list[int]) -> Bag:
    bag = Bag()
    bag.values, bag.counts, bag.total = list(values), list(counts), sum(counts)
    return bag


def _rounded(values: Floats) -> Floats:
    clipped = np.clip(values, -_HALF_MAX, _HALF_MAX)
    return np.asarray(clipped.astype(np.float16).astype(np.float64) + 0.0)


def _finite(values: Floats) -> Floats:
    return np.asarray(values[np.isfinite(values)])


def _class_rows(good: GoodScores, recent: Mapping[str, NDArray[np.float64]]) -> tuple[ClassDrift, ...]:
    rows = []
    for name, values in recent.items():
        kept = _usual(good, name)
        p = p_values(values[:, 0], good.score[kept])
        usual, seen = _finite(good.distance[kept]), _finite(values[:, 1])
        scene = float(np.median(p_values(seen, usual))) if len(usual) and len(seen) else math.nan
        level = 0.005 / len(recent)
        moved = _differ(values[:, 0], good.score[kept], level) or _differ(seen, usual, level)
        rows.append(ClassDrift(name, len(p), float(np.median(p)), float((p <= TAIL).mean()), scene, moved))
    return tuple(rows)


def _usual(good: GoodScores, class_name: str) -> NDArray[np.bool_]:
    """Calibration images of a class, or all where it has none."""
    kept = good.of_class(class_name, given=False)
    return kept if kept.any() else np.ones(len(good), dtype=np.bool_)


def _bulk_moved(good: GoodScores, recent: Mapping[str, NDArray[np.float64]]) -> bool:
    """Whether p-values outside the tail lie off their usual middle by 2.6 standard errors, over all classes."""
    off, variance, images = 0.0, 0.0, 0
    for name, values in recent.items():
        scores = good.score[_usual(good, name)]
        p = p_values(values[:, 0], scores)
        inside = p[p > TAIL]
        off += float((inside - (1.0 + TAIL) / 2).sum())
        # Of uniform p-values, and of the calibration images they are counted in.
        variance += (1.0 - TAIL) ** 2 / 12 * (len(inside) + len(inside) ** 2 / len(scores))
        images += len(inside)
    return images >= 5 and abs(off) > 2.6 * math.sqrt(variance)


def _differ(first: Floats, second: Floats, level: float) -> bool:
    from scipy.stats import ks_2samp

    if min(len(first), len(second)) < 5:
        return False
    return bool(ks_2samp(first, second, method="asymp").pvalue < level)


def _kind(tests: set[str], classes: Sequence[ClassDrift], bulk_moved: bool) -> str:
    if not tests:
        return NONE
    images = sum(one.images for one in classes)
    tail = sum(one.tail * one.images for one in classes)
    # A shift so large that nothing is left in the bulk shows in the tail only: clearly more than half of it all.
    mostly = tail - images / 2 > 1.64 * math.sqrt(images / 4)
    if "bulk" in tests or ("tail" in tests and (mostly or bulk_moved or "scene" in tests)):
        return SHIFT
    return DEFECTS if "tail" in tests else SCENE


def _message(
    kind: str, alarms: Sequence[Alarm], classes: Sequence[ClassDrift], images: int, false_alarm_rate: float
) -> str:
    chance = f"If nothing changed, the chance of any alarm, ever, is at most {100 * false_alarm_rate:g} %."
    if kind == NONE:
        return f"no drift in {images} images. {chance}"
    latest = sum(one.images for one in classes)
    middle = sum(one.median_p * one.images for one in classes) / max(latest, 1)
    tail = sum(one.tail * one.images for one in classes) / max(latest, 1)
    moved = [one.class_name for one in classes if one.moved]
    head = f"{kind} since about image {min(a.since for a in alarms)} (noticed at image {alarms[0].image})"
    several = len(classes) > 1 and len(moved) > 0
    where = f"{len(moved)} of {len(classes)} classes differ from calibration" if several else ""
    if several and len(moved) == 1:
        where = f"only {moved[0]} differs from calibration, so look at that product before the camera"
    facts = [f"median p-value {middle:.2f} (usual 0.50), {100 * tail:.0f} % in the top 5 %", where]
    if any(one.test == "scene" for one in alarms):
        facts.append("the pictures themselves look different")
    return f"{head}: {'; '.join(f for f in facts if f)}. {_advice(kind, tail)} {chance}"


def _advice(kind: str, tail: float) -> str:
    if kind == DEFECTS:
        return (
            "Most images score as before and only the worst got worse or more: more defects are likelier than a "
            "change of light. Look at the images that were called bad."
        )
    if kind == SCENE:
        return (
            "Scores are as before, but another product, background or position is in view. Look at some images; "
            "if they are right, calibrate again or teach them with: twinspect fit --resume-from."
        )
    if tail >= 0.5:
        return (
            "Most images score like defects: either light, focus or camera changed, or nearly every part is bad; "
            "scores alone cannot tell. Look at some images; if they are good, calibrate again."
        )
    return (
        "The images score differently as a whole, not only the worst: light, focus, camera or material changed "
        "rather than the number of defects. Put that right, or calibrate again with new good images."
    )
