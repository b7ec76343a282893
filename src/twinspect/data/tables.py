"""Read the small files that list images: JSON, JSON lines, CSV. Errors name the file and the row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twinspect.data.scan import ScanLog, inside
from twinspect.errors import DataError
from twinspect.files import open_text, read_text

MISSING = "listed, but there is no such file"


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); copy it again from its source") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON-lines file, each with its place for error messages."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON ({error}); one object a line is needed") from None
            yield where, as_object(entry, where)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header, as text; missing cells are empty. Raises as `csv_rows`."""
    return list(csv_rows(path))


def csv_rows(path: Path, errors: str = "strict") -> Iterator[dict[str, str]]:
    """As `read_csv`, a row at a time; cells are separated by commas, semicolons or tabs, as the header has them.

    Raises:
        DataError: not text, or quotes or separators that make other rows of it than were meant.
    """
    line = 0
    try:
        with open_text(path, errors, newline="") as file:
            separator = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.DictReader(file, restval="", delimiter=separator, strict=True)
            line = reader.line_num if reader.fieldnames else 0
            while (row := next(reader, None)) is not None:
                _refuse_misread(row, separator, f"{path} line {line + 1}")
                line = reader.line_num
                yield {(key or "").strip(): value for key, value in row.items() if key is not None}
    except csv.Error as error:
        raise DataError(f"{path} line {line + 1}: not valid CSV ({error}); a quote is missing, or too many") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None


def _refuse_misread(row: Mapping[str | None, Any], separator: str, where: str) -> None:
    """Rows that a stray quote has joined, and cells that a separator in a name has cut."""
    if any(row.get(None) or ()):
        raise DataError(f"{where}: more cells than the header has; put a name that holds {separator!r} into quotes")
    for cell in row.values():
        lines = cell.splitlines() if isinstance(cell, str) else ()
        if len(lines) > 1 and max(line.count(separator) for line in lines) >= len(row) - 1:
            raise DataError(f"{where}: not valid CSV (one cell holds several rows); a quote is missing, or too many")


def as_object(value: Any, where: str) -> dict[str, Any]:
    """The value if it is a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: {str(value)[:60]!r} is not an object of names and values")
    return value


def as_list(value: Any, where: str) -> list[Any]:
    """The value if it is a JSON list."""
    if not isinstance(value, list):
        raise DataError(f"{where}: {str(value)[:60]!r} is not a list")
    return value


def text_of(row: Mapping[str, Any], key: str, where: str) -> str:
    """A required text cell of a row."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} is {value!r}; a text is needed. Names found: {', '.join(row)}")
    return value.strip()


def listed_file(root: Path, text: str, where: str, log: ScanLog) -> Path | None:
    """File that a list names, or None with a log entry if it does not exist; outside ``root`` is an error."""
    path = inside(root, text, where)
    if path.is_file():
        return path
    log.skip(path, MISSING)
    return None
