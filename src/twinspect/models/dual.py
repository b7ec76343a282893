"""System A: dual-student distillation (our re-implementation of arXiv 2509.24448, Park, Seo, Kim 2025).

A frozen teacher T answers an image x with patch features, in two layer groups F_T^1 and F_T^2, and with class tokens
c_T^l, of the last block l or of all. Two students learn these answers on good images:

* the **Encoder-Decoder** (ED, `EncoderDecoder`) rebuilds the layer groups from the teacher's own middle features,
  through a noisy bottleneck and a decoder with linear attention. Where it fails there is a small, local defect;
* the **Encoder-Encoder** (EE, `EncoderEncoder`) has the teacher's architecture and learns its class tokens from the
  pixels, from scratch. Where it fails the image is wrong as a whole.

    L_ED(x) = 1/2 sum_i (1 - cos(vec F_T^i, vec F_S^i))     L_EE(x) = mean_l (1 - cos(c_T^l, c_S^l))
    training: Noisy-OR of both (`losses.noisy_or_loss`)
    map(x)      = mean_i (1 - cos(F_T^i, F_S^i)) at every position
    local(x)    = mean of the largest 1 % of the map        semantic(x) = L_EE(x)
    score(x)    = Noisy-OR of the probabilities that a good image's local and semantic distance are lower

This is scoring ``plain``, and the paper. With scoring ``default``, `models.scorer` adds what good images teach in
closed form. With a ViT the Encoder-Decoder is the network of Dinomaly (CVPR 2025) to the digit; with scoring
``published`` so are its map, its score and the teacher's position table: see docs/papers.md and benchmarks/parity.py.
What is ours: a CNN can be the teacher. Then its stages play the layers, standardised and brought to one grid, the
first half of them one group and the second half the other; pooled stages play the class tokens. Its Encoder-Decoder
starts from the principal components of the features (`EncoderDecoder.start`): 100 steps from there reach the loss of
1,000 steps from chance.

Shapes: B images, D channels, h w grid, N positions of the decoder's grid, P class and register tokens, E width of all
global tokens together, S input side, W width of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.config import ModelConfig, TrainConfig
from twinspect.errors import ConfigError
from twinspect.losses import easy_share, encoder_decoder_loss, encoder_encoder_loss, noisy_or_loss
from twinspect.models.contract import AnomalyModel, Batches, Observed, Plain, Selection
from twinspect.models.layers import (
    DecoderBlock,
    NoisyBottleneck,
    Resample,
    TokenLinear,
    published_map,
    start_small,
    to_tokens,
    top_mean,
    whole_divisor,
)
from twinspect.models.scorer import Scorer
from twinspect.models.teachers import Backbone, BackboneInfo, Teacher

LAYER_NORM_EPS = 1e-8  # Dinomaly's, in the decoder of a ViT and of recentred groups
TOP_SHARE = 0.01  # of positions, whose mean is the Encoder-Decoder's reading (Dinomaly)


def resolved(config: ModelConfig, info: BackboneInfo, size: int) -> ModelConfig:
    """Sizes in the place of zeros: the published ones for a ViT, what two CPU cores can train for a CNN.

    Raises:
        ConfigError: a decoder that cannot rebuild a ViT's two groups of layers.
    """
    if info.vit and config.width not in (0, info.channels[0]):
        raise ConfigError(
            f"--width {config.width}: with {info.arch} as teacher it is {info.channels[0]}; leave it out"
        )
    if info.vit and config.depth == 1:
        raise ConfigError("--depth 1: each of a ViT's two groups of layers needs a block; type 2 or more")
    shrink = config.ee_shrink or (1 if info.vit else round(size / 64))
    return replace(
        config,
        width=config.width or (info.channels[0] if info.vit else 64),
        depth=config.depth or (8 if info.vit else 1),
        ee_shrink=whole_divisor(size, shrink, info.multiple if info.vit else 1),
        ee_depth=config.ee_depth or (1.0 if info.vit else 0.25),
        scoring=config.scores(),
    )


class LayerGroups(nn.Module):
    """The teacher's two layer groups and the decoder's input, from its kept maps.

    ViT (Dinomaly): the mean of each half of the levels, untouched. The decoder's input is the mean of all levels,
    with their class and register tokens in front. Recentred (Dinomaly2), a group is the layer norm of its patches
    minus its class token; the decoder's input stays as it is.

    CNN: every channel standardised by its statistics on good images, on the grid of stride 16.

    Raises:
        ConfigError: recentred groups of a teacher that has no class token.
    """

    def __init__(self, selection: Selection, info: BackboneInfo, size: int, recentre: bool) -> None:
        super().__init__()
        if recentre and not info.class_token:
            raise ConfigError(f"recentre: {info.arch} has no class token; take a ViT such as --teacher dinov2-base")
        self.vit, self.recentre, self.select = info.vit, recentre, [selection]  # in a list: not a child
        half = len(selection.channels) // 2
        self.side = max(selection.map_sides) if self.vit else min(-(-size // 16), max(selection.map_sides))
        self.widths = (
            selection.channels if self.vit else [sum(selection.channels[:half]), sum(selection.channels[half:])]
        )
        self.trunk_dims = selection.channels[0] if self.vit else sum(selection.channels)
        self.moves = nn.ModuleList(Resample(here, self.side) for here in selection.map_sides)

    def forward(self, observed: Observed) -> tuple[list[Tensor], Tensor]:
        """The teacher's answer to (two groups B x N x D, decoder input B x N x D_in, of a ViT B x P+N x D)."""
        if self.vit:
            return self._averaged(observed)
        selection = self.select[0]
        maps = (
            move(selection.standardise(level, i))
            for i, (level, move) in enumerate(zip(observed.maps, self.moves, strict=True))
        )
        trunk = torch.cat([level.permute(0, 2, 3, 1) for level in maps], 3).flatten(1, 2)
        return list(torch.split(trunk, self.widths, 2)), trunk

    def _averaged(self, observed: Observed) -> tuple[list[Tensor], Tensor]:
        groups = [to_tokens(level) for level in observed.maps]
        prefixes, levels = observed.prefix_BMPD.unbind(1), self.select[0].levels
        total = sum(len(members) for members in levels)
        each = zip(prefixes, groups, levels, strict=True)
        trunk = torch.stack(
            [torch.cat([prefix, patches], 1) * (len(members) / total) for prefix, patches, members in each]
        ).sum(0)
        if self.recentre:
            away = (patches - prefix[:, :1] for patches, prefix in zip(groups, prefixes, strict=True))
            groups = [F.layer_norm(group, group.shape[-1:], eps=LAYER_NORM_EPS) for group in away]
        return groups, trunk


class EncoderDecoder(nn.Module):
    """Bottleneck and decoder: the decoder's input to the predicted layer groups, B x N x D each.

    ViT: class and register tokens go with the patches through bottleneck and decoder, and are dropped at its end.
    """

    def __init__(self, groups: LayerGroups, info: BackboneInfo, config: ModelConfig) -> None:
        super().__init__()
        self.vit, self.prefix_tokens, self.widths = info.vit, info.prefix_tokens, groups.widths
        self.width = width = config.width
        heads = whole_divisor(width, width // 64 if self.vit else width // 32, 1)
        ratio = 4.0 if self.vit else 2.0  # hidden units a unit of width: Dinomaly's, and half of it for a CNN
        self.bottleneck = NoisyBottleneck(groups.trunk_dims, width, config.dropout, ratio)
        eps = LAYER_NORM_EPS if self.vit else 1e-5
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, ratio, eps) for _ in range(config.depth))
        if self.vit:
            start_small(self)
        else:
            self.register_buffer("position_NW", sine_positions(groups.side, width), persistent=False)
            self.head = TokenLinear(width, sum(groups.widths))

    def start(self, trunks: Callable[[], Iterable[Tensor]]) -> None:
        """Make a CNN's student a linear one: principal components, and a head solved by least squares.

        ``trunks`` gives features of good images, B x N x D each, whose channels have mean 0 and standard deviation 1.
        """
        covariance_DD = torch.stack([_products(trunk_BND, trunk_BND) for trunk_BND in trunks()]).sum(0)
        axes_DD = torch.linalg.eigh(covariance_DD).eigenvectors
        axes_DD = axes_DD * axes_DD.gather(0, axes_DD.abs().argmax(0, keepdim=True)).sign()  # machines differ in it
        leading_WD = axes_DD.T[-self.width :].float()
        leading_WD = F.pad(leading_WD, (0, 0, 0, self.width - len(leading_WD)))
        one_WW = torch.eye(self.width, device=leading_WD.device)
        enter, leave = (layer for layer in self.bottleneck.net if isinstance(layer, TokenLinear))
        # Two hidden units for a component x, as GELU(x) - GELU(-x) = x. Blocks add nothing yet.
        _set(enter, torch.cat([leading_WD, -leading_WD]))
        _set(leave, torch.cat([one_WW, -one_WW], 1))
        for layer in self.blocks.modules():
            if isinstance(layer, TokenLinear) and layer.out_features == self.width:
                _set(layer, torch.zeros_like(layer.weight))
        self.train()  # the head learns with the noise that all will be trained with
        sums = []
        for trunk_BND in trunks():
            x_BNW = F.pad(self._decoded(trunk_BND)[-1], (0, 1), value=1.0)
            sums.append(torch.cat([_products(x_BNW, x_BNW), _products(x_BNW, trunk_BND)], 1))
        square, product = torch.stack(sums).sum(0).tensor_split((self.width + 1,), 1)
        little = 1e-6 * square.trace() * torch.eye(len(square)).to(square)
        solved = torch.linalg.solve(square + little, product).float()
        _set(self.head, solved[:-1].T, solved[-1])

    def forward(self, trunk_BND: Tensor) -> list[Tensor]:
        """Predicted groups, in the order of the teacher's."""
        outputs = self._decoded(trunk_BND)
        if not self.vit:
            return list(torch.split(self.head(outputs[-1]), self.widths, 2))
        # Deep blocks of the encoder are rebuilt first: the first half of the decoder is the deep group.
        half = len(outputs) // 2
        return [torch.stack(part).mean(0)[:, self.prefix_tokens :] for part in (outputs[half:], outputs[:half])]

    def _decoded(self, trunk_BND: Tensor) -> list[Tensor]:
        """What every block of the decoder gives."""
        x_BNW, outputs = self.bottleneck(trunk_BND), []
        if not self.vit:
            x_BNW = x_BNW + self.position_NW
        for block in self.blocks:
            x_BNW = block(x_BNW)
            outputs.append(x_BNW)
        return outputs


class EncoderEncoder(nn.Module):
    """The teacher's architecture from scratch, giving a global token for the teacher's last level or for all."""

    def __init__(self, info: BackboneInfo, config: ModelConfig, side: int) -> None:
        super().__init__()
        self.net = Backbone(info.arch, depth=config.ee_depth, img_size=side)
        self.net.drop_head()
        levels, teachers = len(self.net.info.token_channels), len(info.token_channels)
        # A shallower student answers for several levels of the teacher with one of its own.
        self.source = [min(levels - 1, (i * levels) // teachers) for i in range(teachers)]
        first = teachers - 1 if config.ee_tokens == "last" else 0
        self.source, theirs = self.source[first:], info.token_channels[first:]
        dims = zip((self.net.info.token_channels[i] for i in self.source), theirs, strict=True)
        self.heads = nn.ModuleList(nn.Linear(a, b) for a, b in dims)

    def forward(self, small_B3SS: Tensor) -> tuple[Tensor, ...]:
        """Normalised, shrunk pixels to one B x D_l token per level."""
        tokens = self.net.features(small_B3SS).tokens
        return tuple(head(tokens[i]) for head, i in zip(self.heads, self.source, strict=True))


class DualStudent(nn.Module):
    """Both students behind one forward, so that one call reaches every trainable weight."""

    def __init__(self, groups: LayerGroups, info: BackboneInfo, config: ModelConfig, side: int) -> None:
        super().__init__()
        self.local, self.semantic = EncoderDecoder(groups, info, config), EncoderEncoder(info, config, side)

    def forward(self, trunk_BND: Tensor, small_B3SS: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Predicted layer groups and class tokens."""
        return self.local(trunk_BND), self.semantic(small_B3SS)


class DualModel(AnomalyModel):
    """Teacher, both students, scorer."""

    student: DualStudent

    def __init__(self, teacher: Teacher, config: ModelConfig, size: int) -> None:
        config = resolved(config, teacher.info, size)
        if config.scoring == "published":
            teacher.resample_positions(size)
        super().__init__(teacher, size, parts=2)
        self.pixel_side = size // config.ee_shrink
        self.groups = LayerGroups(self.selection, teacher.info, size, config.recentre)
        self.student = DualStudent(self.groups, teacher.info, config, self.pixel_side)
        self.scorer = Scorer(teacher.info, self.selection, size, config.scoring, (1, 1))
        # Of the teacher's, that are learnt; kept here because several processes wrap the student.
        self.class_tokens = len(self.student.semantic.heads)

    def initialise(self, batches: Batches, seed: int) -> None:
        """Start the Encoder-Decoder of a CNN from principal components. A ViT's starts as Dinomaly's does."""
        if not self.groups.vit:
            self.student.local.start(lambda: (self.groups(observed)[1] for observed, _ in batches()))

    def targets(self, observed: Observed) -> list[Tensor]:
        """What the students should have said: both layer groups (B x N x D), then the class tokens (B x D)."""
        return [*self.groups(observed)[0], *self._class_tokens(observed)]

    def predictions(self, observed: Observed, small_B3SS: Tensor) -> list[Tensor]:
        """What they say, in the order of `targets`."""
        groups, tokens = self.student(self.groups(observed)[1], small_B3SS)
        return [*groups, *tokens]

    def plain(self, observed: Observed, small_B3SS: Tensor) -> Plain:
        """Both students' distances from the teacher, as the paper reads them."""
        groups_T, trunk = self.groups(observed)
        groups_S, tokens_S = self.student(trunk, small_B3SS)
        semantic_B = encoder_encoder_loss(self._class_tokens(observed), tokens_S)
        pairs, side = zip(groups_T, groups_S, strict=True), self.groups.side
        maps = [(1.0 - F.cosine_similarity(t, s, dim=2)).reshape(-1, side, side) for t, s in pairs]
        if self.scorer.published:
            map_B1HW, local_B = published_map(maps, self.size, "dinomaly")
            return Plain(map_B1HW[:, 0], local_B[:, None], semantic_B[:, None])
        map_Bhw = torch.stack(maps).mean(0)
        local_B = top_mean(self.scorer.finish(map_Bhw)[:, 0], TOP_SHARE)
        return Plain(map_Bhw, local_B[:, None], semantic_B[:, None])

    def losses(self, observed: Observed, small_B3SS: Tensor, step: int, config: TrainConfig) -> dict[str, Tensor]:
        """Noisy-OR of both students' distances, and the two on their own."""
        groups_T, trunk = self.groups(observed)
        groups_S, tokens_S = self.student(trunk, small_B3SS)
        local_B = encoder_decoder_loss(groups_T, groups_S, easy_share(step, config.easy_ramp))
        semantic_B = encoder_encoder_loss(self._class_tokens(observed), tokens_S)
        loss = noisy_or_loss(local_B, semantic_B, config.noisy_or)
        return {"loss": loss, "local": local_B.mean().detach(), "semantic": semantic_B.mean().detach()}

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """A group per student: their safe learning rates differ."""
        theirs = {"amsgrad": True, "eps": 1e-10} if self.groups.vit else {}  # Dinomaly's
        return [
            {"params": list(self.student.local.parameters()), "lr": config.lr, **theirs},
            {"params": list(self.student.semantic.parameters()), "lr": config.lr_ee},
        ]

    def _class_tokens(self, observed: Observed) -> list[Tensor]:
        tokens_BE, widths = self.standardised(observed.tokens[0]), list(self.teacher.info.token_channels)
        return list(torch.split(tokens_BE, widths, 1))[-self.class_tokens :]


build = DualModel  # of a configuration at an input side that suits the teacher: see `config.FAMILIES`


def _products(left_BND: Tensor, right_BND: Tensor) -> Tensor:
    """Sum over all positions of the products of two features: D_left x D_right."""
    return left_BND.flatten(0, 1).double().T @ right_BND.flatten(0, 1).double()


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor | None = None) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)


def sine_positions(side: int, width: int) -> Tensor:
    """Fixed sine and cosine codes of row and column: (side*side) x width."""
    quarter = max(1, width // 4)
    rate = torch.exp(torch.arange(quarter) * (-4.0 / quarter))
    angle = torch.arange(side)[:, None] * rate[None]
    line = torch.cat([angle.sin(), angle.cos()], 1)
    both = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], 2)
    return F.pad(both.reshape(side * side, -1), (0, width - 4 * quarter))
