"""What `predict` is given in Python, as a stream of images: paths, arrays, encoded bytes, iterables of these."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.errors import ImageError
from twinspect.inference.archives import ARCHIVES, Item, Stream
from twinspect.inference.sources import TABLES, among, walk
from twinspect.inference.sources import is_live as is_live_path
from twinspect.inference.video import VIDEOS
from twinspect.types import Sample

_ACCEPTED = "a path, an array, a PIL image, the bytes of an image file, or an iterable of these"


def expand(source: Any) -> Iterator[Any]:
    """The images that a source stands for, lazily and in fixed order.

    Paths, folders, globs, lists, archives, tables and URLs become `Item`s, and so do encoded bytes and open files.
    Arrays (of four dimensions: a stack of images), PIL images and `Sample`s stay what they are. Any iterable of these
    is taken apart. Of several sources, a path without any image gives an item with an error, which becomes its row.

    Raises:
        DataError: nothing found behind the only path; the message says what was looked for.
        ImageError: something that holds no image, when it is reached.
    """
    return _expanded(source, False)


def is_single(source: Any) -> bool:
    """Whether a source stands for exactly one image."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source).is_file() and not str(source).lower().endswith((*ARCHIVES, *TABLES, *VIDEOS))
    return _several(source) is None


def is_live(source: Any) -> bool:
    """Whether more images may still be in the making: a camera, or an iterable that does not know its length."""
    if is_live_path(source):
        return True
    lasting = isinstance(source, (str, os.PathLike)) or hasattr(source, "__len__")
    return not lasting and _several(source) is not None


def is_array(item: Any) -> bool:
    """Whether something is an array of numpy, torch or another library."""
    if isinstance(item, (Item, Sample, str, os.PathLike, Image.Image)):
        return False
    if isinstance(item, memoryview):
        return item.ndim > 1
    return any(hasattr(item, name) for name in ("__array__", "__array_interface__", "__dlpack__"))


def as_array(item: Any) -> NDArray[Any]:
    """An array of any library as numpy's.

    Raises:
        ImageError: it cannot be one.
    """
    try:
        if hasattr(item, "detach"):  # a tensor of torch, perhaps on a GPU or with a gradient
            item = item.detach().cpu()
            item = item.float() if "bfloat16" in str(item.dtype) else item  # a type that numpy lacks
        return np.asarray(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImageError(f"{type(item).__name__} is no array that numpy can read ({error})") from None


def _expanded(one: Any, one_of_several: bool) -> Iterator[Any]:
    if isinstance(one, (str, os.PathLike)):
        found = (among if one_of_several else walk)(os.fsdecode(one))
        return (item for part in found for item in (part.items() if isinstance(part, Stream) else (part,)))
    many = _several(one)
    if many is None:
        return iter([_encoded(one)])
    if isinstance(many, (list, tuple)):
        return chain.from_iterable(_expanded(inner, len(many) > 1) for inner in many)
    return (item for inner in many for item in _expanded(_own_copy(inner), True))


def _several(one: Any) -> Iterable[Any] | None:
    """The parts of what holds several images; None for a single image.

    Raises:
        ImageError: it holds no image at all.
    """
    if is_array(one):
        dimensions = one.ndim if hasattr(one, "ndim") else as_array(one).ndim
        names = dimensions == 1 and as_array(one).dtype.kind in "OUT"  # a column of paths
        return list(as_array(one) if names else one) if dimensions == 4 or names else None
    if isinstance(one, (Item, Sample, Image.Image, bytes, bytearray, memoryview)) or hasattr(one, "read"):
        return None
    if any(hasattr(type(one), name) for name in ("__iter__", "__getitem__")) and not isinstance(one, Mapping):
        several: Iterable[Any] = one
        return several
    hint = ", which cv2.imread returns for a file that it cannot read" if one is None else ""
    raise ImageError(f"{type(one).__name__}{hint}; accepted {_ACCEPTED}")


def _encoded(one: Any) -> Any:
    """A single image; the content of an image file as an `Item`."""
    if isinstance(one, (Item, Sample, Image.Image)) or is_array(one):
        return one
    name = getattr(one, "name", "")
    return Item(name if isinstance(name, str) and name else f"<{type(one).__name__}>", data=_content(one))


def _content(one: Any) -> bytes:
    if isinstance(one, (bytes, bytearray, memoryview)):
        return bytes(one)
    try:
        if hasattr(one, "seekable") and one.seekable():
            one.seek(0)  # whoever has just written an image into it left it at its end
        body = one.read() if not isinstance(one, io.TextIOBase) else ""
    except (OSError, ValueError) as error:  # ValueError: it was closed
        raise ImageError(f"{type(one).__name__} cannot be read ({error})") from None
    if not isinstance(body, bytes):
        raise ImageError(f"{type(one).__name__} gives {type(body).__name__} instead of bytes; open files with 'rb'")
    return body


def _own_copy(one: Any) -> Any:
    """An image of an iterator, out of reach of a camera that writes the next one into the same memory."""
    if is_array(one):
        return np.array(as_array(one))
    return one if isinstance(one, (str, os.PathLike)) or _several(one) is not None else _encoded(one)
