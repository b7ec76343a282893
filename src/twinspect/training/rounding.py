"""Classes whose good images hardly differ, such as a black picture: what 8 bits round away is no difference.

Statistics of such images would call one grey level of brightness a huge anomaly. So copies with a level of brightness
and noise more or less join them; every statistic then knows that so much means nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from twinspect.data.samples import read_sample_rgb
from twinspect.errors import DataError
from twinspect.types import Sample

_LEVEL = 1.0  # grey levels that two images differ by (root mean square), or they are hardly different
_LOOKED_AT = 8  # images of a class that are compared
_SIDE = 512  # pixels a side that are compared of a large image
_COPIES = 24  # at least; half as many as images where those are more


@dataclass(frozen=True, slots=True)
class Rounded(Sample):
    """A copy of an image, not of its file: `around` changes its pixels.

    Attributes:
        seed: of the change.
    """

    seed: int = 0

    def around(self, pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The pixels up to one level brighter or darker, and a share of them one level off."""
        rng = np.random.default_rng(self.seed)
        shift, share = rng.uniform(-1.0, 1.0), 10.0 ** rng.uniform(-3.0, -0.3)
        steps = np.sign(shift) * (rng.random(pixels_HWC.shape) < abs(shift))
        steps += rng.choice([-1, 1], pixels_HWC.shape) * (rng.random(pixels_HWC.shape) < share)
        return np.asarray((pixels_HWC + steps).clip(0, 255), dtype=np.uint8)


def add_rounded(training: Sequence[Sample], held: Sequence[Sample]) -> tuple[list[Sample], list[Sample], list[str]]:
    """Both parts with copies of images of classes that hardly vary, and a sentence about each such class."""
    by_class: dict[str, list[Sample]] = defaultdict(list)
    for sample in (*training, *held):
        by_class[sample.class_name].append(sample)
    parts: tuple[list[Sample], list[Sample]] = (list(training), list(held))
    notes = []
    for name, own in by_class.items():
        if not hardly_differ(own):
            continue
        count = max(_COPIES, len(own) // 2)
        for seed in range(count):
            first = own[seed % len(own)]
            values = {field.name: getattr(first, field.name) for field in fields(Sample)}
            parts[seed % 4 == 3].append(Rounded(**values, seed=seed))
        what = (
            "good images differ by less than one grey level"
            if len(own) > 1
            else "one good image has no other beside it"
        )
        notes.append(
            f"class {name}: its {what}; {count} copies with one level of noise are learnt too, and whatever "
            "differs by more is called an anomaly. If good parts may differ by more, give images of different ones"
        )
    return *parts, notes


def hardly_differ(samples: Sequence[Sample]) -> bool:
    """Whether images differ by less than one grey level, brightness aside; also true of one image alone."""
    last: NDArray[np.float32] | None = None
    for sample in samples[:: max(1, len(samples) // _LOOKED_AT)]:
        try:
            rgb = read_sample_rgb(sample)
        except (DataError, OSError):
            continue  # whoever reads all images says what is wrong with it
        step = max(1, min(rgb.shape[:2]) // _SIDE)
        pixels = rgb[::step, ::step].astype(np.float32)
        if last is not None and (last.shape != pixels.shape or float((last - pixels).std()) >= _LEVEL):
            return False
        last = pixels
    return last is not None
