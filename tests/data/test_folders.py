"""Plain folders and mixed roots: each class by what its names say, no defect or mask learnt, nothing lost unsaid."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save
from trees import MARKED, learnt, seen, tree

from twinspect.data import load
from twinspect.data.folders import good_files
from twinspect.errors import DataError

PART = {"train/good": 3, "test/good": 1, "test/bad": 2, "*ground_truth/bad/{:03d}_mask.png": 2}


def part(name: str, **content: int) -> dict[str, int]:
    """One class of a root."""
    return {("*" if key[:1] == "*" else "") + f"{name}/" + key.lstrip("*"): count for key, count in content.items()}


SIX = {key: count for name in "abcdef" for key, count in part(name, **PART).items()}
OTHERS = {
    "LOCO": {"train/good": 3, "test/good": 1, "test/logical_anomalies": 2},
    "only structural": {"train/good": 3, "test/structural_anomalies": 2},
    "AD 2": {"train/good": 3, "validation/good": 1, "test_public/good": 1, "test_public/bad": 2, "test_private": 1},
    "no folder good": {"train": 3, "test/good": 1, "test/bad": 2},
    "good and bad": {"good": 3, "NG": 2},
    "other language": {"gut": 3, "schlecht": 2},
    "good only": {"train/good": 3},
    "nested lots": {"train/good/lot1": 3, "test/bad/lot1": 2},
    "pictures alone": {"": 3},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_mixed_roots_are_read_whole(tmp_path: Path, other: dict[str, int]) -> None:
    found = load(tree(tmp_path, **SIX, **part("other", **other)))
    assert found.classes == [*"abcdef", "other"]
    assert {name: row.train for name, row in found.counts.items()} == dict.fromkeys([*"abcdef", "other"], 3)
    assert found.counts["a"].masks == 2
    assert all("NG" not in s.image.parts and "schlecht" not in s.image.parts for s in found.samples if s.label == 0)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (
            {"g/train/red": 3, "g/train/blue": 3},
            "g: its training part holds blue/, red/, and none of them is called good",
        ),
        ({"more/h/train/good": 3}, "more: holds classes itself"),
        ({"NG": 2}, "NG: its name says defects, and not of which class"),
        ({"cracked_pcb": 2}, "cracked_pcb: its name says defects"),
    ],
)
def test_what_cannot_be_read_stops_and_says_what_to_type(tmp_path: Path, extra: dict[str, int], reason: str) -> None:
    root = tree(tmp_path, **SIX, **extra)
    with pytest.raises(DataError, match=reason) as stopped:
        load(root)
    assert "classes that can be read: 6; these" in str(stopped.value)
    assert "--layout mvtec-ad to leave them out" in str(stopped.value)
    found = load(root, "mvtec-ad")
    assert found.classes == [*"abcdef"]
    assert found.skipped


@pytest.mark.parametrize("name", ["manifest.csv", "split_csv/1cls.csv", "realiad_jsons/a.json"])
def test_a_list_of_one_class_does_not_drop_the_others(tmp_path: Path, name: str) -> None:
    rows = {"manifest.csv": "image\na/train/good/000.png\n", "realiad_jsons/a.json": '{"train": [], "test": []}'}
    visa = "object,split,label,image,mask\na,train,normal,a/train/good/000.png,\n"
    with pytest.raises(DataError, match="no list names an image in it"):
        load(tree(tmp_path, **SIX, **{name: rows.get(name, visa)}))


@pytest.mark.parametrize(
    "name",
    "bad NG defect fail failed rejected defective def_front bottle_bad schlecht anomaly Not_OK abnormal_dir "
    "Ausschuss 缺陷 mask masks bottle_label x_GT ground_truth mask_dir overlays".split(),
)
@pytest.mark.parametrize("shape", ["{name}", "train/{name}", "{name}/train", "good/{name}", "images/{name}"])
def test_no_defect_and_no_mask_is_learnt(tmp_path: Path, name: str, shape: str) -> None:
    tree(tmp_path, **{"9{:02d}.png": 3, shape.format(name=name): 2})
    try:
        found = load(tmp_path)
    except DataError:
        return
    assert not [s for s in found.samples if s.split != "test" and s.label != 1 and name in s.image.parts]


@pytest.mark.parametrize("name", ["NG", "masks", "defects", "anomalies"])
def test_a_folder_called_bad_is_learnt_only_if_asked(tmp_path: Path, name: str) -> None:
    root = tree(tmp_path / name, **{"{:03d}.png": 3})
    with pytest.raises(DataError, match="by its name this is a folder of .* type --layout folder"):
        load(root)
    assert len(load(root, "folder").samples) == 3
    assert len(load(tree(tmp_path / "anomaly_detection", **{"{:03d}.png": 3})).samples) == 3


def test_training_without_a_folder_good(tmp_path: Path) -> None:
    found = load(tree(tmp_path, **part("bottle", train=3, **{"test/good": 2, "test/bad": 1}), **part("cap", train=4)))
    assert learnt(found) == {"bottle/train", "cap/train"}
    assert seen(found)["bottle/test/bad", "test", 1] == 1
    assert any(
        "nothing says which images of bottle, cap are good: all 7 are taken as good" in note for note in found.notes
    )


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_validation_folders_calibrate(tmp_path: Path, name: str) -> None:
    found = load(tree(tmp_path, **{"train/good": 3, f"{name}/good": 2, f"{name}/bad": 1, "test/good": 1}))
    assert seen(found)[f"{name}/good", "calibration", 0] == 2
    assert ("only good images are used for calibration") in [reason for _, reason in found.skipped]
    loose = load(tree(tmp_path / "loose", **{"good": 3, name: 2}))
    assert seen(loose)[name, "test", None] == 2
    assert any("2 images of loose are neither learnt nor tested" in note for note in loose.notes)


def test_beside_good_plain_words_are_no_kinds_of_defects(tmp_path: Path) -> None:
    beside = {"test": 1, "images": 1, "unsorted": 1, "new": 1, "backup": 1, "golden": 1, "poke": 2, "scratch": 2}
    found = seen(tree(tmp_path, good=3, **beside))
    assert {name: next(label for folder, _, label in found if folder == name) for name in beside} == {
        "test": None, "images": None, "unsorted": None, "new": None, "backup": None, "golden": None,
        "poke": 1, "scratch": 1,
    }  # fmt: skip


def test_good_images_beside_the_training_part_are_learnt(tmp_path: Path) -> None:
    found = load(tree(tmp_path, **{"train/good": 3, "test/good": 1, "evening/good": 2}))
    assert learnt(found) == {"train/good", "evening/good"}


@pytest.mark.parametrize("name", ["neg", "false", "Positives"])
def test_a_folder_that_may_be_good_or_not_beside_images(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"images beside the folder {name}, which may be good ones or not"):
        load(tree(tmp_path, **{"9{:02d}.png": 3, name: 2}))


def test_any_order_of_part_and_kind(tmp_path: Path) -> None:
    split_first = tree(tmp_path / "a", **{"train/good": 3, "test/good": 1, "test/bad": 2})
    kind_first = tree(tmp_path / "b", **{"good/train": 3, "good/test": 1, "bad/test": 2})
    in_one_name = tree(tmp_path / "c", train_good=3, test_good=1, test_bad=2)
    images = tree(tmp_path / "d", **{"images/train/good": 3, "images/test/good": 1, "images/test/bad": 2})
    counts = [load(root).counts.popitem()[1] for root in (split_first, kind_first, in_one_name, images)]
    assert counts == [counts[0]] * 4
    assert (counts[0].train, counts[0].test_good, counts[0].test_defect) == (3, 1, 2)


def test_products_in_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="bottle_good, cap_good are good images of several products; give each"):
        load(tree(tmp_path / "a", bottle_good=3, bottle_bad=1, cap_good=4, cap_bad=2))
    with pytest.raises(DataError, match=r"train_cap are good images of several products"):
        load(tree(tmp_path / "f", train_bottle=3, test_bottle=1, train_cap=4, test_cap=2))
    for name, beside in (("b", {"bottle_bad": 1}), ("c", {"NG/bottle": 1, "NG/cap": 2})):
        with pytest.raises(DataError, match="its name says defects, and not of which class; move it into"):
            load(tree(tmp_path / name, bottle=3, cap=4, **beside))
    one = load(tree(tmp_path / "casting", ok_front=3, def_front=2))
    assert [(name, row.train, row.test_defect) for name, row in one.counts.items()] == [("casting", 3, 2)]
    label = load(tree(tmp_path / "d", **{"label/train/good": 3, "label/test/bad": 1, "cap/train/good": 3}))
    assert learnt(label) == {"label/train/good", "cap/train/good"}
    assert learnt(tree(tmp_path / "e", test_tube=3, bottle=3)) == {"test_tube", "bottle"}


@pytest.mark.parametrize("names", [("0", "1"), ("yes", "no"), ("Positive", "Negative")])
@pytest.mark.parametrize("above", ["", "test/"])
def test_names_of_which_nobody_knows_which_is_good(tmp_path: Path, names: tuple[str, str], above: str) -> None:
    tree(tmp_path, **{above + name: 2 for name in names}, **({"train": 3} if above else {}))
    with pytest.raises(DataError, match="nobody can tell which of .* is good; rename the folder of good images"):
        load(tmp_path)


def test_a_good_product_or_good_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="good_year_tire: is it the name of a product, or are its images good"):
        load(tree(tmp_path, good_year_tire=3, snow_tire=3))


def test_paths_that_are_given_as_good() -> None:
    fine = ["a/good/1.png", "defects/2024/good/1.png", "new/1.png", "1.png", "anomaly/day/1/x.png"]
    assert [s.split for s in good_files(map(Path, fine))] == ["train"] * 5
    for path in ("a/NG/1.png", "a/bad/lot1/1.png", "gt/1.png", "x/NG_1.png", "x/1_mask.png"):
        with pytest.raises(DataError, match="by its name this is a (defect|mask), and only good images are taken"):
            good_files([Path("good/1.png"), Path(path)])


def test_names_of_files(tmp_path: Path) -> None:
    found = load(tree(tmp_path / "a", **{"OK_{:02d}.png": 3, "NG_{:02d}.png": 2}))
    assert seen(found) == {(".", "train", 0): 3, (".", "test", 1): 2}
    assert any("by a word in their own names" in note for note in found.notes)
    inside = load(tree(tmp_path / "b", **{"good": 3, "good/bad_{:02d}.png": 1}))
    assert [(path.name, reason) for path, reason in inside.skipped] == [
        ("bad_00.png", "its name says defect, and its folder good")
    ]


# ---------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    "name",
    [
        "ground_truth/bad/{:03d}_mask.png", "ground_truth/bad/{:03d}.png", "gt/bad/{:03d}_gt.png",
        "masks/{:03d}-mask.png", "masks/{:03d}_GT.png", "mask/{:03d}_label.png", "masks/mask_{:03d}.png",
        "masks/{:03d}.png.png", "masks/{:03d}_mask_0.png", "bad_mask/{:03d}.png", "bad/{:03d}_mask.png",
        "masks/bad/{:03d}/0.png", "masks/test/bad/{:03d}.png", "test/ground_truth/bad/{:03d}_mask.png",
    ],
)  # fmt: skip
def test_masks_by_any_name(tmp_path: Path, name: str) -> None:
    place = "test/bad" if name.startswith(("test", "masks/test")) else "bad"
    good = "test/good" if place == "test/bad" else "good"
    tree(tmp_path, **{good: 3, place: 2})
    for number in range(2):
        save(tmp_path / name.format(number), MARKED)
    found = load(tmp_path)
    assert [len(s.masks) for s in found.samples if s.label == 1] == [1, 1]
    assert all(not s.masks for s in found.samples if s.label == 0)
    assert found.skipped == ()


def test_numbered_masks_of_one_image_all_count(tmp_path: Path) -> None:
    tree(tmp_path, good=2, bad=1, **{"*masks/000_mask_{}.png": 3})
    (defect,) = [s for s in load(tmp_path).samples if s.label == 1]
    assert [mask.name for mask in defect.masks] == ["000_mask_0.png", "000_mask_1.png", "000_mask_2.png"]


def test_masks_beside_images_say_which_are_defects(tmp_path: Path) -> None:
    tree(tmp_path / "flat", **{"{:03d}.png": 4, ".{:03d}_label.png": 3, "*003_label.png": 1})
    found = load(tmp_path / "flat")
    assert seen(found) == {(".", "train", 0): 3, (".", "test", 1): 1}
    tree(tmp_path / "parts", **{"train/1{:02d}.png": 4, ".train/1{:02d}_GT.png": 3, "*train/103_GT.png": 1})
    tree(tmp_path / "parts", **{"test/2{:02d}.png": 2, ".test/2{:02d}_GT.png": 2})
    split = load(tmp_path / "parts")
    assert seen(split) == {("train", "train", 0): 3, ("test", "test", 0): 2}
    assert "its mask marks a defect" in split.skipped[0][1]
    apart = load(tree(tmp_path / "apart", **{"images": 4, "*masks/{:03d}.png": 2}))
    assert seen(apart) == {("images", "train", 0): 2, ("images", "test", 1): 2}


def test_masks_that_belong_to_nothing_are_named(tmp_path: Path) -> None:
    tree(
        tmp_path, **{"good": 2, "bad": 1, "*good/{:03d}_mask.png": 1, "*ground_truth/dent": 1, "*good/9{}_gt.png": 1}
    )
    found = {path.relative_to(tmp_path).as_posix(): reason for path, reason in load(tmp_path).skipped}
    assert found == {
        "good/000_mask.png": "masks of good images are not needed",
        "ground_truth/dent/000.png": "mask without image",
        "good/90_gt.png": "a mask by its name, of an image that is not there",
    }


# ------------------------------------------------------------------------------------ tables and other files


@pytest.mark.parametrize(
    ("name", "head", "good", "bad"),
    [
        ("labels.csv", "Image,label", "OK", "NG"),
        ("labels.csv", "filename;class", "good", "scratch"),
        ("list.tsv", "path\tis_good", "1", "0"),
        ("Labels.CSV", "Datei;Ergebnis", "Gut", "Schlecht"),
        ("a.csv", "file_name,defect_type", "", "poke"),
        ("a.csv", "img_path,anomaly", "False", "True"),
    ],
)
def test_labels_beside_images(tmp_path: Path, name: str, head: str, good: str, bad: str) -> None:
    tree(tmp_path, **{"{:03d}.png": 5})
    separator = next(c for c in ",;\t" if c in head)
    rows = [f"{number:03d}.png{separator}{bad if number == 3 else good}" for number in range(4)]
    (tmp_path / name).write_text("\n".join([head, *rows]))
    with pytest.raises(DataError, match=rf"{name}: it seems to list images; a table .* in place of the folder"):
        load(tmp_path)
    assert Counter((s.split, s.label) for s in load(tmp_path / name).samples) == {("train", 0): 3, ("test", 1): 1}


def test_tables_and_folders(tmp_path: Path) -> None:
    rows = "image,label\nimages/000.png,0\nimages/001.png,1\n"
    for name, text in (("a", rows), ("b", rows.replace("images/", ""))):
        table = tree(tmp_path / name, **{"images": 2, "labels.csv": rows}) / "labels.csv"
        table.write_text(text)
        assert [(s.split, s.label) for s in load(table).samples] == [("train", 0), ("test", 1)]
    stated = load(tree(tmp_path / "d", **PART, **{"labels.csv": "image,label\ntest/bad/000.png,0\n"}))
    assert seen(stated)["test/bad", "test", 1] == 2
    assert dict(stated.skipped)[stated.root / "labels.csv"].startswith("not used: the names of folders say")
    per_class = tree(tmp_path / "e", **part("x", **PART), y=2, **{"y/labels.csv": "file,label\n000.png,NG\n"})
    with pytest.raises(DataError, match=r"labels\.csv: it seems to list(.|\n)* --layout folder to leave them out"):
        load(per_class)


@pytest.mark.parametrize("name", ["meta.json", "a/meta.json", "labels.csv"])
def test_a_list_beside_folders_that_say_all_is_not_missed(tmp_path: Path, name: str) -> None:
    text = "image,label\na/test/bad/000.png,1\n" if name.endswith("csv") else '{"train": {}, "test": {}}'
    found = load(tree(tmp_path, **SIX, **{name: text}))
    assert found.layout == "mvtec-ad"
    assert found.skipped == ((tmp_path / name, "not used: the names of folders say which images are good"),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", '{"filename": "000.png", "label": 1},\n{broken', "train.json line 2: not valid JSON"),
        ("meta.json", '{"train": {},}', "meta.json: not valid JSON"),
        ("manifest.csv", 'image,label\n"000.png,0\n', "manifest.csv line .*: not valid CSV"),
        ("labels.csv", 'image,"label\n"000.png,0\n', "labels.csv: it seems to list images"),
        ("labels.csv", "image,label\nnone.png,0\n", "labels.csv: it seems to list images"),
        ("annotations.json", "{}", "annotations.json: it seems to list images"),
        ("shutter.csv", "image,exposure\n000.png,3\n", "shutter.csv: it seems to list images"),
        ("labels.xlsx", "PK", "labels.xlsx: it seems to list images"),
        ("labels/000.txt", "0 0.5 0.5 0.1 0.1", "labels: labels that are no pictures are not read, such as 000.txt"),
        ("Fehlerliste.xlsx", "PK", "Fehlerliste.xlsx: it seems to list images"),
        ("bad.txt", "./001.png\n", "bad.txt: it seems to list images"),
        ("labels.txt", "000.png 0\n001.png 1\n", "labels.txt: it seems to list images"),
        ("run7.csv", "x/000.png;1\nx/001.png;0\n", "run7.csv: it seems to list images"),
        ("a.csv", "bildname,befund\n000.png,0\n", "a.csv: it seems to list images"),
        ("labels.yaml", "000.png: 1\n", "labels.yaml: it seems to list images"),
        ("export.json", '{"images": [{"file_name": "x/000.png"}]}', "export.json: it seems to list images"),
        ("000.json", "{}", "000.json: 1 of 3 images have such a file, as if for a defect"),
        ("000.png.xml", "<a/>", "000.png.xml: 1 of 3 images have such a file, as if for a defect"),
    ],
)
def test_no_list_is_passed_over(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tree(tmp_path, **{"{:03d}.png": 3, name: content}))


def test_files_that_list_nothing_do_no_harm(tmp_path: Path) -> None:
    own = "path,score,model_id,answer\n000.png,1,x,anomaly\n"
    others = {"results.csv": own, "m.train.jsonl": '{"step": 1}\n'}
    others |= {"readme.txt": "taken on Monday; see x.png", "licence.yaml": "name: MIT"}
    others |= {
        f"00{number}.json": '{"exposure_ms": 3, "file": "000.png"}' for number in range(3)
    }  # one for each image
    assert len(load(tree(tmp_path, **{"{:03d}.png": 3, **others})).samples) == 3


# ------------------------------------------------------------------------------------ what is there, and is not


def test_folders_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, screw=3, nut=3, **{"locked": 1, "nut/deep": 1})
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name in ("locked", "deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = load(tmp_path)
    assert found.classes == ["nut", "screw"]
    assert len(found.samples) == 6
    assert sum("cannot be listed (Permission denied)" in reason for _, reason in found.skipped) == 2


def test_words_about_what_is_not_read(tmp_path: Path) -> None:
    for name, content, message in (
        ("a", "x.dng", r"x\.dng is in a format that is not read; save such pictures as PNG or JPEG"),
        ("b", "x.zip", r"x\.zip is an archive: unpack it, and give the folder"),
    ):
        with pytest.raises(DataError, match=message):
            load(tree(tmp_path / name, **{content: "x"}))
    with pytest.raises(DataError, match=r"x\.zip is an archive: unpack it, and give the folder"):
        load(tmp_path / "b" / "x.zip")
    with pytest.raises(DataError, match="It is one image: give the folder of many"):
        load(tree(tmp_path / "c", **{"{:03d}.png": 1}) / "000.png")
    mixed = load(tree(tmp_path / "d", **{"{:03d}.png": 3, "y.DNG": "x"}))
    assert "a picture in a format that is not read" in mixed.skipped[0][1]


def test_files_of_several_pictures_are_noted(tmp_path: Path) -> None:
    tree(tmp_path, **{"{:03d}.png": 3})
    pages = [Image.fromarray(MARKED + shade) for shade in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "one.tif")
    (note,) = [note for note in load(tmp_path).notes if "several pictures" in note]
    assert "files with several pictures: 1 (first: " in note
    assert "stack.tif, 3); the first of each is read" in note


def test_links_upwards_are_not_followed(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", **part("a", **PART), **part("b", **PART))
    (root / "a" / "train" / "good" / "up").symlink_to(root, target_is_directory=True)
    found = load(root)
    assert found.counts["a"] == found.counts["b"]


def test_what_changes_on_the_disk_is_seen_by_the_next_load(tmp_path: Path) -> None:
    root = tree(tmp_path, **PART)
    before = load(root).samples
    new = root / "train/good/lot2/new.png"
    save(new, np.full((32, 32, 3), 90, np.uint8))
    assert {sample.image for sample in load(root).samples} == {sample.image for sample in before} | {new}
    new.unlink()
    assert load(root).samples == before
