"""Shapes of the answers, for OpenAPI and for whoever reads this instead."""

from __future__ import annotations

from typing import NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12


class ErrorDetail(TypedDict):
    """Why not: a code for programs, a message for people."""

    code: str
    message: str
    request_id: str


class ErrorAnswer(TypedDict):
    """Every answer with a status of 400 or more."""

    error: ErrorDetail


class Status(TypedDict):
    """That the process lives, or that it accepts requests."""

    status: str


class RegionAnswer(TypedDict):
    """A region in pixels of the original image."""

    x: int
    y: int
    width: int
    height: int
    area: int
    score: float
    p_value: float


class InlineMap(TypedDict):
    """Base64 of little-endian float32, row by row, at the model's own size; stretch it over the whole image."""

    rows: int
    columns: int
    dtype: str
    scale: list[float]
    data: str


class ImageAnswer(TypedDict):
    """One image. Higher scores are more anomalous; null is unknown. Fields as in the tables of predict."""

    log_id: int | None
    name: str
    class_name: str
    score: float | None
    score_local: float | None
    score_semantic: float | None
    p_joint: float | None
    p_value: float | None
    threshold: float | None
    severity: float | None
    margin: float | None
    threshold_unsure: float | None
    answer: str
    is_anomaly: bool | None
    predicted_class: str
    class_p: float | None
    unknown_class: bool | None
    cluster_distance: float | None
    peak: float | None
    threshold_region: float | None
    width: int
    height: int
    model_id: str
    ms: float | None
    error: str
    n_regions: int
    max_region_area: int
    regions: list[RegionAnswer]
    map_scale: list[float]
    map_id: str
    map: InlineMap | None


class PredictAnswer(TypedDict):
    """All images of a request, in order; an image that cannot be read among others has ``error`` set."""

    request_id: str
    bundle: str
    model_id: str
    ms: float
    log_error: str
    results: list[ImageAnswer]


class Thresholds(TypedDict):
    """Of one class, with what is promised."""

    score: float
    region: float | None
    promise: str


class ModelAnswer(TypedDict):
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
    """All models; the first is taken where a request names none."""

    models: list[ModelAnswer]


class LogRow(TypedDict):
    """A kept decision; times are UTC in milliseconds since 1970."""

    id: int
    at_ms: int
    request_id: str
    bundle: str
    model_id: str
    name: str
    image_key: str
    session: str
    class_name: str
    predicted_class: str
    answer: str
    score: float | None
    score_local: float | None
    score_semantic: float | None
    p_value: float | None
    threshold: float | None
    severity: float | None
    threshold_unsure: float | None
    class_p: float | None
    cluster_distance: float | None
    peak: float | None
    threshold_region: float | None
    unknown_class: bool | None
    width: int
    height: int
    n_regions: int
    regions: list[RegionAnswer]
    feedback: str
    feedback_at_ms: int | None
    note: str


class LogAnswer(TypedDict):
    """Rows, latest first; ``next`` goes into ``before`` for the next page, null on the last."""

    rows: list[LogRow]
    next: int | None


class FeedbackBody(TypedDict):
    """The operator's word: ``false_alarm``, ``missed``, ``confirmed``, or empty to take it back."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # pydantic reads it here

    verdict: str
    note: NotRequired[str]


class DriftAnswer(TypedDict):
    """Per model: a light (green, red; grey before the first image) and what the monitor says."""

    bundle: str
    light: str
    kind: str
    message: str
    images: int
    false_alarm_rate: float


class DriftsAnswer(TypedDict):
    """All models."""

    drift: list[DriftAnswer]
