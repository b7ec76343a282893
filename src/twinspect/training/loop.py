"""The one training loop: step, log, checkpoint, resume; deterministic for a seed on one machine.

Every step seeds its own noise from (seed, step) and its own batch from (seed, epoch), so a run killed at any
moment and resumed from its last checkpoint gives bit-identical weights on a CPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twinspect.config import TrainConfig
from twinspect.errors import TrainingError
from twinspect.models.contract import AnomalyModel, Observed
from twinspect.training.distributed import ALONE, Group
from twinspect.training.optim import StableAdamW, schedule
from twinspect.training.resume import LOG, load_checkpoint, save_checkpoint
from twinspect.training.source import FeatureSource
from twinspect.types import Progress


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What training did: steps taken, seconds, why it stopped, last loss terms, images of a step here."""

    steps: int
    seconds: float
    stopped: str
    terms: dict[str, float]
    batch: int

    def numbers(self) -> dict[str, Any]:
        """For the record of a run."""
        terms = {name: round(value, 6) for name, value in self.terms.items()}
        return {"steps": self.steps, "seconds": round(self.seconds, 1), "stopped": self.stopped, **terms}


def train(
    model: AnomalyModel,
    source: FeatureSource,
    indices: Sequence[int],
    config: TrainConfig,
    work: Path | None,
    progress: Progress,
    fingerprint: str = "",
    group: Group = ALONE,
) -> TrainReport:
    """Train both students in place on the samples ``indices`` of a source.

    Checkpoint and log are kept in ``work``, from which a killed run with the same ``fingerprint`` goes on. The
    processes of a ``group`` share every batch; all end with the same weights. A loss that is not finite raises
    `TrainingError`.
    """
    if not config.steps:
        model.eval()
        return TrainReport(0, 0.0, "no steps asked for", {}, 0)
    student, optimiser = model.student, make_optimiser(model, config)
    start = _resumed(student, optimiser, work, fingerprint, group)
    log = _Log(work if group.leads else None, start)
    student.train()
    began, terms, stopped, done = time.monotonic(), dict[str, float](), "steps", start
    with group.averaging(model):
        for step, part, observed, small in _given(source, indices, config, start, group):
            for students in optimiser.param_groups:
                students["lr"] = students["peak"] * schedule(step, config.steps, config.warmup)
            with autocast(config.precision, group.device), group.one_batch():
                losses = model.losses(observed, small, step, config)
            terms = group.mean(_numbers(losses))
            if not all(math.isfinite(value) for value in terms.values()):
                raise _not_finite(terms, source, part, step)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(losses["loss"])
            for students in optimiser.param_groups:
                torch.nn.utils.clip_grad_norm_(students["params"], config.clip)
            optimiser.step()
            done = step + 1
            log.write(step, terms, len(part) * group.world)
            progress(f"training  {_say(terms)}", done, config.steps)
            over = config.time_budget_s and group.agree(time.monotonic() - began > config.time_budget_s)
            due = done % config.checkpoint_every == 0 or done == config.steps or over
            if work is not None and group.leads and due:
                save_checkpoint(work, student, optimiser, done, fingerprint)
            if over:
                stopped = "time budget"
                break
    model.eval()
    batch = min(config.batch, len(indices)) // group.world
    return TrainReport(done, time.monotonic() - began, stopped, terms, batch)


def _given(
    source: FeatureSource, indices: Sequence[int], config: TrainConfig, start: int, group: Group
) -> Iterator[tuple[int, list[int], Observed, Tensor]]:
    """(step, this process's images, teacher's answer, pixels), read one step ahead of their use; seeds every step."""
    steps, coming = tee((step, group.mine(part)) for step, part in _batches(indices, config, start))
    batches = source.ahead(part for _, part in coming)
    for step, part in steps:
        torch.manual_seed(config.seed * 1_000_003 + step)
        with autocast(config.precision, group.device):  # a teacher that is asked at every step
            batch = next(batches)
        yield step, part, *batch


def _resumed(student: nn.Module, optimiser: StableAdamW, work: Path | None, fingerprint: str, group: Group) -> int:
    """Steps that a killed run had taken, its state loaded by rank 0; the students' weights follow on wrapping."""

    def loaded() -> tuple[int, dict[str, Any]]:
        start = load_checkpoint(work, student, optimiser, fingerprint) if work is not None else 0
        return start, optimiser.state_dict() if start and group.world > 1 else {}

    start, state = group.share(loaded)
    if state and not group.leads:
        optimiser.load_state_dict(state)
    return start


def make_optimiser(model: AnomalyModel, config: TrainConfig) -> StableAdamW:
    """One optimiser with the model's own groups: students may learn at different rates."""
    groups = [{**group, "peak": group["lr"]} for group in model.parameter_groups(config)]
    return StableAdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def _batches(indices: Sequence[int], config: TrainConfig, start: int) -> Iterator[tuple[int, list[int]]]:
    """(step, indices) from a step on; each epoch is one seeded permutation, the last batch is filled up."""
    batch = min(config.batch, len(indices))
    per_epoch = -(-len(indices) // batch)
    epoch, order = -1, []
    for step in range(start, config.steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            generator = torch.Generator().manual_seed(config.seed * 7_919 + epoch)
            order = torch.randperm(len(indices), generator=generator).tolist()
            order += order[: per_epoch * batch - len(order)]
        place = (step % per_epoch) * batch
        yield step, [indices[i] for i in order[place : place + batch]]


def _numbers(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Every term as a number; a GPU is waited for once."""
    values = torch.stack([value.detach().double() for value in losses.values()]).tolist()
    return dict(zip(losses, values, strict=True))


def _not_finite(terms: Mapping[str, float], source: FeatureSource, part: list[int], step: int) -> TrainingError:
    names = ", ".join(source.samples[i].image.name for i in part[:3])
    return TrainingError(
        f"the loss is not finite at step {step} ({_say(terms)}); batch with {names} ... "
        "Lower the learning rate (--lr), or train with --precision fp32. The last checkpoint is kept"
    )


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context a step's forward pass runs in at a precision (`config.PRECISIONS`) on a device."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _say(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in values.items())


class _Log:
    """JSON lines, one a step; lines of a broken run beyond its checkpoint are dropped."""

    def __init__(self, work: Path | None, start: int) -> None:
        self._path, self._began = work / LOG if work is not None else None, time.monotonic()
        if self._path is not None and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            self._path.write_text("".join(line for line in lines if _step_of(line) < start), encoding="utf-8")

    def write(self, step: int, terms: Mapping[str, float], images: int) -> None:
        if self._path is None:
            return
        row = {"step": step, **terms, "images": images, "seconds": round(time.monotonic() - self._began, 3)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 60  # a line cut off by a kill
