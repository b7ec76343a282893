"""``twinspect data``: look at a data set, list it in a manifest."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twinspect import data as data_room
from twinspect.commands.options import InspectOptions, ManifestOptions
from twinspect.config import LARGEST_SEED
from twinspect.console import Console
from twinspect.data import Loaded
from twinspect.data.leaks import find_leaks
from twinspect.data.manifest import write_manifest
from twinspect.data.protocols import PROTOCOLS, make_splits
from twinspect.data.scan import ScanLog
from twinspect.errors import ConfigError, DataError, check_range
from twinspect.files import refuse_unwritable
from twinspect.inference.table import has_columns
from twinspect.types import Sample


def inspect(options: InspectOptions, console: Console) -> None:
    """Read a data set and say what was found; JSON is printed when the console is quiet."""
    check_range("--seed", options.seed, 0, LARGEST_SEED)
    loaded = data_room.load(options.path, options.layout, options.images)
    for line in loaded.summary():
        console.say(line)
    splits = _split_lines(loaded, options.protocol, options.seed)
    for line in splits:
        console.say(line)
    pairs = find_leaks(loaded.samples) if options.leaks else None
    for line in _leak_lines(pairs):
        console.say(line)
    if console.quiet:
        console.result(json.dumps(_as_json(loaded, splits, pairs), indent=1))


def manifest(options: ManifestOptions, console: Console) -> None:
    """Read a data set in any layout and write it as a manifest."""
    out = options.out
    refuse_unwritable(out, "--out", ours=lambda file: has_columns(file, {"image", "split"}))
    loaded = data_room.load(options.path, options.layout, options.images)
    root = options.images or (loaded.root if loaded.root.is_dir() else loaded.root.parent)
    for line in loaded.summary():
        console.say(line)
    log = ScanLog()
    try:
        rows = write_manifest(loaded.samples, out, root, options.details, log)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from None
    for _, reason in log.skipped:
        console.warn(f"no details: {reason}")
    console.say(f"{out}: {rows:,} rows of {len(loaded.classes)} classes, paths relative to {root}")
    if out.parent.resolve() != root.resolve():
        console.say(f"to read it type: twinspect data inspect {_quoted(out)} --images {_quoted(root)}")


def _split_lines(loaded: Loaded, protocol: str, seed: int) -> list[str]:
    if not protocol:
        return []
    if protocol != "all":
        return [split.describe() for split in make_splits(loaded.samples, protocol, seed)]
    lines = []
    for name in PROTOCOLS:
        try:
            lines += [split.describe() for split in make_splits(loaded.samples, name, seed)]
        except ConfigError:
            continue  # a protocol of the other family of sets
    return lines


def _leak_lines(pairs: Sequence[tuple[Sample, Sample]] | None) -> Iterator[str]:
    if pairs is None:
        return
    yield f"leak check: {len(pairs):,} pairs of byte-equal images in training and test"
    for known, test in pairs[:10]:
        yield f"  {_named(known)} = {_named(test)}"
    if len(pairs) > 10:
        yield f"  and {len(pairs) - 10:,} more"


def _as_json(loaded: Loaded, splits: list[str], pairs: Sequence[tuple[Sample, Sample]] | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "layout": loaded.layout,
        "root": str(loaded.root),
        "images": len(loaded.samples),
        "classes": {name: asdict(row) for name, row in loaded.counts.items()},
        "skipped": [[str(path), reason] for path, reason in loaded.skipped],
        "notes": list(loaded.notes),
    }
    if splits:
        found["splits"] = splits
    if pairs is not None:
        found["leaks"] = [[_named(known), _named(test)] for known, test in pairs]
    return found


def _named(sample: Sample) -> str:
    return str(sample.image) if sample.record is None else f"{sample.image}#{sample.record}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
