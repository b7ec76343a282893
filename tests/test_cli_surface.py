"""Commands and flags are a promise: adding one is an edit of golden/cli.txt and a line in the changelog.

After a deliberate change type: python tests/test_cli_surface.py > tests/golden/cli.txt
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

GOLDEN = Path(__file__).parent / "golden" / "cli.txt"


def surface() -> list[str]:
    """One line per command: its arguments in capitals, then its flags in order."""
    from twinspect.cli import app

    return sorted(lines_of(typer.main.get_command(app), "twinspect"))


def lines_of(command: Any, name: str) -> list[str]:
    words = [
        parameter.name.upper()
        if parameter.param_type_name == "argument"
        else " ".join([*parameter.opts, *parameter.secondary_opts])
        for parameter in command.params
        if parameter.name != "help"
    ]
    inner = [line for key, sub in getattr(command, "commands", {}).items() for line in lines_of(sub, f"{name} {key}")]
    return [" ".join([name, *words]), *inner]


def test_commands_and_flags_are_the_listed_ones() -> None:
    assert surface() == GOLDEN.read_text().splitlines(), __doc__


def test_every_flag_and_command_has_help() -> None:
    from twinspect.cli import app

    def check(command: Any, name: str) -> None:
        assert command.help, name
        for parameter in command.params:
            assert parameter.name == "help" or parameter.help, f"{name} {parameter.name}"
        for key, sub in getattr(command, "commands", {}).items():
            check(sub, f"{name} {key}")

    check(typer.main.get_command(app), "twinspect")


@pytest.mark.parametrize(
    ("command", "some", "hidden"),
    [
        (
            "fit",
            ("--out", "--effort", "--steps"),
            ("--model", "--clip", "--noisy-or", "--time-budget", "--cram"),
        ),
        ("predict", ("--out", "--class", "--overlays"), ("--part-rows", "--shard", "--ray-address", "--submission")),
        ("serve", ("--port", "--log", "--api-key-file"), ("--max-wait-ms", "--max-body-mb", "--root-path")),
        ("calibrate", ("--max-fpr", "--labels", "--out"), ("--since", "--layout")),
    ],
)
def test_help_shows_what_people_use_and_help_all_the_rest(
    command: str, some: tuple[str, ...], hidden: tuple[str, ...]
) -> None:
    from twinspect.cli import app

    short, full = (CliRunner().invoke(app, [command, name]).stdout for name in ("--help", "--help-all"))
    shown, every = (set(re.findall(r"^\s+(?:-[a-z], )?(--[a-z-]+)", text, re.M)) for text in (short, full))
    assert {*some, "--help", "--help-all"} <= shown < every
    assert len(shown) <= 12
    assert {*hidden} <= every - shown
    line = next(line for line in GOLDEN.read_text().splitlines() if line.startswith(f"twinspect {command} "))
    assert {flag for flag in re.findall(r"--[a-z-]+", line) if not flag.startswith("--no-")} <= every | {
        "--random-teacher"
    }


def test_several_values_are_shown_as_people_type_them() -> None:
    from twinspect.cli import app

    text = CliRunner().invoke(app, ["calibrate", "--help"]).stdout
    assert re.search(r"--unsure <float> <float> ", text)
    assert re.search(r"--report <path> ", text)


def test_an_option_is_one_field_with_its_help_and_what_it_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    import twinspect.cli as room
    from twinspect.config import Range, argument, option

    @dataclass(frozen=True)
    class Toy:
        """A command."""

        path: Path = argument("A file.")
        names: tuple[str, ...] = option("Some names.", ())
        loud: bool = option("Say more.", False, "--loud")
        rate: float = option("A rate.", 0.5, accepts=Range(0, 1))

    given: list[Toy] = []
    module = SimpleNamespace(run=lambda options, console: given.append(options))
    monkeypatch.setattr(room, "import_module", {"twinspect.commands.toy": module}.__getitem__)
    toys = typer.Typer()
    room.Command("toy", "toy:run", Toy, "x", shown=("names",)).add_to(toys)
    runner = CliRunner()
    assert runner.invoke(toys, ["x"]).exit_code == 0
    assert runner.invoke(toys, ["x", "--names", "a", "--names", "b", "--loud", "--rate", "1"]).exit_code == 0
    refused = runner.invoke(toys, ["x", "--rate", "2"])
    assert (refused.exit_code, refused.stderr) == (2, "error: --rate 2.0: accepted 0 to 1\n")
    assert given == [Toy(Path("x")), Toy(Path("x"), ("a", "b"), True, 1.0)]
    short, full = (runner.invoke(toys, [name]).output for name in ("--help", "--help-all"))
    assert "Some names." in short
    assert "A rate." not in short
    assert "A rate." in full


def test_commands_stand_in_the_order_of_work_each_with_an_example_that_parses() -> None:
    from twinspect.cli import COMMANDS, app
    from twinspect.commands.reproduce import RECIPES

    top = typer.main.get_command(app)
    found = commands_of(top)
    examples = {row.name: f"twinspect {row.name} {row.example}".rstrip() for row in COMMANDS}
    assert [name for name in found if name != "data"] == list(examples)
    examples["data"] = "twinspect data inspect data/"
    for name, command in found.items():
        words = examples[name].split()
        assert words[0] == "twinspect"
        assert " ".join(words[1:]).startswith(name)
        if not hasattr(command, "commands"):
            command.make_context(name, words[1 + len(name.split()) :])  # raises for an option that is not there
        for flag in ("-h", "--help"):
            assert f"  {examples[name]}\n" in CliRunner().invoke(app, [*name.split(), flag]).stdout
    assert examples["reproduce"].split()[2] in RECIPES


def commands_of(group: Any, prefix: str = "") -> dict[str, Any]:
    """All commands below a group by what is typed, in their order."""
    found = {}
    for name in group.list_commands(None) if hasattr(group, "commands") else ():
        command = group.commands[name]
        found |= {f"{prefix}{name}": command, **commands_of(command, f"{prefix}{name} ")}
    return found


def test_shells_complete_commands_and_options() -> None:
    for typed, wanted in (("twinspect pre", "predict"), ("twinspect fit --eff", "--effort")):
        place = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
        command = [sys.executable, "-c", "from twinspect.cli import app; app(prog_name='twinspect')"]
        environment = {**os.environ, **place, "_TWINSPECT_COMPLETE": "complete_bash"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert wanted in done.stdout.split(), done


if __name__ == "__main__":
    print("\n".join(surface()))
