"""The door: who may come in, how much and how slowly, and one line of log for each request. Plain ASGI.

Everything here happens before a route runs, or around it: key, host and origin, size, memory and time of the
body, errors in one shape, headers, counters. Images never reach the log, nor do file names.
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
from contextlib import suppress
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twinspect.errors import TwinspectError
from twinspect.server import Refused
from twinspect.server.settings import Settings, is_loopback

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs"})  # hold no data
MOST_HEAD = 16_384  # bytes of the head of a request; uvicorn's own limit is for heads that come in pieces
LINGER_S = 1.0  # how long the rest of a refused request is read, so that its sender sees the answer
_MEGABYTE = 1 << 20
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEADERS = {
    "x-content-type-options": "nosniff", "cache-control": "no-store", "referrer-policy": "no-referrer",
    "x-frame-options": "DENY", "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}  # fmt: skip
SOON = {"retry-after": "1"}
_BEARER = {"www-authenticate": "Bearer"}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
logger = logging.getLogger("twinspect.server")


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

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter("twinspect_requests_total", "Requests by route and status", ["route", "status"])
        self.seconds = histogram("twinspect_request_seconds", "Time to the answer", ["route"], buckets=_SECONDS)
        self.images = counter("twinspect_images_total", "Images by answer", ["bundle", "answer"])
        self.batch = histogram("twinspect_batch_images", "Images per call of the model", ["bundle"], buckets=_BATCHES)
        self.model_seconds = histogram(
            "twinspect_model_seconds", "Time of a call of the model", ["bundle"], buckets=_SECONDS
        )
        self.waiting = gauge("twinspect_images_accepted", "Images accepted and not yet answered")
        self.memory = gauge("twinspect_request_bytes", "Bytes of requests being answered")
        self.log_errors = counter("twinspect_log_errors_total", "Decisions the log could not keep")
        self.reloads = counter("twinspect_reloads_total", "New versions of a bundle", ["bundle", "outcome"])
        self.drift = gauge("twinspect_drift_alarm", "1 after a drift alarm", ["bundle"])


class _Body:
    """The body of one request on its way, and the bytes that are reserved for it."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self.guard, self._receive = guard, receive
        self.read = self.reserved = 0
        self.complete = False

    async def load(self, length: str) -> Receive:
        """Read all of it, within size, memory and time; what gives it to the application.

        Room for the ``length`` that the client announces is reserved before a byte is read.
        """
        self._reserve(int(length) if length.isdigit() else 0)
        chunks = []
        try:
            async with asyncio.timeout(self.guard.settings.body_timeout_s):
                while not self.complete:
                    chunks.append(await self._next())
                    self._reserve(self.read)
        except TimeoutError:
            wait = f"{self.guard.settings.body_timeout_s:g}"
            raise Refused(408, "too_slow", f"the request was not complete within {wait} s") from None
        messages: list[Message] = [{"type": "http.request", "body": b"".join(chunks)}]

        async def receive() -> Message:
            return messages.pop() if messages else await self._receive()  # the latter waits for the client to go away

        return receive

    async def drain(self) -> None:
        """Read on for a moment: if the connection ended now, the sender of a long body would see no answer."""
        with suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(LINGER_S):
                while not self.complete:
                    await self._next()

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece: bytes = message.get("body", b"")
        self.read += len(piece)
        self.complete = not message.get("more_body", False)
        return piece

    def _reserve(self, total: int) -> None:
        settings, more = self.guard.settings, max(0, total - self.reserved)
        if total > settings.max_body_mb * _MEGABYTE:
            raise Refused(413, "too_large", f"more than {settings.max_body_mb:g} MB in a request; send fewer images")
        if self.guard.reserved + more > settings.max_memory_mb * _MEGABYTE:
            raise Refused(429, "busy", "requests being answered take all the memory there is for them", SOON)
        self.reserved += more
        self.guard.reserved += more


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.reserved = 0  # bytes of the requests being answered
        metrics.memory.set_function(lambda: self.reserved)
        self._key_hash = hashlib.sha256(settings.api_key.encode()).digest() if settings.api_key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # of a client that goes before its answer
        headers, body = Headers(scope=scope), _Body(self, receive)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(8)
        root, path = self.settings.root_path, scope["path"]
        if f"{path}/".startswith(f"{root}/"):  # some proxies take their own part away, others leave it
            path = path.removeprefix(root) or "/"
        inner = {**scope, "root_path": root, "path": root + path, "state": {"request_id": request_id}}
        if scope["method"] == "HEAD":  # answered like GET; uvicorn leaves the body out
            inner["method"] = "GET"

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                await body.drain()
                status, answer_headers = message["status"], MutableHeaders(scope=message)
                for name, value in {**_HEADERS, "x-request-id": request_id}.items():
                    answer_headers.setdefault(name, value)
                if not body.complete:
                    answer_headers["connection"] = "close"
            await send(message)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEAD:
                raise Refused(431, "head_too_large", f"the head of the request has more than {MOST_HEAD} bytes")
            self._refuse_strangers(path, headers)
            await self.app(inner, await body.load(headers.get("content-length", "")), answer)
        except ClientDisconnect:
            say("client_gone", logging.WARNING, request_id=request_id)
        except Exception as error:
            refused = _refusal(error, request_id)
            if status == 499:
                detail = {"code": refused.code, "message": str(refused), "request_id": request_id}
                response = JSONResponse({"error": detail}, refused.status, refused.headers)
                await response(inner, receive, answer)
        finally:
            self.reserved -= body.reserved
            seconds = time.perf_counter() - began
            route = getattr(inner.get("route"), "path", "other")  # of the router: /v1/log/{number}/picture, no number
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            say(
                "request", logging.WARNING if status >= 500 else logging.INFO, request_id=request_id,
                method=scope["method"], route=route, status=status, ms=round(1000 * seconds, 1), bytes=body.read,
                client=(scope.get("client") or ("",))[0],
            )  # fmt: skip

    def _refuse_strangers(self, path: str, headers: Headers) -> None:
        """Key, or without one the names by which only this machine's own pages call it."""
        host = headers.get("host", "").lower()
        origin = headers.get("origin", "").lower()
        if origin and origin.partition("://")[2] != host:
            raise Refused(403, "other_origin", "pages of other sites may not use this server")
        if not self._key_hash:
            # Without a key a page elsewhere could reach us under a name of its own that leads to 127.0.0.1.
            name = re.sub(r":\d*$", "", host)
            if not is_loopback(name):
                raise Refused(403, "other_host", "without a key this server answers to localhost and 127.0.0.1 only")
            return
        if path in OPEN_PATHS or path.startswith("/docs/"):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Digests have one length, so that not even the key's length shows in the time this takes.
        if not hmac.compare_digest(hashlib.sha256(key.encode("latin-1", "replace")).digest(), self._key_hash):
            raise Refused(401, "wrong_key", "no key or a wrong one; send it as: Authorization: Bearer KEY", _BEARER)


def _refusal(error: Exception, request_id: str) -> Refused:
    if isinstance(error, Refused):
        return error
    if isinstance(error, TwinspectError):
        return Refused(422, "not_accepted", str(error))
    # The trace goes to the log of the process, never to the client.
    logger.error("broken", exc_info=error, extra={"values": {"request_id": request_id}})
    return Refused(500, "internal", "an error in the server; its log has the details")
