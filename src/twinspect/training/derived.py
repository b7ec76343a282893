"""Samples made of good images: altered copies, and tiles of large pictures.

Two kinds of class need copies. If the images of a class hardly differ, such as black pictures, statistics would call
one grey level of brightness a huge anomaly. Copies with a level of noise tell them what 8 bits round away.
A class of a few images shows no spread. Copies that are moved and lit as a camera would do it give one; they are also
turned where the product may lie in any pose. Such copies are learnt; no threshold counts them (`fit.fit_few`).

Others are asked for (--tolerate): packed as JPEG, under another light, shifted. They are learnt and calibrated on
like the images themselves. Cross-fitting holds an image and such copies to be one (`training.normal`).
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.config import CHANGES, tolerated
from twinspect.data.images import resize_rgb
from twinspect.data.samples import read_sample_rgb
from twinspect.errors import DataError
from twinspect.inference.decode import Tiles, boxes
from twinspect.inference.result import counted
from twinspect.types import Sample

T = TypeVar("T", bound=Sample)

FEW = 8  # good images of a class up to which each is left out in turn and copies are learnt
NOISE, FIXED, FREE = "noise", "fixed", "free"
_LEVEL = 1.0  # grey levels that two images differ by (root mean square), or they are hardly different
_LOOKED_AT = 8  # images of a class that are compared
_SIDE = 512  # pixels a side that are compared of a large image
_COPIES = 24  # at least, of a class that hardly varies; half as many as images where those are more
_LEARNT = {FIXED: 16, FREE: 24}  # images and copies of a class of a few images
_SHIFT, _LIGHT = 0.015, 0.04  # of the side, and of the brightness, that a camera may be off by
_POSE_SIDE, _TURNS = 48, 24  # pixels and angles that poses are compared with
# Mean correlation of pairs that are turned to agree, and what turning must gain of it, or the pose is fixed.
_POSE_ALIKE, _POSE_GAIN = 0.65, 0.12
# How far copies that are asked for go, a little beyond what is promised: quality 60, 10 % brighter, 2 % of the width.
_QUALITY, _TOLERATED_LIGHT, _TOLERATED_SHIFT = (50, 90), 0.12, 0.025
_MOST_TOLERATED = 50  # images of a class that are copied for each kind


@dataclass(frozen=True, slots=True)
class Copy(Sample):
    """A copy of an image, not of its file."""

    # noise, fixed (noise, and moved and lit a little), free (turned round as well), or one of `config.CHANGES`
    kind: str = NOISE
    seed: int = 0  # of the change

    @property
    def tolerated(self) -> bool:
        """Whether it was asked for: then the whole picture is changed, else its pixels at the model's size."""
        return self.kind in CHANGES

    def changed(self, pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image's pixels as the copy has them."""
        rng = np.random.default_rng(self.seed)
        match self.kind:
            case "jpeg":
                return packed(pixels_HWC, int(rng.integers(*_QUALITY, endpoint=True)))
            case "light":
                return lit(pixels_HWC, float(rng.uniform(1 - _TOLERATED_LIGHT, 1 + _TOLERATED_LIGHT)))
            case "shift":
                return shifted(pixels_HWC, *rng.uniform(-_TOLERATED_SHIFT, _TOLERATED_SHIFT, 2))
        # Up to one level brighter or darker, and a share of the pixels one level off.
        shift, share = rng.uniform(-1.0, 1.0), 10.0 ** rng.uniform(-3.0, -0.3)
        pixels = pixels_HWC if self.kind == NOISE else moved(pixels_HWC, self.kind, rng)
        steps = np.sign(shift) * (rng.random(pixels.shape) < abs(shift))
        steps += rng.choice([-1, 1], pixels.shape) * (rng.random(pixels.shape) < share)
        return np.asarray((pixels + steps).clip(0, 255), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Tile(Sample):
    """A part of a picture; its class is the picture's with the tile's place."""

    of: Sample | None = None  # the picture
    place: int = 0  # number of the tile, row by row
    tiles: Tiles = (1, 1)  # rows and columns


def _made_of(sample: Sample, record: type[T], /, **more: Any) -> T:
    return record(**{field.name: getattr(sample, field.name) for field in fields(Sample)} | more)


def in_tiles(samples: Sequence[Sample], tiles: Tiles) -> list[Sample]:
    """All tiles of all pictures; the pictures themselves where each is one tile."""
    if tiles == (1, 1):
        return list(samples)
    return [
        _made_of(
            sample, Tile, class_name=f"{sample.class_name} @{row},{column}", of=sample,
            place=row * tiles[1] + column, tiles=tiles,
        )
        for sample in samples
        for row in range(tiles[0])
        for column in range(tiles[1])
    ]  # fmt: skip


def picture_of(sample: Sample) -> Sample:
    """The picture that a tile is of; any other sample itself."""
    return sample.of if isinstance(sample, Tile) and sample.of is not None else sample


def read_picture(sample: Sample, side: int) -> NDArray[np.uint8]:
    """A whole picture, altered where it is such a copy; a draft of ``side`` pixels at least may do."""
    if isinstance(sample, Copy) and sample.tolerated:
        return sample.changed(read_sample_rgb(sample))
    return read_sample_rgb(sample, draft_side=side)


def read_square(
    sample: Sample, size: int, read: Callable[[Sample, int], NDArray[np.uint8]] = read_picture
) -> NDArray[np.uint8]:
    """One sample's RGB at the model's size: size x size x 3; ``read`` gives the whole pictures that tiles are of."""
    picture = picture_of(sample)
    if isinstance(sample, Tile):
        whole = read(picture, size * max(sample.tiles))
        rows, columns = boxes(whole, sample.tiles)[sample.place]
        pixels = resize_rgb(whole[rows, columns], size)
    else:
        pixels = resize_rgb(read_picture(sample, size), size)
    return picture.changed(pixels) if isinstance(picture, Copy) and not picture.tolerated else pixels


def same_image(samples: Sequence[Sample]) -> list[int]:
    """For every image the place of the first one that it is a tile or a copy of, or its own.

    Copies of images that hardly vary stand for images of their own.
    """
    first: dict[tuple[object, ...], int] = {}
    firsts = []
    for place, sample in enumerate(samples):
        picture = picture_of(sample)
        apart = (picture,) if isinstance(picture, Copy) and not picture.tolerated else ()
        firsts.append(first.setdefault((sample.image, sample.record, *apart), place))
    return firsts


# ------------------------------------------------------------------------------------------- which copies are made


def by_class(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """The samples of every class."""
    members: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        members[sample.class_name].append(sample)
    return members


def few_classes(samples: Sequence[Sample]) -> frozenset[str]:
    """Classes of at most `FEW` good images."""
    return frozenset(name for name, members in by_class(samples).items() if len(members) <= FEW)


def add_copies(
    training: Sequence[Sample], held: Sequence[Sample], pose: str = "auto", few: frozenset[str] = frozenset()
) -> tuple[list[Sample], list[Sample], list[str]]:
    """Both parts with copies where they are needed, and a sentence about each class that has some.

    Classes of a few images (``few``), all of them in ``training``, get copies as their ``pose`` asks for: ``fixed``,
    ``free`` or ``auto``.
    """
    parts = list(training), list(held)
    notes = []
    for name, members in by_class((*training, *held)).items():
        if name in few:
            chosen, why = (pose, "as asked") if pose != "auto" else find_pose(members)
            each = max(1, -(-_LEARNT[chosen] // len(members)) - 1)
            parts[0].extend(_made_of(s, Copy, kind=chosen, seed=seed) for s in members for seed in range(each))
            worth = (
                f"about 1 in {len(members) + 1} of the next good ones will be called bad, at best"
                if len(members) > 1
                else "its threshold is the highest score of its own copies, which promises nothing"
            )
            notes.append(
                f"class {name}: {counted(len(members), 'good image')}; no students are trained on so few, and copies "
                f"are learnt with them, {'turned' if chosen == FREE else 'moved'} (--pose {chosen}, {why}); {worth}"
            )
        elif hardly_differ(members):
            count = max(_COPIES, len(members) // 2)
            for seed in range(count):
                copy = _made_of(members[seed % len(members)], Copy, kind=NOISE, seed=seed)
                parts[seed % 4 == 3].append(copy)
            notes.append(
                f"class {name}: its good images differ by less than one grey level; {count} copies with one level of "
                "noise are learnt too, and whatever differs by more is called an anomaly"
            )
    return *parts, notes


def add_tolerated(
    training: Sequence[Sample], held: Sequence[Sample], tolerate: str, seed: int
) -> tuple[list[Sample], list[Sample], list[str]]:
    """Both parts with altered copies of their own images (`config.tolerated` kinds), and a sentence about them."""
    kinds, count, images = tolerated(tolerate), 0, len(training) + len(held)
    parts, held_out = (list(training), list(held)), set(held)
    for members in by_class((*training, *held)).values():
        for number, kind in enumerate(kinds):
            for sample in members[:: -(-len(members) // _MOST_TOLERATED)]:
                copy = _made_of(sample, Copy, kind=kind, seed=seed + len(kinds) * count + number)
                parts[sample in held_out].append(copy)
                count += 1
    sentence = f"--tolerate {','.join(kinds)}: {count} altered copies of {images} images are learnt and counted too"
    return *parts, [sentence] if kinds else []


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


def moved(pixels_HWC: NDArray[np.uint8], pose: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture shifted and lit a little, of a free pose also turned by any angle; its rim is mirrored outwards."""
    height, width = pixels_HWC.shape[:2]
    angle = float(rng.uniform(0.0, 360.0)) if pose == FREE else 0.0
    down, right = rng.uniform(-_SHIFT, _SHIFT, 2) * (height, width)
    rim = max(height, width) // 2
    wide = Image.fromarray(np.pad(pixels_HWC, ((rim, rim), (rim, rim), (0, 0)), mode="symmetric"))
    turned = wide.rotate(angle, Image.Resampling.BILINEAR, translate=(round(right), round(down)))
    pixels = np.asarray(turned, dtype=np.float32)[rim : rim + height, rim : rim + width]
    return np.asarray((pixels * rng.uniform(1 - _LIGHT, 1 + _LIGHT)).round().clip(0, 255), dtype=np.uint8)


def find_pose(samples: Sequence[Sample]) -> tuple[str, str]:
    """Whether the product lies in any pose, and why this is thought.

    Pairs of images are correlated as they lie, and turned to the angle at which they agree best. Where they agree
    well then and worse as they lie, the product does not always lie the same way. What agrees at no angle is fixed.
    """
    box, grey = (_POSE_SIDE, _POSE_SIDE), Image.Resampling.BOX
    read = _readable(samples[:_LOOKED_AT], draft_side=_POSE_SIDE)
    small = [Image.fromarray(rgb).convert("L").resize(box, grey) for rgb in read]
    if len(small) < 2:
        return FIXED, "as one image cannot show whether the product lies in any pose; --pose free if it does"
    lying, best = [], []
    for i, first in enumerate(small):
        mean = round(float(np.asarray(first).mean()))
        angles = [360.0 * turn / _TURNS for turn in range(_TURNS)]
        turns = [_inside(first.rotate(angle, Image.Resampling.BILINEAR, fillcolor=mean)) for angle in angles]
        for second in small[i + 1 :]:
            alike = [float(turn @ _inside(second)) for turn in turns]
            lying.append(alike[0])
            best.append(max(alike))
    as_is, turned = float(np.mean(lying)), float(np.mean(best))
    free = turned > _POSE_ALIKE and turned - as_is > _POSE_GAIN
    return FREE if free else FIXED, f"the images correlate by {as_is:.2f} as they lie, by {turned:.2f} turned"


def _inside(image: Image.Image) -> NDArray[np.float64]:
    """Pixels within the largest circle, of mean 0 and length 1."""
    away = np.arange(_POSE_SIDE) - (_POSE_SIDE - 1) / 2
    values = np.asarray(image, dtype=np.float64)[np.hypot(*np.meshgrid(away, away)) < _POSE_SIDE / 2]
    values = values - values.mean()
    return np.asarray(values / max(float(np.linalg.norm(values)), 1e-9))


def hardly_differ(samples: Sequence[Sample]) -> bool:
    """Whether images differ by less than one grey level, brightness aside; also true of one image alone."""
    last: NDArray[np.float32] | None = None
    for rgb in _readable(samples[:: max(1, len(samples) // _LOOKED_AT)]):
        step = max(1, min(rgb.shape[:2]) // _SIDE)
        pixels = rgb[::step, ::step].astype(np.float32)
        if last is not None and (last.shape != pixels.shape or float((last - pixels).std()) >= _LEVEL):
            return False
        last = pixels
    return last is not None


def _readable(samples: Sequence[Sample], draft_side: int = 0) -> Iterator[NDArray[np.uint8]]:
    """Pixels of the images that can be read; whoever reads all of them says what is wrong with the others."""
    for sample in samples:
        with suppress(DataError, OSError):
            yield read_sample_rgb(sample, draft_side=draft_side)
