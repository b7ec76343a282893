"""The shared development images, if they are beside the checkout (or where TWINSPECT_SHARED_DATA says)."""

import pytest
from tiny import SHARED

from twinspect.data import ClassCounts, load
from twinspect.data.protocols import find_leaks, make_splits
from twinspect.data.samples import read_sample_mask, read_sample_rgb

# train good, test good, test defects, masks: the table of the folder's own README
PARTS = {
    "casting": (300, 100, 120, 0),
    "cubes": (81, 35, 72, 0),
    "fabric": (200, 100, 120, 0),
    "magnetic_tile": (300, 100, 125, 125),
    "pcb": (250, 80, 120, 120),
    "piston": (64, 28, 80, 0),
}


def test_parts() -> None:
    found = load(SHARED / "parts")
    assert found.layout == "mvtec-ad"
    assert found.counts == {n: ClassCounts(t, 0, g, d, 0, m) for n, (t, g, d, m) in PARTS.items()}
    assert found.skipped == ()
    (split,) = make_splits(found.samples)
    assert len(split.train) + len(split.calibration) == 1195
    assert find_leaks(found.samples) == []


def test_part_masks_fit_their_images() -> None:
    masked = [s for s in load(SHARED / "parts").samples if s.masks]
    for sample in masked[::25]:
        assert read_sample_mask(sample, read_sample_rgb(sample).shape[:2]).any()


def test_good_only_part() -> None:
    found = load(SHARED / "parts" / "cubes" / "train" / "good")
    assert found.layout == "folder"
    assert len(found.samples) == 81


@pytest.mark.parametrize(
    ("name", "layout", "classes", "train", "test"),
    [("scenes", "view", 6, 200, 80), ("cifar10", "cifar10", 10, 400, 100)],
)
def test_semantic_sets(name: str, layout: str, classes: int, train: int, test: int) -> None:
    found = load(SHARED / name)
    assert found.layout == layout
    assert len(found.counts) == classes
    assert set(found.counts.values()) == {ClassCounts(train, test_unknown=test)}
    for protocol, runs in (("one-vs-rest", classes), ("unified", 4), ("leave-one-out", classes)):
        splits = make_splits(found.samples, protocol)
        assert len(splits) == runs
        assert all(len(split.test) == classes * test for split in splits)


def test_the_folder_of_all_sets_asks() -> None:
    with pytest.raises(ValueError, match=r"parts \(mvtec-ad\), .*scenes \(view\)"):
        load(SHARED)
