"""Maps that can be fetched for a while after the answer, in bounded memory, under names that cannot be guessed."""

from __future__ import annotations

import base64
import io
import secrets
from collections import OrderedDict
from typing import Any

import numpy as np
from PIL import Image

from twinspect.inference.result import Result, colourise, resize_map
from twinspect.server.guard import Refused

_OVERHEAD = 512  # bytes of the objects around a small map, as measured
FORMATS = {"png": "image/png", "npy": "application/octet-stream"}


class MapStore:
    """The maps of the latest results, oldest forgotten first, within a number of bytes. For the event loop only."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._results: OrderedDict[str, Result] = OrderedDict()

    def add(self, result: Result) -> str:
        """Keep a result's map; the name to fetch it by, empty for none, or for one larger than the whole store."""
        if result.grid is None or _memory(result) > self.limit:
            return ""
        name = secrets.token_urlsafe(16)
        # A copy: the grid is a view into the maps of its whole batch, which would live as long.
        grid, scale = result.grid.copy(), result.scale
        self._results[name] = Result("", height=result.height, width=result.width, grid=grid, scale=scale)
        self.used += _memory(result)
        while self.used > self.limit:
            self.used -= _memory(self._results.popitem(last=False)[1])
        return name

    def get(self, name: str) -> Result:
        """A result with nothing but its map; refused with 404 if it never was, or was forgotten."""
        if name not in self._results:
            raise Refused(404, "no_such_map", "no such map; the latest ones are kept only, so send the image again")
        return self._results[name]


def _memory(result: Result) -> int:
    assert result.grid is not None
    return result.grid.nbytes + _OVERHEAD


def inline_map(result: Result) -> dict[str, Any] | None:
    """For JSON: base64 of little-endian float32, row by row, at the model's own size."""
    if result.grid is None:
        return None
    data = base64.b64encode(np.ascontiguousarray(result.grid, dtype="<f4").tobytes()).decode("ascii")
    rows, columns = result.grid.shape
    return {"rows": rows, "columns": columns, "dtype": "float32", "scale": list(result.scale), "data": data}


def encoded_map(result: Result, format: str, side: int) -> bytes:
    """``png`` in colours or ``npy`` of float16, in the image's size or with a longer side of ``side`` pixels."""
    assert result.grid is not None
    factor = side / max(result.height, result.width) if side else 1.0
    values = resize_map(result.grid, max(1, round(result.height * factor)), max(1, round(result.width * factor)))
    out = io.BytesIO()
    if format == "npy":
        np.save(out, values.astype(np.float16), allow_pickle=False)
    else:
        Image.fromarray(colourise(values, result.scale)).save(out, "PNG")
    return out.getvalue()
