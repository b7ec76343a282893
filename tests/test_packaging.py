"""What is declared is pinned, what is pinned has no address, and what the package needs travels with it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = [
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
PINNED = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line.split("==")[1] for line in LINES}


def test_constraints_are_exact_versions_without_addresses() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in LINES)
    assert "://" not in "".join((ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    assert len(PINNED) == len(LINES)


@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_every_declared_package_is_pinned(extra: str) -> None:
    wanted = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    for requirement in wanted:
        found = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]+\])?>=([0-9.]+)", requirement)
        assert found is not None, requirement
        name = re.sub(r"[-_.]+", "-", found[1]).lower()
        assert numbers(PINNED[name]) >= numbers(found[2]), requirement


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def test_report_template_and_type_marker_are_package_data() -> None:
    assert files("twinspect").joinpath("report.html").is_file()
    assert files("twinspect").joinpath("py.typed").is_file()
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {"py.typed", "*.html"} <= set(config["tool"]["setuptools"]["package-data"]["twinspect"])


def test_light_runtime_holds_every_module_that_its_modules_load() -> None:
    """Without an installation, so that a forgotten module is found in a second."""
    light = tomllib.loads((ROOT / "packaging" / "runtime" / "pyproject.toml").read_text(encoding="utf-8"))
    modules = {name.removesuffix(".__init__") for name in light["tool"]["setuptools"]["py-modules"]}
    for module in sorted(modules - {"twinspect"}):
        path = ROOT / "src" / Path(*module.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        loaded = [n for n in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)]
        own = {n.module for n in loaded if (n.module or "").startswith("twinspect")}
        missing = {one for one in own if one not in modules and not str(one).startswith("twinspect.data")}
        assert not missing, f"{module} loads {missing}"


def test_ci_script_is_strict_and_executable() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.index("make check") < text.index("make test")
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_makefile_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "-C", str(ROOT), "check", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode != 0
    assert "Python >= 3.11 is needed, found: Python 3.8.1" in found.stdout + found.stderr


def test_version_is_the_declared_one() -> None:
    from typer.testing import CliRunner

    from twinspect._version import __version__
    from twinspect.cli import app

    found = CliRunner().invoke(app, ["--version"])
    assert (found.exit_code, found.stdout.strip()) == (0, __version__)
