"""What `twinspect predict` costs over long runs: memory, time beyond the model, kills, Ray.

    python benchmarks/predict.py memory MODEL IMAGES --images 100000   memory of all processes over the run
    python benchmarks/predict.py overhead MODEL IMAGES --images 400    time beyond the model alone
    python benchmarks/predict.py kills MODEL IMAGES --images 4000      kill -9 ten times, then compare the tables
    python benchmarks/predict.py ray MODEL IMAGES --images 4000        two actors against two local processes
    python benchmarks/predict.py live MODEL IMAGES --images 50         from an image to its row, without the model

IMAGES is a folder; its images are linked over and over until there are enough (a file's content is read and decoded
again for every link). The last line is JSON. For memory and kills a small model will do (`--teacher test_vit
--random-teacher --size 64`): both are about what surrounds the model.

Overhead is measured against the time of the model's calls inside the run (column `ms`), and against the same calls on
squares decoded before, alone: by the wall, which counts what decoders take from the model's cores but also any other
work on the machine, and by processor time of the scoring process, which other work hardly touches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from twinspect.inference.bulk import run
from twinspect.inference.decode import Decoding, decode, expand
from twinspect.inference.job import Job
from twinspect.inference.outputs import Part
from twinspect.inference.predictor import load_predictor

Values = dict[str, Any]


class Clock:
    """Listens to a run and notes when so many rows were stored."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, int]] = []

    def result(self, text: str) -> None:
        """Not used: there is a table."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Note the time, and the processor's time of this process."""
        self.marks.append((time.perf_counter(), time.process_time(), done))


def many(folder: Path, count: int, where: Path) -> Path:
    """A folder of so many links to the images of another, a thousand to a subfolder."""
    found = [item.path for item in expand(folder)]
    for number, path in enumerate(islice(cycle(found), count)):
        target = where / f"{number // 1000:04d}" / f"{number:07d}{Path(path).suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target) if same_disk(path, where) else shutil.copy(path, target)
    return where


def same_disk(path: str, where: Path) -> bool:
    """Whether a hard link from one to the other is possible."""
    return os.stat(path).st_dev == os.stat(where).st_dev


def command(given: argparse.Namespace, source: Path, out: Path, *more: object) -> list[str]:
    """The command line of a run."""
    words = [sys.executable, "-m", "twinspect", "predict", given.model, source, "--out", out, "--batch", given.batch]
    return [str(word) for word in (*words, "--workers", given.workers, *more)]


def resident(process: psutil.Process) -> float:
    """MB that a process and its children hold and share with nobody."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().uss / 1e6
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def rows_done(parts: Path) -> int:
    """Rows stored so far, by the names of the parts."""
    names = os.listdir(parts) if parts.is_dir() else []
    return sum(part.rows for name in names if (part := Part.of(name)) is not None)


def memory(given: argparse.Namespace, source: Path, room: Path) -> Values:
    """Memory between 10 % and 100 % of the images."""
    out, marks = room / "t.parquet", list[tuple[int, float]]()
    with (room / "log").open("w") as log:
        began = time.perf_counter()
        process = subprocess.Popen(command(given, source, out), stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.5)
            done = rows_done(Path(f"{out}.parts"))
            if done:
                marks.append((done, resident(psutil.Process(process.pid)) if process.poll() is None else 0.0))
        seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit((room / "log").read_text())
    late = [mb for done, mb in marks if done >= given.images / 10 and mb]
    table = pq.ParquetFile(out)
    return {
        "images": table.metadata.num_rows,
        "at_10_percent_mb": late[0],
        "highest_after_mb": max(late),
        "growth_mb": max(late) - late[0],
        "last_mb": late[-1],
        "images_per_s": given.images / seconds,
        "bytes_per_row": out.stat().st_size / table.metadata.num_rows,
    }


def overhead(given: argparse.Namespace, source: Path, room: Path) -> Values:
    """Time beyond the model, from the first stored part to the last."""
    bare = bare_ms(given, source)
    clock, out = Clock(), room / "t.parquet"
    job = Job(
        Path(given.model), (str(source),), str(out), batch=given.batch, workers=given.workers,
        part_rows=given.part_rows,
    )  # fmt: skip
    run(job, clock)
    (first, cpu_first, before), (last, cpu_last, after) = clock.marks[0], clock.marks[-1]
    each, cpu = ((b - a) * 1e3 / (after - before) for a, b in ((first, last), (cpu_first, cpu_last)))
    inside = float(np.mean(pq.read_table(out, columns=["ms"]).column("ms").to_numpy()[before:after]))
    again = bare_ms(given, source)  # other work on the machine shows as a difference between the two
    alone, alone_cpu = ((x + y) / 2 for x, y in zip(bare, again, strict=True))
    return {
        "images": after - before,
        "ms_per_image": each,
        "ms_in_model_calls": inside,
        "beyond_model_calls": each / inside - 1,
        "ms_model_alone": [bare[0], again[0]],
        "beyond_model_alone": each / alone - 1,
        "cpu_ms_per_image": cpu,
        "cpu_ms_model_alone": [bare[1], again[1]],
        "cpu_beyond_model": cpu / alone_cpu - 1,
        "bytes_per_row": out.stat().st_size / pq.read_metadata(out).num_rows,
    }


def bare_ms(given: argparse.Namespace, source: Path, seconds: float = 15.0) -> tuple[float, float]:
    """Milliseconds an image of the model's calls alone, by the wall and of the processor."""
    predictor = load_predictor(given.model, batch=given.batch)
    size = predictor.runtime.size
    squares = [decode(item, Decoding(size)).square for item in islice(expand(source), 64)]
    batches = [
        np.stack([s for s in squares[i : i + given.batch] if s is not None]) for i in range(0, 64, given.batch)
    ]
    predictor.runtime.run(batches[0])
    done, began, cpu = 0, time.perf_counter(), time.process_time()
    for batch in cycle(batches):
        predictor.runtime.run(batch)
        done += len(batch)
        if time.perf_counter() - began > seconds:
            break
    return (time.perf_counter() - began) * 1e3 / done, (time.process_time() - cpu) * 1e3 / done


def kills(given: argparse.Namespace, source: Path, room: Path) -> Values:
    """Kill -9 at random moments, also while the model loads; then the table against an undisturbed one."""
    chance, calm, out = random.Random(given.seed), room / "calm.parquet", room / "t.parquet"
    began = time.perf_counter()
    subprocess.run(command(given, source, calm, "--part-rows", given.part_rows), check=True, capture_output=True)
    whole = time.perf_counter() - began
    words, done, loads = command(given, source, out, "--part-rows", given.part_rows), list[int](), 0
    while len(done) < given.kills:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Every other kill waits for new rows first: loading takes most of the time, and would take most of the kills.
        before, patience = rows_done(Path(f"{out}.parts")), time.perf_counter() + whole
        while len(done) % 2 and rows_done(Path(f"{out}.parts")) == before and time.perf_counter() < patience:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, whole / given.kills / 2 if len(done) % 2 else whole / 2))
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed; take more --images")
        process.send_signal(signal.SIGKILL)
        process.wait()
        done.append(rows_done(Path(f"{out}.parts")))
        loads += done[-1] == before
    subprocess.run(words, check=True, capture_output=True)
    first, second = (pq.read_table(path).drop(["ms"]) for path in (calm, out))
    return {
        "kills": len(done), "of_them_before_any_new_row": loads, "rows_after_each_kill": done,
        "identical": first.equals(second), "rows": second.num_rows, "undisturbed_s": whole,
        "left_over": sorted(p.name for p in room.iterdir() if p.name.startswith("t.") and p != out),
    }  # fmt: skip


def on_ray(given: argparse.Namespace, source: Path, room: Path) -> Values:
    """Two actors against two processes with a shard each: rate between the first part and the last, and rows."""
    shards = [room / "shards"] * 2
    began = time.perf_counter()
    both = [
        subprocess.Popen(
            command(given, source, f"{out}/", "--shard", f"{n}/2", "--part-rows", given.part_rows),
            stdout=subprocess.DEVNULL,
        )
        for n, out in enumerate(shards)
    ]
    if any([process.wait() for process in both]):
        raise SystemExit("a local process failed")
    local_s, local_rate = time.perf_counter() - began, rate(shards[0])
    began = time.perf_counter()
    more = ("--engine", "ray", "--actors", 2, "--part-rows", given.part_rows)
    subprocess.run(command(given, source, f"{room / 'ray'}/", *more), check=True, capture_output=True)
    ray_s, ray_rate = time.perf_counter() - began, rate(room / "ray")
    tables = [pq.read_table(folder).drop(["ms"]).sort_by("path") for folder in (shards[0], room / "ray")]
    return {
        "same_rows": tables[0].equals(tables[1]), "rows": tables[0].num_rows, "two_processes_per_s": local_rate,
        "two_actors_per_s": ray_rate, "ratio": ray_rate / local_rate, "two_processes_s": local_s,
        "two_actors_s": ray_s,
    }  # fmt: skip


def live(given: argparse.Namespace, source: Path, room: Path) -> Values:
    """Seconds from an image (a file put in place; a path written to the pipe) to its row, one image at a time."""
    images, found = sorted(source.rglob("*.*")), Values()
    for name, words in (("watch", (str(room / "arrive"), "--watch")), ("pipe", ("@-",))):
        (room / "arrive").mkdir(exist_ok=True)
        typed = [sys.executable, "-m", "twinspect", "predict", given.model, *words, "--out", "-"]
        with subprocess.Popen(typed, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            waits = []
            for image in images:
                began = time.perf_counter()
                if name == "watch":
                    os.rename(image, room / "arrive" / image.name)
                else:
                    print(room / "arrive" / image.name, file=process.stdin, flush=True)
                row = json.loads(process.stdout.readline())
                waits.append(1e3 * (time.perf_counter() - began) - row["ms"])
            process.terminate()
        found[f"{name}_ms_beyond_the_model"] = [float(np.percentile(waits[1:], q)) for q in (50, 95)]
    return found


def rate(folder: Path) -> float:
    """Rows a second while both workers were busy: between the tenth and the ninth tenth of the parts."""
    stored = sorted(marks(folder))
    low, high = stored[len(stored) // 10], stored[len(stored) * 9 // 10]
    return sum(rows for at, rows in stored if low[0] < at <= high[0]) / (high[0] - low[0])


def marks(folder: Path) -> Iterator[tuple[float, int]]:
    """When each part was stored, and its rows."""
    for path in folder.iterdir():
        part = Part.of(path.name)
        if part is not None:
            yield path.stat().st_mtime, part.rows


WHAT: dict[str, Callable[[argparse.Namespace, Path, Path], Values]] = {
    "memory": memory, "overhead": overhead, "kills": kills, "ray": on_ray,
    "live": live,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="decoding processes; 0 is threads")
    parser.add_argument("--part-rows", type=int, default=64)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", type=Path, default=None, help="folder for links and tables; on the images' disk")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=given.room) as room:
        found = WHAT[given.what](given, many(given.folder, given.images, Path(room) / "in"), Path(room))
    print(json.dumps({"what": given.what, "cpus": os.cpu_count(), **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
