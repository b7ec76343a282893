"""What other work on the machine costs: predictions alone, beside busy processes, and two of our commands together.

    python benchmarks/neighbours.py calls IMAGES m.twin m.onnx m.xml       calls of a model, beside 0, 1 and 2 others
    python benchmarks/neighbours.py calls IMAGES m.twin --also GOMP_SPINCOUNT=300000 --also OMP_WAIT_POLICY=PASSIVE
    python benchmarks/neighbours.py commands GOOD IMAGES m.twin            `fit GOOD` and `predict IMAGES` together

A neighbour is a process that never pauses. Every model lives in a process of its own, with each of the settings
(variables of the environment) that `--also` names; they take turns, a few images each. A turn begins when the machine
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
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

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

    def beside(self, count: int, task: Callable[[], float]) -> tuple[float, float]:
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

    def __init__(self, model: Path, images: Path, variables: str) -> None:
        self.name = f"{model.name} {variables}".strip()
        command = [sys.executable, __file__, "serve", str(images), str(model)]
        given = dict(one.split("=", 1) for one in variables.split())
        self.process = psutil.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **given}
        )
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{self.name} did not start")

    def milliseconds(self, images: int) -> float:
        """Of an image, in a row of so many."""
        self.process.stdin.write(f"{images}\n")
        self.process.stdin.flush()
        return 1e3 * float(self.process.stdout.readline()) / images


def serve(given: argparse.Namespace) -> int:
    """The other side of `Worker`."""
    from twinspect.inference.decode import decode
    from twinspect.inference.runtimes import load_predictor
    from twinspect.inference.sources import expand

    runtime = load_predictor(given.models[0]).runtime
    found = [decode(item, runtime.size).square for item in islice(expand(given.images), 8)]
    squares = [one[None] for one in found if one is not None]
    for one in squares:
        runtime.run(one)
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for number in range(int(line)):
            runtime.run(squares[number % len(squares)])
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


def undisturbed(task: Callable[[], tuple[float, float]], until: float) -> float | None:
    """What a task says once nobody else was there meanwhile; None if that never happened.

    Args:
        task: gives the number, and the processor's time that is known to be ours.
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
    found: dict[str, dict[int, list[float]]] = {one.name: {n: [] for n in NEIGHBOURS} for one in workers}
    with Busy(max(NEIGHBOURS)) as others:
        for _ in range(given.rounds):
            for worker in workers:
                for count in NEIGHBOURS:

                    def task(worker: Worker = worker, count: int = count) -> tuple[float, float]:
                        before = seconds_of(worker.process)
                        value, theirs = others.beside(count, lambda: worker.milliseconds(given.count))
                        return value, theirs + seconds_of(worker.process) - before

                    value = undisturbed(task, until)
                    if value is not None:
                        found[worker.name][count].append(value)
    for worker in workers:
        worker.process.kill()
    print("ms an image, beside 0, 1 and 2 busy processes (times the first); number of turns")
    for name, rows in found.items():
        middle = {count: statistics.median(values) if values else float("nan") for count, values in rows.items()}
        line = "  ".join(f"{value:7.1f} ({value / middle[0]:.2f})" for value in middle.values())
        print(f"{name:48s} {line}  {min(len(values) for values in rows.values())}")
    return {name: {str(count): values for count, values in rows.items()} for name, rows in found.items()}


def commands(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `fit` and `predict`, each alone and both together, in turns."""
    found: dict[str, list[float]] = {"fit": [], "predict": [], "fit beside predict": [], "predict beside fit": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            fit = ["fit", given.good, "--out", f"{folder}/{number}.twin", "--cache-gb", 0]
            predict = ["predict", given.models[0], given.images, "--out", f"{folder}/{number}.csv", "--restart"]
            for names in (["fit"], ["predict"], ["fit beside predict", "predict beside fit"]):
                began = time.perf_counter()
                words = [fit if name.startswith("fit") else predict for name in names]
                running = [
                    subprocess.Popen([sys.executable, "-m", "twinspect", *map(str, one)], stdout=subprocess.DEVNULL)
                    for one in words
                ]
                left = dict(zip(names, running, strict=True))
                while left:
                    time.sleep(0.05)
                    for name in [name for name, one in left.items() if one.poll() is not None]:
                        if left.pop(name).returncode:
                            raise SystemExit(f"{name} failed")
                        found[name].append(time.perf_counter() - began)
    for name, values in found.items():
        print(f"{name:20s} {statistics.median(values):6.1f} s  of {', '.join(f'{one:.1f}' for one in values)}")
    return dict(found)


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
    parser.add_argument("--count", type=int, default=8, help="images of a turn")
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
