"""``twinspect export`` and ``check``: a model as a file for another runtime, beside the model itself."""

from __future__ import annotations

import json

from twinspect import export as exports
from twinspect.bundle import load
from twinspect.commands.options import CheckOptions, ExportCommandOptions
from twinspect.console import Console
from twinspect.export import TOLERANCES, ParityError, load_images
from twinspect.inference.runtimes import companion


def export(options: ExportCommandOptions, console: Console) -> None:
    """Write a file that agreed with torch on real images."""
    out = options.out
    exports.checked_runtime(out)
    fitted = load(options.bundle, options.weights)
    images = load_images(options.images, fitted.model.size) if options.images is not None else ()
    comparison = exports.export(fitted, out, images, console.progress)
    console.say(*comparison.lines())
    parts = (out, companion(out)) if out.suffix == ".onnx" else (out, out.with_suffix(".bin"), companion(out))
    for path in parts:
        console.say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def check(options: CheckOptions, console: Console) -> None:
    """Compare an export with its bundle on images of the user's choice."""
    path, bundle = options.export, options.bundle
    fitted = load(bundle, options.weights)
    images = load_images(options.images, fitted.model.size)
    comparison, meta = exports.check(path, fitted, images)
    console.say(*comparison.lines())
    if meta.decision != json.loads(json.dumps(fitted.decision.to_dict())):
        console.warn(f"the bundle was calibrated again after {path.name} was written; export it again")
    if problems := comparison.problems():
        raise ParityError(f"{path.name} does not say what {bundle.name} says: {'; '.join(problems)}")
    limits = ", ".join(f"{what} {limit:g}" for what, limit in TOLERANCES.items())
    console.say(f"{path.name} agrees with {bundle.name} within the tolerance ({limits})")
