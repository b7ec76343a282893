"""What executes the graph: torch, ONNX Runtime or OpenVINO behind one contract.

Whoever runs an ONNX or OpenVINO file never loads torch. Beside ``model.onnx`` or ``model.xml`` lies
``model.onnx.json`` or ``model.xml.json``: how the model came to be, its threshold, the comparison that it passed, and
the sha256 of every file of the export.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from twinspect.device import choose_device, granted_threads, share_cores
from twinspect.errors import NONSENSE, BundleError, ConfigError, TwinspectError, refuse_version
from twinspect.files import near_names, sha256_of
from twinspect.inference.predictor import Decision, Predictor, Runtime, check_counts

if TYPE_CHECKING:
    from twinspect.models.contract import AnomalyModel


Pixels = NDArray[np.uint8]
Answers = Mapping[str, NDArray[Any]]
Answer = TypeVar("Answer")
_GPU_BATCH = 16
_MOST_BESIDE = 8  # images that are computed side by side unless asked for more: each takes memory
_CPU = threading.Lock()  # models of one process take turns on the processor; alone each is done sooner
FORMAT = 3  # of the metadata; raised when a reader of an older library would misunderstand it


class TorchRuntime:
    """The model itself, eager, on a device; ``threads`` of the CPU (0: torch's own choice) are the process's."""

    def __init__(self, model: AnomalyModel, device: str = "cpu", threads: int = 0) -> None:
        import torch

        from twinspect.device import keep_freed_memory
        from twinspect.models.fold import prepared

        keep_freed_memory()
        self._torch, self.device, self.size = torch, device, model.size
        self.model = prepared(model.eval()).to(device)
        if threads:
            torch.set_num_threads(threads)
        self._pool = ThreadPoolExecutor(torch.get_num_threads())
        # Images in a batch, unless asked for another number.
        self.usual = min(torch.get_num_threads(), _MOST_BESIDE) if device == "cpu" else _GPU_BATCH

    def run(self, pixels_BHWC: Pixels) -> Answers:
        """uint8 RGB B x S x S x 3 to arrays named as the fields of `Outputs`."""
        parts = self.spread(self.call, pixels_BHWC)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def spread(self, call: Callable[[Pixels], Answer], pixels_BHWC: Pixels) -> list[Answer]:
        """What ``call`` says of the batch; on a CPU of each of its images, side by side with a share of the threads.

        Threads that share an image wait for each other hundreds of times, and beside another busy process each time
        for the slowest. Side by side nobody waits.
        """
        if self.device != "cpu":
            return [call(pixels_BHWC)]
        with _CPU:
            threads = self._torch.get_num_threads()
            beside = min(len(pixels_BHWC), threads)
            if beside < 2:
                return [call(pixels_BHWC)]

            def alone(one_BHWC: Pixels) -> Answer:
                self._torch.set_num_threads(threads // beside)
                return call(one_BHWC)

            try:
                return list(self._pool.map(alone, np.split(pixels_BHWC, len(pixels_BHWC))))
            finally:
                self._torch.set_num_threads(threads)  # part of it holds for all threads of the process

    def call(self, pixels_BHWC: Pixels) -> Answers:
        """As `run`, in one call of the model."""
        with self._torch.inference_mode():
            image = self._torch.from_numpy(pixels_BHWC).to(self.device).permute(0, 3, 1, 2)
            out = self.model(image)
        return {name: value.cpu().numpy() for name, value in out._asdict().items()}


class OnnxRuntime:
    """An ``.onnx`` file on ONNX Runtime: CUDA where its package offers it, else the CPU."""

    def __init__(self, path: Path, size: int, threads: int = 0) -> None:
        ort = required("onnxruntime", path)
        accepted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in accepted if name in ort.get_available_providers()]
        try:
            self.session = ort.InferenceSession(str(path), self.options(threads), providers=providers)
        except Exception as error:  # onnxruntime's own exception types share no public base
            raise BundleError(
                f"{path}: ONNX Runtime {ort.__version__} cannot load it ({error}). Its operators may be newer "
                "than this runtime; type: pip install --upgrade onnxruntime"
            ) from None
        self.size, self.names = size, [output.name for output in self.session.get_outputs()]

    @staticmethod
    def options(threads: int) -> Any:
        """Settings of a session; 0 threads leaves the runtime's own choice."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or granted_threads()
        # Threads that spin between calls take the cores from those that decode the next images; within a call they
        # save a quarter of a single image's time.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def run(self, pixels_BHWC: Pixels) -> Answers:
        """uint8 RGB B x S x S x 3 to arrays named as the fields of `Outputs`."""
        pixels = check_pixels(pixels_BHWC, self.size)
        return dict(zip(self.names, self.session.run(self.names, {"image": pixels}), strict=True))


class OpenVinoRuntime:
    """An ``.xml`` + ``.bin`` pair on OpenVINO's CPU device."""

    def __init__(self, path: Path, size: int, threads: int = 0) -> None:
        ov = required("openvino", path)
        # Left alone OpenVINO computes in bf16 where the CPU can, and scores would no longer agree.
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads := threads or granted_threads():
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = ov.compile_model(str(path), "CPU", options)
        except Exception as error:  # openvino raises RuntimeError subclasses of its own
            raise BundleError(
                f"{path}: OpenVINO {ov.__version__} cannot load it ({error}); type: pip install --upgrade openvino"
            ) from None
        self.request = compiled.create_infer_request()
        self.size, self.names = size, [output.any_name for output in compiled.outputs]

    def run(self, pixels_BHWC: Pixels) -> Answers:
        """uint8 RGB B x S x S x 3 to arrays named as the fields of `Outputs`."""
        outputs = self.request.infer({0: check_pixels(pixels_BHWC, self.size)})
        return {name: outputs[i].copy() for i, name in enumerate(self.names)}


# Ending of an exported file -> what runs it.
RUNTIMES: dict[str, type[OnnxRuntime] | type[OpenVinoRuntime]] = {".onnx": OnnxRuntime, ".xml": OpenVinoRuntime}


def load_predictor(path: Path | str, threads: int = 0, batch: int = 0, device: str = "cpu") -> Predictor:
    """A predictor for a bundle (.twin), which runs with torch, or an exported model (.onnx, .xml).

    Args:
        path: the file.
        threads: of the runtime; 0 leaves its own choice.
        batch: images per call; 0 takes one for each thread of torch on a CPU (at most 8), 16 on a GPU, and for an
            export 1.
        device: of a bundle: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` (a GPU where there is one). Exported models
            go by what their runtime offers.

    Raises:
        BundleError: damaged, changed, too new or too old.
        TwinspectError: the runtime is not installed (the message is the line to type).

    Examples:
        >>> for result in load("model.onnx").predict("new/"):
        ...     print(result.path, result.score, result.is_anomaly)
    """
    path = Path(path)
    check_counts(threads, batch)
    if is_export(path):
        if device.partition(":")[0] not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"--device {device}: accepted auto, cpu, cuda or cuda:1; an exported model runs on what its runtime "
                "offers (a GPU with onnxruntime-gpu)"
            )
        engine, meta = load_runtime(path, threads)
        return Predictor(engine, Decision.from_dict(meta.decision), batch or 1)
    share_cores()
    required("torch", path)
    from twinspect.bundle import load

    chosen, fitted = choose_device(device), load(path)
    torch_runtime = TorchRuntime(fitted.model, chosen, threads)
    return Predictor(torch_runtime, fitted.decision, batch or torch_runtime.usual)


def load_runtime(path: Path, threads: int = 0) -> tuple[Runtime, ExportMeta]:
    """The runtime of an exported file, and the file's verified metadata. Raises as `load_predictor`."""
    meta = read_export(path)
    return RUNTIMES[path.suffix.lower()](path, meta.size, threads), meta


def required(package: str, path: Path) -> Any:
    """Import a runtime's package, or say what to type."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        # Whether the distribution of packaging/runtime is what is installed here.
        if package == "torch" and any(metadata.distributions(name="twinspect-runtime")):
            raise TwinspectError(
                f"{path.name} is a bundle, and this is the light runtime, which runs exported models. Where the "
                f"whole of twinspect is installed, type: twinspect export {path.name} --out {path.stem}.onnx"
            ) from None
        raise TwinspectError(
            f"{path.name} needs {package}, which cannot be imported ({error}). Type: pip install {package}"
        ) from None


def check_pixels(pixels_BHWC: Pixels, size: int) -> Pixels:
    """Refuse what the graph would misread, by a ConfigError: another type, channel order, shape, or nothing."""
    pixels = np.asarray(pixels_BHWC)
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3) or not len(pixels):
        hint = "; channels come first here: type a.transpose(0, 2, 3, 1)" if pixels.shape[1:2] == (3,) else ""
        raise ConfigError(
            f"pixels of type {pixels.dtype} and shape {pixels.shape}; accepted uint8 of B x {size} x {size} x 3 "
            f"(RGB, channels last, B from 1){hint}"
        )
    return np.ascontiguousarray(pixels)


# -------------------------------------------------------------------------------------- what an export says of itself


@dataclass(frozen=True, slots=True)
class ExportMeta:
    """Metadata of an export."""

    runtime: str  # what the file was made for: onnx or openvino
    size: int  # input side in pixels
    decision: dict[str, Any]  # as in the bundle, like the next two
    record: dict[str, Any]
    config: dict[str, Any]
    check: dict[str, Any]  # the comparison with torch that the export passed before it was written
    writer: str  # version of the library


def is_export(path: Path | str) -> bool:
    """Whether a path names an exported model (.onnx, .xml) rather than a bundle."""
    return Path(path).suffix.lower() in RUNTIMES


def write_meta(path: Path, meta: ExportMeta) -> None:
    """Write the metadata of an export beside it, with the sha256 of its files."""
    files = {part.suffix: sha256_of(part) for part in (path, path.with_suffix(".bin")) if part.is_file()}
    text = json.dumps({"format": FORMAT, "files": files, **asdict(meta)}, indent=1, allow_nan=False)
    companion(path).write_text(text + "\n", encoding="utf-8")


def read_export(path: Path) -> ExportMeta:
    """Read and verify what an exported model says of itself; no runtime is loaded.

    A BundleError where it is missing, damaged, changed since, or made for another version of the library.
    """
    if not path.is_file():
        advice = f"Make one with: twinspect export BUNDLE --out {path}"
        raise BundleError(f"no such model: {path}.{near_names(path)} {advice}")
    if not is_export(path):
        raise ConfigError(f"{path.name}: exported models end in {', '.join(RUNTIMES)}")
    home = companion(path)
    if not home.is_file():
        raise BundleError(
            f"{home.name} must lie beside {path}: it holds the threshold, without which no decision can be made. "
            "Copy both, or type: twinspect export BUNDLE --out NEW.onnx"
        )
    try:
        values = dict(json.loads(home.read_text(encoding="utf-8")))
        older = f"Export its bundle again: twinspect export BUNDLE --out {path.name}"
        refuse_version(path, values.get("format", 0), FORMAT, values.get("writer", "of an unknown version"), older)
        ending = path.suffix.lower()
        for suffix in {ending, *values["files"]}:
            part = path if suffix == ending else path.with_suffix(suffix)
            if not part.is_file():
                raise BundleError(f"{part} is missing; an export is moved with all its files")
            if sha256_of(part) != values["files"][suffix]:
                raise BundleError(f"{part} was changed or damaged after it was exported (sha256); export it again")
        return ExportMeta(**{field.name: values[field.name] for field in fields(ExportMeta)})
    except KeyError as error:
        raise BundleError(f"{home}: its metadata lack {error}; export it again") from None
    except (*NONSENSE, OSError, RecursionError) as error:
        raise BundleError(f"{home} is damaged or not an export ({error}); copy it again or export again") from None


def export_info(path: Path) -> dict[str, Any]:
    """What an export says of itself, for people."""
    meta = read_export(path)
    return {
        "written by": f"twinspect {meta.writer}, export format {FORMAT}",
        "export": f"{meta.runtime}, {meta.size} x {meta.size}, uint8 RGB, channels last",
        "compared with torch": meta.check,
        "model_id": meta.decision.get("model_id", ""),
        **meta.record,
    }


def companion(path: Path) -> Path:
    """The JSON file beside an export."""
    return path.with_name(f"{path.name}.json")


def files_of(path: Path) -> list[Path]:
    """A model's file, and those beside an export that belong to it, as far as they are there."""
    beside = (path.with_suffix(".bin"), companion(path)) if is_export(path) else ()
    return [file for file in (path, *beside) if file.is_file()]
