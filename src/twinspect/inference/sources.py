"""What people point prediction at, as a lazy stream of images: files, folders, lists, archives, tables, URLs, videos.

Nothing here decodes. The order is always the same (folders depth first, names sorted), which is what lets a run that
was killed go on, and no more than one folder's names are held at a time. No torch.
"""

from __future__ import annotations

import fnmatch
import glob as globbing
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from twinspect.data.images import is_image
from twinspect.data.manifest import path_column
from twinspect.data.scan import inside, is_hidden
from twinspect.errors import DataError
from twinspect.files import open_text
from twinspect.inference import stores
from twinspect.inference.archives import ARCHIVES, Item, Stream, image_column, suffixes
from twinspect.inference.stores import is_url
from twinspect.inference.table import TABLES, columns_of, read_rows
from twinspect.inference.video import VIDEOS, is_endless, live_frames

_LOCAL = "file://"
_DEEP = "**"  # of a glob: folders at any depth
_HOLDERS = (*ARCHIVES, *VIDEOS)
OF_SEVERAL = (*_HOLDERS, *TABLES)  # endings of files that stand for more than one image
_MEMBER = re.compile("|".join(re.escape(f"{ending}#") for ending in (*_HOLDERS, ".parquet")), re.IGNORECASE)
_WATCH_SECONDS = 0.2  # between two looks into a watched folder
STDIN = "@-"  # a list that others write while it is read
Visited = set[tuple[int, int]]  # folders by device and inode


class NothingFound(DataError):
    """No image is behind a path, which says nothing about others given with it."""


def walk(source: str | Path) -> Iterator[Item | Stream]:
    """Images and streams of images behind one source, lazily; a DataError at once where nothing is found."""
    text = str(source).removeprefix(_LOCAL)
    if "\0" in text:
        raise DataError(f"{text!r}: no path of this system (it holds a zero byte)")
    if is_endless(text):
        return live_frames(text)
    nothing = NothingFound(f"no image files in {text} (looked for {suffixes()})")
    if is_url(text):
        return _first(_remote(text), nothing)
    path = Path(text)
    if os.path.isfile(path):  # unlike Path's own, false for a name that is too long
        return _file(path)
    if text and os.path.isdir(path):
        return _first(_below(text, set()), nothing)
    if text.startswith("@"):
        return _list(Path(text[1:]))
    where = text or "an empty path"
    advice = f"nothing found at {where}: give an image, a folder, or a quoted glob such as 'new/*.png'"
    return _first(_globbed(text), NothingFound(advice))


def walk_all(sources: Iterable[str | Path]) -> Iterator[Item | Stream]:
    """As `walk`, one source after the other.

    Of several, one without any image stays in, so that its row can say so.
    """
    several = list(sources)
    return walk(several[0]) if len(several) == 1 else chain.from_iterable([among(source) for source in several])


def is_live(source: object) -> bool:
    """Whether images of a source may still be in the making, so that none is to be read ahead."""
    return isinstance(source, str) and (source == STDIN or is_endless(source))


def watch(*folders: str | Path) -> Iterator[Item]:
    """Images in and below folders, and then each one that arrives or is overwritten. It does not end.

    An image is given when two looks, a fifth of a second or more apart, found its size and time of change the same:
    it is whole then, if its writer does not pause. What is removed is forgotten, so memory goes with the files there.

    Raises:
        DataError: at once, where one is no folder.

    Example:
        >>> for result in load("model.onnx").predict(watch("incoming/")):
        ...     print(result.path, result.score, result.is_anomaly)
    """
    for folder in folders:
        if not os.path.isdir(folder):
            raise DataError(f"{folder} is no folder; only folders can be watched")
    return _watched([str(folder) for folder in folders])


def _watched(folders: list[str]) -> Iterator[Item]:
    yielded, before = set[str](), set[str]()
    while True:
        began = time.monotonic()
        now = {file.identity: file for folder in folders for file in _below(folder, set())}
        looked = time.monotonic() - began
        yielded &= now.keys()
        for identity, file in now.items():
            if identity in before and identity not in yielded:
                yielded.add(identity)
                yield from file.items()
        before = set(now)
        time.sleep(max(_WATCH_SECONDS, 5 * looked))  # a folder of very many files costs a sixth of a core at most


def among(source: str | Path) -> Iterator[Item | Stream]:
    """As `walk`, for one source of several: an item with an error where nothing is behind it."""
    text = str(source).removeprefix(_LOCAL)
    if not (is_url(text) or text.startswith("@") or globbing.has_magic(text) or os.path.exists(text)):
        return iter([Item(text, text)])
    try:
        return walk(source)
    except NothingFound as error:
        return iter([Item(text, error=str(error))])


def would_find(source: str, file: str) -> bool:
    """Whether a source that is walked again would come upon a file that is written in the meantime."""
    source, file = source.removeprefix(_LOCAL), file.removeprefix(_LOCAL)
    if is_url(source) or is_url(file):
        return file.startswith(source.rstrip("/") + "/")
    place, origin = Path(file).resolve(), Path(source).resolve()
    if origin.is_dir():
        return place.is_relative_to(origin) and not any(map(is_hidden, place.relative_to(origin).parts))
    head, deep, _ = source.partition(_DEEP)
    if deep and not globbing.has_magic(head):
        return would_find(head or ".", file) and fnmatch.fnmatch(place.name, origin.name)
    return globbing.has_magic(source) and place.match(str(origin))


def _first(files: Iterator[Item | Stream], otherwise: DataError) -> Iterator[Item | Stream]:
    """The same; an error at once where there are none."""
    first = next(files, None)
    if first is None:
        raise otherwise
    return chain([first], files)


def _file(path: Path) -> Iterator[Item | Stream]:
    return _table(path) if path.name.lower().endswith(TABLES) else iter([_whole(str(path))])


def _whole(path: str, state: str = "") -> Item | Stream:
    """A file that was named by whoever asks: by its ending one that holds images, or an image."""
    return Stream(path) if path.lower().endswith(_HOLDERS) else Item(path, path, state=state)


# ---------------------------------------------------------------------------------------------- folders


def _remote(url: str) -> Iterator[Item | Stream]:
    is_folder, state = stores.status(url)
    if is_folder:
        yield from _below(url.rstrip("/"), set())
    else:
        yield Stream(url) if url.lower().endswith(".parquet") else _whole(url, state)


def _below(folder: str, visited: Visited) -> Iterator[Item | Stream]:
    """Images and archives in a folder and those below, depth first, names sorted; see `_entries`."""
    try:
        entries = _entries(folder, visited)
    except OSError as error:
        yield Item(folder, error=f"{folder}: the folder cannot be listed ({error.strerror or error})")
        return
    for name, kind, state in entries:
        path = f"{folder}/{name}" if is_url(folder) else os.path.join(folder, name)
        if kind == "folder":
            yield from _below(path, visited)
        elif is_image(path):
            yield Item(path, path, state=state)
        elif path.lower().endswith(ARCHIVES):
            yield Stream(path)
        elif kind == "broken link" and "." not in name:  # by its name the link to a folder: of a disk not mounted?
            yield Item(path, error=f"{path}: a link to what is not there or may not be read")


def _entries(folder: str, visited: Visited) -> list[tuple[str, str, str]]:
    """Names in a folder with kind and state, sorted; nothing where a link leads back to a folder that was read."""
    if is_url(folder):
        listed = stores.entries(folder)
        return [(name, "folder" if deep else "file", state) for name, deep, state in listed if not is_hidden(name)]
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in visited:
        return []
    visited.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        return sorted((entry.name, _kind(entry), "") for entry in entries if not is_hidden(entry.name))


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        return "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "file"
    except OSError:  # of what a link leads to
        return "broken link"


def _globbed(pattern: str) -> Iterator[Item | Stream]:
    pattern = pattern.replace(os.altsep or os.sep, os.sep)
    typed = pattern.split(os.sep)
    for name in sorted(set(_matches(pattern)), key=lambda path: path.split(os.sep)):
        passed_over = any(is_hidden(part) and part not in typed for part in name.split(os.sep)[:-1])
        if not passed_over and not os.path.isdir(name):
            yield from _file(Path(name))


def _matches(pattern: str) -> Iterator[str]:
    """As `glob.iglob`, but ``**`` reads no folder twice, whatever links lead back to it."""
    head, deep, tail = f"{os.sep}{pattern}".partition(f"{os.sep}{_DEEP}")
    if not deep or tail[:1] not in ("", os.sep):
        return globbing.iglob(pattern)
    head, tail = head[1:] or (os.sep if pattern.startswith(os.sep) else ""), tail[1:] or "*"
    folders = (inner for top in (_matches(head) if head else [""]) for inner in _folders(top, set()))
    return (name for folder in folders for name in _matches(os.path.join(globbing.escape(folder), tail)))


def _folders(top: str, visited: Visited) -> Iterator[str]:
    before = len(visited)
    try:
        entries = _entries(top or os.curdir, visited)
    except OSError:  # as glob passes over it
        return
    if len(visited) > before:
        yield top
    for name, kind, _ in entries:
        if kind == "folder":
            yield from _folders(os.path.join(top, name), visited)


# ------------------------------------------------------------------------------------------------ lists


def _list(path: Path) -> Iterator[Item | Stream]:
    """One image, archive, ``ARCHIVE#MEMBER`` or URL a line, relative to the list's folder; ``#`` begins a comment.

    A table with a column of images is read as one. ``-`` is standard input, whose lines are answered as they come.
    """
    if path == Path("-"):
        return (_listed(line.rstrip("\n"), Path()) for line in sys.stdin if line.strip())
    if not os.path.isfile(path):
        raise DataError(f"no such list: {path} (@FILE names a text file with one image path a line)")
    if path.name.lower().endswith(TABLES) and (columns := columns_of(path)) and path_column(columns):
        return _table(path)
    return _first(_lines(path), DataError(f"{path}: the list holds no path"))


def _lines(path: Path) -> Iterator[Item | Stream]:
    with open_text(path, "surrogateescape") as file:
        for line in file:
            if line.strip("\n") and not line.startswith("#"):
                yield _listed(line.rstrip("\n"), path)


def _listed(line: str, path: Path) -> Item | Stream:
    if "\0" in line:
        name = line.partition("\0")[0]
        return Item(name, error=f"{name}: {path} holds a zero byte here; save the list as UTF-8, one path a line")
    line = line.removeprefix(_LOCAL)
    where = line if is_url(line) else _spelled(path.parent, line)
    return by_name(where) if _MEMBER.search(where) else _whole(where)


def _spelled(folder: Path, line: str) -> str:
    """The file of a line; where there is none, without blanks and quotes around it, or with Windows' separators."""
    bare = line.strip().strip('"')
    for text in (line, bare, bare.replace("\\", "/")):
        if os.path.lexists(folder / text):
            return str(folder / text)
    return str(folder / line)


# ----------------------------------------------------------------------------------------------- tables


def _table(path: Path) -> Iterator[Item | Stream]:
    """Images of a manifest, or of a Parquet file that holds encoded images itself."""
    columns, is_parquet = columns_of(path), path.suffix.lower() == ".parquet"
    for _ in () if is_parquet else read_rows(path):  # a row that cannot be read is found before the work
        pass
    column, encoded = image_column(str(path)) if is_parquet else (path_column(columns), False)
    if encoded:
        return iter([Stream(str(path))])
    if columns and not column:
        raise DataError(f"{path}: columns {', '.join(columns)}; image (a path) is needed")
    images = _manifest(read_rows(path, (column, "record")), column, path)
    return _first(images, DataError(f"{path}: holds no row"))


def _manifest(rows: Iterable[dict[str, Any]], column: str, path: Path) -> Iterator[Item]:
    for number, row in enumerate(rows, start=1):
        text, record = str(row.get(column) or ""), row.get("record")
        try:
            file = str(inside(path.parent, text, f"{path} row {number}"))
        except DataError as error:
            yield Item(text, error=str(error))
            continue
        known = record is not None and str(record).isdecimal()
        yield Item(f"{file}#{record}", file, record=int(str(record))) if known else Item(file, file)


def by_name(name: str) -> Item:
    """The image that a row of results calls so, also inside an archive, a video or a table."""
    if match := _MEMBER.search(name):
        images = Stream(name[: match.end() - 1]).items()
        return next((image for image in images if image.name == name), Item(name, error=f"{name}: not in the file"))
    file, mark, record = name.rpartition("#")
    if mark and record.isdecimal() and not os.path.exists(name) and os.path.isfile(file):
        return Item(name, file, record=int(record))
    return Item(name, name)
