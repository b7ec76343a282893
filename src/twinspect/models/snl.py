"""System B: structural teacher-student normality learning (our re-implementation of arXiv 2402.17091, Deng, Li 2024).

Trained on many classes at once, a student learns to reproduce what is anomalous for one class because another class
taught it to: cross-class interference. The remedy: the student must match the teacher's *structure* (position by
position, channel by channel, and how positions and images relate to each other), and its features are pulled to
centres of what is normal (`Cram`; NetVLAD is among the paper's references). One file for all configurations:

    direction  reverse (bottleneck and decoder) or forward (an encoder from scratch, on the pixels)
    terms      flat (RD4AD's cosine of the flattened map), spatial, channel, intra, inter
    cram       number of centres, 0 without
    scoring    plain     cosine maps summed over stages, image score = maximum, as in RD4AD; with ``affinity_map`` the
                         affinity difference map joins them
               published plain, with the very map of RD4AD's code
               default   the same reading beside what good images teach in closed form (`models.scorer`)

``rd`` and ``fd`` are flat, without CRAM, plain. With a WideResNet-50-2 the reverse student is RD4AD's network (Deng,
Li, CVPR 2022) to the digit: see docs/papers.md and benchmarks/parity.py. What is ours: any CNN or ViT as the teacher,
default scoring, and what the paper's abstract leaves open (see `losses`).

Shapes: B images, D channels, h w grid, N tokens, E width of all global tokens together, S input side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect import losses
from twinspect.config import ModelConfig, TrainConfig
from twinspect.models.clusters import k_means
from twinspect.models.contract import AnomalyModel, Batches, Observed, Plain, Selection
from twinspect.models.layers import AllSum, DecoderBlock, published_map, to_map, to_tokens, upsample
from twinspect.models.scorer import Scorer
from twinspect.models.teachers import Backbone, BackboneInfo, Teacher

STAGES = 3  # RD4AD's three; a ViT's layers are averaged in as many parts
RD_BETAS = (0.5, 0.999)  # RD4AD's Adam
RD4AD_DEPTHS = (6, 4, 3)  # blocks of the decoder's stages, fine to coarse; the embedding has as many as the last
_START_ROWS = 512  # vectors of a batch that the centres of a CRAM are found from
_ONE_TO_NEXT = 100.0  # how much more the nearest centre weighs than the second nearest, for a typical vector


class Cram(nn.Module):
    """Pulls features to K learnt centres of what is normal: B x D x h x w to the same shape.

    With soft assignments a_k(x) that sum to one, residuals r_k = x - c_k give

        y = sum_k a_k c_k + g(sum_k a_k r_k),    sum_k a_k r_k = x - sum_k a_k c_k,

    so that with g = identity y = x and the module does nothing. What makes it a bottleneck is g: a 1 x 1
    convolution, normalised, and a ReLU that lets only part of a residual pass. The paper speaks of residuals only;
    that the centres are added back is our reading.
    """

    def __init__(self, width: int, centres: int) -> None:
        super().__init__()
        self.centres_KD = nn.Parameter(torch.randn(centres, width) * width**-0.5)
        self.assign = nn.Conv2d(width, centres, 1)
        self.mix = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """The mixture of centres, and what of the residuals passes."""
        weight_BKhw = self.assign(x_BDhw).softmax(1)
        central: Tensor = (self.centres_KD.T @ weight_BKhw.flatten(2)).reshape(x_BDhw.shape)
        return central + cast(Tensor, self.mix(x_BDhw - central))

    @torch.no_grad()
    def initialise(self, rows_ND: Tensor, seed: int) -> None:
        """Centres by k-means on features of normal images, assignments by distance to them.

        a_k ~ exp(-alpha |x - c_k|^2) is a linear layer: its |x|^2 is the same for all k. ``alpha`` makes the
        nearest centre of a typical vector weigh a hundred times more than the second nearest.
        """
        count = len(self.centres_KD)
        centres = k_means(rows_ND, min(count, len(rows_ND)), seed)
        if len(centres) < count:
            # Fewer vectors than centres: the others stay where chance put them.
            centres = torch.cat([centres, self.centres_KD[len(centres) :]])
        nearest = torch.cdist(rows_ND, centres).square().topk(min(2, count), dim=1, largest=False).values
        gap = (nearest[:, -1] - nearest[:, 0]).mean().clamp_min(1e-6)
        alpha = math.log(_ONE_TO_NEXT) / gap
        self.centres_KD.copy_(centres)
        self.assign.weight.copy_((2 * alpha * centres)[:, :, None, None])
        assert self.assign.bias is not None
        self.assign.bias.copy_(-alpha * centres.square().sum(1))


def gather_batch(part_B: Tensor) -> Tensor:
    """Join the equal parts of a batch of all processes along the first dimension, in rank order, with gradients.

    A loss of the joined batch, computed by every process, gives each one its own part's gradient times the number
    of processes; averaging parameter gradients over processes, as data-parallel training does, then gives exactly
    the gradient of one process with the whole batch. Without a process group the part is the batch.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return part_B
    before, behind = (ranks * len(part_B) for ranks in (dist.get_rank(), dist.get_world_size() - 1 - dist.get_rank()))
    joined: Tensor = AllSum.apply(F.pad(part_B, (0, 0) * (part_B.dim() - 1) + (before, behind)), None)  # type: ignore[no-untyped-call]
    return joined


class Stages:
    """The kept maps that are distilled, fine to coarse, each on its own grid.

    CNN: the last level of its three finest strides from 4 on. ViT: its levels averaged in three parts.
    """

    def __init__(self, info: BackboneInfo, selection: Selection) -> None:
        self.selection = selection
        last = {stride: i for i, stride in enumerate(info.strides)}
        finest = [last[stride] for stride in sorted(last)[:STAGES]]
        self.at = list(range(len(selection.channels))) if info.vit else finest
        self.channels = [selection.channels[i] for i in self.at]
        self.map_sides = [selection.map_sides[i] for i in self.at]

    def of(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        """The stages among kept maps."""
        return [maps[i] for i in self.at]

    def in_spreads(self, map_BDhw: Tensor, i: int) -> Tensor:
        """A map of the i-th stage in units of each channel's standard deviation on good images."""
        return map_BDhw / self.selection.get_buffer(f"scale_{self.at[i]}")[:, None, None]


def conv_norm(width_in: int, width: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Convolution and batch norm."""
    conv = nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(width)]


def rise_norm(width_in: int, width: int, factor: int) -> list[nn.Module]:
    """Transposed convolution that makes a square of every position, and batch norm."""
    return [nn.ConvTranspose2d(width_in, width, factor, factor, bias=False), nn.BatchNorm2d(width)]


class WideBottleneck(nn.Module):
    """ResNet's block of three convolutions around a shortcut, half as wide inside (WideResNet-50-2).

    With ``rise`` a transposed convolution in the place of the middle one enlarges the grid by that factor.
    """

    def __init__(self, width_in: int, width: int, stride: int = 1, rise: int = 1) -> None:
        super().__init__()
        inner = max(1, width // 2)
        middle = conv_norm(inner, inner, stride=stride) if rise == 1 else rise_norm(inner, inner, rise)
        self.body = nn.Sequential(
            *conv_norm(width_in, inner, 1), nn.ReLU(), *middle, nn.ReLU(), *conv_norm(inner, width, 1)
        )
        self.shortcut = nn.Sequential()
        if rise > 1:
            self.shortcut.extend(rise_norm(width_in, width, rise))
        elif stride > 1 or width_in != width:
            self.shortcut.extend(conv_norm(width_in, width, 1, stride))

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """B x D x h x w to B x D_out x h_out x w_out."""
        return F.relu(self.body(x_BDhw) + self.shortcut(x_BDhw))


class ConvReverse(nn.Module):
    """Stages on falling grids to predictions of the same shapes, through a grid half as fine as the coarsest."""

    def __init__(
        self,
        channels: Sequence[int],  # of the stages, fine to coarse
        sides: Sequence[int],
        width: int,  # of the finest stage, doubled at every coarser one; 0 takes each stage's own, at least 64
        depth: int,  # blocks of the embedding and of every stage of the decoder; 0: RD4AD's if rectified, else 3
        rectified: bool,  # whether the teacher's stages end in a ReLU, which the decoder's last one then gives
        centres: int,  # of a CRAM between bottleneck and decoder; 0: none
    ) -> None:
        super().__init__()
        self.sides = tuple(sides)
        widths = [width * 2**i for i in range(len(channels))] if width else [max(64, c) for c in channels]
        depths = RD4AD_DEPTHS[-len(widths) :] if rectified and not depth else (depth or 3,) * len(widths)
        embedded = 2 * widths[-1]
        at_bottleneck = Cram(embedded, centres) if centres else nn.Identity()
        self.fuse = nn.ModuleList(_downwards([channels[i], *widths[i + 1 :]], sides[i:]) for i in range(len(widths)))
        fused = sum(widths[-1] for _ in channels[:-1]) + channels[-1]
        self.embed = nn.Sequential(
            WideBottleneck(fused, embedded, stride=2),
            *(WideBottleneck(embedded, embedded) for _ in range(depths[-1] - 1)),
        )
        self.at_bottleneck = at_bottleneck
        self.rise, self.heads = nn.ModuleList(), nn.ModuleList()
        above, here = embedded, -(-sides[-1] // 2)
        for w, c, side, blocks in zip(*(reversed(x) for x in (widths, channels, sides, depths)), strict=True):
            first = WideBottleneck(above, w, rise=-(-side // here))
            self.rise.append(nn.Sequential(first, *(WideBottleneck(w, w) for _ in range(blocks - 1))))
            self.heads.append(nn.Identity() if rectified and w == c else nn.Conv2d(w, c, 1))
            above, here = w, side

    def forward(self, stages: Sequence[Tensor], pixels_B3ss: Tensor) -> list[Tensor]:
        """Predictions of the stages, fine to coarse; pixels are not looked at."""
        x = self.at_bottleneck(self.embed(torch.cat([f(s) for f, s in zip(self.fuse, stages, strict=True)], 1)))
        predictions = []
        for rise, head, side in zip(self.rise, self.heads, reversed(self.sides), strict=True):
            x = rise(x)[..., :side, :side]  # of an odd side a row too many was made
            predictions.append(head(x))
        return predictions[::-1]


class TokenReverse(nn.Module):
    """The same for stages on one grid (ViT): an MLP bottleneck and transformer blocks, deep stages first."""

    def __init__(self, channels: Sequence[int], width: int, depth: int, heads: int, centres: int) -> None:
        super().__init__()
        count, at_bottleneck = len(channels), Cram(width, centres) if centres else nn.Identity()
        self.embed = nn.Sequential(nn.Linear(sum(channels), width), nn.GELU(), nn.Linear(width, width))
        self.at_bottleneck = at_bottleneck
        self.rise = nn.ModuleList(
            nn.Sequential(*(DecoderBlock(width, heads) for _ in range(max(1, depth // count)))) for _ in channels
        )
        self.heads = nn.ModuleList(nn.Linear(width, c) for c in reversed(channels))

    def forward(self, stages: Sequence[Tensor], pixels_B3ss: Tensor) -> list[Tensor]:
        """Predictions of the stages; pixels are not looked at."""
        x_BND = self.embed(to_tokens(torch.cat(list(stages), 1)))
        x_BND = to_tokens(self.at_bottleneck(to_map(x_BND)))
        predictions = []
        for rise, head in zip(self.rise, self.heads, strict=True):
            x_BND = rise(x_BND)
            predictions.append(to_map(head(x_BND)))
        return predictions[::-1]


def _downwards(widths: Sequence[int], sides: Sequence[int]) -> nn.Module:
    """Convolutions that bring a stage to the coarsest one's grid, one for every stage between."""
    steps: list[nn.Module] = []
    for i in range(len(sides) - 1):
        steps += [*conv_norm(widths[i], widths[i + 1], stride=round(sides[i] / sides[i + 1])), nn.ReLU()]
    return nn.Sequential(*steps)


class ForwardEncoder(nn.Module):
    """The teacher's architecture from scratch, on the same pixels, giving the same stages."""

    def __init__(self, info: BackboneInfo, stages: Stages, size: int) -> None:
        super().__init__()
        self.net, self.stages = Backbone(info.arch, img_size=size), stages

    def forward(self, stages: Sequence[Tensor], pixels_B3SS: Tensor) -> list[Tensor]:
        """Normalised pixels to predictions of the stages; the teacher's are not looked at."""
        return self.stages.of(self.stages.selection.select(self.net.features(pixels_B3SS).maps))


class StructuralStudent(nn.Module):
    """One student, forward or reverse, with a CRAM at the bottleneck, behind every stage, or nowhere."""

    def __init__(self, info: BackboneInfo, stages: Stages, config: ModelConfig, size: int) -> None:
        super().__init__()
        structure = config.structure()
        width = config.width or (info.channels[0] if info.vit else 0)
        inside = structure.cram if structure.cram_place == "bottleneck" else 0
        net: nn.Module
        if structure.direction == "forward":
            net = ForwardEncoder(info, stages, size)
        elif info.vit:
            net = TokenReverse(stages.channels, width, config.depth or 6, max(1, width // 64), inside)
        else:
            net = ConvReverse(stages.channels, stages.map_sides, width, config.depth, info.rectified, inside)
        self.local = nn.ModuleDict({"net": net})
        if structure.cram and structure.cram_place == "stages":
            self.local["crams"] = nn.ModuleList(Cram(c, structure.cram) for c in stages.channels)

    def forward(self, stages: Sequence[Tensor], pixels_B3ss: Tensor) -> list[Tensor]:
        """Predictions of the teacher's stages, fine to coarse."""
        predictions: list[Tensor] = self.local["net"](stages, pixels_B3ss)
        if "crams" not in self.local:
            return predictions
        crams = cast(nn.ModuleList, self.local["crams"])
        return [cram(stage) for cram, stage in zip(crams, predictions, strict=True)]


class StructuralModel(AnomalyModel):
    """Teacher, one student, scorer; ``config`` says which student, terms and scoring."""

    student: StructuralStudent
    map_means_2: Tensor

    def __init__(self, teacher: Teacher, config: ModelConfig, size: int) -> None:
        super().__init__(teacher, size, STAGES)
        self.structure = config.structure()
        self.stages = Stages(teacher.info, self.selection)
        self.student = StructuralStudent(teacher.info, self.stages, config, size)
        self.scorer = Scorer(teacher.info, self.selection, size, self.structure.scoring, (1, 0))
        self.pixel_side = size if self.structure.direction == "forward" else 0
        if self.structure.affinity_map:
            self.register_buffer("map_means_2", torch.ones(2))

    def answer(self, observed: Observed, small_B3SS: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's stages, and the student's predictions of them."""
        stages = self.stages.of(observed.maps)
        return stages, self.student(stages, small_B3SS)

    def targets(self, observed: Observed) -> list[Tensor]:
        """The teacher's stages as rows: B x N x D."""
        return [to_tokens(stage) for stage in self.stages.of(observed.maps)]

    def predictions(self, observed: Observed, small_B3SS: Tensor) -> list[Tensor]:
        """The student's, in their order."""
        return [to_tokens(stage) for stage in self.answer(observed, small_B3SS)[1]]

    def plain(self, observed: Observed, small_B3SS: Tensor) -> Plain:
        """Sum over stages of 1 - cos, the affinity differences if asked for, and the map's maximum."""
        pairs = list(zip(*self.answer(observed, small_B3SS), strict=True))
        if self.scorer.published:
            distances = [losses.position_cosine_distance(t, s) for t, s in pairs]
            map_B1HW, peak_B = published_map(distances, self.size, "rd4ad")
            map_Bhw = map_B1HW[:, 0]
        else:
            maps = self.distance_maps(pairs)
            map_Bhw = maps[0]
            if self.structure.affinity_map:
                features, affinities = self.map_means_2.unbind()
                map_Bhw = maps[0] / features + self.structure.affinity_map * maps[1] / affinities
            peak_B = self.scorer.finish(map_Bhw).amax((1, 2, 3))
        return Plain(map_Bhw, peak_B[:, None], peak_B[:, None][:, :0])

    def distance_maps(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Sums over stages of feature distances and, if asked for, of affinity differences: B x h x w each."""
        side, grid = max(self.stages.map_sides), self.structure.affinity_side
        distances = [[losses.position_cosine_distance(t, s) for t, s in pairs]]
        if self.structure.affinity_map:
            distances.append([losses.affinity_distance(t, s, grid) for t, s in pairs])
        return [torch.cat([upsample(map_Bhw, side) for map_Bhw in maps], 1).sum(1) for maps in distances]

    @torch.no_grad()
    def fit_plain(self, batches: Batches) -> None:
        """Means of both maps on good images, which bring them to one scale."""
        if not self.structure.affinity_map:
            return
        total, images = torch.zeros(2, device=self.device), 0
        for observed, small in batches():
            maps = self.distance_maps(list(zip(*self.answer(observed, small), strict=True)))
            total += torch.stack([map_Bhw.mean((1, 2)).sum() for map_Bhw in maps])
            images += len(maps[0])
        self.map_means_2.copy_((total / images).clamp_min(1e-8))

    def losses(self, observed: Observed, small_B3SS: Tensor, step: int, config: TrainConfig) -> dict[str, Tensor]:
        """Sum over stages of every term that is switched on, by its weight, and each term's own sum without it."""
        stages, predicted = self.answer(observed, small_B3SS)
        pairs, weights = list(enumerate(zip(stages, predicted, strict=True))), self.structure.weights_of_terms()
        terms = {name: torch.stack([self._term(name, i, t, s) for i, (t, s) in pairs]).sum() for name in weights}
        parts = {name: value.detach() for name, value in terms.items()}
        weighed = [weight * terms[name] for name, weight in weights.items()]
        return {"loss": torch.stack(weighed).sum(), **parts}

    def _term(self, name: str, i: int, teacher_BDhw: Tensor, student_BDhw: Tensor) -> Tensor:
        match name:
            case "flat":
                return losses.flat_cosine_distance(teacher_BDhw, student_BDhw).mean()
            case "spatial":
                return losses.spatial_loss(teacher_BDhw, student_BDhw)
            case "channel":
                # A softmax needs a scale: the spread of the channel on normal images.
                return losses.channel_loss(*(self.stages.in_spreads(x, i) for x in (teacher_BDhw, student_BDhw)))
            case "intra":
                return losses.intra_affinity_loss(teacher_BDhw, student_BDhw, self.structure.affinity_side)
            case _:  # inter
                return losses.inter_affinity_loss(teacher_BDhw, student_BDhw, gather=gather_batch)

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """One group for the one student."""
        return [{"params": list(self.student.parameters()), "lr": config.lr, "betas": RD_BETAS}]

    @torch.no_grad()
    def initialise(self, batches: Batches, seed: int) -> None:
        """Put the centres of every CRAM on features of normal images, as the untrained student has them."""
        crams = [module for module in self.student.modules() if isinstance(module, Cram)]
        if not crams:
            return
        seen: dict[Cram, list[Tensor]] = {cram: [] for cram in crams}
        generator = torch.Generator().manual_seed(seed)

        def note(cram: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].movedim(1, -1).flatten(0, -2)
            seen[cast(Cram, cram)].append(rows[torch.randperm(len(rows), generator=generator)[:_START_ROWS]])

        hooks = [cram.register_forward_pre_hook(note) for cram in crams]
        self.student.train()  # batch norm must see these features, its running statistics are still empty
        for observed, small in batches():
            self.answer(observed, small)
        for hook in hooks:
            hook.remove()
        for cram, parts in seen.items():
            cram.initialise(torch.cat(parts), seed)


build = StructuralModel  # of a configuration at an input side that suits the teacher: see `config.FAMILIES`
