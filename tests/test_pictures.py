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
from test_bulk import Silent, job, runs, table
from tiny import images_to_test, picture, save

from twinspect import Detector
from twinspect.errors import DataError
from twinspect.inference.bulk import run
from twinspect.inference.pictures import PictureOptions, run_lengths, submission_place


@pytest.fixture(scope="module")
def model(quick: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick.save(tmp_path_factory.mktemp("model") / "tiny.twin")


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
    options = PictureOptions(str(root / "maps"), "tiff", str(root / "masks"), str(root / "over"), "", True)
    sources = [*images, root / "wide.png", root / "gone.png"]
    runs(job(model, root / "t.parquet", *sources, pictures=options, coco=str(root / "c.json")))
    return root, table(root / "t.parquet"), [*images, root / "wide.png"]


def test_maps_masks_and_overlays(beside: tuple[Path, list[dict[str, Any]], list[Path]], quick: Detector) -> None:
    root, rows, images = beside
    assert all(len(list((root / name).iterdir())) == 5 for name in ("maps", "masks", "over"))
    assert rows[-1]["error"]
    assert rows[-1]["map_path"] == ""
    for row, path in zip(rows, images, strict=False):
        heat = tifffile.imread(row["map_path"])
        expected = quick.predict(path).map
        assert (heat.dtype, heat.shape) == (np.float16, expected.shape)
        np.testing.assert_allclose(heat, expected, rtol=2e-3, atol=2e-3)
        mask = pixels(row["mask_path"])
        assert set(np.unique(mask)) <= {0, 255}
        assert bool(mask.any()) == bool(row["n_regions"])
        assert np.mean((mask > 0) == (expected >= row["threshold_region"])) > 0.999


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
        union = np.zeros((image["height"], image["width"]), dtype=bool)
        for one in own:
            mask = from_run_lengths(one["segmentation"])
            y, x = np.nonzero(mask)
            left, top, width, height = one["bbox"]
            slack = 2 if image["width"] > 2000 else 0  # regions of large images are found on a smaller map
            assert abs(x.min() - left) <= slack
            assert abs(y.max() + 1 - top - height) <= slack
            assert mask.sum() == pytest.approx(one["area"], rel=0.02 if slack else 0)
            union |= mask
        if own and image["width"] < 2000:
            assert np.array_equal(union, pixels(row["mask_path"]) > 0)
    assert any(by_image[one["image_id"]]["width"] > 2000 for one in found)


def from_run_lengths(said: dict[str, Any]) -> np.ndarray:
    """COCO's own definition, literally."""
    flat: list[int] = []
    for number, count in enumerate(said["counts"]):
        flat += [number % 2] * count
    height, width = said["size"]
    flat += [0] * (height * width - len(flat))
    return np.array(flat, dtype=bool).reshape(width, height).T


def test_run_lengths_of_random_masks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random(rng.integers(1, 9, 2)) < 0.4
        mask[rng.integers(mask.shape[0]), rng.integers(mask.shape[1])] = True
        rows, columns = np.nonzero(mask)
        counts = run_lengths(rows, columns, (mask.shape[0], mask.shape[1]))
        assert np.array_equal(from_run_lengths({"counts": counts, "size": list(mask.shape)}), mask)


def test_submission_folders(model: Path, tmp_path: Path) -> None:
    names = ["can/test_private/000_regular.png", "can/test_private_mixed/001_shift.png"]
    for number, name in enumerate(names):
        save(tmp_path / "in" / name, picture(number, 50, 70))
    options = PictureOptions(submission=str(tmp_path / "sub"))
    runs(job(model, tmp_path / "t.csv", tmp_path / "in", pictures=options))
    for name in names:
        heat = tifffile.imread(tmp_path / "sub" / "anomaly_images" / Path(name).with_suffix(".tiff"))
        mask = pixels(tmp_path / "sub" / "anomaly_images_thresholded" / name)
        assert (heat.dtype, heat.shape) == (np.float16, (50, 70))
        assert (mask.dtype, mask.shape) == (np.uint8, (50, 70))
    assert len([p for p in (tmp_path / "sub").rglob("*") if p.is_file()]) == 4
    assert submission_place("/x/s.tar#can/test_public/bad/7.png") == "can/test_public/bad/7"
    save(tmp_path / "other" / "a.png", picture())
    with pytest.raises(DataError, match="OBJECT/test_private"):
        run(job(model, tmp_path / "u.csv", tmp_path / "other", pictures=options), Silent())


def test_archive_names_cannot_leave_the_folder_of_maps(model: Path, tmp_path: Path) -> None:
    body = io.BytesIO()
    Image.fromarray(picture()).save(body, "PNG")
    with tarfile.open(tmp_path / "s.tar", "w") as file:
        for name in ("../../up.png", "a b/%2e%2e;\n.png"):
            info = tarfile.TarInfo(name)
            info.size = len(body.getvalue())
            file.addfile(info, io.BytesIO(body.getvalue()))
    options = PictureOptions(maps=str(tmp_path / "deep" / "maps"))
    runs(job(model, tmp_path / "t.parquet", tmp_path / "s.tar", pictures=options))
    assert [p.name for p in tmp_path.rglob("*.npz")] == ["000000-000001__2e_2e_.npz"]
    assert [bool(row["error"]) for row in table(tmp_path / "t.parquet")] == [True, False]
