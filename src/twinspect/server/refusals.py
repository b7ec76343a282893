"""Why a request is refused: one exception with a status, and the table for the library's own errors."""

from __future__ import annotations

from twinspect.errors import ConfigError, ImageError, TwinspectError
from twinspect.server.batcher import Closed, Expired
from twinspect.server.log import LogError, NoSuchRow


class Refused(TwinspectError):
    """A request that is not answered as asked.

    Args:
        status: of HTTP.
        code: the same for programs, one word that does not change.
        message: for people.
        retry_after_s: when trying again makes sense; 0 says nothing.
    """

    def __init__(self, status: int, code: str, message: str, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s = status, code, retry_after_s


# The nearest ancestor of an error counts; what is missing here is our own mistake, a 500.
_STATUS: dict[type[Exception], tuple[int, str]] = {
    Closed: (503, "stopping"),
    Expired: (504, "timeout"),
    NoSuchRow: (404, "no_such_row"),
    ImageError: (422, "bad_image"),
    ConfigError: (422, "not_accepted"),
    LogError: (503, "log_unavailable"),
}


def refusal_of(error: Exception) -> Refused | None:
    """The refusal an error stands for; None for what nobody should see."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, LogError) and error.full:
        return Refused(507, "log_full", str(error))
    for kind in type(error).__mro__:
        if kind in _STATUS:
            return Refused(*_STATUS[kind], str(error))
    return None


def error_body(code: str, message: str, request_id: str) -> dict[str, dict[str, str]]:
    """The one shape every error has."""
    return {"error": {"code": code, "message": message, "request_id": request_id}}
