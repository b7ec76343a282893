"""Classes whose good images hardly differ: one grey level is nothing, a spot is an anomaly, and `fit` says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import picture, run_config, save, train_samples

from twinspect import Detector
from twinspect.training.source import Rounded, add_rounded, hardly_differ
from twinspect.types import TRAIN, Sample

BLACK = np.zeros((64, 64, 3), np.uint8)


def specks(seed: int, share: float = 0.01) -> np.ndarray:
    """Black with some pixels of one grey level."""
    return (np.random.default_rng(seed).random(BLACK.shape) < share).astype(np.uint8)


def samples(folder: Path, images: list[np.ndarray]) -> list[Sample]:
    """Images on disk as good training images of a class named like the folder."""
    return [Sample(save(folder / f"{i}.png", one), TRAIN, folder.name) for i, one in enumerate(images)]


@pytest.mark.parametrize(
    ("images", "answer"),
    [
        ([specks(i) for i in range(12)], True),
        ([specks(i) + np.uint8(i % 3) for i in range(12)], True),  # brightness is another matter
        ([BLACK], True),
        ([picture(i) for i in range(12)], False),
        ([BLACK, np.zeros((64, 65, 3), np.uint8)], False),
        ([BLACK + np.random.default_rng(i).integers(0, 5, BLACK.shape).astype(np.uint8) for i in range(4)], False),
    ],
)
def test_less_than_one_grey_level_is_hardly_a_difference(
    tmp_path: Path, images: list[np.ndarray], answer: bool
) -> None:
    assert hardly_differ(samples(tmp_path, images)) is answer


def test_what_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no image")
    assert not hardly_differ([Sample(tmp_path / "0.png", TRAIN, "a")])


def test_copies_differ_by_a_level_or_two_and_are_the_same_every_time(tmp_path: Path) -> None:
    grey = np.full((32, 32, 3), 100, np.uint8)
    copies = [Rounded(tmp_path / "a.png", TRAIN, "a", seed=seed).around(grey) for seed in range(8)]
    assert len({one.tobytes() for one in copies}) == 8
    assert all(np.abs(one.astype(int) - 100).max() <= 2 for one in copies)
    assert (Rounded(tmp_path / "a.png", TRAIN, "a", seed=3).around(grey) == copies[3]).all()
    assert Rounded(tmp_path / "a.png", TRAIN, "a", seed=3).around(np.full_like(grey, 255)).min() >= 253  # no overflow


def test_only_such_classes_get_copies_in_both_parts(tmp_path: Path) -> None:
    varied = samples(tmp_path / "varied", [picture(i) for i in range(10)])
    flat = samples(tmp_path / "flat", [specks(i) for i in range(100)])
    training, held, notes = add_rounded([*varied[:8], *flat[:80]], [*varied[8:], *flat[80:]])
    added = [one for one in (*training, *held) if isinstance(one, Rounded)]
    assert {one.class_name for one in added} == {"flat"}
    assert len(added) == 50
    assert 0 < sum(isinstance(one, Rounded) for one in held) < 25
    assert len(notes) == 1
    assert notes[0].startswith("class flat: its good images differ by less than one grey level")


@pytest.mark.parametrize("identical", [True, False])
def test_a_black_class_beside_others(tmp_path: Path, identical: bool) -> None:
    samples(tmp_path / "black", [BLACK if identical else specks(i) for i in range(12)])
    samples(tmp_path / "weave", [picture(i) for i in range(16)])
    config = run_config("efficientnet-lite0", True, cache_gb=0)
    detector = Detector(config=config).fit(train_samples(tmp_path))
    assert any("class black" in note for note in detector.record_["notes"])
    spot = BLACK.copy()
    spot[20:28, 30:38] = 255
    level, noise, black, white = detector.predict([BLACK + np.uint8(1), specks(99), BLACK, spot])
    for one in (level, noise, black):
        assert one.predicted_class == "black"
        assert one.severity < 3  # never a huge anomaly
    assert not black.is_anomaly
    assert white.is_anomaly
    assert white.severity > 5 * level.severity
