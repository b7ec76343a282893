"""Files beside the table: raw maps, masks, overlays, regions for COCO tools, and MVTec AD 2's submission folders."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect import files
from twinspect.errors import ConfigError, DataError
from twinspect.files import replacing
from twinspect.inference.regions import connected, outlines, region_mask, strongest
from twinspect.types import as_text

if TYPE_CHECKING:
    from twinspect.inference.job import Job
    from twinspect.inference.result import Result

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_COCO_HEAD = b'{"categories": [{"id": 1, "name": "anomaly"}], "images": ['
_MVTEC_SPLIT = re.compile(r"test_(public|private|private_mixed)")


def places(job: Job) -> Iterator[tuple[str, str]]:
    """The option of every folder that is written, with a file as it is written there."""
    for option, folder, file in (
        ("--maps", job.maps, "a.npz"),
        ("--masks", job.masks, "a.png"),
        ("--overlays", job.overlays, f"a.{job.overlay_format}"),
        ("--submission", job.submission, "a.tiff"),
    ):
        if folder:
            yield option, f"{folder.rstrip('/')}/{file}"


def save_pictures(result: Result, job: Job, unit: int, index: int) -> None:
    """Write an image's files and note their paths in the result.

    Names are ``UNIT-INDEX_STEM``, so that any name inside an archive is harmless and two equal names stay apart.
    """
    if result.error:
        return
    stem = f"{unit:06d}-{index:06d}_{_UNSAFE.sub('_', PurePosixPath(result.path).stem)[:80]}"
    if job.maps:
        body = io.BytesIO()
        np.savez_compressed(body, map=_half(_map(result)))
        result.map_path = _write(job.maps, f"{stem}.npz", body.getvalue())
    if job.masks and result.grid is not None:
        inside = region_mask(result.grid, (result.height, result.width), _threshold(result))
        result.mask_path = _write(job.masks, f"{stem}.png", _mask_bytes(inside))
    if job.submission:
        import tifffile  # which the light install lacks, as it has no --submission

        place, heat, body = submission_place(result.path), _map(result), io.BytesIO()
        tifffile.imwrite(body, _half(heat))
        result.map_path = _write(job.submission, f"anomaly_images/{place}.tiff", body.getvalue())
        mask = _mask_bytes(heat >= _threshold(result))
        result.mask_path = _write(job.submission, f"anomaly_images_thresholded/{place}.png", mask)
    if job.overlays:
        body, kind = io.BytesIO(), {"jpg": "JPEG", "png": "PNG"}[job.overlay_format]
        result.overlay(side=job.overlay_side).save(body, kind, quality=90)
        _write(job.overlays, f"{stem}.{job.overlay_format}", body.getvalue())


def submission_place(path: str) -> str:
    """``OBJECT/SPLIT/.../STEM`` of an image of MVTec AD 2; a DataError for any other."""
    parts = PurePosixPath(path.partition("#")[2] or path.replace("\\", "/")).with_suffix("").parts
    for number in range(1, len(parts)):
        if _MVTEC_SPLIT.fullmatch(parts[number]):
            return "/".join(parts[number - 1 :])
    raise DataError(
        f"{path}: --submission takes images of MVTec AD 2, which lie in OBJECT/test_private/ and such; give the data "
        "set's own folder, or write --maps and --masks instead"
    )


def _threshold(result: Result) -> float:
    if np.isnan(result.threshold_region):
        raise ConfigError(
            "this model has no threshold for regions, so there are no masks; set one with: "
            "twinspect calibrate MODEL GOOD --max-fpr 0.01"
        )
    return result.threshold_region


def _map(result: Result) -> NDArray[np.float32]:
    heat = result.map
    assert heat is not None, "`Job.wants_maps` asks for it"
    return heat


def _half(heat: NDArray[np.float32]) -> NDArray[np.float16]:
    most = float(np.finfo(np.float16).max)  # beyond it float16 says infinity, which viewers cannot show
    return np.clip(heat, -most, most).astype(np.float16)


def _mask_bytes(mask: NDArray[np.bool_]) -> bytes:
    body = io.BytesIO()
    Image.fromarray((mask * 255).astype(np.uint8)).save(body, "PNG")
    return body.getvalue()


def _write(folder: str, name: str, body: bytes) -> str:
    path = f"{folder.rstrip('/')}/{name}"
    where, _, last = path.rpartition("/")
    files.put(where, last, body, flushed=False)  # what a crash takes, the run does again
    return path


# ------------------------------------------------------------------------------------------------- COCO


def coco_line(result: Result) -> bytes:
    """One image and its regions as a line of JSON, before numbers are given out."""
    regions = [] if result.error else coco_annotations(result)
    image = {"file_name": as_text(result.path), "width": result.width, "height": result.height}
    return json.dumps({"image": image, "regions": regions}).encode() + b"\n"


def coco_annotations(result: Result) -> list[dict[str, Any]]:
    """What COCO calls so, for each of ``result.regions``: box, area, score and polygons, in original pixels."""
    if result.grid is None or not result.regions:
        return []
    regions = connected(result.grid, (result.height, result.width), result.threshold_region)
    scale = np.array([result.width, result.height]) / regions.label_HW.shape[::-1]
    return [
        {
            "bbox": (region.x, region.y, region.width, region.height), "area": region.area, "score": region.score,
            "segmentation": [(outline * scale).round(2).ravel().tolist() for outline in outlines(regions, i)],
        }
        for i, region in zip(strongest(regions), result.regions, strict=True)
    ]  # fmt: skip


def write_coco(parts: Callable[[], Iterable[bytes]], out: Path) -> None:
    """Lines of `coco_line` to one COCO file, without holding them: images in a first pass, regions in a second.

    ``parts`` gives all the lines, many at a time, and is called twice.
    """
    with replacing(out) as file:
        file.write(_COCO_HEAD)
        for number, line in _lines(parts()):
            _write_value(file, number, {"id": number, **line["image"]})
        file.write(b'], "annotations": [')
        count = 0
        for number, line in _lines(parts()):
            for region in line["regions"]:
                count += 1
                fixed = {"id": count, "image_id": number, "category_id": 1, "iscrowd": 0}
                _write_value(file, count, {**fixed, **region})
        file.write(b"]}\n")


def is_own_coco(path: Path) -> bool:
    """Whether a file is one of `write_coco`."""
    with path.open("rb") as file:
        return file.read(len(_COCO_HEAD)) == _COCO_HEAD


def _lines(parts: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    return enumerate((json.loads(line) for part in parts for line in part.splitlines()), start=1)


def _write_value(file: IO[bytes], number: int, value: dict[str, Any]) -> None:
    file.write(f"{',' if number > 1 else ''}\n{json.dumps(value)}".encode())
