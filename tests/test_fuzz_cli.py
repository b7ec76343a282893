"""Command lines of strangers: any options with any values end with an exit code and words, never with a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hostile import inputs, tried
from hypothesis import given
from hypothesis import strategies as st
from tiny import picture, save
from typer.testing import CliRunner

from twinspect.cli import app

COMMAND = typer.main.get_command(app)
LEFT_OUT = {"demo", "fetch", "doctor"}  # take no input, or ask a network


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    for name, one in getattr(group, "commands", {}).items():
        if hasattr(one, "commands"):
            yield from commands(one, (*path, name))
        elif name not in LEFT_OUT:
            yield (*path, name), one


ALL = dict(commands(COMMAND))
# Nothing here can be trained on or served: what is tried is what happens before the work.
VALUES = st.one_of(
    st.sampled_from(
        ["", "-", "0", "-1", "1", "nan", "inf", "1e999", "9" * 40, "0.5", "true", "auto", "none", "all",
        "~nobody-here/x", "/dev/null",
         "/proc/self/mem", "@list.txt", "*.png", "[", "a=b", "http://[", "sqlite:///",
         "postgresql://x:y@127.0.0.1:1/z", "empty", "good",
         "empty.twin", "text.twin", "cut.twin", "a.png", "x.csv", "x.parquet", "x.json", "bad.toml", "x.onnx",
         "x.xml", "new.twin", "sub/dir/out.csv",
         "out.png", "x" * 300, "ü中\u202e", "train", "one-vs-rest/cat", "f1-max", "onnx", "int8", "2026-13-99",
         "0.01,0.05", "1,2,x"]
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=10), st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of every kind that options name, none of them any good."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "empty").mkdir()
    save(folder / "good" / "a.png", picture())
    save(folder / "a.png", picture())
    for name in ("empty.twin", "x.onnx", "x.xml"):
        (folder / name).write_bytes(b"")
    (folder / "text.twin").write_text("hello")
    (folder / "cut.twin").write_bytes(b"PK\x03\x04" + bytes(60))
    (folder / "x.csv").write_text('image,label\n"a.png,0\n')
    (folder / "x.parquet").write_bytes(b"PAR1xxxxPAR1")
    (folder / "x.json").write_text("{")
    (folder / "bad.toml").write_text("[model]\nsize = 'x'\n")
    (folder / "list.txt").write_text("a.png\n")
    return folder


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A command with arguments, some of its options, and now and then something else."""
    words = draw(st.sampled_from(sorted(ALL)))
    line = list(words)
    for one in ALL[words].params:
        if one.param_type_name == "argument":
            line += draw(st.lists(VALUES, min_size=int(one.required), max_size=2 if one.nargs < 0 else 1))
        elif draw(st.integers(0, 5)) == 0 and one.name not in ("help", "help_all"):
            line.append(draw(st.sampled_from([*one.opts, *one.secondary_opts])))
            line += (
                []
                if getattr(one, "is_flag", False)
                else draw(st.lists(VALUES, min_size=one.nargs, max_size=one.nargs))
            )
    return line + draw(st.lists(VALUES, max_size=1)) if draw(st.integers(0, 9)) == 0 else line


@inputs(500)
@given(lines())
def test_any_command_line(place: Path, line: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        found = CliRunner().invoke(app, line)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code in (0, 1, 2, 141)
    assert found.exit_code in (0, 1) or len(found.output) > 10
    assert "Traceback" not in found.output
    tried("command lines")
