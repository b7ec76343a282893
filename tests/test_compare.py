"""Two models on the same images: paired intervals, decisions that differ, pictures, speed and size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_evaluation import call
from test_report import Page

from twinspect import Detector
from twinspect.commands.compare import auroc_difference
from twinspect.metrics import auroc


def pairs_of(first: np.ndarray, second: np.ndarray, label: np.ndarray, name: str = "nut") -> list:
    return [
        tuple({"score": float(score), "label": int(y), "true_class": name} for score in both)
        for *both, y in zip(first, second, label, strict=True)
    ]


def test_the_interval_is_paired() -> None:
    """Two models that err on the same images differ with far more certainty than their own intervals say."""
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], [60, 60])
    shared = rng.normal(size=120) + 1.2 * label
    first, second = shared, shared + 0.15 * label
    found = auroc_difference(pairs_of(first, second, label), 500, 0)["nut"]
    assert found["first"] == pytest.approx(auroc(first, label))
    assert found["difference"] == pytest.approx(auroc(second, label) - auroc(first, label)) != 0
    assert 0 < found["low"] < found["difference"] < found["high"]
    draws = []
    for _ in range(500):  # not paired: each model its own images
        at, other = (np.concatenate([rng.integers(0, 60, 60), rng.integers(60, 120, 60)]) for _ in range(2))
        draws.append(auroc(second[other], label[other]) - auroc(first[at], label[at]))
    assert np.subtract(*np.quantile(draws, (0.975, 0.025))) > 3 * (found["high"] - found["low"])


def test_the_mean_is_over_classes_with_both_labels() -> None:
    rng = np.random.default_rng(1)
    label = np.repeat([0, 1], 20)
    pairs = []
    for name, labels in (("a", label), ("b", label), ("good only", np.zeros(40, int))):
        first, second = rng.normal(size=(2, 40)) + labels
        pairs += pairs_of(first, second, labels, name)
    found = auroc_difference(pairs, 50, 0)
    assert list(found) == ["a", "b", "mean"]
    assert found["mean"]["difference"] == pytest.approx((found["a"]["difference"] + found["b"]["difference"]) / 2)
    same = auroc_difference([(one, one) for one, _ in pairs], 50, 0)["mean"]
    assert (same["difference"], same["low"], same["high"]) == (0.0, 0.0, 0.0)


def test_compare_says_what_differs(bundle: Path, quick: Detector, parts: Path, tmp_path: Path) -> None:
    other = quick.save(tmp_path / "other.twin")
    outs = [option for kind in ("html", "md", "json") for option in ("--report", tmp_path / f"r.{kind}")]
    words = (bundle, other, parts, "--draws", 50, "--json", tmp_path / "v.json", *outs)
    code, out, error = call("compare", *words)
    assert code == 0, error
    values = json.loads((tmp_path / "v.json").read_text())
    evals = {}
    for key, path in (("first", bundle), ("second", other)):
        assert call("eval", path, parts, "--json", tmp_path / f"{key}.json")[0] == 0
        evals[key] = json.loads((tmp_path / f"{key}.json").read_text())
        assert values[key]["mean"] == pytest.approx(evals[key]["mean"])
        assert values[key]["decisions"] == evals[key]["decisions"]
        assert values[key]["mb"] == pytest.approx(path.stat().st_size / 1e6, abs=0.01)
        assert values["auroc_difference"]["mean"][key] == pytest.approx(evals[key]["mean"]["image_auroc"])
    assert values["images"] == 20
    right = values["right"]
    assert right["first"] + right["second"] == len(values["differ"]) > 0
    gained = {
        key: sum(row["found"] - row["false_alarms"] for row in found["decisions"].values())
        for key, found in evals.items()
    }
    assert right["first"] - right["second"] == gained["first"] - gained["second"]
    html = (tmp_path / "r.html").read_text()
    assert not Page(html).open
    assert html.count('alt="Map of the second model"') == len(values["differ"])
    assert "answer" in (tmp_path / "r.md").read_text()
    assert f"the first model is right on {right['first']}, the second on {right['second']}" in out + error


def test_images_that_a_model_has_learnt_are_said(quick: Detector, parts: Path, tmp_path: Path) -> None:
    model = quick.save(tmp_path / "m.twin")
    table = tmp_path / "t.csv"
    good = sorted((parts / "weave" / "train" / "good").iterdir())[:3]
    bad = [p for p in sorted((parts / "weave" / "test").rglob("*.png")) if p.parent.name != "good"][:3]
    lines = [f"{path},test,{label}" for label, paths in ((0, good), (1, bad)) for path in paths]
    table.write_text("image,split,label\n" + "\n".join(lines) + "\n")
    code, out, error = call("compare", model, model, table, "--images", "/", "--draws", 10)
    assert code == 0, error
    assert "m.twin has learnt 3 of the test images" in out + error
    assert "Both models give the same answer to all 6 images." in out
    assert "accepted 1 to" in call("compare", model, model, table, "--draws", 0)[2]
    assert "--seed -1: accepted 0 to" in call("compare", model, model, table, "--seed", -1)[2]
