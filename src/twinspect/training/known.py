"""Files that were read before: their content's address by what the file system says of them.

Hashing a data set means reading all of it, minutes for tens of thousands of images at every start. A file whose path,
size, inode and times of change are those of a file read before has that file's content; git goes by the same. A file
touched within the last seconds may change again within one tick of its clock, so it is not noted yet.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
import uuid
import zlib
from pathlib import Path

_ENTRY = struct.Struct("<16s16sI")  # file as the file system describes it, address of its content, crc32 of the two
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use ticks every two seconds


class KnownFiles:
    """Addresses of files that could be read and decoded. Only a help: what cannot be kept is read again.

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
        lines = [_ENTRY.pack(one, key, zlib.crc32(one + key)) for one, key in self._new]
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
        for one, key, crc in _ENTRY.iter_unpack(raw[: len(raw) // _ENTRY.size * _ENTRY.size]):
            if zlib.crc32(one + key) == crc:
                self._keys[one] = key


def _described(path: Path, status: os.stat_result) -> bytes:
    facts = f"{os.path.abspath(path)}|{status.st_size}|{status.st_ino}|{status.st_mtime_ns}|{status.st_ctime_ns}"
    return hashlib.sha256(facts.encode(errors="surrogatepass")).digest()[:16]
