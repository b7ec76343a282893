"""Prediction: whatever people point it at, in the image's own geometry, and one bad file stops nothing."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import header_only_png
from tiny import images_to_test, picture, save

from twinspect import Detector
from twinspect.errors import DataError
from twinspect.inference.decode import expand
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result, colourise
from twinspect.types import TEST, Sample


def rows(results: list[Result]) -> list[float]:
    return [r.score for r in results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("new")
    for number in range(6):
        save(root / ("deep" if number > 3 else "") / f"{number}.png", picture(50 + number, 70 + number, 90))
    (root / "notes.txt").write_text("x")
    return root


@pytest.fixture(scope="module")
def expected(quick: Detector, folder: Path) -> list[float]:
    """Scores of the folder's images, one at a time, in sorted order."""
    return [quick.predict(path).score for path in sorted(folder.rglob("*.png"))]


# --------------------------------------------------------------------------------------------- sources


def test_single_images(quick: Detector, folder: Path) -> None:
    path = folder / "0.png"
    pixels = np.asarray(Image.open(path))
    sample = Sample(path, TEST, "ring")
    sources = [path, str(path), pixels, Image.open(path), sample]
    results = [quick.predict(source) for source in sources]
    assert all(isinstance(r, Result) for r in results)
    assert len(set(rows(results))) == 1
    assert [r.path for r in results] == [str(path), str(path), "<ndarray>", "<PngImageFile>", str(path)]


def test_many_images(quick: Detector, folder: Path, expected: list[float]) -> None:
    paths = sorted(folder.rglob("*.png"))
    arrays = [np.asarray(Image.open(p)) for p in paths]
    for source in (folder, str(folder), f"{folder}/**/*.png", paths, [str(p) for p in paths], tuple(arrays)):
        results = quick.predict(source)
        assert isinstance(results, list)
        assert rows(results) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert [r.path for r in quick.predict(folder)] == [str(p) for p in paths]
    mixed = [paths[0], arrays[1], Image.open(paths[2]), *paths[3:]]
    assert rows(quick.predict(mixed)) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    nested = quick.predict([folder / "deep", paths[0]])
    assert [r.path for r in nested] == [str(p) for p in (*sorted((folder / "deep").iterdir()), paths[0])]


def test_stack_of_arrays_and_grey(quick: Detector) -> None:
    stack = np.stack([picture(i) for i in range(3)])
    results = quick.predict(stack)
    assert len(results) == 3
    grey = picture()[..., 0]
    assert quick.predict(grey).score == pytest.approx(quick.predict(np.repeat(grey[..., None], 3, 2)).score)
    assert quick.predict([]) == []


def test_stream_is_lazy_and_in_order(quick: Detector, folder: Path, expected: list[float]) -> None:
    stream = quick.predict(folder, stream=True)
    assert next(stream).score == pytest.approx(expected[0], rel=1e-3)
    assert rows(list(stream)) == pytest.approx(expected[1:], rel=1e-3, abs=1e-3)
    drawn = []

    def camera():
        for number in range(1000):
            drawn.append(number)
            yield picture(number)

    endless = quick.predict(camera(), stream=True)
    for _ in range(3):
        next(endless)
    endless.close()
    assert len(drawn) < 100  # it reads ahead by a few batches only


@pytest.mark.parametrize(("batch", "workers"), [(1, 1), (2, 4), (5, 2), (64, 3)])
def test_order_and_scores_do_not_depend_on_batch_or_threads(
    quick: Detector, folder: Path, expected: list[float], batch: int, workers: int
) -> None:
    inner = quick.predictor()
    predictor = Predictor(inner.runtime, inner.decision, batch, workers)
    results = list(predictor.predict(folder))
    assert rows(results) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert [r.path for r in results] == [str(p) for p in sorted(folder.rglob("*.png"))]


def test_nothing_found_says_what_was_looked_for(quick: Detector, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image files in .* \(looked for PNG, JPEG, "):
        quick.predict(tmp_path)
    for source in (tmp_path / "none.png", f"{tmp_path}/*.png", [str(tmp_path / "none.png")]):
        with pytest.raises(DataError, match="nothing found at .*: give an image, a folder, or a quoted glob"):
            quick.predict(source)


def test_a_folder_with_brackets_in_its_name(quick: Detector, tmp_path: Path) -> None:
    path = save(tmp_path / "line [2]" / "a*.png", picture())
    assert len(list(expand(path.parent))) == 1
    assert quick.predict(path).error == ""


# ------------------------------------------------------------------------------------------- bad input


def test_bad_files_become_rows_and_the_run_goes_on(quick: Detector, tmp_path: Path) -> None:
    pixels = picture()
    save(tmp_path / "a_good.png", pixels)
    (tmp_path / "b_empty.png").write_bytes(b"")
    (tmp_path / "c_cut.jpg").write_bytes(save(tmp_path / "c_cut.jpg", pixels).read_bytes()[:500])
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(tmp_path / "d_16bit.png")
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "e_cmyk.jpg")
    Image.fromarray(pixels).convert("P").save(tmp_path / "f_palette.png")
    Image.fromarray(pixels).save(tmp_path / "g_moving.gif", save_all=True, append_images=[Image.new("RGB", (96, 96))])
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(picture(0, 60, 90)).save(tmp_path / "h_turned.jpg", exif=exif)
    save(tmp_path / "i_thin.png", picture(0, 80, 1))
    header_only_png(tmp_path / "j_bomb.png", 20_000, 20_000)
    (tmp_path / "k_text.png").write_text("not an image")
    save(tmp_path / "l_good.png", pixels)
    results = {Path(r.path).name: r for r in quick.predict(tmp_path)}
    assert list(results) == sorted(results)
    bad = {name for name, r in results.items() if r.error}
    assert bad == {"b_empty.png", "c_cut.jpg", "i_thin.png", "j_bomb.png", "k_text.png"}
    for name, result in results.items():
        if name in bad:
            assert str(tmp_path / name) in result.error
            assert math.isnan(result.score)
            assert result.is_anomaly is None
            assert result.map is None
            with pytest.raises(ValueError, match="no map to draw"):
                result.overlay()
        else:
            assert math.isfinite(result.score)
            assert result.map.shape == (result.height, result.width)
    assert results["a_good.png"].score == pytest.approx(results["l_good.png"].score, rel=1e-3)
    assert (results["h_turned.jpg"].height, results["h_turned.jpg"].width) == (90, 60)


def test_a_missing_file_among_others_is_a_row(quick: Detector, folder: Path) -> None:
    results = quick.predict([folder / "0.png", folder / "gone.png", folder / "1.png"])
    assert [bool(r.error) for r in results] == [False, True, False]
    assert "nothing found at" in results[1].error


def test_pil_images_are_read_as_their_files_would_be(quick: Detector, tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(save(cut, picture()).read_bytes()[:2000])
    with Image.open(tmp_path / "deep.png") as whole, Image.open(cut) as broken:
        results = quick.predict([tmp_path / "deep.png", whole, broken, picture()])
    assert results[0].score == pytest.approx(results[1].score, rel=1e-3)
    assert "damaged or truncated" in results[2].error
    assert not results[3].error


def test_a_score_that_is_not_finite_is_never_good(quick: Detector) -> None:
    inner = quick.predictor()

    class Broken:
        size = inner.runtime.size

        def run(self, pixels):
            out = {name: np.array(value) for name, value in inner.runtime.run(pixels).items()}
            out["score_B"] = out["score_B"].astype(np.float64)
            out["score_B"][0] = np.nan
            return out

    first, second = Predictor(Broken(), inner.decision).predict([picture(), picture(1)])
    assert "not finite" in first.error
    assert first.is_anomaly is None
    assert second.error == ""


# -------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(("height", "width"), [(96, 96), (50, 131), (200, 64), (2, 40)])
def test_map_has_the_geometry_of_the_original(quick: Detector, height: int, width: int) -> None:
    result = quick.predict(picture(0, height, width))
    assert (result.height, result.width) == (height, width)
    assert result.map.shape == (height, width)
    assert result.map.dtype == np.float32
    assert result.overlay(words=False).size == (width, height)


RIM = [(0, 0), (0, 40), (0, 88), (40, 0), (40, 88), (88, 0), (88, 40), (88, 88)]


@pytest.mark.parametrize(("top", "left"), RIM)
def test_a_defect_in_the_outermost_eight_pixels_is_found(detector: Detector, top: int, left: int) -> None:
    clean = picture(700)
    spoiled = clean.copy()
    spoiled[top : top + 8, left : left + 8] = 255
    good, bad = detector.predict([clean, spoiled])
    assert bad.score > good.score
    assert bad.map.max() > 2 * good.map.max()
    row, column = np.unravel_index(int(bad.map.argmax()), bad.map.shape)
    assert top - 6 <= row < top + 14
    assert left - 6 <= column < left + 14


def test_rim_defect_of_a_picture_that_is_not_square(detector: Detector) -> None:
    stretched = Image.fromarray(picture(701)).resize((144, 96), Image.Resampling.BICUBIC)
    spoiled = np.array(stretched)
    spoiled[30:38, -8:] = 255
    result = detector.predict(spoiled)
    row, column = np.unravel_index(int(result.map.argmax()), result.map.shape)
    assert column >= 144 - 14
    assert 22 <= row < 46


def test_defects_are_called_and_most_good_images_are_not(detector: Detector) -> None:
    good = detector.predict([picture(800 + i) for i in range(12)])
    spoiled = []
    for number in range(6):
        spoiled.append(picture(900 + number))
        spoiled[-1][20 + 8 * number : 30 + 8 * number, 30:42] = 255
    bad = detector.predict(spoiled)
    assert min(rows(bad)) > max(rows(good))
    assert all(r.is_anomaly for r in bad)
    assert sum(r.is_anomaly for r in good) <= 4
    assert max(r.p_value for r in bad) < np.median([r.p_value for r in good])


# -------------------------------------------------------------------------------------------- overlays


def test_overlays_use_one_scale_for_all_images(detector: Detector, tmp_path: Path) -> None:
    spoiled = picture(1000)
    spoiled[40:60, 40:60] = 255
    good, bad = detector.predict([picture(1001), spoiled])
    assert good.scale == bad.scale
    values = np.array([[good.scale[0], good.scale[1], 1e9, -1e9]], np.float32)
    colours = colourise(values, good.scale)[0]
    assert colours[1].tolist() == colours[2].tolist()  # beyond the end: the end's colour
    assert colours[0].tolist() == colours[3].tolist()
    assert colours[0][2] > colours[0][0]  # blue is low
    assert colours[1][0] > colours[1][2]  # red is high
    places = [np.unravel_index(one.grid.argmax(), one.grid.shape) for one in (good, bad)]
    usual, high = (
        colourise(one.grid, one.scale)[at].astype(int) for one, at in zip((good, bad), places, strict=True)
    )
    assert high[0] - high[2] > usual[0] - usual[2]  # the spoiled one is redder
    assert bad.overlay(words=False).size == (96, 96)
    assert bad.overlay().size[1] > 96


def test_maps_and_pixels_can_be_left_out(quick: Detector, parts: Path) -> None:
    results = quick.predict(images_to_test(parts, None)[:2], maps=False)
    assert all(r.grid is None and r.rgb is None and math.isfinite(r.score) for r in results)


def test_row_is_plain(quick: Detector) -> None:
    row = quick.predict(picture()).row()
    assert {"path", "score", "score_local", "score_semantic", "p_value", "is_anomaly", "class_name", "error"} <= set(
        row
    )
    assert all(isinstance(v, (str, int, float, bool, type(None))) for v in row.values())


def test_every_alarm_shows_a_region(quick: Detector) -> None:
    results = quick.predict(np.stack([picture(i) if i % 2 else np.roll(picture(i), 9, 2) // 2 for i in range(8)]))
    bad = [result for result in results if result.is_anomaly]
    assert bad
    assert all(result.regions for result in bad)
