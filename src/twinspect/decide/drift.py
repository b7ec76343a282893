"""Has something changed since calibration? A conformal test over the stream of predictions. No torch.

Every new score is ranked, within its class, among the calibration scores *and all scores seen since*; so is its
distance to the nearest cluster. As long as nothing changes, these ranks are independent and uniform, whatever the
scores are distributed like, so small calibration sets or unequal mixes of products raise no alarm. One test bets
against uniform ranks: its capital reaches 1 / a with probability at most a, at any time, ever (Ville). It is averaged
over the image at which the change began, which costs little and keeps the delay short after a long quiet time.

The bets are on the *bulk* of the scores (ranks outside the top 5 %), their *tail* (how many are in the top 5 %, and
how deep), and the *scene* (distances). Which of them won says what changed.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinspect.decide.decision import Floats, GoodScores, checked_rate, p_values
from twinspect.errors import DataError

TAIL = 0.05  # share of ranks that counts as the tail
RECENT = 2000  # latest images kept for saying what changed
_MOST_EDGES = 2000  # values of a class between which new ones are ranked
_SIGMAS = 2.6  # standard errors beyond which a mean p-value counts as moved
_TILTS = np.array([-1.8, -0.9, -0.4, 0.4, 0.9, 1.8])
_SPREADS = np.array([-0.9, 0.9])
_POWERS = np.array([0.3, 0.6])
_RATES = np.array([0.05, 0.1, 0.2, 0.5, 0.9])  # shares in the tail that are bet on; 0.05 is no change
_DEPTHS = np.array([1.0, 0.5])
NONE, SHIFT, DEFECTS, SCENE = "none", "calibration shift", "more defects", "another scene"
_ADVICE = {
    DEFECTS: "Most images score as before: more defects are likelier than another light. Look at those called bad.",
    SCENE: "Whole images are unlike the good ones: another product, background, position or light is in view. Look "
    "at some images; if they are right, calibrate again.",
    SHIFT: "All images score differently: light, focus, camera or material changed, or nearly every part is bad; "
    "scores alone cannot tell. Look at some images; put that right, or calibrate again with new good ones.",
}


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
    moved: tuple[str, ...]  # after an alarm: classes whose scores or distances differ from calibration


class Ranks:
    """Exact ranks of values among all before, in bounded memory.

    The first values cut the number line into intervals. While nothing changes, the chance that a new value falls into
    an interval is known exactly: it is in proportion to one plus the number of values that fell into it before.
    """

    def __init__(self, calibration: Floats, rng: np.random.Generator) -> None:
        self.rng = rng
        self.edges = np.sort(self._without_ties(calibration[np.isfinite(calibration)]))
        self.counts = np.ones(len(self.edges) + 1)

    def _without_ties(self, values: Any) -> Any:
        return values + 1e-9 * (1.0 + np.abs(values)) * self.rng.random(np.shape(values))

    def take(self, value: float) -> float:
        """Rank of a new value: uniform in (0, 1) while nothing changes, 0 for the highest."""
        value = self._without_ties(value)
        place = int(np.searchsorted(self.edges, value))
        rank = self.counts[place + 1 :].sum() + self.rng.random() * self.counts[place]
        rank /= self.counts.sum()
        if len(self.edges) < _MOST_EDGES:
            self.edges, self.counts = np.insert(self.edges, place, value), np.ones(len(self.counts) + 1)
        else:
            self.counts[place] += 1
        return float(rank)


def bulk_bets(u: float) -> Floats:
    """What bets pay for a uniform rank: tilted, spread or narrowed, and far moved either way.

    Each is a density over (0, 1), so that it pays 1 on average while nothing changes.
    """
    u = min(max(u, 1e-12), 1.0 - 1e-12)
    high, low = (_POWERS * side ** (_POWERS - 1.0) for side in (u, 1.0 - u))
    return np.concatenate([1.0 + _TILTS * (u - 0.5), 1.0 + _SPREADS * (6.0 * u * u - 6.0 * u + 1.0), high, low])


def tail_bets(u: float) -> Floats:
    """The same for more values in the tail, or deeper in it."""
    if u >= TAIL:
        return np.repeat((1.0 - _RATES) / (1.0 - TAIL), len(_DEPTHS))
    inside = max(u / TAIL, 1e-12)
    return np.outer(_RATES / TAIL, _DEPTHS * inside ** (_DEPTHS - 1.0)).ravel()


_NO_BULK = np.ones(len(bulk_bets(0.5)))  # pays nothing and costs nothing
_KIND_OF_BET = np.repeat([SHIFT, DEFECTS, SCENE], [len(_NO_BULK), len(tail_bets(0.5)), len(_NO_BULK)])


class ChangeTest:
    """Mixture of bets, each started at every image in turn: P(capital ever reaches 1 / level) <= level."""

    def __init__(self, level: float) -> None:
        self.level, self.seen, self.alarm_at, self.since = level, 0, 0, 0
        self.stake: Floats = np.zeros(1)  # of every bet, over all starts so far
        self.run: Floats = np.zeros(1)  # log of what every bet has paid since its best start
        self.start = np.ones(1, dtype=np.int64)

    @property
    def capital(self) -> float:
        """Factor by which the data speak against "nothing changed", at the latest image."""
        return float(self.stake.sum()) + _not_yet(self.seen)

    def update(self, paid: Floats) -> bool:
        """Take what every bet pays for an image; True where that raises the alarm, which happens once."""
        if self.alarm_at:
            return False
        begun = _not_yet(self.seen) - _not_yet(self.seen + 1)
        self.seen += 1
        self.stake = (self.stake + begun / len(paid)) * paid
        self.start = np.where(self.run <= 0.0, self.seen, self.start)
        self.run = np.maximum(self.run, 0.0) + np.log(paid)
        if self.capital < 1.0 / self.level:
            return False
        self.alarm_at, self.since = self.seen, int(self.start[np.argmax(self.run)])
        return True


def _not_yet(images: int) -> float:
    """Prior probability that the change begins after so many images: 1 at 0, falling like 1 / log."""
    return 1.0 / (1.0 + math.log1p(images))


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
            self._rng = np.random.default_rng(self._seed)
            self._ranks: dict[str, tuple[Ranks, Ranks]] = {}  # of scores and of distances
            self.test = ChangeTest(self.false_alarm_rate)
            # Number of the image, class, score, distance.
            self._recent: deque[tuple[int, str, float, float]] = deque(maxlen=RECENT)
            self.images = 0

    def update(self, score: float, predicted_class: str, distance: float = float("nan")) -> bool:
        """Take one prediction; True where it raised the alarm, which happens once."""
        if not math.isfinite(score):
            raise DataError(f"a score of {score} cannot be watched; leave images with an error out")
        with self._lock:
            self.images += 1
            self._recent.append((self.images, predicted_class, score, distance))
            if predicted_class not in self._ranks:
                good = self.good.take(self.good.of_class(predicted_class, given=False))
                self._ranks[predicted_class] = Ranks(good.score, self._rng), Ranks(good.distance, self._rng)
            scores, distances = self._ranks[predicted_class]
            u = scores.take(score)
            bulk = bulk_bets((u - TAIL) / (1.0 - TAIL)) if u >= TAIL else _NO_BULK
            scene = bulk_bets(distances.take(distance)) if math.isfinite(distance) else _NO_BULK
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
            test, images, recent = copy.copy(self.test), self.images, list(self._recent)
        light = "red" if test.alarm_at else "green" if images else "grey"
        kind, moved = NONE, tuple[str, ...]()
        message = f"no drift in {images} images."
        if test.alarm_at:
            kind, message, moved = self._change(test, [row[1:] for row in recent if row[0] >= test.since])
        message += f" If nothing changed, the chance of any alarm, ever, is at most {100 * test.level:g} %."
        return DriftReport(light, kind, message, images, test.level, test.alarm_at, test.since, test.capital, moved)

    def _change(self, test: ChangeTest, since: list[tuple[str, float, float]]) -> tuple[str, str, tuple[str, ...]]:
        """What changed, in a word and for people, and the classes that moved: by images since then."""
        p_of, bulk_moved, moved = [], False, list[str]()
        for name in sorted({name for name, *_ in since}):
            score_N, distance_N = np.array([numbers for row_name, *numbers in since if row_name == name]).T
            of_class = self.good.of_class(name, given=False)
            good = self.good.take(of_class) if of_class.any() else self.good  # without images: against all
            p, usual = p_values(score_N, good.score), good.distance[np.isfinite(good.distance)]
            p_scene = p_values(distance_N[np.isfinite(distance_N)], usual) if len(usual) else usual
            p_of.append(p)
            bulk_moved |= _moved((p[p > TAIL] - TAIL) / (1.0 - TAIL), len(good))
            moved += [name] if _moved(p, len(good)) or _moved(p_scene, len(good)) else []
        all_p, kind = np.concatenate(p_of), str(_KIND_OF_BET[np.argmax(test.run)])
        tail = (all_p <= TAIL).mean()
        # The bets on the tail win first where a shift is large, so the bulk counts too.
        kind = SHIFT if kind == DEFECTS and (tail > 0.5 or bulk_moved) else kind
        message = (
            f"{kind} since about image {test.since} (noticed at image {test.alarm_at}): median p-value "
            f"{np.median(all_p):.2f} (usual 0.50), {100 * tail:.0f} % in the top 5 %. {_ADVICE[kind]}"
        )
        if len(moved) == 1 < len(p_of):
            message += f" Only {moved[0]} differs from calibration, so look at that product before the camera."
        return kind, message, tuple(moved)


def _moved(p: Floats, calibration: int) -> bool:
    """Whether p-values, each counted in so many calibration images, are off one half as a whole."""
    return len(p) >= 5 and bool(abs(p.mean() - 0.5) > _SIGMAS * math.sqrt((1 / len(p) + 1 / calibration) / 12))
