"""Data sets as people have them on disk: one function per layout, ``root -> list[Sample]``.

``load(root)`` recognises the layout, reads it and keeps what it left out; ``.summary()`` says so in words.
Choose by name from ``DATASETS``; a new layout is one function, one row here and one writer in ``synthetic``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from twinspect.data import industrial, listed, semantic
from twinspect.data.folder import folder
from twinspect.data.loaded import ClassCounts, Loaded
from twinspect.data.manifest import looks_like_manifest, manifest
from twinspect.data.scan import ScanLog, existing_root, has_images_below, listing, subfolders
from twinspect.errors import ConfigError, DataError, unknown_name
from twinspect.types import TEST, Sample

__all__ = ["DATASETS", "ClassCounts", "DatasetFn", "Loaded", "ScanLog", "detect", "load"]


class DatasetFn(Protocol):
    """A loader: a folder (or file) in, samples out; what is left out goes to the log, if one is given."""

    def __call__(self, root: Path, log: ScanLog | None = None) -> list[Sample]:
        """Read the data set at ``root``."""


DATASETS: dict[str, DatasetFn] = {
    "mvtec-ad": industrial.mvtec_ad,
    "mvtec-ad-2": industrial.mvtec_ad_2,
    "mvtec-loco": industrial.mvtec_loco,
    "visa": listed.visa,
    "real-iad": listed.real_iad,
    "cifar10": semantic.cifar10,
    "cifar100": semantic.cifar100,
    "fashion-mnist": semantic.fashion_mnist,
    "view": semantic.view,
    "folder": folder,
    "manifest": manifest,
    "meta-json": listed.meta_json,
    "uniad-json": listed.uniad_json,
}

# Layouts whose images may lie elsewhere than the list of them.
_LISTS = {"manifest": manifest, "meta-json": listed.meta_json, "uniad-json": listed.uniad_json}

# In order of asking: the special shape before the general one that would also fit.
_LOOKS_LIKE: dict[str, Callable[[Path], bool]] = {
    "manifest": looks_like_manifest,
    "real-iad": listed.looks_like_real_iad,
    "mvtec-ad-2": lambda root: bool(industrial.class_folders(root, industrial.is_ad2_class)),
    "mvtec-loco": lambda root: bool(industrial.class_folders(root, industrial.is_loco_class)),
    "visa": listed.looks_like_visa,
    "mvtec-ad": lambda root: bool(industrial.class_folders(root, industrial.is_mvtec_class)),
    "meta-json": listed.looks_like_meta_json,
    "uniad-json": listed.looks_like_uniad,
    "cifar10": lambda root: semantic.looks_like(root, semantic.CIFAR10_SET),
    "view": lambda root: semantic.looks_like(root, semantic.VIEW_SET),
    "fashion-mnist": lambda root: semantic.looks_like(root, semantic.FASHION_SET),
    "cifar100": lambda root: semantic.looks_like(root, semantic.CIFAR100_SET),
}


def detect(root: Path | str) -> str:
    """Name of the layout found at ``root``, a key of ``DATASETS``.

    Raises:
        DataError: nothing is there, nothing in it is a known layout, or it holds several data sets.
    """
    return _locate(existing_root(root))[0]


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
    name, found = _locate(given) if layout == "auto" else (layout, _entered(given, layout))
    log = ScanLog()
    samples = _read(name, found, log, images)
    if not samples:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in log.skipped[:5])
        raise DataError(f"{found}: no usable image found as {name}; found: {_found(found)}{reasons}")
    if found != given:
        log.note(f"{given} only wraps {found.name}, which was read")
    _note_missing_masks(samples, log)
    return Loaded(name, found, tuple(samples), tuple(log.skipped), tuple(log.notes))


def _read(name: str, root: Path, log: ScanLog, images: Path | str | None) -> list[Sample]:
    if images is None:
        return DATASETS[name](root, log)
    if name not in _LISTS:
        raise ConfigError(f"images={str(images)!r} has no effect on {name}; it is for {', '.join(_LISTS)}")
    return _LISTS[name](root, log, Path(images))


def _locate(root: Path) -> tuple[str, Path]:
    for place in _wrapped(root):
        name = _known(place)
        if name is not None:
            return name, place
    several = [f"{sub.name} ({name})" for sub in subfolders(root) if (name := _known(sub)) is not None]
    if several:
        raise DataError(f"{root}: holds data sets: {', '.join(several)}. Name one of these folders")
    if root.is_dir() and has_images_below(root):
        return "folder", root
    raise DataError(
        f"{root}: no known layout; found: {_found(root)}. "
        f"Accepted: {', '.join(DATASETS)}; a plain folder of good images is enough"
    )


def _known(place: Path) -> str | None:
    return next((name for name, looks_like in _LOOKS_LIKE.items() if looks_like(place)), None)


def _found(root: Path) -> str:
    return listing(root) if root.is_dir() else "a file"


def _entered(root: Path, layout: str) -> Path:
    looks_like = _LOOKS_LIKE.get(layout)
    return next((p for p in _wrapped(root) if looks_like(p)), root) if looks_like else root


def _wrapped(root: Path) -> list[Path]:
    """The path itself, then what lies inside as long as there is a single folder (three deep at most)."""
    chain = [root]
    while root.is_dir() and len(chain) < 4:
        inner = subfolders(root)
        if len(inner) != 1:
            break
        root = inner[0]
        chain.append(root)
    return chain


def _note_missing_masks(samples: list[Sample], log: ScanLog) -> None:
    defects = [s for s in samples if s.split == TEST and s.label == 1]
    missing = [s for s in defects if not s.masks]
    if missing:
        names = sorted({s.class_name for s in missing})
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        log.note(
            f"{len(missing):,} of {len(defects):,} defect images have no mask ({listed}): "
            "image-level metrics only for them"
        )
