"""Training images as teacher answers and shrunk pixels: from the cache, or computed when it is off."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinspect.data.images import resize_rgb
from twinspect.data.samples import read_sample_rgb
from twinspect.errors import DataError
from twinspect.files import cache_home, why_unwritable
from twinspect.inference.tiles import Tiles, boxes
from twinspect.models.contract import AnomalyModel, Observed
from twinspect.training.cache import FeatureCache, KnownFiles, image_key, pack, unpack
from twinspect.training.copies import Copy
from twinspect.types import Progress, Sample, Skipped

T = TypeVar("T")
R = TypeVar("R")

_GPU_BATCH = 32
_TEACHER_BATCH = 4  # larger batches leave the CPU's cache and are slower per image
_BATCH = 8  # images that are looked at together where a batch means nothing
_AHEAD = 31  # images that are decoded, or being decoded, before the teacher has asked for them
_WAITING = 3  # portions, of one call of the teacher each, that may wait for the disk


class FeatureSource:
    """Batches of (teacher answer, normalised shrunk pixels) for a fixed list of samples, on the model's device.

    With a cache every image is decoded and shown to the teacher once in the life of the cache; without one,
    both happen at every visit. Images that cannot be read are left out and listed in ``skipped``. Files that are
    known from ``notes`` (see `KnownFiles`) are not read again only to learn that they have not changed.
    """

    def __init__(
        self,
        model: AnomalyModel,
        samples: Sequence[Sample],
        cache_root: Path | None,
        progress: Progress,
        notes: Path | None = None,
    ) -> None:
        self._model, self._known = model, KnownFiles(notes) if notes is not None else None
        self._picture: tuple[Sample, NDArray[np.uint8]] | None = None
        self._reading = threading.Lock()
        self.skipped: list[Skipped] = []
        self.samples: list[Sample] = []
        self.keys: list[bytes] = []
        self._cache = FeatureCache(cache_root, space_of(model)) if cache_root is not None else None
        for _ in _in_order(self._store, self._missing(samples, progress), workers=1, ahead=_WAITING):
            pass
        self._picture = None
        if self._known is not None:
            self._known.save()

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> tuple[Observed, Tensor]:
        """The teacher's answer and the Encoder-Encoder's input of some samples."""
        return self._finish(self._prepare(indices))

    def ahead(self, parts: Iterable[Sequence[int]]) -> Iterator[tuple[Observed, Tensor]]:
        """Batches in order, each read and decoded while the one before it is worked on."""
        for prepared in _in_order(self._prepare, parts, workers=1, ahead=1):
            yield self._finish(prepared)

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[Observed, Tensor]]:
        """All samples of a list once, in order."""
        return self.ahead(indices[i : i + _BATCH] for i in range(0, len(indices), _BATCH))

    def vectors(self, indices: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """The teacher's raw tokens (n x E, a view each) and embeddings (n x F), on the model's device."""
        if self._cache is None:
            seen = [(observed.embedding_BF, *observed.tokens) for observed, _ in self.batches(indices)]
            embedding_nF, *tokens = (torch.cat(column) for column in zip(*seen, strict=True))
        else:
            parts = self._cache.read([self.keys[i] for i in indices], vectors=True)
            embedding_nF, *tokens = (parts[name].to(self._model.device) for name in sorted(parts))
        return tuple(tokens), embedding_nF

    def _prepare(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What disk and decoder have to give for a batch; on another thread."""
        if self._cache is not None:
            parts = self._cache.read([self.keys[i] for i in indices])
        else:
            squares = [read_square(self.samples[i], self._model.size, self._read) for i in indices]
            parts = {"squares": torch.from_numpy(np.stack(squares))}
        pinned = self._model.device.type == "cuda"
        return {name: part.pin_memory() for name, part in parts.items()} if pinned else parts

    def _finish(self, prepared: dict[str, Tensor]) -> tuple[Observed, Tensor]:
        """The rest of a batch. A GPU is sent half the bytes, and widens them itself."""
        parts = {name: part.to(self._model.device, non_blocking=True) for name, part in prepared.items()}
        observed, small = unpack(parts) if self._cache is not None else observe(self._model, parts["squares"])
        return observed, self._model.teacher.normalise(small)

    def _missing(
        self, samples: Sequence[Sample], progress: Progress
    ) -> Iterator[tuple[list[bytes], dict[str, Tensor]]]:
        """Try to read every image; what the teacher answers to those that the cache lacks, in portions."""
        waiting: dict[bytes, NDArray[np.uint8]] = {}
        stage = "teacher features" if self._cache is not None else "reading images"
        decoded = _in_order(self._decode, samples, workers=min(4, os.cpu_count() or 1), ahead=_AHEAD)
        for done, (sample, (key, pixels)) in enumerate(zip(samples, decoded, strict=True), 1):
            progress(stage, done, len(samples))
            if isinstance(key, Skipped):
                self.skipped.append(key)
            else:
                self.samples.append(sample)
                self.keys.append(key)
                if pixels is not None and self._cache is not None and key not in self._cache:
                    waiting[key] = pixels
            if len(waiting) == teacher_batch(self._model) or (waiting and done == len(samples)):
                yield list(waiting), pack(*observe(self._model, torch.from_numpy(np.stack([*waiting.values()]))))
                waiting = {}

    def _store(self, portion: tuple[list[bytes], dict[str, Tensor]]) -> None:
        if self._cache is not None:
            self._cache.write(*portion)

    def _decode(self, sample: Sample) -> tuple[bytes | Skipped, NDArray[np.uint8] | None]:
        """The key of a sample, or why it cannot be read; and its pixels where they are still needed."""
        try:
            if not sample.in_file or isinstance(sample, (Copy, Tile)):
                pixels = read_square(sample, self._model.size, self._read)
                return image_key(pixels), pixels
            key = self._known.find(sample.image) if self._known is not None else None
            if key is not None and (self._cache is None or key in self._cache):
                return key, None
            before = sample.image.stat()
            key = image_key(sample.image.read_bytes())
            there = self._cache is not None and key in self._cache
            square = None if there else read_square(sample, self._model.size)
            if self._known is not None:
                self._known.note(sample.image, before, key)
            return key, square
        except (DataError, OSError) as error:
            return Skipped(sample.image, str(error)), None

    def _read(self, sample: Sample, side: int) -> NDArray[np.uint8]:
        """A picture whose tiles are wanted one after the other: decoded once."""
        with self._reading:
            if self._picture is None or self._picture[0] != sample:
                self._picture = (sample, read_picture(sample, side))
            return self._picture[1]


def space_of(model: AnomalyModel) -> str:
    """What the teacher's answers depend on besides the image."""
    teacher, selection = model.teacher, model.selection
    space = f"v6|{teacher.info.arch}|{teacher.hash()}|{model.size}|{selection.shrinks}|{selection.levels}"
    if model.roi_SS is not None:
        space += f"|{hashlib.sha256(model.roi_SS.cpu().numpy().tobytes()).hexdigest()}"
    return f"{space}|{model.pixel_side}"


def _in_order(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int) -> Iterator[R]:
    """What a function gives for items, in their order; threads work on so many items ahead."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def features_folder() -> Path:
    """Where features, and what is known of files, are kept."""
    return cache_home() / "features"


def cache_folder(model: AnomalyModel, images: int, limit_gb: float) -> Path | None:
    """Where features are cached; None when they need more than ``limit_gb``, or the folder cannot be written."""
    folder = features_folder()
    return None if record_bytes(model) * images > limit_gb * 1e9 or why_unwritable(folder) else folder


def record_bytes(model: AnomalyModel) -> int:
    """Bytes that are kept of an image for a model, a few hundred of file header aside."""
    selection, info = model.selection, model.teacher.info
    maps = zip(
        [*selection.channels, *selection.coarse_channels],
        [*selection.map_sides, *selection.coarse_sides],
        strict=True,
    )
    halves = sum(channels * side * side for channels, side in maps) + math.prod(selection.prefix_shape)
    floats = len(selection.shrinks) * sum(info.token_channels) + info.embedding_channels
    return 2 * halves + 4 * floats + 3 * model.pixel_side**2


@dataclass(frozen=True, slots=True)
class Tile(Sample):
    """A part of a picture; its class is the picture's with the tile's place.

    Attributes:
        of: the picture.
        place: number of the tile, row by row.
        tiles: rows and columns.
    """

    of: Sample | None = None
    place: int = 0
    tiles: Tiles = (1, 1)


def in_tiles(samples: Sequence[Sample], tiles: Tiles) -> list[Sample]:
    """All tiles of all pictures; the pictures themselves where each is one tile."""
    if tiles == (1, 1):
        return list(samples)
    return [
        Tile(
            sample.image, sample.split, f"{sample.class_name} @{place // tiles[1]},{place % tiles[1]}", sample.label,
            group=sample.group, record=sample.record, pixels=sample.pixels, of=sample, place=place, tiles=tiles,
        )
        for sample in samples
        for place in range(tiles[0] * tiles[1])
    ]  # fmt: skip


def picture_of(sample: Sample) -> Sample:
    """The picture that a tile is of; any other sample itself."""
    return sample.of if isinstance(sample, Tile) and sample.of is not None else sample


def read_picture(sample: Sample, side: int) -> NDArray[np.uint8]:
    """A whole picture, altered where it is such a copy; a draft of ``side`` pixels at least may do."""
    if isinstance(sample, Copy) and sample.tolerated:
        return sample.changed(read_sample_rgb(sample))
    return read_sample_rgb(sample, draft_side=side)


def read_square(
    sample: Sample, size: int, read: Callable[[Sample, int], NDArray[np.uint8]] = read_picture
) -> NDArray[np.uint8]:
    """One sample's RGB at the model's size: size x size x 3; ``read`` gives the whole pictures that tiles are of."""
    picture = picture_of(sample)
    if isinstance(sample, Tile):
        whole = read(picture, size * max(sample.tiles))
        rows, columns = boxes(whole, sample.tiles)[sample.place]
        pixels = resize_rgb(whole[rows, columns], size)
    else:
        pixels = resize_rgb(read_picture(sample, size), size)
    return picture.changed(pixels) if isinstance(picture, Copy) and not picture.tolerated else pixels


def same_image(samples: Sequence[Sample]) -> list[int]:
    """For every image the place of the first one that it is a tile or a copy of, or its own.

    Copies of images that hardly vary stand for images of their own.
    """
    first: dict[tuple[object, ...], int] = {}
    firsts = []
    for place, sample in enumerate(samples):
        picture = picture_of(sample)
        apart = (picture,) if isinstance(picture, Copy) and not picture.tolerated else ()
        firsts.append(first.setdefault((sample.image, sample.record, *apart), place))
    return firsts


def teacher_batch(model: AnomalyModel) -> int:
    """Images that the teacher is shown together when a cache is filled."""
    return _TEACHER_BATCH if model.device.type == "cpu" else _GPU_BATCH


@torch.no_grad()  # not inference_mode: without a cache these tensors go straight into the students' graph
def observe(model: AnomalyModel, pixels_BHWC: Tensor) -> tuple[Observed, Tensor]:
    """The teacher's answer to uint8 pixels, and the pixels shrunk for the Encoder-Encoder (uint8)."""
    image = model.inside(pixels_BHWC.to(model.device, non_blocking=True).permute(0, 3, 1, 2))
    observed = model.observe(model.teacher.normalise(image).contiguous(memory_format=torch.channels_last))
    small = model.shrink(image.float()).round().to(torch.uint8)
    return observed, small
