"""System A: dual-student distillation (our re-implementation of arXiv 2509.24448, Park, Seo, Kim 2025).

One frozen teacher, two heterogeneous students trained and scored together through a Noisy-OR:

* `EncoderDecoder` rebuilds the teacher's mid-level patch features, in two groups, behind a noisy
  bottleneck with linear attention. It finds small, local defects. Recipe after Dinomaly (CVPR 2025).
* `EncoderEncoder` is the teacher's own architecture trained from scratch to give the teacher's global
  tokens only. Sparse supervision keeps it from learning the identity. It finds semantic anomalies.

What is ours: a CNN can be the teacher (its stages play the layers, pooled stages the class tokens), and
residuals are whitened by their statistics on normal images (`models.statistics`), because raw cosine
distances do not see a small defect in a stochastic texture.

Shapes: B images, D channels, h w grid, T positions of the decoder's grid, N rows of a group (its positions in blocks,
one for every position of the decoder's: see `layers.to_rows`), E width of all global tokens together, S input side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.config import ModelConfig, TrainConfig
from twinspect.losses import easy_share, encoder_decoder_loss, encoder_encoder_loss, noisy_or_loss
from twinspect.models.contract import AnomalyModel, Observed, Outputs, Predicted, Scorer, Selection
from twinspect.models.layers import BlockHead, DecoderBlock, NoisyBottleneck, Resample, to_rows, whole_divisor
from twinspect.models.nearest import NearestNormal
from twinspect.models.statistics import Surprise, TokenDistance, evenness, surprises
from twinspect.models.teachers import Backbone, BackboneInfo, Teacher
from twinspect.scoring import noisy_or, smooth, top_mean, upsample

TOP_SHARE = 0.005  # share of positions whose mean is a layer group's score
TOKEN_WEIGHT = 0.25  # of the tokens' reading where normal images are photographs; 1 where they repeat each other
SURFACE_SHARE = 0.002  # the same for the mean map of the groups that lie on the surface, on the finest grid
SURFACE_WEIGHT = 2.0  # of that reading in the local score: agreement on a place says more than one group alone
GRAIN_WINDOWS, FINE_WINDOWS = (3, 5), (1, 3)  # a position of stride 4 is too small to judge alone
GRAIN_SHARE = 0.0005  # the same for the grain group, which has four times the positions of the next
GRAIN_WEIGHT = 0.25  # in the anomaly map: most defects are coarser, and its noise is the finest


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
            self.width or (info.channels[0] if vit else 64),
            self.depth or (8 if vit else 1),
            self.dropout,
            whole_divisor(self.size, self.ee_shrink or (1 if vit else round(self.size / 64)), multiple),
            self.ee_depth,
            whole_divisor(self.size, self.view_shrink or (1 if vit else round(self.size / 256)), multiple),
        )


class GroupPlan(NamedTuple):
    """A layer group: indices of the teacher's levels, its grid in pixels a step, and how its map is read.

    Attributes:
        windows: sides, in positions, over which squared lengths of residuals are averaged.
        share: of positions, the highest, whose mean is the group's score.
        on_surface: whether its map says where on a surface a defect is; such maps are also read together.
        weight: in the anomaly map.
    """

    levels: tuple[int, ...]
    stride: int
    windows: tuple[int, ...] = (1,)
    share: float = TOP_SHARE
    on_surface: bool = True
    weight: float = 1.0


class LevelGroups(Selection):
    """Forms the teacher's layer groups and the decoder's input from its levels.

    ViT: the mean of each half of the levels, untouched (Dinomaly). CNN: every channel standardised by its
    statistics on normal images, in four groups: grain (stride 4 alone, on its own grid: what a surface is made
    of), fine (strides 4 and 8, first stage of 16, on the grid of 8), middle (last stage of 16) and deep (last
    stages of 16 and 32, on the grid of 16).
    """

    def __init__(self, info: BackboneInfo, size: int) -> None:
        self.averaged = info.kind == "vit"
        plans = _vit_groups(info.strides) if self.averaged else _cnn_groups(info.strides)
        singles = sorted({i for plan in plans for i in plan.levels})
        levels = [list(plan.levels) for plan in plans] if self.averaged else [[i] for i in singles]
        sides = [-(-size // info.strides[members[0]]) for members in levels]
        super().__init__(info, levels, sides, not self.averaged)
        self.plans = plans
        self.members = [[0], [1]] if self.averaged else [[singles.index(i) for i in p.levels] for p in plans]
        self.sides = [-(-size // plan.stride) for plan in plans]
        self.dims = [sum(self.channels[i] for i in group) for group in self.members]
        self.trunk_side = min(self.sides)
        self.trunk_dims = self.channels[0] if self.averaged else sum(self.channels)
        self.factors = [side // self.trunk_side for side in self.sides]
        self.steps = [(i, *step) for i, side in enumerate(sides) for step in _resampling(side, self._sides_of(i))]
        self.moves = nn.ModuleList(Resample(here, side) for _, here, side in self.steps)

    def _sides_of(self, i: int) -> set[int]:
        """Sides of the grids that a selected map is needed on."""
        return {self.trunk_side, *(s for s, own in zip(self.sides, self.members, strict=True) if i in own)}

    def forward(self, selected: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
        """Selected maps to (groups as rows B x N x D, decoder input B x T x D_in)."""
        grids = [self.standardise(one, i).permute(0, 2, 3, 1) for i, one in enumerate(selected)]
        if self.averaged:
            groups = [to_rows(one) for one in grids]
            return groups, torch.stack(groups).mean(0)
        found = {(i, side): grid for i, (grid, side) in enumerate(zip(grids, self.map_sides, strict=True))}
        for (i, here, side), move in zip(self.steps, self.moves, strict=True):
            found[i, side] = move(found[i, here])
        groups = [
            to_rows(torch.cat([found[i, side] for i in group], 3), factor)
            for group, side, factor in zip(self.members, self.sides, self.factors, strict=True)
        ]
        trunk = torch.cat([found[i, self.trunk_side] for i in range(len(grids))], 3)
        return groups, to_rows(trunk)


class EncoderDecoder(nn.Module):
    """Bottleneck and decoder: B x T x D_in to the predicted rows of every group."""

    def __init__(self, groups: LevelGroups, shape: DualShape, info: BackboneInfo) -> None:
        super().__init__()
        self.averaged = groups.averaged
        heads = max(1, shape.width // 64 if self.averaged else shape.width // 32)
        ratio = 4.0 if self.averaged else 2.0  # hidden units a unit of width: Dinomaly's, and half of it for a CNN
        self.bottleneck = NoisyBottleneck(groups.trunk_dims, shape.width, shape.dropout, ratio)
        self.blocks = nn.ModuleList(DecoderBlock(shape.width, heads, ratio) for _ in range(shape.depth))
        if not self.averaged:
            position = sine_positions(groups.trunk_side, shape.width)
            self.register_buffer("position_TW", position, persistent=False)
            each = zip(groups.dims, groups.factors, strict=True)
            self.heads = nn.ModuleList(BlockHead(shape.width, dims, factor) for dims, factor in each)

    def forward(self, trunk_BTD: Tensor) -> list[Tensor]:
        """Predicted rows (B x N x D), in the order of the groups."""
        x_BTW = self.bottleneck(trunk_BTD)
        if self.averaged:
            return self._block_means(x_BTW)
        x_BTW = x_BTW + self.position_TW
        for block in self.blocks:
            x_BTW = block(x_BTW)
        return [head(x_BTW) for head in self.heads]

    def _block_means(self, x_BTW: Tensor) -> list[Tensor]:
        """Deep blocks of the encoder are rebuilt first: the first half of the decoder is the deep group."""
        outputs = []
        for block in self.blocks:
            x_BTW = block(x_BTW)
            outputs.append(x_BTW)
        half = len(outputs) // 2
        return [torch.stack(part).mean(0) for part in (outputs[half:], outputs[:half])]


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

    def forward(self, trunk_BTD: Tensor, small_B3SS: Tensor) -> Predicted:
        """Predictions of both students."""
        return Predicted(self.local(trunk_BTD), self.semantic(small_B3SS))


class DualScorer(Scorer):
    """Turns what teacher and students said into maps and scores; buffers only."""

    gain_E: Tensor
    link_K: Tensor
    even_K: Tensor

    def __init__(self, groups: LevelGroups, info: BackboneInfo, clusters: int) -> None:
        self.side, self.plans = max(groups.sides), groups.plans
        windows = [plan.windows for plan in groups.plans]
        # A quarter of the input side: twice the fine group's grid, whether there is a grain group or not.
        map_side = self.side if groups.plans[0].stride == 4 else 2 * self.side
        super().__init__(info, groups.dims, groups.sides, clusters, map_side, windows, factors=groups.factors)
        token_dims = sum(info.token_channels)
        self.nearest = NearestNormal(info.embedding_channels)
        self.register_buffer("link_K", torch.ones(1))
        self.register_buffer("even_K", torch.zeros(1))
        self.register_buffer("gain_E", torch.ones(token_dims))
        self.token_of_student = TokenDistance(token_dims)
        for group, dims in enumerate(groups.dims):
            self.register_buffer(f"gain_{group}", torch.ones(dims))
        self.surprise_groups = nn.ModuleList(Surprise() for _ in groups.dims)
        self.surprise_surface = Surprise()
        self.surprise_token, self.surprise_nearest = Surprise(), Surprise()
        self.surprise_local, self.surprise_semantic = Surprise(), Surprise()

    def curves_of_groups(self) -> list[Surprise]:
        """The calibration curve of every layer group."""
        return [cast(Surprise, module) for module in self.surprise_groups]

    def curves(self) -> list[Surprise]:
        """Every calibration curve."""
        readings = [*self.curves_of_groups(), self.surprise_surface, self.surprise_token, self.surprise_nearest]
        return [*readings, self.surprise_local, self.surprise_semantic]

    def residual(self, group: int, teacher: Tensor, student: Tensor) -> Tensor:
        """Teacher minus the student at its least-squares gain per channel.

        The cosine loss leaves the student's length free. One gain for all images: fitted to each anew it would
        let a student that has learnt nothing explain a part of every defect.
        """
        return torch.addcmul(teacher, -self.gain(group), student)

    def gain(self, group: int) -> Tensor:
        """The student's gain per channel of a group (D)."""
        return self.get_buffer(f"gain_{group}")

    def fit_gains(self, answers: Iterable[tuple[list[Tensor], list[Tensor]]]) -> None:
        """Learn the gains from (teacher's groups, student's groups) of some normal images."""
        shared = [torch.zeros_like(self.gain(g), dtype=torch.float64) for g in range(len(self.plans))]
        length = [torch.zeros_like(one) for one in shared]
        for groups, predicted in answers:
            for g, (teacher, student) in enumerate(zip(groups, predicted, strict=True)):
                shared[g] += (teacher * student).double().sum((0, 1))
                length[g] += student.double().square().sum((0, 1))
        for g, (one, other) in enumerate(zip(shared, length, strict=True)):
            self.register_buffer(f"gain_{g}", (one / other.clamp_min(1e-12)).float())

    def group_maps(self, groups: list[Tensor], predicted: list[Tensor], prototype_B: Tensor) -> list[Tensor]:
        """The z-map of every layer group on its own grid: B x h x w each."""
        return [
            module(self.residual(g, groups[g], predicted[g]), prototype_B) for g, module in enumerate(self.residuals)
        ]

    def token_residual(self, token_BE: Tensor, predicted: tuple[Tensor, ...]) -> Tensor:
        """Teacher's tokens minus the student's at its least-squares gain per channel: B x E.

        Where the student has learnt nothing the gain is near zero and its noise is kept out.
        """
        return token_BE - self.gain_E * torch.cat(predicted, 1)

    def fit_tokens(self, token_NE: Tensor, said_NE: Tensor, embedding_NF: Tensor, link_K: Tensor, seed: int) -> None:
        """Learn how tokens and what the student misses of them scatter, and where normal images lie."""
        super().fit_tokens(token_NE, said_NE, embedding_NF, link_K, seed)
        variant_N = self.prototypes.variant(token_NE)
        self.gain_E = (token_NE * said_NE).sum(0) / said_NE.square().sum(0).clamp_min(1e-12)
        self.token_of_student.fit(token_NE - self.gain_E * said_NE, variant_N, self.prototypes.variants)
        self.nearest.fit(embedding_NF, variant_N, seed)
        self.link_K, self.even_K = link_K, torch.zeros_like(link_K)

    def calibrate(self, groups_NG: Tensor, local_N: Tensor, semantic_N: Tensor, prototype_N: Tensor) -> Tensor:
        """Fit every reading's curve, then both students', whose scores are formed anew from the readings."""
        count = self.prototypes.count
        for reading, curve in enumerate(self.curves()[:-2]):
            curve.fit(groups_NG[:, reading], prototype_N, count)
        self.even_K = evenness(groups_NG[:, len(self.plans) + 1], prototype_N, count)
        local_N, semantic_N = self.both(groups_NG, prototype_N)
        self.surprise_local.fit(local_N, prototype_N, count)
        self.surprise_semantic.fit(semantic_N, prototype_N, count)
        return self.joined(local_N, semantic_N, prototype_N)[0]

    def both(self, readings_BR: Tensor, prototype_B: Tensor) -> tuple[Tensor, Tensor]:
        """Local and semantic score (B each): Noisy-ORs over their readings, as sums of surprises.

        Local are the layer groups and the surface. Semantic are two: where normal images repeat each other, or are
        draws of one Gaussian, their spread says all, and the nearest of them adds but noise; where they are as
        different as photographs, no spread describes them well. See `repetition` and `evenness`.
        """
        said_BR = surprises(self.curves()[:-2], readings_BR, prototype_B)
        split = len(self.plans)
        surface_B, token_B, nearest_B = said_BR[:, split:].unbind(1)
        near_B = ((1.0 - self.link_K) * (1.0 - self.even_K)).index_select(0, prototype_B)
        spread_B = 1.0 - (1.0 - TOKEN_WEIGHT) * near_B
        return said_BR[:, :split].sum(1) + SURFACE_WEIGHT * surface_B, spread_B * token_B + near_B * nearest_B

    def read_maps(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Raw readings of the groups' z-maps, then of the surface (B x G+1), and the anomaly map (B x h x w)."""
        tops = [top_mean(one, plan.share) for one, plan in zip(maps, self.plans, strict=True)]
        fine = [upsample(one, self.side)[:, 0] for one in maps]
        surface = [one for one, plan in zip(fine, self.plans, strict=True) if plan.on_surface]
        tops.append(top_mean(torch.stack(surface).mean(0), SURFACE_SHARE))
        weights = [plan.weight for plan in self.plans]
        weighted = [weight * one for weight, one in zip(weights, fine, strict=True)]
        return torch.stack(tops, 1), torch.stack(weighted).sum(0) / sum(weights)

    def joined(self, local_B: Tensor, semantic_B: Tensor, prototype_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Joint score and both students' surprises (B each), the local one weighed by its link.

        Each student is calibrated as one, or the layer groups would outvote the semantic student. Doubt grows
        with the square, p = 1 - exp(-s^2 / 2): a student within its normal range then says nearly nothing, and the
        Noisy-OR pays little for listening to it. In a Noisy-OR every cause has a link strength, the chance that it
        is not inhibited. Here it tempers the local student's probability, (1 - p) ** link, where normal images do
        not repeat each other: see `repetition`.
        """
        curves, raw_B2 = self.curves()[-2:], torch.stack([local_B, semantic_B], 1)
        local, semantic = _squared(surprises(curves, raw_B2, prototype_B)).unbind(1)
        local = self.link_K.index_select(0, prototype_B) * local
        return noisy_or(local, semantic)[0], local, semantic

    def read_tokens(
        self, token_BE: Tensor, said: tuple[Tensor, ...], embedding_BF: Tensor, variant_B: Tensor, unusual_B: Tensor
    ) -> Tensor:
        """Two raw readings of the whole image (B x 2): how far it is from its kind, and from any normal image.

        The first is how unusual the teacher's tokens are (``unusual_B``) and how far the student missed them.
        """
        missed_B = self.token_of_student(self.token_residual(token_BE, said), variant_B)
        wrong_B = (unusual_B.square() + missed_B.square()).sqrt()
        return torch.stack([wrong_B, self.nearest(embedding_BF)], 1)

    def forward(self, groups: list[Tensor], token_BE: Tensor, predicted: Predicted, embedding_BF: Tensor) -> Outputs:
        """Maps, raw and calibrated scores of a batch."""
        variant_B = self.prototypes.variant(token_BE)
        prototype_B = self.prototypes.owner_V.index_select(0, variant_B)
        maps = self.group_maps(groups, predicted.groups, prototype_B)
        maps_BR, grid_Bhw = self.read_maps(maps)
        unusual_B = self.token_of_teacher(token_BE, variant_B)
        tokens_B2 = self.read_tokens(token_BE, predicted.tokens, embedding_BF, variant_B, unusual_B)
        readings_BR = torch.cat([maps_BR, tokens_B2], 1)
        local_B, semantic_B = self.both(readings_BR, prototype_B)
        joint_B, surprise_local, surprise_semantic = self.joined(local_B, semantic_B, prototype_B)
        return Outputs(
            smooth(upsample(grid_Bhw, self.map_side), self.kernel), joint_B, local_B, semantic_B,
            surprise_local, surprise_semantic, prototype_B, readings_BR, unusual_B,
        )  # fmt: skip


class DualModel(AnomalyModel):
    """Teacher, both students and scorer.

    Args:
        teacher: frozen teacher.
        shape: sizes of the students.
        clusters: largest number of variants of scene; 0 leaves it to the data.
    """

    groups: LevelGroups
    student: DualStudent
    scorer: DualScorer

    def __init__(self, teacher: Teacher, shape: DualShape, clusters: int = 0) -> None:
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

    def score(self, observed: Observed, small_B3SS: Tensor) -> Outputs:
        """Outputs from the teacher's answer and the shrunk pixels."""
        groups, predicted = self.answer(observed, small_B3SS)
        tokens = self.tokens(observed.token_BE)
        outputs: Outputs = self.scorer(groups, tokens, predicted, observed.embedding_BF)
        return outputs

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


def _squared(surprise: Tensor) -> Tensor:
    """Half the square, with its sign, so that no two scores tie below the normal range."""
    return 0.5 * surprise * surprise.abs()


def sine_positions(side: int, width: int) -> Tensor:
    """Fixed sine and cosine codes of row and column: (side*side) x width."""
    quarter = max(1, width // 4)
    rate = torch.exp(torch.arange(quarter) * (-4.0 / quarter))
    angle = torch.arange(side)[:, None] * rate[None]
    line = torch.cat([angle.sin(), angle.cos()], 1)
    both = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], 2)
    return F.pad(both.reshape(side * side, -1), (0, width - 4 * quarter))


def _resampling(own: int, wanted: set[int]) -> list[tuple[int, int]]:
    """(from side, to side) in an order that can be followed; means are taken of the smallest grid of means."""
    steps, here = [], own
    for side in sorted(wanted - {own}, reverse=True):
        steps.append((here if here % side == 0 else own, side))
        here = side if own % side == 0 else here
    return steps


def _vit_groups(strides: tuple[int, ...]) -> list[GroupPlan]:
    levels, half = len(strides), max(1, len(strides) // 2)
    parts = tuple(range(half)), tuple(range(half, levels)) or (levels - 1,)
    return [GroupPlan(part, strides[0]) for part in parts]


def _cnn_groups(strides: tuple[int, ...]) -> list[GroupPlan]:
    """The grain, fine, middle and deep group; a CNN without a stride repeats the next, or has no grain."""
    last = {stride: max(i for i, s in enumerate(strides) if s == stride) for stride in set(strides)}
    first_16 = min((i for i, s in enumerate(strides) if s == 16), default=len(strides) - 1)
    middle, deep = last.get(16, len(strides) - 1), last.get(32, len(strides) - 1)
    fine = sorted({last[stride] for stride in (4, 8) if stride in last} | {first_16})
    plans = [
        GroupPlan(tuple(fine), max(8, strides[fine[0]]), FINE_WINDOWS),
        GroupPlan((middle,), strides[middle]),
        GroupPlan(tuple(sorted({middle, deep})), strides[middle], on_surface=False),
    ]
    grain = [GroupPlan((last[4],), 4, GRAIN_WINDOWS, GRAIN_SHARE, weight=GRAIN_WEIGHT)] if 4 in last else []
    return grain + plans
