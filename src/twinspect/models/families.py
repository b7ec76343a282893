"""Families of models by name: one row each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from twinspect.config import ModelConfig
from twinspect.models.contract import AnomalyModel
from twinspect.models.dual import build_dual
from twinspect.models.snl import build_structural
from twinspect.models.teachers import Teacher


class Family(NamedTuple):
    """How a family is built.

    Attributes:
        build: makes the untrained model from (teacher, configuration, input side).
        cnn_size: input side where none is asked for, with a CNN as the teacher; 0 takes the teacher's. RD4AD's 256
            for structural models: their finest stage has four times the positions of the dual model's.
    """

    build: Callable[[Teacher, ModelConfig, int], AnomalyModel]
    cnn_size: int = 0


# `config.MODELS` lists the same names without torch.
FAMILIES: dict[str, Family] = {
    "dual": Family(build_dual),
    "snl": Family(build_structural, 256),
    "rd": Family(build_structural, 256),
    "fd": Family(build_structural, 256),
}


def build_family(teacher: Teacher, config: ModelConfig) -> AnomalyModel:
    """The untrained model of a configuration, at the input side that was asked for or that suits both."""
    family = FAMILIES[config.model]
    default = teacher.info.default_size if teacher.is_vit else family.cnn_size or teacher.info.default_size
    return family.build(teacher, config, legal_size(config.size or default, teacher.info.multiple))


def legal_size(size: int, multiple: int) -> int:
    """The nearest side that is a multiple of the patch or the coarsest stride, never below four of them."""
    return max(4, round(size / multiple)) * multiple
