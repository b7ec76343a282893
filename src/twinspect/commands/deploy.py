"""A model put to work: ``export`` and ``check`` for other runtimes, ``serve`` over HTTP, ``sign`` for its origin.

``bench``: throughput, latency and memory on this machine.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twinspect.bundle import files_of, is_export, read_meta
from twinspect.commands.options import BenchOptions, CheckOptions, ExportCommandOptions, ServeOptions, SignOptions
from twinspect.console import Console
from twinspect.data.images import made_up_rgb, read_rgb, resize_rgb
from twinspect.device import peak_mb
from twinspect.errors import ConfigError
from twinspect.inference.decode import encoded, expand
from twinspect.inference.job import MOST_BATCH
from twinspect.inference.predictor import Predictor, load_predictor
from twinspect.report import Table
from twinspect.server import refuse_missing
from twinspect.server.settings import Settings, named_paths, read_key

_PAINTED, _PAINTED_SIDE = 8, 1000  # one-megapixel JPEGs where no images are given
_MOST_FILES = 64


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
    of_log = (("--log-required", chosen.log_required), ("--log-days", chosen.log_days))
    for flag, value in (*of_log, ("--log-thumbnails", chosen.log_thumbnails)):
        if value and where == "none":
            raise ConfigError(f"{flag} contradicts --log none; leave one of them out")
    paths = named_paths(list(options.models))

    def open_file(path: Path) -> Predictor:
        if options.require_signature is None:
            return load(path, options.threads)
        with verified(path, options.require_signature) as copy:
            return load(copy, options.threads)

    with nullcontext() if where == "none" else closing(InspectionLog(where)) as log:
        place = log.described if log is not None else "none"
        app = build_app(chosen, paths, log, open_file)
        serve_app(app, chosen, lambda address: console.say(f"serving {', '.join(paths)} at {address}; log {place}"))


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


# ----------------------------------------------------------------------------------------------------------- bench


def bench(options: BenchOptions, console: Console) -> None:
    """Measure a model on this machine: a table for people, or one line of JSON."""
    batches = parse_batches(options.batch)
    predictor = load_predictor(options.model, options.threads, 1, options.device)
    files, images = _files(options.images)
    rows, shown = [], []
    for done, batch in enumerate(batches):
        console.progress("measuring", done, len(batches))
        row = _measure(predictor, files, batch, options.seconds / 4)
        numbers = {"images/s": row["images_per_s"], "graph only": row["graph_images_per_s"]}
        numbers |= {f"{name} ms": ms for name, ms in row["latency_ms"].items()}
        rows.append(row)
        shown.append({"batch": batch, **{name: f"{number:.1f}" for name, number in numbers.items()}})
    runtime = read_meta(options.model)["runtime"] if is_export(options.model) else "torch"
    size, threads = predictor.runtime.size, options.threads or "auto"
    title = f"{options.model.name}: {runtime} at {size} px, threads {threads}, {images}"
    console.say(*Table.of(title, shown).lines())
    peak = peak_mb()
    console.say(f"peak memory of the process: {f'{peak:.0f} MB' if peak else 'unknown here'}")
    values = {
        "model": options.model.name, "runtime": runtime, "size": size,
        "threads": options.threads, "images": images, "batches": rows, "peak_memory_mb": peak,
    }  # fmt: skip
    if options.as_json:
        console.result(json.dumps(values))


def parse_batches(text: str) -> tuple[int, ...]:
    """``1,16`` to numbers."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and 1 <= int(word) <= MOST_BATCH for word in words):
        raise ConfigError(f"--batch {text}: accepted numbers from 1 to {MOST_BATCH:,}, with commas between: 1,16")
    return tuple(map(int, words))


def _files(images: Path | None) -> tuple[list[bytes], str]:
    """Encoded images and what they are."""
    if images is not None:
        files = []
        for item in islice(expand(images), _MOST_FILES):
            files.append(encoded(item))
            read_rgb(files[-1], name=item.name)  # one that cannot be read would be measured as a very fast one
        return files, f"{len(files)} files of {images.name}"
    rng, files = np.random.default_rng(0), []
    for _ in range(_PAINTED):
        body = io.BytesIO()
        Image.fromarray(made_up_rgb(rng, _PAINTED_SIDE)).save(body, "JPEG", quality=90)
        files.append(body.getvalue())
    return files, f"{_PAINTED} made-up JPEGs of {_PAINTED_SIDE} x {_PAINTED_SIDE}"


def _measure(predictor: Predictor, files: list[bytes], batch: int, seconds: float) -> dict[str, Any]:
    """One batch size: images per second of everything and of the graph alone, and latency, file to result."""
    size, endless = predictor.runtime.size, cycle(files)
    squares = np.stack([resize_rgb(read_rgb(body, draft_side=size), size) for body in islice(endless, batch)])
    alone = Predictor(predictor.runtime, predictor.decision, batch, workers=1)
    graph = _timed(lambda: predictor.runtime.run(squares), seconds)
    whole = _timed(lambda: list(alone.predict(list(islice(endless, batch)), pixels=False, live=False)), seconds)
    predictor.batch = batch  # with all its threads
    results = iter(predictor.predict(cycle(files), maps=False, pixels=False, live=False))
    each = _timed(lambda: [next(results) for _ in range(batch)], 2 * seconds)
    return {
        "batch": batch,
        "images_per_s": batch * len(each) / sum(each),
        "graph_images_per_s": batch / float(np.median(graph)),
        "latency_ms": {f"p{q}": float(np.percentile(whole, q)) * 1e3 for q in (50, 95, 99)},
    }


def _timed(call: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of every call but the first, which warms up."""
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
