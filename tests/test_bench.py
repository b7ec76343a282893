"""The speed command: shape of its report, not its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twinspect.cli import app
from twinspect.errors import ConfigError
from twinspect.export_commands import parse_batches


def test_bench_ends_with_one_line_of_json(quick, parts: Path, tmp_path: Path) -> None:
    bundle = quick.save(tmp_path / "m.twin")
    options = ["--batch", "1,2", "--seconds", "0.2", "--images", str(parts)]
    found = CliRunner().invoke(app, ["bench", str(bundle), *options])
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout.splitlines()[-1])
    assert [one["batch"] for one in report["batches"]] == [1, 2]
    for one in report["batches"]:
        assert one["images_per_s"] > 0
        assert one["latency_ms"]["p50"] <= one["latency_ms"]["p99"]
        assert set(one["share"]) == {"decode", "preprocess", "graph", "post"}
        assert sum(one["share"].values()) == pytest.approx(1, abs=1e-6)
        assert set(one["graph_share"]) == {"teacher", "local", "semantic", "scorer", "other"}
        assert one["ratio_to_teacher"] > 0


@pytest.mark.parametrize("text", ["", "0", "a", "1,,2", "-1"])
def test_batches_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="accepted numbers from 1"):
        parse_batches(text)
