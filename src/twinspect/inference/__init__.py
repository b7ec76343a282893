"""Prediction: images in, results in the images' own geometry out.

`load` opens a bundle or an exported model with any runtime; an ONNX or OpenVINO file never loads torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twinspect.inference.archives import Item
    from twinspect.inference.predictor import Predictor

__all__ = ["load", "watch"]


def watch(*folders: Path | str) -> Iterator[Item]:
    """Images of folders, then each that arrives, for `Predictor.predict`; see `sources.watch`.

    Example:
        >>> for result in load("model.onnx").predict(watch("incoming/")):
        ...     print(result.path, result.score, result.is_anomaly)
    """
    from twinspect.inference.sources import watch as watched

    return watched(*folders)


def load(
    path: Path | str, runtime: str = "auto", threads: int = 0, batch: int = 0, weights: Path | str = ""
) -> Predictor:
    """Open a bundle (.twin) or an exported model (.onnx, .xml); see `runtimes.load_predictor`.

    Examples:
        >>> for result in load("model.onnx").predict("new/"):
        ...     print(result.path, result.score, result.is_anomaly)
    """
    from twinspect.inference.runtimes import load_predictor

    return load_predictor(path, runtime, threads, batch, weights)
