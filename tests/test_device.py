"""Which device, in words where there is none; and a whole run on a device that only pretends to be one."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import RANDOM, RANDOM_CNN, run_config, same_tensors, train_samples
from typer.testing import CliRunner

from twinspect import Detector
from twinspect import device as device_module
from twinspect.cli import app
from twinspect.commands.fit import merged
from twinspect.config import RunConfig
from twinspect.device import choose_device, cpu_quota, gpu_arithmetic, granted_threads, usable_cores
from twinspect.errors import ConfigError
from twinspect.inference.predictor import TorchRuntime, load_predictor
from twinspect.training.distributed import backend_of, joined, own_device
from twinspect.training.fit import fit
from twinspect.training.loop import autocast

HERE = Path(__file__).parent
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "gpu", "tpu:0"])
def test_a_device_that_is_not_there_is_refused_with_what_is(name: str, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--device {name} cannot be used .*; accepted here: auto, cpu$"):
        choose_device(name)
    found = CliRunner().invoke(app, ["fit", str(parts), "--device", name, "--out", str(tmp_path / "m.twin")])
    assert found.exit_code != 0
    assert "accepted here: auto, cpu" in found.output
    assert not (tmp_path / "m.twin").exists()


@no_gpu
def test_auto_is_the_processor_without_a_gpu() -> None:
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    assert joined("auto").device == torch.device("cpu")


def test_of_several_processes_each_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert [own_device(name, 1) for name in ("auto", "cuda")] == [torch.device("cuda:1")] * 2
    assert own_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ConfigError, match="each takes its own GPU; type --device cuda"):
        own_device("cuda:1", 0)
    with pytest.raises(
        ConfigError, match="process 3 of this machine has no GPU.*there are 2; type --nproc-per-node 2"
    ):
        own_device("cuda", 2)
    assert "cuda:nccl" in backend_of(torch.device("cuda:1"))
    assert backend_of(torch.device("cpu")) == "gloo"


def test_the_processor_by_name_is_the_default_without_a_gpu(parts: Path) -> None:
    found = [fit(train_samples(parts), run_config(device=name)) for name in ("auto", "cpu")]
    assert same_tensors(found[0].model.state_dict(), found[1].model.state_dict())
    assert found[0].decision.to_dict() == found[1].decision.to_dict()


def test_going_on_takes_no_device_from_the_bundle() -> None:
    before = RunConfig.from_dict({"train": {"device": "cuda:7", "steps": 9}})
    train = merged(None, {"model": {}, "train": {"lr": 0.5}}, before).train
    assert (train.device, train.steps, train.lr) == ("auto", 9, 0.5)


@pytest.mark.parametrize("teacher", [RANDOM, RANDOM_CNN])
@pytest.mark.parametrize("cache_gb", [20.0, 0.0])
def test_bf16_learns_and_stays_finite(teacher: str, cache_gb: float, parts: Path, tmp_path: Path) -> None:
    """Without a cache the teacher is asked in bf16 as well; statistics are fp32 either way."""
    config = run_config(teacher, precision="bf16", steps=16, warmup=2, cache_gb=cache_gb)
    fitted = fit(train_samples(parts), config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row[term]) for row in rows for term in ("loss", "local", "semantic"))
    assert sum(row["loss"] for row in rows[-4:]) < 0.9 * sum(row["loss"] for row in rows[:4])
    for name, value in fitted.model.state_dict().items():
        kept_short = name.endswith(("whiten_KDD", "bank_nF", "basis_KRE"))  # large, by design
        assert value.dtype not in (torch.bfloat16, *(() if kept_short else (torch.float16,))), name
        assert bool(torch.isfinite(value.float()).all()), name


def test_auto_precision_is_bf16_on_a_gpu_only() -> None:
    x = torch.ones(2, 2)
    for precision, dtype in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(precision, torch.device("cpu")):
            assert (x @ x).dtype == dtype


@pytest.mark.parametrize(("precision", "short"), [("fp32", False), ("tf32", True)])
def test_products_on_a_gpu_are_what_was_asked_for(precision: str, short: bool) -> None:
    def now() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = now()
    with gpu_arithmetic("cuda:0", precision):
        assert now() == (short, short)
        with gpu_arithmetic("cpu"):
            assert now() == (short, short)
        with suppress(KeyError), gpu_arithmetic("cuda"):
            assert now() == (False, False)
            raise KeyError
        assert now() == (short, short)
    assert now() == before


def test_a_cpu_run_leaves_a_callers_own_flags_of_cudnn_alone() -> None:
    code = (
        "import torch\n"
        "from twinspect.device import gpu_arithmetic\n"
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "torch.backends.cudnn.rnn.fp32_precision = 'tf32'\n"
        "with gpu_arithmetic('cpu'): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("model", "teacher"), [("dual", RANDOM), ("snl", RANDOM_CNN)])
def test_nothing_is_left_on_another_device(model: str, teacher: str, parts: Path, tmp_path: Path) -> None:
    """`fit` from the first look at the teacher to thresholds, with a cache and without, on `pretend`'s device."""
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices made in Python")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TWINSPECT_HOME": str(tmp_path)}
    command = [sys.executable, str(HERE / "pretend.py"), str(parts), model, teacher]
    found = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.splitlines()[-1] == "same"


# ------------------------------------------------------------------------------------- beside other processes


def taken_by_openmp(command: list[str], **variables: str) -> str:
    """What the OpenMP library says of its settings when it is loaded."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    env = {**own, "OMP_DISPLAY_ENV": "VERBOSE", **variables}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    (spins,) = set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr))
    return spins


ENTRANCES = {
    "command": ["-m", "twinspect", "doctor"],
    "library": ["-c", "from twinspect import Detector; import torch"],
    "bundle": ["-c", "import sys; from twinspect.inference import load; load(sys.argv[1])"],
}
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP comes with torch on Linux")


@on_linux
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_threads_wait_briefly_and_what_the_user_sets_holds(entrance: str, bundle: Path) -> None:
    command = [*ENTRANCES[entrance], *([str(bundle)] if entrance == "bundle" else [])]
    assert taken_by_openmp(command) == str(device_module._SPINS)
    assert taken_by_openmp(command, GOMP_SPINCOUNT="77") == "77"
    if entrance == "library":
        assert taken_by_openmp(command, OMP_WAIT_POLICY="PASSIVE") == "0"


def test_nothing_is_set_where_torch_was_there_first() -> None:
    code = "import os, torch; before = dict(os.environ); from twinspect import Detector; print(before == os.environ)"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "True", done.stderr


def test_doctor_says_how_many_threads_compute() -> None:
    command = [sys.executable, "-m", "twinspect", "doctor"]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
    assert "threads of torch: 1" in said
    assert "GOMP_SPINCOUNT" not in said


CONTROL_GROUPS = {
    "second version, in a container": ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
    "second version, a service": ("0::/system/x.service\n", {"system/x.service/cpu.max": "400000 100000"}, 4),
    "a folder above limits more": (
        "0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000", "cpu.max": "900000 100000"}, 2,
    ),
    "no limit": ("1:cpu:/\n0::/\n", {"cpu.max": "max 100000"}, math.inf),
    "first version": ("3:memory:/x\n2:cpu,cpuacct:/docker/1f\n", {}, math.inf),
    "damaged": ("0::/\n", {"cpu.max": "soon"}, math.inf),
    "no control groups": (None, {}, math.inf),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTROL_GROUPS)
def test_time_that_a_container_is_granted(case: str, tmp_path: Path) -> None:
    names, files, expected = CONTROL_GROUPS[case]
    if names is not None:
        (tmp_path / "own").write_text(names)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(f"{text}\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "own") == expected


@pytest.mark.parametrize(("quota", "threads"), [(math.inf, 0), (1.9, 1), (0.3, 1), (4.0, 4), (64.0, 0)])
def test_threads_follow_the_time_that_is_granted(quota: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert granted_threads() == threads
    assert usable_cores() == (threads or len(os.sched_getaffinity(0)))
    monkeypatch.delitem(sys.modules, "torch")
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    device_module.share_cores()
    assert os.environ.get("OMP_NUM_THREADS") == (str(threads) if threads else None)
    os.environ["MKL_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "3"
    device_module.share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_runtime_on_another_device_leaves_the_model_on_the_cpu(quick: Detector) -> None:
    """Whoever predicted on a GPU can still save and update: `meta` stands for the other device."""
    model = quick.fitted.model
    runtime = TorchRuntime(model, "meta")
    assert {str(tensor.device) for tensor in runtime.model.state_dict().values()} == {"meta"}
    assert {str(tensor.device) for tensor in model.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize(
    ("precision", "message"), [("tf32", "--precision tf32 is for a GPU, and "), ("bf16", "accepted fp32 or tf32")]
)
@no_gpu
def test_a_precision_that_would_not_hold_is_refused(precision: str, message: str, bundle: Path, parts: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_predictor(bundle, device="auto", precision=precision)
    with pytest.raises(ConfigError, match="an exported model has its own precision"):
        load_predictor(bundle.with_suffix(".onnx"), precision=precision)
    done = CliRunner().invoke(app, ["predict", str(bundle), str(parts), "--precision", precision])
    assert (done.exit_code, precision in done.output) == (2, True)


@pytest.mark.slow
def test_the_script_for_gpus_runs(tmp_path: Path) -> None:
    """Where there is no GPU it is seldom run, and a change of the library would break it unseen."""
    small = ["--arch", "vit_tiny_patch16_224", "--steps", "3", "--stable-size", "64", "--size", "64", "--timed", "7"]
    done = subprocess.run(
        [
            sys.executable, str(HERE.parent / "benchmarks" / "gpu.py"), "--device", "cpu", "--batch", "4",
            "--models", "vit_tiny_patch16_224", "--sizes", "64", "--images", "2", "--seconds", "0.01",
            "--matrix", "64", *small,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["training"]["stability"]["losses_finite"]
    assert found["training"]["step"]["warm"]["seconds"] > 0
    exact, rounded, short = found["rows"]
    assert (exact["precision"], rounded["precision"], short["precision"]) == ("fp32", "tf32", "bf16")
    assert exact["gap_largest"] == rounded["gap_largest"] == 0.0 < short["gap_largest"]  # a CPU has no tf32
