"""Images inside other files: members of tar and zip files, and encoded images in Parquet tables. No torch."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.data.images import SUFFIXES, ImageLimits, is_image
from twinspect.data.manifest import path_column
from twinspect.data.scan import is_hidden
from twinspect.errors import DataError
from twinspect.inference import remote
from twinspect.inference.remote import is_url, open_stream, read

_PLAIN_TAR = ".tar"  # the one archive whose members can be read by their places
ARCHIVES = (_PLAIN_TAR, ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
MOST_BYTES = ImageLimits().max_bytes
_IMAGE_BYTES = ("image", "img", "jpg", "png", "bytes")  # columns of encoded images in other people's tables
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error)


@dataclass(frozen=True, slots=True)
class Item:
    """One image, by reference, so that another process can read it.

    Attributes:
        name: what the table's ``path`` column says; ``archive#member`` inside an archive.
        path: file or URL that holds it; empty where ``data`` or ``error`` says all.
        offset, size: its bytes inside ``path``; -1 is the whole file.
        record: position inside a container file, else None.
        data: encoded bytes, where whoever listed the image had to read them anyway.
        pixels: H x W x 3, RGB, of a video's frame.
        error: why it must not be read.
        state: size and time of change of a file in a store, where the store's listing said them.
    """

    name: str
    path: str = ""
    offset: int = -1
    size: int = -1
    record: int | None = None
    data: bytes | None = field(default=None, repr=False)
    pixels: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    error: str = ""
    state: str = ""

    @property
    def identity(self) -> str:
        """Its name with size and time of change of its file: another file under the same name has another one."""
        return f"{self.name}\0{self.state or _local_state(self.path)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without what is at its default."""
        return {name: value for name, value in asdict(self).items() if value != getattr(_DEFAULT, name)}


_DEFAULT = Item("")


@dataclass(frozen=True, slots=True)
class Stream:
    """An archive, a table of encoded images, or a video, read in order by whoever scores it.

    Attributes:
        path: file or URL.
    """

    path: str

    @property
    def identity(self) -> str:
        """As `Item.identity`, of the whole file."""
        return f"{self.path}\0{remote.state(self.path) if is_url(self.path) else _local_state(self.path)}"

    def items(self) -> Iterator[Item]:
        """Its images; damage becomes a last item with an error."""
        from twinspect.inference.video import file_frames, is_video

        if is_video(self.path):
            return file_frames(self.path)
        return _table_images(self.path) if _is_parquet(self.path) else _archive_images(self.path)

    def count(self) -> int | None:
        """Number of images, where finding out needs no reading of all its bytes."""
        if is_url(self.path):
            return None
        if _is_parquet(self.path):
            import pyarrow.parquet as pq

            return int(pq.read_metadata(self.path).num_rows)
        return sum(1 for _ in self.items()) if self.path.lower().endswith(_PLAIN_TAR) else None


def image_column(path: str) -> tuple[str, bool]:
    """Name of the column with images, and whether it holds their bytes instead of paths.

    Raises:
        DataError: not Parquet, or no such column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _seekable(path) as file:
            columns = {one.name: str(one.type) for one in pq.read_schema(file)}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error})") from None
    for name, kind in columns.items():
        if name.lower() in _IMAGE_BYTES and "binary" in kind:
            return name, True
    if name := path_column(name for name, kind in columns.items() if "string" in kind):
        return name, False
    raise DataError(f"{path}: columns {', '.join(columns)}; image (paths, or encoded images) is needed")


def _table_images(path: str) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        column, _ = image_column(path)
        with _seekable(path) as file:
            for batch in pq.ParquetFile(file).iter_batches(16, columns=[column]):
                for cell in batch.column(0).to_pylist():
                    raw = cell.get("bytes") if isinstance(cell, dict) else cell
                    yield _of_bytes(f"{path}#{number}", raw if isinstance(raw, bytes) else b"")
                    number += 1
    except (pa.ArrowException, OSError, DataError) as error:
        yield Item(path, error=f"{path}: damaged table after {number} images ({error}); copy it again")
        return
    if not number:
        yield Item(path, error=f"{path}: no image in the table")


def _seekable(path: str) -> Any:
    # Footers are at the end: a table of a store is read whole. Large sets there belong into shards.
    return io.BytesIO(read(path, 4 * MOST_BYTES)) if is_url(path) else open(path, "rb")


def _of_bytes(name: str, raw: bytes) -> Item:
    if len(raw) > MOST_BYTES:
        return Item(name, error=f"{name}: {len(raw):,} bytes; an image file of that size is not read")
    return Item(name, data=raw)


def _archive_images(path: str) -> Iterator[Item]:
    """Images of an archive. A plain tar file on this disk is read by place; others as a stream, bytes at hand."""
    count = 0
    try:
        for item in _zip_members(path) if path.lower().endswith(".zip") else _tar_members(path):
            count += 1
            yield item
    except (*_DAMAGED, DataError) as error:
        yield Item(path, error=f"{path}: damaged archive after {count} images ({error}); copy it again")
        return
    if not count:
        yield Item(path, error=f"{path}: no image in the archive (looked for {suffixes()})")


def _tar_members(path: str) -> Iterator[Item]:
    by_place = not is_url(path) and path.lower().endswith(_PLAIN_TAR)
    with _tar(path, by_place) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header it has seen
            if not member.isdir() and _is_wanted(member.name):
                yield _tar_member(path, archive, member, by_place)


@contextmanager
def _tar(path: str, by_place: bool) -> Iterator[tarfile.TarFile]:
    with (
        open_stream(path) if is_url(path) else open(path, "rb") as file,
        tarfile.open(fileobj=file, mode="r:" if by_place else "r|*") as archive,
    ):
        yield archive


def _tar_member(path: str, archive: tarfile.TarFile, member: tarfile.TarInfo, by_place: bool) -> Item:
    name = f"{path}#{member.name}"
    if _leads_out(member.name):
        return Item(name, error=f"{name}: the name leaves the archive; refused")
    if not member.isreg() or member.issparse():
        return Item(name, error=f"{name}: a link, device or sparse file; only plain files of an archive are read")
    if member.size > MOST_BYTES:
        return Item(name, error=f"{name}: {member.size:,} bytes; an image file of that size is not read")
    if by_place:
        return Item(name, path, member.offset_data, member.size)
    body = archive.extractfile(member)
    return Item(name, data=body.read() if body is not None else b"")


def _zip_members(path: str) -> Iterator[Item]:
    with _seekable(path) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir() and _is_wanted(member.filename):
                yield _zip_member(f"{path}#{member.filename}", archive, member)


def _zip_member(name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Item:
    if _leads_out(member.filename):
        return Item(name, error=f"{name}: the name leaves the archive; refused")
    if member.file_size > MOST_BYTES:  # no more than the header says is ever unpacked
        return Item(name, error=f"{name}: {member.file_size:,} bytes; an image file of that size is not read")
    try:
        return Item(name, data=archive.read(member))
    except (*_DAMAGED, RuntimeError) as error:  # RuntimeError: encrypted, or packed in a way that Python lacks
        return Item(name, error=f"{name}: cannot be unpacked ({error})")


def _is_wanted(name: str) -> bool:
    """Whether a member is an image in no hidden folder."""
    folders = name.replace("\\", "/").split("/")[:-1]
    return is_image(name) and not any(is_hidden(one) for one in folders if one not in (".", ".."))


def _leads_out(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or ".." in parts.parts


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _local_state(path: str) -> str:
    """Size and time of change of a file on this disk; empty for others."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: the name holds a zero byte
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def suffixes() -> str:
    """Endings of image files, for messages."""
    return ", ".join(sorted(SUFFIXES))
