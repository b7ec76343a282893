"""One file that holds a trained model: safetensors and JSON in a zip, each with its sha256. Never pickle.

Self-contained by default (teacher included, so prediction needs no network and no package of weights);
a thin bundle names its teacher and the hash of its weights instead, and refuses any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twinspect import files
from twinspect._version import __version__
from twinspect.errors import NONSENSE, BundleError
from twinspect.files import replacing

FORMAT = 8  # raised when the statistics of a model, or what is made of them, change: 8 has one level of clusters
SUFFIX = ".twin"
_META, _TENSORS, _MEMORY, _HASHES = "bundle.json", "model.safetensors", "memory.safetensors", "sha256.json"
_SIGNATURE = "signature.txt"
# What zip and json raise on files that are cut off, changed, encrypted, or something else altogether.
_NOT_WHOLE = (*NONSENSE, zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError)
_MOST_UNPACKED = 50  # times as many bytes as packed: weights do not shrink like that


@dataclass(frozen=True, slots=True)
class BundleContent:
    """What a bundle holds.

    Attributes:
        meta: plain JSON values.
        tensors: named tensors, as safetensors bytes.
        memory: the same, of what is kept of good images; empty where nothing is.
        hashes: sha256 of every part, which are what a signature signs.
        signature: empty without one.
    """

    meta: dict[str, Any]
    tensors: bytes
    memory: bytes = b""
    hashes: dict[str, str] = field(default_factory=dict, compare=False)
    signature: str = field(default="", compare=False)


def write_bundle(path: Path, meta: Mapping[str, Any], tensors: bytes, memory: bytes = b"") -> None:
    """Write a bundle atomically: a crash or a full disk leaves no half-written file under the name.

    Raises:
        BundleError: the folder cannot be written.
    """
    head = {"format": FORMAT, "twinspect": __version__, **meta}
    parts = {_META: json.dumps(head, indent=1, allow_nan=False).encode(), _TENSORS: tensors}
    if memory:
        parts[_MEMORY] = memory
    hashes = {name: hashlib.sha256(body).hexdigest() for name, body in parts.items()}
    refuse_unwritable(path)
    _write(path, {**parts, _HASHES: json.dumps(hashes).encode()})


def _write(path: Path, members: Mapping[str, bytes]) -> None:
    with replacing(path, BundleError) as raw, zipfile.ZipFile(raw, "w") as file:
        for name, body in members.items():
            # Level 9 takes three times as long, for 1 % less.
            file.writestr(zipfile.ZipInfo(name), body, zipfile.ZIP_DEFLATED, compresslevel=1)


def add_signature(path: Path, signature: str) -> None:
    """Write a bundle anew, with a signature.

    Raises:
        BundleError: the folder cannot be written.
    """
    with zipfile.ZipFile(path) as file:
        members = {name: _member(file, name) for name in file.namelist() if name != _SIGNATURE}
    _write(path, {**members, _SIGNATURE: signature.encode()})


def refuse_unwritable(path: Path) -> None:
    """As `files.refuse_unwritable`, for a bundle; called before training, so that no work is lost."""
    files.refuse_unwritable(path, "--out", f"model{SUFFIX}", _looks_like_bundle, BundleError)


def keep_old(path: Path) -> str:
    """Keep the bundle that is about to be replaced as ``NAME.bak``, and say so; empty where there is none."""
    if not path.is_file():
        return ""
    backup = path.with_name(f"{path.name}.bak")
    backup.unlink(missing_ok=True)
    try:
        os.link(path, backup)  # at no cost, and the model never lacks its name
    except OSError:  # a file system without links
        shutil.copy2(path, backup)
    return f"kept the model that was there as {backup} (--force keeps none)"


def _looks_like_bundle(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(64)
    return head[:2] == b"PK" and _META.encode() in head


def read_bundle(path: Path) -> BundleContent:
    """Read and verify a bundle.

    Raises:
        BundleError: not a bundle, truncated, changed after it was written, or of another format than this library's.
    """
    if not path.is_file():
        raise BundleError(f"no such bundle: {path}. Make one with: twinspect fit DATA --out {path}")
    parts, signature = {}, ""
    try:
        with zipfile.ZipFile(path) as file:
            parts[_META] = _member(file, _META)
            meta = json.loads(parts[_META])
            _refuse_other_format(path, int(meta["format"]), str(meta["twinspect"]))
            names = file.namelist()
            parts |= {name: _member(file, name) for name in (_TENSORS, _MEMORY) if name in names}
            hashes = dict(json.loads(_member(file, _HASHES)))
            if _SIGNATURE in names:
                signature = _member(file, _SIGNATURE).decode("ascii", "replace")
    except _NOT_WHOLE as error:
        raise BundleError(
            f"{path} is not a whole bundle (truncated or another kind of file: {error}); copy it again"
        ) from None
    if absent := {_TENSORS, *hashes} - parts.keys():
        raise BundleError(f"{path} is not a whole bundle ({', '.join(sorted(absent))} is missing); copy it again")
    for name, body in parts.items():
        if hashes.get(name) != hashlib.sha256(body).hexdigest():
            raise BundleError(f"{path}: {name} does not match its sha256; the file was changed or damaged")
    return BundleContent(meta, parts[_TENSORS], parts.get(_MEMORY, b""), hashes, signature)


def _member(file: zipfile.ZipFile, name: str) -> bytes:
    """A member; one that unpacks to far more than any model does is refused: it could fill the memory."""
    info = file.getinfo(name)
    if info.file_size > _MOST_UNPACKED * max(info.compress_size, 100_000):
        raise ValueError(f"{name} would unpack to {info.file_size:,} bytes from {info.compress_size:,}")
    return file.read(name)


def _refuse_other_format(path: Path, version: int, writer: str) -> None:
    if version == FORMAT:
        return
    told = f"{path} has format {version}, written by twinspect {writer}; {__version__} reads format {FORMAT}"
    if version < FORMAT:
        raise BundleError(f"{told}, whose statistics it lacks. Train it again: twinspect fit DATA --out {path}")
    raise BundleError(f"{told}. Type: pip install --upgrade twinspect")
