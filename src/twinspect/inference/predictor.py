"""Images to results with any runtime: torch, ONNX Runtime or OpenVINO behind one contract.

A runtime is anything with ``size`` and ``run(pixels) -> dict of arrays``; everything before it (decoding, resizing)
and after it (p-values, thresholds, geometry) is done once, by `Predictor`. Whoever runs an ONNX or OpenVINO file
never loads torch.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from twinspect.bundle import EXPORTS, is_export, read_meta
from twinspect.data.images import MOST_PIXELS
from twinspect.decide.decision import Decision
from twinspect.device import (
    PRECISIONS,
    choose_device,
    gpu_arithmetic,
    granted_threads,
    keep_freed_memory,
    share_cores,
)
from twinspect.errors import BundleError, ConfigError, ImageError, TwinspectError, required
from twinspect.inference import decode
from twinspect.inference.decode import Decoded, Decoding
from twinspect.inference.regions import find_regions, strongest_place
from twinspect.inference.result import Result
from twinspect.inference.streams import Item

if TYPE_CHECKING:
    from twinspect.models.contract import AnomalyModel

Pixels = NDArray[np.uint8]
Answers = Mapping[str, NDArray[Any]]
Tag = TypeVar("Tag")
_GPU_BATCH = 16
_MOST_BESIDE = 8  # images that are computed side by side unless asked for more: each takes memory
_CPU = threading.Lock()  # models of one process take turns on the processor; alone each is done sooner


class Runtime(Protocol):
    """What executes the model's graph."""

    size: int

    def run(self, pixels_BHWC: Pixels) -> Answers:
        """uint8 RGB B x S x S x 3 to arrays named as the fields of the model's `Outputs`."""
        ...


class Predictor:
    """Scores files, folders, globs, arrays and PIL images with one loaded model.

    Args:
        runtime: executes the graph.
        decision: calibration and threshold of the bundle.
        batch: images per call of the runtime.
        workers: threads that decode ahead, or processes with ``processes`` (see `decode.ahead`).
    """

    def __init__(
        self,
        runtime: Runtime,
        decision: Decision,
        batch: int = 4,
        workers: int | None = None,
    ) -> None:
        self.runtime, self.decision, self.batch, self.max_pixels = runtime, decision, batch, MOST_PIXELS
        self.workers, self.processes = workers or min(4, os.cpu_count() or 1), False

    def predict(
        self,
        source: Any,
        maps: bool = True,
        pixels: bool = True,
        class_name: str | None = None,
        live: bool | None = None,
        bgr: bool = False,
    ) -> Iterator[Result]:
        """Results in the order of the images, a few at a time (constant memory).

        ``source``, ``class_name``, ``bgr`` and the errors are those of `Detector.predict`.

        Args:
            source: images.
            maps: keep each result's anomaly map.
            pixels: keep each result's image for overlays.
            class_name: None predicts it per image.
            live: answer each image before the next one is taken, instead of reading ahead; None: where the source is
                an iterable without a length, such as a generator.
            bgr: arrays have blue first.
        """
        self.decision.checked_class(class_name)
        items = map(decode.from_bgr, decode.expand(source)) if bgr else decode.expand(source)
        one_by_one = decode.is_live(source) if live is None else live
        decoded = self._decoded(items, pixels, one_by_one)
        results = self.score(decoded, maps, class_name, 1 if one_by_one else self.batch)
        return _readable(results) if decode.is_single(source) else results

    def _decoded(self, items: Iterator[Item], pixels: bool, one_by_one: bool) -> Iterator[Decoded]:
        if one_by_one:
            yield from (self.decode(item, pixels) for item in items)
            return
        with closing(self.decode_ahead(((None, item) for item in items), pixels)) as images:
            yield from (image for _, image in images)

    def decode_ahead(
        self, tagged: Iterable[tuple[Tag, Any]], pixels: bool
    ) -> Generator[tuple[Tag, Decoded], None, None]:
        """Images with their tags made ready for `score`, as `decode.ahead`; ``pixels`` keeps whole images."""
        return decode.ahead(tagged, self._decoding(pixels), self.workers, self.processes, self.batch)

    def _decoding(self, pixels: bool) -> Decoding:
        return Decoding(self.runtime.size, self.max_pixels, pixels, self.decision.tiles)

    def score(
        self, decoded: Iterable[Decoded], maps: bool = True, class_name: str | None = None, batch: int = 0
    ) -> Iterator[Result]:
        """Results of images that were decoded to ``runtime.size``, in order, a batch (0: the usual) at a time."""
        images = iter(decoded)
        while taken := list(islice(images, batch or self.batch)):
            yield from self.score_batch(taken, maps, [class_name] * len(taken))

    def decode(self, item: Any, pixels: bool = False) -> Decoded:
        """One image made ready for `score_batch`; for callers that decode where and when they like."""
        return decode.decode(item, self._decoding(pixels))

    def score_batch(
        self, images: Sequence[Decoded], maps: bool, class_names: Sequence[str | None]
    ) -> Iterator[Result]:
        """Results of decoded images, in one call of the runtime, each with its own class or None to predict it."""
        usable = [image.square for image in images if image.square is not None]
        began = time.perf_counter()
        out = self._run(np.stack(usable)) if usable else {}
        ms, place = (time.perf_counter() - began) * 1e3 / max(len(usable), 1), 0
        for image, class_name in zip(images, class_names, strict=True):
            if image.square is None:
                yield Result(image.name, width=image.width, height=image.height, rgb=image.rgb, error=image.error)
                continue
            result = self._result(image, {name: value[place] for name, value in out.items()}, class_name, ms)
            result.grid, place = result.grid if maps else None, place + 1
            yield result

    def _run(self, squares: Pixels) -> Answers:
        """What the runtime says of images; of their tiles so many at a time as else of images."""
        tiles = self.decision.tiles
        if tiles == (1, 1):
            return self.runtime.run(squares)
        flat = squares.reshape(-1, *squares.shape[2:])
        parts = [self.runtime.run(flat[i : i + self.batch]) for i in range(0, len(flat), self.batch)]
        out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return decode.joined(out, tiles, self.decision.class_of_cluster)

    def _result(self, image: Decoded, out: Mapping[str, Any], class_name: str | None, ms: float) -> Result:
        decision, grid = self.decision, np.asarray(out["map_B1HW"][0], dtype=np.float32)
        score, distance = float(out["score_B"]), float(out.get("cluster_distance_B", np.nan))
        judged = decision.judge(score, int(out["cluster_B"]), distance, class_name)
        rule = decision.rule(judged["class_name"], class_name is not None)
        result = Result(
            image.name, score, float(out["score_local_B"]), float(out["score_semantic_B"]), **judged,
            cluster_distance=distance, peak=float(grid.max()), model_id=decision.model_id, width=image.width,
            height=image.height, ms=ms, scale=decision.map_scale, grid=grid, rgb=image.rgb, roi=decision.roi,
            near=decision.nearest(int(out.get("nearest_B", -1))),
        )  # fmt: skip
        if not np.isfinite(score):
            result.error = f"{image.name}: the score is not finite; the model is damaged"
            result.is_anomaly, result.answer = None, ""
        elif rule.region is not None:
            threshold, shape = rule.region.value, (image.height, image.width)
            if result.is_anomaly:
                threshold = min(threshold, strongest_place(grid, shape))
            result.threshold_region = threshold
            result.regions = find_regions(grid, shape, threshold, rule.peaks)
        return result


def _readable(results: Iterator[Result]) -> Iterator[Result]:
    for result in results:
        if result.error:
            raise ImageError(result.error)
        yield result


class TorchRuntime:
    """The model itself, eager, on a device; ``threads`` of the CPU (0: torch's own choice) are the process's.

    ``precision``: of a GPU, ``fp32`` or ``tf32``. In bf16 distances from good images are lost in rounding.
    """

    def __init__(self, model: AnomalyModel, device: str = "cpu", threads: int = 0, precision: str = "fp32") -> None:
        import torch

        from twinspect.models.fold import prepared

        keep_freed_memory()
        self._torch, self.device, self.size, self.precision = torch, device, model.size, precision
        ready = prepared(model.eval())
        self.model = ready if device == "cpu" else copy.deepcopy(ready).to(device)  # the one given stays on the CPU
        if threads:
            torch.set_num_threads(threads)
        self._pool = ThreadPoolExecutor(torch.get_num_threads())
        # Images in a batch, unless asked for another number.
        self.usual = min(torch.get_num_threads(), _MOST_BESIDE) if device == "cpu" else _GPU_BATCH

    def run(self, pixels_BHWC: Pixels) -> Answers:
        """uint8 RGB B x S x S x 3 to arrays named as the fields of `Outputs`.

        On a CPU images are computed side by side, each with a share of the threads. Threads that share an image wait
        for each other hundreds of times, and beside another busy process each time for the slowest. Side by side
        nobody waits.
        """
        if self.device != "cpu":
            return self.call(pixels_BHWC)
        with _CPU:
            threads = self._torch.get_num_threads()
            beside = min(len(pixels_BHWC), threads)
            if beside < 2:
                return self.call(pixels_BHWC)

            def alone(one_BHWC: Pixels) -> Answers:
                self._torch.set_num_threads(threads // beside)
                return self.call(one_BHWC)

            try:
                parts = list(self._pool.map(alone, np.split(pixels_BHWC, len(pixels_BHWC))))
            finally:
                self._torch.set_num_threads(threads)  # part of it holds for all threads of the process
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def call(self, pixels_BHWC: Pixels) -> Answers:
        """As `run`, in one call of the model."""
        with self._torch.inference_mode(), gpu_arithmetic(self.device, self.precision):
            image = self._torch.from_numpy(pixels_BHWC).to(self.device).permute(0, 3, 1, 2)
            out = self.model(image)
        return {name: value.cpu().numpy() for name, value in out._asdict().items()}


class OnnxRuntime:
    """An ``.onnx`` file on ONNX Runtime: CUDA where its package offers it, else the CPU."""

    def __init__(self, path: Path, size: int, threads: int = 0) -> None:
        ort = required("onnxruntime", path.name)
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
        return dict(zip(self.names, self.session.run(self.names, {"image": pixels_BHWC}), strict=True))


class OpenVinoRuntime:
    """An ``.xml`` + ``.bin`` pair on OpenVINO's CPU device."""

    def __init__(self, path: Path, size: int, threads: int = 0) -> None:
        ov = required("openvino", path.name)
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
        outputs = self.request.infer({0: np.ascontiguousarray(pixels_BHWC)})
        return {name: outputs[i].copy() for i, name in enumerate(self.names)}


# Ending of an exported file -> what runs it.
RUNTIMES: dict[str, type[OnnxRuntime] | type[OpenVinoRuntime]] = {".onnx": OnnxRuntime, ".xml": OpenVinoRuntime}


def load_predictor(
    path: Path | str, threads: int = 0, batch: int = 0, device: str = "cpu", precision: str = "fp32"
) -> Predictor:
    """A predictor for a bundle (.twin), which runs with torch, or an exported model (.onnx, .xml).

    Args:
        path: the file.
        threads: of the runtime; 0 leaves its own choice.
        batch: images per call; 0 takes one for each thread of torch on a CPU (at most 8), 16 on a GPU, and for an
            export 1.
        device: of a bundle: ``cpu``, ``cuda``, ``cuda:1``, or ``auto`` (a GPU where there is one). Exported models
            go by what their runtime offers.
        precision: of a bundle on a GPU: ``fp32``, or ``tf32``: up to three times as fast, scores differ a little.

    Raises:
        BundleError: damaged, changed, too new or too old.
        TwinspectError: the runtime is not installed (the message is the line to type).

    Examples:
        >>> for result in load("model.onnx").predict("new/"):
        ...     print(result.path, result.score, result.is_anomaly)
    """
    path = Path(path)
    if precision not in PRECISIONS or (precision != "fp32" and is_export(path)):
        raise ConfigError(
            f"--precision {precision}: accepted {' or '.join(PRECISIONS)}; an exported model has its own precision"
        )
    if is_export(path):
        if device.partition(":")[0] not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"--device {device}: accepted auto, cpu, cuda or cuda:1; an exported model runs on what its runtime "
                "offers (a GPU with onnxruntime-gpu)"
            )
        engine, meta = load_runtime(path, threads)
        return Predictor(engine, Decision.from_dict(meta["decision"]), batch or 1)
    share_cores()
    if any(metadata.distributions(name="twinspect-runtime")):  # what packaging/runtime installs
        raise TwinspectError(
            f"{path.name} is a bundle, and this is the light runtime, which runs exported models. Where the whole of "
            f"twinspect is installed, type: twinspect export {path.name} --out {path.stem}.onnx"
        )
    required("torch", path.name)
    from twinspect.bundle import load

    chosen, fitted = choose_device(device), load(path)
    if precision != "fp32" and chosen == "cpu":
        raise ConfigError(f"--precision {precision} is for a GPU, and {path.name} would run on the CPU; leave it out")
    torch_runtime = TorchRuntime(fitted.model, chosen, threads, precision)
    return Predictor(torch_runtime, fitted.decision, batch or torch_runtime.usual)


def load_runtime(path: Path, threads: int = 0) -> tuple[Runtime, dict[str, Any]]:
    """The runtime of an exported file, and `bundle.read_meta` of it. Raises as `load_predictor`."""
    if not is_export(path):
        raise ConfigError(f"{path.name}: exported models end in {', '.join(EXPORTS)}")
    meta = read_meta(path)
    return RUNTIMES[path.suffix.lower()](path, meta["size"], threads), meta
