"""Fold frozen batch norms into the convolutions before them: same function, a third less time on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from twinspect.models.contract import AnomalyModel


@torch.no_grad()
def fold_batch_norms(net: nn.Module, run: Callable[[], object] | None = None) -> int:
    """Fold every batch norm that follows a convolution directly; returns how many were folded.

    Which norm follows which convolution is read from a forward pass (``run``; by default of a tiny image through
    ``net``), so any CNN works; a norm fed by anything else is left alone. A convolution that also feeds something
    else (pre-activation networks) is not folded. The network must be in eval mode and stays frozen for life.
    """
    pairs = _adjacent(net, run or (lambda: net(torch.zeros(1, 3, 64, 64))))
    for conv, norm in pairs:
        _fold(conv, norm)
    replaced = {id(norm) for _, norm in pairs}
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in replaced:
                setattr(parent, name, _activation(child))
    return len(pairs)


@torch.no_grad()
def folded(model: AnomalyModel) -> AnomalyModel:
    """The model for prediction: student's batch norms folded, channels last, in a copy; the rest is ``model``'s own.

    ``model`` itself stays as it is and can be trained on. It must be in eval mode, on the CPU.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.student.modules()):
        return model
    ready = copy.copy(model)
    ready._modules = dict(model._modules)
    ready.student = copy.deepcopy(model.student)
    ready.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = model.shape.size
    fold_batch_norms(ready.student, lambda: ready(torch.zeros(1, 3, size, size)))
    return ready


def _adjacent(net: nn.Module, run: Callable[[], object]) -> list[tuple[nn.Conv2d, Any]]:
    if any(isinstance(m, nn.BatchNorm2d) and not m.track_running_stats for m in net.modules()):
        return []
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensors are held, so that no id is used twice
    pairs: list[tuple[nn.Conv2d, Any]] = []

    def after_conv(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made[id(output)] = (module, output)

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))

    hooks = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_conv))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm))
    run()
    for hook in hooks:
        hook.remove()
    if len({id(conv) for conv, _ in pairs}) < len(pairs) or _is_preactivated(net):
        return []
    return pairs


def _is_preactivated(net: nn.Module) -> bool:
    """Pre-activation blocks hold a norm before their first convolution; their convolutions feed shortcuts too."""
    for block in net.modules():
        kinds = [type(m) for m in block.children() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
        if len(kinds) > 1 and issubclass(kinds[0], nn.BatchNorm2d):
            return True
    return False


def _fold(conv: nn.Conv2d, norm: Any) -> None:
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    conv.weight.mul_(scale[:, None, None, None])
    conv.bias = nn.Parameter(bias.clone(), requires_grad=False)


def _activation(norm: nn.Module) -> nn.Module:
    """What timm's combined norm-and-activation layers still have to do once the norm is gone."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()
