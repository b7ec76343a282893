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
from dataclasses import dataclass
from typing import Generic, TypeVar

from twinspect.errors import TwinspectError

Job = TypeVar("Job")
Answer = TypeVar("Answer")
_SMOOTHING = 0.1  # weight of the latest batch in the mean time per job


class Closed(TwinspectError):
    """The batcher takes no more jobs."""


class Expired(TwinspectError):
    """Nobody waits for the answer any more: the job's time was over before its turn came."""


@dataclass(slots=True)
class _Waiting(Generic[Job, Answer]):
    job: Job
    deadline: float
    future: Future[Answer]


class Batcher(Generic[Job, Answer]):
    """Collects jobs into batches for a function that does several at once cheaper than one by one.

    Args:
        run: jobs to answers, one each, in order. What it raises reaches every job of the batch.
        max_batch: most jobs in a call.
        max_wait_s: longest wait for jobs that are expected, in seconds.
        observe: called with (jobs, seconds) after every batch.
        name: of the thread.

    Examples:
        >>> batcher = Batcher(lambda numbers: [2 * n for n in numbers], max_batch=8)
        >>> batcher.submit(21).result()
        42
        >>> batcher.close()
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], Sequence[Answer]],
        max_batch: int,
        max_wait_s: float = 0.0,
        observe: Callable[[int, float], None] = lambda _jobs, _seconds: None,
        name: str = "batcher",
    ) -> None:
        self._run, self._max_batch, self._max_wait_s = run, max_batch, max_wait_s
        self._observe, self._expected = observe, 0
        self._jobs: deque[_Waiting[Job, Answer]] = deque()
        self._change = threading.Condition()
        self._closing = False
        self.seconds_per_job = 0.0
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)  # started by the first job

    def submit(self, job: Job, timeout_s: float = float("inf")) -> Future[Answer]:
        """Queue a job; it is dropped (`Expired`) if its turn has not come within ``timeout_s`` from now."""
        waiting = _Waiting(job, time.monotonic() + timeout_s, Future[Answer]())
        with self._change:
            if self._closing:
                raise Closed("the server is stopping; send the request again to its successor")
            self._jobs.append(waiting)
            self._change.notify()
            if self._thread.ident is None:
                self._thread.start()
        return waiting.future

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

    def __len__(self) -> int:
        return len(self._jobs)

    def close(self, timeout_s: float | None = None) -> None:
        """Take no more jobs, finish those there are, end the thread."""
        with self._change:
            self._closing = True
            self._change.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while batch := self._gather():
            alive = [one for one in batch if self._still_wanted(one)]
            if alive:
                self._answer(alive)

    def _gather(self) -> list[_Waiting[Job, Answer]]:
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

    def _still_wanted(self, one: _Waiting[Job, Answer]) -> bool:
        if not one.future.set_running_or_notify_cancel():
            return False
        if time.monotonic() < one.deadline:
            return True
        one.future.set_exception(Expired("not answered in time; the server is overloaded, try again later"))
        return False

    def _answer(self, batch: list[_Waiting[Job, Answer]]) -> None:
        began = time.monotonic()
        try:
            answers = self._run([one.job for one in batch])
            for one, answer in zip(batch, answers, strict=True):
                one.future.set_result(answer)
        except Exception as error:  # whatever it is belongs to the callers; the worker lives on
            for one in batch:
                if not one.future.done():
                    one.future.set_exception(error)
        seconds = time.monotonic() - began
        per_job = seconds / len(batch)
        known = self.seconds_per_job
        self.seconds_per_job = per_job if known == 0.0 else known + _SMOOTHING * (per_job - known)
        self._observe(len(batch), seconds)
