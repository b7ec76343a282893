"""``twinspect export`` and ``check``: a model as a file for another runtime, beside the model itself."""

from __future__ import annotations

import json

from twinspect.commands.options import CheckOptions, ExportCommandOptions
from twinspect.console import Console
from twinspect.export import build
from twinspect.export.parity import TOLERANCES, CheckImages, ParityError, load_images, load_labelled
from twinspect.inference.runtimes import companion
from twinspect.storage import Fitted, load


def export(options: ExportCommandOptions, console: Console) -> None:
    """Write a file that agreed with torch on real images."""
    out, format = options.out, build.format_of(options.out, options.format)
    asked = build.ExportOptions(format, options.precision, options.batch, options.any_size, options.accept_loss)
    build.refuse_wrong_name(out, asked)
    fitted = load(options.bundle, options.weights)
    good = load_images(options.images, fitted.model.size) if options.images is not None else None
    compared = _compared(options, fitted, console) if options.data or options.images else None
    comparison = build.export(fitted, out, asked, compared, good, console.progress)
    for line in comparison.lines():
        console.say(line)
    if problems := comparison.problems(options.precision):
        console.warn(f"accepted all the same (--accept-loss): {'; '.join(problems)}")
    parts = (out, companion(out)) if out.suffix == ".onnx" else (out, out.with_suffix(".bin"), companion(out))
    for path in parts:
        console.say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def check(options: CheckOptions, console: Console) -> None:
    """Compare an export with its bundle on images of the user's choice."""
    path, bundle = options.export, options.bundle
    fitted = load(bundle, options.weights)
    comparison, meta = build.check(path, fitted, _compared(options, fitted, console), options.runtime)
    for line in comparison.lines():
        console.say(line)
    if meta.decision != json.loads(json.dumps(fitted.decision.to_dict())):
        console.warn(f"the bundle was calibrated again after {path.name} was written; export it again")
    problems = "; ".join(comparison.problems(meta.precision))
    if problems and meta.check.get("accepted_loss") and not comparison.broken:
        console.warn(f"{path.name} was written with --accept-loss: {problems}")
        return
    if problems:
        raise ParityError(f"{path.name} ({meta.precision}) does not say what {bundle.name} says: {problems}")
    limit = TOLERANCES[meta.precision]
    limits = f"score {limit.score:g}, map {limit.map:g}" if limit.score is not None else f"rank {limit.rank:g}"
    console.say(f"{path.name} agrees with {bundle.name} within the tolerance of {meta.precision} ({limits})")


def _compared(options: ExportCommandOptions | CheckOptions, fitted: Fitted, console: Console) -> CheckImages:
    """Labelled images of ``--data`` if given, else those of ``--images``."""
    data, size = options.data, fitted.model.size
    images = load_images(options.images, size) if data is None else load_labelled(data, size)
    if few := build.too_few(images):
        console.warn(few)
    return images
