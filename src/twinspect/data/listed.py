"""Sets whose split is a list in a file: VisA, Real-IAD, ADer's ``meta.json``, UniAD's JSON lines, Lookout for Vision.

And folder settings of anomalib. A row that names a missing file is skipped and reported; one that points outside the
data folder is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from twinspect.data.manifest import read_rows
from twinspect.data.names import BAD, GOOD, meaning
from twinspect.data.samples import Place, match
from twinspect.data.scan import Folder, ScanLog, folder_name
from twinspect.data.tables import Row, as_object, objects_of, read_json, read_json_lines, table_rows
from twinspect.errors import DataError
from twinspect.files import read_text
from twinspect.types import TEST, TRAIN, Sample

_REAL_IAD_LISTS = "realiad_jsons"
_REAL_IAD_IMAGES = ("realiad_1024", "realiad_512", "realiad_raw", "realiad_256")
_LOOKOUT_LABEL = "groundtruth/image-classification"
_ANOMALIB = {"normal_dir": (TRAIN, 0), "normal_test_dir": (TEST, 0), "abnormal_dir": (TEST, 1)}  # split and label
_HEAD = 1 << 16  # bytes of a file that say what it is


def _contains(path: Path, text: bytes) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return text in file.read(_HEAD)
    return False


def find_visa(root: Folder) -> list[Path]:
    """The list ``split_csv/1cls.csv``."""
    table = root.path / "split_csv" / "1cls.csv"
    return [table] if os.path.isfile(table) else []


def visa(path: Path, log: ScanLog, images: Path | None) -> list[Sample]:
    """VisA as it is published. A converted tree (``1cls/<class>/train/good``) has the layout ``mvtec-ad``."""
    return read_rows(path, table_rows(path), log, images or path.parent.parent, partly=True)


def find_real_iad(root: Folder) -> list[Path]:
    """The lists in ``realiad_jsons``, one for each class."""
    folder = next((sub for sub in root.folders if sub.name.startswith(_REAL_IAD_LISTS)), None)
    places = [folder, *folder.folders] if folder is not None else []  # unpacked, it often holds a folder of its name
    lists = ([path for path in place.files if path.suffix.lower() == ".json"] for place in places)
    return next((paths for paths in lists if paths), [])


def real_iad(path: Path, log: ScanLog, images: Path | None) -> list[Sample]:
    """A class of Real-IAD: ``realiad_jsons/<class>.json``, images in ``realiad_{1024,512,raw,256}/<class>`` or
    beside it.

    Five views of each object share a ``group`` (class and object folder), for scores per object. If images
    are there in several sizes the first of 1024, 512, raw, 256 is read.
    """
    root = images or next(place for place in path.parents if not place.name.startswith(_REAL_IAD_LISTS))
    sizes = [root / name for name in _REAL_IAD_IMAGES if os.path.isdir(root / name)]
    for other in sizes[1:]:
        log.skip(other, f"the same images in another size; {sizes[0].name} is read")
    pictures = (sizes[0] if sizes else root) / path.stem
    if not os.path.isdir(pictures):
        log.skip(path, "list of a class without image folder")
        return []
    return read_rows(path, list(_real_iad_rows(path)), log, pictures, partly=True)


def _real_iad_rows(path: Path) -> Iterator[tuple[str, Row]]:
    lists = as_object(read_json(path), str(path))
    for split in (TRAIN, TEST):
        for where, entry in objects_of(lists.get(split), f"{path} {split}"):
            image = str(entry.get("image_path") or "").replace("\\", "/")
            kind = entry.get("anomaly_class")
            if not isinstance(kind, str) or not kind.strip():
                raise DataError(f"{where}: anomaly_class is {kind!r}; OK or a kind of defect is needed")
            row = {"image": image, "split": split, "label": int(kind != "OK"), "defect_type": kind}
            row |= {"mask": entry.get("mask_path"), "group": f"{path.stem}/{PurePosixPath(image).parent}"}
            yield where, row


def find_meta_json(place: Folder) -> list[Path]:
    """The file called ``meta.json``."""
    return [path for path in place.files if path.name.lower() == "meta.json"]


def meta_json(path: Path, log: ScanLog, images: Path | None) -> list[Sample]:
    """``meta.json`` of the ADer and AnomalyCLIP family: ``{train: {class: [...]}, test: {class: [...]}}``.

    Paths in it are relative to its folder or to ``images``.
    """
    return read_rows(path, list(_meta_rows(path, log)), log, images or path.parent, partly=True)


def _meta_rows(path: Path, log: ScanLog) -> Iterator[tuple[str, Row]]:
    for word, classes in as_object(read_json(path), str(path)).items():
        split = meaning(word).split
        if not split:
            log.skip(path, f"part {word!r} is neither train, calibration nor test")
            continue
        for name, entries in as_object(classes, f"{path} {word}").items():
            for where, entry in objects_of(entries, f"{path} {word} {name}"):
                row = {"image": entry.get("img_path"), "split": split, "class_name": entry.get("cls_name") or name}
                row |= {"label": entry.get("anomaly"), "mask": entry.get("mask_path")}
                yield where, {**row, "defect_type": entry.get("specie_name") or "anomaly"}


def find_uniad_json(place: Folder) -> list[Path]:
    """A file of such lines, or ``train.json`` and ``test.json`` (also ``.jsonl``) of a folder with one."""
    files = [path for path in place.files if path.suffix.lower() in (".json", ".jsonl")]
    if not place.is_file:
        files = [path for path in files if path.stem.lower() in (TRAIN, TEST)]
    lines = any(_contains(path, b'"filename"') for path in files)
    return sorted(files, key=lambda path: path.stem.lower() != TRAIN) if lines else []


def uniad_json(path: Path, log: ScanLog, images: Path | None) -> list[Sample]:
    """UniAD's JSON lines: ``filename, label, label_name, clsname, maskname``, one object a line.

    Paths are relative to ``images``, else to the file's folder, else to a folder inside it where the first file is
    found. Training images without a label are normal.
    """
    split = meaning(path.stem).split or TEST
    rows = []
    for where, entry in read_json_lines(path):
        image = str(entry.get("filename") or "").replace("\\", "/")
        row = {"image": image, "split": split, "class_name": entry.get("clsname") or image.split("/")[0]}
        row |= {"label": entry.get("label", None if split == TEST else 0), "mask": entry.get("maskname")}
        rows.append((where, {**row, "defect_type": PurePosixPath(image).parent.name}))
    return read_rows(path, rows, log, images, partly=True)


def find_lookout(place: Folder) -> list[Path]:
    """Manifests with ``source-ref``."""
    endings = (".manifest", ".jsonl", ".json")
    return [path for path in place.files if path.suffix.lower() in endings and _contains(path, b'"source-ref"')]


def lookout(path: Path, log: ScanLog, images: Path | None) -> list[Sample]:
    """A manifest of Amazon Lookout for Vision: one JSON object a line, with ``source-ref`` and an image label.

    The images must lie on this disk, in ``images`` or beside the manifest: of an address ``s3://bucket/a/b.png`` the
    longest end that is there, the same for all. A manifest whose name says no split gives good images to training and
    anomalies to the test.
    """
    lines, base = list(read_json_lines(path)), images or path.parent
    addresses = [_address_parts(str(entry.get("source-ref") or "")) for _, entry in lines]
    depth = len(addresses[0]) if addresses else 0
    dropped = next((n for n in range(depth) if os.path.isfile(base.joinpath(*addresses[0][n:]))), depth - 1)
    if any(name.endswith("-mask-ref") for _, entry in lines for name in entry):
        log.note(f"{path.name}: masks are not read, as their background is white; image metrics only")
    rows = []
    for parts, (where, entry) in zip(addresses, lines, strict=True):
        label = _lookout_label(entry, where)
        split = meaning(path.stem).split or (TEST if label else TRAIN)
        row = {"image": "/".join(parts[dropped:]) or ".", "split": split, "label": label, "defect_type": "anomaly"}
        rows.append((where, row))
    return read_rows(path, rows, log, base, partly=True)


def _address_parts(address: str) -> list[str]:
    """The parts of an address without its scheme; none of them leads upwards."""
    parts = PurePosixPath(address.partition("://")[2] or address).parts
    return [part for part in parts if part not in ("..", "/")]


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


def find_anomalib(place: Folder) -> list[Path]:
    """YAML files with anomalib's folder settings."""
    return [path for path in place.files if path.suffix.lower() in (".yaml", ".yml") and _settings(path)]


def anomalib(path: Path, log: ScanLog, images: Path | None) -> list[Sample]:
    """Settings of anomalib's ``Folder`` data: ``normal_dir``, ``abnormal_dir``, ``normal_test_dir``, ``mask_dir``.

    One YAML file is one class. Its settings say which images are good, whatever the folders are called. The folder
    that they call ``root`` is looked for beside the file and where the command runs; ``images`` replaces it.
    """
    settings = _settings(path)
    if not settings:
        raise DataError(f"{path}: no normal_dir in it, which anomalib's folder settings have")
    text = str(settings.get("root") or settings.get("path") or ".")
    roots = (path.parent / text, Path.cwd() / text)
    base = images or next((place for place in roots if os.path.isdir(place)), None)
    if base is None:
        raise DataError(f"{path}: root {text!r} is not beside this file nor in {Path.cwd()}; give --images DIR")
    places: dict[str, list[Place]] = {"mask_dir": [], **{key: [] for key in _ANOMALIB}}
    for key, files in places.items():
        value = settings.get(key) or []
        for text in value if isinstance(value, list) else [value]:
            folder = Folder(base / str(text))
            if folder.is_file or folder.problem:
                raise DataError(f"{path}: {key} {text!r}: no such folder below {base}")
            for here in folder.walk(log):
                above = (folder.name, *here.path.relative_to(folder.path).parts)
                files += [Place(image, above) for image in here.images]
    masks = match([places["abnormal_dir"]], places["mask_dir"], log)
    name = str(settings.get("name") or folder_name(base))
    return [
        Sample(image, split, name, label, above[-1] if label else "", masks.get(image, ()))
        for key, (split, label) in _ANOMALIB.items()
        for image, above in places[key]
    ]


def _settings(path: Path) -> dict[str, Any]:
    """The mapping that holds ``normal_dir``, at whatever depth, or an empty one; a DataError where it is no YAML."""
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
