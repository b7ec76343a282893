"""The application, a value built from settings, models and a log: routes in a list, no globals."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from twinspect._version import __version__
from twinspect.errors import TwinspectError, unknown_name
from twinspect.inference import load
from twinspect.inference.predictor import Predictor
from twinspect.server import schema
from twinspect.server.guard import Guard, Refused, error_body, extra_headers, refusal_of
from twinspect.server.log import MOST, Filter, InspectionLog, plain_text
from twinspect.server.reference import reference
from twinspect.server.service import Asked, Service
from twinspect.server.settings import Settings
from twinspect.server.uploads import openapi_body, read_images

_CODES = {400: "bad_request", 404: "not_found", 405: "wrong_method"}
Number = Annotated[int, InPath(ge=1, le=MOST)]


def build_app(
    settings: Settings,
    predictors: Mapping[str, Predictor],
    log: InspectionLog | None = None,
    paths: Mapping[str, Path] | None = None,
    open_file: Callable[[Path], Predictor] = load,
) -> FastAPI:
    """The application, to be run by any ASGI server on one process.

    Args:
        settings: limits and key.
        predictors: models by name; where there are several, requests must name one.
        log: where decisions are kept; None keeps none.
        paths: files of models, which are read again when they change.
        open_file: a file to a predictor.

    Examples:
        >>> app = build_app(Settings(), {"parts": load("parts.onnx")})
        >>> uvicorn.run(app)
    """
    service = Service(settings, predictors, log, paths or {}, open_file)
    routes = _Routes(service).routes()

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    known = frozenset(route.path for route in routes)
    return FastAPI(
        title="twinspect", version=__version__, summary="Visual anomaly detection", lifespan=life, routes=[*routes],
        docs_url=None, redoc_url=None,  # both would load scripts from elsewhere; ours is `reference`
        middleware=[Middleware(Guard, settings=settings, metrics=service.metrics, routes=known)],
        exception_handlers={
            TwinspectError: _refused, HTTPException: _http_error, RequestValidationError: _invalid,
        },
    )  # fmt: skip


class _Routes:
    """One method per route."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._page, self._policy = page(service.settings.root_path)

    def routes(self) -> list[APIRoute]:
        """All of them, in order."""
        errors: dict[int | str, dict[str, Any]] = {
            status: {"model": schema.ErrorAnswer}
            for status in (400, 401, 404, 408, 413, 415, 422, 429, 503, 504, 507)
        }
        table: Sequence[tuple[str, str, Callable[..., Any], Any]] = (
            ("POST", "/v1/predict", self.predict, schema.PredictAnswer),
            ("GET", "/v1/models", self.models, schema.ModelsAnswer),
            ("POST", "/v1/models/{bundle}/reload", self.reload, schema.ModelAnswer),
            ("GET", "/v1/log", self.log_rows, schema.LogAnswer),
            ("GET", "/v1/log/{number}/picture", self.log_picture, ("image/jpeg",)),
            ("POST", "/v1/log/{number}/feedback", self.feedback, schema.LogRow),
            ("GET", "/v1/drift", self.drift, schema.DriftsAnswer),
            ("POST", "/v1/drift/{bundle}/reset", self.reset_drift, schema.DriftsAnswer),
            ("GET", "/healthz", self.healthz, schema.Status),
            ("GET", "/readyz", self.readyz, schema.Status),
            ("GET", "/metrics", self.metrics, ("text/plain",)),
            ("GET", "/docs", self.docs, ("text/plain",)),
            ("GET", "/", self.index, ("text/html",)),
        )

        def answer(model: Any) -> dict[str, Any]:
            return {"content": {kind: {} for kind in model}} if isinstance(model, tuple) else {"model": model}

        return [
            APIRoute(
                path, endpoint, methods=[method], response_model=None,
                dependencies=[Depends(_refuse_unknown)] if path.startswith("/v1") else [],
                response_class=Response if isinstance(model, tuple) else JSONResponse,
                responses={200: answer(model), **(errors if path.startswith("/v1") or path == "/readyz" else {})},
                openapi_extra=openapi_body() if path == "/v1/predict" else None,
                include_in_schema=path not in ("/", "/docs"),
            )
            for method, path, endpoint, model in table
        ]  # fmt: skip

    async def predict(self, request: Request, asked: Annotated[Asked, Depends()]) -> Response:
        """Score one or several images.

        Send fields called ``file`` of a form, or one image as the body. ``class`` names the class of all images
        (predicted otherwise), ``session`` is kept in the inspection log, ``keep=false`` is for trials that neither
        the log nor the drift light shall see, ``maps=inline`` adds anomaly maps as
        numbers, ``maps=overlay`` pictures of the images under them.
        A single image that cannot be read is refused (422); among several it has ``error`` set.
        """
        self.service.refuse_if_full(asked.bundle)
        images = await read_images(request, self.service.settings.max_files)
        return JSONResponse(await self.service.predict(images, asked, str(request.state.request_id)))

    async def models(self) -> Response:
        """Models being served, with thresholds and what they promise."""
        models = self.service.models
        return JSONResponse({"models": [self._describe(served.name) for served in models]})

    def _describe(self, name: str) -> dict[str, Any]:
        models = self.service.models
        return {**models.get(name).describe(), "trouble": models.trouble.get(name, "")}

    async def reload(self, bundle: str) -> Response:
        """Read a model's file again; requests under way finish with the old version."""
        return JSONResponse(self._describe((await self.service.reload(bundle)).name))

    async def log_rows(self, wanted: Annotated[Filter, Depends()]) -> Response:
        """Decisions kept, latest first, by time, class, answer, session, feedback or part of the file's name."""
        rows = await asyncio.to_thread(self.service.the_log().query, wanted)
        return JSONResponse({"rows": rows, "next": rows[-1]["id"] if len(rows) == wanted.limit else None})

    async def log_picture(self, number: Number) -> Response:
        """The picture of a decision under its map, where the server keeps them (``--log-thumbnails``)."""
        return Response(await asyncio.to_thread(self.service.the_log().picture, number), media_type="image/jpeg")

    async def feedback(self, number: Number, body: Annotated[schema.FeedbackBody, Body()]) -> Response:
        """Keep the operator's word on a decision; calibration can learn from it."""
        log = self.service.the_log()
        row = await asyncio.to_thread(log.give_feedback, number, body["verdict"], body.get("note", ""))
        return JSONResponse(row)

    async def drift(self) -> Response:
        """Whether predictions still look like the calibration images."""
        models = list(self.service.models)
        # In a thread: comparing thousands of scores takes a moment.
        reports = await asyncio.to_thread(
            lambda: [{"bundle": one.name, **one.light.report().to_dict()} for one in models]
        )
        return JSONResponse({"drift": reports})

    async def reset_drift(self, bundle: str) -> Response:
        """Watch from the beginning again, after the cause of an alarm was put right."""
        served = self.service.models.get(bundle)
        served.light.reset()
        self.service.metrics.drift.labels(served.name).set(0)
        return await self.drift()

    async def healthz(self) -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """Requests are accepted."""
        if not self.service.ready:
            raise Refused(503, "stopping", "the server is starting or stopping", 1)
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        """Counters for Prometheus."""
        metrics = self.service.metrics
        return Response(metrics.text(), headers={"content-type": metrics.content_type})

    async def docs(self, request: Request) -> Response:
        """The API in words, as Markdown."""
        text = "\n".join(["# twinspect: HTTP API\n", *reference(request.app.openapi())])
        return Response(text, media_type="text/plain; charset=utf-8")

    async def index(self) -> Response:
        """The page."""
        return HTMLResponse(self._page, headers={"content-security-policy": self._policy})


def _refuse_unknown(request: Request) -> None:
    """A misspelt ``class`` would be passed over, and the class predicted instead."""
    route = request.scope["route"].dependant
    accepted = [field.alias for part in (route, *route.dependencies) for field in part.query_params]
    for name in request.query_params:
        if name not in accepted:
            raise Refused(400, "bad_request", unknown_name("parameter", name[:200], accepted or ["none"]))


def page(root: str = "") -> tuple[str, str]:
    """The page for clients that see it below ``root``, and its policy: no script or style from elsewhere."""
    text = files("twinspect").joinpath("server/page.html").read_text(encoding="utf-8")
    text = text.replace("__ROOT__", json.dumps(root))
    hashes = {
        kind: " ".join(f"'sha256-{_digest(part)}'" for part in re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.S))
        for kind in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text, policy


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


async def _refused(request: Request, error: Exception) -> Response:
    refusal = refusal_of(error)
    if refusal is None:
        raise error  # ours; the guard says so
    return _answer(request, refusal)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, Refused):  # while a body was read for us
        return _answer(request, error.__cause__)
    code, text = _CODES.get(error.status_code, "refused"), f"{request.url.path}: {error.detail}"
    if allowed := (error.headers or {}).get("Allow"):
        text = f"{request.method} {request.url.path}: accepted {allowed}"
    return _answer(request, Refused(error.status_code, code, text), error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    text = "; ".join(_complaint(one) for one in error.errors()[:3])
    return _answer(request, Refused(400, "bad_request", text))


def _complaint(one: Mapping[str, Any]) -> str:
    place, *names = one["loc"]
    if place == "body" and (not names or one["type"] == "json_invalid"):
        return "the body is no JSON object; type: curl -H 'Content-Type: application/json' -d '{\"NAME\": \"VALUE\"}'"
    got = "" if one["type"] == "missing" else f" {plain_text(repr(one['input']), 80)}"
    return f"{'.'.join(str(name) for name in names)}{got}: {one['msg']}"


def _answer(request: Request, refused: Refused, headers: Mapping[str, str] | None = None) -> Response:
    body = error_body(refused.code, str(refused), str(getattr(request.state, "request_id", "")))
    extra = {name.decode(): value.decode() for name, value in extra_headers(refused)}
    return JSONResponse(body, refused.status, {**(headers or {}), **extra})
