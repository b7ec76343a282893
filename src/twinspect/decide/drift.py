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

from twinspect.decide.conformal import Floats, p_values
from twinspect.decide.rules import GoodScores
from twinspect.errors import ConfigError, DataError

TAIL = 0.05  # share of ranks that counts as the tail
KEPT = 2000  # latest images kept for saying what changed
_SIGMAS = 2.6  # standard errors beyond which a mean p-value counts as moved
_HALF_MAX = 65504.0
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
    """One class's latest images (since the change where there is an alarm) against its calibration images.

    Attributes:
        class_name: predicted class.
        images: how many.
        median_p: median p-value of their scores; 0.5 is usual, lower means higher scores.
        tail: share of p-values up to 0.05; 0.05 is usual.
        median_scene_p: median p-value of their distances to the cluster; None where unknown.
        moved: whether the mean p-value of scores or distances is off by more than 2.6 standard errors.
    """

    class_name: str
    images: int
    median_p: float
    tail: float
    median_scene_p: float | None
    moved: bool


@dataclass(frozen=True, slots=True)
class DriftReport:
    """What the monitor says.

    Attributes:
        light: ``grey`` before the first image, ``green``, or ``red`` after an alarm.
        kind: ``none``, ``calibration shift``, ``more defects`` or ``another scene``.
        message: the same for people, with the chance of a false alarm.
        images: predictions seen.
        false_alarm_rate: largest chance of an alarm, ever, while nothing changes.
        alarm_at, since: numbers (from 1) of the image that raised the alarm and of the one at which the change
            probably began; 0 without an alarm.
        evidence: capital of the test, a factor against "nothing changed".
        classes: latest images by class.
    """

    light: str
    kind: str
    message: str
    images: int
    false_alarm_rate: float
    alarm_at: int
    since: int
    evidence: float
    classes: tuple[ClassDrift, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Bag:
    """Counts of values seen, in steps of half-precision floats: constant memory, exact ranks with ties."""

    def __init__(self, values: Floats | Sequence[float] = ()) -> None:
        rounded, counts = np.unique(_rounded(np.asarray(values, dtype=np.float64)), return_counts=True)
        self.values: list[float] = rounded.tolist()
        self.counts: list[int] = counts.tolist()

    def rank(self, value: float, chance: float) -> float:
        """Add a value; its smoothed p-value among all values including itself. ``chance`` is uniform."""
        one = float(_rounded(np.array(value)))
        place = bisect.bisect_left(self.values, one)
        if place == len(self.values) or self.values[place] != one:
            self.values.insert(place, one)
            self.counts.insert(place, 0)
        self.counts[place] += 1
        return (sum(self.counts[place + 1 :]) + chance * self.counts[place]) / sum(self.counts)


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
        if not 0.0 < false_alarm_rate < 1.0:
            raise ConfigError(f"--false-alarm-rate {false_alarm_rate}: accepted between 0 and 1, such as 0.01")
        self.false_alarm_rate, self.good, self._seed = false_alarm_rate, good, seed
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Start again, after the cause of an alarm was found and put right."""
        with self._lock:
            rows = {name: self.good.of_class(name, given=False) for name in sorted(set(self.good.predicted))}
            self._scores = {name: Bag(self.good.score[of_class]) for name, of_class in rows.items()}
            self._distances = {name: Bag(_finite(self.good.distance[of_class])) for name, of_class in rows.items()}
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
                bag = self._distances.setdefault(predicted_class, Bag())
                scene = bulk_bets(bag.rank(distance, self._rng.random()))
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
            won = str(_GROUPS[np.argmax(test.run)])
            recent: dict[str, list[tuple[float, float]]] = {}
            for number, name, score, distance in self._recent:
                if number >= test.since:
                    recent.setdefault(name, []).append((score, distance))
        rows = [_class_row(self.good, name, *np.array(seen).T) for name, seen in sorted(recent.items())]
        classes = tuple(row for row, _ in rows)
        # The tail wins first where a shift is large, so the bulk counts too.
        mostly = sum(one.tail * one.images for one in classes) > sum(one.images for one in classes) / 2
        shifted = won == DEFECTS and (mostly or any(moved for _, moved in rows))
        kind = NONE if not test.alarm_at else SHIFT if shifted else won
        light = "grey" if not images else "red" if test.alarm_at else "green"
        message = _message(kind, classes, images, test)
        return DriftReport(
            light, kind, message, images, test.level, test.alarm_at, test.since, test.capital, classes
        )  # fmt: skip


def _rounded(values: Floats) -> Floats:
    clipped = np.clip(values, -_HALF_MAX, _HALF_MAX)
    return np.asarray(clipped.astype(np.float16).astype(np.float64) + 0.0)


def _finite(values: Floats) -> Floats:
    return np.asarray(values[np.isfinite(values)])


def _moved(p: Floats, calibration: int) -> bool:
    """Whether p-values, each counted in so many calibration images, are off one half as a whole."""
    return (
        bool(abs(p.mean() - 0.5) > _SIGMAS * math.sqrt((1 / len(p) + 1 / calibration) / 12)) if len(p) >= 5 else False
    )


def _class_row(good: GoodScores, name: str, score_N: Floats, distance_N: Floats) -> tuple[ClassDrift, bool]:
    """One class, and whether the bulk of its scores moved."""
    of_class = good.of_class(name, given=False)
    if not of_class.any():  # a class without calibration images is compared with all
        of_class = np.ones(len(good), dtype=np.bool_)
    usual, distances = _finite(good.distance[of_class]), _finite(distance_N)
    p, known = p_values(score_N, good.score[of_class]), len(usual) and len(distances)
    scene = p_values(distances, usual) if known else np.empty(0)
    count, bulk = int(of_class.sum()), (p[p > TAIL] - TAIL) / (1.0 - TAIL)
    moved = _moved(p, count) or _moved(scene, max(len(usual), 1))
    median = float(np.median(scene)) if known else None
    return ClassDrift(name, len(p), float(np.median(p)), float((p <= TAIL).mean()), median, moved), _moved(
        bulk, count
    )


def _message(kind: str, classes: Sequence[ClassDrift], images: int, test: ChangeTest) -> str:
    chance = f"If nothing changed, the chance of any alarm, ever, is at most {100 * test.level:g} %."
    if kind == NONE:
        return f"no drift in {images} images. {chance}"
    latest = [one.images for one in classes]
    middle, tail = (np.average([getattr(c, name) for c in classes], weights=latest) for name in ("median_p", "tail"))
    facts = f"median p-value {middle:.2f} (usual 0.50), {100 * tail:.0f} % in the top 5 %"
    moved = [one.class_name for one in classes if one.moved]
    if len(classes) > 1 and len(moved) == 1:
        facts += f"; only {moved[0]} differs from calibration, so look at that product before the camera"
    elif len(classes) > 1 and moved:
        facts += f"; {len(moved)} of {len(classes)} classes differ from calibration"
    advice = _MOSTLY_BAD if kind == SHIFT and tail >= 0.5 else _ADVICE[kind]
    return f"{kind} since about image {test.since} (noticed at image {test.alarm_at}): {facts}. {advice} {chance}"
