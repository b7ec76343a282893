"""Calibration and decisions: p-values against an oracle, coverage by simulation, budgets, labels, third answer."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from twinspect.decide.decision import (
    ANOMALY,
    GOOD,
    UNSURE,
    Budget,
    Decision,
    GoodScores,
    conformal_threshold,
    images_needed,
    labelled_threshold,
    p_values,
    promises,
    refuse_unsupported,
    suspicious_tail,
)
from twinspect.errors import BundleError, ConfigError, DataError

GOLDEN = Path(__file__).parent / "golden" / "nonconform_p_values.json"
RATES = (0.005, 0.01, 0.02, 0.05, 0.1)


def good(scores, classes="a", predicted=None, groups=(), distance=None) -> GoodScores:
    scores = np.asarray(scores, np.float64)
    names = (classes,) * len(scores) if isinstance(classes, str) else tuple(classes)
    far = np.full(len(scores), np.nan) if distance is None else np.asarray(distance, np.float64)
    nothing = ("",) * len(scores)
    return GoodScores(scores, scores / 2, far, names, tuple(predicted or names), tuple(groups) or nothing, nothing)


def decision(scores, max_fpr=0.05, **changes) -> Decision:
    rows = scores if isinstance(scores, GoodScores) else good(scores)
    clusters = tuple(sorted(set(rows.predicted)))
    return Decision(rows, clusters, (0.0, 8.0), **{"budget": Budget(max_fpr), **changes})


# ------------------------------------------------------------------------------------------- p-values


def literal_p(score: float, calibration: list[float]) -> float:
    return (1 + sum(c >= score for c in calibration)) / (len(calibration) + 1)


def test_p_values_agree_with_the_stored_answers_of_nonconform_and_with_the_definition() -> None:
    for case in json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]:
        ours = p_values(np.array(case["score"]), np.array(case["calibration"]))
        np.testing.assert_allclose(ours, case["p"], atol=1e-9, rtol=0)
        np.testing.assert_allclose(ours, [literal_p(s, case["calibration"]) for s in case["score"]], atol=1e-12)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="nonconform needs Python 3.12")
def test_p_values_agree_with_nonconform() -> None:
    from nonconform import scoring as oracle

    rng = np.random.default_rng(1)
    calibration, new = rng.gamma(2, size=137).round(2), rng.gamma(3, size=200).round(2)
    np.testing.assert_allclose(
        p_values(new, calibration), oracle.calculate_p_val(new, calibration), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_calls_exactly_what_the_p_value_calls(ties: bool) -> None:
    rng = np.random.default_rng(0)
    for count in (20, 99, 100, 199, 250):
        calibration, new = rng.normal(size=count), rng.normal(size=300)
        if ties:
            calibration, new = calibration.round(1), new.round(1)
        for rate in RATES:
            found = conformal_threshold(calibration, rate)
            assert found.guaranteed == (count >= images_needed(rate))
            if found.guaranteed:
                assert ((new >= found.value) == (p_values(new, calibration) <= rate + 1e-12)).all()
            else:
                assert found.value > calibration.max()
                assert f"about 1 good image in {count + 1} will be called bad" in found.sentence


@pytest.mark.parametrize(("rate", "needed"), [(0.5, 1), (0.1, 9), (0.05, 19), (0.01, 99), (0.005, 199), (0.001, 999)])
def test_images_needed(rate: float, needed: int) -> None:
    assert images_needed(rate) == needed
    refuse_unsupported(needed, rate)
    with pytest.raises(ConfigError, match=f"at least {needed} are needed"):
        refuse_unsupported(needed - 1, rate)


def test_the_rate_that_a_refusal_suggests_is_supported() -> None:
    for count in range(20, 400):
        with pytest.raises(ConfigError) as caught:
            refuse_unsupported(count, 1e-4)
        refuse_unsupported(count, float(str(caught.value).rsplit(" ", 1)[1]))


# ------------------------------------------------------------------------------------------- coverage


def test_coverage_per_class_over_random_splits() -> None:
    """Realised false-alarm rate of good images, by class: on average within the budget (200 splits)."""
    rng = np.random.default_rng(0)
    names = ("a",) * 400 + ("b",) * 300 + ("c",) * 40
    scores = np.concatenate([rng.gamma(2, 1, 400), rng.normal(5, 1, 300), rng.gamma(1, 4, 40)])
    predicted = tuple("b" if n == "a" and rng.random() < 0.03 else n for n in names)
    called = {(rate, name): [] for rate in RATES for name in "ab"}
    every = {rate: [] for rate in RATES}
    for _ in range(200):
        inside = rng.random(len(scores)) < 0.5
        rows = good(scores, names, predicted).take(inside)
        for rate in RATES:
            made = decision(rows, rate)
            values = {n: made.rule(n, given=False) for n in set(predicted)}
            bad = np.array([s >= values[n].image.value for s, n in zip(scores, predicted, strict=True)])
            every[rate].append(bad[~inside].mean())
            for name in "ab":
                if values[name].image.guaranteed:
                    called[rate, name].append(bad[~inside & np.array([n == name for n in predicted])].mean())
    for key, rates in called.items():
        rate = key[0]
        if not rates:
            continue
        slack = 3 * math.sqrt(rate / 150 / 2)  # one data set of 300 to 400, cut in many ways
        assert np.mean(rates) <= rate + slack, key
        assert np.mean(rates) >= rate - 1 / 100 - slack, key
    for rate in RATES:
        assert np.mean(every[rate]) <= rate + 3 * math.sqrt(rate / 370 / 2)


def test_coverage_on_fresh_draws_is_exact() -> None:
    """With new scores every time the expected rate is floor(a (n + 1)) / (n + 1)."""
    rng = np.random.default_rng(3)
    for rate in (0.01, 0.05, 0.1):
        draws = rng.gamma(2.0, size=(4000, 120))
        kth = math.floor(rate * 120 + 1e-9)
        thresholds = np.array([conformal_threshold(row[:-1], rate).value for row in draws[:1000]])
        realised = (rng.gamma(2.0, size=(1000, 400)) >= thresholds[:, None]).mean()
        assert realised == pytest.approx(kth / 120, abs=3.5 * math.sqrt(kth) / 120 / math.sqrt(1000) + 0.001)


def test_p_values_of_good_images_are_not_too_small() -> None:
    """P(p <= a) <= a for every a, over calibration and test images drawn alike."""
    rng = np.random.default_rng(1)
    p = np.concatenate([p_values(rng.gamma(2, size=10), rng.gamma(2, size=30)) for _ in range(3000)])
    for a in (0.05, 0.1, 0.3, 0.7):
        assert (p <= a).mean() <= a + 4 * np.sqrt(a * (1 - a) / 3000)


def test_the_promise_in_words_and_counts() -> None:
    found = conformal_threshold(np.arange(199.0), 0.01)
    assert found.sentence == (
        "from 199 good images: about 1 % of the next ones, taken like these, will be called bad"
    )
    assert (np.arange(199.0) >= found.value).sum() == 1
    assert found.max_fpr == 0.01
    ties = conformal_threshold(np.ones(200), 0.05)  # all alike: no threshold may call them all bad
    assert ties.value == np.nextafter(1.0, 2.0)


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_impossible_budgets_are_refused(budget: float) -> None:
    with pytest.raises(ConfigError, match="accepted a rate between 0 and 1, such as 0.01"):
        conformal_threshold(np.arange(10.0), budget)


# ------------------------------------------------------------------------------------ classes and groups


def test_a_rare_class_goes_by_its_own_images_and_promises_what_they_can() -> None:
    rng = np.random.default_rng(0)
    scores = np.r_[rng.normal(size=200), rng.normal(6, 1, size=9)]
    made = decision(good(scores, ("big",) * 200 + ("rare",) * 9), 0.01)
    rare = made.rule("rare")
    assert (rare.basis, len(rare.scores)) == ("own images", 9)
    assert rare.image.value == np.nextafter(scores[200:].max(), np.inf)
    assert made.rule("").image.value < rare.image.value
    assert "from 9 good images: about 1 good image in 10 will be called bad" in rare.sentence()
    assert "at least 99 good images are needed" in rare.sentence()
    assert not rare.image.guaranteed
    big = made.rule("big")
    assert (big.basis, big.image.guaranteed) == ("own images", True)
    assert big.image == conformal_threshold(scores[:200], 0.01)
    assert [name for name, _ in promises(made)] == ["big", "rare", "all classes"]


def test_a_class_without_any_good_image_is_judged_with_the_others() -> None:
    made = Decision(good(np.arange(120.0)), ("a", "new"), (0.0, 8.0), budget=Budget(0.01))
    assert (made.rule("new").basis, len(made.rule("new").scores)) == ("every class", 120)
    assert made.rule("new").image == made.rule("").image
    assert made.judge(200.0, cluster=1)["answer"] == ANOMALY


DRAWS = {
    "light": lambda rng, size: rng.normal(size=size),
    "log-normal": lambda rng, size: rng.lognormal(0.0, 1.0, size=size),
}


@pytest.mark.parametrize("shape", list(DRAWS))
@pytest.mark.parametrize(("rate", "expected"), [(0.005, 1 / 41), (0.02, 1 / 41), (0.05, 2 / 41)])
def test_a_small_class_of_larger_scores_has_the_rate_that_its_own_images_support(
    shape: str, rate: float, expected: float
) -> None:
    """Scores of the third class are three times the others': the threshold of all classes calls too many of them."""
    rng, draw = np.random.default_rng(5), DRAWS[shape]
    scale = np.r_[np.ones(180), np.full(40, 3.0)]
    names = ("a",) * 90 + ("b",) * 90 + ("c",) * 40
    ours, together = [], []
    for _ in range(200):
        scores = draw(rng, 220) * scale
        fresh = 3.0 * draw(rng, 2000)
        made = decision(good(scores, names), rate)
        ours.append((fresh >= made.rule("c").image.value).mean())
        together.append((fresh >= made.rule("").image.value).mean())
    assert np.mean(together) > 2.5 * rate
    assert np.mean(ours) == pytest.approx(expected, abs=4 * np.std(ours) / math.sqrt(len(ours)))


@pytest.mark.parametrize("sizes", [(200, 60, 40), (120, 12, 5), (30,), (95, 9)])
def test_answers_follow_p_values_whatever_rule_decided(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    names = tuple(name for name, size in zip("abc", sizes, strict=False) for _ in range(size))
    for round_to in (None, 1):
        scores = rng.exponential(size=len(names))
        scores = scores if round_to is None else scores.round(round_to)
        made = decision(good(scores, names), 0.01, budget=Budget(0.01, unsure=0.04))
        for name in set(names):
            rule, last = made.rule(name), 1.0
            for score in np.linspace(-1.0, scores.max() * 6, 400):
                p = made.judge(float(score), 0, class_name=name)["p_value"]
                assert 0.0 < p <= last
                last = p
                said = made.judge(float(score), 0, class_name=name)
                limit = 1e-9 + np.maximum([0.01, 0.04], 1 / (len(rule.scores) + 1))  # no p-value is lower
                assert (said["answer"] != GOOD) == (p <= limit[1])
                assert (said["answer"] == ANOMALY) == (p <= limit[0])


def test_a_tail_of_ties_puts_the_threshold_above_them() -> None:
    rule = decision(np.r_[np.zeros(10), np.full(10, 2.0)], 0.01).rule("a")
    assert rule.image.value == np.nextafter(2.0, np.inf)


def test_given_and_predicted_classes_have_their_own_images() -> None:
    scores = np.r_[np.full(50, 1.0), np.full(50, 9.0)] + np.arange(100) / 1000
    made = decision(good(scores, ("a",) * 50 + ("b",) * 50, ("b",) * 50 + ("a",) * 50))
    assert made.rule("a", given=True).image.value < 2 < made.rule("a", given=False).image.value
    assert made.judge(5.0, cluster=0)["answer"] == GOOD  # predicted a
    said = made.judge(5.0, cluster=0, class_name="a")
    assert said["answer"] == ANOMALY
    assert (said["class_name"], said["predicted_class"]) == ("a", "a")


def test_one_class_alone_is_all_classes() -> None:
    made = decision(np.arange(60.0), 0.01)
    assert made.threshold.value == made.rule("").image.value
    assert not made.threshold.guaranteed
    assert [name for name, _ in promises(made)] == ["a"]


def test_an_unknown_class_is_named_by_its_distance() -> None:
    rng = np.random.default_rng(0)
    made = decision(good(rng.normal(size=100), distance=rng.normal(1, 0.1, 100)))
    near, far = made.judge(0.0, 0, 1.0), made.judge(0.0, 0, 2.0)
    assert near["unknown_class"] is False
    assert near["class_p"] > 0.2
    assert far["unknown_class"] is True
    assert far["class_p"] == pytest.approx(1 / 101)
    few = decision(good(rng.normal(size=30), distance=np.arange(30.0)), 0.005)
    assert [few.judge(0.0, 0, distance)["unknown_class"] for distance in (29.0, 29.1)] == [False, True]
    silent = made.judge(0.0, 0)
    assert silent["unknown_class"] is None
    assert math.isnan(silent["class_p"])
    with pytest.raises(ConfigError, match="Accepted: a"):
        made.checked_class("aa")


# -------------------------------------------------------------------------------------- third answer


def test_unsure_lies_between_two_budgets() -> None:
    made = decision(np.arange(199.0), budget=Budget(0.01, unsure=0.1))
    answers = [made.judge(score, 0)["answer"] for score in np.arange(199.0)]
    assert answers.count(ANOMALY) == 1
    assert answers.count(ANOMALY) + answers.count(UNSURE) == 19
    assert answers == sorted(answers, key=[GOOD, UNSURE, ANOMALY].index)
    assert "called bad or unsure" in made.rule("a").sentence()


@pytest.mark.parametrize("rates", [(0.0, None), (1.0, None), (0.05, 0.01), (0.05, 0.05), (0.01, 1.5)])
def test_budgets_that_make_no_sense_are_refused(rates) -> None:
    with pytest.raises(ConfigError):
        Budget(rates[0], unsure=rates[1])


# -------------------------------------------------------------------------------------------- labels


def literal_choice(scores, labels, rule: str, cost: float) -> tuple[int, int]:
    """Misses and false alarms of the best threshold, by trying them all."""
    found = []
    for value in [*sorted(set(scores)), math.inf]:
        missed = sum(s < value for s, y in zip(scores, labels, strict=True) if y)
        alarms = sum(s >= value for s, y in zip(scores, labels, strict=True) if not y)
        true = sum(labels) - missed
        f1 = 2 * true / max(true + alarms + sum(labels), 1)
        merit = {"f1-max": f1, "min-cost": -(cost * missed + alarms), "zero-miss": (missed == 0, -alarms)}[rule]
        found.append((merit, missed, alarms))
    best = max(one[0] for one in found)
    return next(one[1:] for one in found if one[0] == best)


@pytest.mark.parametrize(
    ("rule", "cost"), [("f1-max", 1.0), ("min-cost", 1.0), ("min-cost", 20.0), ("zero-miss", 1.0)]
)
@pytest.mark.parametrize("ties", [False, True])
def test_labelled_thresholds_against_trying_them_all(rule: str, cost: float, ties: bool) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        labels = np.r_[np.zeros(30, int), np.ones(12, int)]
        scores = rng.normal(size=42) + 1.5 * labels
        scores = scores.round(1) if ties else scores
        found = labelled_threshold(scores, labels, rule, cost)
        missed, alarms = literal_choice(scores.tolist(), labels.tolist(), rule, cost)
        called = scores >= found.value
        ours = int((~called & (labels == 1)).sum()), int((called & (labels == 0)).sum())
        if rule == "min-cost":
            assert cost * ours[0] + ours[1] == pytest.approx(cost * missed + alarms)
        else:
            assert ours == (missed, alarms)
        assert f"{ours[0]} of 12 defects missed, {ours[1]} of 30 good" in found.sentence
        assert not found.guaranteed


def test_labels_of_one_kind_and_odd_costs_are_refused() -> None:
    with pytest.raises(DataError, match="0 defects"):
        labelled_threshold(np.arange(5.0), [0] * 5, "f1-max")
    with pytest.raises(ConfigError, match="above 0"):
        labelled_threshold(np.arange(4.0), [0, 0, 1, 1], "min-cost", -1.0)
    with pytest.raises(DataError, match="not finite"):
        labelled_threshold(np.array([0.0, np.nan]), [0, 1], "f1-max")


# ---------------------------------------------------------------------------------------- odd input


@pytest.mark.parametrize("count", [8, 12, 20, 50, 300])
@pytest.mark.parametrize("kind", ["exponential", "normal", "gamma", "uniform"])
def test_clean_good_images_are_rarely_suspected(kind: str, count: int) -> None:
    rng = np.random.default_rng(0)
    draw = {
        "exponential": lambda: rng.exponential(2.0, count), "normal": lambda: rng.normal(size=count),
        "gamma": lambda: rng.gamma(2.0, size=count), "uniform": lambda: rng.random(count),
    }[kind]  # fmt: skip
    warned = sum(len(suspicious_tail(draw())) > 0 for _ in range(400))
    assert warned <= (12 if count <= 20 else 4)  # of 400; the scale is rough with ten gaps


@pytest.mark.parametrize(("clean", "odd"), [(95, 5), (60, 15), (30, 2), (300, 1)])
def test_anomalies_among_good_images_are_pointed_at(clean: int, odd: int) -> None:
    rng = np.random.default_rng(0)
    scores = np.r_[rng.exponential(1.0, clean), rng.normal(30, 4, odd)]
    assert set(suspicious_tail(scores)) == set(range(clean, clean + odd))
    scores[clean:] *= 10.0 ** np.arange(odd)  # each far above the last
    assert set(suspicious_tail(scores)) == set(range(clean, clean + odd))


def test_scores_that_are_all_equal_or_few_raise_no_suspicion() -> None:
    assert len(suspicious_tail(np.zeros(100))) == 0
    assert len(suspicious_tail(np.array([1.0, 2.0, 900.0]))) == 0


def test_nan_scores_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        decision(np.r_[np.arange(30.0), np.nan]).rule("a")
    with pytest.raises(DataError, match="no calibration scores"):
        conformal_threshold(np.zeros(0), 0.01)


def test_json_round_trip_keeps_every_answer() -> None:
    rng = np.random.default_rng(0)
    rows = good(rng.normal(size=120), ("a",) * 60 + ("b",) * 60, groups=("x", "y") * 60)
    made = decision(
        rows, budget=Budget(0.05, 0.1), budgets={"b": Budget(0.1)}, model_id="abc",
        trained=frozenset({"00" * 8, "0f" * 8}),
        fixed={"a": labelled_threshold(np.arange(4.0), [0, 0, 1, 1], "f1-max")},
    )  # fmt: skip
    back = Decision.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))
    assert back.trained == made.trained
    assert np.isnan(back.good.distance).all()
    for cluster in (0, 1):
        for score in rng.normal(size=20):
            ours, theirs = made.judge(score, cluster), back.judge(score, cluster)
            for name in ("p_value", "threshold", "answer"):
                assert ours[name] == theirs[name]
    assert made.rule("a").sentence() == back.rule("a").sentence()


def test_what_only_older_versions_calibrated_is_refused() -> None:
    values = decision(np.arange(30.0)).to_dict()
    alike = values | {"by_group": False, "budget": {"max_fpr": 0.02, "unsure": None, "region_fpr": 0.02}}
    assert Decision.from_dict(alike).budget == Budget(0.02)
    with pytest.raises(BundleError, match="--group none"):
        Decision.from_dict(alike | {"by_group": True})
    with pytest.raises(
        BundleError,
        match="^this model has a rate of regions of its own .* type: twinspect calibrate MODEL --max-fpr RATE$",
    ):
        Decision.from_dict(alike | {"budget": alike["budget"] | {"region_fpr": 0.01}})


def test_columns_of_different_lengths_are_refused() -> None:
    values = decision(np.arange(30.0)).to_dict()
    values["good"]["group"].append("x")
    with pytest.raises(BundleError, match="different lengths"):
        Decision.from_dict(values)
