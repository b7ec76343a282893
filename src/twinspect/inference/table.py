"""Rows of results as Parquet, CSV or JSON lines: the columns, one part of a table as bytes, and parts to one file."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from twinspect.errors import ConfigError, TwinspectError

_GROUP = 16_384  # rows of a row group in a joined Parquet file
_TYPES = {
    "path": "string", "class_name": "string", "score": "double", "score_local": "double",
    "score_semantic": "double", "p_joint": "double", "p_value": "double", "threshold": "double", "margin": "double",
    "threshold_unsure": "double", "answer": "string", "is_anomaly": "bool", "predicted_class": "string",
    "class_p": "double", "unknown_class": "bool", "prototype_distance": "double", "peak": "double",
    "threshold_region": "double", "n_regions": "int32", "max_region_area": "int64", "regions": "string",
    "width": "int32", "height": "int32", "map_path": "string", "mask_path": "string", "model_id": "string",
    "ms": "double", "error": "string",
}  # fmt: skip
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
    columns = {name: _plain([row[name] for row in rows], kind) for name, kind in _TYPES.items()}
    if suffix == ".parquet":
        return _parquet(columns)
    text = io.StringIO(newline="")
    lines = zip(*columns.values(), strict=True)
    if suffix == ".csv":
        csv.writer(text).writerows(lines)
    else:
        text.writelines(json.dumps(dict(zip(_TYPES, line, strict=True))) + "\n" for line in lines)
    return text.getvalue().encode("utf-8")


def join(parts: Iterable[bytes], out: Path) -> None:
    """Parts to one file, a group at a time; the file appears under its name when it is whole.

    Raises:
        TwinspectError: the folder cannot be written.
    """
    draft = out.with_name(f"{out.name}.part")
    try:
        with draft.open("wb") as file:
            _join_parquet(parts, file) if out.suffix == ".parquet" else _join_text(parts, file, out.suffix)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, out)
    except OSError as error:
        raise TwinspectError(f"{out} cannot be written ({error.strerror or error})") from None


def _plain(values: list[Any], kind: str) -> list[Any]:
    """A column's values: no not-a-number, no text that a format cannot hold."""
    if kind == "double":
        return [None if value != value else value for value in values]
    return [as_text(value) for value in values] if kind == "string" else values


def as_text(value: str) -> str:
    """A file's name as every format can hold it: bytes that are no text are written as hexadecimal numbers."""
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")


def _schema() -> Any:
    import pyarrow as pa

    # pyarrow's own aliases: string, double, bool, int32, int64.
    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in _TYPES.items()])


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
        header = io.StringIO(newline="")
        csv.DictWriter(header, list(_TYPES)).writeheader()
        file.write(header.getvalue().encode())
    file.writelines(parts)
