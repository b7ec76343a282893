"""Tables that list images, one row each: our own manifest, which every layout can be written as, and other people's.

Columns: ``image`` (required), ``split``, ``class_name``, ``label`` (0, 1 or empty), ``defect_type``, ``mask`` (a
list, or ``;`` between paths), ``group``, ``record`` (position inside a container file). Paths are relative to the
table's folder, or to the folder given when reading. Headers and labels are read as people write them (``_ALIASES``,
`names.meaning`).
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twinspect.data.containers import IMAGE_COLUMNS, parquet_columns, parquet_table
from twinspect.data.names import BAD, GOOD, MASK, UNSORTED, key, meaning, meaning_of_file, role_of
from twinspect.data.samples import marks_a_defect
from twinspect.data.scan import (
    ScanLog,
    files_in,
    first_lines,
    folder_name,
    images_below,
    inside,
    once,
    relative_to_root,
    subfolders,
)
from twinspect.data.tables import csv_header, csv_rows, is_empty, label_of, read_json_lines, split_of
from twinspect.errors import DataError, listed
from twinspect.files import replacing
from twinspect.types import TEST, TRAIN, Sample

COLUMNS = ("image", "split", "class_name", "label", "defect_type", "mask", "group", "record")
NAMES = ("manifest.parquet", "manifest.csv")
SUFFIXES = (".parquet", ".csv", ".tsv", ".txt", ".jsonl")
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
_PREDICTED = {"score", "model_id"}  # columns of a table that `twinspect predict` has written
Row = dict[str, Any]
SplitAt = Callable[[Path], str]


def find_manifests(root: Path) -> list[Path]:
    """The table itself, if it has an image column, or the manifest of a folder."""
    if os.path.isdir(root):
        return [path for name in NAMES for path in files_in(root) if path.name.lower() == name][:1]
    suffix = root.suffix.lower()
    table = suffix in (".parquet", ".csv") or (suffix in SUFFIXES and bool(path_column(_header(root))))
    return [root] if table else []


def path_column(names: Iterable[str]) -> str:
    """The column that holds the paths of images, in one of the spellings that are read; empty if there is none."""
    return _columns(names).get("image", "")


@once
def label_tables(folder: Path) -> list[Path]:
    """Tables directly in a folder that say whether images are good, or which split, class or mask they have."""
    return [path for path in files_in(folder) if path.suffix.lower() in SUFFIXES and _lists_labels(path)]


def manifest(path: Path, log: ScanLog, images: Path | None) -> list[Sample]:
    """Samples of one table, whose paths are relative to ``images``."""
    return read_rows(path, table_rows(path), log, images)


def read_rows(
    path: Path,
    rows: Sequence[tuple[str, Row]],
    log: ScanLog,
    base: Path | None,
    partly: bool = False,
    class_name: str = "",
    within: Path | None = None,
    split_at: SplitAt = lambda _: "",
) -> list[Sample]:
    """Samples of the rows of a list.

    Args:
        path: of the list.
        rows: its rows, and where each stands, for messages.
        log: where notes go.
        base: folder that the paths are relative to; None: the list's own, or one in it where the first image is.
        partly: whether images may be missing, as of a benchmark of which only a part is there; they are logged.
        class_name: of rows that name none; empty: the folder's name.
        within: data set that the list is a part of; paths may then be relative to any folder above the list.
        split_at: split of an image whose row names none, where it is known.

    Raises:
        DataError: rows cannot be used. One is enough: a list that is half true is not a data set.
    """
    if not rows:
        return []
    base = base or _base(path.parent, rows[0][1], within)
    reader = _Reader(path, [row for _, row in rows], base, class_name or folder_name(base), split_at, partly)
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

    If the manifest does not lie in ``root``, name that folder when reading it.

    Raises:
        DataError: a name that the table cannot hold, or an ending that is none of the two.
    """
    suffix = path.suffix.lower()
    if suffix not in (".parquet", ".csv"):
        raise DataError(f"{path}: a manifest ends in .parquet or .csv; type {path.with_suffix('.parquet')}")
    rows: list[Row] = [
        {
            "image": relative_to_root(sample.image, root),
            "split": sample.split,
            "class_name": sample.class_name,
            "label": sample.label,
            "defect_type": sample.defect_type,
            "mask": [relative_to_root(mask, root) for mask in sample.masks],
            "group": sample.group,
            "record": sample.record,
        }
        for sample in samples
    ]
    _refuse_other_names(rows)
    content = _parquet_bytes(rows) if suffix == ".parquet" else _csv_text(rows).encode()
    with replacing(path) as file:
        file.write(content)
    return len(rows)


# --------------------------------------------------------------------------------------------- tables


def _lists_labels(path: Path) -> bool:
    try:
        header = _header(path)
        names = _columns(header)
        if "image" not in names or set(header) >= _PREDICTED:
            return False
        if set(names) - {"image", "record", "group"}:
            return True
        rows = [row for _, row in table_rows(path)]
    except DataError:
        if meaning(path.stem).says:  # labels.csv, train.tsv, good_and_bad.csv
            raise
        return False
    return bool(_judging_column(rows, names))


def _header(path: Path) -> list[str]:
    """Columns of a table; none where it is a list of another kind. Images that are in a Parquet file are no list."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return [name for name, kind in parquet_columns(path).items() if "binary" not in kind]
    if suffix == ".jsonl":
        first = next(read_json_lines(path), None)
        return list(first[1]) if first is not None and "filename" not in first[1] else []  # that would be UniAD's
    header = csv_header(path)
    return header if suffix != ".txt" or len(header) > 1 else []


def _columns(header: Iterable[str]) -> dict[str, str]:
    """Our name of a column -> the table's, for those that are there."""
    by_key = {key(name): name for name in reversed(list(header))}
    columns = {
        ours: next((by_key[alias] for alias in aliases.split() if alias in by_key), "")
        for ours, aliases in _ALIASES.items()
    }
    return {ours: name for ours, name in columns.items() if name}


def table_rows(path: Path) -> list[tuple[str, Row]]:
    """Rows of a table, and where each stands. Row 1 is the first below the header."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet_rows(path)
    elif suffix == ".jsonl":
        rows = [row for _, row in read_json_lines(path)]
    elif suffix in SUFFIXES:
        rows = [dict(row) for row in csv_rows(path)]
    else:
        raise DataError(f"{path}: a manifest ends in .parquet or .csv (accepted too: {', '.join(SUFFIXES[2:])})")
    if not rows:
        raise DataError(f"{path}: holds no row")
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


def _parquet_rows(path: Path) -> list[Row]:
    """Rows of a Parquet file; images that it holds itself become records of it."""
    kinds = parquet_columns(path)
    rows: list[Row] = parquet_table(path, [name for name, kind in kinds.items() if "binary" not in kind]).to_pylist()
    if "image" not in _columns(kinds) or any("binary" in kinds.get(name, "") for name in IMAGE_COLUMNS):
        rows = [{**row, "image": path.name, "record": number} for number, row in enumerate(rows)]
    return rows


def _base(folder: Path, first: Row, within: Path | None) -> Path:
    """The folder that paths are relative to: the table's, one in it, or one above it, where the first image is."""
    text = str(first.get(path_column(first)) or "").partition("#")[0]
    if _PREDICTED <= set(first) and os.path.isfile(text):
        return Path(Path(text).anchor or ".")  # predictions name images as they were found from where they were made
    above = [place for place in folder.parents if within is not None and place.is_relative_to(within.parent)]
    for place in (folder, *subfolders(folder), *above):
        try:
            image = inside(place, text, "")
        except DataError:
            break
        if os.path.isfile(image) and (place not in above or within is None or image.is_relative_to(within)):
            return place
    return folder


# ----------------------------------------------------------------------------------------------- rows


class _Reader:
    """Rows of one table as samples. Which column says what images are good is found once, for all rows."""

    def __init__(
        self, path: Path, rows: list[Row], base: Path, class_name: str, split_at: SplitAt, benchmark: bool
    ) -> None:
        self._base, self._class_name, self._split_at = base, class_name, split_at
        self._columns = [name for name in rows[0] if name]
        names = _columns(self._columns)
        if "image" not in names:
            raise DataError(
                f"{path}: columns {', '.join(rows[0])}; at least image is needed, then {', '.join(COLUMNS[1:])}"
            )
        self._predicted = _PREDICTED <= set(rows[0])
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

    def sample(self, row: Row, where: str) -> tuple[Sample, dict[str, Path]]:
        """One row, or a DataError whose words begin with ``where``; and its files that are missing, by name."""
        text, record = self._text(row, "image"), row.get(self._names.get("record", ""))
        if self._predicted:
            text, _, record = text.partition("#")
        image = inside(self._base, text, where)
        missing = {} if os.path.isfile(image) else {text: image}
        masks: list[Path] = []
        for name in _mask_texts(row.get(self._names.get("mask", ""))):
            file = inside(self._base, name, where)
            if os.path.isdir(file):  # several masks of one image
                masks += images_below(file, ScanLog())
            elif os.path.isfile(file):
                masks.append(file)
            else:
                missing[name] = file
        word = self._text(row, "split")
        split = split_of(word, where) if word else TEST if self._predicted else self._split_at(image)
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
            record=_record(record, where),
        )
        return sample, missing

    def notes(self) -> Iterable[str]:
        """What was made of the table."""
        if self._predicted:
            yield "a table of predictions; what a model has answered is no label"
            return
        if self._judge and self._judge != self._names.get("label"):
            yield f"column {self._judge!r} says which images are good"
        other = [name for name in self._columns if name not in (*self._names.values(), self._judge)]
        if other:
            yield f"columns not used: {', '.join(other)}"

    def _judged(self, cell: Any, where: str) -> tuple[int | None, str]:
        """Label by a cell of the column that judges, and the kind of defect if the cell names one."""
        if is_empty(cell):
            return (0 if self._judge == self._names.get("defect_type") else None), ""
        try:
            label = label_of(cell, where)
        except DataError:
            if not self._kinds:
                raise
            return 1, str(cell).strip()
        word = meaning(str(cell)).role
        if label is not None and not word and meaning(self._judge).role == GOOD:  # 0 in a column called is_good
            label = 1 - label
        return label, (str(cell).strip() if word == BAD else "")

    def _label_of_files(self, image: Path, masks: Sequence[Path], split: str, where: str) -> int | None:
        """Label of an image of a table that does not judge: by its masks, else by names of folders and its own."""
        if masks:
            return int(marks_a_defect(masks) is not False)
        folders = image.parent.relative_to(self._base).parts if image.is_relative_to(self._base) else ()
        role = role_of(folders) or meaning_of_file(image.name).role
        if role == MASK:
            raise DataError(f"{where}: {image} is a mask by its name, and is listed as an image")
        return {GOOD: 0, BAD: 1, UNSORTED: None, "": 0 if split != TEST else None}[role]

    def _text(self, row: Row, ours: str) -> str:
        cell = row.get(self._names.get(ours, ""))
        if cell is None or cell != cell or (ours in ("split", "defect_type") and is_empty(cell)):
            return ""
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)  # whole numbers become floats where cells of their column are empty
        return (cell.decode("utf-8", "replace") if isinstance(cell, bytes) else str(cell)).strip()


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


def _record(cell: Any, where: str) -> int | None:
    if is_empty(cell):
        return None
    text = str(cell).strip().removesuffix(".0")
    if not text.isdecimal():
        raise DataError(f"{where}: record is {cell!r}; a whole number from 0, or empty")
    return int(text)


def _mask_texts(cell: Any) -> list[str]:
    if isinstance(cell, str):
        cell = cell.split(";")
    parts = cell if isinstance(cell, (list, tuple)) else [] if is_empty(cell) else [cell]
    return [str(part).strip() for part in parts if not is_empty(part)]


# -------------------------------------------------------------------------------------------- writing


def _refuse_other_names(rows: Sequence[Row]) -> None:
    """Names that are no Unicode: bytes of an old system, which neither Parquet nor a CSV in UTF-8 can hold."""
    texts = {text for row in rows for text in (row["image"], *row["mask"], row["class_name"], row["defect_type"])}
    escaped = {text: text.encode("utf-8", "backslashreplace").decode() for text in texts}
    bad = sorted(shown for text, shown in escaped.items() if shown != text)
    if bad:
        raise DataError(
            f"{len(bad):,} names are not UTF-8, and a manifest cannot hold them: {listed(bad)}. Rename them, for "
            "example with: convmv -f latin1 -t utf8 -r --notest DIR"
        )


def _parquet_bytes(rows: list[Row]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"label": pa.int8(), "mask": pa.list_(pa.string()), "record": pa.int64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), stream)
    return stream.getvalue()


def _csv_text(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        if any(";" in mask for mask in row["mask"]):
            raise DataError(f"{row['image']}: a mask's name holds ';', which separates masks in CSV; write Parquet")
        writer.writerow(row | {"mask": ";".join(row["mask"])})
    return text.getvalue()
