"""A teacher's features of all images of a set at one input size, in memory: maps (half precision), pooled vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from twinspect.errors import ConfigError
from twinspect.models.teachers import Teacher
from twinspect.training.derived import read_square
from twinspect.types import Progress, Sample

STAGES = (2, 3, 5, 7)  # of an EfficientNet: strides 4, 8, 16 and 32
FINEST = 8  # stride in pixels of the finest patch grid; finer stages are pooled to it
_BATCH = 4  # larger batches leave the CPU's cache and are slower per image


def place(sample: Sample) -> tuple[str, int | None]:
    """What tells two images apart, whatever their labels."""
    return str(sample.image), sample.record


class Bank:
    """Features of every image.

    Args:
        teacher: an EfficientNet.
        samples: images; each is read once, however often it is named.
        size: input side in pixels.
        grid: largest side of a patch grid; finer maps are pooled to it.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: a teacher without the stages that the baselines are made of.
        ImageError: an image that cannot be read.
    """

    def __init__(self, teacher: Teacher, samples: Sequence[Sample], size: int, grid: int, progress: Progress) -> None:
        if teacher.info.vit or not set(STAGES) <= set(teacher.levels):
            raise ConfigError(
                f"{teacher.name}: the baselines need an EfficientNet: efficientnet-lite0, -lite1 or -lite2"
            )
        unique = list({place(s): s for s in samples}.values())
        self.rows = {place(s): row for row, s in enumerate(unique)}
        self.maps: dict[int, Tensor] = {}
        self.pooled: dict[str, Tensor] = {}
        self._grid, self._teacher = min(grid, size // FINEST), teacher
        teacher.net.to(memory_format=torch.channels_last)
        for start, pixels in _decoded(unique, size):
            self._store(start, len(unique), pixels)
            progress(f"teacher at {size} pixels", min(start + _BATCH, len(unique)), len(unique))

    def at(self, samples: Sequence[Sample]) -> list[int]:
        """Rows of some of the images."""
        return [self.rows[place(s)] for s in samples]

    def patches(self, stages: Sequence[int], at: Sequence[int], batch: int = 16) -> Callable[[], Iterator[Tensor]]:
        """Patches of some stages joined on the grid of the finest one: calls give B x P x D, batch by batch."""

        def every() -> Iterator[Tensor]:
            for start in range(0, len(at), batch):
                rows = torch.tensor(list(at[start : start + batch]))
                parts = [self.maps[stage][rows].float() for stage in stages]
                side = parts[0].shape[-1]
                joined = [parts[0], *(_resized(part, side) for part in parts[1:])]
                yield torch.cat(joined, 1).flatten(2).transpose(1, 2).contiguous()

        return every

    def side(self, stages: Sequence[int]) -> int:
        """Positions along one side of the grid of some stages."""
        return int(self.maps[stages[0]].shape[-1])

    @torch.inference_mode()
    def _store(self, start: int, total: int, pixels_BHWC: np.ndarray) -> None:
        image = torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2)
        x = self._teacher.normalise(image).contiguous(memory_format=torch.channels_last)
        found = self._teacher.features(x)
        by_level = dict(zip(self._teacher.levels, found.maps, strict=True))
        for stage in STAGES:
            near = functional.avg_pool2d(by_level[stage], 3, 1, 1, count_include_pad=False)
            part = functional.adaptive_avg_pool2d(near, min(near.shape[-1], self._grid))
            _put(self.maps, stage, start, total, part.half())
        for level, token in zip(self._teacher.token_levels, found.tokens, strict=True):
            _put(self.pooled, f"stage {level}", start, total, token)
        _put(self.pooled, "head", start, total, self._teacher.embedding(found))


def _put(store: dict, name: int | str, start: int, total: int, part: Tensor) -> None:
    """Write rows into a tensor for all images, made at the first call (a list of parts would need it twice)."""
    if name not in store:
        store[name] = torch.empty(total, *part.shape[1:], dtype=part.dtype)
    store[name][start : start + len(part)] = part


def _resized(map_BDhw: Tensor, side: int) -> Tensor:
    if map_BDhw.shape[-1] == side:
        return map_BDhw
    return functional.interpolate(map_BDhw, size=(side, side), mode="bilinear", align_corners=False)


def _decoded(samples: Sequence[Sample], size: int) -> Iterator[tuple[int, np.ndarray]]:
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(samples), _BATCH):
            yield start, np.stack(list(pool.map(lambda s: read_square(s, size), samples[start : start + _BATCH])))
