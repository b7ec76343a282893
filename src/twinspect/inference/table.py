"""Rows of results as Parquet, CSV or JSON lines: the columns, parts of a table as bytes and as one file, and back."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import IO, Any

from twinspect.data.tables import read_table, table_columns
from twinspect.errors import ConfigError, TwinspectError
from twinspect.files import replacing
from twinspect.inference.result import CELLS, columns

_GROUP = 16_384  # rows of a row group in a joined Parquet file
FORMATS = (".parquet", ".csv", ".jsonl")
TABLES = (".parquet", ".csv", ".tsv", ".jsonl")  # that are read


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
    with replacing(out) as file:
        if out.suffix == ".parquet":
            _join_parquet(parts, file)
            return
        if out.suffix == ".csv":
            file.write((",".join(column.name for column in columns()) + "\r\n").encode())
        file.writelines(parts)


def as_text(value: str) -> str:
    """A file's name as every format can hold it: bytes that are no text are written as hexadecimal numbers."""
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")


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


# ------------------------------------------------------------------------------------------- and back again


def is_own(path: Path) -> bool:
    """Whether a file is a table of predictions."""
    return has_columns(path, {"path", "score"})


def has_columns(path: Path, names: AbstractSet[str]) -> bool:
    """Whether a file is a table with these columns, and perhaps others."""
    try:
        return names <= set(columns_of(path))
    except TwinspectError:
        return False


def columns_of(path: Path) -> list[str]:
    """Names of a table's columns, of JSON lines those of the first one; a DataError where it is no table."""
    return table_columns(path, "surrogateescape")


def parts_in(folder: Path) -> list[Path]:
    """Parts of a table that were written to a folder, in their order."""
    return sorted(folder.glob("part-*.parquet"))


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet, CSV or JSON-lines table, or of a folder of parts, a few at a time.

    Of a Parquet file no more is read than the ``columns`` that are named, of those that it has. A DataError where it
    cannot be read as a table, a ConfigError for another kind of file.
    """
    if path.is_dir():
        for part in parts_in(path):
            yield from read_rows(part, columns)
        return
    if path.suffix.lower() not in TABLES:
        raise ConfigError(f"{path.name}: accepted tables end in {', '.join(TABLES)}")
    yield from read_table(path, columns or None, "surrogateescape")
