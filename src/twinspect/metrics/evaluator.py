"""The accumulator behind every results table: images in, one dictionary of metrics out.

Image scores are kept (a few bytes per image), maps are not: each class has a ``ScoreHistogram``, and all of
them share one memory limit. Everything commutes: evaluators of parts of the images merge, in any order, with
bit-identical results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twinspect.errors import DataError
from twinspect.metrics import ranking
from twinspect.metrics.pages import MemoryBudget
from twinspect.metrics.pixels import PixelSummary, ScoreHistogram, summarise

MEMORY_LIMIT = 128 << 20  # bytes
TOLERANCE = 1e-4
Numbers = dict[str, float]


class _Image(NamedTuple):
    """What is kept of one image."""

    score: float
    label: int | None
    defect: str
    group: str
    masked: bool


Images = list[_Image]


class Evaluator:
    """Accumulates scores, maps and masks; computes every metric per class, their mean, and per defect type.

    Args:
        pixel: whether maps are counted; False ignores maps and masks.
        memory_limit: bytes for the pixel counts of all classes together.
    """

    def __init__(self, pixel: bool = True, memory_limit: int = MEMORY_LIMIT) -> None:
        self.pixel = pixel
        self.budget = MemoryBudget(memory_limit)
        self.images: dict[str, Images] = {}
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
        who = name or f"{class_name} image number {len(_labelled(self.images.get(class_name, [])))}"
        if not math.isfinite(score):
            raise DataError(f"score of {who} is {score}; accepted: finite numbers")
        if label not in (0, 1, None):
            raise DataError(f"label of {who} is {label!r}; accepted: 0 (normal), 1 (anomaly), None (unknown)")
        masks = [mask for mask, _ in regions or ()] + ([] if mask_HW is None else [mask_HW])
        if self.pixel and map_HW is not None and (label == 0 or (label == 1 and masks)):
            if label == 0 and any(bool(np.any(mask)) for mask in masks):
                raise DataError(f"{who} is labelled normal but its mask has defect pixels")
            part = defect_type if regions else ""
            self._meter(class_name, part).update(map_HW, mask_HW, who, regions)
        image = _Image(float(score), label, defect_type, group, bool(masks))
        self.images.setdefault(class_name, []).append(image)

    def _meter(self, class_name: str, part: str) -> ScoreHistogram:
        parts = self.meters.setdefault(class_name, {})
        if part not in parts:
            parts[part] = ScoreHistogram(self.budget)
        return parts[part]

    def merge(self, other: Evaluator) -> None:
        """Add everything another evaluator has seen; it stays as it is.

        Raises:
            DataError: the other one was made with other settings.
        """
        mine, theirs = (self.pixel, self.budget.limit), (other.pixel, other.budget.limit)
        if mine != theirs:
            raise DataError(f"cannot merge evaluators with different settings: {mine} and {theirs}")
        for class_name, images in other.images.items():
            self.images.setdefault(class_name, []).extend(images)
        for class_name, parts in other.meters.items():
            for part, meter in parts.items():
                self._meter(class_name, part).merge(meter)

    def compute(self) -> dict[str, Any]:
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
        names, labelled = sorted(self.images), {name: _labelled(images) for name, images in self.images.items()}
        pixels = {name: self._pixels(name) for name in names}
        classes = {name: _image_metrics(labelled[name]) for name in names}
        for name, summary in pixels.items():
            classes[name] |= _defined(summary.values) if summary is not None else {}
        return {
            "classes": classes,
            **_mean(classes),
            "defects": {n: d for n in names if (d := _by_defect(labelled[n]))},
            "defects_auspro_005": {n: d for n in names if (d := self._saturated_parts(n))},
            "images": {n: len(labelled[n]) for n in names},
            "error_bound": {n: s.error_bound for n in names if (s := pixels[n]) is not None},
            "undefined": self._undefined(classes, pixels),
        }

    def intervals(
        self, n: int = 1000, seed: int = 0, level: float = 0.95
    ) -> dict[str, dict[str, tuple[float, float]]]:
        """Bootstrap intervals of the image metrics: class -> metric -> (low, high), where defined."""
        out: dict[str, dict[str, tuple[float, float]]] = {}
        for name in sorted(self.images):
            scores, labels = _arrays(_labelled(self.images[name]))
            if 0 < labels.sum() < len(labels):
                out[name] = {
                    metric: ranking.bootstrap_interval(scores, labels, function, n, seed, level)
                    for metric, function in ranking.IMAGE_METRICS.items()
                }
        return out

    def _pixels(self, class_name: str) -> PixelSummary | None:
        """Summary of a class; None if no defect pixel was ever given."""
        meters = list(self.meters.get(class_name, {}).values())
        return summarise(meters) if any(m.totals.positives for m in meters) else None

    def _saturated_parts(self, class_name: str) -> Numbers:
        parts = self.meters.get(class_name, {})
        good = [parts[""]] if "" in parts else []
        saturated = sorted(part for part in parts if part and parts[part].totals.saturated)
        return _defined({part: summarise([*good, parts[part]]).values["auspro_005"] for part in saturated})

    def _undefined(self, classes: Mapping[str, Numbers], pixels: Mapping[str, PixelSummary | None]) -> list[str]:
        out = [s for name in sorted(classes) for s in self._class_notes(name, pixels[name])]
        if self.pixel and self.images and not any(pixels.values()):
            out = [s for s in out if "no pixel metrics" not in s]
            out.append("no defect masks with score maps were given: image metrics only")
        for name, count in _mean(classes)["mean_over"].items():
            if count < len(classes):
                out.append(f"mean of {name} is over the {count} of {len(classes)} classes where it is defined")
        return out

    def _class_notes(self, name: str, summary: PixelSummary | None) -> list[str]:
        images, out = _labelled(self.images[name]), []
        labels = {image.label for image in images}
        if not labels:
            out.append(f"{name}: image metrics are undefined, no labelled image")
        elif len(labels) == 1:
            kind, lacking = ("anomalous", "good test images") if 1 in labels else ("normal", "defects")
            out.append(
                f"{name}: image metrics are undefined, all {len(images)} images are {kind}; they need {lacking} too"
            )
        if unlabelled := len(self.images[name]) - len(images):
            out.append(f"{name}: {unlabelled} images without label are left out")
        if not self.pixel:
            return out
        if summary is None:
            return [*out, f"{name}: no pixel metrics, no anomalous image has both a score map and a mask"]
        if without_mask := sum(image.label == 1 and not image.masked for image in images):
            out.append(f"{name}: pixel metrics leave out {without_mask} anomalous images without mask")
        if summary.error_bound > TOLERANCE:
            out.append(
                f"{name}: pixel metrics are certain only to {summary.error_bound:.1g}; "
                f"raise memory_limit above {self.budget.limit} bytes or evaluate fewer classes at once"
            )
        if summary.totals.positives == summary.totals.pixels:
            out.append(f"{name}: pixel metrics are undefined, every pixel is a defect")
        return out


def _labelled(images: Images) -> Images:
    return [image for image in images if image.label is not None]


def _arrays(images: Images) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores and labels."""
    return np.array([i.score for i in images], np.float64), np.array([i.label for i in images], np.int64)


def _image_metrics(images: Images) -> Numbers:
    values = {metric: function(*_arrays(images)) for metric, function in ranking.IMAGE_METRICS.items()}
    return _defined(values | _by_sample(images))


def _by_defect(images: Images) -> Numbers:
    """Image AUROC of each defect type against all normal images of the class."""
    kinds = sorted({image.defect for image in images if image.defect and image.label})
    parts = {kind: [image for image in images if not image.label or image.defect == kind] for kind in kinds}
    return _defined({kind: ranking.auroc(*_arrays(part)) for kind, part in parts.items()})


def _by_sample(images: Images) -> Numbers:
    """AUROC over groups, a group scoring the maximum of its views; nothing if no group has two images."""
    groups: dict[str, Images] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.group or f"\0{i}", []).append(image)
    if len(groups) == len(images):
        return {}
    views = [_arrays(part) for part in groups.values()]
    return {"sample_auroc": ranking.auroc([s.max() for s, _ in views], [labels.max() for _, labels in views])}


def _defined(values: Mapping[str, float]) -> Numbers:
    return {name: value for name, value in values.items() if not math.isnan(value)}


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
