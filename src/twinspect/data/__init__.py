"""Data sets as people have them on disk: one function per layout, ``folder -> list[Sample]``.

``load(root)`` recognises the layout, reads it and keeps what it left out.
A new layout is one function and one row of ``DATASETS``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from twinspect.data import folders, manifest, semantic
from twinspect.data.images import UNREAD_SUFFIXES, count_pictures
from twinspect.data.names import BAD, MASK
from twinspect.data.scan import Folder, ScanLog, existing, first_lines
from twinspect.errors import ConfigError, DataError, listed, unknown_name
from twinspect.types import TEST, Sample

__all__ = ["DATASETS", "ClassCounts", "Dataset", "Folder", "Loaded", "ScanLog", "load"]

_TEST_ROLES = {0: "test_good", 1: "test_defect", None: "test_unknown"}
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.xz", ".txz", ".tar.bz2", ".7z", ".rar")


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """How many images of one class there are, by role, and how many mask files."""

    train: int = 0
    calibration: int = 0
    test_good: int = 0
    test_defect: int = 0
    test_unknown: int = 0  # without a label: private test sets, classes of a semantic set
    masks: int = 0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A data set as it was read."""

    layout: str  # a key of ``DATASETS``
    root: Path  # folder or file that was read (inside the one given, if that was only a wrapper)
    samples: tuple[Sample, ...]
    skipped: tuple[tuple[Path, str], ...] = ()  # and why
    notes: tuple[str, ...] = ()  # choices made for the user

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


@dataclass(frozen=True, slots=True)
class Dataset:
    """A layout on disk.

    A layout of list files is read file by file: ``read(file, log, images)``, where ``images`` is the folder that
    paths in it are relative to, or None. Any other is read as ``read(folder, log)``.
    """

    needed: str  # what must be in a folder, in words
    looks_like: Callable[[Folder], bool]  # also asked of a file
    read: Callable[..., list[Sample]]
    find: Callable[[Folder], list[Path]] | None = None  # list files in a folder


def _parts(layout: str, needed: str) -> Dataset:
    return Dataset(
        needed, lambda root: folders.layout_of(root) == layout, partial(folders.read_folders, layout=layout)
    )


def _lists(needed: str, find: Callable[[Folder], list[Path]], read: Callable[..., list[Sample]]) -> Dataset:
    return Dataset(needed, lambda root: bool(find(root)), read, find)


# In order of asking: the special shape before the general one that would also fit.
DATASETS: dict[str, Dataset] = {
    "uniad-json": _lists("train.json or test.json with filename", manifest.find_uniad_json, manifest.uniad_json),
    "manifest": _lists("manifest.parquet or manifest.csv", manifest.find_manifests, manifest.manifest),
    "real-iad": _lists("realiad_jsons/<class>.json", manifest.find_real_iad, manifest.real_iad),
    "visa": _lists("split_csv/1cls.csv", lambda root: list(root.path.glob("split_csv/1cls.csv")), manifest.visa),
    folders.MVTEC_AD_2: _parts(folders.MVTEC_AD_2, "<class>/test_public/{good,bad}"),
    folders.MVTEC_LOCO: _parts(folders.MVTEC_LOCO, f"<class>/test/{folders.LOGICAL}"),
    folders.MVTEC_AD: _parts(folders.MVTEC_AD, "<class>/train/good, <class>/test/<kind>"),
    "meta-json": _lists(
        "meta.json",
        lambda root: [path for path in root.files if path.name.lower() == "meta.json"],
        manifest.meta_json,
    ),
    "lookout": _lists("manifest with source-ref", manifest.find_lookout, manifest.lookout),
    **{images.name: Dataset(images.needed, images.looks_like, images.read) for images in semantic.SETS},
    folders.FOLDER: _parts(folders.FOLDER, "good images, or good/ and folders of defects"),
}


def load(root: Path | str, layout: str = "auto", images: Path | str | None = None) -> Loaded:
    """Read the data set at ``root``; ``layout`` is a key of ``DATASETS``, or ``auto`` to recognise it.

    A folder that only wraps the data set (an unpacked archive) is entered, with a note. ``images`` names
    the folder that the paths of a list (manifest, meta.json, UniAD) are relative to, if that is not the
    list's own.

    Raises:
        ConfigError: the layout's name is unknown, or ``images`` is given for a layout without a list.
        DataError: the data cannot be read as that layout, or hold no image.
    """
    if layout not in ("auto", *DATASETS):
        raise ConfigError(unknown_name("layout", layout, ["auto", *DATASETS]))
    given = Folder(existing(root))
    if given.problem:
        raise DataError(f"{given.path}: {given.problem}")
    if layout == "auto":
        name, place = _locate(given)
    else:
        name = layout
        place = next((place for place in _wrapped(given) if DATASETS[layout].looks_like(place)), given)
    log = ScanLog()
    samples = _known_labels(_read(name, place, images, log), log)
    if DATASETS[name].find is not None:  # images are named in a list, so that folders of others must be a mistake
        _unnamed_folders(place, samples, log)
    if log.undecided and layout == "auto":
        classes = len({sample.class_name for sample in samples})
        raise DataError(
            f"{place.path}: {f'classes that can be read: {classes}; ' if samples else ''}these cannot be used as "
            f"they are:{first_lines(f'{path}: {reason}' for path, reason in log.undecided.items())}"
            + (f"\nMend that, or type --layout {name} to leave them out" if samples else "")
        )
    if not samples:
        reasons = first_lines(f"{path}: {reason}" for path, reason in log.skipped.items())
        raise DataError(
            f"{place.path}: no usable image found as {name}; found: {place.listing()}. "
            f"Needed: {DATASETS[name].needed}{reasons}"
        )
    if place is not given:
        log.note(f"{given.path} only wraps {place.name}, which was read")
    _note(samples, log)
    return Loaded(name, place.path, tuple(samples), tuple(log.skipped.items()), tuple(log.notes))


def _read(name: str, place: Folder, images: Path | str | None, log: ScanLog) -> list[Sample]:
    dataset = DATASETS[name]
    if dataset.find is None:
        if images is not None:
            lists = ", ".join(other for other, dataset in DATASETS.items() if dataset.find is not None)
            raise ConfigError(f"images={str(images)!r} has no effect on {name}; it is for {lists}")
        existing(place.path, folder=True)
        return dataset.read(place, log)
    paths = [place.path] if place.is_file else dataset.find(place)
    base = existing(images, folder=True) if images is not None else None
    return [sample for path in paths for sample in dataset.read(path, log, base)]


def _locate(root: Folder) -> tuple[str, Folder]:
    for place in _wrapped(root):
        if (name := _known(place)) is not None:
            return name, place
    several = [f"{sub.name} ({name})" for sub in root.folders if (name := _known(sub)) is not None]
    if several and not folders.find_classes(root, ScanLog()):
        raise DataError(f"{root.path}: holds data sets: {', '.join(several)}. Name one of these folders")
    if root.is_file or not root.has_images_below:
        raise DataError(
            f"{root.path}: no images that can be read; found: {root.listing()}. {_advice(root)}"
            f"Accepted: a folder of good images, a folder for each product, or a layout of {', '.join(DATASETS)}"
        )
    if root.meant.role in (BAD, MASK) and not root.meant.rest:
        what = "defects" if root.meant.role == BAD else "masks"
        raise DataError(
            f"{root.path}: by its name this is a folder of {what}, and nothing in it says that its images are good. "
            "If they are, type --layout folder"
        )
    return folders.FOLDER, root


def _advice(root: Folder) -> str:
    """What to do about what people give in place of a data set."""
    if root.images:
        return "It is one image: give the folder of many. "
    others = [path for here in root.walk(ScanLog()) for path in here.others]
    if archive := next((path for path in others if path.name.lower().endswith(_ARCHIVES)), None):
        return f"{archive.name} is an archive: unpack it, and give the folder. "
    if other := next((path for path in others if path.suffix.lower() in UNREAD_SUFFIXES), None):
        return f"{other.name} is in a format that is not read; save such pictures as PNG or JPEG. "
    return ""


def _known(place: Folder) -> str | None:
    return next((name for name, dataset in DATASETS.items() if dataset.looks_like(place)), None)


def _wrapped(root: Folder) -> list[Folder]:
    """The folder itself, then what lies inside as long as there is a single folder (three deep at most)."""
    chain = [root]
    while len(chain) < 4 and len(chain[-1].folders) == 1:
        chain += chain[-1].folders
    return chain


def _known_labels(samples: list[Sample], log: ScanLog) -> list[Sample]:
    """Without what is in a training part and has no label, where others have one: nobody says that it is good."""
    if not any(sample.label is not None for sample in samples):
        return samples  # a semantic set
    unknown = [sample for sample in samples if sample.split != TEST and sample.label is None]
    for sample in unknown:
        log.skip(sample.image, "no label, while other images have one; write 0 for good images")
    return [sample for sample in samples if sample.split == TEST or sample.label is not None]


def _unnamed_folders(root: Folder, samples: list[Sample], log: ScanLog) -> None:
    used = {path for sample in samples for path in (sample.image, *sample.masks)}
    inside = {path.relative_to(root.path).parts[:1] for path in used if path.is_relative_to(root.path)}
    for sub in root.folders:
        unnamed = (sub.name,) not in inside and sub.path not in log.skipped
        if unnamed and sub.meant.role != MASK and sub.has_images_below:
            log.leave(sub.path, "no list names an image in it")


def _note(samples: list[Sample], log: ScanLog) -> None:
    defects = [s for s in samples if s.split == TEST and s.label == 1]
    if missing := [s for s in defects if not s.masks]:
        names = listed(sorted({s.class_name for s in missing}), 5)
        log.note(
            f"{len(missing):,} of {len(defects):,} defects have no mask ({names}): metrics of pixels leave them out"
        )
    if several := [(s.image, count) for s in samples if s.record is None and (count := count_pictures(s.image)) > 1]:
        path, count = several[0]
        log.note(
            f"files with several pictures: {len(several):,} (first: {path}, {count}); the first of each is read, "
            "save the others as files of their own"
        )
