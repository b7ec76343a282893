"""What a run of `predict` writes: rows in parts, and files beside them (maps, masks, overlays, COCO, submissions).

A part is written whole or not at all, so that a killed run goes on. The input is cut into units (so many listed
images, or one archive) and units into parts of at most so many rows. A part's file name says its place, its counts
and the digest of its unit: names, sizes and times of change of its files. That is the whole journal: what is there is
done, what is not there is done again, and another digest means that the input has changed. No torch.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect import files
from twinspect.errors import ConfigError, DataError, OutputError
from twinspect.inference.regions import connected, outlines, region_mask, strongest
from twinspect.inference.result import CELLS, Result, columns
from twinspect.types import as_text

if TYPE_CHECKING:
    from twinspect.inference.job import Job

_NAME = re.compile(r"part-(\d{8})-(\d{6})-(\d+)-(\d+)-(\d+)-([0-9a-f]{16})(\.\w+)")
_RUN, _LOCK, _COCO, _DONE = "_run.json", "_lock", "_coco-", "_SUCCESS"  # readers of Parquet folders pass over "_..."
_MOST_BYTES = 1 << 40
_GROUP = 16_384  # rows of a row group in a joined Parquet file
FORMATS = (".parquet", ".csv", ".jsonl")
Place = tuple[int, int]
_UNSAFE = re.compile(r"[^\w.-]+")  # letters of every language are harmless
_COCO_HEAD = b'{"categories": [{"id": 1, "name": "anomaly"}], "images": ['
_MVTEC_SPLIT = re.compile(r"test_(public|private|private_mixed)")


class Part(NamedTuple):
    """One finished part."""

    unit: int  # of the input
    sub: int  # number of the part in its unit
    rows: int
    bad: int  # anomalous images
    errors: int  # images that could not be read
    digest: str  # of the unit
    suffix: str  # format of the rows

    @property
    def place(self) -> Place:
        """Unit and part of it."""
        return self.unit, self.sub

    @property
    def name(self) -> str:
        """Its file name."""
        counts = f"{self.rows}-{self.bad}-{self.errors}"
        return f"part-{self.unit:08d}-{self.sub:06d}-{counts}-{self.digest}{self.suffix}"

    @classmethod
    def of(cls, name: str) -> Part | None:
        """Read back from a file name; None for any other file."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        unit, sub, rows, bad, errors = map(int, match.groups()[:5])
        return cls(unit, sub, rows, bad, errors, match[6], match[7])


@dataclass(slots=True)
class PartStore:
    """A folder of parts (path or URL); ``known`` are those that are there, by place, filled by `look`."""

    folder: str
    suffix: str
    share: tuple[int, int] = (0, 1)  # of the units: its number, and of how many
    known: dict[Place, Part] = field(default_factory=dict)

    def begin(self, settings: Mapping[str, Any], restart: bool) -> None:
        """Note what the run is of, or drop what is there with ``restart``.

        A ConfigError where what is there is of a run with other settings.
        """
        if restart:
            self.clear()
        if _RUN in files.names(self.folder):
            before = json.loads(self._read(_RUN))
            if other := sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key)):
                raise ConfigError(
                    f"{self.folder} holds an unfinished or finished run with another {', '.join(other)}; type the "
                    "same command again to go on with it, --restart to drop it, or take another --out"
                )
        else:
            files.put(self.folder, _RUN, json.dumps(dict(settings), indent=1).encode())

    def look(self) -> None:
        """Find the parts that are there of this share."""
        (number, of), parts = self.share, map(Part.of, files.names(self.folder))
        self.known = {part.place: part for part in parts if part is not None and part.unit % of == number}

    def of_unit(self, unit: int, digest: str) -> list[Part]:
        """Parts of a unit that are there, its first ones; a DataError where its images were others then."""
        parts: list[Part] = []
        while (part := self.known.get((unit, len(parts)))) is not None:
            parts.append(part)
        if any(part.digest != digest for part in parts):
            raise DataError(
                f"the images given are no longer those of the run in {self.folder} (part {unit}): files were added, "
                "removed, renamed or overwritten. Type --restart to score all of them anew, or take another --out"
            )
        return parts

    def put(self, part: Part, body: bytes, coco: bytes) -> None:
        """Keep a part for good, and before it the lines of its COCO file if there are some."""
        if coco:
            files.put(self.folder, _coco(part.place), coco)
        files.put(self.folder, part.name, body)

    def bodies(self) -> Iterator[bytes]:
        """Contents of the known parts in the order of their places."""
        return (self._read(self.known[place].name) for place in sorted(self.known))

    def coco_lines(self) -> Iterator[bytes]:
        """What was kept for the COCO file, in the same order."""
        return (self._read(_coco(place)) for place in sorted(self.known))

    def _read(self, name: str) -> bytes:
        return files.read(f"{self.folder.rstrip('/')}/{name}", _MOST_BYTES)

    def clear(self, all_of_it: bool = False) -> None:
        """Delete our own files, and the folder if ``all_of_it``; anything else in it stays."""
        ours = (_RUN, files.DRAFT, _COCO, _DONE, *([_LOCK] if all_of_it else []))
        for name in files.names(self.folder):
            if Part.of(name) is not None or name.startswith(ours):
                files.remove(self.folder, name)
        if all_of_it and not any(Path(self.folder).iterdir()):
            Path(self.folder).rmdir()

    def finish(self, label: str) -> None:
        """Leave a mark that everything is there, and sweep up drafts of killed runs."""
        files.put(self.folder, f"{_DONE}{label}", b"")
        for name in files.names(self.folder) if not label else ():
            if name.startswith(files.DRAFT):
                files.remove(self.folder, name)

    def lock(self, label: str) -> IO[str]:
        """Keep others from writing the same parts until the returned file is closed; local folders only."""
        if files.is_url(self.folder):
            return io.StringIO()
        if why := files.why_unwritable(Path(self.folder)):
            raise OutputError(f"{self.folder} cannot be written ({why})")
        busy = f"another run is writing {self.folder} now; wait for it, or take another --out"
        return files.lock(Path(self.folder) / f"{_LOCK}{label}", busy)


def _coco(place: Place) -> str:
    return f"{_COCO}{place[0]:08d}-{place[1]:06d}.jsonl"


# ----------------------------------------------------------------------------------------- rows as bytes


def encode(rows: Sequence[dict[str, Any]], suffix: str) -> bytes:
    """Rows of `Result.row` as one part: a Parquet file, or CSV or JSON lines without a header."""
    cells = [{name: as_text(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows]
    if suffix == ".parquet":
        return _parquet(cells)
    text = io.StringIO(newline="")
    if suffix == ".csv":
        csv.writer(text).writerows(row.values() for row in cells)
    else:
        text.writelines(json.dumps(row) + "\n" for row in cells)
    return text.getvalue().encode("utf-8")


def join(parts: Iterable[bytes], out: Path) -> None:
    """Parts to one file, a group at a time; the file appears under its name when it is whole."""
    with files.replacing(out) as file:
        if out.suffix == ".parquet":
            _join_parquet(parts, file)
            return
        if out.suffix == ".csv":
            file.write((",".join(column.name for column in columns()) + "\r\n").encode())
        file.writelines(parts)


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([(column.name, pa.type_for_alias(CELLS[column.kind][0])) for column in columns()])


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), body)
    return body.getvalue()


def _join_parquet(parts: Iterable[bytes], file: IO[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    held: list[Any] = []
    with pq.ParquetWriter(file, _schema()) as writer:
        for part in parts:
            held.append(pq.read_table(pa.BufferReader(part)))
            if sum(table.num_rows for table in held) >= _GROUP:
                writer.write_table(pa.concat_tables(held))
                held = []
        writer.write_table(pa.concat_tables([*held, _schema().empty_table()]))


# ------------------------------------------------------------------------------------- beside the table


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
    named = _UNSAFE.sub("_", PurePosixPath(result.path).stem).encode()[:80].decode(errors="ignore")
    stem = f"{unit:06d}-{index:06d}_{named}"
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
    with files.replacing(out) as file:
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
