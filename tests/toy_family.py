"""A family of models in one file: a linear student predicts every map of the teacher from its global tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twinspect.config import ModelConfig, TrainConfig
from twinspect.losses import position_cosine_distance
from twinspect.models.contract import AnomalyModel, Observed, Plain
from twinspect.models.layers import to_tokens, upsample
from twinspect.models.scorer import Scorer
from twinspect.models.teachers import Teacher


class ToyModel(AnomalyModel):
    """Raises nothing of its own; what a map holds beyond what the whole image says is its score."""

    pixel_side = 0

    def __init__(self, teacher: Teacher, config: ModelConfig, size: int) -> None:
        super().__init__(teacher, size, parts=2)
        width, kept = sum(teacher.info.token_channels), self.selection
        self.student = nn.ModuleDict({"local": nn.ModuleList(nn.Linear(width, d) for d in kept.channels)})
        self.scorer = Scorer(teacher.info, kept, size, config.scoring or "default", (1, 0))

    def maps(self, observed: Observed) -> list[Tensor]:
        token_BE = self.standardised(observed.tokens[0])
        sides = zip(self.student["local"], self.selection.map_sides, strict=True)
        return [head(token_BE)[:, :, None, None].expand(-1, -1, side, side) for head, side in sides]

    def targets(self, observed: Observed) -> list[Tensor]:
        return [to_tokens(one) for one in observed.maps]

    def predictions(self, observed: Observed, small_B3SS: Tensor) -> list[Tensor]:
        return [to_tokens(one) for one in self.maps(observed)]

    def plain(self, observed: Observed, small_B3SS: Tensor) -> Plain:
        pairs = zip(observed.maps, self.maps(observed), strict=True)
        side = max(self.selection.map_sides)
        map_Bhw = torch.cat([upsample(position_cosine_distance(t, s), side) for t, s in pairs], 1).mean(1)
        return Plain(map_Bhw, map_Bhw.amax((1, 2))[:, None], map_Bhw.new_zeros(map_Bhw.shape[0], 0))

    def losses(self, observed: Observed, small_B3SS: Tensor, step: int, config: TrainConfig) -> dict[str, Tensor]:
        pairs = zip(observed.maps, self.maps(observed), strict=True)
        loss = torch.stack([position_cosine_distance(t, s).mean() for t, s in pairs]).sum()
        return {"loss": loss, "cosine": loss.detach()}

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        return [{"params": list(self.student.parameters()), "lr": config.lr}]


def build(teacher: Teacher, config: ModelConfig, size: int) -> ToyModel:
    return ToyModel(teacher, config, size)
