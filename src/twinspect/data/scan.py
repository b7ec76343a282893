"""Look into folders without falling over: stray files, links that loop, odd names, paths that escape.

Every loader reports what it left out through a ``ScanLog``, so that ``load`` can say it once, in words.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from twinspect.data.images import UNREAD_SUFFIXES, is_image
from twinspect.errors import DataError

_NOT_IMAGE = "not an image file"
_UNREAD = "a picture in a format that is not read; save it as PNG or JPEG"
_UNLISTED = "cannot be listed"
_READ_BEFORE = "link to a folder that was already read"
# Folders that systems make, with copies, thumbnails or what was deleted.
_SYSTEM = frozenset({"__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle"})
_caches: list[Any] = []
T = TypeVar("T")


def once(function: Callable[[Path], T]) -> Callable[[Path], T]:
    """A function of a folder that is asked once for each `looking_anew`: a layout is known after many looks."""
    cached = lru_cache(maxsize=None)(function)
    _caches.append(cached)
    return cached


@contextmanager
def looking_anew() -> Iterator[None]:
    """Inside, every folder is looked at once. Nothing is known of it before, and nothing is kept afterwards."""
    try:
        for cached in _caches:
            cached.cache_clear()
        yield
    finally:
        for cached in _caches:
            cached.cache_clear()


@dataclass(slots=True)
class ScanLog:
    """What a loader left out and what its user should know."""

    skipped: dict[tuple[Path, str], None] = field(default_factory=dict)  # path and reason, in the order met
    notes: list[str] = field(default_factory=list)  # choices made for the user, in sentences
    undecided: list[tuple[Path, str]] = field(default_factory=list)  # of those skipped: nobody asked to leave it out

    def skip(self, path: Path, reason: str) -> None:
        """Remember a file or folder that is not used."""
        self.skipped[path, reason] = None

    def take_back(self, path: Path) -> None:
        """Forget a file that was met before somebody had a better reason for it."""
        for reason in (_NOT_IMAGE, _UNREAD):
            self.skipped.pop((path, reason), None)

    def leave(self, path: Path, reason: str) -> None:
        """Remember a folder of images that cannot be used as it is, so that its user has to decide."""
        self.skip(path, reason)
        self.undecided.append((path, reason))

    def note(self, text: str) -> None:
        """Remember a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)


def existing_root(root: Path | str) -> Path:
    """The path with ``~`` expanded; an error with the nearest names if nothing is there."""
    path = Path(root)
    try:
        path = path.expanduser()
        path.stat()
        return path
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (ValueError, RuntimeError) as error:  # a zero byte in it; ~ of a user that is not there
        raise DataError(f"{str(path)!r}: no path of this system ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be reached ({error.strerror or error})") from None
    near: list[str] = []
    with suppress(OSError):
        near = get_close_matches(path.name, os.listdir(path.parent), n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(str(path.parent / n)) for n in near)}?" if near else ""
    raise DataError(f"{path}: no such file or folder.{hint}")


def existing_folder(root: Path | str) -> Path:
    """Like ``existing_root``, and it must be a folder that can be listed."""
    path = existing_root(root)
    if not os.path.isdir(path):
        raise DataError(f"{path}: is a file, and a folder is needed; name the folder that holds it")
    try:
        os.scandir(path).close()
    except OSError as error:
        raise DataError(f"{path}: {_UNLISTED} ({error.strerror or error})") from None
    return path


def subfolders(folder: Path) -> list[Path]:
    """Visible folders directly inside, sorted by name; empty if there is no such folder."""
    return list(_content(folder).folders)


def files_in(folder: Path) -> list[Path]:
    """Visible files directly inside, sorted by name."""
    content = _content(folder)
    return sorted((*content.images, *content.others))


def walk(folder: Path, log: ScanLog) -> Iterator[tuple[Path, list[Path], list[Path]]]:
    """Every visible folder from ``folder`` on, sorted, with the images and the other files directly in it.

    Each real folder is visited once, so links cannot loop. Where there are images, other files are logged.
    """
    visited: set[str] = set()
    stack = [folder]
    while stack:
        here = stack.pop()
        real = os.path.realpath(here)
        if real in visited:
            log.skip(here, _READ_BEFORE)
            continue
        visited.add(real)
        content = _content(here)
        for path, reason in content.left_out:
            log.skip(path, reason)
        if content.images or not content.folders:  # a licence beside folders is no news
            for path, reason in content.unusable:
                log.skip(path, reason)
            for path in content.others:
                log.skip(path, _UNREAD if path.suffix.lower() in UNREAD_SUFFIXES else _NOT_IMAGE)
        yield here, list(content.images), list(content.others)
        stack.extend(reversed(content.folders))


def images_below(folder: Path, log: ScanLog) -> list[Path]:
    """Images at any depth, sorted by path."""
    return sorted(image for _, images, _ in walk(folder, log) for image in images)


def has_images(folder: Path) -> bool:
    """Whether at least one image lies directly inside."""
    return bool(_content(folder).images)


@once
def has_images_below(folder: Path) -> bool:
    """Whether at least one image lies inside at any depth."""
    return any(images for _, images, _ in walk(folder, ScanLog()))


def why_without_images(folder: Path) -> str:
    """The reason for which no image was found below a folder."""
    log = ScanLog()
    images_below(folder, log)
    return next((f"{path}: {why}" for path, why in log.skipped if why.startswith(_UNLISTED)), "folder without images")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is passed over in a folder: hidden, or made by the system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def folder_name(folder: Path) -> str:
    """Name of a folder, also for ``.`` and ``/``."""
    return folder.name or folder.resolve().name or "root"


def listing(folder: Path, limit: int = 8) -> str:
    """Names inside a folder for an error message."""
    if not os.path.isdir(folder):
        return "a file"
    names: list[str] = []
    with suppress(OSError):
        names = sorted(name + "/" * os.path.isdir(folder / name) for name in os.listdir(folder))
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) if names else "nothing"


def first_lines(problems: Iterable[str], limit: int = 5) -> str:
    """The first of what is wrong as lines of an error message, and how many more there are."""
    lines = list(problems)
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "".join(f"\n  {line}" for line in lines[:limit] + more)


def inside(root: Path, text: str, where: str) -> Path:
    """Path named by a split file, below ``root``; also with Windows separators or other Unicode forms.

    Links that the owner of the data made are followed; a name that climbs out of ``root`` is refused.

    Raises:
        DataError: ``where`` (file and row), the name and why it is refused.
    """
    posix = text.strip().replace("\\", "/")
    if not posix or "\0" in posix:
        raise DataError(f"{where}: the path is {text!r}; a path below {root} is needed")
    # ``C:/x`` anywhere; ``C:x`` only where it means a drive, as it is a good file name elsewhere.
    drive = posix[:1].isalpha() and posix[1:2] == ":" and (posix[2:3] in ("/", "") or os.name == "nt")
    if PurePosixPath(posix).is_absolute() or drive:
        path = Path(os.path.normpath(posix))
        if not path.is_relative_to(os.path.abspath(root)):
            raise DataError(f"{where}: {posix!r} points outside {root}; write paths relative to that folder")
        return path
    plain = posixpath.normpath(posix)
    if plain.split("/")[0] == "..":
        raise DataError(f"{where}: {text!r} points outside {root}; only files below it are read")
    # A list written on another system may spell an accented letter in the other Unicode form.
    spellings = [plain, unicodedata.normalize("NFC", plain), unicodedata.normalize("NFD", plain)]
    if "\\" in text and "/" not in text and os.sep == "/":
        spellings.append(text)  # a real backslash in a POSIX file name
    return next((root / name for name in spellings if os.path.exists(root / name)), root / plain)


def relative_to_root(path: Path, root: Path) -> str:
    """Path below ``root`` with forward slashes, for a list."""
    absolute, base = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    if not absolute.is_relative_to(base):
        raise DataError(f"{path}: not below {root}; lists hold paths relative to one folder")
    return absolute.relative_to(base).as_posix()


class _Content(NamedTuple):
    """What is directly in a folder, each kind sorted by name. It is shared, and must not be changed."""

    folders: list[Path]  # visible ones, and links to folders that do not lead upwards
    images: list[Path]
    others: list[Path]  # other visible files
    unusable: list[tuple[Path, str]]  # hidden files, links that lead nowhere and devices, with that reason
    left_out: list[tuple[Path, str]]  # links upwards, or the folder itself if it cannot be listed, with the reason


@once
def _content(folder: Path) -> _Content:
    content = _Content([], [], [], [], [])
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path, linked = folder / entry.name, entry.is_symlink()
                # What is beside a link to a folder that it lies in is not a part of this folder.
                if linked and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path)):
                    content.left_out.append((path, _READ_BEFORE))
                elif os.path.isdir(path) if linked else entry.is_dir():
                    content.folders.extend([] if is_hidden(entry.name) else [path])
                elif is_hidden(entry.name):
                    content.unusable.append((path, "hidden file"))
                elif not (os.path.isfile(path) if linked else entry.is_file()):
                    content.unusable.append((path, "broken link"))
                else:
                    (content.images if is_image(entry.name) else content.others).append(path)
    except OSError as error:
        content.left_out.append((folder, f"{_UNLISTED} ({error.strerror or error})"))
    return content
