"""Decode one image file to 8-bit RGB, the same way for training, prediction and serving.

No torch here: a light runtime reads images with this file alone. Geometry rule: nothing is ever
cropped. The model resizes the whole image to its own square input, and maps are resized back.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from twinspect.errors import ImageError

_OPENING = threading.Lock()
# Pillow's plug-ins raise all of these on damaged files (warnings where Python makes them errors); none of
# them may end a run.
_DAMAGED = (OSError, ValueError, SyntaxError, IndexError, EOFError, TypeError, AttributeError, KeyError, Warning)
_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_OVERSHOOT = 0.05  # of floats beyond 0 and 1, as interpolation and gain leave them; they are clipped
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
# The file formats of those endings. Pillow knows dozens more, and some of them start programs (EPS) or are
# meant for other things than photographs; whatever an upload calls itself, they are refused.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "PPM", "GIF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"})


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a file may hold before it is refused.

    Attributes:
        max_pixels: width times height, checked on the header before any pixel is decoded.
        min_side: shortest side in pixels that still makes sense to score.
        max_bytes: longest file that is read into memory at all.
    """

    max_pixels: int = 100_000_000
    min_side: int = 2
    max_bytes: int = 1 << 30


def is_image(path: Path | str) -> bool:
    """Whether the name looks like an image and is not a hidden file (``._x.jpg`` from other systems)."""
    name = os.path.basename(path)  # a Path for every string would be most of the time that listing a folder takes
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def read_rgb(
    source: Path | bytes, limits: ImageLimits = ImageLimits(), name: str = "", draft_side: int = 0
) -> NDArray[np.uint8]:
    """Decode a file or its bytes to an H x W x 3 array of 8-bit RGB.

    EXIF rotation is applied; 16-bit images are scaled by their full range (a fixed window, so that two
    images of one camera stay comparable); palettes, CMYK and alpha become RGB (alpha over black); of an
    animation the first frame counts. ``draft_side`` > 0 lets a JPEG be decoded at a half, quarter or
    eighth of its size as long as the short side stays at least that long.

    Raises:
        ImageError: with the file's name, what was found and what to do about it.
    """
    return read_sized_rgb(source, limits, name, draft_side)[0]


def read_sized_rgb(
    source: Path | bytes, limits: ImageLimits = ImageLimits(), name: str = "", draft_side: int = 0
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """As `read_rgb`, with the (height, width) of the whole image: a draft has fewer pixels than that.

    Raises:
        ImageError: as `read_rgb`.
    """
    label = name or (str(source) if isinstance(source, Path) else "image bytes")
    raw = _file_bytes(source, limits, label) if isinstance(source, Path) else source
    if not raw:
        raise ImageError(f"{label}: the file is empty (0 bytes); copy it again from its source")
    with _refusals(label, limits), _opened(raw) as image:
        _check_size(image, limits, label)
        shape = _upright_shape(image)
        if draft_side > 0:
            image.draft("RGB", _draft_size(image.size, draft_side))
        return _to_rgb(ImageOps.exif_transpose(image)), shape


def pil_rgb(image: Image.Image, limits: ImageLimits = ImageLimits(), name: str = "PIL image") -> NDArray[np.uint8]:
    """A PIL image to H x W x 3 RGB, by the same rules as its file (`read_rgb`).

    Raises:
        ImageError: as `read_rgb`.
    """
    with _refusals(name, limits):
        _check_size(image, limits, name)
        return _to_rgb(ImageOps.exif_transpose(image))


def array_rgb(values: NDArray[Any], limits: ImageLimits = ImageLimits()) -> NDArray[np.uint8]:
    """Pixels in memory to H x W x 3 RGB, by the rules of files: 16 bits by their full range, alpha over black.

    Args:
        values: H x W, H x W x C or C x H x W, where C is 1 (grey), 3 (RGB) or 4 (RGBA); uint8, uint16, or floats
            from 0 to 1.
        limits: what an image may hold.

    Raises:
        ImageError: another type, shape or range, with what to type.
    """
    layers = values[..., None] if values.ndim == 2 else values
    if layers.ndim == 3 and layers.shape[2] not in _CHANNELS and layers.shape[0] in _CHANNELS:
        layers = np.moveaxis(layers, 0, -1)
    if layers.ndim != 3 or layers.shape[2] not in _CHANNELS or min(layers.shape[:2]) < limits.min_side:
        raise ImageError(
            f"array of shape {values.shape}; accepted H x W (grey), H x W x C or C x H x W, where C is 1 (grey), "
            f"3 (RGB) or 4 (RGBA), at least {limits.min_side} pixels per side; a stack of images has four dimensions"
        )
    eight = _eight_bits(layers)
    if eight.shape[2] == 4:
        return _to_rgb(Image.fromarray(np.ascontiguousarray(eight)))
    return np.ascontiguousarray(np.repeat(eight, 3, axis=2) if eight.shape[2] == 1 else eight)


def _eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    kind = values.dtype
    if kind == np.uint8:
        return values
    if kind == np.uint16:
        return np.asarray((values / 257.0).round(), dtype=np.uint8)
    if kind.kind != "f":
        raise ImageError(
            f"array of type {kind}; accepted uint8, uint16, or floats from 0 to 1{_how_to_convert(kind.kind)}"
        )
    low, high = float(values.min()), float(values.max())
    if not (-_OVERSHOOT <= low and high <= 1 + _OVERSHOOT):  # not a number is refused as well
        raise ImageError(
            f"array of type {kind} with values from {low:g} to {high:g}; accepted floats from 0 to 1, so type: "
            "a / 255 if a is within 0..255, and undo any normalisation"
        )
    return np.asarray((values.astype(np.float64) * 255.0).clip(0, 255).round(), dtype=np.uint8)


def _how_to_convert(kind: str) -> str:
    """What to type for an array of another type, by numpy's letter of its kind."""
    advice = {"b": "a.astype('uint8') * 255", **dict.fromkeys("iu", "a.astype('uint8') if a is within 0..255")}
    return f", so type: {advice[kind]}" if kind in advice else ""


def read_mask(path: Path, limits: ImageLimits = ImageLimits()) -> NDArray[np.bool_]:
    """Decode a ground-truth mask to H x W booleans; any value above zero is defect (rule ``> 0``).

    Of a palette mask the index counts, not its colour: index 0 is the background, as annotation tools write it.
    """
    try:
        with Image.open(path) as image:
            _check_size(image, limits, str(path))
            values: NDArray[Any] = np.asarray(image)
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{path}: mask cannot be read ({error})") from None
    if values.ndim == 3 and values.shape[2] in (2, 4):
        values = values[..., :-1]  # alpha says nothing about the defect
    return np.asarray(values if values.ndim == 2 else values.any(axis=2), dtype=np.bool_)


def resize_rgb(rgb: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize H x W x 3 to size x size with an antialiased bilinear filter; the aspect is not kept."""
    if rgb.shape[:2] == (size, size):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BILINEAR))


def _file_bytes(path: Path, limits: ImageLimits, label: str) -> bytes:
    """Content of a plain file; a device or pipe would be read for ever, and a giant would fill the memory."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{label}: not a plain file; pipes and devices are not read")
        if status.st_size > limits.max_bytes:
            raise ImageError(f"{label}: {status.st_size:,} bytes; files above {limits.max_bytes:,} are not read")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{label}: cannot be opened ({error.strerror or error})") from None


@contextmanager
def _refusals(label: str, limits: ImageLimits) -> Iterator[None]:
    """Whatever Pillow raises on a bad file becomes an ImageError that names it."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{label}: not an image that can be read; accepted: {_accepted()}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{label}: more than {limits.max_pixels:,} pixels; resize it or cut it into tiles") from None
    except _DAMAGED as error:
        raise ImageError(f"{label}: damaged or truncated image ({error}); copy it again from its source") from None


def _opened(raw: bytes) -> Image.Image:
    # Our own limit, checked on the header, replaces Pillow's warning at 89 Mpx. The lock is for threads that
    # decode at the same time: filters are global, and catch_warnings would restore each other's.
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(raw), formats=_FORMATS)


def _check_size(image: Image.Image, limits: ImageLimits, label: str) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{label}: {width} x {height} pixels are more than the limit of {limits.max_pixels:,}; "
            "resize it or cut it into tiles"
        )
    if min(width, height) < limits.min_side:
        raise ImageError(f"{label}: {width} x {height} pixels; at least {limits.min_side} per side are needed")


def _upright_shape(image: Image.Image) -> tuple[int, int]:
    """Height and width after EXIF rotation, from the header."""
    width, height = image.size
    return (width, height) if image.getexif().get(ExifTags.Base.Orientation, 1) in _SIDEWAYS else (height, width)


def _draft_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / min(size)
    return (round(size[0] * scale), round(size[1] * scale)) if scale < 1 else size


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":
        return _window(np.asarray(image), image.mode)
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB"))
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _window(values: NDArray[np.generic], mode: str) -> NDArray[np.uint8]:
    """Grey values of more than 8 bits to RGB: integers by the 16-bit range, floats in [0, 1] or [0, 255]."""
    grey = values.astype(np.float64)
    if mode == "F":
        grey = grey * 255.0 if np.nanmax(grey, initial=0.0) <= 1.0 else grey
    else:
        grey = grey / 257.0  # never by the image's own range: images of one camera must stay comparable
    eight = np.nan_to_num(grey).clip(0, 255).round().astype(np.uint8)
    return np.repeat(eight[..., None], 3, axis=2)


def _accepted() -> str:
    return ", ".join(sorted(s.lstrip(".") for s in SUFFIXES))
