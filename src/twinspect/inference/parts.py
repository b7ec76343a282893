"""Finished parts of a table in a folder: written whole or not at all, so that a killed run goes on. No torch.

The input is cut into units (so many listed images, or one archive) and units into parts of at most so many rows. A
part's file name says its place, its counts and the digest of its unit: names, sizes and times of change of its files.
That is the whole journal: what is there is done, what is not there is done again, and another digest means that the
input has changed.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from twinspect import files
from twinspect.errors import ConfigError, DataError, OutputError
from twinspect.inference.result import CELLS, columns
from twinspect.types import as_text

_NAME = re.compile(r"part-(\d{8})-(\d{6})-(\d+)-(\d+)-(\d+)-([0-9a-f]{16})(\.\w+)")
_RUN, _LOCK, _COCO, _DONE = "_run.json", "_lock", "_coco-", "_SUCCESS"  # readers of Parquet folders pass over "_..."
_MOST_BYTES = 1 << 40
_GROUP = 16_384  # rows of a row group in a joined Parquet file
FORMATS = (".parquet", ".csv", ".jsonl")
Place = tuple[int, int]


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

    def look(self, share: tuple[int, int]) -> None:
        """Find the parts that are there of a share of the units: its number, and of how many."""
        parts = (Part.of(name) for name in files.names(self.folder))
        self.known = {part.place: part for part in parts if part is not None and part.unit % share[1] == share[0]}

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
