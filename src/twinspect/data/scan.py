"""Look into folders without falling over: stray files, links that loop, odd names, paths that escape.

Every loader reports what it left out through a ``ScanLog``, so that ``load`` can say it once, in words.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import wraps
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from twinspect.data.images import UNREAD_SUFFIXES, is_image
from twinspect.errors import DataError

NOT_IMAGE = "not an image file"
UNREAD = "a picture in a format that is not read; save it as PNG or JPEG"
HIDDEN = "hidden file"
_UNLISTED = "cannot be listed"
READ_BEFORE = "link to a folder that was already read"
# Folders that systems make, with copies, thumbnails or what was deleted.
_SYSTEM = frozenset({"__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle"})


_remembered: ContextVar[dict[tuple[object, Path], Any] | None] = ContextVar("remembered", default=None)
T = TypeVar("T")


@contextmanager
def listing_once() -> Iterator[None]:
    """Inside, every folder is listed once: it is looked into many times until its layout is known."""
    token = _remembered.set({}) if _remembered.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _remembered.reset(token)


def once(function: Callable[[Path], T]) -> Callable[[Path], T]:
    """A function of a folder that is asked once for each inside `listing_once`."""

    @wraps(function)
    def asked(folder: Path) -> T:
        known = _remembered.get()
        if known is None:
            return function(folder)
        if (function, folder) not in known:
            known[function, folder] = function(folder)
        answer: T = known[function, folder]
        return answer

    return asked


@dataclass(slots=True)
class ScanLog:
    """What a loader left out and what its user should know.

    Attributes:
        skipped: path and reason, in the order met.
        notes: sentences about choices made for the user.
        undecided: folders of images, among those skipped, that nobody asked to leave out.
    """

    skipped: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    undecided: list[tuple[Path, str]] = field(default_factory=list)

    def skip(self, path: Path, reason: str) -> None:
        """Remember a file or folder that is not used."""
        self.skipped.append((path, reason))

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
    content = _listing(path.parent)
    names = [entry.name for entry in (*content.folders, *content.files)]
    near = get_close_matches(path.name, names, n=3, cutoff=0.6)
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
    return [sub for sub in _listing(folder).folders if not is_hidden(sub.name)]


def files_in(folder: Path) -> list[Path]:
    """Visible files directly inside, sorted by name."""
    return list(_listing(folder).plain)


def walk(folder: Path, log: ScanLog) -> Iterator[tuple[Path, list[Path], list[Path]]]:
    """Every visible folder from ``folder`` on, sorted, with the images and the other files directly in it.

    Each real folder is visited once, so links cannot loop. Where there are images, other files are logged.
    """
    for here, content in _folders_below(folder, log):
        log.skipped += content.skipped
        files = content.files
        # A licence beside folders is no news.
        quiet = log if any(map(is_image, files)) or not content.folders else ScanLog()
        images = [path for path in files if _accept(path, content.broken, quiet)]
        yield here, images, [path for path in files if not is_image(path) and not is_hidden(path.name)]


def images_below(folder: Path, log: ScanLog) -> list[Path]:
    """Images at any depth, sorted by path."""
    return sorted(image for _, images, _ in walk(folder, log) for image in images)


def has_images(folder: Path) -> bool:
    """Whether at least one image lies directly inside."""
    return any(map(is_image, _listing(folder).plain))


@once
def has_images_below(folder: Path) -> bool:
    """Whether at least one image lies inside at any depth."""
    return any(has_images(here) for here, _ in _folders_below(folder, ScanLog()))


def unread_picture(folder: Path) -> Path | None:
    """A picture in a format that is not read, at any depth."""
    files_below = (path for _, _, files in walk(folder, ScanLog()) for path in files)
    return next((path for path in files_below if path.suffix.lower() in UNREAD_SUFFIXES), None)


def why_without_images(folder: Path) -> str:
    """The reason for which no image was found below a folder."""
    log = ScanLog()
    for _ in walk(folder, log):
        pass
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
    content = _listing(folder)
    names = sorted([f"{sub.name}/" for sub in content.folders] + [path.name for path in content.files])
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return (", ".join(names[:limit]) + more) if names else "nothing"


def inside(root: Path, text: str, where: str) -> Path:
    """Path named by a split file, below ``root``; also with Windows separators or other Unicode forms.

    Links that the owner of the data made are followed; a name that climbs out of ``root`` is refused.

    Raises:
        DataError: ``where`` (file and row), the name and why it is refused.
    """
    posix = text.strip().replace("\\", "/")
    if not posix or "\0" in posix:
        raise DataError(f"{where}: the path is {text!r}; a path below {root} is needed")
    relative = PurePosixPath(posix)
    # ``C:/x`` anywhere; ``C:x`` only where it means a drive, as it is a good file name elsewhere.
    drive = posix[:1].isalpha() and posix[1:2] == ":" and (posix[2:3] in ("/", "") or os.name == "nt")
    if relative.is_absolute() or drive:
        path = Path(os.path.normpath(posix))
        if not path.is_relative_to(os.path.abspath(root)):
            raise DataError(f"{where}: {posix!r} points outside {root}; write paths relative to that folder")
        return path
    steps = itertools.accumulate(-1 if part == ".." else 1 for part in relative.parts)
    if min(steps, default=0) < 0:
        raise DataError(f"{where}: {text!r} points outside {root}; only files below it are read")
    plain = posixpath.normpath(posix)
    return next((p for p in _spellings(root, plain, text) if os.path.exists(p)), root / plain)


def relative_to_root(path: Path, root: Path) -> str:
    """Path below ``root`` with forward slashes, for a list."""
    absolute, base = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    if not absolute.is_relative_to(base):
        raise DataError(f"{path}: not below {root}; lists hold paths relative to one folder")
    return absolute.relative_to(base).as_posix()


def _spellings(root: Path, posix: str, text: str) -> Iterator[Path]:
    yield root / posix
    # A list written on another system may spell an accented letter in the other Unicode form.
    yield root / unicodedata.normalize("NFC", posix)
    yield root / unicodedata.normalize("NFD", posix)
    if "\\" in text and "/" not in text and os.sep == "/":
        yield root / text  # a real backslash in a POSIX file name


class _Listing(NamedTuple):
    """What is directly in a folder, each kind sorted by name.

    Attributes:
        folders: and links to folders that do not lead upwards.
        files: and whatever else is no folder.
        plain: those of ``files`` that are visible and really files.
        broken: those of ``files`` that are none: links that lead nowhere, devices.
        skipped: what is left out, or why nothing can be listed.
    """

    folders: tuple[Path, ...]
    files: tuple[Path, ...]
    plain: tuple[Path, ...]
    broken: frozenset[Path]
    skipped: tuple[tuple[Path, str], ...]


@once
def _listing(folder: Path) -> _Listing:
    folders: list[str] = []
    files: list[str] = []
    broken: list[str] = []
    skipped: list[tuple[Path, str]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() and _leads_up(folder, entry):
                    skipped.append((folder / entry.name, READ_BEFORE))
                elif _is(entry.is_dir):
                    folders.append(entry.name)
                else:
                    files.append(entry.name)
                    broken += [] if _is(entry.is_file) else [entry.name]
    except OSError as error:
        skipped.append((folder, f"{_UNLISTED} ({error.strerror or error})"))
    paths = tuple(folder / name for name in sorted(files))
    nowhere = frozenset(folder / name for name in broken)
    return _Listing(
        tuple(folder / name for name in sorted(folders)),
        paths,
        tuple(path for path in paths if path not in nowhere and not is_hidden(path.name)),
        nowhere,
        tuple(skipped),
    )


def _leads_up(folder: Path, link: os.DirEntry[str]) -> bool:
    """Whether a link leads to a folder that it lies in; what is beside it there is not a part of this folder."""
    return Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(link))


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to where nobody may look
        return False


def _accept(entry: Path, broken: frozenset[Path], log: ScanLog) -> bool:
    if not is_image(entry):
        known = UNREAD if entry.suffix.lower() in UNREAD_SUFFIXES else NOT_IMAGE
        log.skip(entry, HIDDEN if is_hidden(entry.name) else known)
    elif entry in broken:
        log.skip(entry, "broken link")
    else:
        return True
    return False


def _folders_below(folder: Path, log: ScanLog) -> Iterator[tuple[Path, _Listing]]:
    """Every visible folder from ``folder`` on, sorted, each real one once."""
    visited: set[tuple[int, int]] = set()
    stack = [folder]
    while stack:
        here = stack.pop()
        try:
            status = here.stat()
        except OSError:
            status = None
        place = (status.st_dev, status.st_ino) if status is not None else None
        if place is None or place in visited:
            log.skip(here, READ_BEFORE)
            continue
        visited.add(place)
        yield here, _listing(here)
        stack.extend(reversed(subfolders(here)))
