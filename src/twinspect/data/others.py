"""Lists that users of other programs have: folder settings of anomalib, manifests of Amazon Lookout for Vision."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from twinspect.data.names import BAD, GOOD, meaning
from twinspect.data.scan import ScanLog, existing_folder, existing_root, files_in, folder_name, images_below, listing
from twinspect.data.tables import as_object, read_json_lines, text_of
from twinspect.errors import DataError
from twinspect.files import read_text
from twinspect.types import TEST, TRAIN, Sample

_SETTINGS, _LINES = (".yaml", ".yml"), (".manifest", ".jsonl", ".json")
_CLASSIFIED = "groundtruth/image-classification"
_HEAD = 1 << 16  # bytes of a file that say what it is


# ------------------------------------------------------------------------------------------- anomalib


def anomalib(root: Path, log: ScanLog, images: Path | None = None) -> list[Sample]:
    """Settings of anomalib's ``Folder`` data: ``normal_dir``, ``abnormal_dir``, ``normal_test_dir``, ``mask_dir``.

    ``root`` is a YAML file, or a folder of such files: one class a file, all for one model. The folder that the
    settings call ``root`` is looked for beside the file and where the command runs; ``images`` replaces it. Masks go
    with the images of ``abnormal_dir`` in the order of their names, and must carry those names.
    """
    path = existing_root(root)
    found = [one for one in _candidates(path, _SETTINGS) if _settings(one)]
    if not found:
        raise DataError(
            f"{path}: no YAML file with normal_dir; found: {listing(path) if path.is_dir() else 'a file'}"
        )
    return [sample for one in found for sample in _anomalib_class(one, _settings(one) or {}, log, images)]


def looks_like_anomalib(root: Path) -> bool:
    """Whether it is such a YAML file, or a folder that holds one."""
    return any(_settings(path) for path in _candidates(root, _SETTINGS))


def _candidates(root: Path, suffixes: Iterable[str]) -> list[Path]:
    files = files_in(root) if os.path.isdir(root) else [root]
    return [path for path in files if path.suffix.lower() in suffixes]


def _holds(path: Path, text: bytes) -> bool:
    with suppress(OSError), path.open("rb") as file:
        return text in file.read(_HEAD)
    return False


def _settings(path: Path) -> dict[str, Any] | None:
    """The mapping that holds ``normal_dir``, at whatever depth; None where there is none.

    Raises:
        DataError: it should be there, but the file is not YAML.
    """
    import yaml

    if not _holds(path, b"normal_dir"):
        return None
    try:
        waiting = [yaml.safe_load(read_text(path))]
    except yaml.YAMLError as error:
        raise DataError(f"{path}: cannot be read as YAML ({error})") from None
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "normal_dir" in one:
                return one
            waiting += one.values()
    return None


def _anomalib_class(path: Path, settings: dict[str, Any], log: ScanLog, images: Path | None) -> list[Sample]:
    base = existing_folder(images) if images is not None else _anomalib_root(path, settings)
    name = str(settings.get("name") or folder_name(base))
    samples = []
    for key, split, label in (("normal_dir", TRAIN, 0), ("normal_test_dir", TEST, 0), ("abnormal_dir", TEST, 1)):
        for folder in _folders(path, base, settings, key):
            kind = folder.name if label else ""
            samples += [Sample(image, split, name, label, kind) for image in images_below(folder, log)]
    masks = [mask for folder in _folders(path, base, settings, "mask_dir") for mask in images_below(folder, log)]
    return _with_masks(path, samples, masks) if masks else samples


def _anomalib_root(path: Path, settings: dict[str, Any]) -> Path:
    text = str(settings.get("root") or settings.get("path") or ".")
    places = [place / text for place in (path.parent, Path.cwd())]
    found = next((place for place in places if os.path.isdir(place)), None)
    if found is None:
        raise DataError(
            f"{path}: root {text!r} is neither beside this file nor in {Path.cwd()}; name it with --images DIR"
        )
    return found


def _folders(path: Path, base: Path, settings: dict[str, Any], key: str) -> Iterator[Path]:
    value = settings.get(key) or []
    for text in value if isinstance(value, list) else [value]:
        folder = base / str(text)
        if not os.path.isdir(folder):
            raise DataError(f"{path}: {key} {text!r}: no such folder below {base}")
        yield folder


def _with_masks(path: Path, samples: list[Sample], masks: list[Path]) -> list[Sample]:
    """Every defect with its mask, paired as anomalib does."""
    defects = [sample for sample in samples if sample.label == 1]
    pairs = dict(zip((sample.image for sample in defects), masks, strict=False))
    wrong = [image for image, mask in pairs.items() if not mask.stem.startswith(image.stem)]
    if wrong or len(masks) != len(defects):
        odd = f"; {pairs[wrong[0]].name} would go with {wrong[0].name}" if wrong else ""
        raise DataError(
            f"{path}: {len(defects)} images in abnormal_dir and {len(masks)} masks in mask_dir do not pair by "
            f"name{odd}. Every mask is named like its image"
        )
    return [
        Sample(one.image, one.split, one.class_name, one.label, one.defect_type, (pairs[one.image],))
        if one.label == 1 else one for one in samples
    ]  # fmt: skip


# ----------------------------------------------------------------------------------- Lookout for Vision


def lookout(root: Path, log: ScanLog, images: Path | None = None) -> list[Sample]:
    """Manifests of Amazon Lookout for Vision: one JSON object a line, with ``source-ref`` and an image label.

    ``root`` is a manifest, or a folder of them (``train.manifest``, ``test.manifest``). The images must lie on this
    disk, in ``images`` or beside the manifest: of an address ``s3://bucket/a/b.png`` the longest end that is there,
    the same for all. A manifest whose name says no split gives good images to training and anomalies to the test.
    """
    path = existing_root(root)
    found = [one for one in _candidates(path, _LINES) if _is_lookout(one)]
    if not found:
        raise DataError(f"{path}: no manifest with source-ref; found: {listing(path) if path.is_dir() else 'a file'}")
    return [sample for one in found for sample in _lookout_lines(one, log, images)]


def looks_like_lookout(root: Path) -> bool:
    """Whether it is such a manifest, or a folder that holds one."""
    return any(_is_lookout(path) for path in _candidates(root, _LINES))


def _is_lookout(path: Path) -> bool:
    return _holds(path, b'"source-ref"')


def _lookout_lines(path: Path, log: ScanLog, images: Path | None) -> Iterator[Sample]:
    lines = list(read_json_lines(path))
    keys = [_key(text_of(entry, "source-ref", where)) for where, entry in lines]
    base = existing_folder(images) if images is not None else path.parent
    depth = len(keys[0].parts)
    dropped = next((n for n in range(depth) if os.path.isfile(base.joinpath(*keys[0].parts[n:]))), depth - 1)
    if any(name.endswith("-mask-ref") for _, entry in lines for name in entry):
        log.note(f"{path.name}: masks are not read, as their background is white; image metrics only")
    for key, (where, entry) in zip(keys, lines, strict=True):
        image = base.joinpath(*key.parts[dropped:])
        if not os.path.isfile(image):
            log.skip(image, "listed, but there is no such file")
            continue
        label = _lookout_label(entry, where)
        split = meaning(path.stem).split or (TEST if label else TRAIN)
        yield Sample(image, split, folder_name(base), label, "anomaly" if label else "")


def _key(address: str) -> PurePosixPath:
    """The parts of an address without its scheme; none of them leads upwards."""
    parts = PurePosixPath(address.partition("://")[2] or address).parts
    return PurePosixPath(*(part for part in parts if part not in ("..", "/")))


def _lookout_label(entry: dict[str, Any], where: str) -> int | None:
    """By the class name, as numbers differ between labelling jobs; None where nobody has judged the image."""
    for name, value in entry.items():
        if name.endswith("-metadata") and as_object(value, where).get("type") == _CLASSIFIED:
            said = str(value.get("class-name", ""))
            role = meaning(said).role
            if role not in (GOOD, BAD):
                raise DataError(f"{where}: class-name {said!r}; accepted: normal, anomaly")
            return int(role == BAD)
    return None
