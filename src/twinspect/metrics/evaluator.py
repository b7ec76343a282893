"""The accumulator behind every results table: images in, one dictionary of metrics out.

Image scores are kept, maps are not: each class has a ``ScoreHistogram``, and all of them share one memory limit.
Everything commutes: evaluators of parts of the images merge, in any order, with bit-identical results.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twinspect.errors import DataError, listed
from twinspect.metrics import ranking
from twinspect.metrics.pixels import MemoryBudget, PixelSummary, ScoreHistogram, summarise

MEMORY_LIMIT = 128 << 20  # bytes
TOLERANCE = 1e-4
_NO_PIXELS = "no pixel metrics, no anomalous image has both a score map and a mask"
Numbers = dict[str, float]


class _Image(NamedTuple):
    score: float
    label: int
    defect: str
    group: str
    masked: bool


@dataclass(slots=True)
class _Class:
    images: list[_Image] = field(default_factory=list)
    # Pixel counts of "" and, for images with saturated regions, of each defect type. A class is the sum of these, and
    # a type with the good images is LOCO's "logical" or "structural" result.
    meters: dict[str, ScoreHistogram] = field(default_factory=dict)

    def pixels(self) -> PixelSummary | None:
        """Summary of all pixels; None if no defect pixel was ever given."""
        meters = list(self.meters.values())
        return summarise(meters) if any(meter.totals.positives for meter in meters) else None

    def saturated_parts(self) -> Numbers:
        """AU-sPRO of every defect type with saturated regions, against the good images."""
        good = [meter for part, meter in self.meters.items() if not part]
        parts = sorted(part for part, meter in self.meters.items() if part and meter.totals.saturated)
        return _defined({part: summarise([*good, self.meters[part]]).values["auspro_005"] for part in parts})


class Evaluator:
    """Accumulates scores, maps and masks; computes every metric per class, their mean, and per defect type.

    Args:
        pixel: whether maps are counted; False ignores maps and masks.
        memory_limit: bytes for the pixel counts of all classes together.
    """

    def __init__(self, pixel: bool = True, memory_limit: int = MEMORY_LIMIT) -> None:
        self.pixel = pixel
        self.budget = MemoryBudget(memory_limit)
        self.classes: dict[str, _Class] = {}

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
            label: 1 anomaly, 0 normal.
            class_name: class whose metrics the image belongs to.
            defect_type: kind of defect of an anomalous image.
            map_HW: H x W finite scores. Without it the image adds to image metrics only.
            mask_HW: H x W, non-zero means defect. A normal image needs none; an anomalous one without mask
                and regions adds to image metrics only.
            regions: (mask H x W, saturation area in pixels) per annotated region (MVTec LOCO).
            name: image name for error messages.
            group: images of one physical sample (views) share it.

        Raises:
            DataError: a score or map that is not finite, a mask of another size, a label that is neither 0 nor 1,
                or defect pixels on a normal image. Nothing is added then.
        """
        of_class = self.classes.get(class_name, _Class())
        who = name or f"{class_name} image number {len(of_class.images)}"
        if score is None or not math.isfinite(score):
            raise DataError(f"score of {who} is {score}; accepted: finite numbers")
        if label not in (0, 1):
            raise DataError(f"label of {who} is {label!r}; accepted: 0 (normal), 1 (anomaly)")
        masks = [mask for mask, _ in regions or ()] + ([] if mask_HW is None else [mask_HW])
        if self.pixel and map_HW is not None and (label == 0 or masks):
            if label == 0 and any(bool(np.any(mask)) for mask in masks):
                raise DataError(f"{who} is labelled normal but its mask has defect pixels")
            self._meter(of_class, defect_type if regions else "").update(map_HW, mask_HW, who, regions)
        of_class.images.append(_Image(float(score), int(label), defect_type, group, bool(masks)))
        self.classes[class_name] = of_class

    def _meter(self, of_class: _Class, part: str) -> ScoreHistogram:
        if part not in of_class.meters:
            of_class.meters[part] = ScoreHistogram(self.budget)
        return of_class.meters[part]

    def merge(self, other: Evaluator) -> None:
        """Add everything another evaluator of the same settings has seen; it stays as it is."""
        mine, theirs = (self.pixel, self.budget.limit), (other.pixel, other.budget.limit)
        if mine != theirs:
            raise DataError(f"cannot merge evaluators with different settings: {mine} and {theirs}")
        for class_name, seen in other.classes.items():
            of_class = self.classes.setdefault(class_name, _Class())
            of_class.images.extend(seen.images)
            for part, meter in seen.meters.items():
                self._meter(of_class, part).merge(meter)

    def compute(self) -> dict[str, Any]:
        """Every metric of everything added so far; plain numbers, no nan, ready for JSON.

        Returns:
            ``classes``: class -> metric -> value; a metric that is undefined for a class is absent.
            ``mean``: metric -> mean over the classes where it is defined; ``mean_over``: how many those are.
            ``defects``: class -> defect type -> image AUROC against the class's normal images.
            ``defects_auspro_005``: the same with AU-sPRO over good images and that type (MVTec LOCO).
            ``images``: class -> number of images.
            ``error_bound``: class -> most that any pixel metric can be off (0.0: exact).
            ``undefined``: sentences about what is missing or not certain, and why.
        """
        names = sorted(self.classes)
        seen = {name: self.classes[name] for name in names}
        pixels = {name: of_class.pixels() for name, of_class in seen.items()}
        classes = {name: _image_metrics(of_class.images) for name, of_class in seen.items()}
        for name, summary in pixels.items():
            classes[name] |= _defined(summary.values) if summary is not None else {}
        mean_over = Counter(metric for values in classes.values() for metric in values)
        classes_of: dict[str, list[str]] = defaultdict(list)  # by a sentence that holds for each of them
        for name in names:
            for note in self._notes(name, pixels[name]):
                classes_of[note].append(name)
        if self.pixel and names and not any(pixels.values()):
            classes_of.pop(_NO_PIXELS, None)
            if any(image.label for of_class in seen.values() for image in of_class.images):
                classes_of["no mask marks the defects: metrics of images only, none of pixels"] = []
        notes = [f"{listed(of)}: {note}" if of else note for note, of in classes_of.items()]
        partial: dict[int, list[str]] = defaultdict(list)
        for metric, count in mean_over.items():
            partial[count].append(metric)
        notes += [
            f"mean of {', '.join(metrics)} is over the {count} of {len(names)} classes where it is defined"
            for count, metrics in partial.items()
            if count < len(names)
        ]
        return {
            "classes": classes,
            "mean": mean_of(classes),
            "mean_over": dict(mean_over),
            "defects": {name: kinds for name in names if (kinds := _by_defect(seen[name].images))},
            "defects_auspro_005": {name: kinds for name in names if (kinds := seen[name].saturated_parts())},
            "images": {name: len(of_class.images) for name, of_class in seen.items()},
            "error_bound": {name: s.error_bound for name, s in pixels.items() if s is not None},
            "undefined": notes,
        }

    def _notes(self, name: str, summary: PixelSummary | None) -> list[str]:
        images, notes = self.classes[name].images, []
        if len({image.label for image in images}) == 1:
            kind, lacking = ("defects", "good test images") if images[0].label else ("good", "defects")
            notes.append(f"no AUROC and the like, as all {len(images)} images are {kind}; they need {lacking}, too")
        if not self.pixel:
            return notes
        if summary is None:
            return [*notes, _NO_PIXELS]
        if without_mask := sum(image.label == 1 and not image.masked for image in images):
            notes.append(f"pixel metrics leave out {without_mask} anomalous images without mask")
        if summary.error_bound > TOLERANCE:
            notes.append(
                f"pixel metrics are certain only to {summary.error_bound:.1g}; "
                f"raise memory_limit above {self.budget.limit} bytes or evaluate fewer classes at once"
            )
        if summary.totals.positives == summary.totals.pixels:
            notes.append("pixel metrics are undefined, every pixel is a defect")
        return notes


def mean_of(rows: Mapping[str, Mapping[str, float]]) -> Numbers:
    """Mean of every metric over the rows (of classes, splits or students) that have it."""
    columns: dict[str, list[float]] = {}
    for values in rows.values():
        for metric, value in values.items():
            columns.setdefault(metric, []).append(value)
    return {metric: math.fsum(values) / len(values) for metric, values in columns.items()}


def _arrays(images: Sequence[_Image]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    return np.array([i.score for i in images], np.float64), np.array([i.label for i in images], np.int64)


def _image_metrics(images: Sequence[_Image]) -> Numbers:
    scores, labels = _arrays(images)
    values = {metric: function(scores, labels) for metric, function in ranking.IMAGE_METRICS.items()}
    samples: dict[str, list[int]] = {}
    for place, image in enumerate(images):
        samples.setdefault(image.group or f"\0{place}", []).append(place)
    if len(samples) < len(images):  # a sample scores as its highest view
        views = list(samples.values())
        values["sample_auroc"] = ranking.auroc([scores[v].max() for v in views], [labels[v].max() for v in views])
    return _defined(values)


def _by_defect(images: Sequence[_Image]) -> Numbers:
    """Image AUROC of each defect type against all normal images of the class."""
    kinds = sorted({image.defect for image in images if image.defect and image.label})
    parts = {kind: [image for image in images if not image.label or image.defect == kind] for kind in kinds}
    return _defined({kind: ranking.auroc(*_arrays(part)) for kind, part in parts.items()})


def _defined(values: Mapping[str, float]) -> Numbers:
    return {name: value for name, value in values.items() if not math.isnan(value)}
