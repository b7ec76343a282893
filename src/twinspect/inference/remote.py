"""Files that are not on this disk: object stores by URL, through pyarrow's file systems, else fsspec's. No torch.

``s3://``, ``gs://``, ``abfs://``, ``hdfs://`` and ``file://`` need pyarrow alone; any other scheme goes to fsspec,
whose packages (such as ``adlfs``) the user installs. Credentials are those of the environment.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from twinspect.data.scan import is_hidden
from twinspect.errors import DataError

_PIECE = 1 << 22
_OBJECT_STORES = ("s3", "gcs", "abfs")  # as pyarrow calls them; they have no folders to make
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(text: str) -> bool:
    """Whether a text names a file by URL (``scheme://...``)."""
    return _SCHEME.match(text) is not None


def below(url: str) -> Iterator[tuple[str, str]]:
    """URLs of the files at or below a URL, each with its `state`, depth first and sorted by name.

    One folder's names are in memory at a time. Hidden folders are passed over, no folder of this disk is read twice.

    Raises:
        DataError: nothing there, no such scheme, or no access.
    """
    from pyarrow import fs

    url = url.rstrip("/")
    system, path = _opened(url)
    try:
        (info,) = system.get_file_info([path])
        if info.type == fs.FileType.File:
            yield url, _state(info)
        elif info.type == fs.FileType.Directory:
            yield from _folder(system, path, url, set())
        else:
            raise DataError(f"nothing found at {url}")
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{url} cannot be listed ({_short(error)})") from None


def _folder(system: Any, path: str, url: str, visited: set[str]) -> Iterator[tuple[str, str]]:
    from pyarrow import fs

    real = os.path.realpath(path) if system.type_name == "local" else path  # links may lead back
    if real in visited:
        return
    visited.add(real)
    for info in sorted(system.get_file_info(fs.FileSelector(path)), key=lambda one: str(one.base_name)):
        here = f"{url}/{info.base_name}"
        if info.type == fs.FileType.Directory and not is_hidden(info.base_name):
            yield from _folder(system, info.path, here, visited)
        elif info.type == fs.FileType.File:
            yield here, _state(info)


def state(url: str) -> str:
    """Size and time of change of a file, as text; empty where they are not known."""
    try:
        system, path = _opened(url)
        (info,) = system.get_file_info([path])
    except (OSError, ValueError):
        return ""
    return _state(info)


def _state(info: Any) -> str:
    return f"{info.size}-{info.mtime_ns}" if info.size is not None else ""


def open_stream(url: str) -> Any:
    """A file object that reads a URL from its start; closing it is the caller's.

    Raises:
        DataError: it cannot be opened.
    """
    folder, _, name = url.rpartition("/")
    try:
        system, path = _opened(folder)
        return system.open_input_stream(f"{path}/{name}")
    except (OSError, ValueError) as error:
        raise DataError(f"{url}: cannot be opened ({_short(error)})") from None


def read(url: str, most: int) -> bytes:
    """Content of a URL, refused above ``most`` bytes.

    Raises:
        DataError: it cannot be read, or is longer.
    """
    parts, length = list[bytes](), 0
    with open_stream(url) as stream:
        try:
            while part := stream.read(_PIECE):  # asked for more, pyarrow would set that much memory aside at once
                parts.append(part)
                length += len(part)
                if length > most:
                    raise DataError(f"{url}: more than {most:,} bytes; a file of that size is not read")
        except OSError as error:
            raise DataError(f"{url}: cannot be read ({_short(error)})") from None
    return b"".join(parts)


def put(folder: str, name: str, body: bytes) -> None:
    """Write one object whole: object stores show it when it is complete, other systems by a rename at the end.

    Raises:
        DataError: it cannot be written.
    """
    try:
        system, path = _opened(folder)
        shown_when_whole = any(kind in system.type_name for kind in _OBJECT_STORES)
        target = f"{path}/{name}" if shown_when_whole else f"{path}/_tmp-{uuid.uuid4().hex}"
        if not shown_when_whole:
            system.create_dir(path, recursive=True)
        with system.open_output_stream(target) as stream:
            stream.write(body)
        if not shown_when_whole:
            system.move(target, f"{path}/{name}")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}/{name} cannot be written ({_short(error)})") from None


def names(folder: str) -> list[str]:
    """Names of the files directly in a folder; empty where there is no such folder.

    Raises:
        DataError: it cannot be listed.
    """
    from pyarrow import fs

    try:
        system, path = _opened(folder)
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} cannot be listed ({_short(error)})") from None
    return [str(one.base_name) for one in found if one.type == fs.FileType.File]


def remove(folder: str, name: str) -> None:
    """Delete one file."""
    system, path = _opened(folder)
    system.delete_file(f"{path}/{name}")


@lru_cache(maxsize=64)
def _opened(folder: str) -> tuple[Any, str]:
    """File system and path of a folder's URL; kept, as opening one may ask the store for its region."""
    try:
        from pyarrow import fs
    except ImportError:
        raise DataError(f"{folder}: URLs need pyarrow; type: pip install pyarrow") from None
    try:
        system, path = fs.FileSystem.from_uri(folder)
        return system, str(path).rstrip("/")
    except (ValueError, NotImplementedError, OSError) as error:
        return _by_fsspec(folder, error)


def _by_fsspec(folder: str, reason: Exception) -> tuple[Any, str]:
    from pyarrow import fs

    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(folder)
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"{folder}: no file system for it ({_short(reason)}; fsspec: {_short(error)})") from None
    return fs.PyFileSystem(fs.FSSpecHandler(system)), str(path).rstrip("/")


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
