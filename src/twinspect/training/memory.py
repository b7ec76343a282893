"""Steps in less memory, with the same result: what a batch couples sees all of it, the rest goes in parts.

Naive accumulation sums the gradients of micro-batches, and is wrong here. Batch norms (of a CNN's students, of a
CRAM) take their statistics from a batch, hard mining orders its positions, the inter-affinity compares its
images, and noise is drawn once for all of it. So the losses are always taken of the whole batch, and two things
are done to what lies below them, both exact:

* A part of the student without batch norms answers image by image. It runs in *micro-batches* that keep nothing but
  their answers; when the answers' gradient is known, each is run again, with the noise it had, and its gradient added
  (Gao et al., 2021, arXiv 2101.06983, call this gradient caching). Its share of memory falls with the micro-batch.
* A block with batch norms sees the whole batch. It keeps its input only and runs again in the backward pass
  (Chen et al., 2016, arXiv 1604.06174), without moving the running statistics a second time. Statistics of every one
  of fifty batch norms over micro-batches would cost fifty passes; in inverted residuals, whose insides are six times
  wider than what enters them, this saves as much as micro-batches of two or three images do.

Either costs one more forward pass of what it is done to. `choose_plan` measures steps, smallest first, and takes the
largest micro-batch that fits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from twinspect.errors import ConfigError
from twinspect.models.layers import noise
from twinspect.models.memory import peak_bytes, resident_bytes
from twinspect.training.distributed import Group, noise_of_slice

_SLACK = 1.1  # of what a step was seen to need: workspaces inside of operations are not seen


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How a step of ``batch`` images (of this process) is worked through: ``micro`` at a time."""

    batch: int
    micro: int

    @property
    def whole(self) -> bool:
        """Whether nothing is cut or computed twice."""
        return self.micro >= self.batch

    @property
    def parts(self) -> int:
        """Micro-batches a step."""
        return -(-self.batch // self.micro)


@contextmanager
def in_less_memory(student: nn.Module, plan: StepPlan, group: Group) -> Iterator[None]:
    """While entered, the student's forward and backward go by the plan."""
    with ExitStack() as patched:
        if not plan.whole:
            for module, coupled in _pieces(student):
                own = module.forward
                run: Callable[..., Any] = (
                    partial(_run_again, module, own, group)
                    if coupled
                    else partial(_run_in_parts, own, plan.micro, group)
                )
                module.forward = run
                patched.callback(delattr, module, "forward")
        yield


def _pieces(student: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The largest modules without batch norms (False), the smallest around one (True)."""
    for child in student.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _pieces(child)
        elif not _couples(child):
            if any(True for _ in child.children()):  # a single layer holds hardly more than its answer
                yield child, False
        elif any(_couples(inner) and not isinstance(inner, _BatchNorm) for inner in child.children()):
            yield from _pieces(child)
        elif not isinstance(child, _BatchNorm):
            yield child, True


def _couples(module: nn.Module) -> bool:
    return any(isinstance(one, _BatchNorm) for one in module.modules())


def _run_in_parts(forward: Callable[..., Any], micro: int, group: Group, *inputs: Any) -> Any:
    first = next(one for one in tree_leaves(inputs) if isinstance(one, Tensor))
    count = len(first)
    if count <= micro or not torch.is_grad_enabled():
        return forward(*inputs)
    noise, found = _Noise(first.device), []
    for start in range(0, count, micro):
        noise.replay()
        part = tree_map(lambda one, at=start: one[at : at + micro] if isinstance(one, Tensor) else one, inputs)
        contexts = partial(_parts_of_batch, group.rank * count + start, group.world * count)
        found.append(checkpoint(forward, *part, use_reentrant=False, context_fn=contexts))
    return tree_map(lambda *parts: torch.cat(parts), *found)


def _run_again(module: nn.Module, forward: Callable[..., Any], group: Group, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    contexts = partial(_second_time, module, group)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), contexts()))


@contextmanager
def _second_time(module: nn.Module, group: Group) -> Iterator[None]:
    with unmoved(module), group.one_batch():
        yield


@contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """Whatever runs inside, running statistics are afterwards what they were."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.data.copy_(before)  # .data: autograd takes no note of it


class _Noise:
    """State of the random numbers of the CPU and of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if self._gpu else None

    def replay(self) -> None:
        """Draw again what was drawn since."""
        own, other = self._states
        torch.set_rng_state(own)
        if other is not None and self._gpu is not None:
            torch.cuda.set_rng_state(other, self._gpu)


def _parts_of_batch(first: int, total: int) -> tuple[_PartOfBatch, _PartOfBatch]:
    return _PartOfBatch(first, total), _PartOfBatch(first, total)


class _PartOfBatch(TorchFunctionMode):
    """Gives a micro-batch its part of the whole batch's noise."""

    def __init__(self, first: int, total: int) -> None:
        super().__init__()
        self._first, self._total = first, total

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every function while the context is entered."""
        if function is not noise:
            return function(*arguments, **(named or {}))
        return self._noise(*arguments)

    def _noise(self, x: Tensor, p: float) -> Tensor:
        return noise_of_slice(x, p, self._first, self._total)


# ------------------------------------------------------------------------------------------- the plan


def choose_plan(
    batch: int, budget_gb: float, kept: int, step: Callable[[StepPlan], None], device: torch.device
) -> StepPlan:
    """The plan with the largest micro-batch whose step stays within a budget.

    Args:
        batch: images of a step.
        budget_gb: memory of the process, or of the GPU where the model lies there, in 10^9 bytes; 0 means no limit.
        kept: bytes that stay beside a step from the first one on: the optimiser's state.
        step: forward and backward by a plan, leaving nothing behind.
        device: of the model.

    Raises:
        ConfigError: even single images need more; the message says how much.
    """
    whole = StepPlan(batch, batch)
    if not budget_gb:
        return whole
    budget = budget_gb * 1e9
    best: StepPlan | None = None
    for plan in [*(StepPlan(batch, 1 << i) for i in range((batch - 1).bit_length())), whole]:
        # The first is tried to its end, to say what is least; the others are broken off before they take too much.
        needed = kept + _needed(device, partial(step, plan), budget - kept if best else math.inf)
        if needed > budget:
            break
        best = plan
    if best is None:
        raise ConfigError(
            f"--memory-gb {budget_gb:g}: a step needs {needed / 1e9:.2f} GB with one image at a time, of which the "
            f"least is fixed by model and batch. Type --memory-gb {_rounded_up(needed / 1e9)}, or a smaller --batch, "
            "--size or teacher"
        )
    return best


def _rounded_up(value: float) -> str:
    return f"{int(value * 20 + 1) / 20:.2f}"


def _needed(device: torch.device, step: Callable[[], None], limit: float) -> float:
    """Bytes that a step is seen to need, with all that is there already; infinite if it was broken off."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step()
        except torch.OutOfMemoryError:
            return math.inf
        return float(torch.cuda.max_memory_reserved(device))
    held = resident_bytes()
    try:
        with _Living((limit - held) / _SLACK) as living:
            step()
    except _TooMuch:
        return math.inf
    return float(max(held + _SLACK * living.most, peak_bytes()))


class _TooMuch(Exception):
    """A step that was tried went beyond its limit."""


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made while it is entered, and the most that lived at a time; ends what goes beyond."""

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.now = self.most = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in given:
                self._count(one.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._seen[place]

        self._seen[place] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)
        if self.now > self.limit:
            raise _TooMuch
