"""``twinspect bench``: throughput, latency and memory on this machine."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twinspect.bundle import is_export, read_meta
from twinspect.commands.options import BenchOptions
from twinspect.console import Console
from twinspect.data.images import made_up_rgb, read_rgb, resize_rgb
from twinspect.device import peak_mb
from twinspect.errors import ConfigError
from twinspect.inference.decode import encoded, expand
from twinspect.inference.job import MOST_BATCH
from twinspect.inference.predictor import Predictor, load_predictor
from twinspect.report import Table

_PAINTED, _PAINTED_SIDE = 8, 1000  # one-megapixel JPEGs where no images are given
_MOST_FILES = 64


def bench(options: BenchOptions, console: Console) -> None:
    """Measure a model on this machine: a table for people, one line of JSON at the end."""
    batches = parse_batches(options.batch)
    predictor = load_predictor(options.model, options.threads, 1)
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
    return files, f"{_PAINTED} painted JPEGs of {_PAINTED_SIDE} x {_PAINTED_SIDE}"


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
