"""``twinspect info --card``: the model card, made of what a bundle or an export says of itself."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinspect.commands.decisions import threshold_table
from twinspect.commands.results import markdown
from twinspect.config import RunConfig
from twinspect.decide.decision import Decision, promises
from twinspect.decide.rules import class_sentence
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


def card(path: Path) -> str:
    """The model card of a bundle or an export, in Markdown.

    Raises:
        BundleError: the file is damaged, or of another version of the library.
    """
    from twinspect.bundle import read_bundle
    from twinspect.inference.runtimes import is_export, read_export

    if is_export(path):
        export = dataclasses.asdict(read_export(path))
        made = f"twinspect {export['writer']}, exported for {export['runtime']} in {export['precision']}"
        return _card(path.name, made, export)
    meta = read_bundle(path).meta
    return _card(path.name, f"twinspect {meta['twinspect']}, bundle format {meta['format']}", meta)


def _card(name: str, made: str, meta: dict[str, Any]) -> str:
    record, decision = meta["record"], Decision.from_dict(meta["decision"])
    teacher, images = record["teacher"], record["images"]
    facts = {
        "what it does": "gives every image a score of how unusual it is, an answer (good or anomaly) and a map",
        "written by": made,
        "model": decision.model_id,
        "family": meta["config"]["model"]["model"],
        "teacher": f"{teacher['name']} ({teacher['arch']}), weights from {teacher['weights']}, "
        f"hash {teacher['hash']}",
        "licence of the teacher's weights": teacher["licence"],
        "input": f"RGB images of any size, scaled to {record['size']} x {record['size']} pixels; nothing is cropped",
    }
    learnt = len(decision.trained)  # `calibrate` changes what calibrates, not this
    taught = f"{images['train']} taught the students, and {learnt - images['train']} were kept to measure their skill"
    if not record["training"]["steps"]:
        taught = "and no students: statistics of these images alone"
    data = Section(
        "Data",
        (
            f"{learnt} good images, {taught}. {images['skipped']} were left out. "
            "No image with a defect was learnt from.",
        ),
        (_classes(record, decision),),
    )
    promised = Section(
        "Thresholds and what they promise",
        tuple(f"{name}: {class_sentence(rule)}" for name, rule in promises(decision)),
        (threshold_table(decision),),
    )
    return markdown(
        f"Model card: {name}",
        [data, _settings(meta["config"]), promised, Section("Known limits", tuple(_limits(record, decision)))],
        facts,
    )


def _classes(record: dict[str, Any], decision: Decision) -> Table:
    """Good images of each class: those that were learnt from, and those behind its threshold."""
    behind = Counter(decision.good.class_name)
    rows = tuple((name, count, behind[name]) for name, count in record["classes"].items())
    return Table("Good images by class", ("class", "learnt from", "behind the threshold"), rows)


def _settings(values: dict[str, Any]) -> Section:
    """Settings that are not the library's defaults, and those that every reader asks for."""
    default = RunConfig().to_dict()
    rows = tuple(
        (f"{section}.{name}", str(value))
        for section in default
        for name, value in values[section].items()
        if name in ("steps", "batch", "seed") or value != default[section].get(name)
    )
    note = "Every other setting has its default; `twinspect info --json` lists them all."
    return Section("Settings", (), (Table("Settings of the training run", ("setting", "value"), rows, note),))


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
