"""Broken disks, killed processes, two at once: the same end result, or words; never half of something.

``TWINSPECT_FUZZ=10`` kills ten times as often: forty commands.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hostile import FACTOR, tried
from tiny import good_folder, picture, run_config, save
from typer.testing import CliRunner

from twinspect import Detector, files
from twinspect.bundle import read_bundle
from twinspect.cli import app
from twinspect.commands.info import describe
from twinspect.training.loop import LOCK

SMALL = "--teacher test_vit --random-teacher --size 64 --steps 8 --depth 2 --batch 4 --checkpoint-every 2".split()
OF_TIME = ("seconds", "memory", "durations", "written", "date")  # what two runs never share
needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_folder(tmp_path_factory.mktemp("faults") / "good", 24)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good images that nothing was trained on."""
    folder = tmp_path_factory.mktemp("fresh") / "fresh"
    for number in range(24):
        save(folder / f"{number}.png", picture(500 + number))
    return folder


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "twinspect", *map(str, words)]


def without_times(value: Any) -> Any:
    """A record without what a clock or a meter has said."""
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in OF_TIME}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def said_by(bundle: Path) -> tuple[Any, ...]:
    """All that a bundle holds but times."""
    content = read_bundle(bundle)
    return without_times(content.meta), content.tensors, content.memory


# ------------------------------------------------------------------------------------------ the same again


def test_the_same_seed_gives_a_bit_identical_bundle(good: Path, tmp_path: Path) -> None:
    made = [Detector(config=run_config()).fit(good).save(tmp_path / f"{number}.twin") for number in range(2)]
    assert said_by(made[0]) == said_by(made[1])
    first, second = (describe(path).values for path in made)
    assert first["learnt from"] == second["learnt from"]
    assert first["learnt from"].startswith("24 images, sha256 of their ids ")
    assert (first["seed"], first["training"]["steps"]) == (0, 3)
    other = Detector(config=run_config(seed=1)).fit(good).save(tmp_path / "other.twin")
    assert said_by(other)[1] != said_by(made[0])[1]


def outcome(path: Path) -> Any:
    """All that a finished command has left, but times."""
    if path.suffix == ".twin":
        return said_by(path)
    if path.suffix == ".onnx":
        return path.read_bytes(), path.with_name(f"{path.name}.json").read_bytes()
    with path.open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name != "ms"} for row in csv.DictReader(file)]


@needs_posix
@pytest.mark.slow
@pytest.mark.parametrize("what", ["fit", "calibrate", "update", "export", "predict"])
def test_killed_at_any_moment_and_begun_again_gives_the_same(
    what: str, good: Path, fresh: Path, tmp_path: Path
) -> None:
    """Old or new after each kill, never between; and in the end what nothing disturbed has made."""
    ending = {"predict": ".csv", "export": ".onnx"}.get(what, ".twin")
    calm, shaken, model = (tmp_path / name / f"m{ending}" for name in ("calm", "shaken", "model"))
    model = model.with_suffix(".twin")
    for path in (calm, shaken, model):
        path.parent.mkdir()
    first = Detector(config=run_config()).fit(good)

    def line(out: Path) -> list[str]:
        if what == "fit":
            return command("fit", good, "--out", out, "--force", *SMALL)
        if what == "calibrate":
            return command("calibrate", out, fresh, "--max-fpr", "0.1", "--force")
        if what == "update":
            return command("update", model, fresh, "--class", first.fitted.decision.classes[0], "--out", out)
        if what == "export":
            return command("export", model, "--out", out)
        return command("predict", model, fresh, "--out", out, "--part-rows", "4", "--workers", "0")

    for path in (calm, shaken) if what == "calibrate" else (model,):
        first.save(path)
    before = outcome(shaken) if shaken.exists() else None
    began = time.monotonic()
    done = subprocess.run(line(calm), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole_s, after = time.monotonic() - began, outcome(calm)
    chance = random.Random(0)
    for _ in range(FACTOR):
        process = subprocess.Popen(line(shaken), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.2, 1) * whole_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if shaken.exists():
            assert outcome(shaken) in (before, after)
        tried(f"kills of {what}")
    done = subprocess.run(line(shaken), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcome(shaken) == after
    left = {one.name for one in shaken.parent.iterdir()} - {one.name for one in calm.parent.iterdir()}
    assert not left


# ------------------------------------------------------------------------------------------ two at once


def test_a_second_fit_in_a_folder_is_refused(good: Path, tmp_path: Path) -> None:
    work = tmp_path / "m.twin.work"
    work.mkdir()
    with files.lock(work / LOCK, ""):
        found = CliRunner().invoke(app, ["fit", str(good), "--out", str(tmp_path / "m.twin"), *SMALL])
        assert found.exit_code == 2
        assert f"another fit is writing {work} now; wait for it, or take another --out" in found.output
    found = CliRunner().invoke(app, ["fit", str(good), "--out", str(tmp_path / "m.twin"), *SMALL])
    assert found.exit_code == 0, found.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.train.jsonl", "m.twin"]
    steps = [json.loads(one)["step"] for one in (tmp_path / "m.train.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


WRITE_ROWS = """
import sys
from twinspect.inference.result import Result
from twinspect.server.log import Inspection, InspectionLog

log = InspectionLog(sys.argv[1])
for number in range(int(sys.argv[2])):
    results = [Result(f"{sys.argv[3]}-{number}-{k}", score=1.0, answer="good") for k in range(3)]
    rows = [Inspection(one, "k", "b", "r") for one in results]
    print(*log.append(rows), flush=True)
"""


def rows_of(log: Path) -> dict[int, str]:
    with closing(sqlite3.connect(log)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return dict(connection.execute("SELECT id, name FROM twinspect_inspections"))


def test_two_servers_on_one_log_lose_no_row(tmp_path: Path) -> None:
    log = tmp_path / "log.db"
    words = [sys.executable, "-c", WRITE_ROWS, str(log), "60"]
    both = [subprocess.Popen([*words, name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    numbers = [int(one) for process in both for one in process.communicate()[0].split()]
    assert [process.returncode for process in both] == [0, 0]
    assert len(numbers) == len(set(numbers)) == 360
    assert rows_of(log).keys() == set(numbers)
    tried("rows of two servers", 360)


@needs_posix
def test_a_server_killed_while_it_writes_has_lost_nothing_that_it_said(tmp_path: Path) -> None:
    log, chance, told = tmp_path / "log.db", random.Random(1), set()
    for turn in range(2 * FACTOR):
        words = [sys.executable, "-c", WRITE_ROWS, str(log), "1000000", str(turn)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        with process:
            assert process.stdout is not None
            first = process.stdout.readline()
            time.sleep(chance.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            lines = (first + process.stdout.read()).splitlines(keepends=True)
        told |= {int(one) for line in lines if line.endswith("\n") for one in line.split()}
        kept = rows_of(log)
        assert told <= kept.keys()
        assert len(kept) % 3 == 0  # a request's rows are kept together
        tried("kills of a server's log")
    assert len(told) >= 3


# ------------------------------------------------------------------------------------------ broken disks


@needs_posix
@pytest.mark.slow
@pytest.mark.parametrize("what", ["fit", "calibrate", "predict"])
def test_a_disk_that_is_full(what: str, good: Path, tmp_path: Path, quick: Detector) -> None:
    """The system itself refuses to write more than some kilobytes to a file."""
    import resource

    model = quick.save(tmp_path / "m.twin")
    before = model.read_bytes()
    line = {
        "fit": command("fit", good, "--out", model, *SMALL),
        "calibrate": command("calibrate", model, good, "--class", "ring", "--max-fpr", "0.1"),
        "predict": command("predict", model, good, "--out", tmp_path / "t.parquet"),
    }[what]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    # `make coverage` could not write its own file there.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    env["TWINSPECT_HOME"] = str(tmp_path / "home")
    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=limit, env=env)
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert model.read_bytes() == before
    assert not list(tmp_path.glob("_tmp-*"))
    assert not (tmp_path / "t.parquet").exists()
