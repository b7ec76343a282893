"""Optimiser and schedule of the published recipe: StableAdamW, linear warm-up, cosine to a tenth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class StableAdamW(Optimizer):
    """AdamW whose step is divided by max(1, RMS(g / sqrt(v))) per tensor (Wortsman et al., 2023).

    The clipping takes the place of gradient clipping where single batches surprise the second moment.
    State per tensor: ``exp_avg``, ``exp_avg_sq`` and ``step`` (a tensor, so that it can be stored).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; returns what ``closure`` returned, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta_1, beta_2 = group["betas"]
        count = float(state["step"])
        state["exp_avg"].lerp_(grad, 1 - beta_1)
        state["exp_avg_sq"].mul_(beta_2).addcmul_(grad, grad, value=1 - beta_2)
        mean = state["exp_avg"] / (1 - beta_1**count)
        square = state["exp_avg_sq"] / (1 - beta_2**count)
        rms = (grad.square() / square.clamp_min(group["eps"] ** 2)).mean().sqrt()
        lr = group["lr"] / max(1.0, float(rms))
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-lr)


def schedule(step: int, steps: int, warmup: int, final: float = 0.1) -> float:
    """Factor of the peak learning rate at a step: linear warm-up, then a cosine to ``final``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
