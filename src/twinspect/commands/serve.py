"""``twinspect serve``: parsing, and what it does before the server room takes over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from twinspect.console import Console
    from twinspect.inference.predictor import Predictor
    from twinspect.server.settings import Settings

LOG_FILE = "inspections.db"
LOG_VARIABLE = "TWINSPECT_LOG"


def serve(
    bundles: Annotated[list[str], typer.Argument(help="Bundles or exported models: FILE or NAME=FILE.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File with the API key; or set TWINSPECT_API_KEY."),
    ] = None,
    log: Annotated[
        str,
        typer.Option(help="Inspection log: file, database URL or none; without: TWINSPECT_LOG, else inspections.db."),
    ] = "",
    log_required: Annotated[bool, typer.Option("--log-required", help="No answer without a row in the log.")] = False,
    log_days: Annotated[float, typer.Option(help="Delete rows older than so many days; 0 keeps them.")] = 0.0,
    runtime: Annotated[str, typer.Option(help="auto, torch, onnx or openvino; auto is what a file was made for.")] = (
        "auto"
    ),
    threads: Annotated[int, typer.Option(help="CPU threads of each model; 0 is the runtime's own choice.")] = 0,
    max_batch: Annotated[int, typer.Option(help="Most images in one call of the model.")] = 16,
    max_wait_ms: Annotated[float, typer.Option(help="Longest wait of a call for images being decoded.")] = 5.0,
    queue: Annotated[int, typer.Option(help="Images accepted at a time; more get 429.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds from acceptance to the answer.")] = 30.0,
    max_body_mb: Annotated[float, typer.Option(help="Size of a request.")] = 64.0,
    max_memory_mb: Annotated[float, typer.Option(help="Size of all requests being answered.")] = 512.0,
    max_files: Annotated[int, typer.Option(help="Images in a request.")] = 32,
    max_megapixels: Annotated[float, typer.Option(help="Size of an image.")] = 50.0,
    root_path: Annotated[str, typer.Option(help="Where a proxy shows the server, such as /inspect.")] = "",
    watch: Annotated[float, typer.Option(help="Seconds between looks for a new version of a file; 0: never.")] = 5.0,
) -> None:
    """Answer images over HTTP, with a page at /, an inspection log and metrics."""
    from twinspect.console import Console

    with Console() as console:
        from twinspect.server import refuse_missing

        refuse_missing()
        from twinspect.server.run import read_key
        from twinspect.server.settings import Settings

        settings = Settings(
            host, port, read_key(api_key_file), max_batch, max_wait_ms, queue, timeout, max_body_mb=max_body_mb,
            max_memory_mb=max_memory_mb, max_files=max_files, max_megapixels=max_megapixels, watch_s=watch,
            log_required=log_required, log_days=log_days, root_path=root_path,
        )  # fmt: skip
        run_server(bundles, settings, log, runtime, threads, console)


def run_server(
    bundles: list[str], settings: Settings, log: str, runtime: str, threads: int, console: Console
) -> None:
    """Open models and log, then serve until a signal."""
    import os

    from twinspect.errors import ConfigError
    from twinspect.inference import load
    from twinspect.server.app import build_app
    from twinspect.server.log import InspectionLog
    from twinspect.server.models import named_paths
    from twinspect.server.run import serve as serve_app

    where = log or os.environ.get(LOG_VARIABLE, LOG_FILE)
    if where == "none" and settings.log_required:
        raise ConfigError("--log-required contradicts --log none; leave one of them out")
    paths = named_paths(bundles)

    def open_file(path: Path) -> Predictor:
        return load(path, runtime, threads)

    kept = None if where == "none" else InspectionLog(where)
    predictors = {name: open_file(path) for name, path in paths.items()}
    app = build_app(settings, predictors, kept, paths, open_file)
    kept_in = kept.described if kept is not None else "none"
    names = ", ".join(paths)
    serve_app(app, settings, lambda address: console.say(f"serving {names} at {address}; log {kept_in}"))
    if kept is not None:
        kept.close()
