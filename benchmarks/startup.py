"""How long ``fit`` takes to its first step on a large set, and how much memory that costs.

    PYTHONPATH=src python benchmarks/startup.py [--images 36465] [--fewer 3000] [--teacher test_vit --size 64]

Synthetic images of 30 classes are written once. Then ``fit`` is started in processes of its own and stopped after its
first step: *first* with an empty cache, *again* with a warm one, *stream* with a cache too small for the set (files
known from the first start, the teacher asked at every step), and the same on a smaller set, for what an image costs
in memory. The teacher is random; its own time (*first*) is that of the chosen network, and no matter here. Seconds of
the processor (of all threads) stand beside those of the clock, which on a busy machine say little. A table for
people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twinspect.device import peak_mb

CLASSES, SIDE = 30, 64
RUNS = (("first", 1000.0), ("again", 1000.0), ("stream", 1e-6))  # and their --cache-gb


class Stopped(Exception):
    """The first step was taken."""


def resident_bytes() -> int:
    """Memory in use, without what the C library keeps for later (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def written(folder: Path, images: int) -> Path:
    """A set in MVTec layout: one colour a class, noise an image."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (CLASSES, 1, 1, 3))
    for number in range(images):
        kind = number % CLASSES
        path = folder / f"class{kind:02d}" / "train" / "good" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(-32, 33, (SIDE, SIDE, 1))
        Image.fromarray((colours[kind] + noise).clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
    return folder


def started(given: argparse.Namespace) -> dict[str, Any]:
    """One ``fit`` up to its first step, in this process."""
    began = time.perf_counter()
    from twinspect.config import ModelConfig, RunConfig, TrainConfig
    from twinspect.data import load
    from twinspect.training.fit import fit

    found: dict[str, Any] = {"imports_s": time.perf_counter() - began}
    samples = load(given.data).samples
    found |= {"images": len(samples), "listed_s": time.perf_counter() - began, "listed_mb": resident_bytes() / 1e6}

    def progress(stage: str, _done: int, _total: int) -> None:
        if stage.startswith("training"):
            raise Stopped

    config = RunConfig(
        ModelConfig(teacher=given.teacher, pretrained=False, size=given.size),
        TrainConfig(cache_gb=given.cache_gb, device="cpu"),
    )
    try:
        fit(samples, config, None, progress)
    except Stopped:
        found |= {"first_step_s": time.perf_counter() - began, "processor_s": time.process_time()}
    return found | {"peak_mb": peak_mb()}


def run(given: argparse.Namespace, data: Path, cache_gb: float, home: Path) -> dict[str, Any]:
    """The same in another process, with a cache of its own."""
    words = [sys.executable, __file__, "--data", data, "--cache-gb", cache_gb, "--teacher", given.teacher]
    command = [str(word) for word in [*words, "--size", given.size]]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TWINSPECT_HOME": str(home)})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    print("images  run      listed s  first step s  processor s  peak MB")
    for images in (given.fewer, given.images):
        data = written(folder / str(images), images)
        for name, cache_gb in RUNS:
            one = found[f"{name} {images}"] = run(given, data, cache_gb, folder / f"home{images}")
            times = f"{one['listed_s']:9.1f} {one['first_step_s']:13.1f} {one['processor_s']:12.1f}"
            print(f"{images:6d}  {name:7s} {times} {one['peak_mb']:8.0f}", flush=True)
    more = found[f"again {given.images}"]["peak_mb"] - found[f"again {given.fewer}"]["peak_mb"]
    found["kilobytes_an_image"] = 1e3 * more / (given.images - given.fewer)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=36465)
    parser.add_argument("--fewer", type=int, default=3000, help="the set to compare memory with")
    parser.add_argument("--teacher", default="test_vit", help="timm name")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--data", type=Path, help="only one start, on this set")
    parser.add_argument("--cache-gb", type=float, default=1000.0, help="of that start")
    given = parser.parse_args()
    if given.data is not None:
        print(json.dumps(started(given)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compared(given, Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
