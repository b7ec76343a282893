"""p-values and thresholds: against brute force, and by simulation of the promise they make."""

import numpy as np
import pytest

from twinspect.decide.conformal import conformal_threshold, p_values
from twinspect.errors import ConfigError, DataError


@pytest.mark.parametrize("tied", [False, True])
def test_p_values_count_calibration_scores_at_least_as_high_plus_one(tied: bool) -> None:
    rng = np.random.default_rng(0)
    calibration = rng.integers(0, 5, 37).astype(float) if tied else rng.normal(size=37)
    scores = np.concatenate([calibration[:10], rng.normal(size=20), [-99.0, 99.0]])
    slow = [(1 + sum(c >= s for c in calibration)) / (37 + 1) for s in scores]
    assert p_values(scores, calibration).tolist() == pytest.approx(slow, abs=0)
    assert p_values(np.array([99.0]), calibration)[0] == 1 / 38  # never zero


def test_p_values_of_good_images_are_not_too_small() -> None:
    """P(p <= a) <= a for every a, over calibration and test images drawn alike."""
    rng = np.random.default_rng(1)
    p = np.concatenate([p_values(rng.gamma(2, size=10), rng.gamma(2, size=30)) for _ in range(3000)])
    for a in (0.05, 0.1, 0.3, 0.7):
        assert (p <= a).mean() <= a + 4 * np.sqrt(a * (1 - a) / 3000)


@pytest.mark.parametrize(("count", "budget"), [(19, 0.05), (100, 0.01), (150, 0.05), (400, 0.01)])
def test_threshold_keeps_its_promise(count: int, budget: float) -> None:
    rng = np.random.default_rng(count)
    rates = []
    for _ in range(1500):
        threshold = conformal_threshold(rng.normal(size=count), budget)
        assert threshold.guaranteed
        rates.append((rng.normal(size=200) >= threshold.value).mean())
    assert np.mean(rates) <= budget + 4 * np.std(rates) / np.sqrt(len(rates))
    assert np.mean(rates) > 0.3 * budget  # and does not buy it by calling nothing


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.2, 0.5])
def test_threshold_and_p_value_say_the_same(budget: float) -> None:
    rng = np.random.default_rng(2)
    calibration, scores = rng.normal(size=119), rng.normal(size=500)
    value = conformal_threshold(calibration, budget).value
    assert ((p_values(scores, calibration) <= budget) == (scores >= value)).all()


def test_a_budget_that_too_few_images_cannot_promise() -> None:
    scores = np.arange(50.0)
    found = conformal_threshold(scores, 0.01)
    assert not found.guaranteed
    assert found.value > 49
    assert not (scores >= found.value).any()
    assert found.sentence == (
        "from 50 good images: about 1 good image in 51 will be called bad, at best; "
        "for 1 % at least 99 good images are needed"
    )
    assert conformal_threshold(np.arange(98.0), 0.01).guaranteed is False
    assert conformal_threshold(np.arange(99.0), 0.01).guaranteed is True


def test_the_promise_in_words_and_counts() -> None:
    found = conformal_threshold(np.arange(199.0), 0.01)
    assert found.sentence == (
        "from 199 good images: at most 1 % of the next ones, taken like these, will be called bad"
    )
    assert (np.arange(199.0) >= found.value).sum() == 1
    assert found.max_fpr == 0.01
    ties = conformal_threshold(np.ones(200), 0.05)  # all alike: no threshold may call them all bad
    assert ties.value == np.nextafter(1.0, 2.0)


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_impossible_budgets_are_refused(budget: float) -> None:
    with pytest.raises(ConfigError, match="accepted a rate between 0 and 1, such as 0.01"):
        conformal_threshold(np.arange(10.0), budget)


def test_no_scores_and_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="no calibration scores; give at least 20"):
        conformal_threshold(np.array([]), 0.1)
    for bad in (np.nan, np.inf):
        with pytest.raises(DataError, match="not finite"):
            conformal_threshold(np.array([1.0, bad]), 0.1)
