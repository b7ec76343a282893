"""Tables of numbers for people and machines: text for the terminal, Markdown, HTML and JSON by suffix."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twinspect._version import __version__
from twinspect.console import Console
from twinspect.errors import ConfigError, listed
from twinspect.files import refuse_unwritable, write_text
from twinspect.metrics import METRICS
from twinspect.report import Section, Table, write_report

SUFFIXES = (".md", ".html", ".json")
WRITER = f"twinspect {__version__}"
MASK_RULE, MAP_SIZE = "> 0", "original image"

Rows = Mapping[str, Mapping[str, float]]


def check_outputs(reports: Iterable[Path], json_file: str = "", option: str = "--report") -> None:
    """Refuse, before any work is done, files that could not be written or that would replace another program's.

    Args:
        reports: results files; the suffix is their format.
        json_file: file for the values alone; ``-`` and empty are none.
        option: that names the reports.

    Raises:
        ConfigError: no permission, another program's file, or another suffix than .md, .html or .json.
    """
    for path in reports:
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(
                f"{option} {path}: accepted endings are {', '.join(SUFFIXES)}; type {option} "
                f"{path.with_suffix('.md') if path.name else 'results.md'}"
            )
        refuse_unwritable(path, option, ours=_names_us)
    if json_file not in ("", "-"):
        refuse_unwritable(Path(json_file), "--json", ours=_names_us)


def _names_us(path: Path) -> bool:
    return b"twinspect" in path.read_bytes()


def write_results(
    path: Path, title: str, sections: Sequence[Section], facts: Mapping[str, str], values: Mapping[str, Any]
) -> Path:
    """Write ``values`` as JSON, or facts and sections as Markdown or self-contained HTML, atomically.

    Raises:
        ConfigError: another suffix than .md, .html or .json.
        TwinspectError: the file cannot be written.
    """
    check_outputs([path])
    if path.suffix.lower() == ".html":
        return write_report(path, title, sections, facts)
    if path.suffix.lower() == ".json":
        return write_json(path, values)
    return write_text(path, markdown(title, sections, {**facts, "written by": WRITER}))


def write_json(path: Path, values: Mapping[str, Any]) -> Path:
    """Write values as JSON, with who wrote them."""
    return write_text(path, json.dumps({**values, "written_by": WRITER}, indent=1, ensure_ascii=False) + "\n")


def publish_json(target: str, values: Mapping[str, Any], console: Console) -> None:
    """What ``--json`` asks for: ``-`` prints the values, empty does nothing."""
    if target == "-":
        console.result(json.dumps({**values, "written_by": WRITER}, indent=1))  # ASCII, which every code page takes
    elif target:
        write_json(Path(target), values)


def markdown(title: str, sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """Facts, paragraphs and tables as GitHub Markdown; charts and pictures are for HTML only."""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items())]
    for section in sections:
        lines += ["", f"## {section.title}"]
        for text in section.text:
            lines += ["", text]
        for part in section.parts:
            if isinstance(part, Table):
                lines += ["", *_markdown_table(part)]
    return "\n".join(lines) + "\n"


def metric_table(title: str, rows: Rows, mean: Mapping[str, float], note: str = "", first: str = "class") -> Table:
    """One row a class (or split), then the mean; a metric that is undefined is a dash."""
    every = {**rows, "mean": mean}
    found = list(dict.fromkeys(metric for row in every.values() for metric in row))
    names = [metric for metric in METRICS if metric in found] + [metric for metric in found if metric not in METRICS]
    body = tuple((name, *(row.get(metric, "-") for metric in names)) for name, row in every.items())
    return Table(title, (first, *names), body, note)


def text_table(table: Table) -> Iterator[str]:
    """A table as aligned lines for the terminal."""
    rows = [[_cell(value) for value in row] for row in (table.columns, *table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    yield table.title
    for row in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        yield "  ".join(["", f"{row[0]:<{widths[0]}}", *cells])


def mean_of(rows: Rows) -> dict[str, float]:
    """Mean of every metric over the rows that have it."""
    columns: dict[str, list[float]] = defaultdict(list)
    for name in sorted(rows):
        for metric, value in rows[name].items():
            columns[metric].append(value)
    return {metric: sum(values) / len(values) for metric, values in columns.items()}


def grouped(sentences: Iterable[str], classes: Iterable[str]) -> list[str]:
    """Sentences that differ in their first name only, joined: ``a, b: text`` and ``mean of m, n is over ...``."""
    names, owners = sorted(classes, key=len, reverse=True), defaultdict(list)
    for sentence in sentences:
        owner = next((name for name in names if sentence.startswith(f"{name}: ")), "")
        mean = None if owner else re.match(r"mean of (\S+) (?=is over )", sentence)
        if owner:
            owners["{}: " + sentence.removeprefix(f"{owner}: ")].append(owner)
        elif mean:
            owners["mean of {} " + sentence[mean.end() :]].append(mean[1])
        else:
            owners[sentence] = []
    return [text.replace("{}", listed(found), 1) if found else text for text, found in owners.items()]


def _markdown_table(table: Table) -> Iterator[str]:
    yield f"**{table.title}**"
    yield ""
    yield _markdown_row(table.columns)
    numeric = (any(not isinstance(row[i], str) for row in table.rows) for i in range(len(table.columns)))
    yield "|" + "".join("--:|" if number else "---|" for number in numeric)
    for row in table.rows:
        yield _markdown_row(row)
    if table.note:
        yield ""
        yield table.note


def _markdown_row(row: Sequence[str | int | float]) -> str:
    return "| " + " | ".join(_cell(value).replace("|", "\\|") for value in row) + " |"


def _cell(value: str | int | float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
