"""Sets whose split is a list in a file: VisA, Real-IAD, ADer's ``meta.json``, UniAD's JSON lines, Lookout for Vision.

And folder settings of anomalib. A row that names a missing file is skipped and reported; one that points outside the
data folder is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from twinspect.data.folders import MVTEC_AD, find_classes, read_folders, shape_of
from twinspect.data.names import BAD, GOOD, meaning
from twinspect.data.scan import (
    ScanLog,
    existing_folder,
    existing_root,
    files_in,
    folder_name,
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
from twinspect.files import read_text
from twinspect.types import TEST, TRAIN, Sample

VISA = tuple("candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum".split())
VISA_COLUMNS = ("object", "split", "label", "image", "mask")
REAL_IAD_FOLDERS = ("realiad_1024", "realiad_512", "realiad_raw", "realiad_256")
_LOOKOUT_LABEL = "groundtruth/image-classification"
_HEAD = 1 << 16  # bytes of a file that say what it is


def holds(is_list: Callable[[Path], bool], root: Path) -> bool:
    """Whether it is a list of a kind, or a folder with one."""
    return bool(_lists(root, is_list))


def _lists(root: Path, is_list: Callable[[Path], bool], needed: str = "") -> list[Path]:
    """The file itself, or those of a folder, that are lists of a kind; without any an error says what is needed."""
    paths = [path for path in (files_in(root) if os.path.isdir(root) else [root]) if is_list(path)]
    if needed and not paths:
        raise DataError(f"{root}: {needed}; found: {listing(root)}")
    return paths


def _contains(path: Path, text: bytes) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return text in file.read(_HEAD)
    return False


def _listed(
    log: ScanLog,
    where: str,
    base: Path,
    image: str,
    split: str,
    label: int | None,
    mask: Any = None,
    kind: str = "anomaly",
    class_name: str = "",
) -> list[Sample]:
    """The sample of a row; none if its image is missing.

    Args:
        log: takes what is missing.
        where: file and row, for messages.
        base: folder that paths are relative to.
        image: its path.
        split: of the image.
        label: of the image.
        mask: path of a mask, or of a folder of masks; anything that is no text says that there is none.
        kind: of defect; empty takes the name of the image's folder.
        class_name: empty takes the first folder of the image's path.
    """
    masks: tuple[Path, ...] = ()
    if label == 1 and isinstance(mask, str) and mask.strip():
        path = inside(base, mask, where)
        masks = tuple(images_below(path, log)) if os.path.isdir(path) else tuple(_present([path], log))
    return [
        Sample(
            path,
            split,
            class_name or _below(path, base).parts[0],
            label,
            (kind or path.parent.name) if label == 1 else "",
            masks,
        )
        for path in _present([inside(base, image, where)], log)
    ]


def _present(paths: list[Path], log: ScanLog) -> Iterator[Path]:
    for path in paths:
        if os.path.isfile(path):
            yield path
        else:
            log.skip(path, "listed, but there is no such file")


def _below(path: Path, base: Path) -> Path:
    return path.relative_to(base) if path.is_relative_to(base) else path


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
    samples = []
    for number, row in enumerate(rows, 1):
        where = f"{table} row {number}"
        label, split = label_of(text_of(row, "label", where), where), split_of(row["split"], where)
        name, image = text_of(row, "object", where), text_of(row, "image", where)
        samples += _listed(log, where, root, image, split, label, row["mask"], class_name=name)
    return samples


def looks_like_visa(root: Path) -> bool:
    """Whether a folder is VisA: by its split files, or by class names of a converted tree."""
    if not os.path.isdir(root):
        return False
    if os.path.isdir(root / "split_csv") or os.path.isdir(root / "visa_pytorch"):
        return True
    classes = find_classes(_visa_place(root), ScanLog())
    return bool(classes) and all(product.name in VISA and shape_of(product) == MVTEC_AD for product in classes)


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
            samples += _real_iad_class(images / path.stem, path, log)
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


def _real_iad_class(images: Path, path: Path, log: ScanLog) -> Iterator[Sample]:
    lists = as_object(read_json(path), str(path))
    for split in (TRAIN, TEST):
        for number, entry in enumerate(as_list(lists.get(split), f"{path} {split}"), start=1):
            where = f"{path} {split} row {number}"
            row = as_object(entry, where)
            image, kind = text_of(row, "image_path", where), text_of(row, "anomaly_class", where)
            mask, label = row.get("mask_path"), int(kind != "OK")
            for sample in _listed(log, where, images, image, split, label, mask, kind, images.name):
                view_of = _below(sample.image, images).parent.as_posix()
                yield replace(sample, group=f"{images.name}/{view_of}")


# ------------------------------------------------------------------------------------------ meta.json


def is_meta_json(path: Path) -> bool:
    """Whether it is a file called ``meta.json``."""
    return path.name.lower() == "meta.json"


def meta_json(root: Path, log: ScanLog, images: Path | None = None) -> list[Sample]:
    """``meta.json`` of the ADer and AnomalyCLIP family: ``{train: {class: [...]}, test: {class: [...]}}``.

    ``root`` is the file, or the folder that holds it; paths in it are relative to that folder or to
    ``images``.
    """
    path = existing_root(root)
    if os.path.isdir(path):
        path = _lists(path, is_meta_json, "no meta.json in it")[0]
    base = existing_folder(images) if images is not None else path.parent
    samples: list[Sample] = []
    for word, classes in as_object(read_json(path), str(path)).items():
        split = meaning(word).split
        if not split:
            log.skip(path, f"part {word!r} is neither train, calibration nor test")
            continue
        for name, entries in as_object(classes, f"{path} {word}").items():
            for number, entry in enumerate(as_list(entries, f"{path} {word} {name}"), start=1):
                where = f"{path} {word} {name} row {number}"
                row = {"cls_name": name, **as_object(entry, where)}
                image, label = text_of(row, "img_path", where), label_of(row.get("anomaly"), where)
                kind, class_name = str(row.get("specie_name") or "anomaly"), text_of(row, "cls_name", where)
                samples += _listed(log, where, base, image, split, label, row.get("mask_path"), kind, class_name)
    return samples


# -------------------------------------------------------------------------------------- UniAD's lines


def is_uniad(path: Path) -> bool:
    """Whether it is a file of such lines: also where a line of it cannot be read."""
    if path.suffix.lower() not in (".json", ".jsonl"):
        return False
    try:
        first = next(read_json_lines(path), None)
    except DataError:
        return _contains(path, b'"filename"')
    return first is not None and "filename" in first[1]


def uniad_json(root: Path, log: ScanLog, images: Path | None = None) -> list[Sample]:
    """UniAD's JSON lines: ``filename, label, label_name, clsname, maskname``, one object a line.

    ``root`` is a folder with ``train.json`` and ``test.json`` (also ``.jsonl``), or one such file. Paths
    are relative to ``images``, else to that folder, else to a folder inside it where the first file is
    found. Training images without a label are normal.
    """
    samples: list[Sample] = []
    for path in _uniad_files(existing_root(root), "neither train.json nor test.json"):
        split, entries = meaning(path.stem).split or TEST, list(read_json_lines(path))
        base = existing_folder(images) if images is not None else _uniad_base(path.parent, entries)
        for where, entry in entries:
            label = label_of(entry.get("label"), where) if "label" in entry or split == TEST else 0
            image, name, kind = text_of(entry, "filename", where), str(entry.get("clsname") or ""), ""
            samples += _listed(log, where, base, image, split, label, entry.get("maskname"), kind, name)
    return samples


def looks_like_uniad(root: Path) -> bool:
    """Whether it is a file of such lines, or a folder with one."""
    return any(map(is_uniad, _uniad_files(root)))


def _uniad_files(root: Path, needed: str = "") -> list[Path]:
    if os.path.isfile(root):
        return [root]
    names = [f"{split}{suffix}" for split in (TRAIN, TEST) for suffix in (".json", ".jsonl")]
    files = _lists(root, lambda path: path.name.lower() in names, needed)
    return sorted(files, key=lambda path: names.index(path.name.lower()))


def _uniad_base(folder: Path, entries: list[tuple[str, dict[str, Any]]]) -> Path:
    if not entries:
        return folder
    where, first = entries[0]
    name = text_of(first, "filename", where)
    places = (folder, *subfolders(folder))
    return next((base for base in places if os.path.isfile(inside(base, name, where))), folder)


# ----------------------------------------------------------------------------------- Lookout for Vision


def is_lookout(path: Path) -> bool:
    """Whether it is such a manifest."""
    return path.suffix.lower() in (".manifest", ".jsonl", ".json") and _contains(path, b'"source-ref"')


def lookout(root: Path, log: ScanLog, images: Path | None = None) -> list[Sample]:
    """Manifests of Amazon Lookout for Vision: one JSON object a line, with ``source-ref`` and an image label.

    ``root`` is a manifest, or a folder of them (``train.manifest``, ``test.manifest``). The images must lie on this
    disk, in ``images`` or beside the manifest: of an address ``s3://bucket/a/b.png`` the longest end that is there,
    the same for all. A manifest whose name says no split gives good images to training and anomalies to the test.
    """
    paths = _lists(existing_root(root), is_lookout, "no manifest with source-ref")
    return [sample for path in paths for sample in _lookout_lines(path, log, images)]


def _lookout_lines(path: Path, log: ScanLog, images: Path | None) -> list[Sample]:
    lines, samples = list(read_json_lines(path)), list[Sample]()
    keys = [_key(text_of(entry, "source-ref", where)) for where, entry in lines]
    base = existing_folder(images) if images is not None else path.parent
    depth = len(keys[0].parts)
    dropped = next((n for n in range(depth) if os.path.isfile(base.joinpath(*keys[0].parts[n:]))), depth - 1)
    if any(name.endswith("-mask-ref") for _, entry in lines for name in entry):
        log.note(f"{path.name}: masks are not read, as their background is white; image metrics only")
    for key, (where, entry) in zip(keys, lines, strict=True):
        label = _lookout_label(entry, where)
        split = meaning(path.stem).split or (TEST if label else TRAIN)
        image = PurePosixPath(*key.parts[dropped:]).as_posix()
        samples += _listed(log, where, base, image, split, label, class_name=folder_name(base))
    return samples


def _key(address: str) -> PurePosixPath:
    """The parts of an address without its scheme; none of them leads upwards."""
    parts = PurePosixPath(address.partition("://")[2] or address).parts
    return PurePosixPath(*(part for part in parts if part not in ("..", "/")))


def _lookout_label(entry: dict[str, Any], where: str) -> int | None:
    """By the class name, as numbers differ between labelling jobs; None where nobody has judged the image."""
    for name, value in entry.items():
        if name.endswith("-metadata") and as_object(value, where).get("type") == _LOOKOUT_LABEL:
            class_name = str(value.get("class-name", ""))
            role = meaning(class_name).role
            if role not in (GOOD, BAD):
                raise DataError(f"{where}: class-name {class_name!r}; accepted: normal, anomaly")
            return int(role == BAD)
    return None


# ------------------------------------------------------------------------------------------- anomalib


def is_anomalib(path: Path) -> bool:
    """Whether it is a YAML file with anomalib's folder settings."""
    return path.suffix.lower() in (".yaml", ".yml") and bool(_settings(path))


def anomalib(root: Path, log: ScanLog, images: Path | None = None) -> list[Sample]:
    """Settings of anomalib's ``Folder`` data: ``normal_dir``, ``abnormal_dir``, ``normal_test_dir``, ``mask_dir``.

    ``root`` is a YAML file, or a folder of such files: one class a file, all for one model. The folder that the
    settings call ``root`` is looked for beside the file and where the command runs; ``images`` replaces it. Masks go
    with the images of ``abnormal_dir`` in the order of their names, and must carry those names.
    """
    paths = _lists(existing_root(root), is_anomalib, "no YAML file with normal_dir")
    return [sample for path in paths for sample in _anomalib_class(path, _settings(path), log, images)]


def _settings(path: Path) -> dict[str, Any]:
    """The mapping that holds ``normal_dir``, at whatever depth; empty where there is none.

    Raises:
        DataError: it should be there, but the file is not YAML.
    """
    import yaml

    if not _contains(path, b"normal_dir"):
        return {}
    try:
        waiting = [yaml.safe_load(read_text(path))]
    except yaml.YAMLError as error:
        raise DataError(f"{path}: cannot be read as YAML ({error})") from None
    while waiting:
        mapping = waiting.pop()
        if isinstance(mapping, dict):
            if "normal_dir" in mapping:
                return mapping
            waiting += mapping.values()
    return {}


def _anomalib_class(path: Path, settings: dict[str, Any], log: ScanLog, images: Path | None) -> list[Sample]:
    base = existing_folder(images) if images is not None else _anomalib_root(path, settings)
    name = str(settings.get("name") or folder_name(base))
    samples, defects = list[Sample](), list[Sample]()
    for key, split, label in (("normal_dir", TRAIN, 0), ("normal_test_dir", TEST, 0), ("abnormal_dir", TEST, 1)):
        for folder in _folders(path, base, settings, key):
            kind = folder.name if label else ""
            part = [Sample(image, split, name, label, kind) for image in images_below(folder, log)]
            (defects if label else samples).extend(part)
    masks = [mask for folder in _folders(path, base, settings, "mask_dir") for mask in images_below(folder, log)]
    return samples + (_with_masks(path, defects, masks) if masks else defects)


def _anomalib_root(path: Path, settings: dict[str, Any]) -> Path:
    text = str(settings.get("root") or settings.get("path") or ".")
    root = next((place / text for place in (path.parent, Path.cwd()) if os.path.isdir(place / text)), None)
    if root is None:
        raise DataError(
            f"{path}: root {text!r} is neither beside this file nor in {Path.cwd()}; name it with --images DIR"
        )
    return root


def _folders(path: Path, base: Path, settings: dict[str, Any], key: str) -> Iterator[Path]:
    value = settings.get(key) or []
    for text in value if isinstance(value, list) else [value]:
        folder = base / str(text)
        if not os.path.isdir(folder):
            raise DataError(f"{path}: {key} {text!r}: no such folder below {base}")
        yield folder


def _with_masks(path: Path, defects: list[Sample], masks: list[Path]) -> list[Sample]:
    """Every defect with its mask, paired as anomalib does."""
    pairs = list(zip(defects, masks, strict=False))
    wrong = [
        f"; {mask.name} would go with {s.image.name}" for s, mask in pairs if not mask.stem.startswith(s.image.stem)
    ]
    if wrong or len(masks) != len(defects):
        raise DataError(
            f"{path}: {len(defects)} images in abnormal_dir and {len(masks)} masks in mask_dir do not pair by "
            f"name{''.join(wrong[:1])}. Every mask is named like its image"
        )
    return [replace(sample, masks=(mask,)) for sample, mask in pairs]
