"""Measure the server as clients see it: batching, latency, overload, long loads, hostile requests, new versions.

python benchmarks/server.py parts.twin --image part.jpg
python benchmarks/server.py simulated                     # a model whose call costs 20 ms + 1 ms per image (GPU-like)
python benchmarks/server.py simulated --only soak --long 1800
python benchmarks/server.py parts.twin --only half --only storm --only reloads --long 1800

Loopback only. The client shares the cores with the server, and other work shows in every number, so the
load average is printed. Tables for people, the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

CALL_S, IMAGE_S = 0.020, 0.001  # of the simulated model
SIDE = 64  # of the simulated model's input
SIMULATED = "simulated"
Request = tuple[str, Callable[["Server", bytes], str]]  # a name, and what sends it and says what came
QUEUE = 16  # for the measurement of overload
PARTS = ("batching", "latency", "overload", "half", "storm", "reloads", "soak")


class Load(NamedTuple):
    """What a load client saw: seconds of each request, and its status."""

    seconds: list[float]
    status: list[int]
    wall_s: float

    @property
    def good(self) -> int:
        """Answered requests."""
        return self.status.count(200)

    @property
    def rate(self) -> float:
        """Answered requests a second."""
        return self.good / self.wall_s

    def percentile(self, percent: float) -> float:
        """Of answered requests, in seconds."""
        return float(
            np.percentile([s for s, code in zip(self.seconds, self.status, strict=True) if code == 200], percent)
        )


# --------------------------------------------------------------------------------------------- servers


def serve_simulated(options: list[str]) -> None:
    """A server over a stand-in model, in this process; for the sub-command that `started` runs."""
    from twinspect.decide.decision import Decision, GoodScores
    from twinspect.inference.predictor import Predictor
    from twinspect.server.app import build_app, serve
    from twinspect.server.log import InspectionLog
    from twinspect.server.settings import Settings

    class Simulated:
        size = SIDE

        def run(self, pixels_BHWC):
            time.sleep(CALL_S + IMAGE_S * len(pixels_BHWC))
            grey = pixels_BHWC.astype(np.float32).mean(axis=3) / 25.5
            score_B = grey.mean(axis=(1, 2)).astype(np.float64)
            grid_B1HW = grey.reshape(-1, 16, SIDE // 16, 16, SIDE // 16).mean(axis=(2, 4))[:, None]
            return {
                "score_B": score_B, "score_local_B": score_B, "score_semantic_B": score_B, "map_B1HW": grid_B1HW,
                "cluster_B": np.zeros(len(score_B), int), "cluster_distance_B": np.ones(len(score_B)),
            }  # fmt: skip

    scores = np.random.default_rng(0).uniform(1.0, 6.0, 200)
    good = GoodScores(scores, scores, np.ones(200), ["part"] * 200, ["part"] * 200, [""] * 200, [""] * 200)
    parser = argparse.ArgumentParser()
    for name, kind in (("--log", str), ("--max-batch", int), ("--queue", int), ("--max-body-mb", float)):
        parser.add_argument(name, type=kind, default=None)
    given = {k: v for k, v in vars(parser.parse_args(options)).items() if v is not None}
    log = InspectionLog(given.pop("log"))
    settings = Settings(port=0, watch_s=0, header_timeout_s=2.0, body_timeout_s=2.0, **given)
    app = build_app(settings, {"part": Predictor(Simulated(), Decision(good, ("part",), (0.0, 8.0)))}, log)
    serve(app, settings, lambda address: print(address, flush=True))


class Server(NamedTuple):
    """A running server."""

    host: str
    port: int
    pid: int

    @property
    def url(self) -> str:
        """Where images go."""
        return f"http://{self.host}:{self.port}/v1/predict"

    def rss_mb(self) -> float:
        """Resident memory."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", text)[0]) / 1024

    def handles(self) -> tuple[int, int]:
        """Open files and threads."""
        return len(os.listdir(f"/proc/{self.pid}/fd")), len(os.listdir(f"/proc/{self.pid}/task"))

    def cpu_s(self) -> float:
        """Seconds of a core that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def images_and_calls(self) -> tuple[float, float]:
        """Images that went through the model, and in how many calls."""
        return self.metric("twinspect_batch_images_sum"), self.metric("twinspect_batch_images_count")

    def answered(self) -> float:
        """Images that were scored, and not refused as unreadable."""
        return self.metric("twinspect_images_total") - self.metric("twinspect_images_total", 'answer="error"')

    def metric(self, name: str, label: str = "") -> float:
        """Sum of a counter over its labels, or over those with one."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return sum(
            float(v)
            for v in re.findall(
                rf"^{name}(?:{{.*}})? (\S+)$" if not label else rf"^{name}{{.*{label}.*}} (\S+)$", text, re.MULTILINE
            )
        )


@contextmanager
def started(model: str, folder: Path, *options: str) -> Iterator[Server]:
    """A server in a process of its own."""
    simulated = [sys.executable, __file__, "--serve-simulated"]
    command = simulated if model == SIMULATED else [sys.executable, "-m", "twinspect", "serve", model, "--port", "0"]
    log = folder / f"{time.monotonic_ns()}.db"
    with (folder / "server.log").open("ab") as errors:
        process = subprocess.Popen(
            [*command, "--log", str(log), *options], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    found = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
    if not found:
        raise SystemExit((folder / "server.log").read_text()[-2000:])
    server = Server(found[1], int(found[2]), process.pid)
    try:
        until = time.monotonic() + 60
        while not ready(server) and time.monotonic() < until:
            time.sleep(0.05)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


def ready(server: Server) -> bool:
    """Whether it answers."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def load(server: Server, image: Path, seconds: float, clients: int) -> Load:
    """Closed loop: so many clients for some seconds, each sends its next request once it has its answer."""

    async def run() -> Load:
        lines, loop = Lines(server, image.read_bytes()), asyncio.get_running_loop()
        began = loop.time()

        async def one() -> None:
            while loop.time() - began < seconds:
                await lines.ask(loop.time())

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(one())
        return lines.done(loop.time() - began)

    return asyncio.run(run())


def arrivals(server: Server, image: Path, gaps: Sequence[float]) -> Load:
    """Open loop: a request after each gap, in seconds, whether or not the ones before are answered.

    A request's time counts from the moment it was due, so that a client or server that falls behind shows.
    """

    async def run() -> Load:
        lines, loop = Lines(server, image.read_bytes()), asyncio.get_running_loop()
        began = due = loop.time()
        async with asyncio.TaskGroup() as group:
            for gap in gaps:
                due += gap
                await asyncio.sleep(due - loop.time())
                group.create_task(lines.ask(due))
        return lines.done(loop.time() - began)

    return asyncio.run(run())


def even(rate: float, seconds: float) -> list[float]:
    """Gaps of a line that takes a picture at regular intervals."""
    return [1.0 / rate] * round(rate * seconds)


def poisson(rate: float, seconds: float) -> list[float]:
    """Gaps of many independent clients."""
    return np.random.default_rng(0).exponential(1.0 / rate, round(rate * seconds)).tolist()


class Lines:
    """Requests with one image each over connections that stay open, and what came of them."""

    def __init__(self, server: Server, image: bytes) -> None:
        target = server.url.partition(str(server.port))[2]
        head = f"POST {target} HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: image/jpeg\r\n"
        self._body = f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image
        self._server, self._found = server, Load([], [], 0.0)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, due: float) -> None:
        """One request, whose time counts from when it was due; status 0 where no whole answer came."""
        while self._idle and self._idle[-1][0].at_eof():  # the server hangs up on those that rest
            self._idle.pop()[1].close()
        status = 0
        with suppress(OSError, asyncio.IncompleteReadError):
            status = await self._answer()
        self._found.seconds.append(asyncio.get_running_loop().time() - due)
        self._found.status.append(status)

    async def _answer(self) -> int:
        old = self._idle.pop() if self._idle else None
        reader, writer = old or await asyncio.open_connection(self._server.host, self._server.port)
        writer.write(self._body)
        answer = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.findall(rb"content-length: (\d+)", answer)[0]))
        if b"connection: close" in answer:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(answer[9:12])

    def done(self, wall_s: float) -> Load:
        """What was seen; connections are closed."""
        for _, writer in self._idle:
            writer.close()
        return self._found._replace(wall_s=wall_s)


# ----------------------------------------------------------------------------------------------- parts


def batching(model: str, image: Path, folder: Path, seconds: float, clients: int) -> dict[str, Any]:
    """Throughput at many clients, one image per call against as many as come together."""
    found = {}
    for name, limit in (("batch 1", "1"), ("micro-batching", "16")):
        with started(model, folder, "--max-batch", limit) as server:
            load(server, image, min(3.0, seconds), clients)
            before = server.images_and_calls()
            one = load(server, image, seconds, clients)
            images, calls = (b - a for a, b in zip(before, server.images_and_calls(), strict=True))
            found[name] = {
                "images_per_s": round(one.rate, 1), "p50_ms": milliseconds(one, 50),
                "p99_ms": milliseconds(one, 99), "images_per_call": round(images / max(calls, 1), 2),
                "not_200": len(one.status) - one.good,
            }  # fmt: skip
    found["gain"] = round(found["micro-batching"]["images_per_s"] / found["batch 1"]["images_per_s"], 2)
    return found


def latency(model: str, image: Path, folder: Path, seconds: float, clients: int) -> dict[str, Any]:
    """p99 at half of what the server can do, against one image at a time with nobody else there.

    "What it can do" is what ``clients`` get that never pause. Half of that comes in an open loop: evenly spaced, as
    from a line, and, harder, at random (Poisson), as from many independent clients.
    """
    with started(model, folder) as server:
        load(server, image, min(3.0, seconds), 1)
        alone = load(server, image, seconds, 1)
        full = load(server, image, seconds, clients)
        found: dict[str, Any] = {
            "alone_p50_ms": milliseconds(alone, 50), "alone_p99_ms": milliseconds(alone, 99),
            "full_images_per_s": round(full.rate, 1),
        }  # fmt: skip
        for name, gaps in (("even", even), ("poisson", poisson)):
            before, spent = server.images_and_calls(), server.cpu_s()
            half = arrivals(server, image, gaps(full.rate / 2, seconds))
            images, calls = (b - a for a, b in zip(before, server.images_and_calls(), strict=True))
            found[f"half_{name}"] = {
                "images_per_s": round(half.rate, 1), "images_per_call": round(images / max(calls, 1), 2),
                "p50_ms": milliseconds(half, 50), "p99_ms": milliseconds(half, 99),
                "server_cpu_ms_per_image": round(1000 * (server.cpu_s() - spent) / max(images, 1), 2),
                "p99_over_alone_p50": round(half.percentile(99) / alone.percentile(50), 2),
                "not_200": len(half.status) - half.good,
            }  # fmt: skip
    return found


def milliseconds(found: Load, percent: float) -> float:
    """A percentile for people."""
    return round(1000 * found.percentile(percent), 1)


def overload(model: str, image: Path, folder: Path, seconds: float, clients: int) -> dict[str, Any]:
    """Four times as many requests a second as can be answered, with a short queue."""
    with started(model, folder, "--queue", str(QUEUE)) as server:
        capacity = load(server, image, min(10.0, seconds), min(clients, QUEUE)).rate
        before, rss = server.metric("twinspect_images_total"), server.rss_mb()
        found = arrivals(server, image, even(4 * capacity, seconds))
        accepted = server.metric("twinspect_images_total") - before
        return {
            "capacity_per_s": round(capacity, 1), "offered_per_s": round(len(found.status) / found.wall_s, 1),
            "status": dict(Counter(found.status)), "accepted": int(accepted), "answered": found.good,
            "answered_p99_ms": milliseconds(found, 99),
            "rss_mb": [round(rss, 1), round(server.rss_mb(), 1)], "alive": ready(server),
        }  # fmt: skip


@contextmanager
def memory(server: Server, seconds: float) -> Iterator[list[float]]:
    """Resident memory before, and after each sixth of the time that the body takes, in MB."""
    ended, found = threading.Event(), [round(server.rss_mb(), 1)]

    def look() -> None:
        while not ended.wait(seconds / 6):
            found.append(round(server.rss_mb(), 1))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def half(model: str, image: Path, folder: Path, seconds: float, clients: int) -> dict[str, Any]:
    """Half of what the server can do, for long: nothing may grow, and every request is answered."""
    with started(model, folder) as server:
        capacity = load(server, image, min(20.0, seconds), clients).rate
        before = server.handles()
        with memory(server, seconds) as rss_mb:
            found = arrivals(server, image, even(capacity / 2, seconds))
        return {
            "seconds": round(found.wall_s), "capacity_per_s": round(capacity, 1),
            "images_per_s": round(found.rate, 1), "status": dict(Counter(found.status)),
            "p50_ms": milliseconds(found, 50), "p99_ms": milliseconds(found, 99),
            "longest_ms": milliseconds(found, 100), "rss_mb": rss_mb,
            "files_and_threads": [before, server.handles()], "alive": ready(server),
        }  # fmt: skip


def storm(model: str, image: Path, folder: Path, seconds: float, clients: int) -> dict[str, Any]:
    """Four times as many requests as can be answered, while others are slow, huge, malformed or hang up."""
    with started(model, folder, "--queue", str(QUEUE), "--max-body-mb", "2") as server:
        capacity = load(server, image, min(20.0, seconds), min(clients, QUEUE)).rate
        before, handles = server.answered(), server.handles()
        command = [sys.executable, __file__, "--attack", server.host, str(server.port), str(server.pid), str(seconds)]
        with (
            memory(server, seconds) as rss_mb,
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as others,
        ):
            found = arrivals(server, image, even(4 * capacity, seconds))
            hostile = json.loads(others.communicate()[0])
        return {
            "seconds": round(found.wall_s), "capacity_per_s": round(capacity, 1),
            "offered_per_s": round(len(found.status) / found.wall_s, 1), "status": dict(Counter(found.status)),
            "scored": int(server.answered() - before), "answered": found.good,
            "answered_p99_ms": milliseconds(found, 99), "hostile_requests": sum(hostile.values()),
            "hostile_outcomes": hostile, "rss_mb": rss_mb,
            "files_and_threads": [handles, server.handles()], "alive": ready(server),
        }  # fmt: skip


def reloads(model: str, image: Path, folder: Path, times: int) -> dict[str, Any]:
    """A model's file is replaced and read again many times, while clients never pause."""
    if model == SIMULATED:
        raise SystemExit("reloads need a bundle: a simulated model has no file")
    path = Path(shutil.copy(model, folder / "reloaded.twin"))
    with started(str(path), folder) as server:
        statuses: Counter[str] = Counter()
        took: list[float] = []

        def renew() -> None:
            for _ in range(times):
                shutil.copy(model, folder / "next.twin")
                os.replace(folder / "next.twin", path)
                began = time.monotonic()
                statuses[post(server, b"", "application/json", "/v1/models/reloaded/reload")] += 1
                took.append(time.monotonic() - began)

        rss, thread, found = [server.rss_mb()], threading.Thread(target=renew), Load([], [], 0.0)
        thread.start()
        while thread.is_alive():
            one = load(server, image, 2.0, 2)
            found = Load(found.seconds + one.seconds, found.status + one.status, found.wall_s + one.wall_s)
            rss.append(server.rss_mb())
        return {
            "reloads": dict(statuses), "reload_p50_ms": round(1000 * float(np.median(took))),
            "reload_longest_ms": round(1000 * max(took)), "seconds": round(found.wall_s),
            "status": dict(Counter(found.status)), "p50_ms": milliseconds(found, 50),
            "p99_ms": milliseconds(found, 99), "rss_mb": [round(rss[len(rss) * n // 6], 1) for n in range(6)],
            "rss_mb_end": round(rss[-1], 1), "alive": ready(server),
        }  # fmt: skip


def attack(server: Server, image: bytes, seconds: float) -> Counter[str]:
    """Hostile requests alone, by what came of them."""
    hostile = [one for one in ATTACKS if not one[0].startswith("good")]
    return mixed(server, image, seconds, hostile, 2)


def mixed(server: Server, image: bytes, seconds: float, requests: Sequence[Request], workers: int) -> Counter[str]:
    """Requests drawn at random, from several threads, by what came of them."""
    stop, outcomes, lock = time.monotonic() + seconds, Counter[str](), threading.Lock()

    def work(seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < stop:
            name, send = dice.choice(requests)
            try:
                said = send(server, image)
            except OSError as error:
                said = type(error).__name__
            with lock:
                outcomes[f"{name}: {said}"] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(workers)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return outcomes


def soak(server: Server, image: bytes, seconds: float, workers: int = 4) -> dict[str, Any]:
    """Good and hostile requests mixed; memory after each sixth of the time, and growth after the first tenth."""
    ended, samples, course = threading.Event(), list[float](), list[tuple[int, float]]()

    def look() -> None:
        began = time.monotonic()
        while not ended.wait(min(1.0, seconds / 20)):
            samples.append(server.rss_mb())
            if time.monotonic() - began > (len(course) + 1) * seconds / 6:
                course.append((round(time.monotonic() - began), round(samples[-1], 1)))

    watcher = threading.Thread(target=look)
    watcher.start()
    outcomes = mixed(server, image, seconds, ATTACKS, workers)
    ended.set()
    watcher.join()
    warm = samples[max(1, len(samples) // 10) :]
    quarter = max(1, len(warm) // 4)
    return {
        "seconds": seconds, "requests": sum(outcomes.values()), "outcomes": dict(sorted(outcomes.items())),
        "status": by_status(outcomes), "seconds_rss_mb": course,
        "rss_mb_start": round(warm[0], 1), "rss_mb_end": round(samples[-1], 1),
        "rss_mb_first_quarter": round(statistics.median(warm[:quarter]), 1),
        "rss_mb_last_quarter": round(statistics.median(warm[-quarter:]), 1),
        "files_and_threads": server.handles(), "alive": ready(server),
    }  # fmt: skip


def by_status(outcomes: Counter[str]) -> dict[str, int]:
    """Requests by what was answered, whatever was sent."""
    found: Counter[str] = Counter()
    for what, count in outcomes.items():
        found[what.rpartition(": ")[2]] += count
    return dict(sorted(found.items()))


# ----------------------------------------------------------------------------------------- the requests


def post(server: Server, body: bytes, kind: str, path: str = "/v1/predict", **headers: str) -> str:
    """Status of one request."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    try:
        connection.request("POST", path, body, {"Content-Type": kind, **headers})
        found = connection.getresponse()
        found.read()
        return str(found.status)
    finally:
        connection.close()


def cut(server: Server, sent: bytes, wait_s: float = 0.0) -> str:
    """Send some bytes and go away."""
    with socket.create_connection((server.host, server.port), timeout=30) as raw:
        raw.sendall(sent)
        time.sleep(wait_s)
    return "gone"


def many_files(count: int, data: bytes) -> bytes:
    """A form with so many files."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="%d.png"\r\n\r\n'
    return b"".join(head % n + data + b"\r\n" for n in range(count)) + b"--x--\r\n"


def bomb() -> bytes:
    """A small file of 400 megapixels."""
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    return out.getvalue()


_SQL = b'{"verdict": "\' OR 1=1 --"}'
_BOMB, _FORM = bomb(), "multipart/form-data; boundary=x"
_HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 100000\r\n\r\n"
ATTACKS: tuple[Request, ...] = (
    *[("good image", lambda server, image: post(server, image, "image/jpeg"))] * 6,
    ("good batch", lambda server, image: post(server, many_files(4, image), _FORM, "/v1/predict?maps=inline")),
    ("no image", lambda server, image: post(server, b"<script>" * 500, "image/png")),
    ("cut image", lambda server, image: post(server, image[: len(image) // 2], "image/png")),
    ("bomb", lambda server, image: post(server, _BOMB, "image/png")),
    ("empty", lambda server, image: post(server, b"", "image/png")),
    ("wrong type", lambda server, image: post(server, image, "text/html")),
    ("10,000 files", lambda server, image: post(server, many_files(10_000, b"x"), _FORM)),
    ("too large", lambda server, image: post(server, bytes(3 << 20), "image/png")),
    ("unknown bundle", lambda server, image: post(server, image, "image/png", "/v1/predict?bundle=../x")),
    ("foreign page", lambda server, image: post(server, image, "image/png", Origin="https://evil.example")),
    (
        "sql",
        lambda server, image: post(server, b'{"verdict": "\' OR 1=1 --"}', "application/json", "/v1/log/1/feedback"),
    ),
    ("gone in the head", lambda server, image: cut(server, b"POST /v1/pre")),
    ("gone in the body", lambda server, image: cut(server, _HEAD + image[:1000])),
    ("slow body", lambda server, image: cut(server, _HEAD + image[:1000], 0.3)),
    ("no http", lambda server, image: cut(server, b"\x16\x03\x01\x02\x00" * 10, 0.01)),
)


# ------------------------------------------------------------------------------------------------ main


def painted(path: Path) -> Path:
    """A JPEG of 640 x 480."""
    pixels = np.random.default_rng(0).normal(110, 12, (480, 640, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).resize((640, 480)).save(path, quality=85)
    return path


def show(name: str, values: dict[str, Any]) -> None:
    """A part's result for people."""
    print(f"{name}:")
    for key, value in values.items():
        print(f"  {key}: {value}")


def main() -> None:
    """Run the parts asked for."""
    if sys.argv[1:2] == ["--serve-simulated"]:
        serve_simulated(sys.argv[2:])
        return
    if sys.argv[1:2] == ["--attack"]:
        host, port, pid, seconds = sys.argv[2:]
        with tempfile.TemporaryDirectory() as name:
            image = painted(Path(name) / "a.jpg").read_bytes()
            print(json.dumps(attack(Server(host, int(port), int(pid)), image, float(seconds))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bundle, exported model, or: simulated")
    parser.add_argument("--image", type=Path, help="image to send; a painted JPEG without")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--long", type=float, default=120.0, help="seconds of half, storm and soak each")
    parser.add_argument("--reloads", type=int, default=50, help="how often a model's file is replaced")
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts only")
    given = parser.parse_args()
    wanted = given.only or list(PARTS)
    found: dict[str, Any] = {"model": given.model, "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = given.image or painted(folder / "painted.jpg")
        for part, measure in (("batching", batching), ("latency", latency), ("overload", overload)):
            if part in wanted:
                found[part] = measure(given.model, image, folder, given.seconds, given.clients)
                show(part, found[part])
        for part, measure in (("half", half), ("storm", storm)):
            if part in wanted:
                found[part] = measure(given.model, image, folder, given.long, given.clients)
                show(part, found[part])
        if "reloads" in wanted and (given.only or given.model != SIMULATED):
            found["reloads"] = reloads(given.model, image, folder, given.reloads)
            show("reloads", found["reloads"])
        if "soak" in wanted:
            with started(given.model, folder, "--max-body-mb", "2") as server:
                found["soak"] = soak(server, image.read_bytes(), given.long)
            show("soak", found["soak"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
