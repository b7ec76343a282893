"""What of a graph's time goes where: its parts, and how much longer it takes than its bare teacher.

Torch is timed part by part, ONNX Runtime by its own profile; OpenVINO does not say. The bare teacher is cut out of
the same model, for the same runtime: raw pixels in, the maps and the embedding that the students need out. Both are
timed in turns, a few calls each, as a machine's speed drifts.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.inference.predictor import Runtime
from twinspect.inference.runtimes import OnnxRuntime, TorchRuntime

Clock = Callable[[], float]
Pixels = NDArray[np.uint8]
Call = Callable[[], object]
PARTS = ("teacher", "local", "semantic", "scorer")
_TEACHER = "teacher/"  # how the names of its nodes begin: see `inference.graph`
_PROFILED = 10  # calls in a profile
_TURNS, _CALLS = 5, 4  # of the graph and the bare teacher, and calls in a turn


def graph_parts(runtime: Runtime, path: Path, threads: int, pixels: Pixels) -> dict[str, float]:
    """Seconds of the graph's parts; empty where the runtime does not say."""
    pixels = _of_a_call(runtime, pixels)
    if isinstance(runtime, TorchRuntime):
        return torch_parts(runtime, pixels)
    return onnx_parts(runtime, path, threads, pixels) if isinstance(runtime, OnnxRuntime) else {}


def ratio_to_teacher(runtime: Runtime, path: Path, threads: int, pixels: Pixels) -> float | None:
    """Time of the graph over that of its bare teacher; None where that cannot be cut out."""
    pixels = _of_a_call(runtime, pixels)
    bare = _bare_teacher(runtime, path, threads, pixels)
    if bare is None:
        return None
    spent: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, Call] = {"whole": lambda: runtime.run(pixels), "bare": bare}
    for _ in range(_TURNS):
        for name, call in calls.items():
            call()  # takes the other's threads and memory back
            for _ in range(_CALLS):
                began = time.perf_counter()
                call()
                spent[name].append(time.perf_counter() - began)
    return float(np.median(spent["whole"]) / np.median(spent["bare"]))


def _of_a_call(runtime: Runtime, pixels: Pixels) -> Pixels:
    """As many images as an export is fixed to, if it is: parts and bare teacher take no other number."""
    fixed = runtime.batch if isinstance(runtime, OnnxRuntime) else 0
    return np.resize(pixels, (fixed or len(pixels), *pixels.shape[1:]))


def _bare_teacher(runtime: Runtime, path: Path, threads: int, pixels: Pixels) -> Call | None:
    if isinstance(runtime, TorchRuntime):
        return _bare_torch(runtime, pixels)
    return _bare_onnx(runtime, path, threads, pixels) if isinstance(runtime, OnnxRuntime) else None


def _bare_torch(runtime: TorchRuntime, pixels: Pixels) -> Call:
    import torch

    teacher, clock = runtime.model.teacher, _torch_clock(runtime.device)

    def call(part: Pixels) -> None:
        with torch.inference_mode():
            image = torch.from_numpy(part).to(runtime.device).permute(0, 3, 1, 2)
            teacher.embedding(teacher.features(teacher.normalise(image)))
        clock()

    return lambda: runtime.spread(call, pixels)


def _bare_onnx(runtime: OnnxRuntime, path: Path, threads: int, pixels: Pixels) -> Call | None:
    try:
        import onnx
    except ImportError:  # a line PC needs the runtime only
        return None
    import onnxruntime as ort

    proto = onnx.load(str(path))
    if not cut_to_teacher(proto):
        return None
    providers = runtime.session.get_providers()
    session = ort.InferenceSession(proto.SerializeToString(), OnnxRuntime.options(threads), providers=providers)
    return lambda: session.run(None, {"image": pixels})


def cut_to_teacher(proto: Any) -> list[str]:
    """Leave of an exported ONNX model its teacher alone; the names of what that says, none if there is no teacher."""
    import onnx

    graph = proto.graph
    maker = {name: node for node in graph.node for name in node.output}
    own = {name for name, node in maker.items() if node.name.startswith(_TEACHER)}
    needed, waiting = set[str](), list(own)
    while waiting:
        node = maker.get(waiting.pop())
        if node is not None and node.name not in needed:
            needed.add(node.name)
            waiting += node.input
    others = [node for node in graph.node if node.name not in needed]
    said = list(dict.fromkeys(name for node in others for name in node.input if name in own))
    for node in others:
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    for unused in [one for one in graph.initializer if one.name not in read]:
        graph.initializer.remove(unused)
    del graph.output[:], graph.value_info[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in said)
    return said


def torch_parts(runtime: TorchRuntime, pixels: Pixels) -> dict[str, float]:
    """Median seconds of the parts of the torch model, by timing them inside a run."""
    model, clock = runtime.model, _torch_clock(runtime.device)
    spent: dict[str, list[float]] = defaultdict(list)
    modules = {**dict(model.student.named_children()), "scorer": model.scorer}
    hooks = [hook for name, module in modules.items() for hook in _time_module(module, spent[name], clock)]
    features = model.teacher.features

    def timed(x: Any) -> Any:
        began = clock()
        found = features(x)
        spent["teacher"].append(clock() - began)
        return found

    model.teacher.features = timed  # type: ignore[method-assign, assignment]
    try:
        for _ in range(_PROFILED):
            began = clock()
            runtime.call(pixels)
            spent["whole"].append(clock() - began)
    finally:
        del model.teacher.features
        for hook in hooks:
            hook.remove()
    # A model without a semantic student spends nothing there; a CNN's teacher looks at large images twice.
    found = {name: float(np.median(spent[name] or [0.0])) for name in (*PARTS, "whole")}
    found["teacher"] = float(np.sum(spent["teacher"])) / _PROFILED
    found["other"] = max(0.0, found.pop("whole") - sum(found[name] for name in PARTS))
    return found


def _torch_clock(device: str) -> Clock:
    if not str(device).startswith("cuda"):
        return time.perf_counter
    import torch

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def _time_module(module: Any, spent: list[float], clock: Clock) -> tuple[Any, Any]:
    began: list[float] = []

    def before(_module: Any, _inputs: Any) -> None:
        began.append(clock())

    def after(_module: Any, _inputs: Any, _output: Any) -> None:
        spent.append(clock() - began.pop())

    return module.register_forward_pre_hook(before), module.register_forward_hook(after)


def onnx_parts(runtime: OnnxRuntime, path: Path, threads: int, pixels: Pixels) -> dict[str, float]:
    """Seconds of a run by part of the model, from ONNX Runtime's own profile (nodes carry their part's name)."""
    import onnxruntime as ort

    spent: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        options = OnnxRuntime.options(threads)
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, providers=runtime.session.get_providers())
        for _ in range(_PROFILED):
            session.run(None, {"image": pixels})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            part = event["name"].split("/")[0]
            spent[part if part in PARTS else "other"] += event["dur"] / 1e6 / _PROFILED
    return dict(spent)
