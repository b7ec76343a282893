"""Drift: exact ranks, bets that are fair, the stated false-alarm rate, the delay, and what the message says."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from twinspect.decide import drift
from twinspect.decide.decision import GoodScores
from twinspect.decide.drift import DEFECTS, NONE, SCENE, SHIFT, ChangeTest, DriftMonitor, Ranks, bulk_bets, tail_bets
from twinspect.errors import ConfigError, DataError


def calibration(rng: np.random.Generator, count: int = 200, classes: str = "ab") -> GoodScores:
    names = tuple(classes[i % len(classes)] for i in range(count))
    offset = np.array([5.0 * classes.index(n) for n in names])
    scores, nothing = rng.gamma(2, 1.5, count) + offset, ("",) * count
    return GoodScores(scores, rng.random(count), rng.normal(1, 0.1, count), names, names, nothing, nothing)


def stream(rng, count: int, shift=0.0, defects=0.0, scene=0.0, classes="ab"):
    for i in range(count):
        name = classes[i % len(classes)]
        score = rng.gamma(2, 1.5) + 5.0 * classes.index(name) + shift
        score += 40.0 if rng.random() < defects else 0.0
        yield score, name, rng.normal(1 + scene, 0.1)


def watched(good: GoodScores, *parts, rate: float = 0.01, seed: int = 0) -> DriftMonitor:
    monitor = DriftMonitor(good, rate, seed)
    for part in parts:
        for row in part:
            monitor.update(*row)
    return monitor


# ------------------------------------------------------------------------------------------ exactness


def test_ranks_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    seen = rng.normal(size=30).tolist()
    ranks = Ranks(np.array(seen), rng)
    for value in rng.normal(size=200):
        rank, above = ranks.take(float(value)), sum(s > value for s in seen)
        seen.append(value)
        assert above / len(seen) <= rank <= (above + 1) / len(seen)


@pytest.mark.parametrize("most", [2000, 8])
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_are_uniform_and_independent_from_the_first_image(
    most: int, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "_MOST_EDGES", most)  # with 8, the latest ones are counted between the first ones
    rng = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        return rng.gamma(2, size=count).round(0 if ties else 9)

    u = []
    for _ in range(600):
        ranks = Ranks(draw(5), rng)
        u.append([ranks.take(float(value)) for value in draw(12)])
    table = np.array(u)
    assert abs(table.mean() - 0.5) < 4 / math.sqrt(12 * table.size)
    assert np.abs(np.histogram(table, 10, (0, 1))[0] / table.size - 0.1).max() < 0.02
    assert np.abs(np.corrcoef(table.T) - np.eye(12)).max() < 0.2


def test_every_bet_is_fair() -> None:
    """The mean factor over a uniform rank is 1, so capital is a martingale."""
    edges = np.concatenate([np.geomspace(1e-12, 1e-3, 4000), np.linspace(1e-3, 1 - 1e-3, 20001)[1:]])
    edges = np.concatenate([edges, 1 - np.geomspace(1e-3, 1e-12, 4000)[1:]])
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    for bets in (bulk_bets, tail_bets):
        factors = np.array([bets(float(u)) for u in middle])
        assert (factors >= 0).all()
        np.testing.assert_allclose((factors * width[:, None]).sum(0), 1.0, atol=2e-3)


def test_capital_against_the_mixture_over_starts() -> None:
    rng = np.random.default_rng(0)
    test, factors = ChangeTest(1e-9), rng.uniform(0.5, 1.5, (40, 3))
    for row in factors:
        test.update(row)
    left = [1 / (1 + math.log1p(n)) for n in range(41)]
    begun = [a - b for a, b in zip(left[:-1], left[1:], strict=True)]
    literal = left[-1] + sum(w * factors[k:, b].prod() / 3 for k, w in enumerate(begun) for b in range(3))
    assert test.capital == pytest.approx(literal)


# ----------------------------------------------------------------------------------------- false alarms


def test_false_alarms_stay_under_the_stated_rate() -> None:
    """100 streams of 2,000 uniform ranks at a stated 20 %: Ville's bound, with sampling error."""
    rng = np.random.default_rng(0)
    raised = 0
    for _ in range(100):
        test = ChangeTest(0.2)
        raised += any(test.update(bulk_bets(u)) for u in rng.random(2000))
    assert raised / 100 <= 0.2 + 2.6 * math.sqrt(0.2 * 0.8 / 100)


@pytest.mark.slow
def test_no_more_than_the_stated_false_alarms_over_ten_thousand_images() -> None:
    """Eight streams of 10,000 undrifted images with few calibration images, at a stated 10 %."""
    raised = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        monitor = watched(calibration(rng, 40), stream(rng, 10_000), rate=0.1, seed=seed)
        raised += monitor.alarmed
        assert monitor.images == 10_000
    assert raised <= 3  # more than 3 of 8 has a chance of 0.5 % at the stated rate


def test_another_mix_of_products_is_no_drift() -> None:
    rng = np.random.default_rng(0)
    rows = ((s, n, d) for s, n, d in stream(rng, 3000) if n == "b" or rng.random() < 0.05)
    assert watched(calibration(rng), rows).report().kind == NONE


# ------------------------------------------------------------------------------------- delay and message


@pytest.mark.parametrize(("shift", "most"), [(1.5, 150), (3.0, 60), (8.0, 40), (-1.5, 150)])
def test_a_shift_is_found_soon_after_a_long_quiet_time(shift: float, most: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        monitor = watched(calibration(rng), stream(rng, 1000))
        assert not monitor.alarmed
        after = watched_until_alarm(monitor, stream(rng, most, shift=shift))
        assert after <= most
        found = monitor.report()
        assert found.kind == SHIFT
        assert abs(found.since - 1000) < 60
        assert "since about image" in found.message


def watched_until_alarm(monitor: DriftMonitor, rows) -> int:
    for number, row in enumerate(rows, start=1):
        if monitor.update(*row):
            return number
    raise AssertionError("no alarm")


def test_more_defects_are_told_from_a_shift() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        monitor = watched(calibration(rng), stream(rng, 1000))
        watched_until_alarm(monitor, stream(rng, 1500, defects=0.08))
        found = monitor.report()
        assert found.kind == DEFECTS
        assert "more defects are likelier" in found.message


def test_another_scene_with_the_same_scores() -> None:
    rng = np.random.default_rng(0)
    found = watched(calibration(rng), stream(rng, 300), stream(rng, 200, scene=0.3)).report()
    assert found.kind == SCENE
    assert found.light == "red"
    assert found.alarm_at > 300


def test_one_product_that_moved_is_named() -> None:
    rng = np.random.default_rng(0)
    rows = ((s + (4.0 if n == "a" else 0.0), n, d) for s, n, d in stream(rng, 300))
    found = watched(calibration(rng, classes="abc"), stream(rng, 300, classes="abc"), rows).report()
    assert "Only a differs" in found.message
    assert found.moved == ("a",)


def test_a_quiet_stream_states_the_chance() -> None:
    rng = np.random.default_rng(0)
    found = watched(calibration(rng), stream(rng, 50), rate=0.05).report()
    assert found.message.startswith("no drift in 50 images")
    assert "at most 5 %" in found.message
    assert 0 < found.evidence < 20
    assert found.light == "green"
    json.dumps(asdict(found), allow_nan=False)


# ------------------------------------------------------------------------------------------------ state


def test_after_a_reset_everything_begins_again() -> None:
    rng = np.random.default_rng(0)
    good, rows = calibration(rng), list(stream(rng, 200, shift=2.0))
    monitor = watched(good, rows)
    first = monitor.report()
    assert first.light == "red"
    monitor.reset()
    assert monitor.report().light == "grey"
    for row in rows:
        monitor.update(*row)
    assert monitor.report() == first


def test_memory_stays_bounded() -> None:
    rng = np.random.default_rng(0)
    monitor = watched(calibration(rng), stream(rng, 5000))
    assert len(monitor._recent) == 2000
    assert all(len(ranks.edges) <= 2000 for pair in monitor._ranks.values() for ranks in pair)


def test_a_class_without_calibration_images_is_watched_from_its_first_one() -> None:
    rng = np.random.default_rng(0)
    monitor = watched(calibration(rng), stream(rng, 400, classes="abcd"))
    assert monitor.report().kind == NONE
    watched_until_alarm(monitor, stream(rng, 400, shift=4.0, classes="d"))
    assert monitor.report().kind == SHIFT


def test_bad_rates_and_scores_are_refused() -> None:
    rng = np.random.default_rng(0)
    for rate in (0.0, 1.0, -1.0):
        with pytest.raises(ConfigError, match="false-alarm-rate"):
            DriftMonitor(calibration(rng), rate)
    with pytest.raises(DataError, match="cannot be watched"):
        DriftMonitor(calibration(rng)).update(math.nan, "a")
