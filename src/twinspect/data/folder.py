"""Plain folders, as people have them before they know any benchmark. Good images alone are enough."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from twinspect.data.industrial import MASK_FOLDERS, defects, masks_in
from twinspect.data.scan import (
    GOOD_NAMES,
    ScanLog,
    child,
    existing_folder,
    folder_name,
    has_images,
    has_images_below,
    images_below,
    images_in,
    listing,
    subfolders,
)
from twinspect.errors import DataError
from twinspect.types import TEST, TRAIN, Sample

GOOD_TEST_NAMES = frozenset({"good_test", "test_good", "normal_test", "test_normal"})


def folder(root: Path, log: ScanLog | None = None) -> list[Sample]:
    """A folder of good images in one of three shapes; the notes say which one was taken.

    * images in the folder itself, with or without folders below: all good, one class named like the folder;
    * ``good/`` (also ``ok``, ``normal``) with optional folders of defects beside it, optional masks in
      ``ground_truth/<defect>/`` or ``masks/``, optional good test images in ``good_test/``: one class;
    * folders only, none called good: each is one class of good images (or itself ``good/`` with defects).

    Good images are the training split. If there are defects and no good test images, the protocols hold
    some good images out (``twinspect.data.protocols.hold_out_good``); this loader moves nothing.
    """
    root = existing_folder(root)
    log = log or ScanLog()
    if child(root, GOOD_NAMES) is not None:
        return _with_good(root, log)
    if has_images(root):
        log.note(f"every image below {root} is taken as a good image of one class, {folder_name(root)!r}")
        return [Sample(image, TRAIN, folder_name(root)) for image in images_below(root, log)]
    return _classes(root, log)


def _classes(root: Path, log: ScanLog) -> list[Sample]:
    _refuse_train_test(root)
    samples: list[Sample] = []
    for sub in subfolders(root):
        if child(sub, GOOD_NAMES) is not None:
            samples += _with_good(sub, log)
            continue
        images = images_below(sub, log)
        if not images:
            log.skip(sub, "folder without images")
        samples += [Sample(image, TRAIN, sub.name) for image in images]
    if not samples:
        raise DataError(
            f"{root}: no image found in it or below; found: {listing(root)}. "
            "Give a folder of good images, or one with good/ and folders of defects"
        )
    names = sorted({sample.class_name for sample in samples})
    log.note(f"no folder is called good: each folder is one class of good images ({len(names)} classes)")
    return samples


def _refuse_train_test(root: Path) -> None:
    train = root / "train"
    if train.is_dir() and any(has_images_below(sub) for sub in subfolders(train)):
        raise DataError(
            f"{root}: train/ holds the folders {listing(train)} and none is called good. "
            "For parts, rename the folder of good images to good; for classes of objects or scenes with "
            "a test split, type --layout view"
        )


def _with_good(root: Path, log: ScanLog) -> list[Sample]:
    name = folder_name(root)
    good, truth = child(root, GOOD_NAMES), child(root, MASK_FOLDERS)
    samples = [Sample(image, TRAIN, name) for image in images_below(good, log)] if good else []
    kinds: dict[str, list[Path]] = {}
    for sub in subfolders(root):
        if sub in (good, truth):
            continue
        images = images_in(sub, log)
        if not images:
            log.skip(sub, "defect folder without images")
        elif sub.name.lower() in GOOD_TEST_NAMES:
            samples += [Sample(image, TEST, name) for image in images]
        else:
            kinds[sub.name] = images
    return samples + _defect_samples(name, kinds, truth, log)


def _defect_samples(name: str, kinds: dict[str, list[Path]], truth: Path | None, log: ScanLog) -> list[Sample]:
    samples: list[Sample] = []
    flat = _flat_masks(kinds, truth, log)
    for kind, images in kinds.items():
        masks = masks_in(truth / kind, log) if truth is not None else {}
        stems = {image.stem for image in images}
        masks |= {key: paths for key, paths in flat.items() if key.removesuffix("_mask") in stems}
        samples += defects(images, masks, name, kind, log)
    return samples


def _flat_masks(kinds: dict[str, list[Path]], truth: Path | None, log: ScanLog) -> dict[str, tuple[Path, ...]]:
    """Masks that lie directly in the mask folder, where the stem says which image is meant."""
    if truth is None or not has_images(truth):
        return {}
    owners = Counter(image.stem for images in kinds.values() for image in images)
    masks: dict[str, tuple[Path, ...]] = {}
    nested = ScanLog()
    for path in images_in(truth, nested):
        count = owners[path.stem.removesuffix("_mask")] or owners[path.stem]
        if count == 1:
            masks[path.stem] = (path,)
        else:
            log.skip(
                path,
                "mask without image" if count == 0 else "mask that fits images of several defect folders",
            )
    return masks
