"""``twinspect info``: what a bundle or an export says of itself, as lines, as JSON, or as a model card."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinspect.bundle import is_export, read_meta
from twinspect.commands.calibrate import class_values
from twinspect.commands.options import InfoOptions
from twinspect.config import RunConfig
from twinspect.console import Console
from twinspect.decide.decision import Decision, promises
from twinspect.errors import NONSENSE, BundleError
from twinspect.models.weights import EMBEDDED
from twinspect.report import Report, Section, Table

_LASTING_LIMITS = (
    "The thresholds hold for good images taken like those they were made from. Another day, light, camera or "
    "position raises false alarms: watch `twinspect drift`, and calibrate again with `twinspect calibrate`.",
    "The promise is about false alarms only. How many defects are found is not promised; measure it on defects of "
    "your own with `twinspect eval`.",
    "Only what differs from the good images in the picture is seen. A defect that the camera does not show, or "
    "that some of the good images have too, is not found.",
    "The model was not made to judge people, and not for decisions about safety without a person who checks them.",
)

_LEAST_LIKE = 5  # training images that are shown


def info(options: InfoOptions, console: Console) -> None:
    """Print what a model says of itself."""
    report = describe(options.model)
    if options.as_card:
        console.result(report.markdown().rstrip())
    elif options.as_json:
        console.result(json.dumps(report.values, indent=1))
    else:
        width = max(map(len, report.facts))
        console.say(*(f"{name:<{width}}  {value}" for name, value in report.facts.items()), *report.lines())


def describe(path: Path) -> Report:
    """What a bundle or an export says of itself, without building the model."""
    meta = read_meta(path)
    head: dict[str, Any] = {"written by": f"twinspect {meta['twinspect']}, format {meta['format']}"}
    if is_export(path):
        made = f"twinspect {meta['twinspect']}, exported for {meta['runtime']}"
        head = {"written by": made, "compared with torch": meta["check"]}
    decision = Decision.from_dict(meta.get("decision", {}), str(path))
    try:
        return _card(path, head, meta["record"], meta["config"], decision)
    except NONSENSE as error:
        raise BundleError(f"{path}: its parts do not fit together ({error})") from None


def _card(
    path: Path, head: dict[str, Any], record: dict[str, Any], config: dict[str, Any], decision: Decision
) -> Report:
    """The model card; ``head`` is what only a bundle or only an export says."""
    learnt = len(decision.trained)  # `calibrate` changes what calibrates, not this
    ids = hashlib.sha256("".join(sorted(decision.trained)).encode()).hexdigest()[:16]
    thresholds, training, teacher = class_values(decision), record["training"], record["teacher"]
    values = {
        **head,
        "learnt from": f"{learnt} images, sha256 of their ids {ids}",
        "seed": config["train"]["seed"],
        **record,
        "model_id": decision.model_id,
        "threshold": decision.threshold.value,
        "promise": decision.threshold.sentence,
        "thresholds": thresholds,
        "config": config,
    }
    facts = {
        "what it does": "gives every image a score of how unusual it is, an answer (good or anomaly) and a map",
        "written by": head["written by"],
        "model": decision.model_id,
        "family": config["model"]["model"],
        "teacher": "{name} ({arch}), weights from {weights}, hash {hash}".format(**teacher),
        "licence of the teacher's weights": teacher["licence"],
        "input": f"RGB images of any size, scaled to {record['size']} x {record['size']} pixels; nothing is cropped",
        "learnt from": values["learnt from"],
        "training": f"{training['steps']} steps in {training['seconds']} s ({training['stopped']})",
        "seed": str(values["seed"]),
    }
    images, taught = record["images"], "and no students: statistics of these images alone"
    if training["steps"]:
        weights = ", ".join(f"{part} {weight:.2f}" for part, weight in record.get("student_weights", {}).items())
        later = sum(sum(entry["classes"].values()) for entry in record.get("updates", ()))
        taught = f"{images['train'] - later} taught the students, and {len(decision.held)} were kept to measure them"
        taught += f"; {later} were learnt later, by updates" if later else ""
        taught += f"; weight of the students in the scores (0 to 1): {weights}" if weights else ""
    seen = len(decision.trained | decision.held)
    told = f"{seen} good images, {taught}. Left out: {images['skipped']}. No image with a defect was learnt from."
    behind = Counter(decision.good.class_name)
    rows = tuple((name, count, behind[name]) for name, count in record["classes"].items())
    counts = Table("Good images by class", ("class", "learnt", "behind the threshold"), rows)
    promised = [
        {
            "class": name, "good images": row["images"], "unsure from": row["threshold_unsure"],
            "threshold": row["threshold"], "promise": row["sentence"],
        }
        for name, row in thresholds.items()
    ]  # fmt: skip
    sections = [
        Section("Data", (told, *outlier_lines(record)), (counts,)),
        Section("Settings", (), (_settings(config),)),
        Section("Thresholds and what they promise", (), (Table.of("Thresholds by class", promised),)),
        Section("Known limits", tuple(_limits(record, decision)), printed=False),
    ]
    return Report(f"Model card: {path.name}", sections, facts, values)


def _settings(config: dict[str, Any]) -> Table:
    default = RunConfig().to_dict()
    rows = tuple(
        (f"{section}.{name}", str(value))
        for section in default
        for name, value in config[section].items()
        if name in ("steps", "batch", "seed") or value != default[section].get(name)
    )
    note = "Every other setting has its default; `twinspect info MODEL --json` lists them all."
    return Table("Settings of the training run", ("setting", "value"), rows, note)


def outlier_lines(record: dict[str, Any]) -> Iterator[str]:
    """The training images that are least like the others, and those that were left out for it."""

    def named(rows: list[dict[str, Any]]) -> str:
        return ", ".join(f"{row['path']} ({row['score']:.4f})" for row in rows)

    if dropped := record.get("dropped"):
        yield f"left out, as they are least like the others (--drop-outliers): {named(dropped)}"
    yield f"training images least like the others (score): {named(record.get('least_like', [])[:_LEAST_LIKE])}"


def _limits(record: dict[str, Any], decision: Decision) -> Iterator[str]:
    yield from record.get("notes", ())
    few = [name for name, rule in promises(decision) if not rule.image.guaranteed and name in decision.classes]
    if few:
        rate = 100 * decision.threshold.max_fpr
        yield (
            f"Too few good images for a false-alarm rate of {rate:g} %: {', '.join(few)}. The threshold lies just "
            "above the highest score of them."
        )
    if record["teacher"]["name"] in EMBEDDED:
        yield (
            "The teacher is a small one. Textures and large products work better with it than objects in many poses."
        )
    yield from _LASTING_LIMITS
