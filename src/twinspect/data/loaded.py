"""What was found: the samples of a data set, and the words to say so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from twinspect.types import CALIBRATION, TEST, TRAIN, Sample


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """How many images of one class there are, by role.

    Attributes:
        train: training images.
        calibration: images of the data set's own calibration or validation split.
        test_good: test images known to be normal.
        test_defect: test images known to be anomalous.
        test_unknown: test images without a label (private test sets, classes of a semantic set).
        masks: mask files of all images.
    """

    train: int = 0
    calibration: int = 0
    test_good: int = 0
    test_defect: int = 0
    test_unknown: int = 0
    masks: int = 0

    def __add__(self, other: ClassCounts) -> ClassCounts:
        return ClassCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def count_classes(samples: Iterable[Sample]) -> dict[str, ClassCounts]:
    """Counts per class, in the order of the class names."""
    counts: dict[str, ClassCounts] = defaultdict(ClassCounts)
    for sample in samples:
        counts[sample.class_name] += _one(sample)
    return dict(sorted(counts.items()))


@dataclass(frozen=True, slots=True)
class Loaded:
    """A data set as it was read.

    Attributes:
        layout: name of the loader, a key of ``DATASETS``.
        root: folder or file that was read (inside the one given, if that was only a wrapper).
        samples: all images, sorted by the loader.
        skipped: what was left out, and why.
        notes: choices made for the user.
    """

    layout: str
    root: Path
    samples: tuple[Sample, ...]
    skipped: tuple[tuple[Path, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, ClassCounts]:
        """Counts per class."""
        return count_classes(self.samples)

    @property
    def classes(self) -> list[str]:
        """Class names, sorted."""
        return sorted({sample.class_name for sample in self.samples})

    def summary(self) -> list[str]:
        """Lines for people: counts per class, what was skipped and why, choices made."""
        counts = self.counts
        plural = "class" if len(counts) == 1 else "classes"
        head = f"{self.layout} at {self.root}: {len(counts)} {plural}, {len(self.samples):,} images"
        return [
            head,
            *_table(counts),
            *_skipped_lines(self.skipped),
            *(f"note: {text}" for text in self.notes),
        ]


def _one(sample: Sample) -> ClassCounts:
    test = sample.split == TEST
    return ClassCounts(
        train=sample.split == TRAIN,
        calibration=sample.split == CALIBRATION,
        test_good=test and sample.label == 0,
        test_defect=test and sample.label == 1,
        test_unknown=test and sample.label is None,
        masks=len(sample.masks),
    )


def _table(counts: dict[str, ClassCounts]) -> Iterator[str]:
    rows = dict(counts)
    total = sum(counts.values(), ClassCounts())
    if len(rows) > 1:
        rows["total"] = total
    shown = [f.name for f in fields(ClassCounts) if f.name != "test_unknown" or total.test_unknown]
    width = max((len(name) for name in (*rows, "class")), default=5)
    yield f"  {'class':<{width}}" + "".join(f"  {name.replace('_', ' '):>12}" for name in shown)
    for name, row in rows.items():
        yield f"  {name:<{width}}" + "".join(f"  {getattr(row, key):>12,}" for key in shown)


def _skipped_lines(skipped: tuple[tuple[Path, str], ...]) -> Iterator[str]:
    by_reason: dict[str, list[Path]] = defaultdict(list)
    for path, reason in skipped:
        by_reason[reason].append(path)
    for reason, paths in by_reason.items():
        yield f"skipped {len(paths):,}: {reason} ({'e.g. ' if len(paths) > 1 else ''}{paths[0]})"
