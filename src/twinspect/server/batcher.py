"""Dynamic micro-batching: many callers, one thread that works on what has come in, up to a limit. No HTTP here.

A batch leaves at once when no other job is on the way, so a lone caller never waits; otherwise it waits for those
that are expected, but not longer than ``max_wait_s``. While a batch runs, the next one gathers.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

Job = TypeVar("Job")
Answer = TypeVar("Answer")
_SMOOTHING = 0.1  # weight of the latest batch in the mean time per job


class Batcher(Generic[Job, Answer]):
    """Collects jobs into batches for a function that does several at once cheaper than one by one.

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
        self.seconds_per_job = 0.0  # running mean; 0 before the first batch

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
        began = time.monotonic()
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, jobs)
            for future, answer in zip(futures, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        except Exception as error:  # whatever it is belongs to the callers; the worker lives on
            for future in futures:
                if not future.done():
                    future.set_exception(error)
        per_job = (time.monotonic() - began) / len(jobs)
        known = self.seconds_per_job
        self.seconds_per_job = per_job if known == 0.0 else known + _SMOOTHING * (per_job - known)
