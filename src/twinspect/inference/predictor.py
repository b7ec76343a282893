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
from itertools import islice, repeat
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.data.images import ImageLimits, is_image, pil_rgb, read_sized_rgb, resize_rgb
from twinspect.data.samples import DEFAULT_LIMITS, read_sample_rgb
from twinspect.decision import ANOMALY
from twinspect.decision import Decision as Decision
from twinspect.errors import DataError, ImageError
from twinspect.inference.regions import find_regions
from twinspect.inference.result import Result
from twinspect.types import Sample

Decoded = tuple[Result, NDArray[np.uint8] | None]


class Runtime(Protocol):
    """What executes the model's graph."""

    size: int

    def run(self, pixels_BHWC: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """uint8 RGB B x S x S x 3 to arrays named as the fields of the model's `Outputs`."""
        ...


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An encoded image in memory, as it arrived.

    Attributes:
        name: what results and errors call it.
        data: the bytes of the file.
    """

    name: str
    data: bytes


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
        self, source: Any, maps: bool = True, pixels: bool = True, class_name: str | None = None
    ) -> Iterator[Result]:
        """Results in the order of the images, a few at a time (constant memory).

        Args:
            source: a path, folder, glob, array (H x W x 3 or H x W, uint8 RGB), PIL image, `Sample`, or a list
                or iterator of them.
            maps: keep each result's anomaly map.
            pixels: keep each result's image for overlays.
            class_name: class of all these images, whose thresholds then hold; None predicts it per image.

        Raises:
            ConfigError: a class that the bundle does not know.
            DataError: nothing to score. An image that cannot be read gives a result with ``error`` instead.
        """
        self.decision.checked_class(class_name)
        return self._predict(iter(expand(source)), maps, pixels, class_name)

    def _predict(self, items: Iterator[Any], maps: bool, pixels: bool, class_name: str | None) -> Iterator[Result]:
        with ThreadPoolExecutor(self.workers) as pool:
            ahead = self.batch * 4
            pending = [pool.submit(self.decode, item, pixels) for item in islice(items, ahead)]
            while pending:
                now, pending = pending[: self.batch], pending[self.batch :]
                pending += [pool.submit(self.decode, item, pixels) for item in islice(items, self.batch)]
                yield from self.score([job.result() for job in now], maps, repeat(class_name))

    def decode(self, item: Any, pixels: bool) -> Decoded:
        """One image read and resized: half of `predict`, for callers that schedule the other half themselves.

        Args:
            item: one image, as `predict` takes them, or `ImageBytes`.
            pixels: keep the image for overlays.

        Returns:
            The result so far, and S x S x 3 uint8 RGB; None and ``error`` for an image that cannot be read.
        """
        name, size = name_of(item), self.runtime.size
        try:
            rgb, (height, width) = self._pixels(item, size)
            square = resize_rgb(rgb, size)
            if pixels and rgb.shape[:2] != (height, width):
                rgb, _ = self._pixels(item, 0)
        except DataError as error:
            return Result(name, error=str(error)), None
        return Result(name, width=width, height=height, rgb=rgb if pixels else None), square

    def _pixels(self, item: Any, draft_side: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """Pixels, large JPEGs as a draft as in training, and the whole image's height and width."""
        if isinstance(item, Sample) and item.record is None:
            item = item.image
        if isinstance(item, (str, Path)):
            return read_sized_rgb(Path(item), self.limits, draft_side=draft_side)
        if isinstance(item, ImageBytes):
            return read_sized_rgb(item.data, self.limits, item.name, draft_side)
        rgb = read_sample_rgb(item, self.limits) if isinstance(item, Sample) else to_rgb(item, self.limits)
        return rgb, (rgb.shape[0], rgb.shape[1])

    def score(
        self, decoded: Sequence[Decoded], maps: bool, class_names: Iterable[str | None] = repeat(None)
    ) -> Iterator[Result]:
        """Results of images that `decode` read, in one call of the runtime.

        Args:
            decoded: as `decode` gave them.
            maps: keep each result's anomaly map.
            class_names: class of each image, None to predict it; `Decision.checked_class` refuses unknown ones.
        """
        usable = [square for _, square in decoded if square is not None]
        out = self.runtime.run(np.stack(usable)) if usable else {}
        place = 0
        for (result, square), class_name in zip(decoded, class_names, strict=False):
            if square is not None:
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
        result.p_joint = float(-np.expm1(-max(result.score, 0.0)))
        if "prototype_distance_B" in out:
            result.prototype_distance = float(out["prototype_distance_B"][i])
        said = decision.judge(result.score, int(out["prototype_B"][i]), result.prototype_distance, class_name)
        result.p_value, result.threshold = said.p_value, said.threshold
        result.threshold_unsure, result.answer = said.threshold_unsure, said.answer
        result.is_anomaly = said.answer == ANOMALY
        result.class_name, result.predicted_class = said.class_name, said.predicted_class
        result.class_p, result.unknown_class = said.class_p, said.unknown_class
        result.model_id, result.scale = decision.model_id, decision.map_scale
        grid = np.asarray(out["map_B1HW"][i, 0], dtype=np.float32)
        result.peak, result.grid = float(grid.max()), grid if maps else None
        if said.rule.region is not None:
            result.threshold_region = said.rule.region.value
            shape = (result.height, result.width)
            result.regions = find_regions(grid, shape, result.threshold_region, said.rule.peaks)


def name_of(item: Any) -> str:
    """The path of a file or sample, or a word for what has none."""
    if isinstance(item, Sample):
        return str(item.image) if item.record is None else f"{item.image}#{item.record}"
    if isinstance(item, ImageBytes):
        return item.name
    return str(item) if isinstance(item, (str, Path)) else f"<{type(item).__name__}>"


def expand(source: Any) -> Iterable[Any]:
    """One image, many, or the image files a path, folder or glob stands for, in sorted order.

    A file that is missing among others in a list stays in it, so that its row can say so.

    Raises:
        DataError: nothing found; the message says what was looked for.
    """
    if isinstance(source, np.ndarray) and source.ndim == 4:
        return list(source)
    if isinstance(source, Iterator):
        return (item for one in source for item in _listed(one))
    if isinstance(source, (list, tuple)):
        return [item for one in source for item in (expand(one) if len(source) == 1 else _listed(one))]
    return _files(Path(source)) if isinstance(source, (str, Path)) else [source]


def _listed(one: Any) -> Iterable[Any]:
    missing = isinstance(one, (str, Path)) and not globbing.has_magic(str(one)) and not Path(one).exists()
    return [one] if missing else expand(one)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and is_image(p))
        if not found:
            raise DataError(f"no image files in {path} (looked for {_suffixes()})")
        return found
    files = [p for p in sorted(Path(p) for p in globbing.glob(str(path), recursive=True)) if p.is_file()]
    if not files:
        raise DataError(f"nothing found at {path}: give an image, a folder, or a quoted glob such as 'new/*.png'")
    return files


def to_rgb(item: Any, limits: ImageLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """An array or PIL image to H x W x 3 uint8 RGB; a PIL image is read as its file would be.

    Raises:
        ImageError: another type, shape or value type.
    """
    if isinstance(item, Image.Image):
        return pil_rgb(item, limits)
    array = np.asarray(item)
    if array.dtype != np.uint8:
        raise ImageError(f"array of type {array.dtype}; accepted uint8 RGB, {_how_to_convert(array.dtype.kind)}")
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ImageError(f"array of shape {array.shape}; accepted H x W x 3 (RGB) or H x W (grey)")
    return np.ascontiguousarray(array)


def classes_of_prototypes(prototype_N: NDArray[np.int64], classes: Sequence[str], count: int) -> tuple[str, ...]:
    """Most common training class of each prototype; empty for one no image belongs to."""
    owners = [Counter(c for c, k in zip(classes, prototype_N, strict=True) if k == one) for one in range(count)]
    return tuple(counter.most_common(1)[0][0] if counter else "" for counter in owners)


def _how_to_convert(kind: str) -> str:
    """What to type for an array of another type, by numpy's letter of its kind."""
    advice = {"f": "(a * 255).astype('uint8') if a is within 0..1", "b": "a.astype('uint8') * 255"}
    advice |= dict.fromkeys("iu", "(a // 257).astype('uint8') if a is 16-bit")
    return f"so type: {advice[kind]}" if kind in advice else "a path or a PIL image"


def _suffixes() -> str:
    from twinspect.data.images import SUFFIXES

    return ", ".join(sorted(SUFFIXES))
