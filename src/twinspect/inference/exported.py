"""What an exported model says of itself. Standard library only: no runtime is loaded to read it.

Beside ``model.onnx`` or ``model.xml`` lies ``model.onnx.json`` or ``model.xml.json``: how the model came to be, its
threshold, the comparison that it passed, and the sha256 of every file of the export.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from twinspect._version import __version__
from twinspect.errors import NONSENSE, BundleError, ConfigError

FORMAT = 2  # of the metadata; raised when a reader of an older library would misunderstand it
RUNTIME_OF_SUFFIX = {".onnx": "onnx", ".xml": "openvino"}


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


def is_export(path: Path | str) -> bool:
    """Whether a path names an exported model (.onnx, .xml) rather than a bundle."""
    return Path(path).suffix in RUNTIME_OF_SUFFIX


def write_meta(path: Path, meta: ExportMeta) -> None:
    """Write the metadata of an export beside it, with the sha256 of its files."""
    files = {part.suffix: sha256_of(part) for part in (path, path.with_suffix(".bin")) if part.is_file()}
    text = json.dumps({"format": FORMAT, "files": files, **asdict(meta)}, indent=1, allow_nan=False)
    companion(path).write_text(text + "\n", encoding="utf-8")


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
    home = companion(path)
    if not home.is_file():
        raise BundleError(
            f"{home.name} must lie beside {path}: it holds the threshold, without which no decision can be made. "
            "Copy both, or type: twinspect export BUNDLE --out NEW.onnx"
        )
    try:
        values = dict(json.loads(home.read_text(encoding="utf-8")))
        _refuse_version(path, values)
        _refuse_changed(path, values["files"])
        return ExportMeta(**{one.name: values[one.name] for one in fields(ExportMeta)})
    except KeyError as error:
        raise BundleError(f"{home}: its metadata lack {error}; export it again") from None
    except (*NONSENSE, OSError, RecursionError) as error:
        raise BundleError(f"{home} is damaged or not an export ({error}); copy it again or export again") from None


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
    """The JSON file beside an export."""
    return path.with_name(f"{path.name}.json")


def sha256_of(path: Path) -> str:
    """Hash of a whole file, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_version(path: Path, values: dict[str, Any]) -> None:
    found, writer = values.get("format", 0), values.get("writer", "an unknown version")
    if found != FORMAT:
        newer = not isinstance(found, int) or found > FORMAT
        what = (
            "Type: pip install --upgrade twinspect"
            if newer
            else f"Export its bundle again: twinspect export BUNDLE --out {path.name}"
        )
        raise BundleError(
            f"{path} has export format {found}, written by twinspect {writer}; this is {__version__} and reads "
            f"format {FORMAT}. {what}"
        )


def _refuse_changed(path: Path, files: dict[str, str]) -> None:
    for suffix in {path.suffix, *files}:
        part, expected = path.with_suffix(suffix), files[suffix]
        if not part.is_file():
            raise BundleError(f"{part} is missing; an export is moved with all its files")
        if sha256_of(part) != expected:
            raise BundleError(f"{part} was changed or damaged after it was exported (sha256); export it again")
