"""The wheel, installed into empty environments: the core alone, then with each extra alone.

What it depends on is linked from this environment, package by package as its metadata ask for them, so that no
registry is needed and a package that nobody has declared is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from documents import PROJECT, ROOT
from installed import needed
from layouts import Plan, write

from twinspect._version import __version__

pytestmark = pytest.mark.slow
USERS = [name for name in PROJECT["optional-dependencies"] if name not in ("dev", "docs")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist from a copy of the tree, and the wheel from that sdist, as ``python -m build`` makes them."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    made = subprocess.run(build, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert (tree / "dist" / f"twinspect-{__version__}.tar.gz").is_file()
    return tree / "dist" / f"twinspect-{__version__}-py3-none-any.whl"


class Place:
    """An environment with the wheel, and what the core and some extras ask for."""

    def __init__(self, home: Path, wheel: Path) -> None:
        venv.create(home, with_pip=False)
        self.python, self.home = home / "bin" / "python", home
        offline = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--disable-pip-version-check"]
        install = [sys.executable, "-m", "pip", "--python", self.python, "install", *offline, str(wheel)]
        done = subprocess.run(install, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (self.site,) = home.glob("lib/python*/site-packages")
        self._link(self.site, "")

    def _link(self, target: Path, extra: str) -> None:
        asked = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
        for package in needed(asked).values():
            for name in {_unit(Path(str(file)), package) for file in package.files or [] if ".." not in file.parts}:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                if not (target / name).exists():
                    (target / name).symlink_to(Path(str(package.locate_file(name))).resolve())

    def run(self, code: str, extra: str = "") -> str:
        """Python code in a process of its own, in the folder beside the environment; what it said."""
        more = self.home / f"extra-{extra}"
        if extra:
            self._link(more, extra)
        own = {"PATH": str(self.home / "bin"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        own |= {"TWINSPECT_HOME": str(self.home / "cache"), "PYTHONPATH": str(more) if extra else ""}
        kept = {name: value for name, value in os.environ.items() if name in ("HOME", "TMPDIR", "LD_LIBRARY_PATH")}
        done = subprocess.run(
            [self.python, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=self.home.parent,
            env={**kept, **own}, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


def _unit(file: Path, package: metadata.Distribution) -> Path:
    """What is linked as a whole: a top-level file or package; of a shared namespace, one level deeper."""
    whole = Path(str(package.locate_file(file.parts[0])))
    shared = whole.is_dir() and whole.suffix != ".dist-info" and not (whole / "__init__.py").is_file()
    return Path(*file.parts[:2]) if shared else Path(file.parts[0])


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With a model that the wheel itself has trained on painted images."""
    root = tmp_path_factory.mktemp("place")
    write("mvtec-ad", root / "data", Plan(size=64, train=12, good=4, defect=4))
    made = Place(root / "venv", wheel)
    made.run(_COMMANDS + 'run("fit data --size 64 --steps 2 --cache-gb 0 --out model.twin")')
    return made


_COMMANDS = """
from twinspect.cli import app

def run(line):
    try:
        app(line.split())
    except SystemExit as stop:
        return stop.code
"""


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if name.startswith("twinspect/")}
        about = file.read(f"twinspect-{__version__}.dist-info/METADATA").decode()
    here = (path for path in (ROOT / "src").rglob("*") if path.is_file() and path.suffix != ".pyc")
    wanted = {path.relative_to(ROOT / "src").as_posix() for path in here if ".egg-info" not in str(path)}
    assert packed == wanted
    assert {"twinspect/report.html", "twinspect/server/page.html", "twinspect/py.typed"} <= packed
    assert "License-Expression: Apache-2.0" in about
    assert "# twinspect" in about  # the README is its description


def test_core_trains_and_predicts_and_says_what_each_extra_is_for(place: Place) -> None:
    said = place.run(
        _COMMANDS
        + """
import subprocess, sys
assert subprocess.check_output(["twinspect", "--version"], text=True).strip() == __import__("twinspect").__version__
assert run("predict model.twin data/weave/test --out rows.parquet") in (0, None)
assert run("eval model.twin data --report report.html") in (0, None)
for line in (
    "export model.twin --out m.onnx", "export model.twin --out m.xml", "serve model.twin", "demo --quick",
    "predict model.twin data --out more/ --engine ray", "predict model.twin camera:0",
    "sign model.twin --key key.pem",
):
    assert run(line) == 2, line
assert not {"onnx", "fastapi", "ray", "openvino"} & set(sys.modules)
"""
    )
    for extra in USERS:
        assert f"twinspect[{extra}]" in said, f"{extra} is not named: {said}"
    assert (place.home.parent / "rows.parquet").is_file()
    assert "</html>" in (place.home.parent / "report.html").read_text(encoding="utf-8")


def test_onnx(place: Place) -> None:
    place.run(
        _COMMANDS
        + """
assert run("export model.twin --out model.onnx --images data/weave/train/good") in (0, None)
assert run("predict model.onnx data/ring/test --out rows.csv") in (0, None)
""",
        "onnx",
    )
    assert len((place.home.parent / "rows.csv").read_text().splitlines()) == 1 + 8


def test_openvino(place: Place) -> None:
    place.run(
        _COMMANDS
        + """
assert run("export model.twin --out model.xml --images data/weave/train/good") in (0, None)
assert run("predict model.xml data/ring/test --out rows-ov.csv") in (0, None)
""",
        "openvino",
    )


def test_server(place: Place) -> None:
    """Started as a user starts it, asked once, stopped by a signal."""
    place.run(
        """
        import json, re, signal, subprocess, urllib.request
        from pathlib import Path
        server = subprocess.Popen(["twinspect", "serve", "model.twin", "--port", "0"], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True)
        for line in server.stdout:
            if found := re.search(r"http://[\\d.:]+", line):
                break
        picture = next(Path("data/weave/test/good").iterdir()).read_bytes()
        request = urllib.request.Request(found[0] + "/v1/predict", picture, {"Content-Type": "image/png"})
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        assert answer["results"][0]["answer"] in ("good", "anomaly"), answer
        assert b"<html" in urllib.request.urlopen(found[0], timeout=60).read()
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        """,
        "server",
    )


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("demo", "from twinspect.commands.demo import find_images; assert find_images().is_dir()"),
        ("ray", "import ray.util"),
        ("video", "import cv2"),
        ("sign", "import cryptography"),
    ],
)
def test_other_extras_bring_what_they_are_for(place: Place, extra: str, code: str) -> None:
    """Their commands are run by tests of their own."""
    place.run(code, extra)


def test_every_extra_for_users_is_tried_here() -> None:
    assert set(USERS) == {"onnx", "openvino", "ray", "server", "demo", "video", "sign"}
