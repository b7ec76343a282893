"""Import timm, also beside a torchvision whose compiled operators do not load.

timm imports torchvision. The torchvision wheel of the default index is compiled against the CUDA build
of torch; beside a CPU build its operators stay unregistered and its own import then dies with
``operator torchvision::nms does not exist``. We use none of those operators, so declaring the two
missing schemas is enough. A torchvision that works is left alone.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from twinspect.errors import TwinspectError

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # held for the life of the process: dropping it undeclares


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    except ModuleNotFoundError as error:
        raise TwinspectError(f"{error}; type: pip install twinspect") from None
    _declare_missing_operators()
    for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]  # half-imported modules must not be found again
    return importlib.import_module("timm")


def _declare_missing_operators() -> None:
    global _library
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if (
            not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", "CPU")
            if _exists(name)
            else True
        ):
            _library.define(f"{name}{_SCHEMA}")


def _exists(name: str) -> bool:
    return bool(torch._C._jit_get_schemas_for_operator(f"torchvision::{name}"))


timm = _import_timm()
