"""Manifests of Lookout for Vision: what they say, and what is refused; files of others beside images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from layouts import write
from tiny import picture, save

from twinspect.data import load
from twinspect.errors import DataError


def folder(root: Path, *names: str) -> Path:
    for name in names:
        save(root / name, picture())
    return root


def test_other_yaml_beside_images_changes_nothing(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path / "set")
    before = load(tmp_path / "set").samples
    (tmp_path / "set" / "notes.yaml").write_bytes(b"camera: \xff\xfe broken: [")
    assert load(tmp_path / "set").samples == before


def line(address: str, name: str, **more: object) -> str:
    about = {"class-name": name, "type": "groundtruth/image-classification", "confidence": 1}
    return json.dumps({"source-ref": address, "anomaly-label": 1, "anomaly-label-metadata": about, **more})


def test_lookout_finds_images_by_the_longest_end_of_their_address(tmp_path: Path) -> None:
    folder(tmp_path / "copy", "images/1.png", "1.png", "images/2.png")
    path = tmp_path / "output.manifest"
    path.write_text(
        "\n".join(line(f"s3://bucket/job/images/{n}.png", name) for n, name in ((1, "normal"), (2, "anomaly")))
    )
    found = load(path, images=tmp_path / "copy")
    assert found.layout == "lookout"
    assert [(s.image.parent.name, s.split, s.label) for s in found.samples] == [
        ("images", "train", 0), ("images", "test", 1),
    ]  # fmt: skip


def test_lookout_says_what_it_leaves_out(tmp_path: Path) -> None:
    folder(tmp_path, "1.png", "2.png")
    lines = [
        line("s3://b/1.png", "normal"),
        line("s3://b/2.png", "anomaly", **{"anomaly-mask-ref": "s3://b/m.png"}),
        line("s3://b/gone.png", "normal"),
    ]
    (tmp_path / "train.manifest").write_text("\n".join(lines))
    found = load(tmp_path)
    assert [s.label for s in found.samples] == [0, 1]
    assert [path.name for path, _ in found.skipped] == ["gone.png"]
    assert any("masks are not read" in note for note in found.notes)


def test_lookout_refuses_a_class_it_does_not_know_and_never_climbs(tmp_path: Path) -> None:
    folder(tmp_path, "secret.png", "set/1.png")
    path = tmp_path / "set" / "a.manifest"
    path.write_text(line("s3://b/1.png", "maybe"))
    with pytest.raises(DataError, match="line 1: class-name 'maybe'; accepted: normal, anomaly"):
        load(path)
    path.write_text("\n".join([line("s3://b/1.png", "normal"), line("s3://../../secret.png", "normal")]))
    assert [s.image.name for s in load(path).samples] == ["1.png"]
