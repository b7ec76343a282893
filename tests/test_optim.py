"""Optimiser and schedule: against torch's AdamW, and the clipping and the curve by their formulas."""

import copy
import math

import pytest
import torch

from twinspect.training.loop import StableAdamW, schedule


def problem(seed: int = 0) -> tuple[torch.nn.Parameter, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(6, 5, generator=generator))
    return weight, torch.randn(6, 5, generator=generator)


def steps(make, gradients: list[torch.Tensor]) -> torch.Tensor:
    weight, _ = problem()
    optimiser = make([weight])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimiser.step()
    return weight.detach()


def test_equals_adamw_while_no_step_is_clipped() -> None:
    # Gradients that shrink never surprise the second moment, so RMS(g / sqrt(v)) stays at or below one.
    start = problem(1)[1]
    gradients = [start * 0.97**i for i in range(30)]
    options = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    ours = steps(lambda p: StableAdamW(p, **options), gradients)
    theirs = steps(lambda p: torch.optim.AdamW(p, **options), gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_amsgrad_equals_its_formula() -> None:
    """Dinomaly's: v never falls, and the clipping goes by the same denominator."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(6, 5, generator=generator) * scale for scale in (1.0, 10.0, 0.1, 0.1, 5.0)]
    lr, decay, eps = 0.01, 0.1, 1e-10
    options = {"lr": lr, "weight_decay": decay, "eps": eps, "betas": (0.9, 0.8)}
    ours = steps(lambda p: StableAdamW(p, amsgrad=True, **options), gradients)
    weight, average, square, largest = problem()[0].detach(), *[torch.zeros(6, 5) for _ in range(3)]
    for count, gradient in enumerate(gradients, start=1):
        average = 0.9 * average + 0.1 * gradient
        square = 0.8 * square + 0.2 * gradient**2
        largest = torch.maximum(largest, square)
        length = (largest / (1 - 0.8**count)).sqrt() + eps
        rate = lr / max(1.0, float((gradient / length).square().mean().sqrt()))
        weight = weight * (1 - lr * decay) - rate * average / (1 - 0.9**count) / length
    torch.testing.assert_close(ours, weight, rtol=1e-5, atol=1e-6)
    assert float((ours - steps(lambda p: StableAdamW(p, **options), gradients)).abs().max()) > 1e-3


def test_a_surprising_gradient_gets_a_smaller_step() -> None:
    base = problem(1)[1]
    gradients = [base] * 5 + [base * 1000]
    options = {"lr": 0.01, "weight_decay": 0.0}
    calm = steps(lambda p: StableAdamW(p, **options), gradients[:5])
    ours = (steps(lambda p: StableAdamW(p, **options), gradients) - calm).abs().mean()
    theirs = (steps(lambda p: torch.optim.AdamW(p, **options), gradients) - calm).abs().mean()
    square = (0.999 * (1 - 0.999**5) + 0.001 * 1e6) / (1 - 0.999**6)  # v after the jump, g = 1 before
    assert (theirs / ours).item() == pytest.approx(1000 / math.sqrt(square), rel=1e-2)


def test_decay_is_decoupled_and_follows_the_rate() -> None:
    weight, _ = problem()
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    StableAdamW([weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5))


def test_parameters_without_gradient_are_left_alone_and_state_can_be_stored() -> None:
    weight, target = problem()
    idle = torch.nn.Parameter(torch.ones(3))
    first = StableAdamW([weight, idle], lr=0.01, weight_decay=0.5)
    weight.grad = target.clone()
    first.step()
    assert torch.equal(idle, torch.ones(3))
    twin = torch.nn.Parameter(weight.detach().clone())
    second = StableAdamW([twin, torch.nn.Parameter(torch.ones(3))], lr=0.01, weight_decay=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for parameter, optimiser in ((weight, first), (twin, second)):
        parameter.grad = target * 0.5
        optimiser.step()
    assert torch.equal(weight, twin)
    assert all(isinstance(v, torch.Tensor) for state in first.state.values() for v in state.values())


def test_schedule_values() -> None:
    assert [schedule(s, 100, 10) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule(10, 100, 10) == pytest.approx(1.0)
    assert schedule(55, 100, 10) == pytest.approx(0.55)  # half way down a cosine from 1 to 0.1
    assert schedule(100, 100, 10) == schedule(500, 100, 10) == pytest.approx(0.1)
    falling = [schedule(s, 100, 10) for s in range(10, 101)]
    assert falling == sorted(falling, reverse=True)
    assert schedule(0, 5, 0) == pytest.approx(1.0)
    assert all(0 < schedule(s, 5, 20) <= 1 for s in range(5))  # fewer steps than warm-up
