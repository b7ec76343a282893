"""An exported model is served as it is: no torch in the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from serving import Command, post
from tiny import picture, save

from twinspect import Detector


@pytest.mark.slow
def test_an_exported_model_is_served_without_torch(quick: Detector, tmp_path: Path) -> None:
    quick.save(tmp_path / "parts.twin")
    image = save(tmp_path / "a.png", picture(3)).read_bytes()
    export = [sys.executable, "-m", "twinspect", "export", "parts.twin", "--out", "parts.onnx"]
    subprocess.run(export, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    command = Command(tmp_path, "light=parts.onnx", "--log", "none")
    try:
        assert "serving light at" in command.first
        answer = post(command.url, image)
        loaded = Path(f"/proc/{command.process.pid}/maps").read_text()
    finally:
        code, errors = command.stop()
    assert (code, answer["bundle"]) == (0, "light")
    assert answer["results"][0]["score"] == pytest.approx(quick.predict(tmp_path / "a.png").score, rel=1e-3)
    assert "onnxruntime" in loaded
    assert "libtorch" not in loaded, errors
