"""Look into folders without falling over: stray files, links that loop, odd names, paths that escape.

Every loader reports what it left out through a ``ScanLog``, so that ``load`` can say it once, in words.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from twinspect.data.images import UNREAD_SUFFIXES, is_image
from twinspect.data.names import Meaning, meaning
from twinspect.errors import DataError, listed
from twinspect.files import near_names

_UNREAD = "a picture in a format that is not read; save it as PNG or JPEG"
_READ_BEFORE = "link to a folder that was already read"
# Folders that systems make, with copies, thumbnails or what was deleted.
_SYSTEM = frozenset({"__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle"})


@dataclass(slots=True)
class ScanLog:
    """What a loader left out and what its user should know."""

    skipped: dict[Path, str] = field(default_factory=dict)  # and why, in the order met
    undecided: dict[Path, str] = field(default_factory=dict)  # of those skipped: nobody asked to leave it out
    notes: list[str] = field(default_factory=list)  # choices made for the user, in sentences

    def skip(self, path: Path, reason: str) -> None:
        """Remember a file or folder that is not used; the last reason counts."""
        self.skipped[path] = reason

    def leave(self, path: Path, reason: str) -> None:
        """Remember images, or a list of them, that cannot be used as they are, so that the user has to decide."""
        self.skipped[path] = self.undecided[path] = reason

    def note(self, text: str) -> None:
        """Remember a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)


class Folder:
    """A folder and what lies directly in it, each kind sorted by name. It looks once, when it is made.

    A file may stand in its place, such as a list of images; it is then the only file in it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.is_file = path, False
        self.problem = ""  # why it cannot be listed
        self.images: list[Path] = []  # visible ones
        self.others: list[Path] = []  # other visible files
        self._inner: list[Path] = []
        self._left_out: list[tuple[Path, str]] = []
        try:
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    self._add(entry)
        except NotADirectoryError:
            self.is_file = True
            (self.images if is_image(path) else self.others).append(path)
        except OSError as error:
            self.problem = f"cannot be listed ({error.strerror or error})"

    def _add(self, entry: os.DirEntry[str]) -> None:
        path, linked = self.path / entry.name, entry.is_symlink()
        # What is beside a link to a folder that it lies in is not a part of this folder.
        if linked and Path(os.path.realpath(self.path)).is_relative_to(os.path.realpath(path)):
            self._left_out.append((path, _READ_BEFORE))
        elif os.path.isdir(path) if linked else entry.is_dir():
            if not is_hidden(entry.name):
                self._inner.append(path)
        elif is_hidden(entry.name):
            self._left_out.append((path, "hidden file"))
        elif not (os.path.isfile(path) if linked else entry.is_file()):
            self._left_out.append((path, "broken link"))
        else:
            (self.images if is_image(entry.name) else self.others).append(path)

    @cached_property
    def folders(self) -> list[Folder]:
        """Visible folders directly inside, and links to folders that do not lead upwards."""
        return [Folder(path) for path in self._inner]

    @property
    def files(self) -> list[Path]:
        """Visible files directly inside."""
        return sorted([*self.images, *self.others])

    @property
    def name(self) -> str:
        """Its name, see `folder_name`."""
        return folder_name(self.path)

    @property
    def meant(self) -> Meaning:
        """What its name says of the images in it."""
        return meaning(self.name)

    def walk(self, log: ScanLog) -> Iterator[Folder]:
        """This folder and every visible one below, sorted by path, each real folder once, so that links cannot loop.

        What is left out is logged. Files that are no images are logged where there are images.
        """
        visited: set[str] = set()
        stack = [self]
        while stack:
            here = stack.pop()
            real = os.path.realpath(here.path)
            if real in visited:
                log.skip(here.path, _READ_BEFORE)
                continue
            visited.add(real)
            if here.problem:
                log.skip(here.path, here.problem)
            beside_images = bool(here.images or not here._inner)  # a licence beside folders is no news
            for path, reason in here._left_out:
                if beside_images or reason == _READ_BEFORE:
                    log.skip(path, reason)
            for path in here.others if beside_images else ():
                log.skip(path, _UNREAD if path.suffix.lower() in UNREAD_SUFFIXES else "not an image file")
            yield here
            stack.extend(reversed(here.folders))

    def images_below(self, log: ScanLog) -> list[Path]:
        """Images at any depth, sorted by path."""
        return sorted(image for here in self.walk(log) for image in here.images)

    @cached_property
    def has_images_below(self) -> bool:
        """Whether at least one image lies inside at any depth."""
        return any(here.images for here in self.walk(ScanLog()))

    def listing(self) -> str:
        """Names inside, for an error message."""
        if self.is_file:
            return "a file"
        names = [f"{path.name}/" for path in self._inner] + [path.name for path in self.files]
        return listed(sorted(names), 8) or "nothing"


def existing(path: Path | str, folder: bool = False) -> Path:
    """The path with ``~`` expanded; a DataError where nothing is there, or a file and a ``folder`` is needed."""
    path = Path(path)
    try:
        path = path.expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: no such file or folder.{near_names(path)}") from None
    except (ValueError, RuntimeError) as error:  # a zero byte in it; ~ of a user that is not there
        raise DataError(f"{str(path)!r}: no path of this system ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be reached ({error.strerror or error})") from None
    if folder and not os.path.isdir(path):
        raise DataError(f"{path}: is a file, and a folder is needed; name the folder that holds it")
    return path


def folder_name(folder: Path) -> str:
    """Name of a folder, also for ``.`` and ``/``."""
    return folder.name or folder.resolve().name or "root"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is passed over in a folder: hidden, or made by the system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def first_lines(problems: Iterable[str]) -> str:
    """The first of what is wrong as lines of an error message, and how many more there are."""
    lines = list(problems)
    more = [f"... and {len(lines) - 5} more"] if len(lines) > 5 else []
    return "".join(f"\n  {line}" for line in lines[:5] + more)


def inside(root: Path, text: str, where: str) -> Path:
    """Path named by a list, below ``root``; also with Windows separators or other Unicode forms.

    Links are followed; a name that climbs out of ``root`` is a DataError, which says ``where`` (file and row).
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
