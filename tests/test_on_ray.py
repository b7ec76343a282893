"""The same rows from a cluster, also when one of its processes is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import ray
from test_bulk import Silent, first_parts, job, table
from tiny import picture, save

from twinspect.errors import TwinspectError
from twinspect.inference.bulk import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own: of its settings, and of sockets it leaves to the collector
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    first = save(root / "0000.png", picture(0, 40, 50))
    for number in range(1, 240):
        os.link(first, root / f"{number:04d}.png")
    (root / "0003.png").unlink()
    (root / "0003.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One for all tests here, as starting it takes seconds; workers find the tests' package where we do."""
    paths = os.pathsep.join(path for path in sys.path if path)
    env = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=env, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local(model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("local") / "t.parquet"
    run(job(model, out, images, part_rows=12), Silent())
    return table(out)


def test_same_rows_although_a_task_is_killed(
    model: Path, images: Path, local: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A local run breaks off, Ray goes on with it, and loses a process that holds a model on the way."""
    one = job(model, tmp_path / "t.parquet", images, part_rows=12)
    first_parts(one, 2)
    stored, killed, over = tmp_path / "t.parquet.parts", list[tuple[int, int]](), Event()

    def kill() -> None:
        while not over.is_set() and not killed:
            done = len(list(stored.glob("part-*")))
            for pid in tasks()[:1] if done > 2 else ():
                os.kill(pid, signal.SIGKILL)
                killed.append((pid, done))
            time.sleep(0.005)

    thread = Thread(target=kill)
    thread.start()
    try:
        totals = run(replace(one, engine="ray", actors=2), Silent())
    finally:
        over.set()
        thread.join()
    assert killed[0][1] < 240 // 12  # there was work left
    assert (totals.rows, totals.errors, totals.before) == (240, 1, 24)
    assert table(tmp_path / "t.parquet") == local


def tasks() -> list[int]:
    """Processes of tasks that score, by the title Ray gives them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_text()
        except OSError:
            continue
        if title.startswith("ray::") and "_score_share" in title:
            found.append(int(path.parent.name))
    return found


def test_errors_of_tasks_are_sentences(model: Path, images: Path, tmp_path: Path) -> None:
    one = job(model, tmp_path / "t.csv", images, class_name="nosuch", engine="ray", actors=1)
    with pytest.raises(TwinspectError, match=r"the run on Ray stopped \(.*nosuch.*same command"):
        run(one, Silent())
