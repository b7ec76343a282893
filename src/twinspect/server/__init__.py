"""HTTP API, micro-batching, inspection log and page over any model; needs the extra ``server``."""

from __future__ import annotations

from collections.abc import Mapping

from twinspect.errors import TwinspectError, required


class Refused(TwinspectError):
    """A request that is not answered as asked: HTTP's status, a code for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def refuse_missing() -> None:
    """Say what to type where packages of the extra are missing."""
    for name in ("fastapi", "uvicorn", "prometheus_client", "sqlalchemy"):
        required(name, "the server", "twinspect[server]")
