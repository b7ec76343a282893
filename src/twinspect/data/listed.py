"""Sets whose split is a list in a file: VisA, Real-IAD, ADer's ``meta.json``, UniAD's JSON lines.

A row that names a missing file is skipped and reported; one that points outside the data folder is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from twinspect.data.class_names import VISA
from twinspect.data.folders import MVTEC_AD, find_classes, mvtec_ad, shape_of
from twinspect.data.names import meaning
from twinspect.data.scan import (
    ScanLog,
    existing_folder,
    existing_root,
    files_in,
    images_in,
    inside,
    listing,
    subfolders,
)
from twinspect.data.tables import (
    as_list,
    as_object,
    label_of,
    listed_file,
    read_csv,
    read_json,
    read_json_lines,
    split_of,
    text_of,
)
from twinspect.errors import DataError
from twinspect.types import TEST, TRAIN, Sample

VISA_COLUMNS = ("object", "split", "label", "image", "mask")
REAL_IAD_FOLDERS = ("realiad_1024", "realiad_512", "realiad_raw", "realiad_256")


# ----------------------------------------------------------------------------------------------- VisA


def visa(root: Path, log: ScanLog | None = None) -> list[Sample]:
    """VisA: the raw tree with ``split_csv/1cls.csv``, or converted to MVTec's layout (``1cls/<class>/...``).

    Official counts of the one-class split: 12 classes, 8,659 training and 2,162 test images (962 good,
    1,200 with defects). Mask pixels are small integers: any value above zero is defect.
    """
    root, log = existing_folder(root), log or ScanLog()
    table = _visa_table(root)
    if table is None:
        return _converted_visa(root, log)
    rows = read_csv(table)
    if not rows or set(VISA_COLUMNS) - set(rows[0]):
        raise DataError(
            f"{table}: columns {', '.join(rows[0]) if rows else 'none'}; needed: {', '.join(VISA_COLUMNS)}"
        )
    places = ((f"{table} row {number}", row) for number, row in enumerate(rows, start=1))
    return [s for where, row in places if (s := _visa_sample(root, row, where, log)) is not None]


def looks_like_visa(root: Path) -> bool:
    """Whether a folder is VisA: by its split files, or by class names of a converted tree."""
    if not os.path.isdir(root):
        return False
    if os.path.isdir(root / "split_csv") or os.path.isdir(root / "visa_pytorch"):
        return True
    classes = find_classes(_visa_place(root), ScanLog())
    return bool(classes) and all(one.name in VISA and shape_of(one) == MVTEC_AD for one in classes)


def _visa_table(root: Path) -> Path | None:
    folder = root / "split_csv"
    if not os.path.isdir(folder):
        return None
    if os.path.isfile(folder / "1cls.csv"):
        return folder / "1cls.csv"
    raise DataError(f"{folder}: no 1cls.csv; found: {listing(folder)}. It comes with VisA's archive")


def _visa_sample(root: Path, row: dict[str, str], where: str, log: ScanLog) -> Sample | None:
    label = text_of(row, "label", where).lower()
    if label not in ("normal", "anomaly"):
        raise DataError(f"{where}: label is {label!r}; accepted: normal, anomaly")
    image = listed_file(root, text_of(row, "image", where), where, log)
    mask = listed_file(root, row["mask"], where, log) if row["mask"].strip() else None
    if image is None:
        return None
    split, name, anomaly = split_of(row["split"], where), text_of(row, "object", where), label == "anomaly"
    masks = (mask,) if mask is not None and anomaly else ()
    return Sample(image, split, name, int(anomaly), "anomaly" if anomaly else "", masks)


def _converted_visa(root: Path, log: ScanLog) -> list[Sample]:
    try:
        return mvtec_ad(_visa_place(root), log)
    except DataError:
        raise DataError(
            f"{root}: neither split_csv/1cls.csv (raw VisA) nor 1cls/<class>/train/good (converted); "
            f"found: {listing(root)}"
        ) from None


def _visa_place(root: Path) -> Path:
    places = (root / "visa_pytorch" / "1cls", root / "visa_pytorch", root / "1cls")
    return next((place for place in places if os.path.isdir(place)), root)


# ------------------------------------------------------------------------------------------- Real-IAD


def real_iad(root: Path, log: ScanLog | None = None) -> list[Sample]:
    """Real-IAD: ``realiad_jsons/<class>.json``, images in ``realiad_{1024,512,raw,256}/<class>`` or beside.

    Five views of each object share a ``group`` (class and object folder), for scores per object. If images
    are there in several sizes the first of 1024, 512, raw, 256 is read, and the notes say so. Official
    counts: 30 classes, 36,465 training and 114,585 test images.
    """
    root, log = existing_folder(root), log or ScanLog()
    jsons = _real_iad_jsons(root, log)
    images = _real_iad_images(root, jsons, log)
    samples: list[Sample] = []
    for path in sorted(jsons.glob("*.json")):
        if os.path.isdir(images / path.stem):
            samples += _real_iad_class(images / path.stem, path, log)
        else:
            log.skip(path, "list of a class without image folder")
    return samples


def looks_like_real_iad(root: Path) -> bool:
    """Whether a folder holds Real-IAD's lists."""
    return any(sub.name.startswith("realiad_jsons") for sub in subfolders(root))


def _real_iad_jsons(root: Path, log: ScanLog) -> Path:
    found = [sub for sub in subfolders(root) if sub.name.startswith("realiad_jsons")]
    if not found:
        raise DataError(f"{root}: no folder realiad_jsons with <class>.json files; found: {listing(root)}")
    folder = next((sub for sub in found if sub.name == "realiad_jsons"), found[0])
    for sub in found:
        if sub != folder:
            log.skip(sub, f"another list of Real-IAD; {folder.name} is read")
    if any(folder.glob("*.json")):
        return folder
    return next((sub for sub in subfolders(folder) if any(sub.glob("*.json"))), folder)


def _real_iad_images(root: Path, jsons: Path, log: ScanLog) -> Path:
    found = [root / name for name in REAL_IAD_FOLDERS if os.path.isdir(root / name)]
    if not found:
        return root
    if len(found) > 1:
        log.note(f"images are here as {', '.join(f.name for f in found)}: {found[0].name} is read")
    for other in found[1:]:
        log.skip(other, f"the same images in another size; {found[0].name} is read")
    return found[0]


def _real_iad_class(images: Path, path: Path, log: ScanLog) -> list[Sample]:
    lists = as_object(read_json(path), str(path))
    samples = []
    for split in (TRAIN, TEST):
        for number, entry in enumerate(as_list(lists.get(split), f"{path} {split}"), start=1):
            where = f"{path} {split} row {number}"
            sample = _real_iad_sample(images, as_object(entry, where), split, where, log)
            samples += [sample] if sample is not None else []
    return samples


def _real_iad_sample(images: Path, entry: dict[str, Any], split: str, where: str, log: ScanLog) -> Sample | None:
    name = text_of(entry, "image_path", where)
    kind = text_of(entry, "anomaly_class", where)
    image = listed_file(images, name, where, log)
    anomaly = kind != "OK"
    mask = listed_file(images, entry["mask_path"], where, log) if anomaly and entry.get("mask_path") else None
    if image is None:
        return None
    group = image.parent.relative_to(images).as_posix() if image.is_relative_to(images) else image.parent.name
    masks = (mask,) if mask is not None else ()
    class_name = images.name
    return Sample(image, split, class_name, int(anomaly), kind if anomaly else "", masks, f"{class_name}/{group}")


# ------------------------------------------------------------------------------------------ meta.json


def meta_json(root: Path, log: ScanLog | None = None, images: Path | None = None) -> list[Sample]:
    """``meta.json`` of the ADer and AnomalyCLIP family: ``{train: {class: [...]}, test: {class: [...]}}``.

    ``root`` is the file, or the folder that holds it; paths in it are relative to that folder or to
    ``images``.
    """
    log = log or ScanLog()
    path = _meta_file(root)
    base = existing_folder(images) if images is not None else path.parent
    content = as_object(read_json(path), str(path))
    samples: list[Sample] = []
    for word, classes in content.items():
        if not meaning(word).split:
            log.skip(path, f"part {word!r} is neither train, calibration nor test")
            continue
        for where, entry in _meta_entries(path, word, classes):
            sample = _meta_sample(base, entry, meaning(word).split, where, log)
            samples += [sample] if sample is not None else []
    return samples


def looks_like_meta_json(root: Path) -> bool:
    """Whether it is such a file, or a folder that holds one."""
    return any(path.name.lower() == "meta.json" for path in ([root] if os.path.isfile(root) else files_in(root)))


def _meta_file(root: Path) -> Path:
    path = existing_root(root)
    found = [one for one in files_in(path) if one.name.lower() == "meta.json"] if os.path.isdir(path) else [path]
    if not found:
        raise DataError(f"{path / 'meta.json'}: no such file; found: {listing(path)}")
    return found[0]


def _meta_entries(path: Path, word: str, classes: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entries in as_object(classes, f"{path} {word}").items():
        for number, entry in enumerate(as_list(entries, f"{path} {word} {name}"), start=1):
            where = f"{path} {word} {name} row {number}"
            yield where, {"cls_name": name, **as_object(entry, where)}


def _meta_sample(base: Path, entry: dict[str, Any], split: str, where: str, log: ScanLog) -> Sample | None:
    image = listed_file(base, text_of(entry, "img_path", where), where, log)
    label = label_of(entry.get("anomaly"), where)
    masks = _meta_masks(base, entry.get("mask_path"), where, log) if label == 1 else ()
    if image is None:
        return None
    kind = str(entry.get("specie_name") or "anomaly") if label == 1 else ""
    return Sample(image, split, text_of(entry, "cls_name", where), label, kind, masks)


def _meta_masks(base: Path, text: Any, where: str, log: ScanLog) -> tuple[Path, ...]:
    if not isinstance(text, str) or not text.strip():
        return ()
    path = inside(base, text, where)
    if os.path.isdir(path):
        return tuple(images_in(path, log))
    mask = listed_file(base, text, where, log)
    return (mask,) if mask is not None else ()


# -------------------------------------------------------------------------------------- UniAD's lines


def uniad_json(root: Path, log: ScanLog | None = None, images: Path | None = None) -> list[Sample]:
    """UniAD's JSON lines: ``filename, label, label_name, clsname, maskname``, one object a line.

    ``root`` is a folder with ``train.json`` and ``test.json`` (also ``.jsonl``), or one such file. Paths
    are relative to ``images``, else to that folder, else to a folder inside it where the first file is
    found. Training images without a label are normal.
    """
    log = log or ScanLog()
    files = _uniad_files(existing_root(root))
    if not files:
        raise DataError(f"{root}: neither train.json nor test.json; found: {listing(Path(root))}")
    samples: list[Sample] = []
    for path, split in files:
        entries = list(read_json_lines(path))
        base = existing_folder(images) if images is not None else _uniad_base(path.parent, entries)
        found = (_uniad_sample(base, entry, split, where, log) for where, entry in entries)
        samples += [sample for sample in found if sample is not None]
    return samples


def looks_like_uniad(root: Path) -> bool:
    """Whether it is a file of such lines, or a folder with one: also where a line of it cannot be read."""
    return any(_names_files(path) for path, _ in _uniad_files(root))


def _names_files(path: Path) -> bool:
    try:
        first = next(read_json_lines(path), None)
    except DataError:
        with suppress(OSError):
            return b'"filename"' in path.read_bytes()
        return False
    return first is not None and "filename" in first[1]


def _uniad_files(root: Path) -> list[tuple[Path, str]]:
    if os.path.isfile(root):
        return [(root, meaning(root.stem).split or TEST)] if root.suffix.lower() in (".json", ".jsonl") else []
    names = {f"{split}{suffix}": split for split in (TRAIN, TEST) for suffix in (".json", ".jsonl")}
    found = [(path, names[path.name.lower()]) for path in files_in(root) if path.name.lower() in names]
    return sorted(found, key=lambda one: list(names).index(one[0].name.lower()))


def _uniad_base(folder: Path, entries: list[tuple[str, dict[str, Any]]]) -> Path:
    if not entries:
        return folder
    where, first = entries[0]
    name = text_of(first, "filename", where)
    places = (folder, *subfolders(folder))
    return next((base for base in places if os.path.isfile(inside(base, name, where))), folder)


def _uniad_sample(base: Path, entry: dict[str, Any], split: str, where: str, log: ScanLog) -> Sample | None:
    name = text_of(entry, "filename", where)
    image = listed_file(base, name, where, log)
    label = label_of(entry.get("label"), where) if "label" in entry or split == TEST else 0
    text = entry.get("maskname")
    mask = listed_file(base, text, where, log) if label == 1 and isinstance(text, str) and text else None
    if image is None:
        return None
    class_name = str(entry.get("clsname") or image.relative_to(base).parts[0])
    kind = "" if label != 1 else image.parent.name  # label_name only says defective
    return Sample(image, split, class_name, label, kind, (mask,) if mask is not None else ())
