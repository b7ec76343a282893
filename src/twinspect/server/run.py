"""The application on a socket: uvicorn with our logging, limits and a deadline for slow clients."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from twinspect.errors import ConfigError
from twinspect.server.guard import MOST_HEAD, JsonLines
from twinspect.server.settings import Settings

DRAIN_S = 30  # longest time that accepted requests have after the signal to stop
# An unused connection is closed after so long. uvicorn's 5 s would meet the next request of a line that sends one
# every 5 s, and that request would get no answer.
IDLE_S = 75
CONNECTIONS = 512  # open at the same time; more are answered with 503


def protocol(header_timeout_s: float, body_timeout_s: float) -> type[H11Protocol]:
    """HTTP/1.1 as uvicorn speaks it, that hangs up on slow clients.

    The first limit is for the head of a request, from its first byte or from the connection on; the second is for
    taking a piece of the answer.
    """

    class Impatient(H11Protocol):
        """One connection."""

        _head: asyncio.TimerHandle | None = None
        _answer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # told of anything that the client does not take
            self._head = self.loop.call_later(header_timeout_s, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._head, self._answer):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head(begun=True)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch_head(begun=bool(self.conn.trailing_data[0]))  # the beginning of a next one came with the last

        def _watch_head(self, begun: bool) -> None:
            waiting = self.cycle is None or self.cycle.response_complete
            if waiting and begun and self._head is None:
                self._head = self.loop.call_later(header_timeout_s, self.transport.abort)
            elif not waiting and self._head is not None:
                self._head.cancel()
                self._head = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer = self.loop.call_later(body_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._answer is not None:
                self._answer.cancel()
                self._answer = None

    return Impatient


def serve(app: FastAPI, settings: Settings, started: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish what was accepted; ``started`` is told the address."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("twinspect.server", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    server, listening = prepared(app, settings)

    def leave(_number: int, _frame: object) -> None:
        server.should_exit = True

    # For a signal before the loop runs; and uvicorn, once everything is finished, passes its signal on to these.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    started(address_of(listening))
    server.run(sockets=[listening])


def prepared(app: FastAPI, settings: Settings) -> tuple[uvicorn.Server, socket.socket]:
    """A server that is not running yet, and its bound socket. Raises as `serve`."""
    config = uvicorn.Config(
        app, settings.host, settings.port, ws="none", lifespan="on",
        http=protocol(settings.header_timeout_s, settings.body_timeout_s),
        log_config=None, access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=CONNECTIONS, h11_max_incomplete_event_size=MOST_HEAD,
        timeout_graceful_shutdown=DRAIN_S, timeout_keep_alive=IDLE_S,
    )  # fmt: skip
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # so that :: means every address
    try:  # early clients wait in the queue instead of being refused
        address = (settings.host.strip("[]"), settings.port)
        listening = socket.create_server(address, family=family, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error}); choose another --port, "
            "or an address of this machine for --host"
        ) from None
    # Connections inherit it. asyncio would not see that they are TCP: Nagle's delay costs 40 ms for each answer.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return uvicorn.Server(config), listening


def address_of(listening: socket.socket) -> str:
    """What to type into a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
