"""Write container files as their owners did: CIFAR's pickles and binaries, IDX, Parquet."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.data.class_names import CIFAR100, CIFAR100_SUPERCLASSES

RGB = NDArray[np.uint8]


def cifar_binary(path: Path, images: Sequence[RGB], labels: Sequence[int], fine: bool) -> None:
    """One or two label bytes (CIFAR-100: super-class, class), then the red, green and blue plane."""
    rows = []
    for rgb, label in zip(images, labels, strict=True):
        head = bytes([_coarse(label), label]) if fine else bytes([label])
        rows.append(head + _planes(rgb))
    path.write_bytes(b"".join(rows))


def cifar_python(path: Path, images: Sequence[RGB], labels: Sequence[int], fine: bool) -> None:
    """A batch as Python 2 pickled it, opcode by opcode (protocol 2, byte strings, numpy's old names)."""
    data = b"".join(_planes(rgb) for rgb in images)
    label_key = b"fine_labels" if fine else b"labels"
    items = _string(b"batch_label") + _string(b"testing batch 1 of 1")
    items += _string(label_key) + _ints(labels)
    if fine:
        items += _string(b"coarse_labels") + _ints([_coarse(label) for label in labels])
    items += _string(b"data") + _array(data, len(images))
    names = b"".join(_string(f"picture_{i:06d}.png".encode()) for i in range(len(images)))
    items += _string(b"filenames") + b"](" + names + b"e"
    path.write_bytes(b"\x80\x02}(" + items + b"u.")


def idx(path: Path, values: NDArray[np.uint8]) -> None:
    """An IDX file of unsigned bytes, compressed if the name ends in ``.gz``."""
    raw = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def parquet(path: Path, images: Sequence[RGB], labels: Sequence[int], image_column: str, label_column: str) -> None:
    """PNG bytes in a struct column and class numbers, as data hubs publish image sets."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": _png(rgb), "path": f"{i}.png"} for i, rgb in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {image_column: pa.array(cells, kind), label_column: pa.array(labels, pa.int64())}
    pq.write_table(pa.table(columns), path)


def _planes(rgb: RGB) -> bytes:
    return np.ascontiguousarray(np.moveaxis(rgb, -1, 0)).tobytes()


def _coarse(fine: int) -> int:
    return list(CIFAR100_SUPERCLASSES).index(list(CIFAR100.values())[fine])


def _png(rgb: RGB) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "PNG")
    return stream.getvalue()


def _string(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _ints(values: Sequence[int]) -> bytes:
    return b"](" + b"".join(_int(value) for value in values) + b"e"


def _array(data: bytes, rows: int) -> bytes:
    """``numpy.core.multiarray._reconstruct(ndarray, (0,), "b")`` with its state, as numpy 1 writes it."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + _int(0) + b"\x85" + _string(b"b") + b"\x87R"
    kind = b"cnumpy\ndtype\n" + _string(b"u1") + _int(0) + _int(1) + b"\x87R"
    kind += b"(" + _int(3) + _string(b"|") + b"NNN" + _int(-1) + _int(-1) + _int(0) + b"tb"
    shape = _int(rows) + _int(len(data) // max(rows, 1)) + b"\x86"
    return made + b"(" + _int(1) + shape + kind + b"\x89" + b"T" + struct.pack("<i", len(data)) + data + b"tb"
