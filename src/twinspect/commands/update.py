"""``twinspect update``: further good images into a bundle; what was learnt is listed, and taken back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinspect.bundle import read_bundle, refuse_unwritable
from twinspect.commands.calibrate import threshold_section
from twinspect.commands.options import UpdateOptions
from twinspect.commands.results import checked_model, read_data, warn_of
from twinspect.console import Console
from twinspect.errors import BundleError, ConfigError


def update(options: UpdateOptions, console: Console) -> None:
    """Learn the good images of ``new``, or list what was learnt, or take the last of it back."""
    bundle = options.bundle
    if (options.new is None) == (not options.listed and not options.undo):
        raise ConfigError("give a folder of new good images, or --list, or --undo: one of the three")
    if options.listed:
        lines = list(update_lines(read_bundle(bundle).meta["record"]))
        console.say("\n".join(lines) if lines else f"{bundle} has learnt nothing beyond its training")
    elif options.undo:
        console.say(_taken_back(bundle))
    elif options.new is not None:
        _learn(options.new, options, console)


def _learn(new: Path, options: UpdateOptions, console: Console) -> None:
    from twinspect.bundle import load, save
    from twinspect.training.update import update as learn

    bundle, out = options.bundle, checked_model(options.out, options.bundle)
    fitted = load(bundle, options.weights)
    loaded = read_data(new, options.layout, options.images, console)
    after = learn(fitted, loaded.samples, options.class_name or None, console.progress)
    warn_of(after, console)
    last = after.record["updates"][-1]
    thin = bool(read_bundle(bundle).meta["thin"])
    if out == bundle:
        before = bundle.with_name(f"{bundle.name}.{len(after.record['updates']) - 1}")
        refuse_unwritable(before)
        last["before"] = before.name
        shutil.copy2(bundle, before)
    save(after, out, thin)
    if out == bundle:
        console.say(f"the model before is {before}; twinspect update {bundle} --undo takes it back")
    console.say(next(update_lines({"updates": [last]})), *threshold_section(after.decision).lines())
    console.say(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


def update_lines(record: dict[str, Any]) -> Iterator[str]:
    """One line for every update of a model."""
    for number, entry in enumerate(record.get("updates", ()), 1):
        counts = ", ".join(f"{count} of {name}" for name, count in entry["classes"].items())
        first, *others = entry["images"]
        more = sum(entry["classes"].values()) - 1
        yield f"{number}. {entry['date']}: {counts} ({first}{f' and {more} more' if others else ''})"


def _taken_back(bundle: Path) -> str:
    """Put the model before the last update into its place."""
    updates = read_bundle(bundle).meta["record"].get("updates", [])
    if not updates:
        raise BundleError(f"{bundle} has learnt nothing beyond its training; there is nothing to take back")
    last = updates[-1]
    if "before" not in last:
        raise BundleError(
            f"the last update of {bundle} was written to a file of its own: the model before it, {last['from']}, is "
            "the bundle that was updated, and has not changed"
        )
    before = bundle.with_name(str(last["before"]))
    if not before.is_file():
        raise BundleError(f"{before} is gone, the model before the last update; train again, or copy it back")
    model_id = read_bundle(before).meta["decision"]["model_id"]
    if model_id != last["from"]:
        raise BundleError(f"{before} is model {model_id}, not {last['from']}, which the last update was made from")
    os.replace(before, bundle)
    return f"taken back: {next(update_lines({'updates': [last]})).partition(' ')[2]}"
