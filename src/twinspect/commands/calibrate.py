"""``twinspect calibrate``: new thresholds into a bundle, and thresholds as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from twinspect import data
from twinspect.bundle import keep_old, read_bundle, refuse_unwritable, write_bundle
from twinspect.charts import Histogram
from twinspect.commands.options import CalibrateOptions
from twinspect.commands.results import check_outputs, publish, read_data, say_tables, text_table
from twinspect.console import Console
from twinspect.decide.decision import Decision, promises, refuse_other_model
from twinspect.decide.recalibrate import Request, Scored, good_samples, recalibrate, score_images, sessions
from twinspect.decide.rules import EVERY, HAND, LABELS, SESSIONS, Rule
from twinspect.errors import ConfigError, DataError
from twinspect.report import Section, Table
from twinspect.types import Sample

_MOST_CHARTS = 12
MOST_LINES = 8  # classes up to which every threshold is printed; twinspect info lists them all


def requested(options: CalibrateOptions) -> Request:
    """What shall change; zeros and empty texts were not typed.

    Raises:
        ConfigError: options that contradict each other, or a value that is not accepted.
    """
    max_fpr, unsure, group, rule = options.max_fpr, options.unsure, options.group, options.rule
    if max_fpr and any(unsure) and max_fpr != unsure[0]:
        raise ConfigError(
            f"--max-fpr {max_fpr:g} and --unsure {unsure[0]:g} {unsure[1]:g} say different things: the first rate of "
            "--unsure is the one of good images called bad; leave --max-fpr out"
        )
    if options.miss_cost and rule not in ("", "min-cost"):
        raise ConfigError(f"--miss-cost has no effect with --rule {rule}; it is for min-cost")
    return Request(
        max_fpr=unsure[0] if any(unsure) else max_fpr or None,
        unsure=unsure[1] if any(unsure) else None,
        region_fpr=options.region_fpr or None,
        class_name=options.class_name or None,
        by_group=group == "session" if group else None,
        add=options.add,
        rule=rule or ("min-cost" if options.miss_cost else ""),
        miss_cost=options.miss_cost or 1.0,
    )


def calibrate(options: CalibrateOptions, console: Console) -> None:
    """``twinspect calibrate``: new thresholds into a bundle; the model stays as it is."""
    asked, out = requested(options), options.out or options.bundle
    refuse_unwritable(out)
    check_outputs(options.report, options.json_file)
    _refuse_sources(options, asked)
    content = read_bundle(options.bundle)
    before = start = Decision.from_dict(content.meta["decision"])
    if options.source is not None:
        start = Decision.from_dict(read_bundle(options.source).meta["decision"])
        refuse_other_model(start, before.model_id, str(options.source))
    scored, labelled = (
        _from_log(options, asked, before, console) if options.from_log else _score(options, asked, console)
    )
    for failure in (*(scored.failed if scored else ()), *(labelled.failed if labelled else ())):
        console.warn(f"left out {failure}")
    after, notes = recalibrate(start, asked, scored, labelled)
    for note in notes:
        console.warn(note)
    meta = {k: v for k, v in content.meta.items() if k not in ("format", "twinspect")}
    meta["decision"] = after.to_dict()
    meta["record"] = {**meta["record"], "images": {**meta["record"]["images"], "calibration": len(after.good)}}
    values: dict[str, Any] = {
        "model_id": after.model_id, "classes": class_values(after), "sessions": sessions(after), "notes": notes,
    }  # fmt: skip
    if not options.force and (note_of_old := keep_old(out)):
        console.warn(note_of_old)
    if content.signature:
        console.warn(f"the new thresholds are not signed; type: twinspect sign {out} --key KEY")
    write_bundle(out, meta, content.tensors, content.memory)
    for line in threshold_lines(after, most=len(values["classes"])):
        console.say(line)
    if values["sessions"]:
        say_tables([session_table(values)], console)
    facts = {"model": after.model_id, "calibration images": str(len(after.good))}
    title = f"Calibration of {options.bundle.name}"
    publish(options, title, facts, values, lambda _: sections(values, after, notes), console)
    console.say(f"wrote {out}")


def _refuse_sources(options: CalibrateOptions, asked: Request) -> None:
    """Options that contradict each other about where images come from."""
    if options.from_log and (options.good is not None or options.labels is not None):
        raise ConfigError("--from-log brings good and labelled images itself; leave GOOD and --labels out")
    if options.since and not options.from_log:
        raise ConfigError("--since has no effect without --from-log")
    if asked.rule and options.labels is None and not options.from_log:
        raise ConfigError("--rule and --miss-cost choose thresholds on labelled images; name them with --labels FILE")


def _from_log(
    options: CalibrateOptions, asked: Request, decision: Decision, console: Console
) -> tuple[Scored | None, Scored | None]:
    """Good images of an inspection log, and labelled ones where a rule shall choose by them."""
    from twinspect.server import refuse_missing

    refuse_missing(("sqlalchemy",))
    from twinspect.server.learn import learn
    from twinspect.server.log import InspectionLog

    log = InspectionLog(options.from_log, create=False)
    try:
        logged = learn(log, decision, options.since, asked.class_name)
    finally:
        log.close()
    for note in logged.notes:
        console.warn(note)
    return logged.good, logged.labelled if asked.rule else None


def _score(options: CalibrateOptions, asked: Request, console: Console) -> tuple[Scored | None, Scored | None]:
    """Good and labelled images with scores, each None if not given; the model is built only if it is needed."""
    if options.good is None and options.labels is None:
        return None, None
    from twinspect.detector import Detector

    predictor = Detector.load(options.bundle, options.weights).predictor()
    name = asked.class_name
    predictor.decision.checked_class(name)
    good = labelled = None
    if options.good is not None:
        loaded = read_data(options.good, options.layout, options.images, console)
        by_session = bool(asked.by_group) and name is not None
        root = loaded.root if by_session and loaded.root.is_dir() else None
        good = score_images(predictor, good_samples(loaded.samples), name, root, console.progress)
    if options.labels is not None:
        samples = labelled_samples(options.labels, options.images)
        labelled = score_images(predictor, samples, name, None, console.progress)
    return good, labelled


def labelled_samples(path: Path, images: Path | None = None) -> list[Sample]:
    """Images with labels from a manifest (columns image, label) or a data set.

    Raises:
        DataError: not both kinds of label.
    """
    labelled = [s for s in data.load(path, "auto", images).samples if s.label is not None]
    kinds = {s.label for s in labelled}
    if kinds != {0, 1}:
        raise DataError(
            f"{path}: {len(labelled)} labelled images, of {'one kind only' if kinds else 'no kind'}; good images "
            "(label 0) and defects (label 1) are needed, such as a CSV with the columns image, label"
        )
    return labelled


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
            "region_fpr": rule.region.max_fpr if rule.region is not None else None,
            "sentence": rule.sentence(),
        }
    return rows


def sections(values: dict[str, Any], decision: Decision, notes: Sequence[str]) -> list[Section]:
    """A calibration for a document."""
    parts = [Section("Thresholds", (), (threshold_table(decision), *_region_table(values)))]
    if values["sessions"]:
        parts.append(Section("Sessions", (), (session_table(values),)))
    charts = tuple(
        Histogram(f"Scores of good images: {name}", "score", {name: decision.good.score[of_class]}, rule.image.value)
        for name, rule in list(promises(decision))[:_MOST_CHARTS]
        if (of_class := decision.good.of_class(rule.class_name, given=True)).any()
    )
    parts.append(Section("Scores", (), charts))
    words = tuple(f"{name}: {row['sentence']}." for name, row in values["classes"].items())
    parts.append(Section("What is promised", words))
    return [*parts, Section("Remarks", tuple(notes))] if notes else parts


def _region_table(values: dict[str, Any]) -> Iterator[Table]:
    rows = tuple(
        (name, row["threshold_region"], f"{100 * row['region_fpr']:g} %")
        for name, row in values["classes"].items()
        if row["threshold_region"] is not None
    )
    if rows:
        note = "At most this share of good images shows a region, where the images are enough for it."
        yield Table("Regions of the map", ("class", "threshold of map values", "budget"), rows, note)


def session_table(values: dict[str, Any]) -> Table:
    """Leave-one-session-out, as a table."""
    rows = tuple(
        (f"{one['class_name']}: {one['group']}", one["images"], one["called"], one["called"] / one["images"])
        for one in values["sessions"]
    )
    note = "What a threshold from the other sessions would have done on this one: the promise does not cross days."
    return Table("each session left out", ("session", "good images", "called bad", "rate"), rows, note)


# ---------------------------------------------------------------------------------------------- thresholds as a table


def threshold_table(decision: Decision) -> Table:
    """One row a class: good images, threshold, false alarms to expect, and good images that it calls bad."""
    rows = class_values(decision)
    third = any(row["threshold_unsure"] is not None for row in rows.values())
    body = []
    for name, row in rows.items():
        unsure = "-" if row["threshold_unsure"] is None else row["threshold_unsure"]
        numbers = (*((unsure,) if third else ()), row["threshold"], row["false_alarms"], row["called"])
        body.append((name, row["images"], *numbers))
    between = ("unsure from",) if third else ()
    columns = ("class", "good images", *between, "threshold", "false alarms", "called bad")
    return Table("Thresholds by class", columns, tuple(body), _NOTE)


def false_alarms(rule: Rule) -> str:
    """Share of the next good images that will be called bad, as far as the images behind a rule can say."""
    if rule.basis == LABELS:
        return "chosen on labelled images"
    if rule.basis == HAND:
        return HAND
    if rule.basis == EVERY:
        return "unknown: no good image of this class"
    if rule.images == 1:
        return "unknown: one good image"
    share = f"{100 * rule.image.max_fpr:g} %" if rule.image.guaranteed else f"1 in {rule.images + 1}"
    return f"at most {share} in every session" if rule.basis == SESSIONS else f"about {share}"


_NOTE = (
    "false alarms: share of the next good images, taken like these, that will be called bad. called bad: how many of "
    "the good images here the threshold calls bad."
)


def threshold_lines(decision: Decision, most: int = MOST_LINES) -> Iterator[str]:
    """The table for the terminal, what it is worth, and what thresholds chosen on labels were chosen by.

    Of more than ``most`` rows only the last is shown, which is for all classes together.
    """
    table = threshold_table(decision)
    if len(table.rows) > most:
        title = f"threshold for {len(table.rows) - 1} classes (each: twinspect info)"
        table = dataclasses.replace(table, title=title, rows=table.rows[-1:])
    yield from text_table(table)
    yield table.note
    for name, rule in promises(decision):
        if rule.basis == LABELS:
            yield f"{name}: {rule.image.sentence}"
