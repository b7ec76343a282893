"""Look into folders without falling over: stray files, links that loop, odd names, paths that escape.

Every loader reports what it left out through a ``ScanLog``, so that ``load`` can say it once, in words.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from twinspect.data.images import is_image
from twinspect.errors import DataError

GOOD_NAMES = frozenset({"good", "normal", "ok"})
NOT_IMAGE = "not an image file"
HIDDEN = "hidden file"
# Folders that systems make, with copies, thumbnails or what was deleted.
_SYSTEM = frozenset({"__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle"})


@dataclass(slots=True)
class ScanLog:
    """What a loader left out and what its user should know.

    Attributes:
        skipped: path and reason, in the order met.
        notes: sentences about choices made for the user; each is kept once.
    """

    skipped: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def skip(self, path: Path, reason: str) -> None:
        """Remember a file or folder that is not used."""
        self.skipped.append((path, reason))

    def note(self, text: str) -> None:
        """Remember a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)


def existing_root(root: Path | str) -> Path:
    """The path with ``~`` expanded; an error with the nearest names if nothing is there."""
    path = Path(root).expanduser()
    if path.exists():
        return path
    names = [entry.name for entry in _entries(path.parent)]
    near = get_close_matches(path.name, names, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(str(path.parent / n)) for n in near)}?" if near else ""
    raise DataError(f"{path}: no such file or folder.{hint}")


def existing_folder(root: Path | str) -> Path:
    """Like ``existing_root``, and it must be a folder that can be listed."""
    path = existing_root(root)
    if not path.is_dir():
        raise DataError(f"{path}: is a file, and a folder is needed; name the folder that holds it")
    try:
        os.scandir(path).close()
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({error.strerror or error})") from None
    return path


def subfolders(folder: Path) -> list[Path]:
    """Visible folders directly inside, sorted by name; empty if there is no such folder."""
    return [entry for entry in _entries(folder) if entry.is_dir() and not is_hidden(entry.name)]


def images_in(folder: Path, log: ScanLog) -> list[Path]:
    """Images directly inside a folder, sorted by name; folders inside and other files are logged."""
    found = []
    for entry in _entries(folder, log):
        if entry.is_dir():
            log.skip(entry, "folder inside a folder of images")
        elif _accept(entry, log):
            found.append(entry)
    return found


def images_below(folder: Path, log: ScanLog) -> list[Path]:
    """Images at any depth, sorted by path; each real folder is visited once, so links cannot loop."""
    found: list[Path] = []
    visited: set[tuple[int, int]] = set()
    stack = [folder]
    while stack:
        here = stack.pop()
        if not _first_visit(here, visited):
            log.skip(here, "link to a folder that was already read")
            continue
        for entry in _entries(here, log):
            if entry.is_dir():
                stack.extend([] if is_hidden(entry.name) else [entry])
            elif _accept(entry, log):
                found.append(entry)
    return sorted(found)


def has_images(folder: Path) -> bool:
    """Whether at least one image lies directly inside."""
    return any(is_image(entry) and entry.is_file() for entry in _entries(folder))


def has_images_below(folder: Path) -> bool:
    """Whether at least one image lies inside at any depth."""
    visited: set[tuple[int, int]] = set()
    stack = [folder]
    while stack:
        here = stack.pop()
        if not _first_visit(here, visited):
            continue
        if has_images(here):
            return True
        stack.extend(subfolders(here))
    return False


def child(folder: Path, names: Iterable[str]) -> Path | None:
    """The folder inside whose lower-case name is one of ``names``, or None."""
    wanted = frozenset(names)
    return next((sub for sub in subfolders(folder) if sub.name.lower() in wanted), None)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is passed over in a folder: hidden, or made by the system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def folder_name(folder: Path) -> str:
    """Name of a folder, also for ``.`` and ``/``."""
    return folder.name or folder.resolve().name or "root"


def listing(folder: Path, limit: int = 8) -> str:
    """Names inside a folder for an error message."""
    names = [entry.name + ("/" if entry.is_dir() else "") for entry in _entries(folder)]
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
    if relative.is_absolute() or _has_drive(posix):
        return _absolute_inside(root, posix, where)
    if _depth(relative) < 0:
        raise DataError(f"{where}: {text!r} points outside {root}; only files below it are read")
    plain = posixpath.normpath(posix)
    return next((p for p in _spellings(root, plain, text) if p.exists()), root / plain)


def _absolute_inside(root: Path, posix: str, where: str) -> Path:
    path = Path(os.path.normpath(posix))
    if not path.is_relative_to(os.path.abspath(root)):
        raise DataError(f"{where}: {posix!r} points outside {root}; write paths relative to that folder")
    return path


def _has_drive(posix: str) -> bool:
    """``C:/x`` anywhere; ``C:x`` only where it means a drive, as it is a good file name elsewhere."""
    return posix[:1].isalpha() and posix[1:2] == ":" and (posix[2:3] in ("/", "") or os.name == "nt")


def _depth(relative: PurePosixPath) -> int:
    """-1 as soon as the path climbs above its start, else the depth it ends at."""
    depth = 0
    for part in relative.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return -1
    return depth


def _spellings(root: Path, posix: str, text: str) -> Iterator[Path]:
    yield root / posix
    # A list written on another system may spell an accented letter in the other Unicode form.
    yield root / unicodedata.normalize("NFC", posix)
    yield root / unicodedata.normalize("NFD", posix)
    if "\\" in text and "/" not in text and os.sep == "/":
        yield root / text  # a real backslash in a POSIX file name


def _entries(folder: Path, log: ScanLog | None = None) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        if log is not None:
            log.skip(folder, f"cannot be listed ({error.strerror or error})")
        return []


def _accept(entry: Path, log: ScanLog) -> bool:
    if not is_image(entry):
        log.skip(entry, HIDDEN if is_hidden(entry.name) else NOT_IMAGE)
        return False
    if not entry.is_file():
        log.skip(entry, "broken link")
        return False
    return True


def _first_visit(folder: Path, visited: set[tuple[int, int]]) -> bool:
    try:
        status = folder.stat()
    except OSError:
        return False
    key = (status.st_dev, status.st_ino)
    if key in visited:
        return False
    visited.add(key)
    return True
