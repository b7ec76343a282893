"""Read the small files that list images: JSON, JSON lines, CSV. Errors name the file and the row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twinspect.data.scan import ScanLog, inside
from twinspect.errors import DataError

MISSING = "listed, but there is no such file"


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    text = _text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); copy it again from its source") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON-lines file, each with its place for error messages."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON ({error}); one object a line is needed") from None
            yield where, as_object(entry, where)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header, as text; missing cells are empty."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), restval="", strict=True)
    try:
        return [{(key or "").strip(): value for key, value in row.items() if key is not None} for row in reader]
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: not valid CSV ({error})") from None


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


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
