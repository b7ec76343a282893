"""A fitted model to a bundle file and back. Torch side of `twinspect.bundle`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from twinspect.bundle import BundleContent, read_bundle, write_bundle
from twinspect.config import ModelConfig, RunConfig
from twinspect.decide.decision import Decision
from twinspect.errors import NONSENSE, BundleError, ConfigError, TwinspectError
from twinspect.models.contract import AnomalyModel, build_family
from twinspect.models.teachers import Teacher, create_teacher
from twinspect.types import Skipped

if TYPE_CHECKING:
    from twinspect.training.outcome import GoodImages

_TEACHER = "teacher."


@dataclass(slots=True)
class Fitted:
    """A trained model and the record of how it came to be."""

    model: AnomalyModel
    decision: Decision
    config: RunConfig
    record: dict[str, Any] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    good: GoodImages | None = None  # of a model that was just trained
    memory: bytes = b""  # what further images can be added to; see `training.outcome`


def teacher_of(config: ModelConfig) -> Teacher:
    """The teacher that a configuration asks for."""
    return create_teacher(config.teacher, config.weights or None, config.pretrained)


def build_model(config: ModelConfig, teacher: Teacher | None = None) -> AnomalyModel:
    """The untrained model of a configuration; weights of the students follow torch's global seed."""
    model = build_family(teacher or teacher_of(config), config)
    model.teacher.net.to(memory_format=torch.channels_last)
    return model


def model_id(model: AnomalyModel) -> str:
    """Name of a trained model: hash of its normal statistics, which no two trainings share."""
    digest = hashlib.sha256()
    for name, value in sorted(model.scorer.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def save(fitted: Fitted, path: Path, thin: bool = False) -> Path:
    """Write a bundle; ``thin`` leaves the teacher out and refers to it by name and weight hash.

    Raises:
        BundleError: the folder cannot be written.
        ConfigError: thin, and the teacher is random.
    """
    from safetensors.torch import save as to_bytes

    if thin and not fitted.config.model.pretrained:
        raise ConfigError("a random teacher cannot be left out of the bundle: no disk holds it; save without thin")
    state = fitted.model.state_dict()
    tensors = {k: v.contiguous() for k, v in state.items() if not (thin and k.startswith(_TEACHER))}
    config, decision = fitted.config.to_dict(), fitted.decision.to_dict()
    meta = {"config": config, "record": fitted.record, "decision": decision, "thin": thin}
    write_bundle(path, meta, to_bytes(tensors), fitted.memory)
    return path


def load(path: Path, weights: str = "") -> Fitted:
    """Read a bundle back.

    Raises:
        BundleError: not a whole bundle, or the teacher at hand is not the one it was made with.
    """
    content = read_bundle(path)
    try:
        return _rebuild(content, path, weights)
    except (*NONSENSE, RuntimeError, AssertionError, SafetensorError, TwinspectError) as error:
        if isinstance(error, TwinspectError) and not isinstance(error, ConfigError):
            raise
        raise BundleError(f"{path}: its parts do not fit together ({error})") from None


def _rebuild(content: BundleContent, path: Path, weights: str) -> Fitted:
    from safetensors.torch import load as from_bytes

    meta = content.meta
    config, record = RunConfig.from_dict(meta["config"]), meta["record"]
    tensors = from_bytes(content.tensors)
    made_with, thin = record["teacher"], bool(meta["thin"])
    teacher = create_teacher(made_with["name"], weights or None, pretrained=thin and config.model.pretrained)
    model = build_model(config.model, teacher)
    model.roi_SS = tensors.get("roi_SS")
    _resize_buffers(model, tensors)
    needed = model.state_dict()
    missing = [key for key in needed if key not in tensors and not (thin and key.startswith(_TEACHER))]
    if missing or any(key not in needed for key in tensors):
        raise BundleError(f"{path}: tensors do not fit this library's model (first: {(missing or [''])[0]})")
    model.load_state_dict(tensors, strict=False)
    model.eval()
    if (teacher_hash := model.teacher.hash()) != made_with["hash"]:
        raise BundleError(
            f"{path} was made with teacher {made_with['name']} of hash {made_with['hash']}, but the teacher on "
            f"this disk has hash {teacher_hash}; give the right file with --weights FILE"
        )
    model.teacher.weights = made_with["weights"]
    decision = Decision.from_dict(meta["decision"], str(path))
    if decision.model_id != (id_of_model := model_id(model)):
        raise BundleError(
            f"{path}: its thresholds were made with another model (id {decision.model_id or 'unknown'}, this one is "
            f"{id_of_model}); scores of two models cannot be compared. Type: twinspect calibrate BUNDLE GOOD"
        )
    return Fitted(model, decision, config, record, memory=content.memory)


def _resize_buffers(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give statistics buffers the sizes of the stored ones: their number of clusters is learnt."""
    for name, buffer in list(model.named_buffers()):
        stored = tensors.get(name)
        if stored is not None and stored.shape != buffer.shape:
            owner, _, own_name = name.rpartition(".")
            model.get_submodule(owner).register_buffer(own_name, torch.empty_like(stored))
