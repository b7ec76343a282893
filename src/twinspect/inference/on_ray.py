"""The same run on a cluster: Ray hands units of the input to actors, each of which holds one model.

An actor that is lost is started again and its unit done again. That is safe because a part has a fixed name and is
written whole: the driver counts what is there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from twinspect.errors import TwinspectError
from twinspect.inference.bulk import PartScorer, Skipped, Unit
from twinspect.inference.job import Job
from twinspect.inference.parts import Part, PartStore


def score(job: Job, store: PartStore, units: Iterator[Unit], skipped: Skipped) -> Iterator[Part]:
    """As `bulk.score`: parts as actors finish them, in any order; a TwinspectError where a unit failed for good."""
    try:
        import ray
        import ray.util
    except ImportError as error:
        raise TwinspectError(
            f"--engine ray needs Ray, which cannot be imported ({error}). Type: pip install 'twinspect[ray]'"
        ) from None
    started = _connect(ray, job.ray_address)
    try:
        for part, known in _parts(ray, job, store, units):
            if known:
                skipped(part)
            else:
                yield part
    except ray.exceptions.RayError as error:
        raise TwinspectError(
            f"the run on Ray stopped ({_reason(error)}); finished parts are kept, type the same command to go on"
        ) from None
    finally:
        if started:
            ray.shutdown()


def _connect(ray: Any, address: str) -> bool:
    """Whether a cluster was joined or started here, and is ours to leave again."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # asks for a choice between two behaviours
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong is raised as well
    try:
        ray.init(address or None, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise TwinspectError(f"Ray at {address} cannot be reached ({error})") from None
    return True


def _parts(ray: Any, job: Job, store: PartStore, units: Iterator[Unit]) -> Iterator[tuple[Part, bool]]:
    kind, each = ("GPU", job.actor_gpus) if job.actor_gpus else ("CPU", job.actor_cpus)
    fitting = max(1, int(ray.cluster_resources().get(kind, 0) / each))
    first = list(islice(units, job.actors or fitting))
    # An actor that is lost is started again, and does again what it was doing.
    limits = {"max_restarts": -1, "max_task_retries": -1, "num_cpus": job.actor_cpus, "num_gpus": job.actor_gpus}
    actor = ray.remote(**limits)(_Actor)
    arguments = (replace(job, workers=max(job.workers, 0)), store.folder, store.suffix, os.getcwd())
    pool = ray.util.ActorPool([actor.remote(*arguments) for _ in first])
    for number, unit in enumerate(chain(first, units)):
        if number >= 2 * len(first):  # the input is listed as it is needed
            yield from pool.get_next_unordered()
        pool.submit(lambda actor, unit: actor.score.remote(unit, store.of_unit(unit.number, unit.digest)), unit)
    while pool.has_next():
        yield from pool.get_next_unordered()


class _Actor:
    def __init__(self, job: Job, folder: str, suffix: str, home: str) -> None:
        if os.path.isdir(home):
            os.chdir(home)  # so that relative paths mean what they mean to whoever typed them
        self.store = PartStore(folder, suffix)
        self.scorer = PartScorer(job, self.store)

    def score(self, unit: Unit, known: list[Part]) -> list[tuple[Part, bool]]:
        """Parts of a unit, and of each whether it was there already: those of an earlier run are ``known``."""
        self.store.known = {part.place: part for part in known}
        before: list[Part] = []
        parts = list(self.scorer.parts([unit], before.append))
        return [*((part, True) for part in before), *((part, False) for part in parts)]


def _reason(error: Exception) -> str:
    """The line of an error that a person can use: that of our own code, if it is in there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line.split("Error: ", 1)[1] for line in lines if line.startswith("twinspect.") and "Error: " in line]
    return (ours or lines or [type(error).__name__])[-1][:300]
