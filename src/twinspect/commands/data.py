"""``twinspect data``: look at a data set, list it in a manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from twinspect.config import LARGEST_SEED
from twinspect.errors import check_range

if TYPE_CHECKING:
    from twinspect.console import Console
    from twinspect.data import Loaded
    from twinspect.types import Sample

data_app = typer.Typer(
    name="data", help="Look at data sets, list them in manifests.", no_args_is_help=True,
    rich_markup_mode=None,
)  # fmt: skip

Where = Annotated[Path, typer.Argument(help="Folder or manifest of a data set.")]
Layout = Annotated[str, typer.Option(help="Layout of the data; auto detects it.")]
Images = Annotated[Optional[Path], typer.Option(help="Folder that the paths of a manifest are relative to.")]  # noqa: UP045


@data_app.command("inspect")
def inspect_command(
    path: Where,
    layout: Layout = "auto",
    images: Images = None,
    protocol: Annotated[str, typer.Option(help="Also list the splits of a protocol, or of all: all.")] = "",
    leaks: Annotated[bool, typer.Option("--leaks", help="Look for byte-equal training and test images.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what is there: layout, classes, counts, masks, what is skipped and why."""
    from twinspect.console import Console

    with Console(quiet=as_json) as console:
        check_range("--seed", seed, 0, LARGEST_SEED)
        inspect(path, layout, images, protocol, leaks, seed, console)


@data_app.command("manifest")
def manifest_command(
    path: Where,
    out: Annotated[Path, typer.Option(help="Manifest to write: .parquet or .csv.")],
    layout: Layout = "auto",
    images: Images = None,
    details: Annotated[bool, typer.Option("--details", help="Add width, height and SHA-256 (reads all).")] = False,
) -> None:
    """Write one row per image: image, split, class_name, label, defect_type, mask, group, record."""
    from twinspect.console import Console

    with Console() as console:
        manifest(path, out, layout, images, details, console)


def inspect(
    path: Path, layout: str, images: Path | None, protocol: str, leaks: bool, seed: int, console: Console
) -> None:
    """Read a data set and say what was found; JSON is printed when the console is quiet."""
    from twinspect import data as data_room
    from twinspect.data.leaks import find_leaks

    loaded = data_room.load(path, layout, images)
    for line in loaded.summary():
        console.say(line)
    splits = _split_lines(loaded, protocol, seed)
    for line in splits:
        console.say(line)
    pairs = find_leaks(loaded.samples) if leaks else None
    for line in _leak_lines(pairs):
        console.say(line)
    if console.quiet:
        console.result(json.dumps(_as_json(loaded, splits, pairs), indent=1))


def manifest(path: Path, out: Path, layout: str, images: Path | None, details: bool, console: Console) -> None:
    """Read a data set in any layout and write it as a manifest."""
    from twinspect import data as data_room
    from twinspect.data.manifest import write_manifest
    from twinspect.data.scan import ScanLog
    from twinspect.errors import DataError
    from twinspect.files import refuse_unwritable
    from twinspect.inference.table import has_columns

    refuse_unwritable(out, "--out", ours=lambda file: has_columns(file, {"image", "split"}))
    loaded = data_room.load(path, layout, images)
    root = images or (loaded.root if loaded.root.is_dir() else loaded.root.parent)
    for line in loaded.summary():
        console.say(line)
    log = ScanLog()
    try:
        rows = write_manifest(loaded.samples, out, root, details, log)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error})") from None
    for _, reason in log.skipped:
        console.warn(f"no details: {reason}")
    console.say(f"{out}: {rows:,} rows of {len(loaded.classes)} classes, paths relative to {root}")
    if out.parent.resolve() != root.resolve():
        console.say(f"to read it type: twinspect data inspect {_quoted(out)} --images {_quoted(root)}")


def _split_lines(loaded: Loaded, protocol: str, seed: int) -> list[str]:
    from twinspect.data.protocols import PROTOCOLS, make_splits
    from twinspect.errors import ConfigError

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
    import shlex

    return shlex.quote(str(path))
