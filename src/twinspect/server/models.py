"""One model being served: its worker, its drift monitor, and what clients may know of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from twinspect.data.images import ImageLimits
from twinspect.decide.decision import promises
from twinspect.decide.drift import DriftMonitor
from twinspect.errors import ConfigError
from twinspect.inference.decode import Decoded
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result
from twinspect.server.batcher import Batcher
from twinspect.server.guard import Metrics, say
from twinspect.server.schema import ModelAnswer
from twinspect.server.settings import Settings


class Served:
    """One version of one model, and its threads.

    The drift monitor of the version ``before`` lives on where the calibration is the same. ``trouble`` says why a
    newer version of the file is not the one being served.
    """

    def __init__(
        self, name: str, predictor: Predictor, settings: Settings, metrics: Metrics, before: Served | None = None
    ) -> None:
        self.name, self.predictor, self.trouble, self._metrics = name, predictor, "", metrics
        self._users, self._replaced = 0, False  # changed on the event loop only
        predictor.limits = ImageLimits(max_pixels=int(settings.max_megapixels * 1e6))
        good = predictor.decision.good
        self.light = DriftMonitor(good)
        if before is not None and before.light.good.to_dict() == good.to_dict():
            self.light = before.light
        metrics.drift.labels(name).set_function(lambda: self.light.alarmed)
        self.batcher: Batcher[tuple[Decoded, str | None], Result] = Batcher(
            self._score, settings.max_batch, settings.max_wait_ms / 1000, f"model-{name}"
        )
        # In a thread of its own: neither answers nor the next call of the model wait for the drift monitor.
        self._watcher = ThreadPoolExecutor(1, f"drift-{name}")

    def count_users(self, change: int) -> None:
        """A request begins or ends to hold this version; a replaced one ends with its last request."""
        self._users += change
        if self._replaced and not self._users:
            self.close(wait=False)

    def replace(self) -> None:
        """Serve the requests that hold this version, and no others."""
        self._replaced = True
        self.count_users(0)

    def close(self, wait: bool = True) -> None:
        """Finish what was accepted, then end the threads."""
        self.batcher.close(wait)
        self._watcher.shutdown(wait)

    def _score(self, jobs: Sequence[tuple[Decoded, str | None]]) -> list[Result]:
        self._metrics.batch.labels(self.name).observe(len(jobs))
        with self._metrics.model_seconds.labels(self.name).time():
            return list(self.predictor.score_batch([image for image, _ in jobs], True, [name for _, name in jobs]))

    def watch(self, results: Sequence[Result]) -> None:
        """Show results to the drift monitor, some time soon."""
        self._watcher.submit(self._watch, results)

    def _watch(self, results: Sequence[Result]) -> None:
        if self.light.watch(results):
            say("drift", logging.WARNING, bundle=self.name, message=self.light.report().message)

    def describe(self) -> ModelAnswer:
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
            "trouble": self.trouble,
        }


def named_paths(texts: Sequence[str]) -> dict[str, Path]:
    """``NAME=FILE`` or ``FILE`` (its stem is the name) to files by name. A path may hold an equals sign itself."""
    paths: dict[str, Path] = {}
    for text in texts:
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
