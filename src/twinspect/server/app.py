"""The application: routes over a `Service`, images of a request, the page; and all of it on a socket by uvicorn."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from email.message import Message
from email.parser import HeaderParser
from email.utils import collapse_rfc2231_value
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, Body, Depends, FastAPI, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles

from twinspect._version import __version__
from twinspect.errors import ConfigError, unknown_name
from twinspect.inference import load
from twinspect.inference.predictor import Predictor
from twinspect.inference.streams import Item
from twinspect.server import Refused, schema
from twinspect.server.guard import MOST_HEAD, SOON, Guard, JsonLines
from twinspect.server.log import MOST, Filter, InspectionLog, plain_text
from twinspect.server.service import Asked, Service
from twinspect.server.settings import Settings

DRAIN_S = 30  # longest time that accepted requests have after the signal to stop
# An unused connection is closed after so long. uvicorn's 5 s would meet the next request of a line that sends one
# every 5 s, and that request would get no answer.
IDLE_S = 75
CONNECTIONS = 512  # open at the same time; more are answered with 503
FIELD = "file"
_FORM = "multipart/form-data"
_RAW = "application/octet-stream"
_CURL = f"curl -F {FIELD}=@a.png"
_MOST_PART_HEAD = 8192  # bytes of the headers of a part
_MOST_FIELDS = 16  # besides the images; none is used, some clients send a few
_CODES = {400: "bad_request", 404: "not_found", 405: "wrong_method"}
# What is accepted instead of a value, by the beginning of pydantic's name for what is wrong with it.
_ACCEPTED = {
    "literal": "{expected}", "greater_than": "{ge} or more", "less_than": "{le} or less", "int": "a whole number",
    "bool": "true or false", "string_too_long": "at most {max_length} characters", "string": "text",
    "extra": " and ".join(schema.FeedbackBody.__annotations__),
}  # fmt: skip
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILES = {"type": "array", "items": _BINARY["schema"]}
_FORM_BODY = {"schema": {"type": "object", "required": [FIELD], "properties": {FIELD: _FILES}}}
_BODY = {"requestBody": {"required": True, "content": {_FORM: _FORM_BODY, "image/*": _BINARY, _RAW: _BINARY}}}


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _refuse_unknown(request: Request) -> None:
    """A misspelt ``class`` would be passed over, and the class predicted instead."""
    route = request.scope["route"].dependant
    accepted = [field.alias for part in (route, *route.dependencies) for field in part.query_params]
    for name in request.query_params:
        if name not in accepted:
            raise Refused(400, "bad_request", unknown_name("parameter", name[:200], accepted or ["none"]))


Serving = Annotated[Service, Depends(_service)]
Number = Annotated[int, InPath(ge=1, le=MOST)]
_errors: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorAnswer} for status in (400, 401, 404, 408, 413, 415, 422, 429, 503, 504, 507)
}
_jpeg: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}}
api = APIRouter(prefix="/v1", dependencies=[Depends(_refuse_unknown)], responses=_errors)
others = APIRouter()


@api.post("/predict", openapi_extra=_BODY)
async def predict(request: Request, options: Annotated[Asked, Depends()], service: Serving) -> schema.PredictAnswer:
    """Score one or several images.

    Send fields called ``file`` of a form, or one image as the body. ``class`` names the class of all images
    (predicted otherwise), ``session`` is kept in the inspection log, ``keep=false`` is for trials that neither
    the log nor the drift light shall see, ``maps=inline`` adds anomaly maps as numbers, ``maps=overlay`` pictures of
    the images under them.
    A single image that cannot be read is refused (422); among several it has ``error`` set.
    """
    images = await _images(request, service.settings.max_files)
    return await service.predict(images, options, request.state.request_id)


@api.get("/models")
async def models(service: Serving) -> schema.ModelsAnswer:
    """Models being served, with thresholds and what they promise."""
    return {"models": [served.describe() for served in service.models.values()]}


@api.post("/models/{bundle}/reload")
async def reload(bundle: str, service: Serving) -> schema.ModelAnswer:
    """Read a model's file again; requests under way finish with the old version."""
    return (await service.reload(bundle)).describe()


@api.get("/log")
def log_rows(selection: Annotated[Filter, Depends()], service: Serving) -> schema.LogAnswer:
    """Decisions kept, latest first, by time, class, answer, session, feedback or part of the file's name."""
    rows = service.the_log().query(selection)
    return {"rows": rows, "next": rows[-1]["id"] if len(rows) == selection.limit else None}


@api.get("/log/{number}/picture", response_class=Response, responses=_jpeg)
def log_picture(number: Number, service: Serving) -> Response:
    """The picture of a decision under its map, where the server keeps them (``--log-thumbnails``)."""
    return Response(service.the_log().picture(number), media_type="image/jpeg")


@api.post("/log/{number}/feedback")
def feedback(number: Number, body: Annotated[schema.FeedbackBody, Body()], service: Serving) -> schema.LogRow:
    """Keep the operator's word on a decision; calibration can learn from it."""
    return service.the_log().give_feedback(number, body["verdict"], body.get("note", ""))


@api.get("/drift")
def drift(service: Serving) -> schema.DriftsAnswer:
    """Whether predictions still look like the calibration images."""
    return {"drift": [{"bundle": model.name, **asdict(model.light.report())} for model in service.models.values()]}


@api.post("/drift/{bundle}/reset")
def reset_drift(bundle: str, service: Serving) -> schema.DriftsAnswer:
    """Watch from the beginning again, after the cause of an alarm was put right."""
    service.model(bundle).light.reset()
    return drift(service)


@others.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@others.get("/readyz", responses=_errors)
async def readyz(service: Serving) -> dict[str, str]:
    """Requests are accepted."""
    if not service.ready:
        raise Refused(503, "stopping", "the server is starting or stopping", SOON)
    return {"status": "ready"}


@others.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Serving) -> Response:
    """Counters for Prometheus."""
    return Response(generate_latest(service.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})


@others.get("/", include_in_schema=False)
async def index() -> Response:
    """The operators' page."""
    return _page("page.html")


@others.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """The page of the API: Swagger UI, whose files come with a package."""
    if not find_spec("swagger_ui_bundle"):
        raise Refused(404, "no_docs", 'the page of the API needs a package; type: pip install "twinspect[server]"')
    return _page("docs.html")


def _swagger() -> list[BaseRoute]:
    if not find_spec("swagger_ui_bundle"):
        return []
    from swagger_ui_bundle import swagger_ui_path

    return [Mount("/docs", StaticFiles(directory=swagger_ui_path))]


def _page(name: str) -> Response:
    """A page and its policy: no script or style from elsewhere, and of its own only what stands there now."""
    text = files("twinspect").joinpath(f"server/{name}").read_text(encoding="utf-8")
    own = {"script": "'self'", "style": "'self'"}
    for kind, part in re.findall(r"<(script|style)>(.*?)</\1>", text, re.S):
        own[kind] += f" 'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
    policy = (
        f"default-src 'none'; script-src {own['script']}; style-src {own['style']}; connect-src 'self'; "
        "img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return HTMLResponse(text, headers={"content-security-policy": policy})


def build_app(
    settings: Settings,
    models: Mapping[str, Predictor | Path],
    log: InspectionLog | None = None,
    open_file: Callable[[Path], Predictor] = load,
) -> FastAPI:
    """The application, to be run by any ASGI server on one process; a TwinspectError where a file cannot be opened.

    ``models`` are predictors or files by name; ``open_file`` opens files again when they change. Without a ``log``
    no decision is kept.
    """
    service = Service(settings, models, log, open_file)
    app = FastAPI(
        title="twinspect", version=__version__, summary="Visual anomaly detection",
        routes=[*api.routes, *others.routes, *_swagger()],
        lifespan=lambda _app: service.running(),
        docs_url=None, redoc_url=None,  # both would load scripts from elsewhere
        middleware=[Middleware(Guard, settings=settings, metrics=service.metrics)],
        exception_handlers={HTTPException: _http_error, RequestValidationError: _invalid},
    )  # fmt: skip
    app.state.service = service
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, text = _CODES.get(error.status_code, "refused"), f"{request.url.path}: {error.detail}"
    if allowed := (error.headers or {}).get("Allow"):
        text = f"{request.method} {request.url.path}: accepted {allowed}"
    raise Refused(error.status_code, code, text, error.headers)


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    raise Refused(400, "bad_request", "; ".join(_complaint(problem) for problem in error.errors()[:3]))


def _complaint(problem: Mapping[str, Any]) -> str:
    place, *names = problem["loc"]
    if place == "body" and (not names or problem["type"] == "json_invalid"):
        return "the body is no JSON object; type: curl -H 'Content-Type: application/json' -d '{\"NAME\": \"VALUE\"}'"
    name, kind = ".".join(map(str, names)), problem["type"]
    if kind == "missing":
        return f"{name} is missing"
    accepted = next((words for key, words in _ACCEPTED.items() if kind.startswith(key)), "another value")
    return f"{name} {plain_text(repr(problem['input']), 80)}: accepted {accepted.format(**problem.get('ctx', {}))}"


# ---------------------------------------------------------------------------------- images of a request


async def _images(request: Request, most: int) -> list[Item]:
    """Several files of a form, or the body itself; refused are another type of content, no image, and too many."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _FORM:
        return await _from_form(request, most)
    if kind == _RAW or kind.startswith("image/"):
        name = _decoded(request.headers.get("x-filename", "").encode("latin-1"))
        return [Item(_label(name) or "image", data=await request.body())]
    raise Refused(
        415, "wrong_type",
        f"content type {plain_text(kind, 80)!r}; accepted {_FORM} with fields called {FIELD!r}, or one image as "
        f"image/* or {_RAW}; type: {_CURL}",
    )  # fmt: skip


async def _from_form(request: Request, most: int) -> list[Item]:
    head = Message()
    head["content-type"] = request.headers["content-type"]
    boundary = head.get_boundary()
    if not boundary:
        raise _bad_form(f"its content type has no boundary; type: {_CURL}")
    body = await request.body()
    images: list[Item] = []
    others: list[str] = []
    for part, data in _parts(body, b"--" + boundary.encode("latin-1", "replace")):
        name, field = _parameter(part, "filename"), _parameter(part, "name") or ""
        if name is not None and field == FIELD:
            images.append(Item(_label(name) or f"image-{len(images)}", data=data))
        else:
            others.append(f"{plain_text(field, 80)!r} with {'text' if name is None else 'a file'}")
        if len(images) > most:
            raise Refused(413, "too_many", f"more than {most} images in one request; send several")
        if len(others) > _MOST_FIELDS:
            raise _bad_form(f"more than {_MOST_FIELDS} fields besides its images")
    if not images:
        names = ", ".join(others) or "nothing"
        raise Refused(400, "no_image", f"the form has no file in a field {FIELD!r}, but {names}; type: {_CURL}")
    return images


def _parts(body: bytes, mark: bytes) -> Iterator[tuple[Message, bytes]]:
    """Headers and content of every part of a form (RFC 7578).

    Starlette's parser passes over ``filename*``, which .NET, Java and requests with urllib3 1 send for every name
    that is not ASCII, and over a last part that was cut off; and it writes large files to the disk.
    """
    start = body.find(mark) + len(mark)
    if start < len(mark):
        raise _bad_form("its boundary is nowhere in it")
    while body[start : start + 2] != b"--":
        head_end = body.find(b"\r\n\r\n", start, start + _MOST_PART_HEAD)
        end = body.find(b"\r\n" + mark, start)
        if not 0 <= head_end < end:
            raise _bad_form(f"a part has no end, or no end of its headers within {_MOST_PART_HEAD} bytes")
        yield HeaderParser().parsestr(_decoded(body[start:head_end]).lstrip()), body[head_end + 4 : end]
        start = end + 2 + len(mark)


def _bad_form(why: str) -> Refused:
    return Refused(400, "bad_form", f"the form cannot be read: {why}")


def _decoded(header: bytes) -> str:
    """UTF-8, as nearly all clients send it, else Latin-1."""
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError:
        return header.decode("latin-1")


def _parameter(head: Message, name: str) -> str | None:
    """A parameter of the content disposition; ``name*`` (RFC 2231) wins over ``name``, whose ASCII is a makeshift."""
    values = [value for key, value in head.get_params([], "content-disposition") if key.lower() == name]
    return collapse_rfc2231_value(values[-1]) if values else None


def _label(name: str) -> str:
    """The last part of a name as the client gave it, safe to show and to keep; it is never opened."""
    return plain_text(name.replace("\\", "/").rsplit("/", 1)[-1])


# --------------------------------------------------------------------------------------------- on a socket


class Server(uvicorn.Server):
    """uvicorn, that hangs up on clients who are too slow to send the head of a request, or to take an answer."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings
        self._since: dict[tuple[Any, ...], float] = {}  # by what is waited for: when that began

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: look at every connection."""
        now, before, self._since = time.monotonic(), self._since, {}
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            request = connection.cycle  # the latest one; none before the first head
            begun = request is None or connection.conn.trailing_data[0]  # the first head, or the next one
            waits = {
                "head": (self._settings.header_timeout_s, begun and (request is None or request.response_complete)),
                "answer": (self._settings.body_timeout_s, connection.transport.get_write_buffer_size() > 0),
            }
            for what, (limit, waiting) in waits.items():
                if waiting:
                    began = self._since[connection, request, what] = before.get((connection, request, what), now)
                    if now - began > limit:
                        connection.transport.abort()
        return await super().on_tick(counter)


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


def prepared(app: FastAPI, settings: Settings) -> tuple[Server, socket.socket]:
    """A server that is not running yet, and its bound socket. Raises as `serve`."""
    config = uvicorn.Config(
        app, settings.host, settings.port, http="h11", ws="none", lifespan="on",
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
    return Server(config, settings), listening


def address_of(listening: socket.socket) -> str:
    """What to type into a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
