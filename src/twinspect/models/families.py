"""Families of models by name: one row each."""

from __future__ import annotations

from collections.abc import Callable

from twinspect.config import ModelConfig
from twinspect.models.contract import AnomalyModel
from twinspect.models.dual import build_dual
from twinspect.models.snl import build_structural
from twinspect.models.teachers import Teacher

# Name -> builder of (teacher, configuration, input side). `config.MODELS` lists the same names without torch.
FAMILIES: dict[str, Callable[[Teacher, ModelConfig, int], AnomalyModel]] = {
    "dual": build_dual,
    "snl": build_structural,
    "rd": build_structural,
    "fd": build_structural,
}
