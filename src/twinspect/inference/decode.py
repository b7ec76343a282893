"""What `predict` is given, taken apart into images, and these decoded to squares ahead of the model. No torch."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect import files
from twinspect.data.containers import read_record
from twinspect.data.images import MOST_BYTES, MOST_PIXELS, array_rgb, pil_rgb, read_sized_rgb, resize_rgb
from twinspect.data.manifest import path_column
from twinspect.errors import DataError, ImageError
from twinspect.inference import job, sources
from twinspect.inference.streams import Item
from twinspect.types import Sample

T = TypeVar("T")
OVERLAP = 0.2  # of a tile's side
_HIGHEST = ("score_B", "score_local_B", "score_semantic_B", "cluster_distance_B")
Tiles = tuple[int, int]  # rows, columns
_JOB_BYTES = 1 << 18  # of squares that come back from a process together
_ACCEPTED = "a path, an array, a PIL image, the bytes of an image file, or an iterable of these"


class Decoded(NamedTuple):
    """One image made ready."""

    name: str  # of its row
    error: str = ""  # why there are no pixels
    height: int = 0  # of the whole image
    width: int = 0
    square: NDArray[np.uint8] | None = None  # S x S x 3 for the model; T x S x S x 3 for one that sees tiles
    rgb: NDArray[np.uint8] | None = None  # the whole image, where it was asked for


class Decoding(NamedTuple):
    """How images are made ready."""

    size: int  # side of the square
    max_pixels: int = MOST_PIXELS
    pixels: bool = False  # keep the whole image as well
    tiles: Tiles = (1, 1)  # rows and columns that an image is cut into


def ahead(
    tagged: Iterable[tuple[T, Any]], how: Decoding, workers: int, processes: bool = False, batch: int = 1
) -> Generator[tuple[T, Decoded], None, None]:
    """Decoded images with their tags, in order; two jobs a worker, or two batches, are ahead of the reader.

    Processes use more cores than threads, and an image that kills its decoder (out of memory, a crash inside a codec)
    costs its own row only. To be closed, which ends them.
    """
    # Handing a job over costs a process 0.2 ms: a tenth of a small model's time if each image were one.
    group = (4 if how.pixels else min(16, max(4, _JOB_BYTES // (3 * how.size**2)))) if processes else 1
    items, pool = iter(tagged), _started(workers, processes)
    jobs = iter(lambda: list(islice(items, group)), [])

    def submitted(job: list[tuple[T, Any]]) -> tuple[list[tuple[T, Any]], Future[list[Decoded]]]:
        try:
            return job, pool.submit(_decode_all, [item for _, item in job], how)
        except BrokenExecutor as error:  # a job before this one killed its worker; whoever waits for it starts anew
            broken: Future[list[Decoded]] = Future()
            broken.set_exception(error)
            return job, broken

    pending = deque(map(submitted, islice(jobs, max(2 * workers, -(-2 * batch // group)))))
    try:
        while pending:
            job, future = pending.popleft()
            try:
                decoded = future.result()
            except BrokenExecutor:  # by this job or another that was under way
                decoded = [_alone(item, how) for _, item in job]
                pool = _started(workers, processes)
                pending = deque(submitted(other) for other, _ in pending)
            pending.extend(map(submitted, islice(jobs, 1)))
            yield from ((tag, image) for (tag, _), image in zip(job, decoded, strict=True))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _alone(item: Any, how: Decoding) -> Decoded:
    """Decoded in a process of its own, as it may kill it."""
    with _started(1, processes=True) as pool:
        try:
            return pool.submit(decode, item, how).result()
        except BrokenExecutor:
            name = as_item(item).name
            return Decoded(name, f"{name}: its decoder died (damaged file, or out of memory)")


def _started(workers: int, processes: bool) -> Executor:
    if not processes:
        return ThreadPoolExecutor(workers)
    # Not forked: a copy of a process that runs threads (torch, pyarrow) may hang.
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_worker)


def _begin_worker() -> None:
    """In a new process: Ctrl-C is the parent's to handle, and a worker does not outlive a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _decode_all(images: list[Any], how: Decoding) -> list[Decoded]:
    return [decode(image, how) for image in images]


def decode(image: Any, how: Decoding) -> Decoded:
    """An image (see `as_item`) to a square for the model; a file that cannot be read gives an error instead.

    An array of a wrong kind raises ImageError: no file is wrong then.
    """
    item = as_item(image)
    try:
        rgb, (height, width) = _pixels(item, how.max_pixels, how.size * max(how.tiles))
        square = cut(rgb, how.size, how.tiles)
        if how.pixels and rgb.shape[:2] != (height, width):
            rgb, _ = _pixels(item, how.max_pixels, 0)
    except DataError as error:
        if is_array(item.pixels):
            raise
        return Decoded(item.name, str(error))
    except MemoryError:
        return Decoded(item.name, f"{item.name}: not enough memory to decode it")
    return Decoded(item.name, "", height, width, square, rgb if how.pixels else None)


def _pixels(item: Item, max_pixels: int, draft_side: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Pixels, large JPEGs as a draft as in training, and the whole image's height and width."""
    if item.pixels is not None:
        is_picture = isinstance(item.pixels, Image.Image)
        rgb = pil_rgb(item.pixels) if is_picture else array_rgb(as_array(item.pixels))
    elif item.record is not None and not item.error:
        rgb = read_record(Path(item.path), item.record)
    else:
        source = Path(item.path) if item.is_file else encoded(item)
        return read_sized_rgb(source, max_pixels, item.name, draft_side)
    return rgb, (rgb.shape[0], rgb.shape[1])


def encoded(item: Item) -> bytes:
    """Bytes of an image as they are stored; an ImageError where it must not or cannot be read."""
    if item.error:
        raise ImageError(item.error)
    if item.data is not None:
        return item.data
    return files.read(item.path, MOST_BYTES)


# -------------------------------------------------------------------------------------------- what is given in Python


def expand(source: Any, one_of_several: bool = False) -> Iterator[Item]:
    """The images that a source stands for, lazily and in fixed order.

    A source is a path, folder, glob, list, archive, table or URL, the bytes of an image file or an open one, an array
    (of four dimensions: a stack of images), a PIL image, a `Sample`, a data frame with a column of paths, or an
    iterable of these, which is taken apart. Of several sources, a path without any image gives an item with an error,
    which becomes its row.

    Raises:
        DataError: nothing found behind the only path; the message says what was looked for.
        ImageError: something that holds no image, when it is reached.
    """
    if isinstance(source, (str, os.PathLike)):
        return chain.from_iterable(file.items() for file in sources.walk(os.fsdecode(source), one_of_several))
    many = _several(source)
    if many is None:
        return iter([as_item(source)])
    if isinstance(many, (list, tuple)):
        return chain.from_iterable(expand(inner, len(many) > 1) for inner in many)
    # A copy of an array: a camera may write its next image into the same memory.
    images = (np.array(as_array(inner)) if is_array(inner) else inner for inner in many)
    return chain.from_iterable(expand(image, True) for image in images)


def is_single(source: Any) -> bool:
    """Whether a source stands for exactly one image."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source).is_file() and not str(source).lower().endswith(sources.OF_SEVERAL)
    return _several(source) is None


def is_live(source: Any) -> bool:
    """Whether more images may still be in the making: a camera, or an iterable that does not know its length."""
    if isinstance(source, (str, os.PathLike)):
        return job.is_live(source)
    return not hasattr(source, "__len__") and _several(source) is not None


def is_array(item: Any) -> bool:
    """Whether something is an array of numpy, torch or another library."""
    if isinstance(item, (Item, Sample, str, os.PathLike, Image.Image)):
        return False
    if isinstance(item, memoryview):
        return item.ndim > 1
    return any(hasattr(item, name) for name in ("__array__", "__array_interface__", "__dlpack__"))


def as_array(item: Any) -> NDArray[Any]:
    """An array of any library as numpy's; an ImageError where it cannot be one."""
    try:
        if hasattr(item, "detach"):  # a tensor of torch, perhaps on a GPU or with a gradient
            item = item.detach().cpu()
            item = item.float() if "bfloat16" in str(item.dtype) else item  # a type that numpy lacks
        return np.asarray(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImageError(f"{type(item).__name__} is no array that numpy can read ({error})") from None


def from_bgr(item: Item) -> Item:
    """An array's first three channels in reverse, as OpenCV gives them; anything else as it is."""
    array = as_array(item.pixels) if is_array(item.pixels) else np.zeros(0)
    axis = next((a for a in (-1, 0) if array.ndim == 3 and array.shape[a] in (3, 4)), None)
    if axis is None:
        return item
    return replace(item, pixels=np.ascontiguousarray(array.take([2, 1, 0, 3][: array.shape[axis]], axis)))


def as_item(image: Any) -> Item:
    """A single image: a path, a `Sample`, an array, a PIL image, the bytes of an image file or an open one."""
    if isinstance(image, Item):
        return image
    if isinstance(image, Sample):
        return Item(image.name, str(image.image), record=image.record, pixels=image.pixels)
    if isinstance(image, (str, os.PathLike)):
        return Item(os.fsdecode(image), os.fsdecode(image))
    kind = f"<{type(image).__name__}>"
    if is_array(image) or isinstance(image, Image.Image):
        return Item(kind, pixels=image)
    name = getattr(image, "name", "")
    return Item(name if isinstance(name, str) and name else kind, data=_content(image))


def _several(source: Any) -> Iterable[Any] | None:
    """The parts of what holds several images, None for a single image; an ImageError where it holds none at all."""
    if hasattr(source, "columns"):  # a data frame of pandas or polars
        column = path_column(map(str, source.columns))
        if not column:
            raise ImageError(
                f"{type(source).__name__} without a column of paths (such as image or path); give the column that "
                "holds them: df['COLUMN']"
            )
        return list(source[column])
    if is_array(source):
        dimensions = source.ndim if hasattr(source, "ndim") else as_array(source).ndim
        names = dimensions == 1 and as_array(source).dtype.kind in "OUT"  # a column of paths
        return list(as_array(source) if names else source) if dimensions == 4 or names else None
    if isinstance(source, (Item, Sample, Image.Image, bytes, bytearray, memoryview)) or hasattr(source, "read"):
        return None
    if any(hasattr(type(source), name) for name in ("__iter__", "__getitem__")) and not isinstance(source, Mapping):
        return cast(Iterable[Any], source)
    hint = ", which cv2.imread returns for a file that it cannot read" if source is None else ""
    raise ImageError(f"{type(source).__name__}{hint}; accepted {_ACCEPTED}")


def _content(source: Any) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    try:
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)  # whoever has just written an image into it left it at its end
        body = source.read() if not isinstance(source, io.TextIOBase) else ""
    except (OSError, ValueError) as error:  # ValueError: it was closed
        raise ImageError(f"{type(source).__name__} cannot be read ({error})") from None
    if not isinstance(body, bytes):
        raise ImageError(
            f"{type(source).__name__} gives {type(body).__name__} instead of bytes; open files with 'rb'"
        )
    return body


# --------------------------------------------------------------------------------------------------------- tiles
# A model sees each tile of a large picture as an image of its own, and knows every place of the picture as a cluster
# of its own. A picture is as anomalous as its most anomalous tile. Its map is put together of theirs; where they
# overlap, the middle of a tile counts more than its rim. Next to each other they share a fifth of a side, so that a
# defect smaller than that is whole in one of them.


def reach(count: int) -> float:
    """A picture's side in sides of a tile, of which so many stand side by side."""
    return count - (count - 1) * OVERLAP


def boxes(rgb_HWC: NDArray[np.uint8], tiles: Tiles) -> list[tuple[slice, slice]]:
    """Rows and columns of the pixels of every tile of a picture, row by row."""
    down, right = (_spans(side, count) for side, count in zip(rgb_HWC.shape[:2], tiles, strict=True))
    return [(rows, columns) for rows in down for columns in right]


def _spans(side: int, count: int) -> list[slice]:
    length = side / reach(count)
    starts = [min(round(i * (1 - OVERLAP) * length), side - 1) for i in range(count)]
    return [slice(start, min(side, max(start + 1, round(start + length)))) for start in starts]


def cut(rgb_HWC: NDArray[np.uint8], size: int, tiles: Tiles) -> NDArray[np.uint8]:
    """A picture as the model sees it: S x S x 3, or T x S x S x 3 of several tiles."""
    if tiles == (1, 1):
        return resize_rgb(rgb_HWC, size)
    return np.stack([resize_rgb(rgb_HWC[box], size) for box in boxes(rgb_HWC, tiles)])


def speaker(score_T: Sequence[float], class_T: Sequence[str]) -> int:
    """The tile whose class and cluster are the picture's: the most anomalous of the class that most tiles show."""
    name = Counter(class_T).most_common(1)[0][0]
    return max((i for i, class_name in enumerate(class_T) if class_name == name), key=lambda i: score_T[i])


def joined(out: Mapping[str, NDArray[Any]], tiles: Tiles, classes: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Answers of B x T tiles as answers of B pictures, named as `Outputs`; ``classes`` are those of the clusters."""
    by_picture = {name: values.reshape(-1, tiles[0] * tiles[1], *values.shape[1:]) for name, values in out.items()}
    pairs = zip(by_picture["score_B"], by_picture["cluster_B"], strict=True)
    spoken = [speaker(score_T, [classes[int(k)] for k in cluster_T]) for score_T, cluster_T in pairs]
    answers = {name: values[np.arange(len(spoken)), spoken] for name, values in by_picture.items()}
    answers |= {name: by_picture[name].max(1) for name in _HIGHEST if name in by_picture}
    answers["map_B1HW"] = np.stack([blended(map_T1hw[:, 0], tiles)[None] for map_T1hw in by_picture["map_B1HW"]])
    return answers


def blended(map_Thw: NDArray[np.float32], tiles: Tiles) -> NDArray[np.float32]:
    """One map of those of the tiles, at their scale."""
    height, width = map_Thw.shape[1:]
    sides = round(height * reach(tiles[0])), round(width * reach(tiles[1]))
    weight_hw = np.minimum.outer(*(np.minimum(np.arange(n), np.arange(n)[::-1]) + 1.0 for n in (height, width)))
    total, weight = np.zeros(sides), np.zeros(sides)
    for place, map_hw in enumerate(map_Thw):
        row, column = divmod(place, tiles[1])
        top = min(round(row * (1 - OVERLAP) * height), sides[0] - height)
        left = min(round(column * (1 - OVERLAP) * width), sides[1] - width)
        total[top : top + height, left : left + width] += weight_hw * map_hw
        weight[top : top + height, left : left + width] += weight_hw
    return np.asarray(total / weight, dtype=np.float32)
