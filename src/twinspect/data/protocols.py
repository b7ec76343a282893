"""From samples to splits: who trains, who calibrates, who is tested, under which name.

*Industrial* sets carry labels: normal training images, test images with and without defects; metrics per class, then
their mean. *Semantic* sets carry classes and no labels: the protocol says which classes are normal; one metric over
the whole test split, then the mean over splits.

Images are chosen by hashing the seed and names relative to the data: the choice does not depend on file order, on
other classes or on where the data lie, and adding an image moves few others.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from twinspect.data.samples import read_sample_rgb
from twinspect.data.semantic import CIFAR100, FASHION
from twinspect.errors import ConfigError, DataError, unknown_name
from twinspect.files import sha256_of
from twinspect.types import CALIBRATION, TEST, TRAIN, Sample

INDUSTRIAL, SEMANTIC = "industrial", "semantic"
CALIBRATION_FRACTION = 0.2
CALIBRATION_MINIMUM = 20
TEST_FRACTION = 0.2
_FEW = 200  # images that are decoded to find copies: some seconds at most


@dataclass(frozen=True)
class Split:
    """One run: what a model trains on, what sets its thresholds, what it is measured on."""

    name: str  # protocol and part, such as one-vs-rest/cat
    kind: str  # industrial or semantic
    train: tuple[Sample, ...]  # normal images
    calibration: tuple[Sample, ...]  # normal images that are not trained on
    test: tuple[Sample, ...]  # labelled images; in a semantic split an anomaly's defect_type is its true class

    @cached_property
    def hash(self) -> str:
        """See `content_hash`."""
        return content_hash([(TRAIN, self.train), (CALIBRATION, self.calibration), (TEST, self.test)])

    def describe(self) -> str:
        """One line with name, hash and counts, to print beside the numbers."""
        normal = sum(sample.label == 0 for sample in self.test)
        anomalous = len(self.test) - normal
        return (
            f"{self.name} (hash {self.hash}): {len(self.test):,} to test ({normal:,} good, {anomalous:,} anomalous), "
            f"{len(self.train):,} to train, {len(self.calibration):,} to calibrate"
        )


# Of a semantic set: the classes that are normal in each part, from the names of all classes in the official order.
# "unified" takes half of them four times: first and second half (of an odd number the first half has one more), even
# and odd. CIFAR-10: {0..4}, {5..9}, {0,2,4,6,8}, {1,3,5,7,9}; View: {0,1,2}, {3,4,5}, {0,2,4}, {1,3,5}.
_NORMAL: dict[str, Callable[[list[str]], dict[str, list[str]]]] = {
    "one-vs-rest": lambda names: {name: [name] for name in names},
    "one-vs-rest-super": lambda names: {name: [name] for name in names},
    "unified": lambda names: {
        "first-half": names[: (len(names) + 1) // 2],
        "second-half": names[(len(names) + 1) // 2 :],
        "even": names[::2],
        "odd": names[1::2],
    },
    "leave-one-out": lambda names: {name: [other for other in names if other != name] for name in names},
}
PROTOCOLS = ("multi-class", "single-class", *_NORMAL)


def is_semantic(samples: Iterable[Sample]) -> bool:
    """Whether training images have no label, as in the semantic sets."""
    return any(sample.split == TRAIN and sample.label is None for sample in samples)


def make_splits(samples: Sequence[Sample], protocol: str = "auto", seed: int = 0) -> list[Split]:
    """Splits of a protocol of ``PROTOCOLS``; ``auto``: ``multi-class`` for labelled sets, ``unified`` for others."""
    name = protocol
    if protocol == "auto":
        name = "unified" if is_semantic(samples) else "multi-class"
    if name not in PROTOCOLS:
        raise ConfigError(unknown_name("protocol", name, ["auto", *PROTOCOLS]))
    return _semantic(samples, name, seed) if name in _NORMAL else _industrial(samples, name, seed)


def find_split(samples: Sequence[Sample], name: str, seed: int = 0) -> Split:
    """One split by its full name, such as ``one-vs-rest/cat``; ``multi-class`` has one only and needs no more."""
    splits = make_splits(samples, name.partition("/")[0], seed)
    if len(splits) == 1 and name in (splits[0].name, "auto"):
        return splits[0]
    named = {split.name: split for split in splits}
    if name not in named:
        raise ConfigError(unknown_name("split", name, list(named)))
    return named[name]


def _industrial(samples: Sequence[Sample], protocol: str, seed: int) -> list[Split]:
    """One model on all classes or one for each, with the same calibration and held-out images.

    Test images without a label are left out. A class with defects but no good test images (plain folders)
    gives a fifth of its good images to the test.
    """
    if is_semantic(samples):
        raise ConfigError(
            "this set says which class an image shows, and not whether it is good: accepted are splits of "
            "one-vs-rest, unified and leave-one-out, such as one-vs-rest/cat"
        )
    held = hold_out_good(samples, seed)
    parts = {protocol: held}
    if protocol == "single-class":
        parts = {f"{protocol}/{name}": members for name, members in by_class(held).items()}
    splits = []
    for name, members in parts.items():
        test = [s for s in members if s.split == TEST and s.label is not None]
        splits.append(_split(name, INDUSTRIAL, [s for s in members if s.label == 0], test, seed))
    return splits


def _semantic(samples: Sequence[Sample], protocol: str, seed: int) -> list[Split]:
    if any(sample.label == 1 for sample in samples):
        raise ConfigError("this set labels its defects: its splits are those of multi-class or single-class")
    classes = by_class(by_superclass(samples) if protocol == "one-vs-rest-super" else samples)
    for name, members in classes.items():
        if not any(sample.split == TEST for sample in members):
            train = [sample for sample in members if sample.split == TRAIN]
            classes[name] = _moved_to_test(members, train, seed)
            if not any(sample.split == TEST for sample in classes[name]):
                raise DataError(f"class {name!r} has {len(train)} training images and no test image; add test images")
    if len(classes) < 2:
        raise ConfigError("a semantic protocol needs at least two classes: one to be normal, one not")
    ready = [sample for members in classes.values() for sample in members]
    splits = []
    for part, normal in _NORMAL[protocol](class_order(classes)).items():
        known = [replace(s, label=0) for s in ready if s.class_name in normal]
        strange = [s for s in ready if s.split == TEST and s.class_name not in normal]
        test = [s for s in known if s.split == TEST]
        test += [replace(s, label=1, defect_type=s.class_name) for s in strange]
        splits.append(_split(f"{protocol}/{part}", SEMANTIC, known, test, seed))
    return splits


def by_superclass(samples: Sequence[Sample]) -> list[Sample]:
    """CIFAR-100 samples with the super-class as class; the protocols then work on 20 classes."""
    if (other := next((s.class_name for s in samples if s.class_name not in CIFAR100), None)) is not None:
        raise ConfigError(f"{other!r} is not a class of CIFAR-100; super-classes are defined for it only")
    return [replace(s, class_name=CIFAR100[s.class_name]) for s in samples]


def class_order(classes: Iterable[str]) -> list[str]:
    """Class names in the order of the official labels: alphabetical for all sets but Fashion-MNIST."""
    names = set(classes)
    return [name for name in FASHION if name in names] if names <= set(FASHION) else sorted(names)


def _split(name: str, kind: str, normal: Sequence[Sample], test: Sequence[Sample], seed: int) -> Split:
    """Calibration images are set aside of classes that have none of their own."""
    given = [s for s in normal if s.split == CALIBRATION]
    provided = {s.class_name for s in given}
    train = [s for s in normal if s.split == TRAIN]
    if not train:
        raise DataError(f"{name}: no normal training image; put good images into train/good (or good/)")
    rest, carved = carve_calibration([s for s in train if s.class_name not in provided], seed=seed)
    rest += [s for s in train if s.class_name in provided]
    parts = [tuple(sorted(part, key=sort_key)) for part in (rest, given + carved, test)]
    return Split(name, kind, *parts)


# ------------------------------------------------------------------------------- images set aside


def carve_calibration(
    train: Iterable[Sample],
    fraction: float = CALIBRATION_FRACTION,
    seed: int = 0,
    minimum: int = CALIBRATION_MINIMUM,
) -> tuple[list[Sample], list[Sample]]:
    """Set a part of each class's training normals aside for calibration: ``(train, calibration)``.

    Per class ``fraction`` of the images and at least ``minimum``, but never more than half of them. Where
    ``group`` is set, whole groups are taken (a session or object is never in both parts); a class with one
    group only is cut by image. The carved samples carry ``split="calibration"``.
    """
    rest: list[Sample] = []
    carved: list[Sample] = []
    for members in by_class(train).values():
        chosen = pick(members, max(round(fraction * len(members)), minimum), f"calibration|{seed}")
        carved += [replace(s, split=CALIBRATION) for i, s in enumerate(members) if i in chosen]
        rest += [s for i, s in enumerate(members) if i not in chosen]
    return rest, carved


def hold_out_good(samples: Iterable[Sample], seed: int = 0) -> list[Sample]:
    """Move a fifth of the good training images to the test, in classes that test defects and no good image."""
    result: list[Sample] = []
    for members in by_class(samples).values():
        tested = {s.label for s in members if s.split == TEST}
        if 1 in tested and 0 not in tested:
            members = _moved_to_test(members, [s for s in members if s.split == TRAIN and s.label == 0], seed)
        result += members
    return result


def _moved_to_test(members: list[Sample], candidates: Sequence[Sample], seed: int) -> list[Sample]:
    chosen = pick(candidates, max(1, round(TEST_FRACTION * len(candidates))), f"test|{seed}")
    moved = {candidates[i] for i in chosen}
    return [replace(s, split=TEST) if s in moved else s for s in members]


def by_class(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples per class, both in a fixed order that does not depend on the order given."""
    classes: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=sort_key):
        classes[sample.class_name].append(sample)
    return dict(classes)


def sort_key(sample: Sample) -> tuple[str, str, int]:
    """Order of samples: class, path, record."""
    return sample.class_name, sample.image.as_posix(), -1 if sample.record is None else sample.record


def pick(members: Sequence[Sample], target: int, salt: str) -> set[int]:
    """Positions of about ``target`` members, at most half, whole groups, ordered by a hash of their names."""
    half = len(members) // 2
    target = min(target, half)
    if target <= 0:
        return set()
    # Positions of the members of each group, or of each image alone.
    base = _common_folder(members)
    names = [f"{_relative(s.image, base)}#{s.record}" for s in members]
    groups: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(members):
        groups[f"group {sample.group}" if sample.group else names[index]].append(index)
    if len(groups) == 1:
        groups = defaultdict(list, {name: [index] for index, name in enumerate(names)})
    units = [groups[key] for key in sorted(groups, key=lambda key: _hash(f"{salt}|{key}"))]
    chosen: set[int] = set()
    for unit in units:
        if len(chosen) >= target:
            break
        if len(chosen) + len(unit) <= half:
            chosen |= set(unit)
    return chosen or set(sorted(units, key=len)[0])


def content_hash(roles: Iterable[tuple[str, Sequence[Sample]]], more: Iterable[str] = ()) -> str:
    """12 hex digits of (role, samples): paths in the common folder, records, labels, classes, groups, masks.

    ``more`` are lines that count besides.
    """
    parts = list(roles)
    base = _common_folder([sample for _, samples in parts for sample in samples])
    lines = []
    for role, samples in parts:
        for s in samples:
            masks = ",".join(_relative(mask, base) for mask in s.masks)
            fields = (role, _relative(s.image, base), s.record, s.class_name, s.label, s.defect_type, s.group, masks)
            lines.append("|".join(map(str, fields)))
    return _hash("\n".join([*sorted(lines), *more]))[:12]


def _common_folder(samples: Iterable[Sample]) -> str:
    """Deepest folder above all images; empty if they share none (two Windows drives) or there are none."""
    try:
        return os.path.commonpath({os.path.dirname(os.path.abspath(sample.image)) for sample in samples})
    except ValueError:
        return ""


def _relative(path: Path, base: str) -> str:
    """Path relative to ``base`` with forward slashes and composed Unicode."""
    absolute = os.path.abspath(path)
    prefix = base.rstrip(os.sep) + os.sep  # much faster than relpath, which is for the rare path outside
    inside = base and absolute.startswith(prefix)
    text = absolute[len(prefix) :] if inside else os.path.relpath(absolute, base or None)
    return unicodedata.normalize("NFC", text.replace(os.sep, "/"))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# ------------------------------------------------------------------------------------------ copies
# Byte-equal images on both sides of a split flatter every number; among training images they count double.


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
        leave_out(_alike((sample for sample in rest if sample.in_file), _pixel_hash))
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
    known = list(samples)
    of_one_size = _alike((sample for sample in known if sample.in_file), _size)
    groups = [part for group in of_one_size for part in _alike(group, lambda sample: sha256_of(sample.image))]
    return groups + _alike((sample for sample in known if not sample.in_file), _pixel_hash)


def _alike(samples: Iterable[Sample], key: Callable[[Sample], Hashable]) -> list[list[Sample]]:
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


def _pixel_hash(sample: Sample) -> str:
    rgb = read_sample_rgb(sample)
    return hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).hexdigest()
