"""What ``twinspect export`` and ``check`` do, apart from parsing."""

from __future__ import annotations

import json
from pathlib import Path

from twinspect.commands.options import CheckOptions, ExportCommandOptions
from twinspect.console import Console
from twinspect.export import build
from twinspect.export.parity import TOLERANCES, CheckImages, ParityError, load_images, load_labelled
from twinspect.inference.runtimes import companion
from twinspect.storage import load


def export(options: ExportCommandOptions, console: Console) -> None:
    """``twinspect export``: write a file that agreed with torch on real images."""
    out, format = options.out, build.format_of(options.out, options.format)
    asked = build.ExportOptions(format, options.precision, options.batch, options.any_size, options.accept_loss)
    build.refuse_wrong_name(out, asked)
    fitted = load(options.bundle, options.weights)
    size = fitted.model.size
    compared = check_images(options.images, options.data, size)
    calibration = load_images(options.images, size) if options.images is not None else None
    if compared is not None and build.too_few(compared):
        console.warn(build.too_few(compared))
    comparison = build.export(fitted, out, asked, compared, calibration, console.progress)
    for line in comparison.lines():
        console.say(line)
    if problems := comparison.problems(options.precision):
        console.warn(f"accepted all the same (--accept-loss): {'; '.join(problems)}")
    parts = (out, companion(out)) if out.suffix == ".onnx" else (out, out.with_suffix(".bin"), companion(out))
    for path in parts:
        console.say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def check(options: CheckOptions, console: Console) -> None:
    """``twinspect check``: an export beside its bundle on images of the user's choice.

    Raises:
        ParityError: they differ by more than the precision's tolerance, which was not accepted when it was written.
    """
    path, bundle = options.export, options.bundle
    fitted = load(bundle, options.weights)
    compared = check_images(options.images, options.data, fitted.model.size)
    assert compared is not None
    if build.too_few(compared):
        console.warn(build.too_few(compared))
    comparison, meta = build.check(path, fitted, compared, options.runtime)
    for line in comparison.lines():
        console.say(line)
    if meta.decision != json.loads(json.dumps(fitted.decision.to_dict())):
        console.warn(f"the bundle was calibrated again after {path.name} was written; export it again")
    problems = comparison.problems(meta.precision)
    if problems and meta.check.get("accepted_loss") and not comparison.broken:
        console.warn(f"{path.name} was written with --accept-loss: {'; '.join(problems)}")
        return
    if problems:
        raise ParityError(
            f"{path.name} ({meta.precision}) does not say what {bundle.name} says: {'; '.join(problems)}"
        )
    limit = TOLERANCES[meta.precision]
    limits = f"score {limit.score:g}, map {limit.map:g}" if limit.score is not None else f"rank {limit.rank:g}"
    console.say(f"{path.name} agrees with {bundle.name} within the tolerance of {meta.precision} ({limits})")


def check_images(images: Path | None, data: Path | None, size: int) -> CheckImages | None:
    """Labelled images of a data set if given, else plain good images, else none."""
    if data is not None:
        return load_labelled(data, size)
    return load_images(images, size) if images is not None else None
