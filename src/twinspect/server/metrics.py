"""What Prometheus sees. One registry per application, so that several can live in one process (tests)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one application."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        PlatformCollector(registry=own)
        self.requests = Counter(
            "twinspect_requests_total", "Requests by route and status", ["route", "status"], registry=own
        )
        self.seconds = Histogram(
            "twinspect_request_seconds", "Time to the answer", ["route"], buckets=_SECONDS, registry=own
        )
        self.images = Counter("twinspect_images_total", "Images by answer", ["bundle", "answer"], registry=own)
        self.batch = Histogram(
            "twinspect_batch_images", "Images per call of the model", ["bundle"], buckets=_BATCHES, registry=own
        )
        self.model_seconds = Histogram(
            "twinspect_model_seconds", "Time of a call of the model", ["bundle"], buckets=_SECONDS, registry=own
        )
        self.waiting = Gauge("twinspect_images_accepted", "Images accepted and not yet answered", registry=own)
        self.memory = Gauge("twinspect_request_bytes", "Bytes of requests being answered", registry=own)
        self.log_errors = Counter("twinspect_log_errors_total", "Decisions the log could not keep", registry=own)
        self.reloads = Counter(
            "twinspect_reloads_total", "New versions of a bundle", ["bundle", "outcome"], registry=own
        )
        self.drift = Gauge("twinspect_drift_alarm", "1 after a drift alarm", ["bundle"], registry=own)

    def text(self) -> bytes:
        """In Prometheus's own format."""
        return bytes(generate_latest(self.registry))
