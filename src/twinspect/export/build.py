"""A bundle to one exported file that proved itself: written aside, run beside torch, renamed when it agrees.

Nothing half-written stays under the name asked for: every step happens in a folder beside it that goes away.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from twinspect._version import __version__
from twinspect.errors import BundleError, ConfigError, TwinspectError, unknown_name
from twinspect.export.parity import FEWEST, CheckImages, Comparison, ParityError, compare, painted, spread
from twinspect.files import lock, refuse_unwritable
from twinspect.inference.predictor import check_counts
from twinspect.inference.runtimes import ExportMeta, read_export, write_meta
from twinspect.types import Progress, silent

if TYPE_CHECKING:
    from twinspect.storage import Fitted

FORMATS = {"onnx": ".onnx", "openvino": ".xml"}
PRECISIONS = ("fp32", "fp16", "int8")
_NEEDS: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
_MOST_CALIBRATION = 100  # images whose ranges int8 takes; more changes nothing


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What is written.

    Attributes:
        format: ``onnx`` or ``openvino``.
        precision: ``fp32``, ``fp16`` (OpenVINO: weights at half the size) or ``int8`` (statistics stay fp32).
        batch: images per call; 0 leaves it open.
        any_size: resize images of any height and width in the graph.
        accept_loss: write the best there is where none keeps the model's answers; the metadata then say so.
    """

    format: str = "onnx"
    precision: str = "fp32"
    batch: int = 0
    any_size: bool = False
    accept_loss: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(unknown_name("format", self.format, FORMATS))
        if self.precision not in PRECISIONS:
            raise ConfigError(unknown_name("precision", self.precision, PRECISIONS))
        check_counts(0, self.batch)
        if self.format == "onnx" and self.precision == "fp16":
            raise ConfigError("--precision fp16 is written for OpenVINO only; type --format openvino")
        if self.format == "openvino" and self.any_size:
            raise ConfigError(
                "--any-size with --format openvino: its antialiased resize differs from torch's, so scores would "
                "change; type --format onnx, or leave the resizing to twinspect"
            )


def export(
    fitted: Fitted,
    out: Path,
    options: ExportOptions,
    images: CheckImages | None = None,
    calibration: CheckImages | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Write an export, after it agreed with torch.

    Args:
        fitted: trained model with its decision.
        out: file to write: ``.onnx``, or ``.xml`` with ``.bin``; the metadata are written beside it.
        options: format and precision.
        images: to compare on, at least 32; painted ones without any (fp32 and fp16 only).
        calibration: good images whose ranges int8 takes; ``images`` without any.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: options that do not go together, or an operator that cannot be exported.
        ParityError: the export does not say what the model says, and that was not accepted; nothing is written.
        BundleError: the folder cannot be written.
        TwinspectError: a package is missing (the message is the line to type).
    """
    refuse_wrong_name(out, options)
    if options.precision == "int8" and images is None:
        raise ConfigError("int8 needs good images to measure ranges and to prove itself on; add --images DIR")
    _refuse_missing(options)
    refuse_unwritable(out, "--out", error=BundleError)
    report = progress or silent
    checked = images or painted(fitted.model.size)
    try:
        with _drafts(out) as folder:
            draft = folder / out.name
            build = _Build(fitted, options, checked, calibration or checked, draft, report)
            comparison = build.accepted()
            made = [part for part in draft.parent.iterdir() if part.is_file()]
            for part in sorted(made, key=lambda p: p == draft):
                os.replace(part, out.with_name(part.name))
    except OSError as error:
        raise BundleError(f"{out} cannot be written ({error.strerror or error}); nothing was left behind") from None
    return comparison


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


def check(path: Path, fitted: Fitted, images: CheckImages, runtime: str = "auto") -> tuple[Comparison, ExportMeta]:
    """Compare an export with its bundle on demand; the caller decides what to do about `Comparison.problems`.

    Raises:
        BundleError: a damaged export, or one of another bundle.
    """
    meta = read_export(path)
    if meta.decision.get("model_id") != fitted.decision.model_id:
        raise BundleError(
            f"{path} was exported from another model (id {meta.decision.get('model_id')}, this bundle's is "
            f"{fitted.decision.model_id}); type: twinspect export BUNDLE --out {path.name}"
        )
    return _compare(path, fitted, images, runtime, silent), meta


def refuse_wrong_name(out: Path, options: ExportOptions) -> None:
    """The ending says what runs a file.

    Raises:
        ConfigError: another ending.
    """
    ending = FORMATS[options.format]
    if out.suffix != ending:
        raise ConfigError(f"--out {out.name}: a {options.format} export ends in {ending}, such as {out.stem}{ending}")


def format_of(out: Path, asked: str) -> str:
    """The format asked for, or the one the ending of a file says."""
    return asked or next((name for name, ending in FORMATS.items() if out.suffix == ending), "onnx")


def _refuse_missing(options: ExportOptions) -> None:
    needed = _NEEDS[options.format]
    if options.format == "openvino" and options.precision == "int8":
        needed = (*needed, "nncf")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "openvino" if options.format == "openvino" else "onnx"
        raise TwinspectError(
            f"--format {options.format} needs {', '.join(missing)}; type: pip install {' '.join(missing)} "
            f'(or: pip install "twinspect[{extra}]")'
        )


@dataclass(frozen=True, slots=True)
class _Build:
    """One export on its way, in a folder that goes away."""

    fitted: Fitted
    options: ExportOptions
    images: CheckImages
    calibration: CheckImages
    draft: Path
    progress: Progress

    def accepted(self) -> Comparison:
        """Write, compare, refuse; int8 is tried with more and more of the teacher in fp32."""
        from twinspect.export.graph import SKIPPED_SHARES, to_onnx

        self.progress("exporting", 0, 1)
        proto = to_onnx(self.fitted.model, self.options.batch, self.options.any_size)
        self.progress("exporting", 1, 1)
        write = self._int8 if self.options.precision == "int8" else self._plain
        tried: dict[float, Comparison] = {}
        for share in SKIPPED_SHARES if self.options.precision == "int8" else (-1.0,):
            write(proto, share)
            self._seal({})
            tried[share] = comparison = _compare(self.draft, self.fitted, self.images, "auto", self.progress)
            if not comparison.problems(self.options.precision):
                self._describe(comparison, share, accepted_loss=False)
                return comparison
        best = min(tried, key=lambda share: tried[share].loss)
        if not self.options.accept_loss or tried[best].broken:
            self._refuse(tried)
        if best != share:
            write(proto, best)
        self._describe(tried[best], best, accepted_loss=True)
        return tried[best]

    def _refuse(self, tried: Mapping[float, Comparison]) -> NoReturn:
        reasons = [
            "; ".join(comparison.problems(self.options.precision))
            + (f" with {share:.0%} of the teacher in fp32" if share >= 0 else "")
            for share, comparison in tried.items()
        ]
        raise ParityError(
            f"the {self.options.precision} export does not say what the model says: {' | '.join(reasons)}. "
            "Nothing was written. "
            + (
                "Type --precision fp32, or add --accept-loss to get the best of these all the same"
                if self.options.precision != "fp32"
                else "Please report this with the versions that twinspect doctor prints"
            )
        )

    def _plain(self, proto: Any, _share: float) -> None:
        from twinspect.export.graph import refuse_too_large, save_proto

        if self.options.format == "onnx":
            refuse_too_large(proto)
            save_proto(proto, self.draft)
        else:
            import openvino as ov

            half = self.options.precision == "fp16"
            ov.save_model(ov.Core().read_model(self._step(proto)), self.draft, compress_to_fp16=half)

    def _step(self, proto: Any) -> Path:
        from twinspect.export.graph import save_proto

        step = self.draft.parent / "steps" / "fp32.onnx"
        if not step.exists():
            step.parent.mkdir()
            save_proto(proto, step)
        return step

    def _int8(self, proto: Any, share: float) -> None:
        from twinspect.export.graph import int8_onnx, int8_openvino, skipped_layers

        step = self._step(proto)
        skipped = skipped_layers(proto, share)
        good = [s for s, label in zip(self.calibration.squares, self.calibration.labels, strict=True) if label != 1]
        times = max(1, self.options.batch)  # a graph of fixed batch is calibrated on one image, repeated
        chosen = [np.repeat(one[None], times, axis=0) for one in spread(good, _MOST_CALIBRATION)]
        self.progress(f"int8  with {len(skipped)} layers in fp32", 0, 1)
        if self.options.format == "onnx":
            int8_onnx(step, self.draft, proto, chosen, skipped)
        else:
            int8_openvino(step, self.draft, chosen, skipped)

    def _describe(self, comparison: Comparison, share: float, accepted_loss: bool) -> None:
        part = {"teacher_fp32_share": share} if share >= 0 else {}
        self._seal({**comparison.to_dict(), "accepted_loss": accepted_loss, **part})

    def _seal(self, checked: dict[str, Any]) -> None:
        fitted, options = self.fitted, self.options
        write_meta(self.draft, ExportMeta(
            options.format, options.precision, fitted.model.size, options.batch, options.any_size,
            fitted.decision.to_dict(), fitted.record, fitted.config.to_dict(), checked, __version__,
        ))  # fmt: skip


def _compare(path: Path, fitted: Fitted, images: CheckImages, runtime: str, progress: Progress) -> Comparison:
    from twinspect.inference.runtimes import TorchRuntime, load_runtime

    engine, meta = load_runtime(path, runtime)
    shown = images if meta.any_size else dataclasses.replace(images, raw=())
    reference = TorchRuntime(fitted.model)
    return compare(reference, engine, shown, fitted.decision, progress)


def too_few(images: CheckImages) -> str:
    """A remark where an export is compared on fewer images than is good; else empty."""
    count = len(images.squares)
    return f"only {count} images to compare on; {FEWEST} or more say more" if count < FEWEST else ""
