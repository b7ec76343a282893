"""Classes whose good images hardly differ, and classes of a few images: copies are learnt, and `fit` says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny import picture, run_config, save, train_samples

from twinspect import Detector
from twinspect.commands.calibrate import threshold_section
from twinspect.training.derived import FIXED, FREE, Copy, add_copies, find_pose, hardly_differ
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
    copies = [Copy(tmp_path / "a.png", TRAIN, "a", seed=seed).changed(grey) for seed in range(8)]
    assert len({one.tobytes() for one in copies}) == 8
    assert all(np.abs(one.astype(int) - 100).max() <= 2 for one in copies)
    assert (Copy(tmp_path / "a.png", TRAIN, "a", seed=3).changed(grey) == copies[3]).all()
    assert Copy(tmp_path / "a.png", TRAIN, "a", seed=3).changed(np.full_like(grey, 255)).min() >= 253  # no overflow


def test_only_such_classes_get_copies_in_both_parts(tmp_path: Path) -> None:
    varied = samples(tmp_path / "varied", [picture(i) for i in range(10)])
    flat = samples(tmp_path / "flat", [specks(i) for i in range(100)])
    training, held, notes = add_copies([*varied[:8], *flat[:80]], [*varied[8:], *flat[80:]])
    added = [one for one in (*training, *held) if isinstance(one, Copy)]
    assert {one.class_name for one in added} == {"flat"}
    assert len(added) == 50
    assert 0 < sum(isinstance(one, Copy) for one in held) < 25
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


# ------------------------------------------------------------------------------------- a few images


def wedge(number: int, turned: float = 0.0) -> np.ndarray:
    """A bright product with one side longer than the other on dark ground, never twice the same."""
    rng = np.random.default_rng(number)
    image = Image.new("L", (96, 96), 30)
    ImageDraw.Draw(image).polygon([(20, 30), (80, 44), (80, 56), (24, 70)], fill=200)
    shade = np.asarray(image.rotate(turned, Image.Resampling.BILINEAR, fillcolor=30), np.float32)
    noisy = shade[..., None] + rng.normal(0.0, 3.0, (96, 96, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def scratched(pixels: np.ndarray) -> np.ndarray:
    """The picture with a dark bar across the product."""
    bad = pixels.copy()
    bad[38:62, 46:54] = 20
    return bad


def test_the_pose_is_read_off_the_images(tmp_path: Path) -> None:
    lying = samples(tmp_path / "lying", [wedge(i) for i in range(4)])
    any_way = samples(tmp_path / "any", [wedge(i, 75.0 * i) for i in range(4)])
    cloth = samples(tmp_path / "cloth", [picture(i) for i in range(4)])
    assert [find_pose(one)[0] for one in (lying, any_way, cloth)] == [FIXED, FREE, FIXED]
    assert find_pose(any_way[:1]) == (FIXED, find_pose(lying[:1])[1])
    assert "--pose free" in find_pose(lying[:1])[1]


def test_moved_copies_are_near_the_image_and_turned_ones_are_not(tmp_path: Path) -> None:
    first = wedge(0)
    near, turned = (Copy(tmp_path / "a.png", TRAIN, "a", seed=3, kind=p).changed(first) for p in (FIXED, FREE))
    assert 0 < np.abs(near.astype(int) - first).mean() < 12
    assert np.abs(turned.astype(int) - first).mean() > 12
    assert abs(float(turned.mean()) - float(first.mean())) < 12  # nothing is lost at the rim


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_few_images_find_a_defect_and_promise_what_they_can(tmp_path: Path, count: int) -> None:
    good = samples(tmp_path / "wedge", [wedge(i) for i in range(count)])
    detector = Detector(config=run_config("efficientnet-lite0", True, size=128)).fit(good)
    bad, fresh = (detector.predict([make(wedge(90 + i)) for i in range(4)]) for make in (scratched, np.copy))
    assert min(one.score for one in bad) > max(one.score for one in fresh)
    assert all(one.is_anomaly for one in bad)
    decision = detector.fitted.decision
    assert len(decision.good) == count  # copies promise nothing
    assert detector.record_["training"]["steps"] == 0
    lines = "\n".join(threshold_section(decision).lines())
    assert ("unknown: one good image" if count == 1 else f"about 1 in {count + 1}") in lines
    (note,) = detector.record_["notes"]
    assert f"class wedge: {count} good image" in note


def test_a_score_of_a_few_images_did_not_see_the_image(tmp_path: Path) -> None:
    good = samples(tmp_path / "wedge", [*(wedge(i) for i in range(3)), scratched(wedge(3))])
    detector = Detector(config=run_config("efficientnet-lite0", True, size=128)).fit(good)
    rows = detector.fitted.decision.good
    assert int(rows.score.argmax()) == 3  # its own copies do not vouch for it
    assert rows.score[3] > 2 * np.median(rows.score[:3])


def test_a_class_of_a_few_images_beside_a_large_one(tmp_path: Path) -> None:
    samples(tmp_path / "wedge", [wedge(i) for i in range(3)])
    samples(tmp_path / "weave", [picture(i) for i in range(16)])
    detector = Detector(config=run_config("efficientnet-lite0", True, size=128)).fit(train_samples(tmp_path))
    assert detector.record_["training"]["steps"] == 3
    assert detector.record_["images"]["calibration"] == 4  # of the large class only
    assert detector.fitted.decision.good.class_name.tolist().count("wedge") == 3
    good, bad, cloth = detector.predict([wedge(90), scratched(wedge(91)), picture(90)])
    assert [one.predicted_class for one in (good, bad, cloth)] == ["wedge", "wedge", "weave"]
    assert bad.is_anomaly
    assert bad.score > 2 * good.score
