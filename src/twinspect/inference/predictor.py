"""Images to results, the same for every runtime. No torch import here.

A runtime is anything with ``size`` and ``run(pixels) -> dict of arrays``; everything before it (decoding,
resizing) and after it (p-values, thresholds, geometry) lives here, once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twinspect.data.images import ImageLimits
from twinspect.data.samples import DEFAULT_LIMITS
from twinspect.decide.decision import ANOMALY, unpack_roi
from twinspect.decide.decision import Decision as Decision
from twinspect.errors import ImageError, check_range
from twinspect.inference.decode import Decoded, DecodePool, decode, expand, from_bgr, is_live, is_single
from twinspect.inference.decode import name_of as name_of
from twinspect.inference.result import Result, find_regions

MOST_BATCH, MOST_THREADS = 4096, 1024


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
        workers: threads that decode ahead.
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
        self.workers = workers or min(4, os.cpu_count() or 1)

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
            source: a path, folder, glob, ``@list``, tar, zip or table file, URL, PIL image, `Sample`, the bytes of an
                image file or an open one, an array, or any iterable of these. Arrays are H x W (grey), H x W x C or
                C x H x W with 1, 3 (RGB) or 4 (RGBA) channels, of uint8, uint16 or floats from 0 to 1, and may be
                torch's; four dimensions are a stack of images.
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
        one_by_one = is_live(source) if live is None else live
        items = map(from_bgr, expand(source)) if bgr else expand(source)
        results = (
            self._live(items, maps, pixels, class_name)
            if one_by_one
            else self._ahead(items, maps, pixels, class_name)
        )
        return self._readable(results) if is_single(source) else results

    def _live(self, items: Iterator[Any], maps: bool, pixels: bool, class_name: str | None) -> Iterator[Result]:
        for item in items:
            yield from self.score_batch([self.decode(item, pixels)], maps, [class_name])

    def _ahead(self, items: Iterator[Any], maps: bool, pixels: bool, class_name: str | None) -> Iterator[Result]:
        with DecodePool(self.runtime.size, self.limits, pixels, self.workers, batch=self.batch) as pool:
            yield from self.score((image for _, image in pool.stream((None, i) for i in items)), maps, class_name)

    @staticmethod
    def _readable(results: Iterator[Result]) -> Iterator[Result]:
        for result in results:
            if result.error:
                raise ImageError(result.error)
            yield result

    def score(self, decoded: Iterable[Decoded], maps: bool = True, class_name: str | None = None) -> Iterator[Result]:
        """Results of images that were decoded to ``runtime.size``, in order, a batch at a time."""
        images = iter(decoded)
        while batch := list(islice(images, self.batch)):
            yield from self.score_batch(batch, maps, [class_name] * len(batch))

    def decode(self, item: Any, pixels: bool = False) -> Decoded:
        """One image made ready for `score_batch`; for callers that decode where and when they like."""
        return decode(item, self.runtime.size, self.limits, pixels)

    def score_batch(
        self, images: Sequence[Decoded], maps: bool, class_names: Sequence[str | None]
    ) -> Iterator[Result]:
        """Results of decoded images, in one call of the runtime, each with its own class or None to predict it."""
        usable = [image.square for image in images if image.square is not None]
        began = time.perf_counter()
        out = self.runtime.run(np.stack(usable)) if usable else {}
        each_ms = (time.perf_counter() - began) * 1e3 / max(len(usable), 1)
        place = 0
        for image, class_name in zip(images, class_names, strict=True):
            result = Result(image.name, width=image.width, height=image.height, rgb=image.rgb, error=image.error)
            if image.square is not None:
                result.ms = each_ms
                self._fill(result, out, place, maps, class_name)
                place += 1
                if not np.isfinite(result.score):
                    result.error = f"{result.path}: the score is not finite; the model is damaged"
                    result.is_anomaly, result.answer, result.regions = None, "", []
            yield result

    def _fill(
        self, result: Result, out: Mapping[str, NDArray[Any]], i: int, maps: bool, class_name: str | None
    ) -> None:
        decision = self.decision
        result.score = float(out["score_B"][i])
        result.score_local, result.score_semantic = (
            float(out["score_local_B"][i]),
            float(out["score_semantic_B"][i]),
        )
        if "cluster_distance_B" in out:
            result.cluster_distance = float(out["cluster_distance_B"][i])
        said = decision.judge(result.score, int(out["cluster_B"][i]), result.cluster_distance, class_name)
        result.p_value, result.threshold = said.p_value, said.threshold
        result.threshold_unsure, result.answer = said.threshold_unsure, said.answer
        result.is_anomaly = said.answer == ANOMALY
        result.class_name, result.predicted_class = said.class_name, said.predicted_class
        result.class_p, result.unknown_class = said.class_p, said.unknown_class
        result.model_id, result.scale = decision.model_id, decision.map_scale
        result.roi = unpack_roi(decision.roi)
        grid = np.asarray(out["map_B1HW"][i, 0], dtype=np.float32)
        result.peak, result.grid = float(grid.max()), grid if maps else None
        if said.rule.region is not None:
            result.threshold_region = said.rule.region.value
            shape = (result.height, result.width)
            result.regions = find_regions(grid, shape, result.threshold_region, said.rule.peaks)


def check_counts(threads: int, batch: int) -> None:
    """Refuse threads of a runtime and images of a call that no machine has; 0 stands for a choice of our own."""
    check_range("--threads", threads, 0, MOST_THREADS)
    check_range("--batch", batch, 0, MOST_BATCH)
