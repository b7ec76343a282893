"""Errors for people: what was got, what is accepted, what to type."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from twinspect._version import __version__


class TwinspectError(Exception):
    """Base of all errors this library raises on purpose; the CLI prints it without a traceback."""


class ConfigError(TwinspectError, ValueError):
    """An option has a value that is not accepted."""


class DataError(TwinspectError, ValueError):
    """The data given cannot be used as it is."""


class ImageError(DataError):
    """One image cannot be read or is refused."""


class WeightsError(TwinspectError):
    """The weights of a teacher are missing, damaged or belong to another network."""


class BundleError(TwinspectError):
    """A saved model is damaged, tampered with, too new, or needs another teacher."""


class OutputError(TwinspectError):
    """A file or folder cannot be written."""


class TrainingError(TwinspectError):
    """Training cannot go on."""


# What Python raises on values of a wrong kind in a file that somebody else has written.
NONSENSE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def required(package: str, what: str, install: str = "") -> Any:
    """A package that not every install has; where it cannot be imported, a ConfigError says what to type."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{what} needs {package}, which cannot be imported ({error}). Type: pip install '{install or package}'"
        ) from None


def refuse_version(path: Path, version: Any, known: int, writer: str, advice: str) -> None:
    """Refuse, by a BundleError, a model of another format than ``known``; ``advice`` is for older ones."""
    if version == known:
        return
    if not isinstance(version, int) or version > known:
        advice = "Type: pip install --upgrade twinspect"
    raise BundleError(
        f"{path} has format {version}, written by twinspect {writer}; {__version__} reads format {known}. {advice}"
    )


def unknown_name(kind: str, got: str, accepted: Iterable[str]) -> str:
    """Sentence for a name that is not in a table, with the nearest accepted names first."""
    names = list(accepted)
    near = difflib.get_close_matches(got, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"unknown {kind} {got!r}.{hint} Accepted: {', '.join(names)}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
