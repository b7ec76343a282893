"""What an exported model says of itself: metadata, precision, hash. Standard library only.

An ONNX file carries everything in its ``metadata_props``, so that a line PC needs one file; an OpenVINO
export has the same JSON in a file beside it. Both are read here without any runtime: the few
bytes of protobuf that are needed are walked by hand.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from twinspect._version import __version__
from twinspect.errors import BundleError, ConfigError

FORMAT = 1  # of the metadata; raised when a reader of an older library would misunderstand it
OLDEST = 1  # the oldest format this library still runs
KEY = "twinspect"
RUNTIME_OF_SUFFIX = {".onnx": "onnx", ".xml": "openvino"}
_ONNX_METADATA_FIELD = 14  # ModelProto.metadata_props
_SEAL = b'"sealed_sha256": "'
_BLANK = b"0" * 64


@dataclass(frozen=True, slots=True)
class ExportMeta:
    """Metadata of an export.

    Attributes:
        runtime: ``onnx`` or ``openvino``: what the file was made for.
        precision: ``fp32``, ``fp16`` or ``int8``.
        size: input side in pixels.
        batch: images per call; 0 means any number.
        any_size: the graph resizes images of any height and width itself.
        decision: calibration and threshold, as in the bundle.
        record: how the model came to be, as in the bundle.
        config: settings of the training run, as in the bundle.
        check: the comparison with torch that the export passed before it was written.
        writer: version of the library that wrote it.
    """

    runtime: str
    precision: str
    size: int
    batch: int
    any_size: bool
    decision: dict[str, Any]
    record: dict[str, Any]
    config: dict[str, Any]
    check: dict[str, Any]
    writer: str

    def to_json(self, files: dict[str, str] | None = None) -> str:
        """JSON with a blank seal; ``files`` are the sha256 of companion files by ending."""
        values = {name: getattr(self, name) for name in self.__slots__}
        head = {"format": FORMAT, "sealed_sha256": _BLANK.decode(), "files": files or {}}
        return json.dumps({**head, **values}, allow_nan=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExportMeta:
        """From the JSON's values; names this library does not know are left out."""
        return cls(**{name: values[name] for name in cls.__slots__})


def is_export(path: Path | str) -> bool:
    """Whether a path names an exported model (.onnx, .xml) rather than a bundle."""
    return Path(path).suffix in RUNTIME_OF_SUFFIX


def seal(path: Path) -> None:
    """Write the hash of a file into it: over all bytes, with the 64 digits of the seal as zeros.

    Raises:
        BundleError: the file has no blank seal, or several.
    """
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as body:
        place, digest = _unsealed_hash(body, path)
        body[place : place + 64] = digest.encode()


def read_export(path: Path) -> ExportMeta:
    """Read and verify what an exported model says of itself; no runtime is loaded.

    Raises:
        BundleError: no such file, not made by ``twinspect export``, changed or damaged since, or made for
            another version of the library.
    """
    if not path.is_file():
        raise BundleError(f"no such model: {path}. Make one with: twinspect export BUNDLE --out {path}")
    if not is_export(path):
        raise ConfigError(f"{path.name}: exported models end in {', '.join(RUNTIME_OF_SUFFIX)}")
    home = path if path.suffix == ".onnx" else companion(path)
    try:
        values = _metadata(home)
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(f"{home} is damaged or not an export ({error}); copy it again or export again") from None
    if values is None:
        raise BundleError(
            f"{path} holds no twinspect metadata: it was not made by twinspect export, and without its "
            "threshold no decision can be made. Type: twinspect export BUNDLE --out NEW.onnx"
        )
    _refuse_version(path, values)
    _refuse_changed(home, values)
    try:
        return ExportMeta.from_dict(values)
    except KeyError as error:
        raise BundleError(f"{path}: its metadata lack {error}; export it again") from None


def export_info(path: Path) -> dict[str, Any]:
    """What an export says of itself, for people."""
    meta = read_export(path)
    batch, size = meta.batch or "any", "any height and width" if meta.any_size else f"{meta.size} x {meta.size}"
    return {
        "written by": f"twinspect {meta.writer}, export format {FORMAT}",
        "export": f"{meta.runtime}, {meta.precision}, batch {batch}, {size}, uint8 RGB, channels last",
        "compared with torch": meta.check,
        "model_id": meta.decision.get("model_id", ""),
        **meta.record,
    }


def companion(path: Path) -> Path:
    """The JSON file beside an OpenVINO export."""
    return path.with_suffix(".json")


def sha256_of(path: Path) -> str:
    """Hash of a whole file, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _metadata(home: Path) -> dict[str, Any] | None:
    if home.suffix == ".json":
        if not home.is_file():
            raise OSError(f"{home.name} must lie beside the model")
        values: dict[str, Any] = json.loads(home.read_text(encoding="utf-8"))
        return values
    with home.open("rb") as file:
        for body in _fields(file, _ONNX_METADATA_FIELD):
            pair = [part.decode("utf-8", "replace") for n in (1, 2) for part in _fields(io.BytesIO(body), n)]
            if len(pair) == 2 and pair[0] == KEY:
                return dict(json.loads(pair[1]))
    return None


def _fields(file: BinaryIO | io.BytesIO, wanted: int) -> Iterator[bytes]:
    """Bodies of one length-delimited field of a protobuf message; everything else is skipped unread."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    while (here := file.tell()) < end:
        number, kind = divmod(_varint(file), 8)
        if kind == 0:
            _varint(file)
        elif kind == 2:
            length = _varint(file)
            if file.tell() + length > end:
                raise ValueError(f"cut off at byte {end}")
            if number == wanted:
                yield file.read(length)
            else:
                file.seek(length, os.SEEK_CUR)
        else:
            raise ValueError(f"no ONNX model (byte {here})")


def _varint(file: BinaryIO | io.BytesIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise EOFError("cut off")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("no ONNX model (a number that does not end)")


def _refuse_version(path: Path, values: dict[str, Any]) -> None:
    found, writer = values.get("format", 0), values.get("writer", "an unknown version")
    if not isinstance(found, int) or found > FORMAT:
        raise BundleError(
            f"{path} has export format {found}, written by twinspect {writer}; this is {__version__} and reads "
            f"up to format {FORMAT}. Type: pip install --upgrade twinspect"
        )
    if found < OLDEST:
        raise BundleError(
            f"{path} has export format {found}, written by twinspect {writer}; this is {__version__} and reads "
            f"from format {OLDEST}. Export its bundle again: twinspect export BUNDLE --out {path.name}"
        )


def _refuse_changed(home: Path, values: dict[str, Any]) -> None:
    with home.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as body:
        _, digest = _unsealed_hash(body, home)
    if digest != values.get("sealed_sha256"):
        raise BundleError(f"{home} was changed or damaged after it was exported (sha256); export it again")
    for ending, expected in dict(values.get("files", {})).items():
        part = home.with_suffix(ending)
        if not part.is_file():
            raise BundleError(f"{part} is missing; an export is moved with all its files")
        if sha256_of(part) != expected:
            raise BundleError(f"{part} was changed or damaged after it was exported (sha256); export it again")


def _unsealed_hash(body: mmap.mmap, path: Path) -> tuple[int, str]:
    """Place of the seal's digits, and the hash of all bytes with zeros there."""
    first = body.find(_SEAL)
    if first < 0 or first != body.rfind(_SEAL):
        raise BundleError(
            f"{path} has {'several seals' if first >= 0 else 'no seal'} instead of one; export it again"
        )
    place = first + len(_SEAL)
    digest = hashlib.sha256()
    with memoryview(body) as view:
        for part in (view[:place], memoryview(_BLANK), view[place + 64 :]):
            digest.update(part)
            part.release()
    return place, digest.hexdigest()
