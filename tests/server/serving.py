"""A server in a thread on a free loopback port, a model that only sees brightness, a client that may misbehave."""

from __future__ import annotations

import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from twinspect.decide.decision import Budget, Decision, GoodScores
from twinspect.inference.predictor import Predictor
from twinspect.server.app import build_app, prepared
from twinspect.server.log import InspectionLog
from twinspect.server.settings import Settings

DARK, BRIGHT = 40, 250  # grey levels of a good image and of an anomaly
BOUNDARY = "0123456789abcdef"


class Brightness:
    """Scores ten times the mean brightness (0 to 1); a call takes ``call_s`` plus ``image_s`` for each image."""

    size = 32

    def __init__(self, call_s: float = 0.0, image_s: float = 0.0) -> None:
        self.call_s, self.image_s = call_s, image_s
        self.batches: list[int] = []

    def run(self, pixels_BHWC):
        self.batches.append(len(pixels_BHWC))
        time.sleep(self.call_s + self.image_s * len(pixels_BHWC))
        grey = pixels_BHWC.astype(np.float64).mean(axis=3) / 25.5
        score_B = grey.mean(axis=(1, 2))
        grid_B1HW = grey.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))[:, None].astype(np.float32)
        return {
            "score_B": score_B, "score_local_B": score_B, "score_semantic_B": 0 * score_B, "map_B1HW": grid_B1HW,
            "cluster_B": np.zeros(len(score_B), int), "cluster_distance_B": np.ones(len(score_B)),
        }  # fmt: skip


class Broken(Brightness):
    """A model that is damaged in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def run(self, pixels_BHWC):
        if self.how == "raises":
            raise RuntimeError("out of memory at /secret/place")
        out = super().run(pixels_BHWC)
        return {**out, "score_B": np.full(len(pixels_BHWC), np.nan)}


def decision(model_id: str = "bright", seed: int = 0, classes: Sequence[str] = ("part",)) -> Decision:
    """Thresholds from 120 dark images; images are called bad from a score near 2.6 on."""
    scores = np.random.default_rng(seed).uniform(1.0, 2.6, 120)
    names = tuple(classes[i % len(classes)] for i in range(len(scores)))
    good = GoodScores(scores, scores, np.ones(len(scores)), names, names, [""] * len(names), [""] * len(names))
    return Decision(good, tuple(classes), (0.0, 8.0), Budget(0.01), model_id=model_id)


def predictor(runtime: Any = None, **changes: Any) -> Predictor:
    return Predictor(runtime or Brightness(), decision(**changes))


def encoded(level: int = DARK, side: int = 40, kind: str = "PNG", seed: int = 0) -> bytes:
    """An image file; the seed makes its bytes its own."""
    pixels = np.full((side, side + 8, 3), level, np.uint8)
    pixels[0, :3] = np.random.default_rng(seed).integers(0, 255, (3, 3))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def form(*files: tuple[str, bytes], field: str = "file") -> tuple[bytes, dict[str, str]]:
    """Body and headers of a form with files."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files
    ]
    body = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of an error; also proves that the error has its shape."""
        error = self.json["error"]
        assert set(error) == {"code", "message", "request_id"}
        assert error["message"]
        assert error["request_id"] == self.headers["x-request-id"]
        return error["code"]


class Running:
    """``with Running(...) as server: server.post(...)``."""

    def __init__(
        self,
        models: Mapping[str, Predictor | Path] | None = None,
        log: InspectionLog | None = None,
        open_file: Any = None,
        **settings: Any,
    ) -> None:
        self.settings = Settings(**{"port": 0, "watch_s": 0, **settings})
        more = {"open_file": open_file} if open_file else {}
        self.app = build_app(self.settings, models or {"bright": predictor()}, log, **more)
        self.headers = {"X-API-Key": self.settings.api_key} if self.settings.api_key else {}

    def __enter__(self) -> Running:
        self.server, listening = prepared(self.app, self.settings)
        self.port = listening.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self.thread.start()
        until = time.monotonic() + 20
        while not self.server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def ask(self, method: str, path: str, body: Any = None, headers: Any = None, timeout: float = 20) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {**self.headers, **(headers or {})})
            found = connection.getresponse()
            return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post_json(self, path: str, value: Any = None) -> Answer:
        return self.ask("POST", path, json.dumps(value or {}), {"Content-Type": "application/json"})

    def post(self, *images: bytes, query: str = "", name: str = "") -> Answer:
        """Images as a form."""
        body, headers = form(*((name or f"{i}.png", data) for i, data in enumerate(images)))
        return self.ask("POST", f"/v1/predict{query}", body, headers)

    def post_raw(self, data: bytes, kind: str = "image/png", query: str = "", **headers: str) -> Answer:
        return self.ask("POST", f"/v1/predict{query}", data, {"Content-Type": kind, **headers})

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


class Command:
    """``twinspect serve`` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "twinspect", "serve", *arguments, "--port", "0"],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline()
        found = re.search(r"http://[^;\s]+", self.first)
        assert found, self.process.communicate(timeout=20)
        self.url = found[0]

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=40)
        return self.process.returncode, errors


def post(url: str, data: bytes) -> dict:
    body, headers = form(("a.png", data))
    request = urllib.request.Request(f"{url}/v1/predict", body, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
