"""A model put to work: ``export`` and ``check`` for other runtimes, ``serve`` over HTTP, ``sign`` for its origin."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinspect.bundle import files_of
from twinspect.commands.options import CheckOptions, ExportCommandOptions, ServeOptions, SignOptions
from twinspect.console import Console
from twinspect.errors import ConfigError
from twinspect.server import refuse_missing
from twinspect.server.settings import Settings, named_paths, read_key

if TYPE_CHECKING:
    from twinspect.inference.predictor import Predictor


def export(options: ExportCommandOptions, console: Console) -> None:
    """Write a file that agreed with torch on real images."""
    from twinspect import export as exports
    from twinspect.bundle import load

    out = options.out
    exports.checked_runtime(out)
    fitted = load(options.model)
    images = exports.load_images(options.images, fitted.model.size) if options.images is not None else ()
    comparison = exports.export(fitted, out, images, console.progress)
    console.say(*comparison.lines())
    for path in files_of(out):
        console.say(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def check(options: CheckOptions, console: Console) -> None:
    """Compare an export with its bundle on images of the user's choice."""
    from twinspect import export as exports
    from twinspect.bundle import load

    path, bundle = options.export, options.model
    fitted = load(bundle)
    images = exports.load_images(options.images, fitted.model.size)
    comparison, meta = exports.check(path, fitted, images)
    console.say(*comparison.lines())
    if meta["decision"] != json.loads(json.dumps(fitted.decision.to_dict())):
        console.warn(f"the bundle was calibrated again after {path.name} was written; export it again")
    if problems := comparison.problems():
        raise exports.ParityError(f"{path.name} does not say what {bundle.name} says: {'; '.join(problems)}")
    limits = ", ".join(f"{what} {limit:g}" for what, limit in exports.TOLERANCES.items())
    console.say(f"{path.name} agrees with {bundle.name} within the tolerance ({limits})")


def serve(options: ServeOptions, settings: dict[str, Any], console: Console) -> None:
    """Open the models and the log, and answer until the process is told to end."""
    refuse_missing()
    from twinspect.bundle import verified
    from twinspect.inference import load
    from twinspect.server.app import build_app
    from twinspect.server.app import serve as serve_app
    from twinspect.server.log import InspectionLog

    chosen = Settings(api_key=read_key(options.api_key_file), **settings)
    where = options.log or os.environ.get("TWINSPECT_LOG", "inspections.db")
    if where == "none" and chosen.log_required:
        raise ConfigError("--log-required contradicts --log none; leave one of them out")
    paths = named_paths(list(options.models))

    def open_file(path: Path) -> Predictor:
        if options.require_signature is None:
            return load(path, options.threads)
        with verified(path, options.require_signature) as copy:
            return load(copy, options.threads)

    log = None if where == "none" else InspectionLog(where)
    place = log.described if log is not None else "none"
    app = build_app(chosen, paths, log, open_file)
    serve_app(app, chosen, lambda address: console.say(f"serving {', '.join(paths)} at {address}; log {place}"))
    if log is not None:
        log.close()


def sign(options: SignOptions, console: Console) -> None:
    """Sign a model with --key, or verify it with --check."""
    from twinspect import bundle

    if (options.key is None) == (options.check is None):
        raise ConfigError("give --key KEY to sign, or --check KEY to verify")
    if options.key is not None:
        bundle.sign(options.model, options.key)
        console.say(f"signed {options.model}")
    elif options.check is not None:
        bundle.verify(options.model, options.check)
        console.say(f"{options.model} is as the holder of {options.check} signed it")
