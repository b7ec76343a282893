"""Models being served: opened, replaced while requests run, closed when the last request has its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinspect.decide.decision import promises
from twinspect.decide.drift import DriftMonitor
from twinspect.errors import ConfigError, TwinspectError, unknown_name
from twinspect.inference.decode import Decoded
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result
from twinspect.inference.stores import state
from twinspect.server.batcher import Batcher
from twinspect.server.guard import Refused

Scored = tuple[Result, str]  # and the key of its image
_WATCHED = 64  # results the drift monitor takes at a time
_RETIRING_S = 0.05  # how often a replaced model looks whether its last request is answered


@dataclass(frozen=True, slots=True)
class Queued:
    """One decoded image for a model; ``key`` is that by which calibration recognises the image's file."""

    decoded: Decoded
    class_name: str | None = None
    watched: bool = True
    key: str = ""


class Served:
    """One version of one model.

    Args:
        name: clients call it.
        predictor: decodes, scores, decides.
        light: watches its results.
        batching: (most images per call, longest wait in seconds).
        observe: called with (name, images, seconds) after each call of the model.
        alarm: called with (name, message) when drift is noticed.
    """

    def __init__(
        self,
        name: str,
        predictor: Predictor,
        light: DriftMonitor,
        batching: tuple[int, float],
        observe: Callable[[str, int, float], None],
        alarm: Callable[[str, str], None],
    ) -> None:
        self.name, self.predictor, self.light, self._alarm = name, predictor, light, alarm
        self.users = 0  # requests that hold this version; changed on the event loop only
        self.batcher: Batcher[Queued, Scored] = Batcher(
            self._score, *batching, lambda jobs, s: observe(name, jobs, s), f"model-{name}"
        )
        # In a thread of its own: neither answers nor the next call of the model wait for the drift monitor.
        self._watcher: Batcher[Result, None] = Batcher(self._watch, _WATCHED, name=f"drift-{name}")

    def close(self) -> None:
        """Finish what was accepted, then end the threads."""
        self.batcher.close()
        self._watcher.close()

    def _score(self, jobs: Sequence[Queued]) -> list[Scored]:
        results = list(self.predictor.score_batch([j.decoded for j in jobs], True, [j.class_name for j in jobs]))
        for one, job in zip(results, jobs, strict=True):
            if job.watched:
                self._watcher.submit(one)
        return [(one, job.key) for one, job in zip(results, jobs, strict=True)]

    def _watch(self, results: Sequence[Result]) -> list[None]:
        if self.light.watch(results):
            self._alarm(self.name, self.light.report().message)
        return [None] * len(results)

    def describe(self) -> dict[str, Any]:
        """What clients may know of it."""
        decision = self.predictor.decision
        return {
            "bundle": self.name,
            "model_id": decision.model_id,
            "size": self.predictor.runtime.size,
            "runtime": type(self.predictor.runtime).__name__,
            "classes": decision.classes,
            "map_scale": list(decision.map_scale),
            "thresholds": {
                name: {
                    "score": rule.image.value,
                    "region": rule.region.value if rule.region is not None else None,
                    "promise": rule.image.sentence,
                }
                for name, rule in promises(decision)
            },
        }


class Models:
    """All models by name.

    Args:
        paths: file of each; a model without a file is never reloaded.
        open_file: a file to a predictor.
        make: a name and a predictor to what is served; given the version it replaces, if any.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        open_file: Callable[[Path], Predictor],
        make: Callable[[str, Predictor, Served | None], Served],
    ) -> None:
        self.paths, self._open, self._make = dict(paths), open_file, make
        self._served: dict[str, Served] = {}
        self._stamps: dict[str, str] = {}
        self.trouble: dict[str, str] = {}  # why the latest version of a file is not the one being served
        self._retiring: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()

    def add(self, name: str, predictor: Predictor) -> None:
        """Serve a predictor."""
        self._served[name] = self._make(name, predictor, None)
        self._stamps[name] = state(str(self.paths[name])) if name in self.paths else ""

    def get(self, name: str) -> Served:
        """The present version; an empty name takes the only one."""
        if not name and len(self._served) > 1:
            names = ", ".join(self._served)
            raise Refused(
                400, "which_bundle", f"several models are served and none is named; add bundle=NAME: {names}"
            )
        chosen = name or next(iter(self._served), "")
        if chosen not in self._served:
            raise Refused(404, "unknown_bundle", unknown_name("bundle", name[:200], self._served))
        return self._served[chosen]

    def __iter__(self) -> Any:
        return iter(self._served.values())

    async def changed(self) -> list[str]:
        """Names of models whose file is another one than when it was last read."""
        now = {name: await asyncio.to_thread(state, str(path)) for name, path in self.paths.items()}
        # A file that is gone for a moment, or for good, leaves the model in service.
        return [name for name, stamp in now.items() if stamp and stamp != self._stamps[name]]

    async def reload(self, name: str) -> Served:
        """Read a model's file again; requests that hold the old version finish with it.

        Raises:
            TwinspectError: the model has no file, or it cannot be used; the old version stays in service.
        """
        served = self.get(name)
        path = self.paths.get(served.name)
        if path is None:
            raise Refused(409, "no_file", f"{served.name} was not opened from a file and cannot be reloaded")
        async with self._reloading:
            served = self.get(served.name)
            self._stamps[served.name] = state(str(path))
            try:
                predictor = await asyncio.to_thread(self._open, path)
                fresh = await asyncio.to_thread(self._make, served.name, predictor, served)
            except TwinspectError as error:
                self.trouble[served.name] = str(error)
                raise
            self.trouble.pop(served.name, None)
            self._served[served.name] = fresh
            task = asyncio.create_task(_retire(served))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        return fresh

    async def close(self) -> None:
        """Finish what was accepted, then end all threads."""
        for served in self._served.values():
            await asyncio.to_thread(served.close)
        await asyncio.gather(*self._retiring)


async def _retire(served: Served) -> None:
    while served.users:
        await asyncio.sleep(_RETIRING_S)
    await asyncio.to_thread(served.close)


def named_paths(given: Sequence[str]) -> dict[str, Path]:
    """``NAME=FILE`` or ``FILE`` (its stem is the name) to files by name. A path may hold an equals sign itself."""
    paths: dict[str, Path] = {}
    for text in given:
        name, equals, file = text.partition("=")
        named = bool(equals) and not Path(text).is_file() and (Path(file).is_file() or not set(name) & {"/", "\\"})
        path = Path(file if named else text)
        name = name if named else path.stem
        if not path.is_file():
            raise ConfigError(f"no such model: {path}. Make one with: twinspect fit DATA --out {path}")
        if not name or not all(c.isalnum() or c in "-_." for c in name):
            raise ConfigError(
                f"{name!r} cannot be a name in an address; type NAME={path} with letters, digits, - _ ."
            )
        if name in paths:
            raise ConfigError(f"two models are called {name}: {paths[name]} and {path}; type NAME={path}")
        paths[name] = path
    return paths
