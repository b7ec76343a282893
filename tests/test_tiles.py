"""Large pictures in overlapping tiles: geometry, one model, and defects wherever they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import picture, run_config, save

from twinspect import Detector
from twinspect.config import RunConfig
from twinspect.data.images import resize_rgb
from twinspect.errors import ConfigError
from twinspect.inference import load
from twinspect.inference.decode import OVERLAP, Decoding, blended, boxes, cut, decode, joined, reach, speaker
from twinspect.training.fit import fitting_tiles, usual_sides
from twinspect.types import TRAIN, Sample

# ----------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("tiles", [(1, 1), (2, 1), (3, 4), (1, 7)])
@pytest.mark.parametrize("shape", [(400, 500), (97, 61), (5, 3)])
def test_tiles_cover_a_picture_and_share_a_fifth(shape: tuple[int, int], tiles: tuple[int, int]) -> None:
    pixels = np.zeros((*shape, 3), np.uint8)
    seen = np.zeros(shape, int)
    for rows, columns in boxes(pixels, tiles):
        seen[rows, columns] += 1
        assert rows.stop > rows.start
        assert columns.stop > columns.start
    assert seen.min() >= 1
    assert len(boxes(pixels, tiles)) == tiles[0] * tiles[1]
    if shape == (400, 500) and tiles == (3, 4):
        first, second = boxes(pixels, tiles)[:2]
        width = first[1].stop - first[1].start
        assert first[1].stop - second[1].start == pytest.approx(OVERLAP * width, abs=1)
        assert width == pytest.approx(500 / reach(4), abs=1)


def test_a_tile_is_that_part_of_the_picture() -> None:
    pixels = picture(0, 120, 200)
    parts = cut(pixels, 32, (2, 3))
    assert parts.shape == (6, 32, 32, 3)
    for part, (rows, columns) in zip(parts, boxes(pixels, (2, 3)), strict=True):
        assert (part == resize_rgb(pixels[rows, columns], 32)).all()
    assert (decode(pixels, Decoding(32, tiles=(2, 3))).square == parts).all()
    assert (cut(pixels, 32, (1, 1)) == resize_rgb(pixels, 32)).all()


@pytest.mark.parametrize("tiles", [(2, 2), (3, 4)])
def test_maps_are_blended_without_seams(tiles: tuple[int, int]) -> None:
    """A smooth map, cut as pictures are and put together again, is what it was."""
    side = 20
    height, width = round(side * reach(tiles[0])), round(side * reach(tiles[1]))
    whole = np.add.outer(np.linspace(0, 3, height), np.linspace(0, 5, width)).astype(np.float32)
    starts = [[round(i * (1 - OVERLAP) * side) for i in range(count)] for count in tiles]
    parts = [whole[top : top + side, left : left + side] for top in starts[0] for left in starts[1]]
    np.testing.assert_allclose(blended(np.stack(parts), tiles), whole, atol=1e-5)
    spot = np.zeros((tiles[0] * tiles[1], side, side), np.float32)
    spot[0, 10, 10] = 1.0  # in the middle of the first tile, where no other is
    assert blended(spot, tiles)[10, 10] == 1.0


def test_answers_of_tiles_are_joined() -> None:
    out = {
        "score_B": np.array([1.0, 5.0, 2.0, 9.0, 3.0, 3.5, 4.0, 1.0]),
        "score_local_B": np.arange(8.0),
        "score_semantic_B": -np.arange(8.0),
        "cluster_B": np.array([0, 1, 2, 3, 0, 1, 1, 2]),
        "map_B1HW": np.random.default_rng(0).random((8, 1, 10, 10), np.float32),
        "readings_BR": np.arange(16.0).reshape(8, 2),
    }
    found = joined(out, (2, 2), ("a", "a", "a", "b"))
    assert found["score_B"].tolist() == [9.0, 4.0]
    assert found["score_local_B"].tolist() == [3.0, 7.0]
    assert found["score_semantic_B"].tolist() == [0.0, -4.0]
    assert found["cluster_B"].tolist() == [1, 1]  # of class a, which most tiles show
    assert found["readings_BR"].tolist() == [[2.0, 3.0], [12.0, 13.0]]
    assert found["map_B1HW"].shape == (2, 1, 18, 18)
    assert speaker([3.0, 1.0, 2.0], ["x", "y", "y"]) == 2


def test_what_is_accepted_and_what_auto_takes() -> None:
    for text in ("3", "0x2", "3x", "7x7", "3 x 4", "aut"):
        with pytest.raises(ConfigError, match="accepted auto, or rows x columns"):
            RunConfig.from_dict({"model": {"tiles": text}})
    assert fitting_tiles((4000, 5000), 512) == (3, 4)
    assert fitting_tiles((700, 700), 256) == (1, 1)
    rows, columns = fitting_tiles((30_000, 60_000), 256)
    assert rows * columns <= 48 < 2 * rows * columns


def test_a_region_of_interest_is_refused_before_the_work(tmp_path: Path) -> None:
    """It is drawn on whole pictures, and a tile is not one."""
    mask = save(tmp_path / "roi.png", np.full((240, 240), 255, np.uint8))
    config = run_config("efficientnet-lite0", pretrained=True, size=96, steps=0, depth=1, tiles="2x2")
    with pytest.raises(ConfigError, match=r"--roi\) does not work with --tiles; leave one of them out"):
        Detector(config=config).fit([sheet(number) for number in range(12)], roi=mask, quiet=True)


# ------------------------------------------------------------------------------------------------- models

SEAMS = [(y, x) for y in (120, 68, 172) for x in (120, 68, 172)][1:]  # middles of what two or four tiles share


def sheet(number: int) -> np.ndarray:
    """A sheet of 240 pixels, the same all over but for noise."""
    rng = np.random.default_rng(number)
    grey = 120 + 30 * np.sin(np.arange(240) / 7)[:, None] + 20 * np.cos(np.arange(240) / 5)[None]
    return (grey[..., None] + rng.normal(0, 6, (240, 240, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    root = tmp_path_factory.mktemp("sheets")
    files = [save(root / f"{number:02d}.png", sheet(number)) for number in range(12)]
    config = run_config("efficientnet-lite0", pretrained=True, size=96, steps=2, depth=1, tiles="3x3")
    return Detector(config=config).fit(files)


def test_a_defect_on_every_seam_is_found(tiled: Detector) -> None:
    good = tiled.predict([sheet(number) for number in range(50, 58)])
    assert sum(bool(one.is_anomaly) for one in good) <= 2
    assert good[0].grid.shape == (round(32 * reach(3)),) * 2
    for y, x in SEAMS:
        pixels = sheet(60)
        pixels[y - 4 : y + 4, x - 4 : x + 4] = 250
        found = tiled.predict(pixels)
        assert found.is_anomaly, (y, x)
        peak = np.unravel_index(found.map.argmax(), found.map.shape)
        assert np.hypot(peak[0] - y, peak[1] - x) < 16, (y, x, peak)


def test_calibration_counts_pictures(tiled: Detector) -> None:
    decision, record = tiled.fitted.decision, tiled.record_
    assert len(decision.good) == 12
    assert set(decision.class_of_cluster) == set(decision.classes)
    assert len(decision.classes) == 1
    assert (decision.tiles, tiled.config.model.tiles) == ((3, 3), "3x3")
    assert len(decision.trained) == 12
    assert (record["images"]["train"] + record["images"]["calibration"], record["sides"]) == (12, [240, 240])
    assert len({one["path"] for one in record["least_like"]}) == len(record["least_like"])
    assert list(record["classes"]) == decision.classes


def test_a_bundle_sees_the_same_tiles(tiled: Detector, tmp_path: Path) -> None:
    files = [save(tmp_path / f"{number}.png", sheet(70 + number)) for number in range(3)]
    expected = tiled.predict(files)
    bundle = tiled.save(tmp_path / "m.twin")
    for batch in (0, 2):
        for one, two in zip(expected, load(bundle, batch=batch).predict(files), strict=True):
            assert two.score == pytest.approx(one.score, rel=1e-4)
            assert two.is_anomaly == one.is_anomaly
            np.testing.assert_allclose(two.map, one.map, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="cannot go on from a model with tiles"):
        Detector.load(bundle).fit(files, resume=True)


@pytest.mark.slow
def test_an_export_sees_the_same_tiles(tiled: Detector, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from twinspect.export import export
    from twinspect.inference.predictor import load_predictor

    export(tiled.fitted, tmp_path / "m.onnx")
    pixels = sheet(70)
    expected = tiled.predict(pixels)
    (answer,) = load_predictor(tmp_path / "m.onnx").predict([pixels])
    assert answer.score == pytest.approx(expected.score, rel=1e-3)
    assert answer.answer == expected.answer
    np.testing.assert_allclose(answer.grid, expected.grid, rtol=1e-2, atol=1e-2)


def test_fit_says_what_a_pixel_covers(tmp_path: Path, tiled: Detector) -> None:
    from twinspect.commands.fit import pixel_lines

    save(tmp_path / "a.png", picture(0, 400, 500))
    assert usual_sides([Sample(tmp_path / "a.png", TRAIN, "a")]) == (400, 500)
    [line] = pixel_lines({"sides": [4000, 5000], "size": 512}, (1, 1))
    assert line.startswith(
        "one pixel of the model covers 9.8 of yours (5000 x 4000, seen at 512): defects under about 29 "
    )
    assert line.endswith("--tiles 3x4 or --size 1024 sees smaller ones")
    [line] = pixel_lines({"sides": [4000, 5000], "size": 512}, (3, 4))
    assert "covers 3.0 of yours (5000 x 4000, seen in 3 x 4 tiles of 512)" in line
    assert line.endswith("; --size 1024 sees smaller ones")
    assert not list(pixel_lines({"sides": [600, 800], "size": 512}, (1, 1)))
