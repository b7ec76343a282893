"""Images that lie inside one big file: CIFAR batches, IDX and Parquet.

A pickle is a program. CIFAR's are read by an unpickler that knows four names and builds nothing but plain
arrays; any other pickle is refused before it can do anything.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.data.images import read_rgb
from twinspect.data.tables import IMAGE_COLUMNS, parquet_columns, parquet_table
from twinspect.errors import DataError

CIFAR_SIDE = 32
CIFAR_BYTES = 3 * CIFAR_SIDE * CIFAR_SIDE
_MOST_UNPACKED = 1 << 30
_LABEL_COLUMNS = ("fine_label", "label")


@dataclass(frozen=True, slots=True)
class Container:
    """A file of images."""

    count: int
    rgb: Callable[[int], NDArray[np.uint8]]  # H x W x 3 of one record
    labels: Sequence[int | str] = ()  # class number or name of each record; empty if the file does not say


def _planes(pixels_NCHW: NDArray[np.uint8], labels: Sequence[int | str] = ()) -> Container:
    """Records of raw 8-bit pixels, one or three channels; one channel is repeated."""

    def rgb(record: int) -> NDArray[np.uint8]:
        planes = np.moveaxis(pixels_NCHW[record], 0, -1)
        return np.ascontiguousarray(np.broadcast_to(planes, (*planes.shape[:2], 3)))

    return Container(len(pixels_NCHW), rgb, labels)


def read_record(path: Path, record: int) -> NDArray[np.uint8]:
    """RGB of one record of a container file."""
    container = open_container(path)
    if not 0 <= record < container.count:
        raise DataError(f"{path}: no record {record}; the file holds {container.count:,}, counted from 0")
    return container.rgb(record)


def open_container(path: Path) -> Container:
    """Open a container file; kept open until the file changes (16 files at most)."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from None
    return _open(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16)
def _open(path: Path, _mtime_ns: int, _size: int) -> Container:
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            return _open_parquet(path)
        if "-idx" in name or ".idx" in name:
            classes = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
            labels = read_idx(classes).ravel().tolist() if classes != path and os.path.isfile(classes) else ()
            return _planes(read_idx(path)[:, None], labels)
        return _open_cifar(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cannot be read ({error}); copy it again from its source") from None


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Array in an IDX file of unsigned bytes (MNIST and Fashion-MNIST), plain or ``.gz``."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        with gzip.open(io.BytesIO(raw)) as stream:
            raw = stream.read(_MOST_UNPACKED + 1)
        if len(raw) > _MOST_UNPACKED:
            raise DataError(f"{path}: unpacks to more than {_MOST_UNPACKED:,} bytes; Fashion-MNIST's has 47 million")
    if len(raw) < 8 or raw[:3] != b"\0\0\x08" or not 1 <= raw[3] <= 3 or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path}: not an IDX file of unsigned bytes; accepted: the files of Fashion-MNIST")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    body = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3])
    promised = int(np.prod(shape, dtype=object))
    if body.size != promised:
        raise DataError(f"{path}: {body.size:,} bytes of data, {promised:,} promised by its header; copy it again")
    return body.reshape(shape)


def _open_cifar(path: Path) -> Container:
    with path.open("rb") as stream:
        try:
            content = _CifarUnpickler(stream, encoding="bytes").load()
        except DataError:
            raise
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise DataError(f"{path}: not a pickle of CIFAR's python version ({error})") from None
    batch = {_text(key): value for key, value in content.items()} if isinstance(content, dict) else {}
    labels, data = batch.get("fine_labels", batch.get("labels")), batch.get("data")
    pixels = data.array(path) if isinstance(data, _StandIn) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != CIFAR_BYTES or not isinstance(labels, list):
        raise DataError(f"{path}: not a batch of CIFAR's python version (data N x 3072, labels)")
    if len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise DataError(f"{path}: {len(labels)} labels for {len(pixels)} images; copy it again from its source")
    return _planes(pixels.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE), labels)


def _text(key: object) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


class _StandIn:
    """Stands in for numpy's array and dtype while unpickling: only remembers what it is given."""

    state: object = ()

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state

    def array(self, path: Path) -> NDArray[np.uint8]:
        """The bytes as an array; only C- or Fortran-ordered unsigned bytes are accepted."""
        match self.state:
            case (int(), tuple() as shape, _StandIn(arguments=(code, *_)), bool() | int() as fortran, bytes() as raw):
                counts = all(type(n) is int and n >= 0 for n in shape)
                whole = counts and int(np.prod(shape, dtype=object)) == len(raw)
                if whole and _text(code) in ("u1", "|u1"):
                    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
        raise DataError(f"{path}: its array is not of unsigned bytes, or is cut short; copy it again from its source")


def _latin1(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("only latin1 text is admitted")
    return text.encode("latin-1")


class _CifarUnpickler(pickle.Unpickler):
    """Admits the names that CIFAR's files hold, each bound to a harmless stand-in; refuses all others."""

    _ADMITTED: dict[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _StandIn,
        ("numpy._core.multiarray", "_reconstruct"): _StandIn,
        ("numpy", "ndarray"): _StandIn,  # only an argument of the above
        ("numpy", "dtype"): _StandIn,
        ("_codecs", "encode"): _latin1,
        ("__builtin__", "bytes"): lambda: b"",
    }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in, or a refusal that names what the file asked for."""
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            raise DataError(
                f"this pickle asks for {module}.{name}, which CIFAR's files never do: it was refused and "
                "nothing in it was run. Use Parquet, or folders of PNG files, instead"
            ) from None


def _open_parquet(path: Path) -> Container:
    """Records of encoded image bytes in an Arrow column, which is kept in memory."""
    import pyarrow.compute as pc

    kinds = parquet_columns(path)
    name = next((column for column in IMAGE_COLUMNS if column in kinds), None)
    if name is None:
        raise DataError(f"{path}: columns {', '.join(kinds)}; one of {', '.join(IMAGE_COLUMNS)} is needed")
    label = next((column for column in _LABEL_COLUMNS if column in kinds), None)
    table = parquet_table(path, [name, label] if label else [name])
    images = pc.struct_field(table.column(name), "bytes") if "bytes" in kinds[name] else table.column(name)

    def rgb(record: int) -> NDArray[np.uint8]:
        raw = images[record].as_py()
        if not isinstance(raw, bytes):
            raise DataError(f"{path}: record {record} holds no image bytes; accepted: PNG or JPEG bytes")
        return read_rgb(raw, name=f"{path} record {record}")

    return Container(table.num_rows, rgb, table.column(label).to_pylist() if label else ())
