"""HTTP API, micro-batching, inspection log and page over any model; needs the extra ``server``."""

from __future__ import annotations

import importlib.util

from twinspect.errors import TwinspectError

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "sqlalchemy")


def refuse_missing(names: tuple[str, ...] = NEEDED) -> None:
    """Say what to type where packages of the extra are missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise TwinspectError(f'the server needs {", ".join(missing)}; type: pip install "twinspect[server]"')
