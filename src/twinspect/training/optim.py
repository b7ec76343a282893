"""Optimiser and schedule of the published recipe: StableAdamW, linear warm-up, cosine to a tenth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

_PORTION = 1 << 24  # values updated at a time


class StableAdamW(Optimizer):
    """AdamW whose step is divided by max(1, RMS(g / (sqrt(v) + eps))) per tensor (Wortsman et al., 2023).

    The clipping takes the place of gradient clipping where single batches surprise the second moment.
    With ``amsgrad`` v is the largest second moment so far, as Dinomaly uses it. State per tensor: ``exp_avg``,
    ``exp_avg_sq``, ``max_exp_avg_sq`` (with ``amsgrad``) and ``step`` (a tensor, so that it can be stored).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        amsgrad: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameters in _portions(parameter for parameter in group["params"] if parameter.grad is not None):
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Many tensors together: a GPU gets a few large kernels, and is never waited for."""
        grads = [cast(Tensor, parameter.grad) for parameter in parameters]
        states = [self._state_of(parameter, group["amsgrad"]) for parameter in parameters]
        averages = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        beta_1, beta_2 = group["betas"]
        counts = [float(state["step"]) for state in states]  # on the CPU, whatever the device
        torch._foreach_lerp_(averages, grads, 1 - beta_1)
        torch._foreach_mul_(squares, beta_2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta_2)
        if group["amsgrad"]:
            largest = [state["max_exp_avg_sq"] for state in states]
            torch._foreach_maximum_(largest, squares)
            squares = largest
        lengths = list(torch._foreach_div(squares, [1 - beta_2**count for count in counts]))
        torch._foreach_sqrt_(lengths)
        torch._foreach_add_(lengths, group["eps"])
        rates = self._rates(grads, lengths, group["lr"])
        steps = torch._foreach_div(averages, [1 - beta_1**count for count in counts])
        torch._foreach_div_(steps, lengths)
        torch._foreach_mul_(steps, rates)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, steps)

    def _state_of(self, parameter: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            if amsgrad:
                state["max_exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        return state

    @staticmethod
    def _rates(grads: list[Tensor], lengths: list[Tensor], rate: float) -> list[Tensor]:
        """Learning rate of every tensor, divided where its gradient surprises the second moment; scalars."""
        ratios = torch._foreach_div(grads, lengths)
        rms = torch._foreach_div(torch._foreach_norm(ratios), [ratio.numel() ** 0.5 for ratio in ratios])
        return list((rate / torch.stack(rms).clamp_min(1.0)).unbind())


def _portions(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters in lists of so many values; what is computed of one list is as large as it several times over."""
    part: list[Tensor] = []
    for parameter in parameters:
        part.append(parameter)
        if sum(parameter.numel() for parameter in part) >= _PORTION:
            yield part
            part = []
    if part:
        yield part


def schedule(step: int, steps: int, warmup: int, final: float = 0.1) -> float:
    """Factor of the peak learning rate at a step: linear warm-up, then a cosine to ``final``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
