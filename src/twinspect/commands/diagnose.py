"""``twinspect diagnose``: cross-class interference, measured without any anomaly.

A model that learnt many classes must still object when one class shows up inside another: two images laid over
each other (Mixup), or a piece of one pasted into the other (CutPaste). A student that has learnt to reproduce
everything lets them pass. Both kinds of image are made here from good images of different classes, scored by any
predictor, and compared with good images of the class they were made from.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twinspect import data
from twinspect.commands import results
from twinspect.commands.options import DiagnoseOptions
from twinspect.console import Console
from twinspect.data.protocols import by_class
from twinspect.data.samples import read_sample_rgb
from twinspect.decide.decision import mixed_up
from twinspect.errors import DataError
from twinspect.inference import load
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result
from twinspect.metrics import Evaluator
from twinspect.report import Cases, Report, Section, Table, case_of
from twinspect.types import CALIBRATION, TEST, TRAIN, Progress, Sample

MIXUP, CUTPASTE = "mixup", "cutpaste"
KINDS = (MIXUP, CUTPASTE)
_WEIGHT = (0.3, 0.5)  # share of the other class in a Mixup image
_AREA, _ASPECT = (0.02, 0.15), (0.3, 3.3)  # of a pasted piece: share of the image, height over width
_VISIBLE, _DRAWS = 12.0, 20  # mean grey levels a paste must change, and how often another place is tried

# What is measured of every ordered pair of classes, and how a table of it is called.
_TITLES = {
    "mixup_auroc": "Mixup: image AUROC of two classes laid over each other, against good images of the row's class",
    "cutpaste_auroc": "CutPaste: image AUROC of a piece of the column's class pasted into the row's class",
    "pixel_auroc": "CutPaste: pixel AUROC of finding the pasted piece",
    "aupro": "CutPaste: AUPRO (to 0.3) of finding the pasted piece",
}
_TEXT = (
    "Normal images of different classes were laid over each other (Mixup) or pasted into each other (CutPaste). "
    "A model that knows its classes scores them as anomalous; one in which classes interfere lets them pass. "
    "0.5 is guessing, 1 is certain."
)
MEASURES = tuple(_TITLES)
_HARDEST = 5  # pictures of each kind in a report
_HIDDEN = 0.9  # AUROC below which a class is said to hide in another

Pixels = NDArray[np.uint8]  # H x W x 3
Mask = NDArray[np.bool_]  # H x W, true in a pasted piece


@dataclass(slots=True)
class Diagnosis:
    """What was measured."""

    classes: list[str]  # in the order of the matrices
    splits: dict[str, str]  # class -> split its normal images come from
    pairs: list[dict[str, Any]] = field(default_factory=list)  # of every ordered pair: base, other and `MEASURES`
    failed: list[str] = field(default_factory=list)  # normal images that could not be read
    taken: Counter[tuple[str, str]] = field(default_factory=Counter)  # (class, predicted class) of normal images
    passed: dict[str, list[Result]] = field(default_factory=lambda: {kind: [] for kind in KINDS})  # lowest scores

    def mean(self) -> dict[str, float]:
        """Mean of every measure over the pairs."""
        return {name: float(np.mean([pair[name] for pair in self.pairs])) for name in MEASURES}

    def values(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        taken = sorted(self.taken.items())
        return {
            "classes": self.classes, "mean": self.mean(), "pairs": self.pairs, "normal_images_from": self.splits,
            "failed": self.failed,
            "predicted_class": [{"class": c, "predicted": p, "images": count} for (c, p), count in taken],
        }  # fmt: skip


# ---------------------------------------------------------------------------------------------- images of two classes


def normal_images(samples: Sequence[Sample], options: DiagnoseOptions) -> dict[str, list[Sample]]:
    """Normal images of every class: of its test split, else of its calibration, else of its training images."""
    normal = by_class([s for s in samples if s.label in (0, None)])
    if len(normal) < 2:
        raise DataError(
            f"good images of {len(normal)} class found ({', '.join(normal) or 'none'}); a diagnosis of how classes "
            "interfere needs at least two. Give a data set with one folder per class"
        )
    chosen = {}
    for name, members in normal.items():
        if len(members) < 2:
            raise DataError(f"class {name} has {len(members)} normal image; at least 2 are needed")
        by_split = ([s for s in members if s.split == split] for split in (TEST, CALIBRATION, TRAIN))
        enough = next((of_split for of_split in by_split if len(of_split) >= 2), members)
        chosen[name] = enough[: max(options.normals, options.count)]
    return chosen


def mixup(base: Pixels, other: Pixels, rng: np.random.Generator) -> Pixels:
    """The other image laid over the base, which has the same size."""
    weight = float(rng.uniform(*_WEIGHT))
    mixed = (1 - weight) * base.astype(np.float32) + weight * other.astype(np.float32)
    return mixed.round().astype(np.uint8)


def cutpaste(base: Pixels, other: Pixels, rng: np.random.Generator) -> tuple[Pixels, Mask]:
    """A piece of the other image pasted into the base, which has the same size, and its mask.

    A piece of background on the same background changes nothing and could be found by nobody, so other places are
    tried until it is visible; after so many tries the most visible one is taken.
    """
    change = -1.0
    for _ in range(_DRAWS):
        place, cut = _places(base.shape[0], base.shape[1], rng)
        moved = float(np.abs(other[cut].astype(np.float32) - base[place]).mean())
        if moved > change:
            into, out_of, change = place, cut, moved
        if change >= _VISIBLE:
            break
    image, mask = base.copy(), np.zeros(base.shape[:2], bool)
    image[into], mask[into] = other[out_of], True
    return image, mask


def _places(rows: int, columns: int, rng: np.random.Generator) -> list[tuple[slice, slice]]:
    """Where a piece is pasted, and where it is cut."""
    area = rng.uniform(*_AREA) * rows * columns
    aspect = float(np.exp(rng.uniform(*np.log(_ASPECT))))
    height = int(np.clip(round((area * aspect) ** 0.5), 1, rows))
    width = int(np.clip(round((area / aspect) ** 0.5), 1, columns))
    tops, lefts = rng.integers(0, rows - height + 1, 2), rng.integers(0, columns - width + 1, 2)
    return [(slice(t, t + height), slice(n, n + width)) for t, n in zip(tops.tolist(), lefts.tolist(), strict=True)]


def composites(
    base: Sequence[Sample], other: Sequence[Sample], kind: str, count: int, seed: int
) -> Iterator[tuple[Sample, Pixels, Mask | None]]:
    """``count`` images of a kind from good images of two classes; the same for the same seed and files.

    Each comes after the sample that it is made from, whose size it has, and before the mask of a pasted piece.
    """
    words = "|".join((base[0].class_name, other[0].class_name, kind))
    rng = np.random.default_rng([seed, zlib.crc32(words.encode())])
    first, second = (rng.permutation(len(members)) for members in (base, other))
    for i in range(count):
        sample = base[first[i % len(base)]]
        below, above = read_sample_rgb(sample), read_sample_rgb(other[second[i % len(other)]])
        if above.shape != below.shape:
            size = (below.shape[1], below.shape[0])
            above = np.asarray(Image.fromarray(above).resize(size, Image.Resampling.BILINEAR))
        yield sample, *((mixup(below, above, rng), None) if kind == MIXUP else cutpaste(below, above, rng))


# -------------------------------------------------------------------------------------------------------- measurement


def interference(
    predictor: Predictor,
    samples: Sequence[Sample],
    options: DiagnoseOptions,
    progress: Progress,
    pictures: bool = False,
) -> Diagnosis:
    """Score cross-class images against normal ones, for every ordered pair of classes.

    With ``pictures`` the results that passed most easily keep theirs. Images that cannot be read are left out. A
    DataError for too few classes or images, or a score that is not finite.
    """
    chosen = normal_images(samples, options)
    diagnosis = Diagnosis(list(chosen), {name: members[0].split for name, members in chosen.items()})
    normal: dict[str, Evaluator] = {}
    for name, members in chosen.items():
        normal[name], chosen[name] = _of_normal_images(predictor, members, options.normals, diagnosis)
    for base, members in chosen.items():
        for other in (name for name in chosen if name != base):
            evaluator = Evaluator()
            evaluator.merge(normal[base])
            for kind in KINDS:
                made = list(composites(members, chosen[other], kind, options.count, options.seed))
                answers = predictor.predict([rgb for _, rgb, _ in made], maps=True, pixels=pictures)
                for (sample, _, mask), result in zip(made, answers, strict=True):
                    result.path = f"{other} in {base} ({kind}), {sample.name}"
                    if result.error:
                        raise DataError(f"{result.path}: {result.error}")
                    heat = None if mask is None else result.map
                    evaluator.update(result.score, 1, base, kind, heat, mask, name=result.path)
                    easiest = sorted([*diagnosis.passed[kind], result], key=lambda result: result.score)
                    diagnosis.passed[kind] = easiest[:_HARDEST]
            table = evaluator.compute()
            by_kind, pixels = table["defects"][base], table["classes"][base]
            values = (by_kind[MIXUP], by_kind[CUTPASTE], pixels["pixel_auroc"], pixels["aupro"])
            diagnosis.pairs.append({"base": base, "other": other, **dict(zip(MEASURES, values, strict=True))})
            progress("cross-class images", len(diagnosis.pairs), len(chosen) * (len(chosen) - 1))
    return diagnosis


def _of_normal_images(
    predictor: Predictor, members: Sequence[Sample], count: int, diagnosis: Diagnosis
) -> tuple[Evaluator, list[Sample]]:
    """What every pair of a class is compared with, the first ``count`` images; and those that can be read, of all."""
    name, evaluator, readable = members[0].class_name, Evaluator(), list[Sample]()
    results = predictor.predict(list(members), maps=True, pixels=False)
    for number, (sample, result) in enumerate(zip(members, results, strict=True)):
        if result.error:
            diagnosis.failed.append(result.error)
            continue
        readable.append(sample)
        if number >= count:
            continue
        if result.predicted_class in diagnosis.classes:  # a model may know them by other names
            diagnosis.taken[name, result.predicted_class] += 1
        evaluator.update(result.score, 0, name, map_HW=result.map, name=result.path)
    if not evaluator.classes:
        raise DataError(f"no normal image of class {name} can be scored: {diagnosis.failed[-1]}")
    return evaluator, readable


# ---------------------------------------------------------------------------------------------------- the command


def diagnose(options: DiagnoseOptions, console: Console) -> None:
    """Load, make images, score, say what was found, write the files asked for."""
    results.check_outputs(options.report, options.json_file)
    predictor = load(options.model)
    samples = data.load(options.data, options.layout, options.images).samples
    pictures = results.shows_pictures(options.report)
    diagnosis = interference(predictor, samples, options, console.progress, pictures)
    for failure in diagnosis.failed:
        console.warn(f"left out {failure}")
    sections = [Section("Which class hides which", (_TEXT, *sentences(diagnosis)), tuple(matrices(diagnosis)))]
    decision = predictor.decision
    if pictures:
        cases = [
            Cases(kind, tuple(case_of(result, kind) for result in passed), decision.map_scale)
            for kind, passed in diagnosis.passed.items()
        ]
        sections.append(Section("What passed most easily", (), tuple(cases)))
    values = {
        "bundle": options.model.name, "data": options.data.name, "model_id": decision.model_id,
        "seed": options.seed, "count": options.count, "normals": options.normals, **diagnosis.values(),
    }  # fmt: skip
    facts = {
        "model": f"{options.model.name} ({decision.model_id})",
        "data": options.data.name,
        "images per pair and kind": str(options.count),
        "normal images per class": f"up to {options.normals} of {', '.join(sorted(set(diagnosis.splits.values())))}",
        "seed": str(options.seed),
    }
    report = Report(f"How classes interfere in {options.model.name}", sections, facts, values)
    results.publish(report, options, console)


def matrices(diagnosis: Diagnosis) -> Iterator[Table]:
    """One table per measure: row = the class whose image it is, column = the class that intrudes."""
    for measure, title in _TITLES.items():
        rows = []
        for base in diagnosis.classes:
            values = {pair["other"]: float(pair[measure]) for pair in diagnosis.pairs if pair["base"] == base}
            shown = (values.get(other, "-") for other in diagnosis.classes)
            rows.append((base, *shown, sum(values.values()) / len(values)))
        yield Table(title, ("class", *diagnosis.classes, "mean"), tuple(rows))


def sentences(diagnosis: Diagnosis) -> Iterator[str]:
    """The means, which class hides which, and which classes are mixed up."""
    mean = diagnosis.mean()
    yield (
        f"mean over {len(diagnosis.pairs)} ordered pairs: Mixup AUROC {mean['mixup_auroc']:.3f}, CutPaste AUROC "
        f"{mean['cutpaste_auroc']:.3f}, pixel AUROC {mean['pixel_auroc']:.3f}, AUPRO {mean['aupro']:.3f}"
    )
    lowest = [(float(min(pair["mixup_auroc"], pair["cutpaste_auroc"])), pair) for pair in diagnosis.pairs]
    hardest = sorted(lowest, key=lambda row: row[0])[:3]
    for value, pair in hardest:
        if value < _HIDDEN:
            yield (
                f"{pair['other']} hides in {pair['base']}: Mixup AUROC {pair['mixup_auroc']:.3f}, CutPaste AUROC "
                f"{pair['cutpaste_auroc']:.3f}"
            )
    value, pair = hardest[0]
    if value >= _HIDDEN:
        yield f"no class hides in another: the lowest value is {value:.3f}, {pair['other']} in {pair['base']}"
    if mixed := mixed_up(diagnosis.taken):
        yield mixed
