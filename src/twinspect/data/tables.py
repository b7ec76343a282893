"""Read the small files that list images: JSON, JSON lines, CSV. Errors name the file and the row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twinspect.data.names import BAD, GOOD, UNSORTED, meaning
from twinspect.errors import DataError
from twinspect.files import open_text, read_text
from twinspect.types import CALIBRATION, TEST, TRAIN

_SEPARATORS = ",;\t|"
_NOTHING = ("", "nan", "none", "null", "na", "n/a", "<na>", "nat", "-")


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); copy it again from its source") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON-lines file, each with its place for error messages.

    One JSON list of objects is read as well, and a comma after an object, as both are easily made from the other.
    """
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            entries = None  # the line that is wrong is named when lines are read
        if entries is not None:
            yield from objects_of(entries, str(path))
            return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip(" \t\r,"):
            where = f"{path} line {number}"
            yield where, json_object(line, where)


def json_object(line: str, where: str) -> dict[str, Any]:
    """The object of one line of JSON lines; a comma may follow it."""
    try:
        entry = json.loads(line.rstrip(" \t\r\n,"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); one object a line is needed") from None
    return as_object(entry, where)


def csv_rows(path: Path, errors: str = "strict") -> Iterator[dict[str, str]]:
    """Rows of a table of text with a header, as text, one at a time; missing cells are empty.

    Cells lie between commas, semicolons, tabs or ``|``, as in the header, or as Excel's line ``sep=;`` above it says.

    Raises:
        DataError: not text, or quotes or separators that make other rows of it than were meant.
    """
    with _opened(path, errors) as (reader, separator):
        line = reader.line_num if reader.fieldnames else 0
        try:
            while (row := next(reader, None)) is not None:
                _refuse_misread(row, separator, f"{path} line {line + 1}")
                line = reader.line_num
                yield {(name or "").strip(): value for name, value in row.items() if name is not None}
        except csv.Error as error:
            where = f"{path} line {line + 1}"
            raise DataError(f"{where}: not valid CSV ({error}); a quote is missing, or too many") from None


def csv_header(path: Path) -> list[str]:
    """Names of the columns of a table of text. Raises as `csv_rows`."""
    with _opened(path, "strict") as (reader, _):
        return [name.strip() for name in reader.fieldnames or ()]


@contextmanager
def _opened(path: Path, errors: str) -> Iterator[tuple[csv.DictReader[str], str]]:
    """A table of text, and what lies between its cells."""
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
            yield csv.DictReader(file, restval="", strict=True, delimiter=separator), separator
    except csv.Error as error:
        raise DataError(f"{path} line 1: not valid CSV ({error}); a quote is missing, or too many") from None
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


def is_empty(cell: Any) -> bool:
    """Whether a cell holds nothing: also not-a-number, and what other tools write for it."""
    return cell is None or cell != cell or (isinstance(cell, str) and cell.strip().lower() in _NOTHING)


def split_of(word: Any, where: str) -> str:
    """Our name of a split from the word a list uses."""
    split = meaning(str(word)).split
    if not split:
        raise DataError(f"{where}: split is {word!r}; accepted: {TRAIN}, {CALIBRATION} (or validation), {TEST}")
    return split


def label_of(value: Any, where: str) -> int | None:
    """0, 1 or None from a cell: a number, its text, a word such as OK or NG (`names.meaning`), or empty."""
    if is_empty(value):
        return None
    text = str(value).strip().lower()
    if text in ("0", "1", "0.0", "1.0", "true", "false"):
        return int(text in ("1", "1.0", "true"))
    role = meaning(str(value)).role
    if role == UNSORTED:
        return None
    if role not in (GOOD, BAD):
        raise DataError(
            f"{where}: label is {value!r}; accepted: 0 or OK (normal), 1 or NG (anomaly), empty (unknown)"
        )
    return int(role == BAD)


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
