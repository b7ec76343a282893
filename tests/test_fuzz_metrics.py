"""Metrics of any numbers: the value of the literature, or a refusal in words; in any order, and merged in any way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hostile import in_words, inputs, tried
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from twinspect.errors import DataError
from twinspect.metrics import Evaluator, auroc, average_precision, f1_max, roc_curve

# Few different values make ties; the others span what floats can.
SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.1, 1e-300, -1e300, 1e300]), st.floats(allow_nan=False, allow_infinity=False)
)
PAIRS = st.lists(st.tuples(SCORES, st.integers(0, 1)), max_size=24)
ANYTHING = st.one_of(
    st.floats(), st.integers(-(2**70), 2**70), st.text(max_size=2), st.none(), st.lists(st.floats(), max_size=2)
)


@inputs(300)
@given(PAIRS)
def test_image_metrics_equal_the_reference(pairs: list[tuple[float, int]]) -> None:
    scores, labels = [score for score, _ in pairs], [label for _, label in pairs]
    tried("metrics")
    if not pairs or len(set(labels)) < 2:
        try:
            assert math.isnan(auroc(scores, labels))
            assert math.isnan(average_precision(scores, labels))
        except DataError as error:
            in_words(error)
        return
    assert math.isclose(auroc(scores, labels), reference.roc_auc_score(labels, scores), abs_tol=1e-12)
    assert math.isclose(
        average_precision(scores, labels), reference.average_precision_score(labels, scores), abs_tol=1e-12
    )
    best = max(reference.f1_score(labels, np.array(scores) >= one) for one in set(scores))
    assert math.isclose(f1_max(scores, labels), best, abs_tol=1e-12)
    rising = auroc(np.argsort(np.argsort(np.unique(scores)))[np.searchsorted(np.unique(scores), scores)], labels)
    assert rising == auroc(scores, labels)  # only the order counts


@inputs(200)
@given(st.lists(ANYTHING, max_size=6), st.lists(ANYTHING, max_size=6))
def test_what_is_no_score_or_label_is_refused(scores: list[Any], labels: list[Any]) -> None:
    for function in (auroc, average_precision, f1_max, roc_curve):
        try:
            function(scores, labels)
        except DataError as error:
            in_words(error)
    tried("metrics of anything")


MAPS = st.one_of(
    st.lists(st.floats(width=32), min_size=12, max_size=12).map(lambda v: np.array(v, np.float32).reshape(3, 4)),
    st.sampled_from(
        [np.zeros((0, 0)), np.zeros(4), np.zeros((2, 2, 2)), np.ones((3, 4), bool), np.full((3, 4), 1e300)]
    ),
)
MASKS = st.one_of(
    st.none(),
    st.lists(st.integers(0, 1), min_size=12, max_size=12).map(lambda v: np.array(v, np.uint8).reshape(3, 4)),
    st.sampled_from([np.zeros((3, 4)), np.ones((4, 3)), np.full((3, 4), np.nan), np.full((3, 4), 255, np.uint8)]),
)  # fmt: skip
IMAGES = st.lists(
    st.tuples(st.floats(), st.sampled_from([0, 1, None]), st.sampled_from("ab"), MAPS, MASKS), max_size=8
)


def plain(value: Any) -> bool:
    """Whether it is JSON without not-a-number."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and plain(one) for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))


@inputs(250)
@given(IMAGES, st.integers(0, 8))
def test_evaluators_take_or_refuse_and_parts_make_the_whole(images: list[tuple[Any, ...]], cut: int) -> None:
    whole, first, second = Evaluator(), Evaluator(), Evaluator()
    taken = 0
    for number, (score, label, name, heat, mask) in enumerate(images):
        try:
            whole.update(score, label, name, map_HW=heat, mask_HW=mask)
        except DataError as error:
            in_words(error)
            continue
        taken += label is not None
        (first if number < cut else second).update(score, label, name, map_HW=heat, mask_HW=mask)
    second.merge(first)
    found = whole.compute()
    assert plain(found)
    assert sum(found["images"].values()) == taken
    assert second.compute() == found
    tried("images of an evaluation")
