"""Records that travel between the rooms of the library. No torch import, no behaviour beyond checks.

Shape letters used across the library: B images, C channels, H W pixels, h w grid positions,
N tokens (h * w), D width, L levels (layers or stages of the teacher), K clusters or centres.

Conventions that hold everywhere: label 1 means anomaly, 0 means normal, None means unknown;
a higher score means more anomalous; a map has the geometry of the original image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

TRAIN = "train"
CALIBRATION = "calibration"
TEST = "test"
SPLITS = (TRAIN, CALIBRATION, TEST)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set and what is known about it.

    Attributes:
        image: file that holds the image, or the container file when ``record`` is set.
        split: ``train``, ``calibration`` or ``test``, as the data set itself says.
        class_name: product or object class; one model learns many.
        label: 0 normal, 1 anomaly, None unknown.
        defect_type: name of the defect kind; empty for normal images.
        masks: ground-truth files; several for one image all count (union), pixels > 0 are defect.
        group: session or physical object, for honest calibration and sample-level scores.
        record: position inside a container file (CIFAR batch, IDX, Parquet), else None.
        pixels: H x W x 3 RGB of an image in memory; ``image`` is then a name, which no other image has.
    """

    image: Path
    split: str
    class_name: str
    label: int | None = 0
    defect_type: str = ""
    masks: tuple[Path, ...] = ()
    group: str = ""
    record: int | None = None
    pixels: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split of {self.image} is {self.split!r}; accepted: {', '.join(SPLITS)}")
        if self.label not in (0, 1, None):
            raise ValueError(f"label of {self.image} is {self.label!r}; accepted: 0 (normal), 1 (anomaly), None")
        for name in ("class_name", "defect_type", "group"):  # of folders, whose names may be no text
            object.__setattr__(self, name, as_text(getattr(self, name)))

    @property
    def name(self) -> str:
        """Its path; ``path#record`` inside a container file."""
        return str(self.image) if self.record is None else f"{self.image}#{self.record}"

    @property
    def is_good(self) -> bool:
        """Whether a model may learn it: it is not of the test, and nobody calls it a defect."""
        return self.split != TEST and self.label != 1

    @property
    def in_file(self) -> bool:
        """Whether the image is a file of its own."""
        return self.record is None and self.pixels is None


Progress = Callable[[str, int, int], None]  # told (stage, how many are done, of how many; 0 where it is not known)


def as_text(value: str) -> str:
    """A name as every format can hold it: bytes of a file's name that are no text are written as numbers."""
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")


def silent(_stage: str, _done: int, _total: int) -> None:
    """Progress for callers that want none."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that could not be used, and why."""

    path: Path
    reason: str


class Features(NamedTuple):
    """What a teacher or an encoder student says about a batch."""

    maps: tuple[Tensor, ...]  # B x D_l x h_l x w_l of each level, fine to coarse for a CNN
    tokens: tuple[Tensor, ...]  # a global token of each level, B x D_l: ViT class token, pooled stage of a CNN
    prefix: tuple[Tensor, ...] = ()  # class and register tokens of a ViT with each map, B x P x D_l
