"""From samples to splits: who trains, who calibrates, who is tested, under which name.

Two families. *Industrial* sets carry labels: training normals, test images with and without defects;
metrics per class, then their mean. *Semantic* sets carry classes and no labels: the protocol says which
classes are normal; one metric over the whole test split, then the mean over splits.

Every choice depends on the seed and on names relative to the data, never on file order or where the data lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from twinspect.data.carving import (
    by_class,
    carve_calibration,
    hold_out_good,
    pick,
    relative_lines,
    short_hash,
)
from twinspect.data.class_names import CIFAR100, FASHION
from twinspect.errors import ConfigError, DataError, unknown_name
from twinspect.types import CALIBRATION, TEST, TRAIN, Sample

INDUSTRIAL, SEMANTIC = "industrial", "semantic"
TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Split:
    """One run: what a model trains on, what sets its thresholds, what it is measured on.

    Attributes:
        name: protocol and part, such as ``one-vs-rest/cat``; print it beside every number.
        kind: ``industrial`` (metrics per class, then the mean) or ``semantic`` (one metric over the whole
            test).
        train: normal images.
        calibration: normal images that are not trained on.
        test: labelled images; in a semantic split ``defect_type`` of an anomaly is its true class.
    """

    name: str
    kind: str
    train: tuple[Sample, ...]
    calibration: tuple[Sample, ...]
    test: tuple[Sample, ...]

    @cached_property
    def hash(self) -> str:
        """12 hex digits of roles, relative paths, records, labels, classes, groups, masks (not pixels)."""
        roles = ((TRAIN, self.train), (CALIBRATION, self.calibration), (TEST, self.test))
        return short_hash(relative_lines(roles))

    def describe(self) -> str:
        """One line with name, hash and counts, to print beside the numbers."""
        normal = sum(sample.label == 0 for sample in self.test)
        return (
            f"{self.name} [{self.hash}]: {len(self.train):,} train, {len(self.calibration):,} calibration, "
            f"{len(self.test):,} test ({normal:,} normal, {len(self.test) - normal:,} anomalous)"
        )


ProtocolFn = Callable[[Sequence[Sample], int], list[Split]]


def is_semantic(samples: Iterable[Sample]) -> bool:
    """Whether training images have no label, as in the semantic sets."""
    return any(sample.split == TRAIN and sample.label is None for sample in samples)


def default_protocol(samples: Sequence[Sample]) -> str:
    """``multi-class`` for labelled sets, ``unified`` for semantic ones."""
    return "unified" if is_semantic(samples) else "multi-class"


def make_splits(samples: Sequence[Sample], protocol: str = "auto", seed: int = 0) -> list[Split]:
    """Splits of a protocol by name, a key of ``PROTOCOLS``; ``auto`` chooses by the kind of set."""
    name = default_protocol(samples) if protocol == "auto" else protocol
    if name not in PROTOCOLS:
        raise ConfigError(unknown_name("protocol", name, ["auto", *PROTOCOLS]))
    return PROTOCOLS[name](samples, seed)


def find_split(samples: Sequence[Sample], name: str, seed: int = 0) -> Split:
    """One split by its full name, such as ``one-vs-rest/cat``; ``multi-class`` has one only and needs no more.

    Raises:
        ConfigError: no such protocol, or no such split in it; the message lists what there is.
    """
    splits = make_splits(samples, name.partition("/")[0], seed)
    if len(splits) == 1 and name in (splits[0].name, "auto"):
        return splits[0]
    found = next((split for split in splits if split.name == name), None)
    if found is None:
        raise ConfigError(unknown_name("split", name, [split.name for split in splits]))
    return found


# ------------------------------------------------------------------------------------------ industrial


def multi_class(samples: Sequence[Sample], seed: int = 0) -> list[Split]:
    """One model on the union of all classes' normal training images.

    Test images without a label are left out. A class with defects but no good test images (plain folders)
    gives a fifth of its good images to the test.
    """
    _refuse_semantic(samples)
    return [_industrial("multi-class", hold_out_good(samples, TEST_FRACTION, seed), seed)]


def single_class(samples: Sequence[Sample], seed: int = 0) -> list[Split]:
    """One model per class; calibration and held-out images are the same as in ``multi_class``."""
    _refuse_semantic(samples)
    held = by_class(hold_out_good(samples, TEST_FRACTION, seed))
    return [_industrial(f"single-class/{name}", members, seed) for name, members in held.items()]


def _industrial(name: str, samples: Sequence[Sample], seed: int) -> Split:
    test = [s for s in samples if s.split == TEST and s.label is not None]
    return _split(name, INDUSTRIAL, [s for s in samples if s.label == 0], test, seed)


def _refuse_semantic(samples: Sequence[Sample]) -> None:
    if is_semantic(samples):
        raise ConfigError(
            "this set says which class an image shows, and not whether it is good: type --protocol "
            "one-vs-rest, unified or leave-one-out"
        )


# -------------------------------------------------------------------------------------------- semantic


def one_vs_rest(samples: Sequence[Sample], seed: int = 0) -> list[Split]:
    """Each class once as the only normal one, all others anomalous, on the whole test split."""
    ready = _semantic_samples(samples, seed)
    return [_semantic(f"one-vs-rest/{name}", ready, {name}, seed) for name in class_order(ready)]


def unified(samples: Sequence[Sample], seed: int = 0) -> list[Split]:
    """Half of the classes normal, four times: first and second half, even and odd, in the official order.

    CIFAR-10: {0..4}, {5..9}, {0,2,4,6,8}, {1,3,5,7,9}; View: {0,1,2}, {3,4,5}, {0,2,4}, {1,3,5}. Of an odd
    number of classes the first half has one more.
    """
    ready = _semantic_samples(samples, seed)
    names = class_order(ready)
    half = (len(names) + 1) // 2
    parts = {"first-half": names[:half], "second-half": names[half:], "even": names[::2], "odd": names[1::2]}
    return [_semantic(f"unified/{part}", ready, set(normal), seed) for part, normal in parts.items()]


def leave_one_out(samples: Sequence[Sample], seed: int = 0) -> list[Split]:
    """All classes but one are normal; the one left out is the anomaly."""
    ready = _semantic_samples(samples, seed)
    names = class_order(ready)
    return [_semantic(f"leave-one-out/{name}", ready, set(names) - {name}, seed) for name in names]


def one_vs_rest_super(samples: Sequence[Sample], seed: int = 0) -> list[Split]:
    """CIFAR-100 by its 20 super-classes: each once as the normal one."""
    splits = one_vs_rest(by_superclass(samples), seed)
    return [replace(s, name=s.name.replace("one-vs-rest", "one-vs-rest-super")) for s in splits]


def by_superclass(samples: Iterable[Sample]) -> list[Sample]:
    """CIFAR-100 samples with the super-class as class; the protocols then work on 20 classes."""
    renamed = []
    for sample in samples:
        if sample.class_name not in CIFAR100:
            raise ConfigError(
                f"{sample.class_name!r} is not a class of CIFAR-100; super-classes are defined for it only"
            )
        renamed.append(replace(sample, class_name=CIFAR100[sample.class_name]))
    return renamed


def class_order(samples: Iterable[Sample]) -> list[str]:
    """Class names in the order of the official labels: alphabetical for all sets but Fashion-MNIST."""
    names = {sample.class_name for sample in samples}
    return [name for name in FASHION if name in names] if names <= set(FASHION) else sorted(names)


def _semantic_samples(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Samples with a test split for every class; refuses sets that know their defects."""
    if any(sample.label == 1 for sample in samples):
        raise ConfigError("this set labels its defects: type --protocol multi-class or single-class")
    ready: list[Sample] = []
    for name, members in by_class(samples).items():
        ready += _with_test(name, members, seed)
    if len({sample.class_name for sample in ready}) < 2:
        raise ConfigError("a semantic protocol needs at least two classes: one to be normal, one not")
    return ready


def _with_test(name: str, members: list[Sample], seed: int) -> list[Sample]:
    train = [sample for sample in members if sample.split == TRAIN]
    if any(sample.split == TEST for sample in members):
        return members
    moved = pick(train, max(1, round(TEST_FRACTION * len(train))), f"test|{seed}")
    if not moved:
        raise DataError(f"class {name!r} has {len(train)} training images and no test image; add test images")
    rest = [sample for sample in members if sample.split != TRAIN]
    return rest + [replace(s, split=TEST) if i in moved else s for i, s in enumerate(train)]


def _semantic(name: str, samples: Sequence[Sample], normal: set[str], seed: int) -> Split:
    known = [replace(s, label=0) for s in samples if s.class_name in normal]
    strange = [s for s in samples if s.split == TEST and s.class_name not in normal]
    test = [s for s in known if s.split == TEST]
    test += [replace(s, label=1, defect_type=s.class_name) for s in strange]
    return _split(name, SEMANTIC, known, test, seed)


def _split(name: str, kind: str, normal: Sequence[Sample], test: Sequence[Sample], seed: int) -> Split:
    own = [s for s in normal if s.split == CALIBRATION]
    provided = {s.class_name for s in own}
    train = [s for s in normal if s.split == TRAIN]
    if not train:
        raise DataError(f"{name}: no normal training image; put good images into train/good (or good/)")
    kept, carved = carve_calibration([s for s in train if s.class_name not in provided], seed=seed)
    kept += [s for s in train if s.class_name in provided]
    return Split(name, kind, _ordered(kept), _ordered(own + carved), _ordered(test))


def _ordered(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    return tuple(sample for members in by_class(samples).values() for sample in members)


PROTOCOLS: dict[str, ProtocolFn] = {
    "multi-class": multi_class,
    "single-class": single_class,
    "one-vs-rest": one_vs_rest,
    "one-vs-rest-super": one_vs_rest_super,
    "unified": unified,
    "leave-one-out": leave_one_out,
}
