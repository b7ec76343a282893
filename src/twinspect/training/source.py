"""Training images as teacher answers and shrunk pixels: from the cache, or computed when it is off.

The teacher is frozen and nothing is augmented, so its answers are computed once. An answer belongs to (teacher
weights, input size, image bytes): runs, students and calibration share it, and an image that changes has another
address. Every image has a safetensors file of its own, which appears whole or not at all. So no lock and no index is
needed, whatever processes write at the same time or are killed.
"""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from twinspect.data.images import file_bytes, read_rgb, resize_rgb
from twinspect.errors import DataError
from twinspect.files import cache_home, why_unwritable
from twinspect.models.contract import AnomalyModel, Observed
from twinspect.models.layers import in_fp16
from twinspect.training.derived import Copy, Tile, read_picture, read_square
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
    both happen at every visit. Images that cannot be read are left out and listed in ``skipped``.
    """

    def __init__(
        self, model: AnomalyModel, samples: Sequence[Sample], cache_root: Path | None, progress: Progress
    ) -> None:
        self._model = model
        self._picture: tuple[Sample, NDArray[np.uint8]] | None = None
        self._reading = threading.Lock()
        self.skipped: list[Skipped] = []
        self.samples: list[Sample] = []
        self.keys: list[bytes] = []
        self._cache = FeatureCache(cache_root, space_of(model)) if cache_root is not None else None
        for _ in _in_order(self._store, self._missing(samples, progress), workers=1, ahead=_WAITING):
            pass
        self._picture = None

    def __len__(self) -> int:
        return len(self.samples)

    def ahead(self, parts: Iterable[Sequence[int]]) -> Iterator[tuple[Observed, Tensor]]:
        """The teacher's answers and the shrunk pixels of batches, each read while the one before it is worked on."""
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
                if pixels is not None and self._cache is not None:
                    waiting[key] = pixels
            if len(waiting) == teacher_batch(self._model) or (waiting and done == len(samples)):
                yield list(waiting), pack(*observe(self._model, torch.from_numpy(np.stack([*waiting.values()]))))
                waiting = {}

    def _store(self, portion: tuple[list[bytes], dict[str, Tensor]]) -> None:
        if self._cache is not None:
            self._cache.write(*portion)

    def _decode(self, sample: Sample) -> tuple[bytes | Skipped, NDArray[np.uint8] | None]:
        """The key of a sample, or why it cannot be read; and its pixels where the cache lacks its answer."""
        try:
            size, of_file = self._model.size, sample.in_file and not isinstance(sample, (Copy, Tile))
            content = file_bytes(sample.image) if of_file else read_square(sample, size, self._read)
            key = image_key(content)
            if self._cache is not None and key in self._cache:
                return key, None
            if isinstance(content, bytes):
                content = resize_rgb(read_rgb(content, name=str(sample.image), draft_side=size), size)
            return key, content
        except (DataError, OSError) as error:
            return Skipped(sample.image, str(error).removeprefix(f"{sample.image}: ")), None

    def _read(self, sample: Sample, side: int) -> NDArray[np.uint8]:
        """A picture whose tiles are wanted one after the other: decoded once."""
        with self._reading:
            if self._picture is None or self._picture[0] != sample:
                self._picture = (sample, read_picture(sample, side))
            return self._picture[1]


@torch.no_grad()  # not inference_mode: without a cache these tensors go straight into the students' graph
def observe(model: AnomalyModel, pixels_BHWC: Tensor) -> tuple[Observed, Tensor]:
    """The teacher's answer to uint8 pixels, and the pixels shrunk for the Encoder-Encoder (uint8)."""
    image = model.inside(pixels_BHWC.to(model.device, non_blocking=True).permute(0, 3, 1, 2))
    observed = model.observe(model.teacher.normalise(image).contiguous(memory_format=torch.channels_last))
    small = model.shrink(image.float()).round().to(torch.uint8)
    return observed, small


def teacher_batch(model: AnomalyModel) -> int:
    """Images that the teacher is shown together when a cache is filled."""
    return _TEACHER_BATCH if model.device.type == "cpu" else _GPU_BATCH


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


# --------------------------------------------------------------------------------------------------------- the cache


def image_key(raw: bytes | NDArray[np.uint8]) -> bytes:
    """Address of an image: the first 16 bytes of the sha256 of its file (or pixels)."""
    return hashlib.sha256(raw if isinstance(raw, bytes) else raw.tobytes()).digest()[:16]


def space_of(model: AnomalyModel) -> str:
    """What the teacher's answers depend on besides the image."""
    teacher, selection = model.teacher, model.selection
    space = f"v6|{teacher.info.arch}|{teacher.hash()}|{model.size}|{selection.shrinks}|{selection.levels}"
    if model.roi_SS is not None:
        space += f"|{hashlib.sha256(model.roi_SS.cpu().numpy().tobytes()).hexdigest()}"
    return f"{space}|{model.pixel_side}"


def features_folder() -> Path:
    """Where features are cached."""
    return cache_home() / "features"


def cache_folder(model: AnomalyModel, images: int, limit_gb: float) -> Path | None:
    """Where features are cached; None when they need more than ``limit_gb``, or the folder cannot be written."""
    folder = features_folder()
    if not limit_gb or why_unwritable(folder):
        return None
    blank = torch.zeros(1, model.size, model.size, 3, dtype=torch.uint8)
    each = sum(part.nbytes for part in pack(*observe(model, blank)).values())
    return folder if each * images <= limit_gb * 1e9 else None


def pack(observed: Observed, small_B3ss: Tensor) -> dict[str, Tensor]:
    """What is kept of a batch: features in fp16, tokens and the embedding in fp32, shrunk pixels in uint8."""
    parts = {"prefix": in_fp16(observed.prefix_BMPD), "embedding": observed.embedding_BF.float()}
    for kind, maps in (("coarse", observed.coarse), ("map", observed.maps)):
        parts |= {f"{kind}.{i:02d}": in_fp16(map_BDhw) for i, map_BDhw in enumerate(maps)}
    parts |= {f"token.{view}": token_BE.float() for view, token_BE in enumerate(observed.tokens)}
    return {name: part.cpu().contiguous() for name, part in (parts | {"pixels": small_B3ss}).items()}


def unpack(parts: dict[str, Tensor]) -> tuple[Observed, Tensor]:
    """The teacher's answer in fp32 and the shrunk pixels, on the device of the parts."""
    maps, coarse, tokens = (
        tuple(parts[name].float() for name in sorted(parts) if name.startswith(kind))
        for kind in ("map.", "coarse.", "token.")
    )
    return Observed(maps, coarse, tokens, parts["embedding"], parts["prefix"].float()), parts["pixels"]


class FeatureCache:
    """Answers of one teacher at one size, a file an image; `space_of` says what else they depend on.

    What cannot be written or read (a full disk, a file that is gone or damaged) raises a DataError.
    """

    def __init__(self, root: Path, space: str) -> None:
        self.folder = root / hashlib.sha256(space.encode()).hexdigest()[:24]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def __contains__(self, key: bytes) -> bool:
        """Whether the answer for an image is there and whole."""
        try:
            with safe_open(self._file(key), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def write(self, keys: Sequence[bytes], parts: dict[str, Tensor]) -> None:
        """Keep the answers for some images (see `pack`)."""
        try:
            for row, key in enumerate(keys):
                draft = self.folder / f"{uuid.uuid4().hex}.new"
                draft.write_bytes(save({name: part[row].clone() for name, part in parts.items()}))
                os.replace(draft, self._file(key))
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise self._unusable(error) from None

    def read(self, keys: Sequence[bytes], vectors: bool = False) -> dict[str, Tensor]:
        """Answers for a batch of images, for `unpack`; with ``vectors`` only tokens and the embedding."""
        rows = []
        try:
            for key in keys:
                with safe_open(self._file(key), "pt") as file:
                    names = [name for name in file.keys() if not vectors or name.startswith(("token.", "embedding"))]
                    rows.append({name: file.get_tensor(name) for name in names})
        except (OSError, SafetensorError) as error:
            raise self._unusable(error) from None
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _file(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}.safetensors"

    def _unusable(self, error: Exception) -> DataError:
        why = getattr(error, "strerror", "") or error
        return DataError(
            f"the feature cache in {self.folder} cannot be written or read ({why}); free some disk, set another "
            "folder with TWINSPECT_HOME, or turn it off with --cache-gb 0"
        )
