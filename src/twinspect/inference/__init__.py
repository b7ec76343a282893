"""Prediction: images in, results in the images' own geometry out.

`load` opens a bundle or an exported model with any runtime; an ONNX or OpenVINO file never loads torch.
"""

from twinspect.inference.runtimes import load_predictor as load
from twinspect.inference.sources import watch

__all__ = ["load", "watch"]
