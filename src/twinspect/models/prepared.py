"""Models made ready to predict: the same answers, in less time. Trained models stay as they are.

Students whose readings count for nothing are not asked. The batch norms of the others move into their convolutions,
as the teacher's have already (`models.fold`).
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from twinspect.models.contract import AnomalyModel
from twinspect.models.fold import fold_batch_norms, take_in_padding

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def prepared(model: AnomalyModel) -> AnomalyModel:
    """The model for prediction: a copy that shares what it can, or the model itself where nothing can be gained.

    It must be in eval mode, on the CPU.
    """
    idle = not model.scorer.students_count()
    if not idle and not any(isinstance(module, nn.BatchNorm2d) for module in model.student.modules()):
        return model
    ready, size = _shallow(model), model.shape.size
    if idle:
        ready.scorer = _shallow(model.scorer)
        ready.scorer.asks_students = False
        return ready
    ready.student = copy.deepcopy(model.student)
    ready.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fold_batch_norms(ready.student, lambda: ready(torch.zeros(1, 3, size, size)))
    take_in_padding(ready.student)
    return ready


def _shallow(module: _Module) -> _Module:
    """A copy whose children and buffers can be replaced."""
    found = copy.copy(module)
    found._modules, found._buffers = dict(module._modules), dict(module._buffers)
    return found
