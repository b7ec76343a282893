"""Pixels of a sample, its masks (which belong to it by their names, and what they mark), and regions of interest."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from twinspect.data.containers import read_record
from twinspect.data.images import MOST_PIXELS, read_mask, read_mask_values, read_rgb
from twinspect.data.names import GOOD, MASK, meaning, role_of
from twinspect.data.scan import ScanLog
from twinspect.data.tables import read_json
from twinspect.errors import DataError
from twinspect.files import near_names
from twinspect.types import Sample

_SATURATION_FILE = "defects_config.json"
_SHAPE = 0.02  # relative difference of a mask's and the images' height to width that is put down to rounding


def read_sample_rgb(sample: Sample, draft_side: int = 0) -> NDArray[np.uint8]:
    """H x W x 3 RGB of a sample, from its own file (see `read_rgb`) or from a record of a container file."""
    if sample.pixels is not None:
        return sample.pixels
    if sample.record is None:
        return read_rgb(sample.image, draft_side=draft_side)
    return read_record(sample.image, sample.record)


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

    A DataError where a mask has another size than ``shape``, or the image is not normal and has no mask.
    """
    if not sample.masks and sample.label != 0:
        raise DataError(f"{sample.image}: no mask, and not known to be good; metrics of pixels leave it out")
    union = np.zeros(shape, dtype=np.bool_)
    for path in sample.masks:
        union |= _sized_mask(path, shape, sample)
    return union


def read_regions(sample: Sample, shape: tuple[int, int]) -> list[tuple[NDArray[np.bool_], float]] | None:
    """One region (H x W) per mask file, and the pixels of it that must be found for full credit in sPRO.

    The grey value of a mask names its entry in MVTec LOCO's ``defects_config.json``: an area in pixels, or a part of
    the region's own area. None where no such file lies above the masks.
    """
    above = (parent / _SATURATION_FILE for path in sample.masks for parent in path.parents[:4])
    if (config := next(filter(os.path.isfile, above), None)) is None:
        return None
    regions, table = [], _saturation_table(config)
    for path in sample.masks:
        mask = _sized_mask(path, shape, sample)
        if not mask.any():
            continue
        values, area = np.unique(read_mask_values(path)[0][mask]), float(mask.sum())
        if len(values) != 1 or int(values[0]) not in table:
            raise DataError(f"{path}: grey values {values.tolist()}; {config} has one for each of {sorted(table)}")
        threshold, relative = table[int(values[0])]
        regions.append((mask, min(threshold * area if relative else threshold, area)))
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


@lru_cache(maxsize=64)
def _saturation_table(config: Path) -> dict[int, tuple[float, bool]]:
    try:
        return {
            int(e["pixel_value"]): (float(e["saturation_threshold"]), bool(e["relative_saturation"]))
            for e in read_json(config)
        }
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{config}: cannot be used ({error!r}); a list of objects with pixel_value, saturation_threshold "
            "and relative_saturation is needed"
        ) from None


# ------------------------------------------------------------------- which mask belongs to which image

_WORDS = r"(?:masks?|maske|gt|ground[_-]?truth|labels?|seg|segmentation|annotations?|anno)"
# 000_mask, 000-mask, 000_mask_0, 000_GT; and mask_000.
_AFTER = re.compile(rf"^(?P<stem>.+?)[ ._-]{_WORDS}(?:[ ._-]?\d+)?$", re.IGNORECASE)
_BEFORE = re.compile(rf"^{_WORDS}[ ._-](?P<stem>.+)$", re.IGNORECASE)
_SURE = re.compile(r"[ ._-](?:masks?|gt|ground[_-]?truth)(?:[ ._-]?\d+)?$", re.IGNORECASE)


class Place(NamedTuple):
    """A file, and the names of the folders between its class and itself, the outermost first."""

    path: Path
    folders: tuple[str, ...]

    @property
    def role(self) -> str:
        """What the folders say that it is: good, bad, mask, unsorted or nothing."""
        return role_of(self.folders)

    @property
    def split(self) -> str:
        """The split that a folder above the image names, the outermost first; empty if none does."""
        return next((split for name in self.folders if (split := meaning(name).split)), "")


Images = dict[str, list[tuple[tuple[str, ...], Path]]]  # name of an image -> folders and path of each that has it


def masks_among(images: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Of files in one folder, those that are masks of others, and those that are masks of images not there."""
    stems = {_plain(image.stem) for image in images}
    masks = [image for image in images if any(stem in stems for stem in _bare(image.stem))]
    known = set(masks)
    return masks, [image for image in images if image not in known and _SURE.search(image.stem)]


def match(groups: Iterable[Sequence[Place]], masks: Sequence[Place], log: ScanLog) -> dict[Path, tuple[Path, ...]]:
    """Masks per image; a mask that belongs to none, or to one of several, is logged.

    A mask lies where its image lies, in a folder of masks instead of one of images: ``ground_truth/bad/000.png``
    belongs to ``test/bad/000.png``. Its name may say that it is a mask (``000_mask``). Several masks of one image lie
    in a folder that is named like the image, or are numbered. Where folders do not tell, the name alone decides. Of
    several groups of images, a mask that fits one of an earlier group is not another's.
    """
    named: list[Images] = []
    for group in groups:
        images: Images = defaultdict(list)
        for path, folders in group:
            for name in (path.stem, path.name):  # a mask of 000.jpg may be 000.jpg.png
                images[_plain(name)].append((_telling(folders), path))
        named.append(images)
    masks_of: dict[Path, list[Path]] = defaultdict(list)
    for mask in masks:
        if any(meaning(folder).role == GOOD for folder in mask.folders):
            log.skip(mask.path, "masks of good images are not needed")
            continue
        owners: list[Path] = next((fits for images in named if (fits := _owners(mask, images))), [])
        if len(owners) == 1:
            masks_of[owners[0]].append(mask.path)
        else:
            log.skip(mask.path, "mask that fits images of several folders" if owners else "mask without image")
    return {image: tuple(sorted(paths)) for image, paths in masks_of.items()}


def _owners(mask: Place, images: Images) -> list[Path]:
    """Images that a mask may belong to, the best fit only."""
    # Without folders of masks; and with what these are called besides: bad of bad_mask.
    bare = _telling(folder for folder in mask.folders if meaning(folder).role != MASK)
    full = _telling("".join(_bare(folder)[:1]) if meaning(folder).role == MASK else folder for folder in mask.folders)
    stems = [_plain(mask.path.stem), *_bare(mask.path.stem)]
    for folders in dict.fromkeys((full, bare)):
        tries = [(stem, folders) for stem in stems]
        if folders:
            tries.append((folders[-1], folders[:-1]))  # 000/0.png, 000/1.png
        for stem, above in tries:
            if fits := [image for place, image in images.get(stem, ()) if place == above]:
                return fits
    fits = [image for stem in stems for place, image in images.get(stem, ()) if set(bare) <= set(place)]
    return list(dict.fromkeys(fits))


def _telling(folders: Iterable[str]) -> tuple[str, ...]:
    """Names of folders that tell images of one class apart: kinds of defects, lots of one kind."""
    known = [(folder, meaning(folder)) for folder in folders if folder]
    return tuple(_plain(folder) for folder, meant in known if meant.role or (meant.rest and not meant.pictures))


def _bare(stem: str) -> list[str]:
    """``scratch`` of ``scratch_mask`` or ``mask_scratch``, nothing of ``ground_truth``."""
    return [_plain(parts["stem"]) for pattern in (_AFTER, _BEFORE) if (parts := pattern.match(stem))]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


# --------------------------------------------------------------------------------- region of interest


def read_roi(path: Path) -> NDArray[np.bool_]:
    """H x W, true inside, of a mask image (above 0 is inside) or LabelMe's polygons; a DataError for nothing."""
    if not path.is_file():
        raise DataError(
            f"--roi {path}: no such file.{near_names(path)} Give a mask image or a JSON file of LabelMe; it holds "
            "for all products of the model"
        )
    roi = _polygons(path) if path.suffix.lower() == ".json" else read_mask(path)
    if not roi.any():
        raise DataError(f"{path}: the region of interest is empty; mark what shall be looked at with white (above 0)")
    return roi


def fit_roi(roi_HW: NDArray[np.bool_], size: int, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A region at the model's size x size; a DataError where the images (height, width) have another shape."""
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
        given: dict[str, Any] = read_json(path)
        width, height = int(given["imageWidth"]), int(given["imageHeight"])
        if width * height > MOST_PIXELS:
            raise DataError(f"{path}: {width} x {height} pixels are more than images may have")
        image = Image.new("1", (width, height))
        for shape in given["shapes"]:
            points = np.array([(float(x), float(y)) for x, y in shape["points"]])
            kind = shape.get("shape_type") or "polygon"
            if kind != "polygon" or len(points) < 3 or not np.isfinite(points).all():
                raise ValueError(f"it has a {kind} without an area; draw polygons of three points or more")
            ImageDraw.Draw(image).polygon([(x, y) for x, y in points.tolist()], fill=1)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read as polygons ({error}); a JSON file of LabelMe is needed (imageWidth, "
            "imageHeight, shapes with points), or a mask image"
        ) from None
    return np.array(image)
