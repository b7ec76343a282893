"""The one training loop: batches, step, optimiser, checkpoint and log; deterministic for a seed on one machine.

Every step seeds its own noise from (seed, step) and its own batch from (seed, epoch), so a run killed at any
moment and resumed from its last checkpoint gives bit-identical weights on a CPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import tee
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from twinspect.config import TrainConfig
from twinspect.errors import TrainingError
from twinspect.models.contract import AnomalyModel, Observed
from twinspect.training.distributed import ALONE, Group, OneBatch
from twinspect.training.source import FeatureSource
from twinspect.types import Progress

_CHECKPOINT = "checkpoint.safetensors"
_SHORT_SAVE = 0.2  # seconds
LOG = "train.jsonl"
LOCK = "lock"  # held by the run that writes in a folder


def train(
    model: AnomalyModel,
    source: FeatureSource,
    indices: Sequence[int],
    config: TrainConfig,
    work: Path | None,
    progress: Progress,
    fingerprint: str = "",
    group: Group = ALONE,
) -> dict[str, Any]:
    """Train the students in place on the samples ``indices`` of a source; steps, seconds, why it stopped, last terms.

    Checkpoint and log are kept in ``work``, from which a killed run with the same ``fingerprint`` goes on. The
    processes of a ``group`` share every batch; all end with the same weights. A loss that is not finite raises
    `TrainingError`.
    """
    if not config.steps:
        model.eval()
        return {"steps": 0, "seconds": 0.0, "stopped": "no steps asked for"}
    optimiser = make_optimiser(model, config)
    folder = WorkFolder(work, model.student, optimiser, fingerprint) if work is not None and group.leads else None
    start, terms = _resumed(folder, optimiser, group)
    model.student.train()
    began, stopped, done = time.monotonic(), "steps", start
    one_batch = OneBatch(group) if group.world > 1 else contextlib.nullcontext()
    with group.averaging(model):
        for step, part, observed, small in _given(source, indices, config, start, group):
            for students in optimiser.param_groups:
                students["lr"] = students["peak"] * schedule(step, config.steps, config.warmup)
            with autocast(config.precision, group.device), one_batch:
                losses = model.losses(observed, small, step, config)
            terms = group.mean(_numbers(losses))
            if not all(map(math.isfinite, terms.values())):
                names = ", ".join(source.samples[i].image.name for i in part[:3])
                raise TrainingError(
                    f"the loss is not finite at step {step} ({_say(terms)}); batch with {names} ... "
                    "Lower the learning rate (--lr), or train with --precision fp32. The last checkpoint is kept"
                )
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(losses["loss"])
            for students in optimiser.param_groups:
                torch.nn.utils.clip_grad_norm_(students["params"], config.clip)
            optimiser.step()
            done = step + 1
            progress(f"training  {_say(terms)}", done, config.steps)
            over = config.time_budget_s and group.share(lambda: time.monotonic() - began > config.time_budget_s)
            if folder is not None:
                folder.log(step, terms, len(part) * group.world)
                if (done % config.checkpoint_every == 0 and folder.due) or done == config.steps or over:
                    folder.save(done, terms)
            if over:
                stopped = "time budget"
                break
    model.eval()
    last = {name: round(value, 6) for name, value in terms.items()}
    return {"steps": done, "seconds": round(time.monotonic() - began, 1), "stopped": stopped, **last}


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


def _resumed(folder: WorkFolder | None, optimiser: Optimizer, group: Group) -> tuple[int, dict[str, float]]:
    """Steps that a killed run had taken and its last loss terms; rank 0 loads its state.

    The students' weights follow on wrapping.
    """

    def loaded() -> tuple[int, dict[str, float], dict[str, Any]]:
        start, terms = folder.load() if folder is not None else (0, {})
        return start, terms, optimiser.state_dict() if start and group.world > 1 else {}

    start, terms, state = group.share(loaded)
    if state and not group.leads:
        optimiser.load_state_dict(state)
    return start, terms


def _numbers(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Every term as a number; a GPU is waited for once."""
    values = torch.stack([value.detach().double() for value in losses.values()]).tolist()
    return dict(zip(losses, values, strict=True))


def _say(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in values.items())


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of a step's forward pass at a precision (auto, fp32 or bf16) on a device."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------------ the optimiser


def make_optimiser(model: AnomalyModel, config: TrainConfig) -> StableAdamW:
    """One optimiser with the model's own groups: students may learn at different rates."""
    groups = [{**group, "peak": group["lr"]} for group in model.parameter_groups(config)]
    return StableAdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the peak learning rate at a step: linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


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
            if parameters := [parameter for parameter in group["params"] if parameter.grad is not None]:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """All tensors together: a GPU gets a few large kernels, and is never waited for."""
        grads = [cast(Tensor, parameter.grad) for parameter in parameters]
        moments = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {"step": torch.zeros(())} | {n: torch.zeros_like(parameter) for n in moments}
        states = [self.state[parameter] for parameter in parameters]
        taken = [state["step"] for state in states]  # on the CPU, whatever the device
        torch._foreach_add_(taken, 1)
        averages = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        beta_1, beta_2 = group["betas"]
        counts = torch.stack(taken).tolist()
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
        ratios = torch._foreach_div(grads, lengths)
        rms = torch._foreach_div(torch._foreach_norm(ratios), [ratio.numel() ** 0.5 for ratio in ratios])
        rates = list((group["lr"] / torch.stack(rms).clamp_min(1.0)).unbind())
        steps = torch._foreach_div(averages, [1 - beta_1**count for count in counts])
        torch._foreach_div_(steps, lengths)
        torch._foreach_mul_(steps, rates)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, steps)


# ---------------------------------------------------------------------------------------------------- the work folder


class WorkFolder:
    """Checkpoint and log of a run in a folder that is there; ``fingerprint`` is of its settings and data."""

    def __init__(self, folder: Path, student: nn.Module, optimiser: Optimizer, fingerprint: str) -> None:
        self._folder, self._student, self._optimiser, self._fingerprint = folder, student, optimiser, fingerprint
        self._began = self._saved = time.monotonic()
        self._took = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to save: the state of a large model takes seconds, and gets a twentieth of the run."""
        return self._took < _SHORT_SAVE or time.monotonic() - self._saved >= 20 * self._took

    def load(self) -> tuple[int, dict[str, float]]:
        """Take up the state that a killed run left: steps already taken (0 without a checkpoint), last loss terms."""
        path = self._folder / _CHECKPOINT
        start, terms = self._restored(path) if path.is_file() else (0, {})
        log = self._folder / LOG
        if log.exists():  # a line a step: those of a broken run beyond its checkpoint are dropped
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            log.write_text("".join(lines[:start]), encoding="utf-8")
        return start, terms

    def _restored(self, path: Path) -> tuple[int, dict[str, float]]:
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise TrainingError(f"{path} is damaged ({error}); delete it to start again") from None
        if meta.get("fingerprint") != self._fingerprint:
            raise TrainingError(
                f"{path} was made with other data or settings; delete the folder {self._folder} or choose another "
                "--work"
            )
        self._student.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("student.")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": state, "param_groups": groups})
        return int(meta["step"]), json.loads(meta.get("terms", "{}"))

    def save(self, step: int, terms: Mapping[str, float]) -> None:
        """Write state and loss terms after ``step`` steps; a crash while writing leaves the file before whole."""
        tensors: dict[str, Tensor] = {f"student.{k}": v.contiguous() for k, v in self._student.state_dict().items()}
        for index, state in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value.contiguous() for name, value in state.items()}
        new, began = self._folder / f"{_CHECKPOINT}.{os.getpid()}.new", time.monotonic()
        try:
            meta = {"step": str(step), "terms": json.dumps(terms), "fingerprint": self._fingerprint}
            save_file(tensors, new, metadata=meta)
            os.replace(new, self._folder / _CHECKPOINT)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"no checkpoint can be written in {self._folder} ({error}); free some disk or give --work"
            ) from None
        self._saved = time.monotonic()
        self._took = self._saved - began

    def log(self, step: int, terms: Mapping[str, float], images: int) -> None:
        """Add a step's loss terms to the log, a JSON line."""
        row = {"step": step, **terms, "images": images, "seconds": round(time.monotonic() - self._began, 3)}
        with (self._folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def remove_checkpoint(work: Path) -> None:
    """Forget the checkpoint of a run that has finished, and what a killed one was writing."""
    for path in (*work.glob(f"{_CHECKPOINT}*"), work / LOCK):
        path.unlink(missing_ok=True)


def leave_work(work: Path, log: Path) -> Path:
    """After a saved run in a folder of our own choosing: only its log stays, as the file ``log``."""
    remove_checkpoint(work)
    if (work / LOG).is_file():
        os.replace(work / LOG, log)
    if not any(work.iterdir()):
        work.rmdir()
    return log
