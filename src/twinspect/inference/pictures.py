"""Files beside the table: raw maps, masks, overlays, regions for COCO tools, and MVTec AD 2's submission folders."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.errors import ConfigError, DataError, check_range
from twinspect.files import replacing
from twinspect.inference import stores
from twinspect.inference.regions import connected, outlines, region_mask, strongest
from twinspect.inference.table import as_text

if TYPE_CHECKING:
    from twinspect.inference.result import Result

MAP_FORMATS, OVERLAY_FORMATS = ("npz", "tiff"), {"jpg": "JPEG", "png": "PNG"}
MOST_SIDE = 65_000  # of a JPEG
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_COCO_HEAD = b'{"categories": [{"id": 1, "name": "anomaly"}], "images": ['
_MVTEC_SPLIT = re.compile(r"test_(public|private|private_mixed)")


@dataclass(frozen=True, slots=True)
class PictureOptions:
    """What to write beside the table; an empty folder name writes nothing.

    Attributes:
        maps: folder for raw maps in the image's own size (float16).
        map_format: ``npz`` or ``tiff``.
        masks: folder for PNG masks, 255 in the regions.
        overlays: folder for pictures of the image under its map, with its regions and answer.
        overlay_format: ``jpg`` or ``png``.
        overlay_side: longest side of these in pixels; 0: the image's own.
        submission: folder for MVTec AD 2's two trees of maps and masks.
        coco: whether regions are kept for a COCO file.
    """

    maps: str = ""
    map_format: str = "npz"
    masks: str = ""
    overlays: str = ""
    submission: str = ""
    coco: bool = False
    overlay_format: str = "jpg"
    overlay_side: int = 1600

    def __post_init__(self) -> None:
        if self.overlay_format not in OVERLAY_FORMATS:
            raise ConfigError(f"--overlay-format {self.overlay_format}: accepted {' or '.join(OVERLAY_FORMATS)}")
        check_range("--overlay-side", self.overlay_side, 0, MOST_SIDE)
        if self.map_format not in MAP_FORMATS:
            raise ConfigError(f"--map-format {self.map_format}: accepted {' or '.join(MAP_FORMATS)}")
        if (self.maps and self.map_format == "tiff") or self.submission:
            _tifffile()

    @property
    def wants_files(self) -> bool:
        """Whether there are files for each image."""
        return bool(self.maps or self.masks or self.overlays or self.submission)

    def places(self) -> Iterator[tuple[str, str]]:
        """The option of every folder that is written, with a file as it is written there."""
        for name, file in (
            ("maps", f"000000-000000_a.{self.map_format}"), ("masks", "000000-000000_a.png"),
            ("overlays", f"000000-000000_a.{self.overlay_format}"), ("submission", "anomaly_images.tiff"),
        ):  # fmt: skip
            if folder := getattr(self, name):
                yield f"--{name}", f"{folder.rstrip('/')}/{file}"

    @property
    def wants_maps(self) -> bool:
        """Whether any of them needs the anomaly map."""
        return self.wants_files or self.coco

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Annotation(NamedTuple):
    """What COCO calls an annotation: box (x, y, width, height), area, score and polygons, in original pixels."""

    bbox: tuple[int, int, int, int]
    area: int
    score: float
    segmentation: list[list[float]]


def save_pictures(result: Result, options: PictureOptions, unit: int, index: int) -> None:
    """Write an image's files and note their paths in the result.

    Names are ``UNIT-INDEX_STEM``, so that any name inside an archive is harmless and two equal names stay apart.

    Raises:
        DataError: a submission of images that do not lie in MVTec AD 2's folders.
        TwinspectError: a file cannot be written.
    """
    if result.error or not options.wants_files:
        return
    stem = f"{unit:06d}-{index:06d}_{_UNSAFE.sub('_', PurePosixPath(result.path).stem)[:80]}"
    heat = result.map if options.maps or options.submission else None
    if heat is not None and options.maps:
        result.map_path = _write(options.maps, f"{stem}.{options.map_format}", _map_bytes(heat, options.map_format))
    if result.grid is not None and options.masks:
        inside = region_mask(result.grid, (result.height, result.width), _threshold(result))
        result.mask_path = _write(options.masks, f"{stem}.png", _mask_bytes(inside))
    if heat is not None and options.submission:
        place = submission_place(result.path)
        result.map_path = _write(options.submission, f"anomaly_images/{place}.tiff", _tiff(heat, compressed=False))
        mask = _mask_bytes(heat >= _threshold(result))
        result.mask_path = _write(options.submission, f"anomaly_images_thresholded/{place}.png", mask)
    if options.overlays:
        body = io.BytesIO()
        kind = options.overlay_format
        result.overlay(side=options.overlay_side).save(body, OVERLAY_FORMATS[kind], quality=90)
        _write(options.overlays, f"{stem}.{kind}", body.getvalue())


def submission_place(path: str) -> str:
    """``OBJECT/SPLIT/.../STEM`` of an image of MVTec AD 2.

    Raises:
        DataError: the path has no ``OBJECT/test_...`` in it.
    """
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
            "twinspect calibrate BUNDLE GOOD --region-fpr 0.01"
        )
    return result.threshold_region


def _map_bytes(heat: NDArray[np.float32], kind: str) -> bytes:
    if kind == "tiff":
        return _tiff(heat, compressed=True)
    body = io.BytesIO()
    np.savez_compressed(body, map=_half(heat))
    return body.getvalue()


def _half(heat: NDArray[np.float32]) -> NDArray[np.float16]:
    most = float(np.finfo(np.float16).max)  # beyond it float16 says infinity, which viewers cannot show
    return np.clip(heat, -most, most).astype(np.float16)


def _tiff(heat: NDArray[np.float32], compressed: bool) -> bytes:
    body = io.BytesIO()
    _tifffile().imwrite(body, _half(heat), compression="zlib" if compressed else None)
    return body.getvalue()


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise ConfigError(
            "float16 TIFF needs tifffile; type: pip install tifffile, or take --map-format npz"
        ) from None
    return tifffile


def _mask_bytes(mask: NDArray[np.bool_]) -> bytes:
    body = io.BytesIO()
    Image.fromarray((mask * 255).astype(np.uint8)).save(body, "PNG")
    return body.getvalue()


def _write(folder: str, name: str, body: bytes) -> str:
    path = f"{folder.rstrip('/')}/{name}"
    where, _, last = path.rpartition("/")
    stores.put(where, last, body, flushed=False)  # what a crash takes, the run does again
    return path


# ------------------------------------------------------------------------------------------------- COCO


def coco_line(result: Result) -> bytes:
    """One image and its regions as a line of JSON, before numbers are given out."""
    regions = [] if result.error else [one._asdict() for one in coco_regions(result)]
    image = {"file_name": as_text(result.path), "width": result.width, "height": result.height}
    return json.dumps({"image": image, "regions": regions}).encode() + b"\n"


def coco_regions(result: Result) -> list[Annotation]:
    """Regions of a result with their pixels, in the order of ``result.regions``."""
    if result.grid is None or not result.regions:
        return []
    regions = connected(result.grid, (result.height, result.width), result.threshold_region)
    scale = np.array([result.width, result.height]) / regions.label_HW.shape[::-1]
    return [
        Annotation(
            (one.x, one.y, one.width, one.height),
            one.area,
            one.score,
            [(outline * scale).round(2).ravel().tolist() for outline in outlines(regions, i)],
        )
        for i, one in zip(strongest(regions), result.regions, strict=True)
    ]


def write_coco(parts: Callable[[], Iterable[bytes]], out: Path) -> None:
    """Lines of `coco_line` to one COCO file, without holding them: images in a first pass, regions in a second.

    Args:
        parts: gives all the lines, many at a time; called twice.
        out: file to write.

    Raises:
        TwinspectError: the file cannot be written.
    """
    with replacing(out) as file:
        file.write(_COCO_HEAD)
        _comma_separated(file, ({"id": number, **line["image"]} for number, line in _lines(parts())))
        file.write(b'], "annotations": [')
        _comma_separated(file, _annotations(parts()))
        file.write(b"]}\n")


def is_own_coco(path: Path) -> bool:
    """Whether a file is one of `write_coco`."""
    with path.open("rb") as file:
        return file.read(len(_COCO_HEAD)) == _COCO_HEAD


def _lines(parts: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    return enumerate((json.loads(line) for part in parts for line in part.splitlines()), start=1)


def _annotations(parts: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    number = 0
    for image, line in _lines(parts):
        for region in line["regions"]:
            number += 1
            yield {"id": number, "image_id": image, "category_id": 1, "iscrowd": 0, **region}


def _comma_separated(file: IO[bytes], values: Iterable[dict[str, Any]]) -> None:
    for number, value in enumerate(values):
        file.write((("," if number else "") + "\n" + json.dumps(value)).encode())
