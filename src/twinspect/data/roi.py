"""A region of interest: where a product lies in every picture, from a mask or from drawn polygons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from twinspect.data.images import read_mask
from twinspect.errors import DataError
from twinspect.files import read_text

_SHAPE = 0.02  # relative difference of a mask's and the images' height to width that is put down to rounding


def read_roi(path: Path) -> NDArray[np.bool_]:
    """H x W, true inside: a mask image (above 0 is inside), or polygons in a JSON file of LabelMe.

    Raises:
        DataError: it cannot be read, or marks nothing.
    """
    roi = _polygons(path) if path.suffix.lower() == ".json" else read_mask(path)
    if not roi.any():
        raise DataError(f"{path}: the region of interest is empty; mark what shall be looked at with white (above 0)")
    return roi


def fit_roi(roi_HW: NDArray[np.bool_], size: int, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A region at the model's size x size.

    Args:
        roi_HW: region in the pixels of an image.
        size: input side of the model.
        shape: height and width of the images.

    Raises:
        DataError: it has another shape than the images.
    """
    height, width = roi_HW.shape
    if abs(height / width * shape[1] / shape[0] - 1.0) > _SHAPE:
        raise DataError(
            f"--roi: its mask has {width} x {height} pixels and the images {shape[1]} x {shape[0]}, which is another "
            "shape; draw it on one of the images"
        )
    image = Image.fromarray(np.where(roi_HW, 255, 0).astype(np.uint8))
    return np.asarray(np.asarray(image.resize((size, size), Image.Resampling.BOX)) > 127)


def _polygons(path: Path) -> NDArray[np.bool_]:
    try:
        given: dict[str, Any] = json.loads(read_text(path))
        image = Image.new("1", (int(given["imageWidth"]), int(given["imageHeight"])))
        for shape in given["shapes"]:
            points = [(float(x), float(y)) for x, y in shape["points"]]
            if shape.get("shape_type", "polygon") == "rectangle":
                (left, top), (right, bottom) = np.sort(points, axis=0)
                points = [(left, top), (right, top), (right, bottom), (left, bottom)]
            ImageDraw.Draw(image).polygon(points, fill=1)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as polygons ({error!r}); a JSON file of LabelMe is needed (imageWidth, "
            "imageHeight, shapes with points), or a mask image"
        ) from None
    return np.array(image)
