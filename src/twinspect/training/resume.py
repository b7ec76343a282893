"""Go on from a trained model with more images or classes, and say what that did to the old ones.

The students keep their weights and the teacher's channel statistics; everything learnt from residuals
(clusters, covariances, thresholds) is learnt anew from the images at hand, so the old ones must be among
them. Images keep their side: what was trained on stays training, what was held out stays held out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from twinspect.decide.decision import Decision, image_id
from twinspect.errors import DataError, TrainingError
from twinspect.models.contract import AnomalyModel
from twinspect.types import TEST, Sample

_NAME = "checkpoint.safetensors"
LOG = "train.jsonl"
LOCK = "lock"  # held by the run that writes in a folder


def refuse_forgetting(decision: Decision, samples: Sequence[Sample], forget: bool) -> list[str]:
    """Old classes of which the data hold no good image; a `DataError` unless ``forget``."""
    present = {s.class_name for s in samples if s.split != TEST and s.label in (0, None)}
    missing = [name for name in decision.classes if name not in present]
    if missing and not forget:
        raise DataError(
            f"the data hold no good image of {', '.join(missing)}, which the bundle knows: what is normal is "
            f"learnt from all images at hand, so going on without them would forget them (classes found: "
            f"{', '.join(sorted(present)) or 'none'}). Give one folder with all classes, old and new, or type "
            "--forget to drop them"
        )
    return missing


def keep_sides(keys: Sequence[bytes], held: set[int], decision: Decision) -> set[int]:
    """Positions to hold out of images with these keys, every known image on the side where it was."""
    trained = decision.trained - decision.held
    names = [image_id(key) for key in keys]
    return {i for i, name in enumerate(names) if name in decision.held or (i in held and name not in trained)}


def take_over(model: AnomalyModel, before: AnomalyModel) -> None:
    """Give a new model the students and channel statistics of a trained one; a `DataError` if shapes differ."""
    try:
        for part in ("student", "selection", "standardised"):
            getattr(model, part).load_state_dict(getattr(before, part).state_dict())
    except RuntimeError:
        raise DataError(
            "the bundle's students have another shape than the settings ask for; going on keeps teacher, size, "
            "width and depth, so leave those options out"
        ) from None


def changes(before: Decision, after: Decision) -> list[dict[str, Any]]:
    """What going on did to every old class, on the calibration images that both models scored.

    ``called_at_old`` is how many images would be called bad had the old threshold been kept. Of a class without such
    images nothing can be said: its numbers are None.
    """
    now = dict(zip(after.good.key, after.good.score.tolist(), strict=True))
    rows = list(zip(before.good.score.tolist(), before.good.key, before.good.class_name, strict=True))
    pairs = {
        name: [(score, now[key]) for score, key, owner in rows if owner == name and key and key in now]
        for name in before.classes
    }
    return [_change(name, np.array(both).reshape(-1, 2), before, after) for name, both in pairs.items()]


def _change(name: str, pairs: np.ndarray[Any, Any], before: Decision, after: Decision) -> dict[str, Any]:
    numbers = dict.fromkeys(
        ("median_before", "median_after", "threshold_before", "threshold_after", "called_before", "called_after",
         "called_at_old")
    )  # fmt: skip
    sentence = f"{name}: none of its calibration images is in the data, so nothing can be said of it"
    if len(pairs):
        old, new = before.rule(name).image.value, after.rule(name).image.value
        medians = np.median(pairs, axis=0).tolist()
        called = [int((pairs[:, column] >= value).sum()) for column, value in ((0, old), (1, new), (1, old))]
        numbers = dict(zip(numbers, (*medians, old, new, *called), strict=True))
        sentence = (
            f"{name}: on its {len(pairs)} stored calibration images the median score went from {medians[0]:.2f} to "
            f"{medians[1]:.2f} and the threshold from {old:.2f} to {new:.2f}; called bad before {called[0]}, now "
            f"{called[1]}, with the old threshold kept {called[2]}"
        )
    return {"class_name": name, "images": len(pairs), **numbers, "sentence": sentence}


# ---------------------------------------------------------------------------------------------- a run that was killed


def save_checkpoint(work: Path, student: nn.Module, optimiser: Optimizer, step: int, fingerprint: str) -> None:
    """Write the state after ``step`` steps; a crash while writing leaves the previous file whole."""
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
    """Take up the state a killed run left; the number of steps already taken (0 without a checkpoint)."""
    path = work / _NAME
    if not path.is_file():
        return 0
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
    for path in (*work.glob(f"{_NAME}*"), work / LOCK):
        path.unlink(missing_ok=True)


def leave_work(work: Path, log: Path) -> Path:
    """After a saved run in a folder of our own choosing: only its log stays, as the file ``log``."""
    remove_checkpoint(work)
    if (work / LOG).is_file():
        os.replace(work / LOG, log)
    if not any(work.iterdir()):
        work.rmdir()
    return log
