"""One file that holds a trained model: safetensors and JSON in a zip, each with its sha256. Never pickle.

Self-contained by default (teacher included, so prediction needs no network and no package of weights);
a thin bundle names its teacher and the hash of its weights instead, and refuses any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinspect._version import __version__
from twinspect.errors import BundleError

FORMAT = 1
SUFFIX = ".twin"
_META, _TENSORS, _HASHES = "bundle.json", "model.safetensors", "sha256.json"


@dataclass(frozen=True, slots=True)
class BundleContent:
    """What a bundle holds: plain JSON values and named tensors (as safetensors bytes)."""

    meta: dict[str, Any]
    tensors: bytes


def write_bundle(path: Path, meta: Mapping[str, Any], tensors: bytes) -> None:
    """Write a bundle atomically: a crash or a full disk leaves no half-written file under the name.

    Raises:
        BundleError: the folder cannot be written.
    """
    head = {"format": FORMAT, "twinspect": __version__, **meta}
    parts = {_META: json.dumps(head, indent=1, allow_nan=False).encode(), _TENSORS: tensors}
    hashes = {name: hashlib.sha256(body).hexdigest() for name, body in parts.items()}
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as file:
            for name, body in {**parts, _HASHES: json.dumps(hashes).encode()}.items():
                file.writestr(zipfile.ZipInfo(name), body)
        os.replace(new, path)
    except OSError as error:
        raise BundleError(f"{path} cannot be written ({error.strerror or error})") from None
    finally:
        new.unlink(missing_ok=True)


def read_bundle(path: Path) -> BundleContent:
    """Read and verify a bundle.

    Raises:
        BundleError: not a bundle, truncated, changed after it was written, or newer than this library.
    """
    if not path.is_file():
        raise BundleError(f"no such bundle: {path}. Make one with: twinspect fit DATA --out {path}")
    try:
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in (_META, _TENSORS, _HASHES)}
        hashes, meta = json.loads(parts[_HASHES]), json.loads(parts[_META])
        version = int(meta["format"])
    except (
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        TypeError,
        OSError,
        EOFError,
        NotImplementedError,
    ) as error:
        raise BundleError(
            f"{path} is not a whole bundle (truncated or another kind of file: {error}); copy it again"
        ) from None
    if version > FORMAT:
        raise BundleError(
            f"{path} has format {version}, written by twinspect {meta.get('twinspect')}; this is "
            f"{__version__} and reads up to format {FORMAT}. Type: pip install --upgrade twinspect"
        )
    for name in (_META, _TENSORS):
        if hashes.get(name) != hashlib.sha256(parts[name]).hexdigest():
            raise BundleError(f"{path}: {name} does not match its sha256; the file was changed or damaged")
    return BundleContent(meta, parts[_TENSORS])
