"""Our own list of images, Parquet or CSV: one row per image, and every layout can be written as one.

Columns: ``image`` (required), ``split``, ``class_name``, ``label`` (0, 1 or empty), ``defect_type``,
    ``mask`` (a list, or ``;`` between paths), ``group``, ``record`` (position inside a container file), and
    on request ``width``, ``height``, ``sha256``. Paths are relative to the manifest's folder, or to the
    folder given when reading.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from twinspect.data.listed import label_of, relative_to_root, split_of
from twinspect.data.samples import read_sample_rgb
from twinspect.data.scan import ScanLog, existing_folder, existing_root, folder_name, inside, listing
from twinspect.data.tables import read_csv
from twinspect.errors import DataError
from twinspect.types import TEST, TRAIN, Sample

COLUMNS = ("image", "split", "class_name", "label", "defect_type", "mask", "group", "record")
DETAILS = ("width", "height", "sha256")
NAMES = ("manifest.parquet", "manifest.csv")
# Names that other tools' tables use for the same things.
ALIASES = {
    "image_path": "image",
    "path": "image",
    "filename": "image",
    "mask_path": "mask",
    "label_index": "label",
    "class": "class_name",
}
SHOWN_PROBLEMS = 5
ROOT_KEY = b"twinspect.root"


def manifest(root: Path, log: ScanLog | None = None, images: Path | None = None) -> list[Sample]:
    """Samples listed in a manifest file, or in ``manifest.parquet`` or ``manifest.csv`` of a folder.

    ``images`` is the folder that the paths are relative to; without it, the manifest's own. Any row that
    cannot be used (no such file, outside that folder, unknown split) refuses the whole manifest, with the
    row's number: a list that is half true is not a data set. Row 1 is the first below the header.
    """
    path = manifest_file(root)
    base = existing_folder(images) if images is not None else path.parent
    rows, recorded = _rows(path)
    samples: list[Sample] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            samples.append(_sample(row, base, f"row {number}"))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(_refusal(path, problems, len(rows), base, recorded))
    return samples


def looks_like_manifest(root: Path) -> bool:
    """Whether it is a table with an image column, or a folder that holds a manifest."""
    if root.is_dir():
        return any((root / name).is_file() for name in NAMES)
    return root.suffix.lower() in (".csv", ".parquet") and root.is_file()


def manifest_file(root: Path) -> Path:
    """The manifest meant by a path: itself, or the one in that folder."""
    path = existing_root(root)
    if path.is_dir():
        found = next((path / name for name in NAMES if (path / name).is_file()), None)
        if found is None:
            raise DataError(f"{path}: neither {' nor '.join(NAMES)}; found: {listing(path)}")
        return found
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise DataError(f"{path}: a manifest ends in .parquet or .csv")
    return path


def write_manifest(samples: Iterable[Sample], path: Path, root: Path, details: bool = False) -> int:
    """Write samples to ``.parquet`` or ``.csv`` with paths relative to ``root``; how many rows were written.

    With ``details`` each image is read for ``width``, ``height`` and ``sha256`` (of the file, or of the
    pixels of a record). If the manifest does not lie in ``root``, name that folder when reading it.
    """
    rows = [_row(sample, root, details) for sample in samples]
    names = (*COLUMNS, *DETAILS) if details else COLUMNS
    partial = path.with_name(path.name + ".part")
    if path.suffix.lower() == ".parquet":
        _write_parquet(rows, names, partial, root)
    elif path.suffix.lower() == ".csv":
        _write_csv(rows, names, partial)
    else:
        raise DataError(f"{path}: a manifest ends in .parquet or .csv; type {path.with_suffix('.parquet')}")
    os.replace(partial, path)
    return len(rows)


def _rows(path: Path) -> tuple[list[dict[str, Any]], str]:
    rows: list[dict[str, Any]]
    rows, recorded = (read_csv(path), "") if path.suffix.lower() == ".csv" else _parquet_rows(path)
    rows = [{ALIASES.get(key, key): value for key, value in row.items()} for row in rows]
    if not rows:
        raise DataError(f"{path}: holds no row")
    if "image" not in rows[0]:
        raise DataError(
            f"{path}: columns {', '.join(rows[0])}; at least image is needed, then {', '.join(COLUMNS[1:])}"
        )
    return rows, recorded


def _parquet_rows(path: Path) -> tuple[list[dict[str, Any]], str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = [n for n in pq.read_schema(path).names if ALIASES.get(n, n) in COLUMNS]
        table = pq.read_table(path, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error})") from None
    recorded = (table.schema.metadata or {}).get(ROOT_KEY, b"").decode("utf-8", "replace")
    return table.to_pylist(), recorded


def _sample(row: dict[str, Any], base: Path, where: str) -> Sample:
    image = _existing(base, row["image"], where)
    split = split_of(str(row.get("split") or TRAIN), where)
    unlabelled = 0 if split != TEST else None  # training and calibration images are normal unless said otherwise
    label = label_of(row["label"], where) if "label" in row else unlabelled
    return Sample(
        image=image,
        split=split,
        class_name=str(row.get("class_name") or folder_name(base)),
        label=label,
        defect_type=str(row.get("defect_type") or ""),
        masks=tuple(_existing(base, text, where) for text in _mask_texts(row.get("mask"))),
        group=str(row.get("group") or ""),
        record=_record(row.get("record"), where),
    )


def _record(cell: Any, where: str) -> int | None:
    if cell is None or cell == "":
        return None
    if not str(cell).isdecimal():
        raise DataError(f"{where}: record is {cell!r}; a whole number from 0, or empty")
    return int(cell)


def _existing(base: Path, text: Any, where: str) -> Path:
    path = inside(base, str(text or ""), where)
    if not path.is_file():
        raise DataError(f"{where}: no such file: {text}")
    return path


def _mask_texts(cell: Any) -> list[str]:
    parts = cell.split(";") if isinstance(cell, str) else list(cell or [])
    return [str(part).strip() for part in parts if str(part).strip()]


def _refusal(path: Path, problems: Sequence[str], count: int, base: Path, recorded: str) -> str:
    more = f"\n  ... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    hint = f" It was written for images below {recorded}." if recorded else ""
    shown = "\n  ".join(problems[:SHOWN_PROBLEMS])
    return (
        f"{path}: {len(problems):,} of {count:,} rows cannot be used. Paths are taken relative to {base}; if "
        f"the images are elsewhere, name their folder (images=...).{hint}\n  {shown}{more}"
    )


def _row(sample: Sample, root: Path, details: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "image": relative_to_root(sample.image, root),
        "split": sample.split,
        "class_name": sample.class_name,
        "label": sample.label,
        "defect_type": sample.defect_type,
        "mask": [relative_to_root(mask, root) for mask in sample.masks],
        "group": sample.group,
        "record": sample.record,
    }
    return row | _details(sample) if details else row


def _details(sample: Sample) -> dict[str, Any]:
    rgb = read_sample_rgb(sample)
    content = sample.image.read_bytes() if sample.record is None else rgb.tobytes()
    return {"width": rgb.shape[1], "height": rgb.shape[0], "sha256": hashlib.sha256(content).hexdigest()}


def _write_parquet(rows: list[dict[str, Any]], names: Sequence[str], path: Path, root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        "label": pa.int8(),
        "mask": pa.list_(pa.string()),
        "record": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
    }
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    schema = schema.with_metadata({ROOT_KEY: os.path.abspath(root).encode()})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def _write_csv(rows: list[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            if any(";" in mask for mask in row["mask"]):
                raise DataError(
                    f"{row['image']}: a mask's name holds ';', which separates masks in CSV; write Parquet"
                )
            writer.writerow(row | {"mask": ";".join(row["mask"])})
