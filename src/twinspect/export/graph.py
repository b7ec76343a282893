"""The model as one exported graph: raw pixels in, every field of `Outputs` out. Needs torch and onnx.

Every node of the ONNX graph is named after the part of the model it belongs to (``teacher/``, ``local/``,
``semantic/``, ``scorer/``, ``pixels/``), so that a profile can be read.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twinspect.errors import ConfigError
from twinspect.models.contract import AnomalyModel, Outputs
from twinspect.models.fold import prepared

OPSET = 20
MOST_BYTES = 2**31 - 2**20  # protobuf's limit for one file, less room for the graph itself
_MOST_BATCH = 4096
_PARTS = {
    "model.teacher": "teacher",
    "model.student.local": "local",
    "model.student.semantic": "semantic",
    "model.scorer": "scorer",
}
_SCOPES = "pkg.torch.onnx.name_scopes"


class DeployedGraph(nn.Module):
    """uint8 RGB B x S x S x 3 (channels last, as decoders give it) to the fields of `Outputs` by name."""

    def __init__(self, model: AnomalyModel) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, image_BHWC: Tensor) -> dict[str, Tensor]:
        """All outputs of the model."""
        return dict(self.model(image_BHWC.permute(0, 3, 1, 2))._asdict())


def to_onnx(model: AnomalyModel) -> Any:
    """The model as an ``onnx.ModelProto`` for any number of images; a ConfigError where it cannot be exported."""
    from onnxscript.optimizer import fold_constants

    example = torch.zeros(2, model.size, model.size, 3, dtype=torch.uint8)
    dims = {0: torch.export.Dim("batch", min=1, max=_MOST_BATCH)}
    graph = DeployedGraph(prepared(model.eval())).eval()
    try:
        with torch.no_grad(), _silent():
            program = torch.export.export(graph, (example,), dynamic_shapes=(dims,), strict=False)
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=["image"], output_names=list(Outputs._fields),
                external_data=False, verbose=False,
            )  # fmt: skip
            assert exported is not None
            # What depends on weights alone, however large.
            fold_constants(exported.model, input_size_limit=MOST_BYTES, output_size_limit=MOST_BYTES)
    except Exception as error:  # torch.export raises a dozen types of its own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"this model cannot be exported: {type(error).__name__}: {reason}") from error
    proto = exported.model_proto
    _name_parts(proto)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    return proto


def _name_parts(proto: Any) -> None:
    """Prefix nodes and their values by part; drop notes of the exporter (they hold paths of this machine)."""
    values = (*proto.graph.input, *proto.graph.output, *proto.graph.initializer)
    fixed = {value.name for value in values}
    renamed: dict[str, str] = {}
    for node in proto.graph.node:
        scopes = next((note.value for note in node.metadata_props if note.key == _SCOPES), "")
        part = next((part for scope, part in _PARTS.items() if f"'{scope}" in scopes), "pixels")
        node.name = f"{part}/{node.name}"
        renamed |= {name: f"{part}/{name}" for name in node.output if name and name not in fixed}
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for noted in (proto, proto.graph, *proto.graph.node, *values):
        del noted.metadata_props[:]
        noted.ClearField("doc_string")
    del proto.graph.value_info[:]


def write(proto: Any, path: Path) -> None:
    """Write a graph as ``.onnx``, or as ``.xml`` for OpenVINO; a ConfigError where it is too large for ONNX."""
    import onnx

    gigabytes = proto.ByteSize() / 1e9
    if path.suffix == ".onnx":
        if proto.ByteSize() > MOST_BYTES:
            raise ConfigError(
                f"{gigabytes:.1f} GB do not fit into one ONNX file (2 GB at most); type --out {path.stem}.xml"
            )
        onnx.save(proto, str(path))
        return
    import openvino as ov

    step = path.parent / "steps" / "fp32.onnx"
    step.parent.mkdir()
    onnx.save(proto, str(step), save_as_external_data=proto.ByteSize() > MOST_BYTES)
    ov.save_model(ov.Core().read_model(step), path, compress_to_fp16=False)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter prints remarks on stdout, which belongs to the commands' results."""
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
