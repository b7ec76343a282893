"""Pixels of a sample: image file or container record to RGB, mask files to one boolean mask."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twinspect.data.containers import read_record
from twinspect.data.images import ImageLimits, read_mask, read_mask_values, read_rgb
from twinspect.errors import DataError
from twinspect.types import Sample

DEFAULT_LIMITS = ImageLimits()
SATURATION_FILE = "defects_config.json"


@dataclass(frozen=True, slots=True)
class DefectRegion:
    """One ground-truth region as sPRO counts it.

    Attributes:
        mask: H x W booleans.
        saturation: area in pixels that must be found for full credit; the whole region's area where the
            data set says nothing.
    """

    mask: NDArray[np.bool_]
    saturation: float


def read_sample_rgb(sample: Sample, limits: ImageLimits = DEFAULT_LIMITS, draft_side: int = 0) -> NDArray[np.uint8]:
    """H x W x 3 RGB of a sample, from its own file or from a record of a container file.

    Containers (CIFAR batches, IDX, Parquet) are opened once per process and kept.
    ``draft_side`` is passed on to ``read_rgb`` for files.
    """
    if sample.pixels is not None:
        return sample.pixels
    if sample.record is None:
        return read_rgb(sample.image, limits, draft_side=draft_side)
    return read_record(sample.image, sample.record, limits)


def has_pixel_truth(sample: Sample) -> bool:
    """Whether pixel metrics can use the sample: it is normal, or it is anomalous and has masks."""
    return sample.label == 0 or (sample.label == 1 and bool(sample.masks))


def marks_a_defect(masks: Sequence[Path]) -> bool | None:
    """Whether any of an image's masks marks a pixel; None where one cannot be read, and no other does."""
    marks: bool | None = False
    for path in masks:
        try:
            if read_mask(path).any():
                return True
        except DataError:
            marks = None
    return marks


def read_sample_mask(sample: Sample, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Union of a sample's masks as H x W booleans (``> 0`` is defect); all False for a normal image.

    Raises:
        DataError: a mask has another size than ``shape``, or the image is not normal and has no mask.
    """
    if not sample.masks and sample.label != 0:
        raise DataError(f"{sample.image}: no mask and not known to be normal; image-level metrics only")
    union = np.zeros(shape, dtype=np.bool_)
    for path in sample.masks:
        union |= _sized_mask(path, shape, sample)
    return union


def has_saturation(sample: Sample) -> bool:
    """Whether the data set states saturation areas for the sample's masks (MVTec LOCO)."""
    return any(_saturation_config(path) is not None for path in sample.masks)


def read_regions(sample: Sample, shape: tuple[int, int]) -> list[DefectRegion]:
    """One region per mask file with its saturation area (MVTec LOCO's ``defects_config.json``).

    The grey value of a mask names its entry: an area in pixels, or a part of the region's own area. Without
    that file (or for a mask of another set) a region saturates at its whole area, and sPRO becomes the
    overlap.
    """
    regions = []
    for path in sample.masks:
        mask = _sized_mask(path, shape, sample)
        if mask.any():
            regions.append(DefectRegion(mask, _saturation(path, mask)))
    return regions


def _sized_mask(path: Path, shape: tuple[int, int], sample: Sample) -> NDArray[np.bool_]:
    mask = read_mask(path)
    if mask.shape != shape:
        turned = " (the image as it lies in its file, before its EXIF turns it?)" if mask.shape == shape[::-1] else ""
        raise DataError(
            f"{path}: mask of {mask.shape[1]} x {mask.shape[0]} pixels, expected {shape[1]} x {shape[0]} as "
            f"the image {sample.image}{turned}; resize the mask to the image's size with nearest neighbour"
        )
    return mask


def _saturation_config(path: Path) -> Path | None:
    return next((p / SATURATION_FILE for p in path.parents[:4] if os.path.isfile(p / SATURATION_FILE)), None)


def _saturation(path: Path, mask: NDArray[np.bool_]) -> float:
    area = float(mask.sum())
    config = _saturation_config(path)
    if config is None:
        return area
    values = np.unique(read_mask_values(path)[0][mask])
    table = _saturation_table(config)
    if len(values) != 1 or int(values[0]) not in table:
        raise DataError(
            f"{path}: grey values {values.tolist()}; {config} has an entry for {sorted(table)}, one per mask"
        )
    threshold, relative = table[int(values[0])]
    return min(threshold * area if relative else threshold, area)


@lru_cache(maxsize=64)
def _saturation_table(config: Path) -> dict[int, tuple[float, bool]]:
    try:
        entries = json.loads(config.read_text("utf-8-sig"))
        return {
            int(e["pixel_value"]): (float(e["saturation_threshold"]), bool(e["relative_saturation"])) for e in entries
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{config}: cannot be used ({error!r}); a list of objects with pixel_value, saturation_threshold "
            "and relative_saturation is needed"
        ) from None
