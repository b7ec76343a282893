"""README and docs tell the truth: their lines run, their links lead somewhere, their numbers are measured ones."""

from __future__ import annotations

import re
import shutil
import warnings
from itertools import groupby
from pathlib import Path

import pytest
import typer
from documents import DOCUMENTS, OPERATORS, ROOT, RUN, SHOWN, Block, Runner, blocks

from twinspect.cli import app

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
WITH_LINES = [d for d in DOCUMENTS if any(b.kind in RUN and not b.reason for b in blocks(d))]
TEXTS = [*DOCUMENTS, *(ROOT / name for name in ("CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md"))]


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.mark.slow
@pytest.mark.parametrize("document", WITH_LINES, ids=name_of)
def test_lines_run(document: Path, documents_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(documents_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TWINSPECT_HOME", str(tmp_path / "home"))
    runner = Runner(document, monkeypatch)
    for block in (block for block in blocks(document) if block.kind in RUN and not block.reason):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # few images, of which a reader shall be warned
                if block.kind == "python":
                    runner.python(block)
                for line in block.lines() if block.kind == "sh" else ():
                    current = line
                    runner.shell(line)
        except (Exception, SystemExit) as error:
            shown = current if block.kind == "sh" else "python"
            pytest.fail(f"{name_of(document)}:{block.line}: {shown}\n{type(error).__name__}: {error}")
    runner.finish()


def test_every_block_says_what_it_is() -> None:
    for block in BLOCKS:
        where = f"{name_of(block.document)}:{block.line}"
        assert block.kind in (*RUN, *SHOWN), f"{where}: a block of {block.kind}, which is not run"
        assert not block.reason or block.kind in RUN, f"{where}: marked, but nothing would be run"
        assert not block.reason or len(block.reason.split()) > 2, f"{where}: the mark says no reason"
        hidden = block.kind not in RUN and re.search(r"^(twinspect|pip|make) [a-z]", block.text, re.MULTILINE)
        assert not hidden, f"{where}: commands in a block that is not run"
    assert sum(bool(b.reason) for b in BLOCKS) < sum(b.kind in RUN and not b.reason for b in BLOCKS)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "sh" and b.reason], ids=lambda b: f"{b.line}")
def test_lines_that_are_not_run_parse(block: Block) -> None:
    """So that no option in them is out of date."""
    for line in block.lines():
        words = line.replace("-m twinspect", "| twinspect").split()
        parts = [list(part) for operator, part in groupby(words, OPERATORS.__contains__) if not operator]
        for part in (part for part in parts if part[0] == "twinspect"):
            command = typer.main.get_command(app)
            while hasattr(command, "commands"):
                part.pop(0)
                command = command.commands[part[0]]
            command.make_context("twinspect", part[1:])


def test_commands_named_in_text_exist() -> None:
    commands = typer.main.get_command(app).commands
    for text in TEXTS:
        named = re.findall(r"`twinspect ([a-z][\w-]*)", text.read_text(encoding="utf-8"))
        assert {*named} <= {*commands}, text


# ------------------------------------------------------------------------------------------------------- links


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and MkDocs make them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", TEXTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue  # other sites are not asked: tests run without a network
        path, _, anchor = target.partition("#")
        found = (document.parent / path) if path else document
        if found.is_relative_to(ROOT / "docs" / "reference") and not found.exists():
            assert found.name in ("cli.md", "http.md"), target  # made when the site is built (docs/pages.py)
            continue
        assert found.exists(), f"{name_of(document)}: {target}"
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{name_of(document)}: {target}"


def test_pages_named_in_code_font_exist() -> None:
    for document in TEXTS:
        for name in re.findall(
            r"`((?:docs|benchmarks|examples|packaging|tests)/[\w/.-]+)`", document.read_text("utf-8")
        ):
            assert (ROOT / name).exists(), f"{name_of(document)}: {name}"


def test_pictures_are_small_and_there() -> None:
    for document in DOCUMENTS:
        for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            assert 0 < (document.parent / picture).stat().st_size < 300_000, picture


# ----------------------------------------------------------------------------------------------------- numbers

_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+")
_NOT_MEASURED = re.compile(r"\banomalib \d+\.\d+\.\d+|\]\([^)]*\)|\bPython \d\.\d+|`[^`]*`")


def section(text: str, anchor: str) -> str:
    """The part of a document under the heading with this anchor, sub-sections included."""
    parts = re.split(r"^(#+) (.+)$", text, flags=re.MULTILINE)
    for at in range(1, len(parts), 3):
        if anchor in anchors(f"# {parts[at + 1]}"):
            later = range(at + 3, len(parts), 3)
            end = next((i for i in later if len(parts[i]) <= len(parts[at])), len(parts))
            return "".join(parts[at:end])
    raise AssertionError(f"no section {anchor}")


def numbers(text: str) -> set[str]:
    """Measured numbers of a text: `.95` and `0.95` are one, so are `1,195` and `1195`."""
    found = _NUMBER.findall(_NOT_MEASURED.sub(" ", text))
    return {one.replace(",", "").rstrip(".").removeprefix("0") or "0" for one in found}


def test_numbers_in_the_readme_are_those_of_the_results() -> None:
    """A line of the README that quotes numbers links to the section of docs/results.md that has them."""
    measured = [line for line in README.splitlines() if "docs/results.md#" in line]
    assert len(measured) >= 8
    for line in measured:
        texts = [section(RESULTS, anchor) for anchor in re.findall(r"docs/results\.md#([\w-]+)", line)]
        lacking = numbers(line) - numbers("\n".join(texts))
        assert not lacking, f"{sorted(lacking)} not in that section of docs/results.md: {line}"


@pytest.mark.parametrize("title", ["Measured", "Compared with anomalib"])
def test_every_number_of_these_sections_has_its_source(title: str) -> None:
    text = re.search(rf"^## {title}\n(.*?)(?=^## )", README, re.MULTILINE | re.DOTALL)[1]
    for line in text.splitlines():
        if numbers(line) and not line.startswith("|--"):
            assert "docs/results.md#" in line, line
