"""``twinspect update``: further good images into a bundle; what was learnt is listed, and taken back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinspect.bundle import read_bundle, refuse_unwritable
from twinspect.commands.options import UpdateOptions
from twinspect.console import Console
from twinspect.errors import BundleError, ConfigError


def update_command(options: UpdateOptions, console: Console) -> None:
    """Learn the good images of ``new``, or list what was learnt, or take the last of it back."""
    bundle, new = options.bundle, options.new
    if (new is None) == (not options.listed and not options.undo):
        raise ConfigError("give a folder of new good images, or --list, or --undo: one of the three")
    if options.listed:
        lines = list(update_lines(read_bundle(bundle).meta["record"]))
        console.say("\n".join(lines) if lines else f"{bundle} has learnt nothing beyond its training")
    elif options.undo:
        console.say(_taken_back(bundle))
    elif new is not None:
        _learn(bundle, new, options.class_name, options.out or bundle, options.weights, options.layout, console)


def _learn(bundle: Path, new: Path, class_name: str, out: Path, weights: str, layout: str, console: Console) -> None:
    from twinspect import data as data_room
    from twinspect.commands.decisions import threshold_lines
    from twinspect.storage import load, save
    from twinspect.training.update import update

    refuse_unwritable(out)
    fitted = load(bundle, weights)
    loaded = data_room.load(new, layout)
    for line in loaded.summary():
        console.say(line)
    found = update(fitted, loaded.samples, class_name or None, console.progress)
    for note in found.record["notes"]:
        console.warn(note)
    for skipped in found.skipped:
        console.warn(f"left out {skipped.path}: {skipped.reason}")
    last = found.record["updates"][-1]
    thin = bool(read_bundle(bundle).meta["thin"])
    if out == bundle:
        kept = bundle.with_name(f"{bundle.name}.{len(found.record['updates']) - 1}")
        refuse_unwritable(kept)
        last["before"] = kept.name
        os.replace(bundle, kept)
        try:
            save(found, out, thin)
        except BaseException:
            os.replace(kept, bundle)
            raise
        console.say(f"the model before is {kept}; twinspect update {bundle} --undo takes it back")
    else:
        save(found, out, thin)
    console.say(next(update_lines({"updates": [last]})))
    for line in threshold_lines(found.decision):
        console.say(line)
    console.say(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


def update_lines(record: dict[str, Any]) -> Iterator[str]:
    """One line for every update of a model."""
    for number, one in enumerate(record.get("updates", ()), 1):
        counts = ", ".join(f"{count} of {name}" for name, count in one["classes"].items())
        first, *others = one["images"]
        more = sum(one["classes"].values()) - 1
        yield f"{number}. {one['date']}: {counts} ({first}{f' and {more} more' if others else ''})"


def _taken_back(bundle: Path) -> str:
    """Put the model before the last update into its place.

    Raises:
        BundleError: there is none, or it is another model.
    """
    updates = read_bundle(bundle).meta["record"].get("updates", [])
    if not updates:
        raise BundleError(f"{bundle} has learnt nothing beyond its training; there is nothing to take back")
    kept = bundle.with_name(str(updates[-1].get("before") or f"{bundle.name}.{len(updates) - 1}"))
    if not kept.is_file():
        raise BundleError(f"{kept} is gone, the model before the last update; train again, or copy it back")
    found = read_bundle(kept).meta["decision"]["model_id"]
    if found != updates[-1]["from"]:
        raise BundleError(f"{kept} is model {found}, not {updates[-1]['from']}, which the last update was made from")
    line = next(update_lines({"updates": updates[-1:]}))
    os.replace(kept, bundle)
    return f"taken back: {line.partition(' ')[2]}"
