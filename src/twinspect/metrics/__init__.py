"""Metrics of anomaly detection: exact for images, in constant memory with proven error for pixels.

``METRICS`` names them all. ``Evaluator`` accumulates a whole evaluation; the functions are for image scores at hand.
"""

from __future__ import annotations

from twinspect.metrics.evaluator import Evaluator, mean_of
from twinspect.metrics.pixels import PIXEL_METRICS
from twinspect.metrics.ranking import IMAGE_METRICS, auroc, average_precision, f1_max, roc_curve

__all__ = [
    "METRICS",
    "Evaluator",
    "auroc",
    "average_precision",
    "f1_max",
    "mean_of",
    "roc_curve",
]

METRICS = (*IMAGE_METRICS, "sample_auroc", *PIXEL_METRICS)  # in the order of tables
