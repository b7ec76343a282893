"""Reports with decisions: what thresholds made of images, what others would, and the pictures that were wrong."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_evaluation import call
from test_report import Page
from tiny import images_to_test, picture, save

from twinspect import Detector
from twinspect.commands.results import FACTORS, Review


def rows(score: list[float], label: list[int], threshold: float = 2.0, name: str = "nut") -> list[dict[str, object]]:
    return [
        {"path": f"{name}/{i}", "class_name": name, "score": s, "threshold": threshold, "label": y, "error": ""}
        for i, (s, y) in enumerate(zip(score, label, strict=True))
    ]


def reviewed(*found: dict[str, object]) -> Review:
    review = Review()
    for row in found:
        review.add(row)
    return review


def test_other_thresholds_are_what_counting_gives() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 200)
    score = rng.gamma(2.0, 1.0, 200) + 2.0 * label
    review = reviewed(*rows(score.tolist(), label.tolist()))
    found = review.other_thresholds()
    assert [row["factor"] for row in found] == list(FACTORS)
    for row in found:
        called = score >= 2.0 * row["factor"]
        assert row["false_alarms"] == int((called & (label == 0)).sum())
        assert row["missed"] == int((~called & (label == 1)).sum())


def test_a_threshold_below_zero_cannot_be_multiplied() -> None:
    found = reviewed(*rows([-3.0, -1.0], [0, 1], threshold=-2.0)).other_thresholds()
    assert found == [{"factor": 1.0, "called": 1, "false_alarms": 0, "missed": 0}]


def test_the_worst_mistakes_and_the_clearest_defects_are_shown() -> None:
    score = [2.5, 9.0, 2.1, 3.0, 4.0, 5.0, 6.0, 7.0, 1.0, 0.1, 8.0]
    label = [0] * 8 + [1] * 3
    review = reviewed(*rows(score, label), {"path": "broken", "error": "cannot be read", "score": None})
    asked: list[str] = []
    assert review.sections(lambda names: asked.extend(names) or [])
    assert set(asked) == {f"nut/{i}" for i in (1, 7, 6, 5, 4, 3, 9, 8, 10)}
    assert review.errors == 1
    review = reviewed(*({"path": str(i), "error": f"{i}: cannot be read", "score": None} for i in range(22)))
    (remarks,) = review.remarks()
    assert (len(remarks.text), remarks.text[0]) == (21, "not scored: 0: cannot be read")
    assert remarks.text[-1] == "not scored: 2 more"
    assert reviewed().remarks() == []


def test_eval_report_shows_decisions_and_pictures(bundle: Path, parts: Path, tmp_path: Path) -> None:
    code, _, error = call("eval", bundle, parts, "--report", tmp_path / "r.html", "--json", tmp_path / "r.json")
    assert code == 0, error
    html, values = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "r.json").read_text())
    assert not Page(html).open
    counts = values["decisions"]
    shown = [n for row in counts.values() for n in (row["false_alarms"], row["found"], row["defects"] - row["found"])]
    assert html.count('<li><div class="pair">') == sum(min(n, 6) for n in shown) > 0
    assert html.count("ROC: ") >= len(counts)
    assert html.count("threshold in use") >= len(counts)
    use = next(row for row in values["other_thresholds"] if row["factor"] == 1.0)
    assert use["false_alarms"] == sum(row["false_alarms"] for row in counts.values())
    assert use["missed"] == sum(row["defects"] - row["found"] for row in counts.values())
    for name, kinds in values["defect_decisions"].items():
        assert sum(one["found"] for one in kinds.values()) == counts[name]["found"]
    tested = sum(row["good"] + row["defects"] for row in counts.values())
    assert f"<dt>tested on</dt><dd>{tested} labelled test images</dd>" in html


@pytest.mark.parametrize("bad", [False, True])
def test_good_and_bad_in_one_folder_are_all_measured(bundle: Path, parts: Path, tmp_path: Path, bad: bool) -> None:
    for name, label in (("normal", 0), ("anomaly", 1))[: 1 + bad]:
        for number, path in enumerate(images_to_test(parts, label)[:4]):
            (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "set" / name / f"{number}.png")
    data = tmp_path / "set" if bad else tmp_path / "set" / "normal"
    code, out, error = call("eval", bundle, data, "--report", tmp_path / "r.html", "--json", tmp_path / "r.json")
    assert code == 0, error
    (own,) = json.loads((tmp_path / "r.json").read_text())["decisions"].values()
    assert (own["good"], own["defects"]) == (4, 4 if bad else 0)
    assert re.search(r"false alarms +false alarms, %\n +\w+ ", out + error)
    assert ("image AUROC" in out + error) == bad


def test_images_that_were_learnt_are_no_test_images(quick: Detector, parts: Path, tmp_path: Path) -> None:
    quick.save(tmp_path / "m.twin")
    learnt = sorted((parts / "weave" / "train" / "good").iterdir())
    for path in learnt:
        (tmp_path / "good").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "good")
    assert "no labelled test images" in call("eval", tmp_path / "m.twin", tmp_path / "good")[2]
    save(tmp_path / "good" / "new.png", picture(77))
    code, _, error = call("eval", tmp_path / "m.twin", tmp_path / "good", "--json", tmp_path / "r.json")
    assert code == 0, error
    (own,) = json.loads((tmp_path / "r.json").read_text())["decisions"].values()
    assert own["good"] == 1


@pytest.mark.parametrize("out", ["", "t.csv", "t.parquet"])
def test_predict_report(bundle: Path, parts: Path, tmp_path: Path, out: str) -> None:
    images = images_to_test(parts, 1)[:3]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in images[1:]:
            tar.add(path, path.name)
    words = ["--out", tmp_path / out] if out else []
    reports = ("--report", tmp_path / "r.html", "--report", tmp_path / "r.json")
    code, _, error = call("predict", bundle, images[0], tmp_path / "a.tar", tmp_path / "gone.png", *words, *reports)
    assert code == 0, error
    html, values = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "r.json").read_text())
    assert not Page(html).open
    assert values["errors"] == 1
    assert sum(one["images"] for one in values["classes"].values() if "images" in one) >= 3
    assert html.count("data:image/jpeg") >= 6
    for path in images:
        assert path.name in html
    assert "not scored:" in html
    assert "gone.png" in html


def test_predict_refuses_a_report_of_a_share(bundle: Path, parts: Path, tmp_path: Path) -> None:
    words = ("--out", f"{tmp_path}/t/", "--shard", "0/2", "--report", tmp_path / "r.html")
    assert "no --shard" in call("predict", bundle, parts, *words)[2]


def test_info_is_a_table(bundle: Path) -> None:
    code, out, error = call("info", bundle)
    assert code == 0
    lines = (out + error).splitlines()
    assert not any("{" in line for line in lines)
    names = ("written by  ", "model  ", "teacher  ", "seed  ")
    facts = [line for line in lines if line.startswith(names)]
    assert len({len(line) - len(line.split("  ", 1)[1].lstrip()) for line in facts}) == 1
    assert len(facts) == 4
    assert any(line.split()[:4] == ["class", "good", "images", "threshold"] for line in lines)
