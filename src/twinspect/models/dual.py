"""System A: dual-student distillation (our re-implementation of arXiv 2509.24448, Park, Seo, Kim 2025).

One frozen teacher, two heterogeneous students trained and scored together through a Noisy-OR:

* `EncoderDecoder` rebuilds the teacher's mid-level patch features, in two groups, behind a noisy
  bottleneck with linear attention. It finds small, local defects. Recipe after Dinomaly (CVPR 2025).
* `EncoderEncoder` is the teacher's own architecture trained from scratch to give the teacher's global
  tokens only. Sparse supervision keeps it from learning the identity. It finds semantic anomalies.

What is ours: a CNN can be the teacher (its stages play the layers, pooled stages the class tokens), and
residuals are whitened by their statistics on normal images (`models.statistics`), because raw cosine
distances do not see a small defect in a stochastic texture.

Shapes: B images, D channels, h w grid, N tokens, E width of all global tokens together, S input side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.config import ModelConfig, TrainConfig
from twinspect.losses import easy_share, encoder_decoder_loss, encoder_encoder_loss, noisy_or_loss
from twinspect.models.contract import AnomalyModel, Observed, Outputs, Predicted, Scorer, Selection
from twinspect.models.layers import DecoderBlock, NoisyBottleneck, resample, to_map, to_tokens, whole_divisor
from twinspect.models.statistics import Surprise, TokenDistance
from twinspect.models.teachers import Backbone, BackboneInfo, Teacher
from twinspect.scoring import noisy_or, smooth, top_mean, upsample

TOP_SHARE = 0.005  # share of positions whose mean is the local score


@dataclass(frozen=True, slots=True)
class DualShape:
    """Sizes of the two students; zeros are replaced by what suits the teacher.

    Attributes:
        size: input side in pixels.
        width, depth: of the Encoder-Decoder's decoder.
        dropout: noise of its bottleneck.
        ee_shrink: factor by which the Encoder-Encoder's input is smaller.
        ee_depth: share of the teacher's blocks in the Encoder-Encoder (ViT).
        view_shrink: factor by which the view is smaller that global tokens are taken from. A CNN recognises
            objects at the size it was trained with; small defects need more pixels than that.
    """

    size: int
    width: int = 0
    depth: int = 0
    dropout: float = 0.2
    ee_shrink: int = 0
    ee_depth: float = 1.0
    view_shrink: int = 0

    def resolved(self, info: BackboneInfo) -> DualShape:
        """Fill the zeros: the published sizes for a ViT, what two CPU cores can train for a CNN."""
        vit = info.kind == "vit"
        multiple = info.multiple if vit else 1
        return DualShape(
            self.size,
            self.width or (info.channels[0] if vit else 128),
            self.depth or (8 if vit else 3),
            self.dropout,
            whole_divisor(self.size, self.ee_shrink or (1 if vit else round(self.size / 128)), multiple),
            self.ee_depth,
            whole_divisor(self.size, self.view_shrink or (1 if vit else round(self.size / 256)), multiple),
        )


class LevelGroups(Selection):
    """Forms the teacher's layer groups and the decoder's input from its levels.

    ViT: the mean of each half of the levels, untouched (Dinomaly). CNN: every channel standardised by its
    statistics on normal images, in three groups: fine (strides 4 and 8, first stage of 16, on the grid of 8),
    middle (last stage of 16) and deep (last stages of 16 and 32, on the grid of 16).
    """

    def __init__(self, info: BackboneInfo, size: int) -> None:
        self.averaged = info.kind == "vit"
        wanted = _vit_groups(len(info.channels)) if self.averaged else _cnn_groups(info.strides)
        levels = wanted if self.averaged else [[i] for i in sorted({i for group in wanted for i in group})]
        # Stages finer than stride 8 are pooled to it at once: four times the memory says nothing more.
        strides = [max(info.strides[members[0]], min(8, max(info.strides))) for members in levels]
        super().__init__(info, levels, [-(-size // stride) for stride in strides], not self.averaged)
        flat = [level for members in levels for level in members]
        self.members = [[0], [1]] if self.averaged else [[flat.index(i) for i in group] for group in wanted]
        self.sides = [max(self.map_sides[i] for i in group) for group in self.members]
        self.dims = [sum(self.channels[i] for i in group) for group in self.members]
        self.trunk_side = min(self.sides)
        self.trunk_dims = self.channels[0] if self.averaged else sum(self.channels)

    def forward(self, selected: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
        """Selected maps to (groups, decoder input B x D_in x t x t)."""
        if self.averaged:
            return list(selected), torch.stack(selected).mean(0)
        scaled = [self.standardise(one, i) for i, one in enumerate(selected)]
        groups = [
            torch.cat([resample(scaled[i], side) for i in group], 1)
            for group, side in zip(self.members, self.sides, strict=True)
        ]
        return groups, torch.cat([resample(one, self.trunk_side) for one in scaled], 1)


class EncoderDecoder(nn.Module):
    """Bottleneck and decoder: B x D_in x t x t to one predicted map per group."""

    def __init__(self, groups: LevelGroups, shape: DualShape, info: BackboneInfo) -> None:
        super().__init__()
        self.averaged = groups.averaged
        heads = max(1, shape.width // 64 if self.averaged else shape.width // 32)
        self.bottleneck = NoisyBottleneck(groups.trunk_dims, shape.width, shape.dropout)
        self.blocks = nn.ModuleList(DecoderBlock(shape.width, heads) for _ in range(shape.depth))
        self.factors = [side // groups.trunk_side for side in groups.sides]
        if not self.averaged:
            position = sine_positions(groups.trunk_side, shape.width)
            self.register_buffer("position_ND", position, persistent=False)
            self.heads = nn.ModuleList(
                nn.Linear(shape.width, dims * factor**2)
                for dims, factor in zip(groups.dims, self.factors, strict=True)
            )

    def forward(self, trunk_BDtt: Tensor) -> list[Tensor]:
        """Predicted group maps, in the order of the groups."""
        x_BND = self.bottleneck(to_tokens(trunk_BDtt))
        if self.averaged:
            return self._block_means(x_BND)
        x_BND = x_BND + self.position_ND
        for block in self.blocks:
            x_BND = block(x_BND)
        maps = [to_map(head(x_BND)) for head in self.heads]
        return [F.pixel_shuffle(m, f) if f > 1 else m for m, f in zip(maps, self.factors, strict=True)]

    def _block_means(self, x_BND: Tensor) -> list[Tensor]:
        """Deep blocks of the encoder are rebuilt first: the first half of the decoder is the deep group."""
        outputs = []
        for block in self.blocks:
            x_BND = block(x_BND)
            outputs.append(x_BND)
        half = len(outputs) // 2
        return [to_map(torch.stack(part).mean(0)) for part in (outputs[half:], outputs[:half])]


class EncoderEncoder(nn.Module):
    """The teacher's architecture from scratch, giving one global token per level of the teacher."""

    def __init__(self, info: BackboneInfo, shape: DualShape) -> None:
        super().__init__()
        self.shrink = shape.ee_shrink
        self.net = Backbone(info.arch, depth=shape.ee_depth, img_size=shape.size // shape.ee_shrink)
        own = len(self.net.info.token_channels)
        wanted = len(info.token_channels)
        # A shallower student answers for several levels of the teacher with one of its own.
        self.source = [min(own - 1, (i * own) // wanted) for i in range(wanted)]
        dims = zip((self.net.info.token_channels[i] for i in self.source), info.token_channels, strict=True)
        self.heads = nn.ModuleList(nn.Linear(a, b) for a, b in dims)

    def forward(self, small_B3SS: Tensor) -> tuple[Tensor, ...]:
        """Normalised, shrunk pixels to one B x D_l token per level."""
        tokens = self.net.features(small_B3SS).tokens
        return tuple(head(tokens[i]) for head, i in zip(self.heads, self.source, strict=True))


class DualStudent(nn.Module):
    """Both students behind one forward, so that one call reaches every trainable weight."""

    def __init__(self, groups: LevelGroups, shape: DualShape, info: BackboneInfo) -> None:
        super().__init__()
        self.local = EncoderDecoder(groups, shape, info)
        self.semantic = EncoderEncoder(info, shape)

    def forward(self, trunk_BDtt: Tensor, small_B3SS: Tensor) -> Predicted:
        """Predictions of both students."""
        return Predicted(self.local(trunk_BDtt), self.semantic(small_B3SS))


class DualScorer(Scorer):
    """Turns what teacher and students said into maps and scores; buffers only."""

    gain_E: Tensor

    def __init__(self, groups: LevelGroups, info: BackboneInfo, clusters: int) -> None:
        self.side = max(groups.sides)
        super().__init__(info, groups.dims, groups.sides, clusters, self.side * 2)
        token_dims = sum(info.token_channels)
        self.register_buffer("gain_E", torch.ones(token_dims))
        self.token_of_student = TokenDistance(token_dims)
        self.surprise_groups = nn.ModuleList(Surprise() for _ in groups.dims)
        self.surprise_local, self.surprise_semantic = Surprise(), Surprise()

    def curves_of_groups(self) -> list[Surprise]:
        """The calibration curve of every layer group."""
        return [cast(Surprise, module) for module in self.surprise_groups]

    def curves(self) -> list[Surprise]:
        """Every calibration curve."""
        return [*self.curves_of_groups(), self.surprise_local, self.surprise_semantic]

    def residual(self, teacher_BDhw: Tensor, student_BDhw: Tensor) -> Tensor:
        """Teacher minus the student at its least-squares gain: see `residual`."""
        return residual(teacher_BDhw, student_BDhw)

    def group_maps(self, groups: list[Tensor], predicted: list[Tensor], prototype_B: Tensor) -> list[Tensor]:
        """The z-map of every layer group on its own grid: B x h x w each."""
        return [
            module(residual(t, s), prototype_B)
            for module, t, s in zip(self.residuals, groups, predicted, strict=True)
        ]

    def token_residual(self, token_BE: Tensor, predicted: tuple[Tensor, ...]) -> Tensor:
        """Teacher's tokens minus the student's at its least-squares gain per channel: B x E.

        Where the student has learnt nothing the gain is near zero and its noise is kept out.
        """
        return token_BE - self.gain_E * torch.cat(predicted, 1)

    def fit_tokens(self, token_NE: Tensor, said_NE: Tensor, variant_N: Tensor, variants: int) -> None:
        """Learn how the teacher's tokens scatter, the student's gain, and how what it misses scatters."""
        super().fit_tokens(token_NE, said_NE, variant_N, variants)
        self.gain_E = (token_NE * said_NE).sum(0) / said_NE.square().sum(0).clamp_min(1e-12)
        self.token_of_student.fit(token_NE - self.gain_E * said_NE, variant_N, variants)

    def calibrate(self, groups_NG: Tensor, local_N: Tensor, semantic_N: Tensor, prototype_N: Tensor) -> Tensor:
        """Fit every group's curve, then both students'; ``local_N`` is formed anew from the fitted groups."""
        count = self.prototypes.count
        for g, curve in enumerate(self.curves_of_groups()):
            curve.fit(groups_NG[:, g], prototype_N, count)
        self.surprise_semantic.fit(semantic_N, prototype_N, count)
        local_N = self.local(groups_NG, prototype_N)
        self.surprise_local.fit(local_N, prototype_N, count)
        surprises = self.surprise_local(local_N, prototype_N), self.surprise_semantic(semantic_N, prototype_N)
        return noisy_or(*surprises)[0]

    def local(self, groups_BG: Tensor, prototype_B: Tensor) -> Tensor:
        """Local score: Noisy-OR over the layer groups, as a sum of surprises (B)."""
        parts = [curve(groups_BG[:, g], prototype_B) for g, curve in enumerate(self.surprise_groups)]
        return torch.stack(parts).sum(0)

    def forward(self, groups: list[Tensor], token_BE: Tensor, predicted: Predicted) -> Outputs:
        """Maps, raw and calibrated scores of a batch."""
        variant_B = self.prototypes.variant(token_BE)
        prototype_B = self.prototypes.owner_V[variant_B]
        maps = self.group_maps(groups, predicted.groups, prototype_B)
        groups_BG = torch.stack([top_mean(one, TOP_SHARE) for one in maps], 1)
        distance_B: Tensor = self.token_of_teacher(token_BE, variant_B)
        missed_B: Tensor = self.token_of_student(self.token_residual(token_BE, predicted.tokens), variant_B)
        # How unusual the token is, and how far the student missed it.
        semantic_B = (distance_B.square() + missed_B.square()).sqrt()
        local_B = self.local(groups_BG, prototype_B)
        # Calibrated once more as one student, or three groups would outvote the semantic student.
        surprise_local = self.surprise_local(local_B, prototype_B)
        surprise_semantic = self.surprise_semantic(semantic_B, prototype_B)
        joint_B, _ = noisy_or(surprise_local, surprise_semantic)
        grid_Bhw = torch.stack([upsample(one, self.side)[:, 0] for one in maps]).mean(0)
        return Outputs(
            smooth(upsample(grid_Bhw, self.map_side), self.kernel), joint_B, local_B, semantic_B,
            surprise_local, surprise_semantic, prototype_B, groups_BG, distance_B,
        )  # fmt: skip


class DualModel(AnomalyModel):
    """Teacher, both students and scorer.

    Args:
        teacher: frozen teacher.
        shape: sizes of the students.
        clusters: largest number of scene prototypes.
    """

    groups: LevelGroups
    student: DualStudent
    scorer: DualScorer

    def __init__(self, teacher: Teacher, shape: DualShape, clusters: int = 16) -> None:
        super().__init__(teacher)
        self.shape = shape.resolved(teacher.info)
        self.groups = LevelGroups(teacher.info, self.shape.size)
        self.student = DualStudent(self.groups, self.shape, teacher.info)
        self.scorer = DualScorer(self.groups, teacher.info, clusters)
        self.pixel_side = self.shape.size // self.shape.ee_shrink

    def answer(self, observed: Observed, small_B3SS: Tensor) -> tuple[list[Tensor], Predicted]:
        """The teacher's layer groups, and what both students say."""
        groups, trunk = self.groups(observed.maps)
        return groups, self.student(trunk, small_B3SS)

    def losses(self, observed: Observed, small_B3SS: Tensor, step: int, config: TrainConfig) -> dict[str, Tensor]:
        """Noisy-OR of both students' distances, and the two on their own."""
        groups, predicted = self.answer(observed, small_B3SS)
        local_B = encoder_decoder_loss(groups, predicted.groups, easy_share(step, config.easy_ramp))
        split = torch.split(self.tokens(observed.token_BE), list(self.teacher.info.token_channels), 1)
        semantic_B = encoder_encoder_loss(split, predicted.tokens)
        loss = noisy_or_loss(local_B, semantic_B, config.noisy_or)
        return {"loss": loss, "local": local_B.mean().detach(), "semantic": semantic_B.mean().detach()}

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """A group per student: their safe learning rates differ."""
        return [
            {"params": list(self.student.local.parameters()), "lr": config.lr},
            {"params": list(self.student.semantic.parameters()), "lr": config.lr_ee},
        ]


def build_dual(teacher: Teacher, config: ModelConfig, size: int) -> DualModel:
    """The untrained model of a configuration at an input side that suits the teacher."""
    shape = DualShape(
        size, config.width, config.depth, config.dropout, config.ee_shrink, config.ee_depth, config.view_shrink
    )
    return DualModel(teacher, shape, config.clusters)


def residual(teacher_BDhw: Tensor, student_BDhw: Tensor) -> Tensor:
    """Teacher minus the student at its least-squares gain, one gain per image: B x D x h x w.

    The cosine loss leaves the student's length free; with this gain |residual|^2 / |teacher|^2 = 1 - cos^2,
    so that the residual is small exactly where the loss is.
    """
    gain = (teacher_BDhw * student_BDhw).flatten(1).sum(1) / student_BDhw.flatten(1).square().sum(1).clamp_min(1e-12)
    return teacher_BDhw - gain[:, None, None, None] * student_BDhw


def sine_positions(side: int, width: int) -> Tensor:
    """Fixed sine and cosine codes of row and column: (side*side) x width."""
    quarter = max(1, width // 4)
    rate = torch.exp(torch.arange(quarter) * (-4.0 / quarter))
    angle = torch.arange(side)[:, None] * rate[None]
    line = torch.cat([angle.sin(), angle.cos()], 1)
    both = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], 2)
    return F.pad(both.reshape(side * side, -1), (0, width - 4 * quarter))


def _vit_groups(levels: int) -> list[list[int]]:
    half = max(1, levels // 2)
    return [list(range(half)), list(range(half, levels)) or [levels - 1]]


def _cnn_groups(strides: tuple[int, ...]) -> list[list[int]]:
    """Indices of the levels of the fine, middle and deep group; a CNN without a stride repeats the next."""
    last = {stride: max(i for i, s in enumerate(strides) if s == stride) for stride in set(strides)}
    first_16 = min((i for i, s in enumerate(strides) if s == 16), default=len(strides) - 1)
    middle, deep = last.get(16, len(strides) - 1), last.get(32, len(strides) - 1)
    fine = sorted({last[stride] for stride in (4, 8) if stride in last} | {first_16})
    return [fine, [middle], sorted({middle, deep})]
