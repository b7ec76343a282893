"""Sets whose split is a list in a file: VisA, Real-IAD, ADer's ``meta.json``, UniAD's JSON lines.

Each reader brings its rows into one shape. A row that names a missing file is skipped and reported; one that points
outside the data folder is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinspect.data.folders import MVTEC_AD, find_classes, read_folders, shape_of
from twinspect.data.names import meaning
from twinspect.data.scan import (
    ScanLog,
    existing_folder,
    existing_root,
    files_in,
    images_below,
    inside,
    listing,
    subfolders,
)
from twinspect.data.tables import (
    as_list,
    as_object,
    label_of,
    read_csv,
    read_json,
    read_json_lines,
    split_of,
    text_of,
)
from twinspect.errors import DataError
from twinspect.types import TEST, TRAIN, Sample

VISA = tuple("candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum".split())
VISA_COLUMNS = ("object", "split", "label", "image", "mask")
REAL_IAD_FOLDERS = ("realiad_1024", "realiad_512", "realiad_raw", "realiad_256")


@dataclass(frozen=True, slots=True)
class _Row:
    """One image of a list.

    Attributes:
        where: file and row, for messages.
        image: its path below ``base``.
        mask: path of its mask, or of a folder of masks; anything that is no text says that there is none.
        kind: of defect; empty takes the name of the image's folder.
        class_name: empty takes the first folder of the image's path.
        view_of: whether the image is one view of the object that its folder is named after.
    """

    where: str
    base: Path
    split: str
    image: str
    label: int | None
    mask: Any = None
    kind: str = "anomaly"
    class_name: str = ""
    view_of: bool = False


def _samples(rows: Iterable[_Row], log: ScanLog) -> list[Sample]:
    samples = []
    for row in rows:
        image = _file(row, row.image, log)
        masks = _masks(row, log) if row.label == 1 else ()
        if image is None:
            continue
        path = image.relative_to(row.base) if image.is_relative_to(row.base) else image
        name = row.class_name or path.parts[0]
        kind = (row.kind or image.parent.name) if row.label == 1 else ""
        group = f"{name}/{path.parent.as_posix()}" if row.view_of else ""
        samples.append(Sample(image, row.split, name, row.label, kind, masks, group))
    return samples


def _file(row: _Row, text: str, log: ScanLog) -> Path | None:
    path = inside(row.base, text, row.where)
    if os.path.isfile(path):
        return path
    log.skip(path, "listed, but there is no such file")
    return None


def _masks(row: _Row, log: ScanLog) -> tuple[Path, ...]:
    if not isinstance(row.mask, str) or not row.mask.strip():
        return ()
    path = inside(row.base, row.mask, row.where)
    if os.path.isdir(path):
        return tuple(images_below(path, log))
    mask = _file(row, row.mask, log)
    return (mask,) if mask is not None else ()


# ----------------------------------------------------------------------------------------------- VisA


def visa(root: Path, log: ScanLog) -> list[Sample]:
    """VisA: the raw tree with ``split_csv/1cls.csv``, or converted to MVTec's layout (``1cls/<class>/...``).

    Official counts of the one-class split: 12 classes, 8,659 training and 2,162 test images (962 good,
    1,200 with defects). Mask pixels are small integers: any value above zero is defect.
    """
    root = existing_folder(root)
    folder = root / "split_csv"
    if not os.path.isdir(folder):
        return _converted_visa(root, log)
    table = folder / "1cls.csv"
    if not os.path.isfile(table):
        raise DataError(f"{folder}: no 1cls.csv; found: {listing(folder)}. It comes with VisA's archive")
    rows = read_csv(table)
    if not rows or set(VISA_COLUMNS) - set(rows[0]):
        raise DataError(
            f"{table}: columns {', '.join(rows[0]) if rows else 'none'}; needed: {', '.join(VISA_COLUMNS)}"
        )
    return _samples((_visa_row(root, row, f"{table} row {number}") for number, row in enumerate(rows, 1)), log)


def _visa_row(root: Path, row: Mapping[str, str], where: str) -> _Row:
    label = text_of(row, "label", where).lower()
    if label not in ("normal", "anomaly"):
        raise DataError(f"{where}: label is {label!r}; accepted: normal, anomaly")
    split, image, name = split_of(row["split"], where), text_of(row, "image", where), text_of(row, "object", where)
    return _Row(where, root, split, image, int(label == "anomaly"), row["mask"], class_name=name)


def looks_like_visa(root: Path) -> bool:
    """Whether a folder is VisA: by its split files, or by class names of a converted tree."""
    if not os.path.isdir(root):
        return False
    if os.path.isdir(root / "split_csv") or os.path.isdir(root / "visa_pytorch"):
        return True
    classes = find_classes(_visa_place(root), ScanLog())
    return bool(classes) and all(one.name in VISA and shape_of(one) == MVTEC_AD for one in classes)


def _converted_visa(root: Path, log: ScanLog) -> list[Sample]:
    try:
        return read_folders(_visa_place(root), log, MVTEC_AD)
    except DataError:
        raise DataError(
            f"{root}: neither split_csv/1cls.csv (raw VisA) nor 1cls/<class>/train/good (converted); "
            f"found: {listing(root)}"
        ) from None


def _visa_place(root: Path) -> Path:
    places = (root / "visa_pytorch" / "1cls", root / "visa_pytorch", root / "1cls")
    return next((place for place in places if os.path.isdir(place)), root)


# ------------------------------------------------------------------------------------------- Real-IAD


def real_iad(root: Path, log: ScanLog) -> list[Sample]:
    """Real-IAD: ``realiad_jsons/<class>.json``, images in ``realiad_{1024,512,raw,256}/<class>`` or beside.

    Five views of each object share a ``group`` (class and object folder), for scores per object. If images
    are there in several sizes the first of 1024, 512, raw, 256 is read, and the notes say so. Official
    counts: 30 classes, 36,465 training and 114,585 test images.
    """
    root = existing_folder(root)
    jsons = _real_iad_jsons(root, log)
    images = _real_iad_images(root, log)
    samples: list[Sample] = []
    for path in sorted(jsons.glob("*.json")):
        if os.path.isdir(images / path.stem):
            samples += _samples(_real_iad_rows(images / path.stem, path), log)
        else:
            log.skip(path, "list of a class without image folder")
    return samples


def looks_like_real_iad(root: Path) -> bool:
    """Whether a folder holds Real-IAD's lists."""
    return any(sub.name.startswith("realiad_jsons") for sub in subfolders(root))


def _real_iad_jsons(root: Path, log: ScanLog) -> Path:
    lists = [sub for sub in subfolders(root) if sub.name.startswith("realiad_jsons")]
    if not lists:
        raise DataError(f"{root}: no folder realiad_jsons with <class>.json files; found: {listing(root)}")
    folder = next((sub for sub in lists if sub.name == "realiad_jsons"), lists[0])
    for sub in lists:
        if sub != folder:
            log.skip(sub, f"another list of Real-IAD; {folder.name} is read")
    if any(folder.glob("*.json")):
        return folder
    return next((sub for sub in subfolders(folder) if any(sub.glob("*.json"))), folder)


def _real_iad_images(root: Path, log: ScanLog) -> Path:
    sizes = [root / name for name in REAL_IAD_FOLDERS if os.path.isdir(root / name)]
    if not sizes:
        return root
    if len(sizes) > 1:
        log.note(f"images are here as {', '.join(f.name for f in sizes)}: {sizes[0].name} is read")
    for other in sizes[1:]:
        log.skip(other, f"the same images in another size; {sizes[0].name} is read")
    return sizes[0]


def _real_iad_rows(images: Path, path: Path) -> Iterator[_Row]:
    lists = as_object(read_json(path), str(path))
    for split in (TRAIN, TEST):
        for number, entry in enumerate(as_list(lists.get(split), f"{path} {split}"), start=1):
            where = f"{path} {split} row {number}"
            row = as_object(entry, where)
            image, kind = text_of(row, "image_path", where), text_of(row, "anomaly_class", where)
            mask = row.get("mask_path")
            yield _Row(where, images, split, image, int(kind != "OK"), mask, kind, images.name, view_of=True)


# ------------------------------------------------------------------------------------------ meta.json


def meta_json(root: Path, log: ScanLog, images: Path | None = None) -> list[Sample]:
    """``meta.json`` of the ADer and AnomalyCLIP family: ``{train: {class: [...]}, test: {class: [...]}}``.

    ``root`` is the file, or the folder that holds it; paths in it are relative to that folder or to
    ``images``.
    """
    path = existing_root(root)
    if os.path.isdir(path):
        named = [one for one in files_in(path) if one.name.lower() == "meta.json"]
        if not named:
            raise DataError(f"{path / 'meta.json'}: no such file; found: {listing(path)}")
        path = named[0]
    base = existing_folder(images) if images is not None else path.parent
    samples: list[Sample] = []
    for word, classes in as_object(read_json(path), str(path)).items():
        if meaning(word).split:
            samples += _samples(_meta_rows(base, path, word, classes), log)
        else:
            log.skip(path, f"part {word!r} is neither train, calibration nor test")
    return samples


def looks_like_meta_json(root: Path) -> bool:
    """Whether it is such a file, or a folder that holds one."""
    return any(path.name.lower() == "meta.json" for path in ([root] if os.path.isfile(root) else files_in(root)))


def _meta_rows(base: Path, path: Path, word: str, classes: Any) -> Iterator[_Row]:
    for name, entries in as_object(classes, f"{path} {word}").items():
        for number, entry in enumerate(as_list(entries, f"{path} {word} {name}"), start=1):
            where = f"{path} {word} {name} row {number}"
            row = {"cls_name": name, **as_object(entry, where)}
            image, label = text_of(row, "img_path", where), label_of(row.get("anomaly"), where)
            kind, class_name = str(row.get("specie_name") or "anomaly"), text_of(row, "cls_name", where)
            yield _Row(where, base, meaning(word).split, image, label, row.get("mask_path"), kind, class_name)


# -------------------------------------------------------------------------------------- UniAD's lines


def uniad_json(root: Path, log: ScanLog, images: Path | None = None) -> list[Sample]:
    """UniAD's JSON lines: ``filename, label, label_name, clsname, maskname``, one object a line.

    ``root`` is a folder with ``train.json`` and ``test.json`` (also ``.jsonl``), or one such file. Paths
    are relative to ``images``, else to that folder, else to a folder inside it where the first file is
    found. Training images without a label are normal.
    """
    files = _uniad_files(existing_root(root))
    if not files:
        raise DataError(f"{root}: neither train.json nor test.json; found: {listing(Path(root))}")
    samples: list[Sample] = []
    for path, split in files:
        entries = list(read_json_lines(path))
        base = existing_folder(images) if images is not None else _uniad_base(path.parent, entries)
        samples += _samples((_uniad_row(base, entry, split, where) for where, entry in entries), log)
    return samples


def _uniad_row(base: Path, entry: dict[str, Any], split: str, where: str) -> _Row:
    label = label_of(entry.get("label"), where) if "label" in entry or split == TEST else 0
    name, image = str(entry.get("clsname") or ""), text_of(entry, "filename", where)
    return _Row(where, base, split, image, label, entry.get("maskname"), "", name)  # label_name only says defective


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
    files = [(path, names[path.name.lower()]) for path in files_in(root) if path.name.lower() in names]
    return sorted(files, key=lambda one: list(names).index(one[0].name.lower()))


def _uniad_base(folder: Path, entries: list[tuple[str, dict[str, Any]]]) -> Path:
    if not entries:
        return folder
    where, first = entries[0]
    name = text_of(first, "filename", where)
    places = (folder, *subfolders(folder))
    return next((base for base in places if os.path.isfile(inside(base, name, where))), folder)
