"""Checkpoints: weights and optimiser state in one safetensors file, replaced atomically."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from twinspect.errors import TrainingError

_NAME = "checkpoint.safetensors"
LOG = "train.jsonl"


def save_checkpoint(work: Path, student: nn.Module, optimiser: Optimizer, step: int, fingerprint: str) -> None:
    """Write the state after ``step`` steps; a crash while writing leaves the previous file whole.

    Raises:
        TrainingError: the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {f"student.{k}": v.contiguous() for k, v in student.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value.contiguous() for name, value in state.items()}
    new = work / f"{_NAME}.{os.getpid()}.new"
    try:
        save_file(tensors, new, metadata={"step": str(step), "fingerprint": fingerprint})
        os.replace(new, work / _NAME)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"no checkpoint can be written in {work} ({error}); free some disk or give --work"
        ) from None


def load_checkpoint(work: Path, student: nn.Module, optimiser: Optimizer, fingerprint: str) -> int:
    """Take up the state a killed run left; the number of steps already taken (0 without a checkpoint).

    Raises:
        TrainingError: the checkpoint belongs to other data or settings, or is damaged.
    """
    path = work / _NAME
    if not path.is_file():
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} is damaged ({error}); delete it to start again") from None
    if meta.get("fingerprint") != fingerprint:
        raise TrainingError(
            f"{path} was made with other data or settings; delete the folder {work} or choose another --work"
        )
    student.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("student.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(meta["step"])


def remove_checkpoint(work: Path) -> None:
    """Forget the checkpoint of a run that has finished, and what a killed one was writing."""
    for path in work.glob(f"{_NAME}*"):
        path.unlink(missing_ok=True)


def leave_work(work: Path, log: Path) -> Path:
    """After a saved run in a folder of our own choosing: only its log stays, as the file ``log``."""
    remove_checkpoint(work)
    if (work / LOG).is_file():
        os.replace(work / LOG, log)
    if not any(work.iterdir()):
        work.rmdir()
    return log
