"""The README tells the truth: its commands parse, its Python runs, its files exist."""

from __future__ import annotations

import re
import shlex
from functools import partialmethod
from pathlib import Path

import pytest
import typer
from layouts import Plan, write

from twinspect import Detector
from twinspect.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
NAMED = re.findall(r"`(twinspect [a-z][^`]*)`", README + (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("twinspect")])
def test_commands_parse(line: str) -> None:
    words = shlex.split(line)[1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("twinspect", words)  # parses; runs nothing


def test_commands_named_in_text_exist() -> None:
    commands = typer.main.get_command(app).commands
    assert {line.split()[1] for line in NAMED} <= {*commands}
    assert {line.split()[1] for line in COMMANDS if line.startswith("twinspect")} <= {*commands}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = [line.split()[1] for line in COMMANDS if line.startswith("make")]
    assert wanted == ["demo", "test"]
    assert all(
        re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in [*wanted, "check", "bench", "clean"]
    )


@pytest.mark.slow
def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write("folder", tmp_path / "data", Plan(train=20))
    write("folder", tmp_path / "new", Plan(train=4, seed=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TWINSPECT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Detector, "fit", partialmethod(Detector.fit, steps=2))
    (code,) = (text for kind, text in BLOCKS if kind == "python")
    exec(compile(code, "README.md", "exec"), {})
    assert "new" in capsys.readouterr().out


def test_files_named_in_the_tree_exist() -> None:
    (tree,) = (text for kind, text in BLOCKS if not kind and "src/twinspect/" in text)
    names = [(line, name) for line in tree.splitlines() for name in re.split(r" {3,}", line.strip())[0].split()]
    assert len(names) > 20
    for line, name in names:
        assert (ROOT / "src" / "twinspect" / name if line.startswith(" ") else ROOT / name).exists(), name


def test_picture_is_small_and_there() -> None:
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert 0 < (ROOT / picture).stat().st_size < 200_000
