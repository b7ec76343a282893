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

from twinspect.errors import ConfigError, DataError, TwinspectError
from twinspect.files import replacing
from twinspect.inference.result import components, pixels_of
from twinspect.inference.table import as_text

if TYPE_CHECKING:
    from twinspect.inference.result import Result

MAP_FORMATS = ("npz", "tiff")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_COCO_HEAD = b'{"categories": [{"id": 1, "name": "anomaly"}], "images": ['
_MVTEC_SPLIT = re.compile(r"test_(public|private|private_mixed)")


@dataclass(frozen=True, slots=True)
class PictureOptions:
    """What to write beside the table; an empty folder name writes nothing.

    Attributes:
        maps: folder for raw maps in the image's own size (float16).
        map_format: ``npz`` or ``tiff``.
        masks: folder for PNG masks, 255 where the map reaches the region threshold.
        overlays: folder for pictures of the image under its map.
        submission: folder for MVTec AD 2's two trees of maps and masks.
        coco: whether regions are kept for a COCO file.
    """

    maps: str = ""
    map_format: str = "npz"
    masks: str = ""
    overlays: str = ""
    submission: str = ""
    coco: bool = False

    def __post_init__(self) -> None:
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
            ("overlays", "000000-000000_a.png"), ("submission", "anomaly_images.tiff"),
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
    """What COCO calls an annotation: box (x, y, width, height), area, score and run lengths, in original pixels."""

    bbox: tuple[int, int, int, int]
    area: int
    score: float
    counts: list[int]


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
    heat = result.map if options.maps or options.masks or options.submission else None
    if heat is not None and options.maps:
        result.map_path = _write(options.maps, f"{stem}.{options.map_format}", _map_bytes(heat, options.map_format))
    if heat is not None and options.masks:
        result.mask_path = _write(options.masks, f"{stem}.png", _mask_bytes(heat, _threshold(result)))
    if heat is not None and options.submission:
        place = submission_place(result.path)
        result.map_path = _write(options.submission, f"anomaly_images/{place}.tiff", _tiff(heat, compressed=False))
        mask = _mask_bytes(heat, _threshold(result))
        result.mask_path = _write(options.submission, f"anomaly_images_thresholded/{place}.png", mask)
    if options.overlays:
        body = io.BytesIO()
        result.overlay().save(body, "PNG")
        _write(options.overlays, f"{stem}.png", body.getvalue())


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


def _mask_bytes(heat: NDArray[np.float32], threshold: float) -> bytes:
    body = io.BytesIO()
    Image.fromarray(((heat >= threshold) * 255).astype(np.uint8)).save(body, "PNG")
    return body.getvalue()


def _write(folder: str, name: str, body: bytes) -> str:
    """A file under a folder or URL; its path. A kill may leave it cut, and its image is then done again."""
    from twinspect.inference import remote

    if remote.is_url(folder):
        inner = PurePosixPath(name)
        remote.put(
            str(folder).rstrip("/") + ("" if inner.parent.name == "" else f"/{inner.parent}"), inner.name, body
        )
        return f"{folder.rstrip('/')}/{name}"
    target = Path(folder) / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(body)
    except OSError as error:
        raise TwinspectError(f"{target} cannot be written ({error.strerror or error})") from None
    return str(target)


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
    from twinspect.inference.result import resized_for_regions

    heat = resized_for_regions(result.grid, (result.height, result.width))
    regions = components(heat >= result.threshold_region, heat)
    order = np.argsort(-regions.peak, kind="stable")[: len(result.regions)]
    pairs = zip(order.tolist(), result.regions, strict=True)
    return [
        Annotation(
            (one.x, one.y, one.width, one.height),
            one.area,
            one.score,
            run_lengths(*_in_original(pixels_of(regions, i), heat.shape, result), (result.height, result.width)),
        )
        for i, one in pairs
    ]


def _in_original(
    pixels: tuple[NDArray[np.int64], NDArray[np.int64]], shape: tuple[int, ...], result: Result
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of a region of a smaller map, in the image's own pixels (nearest neighbour)."""
    rows, columns = pixels
    if shape == (result.height, result.width):
        return rows, columns
    top, left = int(rows.min()), int(columns.min())
    mask = np.zeros((int(rows.max()) - top + 1, int(columns.max()) - left + 1), dtype=np.bool_)
    mask[rows - top, columns - left] = True
    y = (np.arange(result.height) + 0.5) * shape[0] / result.height
    x = (np.arange(result.width) + 0.5) * shape[1] / result.width
    y, x = y.astype(np.int64), x.astype(np.int64)
    kept_y = np.flatnonzero((y >= top) & (y < top + mask.shape[0]))
    kept_x = np.flatnonzero((x >= left) & (x < left + mask.shape[1]))
    inner = np.nonzero(mask[np.ix_(y[kept_y] - top, x[kept_x] - left)])
    return kept_y[inner[0]], kept_x[inner[1]]


def run_lengths(rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int]) -> list[int]:
    """COCO's uncompressed run lengths: zeros and ones in turn, down the columns, zeros first."""
    place = np.sort(columns * shape[0] + rows)
    breaks = np.flatnonzero(np.diff(place) != 1)
    starts = place[np.concatenate([[0], breaks + 1]).astype(np.int64)]
    stops = place[np.concatenate([breaks, [len(place) - 1]]).astype(np.int64)] + 1
    edges = np.stack([starts, stops], 1).ravel()
    counts = np.diff(np.concatenate([[0], edges, [shape[0] * shape[1]]]))
    return [int(c) for c in (counts[:-1] if counts[-1] == 0 else counts)]


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
        size = [line["image"]["height"], line["image"]["width"]]
        for region in line["regions"]:
            number += 1
            counts = region.pop("counts")
            rle = {"size": size, "counts": counts}
            yield {"id": number, "image_id": image, "category_id": 1, "iscrowd": 0, **region, "segmentation": rle}


def _comma_separated(file: IO[bytes], values: Iterable[dict[str, Any]]) -> None:
    for number, value in enumerate(values):
        file.write((("," if number else "") + "\n" + json.dumps(value)).encode())
