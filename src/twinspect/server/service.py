"""What the server does, without HTTP: admission, decoding, scoring, keeping, reloading, housekeeping."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from twinspect.decide.decision import GOOD, image_id
from twinspect.decide.drift import DriftMonitor
from twinspect.errors import TwinspectError
from twinspect.inference.archives import Item
from twinspect.inference.decode import Decoded
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result
from twinspect.server.batcher import Batcher
from twinspect.server.guard import Metrics, Refused, say
from twinspect.server.log import ClassName, Inspection, InspectionLog, LogError, Text
from twinspect.server.models import Models, Queued, Scored, Served
from twinspect.server.settings import Settings

_HOUSEKEEPING_S = 60.0
_LOG_BATCH = 64  # rows of one transaction
_OVERLAY = 1024  # longest side of a picture with an answer, in pixels


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asks for with its images, as parameters of the address.

    Attributes:
        bundle: name of the model; empty for the only one.
        class_name: class of all images; empty predicts it.
        maps: ``inline`` adds the anomaly map as numbers, ``overlay`` the image under it as a picture; both in base64.
        session: kept in the log.
        keep: whether the decisions count: go into the log and before the drift light.
    """

    bundle: Text = ""
    class_name: ClassName = ""
    maps: Literal["none", "inline", "overlay"] = "none"
    session: Text = ""
    keep: bool = True


class Gate:
    """Counts images between acceptance and answer, and tells a gauge."""

    def __init__(self, limit: int, gauge: Callable[[float], None]) -> None:
        self.limit, self.inside, self._gauge = limit, 0, gauge

    def check(self, count: int, seconds_per_image: float) -> None:
        """Refuse what does not fit now."""
        if count > self.limit:
            raise Refused(413, "too_many", f"{count} images; the queue takes {self.limit} in all, send fewer")
        if self.inside + count > self.limit:
            wait = max(1, math.ceil(self.inside * seconds_per_image))
            raise Refused(429, "busy", f"{self.inside} images are waiting, {self.limit} may; try again later", wait)

    @contextmanager
    def enter(self, count: int, seconds_per_image: float) -> Iterator[None]:
        """Hold places for a number of images; raises as `check`."""
        self.check(count, seconds_per_image)
        self.inside += count
        self._gauge(self.inside)
        try:
            yield
        finally:
            self.inside -= count
            self._gauge(self.inside)


class Service:
    """Everything behind the routes. Made on any thread, used on one event loop; arguments as `app.build_app`."""

    def __init__(
        self,
        settings: Settings,
        predictors: Mapping[str, Predictor],
        log: InspectionLog | None,
        paths: Mapping[str, Path],
        open_file: Callable[[Path], Predictor],
    ) -> None:
        self.settings, self.log, self.metrics = settings, log, Metrics()
        self.gate = Gate(settings.queue, self.metrics.waiting.set)
        self.models = Models(paths, open_file, self._make)
        self.decoders = ThreadPoolExecutor(settings.decoders, "decode")
        self.writer = Batcher(log.append, _LOG_BATCH, name="log") if log is not None else None
        self.ready = False
        self._tasks: list[asyncio.Task[None]] = []
        for name, predictor in predictors.items():
            self.models.add(name, predictor)

    # ------------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Begin to look after files, drift and old rows."""
        self._tasks = [asyncio.create_task(self._housekeeping())]
        if self.settings.watch_s:
            self._tasks.append(asyncio.create_task(self._watch_files()))
        self.ready = True

    async def stop(self) -> None:
        """Finish what was accepted, keep what must not be lost, end all threads."""
        self.ready = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.models.close()
        if self.writer is not None:
            await asyncio.to_thread(self.writer.close)
        self.decoders.shutdown(wait=False, cancel_futures=True)

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            if self.log is not None and self.settings.log_days:
                try:
                    gone = await asyncio.to_thread(self.log.prune, self.settings.log_days)
                except LogError as error:
                    say("log_trouble", logging.ERROR, message=str(error))
                else:
                    say("log_pruned", rows=gone)

    async def _watch_files(self) -> None:
        while True:
            await asyncio.sleep(self.settings.watch_s)
            for name in await self.models.changed():
                try:
                    await self.reload(name)
                except TwinspectError as error:
                    say("reload_failed", logging.ERROR, bundle=name, message=str(error))

    def _make(self, name: str, predictor: Predictor, before: Served | None) -> Served:
        """A predictor with its worker and its drift light, which lives on where the calibration is the same."""
        predictor.limits = self.settings.limits
        good, rate = predictor.decision.good, self.settings.drift_rate
        same = before is not None and before.light.good.to_dict() == good.to_dict()
        light = before.light if before is not None and same else DriftMonitor(good, rate)
        self.metrics.drift.labels(name).set(light.alarmed)
        batching = (self.settings.max_batch, self.settings.max_wait_ms / 1000)
        return Served(name, predictor, light, batching, self._observe, self._alarm)

    def _observe(self, name: str, images: int, seconds: float) -> None:
        self.metrics.batch.labels(name).observe(images)
        self.metrics.model_seconds.labels(name).observe(seconds)

    def _alarm(self, name: str, message: str) -> None:
        self.metrics.drift.labels(name).set(1)
        say("drift", logging.WARNING, bundle=name, message=message)

    # --------------------------------------------------------------------------------------- predict

    def refuse_if_full(self, bundle: str) -> Served:
        """The model asked for, before a body is read for nothing."""
        if not self.ready:
            raise Refused(503, "stopping", "the server is starting or stopping; try again", 1)
        served = self.models.get(bundle)
        self.gate.check(1, served.batcher.seconds_per_job)
        return served

    async def predict(self, images: Sequence[Item], asked: Asked, request_id: str) -> dict[str, Any]:
        """Answers for images, kept in the log."""
        served = self.refuse_if_full(asked.bundle)
        served.predictor.decision.checked_class(asked.class_name or None)
        began = time.perf_counter()
        served.users += 1
        try:
            with self.gate.enter(len(images), served.batcher.seconds_per_job):
                try:
                    async with asyncio.timeout(self.settings.timeout_s):
                        scored = await asyncio.gather(*(self._score(served, image, asked) for image in images))
                        results = [result for result, _ in scored]
                        for one in results:
                            answer = "error" if one.error else one.answer
                            self.metrics.images.labels(served.name, answer).inc()
                        _refuse_failures(results)
                        numbers, trouble = await self._keep(served, scored, asked, request_id)
                except TimeoutError:
                    wait = f"{self.settings.timeout_s:g}"
                    raise Refused(504, "timeout", f"no answer within {wait} s; send fewer images, or later") from None
        finally:
            served.users -= 1
        rows = await asyncio.to_thread(
            lambda: [_row(one, number, asked.maps) for one, number in zip(results, numbers, strict=True)]
        )
        return {
            "request_id": request_id,
            "bundle": served.name,
            "model_id": served.predictor.decision.model_id,
            "ms": round(1000 * (time.perf_counter() - began), 2),
            "log_error": trouble,
            "results": rows,
        }

    async def _score(self, served: Served, image: Item, asked: Asked) -> Scored:
        side = max(self.settings.log_thumbnails if asked.keep else 0, _OVERLAY if asked.maps == "overlay" else 0)
        with served.batcher.expecting():
            loop = asyncio.get_running_loop()
            decoded, key = await loop.run_in_executor(self.decoders, _decoded, served.predictor, image, side)
            if decoded.square is None:
                return Result(decoded.name, error=decoded.error), key
            job = Queued(decoded, asked.class_name or None, asked.keep, key)
            scored = served.batcher.submit(job, self.settings.timeout_s)
        return await asyncio.wrap_future(scored)

    async def _keep(
        self, served: Served, scored: Sequence[Scored], asked: Asked, request_id: str
    ) -> tuple[list[int | None], str]:
        """Numbers in the log, None for what is not kept, and why not."""
        numbers: list[int | None] = [None] * len(scored)
        if self.writer is None or not asked.keep:
            return numbers, ""
        places = [place for place, (result, _) in enumerate(scored) if not result.error]
        side = self.settings.log_thumbnails  # in a thread: drawing takes some milliseconds
        pictures = await asyncio.to_thread(lambda: [_jpeg(scored[place][0], side) for place in places])
        rows = [
            Inspection(*scored[place], served.name, request_id, asked.session, picture=picture)
            for place, picture in zip(places, pictures, strict=True)
        ]
        try:
            kept = await asyncio.gather(*(asyncio.wrap_future(self.writer.submit(row)) for row in rows))
        except LogError as error:
            self.metrics.log_errors.inc(len(rows))
            say("log_trouble", logging.ERROR, message=str(error))
            if self.settings.log_required:
                raise
            return numbers, str(error)
        for place, number in zip(places, kept, strict=True):
            numbers[place] = number
        return numbers, ""

    # ---------------------------------------------------------------------------------------- others

    async def reload(self, name: str) -> Served:
        """Read a model's file again; see `Models.reload`."""
        try:
            fresh = await self.models.reload(name)
        except TwinspectError:
            self.metrics.reloads.labels(name, "failed").inc()
            raise
        self.metrics.reloads.labels(name, "done").inc()
        say("reloaded", bundle=fresh.name, model_id=fresh.predictor.decision.model_id)
        return fresh

    def the_log(self) -> InspectionLog:
        """The log; refused with 404 where there is none."""
        if self.log is None:
            raise Refused(404, "no_log", "this server keeps no inspection log; start it with --log FILE")
        return self.log


def _row(result: Result, number: int | None, maps: str) -> dict[str, Any]:
    return {
        "log_id": number,
        **result.answer_row(),
        "map_scale": list(result.scale),
        "map": _inline_map(result) if maps == "inline" else None,
        "overlay": base64.b64encode(_jpeg(result, _OVERLAY)).decode() if maps == "overlay" else "",
        # Base64 of a few kB; what is good needs no explanation.
        "nearest_jpeg": base64.b64encode(result.near[1]).decode() if result.answer not in ("", GOOD) else "",
    }


def _inline_map(result: Result) -> dict[str, Any] | None:
    if result.grid is None:
        return None
    data = base64.b64encode(np.ascontiguousarray(result.grid, dtype="<f4").tobytes()).decode("ascii")
    rows, columns = result.grid.shape
    return {"rows": rows, "columns": columns, "dtype": "float32", "scale": list(result.scale), "data": data}


def _jpeg(result: Result, side: int) -> bytes:
    """An image under its map, if its pixels were kept and a picture of such a side is wanted."""
    if result.rgb is None or not side:
        return b""
    body = io.BytesIO()
    result.overlay(side=side, words=False).save(body, "JPEG", quality=80)
    return body.getvalue()


def _decoded(predictor: Predictor, image: Item, side: int) -> tuple[Decoded, str]:
    """An image made ready, its pixels for pictures made small (many wait for the model at a time), and its key."""
    decoded = predictor.decode(image, pixels=side > 0)
    if decoded.rgb is not None:
        small = Image.fromarray(decoded.rgb)
        small.thumbnail((side, side))
        decoded = decoded._replace(rgb=np.asarray(small))
    return decoded, image_id(hashlib.sha256(image.data or b"").digest())


def _refuse_failures(results: Sequence[Result]) -> None:
    """A model that gives no numbers is an error of ours; images that are none are the client's, if all are."""
    damaged = [one.error for one in results if one.error and one.width]
    if damaged:
        say("model_damaged", logging.ERROR, message=json.dumps(damaged[:1]))
        raise Refused(500, "model_damaged", "the model gave a score that is not finite; put another bundle in place")
    if all(one.error for one in results):
        raise Refused(422, "bad_image", "; ".join(one.error for one in results[:3]))
