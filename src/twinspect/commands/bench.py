"""How fast a model is here: throughput, latency, memory, and where the time goes. Numbers are of this machine.

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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.commands.options import BenchOptions
from twinspect.console import Console
from twinspect.device import peak_mb
from twinspect.errors import ConfigError, check_range
from twinspect.inference.predictor import Predictor, check_counts
from twinspect.inference.runtimes import load_predictor
from twinspect.types import Progress

_PAINTED, _PAINTED_SIDE = 8, 1000  # one-megapixel JPEGs where no images are given


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """One batch size.

    Attributes:
        batch: images per call.
        images_per_s: through the whole predictor: files in, results out.
        graph_images_per_s: of the graph alone, at its median time.
        latency_ms: p50, p95 and p99 of one image (or batch) from file to result, nothing in parallel.
        share: of that time by stage: decode, preprocess, graph, post.
    """

    batch: int
    images_per_s: float
    graph_images_per_s: float
    latency_ms: dict[str, float]
    share: dict[str, float]


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Everything measured; ``peak_memory_mb`` is of the whole process, None where the system does not say."""

    model: str
    runtime: str
    precision: str
    size: int
    threads: int
    images: str
    batches: tuple[BatchTimes, ...]
    peak_memory_mb: float | None

    def lines(self) -> Iterator[str]:
        """A table for people."""
        yield (
            f"{self.model}: {self.runtime} {self.precision} at {self.size} px, threads {self.threads or 'auto'}, "
            f"{self.images}"
        )
        yield "batch  images/s  graph only   p50 ms   p95 ms   p99 ms"
        for one in self.batches:
            ms = one.latency_ms
            yield (
                f"{one.batch:5d}  {one.images_per_s:8.1f}  {one.graph_images_per_s:10.1f} {ms['p50']:8.1f} "
                f"{ms['p95']:8.1f} {ms['p99']:8.1f}"
            )
        for one in self.batches:
            yield f"share of time at batch {one.batch}: {_percent(one.share)}"
        if self.peak_memory_mb is not None:
            yield f"peak memory of the process: {self.peak_memory_mb:.0f} MB"


def bench_command(options: BenchOptions, console: Console) -> None:
    """``twinspect bench``: a table for people, one line of JSON at the end."""
    report = bench(options, console.progress)
    for line in report.lines():
        console.say(line)
    console.result(json.dumps(asdict(report)))


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


def bench(options: BenchOptions, progress: Progress) -> BenchReport:
    """Measure a model on this machine.

    Raises:
        DataError: no images found.
        BundleError, ConfigError, TwinspectError: as `inference.runtimes.load_predictor`.
    """
    check_range("--seconds", options.seconds, 0.001, 86_400)
    batches = parse_batches(options.batch)
    for batch in batches:
        check_counts(options.threads, batch)
    predictor = load_predictor(options.model, options.runtime, options.threads, 1, options.weights)
    files, what = _files(options.images)
    rows = []
    for done, batch in enumerate(batches):
        progress("measuring", done, len(batches))
        rows.append(_measure(predictor, files, batch, options))
    runtime, precision = _kind(options)
    return BenchReport(
        options.model.name, runtime, precision, predictor.runtime.size, options.threads, what, tuple(rows), peak_mb()
    )


def _kind(options: BenchOptions) -> tuple[str, str]:
    from twinspect.inference.runtimes import is_export, read_export

    if not is_export(options.model):
        return "torch", "fp32"
    meta = read_export(options.model)
    return (meta.runtime if options.runtime == "auto" else options.runtime), meta.precision


def _files(images: Path | None) -> tuple[list[bytes], str]:
    """Encoded images and what they are."""
    from twinspect.data.images import read_rgb
    from twinspect.inference.decode import encoded, expand

    if images is not None:
        files = []
        for item in islice(expand(images), 64):
            files.append(encoded(item))
            read_rgb(files[-1], name=item.name)  # one that cannot be read would be measured as a very fast one
        return files, f"{len(files)} files of {images.name}"
    from twinspect.data.painting import part

    rng, files = np.random.default_rng(0), []
    for number in range(_PAINTED):
        body = io.BytesIO()
        Image.fromarray(part(number, rng, _PAINTED_SIDE)).save(body, "JPEG", quality=90)
        files.append(body.getvalue())
    return files, f"{_PAINTED} painted JPEGs of {_PAINTED_SIDE} x {_PAINTED_SIDE}"


def _measure(predictor: Predictor, files: list[bytes], batch: int, options: BenchOptions) -> BatchTimes:
    stages = _stages(predictor, files, batch, options.seconds / 2)
    total = stages["total"]
    graph = float(np.median(stages["graph"]))
    shares = {name: float(stages[name].sum() / total.sum()) for name in stages if name != "total"}
    return BatchTimes(
        batch,
        _throughput(predictor, files, batch, options.seconds / 2),
        batch / graph,
        {f"p{q}": float(np.percentile(total, q)) * 1e3 for q in (50, 95, 99)},
        shares,
    )


def _stages(predictor: Predictor, files: list[bytes], batch: int, seconds: float) -> dict[str, NDArray[np.float64]]:
    """Seconds of every stage of every call."""
    from twinspect.data.images import read_rgb, resize_rgb

    size, rows = predictor.runtime.size, defaultdict(list)
    replay = _Replay(size)
    after = Predictor(replay, predictor.decision, batch, workers=1)
    endless, began = cycle(files), time.perf_counter()
    for call in range(100_000):
        bodies = list(islice(endless, batch))
        marks = [time.perf_counter()]
        drafts = [read_rgb(body, draft_side=size) for body in bodies]
        marks.append(time.perf_counter())
        squares = np.stack([resize_rgb(one, size) for one in drafts])
        marks.append(time.perf_counter())
        replay.answers = predictor.runtime.run(squares)
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


class _Replay:
    """A runtime that says again what another one said, so that only what comes after is timed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.answers: Mapping[str, NDArray[Any]] = {}

    def run(self, pixels_BHWC: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """The answers kept."""
        return self.answers


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


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.0f} %" for name, value in shares.items())
