"""What every family of models is: teacher in, `Outputs` out, one path from pixels to scores.

A family (a row of `twinspect.config.FAMILIES`) fills in a student, its training terms and its plain readings.
Training, caching, statistics, bundles, prediction and exports know this contract only.

Shapes: B images, D channels, h w grid, M kept maps, N positions, P class and register tokens, E width of all global
tokens together, F of the embedding, R readings, H W map, S input side.
"""

from __future__ import annotations

import importlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.config import FAMILIES, ModelConfig, TrainConfig
from twinspect.models.layers import Resample, Shrink, pool, standardise, whole_divisor
from twinspect.models.teachers import BackboneInfo, Teacher, create_teacher
from twinspect.types import Features

if TYPE_CHECKING:
    from twinspect.models.scorer import Scorer

_RECOGNISED_AT = 256  # pixels at which a CNN recognises objects; small defects need more than that
GREY = 127.0  # of 255, in the place of pixels that are not looked at


class Observed(NamedTuple):
    """What is kept of the teacher's answer."""

    maps: tuple[Tensor, ...]  # the kept ones (see `Selection`), B x D x h x w each
    coarse: tuple[Tensor, ...]  # those of a view of half the side (CNN only), which sees what is large
    tokens: tuple[Tensor, ...]  # all global tokens joined, raw, of one or two views: B x E each
    embedding_BF: Tensor  # what the teacher's own classifier would see
    prefix_BMPD: Tensor  # class and register tokens, averaged as the maps are; B x 0 x 0 x 0 for a CNN


Batches = Callable[[], Iterable[tuple[Observed, Tensor]]]  # (teacher's answer, shrunk pixels) of some images


class Plain(NamedTuple):
    """What a family's students say without any further statistics."""

    map_Bhw: Tensor  # anomaly map, as coarse as it is
    local_BR: Tensor  # readings of what sees small defects
    semantic_BR: Tensor  # of what sees wrong scenes; B x 0 in a family without a semantic student


class Outputs(NamedTuple):
    """What the model says about a batch; higher is more anomalous."""

    # At a quarter of the input side: standard deviations of good images, or the students' own distances (plain).
    map_B1HW: Tensor
    score_B: Tensor  # joint score, the surprise in nats of the Noisy-OR
    score_local_B: Tensor  # what sees small defects alone, in standard deviations above the mean of good images
    score_semantic_B: Tensor  # the same of what sees wrong scenes
    cluster_B: Tensor  # index of the nearest cluster
    cluster_distance_B: Tensor  # of the whole image from it; large: it shows no kind of image that is known
    readings_BR: Tensor  # raw, what the scores are made of, local ones first; see `Scorer`
    nearest_B: Tensor  # place of the most similar good image (see `NearestImages`); 0 when scoring is plain


class Selection(nn.Module):
    """Which of the teacher's maps are kept, in which views, and their channel statistics on good images.

    CNN: every level, and a coarse view of half the side with the last levels of stride 16 and 32. ViT: its levels
    averaged in ``parts`` parts (Dinomaly: two).
    """

    def __init__(self, info: BackboneInfo, size: int, parts: int) -> None:
        super().__init__()
        count = len(info.channels)
        bounds = [i * count // parts for i in range(parts + 1)]
        # Members of every map, as indices of the teacher's levels; where there are too few, parts share the last.
        joined = [list(range(a, b)) or [min(a, count - 1)] for a, b in itertools.pairwise(bounds)]
        self.levels = joined if info.vit else [[i] for i in range(count)]
        self.map_sides = [-(-size // info.strides[members[0]]) for members in self.levels]
        self.channels = [info.channels[members[0]] for members in self.levels]
        tokens = info.prefix_tokens  # kept ones are M x P x D, of a CNN 0 x 0 x 0
        self.prefix_shape = (len(self.levels), tokens, self.channels[0]) if tokens else (0, 0, 0)
        # Factors by which the views are smaller that tokens are taken of; by which that of coarse maps is, 0 without.
        first = 1 if info.vit else whole_divisor(size, round(size / _RECOGNISED_AT), 1)
        second = first if first == 1 else whole_divisor(size, 2 * first, 1)  # a small input has no view to spare
        self.shrinks = (first,) if second == first else (first, second)
        self.coarse_shrink = next((s for s in self.shrinks if s > 1), 0)
        last = [max((i for i, s in enumerate(info.strides) if s == stride), default=count - 1) for stride in (16, 32)]
        self.coarse_levels = sorted(set(last)) if self.coarse_shrink else []
        self.coarse_channels = [info.channels[i] for i in self.coarse_levels]
        self.coarse_sides = [-(-(size // self.coarse_shrink) // info.strides[i]) for i in self.coarse_levels]
        for i, channels in enumerate(self.channels):
            self.register_buffer(f"mean_{i}", torch.zeros(channels))
            self.register_buffer(f"scale_{i}", torch.ones(channels))

    def select(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The maps that are kept of the teacher's."""
        joined = [self._mean(maps, members) for members in self.levels]
        return tuple(_at_side(mean, side) for mean, side in zip(joined, self.map_sides, strict=True))

    def select_coarse(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The maps that are kept of the coarse view's."""
        return tuple(_at_side(maps[i], side) for i, side in zip(self.coarse_levels, self.coarse_sides, strict=True))

    def select_prefix(self, features: Features) -> Tensor:
        """Class and register tokens of the kept maps: B x M x P x D."""
        if 0 in self.prefix_shape:
            return features.maps[0].new_zeros(features.maps[0].shape[0], *self.prefix_shape)  # `len` fixes an export
        return torch.stack([self._mean(features.prefix, members) for members in self.levels], 1)

    @staticmethod
    def _mean(levels: tuple[Tensor, ...], members: list[int]) -> Tensor:
        return torch.stack([levels[i] for i in members]).mean(0) if len(members) > 1 else levels[members[0]]

    def standardise(self, map_BDhw: Tensor, i: int) -> Tensor:
        """The i-th kept map with channels of mean 0 and standard deviation 1 on good images."""
        return standardise(map_BDhw, self.get_buffer(f"mean_{i}"), self.get_buffer(f"scale_{i}"))

    def fit(self, i: int, mean_D: Tensor, scale_D: Tensor) -> None:
        """Take the channel statistics of the i-th kept map."""
        self.get_buffer(f"mean_{i}").copy_(mean_D)
        self.get_buffer(f"scale_{i}").copy_(scale_D.clamp_min(1e-4))


class TokenScale(nn.Module):
    """Standardises joined global tokens by their statistics on good images: B x E."""

    mean_E: Tensor
    scale_E: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("mean_E", torch.zeros(dims))
        self.register_buffer("scale_E", torch.ones(dims))

    def forward(self, token_BE: Tensor) -> Tensor:
        """Joined raw tokens to standardised ones, B x E."""
        return (token_BE - self.mean_E) / self.scale_E

    def fit(self, token_nE: Tensor) -> None:
        """Take mean and standard deviation of raw joined tokens of good images."""
        self.mean_E, self.scale_E = token_nE.mean(0), token_nE.std(0).clamp_min(1e-3)


def _at_side(map_BDhw: Tensor, side: int) -> Tensor:
    here = map_BDhw.shape[-1]
    return map_BDhw if here == side else cast(Tensor, Resample(here, side).to(map_BDhw.device)(map_BDhw))


class AnomalyModel(nn.Module):
    """Teacher, students and scorer: raw RGB pixels to `Outputs` in one forward path.

    A family sets the first three attributes and fills in the abstract methods.
    """

    student: nn.Module  # everything that is trained; its children are named by part (``local``, ``semantic``)
    scorer: Scorer  # maps and scores
    pixel_side: int  # side of the pixels the student itself looks at; 0 if it sees the teacher's maps only
    roi_SS: Tensor | None  # region of interest: true where pixels are looked at; None: everywhere

    def __init__(self, teacher: Teacher, size: int, parts: int) -> None:
        super().__init__()
        self.teacher, self.size = teacher, size
        self.selection = Selection(teacher.info, size, parts)
        shrinks = self.selection.shrinks
        self.views = nn.ModuleList(
            Shrink(after // before) for before, after in zip((1, *shrinks), shrinks, strict=False)
        )
        self.standardised = TokenScale(sum(teacher.info.token_channels))  # of the first view's global tokens
        self.register_buffer("roi_SS", None)

    @property
    def device(self) -> torch.device:
        """Where teacher, students and statistics lie."""
        return self.teacher.mean_3.device

    def forward(self, image_BCHW: Tensor) -> Outputs:
        """Score uint8 RGB (or float 0..255) B x 3 x H x W; other sizes are resized to the model's."""
        x = self.teacher.normalise(self.inside(fit_size(image_BCHW, self.size)))
        return self.score(self.observe(x), self.shrink(x))

    def observe(self, x_B3SS: Tensor) -> Observed:
        """The teacher's answer to normalised pixels, reduced to what students and scorer need."""
        whole, selection = self.teacher.features(x_B3SS), self.selection
        views: dict[int, Features] = {1: whole}
        for shrink, smaller in zip(selection.shrinks, self.views, strict=True):
            x_B3SS = smaller(x_B3SS)
            if shrink not in views:
                views[shrink] = self.teacher.features(x_B3SS)
        tokens = tuple(torch.cat(views[shrink].tokens, 1).float() for shrink in selection.shrinks)
        coarse = selection.select_coarse(views[selection.coarse_shrink].maps) if selection.coarse_levels else ()
        embedding_BF = self.teacher.embedding(views[selection.shrinks[0]]).float()
        return Observed(selection.select(whole.maps), coarse, tokens, embedding_BF, selection.select_prefix(whole))

    def score(self, observed: Observed, small_B3SS: Tensor) -> Outputs:
        """Outputs from the teacher's answer and the shrunk pixels."""
        plain = self.plain(observed, small_B3SS) if self.scorer.asks_students else None
        outputs = cast(Outputs, self.scorer(plain, observed))
        return outputs._replace(map_B1HW=self.inside_map(outputs.map_B1HW))

    def inside(self, image_BCSS: Tensor) -> Tensor:
        """Pixels of the model's size with grey outside of the region of interest: nothing there can count."""
        return image_BCSS if self.roi_SS is None else image_BCSS.float().masked_fill(~self.roi_SS, GREY)

    def inside_map(self, map_B1HW: Tensor) -> Tensor:
        """A map that is 0 outside of the region of interest."""
        if self.roi_SS is None:
            return map_B1HW
        share_11HW = F.adaptive_avg_pool2d(self.roi_SS[None, None].float(), map_B1HW.shape[-1])
        return map_B1HW * (share_11HW > 0)

    def shrink(self, x_B3SS: Tensor) -> Tensor:
        """The pixels the student looks at: averaged to ``pixel_side``, or none at all (B x 3 x 0 x 0)."""
        if not self.pixel_side:
            return x_B3SS[:, :, :0, :0]
        factor = self.size // self.pixel_side
        return pool(x_B3SS, factor) if factor > 1 else x_B3SS

    @abstractmethod
    def targets(self, observed: Observed) -> list[Tensor]:
        """The teacher's answers that the student learns: those of patches B x N x D, then global ones B x D."""

    @abstractmethod
    def predictions(self, observed: Observed, small_B3SS: Tensor) -> list[Tensor]:
        """What the student says in their place."""

    @abstractmethod
    def plain(self, observed: Observed, small_B3SS: Tensor) -> Plain:
        """The student's distances from the teacher, read as the family's paper reads them."""

    @abstractmethod
    def losses(self, observed: Observed, small_B3SS: Tensor, step: int, config: TrainConfig) -> dict[str, Tensor]:
        """Training terms of a batch: ``loss`` and its parts, scalars. ``observed`` comes from the teacher."""

    @abstractmethod
    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """The optimiser's groups, each with ``params`` and ``lr``."""

    def initialise(self, batches: Batches, seed: int) -> None:
        """Start the student from some training images, once its inputs are scaled and before it is trained."""

    def fit_plain(self, batches: Batches) -> None:
        """Learn what `plain` itself takes from the good images held out, once the student is trained."""


def fit_size(image_BCHW: Tensor, size: int) -> Tensor:
    """Whole image to size x size, antialiased bilinear, no crop; untouched when it fits already."""
    if image_BCHW.shape[-2:] == (size, size):
        return image_BCHW
    return F.interpolate(image_BCHW.float(), size=(size, size), mode="bilinear", antialias=True)


def build_model(config: ModelConfig, teacher: Teacher | None = None) -> AnomalyModel:
    """The untrained model of a configuration; weights of the students follow torch's global seed.

    Its input side is the one that was asked for, or that suits family and teacher: the nearest multiple of the
    teacher's patch or coarsest stride, and at least four of them.
    """
    family = FAMILIES[config.model]
    teacher = teacher or create_teacher(config.teacher, config.weights, config.pretrained)
    info = teacher.info
    default = info.default_size if info.vit else family.cnn_size or info.default_size
    size = max(4, round((config.size or default) / info.multiple)) * info.multiple
    model: AnomalyModel = importlib.import_module(family.module).build(teacher, config, size)
    model.teacher.net.to(memory_format=torch.channels_last)
    return model
