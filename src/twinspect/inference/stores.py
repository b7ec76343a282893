"""Files by path or URL. URLs go through pyarrow's file systems, else fsspec's. No torch.

``s3://``, ``gs://``, ``abfs://``, ``hdfs://`` and ``file://`` need pyarrow alone; any other scheme goes to fsspec,
whose packages (such as ``adlfs``) the user installs. Credentials are those of the environment.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from twinspect.data.scan import is_hidden
from twinspect.errors import DataError, TwinspectError

DRAFT = "_tmp-"  # how the names of files begin that are being written
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
    url = url.rstrip("/")
    with _refusing(f"{url} cannot be listed", DataError):
        system, path = _opened(url)
        (info,) = system.get_file_info([path])
        if info.is_file:
            yield url, _state(info)
        elif info.type.name == "Directory":
            yield from _folder(system, path, url, set())
        else:
            raise DataError(f"nothing found at {url}")


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


def state(path: str) -> str:
    """Size and time of change of a file, as text; empty where they are not known."""
    try:
        if not is_url(path):
            status = os.stat(path)
            return f"{status.st_size}-{status.st_mtime_ns}"
        system, inner = _opened(path)
        (info,) = system.get_file_info([inner])
    except (OSError, ValueError):  # ValueError: the name holds a zero byte
        return ""
    return _state(info)


def _state(info: Any) -> str:
    return f"{info.size}-{info.mtime_ns}" if info.size is not None else ""


def open_stream(path: str) -> Any:
    """A file object that reads a file from its start; closing it is the caller's.

    Raises:
        DataError: a URL that cannot be opened.
        OSError: a path that cannot be opened.
    """
    if not is_url(path):
        return open(path, "rb")
    folder, _, name = path.rpartition("/")
    with _refusing(f"{path}: cannot be opened", DataError):
        system, inner = _opened(folder)
        return system.open_input_stream(f"{inner}/{name}")


def read(path: str, most: int) -> bytes:
    """Content of a file, refused above ``most`` bytes.

    Raises:
        DataError: it cannot be read, or is longer.
    """
    parts, length = list[bytes](), 0
    with _refusing(f"{path}: cannot be read", DataError), open_stream(path) as stream:
        while part := stream.read(_PIECE):  # asked for more, pyarrow would set that much memory aside at once
            parts.append(part)
            length += len(part)
            if length > most:
                raise DataError(f"{path}: more than {most:,} bytes; a file of that size is not read")
    return b"".join(parts)


def put(folder: str, name: str, body: bytes, flushed: bool = True) -> None:
    """Write one file whole: object stores show it when it is complete, other systems by a rename at the end.

    Args:
        folder: path or URL; it is made.
        name: of the file.
        body: its content.
        flushed: to the disk, so that it outlives a crash of the machine.

    Raises:
        TwinspectError: it cannot be written.
    """
    # Two workers may write the same file, one of them given up for lost: each draft has a name of its own.
    draft = f"{DRAFT}{uuid.uuid4().hex}"
    with _refusing(f"{folder.rstrip('/')}/{name} cannot be written", TwinspectError):
        if not is_url(folder):
            _put_here(Path(folder), draft, name, body, flushed)
            return
        system, path = _opened(folder.rstrip("/"))
        if any(kind in system.type_name for kind in _OBJECT_STORES):
            draft = name
        else:
            system.create_dir(path, recursive=True)
        with system.open_output_stream(f"{path}/{draft}") as stream:
            stream.write(body)
        if draft != name:
            system.move(f"{path}/{draft}", f"{path}/{name}")


def _put_here(folder: Path, draft: str, name: str, body: bytes, flushed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / draft).open("wb") as file:
            file.write(body)
            if flushed:
                file.flush()
                os.fsync(file.fileno())
        os.replace(folder / draft, folder / name)
    finally:
        (folder / draft).unlink(missing_ok=True)


def names(folder: str) -> list[str]:
    """Names of the files directly in a folder, sorted; empty where there is no such folder.

    Raises:
        DataError: it cannot be listed.
    """
    if not is_url(folder):
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    with _refusing(f"{folder} cannot be listed", DataError):
        system, path = _opened(folder)
        from pyarrow import fs

        inside = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(str(info.base_name) for info in inside if info.type == fs.FileType.File)


def remove(folder: str, name: str) -> None:
    """Delete one file."""
    if is_url(folder):
        system, path = _opened(folder)
        system.delete_file(f"{path}/{name}")
    else:
        (Path(folder) / name).unlink(missing_ok=True)


@contextmanager
def _refusing(what: str, kind: type[TwinspectError]) -> Iterator[None]:
    """Errors of a file system as one of ours: what cannot be done, and why."""
    try:
        yield
    except TwinspectError:
        raise
    except (OSError, ValueError) as error:
        raise kind(f"{what} ({_short(error)})") from None


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
    words = getattr(error, "strerror", None) or str(error)
    return words.splitlines()[0][:200] if words else type(error).__name__
