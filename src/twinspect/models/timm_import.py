"""Import timm, also beside a torchvision whose compiled operators do not load.

timm imports torchvision. The torchvision wheel of the default index is compiled against the CUDA build
of torch; beside a CPU build its operators stay unregistered and its own import then dies with
``operator torchvision::nms does not exist``. We use none of those operators, so declaring the two
schemas that its import asks for is enough. A torchvision that works is left alone.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from twinspect.errors import TwinspectError

_MISSING = ("torchvision::nms", "torchvision::qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    except ModuleNotFoundError as error:
        raise TwinspectError(f"{error}; type: pip install twinspect") from None
    for operator in _MISSING:
        torch.library.define(operator, _SCHEMA)
    for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]  # half-imported modules must not be found again
    return importlib.import_module("timm")


timm = _import_timm()
