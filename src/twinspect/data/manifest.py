"""Lists of images: our own manifest, which every layout can be written as, and those of other tools and benchmarks.

Columns: ``image`` (required), ``split``, ``class_name``, ``label`` (0, 1 or empty), ``defect_type``, ``mask`` (a
list, or ``;`` between paths), ``group``, ``record`` (position inside a container file). Paths are relative to the
table's folder, or to the folder given when reading. Headers and labels are read as people write them (``_ALIASES``,
`names.meaning`).

The lists of VisA, Real-IAD, ADer's ``meta.json``, UniAD and Lookout for Vision are turned into such rows. There, a
row that names a missing file is skipped and reported; one that points outside the data folder is always an error.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from twinspect.data.names import BAD, GOOD, MASK, UNSORTED, key, meaning, meaning_of_file, role_of
from twinspect.data.samples import marks_a_defect
from twinspect.data.scan import Folder, ScanLog, first_lines, folder_name, inside, relative_to_root
from twinspect.data.tables import (
    SUFFIXES,
    Row,
    as_object,
    is_empty,
    objects_of,
    read_json,
    read_json_lines,
    table_columns,
    table_rows,
)
from twinspect.errors import DataError
from twinspect.files import replacing
from twinspect.types import CALIBRATION, TEST, TRAIN, Sample

COLUMNS = ("image", "split", "class_name", "label", "defect_type", "mask", "group", "record")
NAMES = ("manifest.parquet", "manifest.csv")
# Headers that other tools' tables have for the same things, as `names.key` spells them, the best first.
_ALIASES = {
    "image": "image imagepath imgpath filepath path img imagefile imagefilename imagename filename file picture "
    "photo bild datei dateiname pfad",
    "split": "split subset set partition",
    "class_name": "classname clsname class cls object objectname product category",
    "label": "label labels labelindex target isanomaly anomaly anomalous",
    "defect_type": "defecttype defect anomalytype anomalyclass speciename defectclass",
    "mask": "mask maskpath maskfile maskname masks gt groundtruth",
    "group": "group session",
    "record": "record",
}
PREDICTED = {"score", "model_id"}  # columns of a table that `twinspect predict` has written
_REAL_IAD_LISTS = "realiad_jsons"
_REAL_IAD_IMAGES = ("realiad_1024", "realiad_512", "realiad_raw", "realiad_256")
_LOOKOUT_LABEL = "groundtruth/image-classification"
_HEAD = 1 << 16  # bytes of a file that say what it is
_NUMBERS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}


def find_manifests(place: Folder) -> list[Path]:
    """The manifest of a folder; a file, if it is a table with an image column."""
    if not place.is_file:
        return [path for name in NAMES for path in place.files if path.name.lower() == name][:1]
    suffix = place.path.suffix.lower()
    is_table = suffix in (".parquet", ".csv") or (suffix in SUFFIXES and path_column(table_columns(place.path)))
    return [place.path] if is_table else []


def manifest(path: Path, log: ScanLog, images: Path | None) -> list[Sample]:
    """Samples of one table; each row must name a file that is there."""
    return read_rows(path, table_rows(path), log, images, partly=False)


def path_column(names: Iterable[str]) -> str:
    """The column that holds the paths of images, in one of the spellings that are read; empty if there is none."""
    return _columns(names).get("image", "")


def read_rows(
    path: Path, rows: Sequence[tuple[str, Row]], log: ScanLog, base: Path | None, partly: bool = True
) -> list[Sample]:
    """Samples of the ``rows`` of a list, which come with their places for messages.

    Paths are relative to ``base``; if that is None, to the list's own folder, or to one in it that has the first. A
    row that cannot be used is a DataError. Of benchmarks (``partly``) images may be missing; they are logged.
    """
    if not rows:
        return []
    base = base or _base(path.parent, rows[0][1])
    reader = _RowReader(path, [row for _, row in rows], base, partly)
    samples: list[Sample] = []
    problems: list[str] = []
    for where, row in rows:
        try:
            sample, missing = reader.sample(row, where)
        except DataError as error:
            problems.append(str(error))
            continue
        if missing and not partly:
            problems.append(f"{where}: no such file: {', '.join(missing)}")
        for file in missing.values():
            log.skip(file, "listed, but there is no such file")
        if sample.image not in missing.values():
            samples.append(sample)
    if problems:
        hint = f" Paths are taken relative to {base}; if the images are elsewhere, name their folder (--images DIR)."
        raise DataError(
            f"{path}: {len(problems):,} of {len(rows):,} rows cannot be used.{'' if partly else hint}"
            f"{first_lines(problems)}"
        )
    for note in () if partly else reader.notes():
        log.note(f"{path.name}: {note}")
    return samples


def write_manifest(samples: Iterable[Sample], path: Path, root: Path) -> int:
    """Write samples to ``.parquet`` or ``.csv`` with paths relative to ``root``; how many rows were written.

    A DataError where a table cannot hold a name. If it does not lie in ``root``, name that folder when reading it.
    """
    suffix = path.suffix.lower()
    if suffix not in (".parquet", ".csv"):
        raise DataError(f"{path}: a manifest ends in .parquet or .csv; type {path.with_suffix('.parquet')}")
    rows: list[Row] = [
        {
            **{name: getattr(sample, name) for name in COLUMNS if name != "mask"},
            "image": relative_to_root(sample.image, root),
            "mask": [relative_to_root(mask, root) for mask in sample.masks],
        }
        for sample in samples
    ]
    content = _table_bytes(rows, suffix)
    with replacing(path) as file:
        file.write(content)
    return len(rows)


def _table_bytes(rows: list[Row], suffix: str) -> bytes:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    kinds = {"label": pa.int8(), "record": pa.int64(), "mask": pa.list_(pa.string())}
    if suffix == ".csv":
        kinds["mask"] = pa.string()
        if other := next((row["image"] for row in rows if any(";" in mask for mask in row["mask"])), None):
            raise DataError(f"{other}: a mask's name holds ';', which separates masks in CSV; write Parquet")
        rows = [{**row, "mask": ";".join(row["mask"])} for row in rows]
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    try:
        table = pa.Table.from_pylist(rows, schema=schema)
    except UnicodeEncodeError as error:  # bytes of an old system
        name = error.object.encode("utf-8", "backslashreplace").decode()
        raise DataError(
            f"{name}: not UTF-8, and a manifest cannot hold it. Rename such files, for example with: convmv -f "
            "latin1 -t utf8 -r --notest DIR"
        ) from None
    stream = io.BytesIO()
    (pq.write_table if suffix == ".parquet" else pyarrow.csv.write_csv)(table, stream)
    return stream.getvalue()


# -------------------------------------------------------------------------------------------- columns


def _columns(header: Iterable[str]) -> dict[str, str]:
    """Our name of a column -> the table's, for those that are there."""
    by_key = {key(name): name for name in reversed(list(header))}
    ranked = ((ours, alias) for ours, aliases in _ALIASES.items() for alias in reversed(aliases.split()))
    return {ours: by_key[alias] for ours, alias in ranked if alias in by_key}  # the best comes last, and stays


def _judging_column(rows: Sequence[Row], names: Mapping[str, str]) -> str:
    """Without a column called label: one whose name or whose every cell says good or bad, or kinds of defects."""
    known = {name for ours, name in names.items() if ours != "class_name"}
    free = [name for name in rows[0] if name and name not in known]
    for name in free:
        meant = meaning(name)
        if meant.role in (GOOD, BAD) and (meant.plain or meant.rest in ("", "is")):
            return name
    for name in free:
        roles = {meaning(str(row.get(name))).role for row in rows if not is_empty(row.get(name))}
        if roles & {GOOD, BAD} and roles <= {GOOD, BAD, UNSORTED}:
            return name
    return names.get("defect_type", "")


def _base(folder: Path, first: Row) -> Path:
    """The folder that paths are relative to: the table's, or one in it, where the first image is."""
    text = str(first.get(path_column(first)) or "").partition("#")[0]
    if PREDICTED <= set(first) and os.path.isfile(text):
        return Path(Path(text).anchor or ".")  # predictions name images as they were found from where they were made
    for place in (folder, *(sub.path for sub in Folder(folder).folders)):
        try:
            if os.path.isfile(inside(place, text, "")):
                return place
        except DataError:
            break
    return folder


# ----------------------------------------------------------------------------------------------- rows


class _RowReader:
    """Rows of one table as samples. Which column says what images are good is found once, for all rows."""

    def __init__(self, path: Path, rows: list[Row], base: Path, benchmark: bool) -> None:
        self._base, self._class_name = base, folder_name(base)
        self._columns = [name for name in rows[0] if name]
        names = _columns(self._columns)
        if "image" not in names:
            raise DataError(
                f"{path}: columns {', '.join(rows[0])}; a column image (paths) is needed, beside it may stand "
                f"{', '.join(COLUMNS[1:])}"
            )
        self._predicted = PREDICTED <= set(rows[0])
        if self._predicted:  # what a model has said is no label, and its masks are no ground truth
            names = {ours: name for ours, name in names.items() if ours in ("image", "split") or name == "label"}
        self._names = names
        self._judge = names.get("label", "") or ("" if self._predicted else _judging_column(rows, names))
        if self._judge and self._judge == names.get("class_name"):
            del names["class_name"]
        texts = [str(row.get(self._judge)) for row in rows if not is_empty(row.get(self._judge))]
        self._labelled = bool(texts)
        # Where one label says good, any other word names a kind of defect; in a benchmark it is a mistake.
        good = any(meaning(text).role == GOOD for text in texts)
        self._kinds = not benchmark and (good or self._judge == names.get("defect_type"))

    def notes(self) -> Iterator[str]:
        """What was made of the table."""
        if self._predicted:
            yield "a table of predictions; what a model has answered is no label"
            return
        if self._judge and self._judge != self._names.get("label"):
            yield f"column {self._judge!r} says which images are good"
        other = [name for name in self._columns if name not in (*self._names.values(), self._judge)]
        if other:
            yield f"columns not used: {', '.join(other)}"

    def sample(self, row: Row, where: str) -> tuple[Sample, dict[str, Path]]:
        """One row, or a DataError whose words begin with ``where``; and its files that are missing, by name."""
        text, record = self._text(row, "image"), row.get(self._names.get("record", ""))
        if self._predicted:
            text, _, record = text.partition("#")
        image = inside(self._base, text, where)
        missing = {} if os.path.isfile(image) else {text: image}
        masks: list[Path] = []
        for name in _mask_names(row.get(self._names.get("mask", ""))):
            file = inside(self._base, name, where)
            if os.path.isfile(file):
                masks.append(file)
            elif os.path.isdir(file):  # several masks of one image
                masks += Folder(file).images_below(ScanLog())
            else:
                missing[name] = file
        word = self._text(row, "split")
        split = meaning(word).split if word else TEST if self._predicted else ""
        if word and not split:
            raise DataError(f"{where}: split is {word!r}; accepted: {TRAIN}, {CALIBRATION} (or validation), {TEST}")
        if self._judge:
            label, kind = self._judged(row.get(self._judge), where)
        else:
            label, kind = self._label_of_files(image, masks, split, where), ""
        if not split:
            split = TEST if label == 1 or (label is None and self._labelled) else TRAIN
        sample = Sample(
            image=image,
            split=split,
            class_name=self._text(row, "class_name") or self._class_name,
            label=label,
            defect_type=(self._text(row, "defect_type") or kind) if label != 0 else "",
            masks=tuple(masks),
            group=self._text(row, "group"),
            record=record_number(record, where),
        )
        return sample, missing

    def _text(self, row: Row, ours: str) -> str:
        cell = row.get(self._names.get(ours, ""))
        if cell is None or cell != cell or (ours in ("split", "defect_type", "group") and is_empty(cell)):
            return ""
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)  # whole numbers become floats where cells of their column are empty
        return str(cell).strip()

    def _judged(self, cell: Any, where: str) -> tuple[int | None, str]:
        """Label by a cell of the column that judges, and the kind of defect if the cell names one."""
        if is_empty(cell):
            return (0 if self._judge == self._names.get("defect_type") else None), ""
        text = str(cell).strip()
        role, number = meaning(text).role, _NUMBERS.get(text.lower())
        if number is not None:
            return (1 - number if meaning(self._judge).role == GOOD else number), ""  # 0 in a column called is_good
        if role in (GOOD, UNSORTED):
            return (0 if role == GOOD else None), ""
        if role == BAD or self._kinds:
            return 1, text
        raise DataError(f"{where}: label is {cell!r}; accepted: 0 or OK (normal), 1 or NG (anomaly), empty (unknown)")

    def _label_of_files(self, image: Path, masks: Sequence[Path], split: str, where: str) -> int | None:
        """Label of an image of a table that does not judge: by its masks, else by names of folders and its own."""
        if masks:
            return int(marks_a_defect(masks) is not False)
        folders = image.parent.relative_to(self._base).parts if image.is_relative_to(self._base) else ()
        if self._predicted:
            folders = folders[-2:]  # further up, they are those of projects and disks: /scratch
        role = role_of(folders) or meaning_of_file(image.name).role
        if role == MASK:
            raise DataError(f"{where}: {image} is a mask by its name, and is listed as an image")
        return {GOOD: 0, BAD: 1, UNSORTED: None, "": 0 if split != TEST else None}[role]


def record_number(cell: Any, where: str) -> int | None:
    """Position in a container file that a cell names, also as a float; None where it is empty."""
    if is_empty(cell):
        return None
    text = str(cell).strip().removesuffix(".0")
    if not text.isdecimal():
        raise DataError(f"{where}: record is {cell!r}; a whole number from 0, or empty")
    return int(text)


def _mask_names(cell: Any) -> list[str]:
    if isinstance(cell, str):
        cell = cell.split(";")
    parts = cell if isinstance(cell, (list, tuple)) else [] if is_empty(cell) else [cell]
    return [str(part).strip() for part in parts if not is_empty(part)]


# -------------------------------------------------------------------------------- lists of benchmarks


def visa(path: Path, log: ScanLog, images: Path | None) -> list[Sample]:
    """VisA as it is published. A converted tree (``1cls/<class>/train/good``) has the layout ``mvtec-ad``."""
    return read_rows(path, table_rows(path), log, images or path.parent.parent)


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
    lists, rows = as_object(read_json(path), str(path)), []
    for split in (TRAIN, TEST):
        for where, entry in objects_of(lists.get(split), f"{path} {split}"):
            image = str(entry.get("image_path") or "").replace("\\", "/")
            kind = entry.get("anomaly_class")
            if not isinstance(kind, str) or not kind.strip():
                raise DataError(f"{where}: anomaly_class is {kind!r}; OK or a kind of defect is needed")
            row = {"image": image, "split": split, "label": int(kind != "OK"), "defect_type": kind}
            row |= {"mask": entry.get("mask_path"), "group": f"{path.stem}/{PurePosixPath(image).parent}"}
            rows.append((where, row))
    return read_rows(path, rows, log, pictures)


def meta_json(path: Path, log: ScanLog, images: Path | None) -> list[Sample]:
    """``meta.json`` of the ADer and AnomalyCLIP family: ``{train: {class: [...]}, test: {class: [...]}}``."""
    rows = []
    for word, classes in as_object(read_json(path), str(path)).items():
        split = meaning(word).split
        if not split:
            log.skip(path, f"part {word!r} is neither train, calibration nor test")
            continue
        for name, entries in as_object(classes, f"{path} {word}").items():
            for where, entry in objects_of(entries, f"{path} {word} {name}"):
                row = {"image": entry.get("img_path"), "split": split, "class_name": entry.get("cls_name") or name}
                row |= {"label": entry.get("anomaly"), "mask": entry.get("mask_path")}
                rows.append((where, {**row, "defect_type": entry.get("specie_name") or "anomaly"}))
    return read_rows(path, rows, log, images or path.parent)


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
    return read_rows(path, rows, log, images)


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
    addresses = []
    for _, entry in lines:
        address = str(entry.get("source-ref") or "")
        parts = PurePosixPath(address.partition("://")[2] or address).parts
        addresses.append([part for part in parts if part not in ("..", "/")])  # none leads upwards
    depth = len(addresses[0]) if addresses else 0
    dropped = next((n for n in range(depth) if os.path.isfile(base.joinpath(*addresses[0][n:]))), depth - 1)
    if any(name.endswith("-mask-ref") for _, entry in lines for name in entry):
        log.note(f"{path.name}: masks are not read, as their background is white; image metrics only")
    rows = []
    for names, (where, entry) in zip(addresses, lines, strict=True):
        label, image = _lookout_label(entry, where), "/".join(names[dropped:]) or "."
        split = meaning(path.stem).split or (TEST if label else TRAIN)
        rows.append((where, {"image": image, "split": split, "label": label, "defect_type": "anomaly"}))
    return read_rows(path, rows, log, base)


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


def _contains(path: Path, text: bytes) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return text in file.read(_HEAD)
    return False
