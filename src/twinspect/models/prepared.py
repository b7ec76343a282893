"""Models made ready to predict: the same answers, in less time. Trained models stay as they are.

The student's batch norms move into its convolutions, as the teacher's have already (`models.fold`). In system A with
a CNN, whatever is affine between the maps and their whitened residuals becomes one product: channels are scaled,
the student's rows are the answer of a linear head times a gain, and residuals are whitened. Nothing but sums and
products lies between, so scales, gains and means move into the weights beside them, and a pass over millions of
values is saved for each. Results are the same up to rounding.

Shapes: B images, T positions of the decoder's grid, N rows of a group in blocks of f x f (see `layers.to_rows`),
D channels, R whitened directions, W width of the decoder, K prototypes.
"""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.models.contract import AnomalyModel
from twinspect.models.dual import DualModel, EncoderDecoder
from twinspect.models.fold import fold_batch_norms, take_in_padding
from twinspect.models.layers import BlockHead, TokenLinear, in_fp16
from twinspect.models.statistics import LengthMap, ResidualMap

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def prepared(model: AnomalyModel) -> AnomalyModel:
    """The model for prediction: a copy that shares what it can, or the model itself where nothing can be gained.

    It must be in eval mode, on the CPU.
    """
    if any(isinstance(module, nn.BatchNorm2d) for module in model.student.modules()):
        model = _with_folded_student(model)
    return _merged(model) if isinstance(model, DualModel) and not model.groups.averaged else model


def _with_folded_student(model: AnomalyModel) -> AnomalyModel:
    ready, size = _shallow(model), model.shape.size
    ready.student = copy.deepcopy(model.student)
    ready.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fold_batch_norms(ready.student, lambda: ready(torch.zeros(1, 3, size, size)))
    take_in_padding(ready.student)
    return ready


def _merged(model: DualModel) -> DualModel:
    ready, groups, scorer = _shallow(model), model.groups, model.scorer
    ready.groups, ready.student, ready.scorer = _shallow(groups), _shallow(model.student), _shallow(scorer)
    ready.groups.standardised, ready.scorer.merged = False, True
    statistics = [
        (groups.get_buffer(f"mean_{i}"), groups.get_buffer(f"scale_{i}")) for i in range(len(groups.channels))
    ]
    decoder = cast(EncoderDecoder, model.student.local)
    ready.student.local = MergedDecoder(decoder, *_joined(statistics, range(len(statistics))))
    heads = cast(list[BlockHead], list(decoder.heads))
    ready.scorer.residuals = nn.ModuleList(
        MergedMap(module, head, scorer.gain(g), *_joined(statistics, members))
        for g, (module, head, members) in enumerate(zip(scorer.maps_of_groups(), heads, groups.members, strict=True))
    )
    return ready


class MergedDecoder(nn.Module):
    """A decoder on raw maps that leaves its heads to `MergedMap`."""

    def __init__(self, decoder: EncoderDecoder, mean_D: Tensor, scale_D: Tensor) -> None:
        super().__init__()
        self.decoder, self.count = _shallow(decoder), len(decoder.heads)
        self.decoder.heads = nn.ModuleList()
        self.decoder.bottleneck = copy.deepcopy(decoder.bottleneck)
        first = next(one for one in self.decoder.bottleneck.modules() if isinstance(one, TokenLinear))
        first.bias.sub_(first.weight @ (mean_D / scale_D))
        first.weight.div_(scale_D)

    def forward(self, trunk_BTD: Tensor, kept_BP: Tensor | None = None) -> list[Tensor]:
        """Tokens with a channel of ones behind them (B x T x W+1), once for every group."""
        x_BTW = F.pad(self.decoder.tokens(trunk_BTD), (0, 1), value=1.0)
        return [x_BTW] * self.count


class MergedMap(LengthMap):
    """`ResidualMap` of a group's raw rows and the decoder's tokens; the head's product takes the rows as its bias."""

    less_head_WD: Tensor
    rotate_DR: Tensor
    away_KNR: Tensor
    whiten_KRR: Tensor

    def __init__(self, own: ResidualMap, head: BlockHead, gain_D: Tensor, mean_D: Tensor, scale_D: Tensor) -> None:
        super().__init__(own.windows, own.factor, own.level_KWhw.shape[-1])
        self.level_KWhw, self.spread_KWhw = own.level_KWhw, own.spread_KWhw
        weight, bias = head.by_block()
        blocks = len(bias) // len(gain_D)
        gain, mean, scale = ((one.repeat(blocks)) for one in (scale_D * gain_D, mean_D, scale_D))
        said = torch.cat([weight * gain[:, None], (bias * gain + mean)[:, None]], 1)
        self.register_buffer("less_head_WD", -said.T.contiguous())
        away_KNR, whiten_KRR = own.away_KND.float() + own.mean_KD[:, None], own.whiten_KDD / own.dims**0.5
        rotated = own.rotate_DR.numel() > 0
        self.register_buffer("rotate_DR", own.rotate_DR / scale_D[:, None] if rotated else own.rotate_DR)
        if not rotated:
            away_KNR, whiten_KRR = away_KNR * scale_D, whiten_KRR / scale_D
        self.register_buffer("away_KNR", in_fp16(away_KNR))
        self.register_buffer("whiten_KRR", whiten_KRR.transpose(1, 2).contiguous())

    def forward(self, rows_BND: Tensor, x_BTW: Tensor, prototype_B: Tensor) -> Tensor:
        """The z-map, B x h x w."""
        blocks = rows_BND.reshape(-1, self.less_head_WD.shape[1])
        residual = torch.addmm(blocks, x_BTW.flatten(0, 1), self.less_head_WD).reshape(-1, *rows_BND.shape[1:])
        rows = residual @ self.rotate_DR if self.rotate_DR.numel() else residual
        if len(self.whiten_KRR) == 1:  # one matrix for all images: one product of all rows
            differing = rows - self.away_KNR.float()
            white = (differing.flatten(0, 1) @ self.whiten_KRR[0]).reshape(-1, *rows.shape[1:])
        else:
            differing = rows - self.away_KNR.index_select(0, prototype_B).float()
            white = differing @ self.whiten_KRR.index_select(0, prototype_B)
        return self.z_map(self.in_windows(torch.linalg.vector_norm(white, dim=2)), prototype_B)


def _joined(statistics: list[tuple[Tensor, Tensor]], members: range | list[int]) -> tuple[Tensor, Tensor]:
    """Means and scales of several maps, one behind the other."""
    mean_D, scale_D = (torch.cat([statistics[i][which] for i in members]) for which in (0, 1))
    return mean_D, scale_D


def _shallow(module: _Module) -> _Module:
    """A copy whose children and buffers can be replaced."""
    found = copy.copy(module)
    found._modules, found._buffers = dict(module._modules), dict(module._buffers)
    return found
