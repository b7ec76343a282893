"""Industrial sets: classes of parts, normal training images, test images with defects and masks.

All of them end as the same records: ``label`` 0 for good and 1 for defects, ``defect_type`` the name of
the folder or column, ``masks`` every ground-truth file of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from twinspect.data.scan import (
    GOOD_NAMES,
    ScanLog,
    child,
    existing_folder,
    folder_name,
    images_in,
    listing,
    subfolders,
)
from twinspect.errors import DataError
from twinspect.types import CALIBRATION, TEST, TRAIN, Sample

MASK_FOLDERS = ("ground_truth", "masks", "mask", "gt")
LOGICAL, STRUCTURAL = "logical_anomalies", "structural_anomalies"


def mvtec_ad(root: Path, log: ScanLog | None = None) -> list[Sample]:
    """MVTec AD and everything laid out like it: one class folder, or a folder of class folders.

    ``<class>/train/good``, ``<class>/test/{good,<defect>}`` and, where present, masks in
    ``<class>/ground_truth/<defect>/<stem>_mask.png`` (also ``<stem>.png``). Without masks everything at
    image level works. Official counts: 15 classes, 3,629 training and 1,725 test images (467 good, 1,258
    with defects).
    """
    return _per_class(root, log or ScanLog(), is_mvtec_class, mvtec_class, "<class>/train/good, <class>/test/<kind>")


def mvtec_loco(root: Path, log: ScanLog | None = None) -> list[Sample]:
    """MVTec LOCO AD: logical and structural anomalies, several masks per image, own validation images.

    ``train/good``, ``validation/good`` (becomes the calibration split), ``test/{good,logical_anomalies,
    structural_anomalies}``, ``ground_truth/<type>/<stem>/000.png, 001.png ...``. Saturation areas for sPRO
    come from ``defects_config.json`` through ``twinspect.data.samples.read_regions``. Official counts: 5
    classes, 1,772 training, 304 validation and 1,568 test images.
    """
    return _per_class(root, log or ScanLog(), is_loco_class, mvtec_class, f"<class>/test/{LOGICAL}")


def mvtec_ad_2(root: Path, log: ScanLog | None = None) -> list[Sample]:
    """MVTec AD 2: ``{train,validation}/good``, ``test_public`` with masks, private test sets without labels.

    The images of ``test_private`` and ``test_private_mixed`` have label None; ``defect_type`` names the
    folder they come from, so that a submission can tell them apart.
    """
    return _per_class(root, log or ScanLog(), is_ad2_class, _ad2_class, "<class>/test_public/{good,bad}")


def is_mvtec_class(folder: Path) -> bool:
    """Whether a folder looks like one class of MVTec AD (or LOCO, or converted VisA)."""
    if child(folder / "train", GOOD_NAMES) is not None:
        return True
    return child(folder, MASK_FOLDERS) is not None and child(folder / "test", GOOD_NAMES) is not None


def is_loco_class(folder: Path) -> bool:
    """Whether a folder looks like one class of MVTec LOCO."""
    return (folder / "test" / LOGICAL).is_dir() or (folder / "test" / STRUCTURAL).is_dir()


def is_ad2_class(folder: Path) -> bool:
    """Whether a folder looks like one class of MVTec AD 2."""
    return (folder / "test_public").is_dir()


def class_folders(root: Path, is_class: Callable[[Path], bool]) -> list[Path]:
    """``[root]`` if it is itself a class, else the folders inside that are."""
    return [root] if is_class(root) else [sub for sub in subfolders(root) if is_class(sub)]


def mvtec_class(folder: Path, log: ScanLog) -> list[Sample]:
    """Samples of one class folder in the shape of MVTec AD, with ``validation/good`` if it is there."""
    name = folder_name(folder)
    samples = _good_images(folder / "train", TRAIN, name, log)
    samples += _good_images(folder / "validation", CALIBRATION, name, log)
    return samples + labelled_test(folder / "test", child(folder, MASK_FOLDERS), name, log)


def labelled_test(test: Path, truth: Path | None, class_name: str, log: ScanLog) -> list[Sample]:
    """Test images from ``<test>/<kind>`` with masks from ``<truth>/<kind>``; ``good`` is normal."""
    samples: list[Sample] = []
    kinds = [sub for sub in subfolders(test) if sub != truth]
    for kind in kinds:
        images = images_in(kind, log)
        if not images:
            log.skip(kind, "test folder without images")
        if kind.name.lower() in GOOD_NAMES:
            samples += [Sample(image, TEST, class_name) for image in images]
        else:
            masks = masks_in(truth / kind.name, log) if truth is not None else {}
            samples += defects(images, masks, class_name, kind.name, log)
    _unused_truth(truth, {kind.name for kind in kinds}, log)
    return samples


def defects(
    images: list[Path], masks: dict[str, tuple[Path, ...]], class_name: str, kind: str, log: ScanLog
) -> list[Sample]:
    """Defect images of one kind with their masks; masks that belong to no image are logged."""
    left = dict(masks)
    samples = []
    for image in images:
        found = left.pop(f"{image.stem}_mask", None) or left.pop(image.stem, ())
        samples.append(Sample(image, TEST, class_name, 1, kind, found))
    for paths in left.values():
        for path in paths:
            log.skip(path, "mask without image")
    return samples


def masks_in(folder: Path, log: ScanLog) -> dict[str, tuple[Path, ...]]:
    """Masks of one defect kind by stem: ``<stem>[_mask].png``, or a folder ``<stem>`` of several masks."""
    if not folder.is_dir():
        return {}
    files = ScanLog()
    masks: dict[str, tuple[Path, ...]] = {}
    for path in images_in(folder, files):
        masks[path.stem] = (*masks.get(path.stem, ()), path)
    log.skipped += [(path, reason) for path, reason in files.skipped if not path.is_dir()]
    for sub in subfolders(folder):
        masks[sub.name] = (*masks.get(sub.name, ()), *images_in(sub, log))
    return masks


def _per_class(
    root: Path,
    log: ScanLog,
    is_class: Callable[[Path], bool],
    read: Callable[[Path, ScanLog], list[Sample]],
    expected: str,
) -> list[Sample]:
    root = existing_folder(root)
    classes = class_folders(root, is_class)
    if not classes:
        raise DataError(f"{root}: no class folder of the shape {expected}; found: {listing(root)}")
    for sub in subfolders(root):
        if sub not in classes and classes != [root]:
            log.skip(sub, f"not a class folder ({expected})")
    return [sample for folder in classes for sample in read(folder, log)]


def _good_images(folder: Path, split: str, class_name: str, log: ScanLog) -> list[Sample]:
    good = child(folder, GOOD_NAMES)
    for sub in subfolders(folder):
        if sub != good:
            log.skip(sub, f"only good images are used for {split}")
    return [Sample(image, split, class_name) for image in images_in(good, log)] if good else []


def _unused_truth(truth: Path | None, kinds: set[str], log: ScanLog) -> None:
    for sub in subfolders(truth) if truth is not None else []:
        if sub.name.lower() in GOOD_NAMES:
            log.skip(sub, "masks of good images are not needed")
        elif sub.name not in kinds:
            log.skip(sub, "masks of a kind that has no test folder")


def _ad2_class(folder: Path, log: ScanLog) -> list[Sample]:
    name = folder_name(folder)
    samples = _good_images(folder / "train", TRAIN, name, log)
    samples += _good_images(folder / "validation", CALIBRATION, name, log)
    public = folder / "test_public"
    samples += labelled_test(public, child(public, MASK_FOLDERS), name, log)
    for private in ("test_private", "test_private_mixed"):
        if (folder / private).is_dir():
            samples += [Sample(p, TEST, name, None, private) for p in images_in(folder / private, log)]
    return samples
