"""Images to results, the same for every runtime. No torch import here.

A runtime is anything with ``size`` and ``run(pixels) -> dict of arrays``; everything before it (decoding,
resizing) and after it (p-values, thresholds, geometry) lives here, once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twinspect.data.images import ImageLimits
from twinspect.data.samples import DEFAULT_LIMITS
from twinspect.decide.decision import Decision as Decision
from twinspect.errors import ConfigError, ImageError
from twinspect.inference.decode import Decoded, DecodePool, Decoding, decode, expand, from_bgr, is_live, is_single
from twinspect.inference.job import MOST_BATCH, MOST_THREADS
from twinspect.inference.regions import find_regions, strongest_place
from twinspect.inference.result import Result
from twinspect.inference.streams import Item
from twinspect.inference.tiles import joined


class Runtime(Protocol):
    """What executes the model's graph."""

    size: int

    def run(self, pixels_BHWC: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """uint8 RGB B x S x S x 3 to arrays named as the fields of the model's `Outputs`."""
        ...


class Predictor:
    """Scores files, folders, globs, arrays and PIL images with one loaded model.

    Args:
        runtime: executes the graph.
        decision: calibration and threshold of the bundle.
        batch: images per call of the runtime.
        workers: threads that decode ahead, or processes with ``processes`` (see `DecodePool`).
        limits: what an image file may hold.
    """

    def __init__(
        self,
        runtime: Runtime,
        decision: Decision,
        batch: int = 4,
        workers: int | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.runtime, self.decision, self.batch, self.limits = runtime, decision, batch, limits
        self.workers, self.processes = workers or min(4, os.cpu_count() or 1), False

    def predict(
        self,
        source: Any,
        maps: bool = True,
        pixels: bool = True,
        class_name: str | None = None,
        live: bool | None = None,
        bgr: bool = False,
    ) -> Iterator[Result]:
        """Results in the order of the images, a few at a time (constant memory).

        Args:
            source: as `Detector.predict` takes it: a path, folder, glob, ``@list``, archive, table, URL, image, array
                (RGB), or any iterable of these.
            maps: keep each result's anomaly map.
            pixels: keep each result's image for overlays.
            class_name: class of all these images, whose thresholds then hold; None predicts it per image.
            live: answer each image before the next one is taken, instead of reading ahead; None: where the source is
                an iterable without a length, such as a generator.
            bgr: arrays have blue first, as OpenCV reads them.

        Raises:
            ConfigError: a class that the bundle does not know.
            DataError: nothing to score.
            ImageError: an array of a wrong kind, an object that holds no image, or a single image that cannot be
                read. An unreadable file among several gives a result with ``error`` instead.
        """
        self.decision.checked_class(class_name)
        items = map(from_bgr, expand(source)) if bgr else expand(source)
        one_by_one = is_live(source) if live is None else live
        decoded = self._decoded(items, pixels, one_by_one)
        results = self.score(decoded, maps, class_name, 1 if one_by_one else self.batch)
        return _readable(results) if is_single(source) else results

    def _decoded(self, items: Iterator[Item], pixels: bool, one_by_one: bool) -> Iterator[Decoded]:
        if one_by_one:
            yield from (self.decode(item, pixels) for item in items)
            return
        with closing(self.pool(pixels)) as pool:
            yield from (image for _, image in pool.stream((None, item) for item in items))

    def pool(self, pixels: bool) -> DecodePool:
        """What decodes ahead for `score`; ``pixels`` keeps whole images."""
        return DecodePool(self._decoding(pixels), self.workers, self.processes, self.batch)

    def _decoding(self, pixels: bool) -> Decoding:
        return Decoding(self.runtime.size, self.limits, pixels, self.decision.tiles)

    def score(
        self, decoded: Iterable[Decoded], maps: bool = True, class_name: str | None = None, batch: int = 0
    ) -> Iterator[Result]:
        """Results of images that were decoded to ``runtime.size``, in order, a batch (0: the usual) at a time."""
        images = iter(decoded)
        while taken := list(islice(images, batch or self.batch)):
            yield from self.score_batch(taken, maps, [class_name] * len(taken))

    def decode(self, item: Any, pixels: bool = False) -> Decoded:
        """One image made ready for `score_batch`; for callers that decode where and when they like."""
        return decode(item, self._decoding(pixels))

    def score_batch(
        self, images: Sequence[Decoded], maps: bool, class_names: Sequence[str | None]
    ) -> Iterator[Result]:
        """Results of decoded images, in one call of the runtime, each with its own class or None to predict it."""
        usable = [image.square for image in images if image.square is not None]
        began = time.perf_counter()
        out = self._run(np.stack(usable)) if usable else {}
        ms, place = (time.perf_counter() - began) * 1e3 / max(len(usable), 1), 0
        for image, class_name in zip(images, class_names, strict=True):
            if image.square is None:
                yield Result(image.name, width=image.width, height=image.height, rgb=image.rgb, error=image.error)
                continue
            result = self._result(image, {name: value[place] for name, value in out.items()}, class_name, ms)
            result.grid, place = result.grid if maps else None, place + 1
            yield result

    def _run(self, squares: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """What the runtime says of images; of their tiles so many at a time as else of images."""
        tiles = self.decision.tiles
        if tiles == (1, 1):
            return self.runtime.run(squares)
        flat = squares.reshape(-1, *squares.shape[2:])
        parts = [self.runtime.run(flat[i : i + self.batch]) for i in range(0, len(flat), self.batch)]
        out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return joined(out, tiles, self.decision.class_of_cluster)

    def _result(self, image: Decoded, out: Mapping[str, Any], class_name: str | None, ms: float) -> Result:
        decision, grid = self.decision, np.asarray(out["map_B1HW"][0], dtype=np.float32)
        score, distance = float(out["score_B"]), float(out.get("cluster_distance_B", np.nan))
        judged = decision.judge(score, int(out["cluster_B"]), distance, class_name)
        rule = decision.rule(judged["class_name"], class_name is not None)
        result = Result(
            image.name, score, float(out["score_local_B"]), float(out["score_semantic_B"]), **judged,
            cluster_distance=distance, peak=float(grid.max()), model_id=decision.model_id, width=image.width,
            height=image.height, ms=ms, scale=decision.map_scale, grid=grid, rgb=image.rgb, roi=decision.roi,
            near=decision.nearest(int(out.get("nearest_B", -1))),
        )  # fmt: skip
        if not np.isfinite(score):
            result.error = f"{image.name}: the score is not finite; the model is damaged"
            result.is_anomaly, result.answer = None, ""
        elif rule.region is not None:
            threshold, shape = rule.region.value, (image.height, image.width)
            if result.is_anomaly:
                threshold = min(threshold, strongest_place(grid, shape))
            result.threshold_region = threshold
            result.regions = find_regions(grid, shape, threshold, rule.peaks)
        return result


def _readable(results: Iterator[Result]) -> Iterator[Result]:
    for result in results:
        if result.error:
            raise ImageError(result.error)
        yield result


def check_counts(threads: int, batch: int) -> None:
    """Refuse threads of a runtime and images of a call that no machine has; 0 stands for a choice of our own."""
    for option, value, most in (("--threads", threads, MOST_THREADS), ("--batch", batch, MOST_BATCH)):
        if not 0 <= value <= most:
            raise ConfigError(f"{option} {value}: accepted 0 to {most:,}")
