"""System B: structural teacher-student normality learning (our re-implementation of arXiv 2402.17091, Deng, Li 2024).

Trained on many classes at once, a student learns to reproduce what is anomalous for one class because another class
taught it to: cross-class interference. The remedy: the student must match the teacher's *structure* (position by
position, channel by channel, and how positions and images relate to each other), and its features are pulled to
centres of what is normal (`models.cram`). One file for all configurations:

    direction  reverse (bottleneck and decoder) or forward (an encoder from scratch, on the pixels)
    terms      flat (RD4AD's cosine of the flattened map), spatial, channel, intra, inter
    cram       number of centres, 0 without
    scoring    plain     cosine maps summed over stages, image score = maximum, as in RD4AD
               whitened  differences of unit vectors measured by their statistics on normal images, each stage
                         calibrated, stages joined by a Noisy-OR (`models.statistics`)
               joint     whitened, joined by a Noisy-OR with how unusual the teacher's global tokens are

``rd`` and ``fd`` are flat, without CRAM, plain. What is ours: any CNN or ViT as the teacher, every scoring but plain,
and what the paper's abstract leaves open (see `losses`).

Shapes: B images, D channels, h w grid, E width of all global tokens together, S input side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.config import ModelConfig, Structure, TrainConfig
from twinspect.losses import (
    channel_loss,
    flat_cosine_distance,
    inter_affinity_loss,
    intra_affinity_loss,
    position_cosine_distance,
    spatial_loss,
)
from twinspect.models.contract import AnomalyModel, Observed, Outputs, Predicted, Scorer, Selection
from twinspect.models.cram import Cram
from twinspect.models.gather import gather_batch
from twinspect.models.layers import to_tokens, whole_divisor
from twinspect.models.reverse import ConvReverse, TokenReverse, bottleneck_width
from twinspect.models.statistics import Surprise, surprises
from twinspect.models.teachers import Backbone, BackboneInfo, Teacher
from twinspect.scoring import noisy_or, smooth, top_mean, upsample

STAGES = 3  # RD4AD's three; a ViT's layers are averaged in as many parts
TOP_SHARE = 0.005  # share of positions whose mean is a stage's score when whitened
# Between whitening (0) and plain distances (infinity), as a share of the mean variance: students of a few hundred
# steps leave residuals whose small directions are noise, and whitening them fully loses small defects (see LOG.md).
RIDGE = 1.0
RD_BETAS = (0.5, 0.999)  # RD4AD's Adam
_START_ROWS = 512  # vectors of a batch that the centres of a CRAM are found from


@dataclass(frozen=True, slots=True)
class StructuralShape:
    """Sizes: input side, factor of the smaller view for global tokens (see `dual.DualShape`)."""

    size: int
    view_shrink: int


class Stages(Selection):
    """The teacher's stages that are distilled, fine to coarse, each on its own grid.

    CNN: the last level of its three finest strides from 4 on. ViT: its levels averaged in three parts.
    """

    def __init__(self, info: BackboneInfo, size: int) -> None:
        levels = _thirds(len(info.channels)) if info.kind == "vit" else _finest(info.strides)
        super().__init__(info, levels, [-(-size // info.strides[one[0]]) for one in levels], True)

    def in_spreads(self, map_BDhw: Tensor, i: int) -> Tensor:
        """A map of the i-th stage in units of each channel's spread on normal images."""
        return map_BDhw / self.get_buffer(f"scale_{i}")[:, None, None]


class ForwardEncoder(nn.Module):
    """The teacher's architecture from scratch, on the same pixels, giving the same stages."""

    def __init__(self, info: BackboneInfo, stages: Stages, size: int) -> None:
        super().__init__()
        self.net = Backbone(info.arch, img_size=size)
        self.select = stages.select

    def forward(self, stages: Sequence[Tensor], pixels_B3SS: Tensor) -> list[Tensor]:
        """Normalised pixels to predictions of the stages; the teacher's are not looked at."""
        return list(self.select(self.net.features(pixels_B3SS).maps))


class StructuralStudent(nn.Module):
    """One student, forward or reverse, with a CRAM at the bottleneck, behind every stage, or nowhere."""

    def __init__(self, info: BackboneInfo, stages: Stages, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.local = _Local(info, stages, config, size)

    def forward(self, stages: Sequence[Tensor], pixels_B3ss: Tensor) -> list[Tensor]:
        """Predictions of the teacher's stages, fine to coarse."""
        found: list[Tensor] = self.local(stages, pixels_B3ss)
        return found


class _Local(nn.Module):
    def __init__(self, info: BackboneInfo, stages: Stages, config: ModelConfig, size: int) -> None:
        super().__init__()
        structure = config.structure()
        at_stages = structure.cram and structure.cram_place == "stages"
        self.net = _student(info, stages, config, size)
        self.crams = nn.ModuleList(Cram(c, structure.cram) for c in stages.channels) if at_stages else None

    def forward(self, stages: Sequence[Tensor], pixels_B3ss: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.net(stages, pixels_B3ss)
        return found if self.crams is None else [cram(one) for cram, one in zip(self.crams, found, strict=True)]


def _student(info: BackboneInfo, stages: Stages, config: ModelConfig, size: int) -> nn.Module:
    structure = config.structure()
    if structure.direction == "forward":
        return ForwardEncoder(info, stages, size)
    vit = info.kind == "vit"
    width = config.width or (info.channels[0] if vit else 0)
    inside = width if vit else bottleneck_width(stages.channels, width)
    cram = Cram(inside, structure.cram) if structure.cram and structure.cram_place == "bottleneck" else None
    if vit:
        return TokenReverse(stages.channels, width, config.depth or 6, max(1, width // 64), cram)
    return ConvReverse(stages.channels, stages.map_sides, width, config.depth, info.rectified, cram)


class StructuralScorer(Scorer):
    """Turns stages and predictions into maps and scores; buffers only.

    plain: the map is the sum over stages of 1 - cos, the local score its maximum. The joint score is a strictly
    rising function of the local one, the same for all images: it ranks as RD4AD's does. The semantic score is the
    mean of the map: how badly the student predicts the image as a whole. It is reported and joins nothing.
    whitened: as in the dual model, stages are z-maps, calibrated one by one; the local score is their Noisy-OR, the
    joint score its calibration by scene. The semantic score is the distance of the teacher's tokens from those of
    normal images of the scene; it is reported, and with ``joint`` scoring joins the local one.
    """

    def __init__(self, stages: Stages, info: BackboneInfo, clusters: int, scoring: str) -> None:
        self.whitened, self.joined = scoring != "plain", scoring == "joint"
        self.side = max(stages.map_sides)
        dims, sides = (stages.channels, stages.map_sides) if self.whitened else ([], [])
        # At a quarter of the input, whatever the finest stage is.
        super().__init__(info, dims, sides, clusters, max(self.side, 2 * min(stages.map_sides)), ridge=RIDGE)
        self.surprise_stages = nn.ModuleList(Surprise() for _ in dims)
        self.surprise_local, self.surprise_semantic = Surprise(), Surprise()

    def curves(self) -> list[Surprise]:
        """Every calibration curve."""
        stages = [cast(Surprise, curve) for curve in self.surprise_stages]
        return [*stages, self.surprise_local, self.surprise_semantic]

    def residual(self, group: int, teacher: Tensor, student: Tensor) -> Tensor:
        """Difference of unit vectors of two maps, as rows B x N x D: half its squared length is 1 - cos."""
        return to_tokens(F.normalize(teacher, dim=1) - F.normalize(student, dim=1))

    def stage_maps(self, stages: list[Tensor], predicted: list[Tensor], prototype_B: Tensor) -> list[Tensor]:
        """Anomaly map of every stage on its own grid: B x h x w each."""
        pairs = list(zip(stages, predicted, strict=True))
        if not self.whitened:
            return [position_cosine_distance(t, s) for t, s in pairs]
        return [
            module(self.residual(g, t, s), prototype_B)
            for g, (module, (t, s)) in enumerate(zip(self.residuals, pairs, strict=True))
        ]

    def owner(self, prototype_B: Tensor) -> Tensor:
        """Whose curve an image is calibrated by: its prototype's, or everybody's when plain."""
        return prototype_B if self.whitened else torch.zeros_like(prototype_B)

    def local(self, groups_BG: Tensor, peak_B: Tensor, prototype_B: Tensor) -> Tensor:
        """Local score (B): the map's maximum, or the Noisy-OR of the stages in nats."""
        if not self.whitened:
            return peak_B
        return surprises(self.curves()[:-2], groups_BG, prototype_B).sum(1)

    def joint(self, local_B: Tensor, semantic_B: Tensor, owner_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Joint score and both calibrated surprises (B each)."""
        raw_B2 = torch.stack([local_B, semantic_B], 1)
        local, semantic = surprises(self.curves()[-2:], raw_B2, owner_B).unbind(1)
        return noisy_or(local, semantic)[0] if self.joined else local, local, semantic

    def calibrate(self, groups_NG: Tensor, local_N: Tensor, semantic_N: Tensor, prototype_N: Tensor) -> Tensor:
        """Fit the curves on raw scores of held-out normal images; their joint scores (N)."""
        count, owner_N = self.prototypes.count, self.owner(prototype_N)
        for g, curve in enumerate(self.surprise_stages):
            cast(Surprise, curve).fit(groups_NG[:, g], prototype_N, count)
        local_N = self.local(groups_NG, local_N, prototype_N)
        self.surprise_local.fit(local_N, owner_N, count)
        self.surprise_semantic.fit(semantic_N, owner_N, count)
        return self.joint(local_N, semantic_N, owner_N)[0]

    def forward(self, stages: list[Tensor], token_BE: Tensor, predicted: Predicted) -> Outputs:
        """Maps, raw and calibrated scores of a batch."""
        variant_B = self.prototypes.variant(token_BE)
        prototype_B = self.prototypes.owner_V.index_select(0, variant_B)
        maps = self.stage_maps(stages, predicted.groups, prototype_B)
        groups_BG = torch.stack([top_mean(one, TOP_SHARE) if self.whitened else one.amax((1, 2)) for one in maps], 1)
        raised = torch.stack([upsample(one, self.side)[:, 0] for one in maps])
        grid_Bhw = raised.mean(0) if self.whitened else raised.sum(0)
        map_B1HW = smooth(upsample(grid_Bhw, self.map_side), self.kernel)
        local_B = self.local(groups_BG, map_B1HW.amax((1, 2, 3)), prototype_B)
        distance_B: Tensor = self.token_of_teacher(token_BE, variant_B)
        semantic_B = distance_B if self.whitened else grid_Bhw.mean((1, 2))
        joint_B, surprise_local, surprise_semantic = self.joint(local_B, semantic_B, self.owner(prototype_B))
        return Outputs(
            map_B1HW, joint_B, local_B, semantic_B, surprise_local, surprise_semantic, prototype_B, groups_BG,
            distance_B,
        )  # fmt: skip


class StructuralModel(AnomalyModel):
    """Teacher, one student, scorer.

    Args:
        teacher: frozen teacher.
        config: which student, terms and scoring; see the module.
        size: input side.

    Attributes:
        gather: joins a batch's features over training processes for the inter-affinity; does nothing in one.
    """

    groups: Stages
    student: StructuralStudent
    scorer: StructuralScorer

    def __init__(self, teacher: Teacher, config: ModelConfig, size: int) -> None:
        super().__init__(teacher)
        self.structure: Structure = config.structure()
        vit = teacher.info.kind == "vit"
        shrink = config.view_shrink or (1 if vit else round(size / 256))
        self.shape = StructuralShape(size, whole_divisor(size, shrink, teacher.info.multiple if vit else 1))
        self.groups = Stages(teacher.info, size)
        self.student = StructuralStudent(teacher.info, self.groups, config, size)
        self.scorer = StructuralScorer(self.groups, teacher.info, config.clusters, self.structure.scoring)
        self.pixel_side = size if self.structure.direction == "forward" else 0
        self.gather: Callable[[Tensor], Tensor] = gather_batch

    def answer(self, observed: Observed, small_B3SS: Tensor) -> tuple[list[Tensor], Predicted]:
        """The teacher's stages, and the student's predictions of them."""
        stages = list(observed.maps)
        return stages, Predicted(self.student(stages, small_B3SS), ())

    def losses(self, observed: Observed, small_B3SS: Tensor, step: int, config: TrainConfig) -> dict[str, Tensor]:
        """Sum over stages of every term that is switched on, and each term's own sum."""
        stages, predicted = self.answer(observed, small_B3SS)
        pairs = list(enumerate(zip(stages, predicted.groups, strict=True)))
        terms = {
            name: torch.stack([self._term(name, i, t, s) for i, (t, s) in pairs]).sum()
            for name in self.structure.terms
        }
        parts = {name: value.detach() for name, value in terms.items()}
        return {"loss": torch.stack(list(terms.values())).sum(), **parts}

    def _term(self, name: str, i: int, teacher_BDhw: Tensor, student_BDhw: Tensor) -> Tensor:
        structure = self.structure
        match name:
            case "flat":
                return flat_cosine_distance(teacher_BDhw, student_BDhw).mean()
            case "spatial":
                return spatial_loss(teacher_BDhw, student_BDhw)
            case "channel":
                # A softmax needs a scale: temperature 1 is one spread of the channel on normal images.
                teacher_BDhw, student_BDhw = (self.groups.in_spreads(x, i) for x in (teacher_BDhw, student_BDhw))
                return channel_loss(teacher_BDhw, student_BDhw, structure.temperature, structure.channel_reading)
            case "intra":
                return intra_affinity_loss(teacher_BDhw, student_BDhw, structure.affinity_side)
            case "inter":
                return inter_affinity_loss(teacher_BDhw, student_BDhw, gather=self.gather)
        raise ValueError(f"unknown term {name!r}")

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """One group for the one student."""
        group: dict[str, Any] = {"params": list(self.student.parameters()), "lr": config.lr}
        return [{**group, "betas": RD_BETAS}]

    @torch.no_grad()
    def initialise(self, batches: Callable[[], Iterable[tuple[Observed, Tensor]]], seed: int) -> None:
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


def build_structural(teacher: Teacher, config: ModelConfig, size: int) -> StructuralModel:
    """The untrained model of a configuration at an input side that suits the teacher."""
    return StructuralModel(teacher, config, size)


def _finest(strides: tuple[int, ...]) -> list[list[int]]:
    """The last level of each of the three finest strides."""
    last = {stride: i for i, stride in enumerate(strides)}
    return [[last[stride]] for stride in sorted(last)[:STAGES]]


def _thirds(levels: int) -> list[list[int]]:
    """Levels in three consecutive parts, as even as may be; fewer levels are a part each."""
    count = min(STAGES, levels)
    return [list(range(i * levels // count, (i + 1) * levels // count)) for i in range(count)]
