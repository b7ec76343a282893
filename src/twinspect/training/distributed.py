"""Training on several processes that together do exactly what one would, started by ``torchrun`` (or by Ray Train).

The batch of a step is cut into equal slices, one a process; `DistributedDataParallel` averages students' gradients.
Three things of a step see the whole batch, and would differ from one process if every process went by its own slice:
the bottleneck's noise, batch norms, and the limit that tells easy positions from hard ones. `OneBatch` gives them
the whole batch, so that the loss does not depend on the number of processes. Only the process of rank 0 writes files.

Everything after the steps (statistics, calibration) every process computes for itself from the same weights, so all
of them end with the same model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from twinspect.device import choose_device
from twinspect.errors import ConfigError, TrainingError
from twinspect.losses import easy_limit
from twinspect.models.contract import AnomalyModel
from twinspect.models.layers import AllSum, noise

T = TypeVar("T")
_PATIENCE = timedelta(hours=2)  # for a process that decodes a large set; one that died is noticed at once


@dataclass(frozen=True, slots=True)
class Group:
    """The processes of a run."""

    rank: int = 0  # of this one; 0 writes files and talks
    world: int = 1  # how many there are
    local_rank: int = 0  # these two: the same among those of this machine
    local_world: int = 1
    whole: Any = None  # channel for what sees the whole batch; its traffic may cross that of the gradients
    device: torch.device = torch.device("cpu")  # of this process's model and batches

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def mine(self, part: Sequence[T]) -> list[T]:
        """This process's slice of a batch; refused where it cannot be divided equally."""
        if len(part) % self.world:
            raise ConfigError(
                f"--batch: {len(part)} images a step cannot be divided among {self.world} processes; take a multiple "
                f"of {self.world} (and no more than there are training images)"
            )
        each = len(part) // self.world
        return list(part[self.rank * each : (self.rank + 1) * each])

    def gathered(self, value: T) -> list[T]:
        """What every process gives, by rank; each waits for all."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            with self._reaching_others():
                dist.all_gather_object(values, value)
        return values

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Means over the processes: of equal slices, those of the whole batch."""
        rows = self.gathered(values)
        return {name: sum(row[name] for row in rows) / self.world for name in values}

    def share(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0, on every process."""
        values: list[Any] = [make() if self.leads else None]
        if self.world > 1:  # not gathered: a checkpoint's state would be sent as often as there are processes
            with self._reaching_others():
                dist.broadcast_object_list(values, src=0)
        return cast(T, values[0])

    def refuse_difference(self, digest_here: str, count: int) -> None:
        """Compare a digest of each process's images and settings; where one differs from rank 0, all stop."""
        answers = self.gathered((digest_here, count))
        first, images = answers[0]
        if other := [f"{rank} ({number} images)" for rank, (digest, number) in enumerate(answers) if digest != first]:
            raise TrainingError(
                f"the processes do not have the same images or settings: rank 0 has {images} images, different on "
                f"rank {', '.join(other)}. Give every machine the same files, settings and version"
            )

    @contextmanager
    def averaging(self, model: AnomalyModel) -> Iterator[None]:
        """While entered, the students' gradients are averaged; at its start all get the weights of rank 0."""
        if self.world == 1:
            yield
            return
        student = model.student
        try:
            with self._reaching_others():
                model.student = nn.parallel.DistributedDataParallel(student, static_graph=True)
                yield
        finally:
            model.student = student

    @contextmanager
    def _reaching_others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise TrainingError(
                f"rank {self.rank} of {self.world}: the other processes cannot be reached any more "
                f"({str(error).splitlines()[0][:200]}); the first error above says why. The last checkpoint is kept"
            ) from None


ALONE = Group()


def joined(device: str = "cpu") -> Group:
    """The processes that ``torchrun`` or Ray Train started; this one alone if neither did.

    Of several processes each takes the GPU of its local rank. A ConfigError where there is no such device, or fewer
    of them than processes; a TrainingError where the others cannot be reached.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_available() or (world == 1 and not dist.is_initialized()):
        return Group(device=torch.device(choose_device(device)))
    here = own_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        try:
            dist.init_process_group(backend_of(here), timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(f"the processes of this run did not find each other ({error})") from None
    return _group(dist.get_rank(), dist.get_world_size(), here)


def own_device(device: str, local_rank: int) -> torch.device:
    """The device of one of several processes of a machine, each of which needs a GPU of its own."""
    chosen = torch.device(choose_device(device))
    if chosen.type != "cuda":
        return chosen
    if ":" in device:
        raise ConfigError(f"--device {device} with several processes: each takes its own GPU; type --device cuda")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"process {local_rank + 1} of this machine has no GPU of its own, there are {count}; "
            f"type --nproc-per-node {count}, or --device cpu"
        )
    return torch.device("cuda", local_rank)


def backend_of(device: torch.device) -> str:
    """What carries tensors between processes: NCCL those on GPUs, gloo all others."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@lru_cache(maxsize=1)
def _group(rank: int, world: int, device: torch.device) -> Group:
    local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    whole = dist.new_group(backend=backend_of(device), timeout=_PATIENCE)
    return Group(rank, world, *local, whole, device)


class OneBatch(TorchFunctionMode):
    """While entered, the three functions that see a whole batch see it; everything else is left alone."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group
        whole_noise = partial(noise, rank=group.rank, world=group.world)  # as one process draws it, by the same seed
        self._ours: dict[Any, Callable[..., Any]] = {
            noise: whole_noise,
            F.batch_norm: self._batch_norm,
            easy_limit: self._easy_limit,
        }

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every function while the context is entered."""
        return self._ours.get(function, function)(*arguments, **(named or {}))

    def _easy_limit(self, distance_BN: Tensor, share: float) -> Tensor:
        parts = [torch.empty_like(distance_BN) for _ in range(self.group.world)]
        dist.all_gather(parts, distance_BN.contiguous(), group=self.group.whole)
        return easy_limit(torch.cat(parts), share)

    def _sum(self, values: Tensor) -> Tensor:
        """Over the processes, with gradients."""
        return cast(Tensor, AllSum.apply(values, self.group.whole))  # type: ignore[no-untyped-call]

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        wide, axes = x.float(), [0, *range(2, x.dim())]
        count = self.group.world * x.numel() // x.shape[1]
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean = self._sum(wide.sum(axes)) / count
        apart = wide - mean.view(shape)
        variance = self._sum(apart.square().sum(axes)) / count
        with torch.no_grad():
            if running_mean is not None and running_var is not None:
                running_mean.lerp_(mean.detach(), momentum)
                running_var.lerp_(variance.detach() * (count / max(count - 1, 1)), momentum)
        out = apart * (variance + eps).rsqrt().view(shape)
        out = out if weight is None else out * weight.view(shape)
        return (out if bias is None else out + bias.view(shape)).to(x.dtype)
