"""What thresholds made of images, for reports: other thresholds, score histograms, ROC curves, pictures.

A `Review` is shown the rows of a table one by one. It keeps numbers of all images, and names of the few to picture.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.charts import Histogram, LineChart, Series
from twinspect.inference.result import Result
from twinspect.metrics import roc_curve
from twinspect.report import Cases, Section, Table, case_of

FACTORS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)  # of the thresholds in use, that are looked at
_KEPT = 6  # pictures of a kind and class
_MOST_CHARTS = 12  # classes that get charts
_UNKNOWN = -1
Again = Callable[[list[str]], Iterable[Result]]


class Review:
    """Gathers rows as `Result.row` gives them, with ``label`` and ``true_class`` where the truth is known.

    Args:
        pooled: one name for all classes; empty keeps them apart.
    """

    def __init__(self, pooled: str = "") -> None:
        self.pooled, self.errors = pooled, 0
        self._columns: dict[str, tuple[array[float], array[float], array[float]]] = {}
        self._shown: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)

    def add(self, row: Mapping[str, Any]) -> None:
        """Look at one row; one without a score is counted as an error."""
        score, threshold = (_number(row.get(name)) for name in ("score", "threshold"))
        if row.get("error") or not np.isfinite(score):
            self.errors += 1
            return
        name = self.pooled or str(row.get("true_class") or row.get("class_name") or "")
        label = int(row.get("label", _UNKNOWN))
        columns = self._columns.setdefault(name, (array("d"), array("d"), array("d")))
        for column, value in zip(columns, (score, threshold, label), strict=True):
            column.append(value)
        for kind, rank in _kinds(score - threshold, label):
            ranked = self._shown[kind, name]
            insort(ranked, (rank, str(row["path"])))
            del ranked[_KEPT:]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted(self._columns)

    def columns(self, name: str = "") -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Scores, thresholds and labels (-1: unknown) of a class, or of all images."""
        names = [name] if name else self.classes
        parts = [np.concatenate([np.asarray(self._columns[n][i], float) for n in names]) for i in range(3)]
        return parts[0], parts[1], parts[2].astype(np.int64)

    def other_thresholds(self) -> dict[str, Any]:
        """What thresholds other than those in use would do to these images, ready for JSON.

        Returns:
            ``all``: one row for each of `FACTORS`, by which every threshold is multiplied. ``classes``: of every
            class with both labels, the lowest threshold without a false alarm and the highest without a miss.
        """
        if not self._columns:
            return {"all": [], "classes": {}}
        score, threshold, label = self.columns()
        rows = []
        for factor in FACTORS if bool((threshold > 0).all()) else (1.0,):
            called = score >= factor * threshold
            counts = {"called": called, "false_alarms": called & (label == 0), "missed": ~called & (label == 1)}
            rows.append({"factor": factor, **{key: int(one.sum()) for key, one in counts.items()}})
        return {"all": rows, "classes": {name: limits for name in self.classes if (limits := self._limits(name))}}

    def _limits(self, name: str) -> dict[str, Any]:
        score, threshold, label = self.columns(name)
        good, bad = score[label == 0], score[label == 1]
        if not len(good) or not len(bad):
            return {}
        highest, lowest = float(np.nextafter(good.max(), np.inf)), float(bad.min())
        return {
            "in_use": float(np.median(threshold)),
            "without_false_alarms": {"threshold": highest, "missed": int((bad < highest).sum())},
            "without_misses": {"threshold": lowest, "false_alarms": int((good >= lowest).sum())},
            "good": len(good),
            "defects": len(bad),
        }

    def answers(self) -> Table:
        """Images and how many of them are called anomalous, by class."""
        rows = []
        for name in [*self.classes, *([""] if len(self.classes) > 1 else [])]:
            score, threshold, _ = self.columns(name)
            called = int((score >= threshold).sum())
            rows.append((name or "all", len(score), called, f"{100 * called / len(score):.1f}"))
        return Table("answers", ("class", "images", "called anomalous", "%"), tuple(rows))

    def sections(self, again: Again | None) -> list[Section]:
        """Other thresholds, the pictures that matter, scores and ROC curves.

        Args:
            again: scores images once more, with map and pixels, by their names; None leaves the pictures out.
        """
        if not self._columns:
            return []
        words = "A threshold chosen from this table does better on these images than on others: they chose it."
        shown = [Section("Other thresholds", (words,), tuple(self._threshold_tables()))]
        if again is not None and self._shown:
            shown.append(Section("Pictures", (), tuple(self._pictures(again))))
        charts = tuple(chart for name in self.classes[:_MOST_CHARTS] for chart in self._charts(name))
        more = len(self.classes) - _MOST_CHARTS
        return [*shown, Section("Scores", (f"{more} more classes are not drawn.",) if more > 0 else (), charts)]

    def _threshold_tables(self) -> Iterator[Table]:
        other = self.other_thresholds()
        _, _, label = self.columns()
        totals = {"called": len(label), "false_alarms": int((label == 0).sum()), "missed": int((label == 1).sum())}
        counted = ["called"] if totals["called"] and not totals["false_alarms"] + totals["missed"] else []
        counted += [key for key in ("false_alarms", "missed") if totals[key]]
        words = {"called": "called anomalous", "false_alarms": "false alarms", "missed": "missed"}
        rows = tuple(
            (
                f"{row['factor']:g} x{' (in use)' if row['factor'] == 1 else ''}",
                *(t for k in counted for t in (f"{row[k]} of {totals[k]}", f"{100 * row[k] / totals[k]:.1f}")),
            )
            for row in other["all"]
        )
        columns = [text for key in counted for text in (words[key], f"{words[key]}, %")]
        yield Table("every threshold multiplied", ("threshold", *columns), rows)
        if other["classes"]:
            body = []
            for name, one in other["classes"].items():
                none, every = one["without_false_alarms"], one["without_misses"]
                misses, alarms = f"{none['missed']} of {one['defects']}", f"{every['false_alarms']} of {one['good']}"
                body.append((name, one["in_use"], none["threshold"], misses, every["threshold"], alarms))
            head = ("class", "in use", "no false alarm from", "misses then", "no miss up to", "false alarms then")
            yield Table("limits of each class", head, tuple(body))

    def _pictures(self, again: Again) -> Iterator[Cases]:
        names = list(dict.fromkeys(name for ranked in self._shown.values() for _, name in ranked))
        results = {result.path: result for result in again(names) if not result.error}
        for (kind, name), ranked in sorted(self._shown.items()):
            shown = [results[path] for _, path in ranked if path in results]
            if shown:
                title = f"{kind}: {name}" if len(self._columns) > 1 else kind
                yield Cases(title, tuple(case_of(one, name) for one in shown), shown[0].scale)

    def _charts(self, name: str) -> Iterator[Histogram | LineChart]:
        score, threshold, label = self.columns(name)
        kinds = {"good": 0, "defects": 1, "images": _UNKNOWN}
        groups = {kind: score[label == value] for kind, value in kinds.items() if (label == value).any()}
        yield Histogram(f"Scores: {name}", "score", groups, float(np.median(threshold)))
        if {"good", "defects"} <= groups.keys():
            known = label != _UNKNOWN
            alarms, hits, _ = roc_curve(score[known], label[known])
            called = score >= threshold
            works_at = (float(called[label == 0].mean()), float(called[label == 1].mean()))
            yield LineChart(
                f"ROC: {name}", "good images called anomalous", "defects found", (Series(name, alarms, hits),),
                marks=(("threshold in use", *works_at),),
            )  # fmt: skip


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


def _number(value: Any) -> float:
    return float("nan") if value in (None, "") else float(value)
