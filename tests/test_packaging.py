"""What is declared is pinned, what is pinned has no address, and what the package needs travels with it."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
from installed import needed
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

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


def test_all_that_the_packages_need_is_pinned_at_the_version_that_is_installed() -> None:
    """So the tests run in the one environment that the constraints describe, complete."""
    asked = [one for extra in PROJECT["optional-dependencies"].values() for one in extra]
    for name, found in needed([*PROJECT["dependencies"], *asked]).items():
        assert PINNED.get(name) == found.version.split("+")[0], f"{name} {found.version}: not as constraints.txt says"


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_what_is_pinned_installs_on_the_first_release_of_every_python(python: str) -> None:
    """Debian 12 has 3.11.2: a version that needs 3.11.5 would stop `make test` there."""
    here = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    asked = [Requirement(one) for extra in PROJECT["optional-dependencies"].values() for one in extra]
    asked = [one for one in asked if one.marker is None or one.marker.evaluate(here)]
    for name, found in needed([*PROJECT["dependencies"], *map(str, asked)]).items():
        accepted = found.metadata.get("Requires-Python", "")
        assert SpecifierSet(accepted).contains(python), f"{name} {found.version} needs Python {accepted}"


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def test_report_template_and_type_marker_are_package_data() -> None:
    assert files("twinspect").joinpath("report.html").is_file()
    assert files("twinspect").joinpath("py.typed").is_file()
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packed = set(config["tool"]["setuptools"]["package-data"]["twinspect"])
    assert {"py.typed", "*.html", "commands/*.toml", "data/*.toml"} <= packed


def test_light_runtime_holds_every_module_that_its_modules_load() -> None:
    """Without an installation, so that a forgotten module is found in a second."""
    light = tomllib.loads((ROOT / "packaging" / "runtime" / "pyproject.toml").read_text(encoding="utf-8"))
    assert light["tool"]["setuptools"]["package-data"] == {"twinspect.data": ["*.toml"]}
    folders = tuple(light["tool"]["setuptools"]["packages"])
    modules = {name.removesuffix(".__init__") for name in light["tool"]["setuptools"]["py-modules"]}
    for module in sorted(modules - {"twinspect"}):
        path = ROOT / "src" / Path(*module.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        loaded = [n for n in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)]
        own = {n.module for n in loaded if (n.module or "").startswith("twinspect")}
        missing = {one for one in own if one not in modules and not str(one).startswith(folders)}
        assert not missing, f"{module} loads {missing}"


def test_ci_runs_what_a_user_types() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert text.index("make check") < text.index("make test")
    assert not re.search(
        r"^\s*(export\b|[A-Z_]+=)|make \w+ +\w", text, re.M
    )  # nothing that a user would not have set
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a clone in an empty folder: without what git ignores, an environment above all."""
    folder = tmp_path_factory.mktemp("clone") / "twinspect"
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, capture_output=True, text=True)
    if done.returncode:  # an unpacked archive
        ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*(line.rstrip("/") for line in ignored), ".git"))
        return folder
    for name in done.stdout.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():  # git still lists what was deleted since the last commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("target", ["demo", "quick", "docs", "test", "check", "bench"])
def test_targets_of_a_bare_clone_resolve(clone: Path, target: str) -> None:
    """Dry runs: of make, which says what it would install, and of pip, which finds all of that as it is pinned."""
    command = ["make", "--dry-run", target, f"PYTHON={sys.executable}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    made = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (install,) = [shlex.split(line) for line in made.stdout.splitlines() if " pip install " in line]
    extras = re.findall(r"\w+", install[-1])
    wanted = {"demo": {"demo"}, "quick": {"demo"}, "docs": {"docs", "server"}}
    assert set(extras) == wanted.get(target, set(PROJECT["optional-dependencies"]))
    options = ["--dry-run", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    resolve = [sys.executable, *install[1:], *options]
    done = subprocess.run(resolve, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_that_the_tests_and_the_build_read_are_in_a_clone(clone: Path) -> None:
    """Git keeps them: nothing that only this folder has is imported or packed."""
    for folder in ("src", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert (clone / path.relative_to(ROOT)).is_file(), f"{path} is ignored by git"
    assert not (clone / ".venv").exists()


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
