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
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from twinspect import files
from twinspect.data.images import ACCEPTED, is_image
from twinspect.data.manifest import path_column, record_number
from twinspect.data.scan import inside, is_hidden
from twinspect.data.tables import read_table, table_columns
from twinspect.errors import DataError
from twinspect.files import is_url, near_names, open_text
from twinspect.inference import streams
from twinspect.inference.job import is_endless
from twinspect.inference.streams import ARCHIVES, Item, Stream

_LOCAL = "file://"
_OLD_NAMES = "surrogateescape"  # names of files may be no UTF-8
TABLES = (".parquet", ".csv", ".tsv", ".jsonl")
_DEEP = "**"  # of a glob: folders at any depth
_HOLDERS = (*ARCHIVES, *streams.VIDEOS)
OF_SEVERAL = (*_HOLDERS, *TABLES)  # endings of files that stand for more than one image
_MEMBER = re.compile("|".join(re.escape(f"{ending}#") for ending in (*_HOLDERS, ".parquet")), re.IGNORECASE)
_WATCH_SECONDS = 0.2  # between two looks into a watched folder
Files = Iterator[Item | Stream]


class _NothingFound(DataError):
    """No image is behind a path, which says nothing about others given with it."""


def walk(source: str | Path, one_of_several: bool = False) -> Files:
    """Images and streams of images behind a source, lazily.

    Where nothing is found: a DataError at once, or of one source of several an item with an error.
    """
    text = str(source).removeprefix(_LOCAL)
    if "\0" in text:
        raise DataError(f"{text!r}: no path of this system (it holds a zero byte)")
    try:
        return _behind(text)
    except _NothingFound as error:
        if not one_of_several:
            raise
        return iter([Item(text, error=str(error))])


def walk_all(sources: Iterable[str | Path]) -> Files:
    """As `walk`, one source after the other."""
    several = list(sources)
    return chain.from_iterable([walk(source, len(several) > 1) for source in several])


def _behind(text: str) -> Files:
    if is_endless(text):
        name = streams.without_password(text)
        lost = f"{name}: gives no more frames; it is opened again every {streams.RETRY_SECONDS:g} s"
        frames = streams.live_frames(text)
        return (Item(f"{name}#{f[0]}", pixels=f[1]) if f is not None else Item(name, error=lost) for f in frames)
    nothing = _NothingFound(f"no image files in {text} (looked for {ACCEPTED})")
    if is_url(text):
        is_folder, state = files.status(text)
        one = Stream(text) if text.lower().endswith(".parquet") else _whole(text, state)
        return _first(_below(text.rstrip("/")), nothing) if is_folder else iter([one])
    if os.path.isfile(text):
        return _file(Path(text))
    if os.path.isdir(text):
        return _first(_below(text), nothing)
    if text.startswith("@"):
        return _list(Path(text[1:]))
    where = text or "an empty path"
    advice = f"nothing found at {where}: give an image, a folder, or a quoted glob such as 'new/*.png'."
    advice += near_names(Path(text)) if text else ""
    return _first(_globbed(text), _NothingFound(advice))


def _first(files: Files, otherwise: DataError) -> Files:
    """The same; an error at once where there are none."""
    first = next(files, None)
    if first is None:
        raise otherwise
    return chain([first], files)


def _file(path: Path) -> Files:
    return _table(path) if path.name.lower().endswith(TABLES) else iter([_whole(str(path))])


def _whole(path: str, state: str = "") -> Item | Stream:
    """A file that was named by whoever asks: by its ending one that holds images, or an image."""
    return Stream(path) if path.lower().endswith(_HOLDERS) else Item(path, path, state=state)


# ---------------------------------------------------------------------------------------------- folders


def _below(folder: str) -> Files:
    """Images and archives in a folder and those below."""
    for path, state, trouble in _entries_below(folder, set()):
        if is_image(path):
            yield Item(path, path, state=state)
        elif path.lower().endswith(ARCHIVES):
            yield Stream(path)
        elif trouble:
            yield Item(path, error=f"{path}: {trouble}")


def _entries_below(folder: str, visited: set[tuple[int, int]]) -> Iterator[tuple[str, str, str]]:
    """Files in a folder and those below, depth first, names sorted: path, `files.state`, and what is wrong with it.

    Nothing where a link leads back to a folder that was read; ``visited`` are those, by device and inode.
    """
    try:
        if is_url(folder):
            entries = files.entries(folder)
        else:
            status = os.stat(folder or os.curdir)
            if (status.st_dev, status.st_ino) in visited:
                return
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder or os.curdir) as listed:
                entries = sorted((entry.name, _is_folder(entry), "") for entry in listed)
    except OSError as error:
        yield folder, "", f"the folder cannot be listed ({error.strerror or error})"
        return
    for name, is_folder, state in entries:
        if is_hidden(name):
            continue
        path = f"{folder}/{name}" if is_url(folder) else os.path.join(folder, name)
        if is_folder:
            yield from _entries_below(path, visited)
        else:
            # By its name the link to a folder: of a disk that is not mounted?
            lost = "." not in name and not is_url(folder) and not os.path.exists(path)
            yield path, state, "a link to what is not there or may not be read" if lost else ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # of what a link leads to
        return False


def _globbed(pattern: str) -> Files:
    pattern = pattern.replace(os.altsep or os.sep, os.sep)
    typed = pattern.split(os.sep)
    for name in sorted(set(_matches(typed)), key=lambda path: path.split(os.sep)):
        passed_over = any(is_hidden(part) and part not in typed for part in name.split(os.sep)[:-1])
        if not passed_over and not os.path.isdir(name):
            yield from _file(Path(name))


def _matches(typed: Sequence[str]) -> Iterator[str]:
    """As `glob.iglob`, but ``**`` reads no folder twice, whatever links lead back to it."""
    if _DEEP not in typed:
        return globbing.iglob(os.sep.join(typed))
    deep = typed.index(_DEEP)
    tops = globbing.iglob(os.sep.join([*typed[:deep], ""])) if deep else [""]
    return (
        path
        for top in tops
        for path, _, trouble in _entries_below(top, set())
        if not trouble and _fits(path[len(top) :].split(os.sep), typed[deep:])
    )


def _fits(names: Sequence[str], typed: Sequence[str]) -> bool:
    if not typed or not names:
        return not names and all(part == _DEEP for part in typed)
    if typed[0] == _DEEP:
        return _fits(names, typed[1:]) or _fits(names[1:], typed)
    return fnmatch.fnmatch(names[0], typed[0]) and _fits(names[1:], typed[1:])


def would_find(source: str, file: str) -> bool:
    """Whether a source that is walked again would come upon a file that is written in the meantime."""
    source, file = source.removeprefix(_LOCAL), file.removeprefix(_LOCAL)
    if is_url(source) or is_url(file):
        return file.startswith(source.rstrip("/") + "/")
    place, origin = Path(file).resolve(), Path(source).resolve()
    if origin.is_dir():
        return place.is_relative_to(origin) and not any(map(is_hidden, place.relative_to(origin).parts))
    return globbing.has_magic(source) and _fits(place.parts, origin.parts)


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
        now = {file.identity: file for folder in folders for file in _below(folder)}
        looked = time.monotonic() - began
        yielded &= now.keys()
        for identity, file in now.items():
            if identity in before and identity not in yielded:
                yielded.add(identity)
                yield from file.items()
        before = set(now)
        time.sleep(max(_WATCH_SECONDS, 5 * looked))  # a folder of very many files costs a sixth of a core at most


# ------------------------------------------------------------------------------------------------ lists


def _list(path: Path) -> Files:
    """One image, archive, ``ARCHIVE#MEMBER`` or URL a line, relative to the list's folder; ``#`` begins a comment.

    A table with a column of images is read as one. ``-`` is standard input, whose lines are answered as they come.
    """
    if path == Path("-"):
        return (_listed(line.rstrip("\n"), Path()) for line in sys.stdin if line.strip())
    if not os.path.isfile(path):
        raise DataError(f"no such list: {path} (@FILE names a text file with one image path a line)")
    if path.name.lower().endswith(TABLES) and (columns := table_columns(path, _OLD_NAMES)) and path_column(columns):
        return _table(path)
    return _first(_lines(path), DataError(f"{path}: the list holds no path"))


def _lines(path: Path) -> Files:
    with open_text(path, _OLD_NAMES) as file:
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


def _table(path: Path) -> Files:
    """Images of a manifest, or of a Parquet file that holds encoded images itself."""
    if path.suffix.lower() == ".parquet":
        column, encoded = streams.image_column(str(path))
        if encoded:
            return iter([Stream(str(path))])
    else:
        deque(read_table(path, errors=_OLD_NAMES), maxlen=0)  # a row that cannot be read is found before the work
        columns = table_columns(path, _OLD_NAMES)
        column = path_column(columns)
        if columns and not column:
            raise DataError(f"{path}: columns {', '.join(columns)}; a column image (paths) is needed")
    images = _manifest(read_table(path, (column, "record"), _OLD_NAMES), column, path)
    return _first(images, DataError(f"{path}: holds no row"))


def _manifest(rows: Iterable[dict[str, Any]], column: str, path: Path) -> Iterator[Item]:
    for number, row in enumerate(rows, start=1):
        text, where = str(row.get(column) or ""), f"{path} row {number}"
        try:
            file, record = str(inside(path.parent, text, where)), record_number(row.get("record"), where)
        except DataError as error:
            yield Item(text, error=str(error))
            continue
        yield Item(file, file) if record is None else Item(f"{file}#{record}", file, record=record)


def by_name(name: str) -> Item:
    """The image that a row of results calls so, also inside an archive, a video or a table."""
    if (match := _MEMBER.search(name)) and not os.path.lexists(name):
        images = Stream(name[: match.end() - 1]).items()
        return next((image for image in images if image.name == name), Item(name, error=f"{name}: not in the file"))
    file, mark, record = name.rpartition("#")
    if mark and record.isdecimal() and not os.path.exists(name) and os.path.isfile(file):
        return Item(name, file, record=int(record))
    return Item(name, name)
