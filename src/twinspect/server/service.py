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
from concurrent.futures import Future, ThreadPoolExecutor
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
from twinspect.server.maps import MapStore, encoded_map, inline_map
from twinspect.server.models import Models, Queued, Scored, Served
from twinspect.server.settings import MEGABYTE, Settings

_HOUSEKEEPING_S = 60.0
_LOG_BATCH = 64  # rows of one transaction


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asks for with its images, as parameters of the address.

    Attributes:
        bundle: name of the model; empty for the only one.
        class_name: class of all images; empty predicts it.
        maps: ``link`` (fetch it later) or ``inline`` (base64).
        session: kept in the log.
        keep: whether the decisions count: go into the log and before the drift light.
    """

    bundle: Text = ""
    class_name: ClassName = ""
    maps: Literal["none", "link", "inline"] = "link"
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
        self.maps = MapStore(int(settings.maps_mb * MEGABYTE))
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
                        scored = await asyncio.gather(*self._begin(served, images, asked))
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
        rows = [self._row(one, number, asked.maps) for one, number in zip(results, numbers, strict=True)]
        return {
            "request_id": request_id,
            "bundle": served.name,
            "model_id": served.predictor.decision.model_id,
            "ms": round(1000 * (time.perf_counter() - began), 2),
            "log_error": trouble,
            "results": rows,
        }

    def _begin(self, served: Served, images: Sequence[Item], asked: Asked) -> list[asyncio.Future[Scored]]:
        """Results and keys to come; a decoder hands its image to the model itself, without a detour here."""
        promises = [Future[Scored]() for _ in images]
        served.batcher.announce(len(images))
        for image, promise in zip(images, promises, strict=True):
            self.decoders.submit(_decode, served, image, asked, self.settings, promise)
        return [asyncio.wrap_future(one) for one in promises]

    async def _keep(
        self, served: Served, scored: Sequence[Scored], asked: Asked, request_id: str
    ) -> tuple[list[int | None], str]:
        """Numbers in the log, None for what is not kept, and why not."""
        nothing: list[int | None] = [None] * len(scored)
        if self.writer is None or not asked.keep:
            return nothing, ""
        kept = {place: one for place, one in enumerate(scored) if not one[0].error}
        # In a thread: drawing takes some milliseconds.
        pictures = await asyncio.to_thread(lambda: [_picture(result) for result, _ in kept.values()])
        rows = {
            place: Inspection(result, served.name, request_id, key, asked.session, picture=picture)
            for (place, (result, key)), picture in zip(kept.items(), pictures, strict=True)
        }
        try:
            numbers = await asyncio.gather(*(asyncio.wrap_future(self.writer.submit(row)) for row in rows.values()))
        except LogError as error:
            self.metrics.log_errors.inc(len(rows))
            say("log_trouble", logging.ERROR, message=str(error))
            if self.settings.log_required:
                raise
            return nothing, str(error)
        number_of = dict(zip(rows, numbers, strict=True))
        return [number_of.get(place) for place in range(len(scored))], ""

    def _row(self, result: Result, number: int | None, maps: str) -> dict[str, Any]:
        """One image's answer as plain JSON values."""
        return {
            "log_id": number,
            **result.answer_row(),
            "map_scale": list(result.scale),
            "map_id": self.maps.add(result) if maps != "none" else "",
            "map": inline_map(result) if maps == "inline" else None,
            # Base64 of a few kB; what is good needs no explanation.
            "nearest_jpeg": base64.b64encode(result.near[1]).decode() if result.answer not in ("", GOOD) else "",
        }

    # ---------------------------------------------------------------------------------------- others

    async def map_bytes(self, name: str, format: str, side: int) -> bytes:
        """A map of a recent answer; see `encoded_map`."""
        result = self.maps.get(name)
        with self.gate.enter(1, 0.0):  # large pictures take memory and time like an image does
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.decoders, encoded_map, result, format, side)

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


def _picture(result: Result) -> bytes:
    """A JPEG of an image under its map, if its pixels were kept; they are let go of."""
    if result.rgb is None:
        return b""
    body = io.BytesIO()
    result.overlay(words=False).save(body, "JPEG", quality=80)
    result.rgb = None
    return body.getvalue()


def _shrunk(decoded: Decoded, side: int) -> Decoded:
    """The same, its whole image made small: many wait for the model at a time."""
    if decoded.rgb is None:
        return decoded
    small = Image.fromarray(decoded.rgb)
    small.thumbnail((side, side))
    return decoded._replace(rgb=np.asarray(small))


def _decode(served: Served, image: Item, asked: Asked, settings: Settings, promise: Future[Scored]) -> None:
    """Queue an announced image for the model; one that cannot be read is answered here."""
    queued = False
    try:
        if promise.cancelled():  # nobody waits for it any more
            return
        side = settings.log_thumbnails if asked.keep else 0
        decoded = _shrunk(served.predictor.decode(image, pixels=side > 0), side)
        key = image_id(hashlib.sha256(image.data or b"").digest())
        if decoded.square is not None:
            queued = True
            job = Queued(decoded, asked.class_name or None, asked.keep, key)
            served.batcher.submit(job, settings.timeout_s, promise, announced=True)
        elif promise.set_running_or_notify_cancel():
            promise.set_result((Result(decoded.name, error=decoded.error), key))
    except Exception as error:  # whatever it is belongs to the request
        if promise.set_running_or_notify_cancel():
            promise.set_exception(error)
    finally:
        if not queued:
            served.batcher.turned_back()


def _refuse_failures(results: Sequence[Result]) -> None:
    """A model that gives no numbers is an error of ours; images that are none are the client's, if all are."""
    damaged = [one.error for one in results if one.error and one.width]
    if damaged:
        say("model_damaged", logging.ERROR, message=json.dumps(damaged[:1]))
        raise Refused(500, "model_damaged", "the model gave a score that is not finite; put another bundle in place")
    if all(one.error for one in results):
        raise Refused(422, "bad_image", "; ".join(one.error for one in results[:3]))
