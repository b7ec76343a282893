"""The model as one exported graph: raw pixels in, every field of `Outputs` out. Needs torch and onnx.

Every node of the ONNX graph is named after the part of the model it belongs to (``teacher/``, ``local/``,
``semantic/``, ``scorer/``, ``pixels/``), so that a profile can be read and int8 can leave the statistics
(``scorer/``) in fp32: they divide by spreads that low precision would round away. Of the teacher, the first layers
decide: few channels of very different ranges at full resolution. How many of them stay in fp32 is found by trying.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from twinspect.errors import ConfigError, TwinspectError
from twinspect.models.contract import AnomalyModel, Outputs
from twinspect.models.fold import prepared

OPSET = 20
MOST_BYTES = 2**31 - 2**20  # protobuf's limit for one file, less room for the graph itself
_MOST_BATCH = 4096
_MOST_SIDE = 16384
_PARTS = {
    "model.teacher": "teacher",
    "model.student.local": "local",
    "model.student.semantic": "semantic",
    "model.scorer": "scorer",
}
_SCOPES = "pkg.torch.onnx.name_scopes"
Pixels = NDArray[np.uint8]
# Shares of the teacher's layers, from its input on, that stay in fp32; the first that passes is taken.
SKIPPED_SHARES = (0.0, 0.2, 0.4, 1.0)
_LAYERS = frozenset({"Conv", "MatMul", "Gemm"})
_QUANTISED = ("teacher", "local", "semantic")
_KEPT_FP32 = ["Subtract", "Multiply", "Divide", "ReduceMean", "ReduceSum", "MVN", "Sqrt", "Interpolate", "AvgPool"]


class DeployedGraph(nn.Module):
    """uint8 RGB B x H x W x 3 (channels last, as decoders give it) to the fields of `Outputs` by name.

    Args:
        model: trained model.
        any_size: resize images of any height and width in the graph (antialiased bilinear, no crop).
    """

    def __init__(self, model: AnomalyModel, any_size: bool = False) -> None:
        super().__init__()
        self.model = model.eval()
        self.any_size = any_size

    def forward(self, image_BHWC: Tensor) -> dict[str, Tensor]:
        """All outputs of the model."""
        image = image_BHWC.permute(0, 3, 1, 2)
        if self.any_size:
            side = self.model.size
            image = F.interpolate(image.float(), size=(side, side), mode="bilinear", antialias=True)
        return dict(self.model(image)._asdict())


def trace(model: AnomalyModel, batch: int, any_size: bool) -> torch.export.ExportedProgram:
    """The model as an exported program; ``batch`` 0 leaves the number of images open.

    Raises:
        ConfigError: the model holds something torch cannot export.
    """
    size = model.size
    example = torch.zeros(batch or 2, *((size + 8, size + 24) if any_size else (size, size)), 3, dtype=torch.uint8)
    dims: dict[int, Any] = {} if batch else {0: torch.export.Dim("batch", min=1, max=_MOST_BATCH)}
    if any_size:
        dims |= {i + 1: torch.export.Dim(side, min=2, max=_MOST_SIDE) for i, side in enumerate(("height", "width"))}
    graph = DeployedGraph(prepared(model.eval()), any_size).eval()
    try:
        with torch.no_grad(), _silent():
            return torch.export.export(graph, (example,), dynamic_shapes=(dims or None,), strict=False)
    except Exception as error:  # torch.export raises a dozen types of its own
        raise ConfigError(f"this model cannot be exported: {_first_line(error)}") from error


def to_onnx(model: AnomalyModel, batch: int, any_size: bool) -> Any:
    """The model as an ``onnx.ModelProto`` whose nodes are named after their part.

    Raises:
        ConfigError: an operator without ONNX equivalent.
    """
    from onnxscript.optimizer import fold_constants

    program = trace(model, batch, any_size)
    try:
        with _silent():
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=["image"], output_names=list(Outputs._fields),
                external_data=False, verbose=False,
            )  # fmt: skip
            assert exported is not None
            # What depends on weights alone, however large: quantisation wants every weight as a constant.
            fold_constants(exported.model, input_size_limit=MOST_BYTES, output_size_limit=MOST_BYTES)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ConfigError(f"this model cannot be written as ONNX: {_first_line(error)}") from error
    proto = exported.model_proto
    _name_parts(proto)
    _name_axes(proto, any_size)
    return proto


def _name_parts(proto: Any) -> None:
    """Prefix nodes and their values by part; drop notes of the exporter (they hold paths of this machine)."""
    fixed = {value.name for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer)}
    renamed: dict[str, str] = {}
    for node in proto.graph.node:
        part = _part_of(node)
        node.name = f"{part}/{node.name}"
        renamed |= {name: f"{part}/{name}" for name in node.output if name and name not in fixed}
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        del node.metadata_props[:]
        node.ClearField("doc_string")
    del proto.graph.value_info[:], proto.graph.metadata_props[:], proto.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    proto.graph.ClearField("doc_string")


def _part_of(node: Any) -> str:
    scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), "")
    return next((part for scope, part in _PARTS.items() if f"'{scope}" in scopes), "pixels")


def _name_axes(proto: Any, any_size: bool) -> None:
    names = ("batch", "height", "width") if any_size else ("batch",)
    for axis, name in zip(proto.graph.input[0].type.tensor_type.shape.dim, names, strict=False):
        if not axis.HasField("dim_value"):
            axis.dim_param = name


def refuse_too_large(proto: Any) -> None:
    """One ONNX file holds at most 2 GB.

    Raises:
        ConfigError: with what to type instead.
    """
    if proto.ByteSize() > MOST_BYTES:
        raise ConfigError(
            f"{proto.ByteSize() / 1e9:.1f} GB do not fit into one ONNX file (2 GB at most); type --format openvino"
        )


def save_proto(proto: Any, path: Path) -> None:
    """Write an ONNX file; one above 2 GB (only ever a step on the way to OpenVINO) with its weights beside."""
    import onnx

    onnx.save(proto, str(path), save_as_external_data=proto.ByteSize() > MOST_BYTES)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


# --------------------------------------------------------------------------------------------------------------- int8


def layers(proto: Any) -> list[str]:
    """Names of the nodes that int8 speeds up, in the order of the graph."""
    return [n.name for n in proto.graph.node if n.op_type in _LAYERS and n.name.split("/")[0] in _QUANTISED]


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
    patterns = [rf"^(?!({'|'.join(_QUANTISED)})/).*", *(re.escape(name) + "(/.*)?$" for name in skipped)]
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
    os.environ.setdefault("NNCF_CI", "1")  # or it would send reports to an outside address, unasked
    try:
        import nncf
    except ImportError as error:
        raise TwinspectError(f"int8 for OpenVINO needs nncf ({error}); type: pip install nncf") from None
    return nncf


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter and the quantisers print bars and remarks on stdout, which belongs to the commands' results."""
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
