"""``twinspect info``: what a bundle or an export says of itself, as lines, as JSON, or as a model card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinspect.bundle import read_bundle
from twinspect.commands.calibrate import class_values, threshold_table
from twinspect.commands.options import InfoOptions
from twinspect.commands.results import markdown, text_table
from twinspect.config import RunConfig
from twinspect.console import Console
from twinspect.decide.decision import Decision, promises
from twinspect.errors import NONSENSE, BundleError
from twinspect.inference.runtimes import export_info, is_export, read_export
from twinspect.models.weights import EMBEDDED
from twinspect.report import Section, Table

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
    if options.as_card:
        console.result(card(options.bundle))
    elif options.as_json:
        console.result(json.dumps(info_lines(options.bundle), indent=1))
    else:
        console.say("\n".join(info_text(info_lines(options.bundle))))


def info_lines(bundle: Path) -> dict[str, Any]:
    """What a bundle or an export says of itself, without building the model."""
    if is_export(bundle):
        return export_info(bundle)
    meta = read_bundle(bundle).meta
    decision = Decision.from_dict(meta.get("decision", {}), str(bundle))
    learnt = hashlib.sha256("".join(sorted(decision.trained)).encode()).hexdigest()
    try:
        return {
            "written by": f"twinspect {meta['twinspect']}, format {meta['format']}",
            "learnt from": f"{len(decision.trained)} images, sha256 of their ids {learnt[:16]}",
            "seed": meta["config"]["train"]["seed"],
            "thin": meta["thin"],
            **meta["record"],
            "model_id": decision.model_id,
            "threshold": decision.threshold.value,
            "promise": decision.threshold.sentence,
            "thresholds": class_values(decision),
            "config": meta["config"],
        }
    except NONSENSE as error:
        raise BundleError(f"{bundle}: its parts do not fit together ({error})") from None


def outlier_lines(record: dict[str, Any]) -> Iterator[str]:
    """The training images that are least like the others, and those that were left out for it."""

    def named(rows: list[dict[str, Any]]) -> str:
        return ", ".join(f"{row['path']} ({row['score']:.1f})" for row in rows)

    if dropped := record.get("dropped"):
        yield f"left out, as they are least like the others (--drop-outliers): {named(dropped)}"
    listed = record["least_like"]
    yield f"training images least like the others (score): {named(listed[:_LEAST_LIKE])}"
    if apart := [row for row in listed if row["apart"]]:
        yield (
            f"{len(apart)} of them score{'s' if len(apart) == 1 else ''} apart from the rest, as anomalies among the "
            f"good ones would; look at them, and leave them out with --drop-outliers {len(apart)} if they are bad"
        )


def info_text(content: dict[str, Any]) -> Iterator[str]:
    """The same as aligned lines: one fact a line, then the thresholds; settings are for ``--json``."""
    apart = ("thresholds", "config", "least_like", "dropped")
    facts = dict(_flat({k: v for k, v in content.items() if k not in apart}))
    width = max(map(len, facts))
    yield from (f"{name:<{width}}  {value}" for name, value in facts.items())
    if "least_like" in content:
        yield from outlier_lines(content)
    rows = [
        {"class": name, "threshold": row["threshold"], "from": row["rule"]}
        for name, row in content.get("thresholds", {}).items()
    ]
    if rows:
        yield from text_table(Table.of("thresholds", rows))


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}, ")
        elif value not in ([], ""):
            several = value if isinstance(value, list) else [value]
            texts = (", ".join(map(str, item.values())) if isinstance(item, dict) else str(item) for item in several)
            yield f"{above}{name}", "; ".join(texts)


def card(path: Path) -> str:
    """The model card of a bundle or an export, in Markdown."""
    if is_export(path):
        meta = dataclasses.asdict(read_export(path))
        made = f"twinspect {meta['writer']}, exported for {meta['runtime']} in {meta['precision']}"
    else:
        meta = read_bundle(path).meta
        made = f"twinspect {meta['twinspect']}, bundle format {meta['format']}"
    record, config, decision = meta["record"], meta["config"], Decision.from_dict(meta["decision"])
    teacher, images = record["teacher"], record["images"]
    facts = {
        "what it does": "gives every image a score of how unusual it is, an answer (good or anomaly) and a map",
        "written by": made,
        "model": decision.model_id,
        "family": config["model"]["model"],
        "teacher": "{name} ({arch}), weights from {weights}, hash {hash}".format(**teacher),
        "licence of the teacher's weights": teacher["licence"],
        "input": f"RGB images of any size, scaled to {record['size']} x {record['size']} pixels; nothing is cropped",
    }
    learnt = len(decision.trained)  # `calibrate` changes what calibrates, not this
    taught = f"{images['train']} taught the students, and {learnt - images['train']} were kept to measure their skill"
    if not record["training"]["steps"]:
        taught = "and no students: statistics of these images alone"
    words = (
        f"{learnt} good images, {taught}. {images['skipped']} were left out. No image with a defect was learnt from."
    )
    behind = Counter(decision.good.class_name)
    counts = tuple((name, count, behind[name]) for name, count in record["classes"].items())
    columns = ("class", "learnt from", "behind the threshold")
    default = RunConfig().to_dict()
    chosen = tuple(
        (f"{section}.{name}", str(value))
        for section in default
        for name, value in config[section].items()
        if name in ("steps", "batch", "seed") or value != default[section].get(name)
    )
    note = "Every other setting has its default; `twinspect info --json` lists them all."
    promised = tuple(f"{name}: {row['sentence']}" for name, row in class_values(decision).items())
    sections = [
        Section("Data", (words,), (Table("Good images by class", columns, counts),)),
        Section("Settings", (), (Table("Settings of the training run", ("setting", "value"), chosen, note),)),
        Section("Thresholds and what they promise", promised, (threshold_table(decision),)),
        Section("Known limits", tuple(_limits(record, decision))),
    ]
    return markdown(f"Model card: {path.name}", sections, facts)


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
