"""The site is built without a warning and loads nothing from elsewhere; its figures and references are up to date."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer
from documents import ROOT

from twinspect.bundle import FORMAT
from twinspect.cli import app


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it: any warning is an error (strict)."""
    target = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(target)]
    quiet = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
    }  # an announcement of the theme's authors, about no page of ours
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    return target


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"<link[^>]*\shref=[\"']?([^\"'\s>]+)", text)
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page


@pytest.mark.slow
def test_links_inside_a_page_stay_links(site: Path) -> None:
    assert '<a href="#constants">constants</a>' in (site / "results.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_command_option_and_route_is_in_the_reference(site: Path) -> None:
    from twinspect.server.app import build_app
    from twinspect.server.settings import Settings

    text = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands
    for name, command in commands.items():
        assert f"twinspect {name}" in text
        for parameter in command.params:
            assert all(f"<code>{flag}</code>" in text for flag in parameter.opts if flag.startswith("--"))
    routes = (site / "reference" / "http.html").read_text(encoding="utf-8")
    assert all(path in routes for path in build_app(Settings(), {}).openapi()["paths"])
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert 'id="twinspect.detector.Detector.predict"' in python


def test_the_bundle_format_is_as_its_page_says(quick, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "reference" / "bundle.md").read_text(encoding="utf-8")
    members, keys = (
        set(re.findall(r"^\| `([\w.]+)` \|", part, re.MULTILINE)) for part in page.split("## bundle.json")
    )
    with zipfile.ZipFile(quick.save(tmp_path / "model.twin")) as file:
        assert members == set(file.namelist())
        assert keys == set(json.loads(file.read("bundle.json")))
    assert f"number of this format, {FORMAT} now" in page


def test_figures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    script = ROOT / "docs" / "images" / "concepts.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == ["calibration.svg", "interference.png", "noisy-or.svg", "students.svg"]
    for name in drawn:
        if name.endswith(".svg"):
            new, kept = (
                re.sub(r"<style>.*?</style>", "", (place / name).read_text()) for place in (tmp_path, script.parent)
            )
            assert new == kept, f"draw {name} again"
