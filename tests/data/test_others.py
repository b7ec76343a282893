"""Folder settings of anomalib and manifests of Lookout for Vision: what they say, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from layouts import write
from tiny import picture, save

from twinspect.data import load
from twinspect.errors import DataError


def settings(path: Path, **values: object) -> Path:
    path.write_text(yaml.safe_dump({"data": {"init_args": values}}), encoding="utf-8")
    return path


def folder(root: Path, *names: str) -> Path:
    for name in names:
        save(root / name, picture())
    return root


def test_one_settings_file_is_a_data_set_wherever_its_images_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "images", "ok/1.png", "ok/deep/2.png", "odd/3.png")
    (tmp_path / "configs").mkdir()
    path = settings(tmp_path / "configs" / "a.yaml", name="cable", root="images", normal_dir="ok", abnormal_dir="odd")
    with pytest.raises(DataError, match="root 'images' is not beside this file nor in .*--images DIR"):
        load(path)
    monkeypatch.chdir(tmp_path)
    assert load(path).layout == "anomalib"
    (counts,) = load(path).counts.values()
    assert (counts.train, counts.test_defect) == (2, 1)
    assert {s.class_name for s in load(path, images=tmp_path / "images").samples} == {"cable"}
    assert [s.defect_type for s in load(path).samples if s.label] == ["odd"]


def test_masks_belong_to_images_of_their_names(tmp_path: Path) -> None:
    folder(tmp_path, "ok/1.png", "odd/3.png", "odd/4.png", "gt/3_mask.png", "gt/7.png")
    path = settings(tmp_path / "a.yaml", normal_dir="ok", abnormal_dir="odd", mask_dir="gt")
    found = load(path)
    assert [[mask.name for mask in s.masks] for s in found.samples if s.label] == [["3_mask.png"], []]
    assert found.skipped == ((tmp_path / "gt" / "7.png", "mask without image"),)


def test_masks_of_several_folders_belong_to_images_of_the_same_folder(tmp_path: Path) -> None:
    folder(tmp_path, "ok/1.png", *(f"{top}/{kind}/1.png" for top in ("test", "gt") for kind in ("cut", "dent")))
    path = settings(
        tmp_path / "a.yaml", normal_dir="ok", abnormal_dir=["test/cut", "test/dent"], mask_dir=["gt/cut", "gt/dent"]
    )
    defects = [s for s in load(path).samples if s.label]
    assert [(s.defect_type, [mask.parent.name for mask in s.masks]) for s in defects] == [
        ("cut", ["cut"]), ("dent", ["dent"]),
    ]  # fmt: skip


def test_the_settings_decide_whatever_the_folders_are_called(tmp_path: Path) -> None:
    folder(tmp_path, "bad_lot/1.png", "test_tube/2.png", "images/3.png", "images/deep/4.png")
    path = settings(
        tmp_path / "a.yaml", normal_dir="bad_lot", normal_test_dir="test_tube", abnormal_dir=["images"], name="x"
    )
    assert [(s.image.stem, s.split, s.label, s.defect_type) for s in load(path).samples] == [
        ("1", "train", 0, ""), ("2", "test", 0, ""), ("3", "test", 1, "images"), ("4", "test", 1, "deep"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [("normal_dir: [", "cannot be read as YAML"), ("normal_dir: gone", "normal_dir 'gone': no such folder")],
)
def test_settings_that_cannot_be_used_say_why(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        load(path)


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
