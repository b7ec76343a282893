"""What people point prediction at, as a lazy stream of images: files, folders, globs, lists, archives, tables, URLs.

Nothing here decodes. The order is always the same (folders depth first, names sorted), which is what lets a run that
was killed go on, and no more than one folder's names are held at a time. No torch.
"""

from __future__ import annotations

import csv
import glob as globbing
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from twinspect.data.images import SUFFIXES, ImageLimits, is_image
from twinspect.data.manifest import is_image_column
from twinspect.data.scan import inside
from twinspect.errors import DataError
from twinspect.inference.remote import below, is_url, open_stream

ARCHIVES = (".tar", ".tar.gz", ".tgz")
TABLES = (".parquet", ".csv")
MOST_BYTES = ImageLimits().max_bytes
_IMAGE_BYTES = ("image", "img", "jpg", "png", "bytes")  # columns of encoded images in other people's tables
_ROWS = 256  # of a list of paths, read at a time; encoded images are read 16 at a time
_DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error)


@dataclass(frozen=True, slots=True)
class Item:
    """One image, by reference, so that another process can read it.

    Attributes:
        name: what the table's ``path`` column says; ``archive#member`` inside an archive.
        path: file or URL that holds it; empty where ``data`` or ``error`` says all.
        offset, size: its bytes inside ``path``; -1 is the whole file.
        record: position inside a container file, else None.
        data: encoded bytes, where whoever listed the image had to read them anyway.
        error: why it must not be read.
    """

    name: str
    path: str = ""
    offset: int = -1
    size: int = -1
    record: int | None = None
    data: bytes | None = field(default=None, repr=False)
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without what is at its default."""
        return {name: value for name, value in asdict(self).items() if value != getattr(_PLAIN, name)}


_PLAIN = Item("")


@dataclass(frozen=True, slots=True)
class Stream:
    """An archive or a table of encoded images, read in order by whoever scores it.

    Attributes:
        path: file or URL.
    """

    path: str

    def items(self) -> Iterator[Item]:
        """Its images; damage becomes a last item with an error."""
        return _table_images(self.path) if self.path.endswith(".parquet") else _archive_images(self.path)

    def count(self) -> int | None:
        """Number of images, where finding out needs no reading of all its bytes."""
        if is_url(self.path) or self.path.endswith(ARCHIVES[1:]):
            return None
        if self.path.endswith(".parquet"):
            import pyarrow.parquet as pq

            return int(pq.read_metadata(self.path).num_rows)
        return sum(1 for _ in self.items())


def walk(source: str | Path) -> Iterator[Item | Stream]:
    """Images and streams of images behind one source, lazily.

    Raises:
        DataError: at once where nothing is found; the message says what was looked for.
    """
    text = str(source)
    if is_url(text):
        return _first(_remote(text), f"no image files in {text} (looked for {_suffixes()})")
    path = Path(text)
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _first(_below(text), f"no image files in {path} (looked for {_suffixes()})")
    if text.startswith("@"):
        return _list(Path(text[1:]))
    return _first(
        _globbed(text), f"nothing found at {path}: give an image, a folder, or a quoted glob such as 'new/*.png'"
    )


def walk_all(sources: Iterable[str | Path]) -> Iterator[Item | Stream]:
    """As `walk`, one source after the other; of several, a missing file stays in, so that its row can say so.

    Raises:
        DataError: at once, where there is nothing behind one of them.
    """
    listed = list(sources)
    return chain.from_iterable(_or_missing(one) if len(listed) > 1 else walk(one) for one in listed)


def expand(source: Any) -> Iterable[Any]:
    """One image, many, or the images a path, folder, glob, list, archive, table or URL stands for, in fixed order.

    A file that is missing among others in a list stays in it, so that its row can say so.

    Raises:
        DataError: nothing found; the message says what was looked for.
    """
    if isinstance(source, np.ndarray) and source.ndim == 4:
        return list(source)
    if isinstance(source, Iterator):
        return (item for one in source for item in _expanded(one, among=True))
    if isinstance(source, (list, tuple)):
        return chain.from_iterable([_expanded(one, among=len(source) > 1) for one in source])
    return _expanded(source, among=False)


def _expanded(one: Any, among: bool) -> Iterable[Any]:
    if not isinstance(one, (str, Path)):
        return [one] if not isinstance(one, (list, tuple)) and not _is_stack(one) else expand(one)
    found = _or_missing(one) if among else walk(one)
    return (item for part in found for item in (part.items() if isinstance(part, Stream) else (part,)))


def _is_stack(one: Any) -> bool:
    return isinstance(one, np.ndarray) and one.ndim == 4


def _or_missing(one: str | Path) -> Iterator[Item | Stream]:
    text = str(one)
    special = is_url(text) or text.startswith("@") or globbing.has_magic(text)
    return iter([Item(text, text)]) if not special and not os.path.exists(text) else walk(one)


def _first(found: Iterator[Item | Stream], otherwise: str) -> Iterator[Item | Stream]:
    """The same items; an error at once where there are none."""
    first = next(found, None)
    if first is None:
        raise DataError(otherwise)
    return chain([first], found)


def _file(path: Path) -> Iterator[Item | Stream]:
    name = path.name.lower()
    if name.endswith(TABLES):
        return _table(path)
    return iter([Stream(str(path)) if name.endswith(ARCHIVES) else Item(str(path), str(path))])


def _kept(text: str) -> Item | Stream | None:
    """What a file in a folder is by its name: an image, an archive of images, or neither."""
    if is_image(text):
        return Item(text, text)
    return Stream(text) if text.lower().endswith(ARCHIVES) and not os.path.basename(text).startswith(".") else None


def _below(folder: str) -> Iterator[Item | Stream]:
    try:
        with os.scandir(folder) as entries:
            found = sorted((e.name, e.is_dir(follow_symlinks=False), e.is_file()) for e in entries)
    except OSError as error:
        yield Item(folder, error=f"{folder}: the folder cannot be listed ({error.strerror or error})")
        return
    for name, is_folder, is_file in found:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _below(path)
        elif is_file and (kept := _kept(path)) is not None:
            yield kept


def _remote(url: str) -> Iterator[Item | Stream]:
    found = below(url)
    first = next(found)
    if first == url.rstrip("/"):
        yield Stream(first) if first.lower().endswith((*ARCHIVES, ".parquet")) else Item(first, first)
        return
    yield from (kept for one in chain([first], found) if (kept := _kept(one)) is not None)


def _globbed(pattern: str) -> Iterator[Item | Stream]:
    names = sorted(globbing.iglob(pattern, recursive=True), key=lambda p: p.split(os.sep))
    return (part for name in names if os.path.isfile(name) for part in _file(Path(name)))


def _list(path: Path) -> Iterator[Item | Stream]:
    """One image, archive or URL a line, relative to the list's folder; empty lines and ``#`` lines do not count.

    Raises:
        DataError: no such list.
    """
    if not path.is_file():
        raise DataError(f"no such list: {path} (@FILE names a text file with one image path a line)")
    lines = (line for line in _lines(path) if line and not line.startswith("#"))
    return _first((_listed(line, path.parent) for line in lines), f"{path}: the list holds no path")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        yield from (line.rstrip("\r\n") for line in file)


def _listed(line: str, folder: Path) -> Item | Stream:
    where = line if is_url(line) else str(folder / line)
    return Stream(where) if where.lower().endswith(ARCHIVES) else Item(where, where)


# ----------------------------------------------------------------------------------------------- tables


def _table(path: Path) -> Iterator[Item | Stream]:
    """Images of a manifest (Parquet or CSV), or of a Parquet file that holds encoded images itself."""
    if path.suffix.lower() == ".csv":
        return _first(_manifest(_csv_rows(path), path), f"{path}: holds no row")
    column, encoded = _image_column(str(path))
    if encoded:
        return iter([Stream(str(path))])
    return _first(_manifest(_parquet_rows(path, column), path), f"{path}: holds no row")


def _manifest(rows: Iterator[dict[str, Any]], path: Path) -> Iterator[Item | Stream]:
    for number, row in enumerate(rows, start=1):
        text, record = str(row["image"] or ""), row.get("record")
        try:
            found = str(inside(path.parent, text, f"{path} row {number}"))
        except DataError as error:
            yield Item(text, error=str(error))
            continue
        known = record is not None and str(record).isdecimal()
        yield Item(f"{found}#{record}", found, record=int(str(record))) if known else Item(found, found)


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        names = ["image" if is_image_column(name) else name for name in reader.fieldnames or ()]
        if "image" not in names:
            raise DataError(f"{path}: columns {', '.join(names) or 'none'}; image (a path) is needed")
        reader.fieldnames = names
        yield from reader


def _parquet_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = [column, *(["record"] if "record" in file.schema_arrow.names else [])]
    for batch in file.iter_batches(_ROWS, columns=names):
        yield from ({**row, "image": row[column]} for row in batch.to_pylist())


def _image_column(path: str) -> tuple[str, bool]:
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
        if name in _IMAGE_BYTES and "binary" in kind:
            return name, True
    for name, kind in columns.items():
        if is_image_column(name) and "string" in kind:
            return name, False
    raise DataError(f"{path}: columns {', '.join(columns)}; image (paths, or encoded images) is needed")


def _table_images(path: str) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        column, _ = _image_column(path)
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
    from pyarrow import BufferReader

    from twinspect.inference.remote import read

    # Footers are at the end: a table of a store is read whole. Large sets there belong into shards.
    return BufferReader(read(path, 4 * MOST_BYTES)) if is_url(path) else open(path, "rb")


def _of_bytes(name: str, raw: bytes) -> Item:
    if len(raw) > MOST_BYTES:
        return Item(name, error=f"{name}: {len(raw):,} bytes; an image file of that size is not read")
    return Item(name, data=raw)


# --------------------------------------------------------------------------------------------- archives


def _archive_images(path: str) -> Iterator[Item]:
    """Images of a tar file. A plain one on this disk is read by place; others as a stream, bytes at hand."""
    by_place = not is_url(path) and path.lower().endswith(".tar")
    count = 0
    try:
        with _archive(path, by_place) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header it has seen
                if member.isdir() or not is_image(member.name):
                    continue
                count += 1
                yield _member(path, archive, member, by_place)
    except (*_DAMAGED, DataError) as error:
        count += 1
        yield Item(path, error=f"{path}: damaged archive after {count - 1} images ({error}); copy it again")
    if not count:
        yield Item(path, error=f"{path}: no image in the archive (looked for {_suffixes()})")


@contextmanager
def _archive(path: str, by_place: bool) -> Iterator[tarfile.TarFile]:
    with (
        open_stream(path) if is_url(path) else open(path, "rb") as file,
        tarfile.open(fileobj=file, mode="r:" if by_place else "r|*") as archive,
    ):
        yield archive


def _member(path: str, archive: tarfile.TarFile, member: tarfile.TarInfo, by_place: bool) -> Item:
    name = f"{path}#{member.name}"
    parts = PurePosixPath(member.name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts:
        return Item(name, error=f"{name}: the name leaves the archive; refused")
    if not member.isreg() or member.issparse():
        return Item(name, error=f"{name}: a link, device or sparse file; only plain files of an archive are read")
    if member.size > MOST_BYTES:
        return Item(name, error=f"{name}: {member.size:,} bytes; an image file of that size is not read")
    if by_place:
        return Item(name, path, member.offset_data, member.size)
    body = archive.extractfile(member)
    return Item(name, data=body.read() if body is not None else b"")


def _suffixes() -> str:
    return ", ".join(sorted(SUFFIXES))
