"""What the server does, without HTTP: admission, decoding, scoring, keeping, new versions of models."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import hashlib
import io
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from PIL import Image

from twinspect.bundle import signature_file
from twinspect.decide.decision import GOOD, image_id, promises
from twinspect.decide.drift import DriftMonitor
from twinspect.errors import TwinspectError, unknown_name
from twinspect.files import state
from twinspect.inference.decode import Decoded
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result
from twinspect.inference.streams import Item
from twinspect.server import Refused
from twinspect.server.guard import SOON, Metrics, logger, say
from twinspect.server.log import ClassName, Inspection, InspectionLog, LogError, Text
from twinspect.server.schema import ModelAnswer, PredictAnswer, Thresholds
from twinspect.server.settings import Settings

Job = TypeVar("Job")
Answer = TypeVar("Answer")
_DECODERS = 2  # threads
_PRUNING_S = 60.0
_LOG_BATCH = 64  # rows of one transaction
_OVERLAY = 1024  # longest side of a picture with an answer, in pixels


class Batcher(Generic[Job, Answer]):
    """Collects jobs into batches for a function that does several at once cheaper than one by one.

    A batch leaves at once when no other job is on the way, so that a lone caller never waits; otherwise it waits for
    those that are expected, but not longer than ``max_wait_s``. While a batch runs, the next one gathers.

    ``run`` gives one answer for each job, in order; what it raises reaches every job of the batch. It runs in
    a thread of its own, which ends with the batcher; everything else happens on one event loop.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], Sequence[Answer]],
        max_batch: int,
        max_wait_s: float = 0.0,
        name: str = "batcher",
    ) -> None:
        self._run, self._max_batch, self._max_wait_s = run, max_batch, max_wait_s
        self._jobs: deque[tuple[Job, asyncio.Future[Answer]]] = deque()
        self._expected, self._change = 0, asyncio.Event()
        self._thread = ThreadPoolExecutor(1, name)  # started by the first job
        self._worker: asyncio.Task[None] | None = None

    async def do(self, job: Job) -> Answer:
        """The answer to a job. One whose caller gives up before its turn is not done."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._jobs.append((job, future))
        self._change.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """While entered, a job is on the way: a batch waits for it."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1
            self._change.set()

    async def close(self) -> None:
        """Finish the jobs that there are, end the thread."""
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        while self._jobs:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._max_wait_s):
                    while self._expected and len(self._jobs) < self._max_batch:
                        self._change.clear()
                        await self._change.wait()
            batch = [self._jobs.popleft() for _ in range(min(self._max_batch, len(self._jobs)))]
            if alive := [(job, future) for job, future in batch if not future.done()]:
                await self._answer([job for job, _ in alive], [future for _, future in alive])

    async def _answer(self, jobs: list[Job], futures: list[asyncio.Future[Answer]]) -> None:
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, jobs)
            for future, answer in zip(futures, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        except Exception as error:  # whatever it is belongs to the callers; the worker lives on
            for future in futures:
                if not future.done():
                    future.set_exception(error)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asks for with its images, as parameters of the address; `app.predict` explains them."""

    bundle: Text = ""
    class_name: ClassName = ""
    maps: Literal["none", "inline", "overlay"] = "none"
    session: Text = ""
    keep: bool = True


class Served:
    """One version of one model, its worker and its drift monitor. Requests that hold an old version keep it alive.

    The drift monitor of the version ``before`` lives on where the calibration is the same. ``trouble`` says why a
    newer version of the file is not the one being served.
    """

    def __init__(
        self, name: str, predictor: Predictor, settings: Settings, metrics: Metrics, before: Served | None = None
    ) -> None:
        self.name, self.predictor, self.trouble = name, predictor, ""
        predictor.max_pixels = int(settings.max_megapixels * 1e6)
        good = predictor.decision.good
        same = before is not None and before.light.good.to_dict() == good.to_dict()
        self.light: DriftMonitor = before.light if before is not None and same else DriftMonitor(good)
        light = self.light
        metrics.drift.labels(name).set_function(lambda: light.alarmed)  # which keeps no old version alive
        run, wait_s = partial(_score, predictor, metrics, name), settings.max_wait_ms / 1000
        self.batcher = Batcher[tuple[Decoded, str | None], Result](run, settings.max_batch, wait_s, f"model-{name}")

    def describe(self) -> ModelAnswer:
        """What clients may know of it."""
        decision, runtime = self.predictor.decision, self.predictor.runtime
        thresholds = {
            name: Thresholds(rule.image.value, rule.region.value if rule.region else None, rule.image.sentence)
            for name, rule in promises(decision)
        }
        return ModelAnswer(
            self.name, decision.model_id, runtime.size, type(runtime).__name__, decision.classes,
            list(decision.map_scale), thresholds, self.trouble,
        )  # fmt: skip


def _trim_memory() -> None:
    """Give free memory back to the system: the C library of Linux keeps some for every thread that read a model."""
    with suppress(AttributeError, OSError, TypeError):  # other systems have no such function, or give no handle
        ctypes.CDLL(None).malloc_trim(0)


class Service:
    """Everything behind the routes. Made on any thread, used on one event loop; arguments as `app.build_app`."""

    def __init__(
        self,
        settings: Settings,
        models: Mapping[str, Predictor | Path],
        log: InspectionLog | None,
        open_file: Callable[[Path], Predictor],
    ) -> None:
        self.settings, self.log, self.metrics = settings, log, Metrics()
        self.ready = False
        self._open, self._reloading = open_file, asyncio.Lock()
        self._paths = {name: model for name, model in models.items() if isinstance(model, Path)}
        self._states = {name: _state(path) for name, path in self._paths.items()}  # when they were last read
        self.models = {
            name: Served(name, open_file(model) if isinstance(model, Path) else model, settings, self.metrics)
            for name, model in models.items()
        }
        self._accepted = 0  # images between acceptance and answer
        self.metrics.waiting.set_function(lambda: self._accepted)
        self._decoders = ThreadPoolExecutor(_DECODERS, "decode")
        # In a thread of its own: neither answers nor the next call of a model wait for the drift monitors.
        self._watcher = ThreadPoolExecutor(1, "drift")
        self._writer = Batcher(log.append, _LOG_BATCH, name="log") if log is not None else None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look after files and old rows while entered; at the end finish what was accepted, and end all threads."""
        tasks = []
        if self.log is not None and self.settings.log_days:
            tasks.append(asyncio.create_task(_every(_PRUNING_S, self._prune)))
        if self.settings.watch_s:
            tasks.append(asyncio.create_task(_every(self.settings.watch_s, self._reload_changed)))
        self.ready = True
        try:
            yield
        finally:
            self.ready = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            batchers = [served.batcher for served in self.models.values()]
            for batcher in (*batchers, self._writer):
                if batcher is not None:
                    await batcher.close()
            await asyncio.to_thread(self._watcher.shutdown)
            self._decoders.shutdown(wait=False, cancel_futures=True)

    async def _prune(self) -> None:
        say("log_pruned", rows=await asyncio.to_thread(self.the_log().prune, self.settings.log_days))

    def the_log(self) -> InspectionLog:
        """The log; refused with 404 where there is none."""
        if self.log is None:
            raise Refused(404, "no_log", "this server keeps no inspection log; start it with --log FILE")
        return self.log

    def model(self, name: str) -> Served:
        """The present version of a model; an empty name takes the only one."""
        if not name and len(self.models) > 1:
            names = ", ".join(self.models)
            raise Refused(400, "which_bundle", f"several models are served, none is named; add bundle=NAME: {names}")
        chosen = name or next(iter(self.models), "")
        if chosen not in self.models:
            raise Refused(404, "unknown_bundle", unknown_name("bundle", name[:200], self.models))
        return self.models[chosen]

    async def reload(self, name: str) -> Served:
        """Read a model's file again; requests that hold the old version finish with it.

        A TwinspectError where it has no file, or one that cannot be used; the old version stays in service.
        """
        path = self._paths.get(self.model(name).name)
        if path is None:
            raise Refused(409, "no_file", f"{name} was not opened from a file and cannot be reloaded")
        async with self._reloading:
            old = self.model(name)
            self._states[name] = _state(path)
            try:
                predictor = await asyncio.to_thread(self._open, path)
            except TwinspectError as error:
                old.trouble = str(error)
                self.metrics.reloads.labels(name, "failed").inc()
                say("reload_failed", logging.ERROR, bundle=name, message=str(error))
                raise
            new = self.models[name] = Served(name, predictor, self.settings, self.metrics, old)
            del old
            await asyncio.to_thread(_trim_memory)
        self.metrics.reloads.labels(name, "done").inc()
        say("reloaded", bundle=name, model_id=predictor.decision.model_id)
        return new

    async def _reload_changed(self) -> None:
        for name, path in self._paths.items():
            present = await asyncio.to_thread(_state, path)
            # A file that is gone for a moment, or for good, leaves the model in service.
            if present[0] and present != self._states[name]:
                with suppress(TwinspectError):  # it was said
                    await self.reload(name)

    async def predict(self, images: Sequence[Item], options: Asked, request_id: str) -> PredictAnswer:
        """Answers for images, kept in the log."""
        served = self._admit(options.bundle, len(images))
        served.predictor.decision.checked_class(options.class_name or None)
        began = time.perf_counter()
        self._accepted += len(images)
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                inspections = await asyncio.gather(
                    *(self._inspect(served, image, options, request_id) for image in images)
                )
                results = [inspection.result for inspection in inspections]
                for result in results:
                    self.metrics.images.labels(served.name, "error" if result.error else result.answer).inc()
                _refuse_failures(results)
                if options.keep:
                    self._watcher.submit(_watch, served.name, served.light, results)
                numbers, trouble = await self._keep(inspections, options)
        except TimeoutError:
            wait = f"{self.settings.timeout_s:g}"
            raise Refused(504, "timeout", f"no answer within {wait} s; send fewer images, or later") from None
        finally:
            self._accepted -= len(images)
        rows = await asyncio.to_thread(
            lambda: [_row(result, number, options.maps) for result, number in zip(results, numbers, strict=True)]
        )
        ms, model_id = round(1000 * (time.perf_counter() - began), 2), served.predictor.decision.model_id
        return {
            "request_id": request_id, "bundle": served.name, "model_id": model_id, "ms": ms,
            "log_error": trouble, "results": rows,
        }  # fmt: skip

    def _admit(self, bundle: str, images: int) -> Served:
        if not self.ready:
            raise Refused(503, "stopping", "the server is starting or stopping; try again", SOON)
        served, limit, waiting = self.model(bundle), self.settings.queue, self._accepted
        if images > limit:
            raise Refused(413, "too_many", f"{images} images; the queue takes {limit} in all, send fewer")
        if waiting + images > limit:
            raise Refused(429, "busy", f"{waiting} images are waiting, {limit} may; try again later", SOON)
        return served

    async def _inspect(self, served: Served, image: Item, options: Asked, request_id: str) -> Inspection:
        thumbnail = self.settings.log_thumbnails if options.keep and self.log is not None else 0
        side = max(thumbnail, _OVERLAY if options.maps == "overlay" else 0)
        with served.batcher.expecting():
            loop = asyncio.get_running_loop()
            decoded, key = await loop.run_in_executor(self._decoders, _decoded, served.predictor, image, side)
        if decoded.square is None:
            result = Result(decoded.name, error=decoded.error)
        else:
            result = await served.batcher.do((decoded, options.class_name or None))
        picture = await asyncio.to_thread(_jpeg, result, thumbnail) if thumbnail else b""
        return Inspection(result, key, served.name, request_id, options.session, picture=picture)

    async def _keep(self, inspections: Sequence[Inspection], options: Asked) -> tuple[list[int | None], str]:
        """Numbers in the log, None for what is not kept, and why not."""
        nothing: list[int | None] = [None] * len(inspections)
        writer = self._writer
        if writer is None or not options.keep:
            return nothing, ""
        kept = [inspection for inspection in inspections if not inspection.result.error]
        try:
            numbers = iter(await asyncio.gather(*(writer.do(inspection) for inspection in kept)))
        except LogError as error:
            self.metrics.log_errors.inc(len(kept))
            say("log_trouble", logging.ERROR, message=str(error))
            if self.settings.log_required:
                raise
            return nothing, str(error)
        return [None if inspection.result.error else next(numbers) for inspection in inspections], ""


def _state(path: Path) -> tuple[str, str]:
    """What changes with a model's file, and with its signature."""
    return state(str(path)), state(str(signature_file(path)))


async def _every(seconds: float, job: Callable[[], Awaitable[None]]) -> None:
    """Do a job again and again; what goes wrong is said, and the next time comes all the same."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await job()
        except Exception:
            logger.exception("housekeeping")


def _decoded(predictor: Predictor, image: Item, side: int) -> tuple[Decoded, str]:
    """An image made ready, its pixels for pictures made small (many wait for the model at a time), and its key."""
    decoded = predictor.decode(image, pixels=side > 0)
    if decoded.rgb is not None:
        small = Image.fromarray(decoded.rgb)
        small.thumbnail((side, side))
        decoded = decoded._replace(rgb=np.asarray(small))
    return decoded, image_id(hashlib.sha256(image.data or b"").digest())


def _score(
    predictor: Predictor, metrics: Metrics, name: str, jobs: Sequence[tuple[Decoded, str | None]]
) -> list[Result]:
    metrics.batch.labels(name).observe(len(jobs))
    with metrics.model_seconds.labels(name).time():
        return list(predictor.score_batch([image for image, _ in jobs], True, [class_name for _, class_name in jobs]))


def _watch(name: str, light: DriftMonitor, results: Sequence[Result]) -> None:
    if light.watch(results):
        say("drift", logging.WARNING, bundle=name, message=light.report().message)


def _refuse_failures(results: Sequence[Result]) -> None:
    """A model that gives no numbers is an error of ours; images that are none are the client's, if all are."""
    damaged = [result.error for result in results if result.error and result.width]
    if damaged:
        say("model_damaged", logging.ERROR, message=damaged[0])
        raise Refused(500, "model_damaged", "the model gave a score that is not finite; put another bundle in place")
    if all(result.error for result in results):
        raise Refused(422, "bad_image", "; ".join(result.error for result in results[:3]))


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
    """An image under its map, if its pixels were kept."""
    if result.rgb is None:
        return b""
    body = io.BytesIO()
    result.overlay(side=side, words=False).save(body, "JPEG", quality=80)
    return body.getvalue()
