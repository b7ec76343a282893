"""How much longer a model takes than its bare teacher, in torch or ONNX Runtime, from the same pixels.

    PYTHONPATH=src python benchmarks/bare_teacher.py model.onnx --batch 1,16

The bare teacher is cut out of the same model: raw pixels in, the maps and the embedding that the students need out.
Both are timed in turns, a few calls each, as a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.inference.runtimes import OnnxRuntime, TorchRuntime, load_predictor

Pixels = NDArray[np.uint8]
Call = Callable[[], object]
_TEACHER = "teacher/"  # how the names of its nodes begin: see `twinspect.export.graph`
_TURNS, _CALLS = 5, 4  # of the graph and the bare teacher, and calls in a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="bundle (.twin) or .onnx")
    parser.add_argument("--batch", default="1,16", help="images per call, separated by commas")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    runtime = load_predictor(given.model, threads=given.threads).runtime
    assert isinstance(runtime, (TorchRuntime, OnnxRuntime)), "accepted: a bundle (.twin) or an .onnx file"
    for batch in (int(one) for one in given.batch.split(",")):
        pixels = np.zeros((runtime.batch or batch, runtime.size, runtime.size, 3), np.uint8)
        print(f"batch {len(pixels)}: {ratio(runtime, given.model, given.threads, pixels):.2f} times the bare teacher")


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

    proto = onnx.load(str(path))
    assert cut_to_teacher(proto), f"{path} holds no teacher"
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


if __name__ == "__main__":
    main()
