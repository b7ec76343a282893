"""Where a call of a model's graph spends its time, and how much longer it takes than its bare teacher.

    PYTHONPATH=src python benchmarks/graph_parts.py model.twin --onnx --batch 1,16

Torch is timed part by part. ONNX Runtime is timed by its own profile of an export, whose nodes are named after the
part of the model that they come from; OpenVINO does not say. The bare teacher is cut out of
the same model: raw pixels in, the maps and the embedding that the students need out. Both are timed in turns, a few
calls each, as a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.bundle import load
from twinspect.export import to_onnx, write
from twinspect.inference.predictor import OnnxRuntime, TorchRuntime

Clock = Callable[[], float]
Pixels = NDArray[np.uint8]
Call = Callable[[], object]
PARTS = ("teacher", "local", "semantic", "scorer")  # how the names of nodes begin
SCOPES = {  # of the modules that an exported node comes from
    "model.teacher": "teacher",
    "model.student.local": "local",
    "model.student.semantic": "semantic",
    "model.scorer": "scorer",
}
_PROFILED = 10  # calls in a profile
_TURNS, _CALLS = 5, 4  # of the graph and the bare teacher, and calls in a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="bundle (.twin)")
    parser.add_argument("--onnx", action="store_true", help="of an export, on ONNX Runtime")
    parser.add_argument("--batch", default="1,16", help="images per call, separated by commas")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    fitted = load(given.model)
    with tempfile.TemporaryDirectory() as folder:
        path = named_export(fitted.model, Path(folder) / "m.onnx") if given.onnx else given.model
        size, threads = fitted.model.size, given.threads
        runtime = OnnxRuntime(path, size, threads) if given.onnx else TorchRuntime(fitted.model, threads=threads)
        _measure(runtime, path, threads, [int(one) for one in given.batch.split(",")])


def _measure(runtime: TorchRuntime | OnnxRuntime, path: Path, threads: int, batches: list[int]) -> None:
    for batch in batches:
        pixels = np.zeros((batch, runtime.size, runtime.size, 3), np.uint8)
        parts = graph_parts(runtime, path, threads, pixels)
        times = ratio(runtime, path, threads, pixels)
        shares = ", ".join(f"{name} {value:.0%}" for name, value in parts.items())
        print(f"batch {len(pixels)}: {shares}; {times:.2f} times the bare teacher")


def named_export(model: Any, path: Path) -> Path:
    """An ``.onnx`` file whose nodes, and what they make, are named after the part of the model."""
    proto = to_onnx(model)
    fixed = {value.name for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer)}
    renamed: dict[str, str] = {}
    for node in proto.graph.node:
        scopes = next((note.value for note in node.metadata_props if note.key == "pkg.torch.onnx.name_scopes"), "")
        part = next((part for scope, part in SCOPES.items() if f"'{scope}" in scopes), "pixels")
        node.name = f"{part}/{node.name}"
        renamed |= {name: f"{part}/{name}" for name in node.output if name and name not in fixed}
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    write(proto, path)
    return path


def graph_parts(runtime: TorchRuntime | OnnxRuntime, path: Path, threads: int, pixels: Pixels) -> dict[str, float]:
    """Shares of the graph's time by part."""
    is_torch = isinstance(runtime, TorchRuntime)
    seconds = torch_parts(runtime, pixels) if is_torch else onnx_parts(runtime, path, threads, pixels)
    return {name: value / sum(seconds.values()) for name, value in seconds.items()}


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


# -------------------------------------------------------------------------------------------------- the bare teacher


def ratio(runtime: TorchRuntime | OnnxRuntime, path: Path, threads: int, pixels: Pixels) -> float:
    """Time of the graph over that of its bare teacher."""
    is_torch = isinstance(runtime, TorchRuntime)
    bare = bare_torch(runtime, pixels) if is_torch else bare_onnx(runtime, path, threads, pixels)
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


def bare_torch(runtime: TorchRuntime, pixels: Pixels) -> Call:
    import torch

    teacher = runtime.model.teacher

    def call(part: Pixels) -> None:
        with torch.inference_mode():
            teacher.embedding(teacher.features(teacher.normalise(torch.from_numpy(part).permute(0, 3, 1, 2))))

    return lambda: runtime.spread(call, pixels)


def bare_onnx(runtime: OnnxRuntime, path: Path, threads: int, pixels: Pixels) -> Call:
    import onnx
    import onnxruntime as ort

    alone = bare_teacher(onnx.load(str(path))).SerializeToString()
    session = ort.InferenceSession(alone, OnnxRuntime.options(threads), providers=runtime.session.get_providers())
    return lambda: session.run(None, {"image": pixels})


def bare_teacher(proto: Any) -> Any:
    """The teacher of an exported ONNX model, as a model whose outputs are what the other parts read of it."""
    from onnx.shape_inference import infer_shapes
    from onnx.utils import Extractor

    maker = {name: node for node in proto.graph.node for name in node.output}
    made = {name for name, node in maker.items() if node.name.startswith("teacher/")}
    needed, waiting = set[str](), list(made)  # nodes that the teacher cannot do without
    while waiting:
        node = maker.get(waiting.pop())
        if node is not None and node.name not in needed:
            needed.add(node.name)
            waiting += node.input
    others = [node for node in proto.graph.node if node.name not in needed]
    read = dict.fromkeys(name for node in others for name in node.input if name in made)
    assert read, "nothing is read of a teacher here"
    return Extractor(infer_shapes(proto)).extract_model(["image"], list(read))


if __name__ == "__main__":
    main()
