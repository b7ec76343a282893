"""Micro-batching without HTTP: who waits for whom, for how long, and what happens to mistakes."""

from __future__ import annotations

import threading
import time

import pytest

from twinspect.server.batcher import Batcher, Closed


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


def test_answers_belong_to_their_jobs() -> None:
    batcher = Batcher(double, max_batch=7)
    futures = [batcher.submit(n) for n in range(500)]
    assert [f.result(5) for f in futures] == [2 * n for n in range(500)]
    batcher.close()


def test_jobs_that_come_while_a_batch_runs_go_together_up_to_the_limit() -> None:
    slow = Slow()
    batcher = Batcher(slow, max_batch=4)
    first = batcher.submit(0)
    while not slow.batches:
        time.sleep(0.001)
    futures = [batcher.submit(n) for n in range(1, 10)]
    assert [f.result(5) for f in (first, *futures)] == [2 * n for n in range(10)]
    assert [len(b) for b in slow.batches] == [1, 4, 4, 1]
    batcher.close()


def test_a_lone_job_does_not_wait() -> None:
    batcher = Batcher(double, max_batch=8, max_wait_s=5.0)
    began = time.monotonic()
    assert batcher.submit(1).result(5) == 2
    assert time.monotonic() - began < 1.0
    batcher.close()


def test_a_job_waits_for_those_on_the_way_but_not_longer_than_the_limit() -> None:
    slow = Slow(0.0)
    batcher = Batcher(slow, max_batch=8, max_wait_s=0.2)
    with batcher.expecting():
        with batcher.expecting():
            first = batcher.submit(1)
            time.sleep(0.05)
            second = batcher.submit(2)
        assert (first.result(5), second.result(5)) == (2, 4)
        assert slow.batches == [[1, 2]]
        began = time.monotonic()
        assert batcher.submit(3).result(5) == 6
        assert 0.15 < time.monotonic() - began < 2.0
    batcher.close()


def test_nobody_waits_for_a_job_that_will_never_be() -> None:
    batcher = Batcher(double, max_batch=8, max_wait_s=30.0)
    with batcher.expecting():
        future = batcher.submit(1)
        time.sleep(0.05)
        assert not future.done()
    assert future.result(5) == 2
    batcher.close()


def test_a_mistake_reaches_the_jobs_of_its_batch_and_the_next_ones_are_answered() -> None:
    def picky(numbers):
        if 13 in numbers:
            raise ValueError("thirteen")
        return double(numbers)

    batcher = Batcher(picky, max_batch=1)
    with pytest.raises(ValueError, match="thirteen"):
        batcher.submit(13).result(5)
    assert batcher.submit(1).result(5) == 2
    batcher.close()


def test_too_few_answers_are_a_mistake_too() -> None:
    batcher = Batcher(lambda numbers: [], max_batch=1)
    with pytest.raises(ValueError, match="zip"):
        batcher.submit(1).result(5)
    batcher.close()


def test_a_cancelled_job_is_not_computed() -> None:
    slow = Slow(0.1)
    batcher = Batcher(slow, max_batch=1)
    first, second, third = (batcher.submit(n) for n in (1, 2, 3))
    assert second.cancel()
    assert (first.result(5), third.result(5)) == (2, 6)
    assert slow.batches == [[1], [3]]
    batcher.close()


def test_close_finishes_what_was_taken_and_takes_no_more() -> None:
    batcher = Batcher(Slow(0.02), max_batch=2)
    futures = [batcher.submit(n) for n in range(9)]
    batcher.close()
    assert [f.result(0) for f in futures] == [2 * n for n in range(9)]
    with pytest.raises(Closed, match="stopping"):
        batcher.submit(1)


def test_time_per_job_follows_the_load() -> None:
    batcher = Batcher(Slow(0.05), max_batch=4)
    assert batcher.seconds_per_job == 0.0
    for future in [batcher.submit(n) for n in range(4)]:
        future.result(5)
    batcher.close()
    assert 0.01 < batcher.seconds_per_job < 0.2


def test_many_threads() -> None:
    batcher = Batcher(double, max_batch=16, max_wait_s=0.001)
    wrong = []

    def caller(start: int) -> None:
        wrong.extend(n for n in range(start, start + 100) if batcher.submit(n).result(10) != 2 * n)

    threads = [threading.Thread(target=caller, args=(1000 * i,)) for i in range(8)]
    with batcher.expecting():  # of one that never comes: every batch waits its longest
        for one in threads:
            one.start()
        for one in threads:
            one.join(30)
    batcher.close()
    assert not wrong
