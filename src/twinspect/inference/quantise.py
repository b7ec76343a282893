"""Smaller numbers: int8 of an exported graph.

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
from collections.abc import Iterator, Sequence
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
