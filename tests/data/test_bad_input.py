"""Stray files, odd names, links and lists that lie: reported or refused, never a crash."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from layouts import Plan, write
from PIL import Image

from twinspect.data import load
from twinspect.data.samples import read_sample_mask, read_sample_rgb
from twinspect.data.scan import inside
from twinspect.errors import DataError, ImageError


def reasons(root: Path) -> dict[str, str]:
    return {path.name: reason for path, reason in load(root).skipped}


def test_stray_files_are_named(tmp_path: Path) -> None:
    expected = write("mvtec-ad", tmp_path)
    good = tmp_path / "ring" / "train" / "good"
    (good / "Thumbs.db").write_bytes(b"x")
    (good / "._000.png").write_bytes(b"x")
    (tmp_path / "license.txt").write_text("x")
    (tmp_path / "other").mkdir()
    for place in ("train/bad", "ground_truth/good", "ground_truth/dent"):
        (tmp_path / "ring" / place).mkdir()
        shutil.copy(good / "000.png", tmp_path / "ring" / place / f"{place.replace('/', '_')}.png")
    assert load(tmp_path).counts == expected
    found = reasons(tmp_path)
    assert found["Thumbs.db"] == "not an image file"
    assert found["._000.png"] == "hidden file"
    assert found["other"] == "folder without images"
    assert found["train_bad.png"] == "only good images are used for train"
    assert found["ground_truth_good.png"] == "masks of good images are not needed"
    assert found["ground_truth_dent.png"] == "mask without image"


def test_masks_without_image_and_defect_folders_without_images(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path)
    truth = tmp_path / "ring" / "ground_truth" / "scratch"
    shutil.copy(next(truth.iterdir()), truth / "999_mask.png")
    assert reasons(tmp_path)["999_mask.png"] == "mask without image"


def test_missing_masks_are_said_once(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path, Plan(defect=9))
    shutil.rmtree(tmp_path / "ring" / "ground_truth")
    found = load(tmp_path)
    notes = [note for note in found.notes if "have no mask" in note]
    assert notes == ["9 of 18 defects have no mask (ring): metrics of pixels leave them out"]
    sample = next(s for s in found.samples if s.label == 1 and not s.masks)
    with pytest.raises(DataError, match="no mask"):
        read_sample_mask(sample, (64, 64))


def test_mask_of_another_size_names_both_files(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path)
    sample = next(s for s in load(tmp_path).samples if s.masks)
    Image.new("L", (10, 20), 255).save(sample.masks[0])
    with pytest.raises(DataError, match=r"_mask\.png: mask of 10 x 20 pixels, expected 64 x 64"):
        read_sample_mask(sample, (64, 64))


def test_damaged_image_is_an_image_error(tmp_path: Path) -> None:
    write("folder", tmp_path, Plan(shape="good"))
    sample = load(tmp_path).samples[0]
    sample.image.write_bytes(b"")
    with pytest.raises(ImageError, match="000.png"):
        read_sample_rgb(sample)


def test_link_loops_end(tmp_path: Path) -> None:
    root = tmp_path / "parts"
    expected = write("folder", root, Plan(shape="flat"))
    (root / "again").symlink_to(root, target_is_directory=True)
    (root / "self.png").symlink_to(root / "self.png")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    found = load(root)
    assert found.counts == expected
    assert {path.name for path, _ in found.skipped} == {"again", "self.png", "gone.png"}


def test_link_loops_above_classes(tmp_path: Path) -> None:
    expected = write("mvtec-ad", tmp_path)
    (tmp_path / "ring" / "train" / "good" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert load(tmp_path).counts == expected


def test_linked_class_folder_is_read(tmp_path: Path) -> None:
    expected = write("mvtec-ad", tmp_path / "disk")
    (tmp_path / "here").mkdir()
    for name in expected:
        (tmp_path / "here" / name).symlink_to(tmp_path / "disk" / name, target_is_directory=True)
    assert load(tmp_path / "here").counts == expected


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("folder", tmp_path, Plan(shape="classes"))
    listed = os.scandir

    def refuse(path: Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "ring":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = load(tmp_path, "folder")
    assert set(found.counts) == {"weave"}
    assert dict(found.skipped)[tmp_path / "ring"] == "cannot be listed (Permission denied)"


def test_nothing_there_and_nothing_in_it(tmp_path: Path) -> None:
    (tmp_path / "casting").mkdir()
    with pytest.raises(DataError, match="Did you mean .*casting"):
        load(tmp_path / "castings")
    with pytest.raises(DataError, match="no images that can be read; found: nothing"):
        load(tmp_path / "casting")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match="found: a file"):
        load(tmp_path / "x.txt")
    for layout in (
        "mvtec-ad",
        "visa",
        "real-iad",
        "cifar10",
        "fashion-mnist",
        "view",
        "folder",
        "manifest",
        "meta-json",
    ):
        with pytest.raises(DataError, match="found: nothing"):
            load(tmp_path / "casting", layout)


@pytest.mark.parametrize(
    "text",
    [
        "../x.png",
        "a/../../x.png",
        "..\\x.png",
        "/etc/x.png",
        "C:\\x.png",
        "c:/x.png",
        "\\\\host\\x.png",
        "",
        "a\0b",
    ],
)
def test_paths_that_leave_the_root_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="row 4"):
        inside(tmp_path, text, "row 4")


def test_paths_inside_are_found_in_any_spelling(tmp_path: Path) -> None:
    (tmp_path / "café").mkdir()
    (tmp_path / "café" / "a b.png").write_bytes(b"x")
    target = tmp_path / "café" / "a b.png"
    for text in ("café\\a b.png", "cafe\u0301/a b.png", "x/../café/a b.png", str(target)):
        assert inside(tmp_path, text, "row 1").read_bytes() == b"x"


def test_visa_with_windows_separators(tmp_path: Path) -> None:
    expected = write("visa", tmp_path)
    table = tmp_path / "split_csv" / "1cls.csv"
    table.write_text(table.read_text().replace("/", "\\"))
    assert load(tmp_path).counts == expected


def test_visa_rows_nowhere_and_outside(tmp_path: Path) -> None:
    write("visa", tmp_path)
    table = tmp_path / "split_csv" / "1cls.csv"
    text = table.read_text()
    table.write_text(text + "candle,train,normal,candle/Data/Images/Normal/none.JPG,\n")
    assert reasons(tmp_path)["none.JPG"] == "listed, but there is no such file"
    table.write_text(text + "candle,train,normal,../../none.JPG,\n")
    with pytest.raises(DataError, match=r"1cls.csv: 1 of 27 rows.*\n  row 27: '../../none.JPG' points outside"):
        load(tmp_path)
    table.write_text("object,split\ncandle,train\n")
    with pytest.raises(DataError, match="columns object, split; a column image .paths. is needed"):
        load(tmp_path)
    table.write_text(text.replace(",anomaly,", ",odd,"))
    with pytest.raises(DataError, match="label is 'odd'; accepted: 0 or OK"):
        load(tmp_path)


def test_real_iad_lists_that_lie(tmp_path: Path) -> None:
    write("real-iad", tmp_path, Plan(shape="beside"))
    path = tmp_path / "realiad_jsons" / "ring.json"
    lists = json.loads(path.read_text())
    lists["train"][0]["image_path"] = "OK\\S0001\\none.jpg"
    path.write_text(json.dumps(lists))
    assert reasons(tmp_path)["none.jpg"] == "listed, but there is no such file"
    lists["train"][0]["image_path"] = "../weave/OK/S0001/x.jpg"
    path.write_text(json.dumps(lists))
    with pytest.raises(DataError, match="train row 1: .* points outside"):
        load(tmp_path)
    for bad, message in (("{", "not valid JSON"), ("[]", "not an object"), ('{"train": 3}', "is not a list")):
        path.write_text(bad)
        with pytest.raises(DataError, match=message):
            load(tmp_path)
    lists["train"][0] = {"image_path": "OK/S0001/none.jpg"}
    path.write_text(json.dumps(lists))
    with pytest.raises(DataError, match="train row 1: anomaly_class is None; OK or a kind"):
        load(tmp_path)
    shutil.rmtree(tmp_path / "ring")
    assert "class without image folder" in reasons(tmp_path)["ring.json"]


def test_folder_kinds_without_images_and_ambiguous_masks(tmp_path: Path) -> None:
    write("folder", tmp_path, Plan(shape="defects", defect=2))
    (tmp_path / "empty").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "good_test").mkdir()
    mask = np.full((64, 64), 255, np.uint8)
    shutil.copy(tmp_path / "scratch" / "000.png", tmp_path / "spot" / "000.png")
    for name in ("000.png", "001_mask.png", "777.png"):
        Image.fromarray(mask).save(tmp_path / "masks" / name)
    shutil.copy(tmp_path / "good" / "000.png", tmp_path / "good_test" / "g.png")
    found = load(tmp_path)
    assert sum(len(s.masks) for s in found.samples) == 1
    assert sum(s.split == "test" and s.label == 0 for s in found.samples) == 1
    skipped = {path.name: reason for path, reason in found.skipped}
    assert skipped["empty"] == "folder without images"
    assert skipped["777.png"] == "mask without image"
    assert skipped["000.png"] == "mask that fits images of several folders"
