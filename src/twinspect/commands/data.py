"""``twinspect data``: look at a data set, list it in a manifest."""

from __future__ import annotations

import json
from dataclasses import asdict
from shlex import quote
from typing import Any

from twinspect.commands.options import InspectOptions, ManifestOptions
from twinspect.commands.results import read_data
from twinspect.console import Console
from twinspect.data.manifest import write_manifest
from twinspect.data.protocols import find_leaks
from twinspect.data.scan import first_lines
from twinspect.data.tables import has_columns
from twinspect.files import refuse_unwritable


def inspect(options: InspectOptions, console: Console) -> None:
    """Read a data set and say what was found; JSON is printed when the console is quiet."""
    loaded = read_data(options.path, options.layout, options.images, console)
    values: dict[str, Any] = {
        "layout": loaded.layout,
        "root": str(loaded.root),
        "images": len(loaded.samples),
        "classes": {name: asdict(row) for name, row in loaded.counts.items()},
        "skipped": [[str(path), reason] for path, reason in loaded.skipped],
        "notes": list(loaded.notes),
    }
    if options.leaks:
        pairs = values["leaks"] = [[known.name, test.name] for known, test in find_leaks(loaded.samples)]
        which = first_lines(f"{known} = {test}" for known, test in pairs)
        console.say(f"leak check: {len(pairs):,} pairs of a training image and its copy in the test{which}")
    if options.as_json:
        console.result(json.dumps(values, indent=1))


def manifest(options: ManifestOptions, console: Console) -> None:
    """Read a data set in any layout and write it as a manifest."""
    out = options.out
    refuse_unwritable(out, "--out", ours=lambda file: has_columns(file, {"image", "split"}))
    loaded = read_data(options.path, options.layout, options.images, console)
    root = options.images or (loaded.root if loaded.root.is_dir() else loaded.root.parent)
    rows = write_manifest(loaded.samples, out, root)
    console.say(f"{out}: {rows:,} rows of {len(loaded.classes)} classes, paths relative to {root}")
    if out.parent.resolve() != root.resolve():
        console.say(f"to read it type: twinspect data inspect {quote(str(out))} --images {quote(str(root))}")
