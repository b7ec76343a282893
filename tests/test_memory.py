"""Less memory, same result: losses and weights of cut steps are those of whole ones; budgets are kept or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RANDOM, RANDOM_CNN, run_config, train_samples
from typer.testing import CliRunner

from twinspect.cli import app
from twinspect.config import RunConfig
from twinspect.errors import ConfigError
from twinspect.training import loop, memory
from twinspect.training.distributed import ALONE
from twinspect.training.fit import Fitted, build_model, fit
from twinspect.training.memory import StepPlan, _Living, choose_plan, in_less_memory, unmoved

KINDS: dict[str, dict[str, Any]] = {
    "dual CNN": {"teacher": RANDOM_CNN},
    "dual ViT": {"teacher": RANDOM},
    "snl ViT": {"teacher": RANDOM, "model": "snl"},
    "snl CNN": {"teacher": RANDOM_CNN, "model": "snl"},
    "snl CNN forward": {"teacher": RANDOM_CNN, "model": "snl", "direction": "forward"},
}


def trained(parts: Path, config: RunConfig, micro: int, patch: pytest.MonkeyPatch, work: Path) -> Fitted:
    def plan(batch: int, *_: object) -> StepPlan:
        return StepPlan(batch, micro)

    patch.setattr(loop, "choose_plan", plan)
    return fit(train_samples(parts), config, work)


def losses(work: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (work / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "micro", "cache_gb"),
    [
        ("dual CNN", 3, 20.0),  # 3 does not divide the batch
        ("dual CNN", 2, 0.0),  # without a cache the teacher is asked in parts as well
        ("dual ViT", 1, 20.0),
        ("snl ViT", 3, 20.0),
        ("snl CNN", 2, 20.0),
    ],
)
def test_cut_steps_equal_whole_ones(
    kind: str, micro: int, cache_gb: float, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, batch norms, hard mining and affinities between images included."""
    # Rounding errors of the structural model on random networks grow tenfold every other step.
    steps = 4 if "snl" in kind else 8
    config = run_config(**KINDS[kind], steps=steps, batch=8, easy_ramp=4, warmup=1, cache_gb=cache_gb)
    whole = trained(parts, config, 8, monkeypatch, tmp_path / "whole")
    expected = losses(tmp_path / "whole")
    assert len(set(expected)) == steps
    cut = trained(parts, config, micro, monkeypatch, tmp_path / "cut")
    assert losses(tmp_path / "cut") == pytest.approx(expected, abs=1e-5, rel=0)
    assert cut.record["memory"]["micro_batches"] == -(-8 // micro)
    after = cut.model.student.state_dict()
    for name, value in whole.model.student.state_dict().items():
        if not value.is_floating_point() or "running" in name:  # moved once a step, not once a pass
            torch.testing.assert_close(after[name], value, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_cut_step(kind: str) -> None:
    model = small_model(kind)
    config = run_config(**KINDS[kind]).train
    observed, small = batch_of(model, 5)
    found = []
    for micro in (5, 2):
        torch.manual_seed(1)
        with unmoved(model.student), in_less_memory(model.student, StepPlan(5, micro), ALONE):
            model.losses(observed, small, 500, config)["loss"].backward()
        found.append({name: p.grad.clone() for name, p in model.student.named_parameters() if p.grad is not None})
        model.student.zero_grad()
    assert found[0].keys() == found[1].keys()
    largest = max(float(one.abs().max()) for one in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5 * largest, rtol=1e-4, msg=name)


def small_model(kind: str) -> Any:
    torch.manual_seed(0)
    model = build_model(run_config(**KINDS[kind]).model)
    model.student.train()
    return model


def batch_of(model: Any, count: int) -> tuple[Any, torch.Tensor]:
    size = model.shape.size
    image = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(2)).float()
    x = model.teacher.normalise(image)
    return model.observe(x), model.shrink(x)


# ----------------------------------------------------------------------------------------- the budget


def needs(of_micro: dict[int, float]) -> Any:
    """Stands in for steps, which need so many bytes."""
    tried: list[int] = []

    def needed(_device: torch.device, step: Any, _limit: float) -> float:
        tried.append(step.args[0].micro)
        return of_micro[tried[-1]]

    return needed, tried


@pytest.mark.parametrize(
    ("budget", "micro"), [(0.0, 16), (1.7, 16), (1.6, 16), (1.59, 8), (0.8, 8), (0.5, 4), (0.2, 1)]
)
def test_the_largest_micro_batch_that_fits(budget: float, micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, tried = needs({1: 0.2e9, 2: 0.3e9, 4: 0.4e9, 8: 0.8e9, 16: 1.6e9})
    monkeypatch.setattr(memory, "_needed", needed)
    plan = choose_plan(16, budget, 0, lambda _: None, torch.device("cpu"))
    assert plan == StepPlan(16, micro)
    assert tried == sorted(tried)  # the smallest first: what is too much is not tried twice over
    assert plan.parts == 16 // micro


def test_what_stays_beside_a_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    needed, _ = needs({1: 0.2e9, 2: 0.3e9, 3: 0.4e9})
    monkeypatch.setattr(memory, "_needed", needed)
    assert choose_plan(3, 0.41, 0, lambda _: None, torch.device("cpu")).whole
    assert choose_plan(3, 0.41, int(0.1e9), lambda _: None, torch.device("cpu")).micro == 2
    needed, _ = needs({1: 0.2e9})
    monkeypatch.setattr(memory, "_needed", needed)
    with pytest.raises(ConfigError, match=r"--memory-gb 0.25: a step needs 0.30 GB .* Type --memory-gb 0.35"):
        choose_plan(3, 0.25, int(0.1e9), lambda _: None, torch.device("cpu"))


def test_a_cut_step_is_seen_to_need_less() -> None:
    """Activations of a ViT's students, one image at a time instead of sixteen."""
    model = small_model("dual ViT")
    config = run_config(**KINDS["dual ViT"]).train
    observed, small = batch_of(model, 16)
    most = {}
    for micro in (16, 4, 1):
        with _Living() as living, unmoved(model.student), in_less_memory(model.student, StepPlan(16, micro), ALONE):
            model.losses(observed, small, 500, config)["loss"].backward()
        model.student.zero_grad()
        most[micro] = living.most
    gradients = sum(4 * p.numel() for p in model.student.parameters())
    assert gradients < most[1] < most[4] < most[16]
    assert most[16] - gradients > 2.5 * (most[1] - gradients)


def test_living_counts_what_lives_together() -> None:
    with _Living() as living:
        first = torch.zeros(1000)
        assert living.now == 4000
        view = first[10:]
        view += 1  # nothing new
        second = first + 1
        assert living.now == 8000
        del second
        assert living.now == 4000
        torch.zeros(500)
    assert (living.now, living.most) == (4000, 8000)


def test_a_step_that_is_tried_is_broken_off_before_it_takes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out by doing it, too large a step would end the process that asked."""
    most = {1: 10_000_000, 2: 20_000_000, 4: 30_000_000, 8: 90_000_000}
    lived: list[int] = []

    def step(plan: StepPlan) -> None:
        blocks = []
        for _ in range(most[plan.micro] // 1_000_000):
            blocks.append(torch.zeros(250_000))
            lived.append(4 * 250_000 * len(blocks))

    monkeypatch.setattr(memory, "resident_bytes", lambda: 1e8)
    monkeypatch.setattr(memory, "peak_bytes", lambda: 1e8)
    assert choose_plan(8, 0.14, 0, step, torch.device("cpu")) == StepPlan(8, 4)
    assert max(lived) <= 40_000_000
    with pytest.raises(ConfigError, match=r"needs 0.11 GB with one image"):
        choose_plan(8, 0.105, 0, step, torch.device("cpu"))


def test_fit_says_what_it_took_and_refuses_what_is_too_little(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        f'[model]\nteacher = "{RANDOM}"\npretrained = false\nsize = 64\ndepth = 2\n[train]\nsteps = 2\nbatch = 8\n'
    )
    words = ["fit", str(parts), "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "m.twin")]
    plain = CliRunner().invoke(app, words)
    assert plain.exit_code == 0, plain.output
    assert re.search(r"peak memory \d+ MB; steps of 8 images a process, in one piece", plain.output)
    refused = CliRunner().invoke(app, [*words, "--memory-gb", "0.05"])
    assert refused.exit_code != 0
    said = re.search(r"--memory-gb 0.05: a step needs (\S+) GB .* Type --memory-gb (\S+), or a", refused.output)
    assert said is not None, refused.output
    assert float(said[1]) < float(said[2])
    roomy = CliRunner().invoke(app, [*words, "--memory-gb", "1000"])
    assert "in one piece" in roomy.output
    assert CliRunner().invoke(app, [*words, "--memory-gb", "-1"]).exit_code != 0
