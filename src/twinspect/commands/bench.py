"""``twinspect bench``: throughput, latency, memory, and where the time goes. Numbers are of this machine.

Each stage is timed alone, on one thread of ours: decode (file to RGB), preprocess (resize), graph (the
runtime), post (p-value, threshold, regions). Images per second are measured apart from that, through the whole
predictor with its decoding threads.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections import defaultdict
from itertools import count, cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.commands.options import BenchOptions
from twinspect.commands.results import say_tables
from twinspect.console import Console
from twinspect.data.images import read_rgb, resize_rgb
from twinspect.data.painting import part
from twinspect.device import peak_mb
from twinspect.errors import ConfigError
from twinspect.inference.decode import encoded, expand
from twinspect.inference.predictor import Predictor, check_counts
from twinspect.inference.runtimes import is_export, load_predictor, read_export
from twinspect.report import Table

_PAINTED, _PAINTED_SIDE = 8, 1000  # one-megapixel JPEGs where no images are given


def bench(options: BenchOptions, console: Console) -> None:
    """Measure a model on this machine: a table for people, one line of JSON at the end.

    Raises:
        DataError: no images found.
        BundleError, ConfigError, TwinspectError: as `inference.runtimes.load_predictor`.
    """
    batches = parse_batches(options.batch)
    for batch in batches:
        check_counts(options.threads, batch)
    predictor = load_predictor(options.model, options.threads, 1, options.weights)
    files, images = _files(options.images)
    rows = []
    for done, batch in enumerate(batches):
        console.progress("measuring", done, len(batches))
        rows.append(_measure(predictor, files, batch, options.seconds / 2))
    runtime, precision = "torch", "fp32"
    if is_export(options.model):
        meta = read_export(options.model)
        runtime, precision = meta.runtime, meta.precision
    title = (
        f"{options.model.name}: {runtime} {precision} at {predictor.runtime.size} px, "
        f"threads {options.threads or 'auto'}, {images}"
    )
    columns = ("batch", "images/s", "graph only", "p50 ms", "p95 ms", "p99 ms")
    body = tuple(
        (str(row["batch"]), *(f"{x:.1f}" for x in (row["images_per_s"], row["graph_images_per_s"], *ms.values())))
        for row in rows
        if (ms := row["latency_ms"])
    )
    say_tables([Table(title, columns, body)], console)
    for row in rows:
        shares = ", ".join(f"{name} {100 * value:.0f} %" for name, value in row["share"].items())
        console.say(f"share of time at batch {row['batch']}: {shares}")
    if peak := peak_mb():
        console.say(f"peak memory of the process: {peak:.0f} MB")
    values = {
        "model": options.model.name, "runtime": runtime, "precision": precision, "size": predictor.runtime.size,
        "threads": options.threads, "images": images, "batches": rows, "peak_memory_mb": peak,
    }  # fmt: skip
    console.result(json.dumps(values))


def parse_batches(text: str) -> tuple[int, ...]:
    """``1,16`` to numbers.

    Raises:
        ConfigError: something else.
    """
    try:
        batches = tuple(int(one) for one in text.split(","))
    except ValueError:
        batches = ()
    if not batches or min(batches) < 1:
        raise ConfigError(f"--batch {text}: accepted numbers from 1, separated by commas, such as 1,16")
    return batches


def _files(images: Path | None) -> tuple[list[bytes], str]:
    """Encoded images and what they are."""
    if images is not None:
        files = []
        for item in islice(expand(images), 64):
            files.append(encoded(item))
            read_rgb(files[-1], name=item.name)  # one that cannot be read would be measured as a very fast one
        return files, f"{len(files)} files of {images.name}"
    rng, files = np.random.default_rng(0), []
    for number in range(_PAINTED):
        body = io.BytesIO()
        Image.fromarray(part(number, rng, _PAINTED_SIDE)).save(body, "JPEG", quality=90)
        files.append(body.getvalue())
    return files, f"{_PAINTED} painted JPEGs of {_PAINTED_SIDE} x {_PAINTED_SIDE}"


def _measure(predictor: Predictor, files: list[bytes], batch: int, seconds: float) -> dict[str, Any]:
    """One batch size: images per second of everything and of the graph alone, latency, share of every stage."""
    stages = _stages(predictor, files, batch, seconds)
    total = stages.pop("total")
    return {
        "batch": batch,
        "images_per_s": _throughput(predictor, files, batch, seconds),
        "graph_images_per_s": batch / float(np.median(stages["graph"])),
        "latency_ms": {f"p{q}": float(np.percentile(total, q)) * 1e3 for q in (50, 95, 99)},
        "share": {name: float(times.sum() / total.sum()) for name, times in stages.items()},
    }


def _stages(predictor: Predictor, files: list[bytes], batch: int, seconds: float) -> dict[str, NDArray[np.float64]]:
    """Seconds of every stage of every call, nothing in parallel, and their total."""
    size, rows = predictor.runtime.size, defaultdict(list)
    answers: Any = {}
    # Says again what the runtime said, so that only what comes after it is timed.
    replay: Any = SimpleNamespace(size=size, run=lambda _pixels: answers)
    after = Predictor(replay, predictor.decision, batch, workers=1)
    endless, began = cycle(files), time.perf_counter()
    for call in count():
        bodies = list(islice(endless, batch))
        marks = [time.perf_counter()]
        drafts = [read_rgb(body, draft_side=size) for body in bodies]
        marks.append(time.perf_counter())
        squares = np.stack([resize_rgb(one, size) for one in drafts])
        marks.append(time.perf_counter())
        answers = predictor.runtime.run(squares)
        marks.append(time.perf_counter())
        list(after.predict(squares, maps=True, pixels=False))
        marks.append(time.perf_counter())
        if call:  # the first call warms up
            for name, step in zip(("decode", "preprocess", "graph", "post"), np.diff(marks), strict=True):
                rows[name].append(float(step))
            rows["total"].append(marks[-1] - marks[0])
        if call >= 3 and time.perf_counter() - began > seconds:
            break
    return {name: np.array(values) for name, values in rows.items()}


def _throughput(predictor: Predictor, files: list[bytes], batch: int, seconds: float) -> float:
    """Images per second through the predictor with its threads, from files on disk."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.img" for i in range(len(files))]
        for path, body in zip(paths, files, strict=True):
            path.write_bytes(body)
        predictor.batch = batch
        began, done = time.perf_counter(), 0
        for _ in predictor.predict(cycle(paths), maps=False, pixels=False, live=False):
            done += 1
            if time.perf_counter() - began > seconds and done >= 2 * batch:
                break
        return done / (time.perf_counter() - began)
