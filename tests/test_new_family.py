"""A family of models is one file and one row: nothing else has to know it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import RANDOM_CNN, images_to_test
from typer.testing import CliRunner

from twinspect import config
from twinspect.cli import app
from twinspect.inference import load

sys.path.append(str(Path(__file__).parent / "server"))

TOY = Path(__file__).with_name("toy_family.py")


def ok(*words: object) -> str:
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == 0, found.output
    return found.stdout


@pytest.mark.slow
def test_fit_eval_predict_export_and_serve(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(TOY.read_text(encoding="utf-8").splitlines()) < 75
    monkeypatch.setitem(config.FAMILIES, "toy", config.Family("toy_family", "predicts maps from tokens"))
    bundle, exported, rows = tmp_path / "toy.twin", tmp_path / "toy.onnx", tmp_path / "rows.csv"
    small = ["--teacher", RANDOM_CNN, "--random-teacher", "--size", 64, "--steps", 4, "--batch", 4]
    said = ok("fit", parts, "--model", "toy", "--out", bundle, *small)
    assert "cosine" in said
    assert "local student" in said
    found = json.loads(ok("eval", bundle, parts, "--json", "-"))
    assert all(0.0 <= row["image_auroc"] <= 1.0 for row in found["classes"].values())
    images = images_to_test(parts, None)[:3]
    ok("predict", bundle, *images, "--out", rows, "--workers", 0)
    assert len(rows.read_text(encoding="utf-8").splitlines()) == 4
    ok("export", bundle, "--out", exported, "--images", parts / "ring" / "train")
    ours, theirs = ([r.score for r in load(path).predict(images)] for path in (bundle, exported))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)

    from serving import Running

    with Running({"toy": load(exported)}) as server:
        (one,) = server.post(images[0].read_bytes()).json["results"]
    assert math.isclose(one["score"], theirs[0], rel_tol=1e-4, abs_tol=1e-4)
