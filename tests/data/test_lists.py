"""Manifests, meta.json and UniAD's lines: written and read back, wrong rows refused by number."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import WRITERS, Plan, write, write_meta_json
from trees import tree

from twinspect.data import load
from twinspect.data.images import read_rgb
from twinspect.data.manifest import write_manifest
from twinspect.data.samples import read_sample_rgb
from twinspect.errors import DataError

CASES = [(layout, shape) for layout, writer in WRITERS.items() for shape in writer.shapes]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_any_layout_survives_a_manifest(tmp_path: Path, layout: str, shape: str, ending: str) -> None:
    write(layout, tmp_path / "set", Plan(shape=shape))
    samples = load(tmp_path / "set").samples
    path = tmp_path / f"all.{ending}"
    assert write_manifest(samples, path, tmp_path) == len(samples)
    found = load(path)
    assert found.layout == "manifest"
    assert found.samples == samples
    assert not list(tmp_path.glob("_tmp-*"))


def test_manifest_elsewhere_needs_the_images_folder(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path / "set")
    samples = load(tmp_path / "set").samples
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "m.parquet"
    write_manifest(samples, path, tmp_path / "set")
    assert load(path, images=tmp_path / "set").samples == samples
    with pytest.raises(DataError, match=r"26 of 26 rows.*name their folder \(--images DIR\)") as caught:
        load(path)
    assert "row 1: no such file" in str(caught.value)
    assert "and 21 more" in str(caught.value)


def rows_to(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv_by_hand_with_the_least(tmp_path: Path) -> None:
    write("folder", tmp_path / "set", Plan(shape="good"))
    path = rows_to(tmp_path / "m.csv", {"image": "set\\good\\000.png"}, {"image": "set/good/001.png"})
    samples = load(path).samples
    assert [(s.split, s.label, s.class_name) for s in samples] == [("train", 0, tmp_path.name)] * 2


def test_csv_with_other_tools_names_and_unknown_labels(tmp_path: Path) -> None:
    write("folder", tmp_path / "set", Plan(shape="good"))
    base = {"split": "val", "label_index": "0.0", "mask_path": ""}
    path = rows_to(
        tmp_path / "m.csv",
        {"image_path": "set/good/000.png", **base},
        {"image_path": "set/good/001.png", **base, "split": "Test", "label_index": ""},
        {
            "image_path": "set/good/002.png",
            **base,
            "split": "test",
            "label_index": "1",
            "mask_path": "set/good/003.png",
        },
    )
    samples = load(path).samples
    assert [(s.split, s.label) for s in samples] == [("calibration", 0), ("test", None), ("test", 1)]
    assert [len(s.masks) for s in samples] == [0, 0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "../outside.png"}, r"row 2: '\.\./outside\.png' points outside"),
        ({"image": "/etc/passwd"}, "row 2: .* points outside"),
        ({"image": "..\\x.png"}, "row 2: .* points outside"),
        ({"image": "none.png"}, "row 2: no such file: none.png"),
        ({"image": ""}, "row 2: the path is ''"),
        ({"split": "exam"}, "row 2: split is 'exam'; accepted: train"),
        ({"label": "2"}, "row 2: label is '2'; accepted: 0"),
        ({"mask": "a.png;../b.png"}, "row 2: .*outside|row 2: no such file"),
        ({"record": "x"}, "row 2: record is 'x'; a whole number"),
    ],
)
def test_wrong_rows_refuse_the_manifest_by_number(tmp_path: Path, row: dict[str, str], message: str) -> None:
    write("folder", tmp_path / "set", Plan(shape="good"))
    good = {"image": "set/good/000.png", "split": "train", "label": "0", "mask": "", "record": ""}
    path = rows_to(tmp_path / "m.csv", good, good | row)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert "1 of 2 rows" in str(caught.value)
    assert "row 2" in str(caught.value)


def test_manifest_files_that_are_none(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.csv", "split\ntrain\n", "a column image .paths. is needed"),
        ("b.csv", "", "holds no row"),
        ("c.csv", 'image\n"x\n', "not valid CSV"),
        ("d.parquet", "junk", "not a Parquet file"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            load(tmp_path / name, "manifest")
    (tmp_path / "e.csv").write_bytes(b"image\n\xff\xfe\n")
    with pytest.raises(DataError, match="not UTF-8"):
        load(tmp_path / "e.csv")
    with pytest.raises(DataError, match=r"ends in \.parquet or \.csv"):
        write_manifest([], tmp_path / "x.json", tmp_path)


def test_what_a_manifest_cannot_hold(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path / "set")
    samples = load(tmp_path / "set").samples
    with pytest.raises(DataError, match="not below"):
        write_manifest(samples, tmp_path / "m.csv", tmp_path / "set" / "ring")
    mask = next(s for s in samples if s.masks).masks[0]
    mask.rename(mask.with_name(mask.name.replace("_mask", ";_mask")))
    image = next(s for s in samples if s.masks).image
    image.rename(image.with_name(image.name.replace(".png", ";.png")))
    with pytest.raises(DataError, match="write Parquet"):
        write_manifest(load(tmp_path / "set").samples, tmp_path / "m.csv", tmp_path)


@pytest.mark.parametrize("layout", ["mvtec-ad", "mvtec-loco", "visa", "mvtec-ad-2", "view"])
def test_meta_json_keeps_everything_but_groups(tmp_path: Path, layout: str) -> None:
    write(layout, tmp_path / "set")
    samples = load(tmp_path / "set").samples
    write_meta_json(samples, tmp_path / "meta.json", tmp_path)
    found = load(tmp_path / "meta.json")
    key = [(s.split, s.class_name, s.image, s.label, s.masks) for s in found.samples]
    assert sorted(key, key=str) == sorted(
        [(s.split, s.class_name, s.image, s.label, s.masks) for s in samples], key=str
    )


def test_meta_json_rows_that_lie(tmp_path: Path) -> None:
    write("meta-json", tmp_path)
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())
    meta["train"]["ring"][0]["img_path"] = "images/none.png"
    meta["extra"] = {}
    path.write_text(json.dumps(meta))
    skipped = [reason for _, reason in load(tmp_path).skipped]
    assert sorted(skipped) == [
        "listed, but there is no such file",
        "part 'extra' is neither train, calibration nor test",
    ]
    for key, value, message in (
        ("img_path", "../x.png", "train ring row 1: '../x.png' points outside"),
        ("img_path", None, "row 1: the path is ''; a path below"),
        ("anomaly", "odd", "label is 'odd'"),
    ):
        broken = json.loads(json.dumps(meta))
        broken["train"]["ring"][0][key] = value
        path.write_text(json.dumps(broken))
        with pytest.raises(DataError, match=message):
            load(tmp_path, "meta-json")


def test_all_rows_missing_says_where(tmp_path: Path) -> None:
    write("meta-json", tmp_path)
    (tmp_path / "images").rename(tmp_path / "pictures")
    with pytest.raises(DataError, match=r"no usable image(.|\n)*000\.png: listed, but there is no such file"):
        load(tmp_path, "meta-json")


def test_uniad_single_file_and_bad_lines(tmp_path: Path) -> None:
    write("uniad-json", tmp_path)
    found = load(tmp_path / "test.json")
    assert {s.split for s in found.samples} == {"test"}
    moved = load(tmp_path / "test.json", images=tmp_path / "mvtec_anomaly_detection")
    assert moved.samples == found.samples
    with (tmp_path / "test.json").open("a") as stream:
        stream.write("{broken\n")
    with pytest.raises(DataError, match="test.json line 15: not valid JSON"):
        load(tmp_path, "uniad-json")


# ------------------------------------------------------------------------- tables as other tools write them


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four pictures, ``img/000.png`` to ``img/003.png``."""
    return tree(tmp_path, img=4)


IMAGES = [f"img/{number:03d}.png" for number in range(4)]


@pytest.mark.parametrize(
    "text",
    [
        "Image,Label\n{}",
        "\ufeffimage;label\r\n{}",
        "sep=;\nimage;label\n{}",
        "FilePath\tlabel\n{}",
        " image , label \n{}",
        "image|label\n{}",
    ],
)
def test_separators_headers_and_marks(pictures: Path, text: str) -> None:
    separator = next(c for c in "\t|;," if c in text.replace("sep=;", ""))
    rows = "\n".join(
        f"{image}{separator}{label}" for image, label in zip(IMAGES, ("OK", "NG", "0", "1"), strict=True)
    )
    (pictures / "m.csv").write_text(text.format(rows), encoding="utf-8")
    assert [(s.split, s.label) for s in load(pictures / "m.csv").samples] == [("train", 0), ("test", 1)] * 2


def test_utf16_as_spreadsheets_write_it(pictures: Path) -> None:
    (pictures / "m.txt").write_text("Image\tlabel\n" + "\n".join(f"{i}\tOK" for i in IMAGES), encoding="utf-16")
    assert len(load(pictures / "m.txt").samples) == 4


def test_cells_of_data_frames(pictures: Path) -> None:
    nothing = pa.array([float("nan")] * 4)
    columns = {"image": IMAGES, "class_name": [0, 1, 0, 2], "group": [0.0, 0.0, 1.0, float("nan")], "mask": nothing}
    pq.write_table(
        pa.table({**columns, "record": nothing, "label": [0.0, float("nan"), 1.0, 0.0]}), pictures / "M.PARQUET"
    )
    samples = load(pictures / "M.PARQUET").samples
    assert [(s.class_name, s.group, s.label, s.split) for s in samples] == [
        ("0", "0", 0, "train"), ("1", "0", None, "test"), ("0", "1", 1, "test"), ("2", "", 0, "train"),
    ]  # fmt: skip
    assert all(s.masks == () and s.record is None for s in samples)
    assert load(tree(pictures / "set", **{"a/train/good": 1, "a/test/bad": 1})).counts["a"].train == 1


def test_text_that_parquet_calls_bytes(pictures: Path) -> None:
    columns = {
        "class_name": [b"a", b"a", b"b", b"b"],
        "label": [b"good", b"good", b"bad", None],
        "group": ["nan"] * 4,
    }
    columns |= {"thumbnail": [b"\x89PNG"] * 4, "image": IMAGES}
    pq.write_table(pa.table(columns), pictures / "m.parquet")
    samples = load(pictures / "m.parquet").samples
    assert [(s.class_name, s.label, s.group) for s in samples] == [
        ("a", 0, ""), ("a", 0, ""), ("b", 1, ""), ("b", None, ""),
    ]  # fmt: skip


def test_images_inside_a_table_are_records(pictures: Path) -> None:
    body = [{"bytes": (pictures / image).read_bytes(), "path": image} for image in IMAGES]
    pq.write_table(pa.table({"image": body, "label": ["OK", "OK", "NG", "OK"]}), pictures / "t.parquet")
    samples = load(pictures / "t.parquet").samples
    assert [(s.record, s.label, s.split) for s in samples] == [
        (0, 0, "train"), (1, 0, "train"), (2, 1, "test"), (3, 0, "train"),
    ]  # fmt: skip
    assert np.array_equal(read_sample_rgb(samples[2]), read_rgb(pictures / IMAGES[2]))


def test_a_list_without_labels_goes_by_its_paths(tmp_path: Path) -> None:
    tree(tmp_path, good=2, **{"other/NG": 1, "*masks/{:03d}.png": 1})
    paths = ["good/000.png", "good/001.png", "other/NG/000.png"]
    samples = load(rows_to(tmp_path / "m.csv", *({"image": path} for path in paths))).samples
    assert [(s.split, s.label) for s in samples] == [("train", 0), ("train", 0), ("test", 1)]
    with pytest.raises(DataError, match=r"row 2: .*000\.png is a mask by its name"):
        load(rows_to(tmp_path / "m.csv", {"image": "good/000.png"}, {"image": "masks/000.png"}))
    marked = rows_to(tmp_path / "m.csv", {"image": "good/000.png", "mask": "masks/000.png"})
    assert [s.label for s in load(marked).samples] == [1]


def test_training_rows_without_a_label_are_not_good(pictures: Path) -> None:
    cells = zip(IMAGES, ("0", "", "1", "0"), ("train", "train", "test", "train"), strict=True)
    path = rows_to(pictures / "m.csv", *({"image": i, "label": label, "split": s} for i, label, s in cells))
    found = load(path)
    assert [s.image.name for s in found.samples] == ["000.png", "002.png", "003.png"]
    assert found.skipped == (
        (pictures / IMAGES[1], "no label, while other images have one; write 0 for good images"),
    )


def test_a_table_of_predictions_holds_no_labels(pictures: Path) -> None:
    row = {"score": "1.0", "model_id": "x", "answer": "good", "is_anomaly": "False", "mask_path": "img/000.png"}
    path = rows_to(pictures / "p.csv", *({"path": str(pictures / image), **row} for image in IMAGES))
    found = load(path)
    assert {(s.split, s.label, s.masks) for s in found.samples} == {("test", None, ())}
    assert found.notes == ("p.csv: a table of predictions; what a model has answered is no label",)
    judged = rows_to(pictures / "p.csv", {"path": str(pictures / IMAGES[0]), **row, "label": "1"})
    assert [s.label for s in load(judged).samples] == [1]


def test_columns_that_are_not_used_are_named(pictures: Path) -> None:
    path = rows_to(pictures / "m.csv", {"image": IMAGES[0], "label": "OK", "exposure": "3"})
    assert load(path).notes == ("m.csv: columns not used: exposure",)


def test_json_lines_with_commas_and_as_one_list(tmp_path: Path) -> None:
    write("uniad-json", tmp_path)
    expected = load(tmp_path).samples
    path = tmp_path / "train.json"
    lines = path.read_text().splitlines()
    path.write_text(",\n".join(lines) + ",\n")
    assert load(tmp_path).samples == expected
    path.write_text("[" + ",\n".join(lines) + "]")
    assert load(tmp_path).samples == expected
    path.rename(tmp_path / "TRAIN.JSON")
    assert load(tmp_path).samples == expected


def test_names_that_are_no_unicode_are_named(tmp_path: Path) -> None:
    tree(tmp_path, good=2)
    try:
        os.rename(os.fsencode(tmp_path / "good" / "000.png"), os.fsencode(tmp_path / "good") + b"/sch\xe4den.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    samples = load(tmp_path).samples
    assert len(samples) == 2
    for ending in ("csv", "parquet"):
        with pytest.raises(DataError, match=r"sch\\udce4den\.png: not UTF-8, .* convmv"):
            write_manifest(samples, tmp_path / f"m.{ending}", tmp_path)
        assert not list(tmp_path.glob("m.*"))
    os.rename(tmp_path / "good", os.fsencode(tmp_path) + b"/b\xfchler")
    found = load(os.fsdecode(os.fsencode(tmp_path) + b"/b\xfchler"))
    assert found.classes == [r"b\udcfchler"]  # as reports, tables and answers of the server can hold it
    assert os.path.isfile(found.samples[0].image)
