"""What executes the graph. Heavy imports happen inside the constructors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from twinspect.models.dual import DualModel


class TorchRuntime:
    """The model itself, eager, on a device."""

    def __init__(self, model: DualModel, device: str = "cpu") -> None:
        import torch

        self._torch = torch
        self.device = device
        self.size = model.shape.size
        self.model = model.eval().to(device)

    def run(self, pixels_BHWC: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """uint8 RGB B x S x S x 3 to arrays named as the fields of `Outputs`."""
        with self._torch.inference_mode():
            image = self._torch.from_numpy(pixels_BHWC).to(self.device).permute(0, 3, 1, 2)
            out = self.model(image)
        return {name: value.cpu().numpy() for name, value in out._asdict().items()}
