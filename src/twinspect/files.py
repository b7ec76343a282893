"""Files: text in the encodings that editors write, outputs that appear whole or not at all, the folder of caches."""

from __future__ import annotations

import codecs
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import IO, TextIO

from twinspect.errors import ConfigError, DataError, OutputError

DRAFT = "_tmp-"  # how the names of files begin that are being written; readers of Parquet folders pass over them
# UTF-32 comes first: its little-endian mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def open_text(path: Path, errors: str = "strict", newline: str | None = None) -> TextIO:
    """A text file, opened in the encoding that its byte order mark names, else UTF-8; arguments as of `open`.

    Windows writes such marks: Notepad before UTF-8, PowerShell before UTF-16. Raises DataError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
        encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")
        if errors != "strict" and encoding != "utf-8":
            errors = "replace"  # surrogate escapes stand for single bytes, which UTF-16 does not have
        return path.open(encoding=encoding, errors=errors, newline=newline)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_text(path: Path) -> str:
    """Content of a text file; a DataError where it cannot be read, or is no text. Encodings as in `open_text`."""
    try:
        with open_text(path) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


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
        with draft.open("wb") as file:
            yield file
            file.flush()
            if flushed and draft != path:
                os.fsync(file.fileno())
        if draft != path:
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
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # a system without it: two runs at once are then the user's to avoid
        return file
    except OSError:
        file.close()
        raise ConfigError(busy) from None
    return file


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
    return path if _is_special(path) else path.with_name(f"{DRAFT}{uuid.uuid4().hex}")


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
