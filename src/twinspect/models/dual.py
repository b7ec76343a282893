"""System A: dual-student distillation (our re-implementation of arXiv 2509.24448, Park, Seo, Kim 2025).

One frozen teacher, two heterogeneous students trained and scored together through a Noisy-OR:

* `EncoderDecoder` rebuilds the teacher's mid-level patch features, in two groups, behind a noisy
  bottleneck with linear attention. It finds small, local defects. With a ViT it is the network of
  Dinomaly (CVPR 2025) to the digit: see docs/papers.md and benchmarks/parity.py.
* `EncoderEncoder` is the teacher's own architecture trained from scratch to give the teacher's global
  tokens only. Sparse supervision keeps it from learning the identity. It finds semantic anomalies.

What is ours: a CNN can be the teacher (its stages play the layers, pooled stages the class tokens), and
residuals are whitened by their statistics on normal images (`models.statistics`), because raw cosine
distances do not see a small defect in a stochastic texture.

Shapes: B images, D channels, h w grid, T positions of the decoder's grid, N rows of a group (its positions in blocks,
one for every position of the decoder's: see `layers.to_rows`), P class and register tokens, E width of all global
tokens together, S input side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.config import ModelConfig, TrainConfig
from twinspect.losses import easy_share, encoder_decoder_loss, encoder_encoder_loss, noisy_or_loss
from twinspect.models.contract import AnomalyModel, Observed, Outputs, Predicted
from twinspect.models.dual_scorer import DualScorer
from twinspect.models.groups import LAYER_NORM_EPS, LevelGroups
from twinspect.models.layers import BlockHead, DecoderBlock, NoisyBottleneck, start_small, whole_divisor
from twinspect.models.teachers import Backbone, BackboneInfo, Teacher


@dataclass(frozen=True, slots=True)
class DualShape:
    """Sizes of the two students; zeros are replaced by what suits the teacher.

    Attributes:
        size: input side in pixels.
        width, depth: of the Encoder-Decoder's decoder.
        dropout: noise of its bottleneck.
        ee_shrink: factor by which the Encoder-Encoder's input is smaller.
        ee_depth: share of the teacher's blocks in the Encoder-Encoder; of a CNN's, of every stage.
        view_shrink: factor by which the view is smaller that global tokens are taken from. A CNN recognises
            objects at the size it was trained with; small defects need more pixels than that.
        recentre: whether the Encoder-Decoder's targets are recentred on the class token (Dinomaly2).
    """

    size: int
    width: int = 0
    depth: int = 0
    dropout: float = 0.2
    ee_shrink: int = 0
    ee_depth: float = 0.0
    view_shrink: int = 0
    recentre: bool = False

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
            self.ee_depth or (1.0 if vit else 0.25),
            whole_divisor(self.size, self.view_shrink or (1 if vit else round(self.size / 256)), multiple),
            self.recentre,
        )


class EncoderDecoder(nn.Module):
    """Bottleneck and decoder: B x T x D_in to the predicted rows of every group.

    ViT: class and register tokens go with the patches through bottleneck and decoder, and are dropped at its end.
    """

    def __init__(self, groups: LevelGroups, shape: DualShape, info: BackboneInfo) -> None:
        super().__init__()
        self.averaged, self.prefix_tokens = groups.averaged, groups.prefix_tokens
        heads = max(1, shape.width // 64 if self.averaged else shape.width // 32)
        ratio = 4.0 if self.averaged else 2.0  # hidden units a unit of width: Dinomaly's, and half of it for a CNN
        self.bottleneck = NoisyBottleneck(groups.trunk_dims, shape.width, shape.dropout, ratio)
        eps = LAYER_NORM_EPS if self.averaged else 1e-5
        self.blocks = nn.ModuleList(DecoderBlock(shape.width, heads, ratio, eps) for _ in range(shape.depth))
        if self.averaged:
            start_small(self)
        else:
            position = sine_positions(groups.trunk_side, shape.width)
            self.register_buffer("position_TW", position, persistent=False)
            each = zip(groups.dims, groups.factors, strict=True)
            self.heads = nn.ModuleList(BlockHead(shape.width, dims, factor) for dims, factor in each)

    def forward(self, trunk_BTD: Tensor, kept_BP: Tensor | None = None) -> list[Tensor]:
        """Predicted rows (B x N x D), in the order of the groups.

        Of a CNN's positions ``kept_BP`` only, if given: the same for every image, but one row each, so that a batch
        can be cut into parts.
        """
        if self.averaged:
            return self._block_means(self.bottleneck(trunk_BTD))
        x_BTW = self.tokens(trunk_BTD)
        if kept_BP is not None:
            x_BTW = x_BTW.index_select(1, kept_BP[0])
        return [head(x_BTW) for head in self.heads]

    def tokens(self, trunk_BTD: Tensor) -> Tensor:
        """What the heads of a CNN's decoder see: B x T x W."""
        x_BTW: Tensor = self.bottleneck(trunk_BTD) + self.position_TW
        for block in self.blocks:
            x_BTW = block(x_BTW)
        return x_BTW

    def _block_means(self, x_BTW: Tensor) -> list[Tensor]:
        """Deep blocks of the encoder are rebuilt first: the first half of the decoder is the deep group."""
        outputs = []
        for block in self.blocks:
            x_BTW = block(x_BTW)
            outputs.append(x_BTW)
        half = len(outputs) // 2
        return [torch.stack(part).mean(0)[:, self.prefix_tokens :] for part in (outputs[half:], outputs[:half])]


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
        self.local: nn.Module = EncoderDecoder(groups, shape, info)
        self.semantic = EncoderEncoder(info, shape)

    def forward(self, trunk_BTD: Tensor, small_B3SS: Tensor, kept_BP: Tensor | None = None) -> Predicted:
        """Predictions of both students; the local one's at positions ``kept_BP`` only, if given."""
        return Predicted(self.local(trunk_BTD, kept_BP), self.semantic(small_B3SS))


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
        self.groups = LevelGroups(teacher.info, self.shape.size, self.shape.recentre)
        self.student = DualStudent(self.groups, self.shape, teacher.info)
        self.scorer = DualScorer(self.groups, teacher.info, clusters)
        self.pixel_side = self.shape.size // self.shape.ee_shrink

    def answer(self, observed: Observed, small_B3SS: Tensor) -> tuple[list[Tensor], Predicted]:
        """The teacher's layer groups, and what both students say."""
        groups, trunk = self.groups(observed)
        return groups, self.student(trunk, small_B3SS)

    def score(self, observed: Observed, small_B3SS: Tensor) -> Outputs:
        """Outputs from the teacher's answer and the shrunk pixels."""
        groups, predicted = self.answer(observed, small_B3SS)
        tokens = self.tokens(observed.token_BE)
        outputs: Outputs = self.scorer(groups, tokens, predicted, observed.embedding_BF)
        return outputs

    def losses(self, observed: Observed, small_B3SS: Tensor, step: int, config: TrainConfig) -> dict[str, Tensor]:
        """Noisy-OR of both students' distances, and the two on their own."""
        groups, trunk = self.groups(observed)
        kept_P = self.compared(step, config)
        if kept_P is None:
            predicted = self.student(trunk, small_B3SS)
        else:
            groups = [_kept(one, trunk.shape[1], kept_P) for one in groups]
            predicted = self.student(trunk, small_B3SS, kept_P.expand(len(trunk), -1))
        local_B = encoder_decoder_loss(groups, predicted.groups, easy_share(step, config.easy_ramp))
        split = torch.split(self.tokens(observed.token_BE), list(self.teacher.info.token_channels), 1)
        semantic_B = encoder_encoder_loss(split, predicted.tokens)
        loss = noisy_or_loss(local_B, semantic_B, config.noisy_or)
        return {"loss": loss, "local": local_B.mean().detach(), "semantic": semantic_B.mean().detach()}

    def compared(self, step: int, config: TrainConfig) -> Tensor | None:
        """Positions of the decoder's grid whose features a step compares: others at every step, the same for all.

        A CNN's heads and their loss are most of a step, and neighbouring positions teach nearly the same. A ViT's
        decoder has no heads: every position is compared.
        """
        if self.groups.averaged:
            return None
        count = self.groups.trunk_side**2
        order = torch.randperm(count, generator=torch.Generator().manual_seed(step))
        return order[: max(1, round(config.compared * count))].sort().values.to(self.device)

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """A group per student: their safe learning rates differ."""
        theirs = {"amsgrad": True, "eps": 1e-10} if self.groups.averaged else {}  # Dinomaly's
        return [
            {"params": list(self.student.local.parameters()), "lr": config.lr, **theirs},
            {"params": list(self.student.semantic.parameters()), "lr": config.lr_ee},
        ]


def build_dual(teacher: Teacher, config: ModelConfig, size: int) -> DualModel:
    """The untrained model of a configuration at an input side that suits the teacher."""
    shape = DualShape(
        size, config.width, config.depth, config.dropout, config.ee_shrink, config.ee_depth, config.view_shrink,
        config.recentre,
    )  # fmt: skip
    return DualModel(teacher, shape, config.clusters)


def _kept(rows_BND: Tensor, positions: int, kept_P: Tensor) -> Tensor:
    """The rows of some of the decoder's positions."""
    blocks = rows_BND.reshape(len(rows_BND), positions, -1).index_select(1, kept_P)
    return blocks.reshape(len(rows_BND), -1, rows_BND.shape[2])


def sine_positions(side: int, width: int) -> Tensor:
    """Fixed sine and cosine codes of row and column: (side*side) x width."""
    quarter = max(1, width // 4)
    rate = torch.exp(torch.arange(quarter) * (-4.0 / quarter))
    angle = torch.arange(side)[:, None] * rate[None]
    line = torch.cat([angle.sin(), angle.cos()], 1)
    both = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], 2)
    return F.pad(both.reshape(side * side, -1), (0, width - 4 * quarter))
