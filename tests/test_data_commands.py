"""``twinspect data``: what is there is said, listed and written, and refusals say what to type."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from layouts import Plan, write
from PIL import Image
from typer.testing import CliRunner

from twinspect.cli import app
from twinspect.data import DATASETS, load
from twinspect.data.images import read_mask

DOCS = Path(__file__).parents[1] / "docs"


def call(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of a command."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("layout", list(DATASETS))
def test_inspect_finds_what_was_written(tmp_path: Path, layout: str) -> None:
    write(layout, tmp_path / "set", Plan(train=3, good=2, defect=2))
    code, found, _ = call("data", "inspect", tmp_path / "set", "--json")
    assert code == 0
    values = json.loads(found)
    assert values["layout"] == layout
    assert values["images"] == sum(sum(row.values()) - row["masks"] for row in values["classes"].values())


def test_inspect_says_layout_counts_skips_and_leaks(tmp_path: Path) -> None:
    root = tmp_path / "parts"
    write("mvtec-ad", root, Plan(train=5, good=2, defect=3))
    (root / "notes.txt").write_text("x")
    train = sorted((root / "ring" / "train" / "good").iterdir())[0]
    shutil.copy(train, root / "ring" / "test" / "good" / "copy.png")
    (root / "ring" / "train" / "good" / "read me.txt").write_text("x")
    code, said, _ = call("data", "inspect", root, "--leaks")
    assert code == 0
    assert "mvtec-ad at" in said
    assert "not an image file" in said
    assert "1 pairs of a training image and its copy" in said
    assert "copy.png" in said


def test_inspect_refuses_what_is_not_there(tmp_path: Path) -> None:
    code, _, problem = call("data", "inspect", tmp_path / "nothing")
    assert code == 2
    assert "no such file or folder" in problem


@pytest.mark.parametrize("layout", list(DATASETS))
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_manifest_of_every_layout_reads_back(tmp_path: Path, layout: str, ending: str) -> None:
    root, out = tmp_path / "a set", tmp_path / "lists" / f"list.{ending}"
    write(layout, root, Plan(train=3, good=2, defect=2))
    code, said, _ = call("data", "manifest", root, "--out", out)
    assert code == 0
    assert "--images" in said
    mine = load(root)
    again = load(out, images=mine.root)
    assert sorted(map(repr, again.samples)) == sorted(map(repr, mine.samples))
    line = next(line for line in said.splitlines() if "to read it type" in line)
    words = shlex.split(line.partition("type: ")[2])[1:]
    assert call(*words)[0] == 0


def test_a_manifest_of_another_ending(tmp_path: Path) -> None:
    write("folder", tmp_path / "set", Plan(train=2, defect=1))
    code, _, problem = call("data", "manifest", tmp_path / "set", "--out", tmp_path / "list.txt")
    assert code == 2
    assert "list.parquet" in problem


def test_images_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path / "set")
    code, _, problem = call("data", "inspect", tmp_path / "set", "--images", tmp_path)
    assert code == 2
    assert "it is for uniad-json, manifest" in problem


@pytest.mark.parametrize("mode", ["palette", "grey", "bits", "rgb", "grey with alpha"])
def test_masks_of_every_kind(tmp_path: Path, mode: str) -> None:
    """In a palette mask the index counts: a black colour at index 1 is still a defect."""
    truth = np.zeros((6, 9), np.uint8)
    truth[2:4, 3:7] = 1
    if mode == "palette":
        image = Image.frombytes("P", (9, 6), truth.tobytes())
        image.putpalette([255, 255, 255, 0, 0, 0])
    elif mode == "bits":
        image = Image.fromarray(truth.astype(bool))
    elif mode == "rgb":
        image = Image.fromarray(np.stack([truth * 0, truth, truth * 0], axis=2))
    elif mode == "grey with alpha":
        image = Image.merge("LA", [Image.fromarray(truth), Image.new("L", (9, 6), 255)])
    else:
        image = Image.fromarray(truth)
    image.save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png"), truth.astype(bool))


@pytest.mark.parametrize("page", ["data.md", "metrics.md", "reproduce.md"])
def test_commands_in_the_docs_parse(page: str) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for text in blocks for line in text.splitlines()]
    commands = [line for line in lines if line.startswith("twinspect")]
    assert commands
    for line in commands:
        words = shlex.split(line)[1:]
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context("twinspect", words)
