"""From what teacher and students said to `Outputs`: plain, or with what good images teach beside the students.

A **reading** is one number per image, higher is more anomalous. The students' own readings are the family's
(`AnomalyModel.plain`). With ``scoring`` "plain" nothing else is used: that is the paper's system ("published": with
maps as the public code of its relatives makes them, see `layers.published_map`). With "default",
these join them, each learnt in closed form from the same good images (`models.statistics`):

1. clusters: every product, and every look of it, is measured by its own statistics (`models.clusters`);
2. local: of every layer group, how far patches, or means of regions, lie from the mean of good images at their
   position;
3. semantic: how far global tokens lie from those of good images, in two views; how far the nearest good images are.

Every reading is standardised by its mean and standard deviation on good images, z. A surprise is -log of the
probability that a good image's z is higher if readings are normal. In a Noisy-OR independent causes multiply 1 - p,
so surprises add up. Layer groups look for defects of different size: each is a cause. Semantic readings measure the
same thing in different ways: they are averaged (a sum, as both are standardised once more). The map follows the same
rule: at every position the surprises of the layer groups add up.

    local = sum over local readings of w s(z)          semantic = sum over semantic readings of w z
    score = link s(z of local) + s(z of semantic)      s(z) = -log(1 - Phi(z))
    map = sum over the layer groups of the map of s(z of distance)

The weight w of a student's reading comes from its skill, how much better it predicts good images than their mean
does: 0 up to `LEAST_SKILL`, and in proportion from there to 1. It is 1 for the rest. ``link`` says how far the good
images of a cluster repeat each other (`clusters.repetition`): 1 on a line, near 0 among photographs, where the place
and grain of a patch mean nothing. There the nearest good images tell most, so their reading counts 1 - link.

Shapes: B images, h w grid, R readings, n good images, K clusters, H W map.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.models.clusters import Clusters
from twinspect.models.contract import Observed, Outputs, Plain, Selection
from twinspect.models.layers import Resample, surprise, top_mean, upsample
from twinspect.models.statistics import NearestImages, PositionGaussian, Standardiser, TokenGaussian
from twinspect.models.teachers import BackboneInfo

TOP_SHARE = 0.005  # share of positions, the most unusual, whose mean is a layer group's reading
WINDOW = 20  # pixels that squared distances are averaged over, where a position is smaller
LEAST_SKILL = 0.75  # a student's own reading counts from this skill on, and fully at 1
REGION = 4  # positions of the coarsest stages, of 32 pixels, that a region is wide; regions overlap by half


class GroupPlan(NamedTuple):
    """A layer group that patches are judged on."""

    maps: tuple[int, ...]  # indices of the kept maps that it joins
    stride: int  # pixels of the model's input a step of its grid
    scored: bool = True  # whether it gives a local reading
    mapped: bool = True  # whether it is part of the anomaly map
    coarse: bool = False  # whether its maps are those of the coarse view
    region: int = 1  # positions of the grid that features are averaged over, in windows that overlap by half


class LayerGroup(PositionGaussian):
    """The patches of a layer group, and their statistics. Its positions are those of its grid, or regions of it."""

    def __init__(self, plan: GroupPlan, selection: Selection, size: int) -> None:
        sides = selection.coarse_sides if plan.coarse else selection.map_sides
        channels = selection.coarse_channels if plan.coarse else selection.channels
        grid = max(sides) if plan.coarse else -(-size // plan.stride)
        side = grid if plan.region == 1 else (grid - plan.region) // (plan.region // 2) + 1
        super().__init__(sum(channels[i] for i in plan.maps), side, _window(plan.stride))
        self.plan = plan
        self.moves = nn.ModuleList(Resample(sides[i], grid) for i in plan.maps)

    def patches(self, observed: Observed) -> Tensor:
        """Features of every position, with as many channels as the statistics have: B x N x D."""
        maps = observed.coarse if self.plan.coarse else observed.maps
        moved = [move(maps[i]) for i, move in zip(self.plan.maps, self.moves, strict=True)]
        if self.plan.region > 1:
            moved = [F.avg_pool2d(map_BDhw, self.plan.region, self.plan.region // 2) for map_BDhw in moved]
        grids_BhwD = [map_BDhw.permute(0, 2, 3, 1) for map_BDhw in moved]
        grid_BhwD = torch.cat(grids_BhwD, 3) if len(grids_BhwD) > 1 else grids_BhwD[0]
        return self.rows(grid_BhwD.flatten(1, 2))


class Scorer(nn.Module):
    """Maps and scores of a batch; buffers only, learnt from good images after training.

    ``scoring`` is ``plain``, ``published`` (plain, and the family's maps are finished already) or ``default``.
    ``student_readings`` are the numbers of local and of semantic readings that the family's students give.
    """

    weight_R: Tensor
    map_level_KG: Tensor
    map_spread_KG: Tensor

    def __init__(
        self, info: BackboneInfo, selection: Selection, size: int, scoring: str, student_readings: tuple[int, int]
    ) -> None:
        super().__init__()
        self.plain, self.published = scoring != "default", scoring == "published"
        self.student_readings, self.asks_students = student_readings, True
        self.clusters = Clusters(sum(info.token_channels))
        plans = [] if self.plain else group_plans(info, selection)
        self.scored = [g for g, plan in enumerate(plans) if plan.scored]
        self.mapped = [g for g, plan in enumerate(plans) if plan.mapped]
        self.patches = nn.ModuleList(LayerGroup(plan, selection, size) for plan in plans)
        views = 0 if self.plain else len(selection.shrinks)
        self.tokens = nn.ModuleList(TokenGaussian(sum(info.token_channels)) for _ in range(views))
        self.nearest = NearestImages(info.embedding_channels) if not self.plain else None
        self.local_count = student_readings[0] + len(self.scored)
        semantic = student_readings[1] + views + (not self.plain)
        self.standardise = Standardiser(self.local_count + semantic)
        self.standardise_students = Standardiser(2)
        self.register_buffer("weight_R", torch.ones(self.local_count + semantic))
        self.register_buffer("map_level_KG", torch.zeros(1, max(1, len(plans))))
        self.register_buffer("map_spread_KG", torch.ones(1, max(1, len(plans))))
        self.map_side = size // 4

    def student_weights(self) -> dict[str, float]:
        """The weights of the students' own readings in the scores, by part."""
        local, semantic = self.student_readings
        at = {"local": range(local), "semantic": range(self.local_count, self.local_count + semantic)}
        return {part: round(float(self.weight_R[places[0]]), 2) for part, places in at.items() if places}

    def students_count(self) -> bool:
        """Whether the students' own readings change a score: always when plain, else if they have any weight."""
        return self.plain or any(self.student_weights().values())

    def gaussians(self) -> list[LayerGroup]:
        """The layer groups that patches are judged on."""
        return [cast(LayerGroup, gaussian) for gaussian in self.patches]

    def token_gaussians(self) -> list[TokenGaussian]:
        """The statistics of the global tokens of every view."""
        return [cast(TokenGaussian, gaussian) for gaussian in self.tokens]

    def distances(self, observed: Observed, cluster_B: Tensor) -> list[Tensor]:
        """How far patches lie from those of good images at their position, a group each: B x h x w."""
        return [gaussian(gaussian.patches(observed), cluster_B) for gaussian in self.gaussians()]

    def map_of(self, distances: list[Tensor], cluster_B: Tensor) -> Tensor:
        """The anomaly map, B x 1 x H x W: the groups' surprises added up."""
        return self.surprises(distances, cluster_B).sum(1, keepdim=True)

    def surprises(self, distances: list[Tensor], cluster_B: Tensor) -> Tensor:
        """How surprising the distance at every position is, a group of the map each: B x G x H x W.

        One level a map, and at every position a spread that is at least the whole map's: where good images hardly
        vary, as on a black ground, a level and a spread of its own would make dust there louder than a cut in the
        product. Where they vary most, as at the rim that the teacher pads with zeros, a distance says less.
        """
        maps = []
        for g in self.mapped:
            gaussian, distance_Bhw = self.gaussians()[g], distances[g]
            level, spread = (
                t_KG[:, g].index_select(0, cluster_B) for t_KG in (self.map_level_KG, self.map_spread_KG)
            )
            spread_Bhw = gaussian.spread_Khw.index_select(0, cluster_B).maximum(spread[:, None, None])
            maps.append(upsample(surprise((distance_Bhw - level[:, None, None]) / spread_Bhw), self.map_side))
        return torch.cat(maps, 1)

    def finish(self, map_Bhw: Tensor) -> Tensor:
        """A student's map at the size of the outputs: B x 1 x H x W; a published one has its size already."""
        return map_Bhw[:, None] if self.published else upsample(map_Bhw, self.map_side)

    def readings(self, plain: Plain, observed: Observed, distances: list[Tensor], cluster_B: Tensor) -> Tensor:
        """All readings (B x R), local ones first."""
        local = [plain.local_BR]
        for g in self.scored:
            local.append(top_mean(self.gaussians()[g].scaled(distances[g], cluster_B), TOP_SHARE)[:, None])
        semantic = [plain.semantic_BR]
        for gaussian, token_BE in zip(self.token_gaussians(), observed.tokens, strict=not self.plain):
            semantic.append(gaussian(token_BE, cluster_B)[:, None])
        if self.nearest is not None:
            semantic.append(self.nearest(observed.embedding_BF)[:, None])
        return torch.cat([*local, *semantic], 1)

    def owner(self, cluster_B: Tensor) -> Tensor:
        """Whose calibration an image goes by: its cluster's, or everybody's when plain."""
        return torch.zeros_like(cluster_B) if self.plain else cluster_B

    def students(self, reading_BR: Tensor, cluster_B: Tensor) -> Tensor:
        """Local and semantic score before their own calibration (B x 2): Noisy-OR and sum, or the only reading."""
        local = self.local_count
        if self.plain:
            return torch.stack([reading_BR[:, :local].sum(1), reading_BR[:, local:].sum(1)], 1)
        z_BR = self.standardise(reading_BR, cluster_B)
        local_B = (self.weight_R[:local] * surprise(z_BR[:, :local])).sum(1)
        semantic_BR = self.weight_R[local:] * z_BR[:, local:]
        nearest_B = (1.0 - self.clusters.link_K.index_select(0, cluster_B)) * semantic_BR[:, -1]
        return torch.stack([local_B, semantic_BR[:, :-1].sum(1) + nearest_B], 1)

    def joined(self, students_B2: Tensor, cluster_B: Tensor) -> tuple[Tensor, Tensor]:
        """Joint score (B) and the calibrated scores of both (B x 2), in standard deviations."""
        z_B2 = self.standardise_students(students_B2, self.owner(cluster_B))
        local_B, semantic_B = surprise(z_B2).unbind(1)
        if self.local_count == len(self.weight_R):  # a family without any semantic reading
            return local_B, z_B2
        link_B = 1.0 if self.plain else self.clusters.link_K.index_select(0, cluster_B)
        return link_B * local_B + semantic_B, z_B2

    def calibrate(self, reading_nR: Tensor, cluster_n: Tensor, counted_n: Tensor) -> tuple[Tensor, Tensor]:
        """Fit both standardisations on readings of the good images that count; what `joined` gives of all."""
        owner_n, clusters = self.owner(cluster_n), 1 if self.plain else self.clusters.count
        self.standardise.fit(reading_nR[counted_n], owner_n[counted_n], clusters)
        students_n2 = self.students(reading_nR, cluster_n)
        self.standardise_students.fit(students_n2[counted_n], owner_n[counted_n], clusters)
        return self.joined(students_n2, cluster_n)

    def cluster_distance(self, reading_BR: Tensor, z_B2: Tensor) -> Tensor:
        """How unusual the whole image is for its cluster (B): of its tokens, or as the students see it when plain."""
        return z_B2[:, 1] if self.plain else reading_BR[:, self.local_count + self.student_readings[1]]

    def forward(self, plain: Plain | None, observed: Observed) -> Outputs:
        """Maps and scores of a batch; without the students' readings where `asks_students` is false."""
        if plain is None:
            local, semantic = (observed.embedding_BF[:, :1].expand(-1, n) * 0.0 for n in self.student_readings)
            plain = Plain(observed.embedding_BF, local, semantic)
        cluster_B = self.clusters(observed.tokens[0])
        distances = self.distances(observed, cluster_B)
        map_B1HW = self.finish(plain.map_Bhw) if self.plain else self.map_of(distances, cluster_B)
        reading_BR = self.readings(plain, observed, distances, cluster_B)
        score_B, z_B2 = self.joined(self.students(reading_BR, cluster_B), cluster_B)
        distance_B = self.cluster_distance(reading_BR, z_B2)
        nearest_B = cluster_B * 0 if self.nearest is None else self.nearest.first(observed.embedding_BF)
        return Outputs(map_B1HW, score_B, z_B2[:, 0], z_B2[:, 1], cluster_B, distance_B, reading_BR, nearest_B)


def _window(stride: int) -> int:
    """The odd number of positions nearest to `WINDOW` pixels, at least 1."""
    return 2 * int(WINDOW / stride / 2) + 1 if stride < WINDOW // 2 else 1


def group_plans(info: BackboneInfo, selection: Selection) -> list[GroupPlan]:
    """The layer groups that patches are judged on.

    ViT: the kept maps, one each. CNN: what a surface is made of (stride 4 alone), fine (strides 4, 8 and the first of
    16, on the grid of 8), middle (stride 8 and all of 16, on the grid of 16), deep (the last of 16 and of 32, on the
    grid of 16), and deep once more in the coarse view, which sees what is large. The last two make the map only. The
    score reads the deepest stages as means of regions instead: noise of single positions averages out there.
    """
    if info.vit:
        return [GroupPlan((i,), info.strides[0]) for i in range(len(selection.channels))]
    last = {stride: max(i for i, s in enumerate(info.strides) if s == stride) for stride in set(info.strides)}
    of_16 = [i for i, s in enumerate(info.strides) if s == 16] or [len(info.strides) - 1]
    fine = sorted({last[s] for s in (4, 8) if s in last} | {of_16[0]})
    middle = sorted({last[s] for s in (8,) if s in last} | set(of_16))
    deep = tuple(sorted({of_16[-1], last.get(32, len(info.strides) - 1)}))
    grid_16 = info.strides[of_16[-1]]
    plans = [GroupPlan((last[4],), 4)] if 4 in last else []
    regions = tuple(i for i, stride in enumerate(info.strides) if stride == 32)
    plans += [
        GroupPlan(tuple(fine), max(8, info.strides[fine[0]])),
        GroupPlan(tuple(middle), grid_16),
        GroupPlan(deep, grid_16, scored=not regions),
    ]
    if selection.coarse_levels:
        plans.append(GroupPlan(tuple(range(len(selection.coarse_levels))), grid_16, scored=False, coarse=True))
    if regions:
        plans.append(GroupPlan(regions, 32, mapped=False, region=REGION))
    return plans
