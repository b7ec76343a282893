"""Micro-batching without HTTP: who waits for whom, for how long, and what happens to mistakes."""

from __future__ import annotations

import asyncio
import time

import pytest

from twinspect.server.service import Batcher

pytestmark = pytest.mark.anyio  # its plugin comes with Starlette


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def double(numbers):
    return [2 * n for n in numbers]


class Slow:
    """Doubles numbers in a time that does not depend on how many; records its batches."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds, self.batches = seconds, []

    def __call__(self, numbers):
        self.batches.append(list(numbers))
        time.sleep(self.seconds)
        return double(numbers)


def started(batcher: Batcher, numbers) -> list[asyncio.Task]:
    return [asyncio.create_task(batcher.do(n)) for n in numbers]


async def test_answers_belong_to_their_jobs() -> None:
    batcher = Batcher(double, max_batch=7)
    assert await asyncio.gather(*started(batcher, range(500))) == [2 * n for n in range(500)]
    await batcher.close()


async def test_jobs_that_come_while_a_batch_runs_go_together_up_to_the_limit() -> None:
    slow = Slow()
    batcher = Batcher(slow, max_batch=4)
    first = started(batcher, [0])
    while not slow.batches:
        await asyncio.sleep(0.001)
    assert await asyncio.gather(*first, *started(batcher, range(1, 10))) == [2 * n for n in range(10)]
    assert [len(b) for b in slow.batches] == [1, 4, 4, 1]
    await batcher.close()


async def test_a_lone_job_does_not_wait() -> None:
    batcher = Batcher(double, max_batch=8, max_wait_s=5.0)
    began = time.monotonic()
    assert await batcher.do(1) == 2
    assert time.monotonic() - began < 1.0
    await batcher.close()


async def test_a_job_waits_for_those_on_the_way_but_not_longer_than_the_limit() -> None:
    slow = Slow(0.0)
    batcher = Batcher(slow, max_batch=8, max_wait_s=0.2)
    with batcher.expecting():
        with batcher.expecting():
            first = started(batcher, [1])
            await asyncio.sleep(0.05)
            second = started(batcher, [2])
            await asyncio.sleep(0)
        assert await asyncio.gather(*first, *second) == [2, 4]
        assert slow.batches == [[1, 2]]
        began = time.monotonic()
        assert await batcher.do(3) == 6
        assert 0.15 < time.monotonic() - began < 2.0
    await batcher.close()


async def test_nobody_waits_for_a_job_that_will_never_be() -> None:
    batcher = Batcher(double, max_batch=8, max_wait_s=30.0)
    with batcher.expecting():
        (job,) = started(batcher, [1])
        await asyncio.sleep(0.05)
        assert not job.done()
    assert await asyncio.wait_for(job, 5) == 2
    await batcher.close()


async def test_a_mistake_reaches_the_jobs_of_its_batch_and_the_next_ones_are_answered() -> None:
    def picky(numbers):
        if 13 in numbers:
            raise ValueError("thirteen")
        return double(numbers)

    batcher = Batcher(picky, max_batch=1)
    with pytest.raises(ValueError, match="thirteen"):
        await batcher.do(13)
    assert await batcher.do(1) == 2
    await batcher.close()


async def test_too_few_answers_are_a_mistake_too() -> None:
    batcher = Batcher(lambda numbers: [], max_batch=1)
    with pytest.raises(ValueError, match="zip"):
        await batcher.do(1)
    await batcher.close()


async def test_a_cancelled_job_is_not_computed() -> None:
    slow = Slow(0.1)
    batcher = Batcher(slow, max_batch=1)
    first, second, third = started(batcher, [1, 2, 3])
    await asyncio.sleep(0.05)
    assert second.cancel()
    assert await asyncio.gather(first, third) == [2, 6]
    assert slow.batches == [[1], [3]]
    await batcher.close()


async def test_close_finishes_what_was_taken() -> None:
    batcher = Batcher(Slow(0.02), max_batch=2)
    jobs = started(batcher, range(9))
    await asyncio.sleep(0)
    await batcher.close()
    assert [job.result() for job in jobs] == [2 * n for n in range(9)]
