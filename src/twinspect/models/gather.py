"""What several training processes tell each other. Nothing here is needed, or imported, by one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All-gather whose gradient is the sum of what every process asks of a part, given to the part's owner."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        own: Tensor = total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)]
        return own, None


def gather_batch(part_B: Tensor, group: Any = None) -> Tensor:
    """Join the equal parts of a batch of all processes along the first dimension, in rank order, with gradients.

    A loss of the joined batch, computed by every process, gives each one its own part's gradient times the number
    of processes; averaging parameter gradients over processes, as data-parallel training does, then gives exactly
    the gradient of one process with the whole batch. Without a process group the part is the batch.

    Args:
        part_B: this process's part, B x ...
        group: process group; None takes the default one.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return part_B
    joined: Tensor = _Gather.apply(part_B, group)  # type: ignore[no-untyped-call]
    return joined
