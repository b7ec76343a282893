"""``twinspect calibrate``: new thresholds into a bundle, and thresholds as a table.

``drift``: do the predictions of a table still look like the calibration images?
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from twinspect import data
from twinspect.bundle import keep_old, read_bundle, signature_file, write_bundle
from twinspect.commands.options import CalibrateOptions, DriftOptions
from twinspect.commands.results import check_outputs, checked_model, number_in, publish, read_data
from twinspect.console import Console
from twinspect.data.tables import parts_in, read_table
from twinspect.decide.decision import EVERY, HAND, LABELS, Decision, Rule, promises
from twinspect.decide.drift import NONE, DriftMonitor
from twinspect.decide.recalibrate import Scored, good_samples, recalibrate, score_images, sessions
from twinspect.errors import ConfigError, DataError
from twinspect.report import MOST_CHARTS, Histogram, Report, Section, Table

_NOTE = (
    "false alarms: share of the next good images, taken like these, that will be called bad. called bad: how many of "
    "the good images here the threshold calls bad."
)


def calibrate(options: CalibrateOptions, console: Console) -> None:
    """New thresholds into a bundle; the model stays as it is."""
    refuse_contradictions(options)
    out, name = checked_model(options.out, options.model), options.class_name or None
    check_outputs(options.report, options.json_file)
    content = read_bundle(options.model)
    before = Decision.from_dict(content.meta["decision"])
    good, labelled = _logged(options, before, console) if options.from_log else _scored(options, console)
    for scored in (good, labelled):
        if scored is not None:
            console.warn(*(f"left out {failure}" for failure in scored.failed))
    max_fpr, unsure = options.unsure or (options.max_fpr, None)
    rule = options.rule or "f1-max"
    after, notes = recalibrate(before, good, labelled, max_fpr, unsure, name, options.add, rule, options.miss_cost)
    console.warn(*notes)
    meta = {k: v for k, v in content.meta.items() if k not in ("format", "twinspect")}
    unchanged = out == options.model and after.to_dict() == meta["decision"]
    meta["decision"] = after.to_dict()
    meta["record"] = {**meta["record"], "images": {**meta["record"]["images"], "calibration": len(after.good)}}
    if not unchanged:
        if not options.force and (note_of_old := keep_old(out)):
            console.warn(note_of_old)
        if signature_file(options.model).is_file():
            console.warn(f"the new thresholds are not signed; type: twinspect sign {out} --key KEY")
        write_bundle(out, meta, content.tensors, content.memory)
    title = f"Calibration of {options.model.name}"
    facts = {"model": after.model_id, "calibration images": str(len(after.good))}
    left_out = sessions(after)
    values = {"model_id": after.model_id, "classes": class_values(after), "sessions": left_out, "notes": notes}
    publish(Report(title, sections(after, left_out, notes), facts, values), options, console)
    console.say(f"nothing changes, {out} is as it was" if unchanged else f"wrote {out}")


def refuse_contradictions(options: CalibrateOptions) -> None:
    """A ConfigError for options that say different things, or nothing."""
    unsure, rule, labelled = options.unsure, options.rule, options.labels is not None or bool(options.from_log)
    if options.from_log and (options.good is not None or options.labels is not None):
        raise ConfigError("--from-log brings good and labelled images itself; leave GOOD and --labels out")
    if options.since and not options.from_log:
        raise ConfigError("--since has no effect without --from-log")
    if unsure is not None and options.max_fpr not in (None, unsure[0]):
        raise ConfigError(
            f"--max-fpr {options.max_fpr:g} and --unsure {unsure[0]:g} {unsure[1]:g} say different things: the first "
            "rate of --unsure is the one of good images called bad; leave --max-fpr out"
        )
    if options.miss_cost != 1.0 and rule != "min-cost":
        raise ConfigError(f"--miss-cost {options.miss_cost:g} has no effect without --rule min-cost")
    if rule and not labelled:
        raise ConfigError("--rule chooses thresholds on labelled images; name them with --labels FILE")


def _logged(options: CalibrateOptions, decision: Decision, console: Console) -> tuple[Scored | None, Scored | None]:
    """Good images of an inspection log, and labelled ones where a rule shall choose by them."""
    from twinspect.server import refuse_missing

    refuse_missing()
    from twinspect.server.log import InspectionLog, learn

    with closing(InspectionLog(options.from_log, create=False)) as log:
        good, labelled, notes = learn(log, decision, options.since, options.class_name or None)
    console.warn(*notes)
    return good, labelled if options.rule else None


def _scored(options: CalibrateOptions, console: Console) -> tuple[Scored | None, Scored | None]:
    """Good and labelled images with scores, each None if not given; the model is built only if it is needed."""
    if options.good is None and options.labels is None:
        return None, None
    from twinspect.detector import Detector

    predictor, name = Detector.load(options.model).predictor(), options.class_name or None
    predictor.decision.checked_class(name)
    good = labelled = None
    if options.good is not None:
        loaded = read_data(options.good, options.layout, options.images, console)
        good = score_images(predictor, good_samples(loaded.samples), name, console.progress)
    if options.labels is not None:
        samples = [s for s in data.load(options.labels, "auto", options.images).samples if s.label is not None]
        if (kinds := {s.label for s in samples}) != {0, 1}:
            raise DataError(
                f"{options.labels}: {len(samples)} labelled images, of {'one kind only' if kinds else 'no kind'}; "
                "good images (label 0) and defects (label 1) are needed, such as a CSV with the columns image, label"
            )
        labelled = score_images(predictor, samples, name, console.progress)
    return good, labelled


def sections(decision: Decision, left_out: Sequence[dict[str, Any]], notes: Sequence[str]) -> list[Section]:
    """A calibration: thresholds, sessions where there are some, promises, scores, and remarks."""
    shown = [threshold_section(decision)]
    if left_out:
        note = "What a threshold from the other sessions would do on this one: the promise does not cross days."
        shown.append(Section("Sessions", (), (Table.of("each session left out", left_out, note),)))
    charts = [
        Histogram(f"Scores of good images: {name}", {name: decision.good.score[of_class]}, rule.image.value)
        for name, rule in promises(decision)
        if (of_class := decision.good.of_class(rule.class_name, given=True)).any()
    ]
    words = tuple(f"{name}: {rule.sentence()}." for name, rule in promises(decision))
    return [
        *shown,
        Section("What is promised", words, printed=False),
        Section("Scores", (), tuple(charts[:MOST_CHARTS])),
        *([Section("Remarks", tuple(notes), printed=False)] if notes else []),
    ]


# ---------------------------------------------------------------------------------------------- thresholds as a table


def class_values(decision: Decision) -> dict[str, dict[str, Any]]:
    """What is to be said of every class's threshold, and of all classes together, ready for JSON."""
    rows = {}
    for name, rule in promises(decision):
        score = decision.good.score[decision.good.of_class(rule.class_name, given=True)]
        rows[name] = {
            "images": len(score),
            "threshold": rule.image.value,
            "rule": rule.basis,
            "called": int((score >= rule.image.value).sum()),
            "false_alarms": false_alarms(rule),
            "max_fpr": rule.image.max_fpr,
            "guaranteed": rule.image.guaranteed,
            "threshold_unsure": rule.unsure.value if rule.unsure is not None else None,
            "threshold_region": rule.region.value if rule.region is not None else None,
            "sentence": rule.sentence(),
        }
    return rows


def threshold_section(decision: Decision) -> Section:
    """A table with a row for each class, and what the thresholds that were chosen on labels were chosen by."""
    chosen = (f"{name}: {rule.image.sentence}" for name, rule in promises(decision) if rule.basis == LABELS)
    rows = [
        {
            "class": name, "good images": row["images"], "unsure from": row["threshold_unsure"],
            "threshold": row["threshold"], "false alarms": row["false_alarms"], "called bad": row["called"],
        }
        for name, row in class_values(decision).items()
    ]  # fmt: skip
    note = f"{_NOTE} all classes: for a class without good images of its own." if len(rows) > 1 else _NOTE
    return Section("Thresholds", tuple(chosen), (Table.of("Thresholds by class", rows, note),))


def false_alarms(rule: Rule) -> str:
    """Share of the next good images that will be called bad, as far as the images behind a rule can say."""
    if rule.basis == LABELS:
        return "chosen on labelled images"
    if rule.basis == HAND:
        return HAND
    if rule.basis == EVERY:
        return "unknown: no good image of this class"
    if len(rule.scores) == 1:
        return "unknown: one good image"
    return f"about {100 * rule.image.max_fpr:g} %" if rule.image.guaranteed else f"about 1 in {len(rule.scores) + 1}"


_COLUMNS = ("score", "predicted_class", "class_name", "cluster_distance", "model_id", "error")


def drift(options: DriftOptions, console: Console) -> None:
    """Watch the predictions of one or more tables, in their order."""
    check_outputs(options.report, options.json_file)
    decision = Decision.from_dict(read_bundle(options.model).meta["decision"])
    monitor = DriftMonitor(decision.good, options.false_alarm_rate)
    scores, left_out = array("d"), 0
    for path in options.tables:
        for row in read_predictions(path, decision.model_id):
            score, distance = (number_in(row.get(name)) for name in ("score", "cluster_distance"))
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
    chart = Histogram("Scores of calibration and of the predictions", groups)
    heading = "No drift" if report.kind == NONE else report.kind.capitalize()
    facts = {"images": str(report.images), "chance of a false alarm": f"at most {100 * report.false_alarm_rate:g} %"}
    sections = [Section(heading, (report.message,), (chart,))]
    publish(Report(f"Drift of {options.model.name}", sections, facts, asdict(report)), options, console)


def read_predictions(path: Path, model_id: str) -> Iterator[dict[str, Any]]:
    """Rows of a table (or a folder of parts) that ``twinspect predict`` wrote with a model, a few at a time."""
    if not path.is_file() and not parts_in(path):
        raise DataError(f"no such table: {path}. Make one with: twinspect predict MODEL IMAGES --out {path}")
    for number, row in enumerate(read_table(path, _COLUMNS, "surrogateescape")):
        if number == 0 and "score" not in row:
            raise DataError(f"{path} has no column score; give a table written by twinspect predict")
        if row.get("model_id") not in (None, "", model_id):
            raise DataError(
                f"{path}: its scores come from another model (id {row['model_id']}, the bundle's is {model_id}) and "
                f"cannot be compared. Type: twinspect predict MODEL IMAGES --out {path.name}"
            )
        yield row
