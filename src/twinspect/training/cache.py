"""Teacher answers on disk: the teacher is frozen and nothing is augmented, so they are computed once.

Content-addressed and append-only: a record belongs to (teacher weights, input size, image bytes), so runs,
students and calibration share it, and an image that changes simply has another address. Every process
appends to a segment of its own (``*.data`` and ``*.index``), so no locks are needed; an index line is
written after its record is flushed, so a crash leaves at most a record nobody refers to. A thread writes while the
teacher looks at the next images.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import time
import uuid
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinspect.errors import DataError
from twinspect.models.layers import in_fp16
from twinspect.models.observed import Observed

_ENTRY = struct.Struct("<16sQI")  # image key, offset of the record, crc32 of the two
_WAITING = 3  # portions, of one call of the teacher each, that may wait for the disk
_NOTE = struct.Struct("<16s16sI")  # file as the file system describes it, address of its content, crc32 of the two
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use ticks every two seconds


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Byte layout of one image's record: maps and prefix tokens in fp16, tokens and embedding in fp32, shrunk pixels
    in uint8.
    """

    map_shapes: tuple[tuple[int, int, int], ...]
    coarse_shapes: tuple[tuple[int, int, int], ...]
    prefix_shape: tuple[int, int, int]
    token_dims: tuple[int, ...]
    embedding_dims: int
    small_side: int

    @property
    def _parts(self) -> list[tuple[slice, tuple[int, ...], torch.dtype]]:
        """Bytes, shape and type of every part of a record, in order."""
        halves = [(shape, torch.float16) for shape in (*self.map_shapes, *self.coarse_shapes, self.prefix_shape)]
        vectors = [((dims,), torch.float32) for dims in (*self.token_dims, self.embedding_dims)]
        parts, start = list[tuple[slice, tuple[int, ...], torch.dtype]](), 0
        for shape, dtype in (*halves, *vectors, ((3, self.small_side, self.small_side), torch.uint8)):
            stop = start + dtype.itemsize * math.prod(shape)
            parts.append((slice(start, stop), shape, dtype))
            start = stop
        return parts

    @property
    def size(self) -> int:
        """Bytes of one record."""
        return sum(dtype.itemsize * math.prod(shape) for _, shape, dtype in self._parts)

    @property
    def vectors(self) -> tuple[int, int]:
        """First and last byte (exclusive) of a record's tokens and embedding."""
        places = [place for place, _, dtype in self._parts if dtype == torch.float32]
        return places[0].start, places[-1].stop

    def pack(self, observed: Observed, small_B3ss: Tensor) -> Tensor:
        """The teacher's answers and the shrunk pixels of a batch to its records: uint8, B x size, on the CPU."""
        block_BR = torch.empty(len(small_B3ss), self.size, dtype=torch.uint8)
        features = [in_fp16(value) for value in (*observed.maps, *observed.coarse, observed.prefix_BMPD)]
        vectors = [value.float() for value in (*observed.tokens, observed.embedding_BF)]
        values = (*features, *vectors, small_B3ss.to(torch.uint8))
        for value, (place, shape, _) in zip(values, self._parts, strict=True):
            if value.shape[1:] != shape:
                raise ValueError(f"a part of shape {tuple(value.shape[1:])}, expected {shape}")
            block_BR[:, place] = value.cpu().contiguous().flatten(1).view(torch.uint8)
        return block_BR

    def unpack(self, block_BR: Tensor) -> tuple[Observed, Tensor]:
        """Records of a batch (uint8, B x size) to (teacher's answer in fp32, shrunk uint8 pixels B x 3 x s x s).

        On the block's device: a GPU is sent half the bytes and widens them itself.
        """
        batch = len(block_BR)
        *values, small = (_typed(block_BR[:, at], kind).reshape(batch, *shape) for at, shape, kind in self._parts)
        maps, coarse = len(self.map_shapes), len(self.map_shapes) + len(self.coarse_shapes)
        features = tuple(value.float() for value in values[: coarse + 1])
        tokens, embedding_BF = self.unpack_vectors(block_BR[:, slice(*self.vectors)])
        return Observed(features[:maps], features[maps:coarse], tokens, embedding_BF, features[coarse]), small

    def unpack_vectors(self, block_BR: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Bytes ``vectors`` of the records of a batch to (tokens of every view B x E, embeddings B x F)."""
        parts = torch.split(_typed(block_BR, torch.float32), [*self.token_dims, self.embedding_dims], 1)
        *tokens, embedding_BF = (vector.clone() for vector in parts)
        return tuple(tokens), embedding_BF


class FeatureCache:
    """Records of one teacher at one size; reads all segments, appends to its own.

    Args:
        root: cache folder.
        space: what the records depend on besides the image (teacher hash, size, layout version).
        layout: byte layout of a record.

    Raises:
        DataError: the folder cannot be made or read.
    """

    def __init__(self, root: Path, space: str, layout: RecordLayout) -> None:
        self.layout = layout
        self.folder = root / hashlib.sha256(f"{space}|{layout}".encode()).hexdigest()[:24]
        self._place: dict[bytes, tuple[int, int]] = {}
        self._segments: list[Path] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for index in sorted(self.folder.glob("*.index")):
                self._read_segment(index)
        except OSError as error:
            raise self._unusable(error) from None
        self._own = self._new_segment()
        self._writing: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="twinspect-cache")

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def add(self, keys: Sequence[bytes], block_BR: Tensor) -> None:
        """Keep the records of some images (see `RecordLayout.pack`); they become readable after `flush`.

        Waits while more than a few portions are still to be written, so that memory stays bounded.

        Raises:
            DataError: the disk is full or the folder cannot be written, now or for records given before.
        """
        if block_BR.shape[1] != self.layout.size:
            raise ValueError(f"records of {block_BR.shape[1]} bytes, expected {self.layout.size}")
        self._writing.append(self._thread.submit(self._write, list(keys), block_BR))
        self._wait(_WAITING)

    def flush(self) -> None:
        """Wait until all is written, and make it readable.

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
        self._wait(0)
        index = self._own.with_suffix(".index")
        if index.exists():
            self._read_segment(index)
            self._own = self._new_segment()

    def _new_segment(self) -> Path:
        return self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"

    def _wait(self, most: int) -> None:
        """Wait until at most ``most`` portions are being written."""
        while len(self._writing) > most:
            try:
                self._writing.popleft().result()
            except OSError as error:
                while self._writing:
                    self._writing.popleft().cancel()
                raise self._unusable(error) from None

    def read(self, keys: Sequence[bytes], pinned: bool = False, span: tuple[int, int] | None = None) -> Tensor:
        """Records of a batch of images, for `RecordLayout.unpack`: uint8, B x size, in pinned memory if asked.

        With ``span`` only these bytes of every record, first and last (exclusive).

        Read, not mapped: pages of a mapped file count as the process's memory until the kernel wants them back, and
        every four kilobytes of them cost a fault. The files stay in the kernel's own cache either way.

        Raises:
            DataError: a file cannot be read any more.
        """
        start, stop = span or (0, self.layout.size)
        block = torch.empty(len(keys), stop - start, dtype=torch.uint8, pin_memory=pinned)
        files: dict[int, io.FileIO] = {}
        try:
            with ExitStack() as opened:
                for key, row in zip(keys, block.numpy(), strict=True):
                    segment, offset = self._place[key]
                    if segment not in files:
                        files[segment] = opened.enter_context(io.FileIO(self._segments[segment]))
                    files[segment].seek(offset + start)
                    if files[segment].readinto(row) != stop - start:
                        raise OSError(f"{self._segments[segment].name} has become shorter")
        except OSError as error:
            raise self._unusable(error) from None
        return block

    def _write(self, keys: list[bytes], block_BR: Tensor) -> None:
        """Append records, and the index of them once they are on the disk; on the one thread, so in order."""
        with self._own.with_suffix(".data").open("ab", buffering=0) as data:
            offset = data.tell()
            _write_all(data, block_BR.contiguous().numpy().data.cast("B"))
            os.fsync(data.fileno())
        lines = []
        for number, key in enumerate(keys):
            place = offset + number * self.layout.size
            lines.append(_ENTRY.pack(key, place, zlib.crc32(struct.pack("<16sQ", key, place))))
        with self._own.with_suffix(".index").open("ab") as index:
            index.write(b"".join(lines))

    def _unusable(self, error: OSError) -> DataError:
        return DataError(
            f"the feature cache in {self.folder} cannot be written or read ({error.strerror or error}); free some "
            "disk, set another folder with TWINSPECT_HOME, or turn it off with --cache-gb 0"
        )

    def _read_segment(self, index: Path) -> None:
        data = index.with_suffix(".data")
        raw = index.read_bytes()
        size = data.stat().st_size if data.is_file() else 0
        number = len(self._segments)
        holds_some = False
        for start in range(0, len(raw) - _ENTRY.size + 1, _ENTRY.size):
            key, offset, crc = _ENTRY.unpack_from(raw, start)
            whole = zlib.crc32(raw[start : start + 24]) == crc and offset + self.layout.size <= size
            if whole and key not in self._place:
                self._place[key] = (number, offset)
                holds_some = True
        if holds_some:
            self._segments.append(data)


def _write_all(file: io.FileIO, rest: memoryview) -> None:
    """Write all of a buffer; an unbuffered file may take less at a time."""
    while rest:
        rest = rest[file.write(rest) :]


def _typed(part_BR: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes of a part of every record as numbers: in place where records lie so, else copied."""
    if not part_BR.shape[1]:  # torch sees no numbers of two bytes in none at all
        return part_BR.new_empty(len(part_BR), 0, dtype=dtype)
    if part_BR.stride(0) % dtype.itemsize or part_BR.storage_offset() % dtype.itemsize:
        part_BR = part_BR.clone(memory_format=torch.contiguous_format)
    return part_BR.view(dtype)


def image_key(raw: bytes | NDArray[np.uint8]) -> bytes:
    """Address of an image: the first 16 bytes of the sha256 of its file (or pixels)."""
    return hashlib.sha256(raw if isinstance(raw, bytes) else raw.tobytes()).digest()[:16]


# -------------------------------------------------------------------------------------------------- files read before


class KnownFiles:
    """Addresses of files that could be read and decoded, so that a data set is not read again only to hash it.

    A file whose path, size, inode and times of change are those of a file read before has that file's content; git
    goes by the same. A file touched within the last seconds may change again within one tick of its clock, so it is
    not noted yet. Only a help: what cannot be kept is read again.

    Args:
        folder: of the notes; every process appends to a file of its own, damaged entries are left out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: dict[bytes, bytes] = {}
        self._new: list[tuple[bytes, bytes]] = []
        for path in sorted(folder.glob("*.known")):
            self._load(path)

    def find(self, path: Path) -> bytes | None:
        """Address of a file's content if it has not changed since it was noted."""
        try:
            return self._keys.get(_described(path, path.stat()))
        except OSError:
            return None

    def note(self, path: Path, before: os.stat_result, key: bytes) -> None:
        """Remember a file that was read and decoded; ``before`` is its state when reading began."""
        newest = max(before.st_mtime_ns, before.st_ctime_ns)
        if time.time_ns() - newest > _SETTLED_NS:
            described = _described(path, before)
            self._keys[described] = key
            self._new.append((described, key))

    def save(self) -> None:
        """Write what was noted; a full disk costs the next start some time, and nothing else."""
        if not self._new:
            return
        lines = [_NOTE.pack(file, key, zlib.crc32(file + key)) for file, key in self._new]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.known").open("wb") as file:
                file.write(b"".join(lines))
        except OSError:
            return
        self._new = []

    def _load(self, path: Path) -> None:
        try:
            raw = path.read_bytes()
        except OSError:
            return
        for file, key, crc in _NOTE.iter_unpack(raw[: len(raw) // _NOTE.size * _NOTE.size]):
            if zlib.crc32(file + key) == crc:
                self._keys[file] = key


def _described(path: Path, status: os.stat_result) -> bytes:
    facts = f"{os.path.abspath(path)}|{status.st_size}|{status.st_ino}|{status.st_mtime_ns}|{status.st_ctime_ns}"
    return hashlib.sha256(facts.encode(errors="surrogatepass")).digest()[:16]
