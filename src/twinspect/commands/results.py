"""What commands share: reading data, outputs that are refused before the work, and reports written after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinspect import bundle, data
from twinspect.console import Console
from twinspect.data import Loaded
from twinspect.errors import ConfigError, listed
from twinspect.files import refuse_unwritable, write_text
from twinspect.metrics import METRICS
from twinspect.report import FORMATS, Report

if TYPE_CHECKING:
    from twinspect.bundle import Fitted

MASK_RULE, MAP_SIZE = "> 0", "original image"

Rows = Mapping[str, Mapping[str, Any]]  # values by the name of a class, split or score


def read_data(path: Path, layout: str, images: Path | None, console: Console) -> Loaded:
    """A data set, and what was found in it to the console. Raises as `data.load`."""
    loaded = data.load(path, layout, images)
    console.say(*loaded.summary())
    return loaded


def warn_of(fitted: Fitted, console: Console) -> None:
    """Say what training noticed, and which images it left out."""
    console.warn(*fitted.record["notes"])
    for skipped in fitted.skipped:
        console.warn(f"left out {skipped.path}: {skipped.reason}")


def checked_model(out: Path | None, instead: Path) -> Path:
    """Where a model is written: ``out``, or ``instead`` where none is named. Refused before any work is done."""
    path = out or instead
    bundle.refuse_unwritable(path)
    if out is not None and out.suffix != bundle.SUFFIX:
        example = out.with_name(f"{out.stem}{bundle.SUFFIX}")
        raise ConfigError(f"--out {out}: a model's file ends in {bundle.SUFFIX}; type --out {example}")
    return path


def check_outputs(reports: Iterable[Path], json_file: str = "", option: str = "--report") -> None:
    """Refuse, before any work is done, files that could not be written or that would replace another program's."""

    def names_us(path: Path) -> bool:
        return b"twinspect" in path.read_bytes()

    for path in reports:
        if path.suffix.lower() not in FORMATS:
            example = path.with_suffix(".md") if path.name else "results.md"
            raise ConfigError(f"{option} {path}: accepted endings are {', '.join(FORMATS)}; type {option} {example}")
        refuse_unwritable(path, option, ours=names_us)
    if json_file not in ("", "-"):
        refuse_unwritable(Path(json_file), "--json", ours=names_us)


def shows_pictures(reports: Iterable[Path]) -> bool:
    """Whether one of the reports asked for can show pictures."""
    return any(path.suffix.lower() == ".html" for path in reports)


def publish(report: Report, options: Any, console: Console) -> None:
    """Print a report, and write what a command's ``--json`` and ``--report`` ask for."""
    console.say(*report.lines())
    target = getattr(options, "json_file", "")
    if target == "-":
        console.result(report.json().rstrip())
    elif target:
        write_text(Path(target), report.json())
    for path in options.report:
        console.say(f"wrote {report.write(path)}")


def metric_rows(rows: Rows, first: str = "class") -> list[dict[str, Any]]:
    """Rows for `Table.of`: their name, then metrics in the order of all tables."""
    return [{first: name, **dict.fromkeys(METRICS), **row} for name, row in rows.items()]


def mean_of(rows: Rows) -> dict[str, float]:
    """Mean of every metric over the rows that have it."""
    columns: dict[str, list[float]] = defaultdict(list)
    for name in sorted(rows):
        for metric, value in rows[name].items():
            columns[metric].append(value)
    return {metric: sum(values) / len(values) for metric, values in columns.items()}


def grouped(sentences: Iterable[str], classes: Iterable[str]) -> list[str]:
    """Sentences that differ in the class they begin with only, joined: ``a, b: text``."""
    names, owners = set(classes), defaultdict(list)
    for sentence in sentences:
        owner, _, text = sentence.partition(": ")
        if owner in names:
            owners[text].append(owner)
        else:
            owners[sentence] = []
    return [f"{listed(owner)}: {text}" if owner else text for text, owner in owners.items()]
