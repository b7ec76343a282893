"""Dynamic micro-batching: many callers, one worker that takes what has come in, up to a limit. No HTTP here.

A batch leaves at once when no other job is on the way, so a lone caller never waits; otherwise it waits for those
that are expected, but not longer than ``max_wait_s``. While a batch runs, the next one gathers.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

from twinspect.errors import TwinspectError

Job = TypeVar("Job")
Answer = TypeVar("Answer")
_SMOOTHING = 0.1  # weight of the latest batch in the mean time per job


class Closed(TwinspectError):
    """The batcher takes no more jobs."""


class Batcher(Generic[Job, Answer]):
    """Collects jobs into batches for a function that does several at once cheaper than one by one.

    ``run`` gives one answer for each job, in order; what it raises reaches every job of the batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], Sequence[Answer]],
        max_batch: int,
        max_wait_s: float = 0.0,
        name: str = "batcher",
    ) -> None:
        self._run, self._max_batch, self._max_wait_s, self._expected = run, max_batch, max_wait_s, 0
        self._jobs: deque[tuple[Job, Future[Answer]]] = deque()
        self._change = threading.Condition()
        self._closing = False
        self.seconds_per_job = 0.0  # running mean; 0 before the first batch
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)  # started by the first job

    def submit(self, job: Job) -> Future[Answer]:
        """Queue a job; one that is cancelled before its turn is not done."""
        future = Future[Answer]()
        with self._change:
            if self._closing:
                raise Closed("the server is stopping; send the request again to its successor")
            self._jobs.append((job, future))
            self._change.notify()
            if self._thread.ident is None:
                self._thread.start()
        return future

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """While entered, a job is on the way: a batch waits for it."""
        with self._change:
            self._expected += 1
        try:
            yield
        finally:
            with self._change:
                self._expected -= 1
                self._change.notify()

    def close(self, wait: bool = True) -> None:
        """Take no more jobs, finish those there are, end the thread."""
        with self._change:
            self._closing = True
            self._change.notify()
        if wait and self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while batch := self._gather():
            if alive := [(job, future) for job, future in batch if future.set_running_or_notify_cancel()]:
                self._answer([job for job, _ in alive], [future for _, future in alive])

    def _gather(self) -> list[tuple[Job, Future[Answer]]]:
        """The next batch; empty when closed and nothing is left."""
        with self._change:
            while not self._jobs and not self._closing:
                self._change.wait()
            until = time.monotonic() + self._max_wait_s
            while len(self._jobs) < self._max_batch and not self._closing and self._expected:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._change.wait(left)
            return [self._jobs.popleft() for _ in range(min(self._max_batch, len(self._jobs)))]

    def _answer(self, jobs: list[Job], futures: list[Future[Answer]]) -> None:
        began = time.monotonic()
        try:
            for future, answer in zip(futures, self._run(jobs), strict=True):
                future.set_result(answer)
        except Exception as error:  # whatever it is belongs to the callers; the worker lives on
            for future in futures:
                if not future.done():
                    future.set_exception(error)
        per_job = (time.monotonic() - began) / len(jobs)
        known = self.seconds_per_job
        self.seconds_per_job = per_job if known == 0.0 else known + _SMOOTHING * (per_job - known)
