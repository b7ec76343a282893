"""twinspect: generalist visual anomaly detection by distillation to two student networks.

Public names are loaded on first use, so that ``import twinspect`` stays cheap and torch-free.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from twinspect._version import __version__

if TYPE_CHECKING:
    from twinspect.detector import Detector
    from twinspect.errors import TwinspectError
    from twinspect.types import Sample

__all__ = ["Detector", "Sample", "TwinspectError", "__version__"]

_HOME = {"Detector": "twinspect.detector", "Sample": "twinspect.types", "TwinspectError": "twinspect.errors"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from twinspect.device import share_cores

        share_cores()
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'twinspect' has no attribute {name!r}")
