"""Shapes of the answers, for OpenAPI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, get_type_hints

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from twinspect.decide.drift import DriftReport
from twinspect.inference.regions import Region
from twinspect.inference.result import columns
from twinspect.server.log import Verdict, inspections


class ErrorDetail(TypedDict):
    """Why not: a code for programs, a message for people."""

    code: str
    message: str
    request_id: str


class ErrorAnswer(TypedDict):
    """Every answer with a status of 400 or more."""

    error: ErrorDetail


class InlineMap(TypedDict):
    """Base64 of little-endian float32, row by row, at the model's own size; stretch it over the whole image."""

    rows: int
    columns: int
    dtype: str
    scale: list[float]
    data: str


if TYPE_CHECKING:
    ImageAnswer = dict[str, Any]
    LogRow = dict[str, Any]
    DriftAnswer = dict[str, Any]
else:
    # Kind of a result's column -> type of its value in JSON.
    _JSON = {
        "string": str, "double": float | None, "bool": bool | None, "int32": int, "int64": int,
        "regions": list[Region],
    }  # fmt: skip
    _COLUMNS = {
        "name" if column.name == "path" else column.name: Annotated[
            _JSON[column.kind], Field(description=column.help)
        ]
        for column in columns()
        if not column.tables_only
    }
    ImageAnswer = TypedDict(
        "ImageAnswer",
        {
            "log_id": int | None, **_COLUMNS, "map_scale": list[float], "map": InlineMap | None, "overlay": str,
            "nearest_jpeg": str,
        },
    )  # fmt: skip
    ImageAnswer.__doc__ = "One image. Higher scores are more anomalous; null is unknown."
    _OF_LOG = {c.name: c.type.python_type | None if c.nullable else c.type.python_type for c in inspections.c}
    LogRow = TypedDict("LogRow", {**_OF_LOG, **_COLUMNS, "picture": bool})
    LogRow.__doc__ = (
        "A kept decision; times are UTC in milliseconds since 1970. ``picture``: whether one was kept, for "
        "``/v1/log/{number}/picture``."
    )
    DriftAnswer = TypedDict("DriftAnswer", {"bundle": str, **get_type_hints(DriftReport)})
    DriftAnswer.__doc__ = "What the drift monitor of a model says; its light is grey before the first image."


class PredictAnswer(TypedDict):
    """All images of a request, in order; an image that cannot be read among others has ``error`` set."""

    request_id: str
    bundle: str
    model_id: str
    ms: float
    log_error: str
    results: list[ImageAnswer]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Of one class, with what is promised."""

    score: float
    region: float | None
    promise: str


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """A model being served; ``trouble`` says why a newer file of it is not."""

    bundle: str
    model_id: str
    size: int
    runtime: str
    classes: list[str]
    map_scale: list[float]
    thresholds: dict[str, Thresholds]
    trouble: str


class ModelsAnswer(TypedDict):
    """All models; where there are several, a request names one."""

    models: list[ModelAnswer]


class LogAnswer(TypedDict):
    """Rows, latest first; ``next`` goes into ``before`` for the next page, null on the last."""

    rows: list[LogRow]
    next: int | None


class FeedbackBody(TypedDict):
    """The operator's word; an empty verdict takes it back."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # pydantic reads it here

    verdict: Literal["", Verdict]
    note: NotRequired[str]


class DriftsAnswer(TypedDict):
    """All models."""

    drift: list[DriftAnswer]
