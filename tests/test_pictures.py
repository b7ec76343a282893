"""Files beside the table: maps, masks, overlays, regions for COCO tools, submission folders."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage
from test_bulk import Silent, job, runs, table
from tiny import images_to_test, picture, save

from twinspect import Detector
from twinspect.errors import DataError
from twinspect.inference.bulk import run
from twinspect.inference.outputs import submission_place
from twinspect.inference.regions import components, find_regions, outlines


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def beside(
    model: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]], list[Path]]:
    """Everything that can be written beside a table, for six defect images (some larger than the region grid)."""
    root = tmp_path_factory.mktemp("beside")
    images = images_to_test(parts, 1)[:4]
    save(root / "wide.png", np.asarray(Image.fromarray(pixels(images[0])).resize((2600, 1800))))
    (root / "wide.png").rename(wide := root / f"Größe 部品{'部' * 70}.png")
    options = {"maps": str(root / "maps"), "masks": str(root / "masks"), "overlays": str(root / "over")}
    sources = [*images, wide, root / "gone.png"]
    runs(job(model, root / "t.parquet", *sources, **options, coco=str(root / "c.json")))
    return root, table(root / "t.parquet"), [*images, wide]


def test_maps_masks_and_overlays(beside: tuple[Path, list[dict[str, Any]], list[Path]], quick: Detector) -> None:
    root, rows, images = beside
    assert all(len(list((root / name).iterdir())) == 5 for name in ("maps", "masks", "over"))
    assert rows[-1]["error"]
    assert rows[-1]["map_path"] == ""
    assert "_Größe_部品部" in rows[-2]["map_path"]
    for row, path in zip(rows, images, strict=False):
        heat = np.load(row["map_path"])["map"]
        expected = quick.predict(path).map
        assert (heat.dtype, heat.shape) == (np.float16, expected.shape)
        np.testing.assert_allclose(heat, expected, rtol=2e-3, atol=2e-3)
        mask = pixels(row["mask_path"])
        assert set(np.unique(mask)) <= {0, 255}
        assert mask.shape == expected.shape
        assert bool(mask.any()) == bool(row["n_regions"])
        if row["n_regions"] < 100:  # as many are listed
            areas = sum(one["area"] for one in json.loads(row["regions"]))
            assert (mask > 0).sum() == pytest.approx(areas, rel=0.01)


def test_coco_regions(beside: tuple[Path, list[dict[str, Any]], list[Path]]) -> None:
    root, rows, _ = beside
    coco = json.loads((root / "c.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == [row["path"] for row in rows]
    found = coco["annotations"]
    assert len(found) == sum(row["n_regions"] for row in rows) > 0
    assert [one["id"] for one in found] == list(range(1, len(found) + 1))
    by_image = {image["id"]: image for image in coco["images"]}
    for row, image in zip(rows, coco["images"], strict=True):
        own = [one for one in found if one["image_id"] == image["id"]]
        assert [one["score"] for one in own] == [region["score"] for region in json.loads(row["regions"])]
        for one in own:
            corners = np.concatenate([np.reshape(ring, (-1, 2)) for ring in one["segmentation"]])
            left, top, width, height = one["bbox"]
            slack = 2 if image["width"] > 2000 else 0  # regions of large images are found on a smaller map
            np.testing.assert_allclose(corners.min(0), [left, top], atol=slack)
            np.testing.assert_allclose(corners.max(0), [left + width, top + height], atol=slack)
    assert any(by_image[one["image_id"]]["width"] > 2000 for one in found)


def test_outlines_of_random_masks() -> None:
    """An outline encloses the region and its holes, pixel by pixel: counted by crossings of each pixel's centre."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        mask = rng.random(rng.integers(1, 12, 2)) < 0.55
        mask[rng.integers(mask.shape[0]), rng.integers(mask.shape[1])] = True
        found = components(mask, mask.astype(np.float32))
        for region in range(len(found.area_R)):
            own = found.label_HW == region + 1
            inside = np.zeros(mask.shape, int)
            for outline in outlines(found, region):
                for (x, y), (to_x, to_y) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
                    if x == to_x:  # an upright edge: it turns everything to its right around
                        inside[min(y, to_y) : max(y, to_y), x:] ^= 1
            filled = ndimage.binary_fill_holes(own)
            assert ((inside > 0) >= own).all()
            assert ((inside > 0) <= filled).all()
            if filled.sum() == own.sum():
                assert np.array_equal(inside > 0, own)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_pycocotools_reads_what_we_write(beside: tuple[Path, list[dict[str, Any]], list[Path]]) -> None:
    """The polygons, decoded by the reference implementation, cover the region masks."""
    from pycocotools.coco import COCO

    root, rows, _ = beside
    coco = COCO(str(root / "c.json"))
    assert [coco.cats[1]["name"], len(coco.imgs)] == ["anomaly", len(rows)]
    checked = 0
    for number, row in enumerate(rows, start=1):
        own = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        assert len(own) == row["n_regions"]
        if not own:
            continue
        union = np.zeros((row["height"], row["width"]), bool)
        for one in own:
            assert one["iscrowd"] == 0
            assert all(len(ring) >= 6 for ring in one["segmentation"])
            union |= coco.annToMask(one) > 0
        ours = ndimage.binary_fill_holes(pixels(row["mask_path"]) > 0)
        assert (union & ours).sum() / (union | ours).sum() > 0.9
        checked += 1
    assert checked


def test_submission_folders(model: Path, tmp_path: Path) -> None:
    names = ["can/test_private/000_regular.png", "can/test_private_mixed/001_shift.png"]
    for number, name in enumerate(names):
        save(tmp_path / "in" / name, picture(number, 50, 70))
    folder = str(tmp_path / "sub")
    runs(job(model, tmp_path / "t.csv", tmp_path / "in", submission=folder))
    for name in names:
        heat = tifffile.imread(tmp_path / "sub" / "anomaly_images" / Path(name).with_suffix(".tiff"))
        mask = pixels(tmp_path / "sub" / "anomaly_images_thresholded" / name)
        assert (heat.dtype, heat.shape) == (np.float16, (50, 70))
        assert (mask.dtype, mask.shape) == (np.uint8, (50, 70))
    assert len([p for p in (tmp_path / "sub").rglob("*") if p.is_file()]) == 4
    assert submission_place("/x/s.tar#can/test_public/bad/7.png") == "can/test_public/bad/7"
    save(tmp_path / "other" / "a.png", picture())
    with pytest.raises(DataError, match="OBJECT/test_private"):
        run(job(model, tmp_path / "u.csv", tmp_path / "other", submission=folder), Silent())


def test_archive_names_cannot_leave_the_folder_of_maps(model: Path, tmp_path: Path) -> None:
    body = io.BytesIO()
    Image.fromarray(picture()).save(body, "PNG")
    with tarfile.open(tmp_path / "s.tar", "w") as file:
        for name in ("../../up.png", "a b/%2e%2e;\n.png"):
            info = tarfile.TarInfo(name)
            info.size = len(body.getvalue())
            file.addfile(info, io.BytesIO(body.getvalue()))
    runs(job(model, tmp_path / "t.parquet", tmp_path / "s.tar", maps=str(tmp_path / "deep" / "maps")))
    assert [p.name for p in tmp_path.rglob("*.npz")] == ["000000-000001__2e_2e_.npz"]
    assert [bool(row["error"]) for row in table(tmp_path / "t.parquet")] == [True, False]


def test_overlays_say_what_was_found(model: Path, parts: Path, tmp_path: Path) -> None:
    """Outline and box of each region, and the answer in a strip; no larger than asked for, one colour scale."""
    from twinspect.inference.result import Result, colourise

    grid = np.zeros((32, 32), np.float32)
    grid[8:16, 4:12] = 30.0
    grey = np.full((800, 1200, 3), 128, np.uint8)
    found = find_regions(grid, (800, 1200), 10.0, np.arange(5.0))
    result = Result(
        "a.png", score=9.0, threshold=4.0, is_anomaly=True, answer="anomaly", class_name="Mutter ß 螺", width=1200,
        height=800, threshold_region=10.0, regions=found, scale=(0.0, 64.0), grid=grid, rgb=grey,
    )  # fmt: skip
    drawn = np.asarray(result.overlay(side=600))
    assert drawn.shape[1] == 600
    strip = drawn.shape[0] - 400
    assert strip > 0
    assert len(np.unique(drawn[:strip].reshape(-1, 3), axis=0)) > 2  # words are in it
    plain = np.asarray(result.overlay(side=600, words=False))
    assert plain.shape == (400, 600, 3)
    assert np.array_equal(plain, drawn[strip:])
    (region,) = found
    left, top, right, bottom = (
        v // 2 for v in (region.x, region.y, region.x + region.width, region.y + region.height)
    )
    pink = (plain == (255, 0, 200)).all(2)
    assert pink.sum() == pytest.approx(2 * 2 * (right - left + bottom - top), rel=0.1)  # two pixels wide
    assert not pink[top + 5 : bottom - 5, left + 5 : right - 5].any()
    white = (plain == 255).all(2)
    assert white[top - 3 : bottom + 3, left - 3 : right + 3].sum() == white.sum() > 100
    steps = colourise(np.array([[2.0, 8.0, 16.0, 32.0, 50.0]], np.float32), result.scale)[0].astype(int)
    assert all(np.abs(a - b).sum() > 20 for a, b in zip(steps, steps[1:], strict=False))
    image = images_to_test(parts, 1)[0]
    for kind in ("jpg", "png"):
        options = {"overlays": str(tmp_path / kind), "overlay_format": kind, "overlay_side": 48}
        runs(job(model, tmp_path / f"{kind}.csv", image, **options))
        (written,) = (tmp_path / kind).iterdir()
        assert written.suffix == f".{kind}"
        assert pixels(written).shape[1] == 48
