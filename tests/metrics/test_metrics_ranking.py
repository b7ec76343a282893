import numpy as np
import pytest
from sklearn import metrics as sk

from twinspect.errors import DataError
from twinspect.metrics import auroc, average_precision, f1_max, roc_curve


def score_sets():
    rng = np.random.default_rng(3)
    normal = rng.normal(size=200)
    return {
        "continuous": normal,
        "all equal": np.full(200, 0.7),
        "two values": rng.integers(0, 2, 200).astype(float),
        "heavy ties": rng.integers(-3, 3, 200) / 7,
        "integers": rng.integers(0, 10**9, 200),
        "tiny to huge": 10.0 ** rng.uniform(-300, 300, 200),
        "negative": -np.exp(normal),
        "tiny differences": 1 + 1e-15 * rng.integers(0, 40, 200),
    }


LABELS = np.random.default_rng(4).integers(0, 2, 200)


@pytest.mark.parametrize("scores", score_sets().values(), ids=score_sets().keys())
def test_agrees_with_scikit_learn(scores):
    assert auroc(scores, LABELS) == pytest.approx(sk.roc_auc_score(LABELS, scores), abs=1e-12)
    assert average_precision(scores, LABELS) == pytest.approx(sk.average_precision_score(LABELS, scores), abs=1e-12)
    theirs = sk.roc_curve(LABELS, scores, drop_intermediate=False)
    for a, b in zip(roc_curve(scores, LABELS), theirs, strict=True):
        np.testing.assert_allclose(a, b)
    candidates = [sk.f1_score(LABELS, scores >= t) for t in np.unique(scores)]
    assert f1_max(scores, LABELS) == pytest.approx(max(candidates), abs=1e-12)


def test_order_of_items_does_not_change_a_bit():
    scores = np.random.default_rng(0).normal(size=200)
    turn = np.random.default_rng(1).permutation(200)
    for metric in (auroc, average_precision, f1_max):
        assert metric(scores, LABELS) == metric(scores[turn], LABELS[turn])


@pytest.mark.parametrize("label", [0, 1])
def test_one_label_is_undefined(label):
    scores, labels = [0.1, 0.2], [label, label]
    assert np.isnan(auroc(scores, labels))
    assert np.isnan(average_precision(scores, labels))
    assert np.isnan(f1_max(scores, labels))
    fpr, tpr, thresholds = roc_curve(scores, labels)
    assert np.isnan(tpr if label == 0 else fpr).all()
    assert thresholds[0] == np.inf


def test_nothing_at_all_is_undefined():
    assert np.isnan(auroc([], []))
    assert np.isnan(average_precision([], []))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_named(bad):
    with pytest.raises(DataError, match="item number 1"):
        average_precision([0.1, bad, 0.3], [0, 1, 1])


def test_bad_shapes_and_labels():
    with pytest.raises(DataError, match="same length"):
        auroc([1, 2], [1])
    with pytest.raises(DataError, match="accepted: 0"):
        auroc([1, 2], [1, 2])
