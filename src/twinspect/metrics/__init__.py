"""Metrics of anomaly detection: exact for images, in constant memory with proven error for pixels.

``METRICS`` names them all. ``Evaluator`` accumulates a whole evaluation; ``ScoreHistogram`` is its pixel
half; the functions are for arrays at hand.
"""

from __future__ import annotations

from typing import NamedTuple

from twinspect.metrics.evaluator import IMAGE_FUNCTIONS, Evaluator
from twinspect.metrics.ranking import Metric as MetricFunction
from twinspect.metrics.ranking import auroc, average_precision, bootstrap_interval, f1_max, roc_curve
from twinspect.metrics.regions import aupro, auspro
from twinspect.metrics.stream import ScoreHistogram
from twinspect.metrics.sweep import PixelSummary

__all__ = [
    "METRICS",
    "Evaluator",
    "MetricInfo",
    "PixelSummary",
    "ScoreHistogram",
    "aupro",
    "auspro",
    "auroc",
    "average_precision",
    "bootstrap_interval",
    "f1_max",
    "roc_curve",
]


class MetricInfo(NamedTuple):
    """One row of ``METRICS``.

    Attributes:
        level: ``image``, ``sample`` or ``pixel``.
        text: what it is, for tables and help.
        function: of (scores, labels) for image metrics; None where the ``Evaluator`` accumulates instead.
    """

    level: str
    text: str
    function: MetricFunction | None = None


METRICS: dict[str, MetricInfo] = {
    "image_auroc": MetricInfo("image", "area under the ROC curve", IMAGE_FUNCTIONS["image_auroc"]),
    "image_ap": MetricInfo("image", "average precision", IMAGE_FUNCTIONS["image_ap"]),
    "image_f1max": MetricInfo("image", "best F1 over all thresholds", IMAGE_FUNCTIONS["image_f1max"]),
    "sample_auroc": MetricInfo("sample", "area under the ROC curve, a sample scoring its highest view"),
    "pixel_auroc": MetricInfo("pixel", "area under the ROC curve over pixels"),
    "pixel_ap": MetricInfo("pixel", "average precision over pixels"),
    "pixel_f1max": MetricInfo("pixel", "best F1 over all thresholds, over pixels"),
    "aupro": MetricInfo("pixel", "area under per-region overlap to false positive rate 0.3"),
    "aupro_005": MetricInfo("pixel", "area under per-region overlap to false positive rate 0.05"),
    "auspro_005": MetricInfo("pixel", "area under saturated per-region overlap to false positive rate 0.05"),
}
