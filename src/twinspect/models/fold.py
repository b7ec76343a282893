"""Frozen networks made faster without changing what they compute, nor their weights by name, shape or hash.

Batch norms are folded into the convolutions before them (a third less time on a CPU), and the 'same' padding of
TensorFlow's networks (a fifth less) and activations that clip (a seventh) become part of the convolutions. `prepared`
does it for a trained model that predicts.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from twinspect.models.contract import AnomalyModel

_CLIPS = (nn.ReLU, nn.ReLU6)


@torch.no_grad()
def fold_batch_norms(net: nn.Module, run: Callable[[], object] | None = None) -> None:
    """Fold every batch norm that follows a convolution directly.

    What clips right behind a norm, and padding of TensorFlow's kind, moves into the convolutions: see `FrozenConv`.

    Which norm follows which convolution is read from a forward pass (``run``; by default of a tiny image through
    ``net``), so any CNN works; a norm fed by anything else is left alone. A convolution that also feeds something
    else (pre-activation networks) is not folded. The network must be in eval mode and stays frozen for life.
    """
    replaced: dict[int, nn.Module] = {}
    for conv, norm in _adjacent(net, run or (lambda: net(torch.zeros(1, 3, 64, 64)))):
        _fold(conv, norm)
        # What timm's combined norm-and-activation layers still have to do once the norm is gone.
        then = norm.act if isinstance(getattr(norm, "act", None), nn.Module) else nn.Identity()
        if type(then) in _CLIPS and FrozenConv.accepts(conv):
            replaced[id(conv)], then = FrozenConv(conv, then), nn.Identity()
        replaced[id(norm)] = then
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
            elif pads_unevenly(child):
                setattr(parent, name, FrozenConv(child))


class FrozenConv(nn.Module):
    """A convolution that pads TensorFlow's way without a copy, and clips its output before it leaves the CPU's cache.

    TensorFlow's 'same' padding of a k x k convolution of stride 2 is (k - 3) / 2 before and (k - 1) / 2 behind an
    even side. No convolution takes two paddings, so timm copies its input to pad it, which takes about as long as the
    convolution. With a row and a column of zeros before its kernel the convolution has k // 2 on both sides. Odd
    sides have equal paddings already. The kernel is enlarged at every call (a few kilobytes).

    The weights stay as they are, so that hashes, bundles and whatever loads weights later know nothing of this.
    ``then`` follows the convolution directly: a ReLU, a ReLU6, or None.
    """

    def __init__(self, conv: nn.Conv2d, then: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.same = pads_unevenly(conv)
        side = conv.kernel_size[0] // 2
        self.padding = (side, side) if self.same else cast(tuple[int, int], conv.padding)
        self.then = then

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether a module is a plain convolution, or one of TensorFlow's that a plain one can stand in for."""
        if type(module) is nn.Conv2d:
            return module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return pads_unevenly(module)

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """B x D x H x W to B x O x h x w, clipped."""
        weight = self.weight
        if self.same:
            weight = F.pad(weight, (1 - x_BDHW.shape[3] % 2, 0, 1 - x_BDHW.shape[2] % 2, 0))
        # Where torch's own compiler would let oneDNN clip; it knows no gradients, no autocast and no export.
        usual = x_BDHW.device.type == "cpu" and x_BDHW.dtype == weight.dtype == torch.float32
        recorded = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        if self.then is not None and usual and not recorded and _has_clipping():
            where = (self.padding, self.stride, self.dilation, self.groups)
            return _clipped(x_BDHW, weight, self.bias, where, isinstance(self.then, nn.ReLU6))
        out = F.conv2d(x_BDHW, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return out if self.then is None else cast(Tensor, self.then(out))


def pads_unevenly(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is one of timm's convolutions of stride 2 with TensorFlow's padding, as `FrozenConv` knows."""
    if type(module).__name__ != "Conv2dSame" or not isinstance(module, nn.Conv2d):
        return False
    side, other = module.kernel_size
    padded = side == other and side % 2 == 1 and side > 1  # a kernel of one position is never padded
    return bool(padded and module.stride == (2, 2) and module.dilation == (1, 1))


def _clipped(
    x_BDHW: Tensor, weight: Tensor, bias: Tensor | None, where: tuple[Any, Any, Any, int], at_six: bool
) -> Tensor:
    kind, ends = ("hardtanh", [0.0, 6.0]) if at_six else ("relu", [])
    return cast(Tensor, torch.ops.mkldnn._convolution_pointwise(x_BDHW, weight, bias, *where, kind, ends, ""))


@functools.cache
def _has_clipping() -> bool:
    """Whether this torch on this CPU has the operator, and it does what is expected.

    It is torch's own for compiled graphs, not promised to stay, and was measured on x86 only.
    """
    if not torch._C._has_mkldnn or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    x, weight = torch.linspace(-9.0, 9.0, 50).reshape(1, 2, 5, 5), torch.ones(3, 2, 1, 1)
    plain = F.conv2d(x, weight)
    try:
        clipped = [_clipped(x, weight, None, ((0, 0), (1, 1), (1, 1), 1), at_six) for at_six in (False, True)]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(clipped[0], plain.relu()) and torch.allclose(clipped[1], plain.clamp(0.0, 6.0))


def _adjacent(net: nn.Module, run: Callable[[], object]) -> list[tuple[nn.Conv2d, Any]]:
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


_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def prepared(model: AnomalyModel) -> AnomalyModel:
    """The model for prediction: a copy that shares what it can, or the model itself where nothing can be gained.

    It must be in eval mode, on the CPU.
    """
    idle = not model.scorer.students_count()
    if not idle and not any(isinstance(module, nn.BatchNorm2d) for module in model.student.modules()):
        return model
    ready, size = _shallow(model), model.size
    if idle:
        ready.scorer = _shallow(model.scorer)
        ready.scorer.asks_students = False
        return ready
    ready.student = copy.deepcopy(model.student)
    ready.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fold_batch_norms(ready.student, lambda: ready(torch.zeros(1, 3, size, size)))
    return ready


def _shallow(module: _Module) -> _Module:
    """A copy whose children and buffers can be replaced."""
    copied = copy.copy(module)
    copied._modules, copied._buffers = dict(module._modules), dict(module._buffers)
    return copied
