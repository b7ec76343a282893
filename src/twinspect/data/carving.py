"""Set images aside, reproducibly: calibration from training normals, test images from plain folders.

A choice is made by hashing names, so it does not depend on file order, on other classes, or on where the
data lie, and adding an image moves few others.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from twinspect.types import CALIBRATION, TEST, TRAIN, Sample

CALIBRATION_FRACTION = 0.2
CALIBRATION_MINIMUM = 20
TEST_FRACTION = 0.2


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
    kept: list[Sample] = []
    carved: list[Sample] = []
    for members in by_class(train).values():
        chosen = pick(members, max(round(fraction * len(members)), minimum), f"calibration|{seed}")
        carved += [replace(s, split=CALIBRATION) for i, s in enumerate(members) if i in chosen]
        kept += [s for i, s in enumerate(members) if i not in chosen]
    return kept, carved


def hold_out_good(samples: Iterable[Sample], fraction: float = TEST_FRACTION, seed: int = 0) -> list[Sample]:
    """Move a part of the good training images to the test, in classes that test defects and no good image."""
    result: list[Sample] = []
    for members in by_class(samples).values():
        tested = {s.label for s in members if s.split == TEST}
        good = [s for s in members if s.split == TRAIN and s.label == 0]
        wanted = max(1, round(fraction * len(good))) if 1 in tested and 0 not in tested else 0
        moved = {good[i] for i in pick(good, wanted, f"test|{seed}")}
        result += [replace(s, split=TEST) if s in moved else s for s in members]
    return result


def by_class(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples per class, both in a fixed order that does not depend on the order given."""
    classes: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=sort_key):
        classes[sample.class_name].append(sample)
    return dict(sorted(classes.items()))


def sort_key(sample: Sample) -> tuple[str, str, int]:
    """Order of samples: class, path, record."""
    return sample.class_name, sample.image.as_posix(), -1 if sample.record is None else sample.record


def pick(members: Sequence[Sample], target: int, salt: str) -> set[int]:
    """Positions of about ``target`` members, at most half, whole groups, ordered by a hash of their names."""
    half = len(members) // 2
    target = min(target, half)
    if target <= 0:
        return set()
    units = _units(members, salt)
    chosen: set[int] = set()
    for unit in units:
        if len(chosen) >= target:
            break
        if len(chosen) + len(unit) <= half:
            chosen |= set(unit)
    return chosen or set(sorted(units, key=len)[0])


def relative_lines(roles: Iterable[tuple[str, Sequence[Sample]]]) -> list[str]:
    """One sorted line per sample with everything that defines it, paths relative to the common folder."""
    parts = list(roles)
    base = common_folder(sample.image for _, samples in parts for sample in samples)
    lines = []
    for role, samples in parts:
        for s in samples:
            masks = ",".join(relative_name(mask, base) for mask in s.masks)
            fields = (
                role,
                relative_name(s.image, base),
                s.record,
                s.class_name,
                s.label,
                s.defect_type,
                s.group,
                masks,
            )
            lines.append("|".join(str(field) for field in fields))
    return sorted(lines)


def short_hash(lines: Iterable[str]) -> str:
    """12 hex digits of the SHA-256 of some lines."""
    return _hash("\n".join(lines))[:12]


def common_folder(paths: Iterable[Path]) -> str:
    """Deepest folder above all paths; empty if they share none (two Windows drives) or there are none."""
    try:
        return os.path.commonpath({os.path.dirname(os.path.abspath(path)) for path in paths})
    except ValueError:
        return ""


def relative_name(path: Path, base: str) -> str:
    """Path relative to ``base`` with forward slashes and composed Unicode."""
    absolute = os.path.abspath(path)
    prefix = base.rstrip(os.sep) + os.sep
    text = (
        absolute[len(prefix) :] if base and absolute.startswith(prefix) else os.path.relpath(absolute, base or None)
    )
    return unicodedata.normalize("NFC", text.replace(os.sep, "/"))


def _units(members: Sequence[Sample], salt: str) -> list[list[int]]:
    base = common_folder(sample.image for sample in members)
    names = [f"{relative_name(s.image, base)}#{s.record}" for s in members]
    groups: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(members):
        groups[f"group {sample.group}" if sample.group else names[index]].append(index)
    if len(groups) == 1:
        groups = defaultdict(list, {name: [index] for index, name in enumerate(names)})
    return [groups[key] for key in sorted(groups, key=lambda key: _hash(f"{salt}|{key}"))]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
