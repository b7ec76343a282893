"""Dirty training data: what is least like the others is listed, and left out where that is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from test_copies import wedge
from tiny import good_folder, picture, run_config, save, train_samples

from twinspect import Detector, Sample
from twinspect.commands.info import outlier_lines
from twinspect.decide.decision import Decision, Threshold
from twinspect.errors import ConfigError
from twinspect.training.fit import taken_differently
from twinspect.training.normal import GoodImages
from twinspect.training.outcome import odd_notes
from twinspect.types import TRAIN

BROKEN = (4, 17, 26)


def cut(pixels: np.ndarray, number: int) -> np.ndarray:
    """The product without its tip."""
    left = pixels.copy()
    left[:, 50 + number % 7 :] = pixels[:20, 50 + number % 7 :].mean((0, 1))
    return left


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures of one product, three of them broken."""
    folder = tmp_path_factory.mktemp("line")
    for number in range(30):
        save(folder / f"{number:02d}.png", cut(wedge(number), number) if number in BROKEN else wedge(number))
    return folder


def broken(folder: Path) -> set[str]:
    return {str(folder / f"{number:02d}.png") for number in BROKEN}


def test_three_broken_among_thirty_are_the_first_three_and_are_left_out(dirty: Path) -> None:
    config = run_config("efficientnet-lite0", True, size=128, steps=2)
    record = Detector(config=config).fit(dirty).record_
    assert {row["path"] for row in record["least_like"][:3]} == broken(dirty)
    scores = [row["score"] for row in record["least_like"]]
    assert scores == sorted(scores, reverse=True)
    (line,) = outlier_lines(record)
    assert all(path in line for path in broken(dirty))

    clean = Detector(config=run_config("efficientnet-lite0", True, size=128, steps=2, drop_outliers=3)).fit(dirty)
    assert {row["path"] for row in clean.record_["dropped"]} == broken(dirty)
    assert sum(clean.record_["images"].values()) == 27
    assert "left out" in next(outlier_lines(clean.record_))
    again = clean.predict([dirty / f"{number:02d}.png" for number in BROKEN])
    assert all(result.is_anomaly for result in again)


def of_scores(score_n: torch.Tensor) -> tuple[list[Sample], GoodImages, Decision]:
    """Good images of one class with these scores, and the thresholds that they make."""
    count = len(score_n)
    samples = [Sample(Path(f"{i}.png"), TRAIN, "a") for i in range(count)]
    zeros, texts = torch.zeros(count, dtype=torch.int64), ("a",) * count
    everything = torch.ones(count, dtype=torch.bool)
    columns = (score_n, score_n, score_n, zeros, everything, score_n[:, None], (), score_n[:, None])
    good = GoodImages(*columns, texts, texts, tuple(map(str, range(count))))
    return samples, good, Decision(good.scores(("a",)), ("a",), (0.0, 1.0))


def test_images_that_score_apart_are_said_to_with_what_to_type() -> None:
    normal = np.random.default_rng(0).exponential(1.0, 40)
    (note,) = odd_notes(*of_scores(torch.tensor([*normal, 30.0, 33.0])))
    assert note == (
        "class a: 2 of 42 good images score far above the others (the threshold lies above them): 41.png (33.0000), "
        "40.png (30.0000). Leave out what is bad (--drop-outliers 2)"
    )
    assert odd_notes(*of_scores(torch.tensor(normal))) == []


def test_one_image_that_sets_the_threshold_of_a_small_set_is_named() -> None:
    normal = torch.tensor([1.0, 1.2, 1.5, 1.9, 2.0, 2.2, 2.9, 3.1, 3.5])
    samples, good, decision = of_scores(torch.cat([normal, torch.tensor([42.0])]))
    (note,) = odd_notes(samples, good, decision)
    assert "1 of 10 good images scores far above the others (the threshold lies above it): 9.png (42.0000)" in note
    by_hand = replace(decision, fixed={"a": Threshold(5.0, 0.02, False, "set by hand")})
    (note,) = odd_notes(samples, good, by_hand)
    assert "threshold" not in note


def test_fit_names_the_broken_one_among_a_dozen(tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path / f"{number:02d}.png", np.full_like(wedge(0), 90) if number == 5 else wedge(number))
    record = Detector(config=run_config("efficientnet-lite0", True, size=128, steps=0)).fit(tmp_path).record_
    (note,) = [note for note in record["notes"] if "the threshold lies above it" in note]
    assert f"{tmp_path / '05.png'} (" in note


def test_more_than_a_third_is_no_outlier(dirty: Path) -> None:
    with pytest.raises(ConfigError, match="--drop-outliers 11: at most a third of the 30 good images"):
        Detector(config=run_config(drop_outliers=11)).fit(dirty)


# ------------------------------------------------------------------------------- pictures of one class, taken alike


def test_a_class_of_grey_and_coloured_pictures_is_said_to_be_one(tmp_path: Path) -> None:
    for name in ("alike", "mixed"):
        good_folder(tmp_path / name, 6)
    for number in range(3):
        save(tmp_path / "mixed" / f"grey{number}.png", picture(number).mean(2).astype(np.uint8))
    (note,) = taken_differently(train_samples(tmp_path))
    assert note.startswith("class mixed: 3 of 9 images are grey, the others in colour.")


@pytest.mark.parametrize(("height", "width", "said"), [(96, 200, True), (240, 240, True), (100, 96, False)])
def test_a_class_of_several_sizes_is_said_to_be_one(tmp_path: Path, height: int, width: int, said: bool) -> None:
    good_folder(tmp_path / "a", 8)
    save(tmp_path / "a" / "odd.png", picture(9, height, width))
    (tmp_path / "a" / "text.png").write_text("no image")
    record = Detector(config=run_config(steps=0, cache_gb=0)).fit(tmp_path / "a").record_
    notes = [note for note in record["notes"] if note.startswith("class a: its images have different")]
    assert len(notes) == said
    if said:
        assert f"different sizes, such as 96 x 96 and {width} x {height}." in notes[0]


def test_a_picture_that_its_exif_turns_has_the_shape_of_the_others(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    samples = [Sample(save(tmp_path / "a.jpg", picture(0, 96, 160)), TRAIN, "a")]
    samples.append(Sample(save(tmp_path / "b.jpg", picture(1, 160, 96), exif=exif), TRAIN, "a"))
    assert taken_differently(samples) == []
