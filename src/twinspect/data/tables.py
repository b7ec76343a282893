"""Read the files that list images: JSON, JSON lines, CSV, Parquet. Errors name the file and the row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from twinspect.errors import NONSENSE, DataError
from twinspect.files import open_text, read_text

SUFFIXES = (".parquet", ".csv", ".tsv", ".txt", ".jsonl")  # of tables
IMAGE_COLUMNS = ("img", "image")  # of Parquet files that hold encoded images
Row = dict[str, Any]
_SEPARATORS = ",;\t|"
_NOTHING = ("", "nan", "none", "null", "na", "n/a", "<na>", "nat", "-")


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); copy it again from its source") from None


def table_columns(path: Path, errors: str = "strict") -> list[str]:
    """Names of a table's columns; none where text has no row. Arguments and errors as of `read_table`."""
    if path.suffix.lower() == ".parquet":
        return list(parquet_columns(path))
    return list(next(read_table(path, errors=errors), {}))


def has_columns(path: Path, names: AbstractSet[str]) -> bool:
    """Whether a file is a table with these columns, and perhaps others."""
    try:
        return names <= set(table_columns(path, "surrogateescape"))
    except DataError:
        return False


def parts_in(folder: Path) -> list[Path]:
    """Parts of a table that ``twinspect predict --out DIR/`` has written, in their order."""
    return sorted(folder.glob("part-*.parquet"))


def _holds_text(path: Path, column: str) -> bool:
    """Whether a column of bytes holds text, as programs write it that do not say so in Parquet (Spark's binary)."""
    with _parquet_errors(path):
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches(1, columns=[column]):  # images are large: one at a time
            if cell := batch.to_pylist()[0][column]:
                with suppress(AttributeError, UnicodeDecodeError):  # AttributeError: of Hugging Face's pairs
                    return bool(cell.decode().isprintable())
                return False
    return False


def read_table(path: Path, columns: Sequence[str] | None = None, errors: str = "strict") -> Iterator[Row]:
    """Rows of Parquet, of JSON lines, or of a table of text with a header, a few at a time; a DataError for others.

    A folder of the parts of a table is read as one. Of a Parquet file no more is read than the ``columns`` that are
    named, of those that it has. ``errors`` says what happens to text that is not UTF-8, as in `open`.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        for part in parts_in(path):
            yield from read_table(part, columns)
    elif suffix == ".parquet":
        with _parquet_errors(path):
            import pyarrow.parquet as pq

            file = pq.ParquetFile(path)
            names = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(1024, columns=names):
                yield from batch.to_pylist()
    elif suffix == ".jsonl":
        yield from (row for _, row in read_json_lines(path))
    elif suffix in SUFFIXES:
        yield from _csv_rows(path, errors)
    else:
        raise DataError(f"{path}: a table of images ends in {', '.join(SUFFIXES)}")


def table_rows(path: Path) -> list[tuple[str, Row]]:
    """All rows of a table, and where each stands: row 1 is the first below the header.

    Images that a Parquet file holds itself become records of it.
    """
    kinds = parquet_columns(path) if path.suffix.lower() == ".parquet" else {}
    text = [name for name, kind in kinds.items() if "binary" not in kind or _holds_text(path, name)]
    rows = [
        {name: cell.decode("utf-8", "replace") if isinstance(cell, bytes) else cell for name, cell in row.items()}
        for row in read_table(path, text)
    ]
    if not rows:
        raise DataError(f"{path}: holds no row")
    if any("binary" in kinds.get(name, "") for name in IMAGE_COLUMNS):
        rows = [{**row, "image": path.name, "record": number} for number, row in enumerate(rows)]
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def parquet_columns(path: Path | str, file: Any = None) -> dict[str, str]:
    """Column names and types of a Parquet file, from its header; of ``file`` where it was opened."""
    with _parquet_errors(path):
        import pyarrow.parquet as pq

        return {field.name: str(field.type) for field in pq.read_schema(file or path)}


def parquet_table(path: Path, columns: list[str]) -> Any:
    """Columns of a Parquet file as an Arrow table."""
    with _parquet_errors(path):
        import pyarrow.parquet as pq

        return pq.read_table(path, columns=columns)


@contextmanager
def _parquet_errors(path: Path | str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow; type: pip install pyarrow") from None
    except (OSError, NotImplementedError, *NONSENSE) as error:  # pyarrow's errors are of these kinds
        raise DataError(f"{path}: not a Parquet file, or damaged; it cannot be read as a table ({error})") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON-lines file, each with its place for error messages.

    One JSON list of objects is read as well, and a comma after an object, as both are easily made from the other.
    """
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
        if first.lstrip().startswith("["):
            entries = None
            with suppress(ValueError, RecursionError):  # the line that is wrong is named when lines are read
                entries = json.loads(first + file.read())
            if entries is not None:
                yield from objects_of(entries, str(path))
                return
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if line.strip(" \t\r\n,"):
                where = f"{path} line {number}"
                try:
                    entry = json.loads(line.rstrip(" \t\r\n,"))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where}: not valid JSON ({error}); one object a line is needed") from None
                yield where, as_object(entry, where)


def _csv_rows(path: Path, errors: str) -> Iterator[dict[str, str]]:
    """Rows of a table of text with a header, as text, one at a time; missing cells are empty.

    Cells lie between commas, semicolons, tabs or ``|``, as in the header, or as Excel's line ``sep=;`` above it says.
    A DataError where quotes or separators make other rows of it than were meant.
    """
    line = 0
    try:
        with open_text(path, errors, newline="") as file:
            start, first = 0, file.readline()
            while first and not first.strip():
                start, first = file.tell(), file.readline()
            if first.lower().startswith("sep=") and len(first.rstrip("\r\n")) == 5:
                separator = first[4]
            else:
                separator = max(_SEPARATORS, key=first.count)  # of equals, and of none, the comma
                file.seek(start)
            reader = csv.DictReader(file, restval="", strict=True, delimiter=separator)
            line = reader.line_num if reader.fieldnames else 0
            while (row := next(reader, None)) is not None:
                _refuse_misread(row, separator, f"{path} line {line + 1}")
                line = reader.line_num
                yield {(name or "").strip(): value for name, value in row.items() if name is not None}
    except csv.Error as error:
        where = f"{path} line {line + 1}"
        raise DataError(f"{where}: not valid CSV ({error}); a quote is missing, or too many") from None


def _refuse_misread(row: Mapping[str | None, Any], separator: str, where: str) -> None:
    """Rows that a stray quote has joined, and cells that a separator in a name has cut."""
    if any(row.get(None) or ()):
        raise DataError(f"{where}: more cells than the header has; put a name that holds {separator!r} into quotes")
    for cell in row.values():
        lines = cell.splitlines() if isinstance(cell, str) else ()
        if len(lines) > 1 and max(line.count(separator) for line in lines) >= len(row) - 1:
            raise DataError(f"{where}: not valid CSV (one cell holds several rows); a quote is missing, or too many")


def is_empty(cell: Any) -> bool:
    """Whether a cell holds nothing: also not-a-number, and what other tools write for it."""
    return cell is None or cell != cell or (isinstance(cell, str) and cell.strip().lower() in _NOTHING)


def as_object(value: Any, where: str) -> dict[str, Any]:
    """The value if it is a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: {str(value)[:60]!r} is not an object of names and values")
    return value


def objects_of(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list, each with its place for error messages."""
    if not isinstance(value, list):
        raise DataError(f"{where}: {str(value)[:60]!r} is not a list")
    for number, entry in enumerate(value, start=1):
        yield f"{where} row {number}", as_object(entry, f"{where} row {number}")
