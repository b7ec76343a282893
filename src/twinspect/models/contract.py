"""What every family of models is: teacher in, `Outputs` out, one path from pixels to scores.

A family (`twinspect.models.families`) fills in a student, a scorer and the training terms. Training, caching,
bundles, prediction and exports know this contract only.

Shapes: B images, D channels, h w grid, E width of all global tokens together, S input side.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.config import TrainConfig
from twinspect.models.layers import Resample, pool, standardise
from twinspect.models.prototypes import Prototypes
from twinspect.models.statistics import ResidualMap, Surprise, TokenDistance
from twinspect.models.teachers import BackboneInfo, Teacher
from twinspect.scoring import gaussian_kernel
from twinspect.types import Features

MAP_SIGMA = 4.0 / 256.0  # smoothing of the map, as a share of its side (4 pixels at 256)


class Outputs(NamedTuple):
    """What the model says about a batch; higher is more anomalous.

    Attributes:
        map_B1HW: anomaly map in normal spreads, at a quarter of the input side.
        score_B: joint score, the surprise in nats of the Noisy-OR.
        score_local_B, score_semantic_B: what sees small defects and what sees wrong scenes, each alone. The dual
            model: its two students, each the Noisy-OR of its readings in nats. Structural models have one student:
            where it fails most, and how it fails on the whole.
        surprise_local_B, surprise_semantic_B: what the joint score adds up, -log(1 - p) of each part. In the dual
            model a power of its calibrated surprise, the local one times its link strength.
        prototype_B: index of the nearest scene prototype.
        groups_BG: raw readings that the scores are made of: one of every layer group, then (dual model) one of
            the surface and two of the global tokens.
        prototype_distance_B: whitened distance of the teacher's token from that prototype; large means that
            the image shows none of the kinds of scene the model knows.
    """

    map_B1HW: Tensor
    score_B: Tensor
    score_local_B: Tensor
    score_semantic_B: Tensor
    surprise_local_B: Tensor
    surprise_semantic_B: Tensor
    prototype_B: Tensor
    groups_BG: Tensor
    prototype_distance_B: Tensor


class Observed(NamedTuple):
    """What is kept of the teacher's answer.

    Attributes:
        maps: the maps the layer groups are made of (see `LevelGroups.select`).
        token_BE: all global tokens joined, raw.
        embedding_BF: what the teacher's own classifier would see.
        prefix_BMPD: class and register tokens of the kept maps, averaged as the maps are: M maps, P tokens. No
            maps and no tokens (B x 0 x 0 x 0) for a CNN.
    """

    maps: tuple[Tensor, ...]
    token_BE: Tensor
    embedding_BF: Tensor
    prefix_BMPD: Tensor


class Predicted(NamedTuple):
    """What the students say the teacher should have said; a family without a semantic student has no tokens.

    Groups are as the family's own groups are: rows B x N x D (dual) or maps B x D x h x w (structural).
    """

    groups: list[Tensor]
    tokens: tuple[Tensor, ...]


class Shape(Protocol):
    """Sizes that code outside a family may ask for."""

    @property
    def size(self) -> int:
        """Input side in pixels."""
        ...

    @property
    def view_shrink(self) -> int:
        """Factor by which the view for global tokens is smaller."""
        ...


class Selection(nn.Module):
    """Which of the teacher's maps a family works on, and their channel statistics on normal images.

    ``select`` keeps of a teacher's answer what is needed (and what a cache must store). Several levels joined in
    one map are averaged (layers of a ViT); single ones are brought to their side (stages of a CNN).

    Attributes:
        levels: members of every map, as indices of the teacher's levels.
        channels, map_sides: of every map.
        prefix_shape: M x P x D of the kept class and register tokens; zeros for a CNN.
        standardised: whether `standardise` uses the statistics, or leaves maps as they are.
    """

    def __init__(self, info: BackboneInfo, levels: list[list[int]], map_sides: list[int], standardised: bool) -> None:
        super().__init__()
        self.levels, self.map_sides, self.standardised = levels, map_sides, standardised
        self.channels = [info.channels[members[0]] for members in levels]
        self.prefix_shape = (len(levels), info.prefix_tokens, self.channels[0]) if info.prefix_tokens else (0, 0, 0)
        for i, channels in enumerate(self.channels):
            self.register_buffer(f"mean_{i}", torch.zeros(channels))
            self.register_buffer(f"scale_{i}", torch.ones(channels))

    def select(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The maps that are kept of the teacher's."""
        joined = (self._mean(maps, members) for members in self.levels)
        return tuple(_at_side(one, side) for one, side in zip(joined, self.map_sides, strict=True))

    def select_prefix(self, features: Features) -> Tensor:
        """Class and register tokens of the kept maps: B x M x P x D."""
        if 0 in self.prefix_shape:
            return features.maps[0].new_zeros(features.maps[0].shape[0], *self.prefix_shape)  # `len` fixes an export
        return torch.stack([self._mean(features.prefix, members) for members in self.levels], 1)

    @staticmethod
    def _mean(levels: tuple[Tensor, ...], members: list[int]) -> Tensor:
        return torch.stack([levels[i] for i in members]).mean(0) if len(members) > 1 else levels[members[0]]

    def standardise(self, map_BDhw: Tensor, i: int) -> Tensor:
        """The i-th selected map with channels of mean 0 and spread 1 on normal images."""
        if not self.standardised:
            return map_BDhw
        return standardise(map_BDhw, self.get_buffer(f"mean_{i}"), self.get_buffer(f"scale_{i}"))

    def fit(self, i: int, mean_D: Tensor, scale_D: Tensor) -> None:
        """Take a selected map's channel statistics on normal images."""
        if self.standardised:
            self.get_buffer(f"mean_{i}").copy_(mean_D)
            self.get_buffer(f"scale_{i}").copy_(scale_D.clamp_min(1e-4))


class TokenScale(nn.Module):
    """Standardises the global tokens by their statistics on normal images and joins them: B x E."""

    mean_E: Tensor
    scale_E: Tensor

    def __init__(self, info: BackboneInfo) -> None:
        super().__init__()
        self.register_buffer("mean_E", torch.zeros(sum(info.token_channels)))
        self.register_buffer("scale_E", torch.ones(sum(info.token_channels)))

    def forward(self, token_BE: Tensor) -> Tensor:
        """Joined raw tokens to standardised ones, B x E."""
        return (token_BE - self.mean_E) / self.scale_E

    def fit(self, token_NE: Tensor) -> None:
        """Take mean and spread of raw joined tokens of normal images."""
        self.mean_E, self.scale_E = token_NE.mean(0), token_NE.std(0).clamp_min(1e-3)


class Scorer(nn.Module):
    """Turns what teacher and students said into `Outputs`; buffers only, learnt from normal images after training.

    What all families share: scene prototypes from the teacher's tokens, the statistics of residuals (none for
    plain cosine distances), calibration curves.
    """

    kernel: Tensor

    def __init__(
        self,
        info: BackboneInfo,
        dims: list[int],
        sides: list[int],
        clusters: int,
        map_side: int,
        windows: list[tuple[int, ...]] | None = None,
        ridge: float = 3e-3,
        factors: list[int] | None = None,
    ) -> None:
        super().__init__()
        token_dims = sum(info.token_channels)
        self.prototypes = Prototypes(token_dims, most=clusters)
        each = zip(dims, sides, windows or [(1,)] * len(dims), factors or [1] * len(dims), strict=True)
        self.residuals = nn.ModuleList(ResidualMap(d, side, own, f, ridge=ridge) for d, side, own, f in each)
        self.token_of_teacher = TokenDistance(token_dims)
        self.map_side = map_side
        self.register_buffer("kernel", gaussian_kernel(MAP_SIGMA * map_side), persistent=False)

    def maps_of_groups(self) -> list[ResidualMap]:
        """The residual statistics of every layer group."""
        return [cast(ResidualMap, module) for module in self.residuals]

    @abstractmethod
    def residual(self, group: int, teacher: Tensor, student: Tensor) -> Tensor:
        """What of a group of the teacher's the student's does not explain, as rows: B x N x D."""

    def fit_gains(self, answers: Iterable[tuple[list[Tensor], list[Tensor]]]) -> None:
        """Learn what `residual` needs from (teacher's groups, student's groups) of some normal images."""

    @abstractmethod
    def curves(self) -> list[Surprise]:
        """Every calibration curve."""

    @abstractmethod
    def calibrate(self, groups_NG: Tensor, local_N: Tensor, semantic_N: Tensor, prototype_N: Tensor) -> Tensor:
        """Fit the curves on raw scores of held-out normal images; their joint scores (N)."""

    def fit_tokens(self, token_NE: Tensor, said_NE: Tensor, embedding_NF: Tensor, link_K: Tensor, seed: int) -> None:
        """Learn how the teacher's tokens (and, where there are some, the student's) scatter on normal images.

        The prototypes are fitted already; ``link_K`` says how far the images of each repeat each other.
        """
        self.token_of_teacher.fit(token_NE, self.prototypes.variant(token_NE), self.prototypes.variants)


class AnomalyModel(nn.Module):
    """Teacher, students and scorer: raw RGB pixels to `Outputs` in one forward path.

    A family sets the attributes and fills in `answer`, `losses` and `parameter_groups`.

    Attributes:
        teacher: frozen.
        shape: sizes; ``shape.size`` is the input side.
        groups: the teacher's maps that are kept.
        student: everything that is trained; its children are named by part (``local``, ``semantic``).
        scorer: maps and scores.
        tokens: standardises the teacher's global tokens.
        pixel_side: side of the pixels the student itself looks at; 0 if it sees the teacher's maps only.
    """

    shape: Shape
    groups: Selection
    student: nn.Module
    scorer: Scorer
    pixel_side: int

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.tokens = TokenScale(teacher.info)

    @property
    def device(self) -> torch.device:
        """Where teacher, students and statistics lie."""
        return self.teacher.mean_3.device

    def forward(self, image_BCHW: Tensor) -> Outputs:
        """Score uint8 RGB (or float 0..255) B x 3 x H x W; other sizes are resized to the model's."""
        x = self.teacher.normalise(fit_size(image_BCHW, self.shape.size))
        return self.score(self.observe(x), self.shrink(x))

    def observe(self, x_B3SS: Tensor) -> Observed:
        """The teacher's answer to normalised pixels, reduced to what students and scorer need."""
        features = self.teacher.features(x_B3SS)
        view = features
        if self.shape.view_shrink > 1:
            view = self.teacher.features(_shrunk(x_B3SS, self.shape.view_shrink))
        embedding_BF = self.teacher.embedding(view).float()
        tokens = torch.cat(view.tokens, 1).float()
        return Observed(self.groups.select(features.maps), tokens, embedding_BF, self.groups.select_prefix(features))

    def score(self, observed: Observed, small_B3SS: Tensor) -> Outputs:
        """Outputs from the teacher's answer and the shrunk pixels."""
        groups, predicted = self.answer(observed, small_B3SS)
        outputs: Outputs = self.scorer(groups, self.tokens(observed.token_BE), predicted)
        return outputs

    def shrink(self, x_B3SS: Tensor) -> Tensor:
        """The pixels the student looks at: averaged to ``pixel_side``, or none at all (B x 3 x 0 x 0)."""
        if not self.pixel_side:
            return x_B3SS[:, :, :0, :0]
        factor = self.shape.size // self.pixel_side
        return _shrunk(x_B3SS, factor) if factor > 1 else x_B3SS

    @abstractmethod
    def answer(self, observed: Observed, small_B3SS: Tensor) -> tuple[list[Tensor], Predicted]:
        """The teacher's maps by group, and what the students make of them."""

    @abstractmethod
    def losses(self, observed: Observed, small_B3SS: Tensor, step: int, config: TrainConfig) -> dict[str, Tensor]:
        """Training terms of a batch: ``loss`` and its parts, scalars. ``observed`` comes from the teacher."""

    @abstractmethod
    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """The optimiser's groups, each with ``params`` and ``lr``."""

    def initialise(self, batches: Callable[[], Iterable[tuple[Observed, Tensor]]], seed: int) -> None:
        """Start the student from normal images, once its inputs are scaled and before it is trained.

        Args:
            batches: gives (teacher's answer, shrunk pixels) of some training images.
            seed: of whatever is drawn.
        """


def _at_side(map_BDhw: Tensor, side: int) -> Tensor:
    here = map_BDhw.shape[-1]
    if here == side:
        return map_BDhw
    found: Tensor = Resample(here, side).to(map_BDhw.device)(map_BDhw)
    return found


def _shrunk(x_B3SS: Tensor, factor: int) -> Tensor:
    """Mean of every factor x factor pixels."""
    return pool(x_B3SS, factor)


def fit_size(image_BCHW: Tensor, size: int) -> Tensor:
    """Whole image to size x size, antialiased bilinear, no crop; untouched when it fits already."""
    if image_BCHW.shape[-2:] == (size, size):
        return image_BCHW
    return F.interpolate(image_BCHW.float(), size=(size, size), mode="bilinear", antialias=True)
