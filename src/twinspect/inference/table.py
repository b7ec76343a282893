"""Rows of results as Parquet, CSV or JSON lines: the columns, parts of a table as bytes and as one file, and back."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from twinspect.data.tables import csv_rows, json_object
from twinspect.errors import ConfigError, DataError, TwinspectError
from twinspect.files import open_text, replacing
from twinspect.inference.result import CELLS, columns

_GROUP = 16_384  # rows of a row group in a joined Parquet file
OWN = frozenset({"path", "score"})  # what tells a table of predictions from others
FORMATS = (".parquet", ".csv", ".jsonl")


def check_format(suffix: str, name: str) -> None:
    """Refuse a table that could not be written.

    Raises:
        ConfigError: an ending that is none of the accepted ones, or Parquet without pyarrow.
    """
    if suffix not in FORMATS:
        raise ConfigError(
            f"--out {name}: accepted endings are {', '.join(FORMATS)}; a folder (DIR/) takes Parquet parts"
        )
    if suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"--out {name}: Parquet needs pyarrow; type: pip install pyarrow, or take .csv"
            ) from None


def encode(rows: Sequence[dict[str, Any]], suffix: str) -> bytes:
    """Rows of `Result.row` as one part: a Parquet file, or CSV or JSON lines without a header.

    Not-a-number becomes an empty cell, and names become what `as_text` makes of them.
    """
    cells = {name: _plain([row[name] for row in rows], kind) for name, kind in _kinds().items()}
    if suffix == ".parquet":
        return _parquet(cells)
    text = io.StringIO(newline="")
    lines = zip(*cells.values(), strict=True)
    if suffix == ".csv":
        csv.writer(text).writerows(lines)
    else:
        text.writelines(json.dumps(dict(zip(cells, line, strict=True))) + "\n" for line in lines)
    return text.getvalue().encode("utf-8")


def as_line(row: dict[str, Any], suffix: str) -> str:
    """One row for standard output, without the end of its line."""
    return encode([row], suffix).decode().rstrip("\r\n")


def csv_header() -> str:
    """First line of a CSV table, without its end."""
    return ",".join(_kinds())


def join(parts: Iterable[bytes], out: Path) -> None:
    """Parts to one file, a group at a time; the file appears under its name when it is whole.

    Raises:
        TwinspectError: the folder cannot be written.
    """
    with replacing(out) as file:
        _join_parquet(parts, file) if out.suffix == ".parquet" else _join_text(parts, file, out.suffix)


def _kinds() -> dict[str, str]:
    """Column -> type of its cells, by pyarrow's aliases."""
    return {column.name: CELLS[column.kind][0] for column in columns()}


def _plain(values: list[Any], kind: str) -> list[Any]:
    if kind == "double":
        return [None if value != value else value for value in values]
    return [as_text(value) for value in values] if kind == "string" else values


def as_text(value: str) -> str:
    """A file's name as every format can hold it: bytes that are no text are written as hexadecimal numbers."""
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in _kinds().items()])


def _parquet(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    body = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_schema()), body)
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


def _join_text(parts: Iterable[bytes], file: IO[bytes], suffix: str) -> None:
    if suffix == ".csv":
        file.write(f"{csv_header()}\r\n".encode())
    file.writelines(parts)


# ------------------------------------------------------------------------------------------- and back again


def is_own(path: Path) -> bool:
    """Whether a file is a table of predictions."""
    return has_columns(path, OWN)


def has_columns(path: Path, names: AbstractSet[str]) -> bool:
    """Whether a file is a table with these columns, and perhaps others."""
    try:
        return names <= set(columns_of(path))
    except TwinspectError:
        return False


def columns_of(path: Path) -> list[str]:
    """Names of a table's columns; of JSON lines, those of the first one. None in an empty file.

    Raises:
        DataError: it cannot be read as a table.
    """
    if path.suffix.lower() == ".parquet":
        with _readable(path):
            import pyarrow.parquet as pq

            return [str(name) for name in pq.read_schema(path).names]
    return list(next(read_rows(path), {}))


def parts_in(folder: Path) -> list[Path]:
    """Parts of a table that were written to a folder, in their order."""
    return sorted(folder.glob("part-*.parquet"))


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet, CSV or JSON-lines table, or of a folder of parts, a few at a time.

    Args:
        path: file or folder.
        columns: all that is wanted, so that no more of a Parquet file is read; those that it lacks are left out.

    Raises:
        DataError: it cannot be read as a table.
        ConfigError: another kind of file.
    """
    if path.is_dir():
        for part in parts_in(path):
            yield from read_rows(part, columns)
        return
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix.lower() not in readers:
        raise ConfigError(f"{path.name}: accepted tables end in {', '.join(readers)}")
    with _readable(path):
        yield from readers[path.suffix.lower()](path, columns)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow; type: pip install pyarrow") from None
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:  # pyarrow's are of these kinds
        raise DataError(f"{path} cannot be read as a table ({error})") from None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = [name for name in columns if name in file.schema_arrow.names] if columns else None
    for batch in file.iter_batches(1024, columns=names):
        yield from batch.to_pylist()


def _csv_rows(path: Path, _columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    return csv_rows(path, "surrogateescape")


def _json_rows(path: Path, _columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip(" \t\r\n,"):
                yield json_object(line, f"{path} line {number}")
