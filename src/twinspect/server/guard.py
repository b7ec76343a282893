"""The door: who may come in, how much and how slowly, and one line of log for each request. Plain ASGI.

Everything here happens before a route runs, or around it: key, host and origin, size, memory and time of the
body, headers, counters. Images never reach the log, nor do file names.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect

from twinspect.errors import ConfigError, ImageError, TwinspectError
from twinspect.server.batcher import Closed, Expired
from twinspect.server.log import LogError, NoSuchRow
from twinspect.server.settings import MEGABYTE, Settings, is_loopback

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz"})  # hold no data
MOST_HEAD = 16_384  # bytes of the head of a request
LINGER_S = 1.0  # how long the rest of a refused request is read, so that its sender sees the answer
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
logger = logging.getLogger("twinspect.server")


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


def say(event: str, level: int = logging.INFO, /, **values: object) -> None:
    """One structured line; see `JsonLines`."""
    logger.log(level, event, extra={"values": values})


class JsonLines(logging.Formatter):
    """Log records as JSON, one a line; line breaks and quotes in values cannot forge another line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        values = {"at": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage()}
        values |= getattr(record, "values", {})
        if record.exc_info:
            values["trace"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)


class Metrics:
    """What Prometheus sees. One registry per application, so that several can live in one process (tests)."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.requests = Counter(
            "twinspect_requests_total", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "twinspect_request_seconds", "Time to the answer", ["route"], buckets=_SECONDS, registry=registry
        )
        self.images = Counter("twinspect_images_total", "Images by answer", ["bundle", "answer"], registry=registry)
        self.batch = Histogram(
            "twinspect_batch_images", "Images per call of the model", ["bundle"], buckets=_BATCHES, registry=registry
        )
        self.model_seconds = Histogram(
            "twinspect_model_seconds", "Time of a call of the model", ["bundle"], buckets=_SECONDS, registry=registry
        )
        self.waiting = Gauge("twinspect_images_accepted", "Images accepted and not yet answered", registry=registry)
        self.memory = Gauge("twinspect_request_bytes", "Bytes of requests being answered", registry=registry)
        self.log_errors = Counter("twinspect_log_errors_total", "Decisions the log could not keep", registry=registry)
        self.reloads = Counter(
            "twinspect_reloads_total", "New versions of a bundle", ["bundle", "outcome"], registry=registry
        )
        self.drift = Gauge("twinspect_drift_alarm", "1 after a drift alarm", ["bundle"], registry=registry)

    def text(self) -> bytes:
        """In Prometheus's own format."""
        return bytes(generate_latest(self.registry))


@dataclass(slots=True)
class _Exchange:
    """One request on its way."""

    guard: Guard
    receive: Receive
    send: Send
    request_id: str
    method: str
    until: float  # when the body must have come
    began: float = field(default_factory=time.perf_counter)
    read: int = 0
    reserved: int = 0
    complete: bool = False
    status: int = 0

    def reserve(self, total: int) -> None:
        """Account for a body of so many bytes."""
        settings, more = self.guard.settings, max(0, total - self.reserved)
        if total > settings.max_body_mb * MEGABYTE:
            raise Refused(
                413, "too_large", f"the request has more than {settings.max_body_mb:g} MB; send fewer images"
            )
        if self.guard.reserved + more > settings.max_memory_mb * MEGABYTE:
            raise Refused(429, "busy", "requests being answered take all the memory there is for them", 1)
        self.reserved += more
        self.guard.reserved += more

    async def next_message(self) -> Message:
        """The next piece of the body, within size and time."""
        if self.complete:
            return await self.receive()  # waits for the client to go away
        try:
            async with asyncio.timeout_at(self.until):
                message = await self.receive()
        except TimeoutError:
            wait = f"{self.guard.settings.body_timeout_s:g}"
            raise Refused(408, "too_slow", f"the request was not complete within {wait} s") from None
        if message["type"] == "http.request":
            self.read += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            self.reserve(self.read)
        else:
            self.complete = True
        return message

    async def answer(self, message: Message) -> None:
        """Send a piece of the answer."""
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            added = [*_HEADERS, (b"x-request-id", self.request_id.encode())]
            if not self.complete:
                await self.linger()
            if not self.complete:
                added.append((b"connection", b"close"))
            present = {name.lower() for name, _ in message.get("headers", ())}
            headers = [*message.get("headers", ()), *((n, v) for n, v in added if n not in present)]
            message = {**message, "headers": headers}
        elif self.method == "HEAD":
            message = {**message, "body": b""}
        await self.send(message)

    async def linger(self) -> None:
        """Read and drop what is left of a body that was refused, for a moment."""
        try:
            async with asyncio.timeout(LINGER_S):
                while not self.complete:
                    message = await self.receive()
                    self.read += len(message.get("body", b""))
                    self.complete = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            return


class Guard:
    """ASGI middleware around the whole application; paths not in ``routes`` are counted together."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app, self.settings, self.metrics, self.routes = app, settings, metrics, routes
        self.reserved = 0  # bytes of the requests being answered
        self._key_hash = hashlib.sha256(settings.api_key.encode()).digest() if settings.api_key else b""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        root = self.settings.root_path or str(scope.get("root_path", ""))
        path = str(scope["path"])
        if f"{path}/".startswith(f"{root}/"):  # some proxies take their own part away, others leave it
            path = path.removeprefix(root) or "/"
        scope["root_path"], scope["path"] = root, root + path
        method = str(scope["method"])
        if method == "HEAD":  # answered like GET, without the body
            scope["method"] = "GET"
        until = asyncio.get_running_loop().time() + self.settings.body_timeout_s
        exchange = _Exchange(self, receive, send, request_id, method, until)
        try:
            await self._pass(scope, path, headers, exchange)
        finally:
            self.reserved -= exchange.reserved
            self.metrics.memory.set(self.reserved)
            self._count(scope, exchange)

    async def _pass(
        self, scope: MutableMapping[str, Any], path: str, headers: dict[str, str], exchange: _Exchange
    ) -> None:
        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEAD:
                raise Refused(431, "head_too_large", f"the head of the request has more than {MOST_HEAD} bytes")
            self._refuse_strangers(path, headers)
            length = headers.get("content-length", "")
            exchange.complete = length == "0" or (not length and "transfer-encoding" not in headers)
            if length.isdigit():
                exchange.reserve(int(length))
            self.metrics.memory.set(self.reserved)
            await self.app(scope, exchange.next_message, exchange.answer)
        except Refused as refused:
            await self._refuse(exchange, refused)
        except ClientDisconnect:
            say("client_gone", logging.WARNING, request_id=exchange.request_id)
        except Exception:
            # The trace goes to the log of the process, never to the client.
            logger.exception("broken", extra={"values": {"request_id": exchange.request_id}})
            await self._refuse(exchange, Refused(500, "internal", "an error in the server; its log has the details"))

    async def _refuse(self, exchange: _Exchange, refused: Refused) -> None:
        """Send a refusal as JSON, unless an answer has begun."""
        if exchange.status:
            return
        body = json.dumps(error_body(refused.code, str(refused), exchange.request_id)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        start = {"type": "http.response.start", "status": refused.status, "headers": headers + extra_headers(refused)}
        await exchange.answer(start)
        await exchange.answer({"type": "http.response.body", "body": body})

    def _refuse_strangers(self, path: str, headers: dict[str, str]) -> None:
        """Key, or without one the names by which only this machine's own pages call it."""
        host = headers.get("host", "").lower()
        origin = headers.get("origin", "").lower()
        if origin and origin.partition("://")[2] != host:
            raise Refused(403, "other_origin", "pages of other sites may not use this server")
        if not self._key_hash:
            # Without a key a page elsewhere could reach us under a name of its own that leads to 127.0.0.1.
            if not is_loopback(_host_name(host)):
                raise Refused(403, "other_host", "without a key this server answers to localhost and 127.0.0.1 only")
            return
        if path in OPEN_PATHS:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Digests have one length, so that not even the key's length shows in the time this takes.
        if not hmac.compare_digest(hashlib.sha256(key.encode("latin-1", "replace")).digest(), self._key_hash):
            raise Refused(401, "wrong_key", "no key or a wrong one; send it as: Authorization: Bearer KEY")

    def _count(self, scope: MutableMapping[str, Any], exchange: _Exchange) -> None:
        seconds = time.perf_counter() - exchange.began
        matched = getattr(scope.get("route"), "path", None)  # set by the router: /v1/log/{number}/picture, no number
        path = matched if matched in self.routes else "other"
        status = exchange.status or 499  # gone before the answer
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        client = scope.get("client") or ("",)
        say(
            "request", logging.WARNING if status >= 500 else logging.INFO, request_id=exchange.request_id,
            method=exchange.method, route=path, status=status, ms=round(1000 * seconds, 1), bytes=exchange.read,
            client=client[0],
        )  # fmt: skip


def extra_headers(refused: Refused) -> list[tuple[bytes, bytes]]:
    """What HTTP wants with some refusals."""
    headers = [(b"retry-after", str(refused.retry_after_s).encode())] if refused.retry_after_s else []
    return [*headers, (b"www-authenticate", b"Bearer")] if refused.status == 401 else headers


def _host_name(host: str) -> str:
    """The name without its port: ``[::1]:80`` to ``[::1]``."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
