"""The scripts and the notebook of examples/ run as a reader would run them, on small data and with a tiny teacher."""

from __future__ import annotations

import ast
import json
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from documents import ROOT, serving, small

pytestmark = pytest.mark.slow
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _here(documents_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import twinspect.training.fit as room

    shutil.copytree(documents_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TWINSPECT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(room, "fit", small(room.fit))


def run(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few images, of which a reader shall be warned
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_own_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_folder.py", ["data", "new", "--good", "good", "--max-fpr", "0.01"], monkeypatch)
    said = capsys.readouterr().out
    assert "model: results/model.twin" in said
    assert "stay as they are" not in said  # 100 images are enough for 1 %
    assert len(Path("results/table.csv").read_text().splitlines()) == 1 + len(list(Path("new").iterdir()))
    run("own_folder.py", ["data", "new", "--good", "new", "--max-fpr", "0.001"], monkeypatch)
    assert "the thresholds stay as they are" in capsys.readouterr().out


def test_camera_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("camera_loop.py", ["model.twin", "new"], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("  anomaly: ")]
    answers = [line for line in lines if ", severity " in line]
    assert len(answers) == 8
    assert len(found) == sum(": anomaly," in line for line in answers)


def test_server_client(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from twinspect.inference import load
    from twinspect.server.app import build_app
    from twinspect.server.log import InspectionLog
    from twinspect.server.settings import Settings

    log = InspectionLog("inspections.db")
    app = build_app(Settings(), {"model": load("model.twin")}, log)
    with serving(app, Settings()) as address:
        run("server_client.py", ["new.png", "good/000.png", "--server", address], monkeypatch)
        rows = [line.rpartition("row ")[2] for line in capsys.readouterr().out.splitlines()]
        assert rows == ["1", "2"]
        with pytest.raises(SystemExit, match="404: "):
            run("server_client.py", ["new.png", "--server", address, "--false-alarm", "99"], monkeypatch)
    log.close()
    with pytest.raises(SystemExit, match="start one: twinspect serve model.twin"):
        run("server_client.py", ["new.png", "--server", address], monkeypatch)


def test_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("benchmark.py", ["data", "--effort", "fast"], monkeypatch)
    first, mean, own = capsys.readouterr().out.splitlines()[-3:]
    assert first == "40 good images to learn, 24 to test"
    assert mean.startswith("distance from the mean: image AUROC ")
    assert own.startswith("fast: image AUROC ")


@pytest.mark.filterwarnings("ignore::UserWarning")  # other images take the place of those that made the threshold
def test_notebook() -> None:
    """Its cells in order, each last expression evaluated, as a notebook does."""
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], {c["cell_type"] for c in notebook["cells"]}) == (4, {"code", "markdown"})
    names: dict[str, object] = {}
    shown = []
    for number, cell in enumerate(c for c in notebook["cells"] if c["cell_type"] == "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None), "clear the outputs before you commit"
        body = ast.parse("".join(cell["source"]))
        last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names))
    assert shown[0][0] > 200
    assert shown[1]["train"] + shown[1]["calibration"] == 60
    assert shown[-1] is True
