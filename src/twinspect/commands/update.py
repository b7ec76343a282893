"""``twinspect update``: further good images into a bundle; what was learnt is listed, and taken back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinspect.bundle import read_bundle, refuse_unwritable
from twinspect.commands.calibrate import threshold_lines
from twinspect.commands.options import UpdateOptions
from twinspect.commands.results import read_data, warn_of
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
        _learn(bundle, options.new, options, console)


def _learn(bundle: Path, new: Path, options: UpdateOptions, console: Console) -> None:
    from twinspect.bundle import load, save
    from twinspect.training.update import update as learn

    out = options.out or bundle
    refuse_unwritable(out)
    fitted = load(bundle, options.weights)
    loaded = read_data(new, options.layout, None, console)
    after = learn(fitted, loaded.samples, options.class_name or None, console.progress)
    warn_of(after, console)
    last = after.record["updates"][-1]
    thin = bool(read_bundle(bundle).meta["thin"])
    if out == bundle:
        before = bundle.with_name(f"{bundle.name}.{len(after.record['updates']) - 1}")
        refuse_unwritable(before)
        last["before"] = before.name
        os.replace(bundle, before)
        try:
            save(after, out, thin)
        except BaseException:
            os.replace(before, bundle)
            raise
        console.say(f"the model before is {before}; twinspect update {bundle} --undo takes it back")
    else:
        save(after, out, thin)
    for line in (next(update_lines({"updates": [last]})), *threshold_lines(after.decision)):
        console.say(line)
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
    before = bundle.with_name(str(updates[-1].get("before") or f"{bundle.name}.{len(updates) - 1}"))
    if not before.is_file():
        raise BundleError(f"{before} is gone, the model before the last update; train again, or copy it back")
    model_id = read_bundle(before).meta["decision"]["model_id"]
    if model_id != updates[-1]["from"]:
        raise BundleError(
            f"{before} is model {model_id}, not {updates[-1]['from']}, which the last update was made from"
        )
    line = next(update_lines({"updates": updates[-1:]}))
    os.replace(before, bundle)
    return f"taken back: {line.partition(' ')[2]}"
