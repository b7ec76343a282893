"""Teacher answers on disk: the teacher is frozen and nothing is augmented, so they are computed once.

An answer belongs to (teacher weights, input size, image bytes), so runs, students and calibration share it, and an
image that changes has another address. Every image has a safetensors file of its own, which appears whole or not at
all: no lock and no index is needed, whatever processes write at the same time or are killed.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from twinspect.errors import DataError, OutputError
from twinspect.files import replacing
from twinspect.models.contract import Observed
from twinspect.models.layers import in_fp16

_NOTE = struct.Struct("<16s16s")  # a file as the file system describes it, and the address of its content
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use ticks every two seconds


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
    """Answers of one teacher at one size.

    Args:
        root: cache folder.
        space: what answers depend on besides the image (teacher's hash, size, version of the layout).

    Raises:
        DataError: the folder cannot be made.
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
        """Keep the answers for some images (see `pack`).

        Raises:
            DataError: the disk is full or the folder cannot be written.
        """
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
        """Answers for a batch of images, for `unpack`; with ``vectors`` only tokens and the embedding.

        Raises:
            DataError: a file is gone or damaged.
        """
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


def image_key(raw: bytes | NDArray[np.uint8]) -> bytes:
    """Address of an image: the first 16 bytes of the sha256 of its file (or pixels)."""
    return hashlib.sha256(raw if isinstance(raw, bytes) else raw.tobytes()).digest()[:16]


class KnownFiles:
    """Addresses of files that could be read and decoded, so that a data set is not read again only to hash it.

    A file whose path, size, inode and times of change are those of a file read before has that file's content; git
    goes by the same. A file touched within the last seconds may change again within one tick of its clock, so it is
    not noted yet. Only a help: what cannot be kept, or another process overwrites, is read again.

    Args:
        folder: of the notes.
    """

    def __init__(self, folder: Path) -> None:
        self._notes = folder / "known"
        self._new: dict[bytes, bytes] = {}
        self._keys = self._noted()

    def find(self, path: Path) -> bytes | None:
        """Address of a file's content if it has not changed since it was noted."""
        try:
            return self._keys.get(_described(path, path.stat()))
        except OSError:
            return None

    def note(self, path: Path, before: os.stat_result, key: bytes) -> None:
        """Remember a file that was read and decoded; ``before`` is its state when reading began."""
        if time.time_ns() - max(before.st_mtime_ns, before.st_ctime_ns) > _SETTLED_NS:
            self._keys[_described(path, before)] = self._new[_described(path, before)] = key

    def save(self) -> None:
        """Write what was noted; a full disk costs the next start some time, and nothing else."""
        if self._new:
            with suppress(OutputError), replacing(self._notes) as file:
                file.write(b"".join(_NOTE.pack(*pair) for pair in (self._noted() | self._new).items()))

    def _noted(self) -> dict[bytes, bytes]:
        try:
            raw = self._notes.read_bytes()
        except OSError:
            return {}
        return dict(_NOTE.iter_unpack(raw[: len(raw) // _NOTE.size * _NOTE.size]))


def _described(path: Path, status: os.stat_result) -> bytes:
    facts = f"{os.path.abspath(path)}|{status.st_size}|{status.st_ino}|{status.st_mtime_ns}|{status.st_ctime_ns}"
    return hashlib.sha256(facts.encode(errors="surrogatepass")).digest()[:16]
