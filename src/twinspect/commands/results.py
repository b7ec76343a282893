"""What commands share: reading data, outputs that are refused before the work, and reports written after it.

A `Review` is shown the rows of a table one by one. It keeps numbers of all images, and names of the few to picture.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinspect import bundle, data
from twinspect.console import Console
from twinspect.data import Loaded
from twinspect.errors import ConfigError, DataError
from twinspect.files import refuse_unwritable, write_text
from twinspect.inference.result import Result
from twinspect.metrics import METRICS, roc_curve
from twinspect.report import FORMATS, MOST_CHARTS, Cases, Histogram, Report, RocCurve, Section, Table, case_of

if TYPE_CHECKING:
    from twinspect.bundle import Fitted

MASK_RULE, MAP_SIZE = "> 0", "original image"
FACTORS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)  # of the thresholds in use, that are looked at
_MOST_PICTURES = 6  # pictures of a kind and class
_MOST_NAMED = 20  # images that are not scored
_UNKNOWN = -1

Rows = Mapping[str, Mapping[str, Any]]  # values by the name of a class, split or score
Again = Callable[[list[str]], Iterable[Result]]  # scores images once more, with map and pixels, by their names


def read_data(path: Path, layout: str, images: Path | None, console: Console) -> Loaded:
    """A data set, and what was found in it to the console. Raises as `data.load`."""
    loaded = data.load(path, layout, images)
    console.say(*summary(loaded))
    return loaded


def summary(loaded: Loaded) -> Iterator[str]:
    """Counts per class, what was skipped and why, choices made."""
    counts, images = loaded.counts, len(loaded.samples)
    classes = "1 class" if len(counts) == 1 else f"{len(counts)} classes"
    title = f"{loaded.layout} at {loaded.root}: {classes}, {images:,} image{'' if images == 1 else 's'}"
    if len(counts) > 1:
        counts["total"] = data.ClassCounts(*map(sum, zip(*map(astuple, counts.values()), strict=True)))
    rows = [
        {"class": name, **{key.replace("_", " "): n for key, n in asdict(row).items() if n or key != "test_unknown"}}
        for name, row in counts.items()
    ]
    yield from Table.of(title, rows).lines()
    by_reason: dict[str, list[Path]] = defaultdict(list)
    for path, reason in loaded.skipped:
        by_reason[reason].append(path)
    for reason, paths in by_reason.items():
        yield f"skipped {len(paths):,}: {reason} ({'e.g. ' if len(paths) > 1 else ''}{paths[0]})"
    yield from (f"note: {text}" for text in loaded.notes)


def warn_of(fitted: Fitted, console: Console) -> None:
    """Say what training noticed, and which images it left out."""
    console.warn(*fitted.record["notes"])
    for skipped in fitted.skipped:
        console.warn(f"left out {skipped.path}: {skipped.reason}")


def checked_model(out: Path | None, instead: Path) -> Path:
    """Where a model is written: ``out``, or the model ``instead``. Refused before any work is done."""
    if out is None:
        if instead.is_file():  # who reads it next says so where it is no model
            refuse_unwritable(instead, "--out")
        return instead
    bundle.refuse_unwritable(out)
    if out.suffix != bundle.SUFFIX:
        example = out.with_name(f"{out.stem}{bundle.SUFFIX}")
        raise ConfigError(f"--out {out}: a model's file ends in {bundle.SUFFIX}; type --out {example}")
    return out


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


# ------------------------------------------------------------------------------ what thresholds made of many images


class Review:
    """Gathers rows as `Result.row` gives them, with ``label`` and ``true_class`` where the truth is known."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.errors = 0
        self._unread: list[str] = []  # the first of them: what is wrong
        self._numbers: dict[str, array[float]] = {}  # by class: score, threshold and label of every image in turn
        self._shown: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Look at one row; one without a score is counted as an error."""
        score, threshold = (number_in(row.get(name)) for name in ("score", "threshold"))
        if row.get("error") or not np.isfinite(score):
            self.errors += 1
            if len(self._unread) < _MOST_NAMED:
                self._unread.append(str(row.get("error") or row["path"]))
            return
        name = str(row.get("true_class") or row.get("class_name") or "")
        label = int(row.get("label", _UNKNOWN))
        self._numbers.setdefault(name, array("d")).extend((score, threshold, label))
        for kind, rank in _kinds(score - threshold, label):
            ranked = self._shown[kind, name]
            insort(ranked, (rank, str(row["path"])))
            del ranked[_MOST_PICTURES:]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted(self._numbers)

    def columns(self, *names: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Scores, thresholds and labels (-1: unknown) of some classes, or of all images."""
        parts = [np.asarray(self._numbers[name]) for name in names or self.classes]
        score, threshold, label = np.concatenate(parts).reshape(-1, 3).T
        return score, threshold, label.astype(np.int64)

    def other_thresholds(self) -> list[dict[str, Any]]:
        """What these images would become if every threshold were multiplied by each of `FACTORS`, ready for JSON."""
        if not self._numbers:
            return []
        score, threshold, label = self.columns()
        rows = []
        for factor in FACTORS if bool((threshold > 0).all()) else (1.0,):
            called = score >= factor * threshold
            counts = {"called": called, "false_alarms": called & (label == 0), "missed": ~called & (label == 1)}
            rows.append({"factor": factor, **{key: int(mask.sum()) for key, mask in counts.items()}})
        return rows

    def answers(self) -> Table:
        """Images and how many of them are called anomalous, by class and (of several) of all."""
        parts = {name: (name,) for name in self.classes} | ({"all": ()} if len(self.classes) > 1 else {})
        rows = []
        for name, names in parts.items():
            score, threshold, _ = self.columns(*names)
            called = int((score >= threshold).sum())
            rows.append((name, len(score), called, f"{100 * called / len(score):.1f}"))
        return Table("answers", ("class", "images", "called anomalous", "%"), tuple(rows))

    def sections(self, again: Again | None) -> list[Section]:
        """Other thresholds, scores and ROC curves, and the pictures that matter, if ``again`` scores images anew."""
        if not self._numbers:
            return []
        words = "A threshold chosen from this table does better on these images than on others: they chose it."
        shown = [Section("Other thresholds", (words,), (self._threshold_table(),), printed=False)]
        if again is not None and self._shown:
            shown.append(Section("Pictures", (), tuple(self._pictures(again))))
        charts = tuple(chart for name in self.classes[:MOST_CHARTS] for chart in self._charts(name))
        more = len(self.classes) - MOST_CHARTS
        text = (f"{more} more classes are not drawn.",) if more > 0 else ()
        return [*shown, Section("Scores", text, charts, printed=False)]

    def remarks(self) -> list[Section]:
        """The images without a score, of many the first ones."""
        lines = [f"not scored: {reason}" for reason in self._unread]
        if (more := self.errors - len(lines)) > 0:
            lines.append(f"not scored: {more:,} more")
        return [Section("Remarks", tuple(lines), printed=False)] if lines else []

    def _threshold_table(self) -> Table:
        _, _, label = self.columns()
        good, bad = int((label == 0).sum()), int((label == 1).sum())
        counted = {"false alarms": ("false_alarms", good), "missed": ("missed", bad)}
        if not good + bad:
            counted = {"called anomalous": ("called", len(label))}
        rows = []
        for row in self.other_thresholds():
            cells = {"threshold": f"{row['factor']:g} x{' (in use)' if row['factor'] == 1 else ''}"}
            for words, (key, total) in counted.items():
                if total:
                    cells |= {words: f"{row[key]} of {total}", f"{words}, %": f"{100 * row[key] / total:.1f}"}
            rows.append(cells)
        return Table.of("every threshold multiplied", rows)

    def _pictures(self, again: Again) -> Iterator[Cases]:
        names = list(dict.fromkeys(name for ranked in self._shown.values() for _, name in ranked))
        results = {result.path: result for result in again(names) if not result.error}
        for (kind, name), ranked in sorted(self._shown.items()):
            shown = [results[path] for _, path in ranked if path in results]
            if shown:
                title = f"{kind}: {name}" if len(self._numbers) > 1 else kind
                yield Cases(title, tuple(case_of(result, name) for result in shown), shown[0].scale)

    def _charts(self, name: str) -> Iterator[Histogram | RocCurve]:
        score, threshold, label = self.columns(name)
        kinds = {"good": 0, "defects": 1, "images": _UNKNOWN}
        groups = {kind: score[label == value] for kind, value in kinds.items() if (label == value).any()}
        yield Histogram(f"Scores: {name}", groups, float(np.median(threshold)))
        if {"good", "defects"} <= groups.keys():
            known = label != _UNKNOWN
            alarms, hits, _ = roc_curve(score[known], label[known])
            called = score >= threshold
            in_use = (float(called[label == 0].mean()), float(called[label == 1].mean()))
            yield RocCurve(f"ROC: {name}", alarms, hits, in_use)


def _kinds(margin: float, label: int) -> Iterator[tuple[str, float]]:
    """Under which headings a picture is worth showing, with its rank there: the lowest come first."""
    if label == _UNKNOWN:
        if margin >= 0:
            yield "Called anomalous, strongest first", -margin
        yield "Nearest to the threshold", abs(margin)
    elif label == 0 and margin >= 0:
        yield "False alarms, worst first", -margin
    elif label == 1 and margin < 0:
        yield "Missed defects, worst first", margin
    elif label == 1:
        yield "Defects found, clearest first", -margin


def number_in(value: Any) -> float:
    """A number of a table's cell; an empty one is not-a-number."""
    try:
        return float("nan") if value in (None, "") else float(value)
    except (TypeError, ValueError):
        raise DataError(f"a score in the table is {value!r}, not a number") from None
