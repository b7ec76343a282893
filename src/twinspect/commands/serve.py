"""``twinspect serve``: parsing, and what it does before the server room takes over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from twinspect.commands import with_settings
from twinspect.server import refuse_missing
from twinspect.server.settings import Settings

if TYPE_CHECKING:
    from twinspect.inference.predictor import Predictor

LOG_FILE = "inspections.db"
LOG_VARIABLE = "TWINSPECT_LOG"


@with_settings(Settings)
def serve(
    bundles: Annotated[list[str], typer.Argument(help="Bundles or exported models: FILE or NAME=FILE.")],
    api_key_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File with the API key; or set TWINSPECT_API_KEY."),
    ] = None,
    log: Annotated[
        str,
        typer.Option(help="Inspection log: file, database URL or none; without: TWINSPECT_LOG, else inspections.db."),
    ] = "",
    runtime: Annotated[str, typer.Option(help="auto, torch, onnx or openvino; auto is what a file was made for.")] = (
        "auto"
    ),
    threads: Annotated[int, typer.Option(help="CPU threads of each model; 0 is the runtime's own choice.")] = 0,
    require_signature: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Public key: serve models only that its holder has signed (twinspect sign)."),
    ] = None,
    **settings: Any,
) -> None:
    """Answer images over HTTP, with a page at /, an inspection log and metrics."""
    from twinspect.console import Console

    with Console() as console:
        refuse_missing()
        from twinspect.errors import ConfigError
        from twinspect.inference import load
        from twinspect.server.app import build_app
        from twinspect.server.log import InspectionLog
        from twinspect.server.models import named_paths
        from twinspect.server.run import read_key
        from twinspect.server.run import serve as serve_app
        from twinspect.signature import verified

        chosen = Settings(api_key=read_key(api_key_file), **settings)
        where = log or os.environ.get(LOG_VARIABLE, LOG_FILE)
        if where == "none" and chosen.log_required:
            raise ConfigError("--log-required contradicts --log none; leave one of them out")
        paths = named_paths(bundles)

        def open_file(path: Path) -> Predictor:
            if require_signature is None:
                return load(path, runtime, threads)
            with verified(path, require_signature) as copy:
                return load(copy, runtime, threads)

        inspections = None if where == "none" else InspectionLog(where)
        place = inspections.described if inspections is not None else "none"
        predictors = {name: open_file(path) for name, path in paths.items()}
        app = build_app(chosen, predictors, inspections, paths, open_file)
        serve_app(app, chosen, lambda address: console.say(f"serving {', '.join(paths)} at {address}; log {place}"))
        if inspections is not None:
            inspections.close()
