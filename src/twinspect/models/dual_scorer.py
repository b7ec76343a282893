"""How system A reads what teacher and students said: maps, raw readings, both students' scores, the joint score.

Shapes: B images, N normal images (or rows of a group), D channels, h w grid, E width of all global tokens together,
F of the embedding, R readings, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from twinspect.models.contract import Outputs, Predicted, Scorer
from twinspect.models.groups import LevelGroups
from twinspect.models.nearest import NearestNormal
from twinspect.models.statistics import Surprise, TokenDistance, evenness, surprises
from twinspect.models.teachers import BackboneInfo
from twinspect.scoring import noisy_or, smooth, top_mean, upsample

TOKEN_WEIGHT = 0.25  # of the tokens' reading where normal images are photographs; 1 where they repeat each other
SURFACE_SHARE = 0.002  # of positions, on the finest grid, whose mean is the reading of all surface groups together
SURFACE_WEIGHT = 4.0  # of that reading in the local score: agreement on a place says more than one group alone
DOUBT_POWER = 2.5  # with which a student's surprise counts in the joint score: see `DualScorer.joined`


class DualScorer(Scorer):
    """Turns what teacher and students said into maps and scores; buffers only.

    Attributes:
        merged: whether gains and the student's heads have become part of the residual maps (`models.prepared`).
    """

    merged = False
    gain_E: Tensor
    link_K: Tensor
    even_K: Tensor
    share_G: Tensor

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
        weight_G = torch.tensor([plan.weight for plan in groups.plans])
        self.register_buffer("share_G", weight_G / weight_G.sum(), persistent=False)
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
        if self.merged:
            each = zip(self.residuals, groups, predicted, strict=True)
            return [module(rows, said, prototype_B) for module, rows, said in each]
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
        fine = [upsample(one, self.side) for one in maps]
        surface = [one for one, plan in zip(fine, self.plans, strict=True) if plan.on_surface]
        tops.append(top_mean(torch.cat(surface, 1).mean(1), SURFACE_SHARE))
        return torch.stack(tops, 1), torch.einsum("bghw,g->bhw", torch.cat(fine, 1), self.share_G)

    def joined(self, local_B: Tensor, semantic_B: Tensor, prototype_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Joint score and both students' surprises (B each), the local one weighed by its link.

        Each student is calibrated as one, or the layer groups would outvote the semantic student. Doubt grows
        faster than s, p = 1 - exp(-s^2.5 / 2): a student within its normal range then says nearly nothing, and the
        Noisy-OR pays little for listening to it. In a Noisy-OR every cause has a link strength, the chance that it
        is not inhibited. Here it tempers the local student's probability, (1 - p) ** link, where normal images do
        not repeat each other: see `repetition`.
        """
        curves, raw_B2 = self.curves()[-2:], torch.stack([local_B, semantic_B], 1)
        local, semantic = _doubt(surprises(curves, raw_B2, prototype_B)).unbind(1)
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


def _doubt(surprise: Tensor) -> Tensor:
    """Half a power of the surprise, with its sign, so that no two scores tie below the normal range."""
    return 0.5 * surprise * surprise.abs() ** (DOUBT_POWER - 1.0)
