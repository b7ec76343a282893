"""What other work on the machine costs: predictions alone, beside busy processes, and two of our commands together.

    python benchmarks/neighbours.py calls IMAGES m.twin m.onnx m.xml       calls of a model, beside 0, 1 and 2 others
    python benchmarks/neighbours.py calls IMAGES m.twin --also GOMP_SPINCOUNT=300000 --also OMP_WAIT_POLICY=PASSIVE
    python benchmarks/neighbours.py commands GOOD IMAGES m.twin            whole `predict`, `fit`, both at once

A neighbour is a process that never pauses. Every model lives in a process of its own, with each of the settings
(variables of the environment) that `--also` names; they take turns, a few images each: one by one, as single requests
come, and in batches of the size that `predict` takes for many images. A turn begins when the machine
has been idle for a moment, and is repeated if anybody else took more than a twentieth of it meanwhile, so a machine
that is never quiet gives no numbers (`--patience` seconds, then what there is). Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

Found = TypeVar("Found")
DISTURBED = 0.05  # share of all cores' time that others may take
NEIGHBOURS = (0, 1, 2)


class Busy:
    """Processes that never pause, stopped until they are wanted. A context."""

    def __init__(self, count: int) -> None:
        # In groups of their own: a stopped process is woken when the shell that started its group ends.
        spin = [sys.executable, "-c", "while True: pass"]
        self.all = [psutil.Popen(spin, process_group=0) for _ in range(count)]

    def __enter__(self) -> Busy:
        for one in self.all:
            one.suspend()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.all:
            one.kill()
            one.wait()

    def beside(self, count: int, task: Callable[[], Found]) -> tuple[Found, float]:
        """What a task says while so many run, and the processor's time that they took."""
        awake = self.all[:count]
        before = sum(seconds_of(one) for one in awake)
        for one in awake:
            one.resume()
        try:
            return task(), sum(seconds_of(one) for one in awake) - before
        finally:
            for one in awake:
                one.suspend()


class Worker:
    """A loaded model in a process of its own, with some variables of the environment."""

    def __init__(self, model: Path, images: Path, also: str) -> None:
        self.name = f"{model.name} {also}".strip()
        command = [sys.executable, __file__, "serve", str(images), str(model)]
        self.process = psutil.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables(also)}
        )
        said = self.process.stdout.readline()
        if not said.startswith("ready "):
            raise SystemExit(f"{self.name} did not start")
        self.batches = sorted({1, int(said.split()[1])})

    def milliseconds(self, images: int, batch: int) -> float:
        """Of an image, in a row of so many."""
        self.process.stdin.write(f"{images} {batch}\n")
        self.process.stdin.flush()
        return 1e3 * float(self.process.stdout.readline()) / images


def serve(given: argparse.Namespace) -> int:
    """The other side of `Worker`."""
    from twinspect.inference.decode import Decoding, decode, expand
    from twinspect.inference.predictor import load_predictor

    predictor = load_predictor(given.models[0])
    runtime = predictor.runtime
    found = [decode(item, Decoding(runtime.size)).square for item in islice(expand(given.images), 64)]
    squares = np.stack([one for one in found if one is not None])
    for batch in (1, predictor.batch):
        runtime.run(squares[:batch])
    print(f"ready {predictor.batch}", flush=True)
    for line in sys.stdin:
        images, batch = (int(word) for word in line.split())
        began = time.perf_counter()
        for first in range(0, images, batch):
            runtime.run(squares[first : first + batch])
        print(time.perf_counter() - began, flush=True)
    return 0


def seconds_of(process: psutil.Process) -> float:
    """Processor time of a process and its children so far."""
    found = process.cpu_times()
    return float(found.user + found.system + found.children_user + found.children_system)


def busy() -> float:
    """Processor time of everybody so far, in seconds."""
    found = psutil.cpu_times()
    return float(sum(found) - found.idle - getattr(found, "iowait", 0.0) - getattr(found, "guest", 0.0))


def undisturbed(task: Callable[[], tuple[Found, float]], until: float) -> Found | None:
    """What a task says once nobody else was there meanwhile; None if that never happened.

    Args:
        task: gives what it found, and the processor's time that is known to be ours.
        until: by the clock of `time.monotonic`.
    """
    cores = psutil.cpu_count()
    while time.monotonic() < until:
        if psutil.cpu_percent(0.25) > 100 * DISTURBED:
            continue
        before, began = busy(), time.perf_counter()
        found, ours = task()
        if (busy() - before - ours) / (time.perf_counter() - began) / cores <= DISTURBED:
            return found
    return None


def calls(given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of an image, for every model and setting, beside so many neighbours."""
    until = time.monotonic() + given.patience
    workers = [Worker(model, given.images, also) for model in given.models for also in ("", *given.also)]
    turns = [(one, batch) for one in workers for batch in one.batches]
    found: dict[str, dict[int, list[float]]] = {
        f"{one.name} batch {batch}": {n: [] for n in NEIGHBOURS} for one, batch in turns
    }
    with Busy(max(NEIGHBOURS)) as others:
        for _ in range(given.rounds):
            for worker, batch in turns:
                for count in NEIGHBOURS:

                    def task(one: Worker = worker, batch: int = batch, count: int = count) -> tuple[float, float]:
                        before = seconds_of(one.process)
                        value, theirs = others.beside(count, lambda: one.milliseconds(given.count, batch))
                        return value, theirs + seconds_of(one.process) - before

                    value = undisturbed(task, until)
                    if value is not None:
                        found[f"{worker.name} batch {batch}"][count].append(value)
    for worker in workers:
        worker.process.kill()
    print("ms an image, beside 0, 1 and 2 busy processes (times the first); number of turns")
    for name, rows in found.items():
        middle = {count: statistics.median(values) if values else float("nan") for count, values in rows.items()}
        line = "  ".join(f"{value:7.1f} ({value / middle[0]:.2f})" for value in middle.values())
        print(f"{name:48s} {line}  {min(len(values) for values in rows.values())}")
    return {name: {str(count): values for count, values in rows.items()} for name, rows in found.items()}


def commands(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `predict` and `fit`, each beside so many neighbours, and of both together."""
    until = time.monotonic() + given.patience
    found: dict[str, list[float]] = defaultdict(list)
    with Busy(max(NEIGHBOURS)) as others, tempfile.TemporaryDirectory() as folder:
        fit = ["fit", given.good, "--out", f"{folder}/m.twin", "--cache-gb", 0]
        predict = ["predict", given.models[0], given.images, "--out", f"{folder}/t.csv", "--restart"]
        turns = [(one, count) for one in ([predict], [fit]) for count in NEIGHBOURS] + [([fit, predict], 0)]
        for _ in range(given.rounds):
            for also in ("", *given.also):
                for words, count in turns:

                    def task(
                        words: list[list[Any]] = words, count: int = count, also: str = also
                    ) -> tuple[list[float], float]:
                        before = seconds_of(psutil.Process())
                        seconds, theirs = others.beside(count, lambda: together(words, also))
                        return seconds, theirs + seconds_of(psutil.Process()) - before

                    seconds = undisturbed(task, until)
                    names = [
                        f"{one[0]} beside {count} busy" if len(words) == 1 else f"{one[0]}, both" for one in words
                    ]
                    for name, value in zip(names, seconds or [], strict=False):
                        found[f"{also} {name}".strip()].append(value)
    for name, values in found.items():
        print(f"{name:48s} {statistics.median(values):6.1f} s  of {', '.join(f'{one:.1f}' for one in values)}")
    return dict(found)


def together(words: list[list[Any]], also: str) -> list[float]:
    """Seconds of commands that are started at once."""
    began, seconds = time.perf_counter(), [0.0] * len(words)
    environment = {**os.environ, **variables(also)}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "twinspect", *map(str, one)], stdout=subprocess.DEVNULL, env=environment
        )
        for one in words
    ]
    while not all(seconds):
        time.sleep(0.02)
        for place, one in enumerate(running):
            if not seconds[place] and one.poll() is not None:
                seconds[place] = time.perf_counter() - began
                if one.returncode:
                    raise SystemExit(f"twinspect {words[place][0]} failed")
    return seconds


def variables(text: str) -> dict[str, str]:
    """``A=1 B=2`` as a dict."""
    return dict(one.split("=", 1) for one in text.split())


WHAT: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"calls": calls, "commands": commands}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*WHAT, "serve"), help="serve: for this script itself")
    given, rest = parser.parse_known_args(arguments)
    if given.what == "commands":
        parser.add_argument("good", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--also", action="append", default=[], help="VARIABLE=VALUE, several with blanks between")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=8, help="images of a turn, at most 64")
    parser.add_argument("--patience", type=float, default=1800, help="seconds to wait for quiet moments")
    given = parser.parse_args(arguments)
    if given.what == "serve":
        return serve(given)
    began = os.getloadavg()
    found = WHAT[given.what](given)
    print(
        json.dumps({"what": given.what, "cores": psutil.cpu_count(), "load": [began[0], os.getloadavg()[0]], **found})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
