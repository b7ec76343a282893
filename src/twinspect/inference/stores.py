"""Files by path or by URL. No torch.

URLs go through fsspec. For most schemes it needs a package of its own (``s3://``: s3fs, ``gs://``: gcsfs, ``abfs://``:
adlfs), whose name stands in the error where it is missing. Credentials are those of the environment.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twinspect.errors import DataError, OutputError, TwinspectError
from twinspect.files import DRAFT, replacing

_PIECE = 1 << 22
_OBJECT_STORES = ("s3://", "gs://", "gcs://", "abfs://", "az://")  # show a file when it is complete; have no folders
_CHANGED = ("mtime", "ETag", "last_modified", "LastModified", "updated", "created")  # what stores say of a change
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
CAMERA = "camera:"
STDIN = "@-"  # a list that others write while it is read
_ENDLESS = (CAMERA, "rtsp://", "rtsps://", "rtmp://", "udp://", "tcp://")


def is_url(text: str) -> bool:
    """Whether a text names a file by URL (``scheme://...``)."""
    return _SCHEME.match(text) is not None


def is_endless(source: object) -> bool:
    """Whether a source is a camera (``camera:0``) or a stream of video from the network."""
    return isinstance(source, str) and source.lower().startswith(_ENDLESS)


def is_live(source: object) -> bool:
    """Whether images of a source may still be in the making, so that none is to be read ahead."""
    return source == STDIN or is_endless(source)


def status(url: str) -> tuple[bool, str]:
    """Whether a URL is a folder, and its `state`; a DataError where nothing is there, or it cannot be reached."""
    system, path = _opened(url)
    with _refusing(f"{url} cannot be listed", DataError):
        try:
            info = system.info(path)
        except FileNotFoundError:
            raise DataError(f"nothing found at {url}") from None
    return info["type"] == "directory", _state(info)


def entries(url: str) -> list[tuple[str, bool, str]]:
    """Name, whether it is a folder, and `state` of all that lies directly in a folder, sorted by name."""
    system, path = _opened(url)
    with _refusing(f"{url} cannot be listed", DataError):
        system.invalidate_cache()  # other machines write as well
        try:
            infos = system.ls(path, detail=True)
        except FileNotFoundError:
            infos = []
    inside = [info for info in infos if info["name"].strip("/") != path.strip("/")]  # some stores list the folder too
    return sorted((Path(info["name"]).name, info["type"] == "directory", _state(info)) for info in inside)


def state(path: str) -> str:
    """Size and time of change of a file, as text; empty where they are not known."""
    try:
        if is_url(path):
            return status(path)[1]
        local = os.stat(path)
        return f"{local.st_size}-{local.st_mtime_ns}"
    except (OSError, ValueError):  # ValueError: the name holds a zero byte, or a DataError
        return ""


def _state(info: Mapping[str, Any]) -> str:
    changed = next((info[key] for key in _CHANGED if info.get(key)), "")
    return f"{info['size']}-{changed}" if info.get("size") is not None else ""


def open_file(path: str) -> Any:
    """A file object for reading that can seek. Where that fails: an OSError for a path, a DataError for a URL."""
    if not is_url(path):
        return open(path, "rb")
    system, inner = _opened(path)
    with _refusing(f"{path}: cannot be opened", DataError):
        return system.open(inner, "rb")


def read(path: str, most: int) -> bytes:
    """Content of a file; a DataError where it cannot be read or is longer than ``most`` bytes."""
    parts, length = list[bytes](), 0
    with _refusing(f"{path}: cannot be read", DataError), open_file(path) as file:
        while part := file.read(_PIECE):  # asked for all at once, it may set ``most`` bytes aside
            parts.append(part)
            length += len(part)
            if length > most:
                raise DataError(f"{path}: more than {most:,} bytes; a file of that size is not read")
    return b"".join(parts)


def put(folder: str, name: str, body: bytes, flushed: bool = True) -> None:
    """Write a file whole: under its name it is complete or not there. An OutputError where it cannot be written.

    The folder, a path or URL, is made. ``flushed`` as of `files.replacing`.
    """
    if not is_url(folder):
        with replacing(Path(folder) / name, flushed) as file:
            file.write(body)
        return
    with _refusing(f"{folder.rstrip('/')}/{name} cannot be written", OutputError):
        system, path = _opened(folder)
        draft = f"{DRAFT}{uuid.uuid4().hex}"
        if folder.startswith(_OBJECT_STORES):
            system.pipe_file(f"{path}/{name}", body)
        else:
            system.makedirs(path, exist_ok=True)
            system.pipe_file(f"{path}/{draft}", body)
            system.mv(f"{path}/{draft}", f"{path}/{name}")


def names(folder: str) -> list[str]:
    """Names of the files directly in a folder, sorted; none where there is no such folder."""
    if is_url(folder):
        return [name for name, is_folder, _ in entries(folder) if not is_folder]
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def remove(folder: str, name: str) -> None:
    """Delete one file."""
    if is_url(folder):
        system, path = _opened(folder)
        system.rm_file(f"{path}/{name}")
    else:
        (Path(folder) / name).unlink(missing_ok=True)


@contextmanager
def _refusing(what: str, kind: type[TwinspectError]) -> Iterator[None]:
    """Errors of a file system as one of ours: what cannot be done, and why."""
    try:
        yield
    except TwinspectError:
        raise
    except Exception as error:  # packages of stores raise kinds of their own, such as botocore's
        raise kind(f"{what} ({_short(error)})") from None


def _opened(url: str) -> tuple[Any, str]:
    """File system of a URL (fsspec keeps it), and the path in it."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:  # an ImportError says what to install
        raise DataError(f"{url}: no file system for it ({_short(error)})") from None
    return system, str(path).rstrip("/")


def _short(error: Exception) -> str:
    words = getattr(error, "strerror", None) or str(error)
    return words.splitlines()[0][:200] if words else type(error).__name__
