"""Write a tiny data set in any layout, for the tests.

``write("mvtec-loco", root)`` returns the counts per class that the loader must find. Same plan, same pixels.
"""

from __future__ import annotations

import colorsys
import csv
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from painting import PARTS, damaged, drawn, finished, grid, part, spot
from PIL import Image

from twinspect.data import ClassCounts
from twinspect.data.folders import LOGICAL, MVTEC_AD, STRUCTURAL, read_folders
from twinspect.data.manifest import write_manifest
from twinspect.data.scan import Folder, ScanLog, relative_to_root
from twinspect.data.semantic import CIFAR10, CIFAR100, CIFAR100_SUPERCLASSES, FASHION, VIEW
from twinspect.types import TEST, TRAIN, Sample

REAL_IAD_VIEWS = 5
VISA = tuple("candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum".split())
Counts = dict[str, ClassCounts]
RGB = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def scene(index: int, count: int, rng: np.random.Generator, size: int, grey: bool = False) -> RGB:
    """A picture of class ``index`` of ``count``: hue, stripe direction and stripe width tell the class."""
    x, y = grid(size)
    angle = np.pi * index / count + rng.normal(0, 0.03)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (12 + 5 * (index % 7)) + rng.uniform(0, 6.28))
    tint = np.array([1.0, 1.0, 1.0] if grey else colorsys.hsv_to_rgb(index / count, 0.6, 1.0))
    rgb = finished((128 + 60 * wave)[..., None] * tint, rng, 5)
    return np.repeat(rgb[..., :1], 3, axis=2) if grey else rgb


def scratch(rng: np.random.Generator, size: int) -> Mask:
    """A straight line of a few pixels' width."""
    a, b = rng.uniform(0.15, 0.45, 2) * size, rng.uniform(0.55, 0.85, 2) * size
    return drawn(size, lambda draw: draw.line([*a, *b], fill=1, width=max(2, size // 24)))


def chip(rng: np.random.Generator, size: int) -> Mask:
    """A triangle broken out of the rim."""
    start, depth = rng.uniform(0.1, 0.6) * size, rng.uniform(0.15, 0.3) * size
    corners = [(start, 0), (start + depth, 0), (start + depth / 2, depth)]
    return drawn(size, lambda draw: draw.polygon(corners, fill=1))


DEFECTS: dict[str, Callable[[np.random.Generator, int], Mask]] = {
    "scratch": scratch,
    "spot": spot,
    "chip": chip,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to write.

    Attributes:
        seed: of every picture.
        size: side in pixels; CIFAR is always 32 and Fashion-MNIST 28.
        classes: how many; semantic sets have at least two.
        train: training images per class (Real-IAD: objects of five views).
        calibration: images per class where the layout has its own validation split.
        good: normal test images per class (semantic sets: test images per class; Real-IAD: objects).
        defect: anomalous test images per class (Real-IAD: objects).
        shape: one of ``WRITERS[layout].shapes``; empty for the first.
    """

    seed: int = 0
    size: int = 64
    classes: int = 2
    train: int = 6
    calibration: int = 3
    good: int = 3
    defect: int = 4
    shape: str = ""


def write(layout: str, root: Path | str, plan: Plan | None = None) -> Counts:
    """Write a set of this layout below ``root`` (created if absent); the counts per class that are there."""
    plan, writer = plan or Plan(), WRITERS[layout]
    assert plan.shape in ("", *writer.shapes), (layout, plan.shape)
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True)
    return writer.write(folder, plan, plan.shape or writer.shapes[0])


# -------------------------------------------------------------------------------------- MVTec's family


def _mvtec_ad(root: Path, plan: Plan, shape: str) -> Counts:
    if shape == "one-class":
        return {root.name: _mvtec_class(root, 0, plan)}
    names = _part_names(plan)
    if shape == "1cls":  # VisA as it is often converted
        return {n: _mvtec_class(root / "1cls" / n, i, plan, suffix="") for i, n in enumerate(names)}
    return {n: _mvtec_class(root / n, i, plan, masks=shape != "no-masks") for i, n in enumerate(names)}


def _mvtec_class(folder: Path, index: int, plan: Plan, masks: bool = True, suffix: str = "_mask") -> ClassCounts:
    _good_files(folder / "train" / "good", index, plan, "train", plan.train)
    _good_files(folder / "test" / "good", index, plan, "good", plan.good)
    for number, kind, rgb, found in _defect_pictures(index, plan):
        _save(folder / "test" / kind / f"{number:03d}.png", rgb)
        if masks:
            _save(folder / "ground_truth" / kind / f"{number:03d}{suffix}.png", found[0])
    return _counts(plan, masks=plan.defect if masks else 0)


def _mvtec_ad_2(root: Path, plan: Plan, shape: str) -> Counts:
    names = _part_names(plan)
    for index, name in enumerate(names):
        public = root / name / "test_public"
        _good_files(root / name / "train" / "good", index, plan, "train", plan.train, "_regular")
        _good_files(root / name / "validation" / "good", index, plan, "validation", plan.calibration, "_regular")
        _good_files(public / "good", index, plan, "good", plan.good, "_regular")
        for private in ("test_private", "test_private_mixed"):
            _good_files(root / name / private, index, plan, private, plan.good, "_overexposed")
        for number, _, rgb, found in _defect_pictures(index, plan):
            _save(public / "bad" / f"{number:03d}_regular.png", rgb)
            _save(public / "ground_truth" / "bad" / f"{number:03d}_regular_mask.png", found[0])
    return dict.fromkeys(names, _counts(plan, plan.calibration, unknown=2 * plan.good, masks=plan.defect))


def _mvtec_loco(root: Path, plan: Plan, shape: str) -> Counts:
    """Two regions per anomalous image: a grey value of 255 saturates at half its area, 254 at ten pixels."""
    names = _part_names(plan)
    for index, name in enumerate(names):
        folder = root / name
        _good_files(folder / "train" / "good", index, plan, "train", plan.train)
        _good_files(folder / "validation" / "good", index, plan, "validation", plan.calibration)
        _good_files(folder / "test" / "good", index, plan, "good", plan.good)
        for number, _, rgb, found in _defect_pictures(index, plan, regions=2):
            kind = LOGICAL if number % 2 else STRUCTURAL
            _save(folder / "test" / kind / f"{number:03d}.png", rgb)
            for region, mask in enumerate(found):
                grey = (mask * (255 - region)).astype(np.uint8)
                _save(folder / "ground_truth" / kind / f"{number:03d}" / f"{region:03d}.png", grey)
        _save_json(folder / "defects_config.json", _saturation_config())
    return dict.fromkeys(names, _counts(plan, plan.calibration, masks=2 * plan.defect))


def _saturation_config() -> list[dict[str, Any]]:
    rows = (("part_of_a_region", 255, 0.5, True), ("ten_pixels", 254, 10, False))
    keys = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
    return [dict(zip(keys, row, strict=True)) for row in rows]


# ------------------------------------------------------------------------------------ VisA and Real-IAD


def _visa(root: Path, plan: Plan, shape: str) -> Counts:
    names = list(VISA[: plan.classes])
    rows: list[tuple[str, ...]] = []
    for index, name in enumerate(names):
        rows += _visa_class(root, name, index, plan)
    (root / "split_csv").mkdir(exist_ok=True)
    with (root / "split_csv" / "1cls.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("object", "split", "label", "image", "mask"), *rows])
    return dict.fromkeys(names, _counts(plan, masks=plan.defect))


def _visa_class(root: Path, name: str, index: int, plan: Plan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    data = root / name / "Data"
    for number, split in enumerate([TRAIN] * plan.train + [TEST] * plan.good):
        path = data / "Images" / "Normal" / f"{number:04d}.JPG"
        _save(path, part(index, _rng(plan, name, split, number), plan.size))
        rows.append((name, split, "normal", relative_to_root(path, root), ""))
    for number, _, rgb, found in _defect_pictures(index, plan):
        path, mask = (
            data / "Images" / "Anomaly" / f"{number:03d}.JPG",
            data / "Masks" / "Anomaly" / f"{number:03d}.png",
        )
        _save(path, rgb)
        _save(mask, found[0].astype(np.uint8) * (1 + number % 3))  # small integers, as in VisA
        rows.append((name, TEST, "anomaly", relative_to_root(path, root), relative_to_root(mask, root)))
    return rows


def _real_iad(root: Path, plan: Plan, shape: str) -> Counts:
    names = _part_names(plan)
    official = shape == "official"
    for index, name in enumerate(names):
        folder = root / "realiad_256" / name if official else root / name
        lists = {
            TRAIN: _real_iad_objects(folder, index, plan, "OK", range(plan.train)),
            TEST: _real_iad_objects(folder, index, plan, "OK", range(plan.train, plan.train + plan.good))
            + _real_iad_objects(folder, index, plan, "HS", range(plan.defect)),
        }
        jsons = root / "realiad_jsons" / "realiad_jsons" if official else root / "realiad_jsons"
        _save_json(jsons / f"{name}.json", {"meta": {"normal_class": "OK", "prefix": f"{name}/"}, **lists})
    views = REAL_IAD_VIEWS
    counts = ClassCounts(views * plan.train, 0, views * plan.good, views * plan.defect, 0, views * plan.defect)
    return dict.fromkeys(names, counts)


def _real_iad_objects(
    folder: Path, index: int, plan: Plan, kind: str, numbers: Sequence[int]
) -> list[dict[str, str | None]]:
    """Rows of the objects ``numbers``, five views each; every view of an object not OK has a defect."""
    rows: list[dict[str, str | None]] = []
    for number in numbers:
        for view in range(1, REAL_IAD_VIEWS + 1):
            rng = _rng(plan, folder.name, kind, number, view)
            rgb, mask = part(index, rng, plan.size), DEFECTS["spot"](rng, plan.size)
            place = Path("OK" if kind == "OK" else f"NG/{kind}") / f"S{number + 1:04d}"
            stem = f"{folder.name}_{number + 1:04d}_{'OK' if kind == 'OK' else 'NG'}_C{view}_20231023"
            image = place / f"{stem}.jpg"
            _save(folder / image, rgb if kind == "OK" else damaged(rgb, [mask]))
            if kind != "OK":
                _save(folder / place / f"{stem}.png", mask)
            truth = None if kind == "OK" else (place / f"{stem}.png").as_posix()
            row = {
                "category": folder.name,
                "anomaly_class": kind,
                "image_path": image.as_posix(),
                "mask_path": truth,
            }
            rows.append(row)
    return rows


# --------------------------------------------------------------------------------------- semantic sets


@dataclass(frozen=True, slots=True)
class _Pictures:
    """All pictures of a semantic set: per split the labels and the images, classes in turn."""

    names: tuple[str, ...]
    labels: dict[str, list[int]]
    images: dict[str, list[RGB]]


def _cifar10(root: Path, plan: Plan, shape: str) -> Counts:
    pictures = _pictures(plan, CIFAR10, 32)
    files = {TRAIN: [f"data_batch_{i}" for i in range(1, 6)], TEST: ["test_batch"]}
    places = {"python": "cifar-10-batches-py", "parquet": "plain_text"}
    return _cifar(root / places.get(shape, "."), plan, shape, pictures, files, fine=False)


def _cifar100(root: Path, plan: Plan, shape: str) -> Counts:
    pictures = _pictures(plan, tuple(CIFAR100), 32)
    places = {"python": "cifar-100-python", "parquet": "cifar100"}
    files = {TRAIN: [TRAIN], TEST: [TEST]}
    return _cifar(root / places.get(shape, "."), plan, shape, pictures, files, fine=True)


def _cifar(
    folder: Path, plan: Plan, shape: str, pictures: _Pictures, files: dict[str, list[str]], fine: bool
) -> Counts:
    if shape == "folders":
        return _class_folders(folder / TRAIN, folder / TEST, plan, pictures)
    folder.mkdir(exist_ok=True)
    for split, stems in files.items():
        images, labels = pictures.images[split], pictures.labels[split]
        if shape == "parquet":
            parquet(
                folder / f"{split}-00000-of-00001.parquet",
                images,
                labels,
                "img",
                "fine_label" if fine else "label",
            )
            continue
        for number, stem in enumerate(stems):
            part_images, part_labels = images[number :: len(stems)], labels[number :: len(stems)]
            if part_images:
                cifar_python(folder / stem, part_images, part_labels, fine)
    return _semantic_counts(plan, pictures)


def _fashion_mnist(root: Path, plan: Plan, shape: str) -> Counts:
    pictures = _pictures(plan, FASHION, 28, grey=True)
    if shape == "folders":
        return _class_folders(root / TRAIN, root / TEST, plan, pictures)
    for split, stem in ((TRAIN, "train"), (TEST, "t10k")):
        images, labels = pictures.images[split], pictures.labels[split]
        if shape == "parquet":
            parquet(root / f"{split}-00000-of-00001.parquet", images, labels, "image", "label")
            continue
        ending = ".gz" if shape == "gz" else ""
        idx(root / f"{stem}-images-idx3-ubyte{ending}", np.stack([image[..., 0] for image in images]))
        idx(root / f"{stem}-labels-idx1-ubyte{ending}", np.array(labels, dtype=np.uint8))
    return _semantic_counts(plan, pictures)


def _view(root: Path, plan: Plan, shape: str) -> Counts:
    pictures = _pictures(plan, VIEW, plan.size)
    if shape == "plain":
        return _class_folders(root / "train", root / "test", plan, pictures)
    return _class_folders(root / "seg_train" / "seg_train", root / "seg_test" / "seg_test", plan, pictures)


def _pictures(plan: Plan, names: tuple[str, ...], size: int, grey: bool = False) -> _Pictures:
    count = min(max(plan.classes, 2), len(names))
    each = {TRAIN: plan.train, TEST: max(plan.good, 1)}
    labels = {split: list(range(count)) * number for split, number in each.items()}
    images = {
        split: [scene(x, count, _rng(plan, split, i), size, grey) for i, x in enumerate(found)]
        for split, found in labels.items()
    }
    return _Pictures(names[:count], labels, images)


def _class_folders(train: Path, test: Path, plan: Plan, pictures: _Pictures) -> Counts:
    for split, folder in ((TRAIN, train), (TEST, test)):
        for number, (label, rgb) in enumerate(zip(pictures.labels[split], pictures.images[split], strict=True)):
            _save(folder / pictures.names[label] / f"{number:05d}.png", rgb)
    return _semantic_counts(plan, pictures)


def _semantic_counts(plan: Plan, pictures: _Pictures) -> Counts:
    return dict.fromkeys(pictures.names, ClassCounts(plan.train, test_unknown=max(plan.good, 1)))


# ------------------------------------------------------------------------------------- plain and listed


def _folder(root: Path, plan: Plan, shape: str) -> Counts:
    if shape == "flat":
        _good_files(root, 0, plan, "train", plan.train)
        return {root.name: ClassCounts(plan.train)}
    if shape == "classes":
        names = _part_names(plan)
        for index, name in enumerate(names):
            _good_files(root / name, index, plan, "train", plan.train)
        return dict.fromkeys(names, ClassCounts(plan.train))
    _good_files(root / "good", 0, plan, "train", plan.train)
    if shape == "good":
        return {root.name: ClassCounts(plan.train)}
    for number, kind, rgb, found in _defect_pictures(0, plan):
        _save(root / kind / f"{number:03d}.png", rgb)
        if shape == "masks":
            _save(root / "ground_truth" / kind / f"{number:03d}_mask.png", found[0])
    return {root.name: ClassCounts(plan.train, test_defect=plan.defect, masks=plan.defect * (shape == "masks"))}


def _manifest(root: Path, plan: Plan, shape: str) -> Counts:
    counts = _mvtec_ad(root / "images", plan, "classes")
    write_manifest(read_folders(Folder(root / "images"), ScanLog(), MVTEC_AD), root / f"manifest.{shape}", root)
    return counts


def _meta_json(root: Path, plan: Plan, shape: str) -> Counts:
    counts = _mvtec_ad(root / "images", plan, "classes")
    write_meta_json(read_folders(Folder(root / "images"), ScanLog(), MVTEC_AD), root / "meta.json", root)
    return counts


def write_meta_json(samples: Sequence[Sample], path: Path, root: Path) -> None:
    """``meta.json`` with paths relative to ``root``."""
    content: dict[str, dict[str, list[dict[str, Any]]]] = {TRAIN: {}, TEST: {}}
    for sample in samples:
        masks = sample.masks if len(sample.masks) < 2 else (sample.masks[0].parent,)  # several: their folder
        entry = {
            "img_path": relative_to_root(sample.image, root),
            "mask_path": relative_to_root(masks[0], root) if masks else "",
            "cls_name": sample.class_name,
            "specie_name": sample.defect_type or ("good" if sample.label == 0 else ""),
            "anomaly": sample.label,
        }
        content.setdefault(sample.split, {}).setdefault(sample.class_name, []).append(entry)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _uniad_json(root: Path, plan: Plan, shape: str) -> Counts:
    images = root / "mvtec_anomaly_detection"
    counts = _mvtec_ad(images, plan, "classes")
    for split in (TRAIN, TEST):
        lines = []
        for sample in (s for s in read_folders(Folder(images), ScanLog(), MVTEC_AD) if s.split == split):
            line = {"filename": relative_to_root(sample.image, images), "label": sample.label}
            line |= {"label_name": "defective" if sample.label else "good", "clsname": sample.class_name}
            line |= {"maskname": relative_to_root(sample.masks[0], images)} if sample.masks else {}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        (root / f"{split}.json").write_text("".join(lines), encoding="utf-8")
    return counts


def _lookout(root: Path, plan: Plan, shape: str) -> Counts:
    """Manifests as Lookout for Vision exports them; their images were copied from the bucket to this folder."""
    counts = _mvtec_ad(root / "gt-job", replace(plan, classes=1), "no-masks")
    for split in (TRAIN, TEST):
        lines = []
        for sample in (s for s in read_folders(Folder(root / "gt-job"), ScanLog(), MVTEC_AD) if s.split == split):
            about = {
                "class-name": "anomaly" if sample.label else "normal",
                "type": "groundtruth/image-classification",
            }
            line = {"source-ref": f"s3://lookoutvision-bucket/{relative_to_root(sample.image, root)}"}
            lines.append(json.dumps({**line, "anomaly-label": 1, "anomaly-label-metadata": about}) + "\n")
        (root / f"{split}.manifest").write_text("".join(lines), encoding="utf-8")
    (one,) = counts.values()
    return {root.name: one}


# ------------------------------------------------------------------------- container files as their owners wrote them


def cifar_python(path: Path, images: Sequence[RGB], labels: Sequence[int], fine: bool) -> None:
    """A batch as Python 2 pickled it, opcode by opcode (protocol 2, byte strings, numpy's old names)."""
    data = b"".join(_planes(rgb) for rgb in images)
    label_key = b"fine_labels" if fine else b"labels"
    items = _string(b"batch_label") + _string(b"testing batch 1 of 1")
    items += _string(label_key) + _ints(labels)
    if fine:
        items += _string(b"coarse_labels") + _ints([_coarse(label) for label in labels])
    items += _string(b"data") + _array(data, len(images))
    names = b"".join(_string(f"picture_{i:06d}.png".encode()) for i in range(len(images)))
    items += _string(b"filenames") + b"](" + names + b"e"
    path.write_bytes(b"\x80\x02}(" + items + b"u.")


def idx(path: Path, values: NDArray[np.uint8]) -> None:
    """An IDX file of unsigned bytes, compressed if the name ends in ``.gz``."""
    raw = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


def parquet(path: Path, images: Sequence[RGB], labels: Sequence[int], image_column: str, label_column: str) -> None:
    """PNG bytes in a struct column and class numbers, as data hubs publish image sets."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": _png(rgb), "path": f"{i}.png"} for i, rgb in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {image_column: pa.array(cells, kind), label_column: pa.array(labels, pa.int64())}
    pq.write_table(pa.table(columns), path)


def _planes(rgb: RGB) -> bytes:
    return np.ascontiguousarray(np.moveaxis(rgb, -1, 0)).tobytes()


def _coarse(fine: int) -> int:
    return list(CIFAR100_SUPERCLASSES).index(list(CIFAR100.values())[fine])


def _png(rgb: RGB) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "PNG")
    return stream.getvalue()


def _string(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _ints(values: Sequence[int]) -> bytes:
    return b"](" + b"".join(_int(value) for value in values) + b"e"


def _array(data: bytes, rows: int) -> bytes:
    """``numpy.core.multiarray._reconstruct(ndarray, (0,), "b")`` with its state, as numpy 1 writes it."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + _int(0) + b"\x85" + _string(b"b") + b"\x87R"
    kind = b"cnumpy\ndtype\n" + _string(b"u1") + _int(0) + _int(1) + b"\x87R"
    kind += b"(" + _int(3) + _string(b"|") + b"NNN" + _int(-1) + _int(-1) + _int(0) + b"tb"
    shape = _int(rows) + _int(len(data) // max(rows, 1)) + b"\x86"
    return made + b"(" + _int(1) + shape + kind + b"\x89" + b"T" + struct.pack("<i", len(data)) + data + b"tb"


# ---------------------------------------------------------------------------------------------- shared


def _counts(plan: Plan, calibration: int = 0, unknown: int = 0, masks: int = 0) -> ClassCounts:
    return ClassCounts(plan.train, calibration, plan.good, plan.defect, unknown, masks)


def _part_names(plan: Plan) -> list[str]:
    base = list(PARTS)
    return [base[i % len(base)] + (f"{i // len(base) + 1}" if i >= len(base) else "") for i in range(plan.classes)]


def _rng(plan: Plan, *key: object) -> np.random.Generator:
    return np.random.default_rng([plan.seed, zlib.crc32("|".join(map(str, key)).encode())])


def _good_files(folder: Path, index: int, plan: Plan, role: str, count: int, ending: str = "") -> None:
    for number in range(count):
        rgb = part(index, _rng(plan, index, role, number), plan.size)
        _save(folder / f"{number:03d}{ending}.png", rgb)


def _defect_pictures(index: int, plan: Plan, regions: int = 1) -> Iterator[tuple[int, str, RGB, list[Mask]]]:
    """Number, kind, picture and its masks for each defect of a class; kinds take turns."""
    kinds = list(DEFECTS)
    for number in range(plan.defect):
        rng = _rng(plan, index, "defect", number)
        rgb = part(index, rng, plan.size)
        chosen = [kinds[(number + offset) % len(kinds)] for offset in range(regions)]
        masks = [DEFECTS[kind](rng, plan.size) for kind in chosen]
        yield number, chosen[0], damaged(rgb, masks), masks


def _save(path: Path, pixels: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint8) * 255)
    if path.suffix.lower() == ".jpg":
        image.save(path, "JPEG", quality=95)
    else:
        image.save(path)


def _save_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


class Writer(NamedTuple):
    """A layout that can be written.

    Attributes:
        write: root, plan and shape to the counts that are there.
        shapes: that the layout has on disk, the usual one first.
    """

    write: Callable[[Path, Plan, str], Counts]
    shapes: tuple[str, ...] = ("classes",)


WRITERS: dict[str, Writer] = {
    "mvtec-ad": Writer(_mvtec_ad, ("classes", "one-class", "no-masks", "1cls")),
    "mvtec-ad-2": Writer(_mvtec_ad_2),
    "mvtec-loco": Writer(_mvtec_loco),
    "visa": Writer(_visa),
    "real-iad": Writer(_real_iad, ("official", "beside")),
    "cifar10": Writer(_cifar10, ("python", "folders", "parquet")),
    "cifar100": Writer(_cifar100, ("python", "folders", "parquet")),
    "fashion-mnist": Writer(_fashion_mnist, ("gz", "plain", "folders", "parquet")),
    "view": Writer(_view, ("nested", "plain")),
    "folder": Writer(_folder, ("masks", "defects", "good", "flat", "classes")),
    "manifest": Writer(_manifest, ("parquet", "csv")),
    "meta-json": Writer(_meta_json),
    "uniad-json": Writer(_uniad_json),
    "lookout": Writer(_lookout),
}
