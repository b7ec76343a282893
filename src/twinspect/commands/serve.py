"""``twinspect serve`` and ``sign``: a model put to work, and the proof of who made it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinspect.commands.options import ServeOptions, SignOptions
from twinspect.console import Console
from twinspect.errors import ConfigError
from twinspect.server import refuse_missing
from twinspect.server.settings import Settings, named_paths, read_key

if TYPE_CHECKING:
    from twinspect.inference.predictor import Predictor


def serve(options: ServeOptions, settings: dict[str, Any], console: Console) -> None:
    """Open the models and the log, and answer until the process is told to end."""
    refuse_missing()
    from twinspect.inference import load
    from twinspect.server.app import build_app
    from twinspect.server.log import InspectionLog
    from twinspect.server.run import serve as serve_app
    from twinspect.signature import verified

    chosen = Settings(api_key=read_key(options.api_key_file), **settings)
    where = options.log or os.environ.get("TWINSPECT_LOG", "inspections.db")
    if where == "none" and chosen.log_required:
        raise ConfigError("--log-required contradicts --log none; leave one of them out")
    paths = named_paths(list(options.bundles))

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
    from twinspect import signature

    if (options.key is None) == (options.check is None):
        raise ConfigError("give --key KEY to sign, or --check KEY to verify")
    if options.key is not None:
        signature.sign(options.model, options.key)
        console.say(f"signed {options.model}")
    elif options.check is not None:
        signature.verify(options.model, options.check)
        console.say(f"{options.model} is as the holder of {options.check} signed it")
