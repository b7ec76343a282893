"""Has something changed since calibration? A conformal test over the stream of predictions. No torch.

Every new score is ranked, within its class, among the calibration scores *and all scores seen since*, ties
broken at random; so is its distance to the nearest cluster. As long as nothing changes (the scores of a class are
exchangeable) these ranks are independent and uniform, whatever the scores are distributed like: this is exact, and
small calibration sets or unequal mixes of products raise no alarm. One test bets against uniform ranks: its capital
reaches 1 / a with probability at most a, at any time, ever (Ville). It is averaged over the image at which the change
began, which costs little and keeps the delay short after a long quiet time.

The bets are on the *bulk* of the scores (ranks outside the top 5 %), their *tail* (how many are in the top 5 %, and
how deep), and the *scene* (distances). Which of them won says what changed: light or camera move the bulk; more
defects move the tail only; another product or background moves the scene.
"""

from __future__ import annotations

import bisect
import copy
import math
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from twinspect.decide.conformal import Floats, checked_rate, p_values
from twinspect.decide.rules import GoodScores
from twinspect.errors import DataError

TAIL = 0.05  # share of ranks that counts as the tail
KEPT = 2000  # latest images kept for saying what changed
_SIGMAS = 2.6  # standard errors beyond which a mean p-value counts as moved
_HALF_MAX = 65504.0  # largest float of half precision
_TILTS = np.array([-1.8, -0.9, -0.4, 0.4, 0.9, 1.8])
_SPREADS = np.array([-0.9, 0.9])
_POWERS = np.array([0.3, 0.6])
_RATES = np.array([0.05, 0.1, 0.2, 0.5, 0.9])  # shares in the tail that are bet on; 0.05 is no change
_DEPTHS = np.array([1.0, 0.5])
NONE, SHIFT, DEFECTS, SCENE = "none", "calibration shift", "more defects", "another scene"
_ADVICE = {
    DEFECTS: "Most images score as before and only the worst got worse or more: more defects are likelier than a "
    "change of light. Look at the images that were called bad.",
    SCENE: "Scores are as before, but another product, background or position is in view. Look at some images; if "
    "they are right, calibrate again or teach them with: twinspect fit --resume-from.",
    SHIFT: "The images score differently as a whole, not only the worst: light, focus, camera or material changed "
    "rather than the number of defects. Put that right, or calibrate again with new good images.",
}
_MOSTLY_BAD = (
    "Most images score like defects: either light, focus or camera changed, or nearly every part is bad; scores "
    "alone cannot tell. Look at some images; if they are good, calibrate again."
)


@dataclass(frozen=True, slots=True)
class ClassDrift:
    """A predicted class's latest images (since the change where there is an alarm) against its calibration images."""

    class_name: str
    images: int
    median_p: float  # median p-value of scores; 0.5 is usual, lower means higher scores
    tail: float  # share of p-values up to 0.05; 0.05 is usual
    median_scene_p: float | None  # median p-value of distances to the cluster; None where unknown
    moved: bool  # whether the mean p-value of scores or distances is off by more than 2.6 standard errors


@dataclass(frozen=True, slots=True)
class DriftReport:
    """What the monitor says. Images are numbered from 1; 0 stands for none."""

    light: str  # grey before the first image, green, or red after an alarm
    kind: str  # none, calibration shift, more defects or another scene
    message: str  # the same for people, with the chance of a false alarm
    images: int  # predictions seen
    false_alarm_rate: float  # largest chance of an alarm, ever, while nothing changes
    alarm_at: int  # number of the image that raised the alarm
    since: int  # of the one at which the change probably began
    evidence: float  # capital of the test: a factor against "nothing changed"
    classes: tuple[ClassDrift, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Bag:
    """Counts of values seen, in steps of half-precision floats: constant memory, exact ranks with ties."""

    def __init__(self, values: Floats | Sequence[float] = ()) -> None:
        distinct, counts = np.unique(_half(values), return_counts=True)
        self.values: list[float] = distinct.tolist()
        self.counts: list[int] = counts.tolist()

    def rank(self, value: float, chance: float) -> float:
        """Add a value; its smoothed p-value among all values including itself. ``chance`` is uniform."""
        rounded = float(_half(value))
        place = bisect.bisect_left(self.values, rounded)
        if place == len(self.values) or self.values[place] != rounded:
            self.values.insert(place, rounded)
            self.counts.insert(place, 0)
        self.counts[place] += 1
        return (sum(self.counts[place + 1 :]) + chance * self.counts[place]) / sum(self.counts)


def _half(values: Floats | Sequence[float] | float) -> Floats:
    """Values in half precision, without a negative zero."""
    return np.asarray(np.clip(values, -_HALF_MAX, _HALF_MAX).astype(np.float16).astype(np.float64) + 0.0)


class ChangeTest:
    """Mixture of bets, each started at every image in turn: P(capital ever reaches 1 / level) <= level."""

    def __init__(self, bets: int, level: float) -> None:
        self.level, self.seen, self.alarm_at, self.since = level, 0, 0, 0
        self.stake = np.zeros(bets)
        self.run = np.zeros(bets)  # log factors since the best start of a change
        self.start = np.ones(bets, dtype=np.int64)

    @property
    def capital(self) -> float:
        """Factor by which the data speak against "nothing changed", at the latest image."""
        return float(self.stake.sum()) + _not_yet(self.seen)

    def update(self, factor_b: Floats) -> bool:
        """Take every bet's factor (expectation 1 while nothing changes); True when the alarm is raised."""
        if self.alarm_at:
            return False
        begun = _not_yet(self.seen) - _not_yet(self.seen + 1)
        self.seen += 1
        self.stake = (self.stake + begun / len(factor_b)) * factor_b
        self.start[self.run <= 0.0] = self.seen
        self.run = np.maximum(self.run, 0.0) + np.log(factor_b)
        if self.capital < 1.0 / self.level:
            return False
        self.alarm_at, self.since = self.seen, int(self.start[np.argmax(self.run)])
        return True


def _not_yet(images: int) -> float:
    """Prior probability that the change begins after so many images: 1 at 0, falling like 1 / log."""
    return 1.0 / (1.0 + math.log1p(images))


def bulk_bets(u: float) -> Floats:
    """Factors for a uniform rank in (0, 1): moved, spread or narrowed, and far moved either way."""
    u = min(max(u, 1e-12), 1.0 - 1e-12)
    legendre = 6.0 * u * u - 6.0 * u + 1.0
    low, high = (_POWERS * side ** (_POWERS - 1.0) for side in (u, 1.0 - u))
    return np.concatenate([1.0 + _TILTS * (u - 0.5), 1.0 + _SPREADS * legendre, low, high])


def tail_bets(u: float) -> Floats:
    """Factors for a uniform rank: more of them in the tail, and deeper in it."""
    if u >= TAIL:
        return np.repeat((1.0 - _RATES) / (1.0 - TAIL), len(_DEPTHS))
    inside = max(u / TAIL, 1e-12)
    return np.outer(_RATES / TAIL, _DEPTHS * inside ** (_DEPTHS - 1.0)).ravel()


_BULK, _TAIL = len(bulk_bets(0.5)), len(tail_bets(0.5))
_GROUPS = np.repeat([SHIFT, DEFECTS, SCENE], [_BULK, _TAIL, _BULK])  # what each bet is on


class DriftMonitor:
    """Accumulates predictions in constant memory and says when, and how, they stopped looking like calibration.

    Several threads may use one monitor.

    Args:
        good: calibration images of the bundle.
        false_alarm_rate: largest chance of an alarm, ever, while nothing changes; between 0 and 1.
        seed: of the random breaking of ties.

    Raises:
        ConfigError: a rate outside (0, 1).

    Examples:
        >>> monitor = DriftMonitor(detector.fitted.decision.good)
        >>> for result in detector.predict("today/", stream=True):
        ...     if monitor.update(result.score, result.predicted_class, result.cluster_distance):
        ...         print(monitor.report().message)
    """

    def __init__(self, good: GoodScores, false_alarm_rate: float = 0.01, seed: int = 0) -> None:
        self.false_alarm_rate = checked_rate(false_alarm_rate, "--false-alarm-rate")
        self.good, self._seed, self._lock = good, seed, threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Start again, after the cause of an alarm was found and put right."""
        with self._lock:
            self._scores, self._distances = {}, {}
            for name in sorted(set(self.good.predicted)):
                rows = self.good.take(self.good.of_class(name, given=False))
                self._scores[name], self._distances[name] = Bag(rows.score), Bag(_finite(rows.distance))
            self.test = ChangeTest(len(_GROUPS), self.false_alarm_rate)
            self._recent: deque[tuple[int, str, float, float]] = deque(maxlen=KEPT)  # number, class, score, distance
            self._rng = np.random.default_rng(self._seed)
            self.images = 0

    def update(self, score: float, predicted_class: str, distance: float = float("nan")) -> bool:
        """Take one prediction; True where it raised the alarm, which happens once."""
        if not math.isfinite(score):
            raise DataError(f"a score of {score} cannot be watched; leave images with an error out")
        with self._lock:
            self.images += 1
            self._recent.append((self.images, predicted_class, score, distance))
            u = self._scores.setdefault(predicted_class, Bag()).rank(score, self._rng.random())
            bulk, scene = np.ones(_BULK), np.ones(_BULK)  # nothing is bet where there is nothing to bet on
            if u >= TAIL:
                bulk = bulk_bets((u - TAIL) / (1.0 - TAIL))
            if math.isfinite(distance):
                distances = self._distances.setdefault(predicted_class, Bag())
                scene = bulk_bets(distances.rank(distance, self._rng.random()))
            return self.test.update(np.concatenate([bulk, tail_bets(u), scene]))

    def watch(self, results: Iterable[Any]) -> bool:
        """Take many results (`twinspect.Result`), those with an error left out; True where one raised the alarm."""
        raised = [self.update(r.score, r.predicted_class, r.cluster_distance) for r in results if not r.error]
        return any(raised)

    @property
    def alarmed(self) -> bool:
        """Whether the alarm was raised since the last reset."""
        return self.test.alarm_at > 0

    def report(self) -> DriftReport:
        """What can be said now."""
        with self._lock:  # the rest looks at thousands of scores, and results go on coming in
            test, images = copy.copy(self.test), self.images
            recent: dict[str, list[tuple[float, float]]] = {}
            for number, name, score, distance in self._recent:
                if number >= test.since:
                    recent.setdefault(name, []).append((score, distance))
        rows = [_class_row(self.good, name, *np.array(seen).T) for name, seen in sorted(recent.items())]
        classes = tuple(row for row, _ in rows)
        light, kind = ("green" if images else "grey"), NONE
        if test.alarm_at:
            light, kind = "red", str(_GROUPS[np.argmax(test.run)])
            # The bets on the tail win first where a shift is large, so the bulk counts too.
            mostly = sum(row.tail * row.images for row in classes) > sum(row.images for row in classes) / 2
            if kind == DEFECTS and (mostly or any(bulk_moved for _, bulk_moved in rows)):
                kind = SHIFT
        return DriftReport(
            light, kind, _message(kind, classes, images, test), images, test.level, test.alarm_at, test.since,
            test.capital, classes,
        )  # fmt: skip


def _finite(values: Floats) -> Floats:
    return np.asarray(values[np.isfinite(values)])


def _moved(p: Floats, calibration: int) -> bool:
    """Whether p-values, each counted in so many calibration images, are off one half as a whole."""
    if len(p) < 5:
        return False
    return bool(abs(p.mean() - 0.5) > _SIGMAS * math.sqrt((1 / len(p) + 1 / calibration) / 12))


def _class_row(good: GoodScores, name: str, score_N: Floats, distance_N: Floats) -> tuple[ClassDrift, bool]:
    """One class, and whether the bulk of its scores moved."""
    of_class = good.of_class(name, given=False)
    rows = good.take(of_class) if of_class.any() else good  # a class without calibration images: against all
    p, usual, distances = p_values(score_N, rows.score), _finite(rows.distance), _finite(distance_N)
    scene = p_values(distances, usual) if len(usual) else np.empty(0)
    moved = _moved(p, len(rows)) or _moved(scene, len(usual))
    row = ClassDrift(
        name, len(p), float(np.median(p)), float((p <= TAIL).mean()),
        float(np.median(scene)) if len(scene) else None, moved,
    )  # fmt: skip
    return row, _moved((p[p > TAIL] - TAIL) / (1.0 - TAIL), len(rows))


def _message(kind: str, classes: Sequence[ClassDrift], images: int, test: ChangeTest) -> str:
    chance = f"If nothing changed, the chance of any alarm, ever, is at most {100 * test.level:g} %."
    if kind == NONE:
        return f"no drift in {images} images. {chance}"
    weights = [row.images for row in classes]
    middle = np.average([row.median_p for row in classes], weights=weights)
    tail = np.average([row.tail for row in classes], weights=weights)
    facts = f"median p-value {middle:.2f} (usual 0.50), {100 * tail:.0f} % in the top 5 %"
    moved = [row.class_name for row in classes if row.moved]
    if len(classes) > 1 and len(moved) == 1:
        facts += f"; only {moved[0]} differs from calibration, so look at that product before the camera"
    elif len(classes) > 1 and moved:
        facts += f"; {len(moved)} of {len(classes)} classes differ from calibration"
    advice = _MOSTLY_BAD if kind == SHIFT and tail >= 0.5 else _ADVICE[kind]
    return f"{kind} since about image {test.since} (noticed at image {test.alarm_at}): {facts}. {advice} {chance}"
