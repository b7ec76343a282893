"""Copies of good images as a camera might have taken them: packed as JPEG, under another light, shifted (--tolerate).

They are learnt and calibrated on beside the images themselves. Cross-fitting holds an image and its copies to be one:
what scores one of them has seen none (`training.normal`).
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.config import tolerated
from twinspect.types import Sample

# How far copies go, a little beyond what is promised: quality 60, 10 % of the brightness, 2 % of the width.
_QUALITY, _LIGHT, _SHIFT = (50, 90), 0.12, 0.025
_MOST = 50  # images of a class that are copied for each kind


@dataclass(frozen=True, slots=True)
class Disturbed(Sample):
    """A copy of an image, not of its file.

    Attributes:
        kind: ``jpeg``, ``light`` or ``shift``.
        seed: of how far.
    """

    kind: str = ""
    seed: int = 0

    def disturbed(self, pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The whole image's pixels as they would be then."""
        rng = np.random.default_rng(self.seed)
        if self.kind == "jpeg":
            return packed(pixels_HWC, int(rng.integers(*_QUALITY, endpoint=True)))
        if self.kind == "light":
            return lit(pixels_HWC, float(rng.uniform(1 - _LIGHT, 1 + _LIGHT)))
        return shifted(pixels_HWC, *rng.uniform(-_SHIFT, _SHIFT, 2))


def packed(pixels_HWC: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """As a JPEG file of that quality gives them back."""
    body = io.BytesIO()
    Image.fromarray(pixels_HWC).save(body, "JPEG", quality=quality)
    return np.asarray(Image.open(body).convert("RGB"))


def lit(pixels_HWC: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """So many times as bright; white stays white."""
    return np.asarray((pixels_HWC * factor).round().clip(0, 255), dtype=np.uint8)


def shifted(pixels_HWC: NDArray[np.uint8], down: float, right: float) -> NDArray[np.uint8]:
    """Shifted by shares of the width; the rim is repeated outwards."""
    height, width = pixels_HWC.shape[:2]
    rows, columns = (np.arange(side) - round(by * width) for side, by in ((height, down), (width, right)))
    moved: NDArray[np.uint8] = pixels_HWC[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
    return moved


def add_disturbed(
    training: Sequence[Sample], held: Sequence[Sample], tolerate: str, seed: int
) -> tuple[list[Sample], list[Sample], list[str]]:
    """Both parts with copies of their own images, and a sentence about them.

    Args:
        training: good images.
        held: good images held out.
        tolerate: kinds, separated by commas; empty adds nothing.
        seed: of how far each copy goes.
    """
    kinds = tolerated(tolerate)
    if not kinds:
        return list(training), list(held), []
    by_class: dict[str, list[tuple[int, Sample]]] = defaultdict(list)
    for part, samples in enumerate((training, held)):
        for sample in samples:
            by_class[sample.class_name].append((part, sample))
    parts: tuple[list[Sample], list[Sample]] = (list(training), list(held))
    count = 0
    for own in by_class.values():
        for number, kind in enumerate(kinds):
            for part, sample in own[:: -(-len(own) // _MOST)]:
                values = {field.name: getattr(sample, field.name) for field in fields(Sample)}
                parts[part].append(Disturbed(**values, kind=kind, seed=seed + len(kinds) * count + number))
                count += 1
    images = len(training) + len(held)
    return *parts, [
        f"--tolerate {','.join(kinds)}: {count} altered copies of {images} images are learnt and counted too"
    ]
