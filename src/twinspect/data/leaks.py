"""Byte-equal images on both sides of a split: known sets hold some, and they flatter every number."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

from twinspect.data.samples import read_sample_rgb
from twinspect.types import TEST, Sample


def find_leaks(samples: Iterable[Sample]) -> list[tuple[Sample, Sample]]:
    """Pairs ``(training or calibration sample, test sample)`` with the same bytes.

    Only files of equal size are read. Records of container files are compared by their pixels.
    """
    by_kind: dict[bool, list[Sample]] = {False: [], True: []}
    for sample in samples:
        by_kind[sample.record is not None].append(sample)
    suspects = [group for group in _shared(by_kind[False], _size)]
    pairs = [pair for group in suspects for twins in _shared(group, _file_hash) for pair in _pairs(twins)]
    return pairs + [pair for twins in _shared(by_kind[True], _pixel_hash) for pair in _pairs(twins)]


def drop_leaks(samples: Sequence[Sample]) -> list[Sample]:
    """The samples without the training and calibration copies of test images; the test split stays whole."""
    leaked = {sample for sample, _ in find_leaks(samples)}
    return [sample for sample in samples if sample not in leaked]


def _shared(samples: Iterable[Sample], key: Callable[[Sample], Hashable]) -> list[list[Sample]]:
    """Groups of equal key that lie on both sides."""
    groups: dict[Hashable, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[key(sample)].append(sample)
    return [group for group in groups.values() if len({sample.split == TEST for sample in group}) == 2]


def _pairs(twins: list[Sample]) -> list[tuple[Sample, Sample]]:
    tests = [sample for sample in twins if sample.split == TEST]
    return [(sample, test) for sample in twins if sample.split != TEST for test in tests]


def _size(sample: Sample) -> int:
    return sample.image.stat().st_size


def _file_hash(sample: Sample) -> str:
    with sample.image.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pixel_hash(sample: Sample) -> str:
    return hashlib.sha256(read_sample_rgb(sample).tobytes()).hexdigest()
