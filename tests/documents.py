"""The blocks of the documents, and how each of their lines is run on small data.

A block of ``sh`` or ``python`` in README.md, CONTRIBUTING.md or docs/ is run by ``test_documents.py``, line by line,
in a folder that holds what the documents speak of (`made`). A block that cannot be run here has a mark on the line
above: ``<!-- not run: REASON -->``.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from layouts import Plan, write
from PIL import Image
from tiny import RANDOM, images_to_test, run_config, save

from twinspect._version import __version__

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("sh", "python")
SHOWN = ("", "levels", "json", "toml", "text", "nginx", "yaml")  # nothing in them is a command
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPERATORS = {"|", "||", "&&", ">", ">>", "<"}  # of a shell, where a document joins commands
_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """A fenced block: where it stands, its language, its text, and why it is not run (empty: it is)."""

    document: Path
    line: int
    kind: str
    text: str
    reason: str

    def lines(self) -> Iterator[str]:
        """Its commands: without comments, joined where they are continued."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if command := re.sub(r"(^|\s+)#\s.*$", "", line).strip():
                yield command


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(document, text.count("\n", 0, m.start()) + 1, m["kind"], m["text"], m["reason"] or "")
        for m in _FENCE.finditer(text)
    ]


def made(root: Path) -> Path:
    """What the documents speak of.

    ``data/`` (classes cable and screw, with test images and masks), ``good/`` (100 good images of cable that were not
    trained on), ``more/`` (20 others), ``new/`` (four good, four others), ``new.png``, ``model.twin``,
    ``old.twin`` and ``new.twin``, a key, a list and labels.
    """
    from twinspect import Detector

    write("mvtec-ad", root / "painted", Plan(size=64, train=20, good=6, defect=6))
    (root / "data").mkdir()
    for old, new in (("weave", "cable"), ("ring", "screw")):
        (root / "painted" / old).rename(root / "data" / new)
    write("folder", root / "painting", Plan(size=64, classes=1, train=120, seed=7))
    pictures = sorted((root / "painting").rglob("*.png"))
    for number, path in enumerate(pictures[:120]):
        save(root / ("good" if number < 100 else "more") / f"{number:03d}.png", _pixels(path))
    for label in (0, 1):
        for path in images_to_test(root / "data", label)[:4]:
            save(root / "new" / f"{label}-{path.name}", _pixels(path))
    shutil.copy(images_to_test(root / "data", 1)[0], root / "new.png")
    (root / "key").write_text("0123456789abcdef0123456789abcdef")
    (root / "list.txt").write_text("new.png\n")
    rows = [f"new/{path.name},{path.name[0]}" for path in sorted((root / "new").iterdir())]
    (root / "checked.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    for name, steps in (("model", 3), ("new", 4)):
        Detector(config=run_config(RANDOM, steps=steps)).fit(root / "data").save(root / f"{name}.twin")
    shutil.copy(root / "model.twin", root / "old.twin")
    for folder in ("painted", "painting"):
        shutil.rmtree(root / folder)
    return root


def _pixels(path: Path) -> Any:
    import numpy as np

    return np.asarray(Image.open(path).convert("RGB"))


def small(fit: Callable[..., Any]) -> Callable[..., Any]:
    """``training.fit.fit`` with a tiny random teacher and three steps, whatever the document asks for."""

    def fitted(samples: Any, config: Any, *rest: Any, **more: Any) -> Any:
        tiny = run_config()
        names = ("teacher", "pretrained", "size", "depth")
        model = dataclasses.replace(config.model, **{name: getattr(tiny.model, name) for name in names})
        train = dataclasses.replace(config.train, steps=3, batch=4, device="cpu")
        return fit(samples, dataclasses.replace(config, model=model, train=train), *rest, **more)

    return fitted


class Runner:
    """Runs the lines of one document in its own copy of the folder."""

    def __init__(self, document: Path, patch: pytest.MonkeyPatch) -> None:
        import twinspect.commands.fit as command
        import twinspect.training.fit as room

        patch.setattr(command, "train", small(room.fit))
        patch.setattr(room, "fit", small(room.fit))
        patch.setattr("twinspect.server.app.serve", self._serve)
        runs = [
            line for block in blocks(document) if block.kind == "sh" and not block.reason for line in block.lines()
        ]
        self._requests = [line for line in runs if line.startswith("curl ")]
        self._names: dict[str, Any] = {"__name__": "documents"}

    def python(self, block: Block) -> None:
        """Blocks of a document share their names, as in a session."""
        source = "\n" * block.line + block.text
        exec(compile(source, str(block.document), "exec"), self._names)

    def shell(self, line: str) -> None:
        """One line: it must end well."""
        from typer.testing import CliRunner

        from twinspect.cli import app

        program, *words = shlex.split(line)
        if program == "twinspect" and not set(words) & OPERATORS:
            found = CliRunner().invoke(app, words, catch_exceptions=False)
            assert found.exit_code == 0, found.output
        elif program == "pip":
            self._check_install(words)
        elif program == ".":
            assert words == [".venv/bin/activate"], "make wheel makes this environment"
        elif program == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{re.escape(words[0])}:", makefile, re.MULTILINE), f"no target {words[0]}"
        elif program != "curl":  # requests are sent while the document's server runs
            places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            done = subprocess.run(
                ["bash", "-c", line], capture_output=True, text=True, env={**os.environ, "PATH": places}
            )
            assert done.returncode == 0, done.stderr

    def finish(self) -> None:
        """Nothing was left over."""
        assert not self._requests, "no server was started for the requests of this document"

    @staticmethod
    def _check_install(words: list[str]) -> None:
        """The wheel itself is installed by ``test_wheel.py``: here its name and extras must be those it has."""
        assert words[0] == "install"
        for word in (word for word in words[1:] if not word.startswith("-")):
            own = re.fullmatch(r"twinspect(?:\[([\w,]+)\])?", word)
            extras = {*(own[1] or "").split(",")} - {""} if own else set()
            assert own or word == f"dist/twinspect-{__version__}-py3-none-any.whl" or (ROOT / word).is_dir(), word
            assert extras <= {*PROJECT["optional-dependencies"]}, word

    def _serve(self, app: Any, settings: Any, started: Callable[[str], None]) -> None:
        """In the place of ``server.app.serve``: on a free port, for a check and the document's own requests."""
        with serving(app, settings) as address:
            started(address)
            while self._requests:
                line = self._requests.pop(0).replace("localhost:8000", address.removeprefix("http://"))
                line = line.replace("curl", "curl --fail-with-body --silent --show-error --max-time 60", 1)
                done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
                assert done.returncode == 0, (line, done.stdout, done.stderr)


@contextmanager
def serving(app: Any, settings: Any) -> Iterator[str]:
    """A server on a free port of this machine, alive; its address."""
    from twinspect.server.app import address_of, prepared

    server, listening = prepared(app, dataclasses.replace(settings, host="127.0.0.1", port=0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        with urllib.request.urlopen(f"{address_of(listening)}/healthz", timeout=30) as answer:
            assert answer.status == 200
        yield address_of(listening)
    finally:
        server.should_exit = True
        thread.join()
