"""Two processes are one: the same losses, the same model; when something is wrong, all of them say so and stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import RANDOM, RANDOM_CNN, run_config, train_samples
from torch import nn
from typer.testing import CliRunner

from twinspect.cli import app
from twinspect.errors import ConfigError
from twinspect.losses import easy_limit
from twinspect.models.layers import Noise
from twinspect.training.distributed import ALONE, Group, OneBatch
from twinspect.training.fit import fit

HERE = Path(__file__).parent
CONFIG = """
[model]
model = "{model}"
teacher = "{teacher}"
pretrained = false
size = 64
depth = 2
[train]
steps = 20
batch = 8
easy_ramp = 10
checkpoint_every = 5
"""
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def torchrun(*words: object, home: Path) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TWINSPECT_HOME": str(home)}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env, timeout=300)


def losses(work: Path) -> list[float]:
    rows = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(20))
    assert {row["images"] for row in rows} == {8}
    return [row["loss"] for row in rows]


def metrics(bundle: Path, data: Path, out: Path) -> dict[str, Any]:
    found = CliRunner().invoke(app, ["eval", str(bundle), str(data), "--json", str(out)])
    assert found.exit_code == 0, found.output
    return json.loads(out.read_text())["classes"]


def both_ways(parts: Path, config: Path) -> str:
    """Train alone and on two processes, beside the settings; what the two said."""
    folder = config.parent

    def words(name: str) -> list[object]:
        return ["fit", parts, "--config", config, "--out", folder / f"{name}.twin", "--work", folder / name]

    alone = CliRunner().invoke(app, [str(word) for word in words("alone")])
    assert alone.exit_code == 0, alone.output
    both = torchrun("-m", "twinspect", *words("both"), home=folder / "home")
    assert both.returncode == 0, both.stderr
    return both.stdout


@pytest.mark.slow
def test_two_processes_equal_one(parts: Path, tmp_path: Path) -> None:
    """A CNN: batch norms, dropout and hard mining all see the whole batch."""
    config = tmp_path / "c.toml"
    config.write_text(CONFIG.format(teacher=RANDOM_CNN, model="dual"))

    assert both_ways(parts, config).count("wrote ") == 1  # rank 0 alone writes and talks
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5, rel=0)
    found = [metrics(tmp_path / f"{name}.twin", parts, tmp_path / f"{name}.json") for name in ("both", "alone")]
    for name, row in found[0].items():
        for metric in ("image_auroc", "image_ap", "image_f1max"):
            assert row[metric] == found[1][name][metric]
        assert row["pixel_auroc"] == pytest.approx(found[1][name]["pixel_auroc"], abs=1e-5)


@pytest.mark.slow
def test_affinity_between_images_sees_the_whole_batch(parts: Path, tmp_path: Path) -> None:
    """The structural model: rounding errors grow tenfold every other step (reversing a batch shows the same in one
    process), so the first five steps are compared; the second already hangs on the gradients of the first.
    """
    config = tmp_path / "c.toml"
    config.write_text(CONFIG.format(teacher=RANDOM, model="snl"))

    both_ways(parts, config)
    found = [losses(tmp_path / name)[:5] for name in ("both", "alone")]
    assert found[0] == pytest.approx(found[1], abs=1e-5, rel=0)
    assert found[1][4] < found[1][0] - 0.1  # they moved


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_and_one_process_goes_on(parts: Path, tmp_path: Path) -> None:
    broken = torchrun(HERE / "ddp_worker.py", parts, tmp_path / "both", "fail", 12, home=tmp_path / "home")
    assert broken.returncode != 0
    assert "error: the disk of rank 1 went away" in broken.stderr
    assert not list((tmp_path / "both").glob("*.new"))
    config = run_config(RANDOM, steps=20, batch=8, easy_ramp=10, checkpoint_every=5)
    steps = []

    def said(stage: str, done: int, total: int) -> None:
        steps.extend([done] if stage.startswith("training") else [])

    fit(train_samples(parts), config, tmp_path / "both", said)
    assert steps == list(range(11, 21))  # from the checkpoint of two processes
    fit(train_samples(parts), config, tmp_path / "alone")
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5, rel=0)


@pytest.mark.slow
def test_different_data_are_noticed(parts: Path, tmp_path: Path) -> None:
    found = torchrun(HERE / "ddp_worker.py", parts, tmp_path / "w", "other-data", 0, home=tmp_path / "home")
    assert found.returncode != 0
    assert "the processes do not have the same images or settings: rank 0 has 24 images" in found.stderr
    assert "different on rank 1 (23 images)" in found.stderr


def test_slices_of_a_batch() -> None:
    first, second = (Group(rank, 2) for rank in (0, 1))
    assert (first.mine([1, 2, 3, 4]), second.mine([1, 2, 3, 4])) == ([1, 2], [3, 4])
    assert ALONE.mine([1, 2, 3]) == [1, 2, 3]
    assert ALONE.mean({"loss": 2.0}) == {"loss": 2.0}
    assert ALONE.share(lambda: 3) == 3
    with pytest.raises(ConfigError, match="3 images a step cannot be divided among 2 processes"):
        first.mine([1, 2, 3])


class Alternating:
    """Collectives of two processes, one after the other in this one: what both said is gone through in turn."""

    def __init__(self, others: list[torch.Tensor]) -> None:
        self.others = others

    def all_reduce(self, values: torch.Tensor, group: object = None) -> None:
        values += self.others.pop(0)

    def all_gather(self, parts: list[torch.Tensor], values: torch.Tensor, group: object = None) -> None:
        parts[0].copy_(values)
        parts[1].copy_(self.others.pop(0))


@pytest.mark.parametrize("channels_first", [False, True])
def test_noise_is_that_of_the_whole_batch(channels_first: bool) -> None:
    """Also where memory is in another order than the axes, as after a transpose."""
    x = torch.randn(6, 5, 7)
    x = x.transpose(1, 2) if channels_first else x
    layer = Noise(0.3)
    torch.manual_seed(1)
    whole = layer(x)
    for rank in range(3):
        torch.manual_seed(1)
        with OneBatch(Group(rank, 3)):
            assert torch.equal(layer(x[2 * rank : 2 * rank + 2]), whole[2 * rank : 2 * rank + 2])
    with OneBatch(Group(1, 3)):
        assert torch.equal(layer.eval()(x), x)


def test_batch_norm_and_easy_limit_see_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 3, 4, 4, dtype=torch.float32) * 5 + 7
    ours, theirs = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        theirs.weight.copy_(ours.weight)
    whole = theirs(x)
    mine, other = x[:4], x[4:]
    sums = [other.sum((0, 2, 3)), (other - x.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))]
    fake = Alternating([*sums, other])
    monkeypatch.setattr(torch.distributed, "all_reduce", fake.all_reduce)
    monkeypatch.setattr(torch.distributed, "all_gather", fake.all_gather)
    limit = easy_limit(x, 0.3)
    with OneBatch(Group(0, 2)):
        torch.testing.assert_close(ours(mine), whole[:4], atol=1e-5, rtol=1e-5)
        assert easy_limit(mine, 0.3) == limit
        assert torch.equal(
            ours.eval()(other), F.batch_norm(other, ours.running_mean, ours.running_var, ours.weight, ours.bias)
        )
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
