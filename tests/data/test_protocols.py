"""Splits: counts, disjoint roles, the same on every machine, a hash that notices every change."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from layouts import Plan, write
from tiny import save
from trees import colour, tree

from twinspect.config import RunConfig
from twinspect.data import load
from twinspect.data.protocols import (
    PROTOCOLS,
    Split,
    by_superclass,
    carve_calibration,
    class_order,
    count_once,
    find_leaks,
    hold_out_good,
    make_splits,
    pick,
)
from twinspect.data.semantic import CIFAR100, CIFAR100_SUPERCLASSES, FASHION
from twinspect.errors import ConfigError, DataError
from twinspect.training.fit import choose_images
from twinspect.types import CALIBRATION, TEST, TRAIN, Sample


def semantic(count: int, train: int = 50, test: int = 4, base: str = "data") -> list[Sample]:
    names = [f"c{i:02d}" for i in range(count)]
    return [
        Sample(Path(base) / split / name / f"{i}.png", split, name, None)
        for name in names
        for split, number in ((TRAIN, train), (TEST, test))
        for i in range(number)
    ]


def good(count: int, name: str = "a", group: int = 0, base: str = "data") -> list[Sample]:
    return [
        Sample(Path(base) / name / f"{i:04d}.png", TRAIN, name, group=f"g{i // group}" if group else "")
        for i in range(count)
    ]


def paths(samples: tuple[Sample, ...] | list[Sample]) -> set[tuple[Path, int | None]]:
    return {(s.image, s.record) for s in samples}


def check(split: Split) -> None:
    assert {s.label for s in (*split.train, *split.calibration)} == {0}
    assert {s.label for s in split.test} <= {0, 1}
    assert {s.split for s in split.train} == {TRAIN}
    assert {s.split for s in split.calibration} <= {CALIBRATION}
    assert {s.split for s in split.test} <= {TEST}
    roles = [paths(part) for part in (split.train, split.calibration, split.test)]
    assert (
        sum(map(len, roles)) == len(set.union(*roles)) == sum(map(len, (split.train, split.calibration, split.test)))
    )


@pytest.mark.parametrize("protocol", ["multi-class", "single-class"])
@pytest.mark.parametrize("layout", ["mvtec-ad", "mvtec-loco", "visa", "real-iad", "folder", "mvtec-ad-2"])
def test_industrial(tmp_path: Path, layout: str, protocol: str) -> None:
    counts = write(layout, tmp_path, Plan(train=10))
    samples = load(tmp_path).samples
    splits = make_splits(samples, protocol)
    for split in splits:
        check(split)
        assert split.kind == "industrial"
    assert len(splits) == (1 if protocol == "multi-class" else len(counts))
    tested = Counter(s.label for split in splits for s in split.test)
    assert tested[1] == sum(c.test_defect for c in counts.values())
    assert tested[0] == (2 if layout == "folder" else sum(c.test_good for c in counts.values()))
    used = sum(len(s.train) + len(s.calibration) for s in splits) + (2 if layout == "folder" else 0)
    assert used == sum(c.train + c.calibration for c in counts.values())


def test_single_and_multi_class_use_the_same_calibration_images(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path, Plan(train=30))
    samples = load(tmp_path).samples
    (multi,) = make_splits(samples, "multi-class")
    single = make_splits(samples, "single-class")
    assert {s.name for s in single} == {"single-class/ring", "single-class/weave"}
    assert paths(multi.calibration) == set.union(*(paths(s.calibration) for s in single))


def test_own_validation_split_is_used_and_nothing_carved(tmp_path: Path) -> None:
    write("mvtec-loco", tmp_path, Plan(train=10, calibration=4))
    (split,) = make_splits(load(tmp_path).samples)
    assert (len(split.train), len(split.calibration)) == (20, 8)
    assert all("validation" in s.image.parts for s in split.calibration)


def normal_classes(split: Split) -> list[str]:
    """Classes that the model learns as normal, sorted."""
    return sorted({sample.class_name for sample in split.train})


@pytest.mark.parametrize("protocol", ["one-vs-rest", "unified", "leave-one-out"])
def test_semantic_splits_test_everything(protocol: str) -> None:
    samples = semantic(10)
    splits = make_splits(samples, protocol)
    assert len(splits) == (4 if protocol == "unified" else 10)
    normal = {"one-vs-rest": 1, "unified": 5, "leave-one-out": 9}[protocol]
    for split in splits:
        check(split)
        assert split.kind == "semantic"
        assert len(normal_classes(split)) == normal
        assert (len(split.train), len(split.calibration)) == (
            30 * normal,
            20 * normal,
        )  # at least 20 per class
        assert len(split.test) == 40
        anomalies = [s for s in split.test if s.label == 1]
        assert len(anomalies) == 4 * (10 - normal)
        assert all(s.defect_type == s.class_name not in normal_classes(split) for s in anomalies)


def test_unified_parts_are_the_published_ones() -> None:
    splits = {s.name: [int(n[1:]) for n in normal_classes(s)] for s in make_splits(semantic(10), "unified")}
    assert splits == {
        "unified/first-half": [0, 1, 2, 3, 4],
        "unified/second-half": [5, 6, 7, 8, 9],
        "unified/even": [0, 2, 4, 6, 8],
        "unified/odd": [1, 3, 5, 7, 9],
    }
    six = [[int(n[1:]) for n in normal_classes(s)] for s in make_splits(semantic(6), "unified")]
    assert six == [[0, 1, 2], [3, 4, 5], [0, 2, 4], [1, 3, 5]]


def test_class_order_is_official() -> None:
    assert class_order(sorted(FASHION)) == list(FASHION)
    assert list(CIFAR100)[:3] == ["apple", "aquarium_fish", "baby"]
    assert list(CIFAR100).index("maple_tree") == 47


def test_cifar100_super_classes(tmp_path: Path) -> None:
    assert len(CIFAR100) == 100
    assert len(CIFAR100_SUPERCLASSES) == 20
    assert {len(fines) for fines in CIFAR100_SUPERCLASSES.values()} == {5}
    write("cifar100", tmp_path, Plan(classes=100, train=1, good=1))
    samples = load(tmp_path).samples
    splits = make_splits(samples, "one-vs-rest-super")
    assert len(splits) == 20
    for split in splits:
        check(split)
        assert len(split.train) + len(split.calibration) == 5
        assert sum(s.label == 0 for s in split.test) == 5
        assert len(split.test) == 100
        assert split.name == f"one-vs-rest-super/{normal_classes(split)[0]}"
    assert len(make_splits(samples, "one-vs-rest")) == 100
    with pytest.raises(ConfigError, match="not a class of CIFAR-100"):
        by_superclass(semantic(2))


def test_class_folders_without_test_split_hold_some_out(tmp_path: Path) -> None:
    write("folder", tmp_path, Plan(shape="classes", train=10))
    splits = make_splits(load(tmp_path).samples, "one-vs-rest")
    for split in splits:
        check(split)
        assert len(split.test) == 4


def test_protocols_that_do_not_fit_say_which_do() -> None:
    labelled = [*good(4), Sample(Path("x/t.png"), TEST, "a", 1, "dent")]
    for name in ("one-vs-rest", "unified", "leave-one-out"):
        with pytest.raises(ConfigError, match="multi-class or single-class"):
            make_splits(labelled, name)
        with pytest.raises(ConfigError, match="at least two classes"):
            make_splits(good(10), name)
    with pytest.raises(ConfigError, match="one-vs-rest"):
        make_splits(semantic(2), "multi-class")
    with pytest.raises(ConfigError, match="Did you mean 'unified'"):
        make_splits(semantic(2), "unifed")
    with pytest.raises(DataError, match="no normal training image"):
        make_splits([Sample(Path("x.png"), TEST, "a", 1)], "multi-class")
    assert [split.name for split in make_splits(labelled)] == ["multi-class"]
    assert make_splits(semantic(2))[0].name == "unified/first-half"
    assert {"multi-class", "single-class", "one-vs-rest", "unified", "leave-one-out"} <= set(PROTOCOLS)


def test_anomalous_training_images_are_not_trained_on() -> None:
    noisy = [*good(50), Sample(Path("data/a/bad.png"), TRAIN, "a", 1)]
    (split,) = make_splits(noisy)
    check(split)
    assert len(split.train) + len(split.calibration) == 50


def test_hash_notices_labels_roles_and_masks_but_not_the_place() -> None:
    here, there = semantic(4), semantic(4, base="/mnt/other/place")
    first, second = make_splits(here)[0], make_splits(there)[0]
    assert first.hash == second.hash
    assert len(first.hash) == 12
    sample = first.test[0]
    for changed in (
        replace(first, test=(replace(sample, label=1), *first.test[1:])),
        replace(first, test=(replace(sample, masks=(Path("data/m.png"),)), *first.test[1:])),
        replace(first, test=(replace(sample, group="g"), *first.test[1:])),
        replace(first, test=first.test[1:]),
        replace(first, train=first.calibration, calibration=first.train),
    ):
        assert changed.hash != first.hash
    assert make_splits(here, seed=1)[0].hash != first.hash
    assert make_splits(here, seed=1)[0].test == first.test
    assert first.hash in first.describe()


def test_hash_is_a_golden_value() -> None:
    # Moves only on purpose: published numbers name these splits.
    hashes = [s.hash for s in make_splits(semantic(4), "unified")]
    assert hashes == ["7472d6276055", "b003d7df190d", "8dac83f4e1d6", "375f0f1ab936"]


# ---------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 1), (10, 5), (40, 20), (60, 20), (100, 20), (300, 60)])
def test_carving_counts(count: int, expected: int) -> None:
    kept, carved = carve_calibration(good(count))
    assert (len(kept), len(carved)) == (count - expected, expected)


def test_carving_per_class_and_seed() -> None:
    samples = good(100) + good(50, "b")
    kept, carved = carve_calibration(samples, fraction=0.5, seed=0, minimum=1)
    assert Counter(s.class_name for s in carved) == {"a": 50, "b": 25}
    assert carve_calibration(samples[::-1], 0.5, 0, 1) == (kept, carved)
    assert paths(carve_calibration(samples, 0.5, 1, 1)[1]) != paths(carved)
    moved = carve_calibration(good(100, base="/elsewhere"), 0.5, 0, 1)[1]
    assert {s.image.name for s in moved} == {s.image.name for s in carved if s.class_name == "a"}


def test_another_image_moves_few_others() -> None:
    before = paths(carve_calibration(good(200))[1])
    after = paths(carve_calibration(good(205))[1])
    assert len(before - after) <= 5  # of 40


def test_carving_takes_whole_groups() -> None:
    kept, carved = carve_calibration(good(100, group=7), minimum=1)
    assert not {s.group for s in kept} & {s.group for s in carved}
    assert 20 <= len(carved) <= 26
    kept, carved = carve_calibration(good(100, group=100), minimum=1)  # one group: by image
    assert len(carved) == 20
    kept, carved = carve_calibration(good(100, group=60), minimum=1)  # 60 and 40: the smaller one
    assert len(carved) == 40
    assert carve_calibration([]) == ([], [])


def test_pick_nothing() -> None:
    assert pick(good(1), 5, "x") == set()
    assert pick(good(5), 0, "x") == set()


def test_hold_out_only_where_needed() -> None:
    defect = Sample(Path("data/a/d/1.png"), TEST, "a", 1, "d")
    held = hold_out_good([*good(10), defect, *good(10, "b")])
    assert Counter((s.class_name, s.split) for s in held if s.label == 0) == {
        ("a", TRAIN): 8,
        ("a", TEST): 2,
        ("b", TRAIN): 10,
    }
    own = Sample(Path("data/a/t/1.png"), TEST, "a")
    assert Counter(s.split for s in hold_out_good([*good(10), defect, own])) == {TRAIN: 10, TEST: 2}


# ----------------------------------------------------------------------------------------------- leaks


def test_leaks_in_files(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path)
    assert find_leaks(load(tmp_path).samples) == []
    train, test = tmp_path / "ring" / "train" / "good", tmp_path / "ring" / "test" / "good"
    (train / "copy.png").write_bytes((test / "000.png").read_bytes())
    (train / "copy2.png").write_bytes((test / "000.png").read_bytes())
    (train / "twin.png").write_bytes((train / "001.png").read_bytes())  # twice in training: no leak
    samples = load(tmp_path).samples
    assert [(a.image.name, b.image.name) for a, b in find_leaks(samples)] == [
        ("copy.png", "000.png"),
        ("copy2.png", "000.png"),
    ]


@pytest.mark.parametrize("shape", ["python", "parquet"])
def test_leaks_in_records(tmp_path: Path, shape: str) -> None:
    write("cifar10", tmp_path, Plan(shape=shape))
    samples = list(load(tmp_path).samples)
    assert find_leaks(samples) == []
    test = next(s for s in samples if s.split == TEST)
    samples.append(replace(test, split=TRAIN))
    assert [b for _, b in find_leaks(samples)] == [test]


# --------------------------------------------------------------------------------------- copies in training


def test_copies_are_counted_once(tmp_path: Path) -> None:
    root = tree(tmp_path, **{"train/good": 12, "validation/good": 3, "test/bad": 2})
    train, held = root / "train" / "good", root / "validation" / "good"
    for number in range(12):
        for copy in (1, 2):
            shutil.copy(train / f"{number:03d}.png", train / f"{number:03d} - Copy ({copy}).png")
    shutil.copy(train / "000.png", held / "000.png")
    shutil.copy(root / "test" / "bad" / "001.png", train / "900.png")
    samples = load(root).samples
    kept, notes = count_once([s for s in samples if s.label == 0], [s for s in samples if s.label == 1])
    assert Counter(s.split for s in kept) == {TRAIN: 12, CALIBRATION: 2}
    assert train / "900.png" not in {s.image for s in kept}
    assert [note[: note.index(" (first")] for note in notes] == [
        "25 of 40 good images are copies of others",
        "1 of 40 good images are copies of images that are called defects",
    ]


def test_the_same_picture_saved_anew_is_a_copy(tmp_path: Path) -> None:
    pixels = colour(Path("a"))
    for number, options in enumerate(({}, {"compress_level": 0}, {"dpi": (300, 300)})):
        save(tmp_path / f"{number}.png", pixels, **options)
    save(tmp_path / "3.bmp", pixels)
    save(tmp_path / "4.png", 255 - pixels)
    kept, _ = count_once(load(tmp_path).samples)
    assert [s.image.name for s in kept] == ["0.png", "4.png"]


@pytest.mark.parametrize("shape", ["python", "parquet"])
def test_copies_among_records(tmp_path: Path, shape: str) -> None:
    write("cifar10", tmp_path, Plan(shape=shape))
    train = [s for s in load(tmp_path).samples if s.split == TRAIN]
    assert count_once(train) == (train, [])
    kept, notes = count_once([*train, replace(train[0], split=CALIBRATION)])
    assert kept == train
    assert len(notes) == 1


def test_no_held_out_image_was_learnt(tmp_path: Path) -> None:
    root = tree(tmp_path, good=30)
    for number in range(30):
        for copy in (1, 2):
            shutil.copy(root / "good" / f"{number:03d}.png", root / "good" / f"{number:03d} - Copy ({copy}).png")
    notes: list[str] = []
    training, held = choose_images(load(root).samples, RunConfig(), notes)
    assert len(training) + len(held) == 30
    assert not {s.image.read_bytes() for s in training} & {s.image.read_bytes() for s in held}
    assert "60 of 90 good images are copies of others" in notes[0]


def test_what_is_not_there_is_equal_to_nothing(tmp_path: Path) -> None:
    samples = [*load(tree(tmp_path, good=2)).samples, *good(2)]
    for path in (tmp_path / "good").iterdir():
        path.write_bytes(b"")
    assert count_once(samples) == (samples, [])
    assert find_leaks(samples) == []
