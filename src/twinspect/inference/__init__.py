"""Prediction: images in, results in the images' own geometry out.

`load` opens a bundle or an exported model with any runtime; an ONNX or OpenVINO file never loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinspect.inference.predictor import load_predictor as load
    from twinspect.inference.sources import watch

__all__ = ["load", "watch"]


def __getattr__(name: str) -> Any:  # on first use, as the command line imports `job` and must start at once
    if name == "load":
        from twinspect.inference.predictor import load_predictor

        return load_predictor
    if name == "watch":
        from twinspect.inference.sources import watch

        return watch
    raise AttributeError(f"module 'twinspect.inference' has no attribute {name!r}")
