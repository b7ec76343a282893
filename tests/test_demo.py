"""The demo on a handful of images, and its split."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from twinspect.commands.demo import FULL, QUICK, DemoSize, find_images, run_on, split
from twinspect.console import Console
from twinspect.errors import DataError

TINY = DemoSize(train=12, test=4, steps=2, budget_s=20.0)


@pytest.fixture
def few(tmp_path: Path) -> Path:
    root = find_images()
    for kind, count in (("nominal", 17), ("local", 5), ("global", 5)):
        (tmp_path / kind).mkdir()
        for path in sorted((root / kind).glob("*.jpg"))[:count]:
            shutil.copy(path, tmp_path / kind)
    return tmp_path


@pytest.mark.slow
def test_demo_writes_report_numbers_and_model(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TWINSPECT_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    run_on(few, out, TINY, Console())
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    for key in ("auroc", "auroc_ed_only", "auroc_ee_only"):
        assert set(metrics[key]) == {"local", "global", "all"}
        assert all(0 <= value <= 1 for value in metrics[key].values())
    assert metrics["train_s"] > 0
    assert metrics["predict_img_per_s"] > 0
    found = metrics["decisions"]["textile"]
    assert (found["good"], found["defects"]) == (4, 8)
    assert set(metrics["defect_decisions"]["textile"]) == {"local", "global"}
    assert metrics["settings"]["train"]["steps"] == 2
    html = (out / "report.html").read_text(encoding="utf-8")
    assert len(html) < 5_000_000
    assert html.count("<img") >= 4
    assert "ROC: textile" in html
    assert (out / "demo.twin").is_file()
    said = capsys.readouterr().out
    assert "Image AUROC" in said
    assert "decisions at the thresholds in use" in said
    assert "report.html" in said


def test_split_keeps_training_and_test_apart_and_is_seeded() -> None:
    root = find_images()
    for size in (FULL, QUICK):
        training, test = split(root, size)
        assert not {s.image for s in training} & {s.image for s in test}
        assert all("nominal" in s.image.parts and s.label == 0 for s in training)
        counts = {kind: sum(s.image.parent.name == kind for s in test) for kind in ("nominal", "local", "global")}
        assert counts == dict.fromkeys(counts, size.test)
        assert split(root, size) == (training, test)


def test_missing_package_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'pip install "twinspect\[demo\]"'):
        find_images()


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few images"):
        split(tmp_path, QUICK)
