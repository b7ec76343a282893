"""``twinspect drift``: do the predictions of a table still look like the calibration images?"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from twinspect.bundle import read_bundle
from twinspect.commands import results
from twinspect.commands.options import DriftOptions
from twinspect.console import Console
from twinspect.data.tables import parts_in, read_table
from twinspect.decide.decision import Decision
from twinspect.decide.drift import NONE, DriftMonitor
from twinspect.errors import DataError
from twinspect.report import Histogram, Report, Section

_COLUMNS = ("score", "predicted_class", "class_name", "cluster_distance", "model_id", "error")


def drift(options: DriftOptions, console: Console) -> None:
    """Watch the predictions of one or more tables, in their order."""
    results.check_outputs(options.report, options.json_file)
    decision = Decision.from_dict(read_bundle(options.bundle).meta["decision"])
    monitor = DriftMonitor(decision.good, options.false_alarm_rate)
    scores, left_out = array("d"), 0
    for path in options.tables:
        for row in read_predictions(path, decision.model_id):
            score, distance = _number(row.get("score")), _number(row.get("cluster_distance"))
            if row.get("error") or not np.isfinite(score):
                left_out += 1
                continue
            scores.append(score)
            monitor.update(score, str(row.get("predicted_class") or row.get("class_name") or ""), distance)
    if not monitor.images:
        raise DataError("the tables hold no scored image; nothing can be said about drift")
    if left_out:
        console.warn(f"{left_out} rows without a score were left out")
    report = monitor.report()
    groups = {"calibration": decision.good.score, "predictions": np.array(scores)}
    chart = Histogram("Scores of calibration and of the predictions", "score", groups)
    heading = "No drift" if report.kind == NONE else report.kind.capitalize()
    facts = {"images": str(report.images), "chance of a false alarm": f"at most {100 * report.false_alarm_rate:g} %"}
    sections = [Section(heading, (report.message,), (chart,))]
    results.publish(Report(f"Drift of {options.bundle.name}", sections, facts, report.to_dict()), options, console)


def read_predictions(path: Path, model_id: str) -> Iterator[dict[str, Any]]:
    """Rows of a table (or a folder of parts) that ``twinspect predict`` wrote with a model, a few at a time."""
    if not path.is_file() and not parts_in(path):
        raise DataError(f"no such table: {path}. Make one with: twinspect predict BUNDLE IMAGES --out {path}")
    for number, row in enumerate(read_table(path, _COLUMNS, "surrogateescape")):
        if number == 0 and "score" not in row:
            raise DataError(f"{path} has no column score; give a table written by twinspect predict")
        if row.get("model_id") not in (None, "", model_id):
            raise DataError(
                f"{path}: its scores come from another model (id {row['model_id']}, the bundle's is {model_id}) and "
                f"cannot be compared. Type: twinspect predict BUNDLE IMAGES --out {path.name}"
            )
        yield row


def _number(value: Any) -> float:
    try:
        return float("nan") if value in (None, "") else float(value)
    except (TypeError, ValueError):
        raise DataError(f"a score in the table is {value!r}, not a number") from None
