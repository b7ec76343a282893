"""Data sets as people have them on disk: one function per layout, ``folder -> list[Sample]``.

``load(root)`` recognises the layout, reads it and keeps what it left out; ``.summary()`` says so in words.
A new layout is one function and one row of ``DATASETS``.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path

from twinspect.data import folders, listed, semantic
from twinspect.data.images import UNREAD_SUFFIXES, count_pictures, is_image
from twinspect.data.manifest import find_manifests, manifest
from twinspect.data.names import BAD, MASK, meaning
from twinspect.data.scan import (
    ScanLog,
    existing_folder,
    existing_root,
    files_in,
    first_lines,
    folder_name,
    has_images_below,
    listing,
    looking_anew,
    subfolders,
    walk,
)
from twinspect.errors import ConfigError, DataError, unknown_name
from twinspect.errors import listed as shortened
from twinspect.types import TEST, Sample

__all__ = ["DATASETS", "ClassCounts", "Dataset", "Loaded", "ScanLog", "detect", "load"]

_TEST_ROLES = {0: "test_good", 1: "test_defect", None: "test_unknown"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.xz", ".txz", ".tar.bz2", ".7z", ".rar")


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """How many images of one class there are, by role, and how many mask files.

    ``test_unknown`` are test images without a label (private test sets, classes of a semantic set).
    """

    train: int = 0
    calibration: int = 0
    test_good: int = 0
    test_defect: int = 0
    test_unknown: int = 0
    masks: int = 0


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
        """Counts per class, in the order of the class names."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in self.samples:
            role = _TEST_ROLES[sample.label] if sample.split == TEST else sample.split
            counts[sample.class_name].update({role: 1, "masks": len(sample.masks)})
        return {name: ClassCounts(**row) for name, row in sorted(counts.items())}

    @property
    def classes(self) -> list[str]:
        """Class names, sorted."""
        return sorted({sample.class_name for sample in self.samples})

    def summary(self) -> list[str]:
        """Lines for people: counts per class, what was skipped and why, choices made."""
        counts = self.counts
        plural = "class" if len(counts) == 1 else "classes"
        by_reason: dict[str, list[Path]] = defaultdict(list)
        for path, reason in self.skipped:
            by_reason[reason].append(path)
        return [
            f"{self.layout} at {self.root}: {len(counts)} {plural}, {len(self.samples):,} images",
            *_table(counts),
            *(
                f"skipped {len(paths):,}: {reason} ({'e.g. ' if len(paths) > 1 else ''}{paths[0]})"
                for reason, paths in by_reason.items()
            ),
            *(f"note: {text}" for text in self.notes),
        ]


def _table(counts: dict[str, ClassCounts]) -> Iterator[str]:
    total = ClassCounts(*map(sum, zip(*map(astuple, counts.values()), strict=True)))
    rows = {**counts, "total": total} if len(counts) > 1 else counts
    shown = [f.name for f in fields(ClassCounts) if f.name != "test_unknown" or total.test_unknown]
    width = max(len(name) for name in (*rows, "class"))
    yield f"  {'class':<{width}}" + "".join(f"  {name.replace('_', ' '):>12}" for name in shown)
    for name, row in rows.items():
        yield f"  {name:<{width}}" + "".join(f"  {getattr(row, key):>12,}" for key in shown)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A layout on disk.

    ``read(folder, log)`` gives the samples of a folder. A layout of list files is read file by file:
    ``read(file, log, base)``, where ``base`` is the folder that paths in it are relative to, or None.
    """

    read: Callable[..., list[Sample]]
    looks_like: Callable[[Path], bool]  # whether a folder or file has this layout
    listed: bool = False  # whether images are named in a list, so that folders of others must be a mistake
    find: Callable[[Path], list[Path]] | None = None  # of list files: those at a path, itself or in it
    needed: str = ""  # of list files: what must be in a folder, in words


def _is(layout: str, root: Path) -> bool:
    return folders.layout_of(root) == layout


def _lists(read: Callable[..., list[Sample]], find: Callable[[Path], list[Path]], needed: str) -> Dataset:
    return Dataset(read, lambda root: bool(find(root)), True, find, needed)


# In order of asking: the special shape before the general one that would also fit.
DATASETS: dict[str, Dataset] = {
    "manifest": _lists(manifest, find_manifests, "manifest.parquet or manifest.csv"),
    "real-iad": Dataset(listed.real_iad, listed.looks_like_real_iad, listed=True),
    "visa": Dataset(listed.visa, listed.looks_like_visa, listed=True),
    **{
        name: Dataset(partial(folders.read_folders, layout=name), partial(_is, name))
        for name in (folders.MVTEC_AD_2, folders.MVTEC_LOCO, folders.MVTEC_AD)
    },
    "meta-json": _lists(listed.meta_json, listed.find_meta_json, "meta.json"),
    "uniad-json": _lists(listed.uniad_json, listed.find_uniad_json, "train.json or test.json with filename"),
    "anomalib": _lists(listed.anomalib, listed.find_anomalib, "YAML file with normal_dir"),
    "lookout": _lists(listed.lookout, listed.find_lookout, "manifest with source-ref"),
    **{image_set.name: Dataset(image_set.read, image_set.looks_like) for image_set in semantic.SETS},
    folders.FOLDER: Dataset(folders.read_folders, partial(_is, folders.FOLDER)),
}


@looking_anew()
def detect(root: Path | str) -> str:
    """Name of the layout found at ``root``, a key of ``DATASETS``.

    Raises:
        DataError: nothing is there, nothing in it is a known layout, or it holds several data sets.
    """
    return _locate(existing_root(root))[0]


@looking_anew()
def load(root: Path | str, layout: str = "auto", images: Path | str | None = None) -> Loaded:
    """Read the data set at ``root``; ``layout`` is a key of ``DATASETS``, or ``auto`` to recognise it.

    A folder that only wraps the data set (an unpacked archive) is entered, with a note. ``images`` names
    the folder that the paths of a list (manifest, meta.json, UniAD) are relative to, if that is not the
    list's own.

    Raises:
        ConfigError: the layout's name is unknown, or ``images`` is given for a layout without a list.
        DataError: the data cannot be read as that layout, or hold no image.
    """
    if layout != "auto" and layout not in DATASETS:
        raise ConfigError(unknown_name("layout", layout, ["auto", *DATASETS]))
    given = existing_root(root)
    given = existing_folder(given) if os.path.isdir(given) else given
    if layout == "auto":
        name, place = _locate(given)
        _refuse_own_name(name, place)
    else:
        name = layout
        place = next((place for place in _wrapped(given) if DATASETS[layout].looks_like(place)), given)
    log = ScanLog()
    samples = _known_labels(_read(name, place, images, log), log)
    _unnamed_folders(name, place, samples, log)
    if log.undecided and layout == "auto":
        raise DataError(_undecided(name, place, samples, log))
    if not samples:
        reasons = first_lines(f"{path}: {reason}" for path, reason in log.skipped)
        raise DataError(f"{place}: no usable image found as {name}; found: {listing(place)}{reasons}")
    if place != given:
        log.note(f"{given} only wraps {place.name}, which was read")
    _note(samples, log)
    return Loaded(name, place, tuple(samples), tuple(log.skipped), tuple(log.notes))


def _read(name: str, place: Path, images: Path | str | None, log: ScanLog) -> list[Sample]:
    dataset = DATASETS[name]
    if dataset.find is None:
        if images is not None:
            lists = ", ".join(other for other, dataset in DATASETS.items() if dataset.find is not None)
            raise ConfigError(f"images={str(images)!r} has no effect on {name}; it is for {lists}")
        return dataset.read(existing_folder(place), log)
    paths = dataset.find(place) if os.path.isdir(place) else [place]
    if not paths:
        raise DataError(f"{place}: no {dataset.needed} in it; found: {listing(place)}")
    base = existing_folder(images) if images is not None else None
    return [sample for path in paths for sample in dataset.read(path, log, base)]


def _locate(root: Path) -> tuple[str, Path]:
    for place in _wrapped(root):
        if (name := _known(place)) is not None:
            return name, place
    several = [f"{sub.name} ({name})" for sub in subfolders(root) if (name := _known(sub)) is not None]
    if several and folders.find_classes(root, ScanLog()) == []:
        raise DataError(f"{root}: holds data sets: {', '.join(several)}. Name one of these folders")
    if os.path.isdir(root) and has_images_below(root):
        return folders.FOLDER, root
    raise DataError(
        f"{root}: no known layout; found: {listing(root)}. {_advice(root)}"
        f"Accepted: {', '.join(DATASETS)}; a plain folder of good images is enough"
    )


def _advice(root: Path) -> str:
    """What to do about what people give in place of a data set."""
    if os.path.isfile(root):
        if root.name.lower().endswith(_ARCHIVES):
            return "It is an archive: unpack it, and give the folder. "
        return "It is one image: give the folder of many. " if is_image(root) else ""
    if archive := next((path.name for path in files_in(root) if path.name.lower().endswith(_ARCHIVES)), ""):
        return f"Unpack {archive} first. "
    others = (path for _, _, others in walk(root, ScanLog()) for path in others)
    if other := next((path.name for path in others if path.suffix.lower() in UNREAD_SUFFIXES), ""):
        return f"{other} is in a format that is not read; save such pictures as PNG or JPEG. "
    return ""


def _known(place: Path) -> str | None:
    return next((name for name, dataset in DATASETS.items() if dataset.looks_like(place)), None)


def _wrapped(root: Path) -> list[Path]:
    """The path itself, then what lies inside as long as there is a single folder (three deep at most)."""
    chain = [root]
    while len(chain) < 4 and len(inner := subfolders(chain[-1])) == 1:
        chain += inner
    return chain


def _refuse_own_name(name: str, root: Path) -> None:
    """A folder called bad or masks, in which nothing says that its images are good."""
    meant = meaning(folder_name(root))
    if name == folders.FOLDER and meant.role in (BAD, MASK) and not meant.rest and not folders.layout_of(root):
        what = "defects" if meant.role == BAD else "masks"
        raise DataError(
            f"{root}: by its name this is a folder of {what}, and nothing in it says that its images are good. If "
            "they are, type --layout folder"
        )


def _known_labels(samples: list[Sample], log: ScanLog) -> list[Sample]:
    """Without what is in a training part and has no label, where others have one: nobody says that it is good."""
    if not any(sample.label is not None for sample in samples):
        return samples  # a semantic set
    known = []
    for sample in samples:
        if sample.split == TEST or sample.label is not None:
            known.append(sample)
        else:
            log.skip(sample.image, "no label, while other images have one; write 0 for good images")
    return known


def _unnamed_folders(name: str, root: Path, samples: list[Sample], log: ScanLog) -> None:
    """Folders of images of which a list names none."""
    if not DATASETS[name].listed or not os.path.isdir(root):
        return
    used = {path for sample in samples for path in (sample.image, *sample.masks)}
    inside = {path.relative_to(root).parts[0] for path in used if path.is_relative_to(root)}
    skipped = {path for path, _ in log.skipped}
    for sub in subfolders(root):
        if sub.name not in inside and sub not in skipped and meaning(sub.name).role != MASK and has_images_below(sub):
            log.leave(sub, "no list names an image in it")


def _undecided(name: str, root: Path, samples: list[Sample], log: ScanLog) -> str:
    classes = len({sample.class_name for sample in samples})
    count = f"{classes} classes can be read, and " if samples else ""
    reasons = first_lines(f"{path}: {reason}" for path, reason in log.undecided)
    advice = f"\nMend that, or type --layout {name} to leave them out" if samples else ""
    return f"{root}: {count}these cannot be used as they are:{reasons}{advice}"


def _note(samples: list[Sample], log: ScanLog) -> None:
    defects = [s for s in samples if s.split == TEST and s.label == 1]
    if missing := [s for s in defects if not s.masks]:
        names = shortened(sorted({s.class_name for s in missing}), 5)
        log.note(
            f"{len(missing):,} of {len(defects):,} defect images have no mask ({names}): "
            "image-level metrics only for them"
        )
    if several := [(s.image, count) for s in samples if s.record is None and (count := count_pictures(s.image)) > 1]:
        path, count = several[0]
        log.note(
            f"{len(several):,} files hold several pictures (first: {path}, {count}): the first of each is read; save "
            "the others as files of their own"
        )
