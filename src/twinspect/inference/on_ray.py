"""The same run on a cluster: Ray Data hands units of the input to actors, each of which holds one model.

What makes it safe is not Ray but the parts: a unit's rows become files with fixed names, written whole. An actor that
is lost is started again and its unit done again, to the same files; the driver counts what is there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from twinspect.errors import TwinspectError, check_range
from twinspect.inference.archives import Item, Stream
from twinspect.inference.bulk import UnitScorer
from twinspect.inference.job import Job, Unit
from twinspect.inference.parts import Part, PartStore


@dataclass(frozen=True, slots=True)
class RayEngine:
    """Scores units in actors; `bulk.run` takes it as its engine.

    Attributes:
        actors: how many; 0 takes one a GPU if ``gpus`` is given, else one for every ``cpus`` CPUs of the cluster.
        cpus: of an actor, for the model's threads and its decoders.
        gpus: of an actor; a part of one lets several share it.
        address: of a running cluster; empty takes ``RAY_ADDRESS``, or starts Ray on this machine.
    """

    actors: int = 0
    cpus: float = 1.0
    gpus: float = 0.0
    address: str = ""

    def __post_init__(self) -> None:
        check_range("--actors", self.actors, 0, 100_000)
        check_range("--actor-cpus", self.cpus, 0.01, 1024)
        check_range("--actor-gpus", self.gpus, 0, 64)

    def __call__(
        self, job: Job, store: PartStore, units: Iterator[Unit], skipped: Callable[[Part], None]
    ) -> Iterator[Part]:
        """Parts as actors finish them, in any order.

        Raises:
            TwinspectError: Ray is not installed, not reachable, or a unit failed for good.
        """
        ray = _ray()
        started = self._connected(ray)
        try:
            for row in self._rows(ray, job, store, units):
                part = Part.of(row["name"])
                assert part is not None
                if row["before"]:
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

    def _connected(self, ray: Any) -> bool:
        """Whether a cluster was joined or started here, and is ours to leave again."""
        if ray.is_initialized():
            return False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # asks for a choice between two behaviours
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong is raised as well
        try:
            ray.init(self.address or None, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise TwinspectError(f"Ray at {self.address} cannot be reached ({error})") from None
        return True

    def _rows(self, ray: Any, job: Job, store: PartStore, units: Iterator[Unit]) -> Iterator[dict[str, Any]]:
        import pyarrow as pa

        # One block a unit, put away as they are found: the object store spills to disk; only references stay here.
        blocks = [ray.put(pa.table({"unit": [_packed(unit, store)]})) for unit in units]
        if not blocks:
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours says images, not blocks
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        actors = self.actors or self._every_actor(ray)
        answers = ray.data.from_arrow_refs(blocks).map_batches(
            _Actor,
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(blocks)), max_tasks_in_flight_per_actor=2),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            fn_constructor_args=(replace(job, workers=max(job.workers, 0)), store.folder, store.suffix, os.getcwd()),
        )
        yield from answers.iter_rows()

    def _every_actor(self, ray: Any) -> int:
        resources = ray.cluster_resources()
        kind, each = ("GPU", self.gpus) if self.gpus else ("CPU", self.cpus)
        return max(1, int(resources.get(kind, 0) / each))


class _Actor:
    """One model with its decoders on some machine of the cluster."""

    def __init__(self, job: Job, folder: str, suffix: str, home: str) -> None:
        if os.path.isdir(home):
            os.chdir(home)  # so that relative paths mean what they mean to whoever typed them
        self.scorer = UnitScorer(job, PartStore(folder, suffix))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the units of a batch (one): names of their parts, and whether they were there already."""
        names: list[str] = []
        before: list[bool] = []

        def skipped(part: Part) -> None:
            names.append(part.name)
            before.append(True)

        for text in batch["unit"]:
            unit, known = _unpacked(str(text))
            assert self.scorer.store is not None
            self.scorer.store.known = known
            for part in self.scorer.parts([unit], skipped):
                names.append(part.name)
                before.append(False)
        return {"name": names, "before": before}


def _packed(unit: Unit, store: PartStore) -> str:
    known, sub = list[str](), 0
    while (part := store.known.get((unit.number, sub))) is not None:
        known, sub = [*known, part.name], sub + 1
    return json.dumps(
        {"number": unit.number, "items": [one.to_dict() for one in unit.items], "stream": unit.source, "known": known}
    )


def _unpacked(text: str) -> tuple[Unit, dict[tuple[int, int], Part]]:
    values = json.loads(text)
    items = tuple(Item(**one) for one in values["items"])
    parts = [part for name in values["known"] if (part := Part.of(name)) is not None]
    unit = Unit(values["number"], items, Stream(values["stream"]) if values["stream"] else None)
    return unit, {(part.unit, part.sub): part for part in parts}


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise TwinspectError(
            f"--engine ray needs Ray, which cannot be imported ({error}). Type: pip install 'twinspect[ray]'"
        ) from None
    return ray


def _reason(error: Exception) -> str:
    """The line of an error that a person can use: that of our own code, if it is in there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line.split("Error: ", 1)[1] for line in lines if line.startswith("twinspect.") and "Error: " in line]
    return (ours or lines or [type(error).__name__])[-1][:300]
