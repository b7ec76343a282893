"""Every loader finds exactly what the synthetic writer wrote, in every shape, in any order."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from layouts import WRITERS, Plan, write

from twinspect.commands.results import summary
from twinspect.data import DATASETS, Dataset, load
from twinspect.data.folders import LOGICAL, STRUCTURAL
from twinspect.data.protocols import make_splits
from twinspect.data.samples import has_pixel_truth, read_regions, read_sample_mask, read_sample_rgb
from twinspect.data.scan import Folder, ScanLog
from twinspect.errors import ConfigError, DataError
from twinspect.types import Sample

CASES = [(layout, shape) for layout, writer in WRITERS.items() for shape in writer.shapes]


def test_every_layout_has_a_loader_and_a_writer() -> None:
    assert set(DATASETS) == set(WRITERS)


@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_counts_are_exact(tmp_path: Path, layout: str, shape: str) -> None:
    root = tmp_path / "größe 5 µm"
    expected = write(layout, root, Plan(shape=shape, classes=3, train=5, good=2, defect=7))
    assert load(root).layout == layout
    found = load(root)
    assert found.layout == layout
    assert found.counts == expected
    assert found.skipped == ()
    assert load(root, layout).samples == found.samples


@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_every_image_and_mask_can_be_read(tmp_path: Path, layout: str, shape: str) -> None:
    write(layout, tmp_path / "set", Plan(shape=shape, train=2, good=1, defect=2, size=24))
    for sample in load(tmp_path / "set").samples:
        rgb = read_sample_rgb(sample)
        assert rgb.dtype == np.uint8
        assert rgb.ndim == 3
        assert rgb.shape[2] == 3
        if has_pixel_truth(sample):
            assert read_sample_mask(sample, rgb.shape[:2]).any() == (sample.label == 1)


@pytest.mark.parametrize("layout", ["mvtec-ad", "cifar10", "folder"])
def test_splits_do_not_depend_on_sample_order(tmp_path: Path, layout: str) -> None:
    write(layout, tmp_path / "set", Plan(train=9))
    samples = list(load(tmp_path / "set").samples)
    shuffled = random.Random(3).sample(samples, len(samples))
    assert make_splits(samples) == make_splits(shuffled)
    assert [s.hash for s in make_splits(samples)] == [s.hash for s in make_splits(shuffled)]


@pytest.mark.parametrize("layout", ["cifar10", "cifar100", "fashion-mnist"])
def test_shapes_of_one_set_hold_the_same_pixels(tmp_path: Path, layout: str) -> None:
    seen = []
    for shape in WRITERS[layout].shapes:
        write(layout, tmp_path / shape, Plan(shape=shape, train=7))
        samples = load(tmp_path / shape).samples
        seen.append(sorted((s.split, s.class_name, read_sample_rgb(s).tobytes()) for s in samples))
    assert all(other == seen[0] for other in seen)


@pytest.mark.parametrize("layout", ["manifest", "meta-json", "uniad-json"])
def test_lists_give_the_same_split_as_the_folders(tmp_path: Path, layout: str) -> None:
    write("mvtec-ad", tmp_path / "folders")
    write(layout, tmp_path / "list")
    a, b = make_splits(load(tmp_path / "folders").samples), make_splits(load(tmp_path / "list").samples)
    assert [s.hash for s in a] == [s.hash for s in b]


def test_one_class_folder_alone(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path / "parts")
    found = load(tmp_path / "parts" / "ring")
    assert list(found.counts) == ["ring"]


def test_wrapping_folders_are_entered(tmp_path: Path) -> None:
    expected = write("mvtec-ad", tmp_path / "archive" / "mvtec_anomaly_detection")
    found = load(tmp_path / "archive")
    assert found.counts == expected
    assert found.root.name == "mvtec_anomaly_detection"
    assert any("wraps" in note for note in found.notes)
    assert load(tmp_path / "archive", "mvtec-ad").counts == expected


def test_folder_of_data_sets_asks_which_one(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path / "a")
    write("view", tmp_path / "b")
    with pytest.raises(DataError, match=r"a \(mvtec-ad\), b \(view\)"):
        load(tmp_path)


def test_masks_without_suffix_and_other_case_of_good(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path / "v", Plan(shape="1cls"))
    train = tmp_path / "v" / "1cls" / "ring" / "train"
    (train / "good").rename(train / "OK")
    found = load(tmp_path / "v")
    assert all(len(s.masks) == 1 for s in found.samples if s.label == 1)
    assert found.counts["ring"].train == 6


def test_loco_masks_and_saturation(tmp_path: Path) -> None:
    write("mvtec-loco", tmp_path)
    anomalies = [s for s in load(tmp_path).samples if s.label == 1]
    assert {s.defect_type for s in anomalies} == {LOGICAL, STRUCTURAL}
    for sample in anomalies:
        shape = read_sample_rgb(sample).shape[:2]
        (first, first_area), (second, second_area) = read_regions(sample, shape)
        assert first_area == pytest.approx(first.sum() / 2)
        assert second_area == 10
        assert np.array_equal(read_sample_mask(sample, shape), first | second)


def test_regions_are_those_of_sets_that_state_saturation_areas(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path)
    sample = next(s for s in load(tmp_path).samples if s.masks)
    assert read_regions(sample, (64, 64)) is None


def test_loco_grey_value_without_entry_is_an_error(tmp_path: Path) -> None:
    write("mvtec-loco", tmp_path)
    for config in tmp_path.glob("*/defects_config.json"):
        config.write_text("[]")
    sample = next(s for s in load(tmp_path).samples if s.masks)
    with pytest.raises(DataError, match=r"000\.png: grey values \[255\]"):
        read_regions(sample, (64, 64))


def test_real_iad_objects_are_groups_of_five_views(tmp_path: Path) -> None:
    write("real-iad", tmp_path)
    samples = load(tmp_path).samples
    by_group: dict[str, list[str]] = {}
    for sample in samples:
        by_group.setdefault(sample.group, []).append(re.findall(r"_(C\d)_", sample.image.name)[0])
    assert all(sorted(views) == ["C1", "C2", "C3", "C4", "C5"] for views in by_group.values())
    assert len(by_group) == 2 * (6 + 3 + 4)
    assert {s.defect_type for s in samples} == {"", "HS"}


def test_real_iad_prefers_one_size_and_says_so(tmp_path: Path) -> None:
    write("real-iad", tmp_path)
    (tmp_path / "realiad_256").rename(tmp_path / "realiad_1024")
    write("real-iad", tmp_path)
    found = load(tmp_path)
    assert all("realiad_1024" in s.image.parts for s in found.samples)
    assert found.skipped == ((tmp_path / "realiad_256", "the same images in another size; realiad_1024 is read"),)


def test_ad2_private_images_have_no_label_and_stay_out_of_the_test(tmp_path: Path) -> None:
    write("mvtec-ad-2", tmp_path)
    samples = load(tmp_path).samples
    private = [s for s in samples if s.label is None]
    assert {s.defect_type for s in private} == {"test_private", "test_private_mixed"}
    (split,) = make_splits(samples)
    assert all(s.label is not None for s in split.test)
    assert {s.split for s in split.calibration} == {"calibration"}


def test_semantic_samples_have_classes_and_no_labels(tmp_path: Path) -> None:
    write("fashion-mnist", tmp_path, Plan(classes=10, train=1))
    samples = load(tmp_path).samples
    assert {s.label for s in samples} == {None}
    assert "t-shirt-top" in {s.class_name for s in samples}


def test_class_folders_by_alias(tmp_path: Path) -> None:
    write("cifar10", tmp_path, Plan(shape="folders"))
    for split in ("train", "test"):
        (tmp_path / split / "airplane").rename(tmp_path / split / "plane")
    found = load(tmp_path)
    assert found.layout == "cifar10"
    assert set(found.counts) == {"airplane", "automobile"}


def test_view_reads_other_scene_classes(tmp_path: Path) -> None:
    write("view", tmp_path, Plan(shape="plain"))
    for split in ("train", "test"):
        (tmp_path / split / "forest").rename(tmp_path / split / "harbour")
    assert set(load(tmp_path, "view").counts) == {"buildings", "harbour"}
    with pytest.raises(DataError, match="--layout view"):
        load(tmp_path, "folder")


def test_summary_speaks_of_counts_masks_and_skipped(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path, Plan(shape="no-masks"))
    (tmp_path / "weave" / "train" / "good" / "notes.txt").write_text("x")
    text = "\n".join(summary(load(tmp_path)))
    for part in (
        "mvtec-ad at",
        "2 classes, 26 images",
        "weave",
        "total",
        "notes.txt",
        "not an image",
        "no mask",
    ):
        assert part in text


def test_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'mvtec-ad'"):
        load(".", "mvtec_ad")
    with pytest.raises(ConfigError, match="no effect on folder"):
        load(".", "folder", images=".")


def test_a_new_data_set_is_one_function_and_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def catalogue(root: Folder, log: ScanLog) -> list[Sample]:
        rows = [line.split() for line in (root.path / "catalogue.lst").read_text().splitlines()]
        return [Sample(root.path / name, split, "nut", int(label)) for name, split, label in rows]

    def is_catalogue(root: Folder) -> bool:
        return root.path / "catalogue.lst" in root.others

    write("folder", tmp_path, Plan(shape="good"))
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    lines = [f"{name} train 0" for name in names[:-2]] + [f"{names[-2]} test 0", f"{names[-1]} test 1"]
    (tmp_path / "catalogue.lst").write_text("\n".join(lines))
    row = {"catalogue": Dataset("catalogue.lst", is_catalogue, catalogue)}
    monkeypatch.setattr("twinspect.data.DATASETS", row | DATASETS)
    found = load(tmp_path)
    assert found.layout == "catalogue"
    assert [s.image.relative_to(tmp_path).as_posix() for s in found.samples] == names
    (split,) = make_splits(found.samples)
    assert (len(split.train) + len(split.calibration), len(split.test)) == (len(names) - 2, 2)
    (tmp_path / "catalogue.lst").unlink()
    assert load(tmp_path).layout == "folder"
