"""The speed command: shape of its report, not its numbers."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny import picture
from typer.testing import CliRunner

from twinspect.cli import app
from twinspect.commands.deploy import parse_batches
from twinspect.errors import ConfigError
from twinspect.inference.predictor import OnnxRuntime, TorchRuntime


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script of ``benchmarks/``."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="module")
def onnx_file(quick, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from twinspect.export import export

    path = tmp_path_factory.mktemp("bench") / "m.onnx"
    export(quick.fitted, path)
    return path


def test_bench_says_a_table_or_one_line_of_json(quick, parts: Path, tmp_path: Path) -> None:
    bundle = quick.save(tmp_path / "m.twin")
    options = ["--batch", "1,2", "--seconds", "0.2", "--images", str(parts)]
    found = CliRunner().invoke(app, ["bench", str(bundle), *options])
    assert found.exit_code == 0, found.output
    assert "{" not in found.stdout
    assert found.stdout.splitlines()[-1].startswith("peak memory of the process")
    found = CliRunner().invoke(app, ["bench", str(bundle), *options, "--json"])
    report = json.loads(found.stdout)
    assert [one["batch"] for one in report["batches"]] == [1, 2]
    for one in report["batches"]:
        assert one["images_per_s"] > 0
        assert one["latency_ms"]["p50"] <= one["latency_ms"]["p99"]
        assert one["graph_images_per_s"] > 0


def test_bench_names_an_image_that_cannot_be_read(quick, tmp_path: Path) -> None:
    bundle = quick.save(tmp_path / "m.twin")
    (tmp_path / "text.png").write_text("no picture")
    found = CliRunner().invoke(app, ["bench", str(bundle), "--images", str(tmp_path)])
    assert found.exit_code == 2
    assert "text.png: not an image that can be read" in found.output


@pytest.mark.parametrize("text", ["", "0", "a", "1,,2", "-1"])
def test_batches_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="accepted numbers from 1"):
        parse_batches(text)


@pytest.fixture
def named_file(quick, benchmark_module, tmp_path: Path) -> Path:
    return benchmark_module("graph_parts").named_export(quick.fitted.model, tmp_path / "named.onnx")


def test_parts_of_the_graph(named_file: Path, quick, benchmark_module) -> None:
    parts_of, model = benchmark_module("graph_parts").graph_parts, quick.fitted.model
    onnx_runtime = OnnxRuntime(named_file, model.size)
    for runtime, batch in ((TorchRuntime(model), 2), (onnx_runtime, 1), (onnx_runtime, 4)):
        found = parts_of(runtime, named_file, 0, np.zeros((batch, runtime.size, runtime.size, 3), np.uint8))
        assert set(found) <= {"teacher", "local", "semantic", "scorer", "other"}
        assert sum(found.values()) == pytest.approx(1)
        assert max(found.values()) < 1


def test_the_teacher_is_cut_out_of_the_same_graph(named_file: Path, quick, benchmark_module) -> None:
    """What is timed as the bare teacher reads raw pixels and says what the teacher says."""
    import onnx
    import onnxruntime as ort
    import torch

    benchmark = benchmark_module("graph_parts")
    proto = benchmark.bare_teacher(onnx.load(str(named_file)))
    assert not [node.name for node in proto.graph.node if node.name.startswith(("scorer/", "local/", "semantic/"))]
    model = quick.fitted.model
    pixels = np.stack([picture(i, model.size, model.size) for i in range(2)])
    found = ort.InferenceSession(proto.SerializeToString()).run(None, {"image": pixels})
    with torch.no_grad():
        features = model.teacher.features(model.teacher.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    # Every number of the deepest map is somewhere in what the cut graph says, in whatever layout.
    deepest = np.sort(features.maps[-1].numpy().ravel())
    assert any(one.size >= deepest.size and _holds(np.sort(one.ravel()), deepest) for one in found)
    with pytest.raises(AssertionError, match="nothing is read"):
        benchmark.bare_teacher(proto)
    assert benchmark.ratio(OnnxRuntime(named_file, model.size), named_file, 1, pixels) > 0


def _holds(sorted_values: np.ndarray, wanted: np.ndarray) -> bool:
    at = np.searchsorted(sorted_values, wanted).clip(1, len(sorted_values) - 1)
    apart = np.minimum(np.abs(sorted_values[at] - wanted), np.abs(sorted_values[at - 1] - wanted))
    return bool(apart.max() < 1e-3)


def test_training_says_time_and_bound_of_every_part(quick, parts: Path, tmp_path: Path, benchmark_module) -> None:
    bundle = quick.save(tmp_path / "m.twin")
    before = bundle.read_bytes()
    found = benchmark_module("training").profile(bundle, parts, batch=4, seconds=0.1)
    assert len(list(found.lines())) >= 4
    report = dataclasses.asdict(found)
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


def test_operations_of_a_depthwise_convolution_are_counted_by_group(benchmark_module) -> None:
    import torch

    _Meter = benchmark_module("training")._Meter

    layer, x = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), torch.randn(2, 8, 5, 5, requires_grad=True)
    with _Meter(counted=True) as forward:
        out = layer(x).sum()
    with _Meter(counted=True) as backward:
        out.backward()
    assert forward.spent[0] == 2 * (2 * 8 * 5 * 5) * 9
    assert backward.spent[0] == 2 * forward.spent[0]
    assert backward.spent[1] > forward.spent[1] > 4 * 2 * x.numel()


@pytest.mark.slow
def test_the_last_row_of_the_additions_is_the_model(tmp_path: Path) -> None:
    """Both scripts run seldom, and one of them makes scores anew from what it has taken from the library."""
    found = {}
    for script, last in (("additions.py", "+ students weighed by skill (default)"), ("accuracy.py", "| A, joint |")):
        done = subprocess.run(
            [
                sys.executable, str(Path(__file__).parents[1] / "benchmarks" / script), "--data", ".",
                "--sets", "textile", "--limit", "12", "--steps", "2", "--size", "64",
                *(["--methods", "ours-a"] if script == "accuracy.py" else []),
            ],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if last in line)
        found[script] = re.search(r"0\.\d{4}", line)[0]  # type: ignore[index]
    assert found["additions.py"] == found["accuracy.py"]
