"""Maps that can be fetched for a while after the answer, in bounded memory, under names that cannot be guessed."""

from __future__ import annotations

import base64
import io
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect.inference.result import Result, colourise, resize_map
from twinspect.server.guard import Refused

_OVERHEAD = 512  # bytes of the objects around a small map, as measured
FORMATS = {"png": "image/png", "npy": "application/octet-stream"}


@dataclass(frozen=True, slots=True)
class KeptMap:
    """A map at the model's own size (float32, rows x columns), and the height and width of its image."""

    grid: NDArray[np.float32]
    height: int
    width: int
    scale: tuple[float, float]

    @property
    def memory(self) -> int:
        """Memory it takes in a `MapStore`."""
        return self.grid.nbytes + _OVERHEAD

    def inline(self) -> dict[str, Any]:
        """For JSON: base64 of little-endian float32, row by row, at the model's own size."""
        data = base64.b64encode(np.ascontiguousarray(self.grid, dtype="<f4").tobytes()).decode("ascii")
        rows, columns = self.grid.shape
        return {"rows": rows, "columns": columns, "dtype": "float32", "scale": list(self.scale), "data": data}

    def encoded(self, format: str, side: int) -> bytes:
        """``png`` in colours or ``npy`` of float16, in the image's size or with a longer side of ``side`` pixels."""
        factor = side / max(self.height, self.width) if side else 1.0
        shape = (max(1, round(self.height * factor)), max(1, round(self.width * factor)))
        values = resize_map(self.grid, *shape)
        out = io.BytesIO()
        if format == "npy":
            np.save(out, values.astype(np.float16), allow_pickle=False)
        else:
            Image.fromarray(colourise(values, self.scale).round().astype(np.uint8)).save(out, "PNG")
        return out.getvalue()


class MapStore:
    """The latest maps, oldest forgotten first, within a number of bytes. Used on the event loop only."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._kept: OrderedDict[str, KeptMap] = OrderedDict()

    def add(self, kept: KeptMap) -> str:
        """Keep a map; the name to fetch it by, empty if it is larger than the whole store."""
        if kept.memory > self.limit:
            return ""
        name = secrets.token_urlsafe(16)
        self._kept[name] = kept
        self.used += kept.memory
        while self.used > self.limit:
            _, oldest = self._kept.popitem(last=False)
            self.used -= oldest.memory
        return name

    def get(self, name: str) -> KeptMap:
        """A map by name; refused with 404 if it never was, or was forgotten."""
        if name not in self._kept:
            raise Refused(404, "no_such_map", "no such map; the latest ones are kept only, so send the image again")
        return self._kept[name]


def kept_map(result: Result) -> KeptMap | None:
    """The map of a result, if it has one."""
    if result.grid is None:
        return None
    # A copy: the grid is a view into the maps of its whole batch, which would live as long.
    return KeptMap(result.grid.copy(), result.height, result.width, result.scale)
