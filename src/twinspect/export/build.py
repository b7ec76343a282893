"""A bundle to one exported file that proved itself: written aside, run beside torch, renamed when it agrees.

Nothing half-written stays under the name asked for: every step happens in a folder beside it that goes away.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinspect._version import __version__
from twinspect.errors import BundleError, ConfigError, OutputError, TwinspectError, unknown_name
from twinspect.export.parity import Comparison, ParityError, Pixels, compare
from twinspect.files import lock, refuse_unwritable
from twinspect.inference.runtimes import ExportMeta, TorchRuntime, load_runtime, write_meta
from twinspect.types import Progress, silent

if TYPE_CHECKING:
    from twinspect.bundle import Fitted

# Precision -> what to do where an export of it does not agree with the model.
_ADVICE = {
    "fp32": "Please report this with the versions that twinspect doctor prints",
    "fp16": "Type --precision fp32",
}
# Ending of a file -> runtime it is for, and packages that write it.
_FORMATS = {
    ".onnx": ("onnx", ("onnx", "onnxscript", "onnxruntime")),
    ".xml": ("openvino", ("onnx", "onnxscript", "openvino")),
}


def export(
    fitted: Fitted,
    out: Path,
    precision: str = "fp32",
    images: Sequence[Pixels] = (),
    progress: Progress = silent,
) -> Comparison:
    """Write an export, after it agreed with torch.

    Args:
        fitted: trained model with its decision.
        out: file to write, whose ending says the runtime: ``.onnx``, or ``.xml`` (with ``.bin``) for OpenVINO. The
            metadata are written beside it.
        precision: ``fp32``, or ``fp16`` for OpenVINO, with weights at half the size.
        images: to compare on, of the model's size (`parity.load_images`), at least 32; without any some are painted.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: an ending or a precision that there is not, or a model that cannot be exported.
        ParityError: the export does not say what the model says; nothing is written.
        OutputError: it cannot be written.
        TwinspectError: a package is missing (the message is the line to type).
    """
    runtime = checked_runtime(out, precision)
    refuse_unwritable(out, "--out")
    from twinspect.export import graph

    def seal(checked: dict[str, Any]) -> None:
        fixed = (fitted.decision.to_dict(), fitted.record, fitted.config.to_dict())
        write_meta(draft, ExportMeta(runtime, precision, fitted.model.size, *fixed, checked, __version__))

    try:
        with _drafts(out) as folder:
            draft = folder / out.name
            progress("exporting", 0, 1)
            graph.write(graph.to_onnx(fitted.model), draft, half=precision == "fp16")
            progress("exporting", 1, 1)
            seal({})  # without metadata it cannot be loaded
            reference, exported = TorchRuntime(fitted.model), load_runtime(draft)[0]
            comparison = compare(reference, exported, images, fitted.decision, progress)
            if problems := "; ".join(comparison.problems(precision)):
                raise ParityError(
                    f"the {precision} export does not say what the model says: {problems}. Nothing was written. "
                    f"{_ADVICE[precision]}"
                )
            seal(asdict(comparison))
            made = [part for part in folder.iterdir() if part.is_file()]
            for part in sorted(made, key=lambda p: p == draft):
                os.replace(part, out.with_name(part.name))
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror or error}); nothing was left behind") from None
    return comparison


def check(path: Path, fitted: Fitted, images: Sequence[Pixels]) -> tuple[Comparison, ExportMeta]:
    """Compare an export with its bundle on demand; the caller decides what to do about `Comparison.problems`.

    Raises:
        BundleError: a damaged export, or one of another bundle.
    """
    exported, meta = load_runtime(path)
    if meta.decision.get("model_id") != fitted.decision.model_id:
        raise BundleError(
            f"{path} was exported from another model (id {meta.decision.get('model_id')}, this bundle's is "
            f"{fitted.decision.model_id}); type: twinspect export BUNDLE --out {path.name}"
        )
    return compare(TorchRuntime(fitted.model), exported, images, fitted.decision, silent), meta


def checked_runtime(out: Path, precision: str) -> str:
    """The runtime that a file's ending says, which is there to compare with.

    Raises:
        ConfigError: another ending, or a precision that there is not.
        TwinspectError: a package is missing.
    """
    runtime, needed = _FORMATS.get(out.suffix, ("", ()))
    if not runtime:
        raise ConfigError(f"--out {out.name}: an export ends in .onnx, or in .xml for OpenVINO")
    if precision not in _ADVICE:
        raise ConfigError(unknown_name("precision", precision, _ADVICE))
    if (runtime, precision) == ("onnx", "fp16"):
        raise ConfigError(f"--precision fp16 is written for OpenVINO only; type --out {out.stem}.xml")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise TwinspectError(
            f"{out.name} needs {', '.join(missing)}; type: pip install {' '.join(missing)} "
            f'(or: pip install "twinspect[{runtime}]")'
        )
    return runtime


@contextmanager
def _drafts(out: Path) -> Iterator[Path]:
    """A folder for what is not accepted yet; one that a killed export left is emptied first.

    Raises:
        ConfigError: another export to the same file is at work.
    """
    folder = out.with_name(f".{out.name}.export")
    folder.mkdir(exist_ok=True)
    with lock(folder / "lock", f"another export to {out} is at work; wait for it, or choose another --out"):
        drafts = folder / "drafts"
        shutil.rmtree(drafts, ignore_errors=True)
        drafts.mkdir()
        try:
            yield drafts
        finally:
            shutil.rmtree(folder, ignore_errors=True)
