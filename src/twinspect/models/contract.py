"""What every family of models is: teacher in, `Outputs` out, one path from pixels to scores.

A family (a row of `twinspect.config.FAMILIES`) fills in a student, its training terms and its plain readings.
Training, caching, statistics, bundles, prediction and exports know this contract only.

Shapes: B images, D channels, h w grid, N positions, E width of all global tokens together, S input side.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.config import FAMILIES, ModelConfig, TrainConfig
from twinspect.models.layers import Shrink, pool
from twinspect.models.observed import Observed, Outputs, Plain, Selection, TokenScale
from twinspect.models.scorer import Scorer
from twinspect.models.teachers import Teacher
from twinspect.types import Features

Batches = Callable[[], Iterable[tuple[Observed, Tensor]]]  # (teacher's answer, shrunk pixels) of some images
GREY = 127.0  # of 255, in the place of pixels that are not looked at


class AnomalyModel(nn.Module):
    """Teacher, students and scorer: raw RGB pixels to `Outputs` in one forward path.

    A family sets the last three attributes and fills in the abstract methods.

    Attributes:
        selection: the teacher's maps that are kept; a ViT's levels are averaged in ``parts``.
        standardised: standardises the teacher's global tokens (of the first view).
        roi_SS: region of interest: true where pixels are looked at; None: everywhere.
        student: everything that is trained; its children are named by part (``local``, ``semantic``).
        scorer: maps and scores.
        pixel_side: side of the pixels the student itself looks at; 0 if it sees the teacher's maps only.
    """

    student: nn.Module
    scorer: Scorer
    pixel_side: int
    roi_SS: Tensor | None

    def __init__(self, teacher: Teacher, size: int, parts: int) -> None:
        super().__init__()
        self.teacher, self.size = teacher, size
        self.selection = Selection(teacher.info, size, parts)
        shrinks = self.selection.shrinks
        self.views = nn.ModuleList(
            Shrink(after // before) for before, after in zip((1, *shrinks), shrinks, strict=False)
        )
        self.standardised = TokenScale(sum(teacher.info.token_channels))
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
        outputs: Outputs = self.scorer(plain, observed)
        return outputs._replace(map_B1HW=self.inside_map(outputs.map_B1HW))

    def inside(self, image_BCSS: Tensor) -> Tensor:
        """Pixels of the model's size with grey outside of the region of interest: nothing there can count."""
        return image_BCSS if self.roi_SS is None else image_BCSS.float().masked_fill(~self.roi_SS, GREY)

    def inside_map(self, map_B1HW: Tensor) -> Tensor:
        """A map that is 0 outside of the region of interest."""
        if self.roi_SS is None:
            return map_B1HW
        return map_B1HW * F.adaptive_max_pool2d(self.roi_SS[None, None].float(), self.scorer.map_side)

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


def build_family(teacher: Teacher, config: ModelConfig) -> AnomalyModel:
    """The untrained model of a configuration, at the input side that was asked for or that suits both."""
    family = FAMILIES[config.model]
    default = teacher.info.default_size if teacher.is_vit else family.cnn_size or teacher.info.default_size
    size = legal_size(config.size or default, teacher.info.multiple)
    model: AnomalyModel = importlib.import_module(family.module).build(teacher, config, size)
    return model


def legal_size(size: int, multiple: int) -> int:
    """The nearest side that is a multiple of the patch or the coarsest stride, never below four of them."""
    return max(4, round(size / multiple)) * multiple
