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


def test_train_profile_says_time_and_bound_of_every_part(quick, parts: Path, tmp_path: Path) -> None:
    bundle = quick.save(tmp_path / "m.twin")
    before = bundle.read_bytes()
    options = ["--train", "--batch", "1,4", "--seconds", "0.1", "--images", str(parts)]
    found = CliRunner().invoke(app, ["bench", str(bundle), *options])
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout.splitlines()[-1])
    students = [f"{name} {way}" for name in ("local", "semantic") for way in ("forward", "backward")]
    assert set(report["parts"]) == {"decode", "teacher", "read", *students, "rest", "optimiser"}
    assert report["batch"] == 4
    assert report["steps"] >= 3
    for name, one in report["parts"].items():
        assert one["seconds"] >= 0, name
        bounds = one["gflop"] / report["gflop_per_s"], one["gigabytes"] / report["gigabytes_per_s"]
        assert one["bound_s"] == pytest.approx(max(bounds)), name
    for name in ("teacher", *students):
        assert report["parts"][name]["gflop"] > 0, name
    # A backward pass without its input's gradient costs between one and two forward passes.
    for name in ("local", "semantic"):
        ratio = report["parts"][f"{name} backward"]["gflop"] / report["parts"][f"{name} forward"]["gflop"]
        assert 1.0 <= ratio <= 2.5, name
    assert report["parts"]["optimiser"]["gigabytes"] > 0
    warm = sum(one["seconds"] for name, one in report["parts"].items() if name not in ("decode", "teacher"))
    assert report["warm_s"] == pytest.approx(warm)
    assert bundle.read_bytes() == before


def test_an_export_cannot_be_trained(quick, parts: Path, tmp_path: Path) -> None:
    from twinspect.bench import BenchOptions
    from twinspect.bench_train import bench_train

    path = tmp_path / "m.onnx"
    path.write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"give its bundle \(\.twin\)"):
        bench_train(BenchOptions(path), lambda _stage, _done, _total: None)


def test_operations_of_a_depthwise_convolution_are_counted_by_group() -> None:
    import torch

    from twinspect.bench_train import _Meter

    layer, x = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), torch.randn(2, 8, 5, 5, requires_grad=True)
    with _Meter(counted=True) as forward:
        out = layer(x).sum()
    with _Meter(counted=True) as backward:
        out.backward()
    assert forward.spent[0] == 2 * (2 * 8 * 5 * 5) * 9
    assert backward.spent[0] == 2 * forward.spent[0]
    assert backward.spent[1] > forward.spent[1] > 4 * 2 * x.numel()
