"""Images to results, the same for every runtime. No torch import here.

A runtime is anything with ``size`` and ``run(pixels) -> dict of arrays``; everything before it (decoding,
resizing) and after it (p-values, thresholds, geometry) lives here, once.
"""

from __future__ import annotations

import glob as globbing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twinspect.calibration import Threshold, conformal_threshold, p_values
from twinspect.data.images import ImageLimits, is_image, read_rgb, resize_rgb
from twinspect.data.samples import read_sample_rgb
from twinspect.errors import DataError, ImageError
from twinspect.inference.result import Result
from twinspect.types import Sample


class Runtime(Protocol):
    """What executes the model's graph."""

    size: int

    def run(self, pixels_BHWC: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """uint8 RGB B x S x S x 3 to arrays named as the fields of the model's `Outputs`."""
        ...


@dataclass(frozen=True, slots=True)
class Decision:
    """Everything between raw scores and answers; stored in the bundle as JSON.

    Attributes:
        calibration: joint scores of held-out normal images.
        threshold: decision rule made from them.
        class_of_prototype: most common class of each scene prototype.
        map_scale: (low, high) of map values for colours, one for all images.
    """

    calibration: NDArray[np.float64]
    threshold: Threshold
    class_of_prototype: tuple[str, ...]
    map_scale: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "calibration": [float(s) for s in self.calibration],
            "max_fpr": self.threshold.max_fpr,
            "class_of_prototype": list(self.class_of_prototype),
            "map_scale": list(self.map_scale),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """Rebuild from a bundle's JSON; the threshold is computed again from the calibration scores."""
        scores = np.asarray(values["calibration"], dtype=np.float64)
        low, high = values["map_scale"]
        return cls(
            scores,
            conformal_threshold(scores, float(values["max_fpr"])),
            tuple(values["class_of_prototype"]),
            (float(low), float(high)),
        )


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
        limits: ImageLimits = ImageLimits(),
    ) -> None:
        self.runtime, self.decision, self.batch, self.limits = runtime, decision, batch, limits
        self.workers = workers or min(4, os.cpu_count() or 1)

    def predict(self, source: Any, maps: bool = True, pixels: bool = True) -> Iterator[Result]:
        """Results in the order of the images, a few at a time (constant memory).

        Args:
            source: a path, folder, glob, array (H x W x 3 or H x W, uint8 RGB), PIL image, `Sample`, or a list.
            maps: keep each result's anomaly map.
            pixels: keep each result's image for overlays.

        Raises:
            DataError: nothing to score. An image that cannot be read gives a result with ``error`` instead.
        """
        items = iter(expand(source))
        with ThreadPoolExecutor(self.workers) as pool:
            ahead = self.batch * 4
            pending = [pool.submit(self._decode, item) for item in islice(items, ahead)]
            while pending:
                now, pending = pending[: self.batch], pending[self.batch :]
                pending += [pool.submit(self._decode, item) for item in islice(items, self.batch)]
                yield from self._score([job.result() for job in now], maps, pixels)

    def _decode(self, item: Any) -> tuple[Result, NDArray[np.uint8] | None]:
        name = name_of(item)
        try:
            rgb = self._pixels(item)
        except DataError as error:
            return Result(name, error=str(error)), None
        return Result(name, width=rgb.shape[1], height=rgb.shape[0], rgb=rgb), resize_rgb(rgb, self.runtime.size)

    def _pixels(self, item: Any) -> NDArray[np.uint8]:
        if isinstance(item, Sample):
            return read_sample_rgb(item, self.limits)
        return read_rgb(Path(item), self.limits) if isinstance(item, (str, Path)) else to_rgb(item)

    def _score(
        self, decoded: Sequence[tuple[Result, NDArray[np.uint8] | None]], maps: bool, pixels: bool
    ) -> Iterator[Result]:
        usable = [square for _, square in decoded if square is not None]
        out = self.runtime.run(np.stack(usable)) if usable else {}
        place = 0
        for result, square in decoded:
            if square is not None:
                self._fill(result, out, place, maps)
                place += 1
            if not pixels:
                result.rgb = None
            yield result

    def _fill(self, result: Result, out: Mapping[str, NDArray[Any]], i: int, maps: bool) -> None:
        decision = self.decision
        result.score = float(out["score_B"][i])
        result.score_local, result.score_semantic = (
            float(out["score_local_B"][i]),
            float(out["score_semantic_B"][i]),
        )
        result.p_joint = float(-np.expm1(-max(result.score, 0.0)))
        result.p_value = float(p_values(np.array([result.score]), decision.calibration)[0])
        result.threshold = decision.threshold.value
        result.is_anomaly = bool(result.score >= result.threshold)
        result.class_name = decision.class_of_prototype[int(out["prototype_B"][i])]
        result.scale = decision.map_scale
        result.grid = np.asarray(out["map_B1HW"][i, 0], dtype=np.float32) if maps else None


def name_of(item: Any) -> str:
    """The path of a file or sample, or a word for what has none."""
    if isinstance(item, Sample):
        return str(item.image) if item.record is None else f"{item.image}#{item.record}"
    return str(item) if isinstance(item, (str, Path)) else f"<{type(item).__name__}>"


def expand(source: Any) -> Iterable[Any]:
    """One image, many, or the image files a path, folder or glob stands for, in sorted order.

    Raises:
        DataError: nothing found; the message says what was looked for.
    """
    if isinstance(source, np.ndarray) and source.ndim == 4:
        return list(source)
    if isinstance(source, (list, tuple)):
        return [item for one in source for item in expand(one)]
    if not isinstance(source, (str, Path)):
        return [source]
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and is_image(p))
        if not found:
            raise DataError(f"no image files in {path} (looked for {_suffixes()})")
        return found
    matched = sorted(Path(p) for p in globbing.glob(str(source), recursive=True))
    files = [p for p in matched if p.is_file()]
    if not files:
        raise DataError(f"nothing found at {source}: give an image, a folder, or a quoted glob such as 'new/*.png'")
    return files


def to_rgb(item: Any) -> NDArray[np.uint8]:
    """An array or PIL image to H x W x 3 uint8 RGB.

    Raises:
        ImageError: another type, shape or value type.
    """
    array = np.asarray(item.convert("RGB") if hasattr(item, "convert") else item)
    if array.dtype != np.uint8:
        raise ImageError(f"array of type {array.dtype}; accepted uint8 RGB, so type: (a * 255).astype('uint8')")
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ImageError(f"array of shape {array.shape}; accepted H x W x 3 (RGB) or H x W (grey)")
    return np.ascontiguousarray(array)


def classes_of_prototypes(prototype_N: NDArray[np.int64], classes: Sequence[str], count: int) -> tuple[str, ...]:
    """Most common training class of each prototype; empty for one no image belongs to."""
    owners = [Counter(c for c, k in zip(classes, prototype_N, strict=True) if k == one) for one in range(count)]
    return tuple(counter.most_common(1)[0][0] if counter else "" for counter in owners)


def _suffixes() -> str:
    from twinspect.data.images import SUFFIXES

    return ", ".join(sorted(SUFFIXES))
