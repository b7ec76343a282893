"""What commands share: reading data, and results as text for the terminal, Markdown, HTML or JSON."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinspect import data
from twinspect._version import __version__
from twinspect.console import Console
from twinspect.data import Loaded
from twinspect.errors import ConfigError, listed
from twinspect.files import refuse_unwritable, write_text
from twinspect.metrics import METRICS
from twinspect.report import Section, Table, write_report

if TYPE_CHECKING:
    from twinspect.bundle import Fitted

SUFFIXES = (".md", ".html", ".json")
WRITER = f"twinspect {__version__}"
MASK_RULE, MAP_SIZE = "> 0", "original image"

Rows = Mapping[str, Mapping[str, Any]]


def read_data(path: Path, layout: str, images: Path | None, console: Console) -> Loaded:
    """A data set, and what was found in it to the console. Raises as `data.load`."""
    loaded = data.load(path, layout, images)
    for line in loaded.summary():
        console.say(line)
    return loaded


def warn_of(fitted: Fitted, console: Console) -> None:
    """Say what training noticed, and which images it left out."""
    for note in fitted.record["notes"]:
        console.warn(note)
    for skipped in fitted.skipped:
        console.warn(f"left out {skipped.path}: {skipped.reason}")


def check_outputs(reports: Iterable[Path], json_file: str = "", option: str = "--report") -> None:
    """Refuse, before any work is done, files that could not be written or that would replace another program's."""

    def names_us(path: Path) -> bool:
        return b"twinspect" in path.read_bytes()

    for path in reports:
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(
                f"{option} {path}: accepted endings are {', '.join(SUFFIXES)}; type {option} "
                f"{path.with_suffix('.md') if path.name else 'results.md'}"
            )
        refuse_unwritable(path, option, ours=names_us)
    if json_file not in ("", "-"):
        refuse_unwritable(Path(json_file), "--json", ours=names_us)


def shows_pictures(reports: Iterable[Path]) -> bool:
    """Whether one of the reports asked for can show pictures."""
    return any(path.suffix.lower() == ".html" for path in reports)


def publish(
    options: Any, title: str, facts: Mapping[str, str], values: Mapping[str, Any], sections: Sequence[Section],
    console: Console,
) -> None:  # fmt: skip
    """Write what a command's ``--json`` and ``--report`` ask for; ``values`` are what JSON holds."""
    target = getattr(options, "json_file", "")
    if target == "-":
        console.result(json.dumps({**values, "written_by": WRITER}, indent=1))  # ASCII, which every code page takes
    elif target:
        write_json(Path(target), values)
    for path in options.report:
        write_results(path, title, sections, facts, values)
        console.say(f"wrote {path}")


def write_results(
    path: Path, title: str, sections: Sequence[Section], facts: Mapping[str, str], values: Mapping[str, Any]
) -> None:
    """Write ``values`` as JSON, or facts and sections as Markdown or self-contained HTML, atomically."""
    if path.suffix.lower() == ".html":
        write_report(path, title, sections, facts)
    elif path.suffix.lower() == ".json":
        write_json(path, values)
    else:
        write_text(path, markdown(title, sections, {**facts, "written by": WRITER}))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write values as JSON, with who wrote them."""
    write_text(path, json.dumps({**values, "written_by": WRITER}, indent=1, ensure_ascii=False) + "\n")


def markdown(title: str, sections: Sequence[Section], facts: Mapping[str, str]) -> str:
    """Facts, paragraphs and tables as GitHub Markdown; charts and pictures are for HTML only."""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items())]
    for section in sections:
        lines += ["", f"## {section.title}"]
        for text in section.text:
            lines += ["", text]
        for table in (part for part in section.parts if isinstance(part, Table)):
            head, *body = ([cell.replace("|", "\\|") for cell in row] for row in table.cells())
            rule = ["--:" if number else "---" for number in table.numeric()]
            lines += ["", f"**{table.title}**", "", f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|"]
            lines += [f"| {' | '.join(row)} |" for row in body]
            lines += ["", table.note] if table.note else []
    return "\n".join(lines) + "\n"


def metric_table(title: str, rows: Rows, first: str = "class") -> Table:
    """One row a class (or split, or score)."""
    names = [*METRICS, *sorted({metric for row in rows.values() for metric in row} - {*METRICS})]
    return Table.of(title, ({first: name, **{m: row.get(m) for m in names}} for name, row in rows.items()))


def text_table(table: Table) -> Iterator[str]:
    """A table as aligned lines for the terminal."""
    rows = table.cells()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield table.title
    for name, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join(["", f"{name:<{widths[0]}}", *cells])


def say_tables(tables: Iterable[Table], console: Console) -> None:
    """Print tables."""
    for table in tables:
        console.say("\n".join(text_table(table)))


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
    return [text.replace("{}", listed(group), 1) if group else text for text, group in owners.items()]
