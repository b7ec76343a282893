"""Measure the server as clients see it: batching, latency, overload, and a soak with hostile requests.

python benchmarks/server.py parts.twin --image part.jpg
python benchmarks/server.py simulated                     # a model whose call costs 20 ms + 1 ms per image (GPU-like)
python benchmarks/server.py simulated --only soak --soak 1800

Loopback only. The load comes from ``hey`` (apt-get install hey); tables for people, the last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

CALL_S, IMAGE_S = 0.020, 0.001  # of the simulated model
SIDE = 64  # of the simulated model's input
SIMULATED = "simulated"
QUEUE = 16  # for the measurement of overload
PARTS = ("batching", "latency", "overload", "soak")


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
    from twinspect.decision import Decision, GoodScores
    from twinspect.inference.predictor import Predictor
    from twinspect.server.app import build_app
    from twinspect.server.log import InspectionLog
    from twinspect.server.run import serve
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
                "prototype_B": np.zeros(len(score_B), int), "prototype_distance_B": np.ones(len(score_B)),
            }  # fmt: skip

    scores = np.random.default_rng(0).uniform(1.0, 6.0, 200)
    good = GoodScores(scores, scores, np.ones(200), ("part",) * 200, ("part",) * 200)
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
        return f"http://{self.host}:{self.port}/v1/predict?maps=none"

    def rss_mb(self) -> float:
        """Resident memory."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", text)[0]) / 1024

    def handles(self) -> tuple[int, int]:
        """Open files and threads."""
        return len(os.listdir(f"/proc/{self.pid}/fd")), len(os.listdir(f"/proc/{self.pid}/task"))

    def metric(self, name: str) -> float:
        """Sum of a counter over its labels."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


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


def load(server: Server, image: Path, seconds: float, clients: int, rate: float = 0.0) -> Load:
    """Requests for some seconds; ``rate`` > 0 is the number a second of all clients together, evenly spread.

    A single ``hey`` lets all its clients tick together, in bursts as large as their number; one for each client,
    started one after the other, does not.
    """
    command = [
        "hey",
        "-z",
        f"{seconds}s",
        "-m",
        "POST",
        "-T",
        "image/jpeg",
        "-D",
        str(image),
        "-o",
        "csv",
        "-t",
        "60",
    ]
    each = ["-c", "1", "-q", f"{rate / clients:.4f}"] if rate else ["-c", str(clients)]
    began = time.monotonic()
    running = []
    for _ in range(clients if rate else 1):
        running.append(subprocess.Popen([*command, *each, server.url], stdout=subprocess.PIPE, text=True))
        time.sleep(1.0 / rate if rate else 0.0)
    texts = [one.communicate()[0] for one in running]
    wall = time.monotonic() - began
    rows = [row for text in texts for row in csv.DictReader(io.StringIO(text))]
    return Load([float(r["response-time"]) for r in rows], [int(r["status-code"]) for r in rows], wall)


# ----------------------------------------------------------------------------------------------- parts


def batching(model: str, image: Path, folder: Path, seconds: float, clients: int) -> dict[str, Any]:
    """Throughput at many clients, one image per call against as many as come together."""
    found = {}
    for name, limit in (("batch 1", "1"), ("micro-batching", "16")):
        with started(model, folder, "--max-batch", limit) as server:
            load(server, image, min(3.0, seconds), clients)
            before = server.metric("twinspect_batch_images_count"), server.metric("twinspect_batch_images_sum")
            one = load(server, image, seconds, clients)
            calls = server.metric("twinspect_batch_images_count") - before[0]
            images = server.metric("twinspect_batch_images_sum") - before[1]
            found[name] = {
                "images_per_s": round(one.rate, 1), "p50_ms": round(1000 * one.percentile(50), 1),
                "p99_ms": round(1000 * one.percentile(99), 1), "images_per_call": round(images / max(calls, 1), 2),
                "not_200": len(one.status) - one.good,
            }  # fmt: skip
    found["gain"] = round(found["micro-batching"]["images_per_s"] / found["batch 1"]["images_per_s"], 2)
    return found


def latency(model: str, image: Path, folder: Path, seconds: float, clients: int) -> dict[str, Any]:
    """p99 at half of what the server can do, against one image at a time with nobody else there."""
    with started(model, folder) as server:
        load(server, image, min(3.0, seconds), 1)
        alone = load(server, image, seconds, 1)
        full = load(server, image, seconds, clients)
        half = load(server, image, seconds, clients, full.rate / 2)
    return {
        "alone_p50_ms": round(1000 * alone.percentile(50), 1), "alone_p99_ms": round(1000 * alone.percentile(99), 1),
        "full_images_per_s": round(full.rate, 1), "half_images_per_s": round(half.rate, 1),
        "half_p50_ms": round(1000 * half.percentile(50), 1), "half_p99_ms": round(1000 * half.percentile(99), 1),
        "half_p99_over_alone_p50": round(half.percentile(99) / alone.percentile(50), 2),
    }  # fmt: skip


def overload(model: str, image: Path, folder: Path, seconds: float, clients: int) -> dict[str, Any]:
    """Four times as many requests a second as can be answered, with a short queue."""
    with started(model, folder, "--queue", str(QUEUE)) as server:
        capacity = load(server, image, min(10.0, seconds), min(clients, QUEUE)).rate
        before, rss = server.metric("twinspect_images_total"), server.rss_mb()
        found = load(server, image, seconds, 4 * QUEUE, 4 * capacity)
        accepted = server.metric("twinspect_images_total") - before
        return {
            "capacity_per_s": round(capacity, 1), "offered_per_s": round(len(found.status) / found.wall_s, 1),
            "status": dict(Counter(found.status)), "accepted": int(accepted), "answered": found.good,
            "answered_p99_ms": round(1000 * found.percentile(99), 1),
            "rss_mb": [round(rss, 1), round(server.rss_mb(), 1)], "alive": ready(server),
        }  # fmt: skip


def soak(server: Server, image: bytes, seconds: float, workers: int = 4) -> dict[str, Any]:
    """Good and hostile requests mixed; resident memory after a tenth of the time, and at the end."""
    stop = time.monotonic() + seconds
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def work(seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < stop:
            name, attack = dice.choice(ATTACKS)
            try:
                said = attack(server, image)
            except OSError as error:
                said = type(error).__name__
            with lock:
                outcomes[f"{name}: {said}"] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(workers)]
    for one in threads:
        one.start()
    samples = []
    while any(one.is_alive() for one in threads):
        time.sleep(min(1.0, seconds / 20))
        samples.append(server.rss_mb())
    warm = samples[max(1, len(samples) // 10) :]
    quarter = max(1, len(warm) // 4)
    return {
        "seconds": seconds, "requests": sum(outcomes.values()), "outcomes": dict(sorted(outcomes.items())),
        "rss_mb_start": round(warm[0], 1), "rss_mb_end": round(samples[-1], 1),
        "rss_mb_first_quarter": round(statistics.median(warm[:quarter]), 1),
        "rss_mb_last_quarter": round(statistics.median(warm[-quarter:]), 1),
        "files_and_threads": server.handles(), "alive": ready(server),
    }  # fmt: skip


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
ATTACKS: tuple[tuple[str, Callable[[Server, bytes], str]], ...] = (
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bundle, exported model, or: simulated")
    parser.add_argument("--image", type=Path, help="image to send; a painted JPEG without")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--soak", type=float, default=120.0, help="seconds of the soak")
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts only")
    given = parser.parse_args()
    wanted = given.only or list(PARTS)
    if shutil.which("hey") is None and wanted != ["soak"]:
        raise SystemExit("hey is not installed; type: apt-get install hey")
    found: dict[str, Any] = {"model": given.model, "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = given.image or painted(folder / "painted.jpg")
        for part, measure in (("batching", batching), ("latency", latency), ("overload", overload)):
            if part in wanted:
                found[part] = measure(given.model, image, folder, given.seconds, given.clients)
                show(part, found[part])
        if "soak" in wanted:
            with started(given.model, folder, "--max-body-mb", "2") as server:
                found["soak"] = soak(server, image.read_bytes(), given.soak)
            show("soak", found["soak"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
