"""Byte-equal images: on both sides of a split they flatter every number, among training images they count double."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

from twinspect.data.protocols import sort_key
from twinspect.data.samples import read_sample_rgb
from twinspect.errors import DataError
from twinspect.files import sha256_of
from twinspect.types import TEST, TRAIN, Sample

_FEW = 200  # images that are decoded to find copies: some seconds at most
_PEEK = 1 << 12  # bytes from the middle of a file that tell most files of equal size apart


def find_leaks(samples: Iterable[Sample]) -> list[tuple[Sample, Sample]]:
    """Pairs ``(training or calibration sample, test sample)`` with the same bytes.

    Only files of equal size are read. Records of container files are compared by their pixels. What cannot be read is
    equal to nothing.
    """
    return [
        (sample, test)
        for twins in _equal(samples)
        for sample in twins
        for test in twins
        if sample.split != TEST and test.split == TEST
    ]


def drop_leaks(samples: Sequence[Sample]) -> list[Sample]:
    """The samples without the training and calibration copies of test images; the test split stays whole."""
    leaked = {sample for sample, _ in find_leaks(samples)}
    return [sample for sample in samples if sample not in leaked]


def count_once(good: Sequence[Sample], defects: Sequence[Sample] = ()) -> tuple[list[Sample], list[str]]:
    """Good images without copies of each other and of defects, in their order, and sentences about what was left out.

    Copies are byte-equal. Of few images, which copies harm most, also equal pixels make one: the same picture saved
    anew. The first copy stays, a training image before one of calibration: what is held out must not be known.
    """
    first_of: dict[Sample, Sample] = {}  # a copy -> what it is a copy of

    def leave_out(groups: Iterable[list[Sample]]) -> None:
        for twins in groups:
            first, *others = sorted(twins, key=lambda twin: (twin.label != 1, twin.split != TRAIN, sort_key(twin)))
            first_of.update((other, first) for other in others if other.label != 1)

    leave_out(_equal([*good, *defects]))
    rest = [sample for sample in good if sample not in first_of]
    if len(rest) <= _FEW:
        leave_out(_split((sample for sample in rest if sample.in_file), _pixel_hash))
    notes = []
    for label, what, done in (
        (0, "are copies of others", "each picture is counted once"),
        (1, "are copies of images that are called defects", "they are left out"),
    ):
        pairs = [(copy, first) for copy, first in first_of.items() if (first.label == 1) == label]
        if pairs:
            pair = f"{pairs[0][0].image} = {pairs[0][1].image}"
            notes.append(f"{len(pairs):,} of {len(good):,} good images {what} (first: {pair}): {done}")
    return [sample for sample in rest if sample not in first_of], notes


def _equal(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Groups of two and more samples with the same content."""
    known = list(samples)
    groups = [[sample for sample in known if sample.in_file]]
    for key in (_size, _peek, lambda sample: sha256_of(sample.image)):
        groups = [part for group in groups for part in _split(group, key)]
    return groups + _split((sample for sample in known if not sample.in_file), _pixel_hash)


def _split(samples: Iterable[Sample], key: Callable[[Sample], Hashable]) -> list[list[Sample]]:
    groups: dict[Hashable, list[Sample]] = defaultdict(list)
    for sample in samples:
        try:
            groups[key(sample)].append(sample)
        except (OSError, DataError):
            continue  # whoever reads the image says what is wrong with it
    return [group for group in groups.values() if len(group) > 1]


def _size(sample: Sample) -> int:
    size = sample.image.stat().st_size
    if size == 0:
        raise DataError(f"{sample.image}: empty")
    return size


def _peek(sample: Sample) -> bytes:
    with sample.image.open("rb") as stream:
        stream.seek(sample.image.stat().st_size // 2)
        return stream.read(_PEEK)


def _pixel_hash(sample: Sample) -> str:
    rgb = read_sample_rgb(sample)
    return hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).hexdigest()
