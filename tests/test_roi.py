"""A region of interest: pixels outside are neither learnt nor scored, wherever the model runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_copies import scratched, wedge
from tiny import run_config, save
from typer.testing import CliRunner

from twinspect import Detector
from twinspect.cli import app
from twinspect.data.samples import fit_roi, read_roi
from twinspect.errors import DataError
from twinspect.inference.predictor import load_predictor

CONFIG = run_config("efficientnet-lite0", True, size=128, steps=2, depth=1)


def busy(number: int) -> np.ndarray:
    """The product, with clutter that is never twice the same in a band below it."""
    pixels = wedge(number)
    pixels[76:] = np.random.default_rng([number, 5]).integers(0, 255, (20, 96, 3))
    return pixels


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """White where the product is."""
    inside = np.zeros((96, 96), np.uint8)
    inside[:72] = 255
    return save(tmp_path_factory.mktemp("roi") / "look_here.png", inside)


@pytest.fixture(scope="module")
def looking(mask: Path) -> Detector:
    return Detector(config=CONFIG).fit([busy(i) for i in range(20)], roi=mask, quiet=True)


def test_nothing_outside_changes_a_score_or_shows_in_the_map(looking: Detector) -> None:
    clean, other = busy(70), busy(70)
    other[76:] = 255
    first, second = looking.predict([clean, other])
    assert first.score == second.score
    assert (first.grid == second.grid).all()
    assert not first.map[74:].any()
    assert first.map[:70].any()


@pytest.mark.parametrize("model", ["dual", "rd"])
def test_published_maps_have_another_side(mask: Path, model: str) -> None:
    config = run_config("test_efficientnet", size=128, steps=1, model=model, scoring="published")
    found = Detector(config=config).fit([busy(i) for i in range(12)], roi=mask, quiet=True).predict(busy(70))
    assert not found.map[74:].any()
    assert found.map[:70].any()


def test_a_defect_inside_is_found_and_clutter_is_not(looking: Detector) -> None:
    good, bad = looking.predict([busy(80), scratched(busy(81))])
    assert bad.is_anomaly
    assert bad.score > 3 * good.score
    assert bad.regions
    assert all(region.y + region.height <= 76 for region in bad.regions)


def test_it_is_kept_in_the_bundle_and_shown_in_overlays(looking: Detector, tmp_path: Path) -> None:
    again = Detector.load(looking.save(tmp_path / "m.twin"))
    one = again.predict(busy(90))
    assert one.score == pytest.approx(looking.predict(busy(90)).score)
    drawn = np.asarray(one.overlay(words=False)).astype(int)
    assert np.ptp(drawn[78:], axis=-1).max() == 0  # grey
    assert np.ptp(drawn[:70], axis=-1).max() > 20  # coloured
    grown = again.update([busy(100 + i) for i in range(4)], class_name="normal", quiet=True)
    assert (grown.fitted.model.roi_SS == looking.fitted.model.roi_SS).all()


@pytest.mark.slow
def test_it_is_exported(looking: Detector, tmp_path: Path) -> None:
    looking.save(tmp_path / "m.twin")
    for number in range(32):
        save(tmp_path / "images" / f"{number}.png", busy(200 + number))
    out = tmp_path / "m.onnx"
    done = CliRunner().invoke(
        app, ["export", str(tmp_path / "m.twin"), "--out", str(out), "--images", str(tmp_path / "images")]
    )
    assert done.exit_code == 0, done.output
    clean, other = busy(70), busy(70)
    other[76:] = 255
    first, second = load_predictor(out).predict([clean, other])
    assert first.score == second.score == pytest.approx(looking.predict(clean).score, rel=1e-3)
    assert first.roi is not None


def test_polygons_of_labelme(tmp_path: Path) -> None:
    shapes = [
        {"points": [[10, 10], [50, 10], [50, 60], [10, 60]]},
        {"points": [[90, 30], [70, 30], [70, 5], [90, 5]], "shape_type": "polygon"},
    ]
    path = tmp_path / "roi.json"
    path.write_text(json.dumps({"imageWidth": 100, "imageHeight": 80, "shapes": shapes}))
    roi = read_roi(path)
    assert roi.shape == (80, 100)
    assert roi[30, 30]
    assert roi[20, 80]
    assert not roi[70, 30]
    assert not roi[20, 60]
    small = fit_roi(roi, 50, (160, 200))
    assert small[18, 15]
    assert not small[44, 15]


@pytest.mark.parametrize(
    ("shape", "width", "message"),
    [
        (
            {"points": [[1, 1], [9, 9]], "shape_type": "line"},
            20,
            "it has a line without an area; draw polygons of three points",
        ),
        ({"points": [[1, 1]], "shape_type": "point"}, 20, "a point without an area"),
        ({"points": [[1, 1], [9, 9]], "shape_type": "circle"}, 20, "a circle without an area"),
        ({"points": [[1, 1], [9, 9]]}, 20, "a polygon without an area"),
        ({"points": [[1, 1], [9, 9], [float("nan"), 4]]}, 20, "a polygon without an area"),
        ({"points": [[1, 1], [9, 9], [1, 9]]}, 10**9, "1000000000 x 20 pixels are more than images may have"),
    ],
)
def test_shapes_without_an_area_are_refused(tmp_path: Path, shape: dict, width: int, message: str) -> None:
    path = tmp_path / "roi.json"
    path.write_text(json.dumps({"imageWidth": width, "imageHeight": 20, "shapes": [shape]}))
    with pytest.raises(DataError, match=message):
        read_roi(path)


def test_wrong_regions_are_refused(tmp_path: Path, mask: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        read_roi(save(tmp_path / "black.png", np.zeros((8, 8), np.uint8)))
    with pytest.raises(DataError, match="no such file.*all products"):
        read_roi(tmp_path / "ring=mask.png")
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(DataError, match="LabelMe"):
        read_roi(tmp_path / "no.json")
    with pytest.raises(DataError, match="96 x 96 pixels and the images 64 x 96"):
        fit_roi(read_roi(mask), 64, (96, 64))
