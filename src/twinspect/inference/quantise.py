"""Smaller numbers: fp16 and int8 of an exported graph.

The statistics of what is normal (``scorer/``) always stay in fp32: they divide by spreads that low precision
would round away. Of the teacher, the first layers decide: few channels of very different ranges at full
resolution. How many of them must stay in fp32 is found by trying (`SKIPPED_SHARES`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.errors import TwinspectError

Pixels = NDArray[np.uint8]
# Shares of the teacher's layers, from its input on, that stay in fp32; the first that passes is taken.
SKIPPED_SHARES = (0.0, 0.2, 0.4, 1.0)
_LAYERS = frozenset({"Conv", "MatMul", "Gemm"})
_PARTS = ("teacher", "local", "semantic")
_KEPT_FP32 = ["Subtract", "Multiply", "Divide", "ReduceMean", "ReduceSum", "MVN", "Sqrt", "Interpolate", "AvgPool"]
_HALF_OPERATORS = frozenset({
    "Conv", "MatMul", "Gemm", "Add", "Sub", "Mul", "Clip", "Relu", "Sigmoid", "HardSigmoid", "HardSwish", "Erf",
    "Gelu", "Tanh", "Softmax", "LayerNormalization", "Transpose", "Reshape", "AveragePool", "MaxPool", "Concat",
})  # fmt: skip
_HALF_INPUTS = {"Reshape": 1}  # inputs that hold values; the others hold shapes


def to_half(proto: Any) -> Any:
    """A copy of an ONNX model with fp16 weights and arithmetic outside the statistics; inputs stay as they are.

    Not ONNX Runtime's own converter: that one rounds every value between two nodes to fp16, also between nodes
    it was told to leave alone, and the sums of squares in the scores overflow.
    """
    import onnx

    half = onnx.ModelProto()
    half.CopyFrom(proto)
    graph = half.graph
    weights = {one.name: one for one in graph.initializer}
    floats = _float_values(proto)
    chosen = {
        i for i, node in enumerate(graph.node) if _may_be_half(node, weights) and floats.issuperset(node.output)
    }
    made_half = {name for i in chosen for name in graph.node[i].output}
    casts: dict[tuple[str, bool], Any] = {}
    for i, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            if i in chosen and place < _HALF_INPUTS.get(node.op_type, len(node.input)):
                node.input[place] = _as_half(name, weights, made_half, casts)
            elif name in made_half:
                node.input[place] = _cast(name, False, casts)
    read = {name for node in graph.node for name in node.input}
    nodes = [one for node in graph.node for one in (node, *(_casts_of(node, casts)))]
    first = [casts[key] for key in casts if key[0] not in {name for node in graph.node for name in node.output}]
    del graph.node[:], graph.initializer[:]
    graph.node.extend([*first, *nodes])
    graph.initializer.extend([one for name, one in weights.items() if name in read])
    return half


def _float_values(proto: Any) -> set[str]:
    """Values that hold fp32; a Concat may also join shapes, which are whole numbers."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(proto).graph
    values = (*inferred.value_info, *inferred.output)
    return {one.name for one in values if one.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}


def _casts_of(node: Any, casts: Mapping[tuple[str, bool], Any]) -> list[Any]:
    """Casts of a node's outputs, to stand right behind it."""
    return [casts[name, kind] for name in node.output for kind in (True, False) if (name, kind) in casts]


def _may_be_half(node: Any, weights: Mapping[str, Any]) -> bool:
    """Sums over thousands of tokens (the linear attention of the local student) overflow or round in fp16."""
    part = node.name.split("/")[0]
    if part not in _PARTS or node.op_type not in _HALF_OPERATORS or "/" not in node.output[0]:
        return False
    if part == "local":
        product = node.op_type == "MatMul" and not any(name in weights for name in node.input)
        return not product and node.op_type != "Clip"
    return True


def _as_half(name: str, weights: dict[str, Any], made_half: set[str], casts: dict[tuple[str, bool], Any]) -> str:
    """The fp16 form of a value that an fp16 node reads: itself, a converted weight, or a cast."""
    import onnx

    if not name or name in made_half:
        return name
    if name not in weights:
        return _cast(name, True, casts)
    found = weights[name]
    if found.data_type != onnx.TensorProto.FLOAT:
        return name
    converted = f"{name}_fp16"
    if converted not in weights:
        values = onnx.numpy_helper.to_array(found).astype(np.float16)
        weights[converted] = onnx.numpy_helper.from_array(values, converted)
    return converted


def _cast(name: str, to_fp16: bool, casts: dict[tuple[str, bool], Any]) -> str:
    import onnx

    ending, kind = ("_to_fp16", onnx.TensorProto.FLOAT16) if to_fp16 else ("_to_fp32", onnx.TensorProto.FLOAT)
    if (name, to_fp16) not in casts:
        casts[name, to_fp16] = onnx.helper.make_node("Cast", [name], [name + ending], name + ending, to=kind)
    return name + ending


def layers(proto: Any) -> list[str]:
    """Names of the nodes that int8 speeds up, in the order of the graph."""
    return [n.name for n in proto.graph.node if n.op_type in _LAYERS and n.name.split("/")[0] in _PARTS]


def skipped_layers(proto: Any, share: float) -> list[str]:
    """The first ``share`` of the teacher's layers, which stay in fp32."""
    teacher = [name for name in layers(proto) if name.startswith("teacher/")]
    return teacher[: round(share * len(teacher))]


def int8_onnx(source: Path, target: Path, proto: Any, images: Sequence[Pixels], skipped: Sequence[str]) -> None:
    """Static QDQ quantisation by ONNX Runtime: weights per channel, activations by their range on good batches."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands out one batch at a time."""

        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, Pixels] | None:
            """The next input, or None at the end."""
            one = next(self.rest, None)
            return None if one is None else {"image": one}

    chosen = [name for name in layers(proto) if name not in set(skipped)]
    with _silent():
        quantize_static(
            source, target, Reader(), nodes_to_quantize=chosen, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip


def int8_openvino(source: Path, target: Path, images: Sequence[Pixels], skipped: Sequence[str]) -> None:
    """Static quantisation by NNCF with bias correction, written as OpenVINO IR."""
    import openvino as ov

    nncf = _nncf()
    # Names of constants and helpers made by the conversion match none of our parts and stay in fp32.
    patterns = [rf"^(?!({'|'.join(_PARTS)})/).*", *(re.escape(name) + "(/.*)?$" for name in skipped)]
    with _silent():
        quantised = nncf.quantize(
            ov.Core().read_model(source),
            nncf.Dataset(list(images)),
            subset_size=len(images),
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(patterns=patterns, types=_KEPT_FP32, validate=False),
        )
        ov.save_model(quantised, target, compress_to_fp16=False)


def _nncf() -> Any:
    """NNCF without its reports to an outside address, which it would otherwise send unasked."""
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"
    try:
        import nncf
    except ImportError as error:
        raise TwinspectError(f"int8 for OpenVINO needs nncf ({error}); type: pip install nncf") from None
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before
    return nncf


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Both quantisers print bars and log lines of their own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
