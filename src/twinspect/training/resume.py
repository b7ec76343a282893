"""The folder of a training run: the checkpoint that a killed run goes on from, and the log of its steps."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from twinspect.errors import TrainingError

_CHECKPOINT = "checkpoint.safetensors"
LOG = "train.jsonl"
LOCK = "lock"  # held by the run that writes in a folder


class WorkFolder:
    """Checkpoint and log of a run in a folder that is there.

    Args:
        folder: where they are.
        student, optimiser: whose state the checkpoint is.
        fingerprint: of settings and data, which a checkpoint must agree with.
    """

    def __init__(self, folder: Path, student: nn.Module, optimiser: Optimizer, fingerprint: str) -> None:
        self._folder, self._student, self._optimiser, self._fingerprint = folder, student, optimiser, fingerprint
        self._began = time.monotonic()

    def load(self) -> int:
        """Take up the state that a killed run left; the number of steps already taken (0 without a checkpoint).

        Raises:
            TrainingError: the checkpoint is damaged or of another run.
        """
        path, start = self._folder / _CHECKPOINT, 0
        if path.is_file():
            start = self._restored(path)
        log = self._folder / LOG
        if log.exists():  # lines of a broken run beyond its checkpoint are dropped
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            log.write_text("".join(line for line in lines if _step_of(line) < start), encoding="utf-8")
        return start

    def _restored(self, path: Path) -> int:
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
        return int(meta["step"])

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps; a crash while writing leaves the previous file whole."""
        tensors: dict[str, Tensor] = {f"student.{k}": v.contiguous() for k, v in self._student.state_dict().items()}
        for index, state in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": value.contiguous() for name, value in state.items()}
        new = self._folder / f"{_CHECKPOINT}.{os.getpid()}.new"
        try:
            save_file(tensors, new, metadata={"step": str(step), "fingerprint": self._fingerprint})
            os.replace(new, self._folder / _CHECKPOINT)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"no checkpoint can be written in {self._folder} ({error}); free some disk or give --work"
            ) from None

    def log(self, step: int, terms: Mapping[str, float], images: int) -> None:
        """Add a step's loss terms to the log, a JSON line."""
        row = {"step": step, **terms, "images": images, "seconds": round(time.monotonic() - self._began, 3)}
        with (self._folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 60  # a line cut off by a kill


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
