"""Files: text in the encodings that editors write, outputs that appear whole or not at all, and files by URL.

URLs go through fsspec. For most schemes it needs a package of its own (``s3://``: s3fs, ``gs://``: gcsfs, ``abfs://``:
adlfs), whose name stands in the error where it is missing. Credentials are those of the environment.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, TextIO

from twinspect.errors import ConfigError, DataError, OutputError, TwinspectError

DRAFT = "_tmp-"  # how the names of files begin that are being written; readers of Parquet folders pass over them
_PIECE = 1 << 22
_OBJECT_STORES = ("s3://", "gs://", "gcs://", "abfs://", "az://")  # show a file when it is complete; have no folders
_CHANGED = ("mtime", "ETag", "last_modified", "LastModified", "updated", "created")  # what stores say of a change
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# UTF-32 comes first: its little-endian mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


@contextmanager
def open_text(path: Path, errors: str = "strict", newline: str | None = None) -> Iterator[TextIO]:
    """A text file to read, in the encoding that its byte order mark names, else UTF-8; arguments as of `open`.

    Windows writes such marks: Notepad before UTF-8, PowerShell before UTF-16. Raises DataError where the file cannot
    be opened or read, or is no text.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
        encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")
        if errors != "strict" and encoding != "utf-8":
            errors = "replace"  # surrogate escapes stand for single bytes, which UTF-16 does not have
        with path.open(encoding=encoding, errors=errors, newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_text(path: Path) -> str:
    """Content of a text file, as `open_text` opens it."""
    with open_text(path) as file:
        return file.read()


def sha256_of(path: Path) -> str:
    """Sha256 of a file's bytes as 64 hex digits, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path, flushed: bool = True) -> Iterator[IO[bytes]]:
    """A file to write. It takes its name when it is whole, so that a crash or a full disk leaves the old one.

    A device or pipe is written as it is. The file's folder is made. ``flushed`` means to the disk, so that the file
    outlives a crash of the machine. Raises OutputError if it cannot be written.
    """
    draft = _draft(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        with draft.open("wb") as file:
            locked = _locked(file)
            yield file
            file.flush()
            if flushed and draft != path:
                os.fsync(file.fileno())
            if locked and draft != path:
                os.replace(draft, path)  # while it is locked, so that nobody takes it for a dead writer's
        if not locked and draft != path:
            os.replace(draft, path)
    except OSError as reason:
        raise OutputError(f"{path} cannot be written ({reason.strerror or reason})") from None
    finally:
        if draft != path:
            with suppress(OSError):
                draft.unlink()


def near_names(path: Path) -> str:
    """A question that names what lies beside a path that is not there and is called alike; empty without any."""
    near: list[str] = []
    with suppress(OSError):
        near = get_close_matches(path.name, os.listdir(path.parent), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(str(path.parent / name)) for name in near)}?" if near else ""


def write_text(path: Path, text: str) -> Path:
    """Write a text file as `replacing` does; what is no UTF-8 in it, such as old file names, is escaped."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
    return path


def refuse_unwritable(path: Path, option: str, example: str = "", ours: Callable[[Path], bool] | None = None) -> None:
    """Find out before the work whether its result can be written, by an OutputError; the result's folder is made.

    ``option`` of the command line names the path. ``example`` is a file's name, for people who named a folder.
    ``ours`` says whether a file that is there may be replaced; None: every one.
    """
    other = f"choose another {option}"
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder; {other}" + (f", such as {path / example}" if example else ""))
        why = "" if _is_special(path) else why_unwritable(path.parent, path.name)
        if path.exists() and not os.access(path, os.W_OK):
            why = "no permission"
        if why:
            raise OutputError(f"{path} cannot be written ({why}); {other}")
        if ours is not None and path.is_file() and path.stat().st_size and not ours(path):
            raise OutputError(f"{path} exists and holds something else; move it away, or {other}")
    except OSError as reason:
        raise OutputError(f"{path} cannot be written ({reason.strerror or reason}); {other}") from None


def lock(path: Path, busy: str) -> IO[str]:
    """Keep other processes out until the returned file is closed, or this process ends, however it does.

    Where another holds it: a ConfigError with the message ``busy``.
    """
    file = path.open("w")
    if _locked(file) is False:
        file.close()
        raise ConfigError(busy)
    return file


def _locked(file: IO[Any]) -> bool | None:
    """Lock a file until it is closed; False where another process has it, None on a system without such locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # two runs at once are then the user's to avoid
        return None
    except OSError:
        return False
    return True


def why_unwritable(folder: Path, name: str = "probe") -> str:
    """Why no file of that name can be made in a folder, which is made if it is not there; empty if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _draft(folder / name)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _draft(path: Path) -> Path:
    # Two machines may write the same file, one of them given up for lost: each draft has a name of its own.
    return path if _is_special(path) else path.with_name(f"{_drafts_of(path)}{uuid.uuid4().hex}")


def _drafts_of(path: Path) -> str:
    """How the names of a file's drafts begin; not with its own name, which may be as long as names can be."""
    return f"{DRAFT}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}-"


def _sweep(path: Path) -> None:
    """Delete drafts of a file whose writers were killed: those that nobody has locked."""
    for draft in path.parent.glob(f"{_drafts_of(path)}*"):
        with suppress(OSError), draft.open("rb") as file:
            if _locked(file):
                draft.unlink()


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, which is written as it is."""
    return path.exists() and not path.is_file()


def cache_home() -> Path:
    """Folder of fetched weights and features: ``TWINSPECT_HOME``, or ours in the user's cache folder."""
    if home := os.environ.get("TWINSPECT_HOME"):
        return Path(home)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # "~" stays where a user has neither HOME nor an entry of his own; containers set HOME=/ for such users.
    return Path(cache.removeprefix("~")) / "twinspect"


# ---------------------------------------------------------------------------------------- by path or by URL


def is_url(text: str) -> bool:
    """Whether a text names a file by URL (``scheme://...``)."""
    return _SCHEME.match(text) is not None


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
