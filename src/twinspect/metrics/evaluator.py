"""The accumulator behind every results table: images in, one dictionary of metrics out.

Image scores are kept (a few bytes per image), maps are not: each class has a ``ScoreHistogram``, and all of
them share one memory limit. Everything commutes: evaluators of parts of the images merge, in any order, with
bit-identical results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twinspect.errors import DataError
from twinspect.metrics import ranking
from twinspect.metrics.pages import Budget
from twinspect.metrics.regions import SPRO_LIMIT, check_limit
from twinspect.metrics.stream import FPR_LIMITS, MEMORY_LIMIT, ScoreHistogram
from twinspect.metrics.sweep import PixelSummary, Totals, summarise

TOLERANCE = 1e-4
IMAGE_FUNCTIONS: dict[str, ranking.Metric] = {
    "image_auroc": ranking.auroc,
    "image_ap": ranking.average_precision,
    "image_f1max": lambda scores, labels: ranking.f1_max(scores, labels)[0],
}
PIXEL_NAMES = {"pixel_auroc": "auroc", "pixel_ap": "ap", "pixel_f1max": "f1max"}
SPRO_NAME = "auspro_005"

Numbers = dict[str, float]


def aupro_name(limit: float) -> str:
    """Key of AUPRO at a false positive rate limit: ``aupro`` at the usual 0.3, ``aupro_005`` at 0.05."""
    return "aupro" if limit == 0.3 else f"aupro_{limit:g}".replace(".", "")


@dataclass
class ClassRecords:
    """What is kept of the images of one class."""

    scores: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    without_mask: int = 0
    unlabelled: int = 0

    def extend(self, other: ClassRecords) -> None:
        """Append the records of another process."""
        self.scores += other.scores
        self.labels += other.labels
        self.defects += other.defects
        self.groups += other.groups
        self.without_mask += other.without_mask
        self.unlabelled += other.unlabelled

    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Scores and labels."""
        return np.array(self.scores, np.float64), np.array(self.labels, np.int64)

    def by_defect(self) -> dict[str, float]:
        """Image AUROC of each defect type against all normal images of the class."""
        scores, labels = self.arrays()
        kinds = np.array(self.defects, dtype=object)
        out = {}
        for kind in sorted({d for d, label in zip(self.defects, self.labels, strict=True) if d and label}):
            keep = (labels == 0) | ((kinds == kind) & (labels == 1))
            out[kind] = ranking.auroc(scores[keep], labels[keep])
        return {kind: value for kind, value in out.items() if not math.isnan(value)}

    def by_sample(self) -> float | None:
        """AUROC over groups, a group scoring the maximum of its views; None if no group has two images."""
        groups: dict[str, tuple[float, int]] = {}
        for i, (score, label) in enumerate(zip(self.scores, self.labels, strict=True)):
            key = self.groups[i] or f"\0{i}"
            best, worst = groups.get(key, (score, label))
            groups[key] = (max(best, score), max(worst, label))
        if len(groups) == len(self.scores):
            return None
        scores, labels = zip(*groups.values(), strict=True)
        return ranking.auroc(scores, labels)


class Evaluator:
    """Accumulates scores, maps and masks; computes every metric per class, their mean, and per defect type.

    Args:
        pixel: whether maps are counted; False ignores maps and masks.
        fpr_limits: false positive rates at which AUPRO ends.
        memory_limit: bytes for the pixel counts of all classes together.

    Raises:
        DataError: a limit outside (0, 1].
    """

    def __init__(
        self,
        pixel: bool = True,
        fpr_limits: Sequence[float] = FPR_LIMITS,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self.pixel = pixel
        self.fpr_limits = tuple(check_limit(limit) for limit in fpr_limits)
        self.budget = Budget(memory_limit)
        self.records: dict[str, ClassRecords] = {}
        # Per class, then per part: "" or, for images with saturated regions, the defect type. A class is the
        # sum of its parts, and a part with the good images is LOCO's "logical" or "structural" result.
        self.meters: dict[str, dict[str, ScoreHistogram]] = {}

    def update(
        self,
        score: float,
        label: int | None,
        class_name: str,
        defect_type: str = "",
        map_HW: ArrayLike | None = None,
        mask_HW: ArrayLike | None = None,
        regions: Sequence[tuple[ArrayLike, float]] | None = None,
        name: str = "",
        group: str = "",
    ) -> None:
        """Add one image.

        Args:
            score: finite number, higher means more anomalous.
            label: 1 anomaly, 0 normal, None unknown (counted, nothing else).
            class_name: class whose metrics the image belongs to.
            defect_type: kind of defect of an anomalous image.
            map_HW: H x W finite scores. Without it the image adds to image metrics only.
            mask_HW: H x W, non-zero means defect. A normal image needs none; an anomalous one without mask
                and regions adds to image metrics only.
            regions: (mask H x W, saturation area in pixels) per annotated region (MVTec LOCO).
            name: image name for error messages.
            group: images of one physical sample (views) share it.

        Raises:
            DataError: a score or map that is not finite, a mask of another size, a label that is not 0, 1 or
                None, or defect pixels on a normal image. Nothing is added then.
        """
        record = self.records.get(class_name, ClassRecords())
        who = name or f"{class_name} image number {len(record.scores)}"
        _check(score, label, who)
        masked = mask_HW is not None or bool(regions)
        if self.pixel and map_HW is not None and (label == 0 or (label == 1 and masked)):
            if label == 0 and _has_defect(mask_HW, regions):
                raise DataError(f"{who} is labelled normal but its mask has defect pixels")
            part = defect_type if regions else ""
            self._meter(class_name, part).update(map_HW, mask_HW, who, regions)
        self.records[class_name] = record
        if label is None:
            record.unlabelled += 1
            return
        record.without_mask += int(label == 1 and not masked)
        record.scores.append(float(score))
        record.labels.append(int(label))
        record.defects.append(defect_type)
        record.groups.append(group)

    def _meter(self, class_name: str, part: str) -> ScoreHistogram:
        parts = self.meters.setdefault(class_name, {})
        if part not in parts:
            parts[part] = ScoreHistogram(budget=self.budget)
        return parts[part]

    def merge(self, other: Evaluator) -> None:
        """Add everything another evaluator has seen; it stays as it is.

        Raises:
            DataError: the other one was made with other settings.
        """
        mine = (self.pixel, self.fpr_limits, self.budget.limit)
        theirs = (other.pixel, other.fpr_limits, other.budget.limit)
        if mine != theirs:
            raise DataError(f"cannot merge evaluators with different settings: {mine} and {theirs}")
        for class_name, record in other.records.items():
            self.records.setdefault(class_name, ClassRecords()).extend(record)
        for class_name, parts in other.meters.items():
            for part, meter in parts.items():
                self._meter(class_name, part).merge(meter)

    def compute(self) -> dict[str, object]:
        """Every metric of everything added so far; plain numbers, no nan, ready for JSON.

        Returns:
            ``classes``: class -> metric -> value; a metric that is undefined for a class is absent.
            ``mean``: metric -> mean over the classes where it is defined; ``mean_over``: how many those are.
            ``defects``: class -> defect type -> image AUROC against the class's normal images.
            ``defects_auspro_005``: the same with AU-sPRO over good images and that type (MVTec LOCO).
            ``images``: class -> number of labelled images.
            ``error_bound``: class -> most that any pixel metric can be off (0.0: exact).
            ``undefined``: sentences about what is missing or not certain, and why.
        """
        names = sorted(self.records)
        pixels = {name: self._pixels(name) for name in names}
        classes = {name: self._image(name) | self._pixel(pixels[name]) for name in names}
        return {
            "classes": classes,
            **_mean(classes),
            "defects": {n: d for n in names if (d := self.records[n].by_defect())},
            "defects_auspro_005": {n: d for n in names if (d := self._saturated_parts(n))},
            "images": {n: len(self.records[n].scores) for n in names},
            "error_bound": {n: s.error_bound for n in names if (s := pixels[n]) is not None},
            "undefined": self._undefined(classes, pixels),
        }

    def intervals(
        self, n: int = 1000, seed: int = 0, level: float = 0.95
    ) -> dict[str, dict[str, tuple[float, float]]]:
        """Bootstrap intervals of the image metrics: class -> metric -> (low, high), where defined."""
        out: dict[str, dict[str, tuple[float, float]]] = {}
        for name in sorted(self.records):
            scores, labels = self.records[name].arrays()
            if 0 < labels.sum() < len(labels):
                out[name] = {
                    metric: ranking.bootstrap_interval(scores, labels, function, n, seed, level)
                    for metric, function in IMAGE_FUNCTIONS.items()
                }
        return out

    def _image(self, class_name: str) -> Numbers:
        record = self.records[class_name]
        scores, labels = record.arrays()
        out = {metric: function(scores, labels) for metric, function in IMAGE_FUNCTIONS.items()}
        sample = record.by_sample()
        if sample is not None:
            out["sample_auroc"] = sample
        return {metric: value for metric, value in out.items() if not math.isnan(value)}

    def _summary(self, meters: Sequence[ScoreHistogram]) -> PixelSummary:
        totals = Totals(*(sum(column) for column in zip(*(m.totals for m in meters), strict=True)))
        limits = sorted({*self.fpr_limits, SPRO_LIMIT}, reverse=True)
        return summarise([m.tables for m in meters], totals, limits, any(m.rounded for m in meters))

    def _pixels(self, class_name: str) -> PixelSummary | None:
        """Summary of a class; None if no defect pixel was ever given."""
        meters = list(self.meters.get(class_name, {}).values())
        if not any(m.totals.positives for m in meters):
            return None
        return self._summary(meters)

    def _pixel(self, summary: PixelSummary | None) -> Numbers:
        if summary is None:
            return {}
        wanted = PIXEL_NAMES | {aupro_name(limit): f"aupro@{limit:g}" for limit in self.fpr_limits}
        wanted[SPRO_NAME] = f"auspro@{SPRO_LIMIT:g}"
        out = {name: summary.values[key] for name, key in wanted.items()}
        return {name: value for name, value in out.items() if not math.isnan(value)}

    def _saturated_parts(self, class_name: str) -> Numbers:
        parts = self.meters.get(class_name, {})
        good = [parts[""]] if "" in parts else []
        out = {}
        for part in sorted(p for p in parts if p and parts[p].totals.saturated):
            out[part] = self._summary([*good, parts[part]]).values[f"auspro@{SPRO_LIMIT:g}"]
        return {part: value for part, value in out.items() if not math.isnan(value)}

    def _undefined(self, classes: Mapping[str, Numbers], pixels: Mapping[str, PixelSummary | None]) -> list[str]:
        out = [s for name in sorted(classes) for s in self._class_notes(name, pixels[name])]
        if self.pixel and self.records and not any(pixels.values()):
            out = [s for s in out if "no pixel metrics" not in s]
            out.append("no defect masks with score maps were given: image metrics only")
        for name, count in _mean(classes)["mean_over"].items():
            if count < len(classes):
                out.append(f"mean of {name} is over the {count} of {len(classes)} classes where it is defined")
        return out

    def _class_notes(self, name: str, summary: PixelSummary | None) -> list[str]:
        record, out = self.records[name], []
        if not 0 < sum(record.labels) < len(record.labels):
            kind = "anomalous" if any(record.labels) else "normal"
            what = f"all {len(record.labels)} images are {kind}" if record.labels else "no labelled image"
            out.append(f"{name}: image metrics are undefined, {what}")
        if record.unlabelled:
            out.append(f"{name}: {record.unlabelled} images without label are left out")
        if not self.pixel:
            return out
        if summary is None:
            out.append(f"{name}: no pixel metrics, no anomalous image has both a score map and a mask")
        elif record.without_mask:
            out.append(f"{name}: pixel metrics leave out {record.without_mask} anomalous images without mask")
        if summary is not None and summary.error_bound > TOLERANCE:
            out.append(
                f"{name}: pixel metrics are certain only to {summary.error_bound:.1g}; "
                f"raise memory_limit above {self.budget.limit} bytes or evaluate fewer classes at once"
            )
        if summary is not None and summary.totals.positives == summary.totals.pixels:
            out.append(f"{name}: pixel metrics are undefined, every pixel is a defect")
        return out


def _check(score: float, label: int | None, who: str) -> None:
    if not math.isfinite(score):
        raise DataError(f"score of {who} is {score}; accepted: finite numbers")
    if label not in (0, 1, None):
        raise DataError(f"label of {who} is {label!r}; accepted: 0 (normal), 1 (anomaly), None (unknown)")


def _has_defect(mask_HW: ArrayLike | None, regions: Sequence[tuple[ArrayLike, float]] | None) -> bool:
    masks = [m for m, _ in regions or ()] + ([] if mask_HW is None else [mask_HW])
    return any(bool(np.any(mask)) for mask in masks)


def _mean(classes: Mapping[str, Numbers]) -> dict[str, dict[str, float]]:
    """Mean of every metric over the classes that have it, and how many have it."""
    columns: dict[str, list[float]] = {}
    for name in sorted(classes):
        for metric, value in classes[name].items():
            columns.setdefault(metric, []).append(value)
    return {
        "mean": {metric: math.fsum(values) / len(values) for metric, values in columns.items()},
        "mean_over": {metric: len(values) for metric, values in columns.items()},
    }
