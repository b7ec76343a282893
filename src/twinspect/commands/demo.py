"""The demo: learn from good textile images only, then find local and global defects with one model.

Images: the MIT-licensed package ``conformal-clip-data`` (only its files are used, none of its code). The
settings are the library's defaults; only the number of images and the time for training are limited here.
"""

from __future__ import annotations

import importlib.util
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.bundle import refuse_unwritable
from twinspect.commands.options import DemoOptions
from twinspect.commands.results import check_outputs, say_tables, write_json
from twinspect.commands.review import Review
from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.detector import Detector
from twinspect.errors import DataError
from twinspect.evaluation import Evaluation, evaluate
from twinspect.metrics import auroc, bootstrap_interval
from twinspect.models.weights import DEFAULT_EMBEDDED
from twinspect.report import Section, Table, write_report
from twinspect.types import TEST, TRAIN, Sample

PACKAGE = "conformal_clip_data"
NOMINAL, LOCAL, GLOBAL, ALL = "nominal", "local", "global", "all"
SCORES = {
    "score": "both students (Noisy-OR)",
    "score_local": "local student alone (ED)",
    "score_semantic": "semantic student alone (EE)",
}
SEED = 0


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How much the demo does.

    Attributes:
        train: nominal images to learn from, those held out for calibration included.
        test: images of each kind to evaluate on.
        steps: optimiser steps.
        budget_s: seconds after which training stops, on machines slower than two cores.
    """

    train: int
    test: int
    steps: int
    budget_s: float


FULL = DemoSize(train=400, test=300, steps=TrainConfig().steps, budget_s=90.0)
QUICK = DemoSize(train=120, test=60, steps=40, budget_s=35.0)


def demo(options: DemoOptions, console: Console) -> None:
    """Train, evaluate, and write ``report.html``, ``metrics.json`` and ``demo.twin`` to a folder.

    Raises:
        DataError: the package of images is not installed.
    """
    run_on(find_images(), options.out, QUICK if options.quick else FULL, console)


def run_on(root: Path, out: Path, size: DemoSize, console: Console) -> None:
    """`demo` on a folder with ``nominal``, ``local`` and ``global`` images, with a given size."""
    bundle, page, numbers = out / "demo.twin", out / "report.html", out / "metrics.json"
    refuse_unwritable(bundle)
    check_outputs([page], str(numbers), "--out")
    training, test = split(root, size)
    console.say(
        f"learning from {len(training)} good textile images with teacher {DEFAULT_EMBEDDED}; "
        f"testing on {len(test)} others (label 1 = anomaly, higher score = more anomalous)"
    )
    train = TrainConfig(steps=size.steps, seed=SEED, time_budget_s=size.budget_s)
    detector = Detector(config=RunConfig(ModelConfig(teacher=DEFAULT_EMBEDDED), train))
    began = time.monotonic()
    detector.fit(training, progress=console.progress)
    fit_s = time.monotonic() - began
    detector.save(bundle)
    measured = evaluate(detector.predictor(), test, console.progress)
    review = Review()
    for row in measured.rows:
        review.add(row)
    metrics = measure(detector, measured, fit_s)
    write_json(numbers, metrics)
    result, made = sections(metrics)
    shown, images = [result, *review.sections(detector.predictor().predict), made], metrics["images"]
    facts = {
        "Learned from": f"{images['train']} good images, {images['calibration']} more set the threshold",
        "Tested on": ", ".join(f"{count} {kind}" for kind, count in images["test"].items()),
        "Teacher": metrics["teacher"]["name"],
        "Training": f"{metrics['train_s']} s",
        "Prediction": f"{metrics['predict_img_per_s']} images/s",
    }
    write_report(page, "twinspect demo: textile", shown, facts)
    say_tables((part for part in result.parts if isinstance(part, Table)), console)
    console.say(f"training took {metrics['train_s']} s, prediction {metrics['predict_img_per_s']} images/s")
    console.say(f"report: {page}\nnumbers: {numbers}\nmodel: {bundle}")


def find_images() -> Path:
    """Folder of the textile images inside the installed package, found without running its code.

    Raises:
        DataError: not installed, or without its images.
    """
    spec = importlib.util.find_spec(PACKAGE)
    root = Path(spec.origin).parent / "data" / "textile_images" / "simulated" if spec and spec.origin else None
    if root is None or not all((root / kind).is_dir() for kind in (NOMINAL, LOCAL, GLOBAL)):
        raise DataError(
            'the demo needs the images of the package conformal-clip-data; type: pip install "twinspect[demo]"'
        )
    return root


def split(root: Path, size: DemoSize) -> tuple[list[Sample], list[Sample]]:
    """Seeded split: nominal images to learn from, and other nominal, local and global ones to test.

    Raises:
        DataError: fewer nominal images than ``size.train`` and one to test.
    """
    files = {kind: sorted((root / kind).glob("*.jpg")) for kind in (NOMINAL, LOCAL, GLOBAL)}
    if len(files[NOMINAL]) <= size.train or not files[LOCAL] or not files[GLOBAL]:
        raise DataError(f"{root} holds too few images; more than {size.train} nominal ones and defects are needed")
    rng = random.Random(SEED)
    for paths in files.values():
        rng.shuffle(paths)
    training = [Sample(path, TRAIN, "textile") for path in files[NOMINAL][: size.train]]
    rest = {**files, NOMINAL: files[NOMINAL][size.train :]}
    test = [
        Sample(path, TEST, "textile", int(kind != NOMINAL), "" if kind == NOMINAL else kind)
        for kind, paths in rest.items()
        for path in paths[: size.test]
    ]
    return training, test


def kind_of(sample: Sample) -> str:
    """Nominal, local or global."""
    return sample.defect_type or NOMINAL


def against_nominal(measured: Evaluation, score: str, kind: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores and labels of the nominal images and of the defects of one kind (or all)."""
    rows = [row for row in measured.rows if kind == ALL or row["defect_type"] in ("", kind)]
    return np.array([row[score] for row in rows]), np.array([row["label"] for row in rows])


def measure(detector: Detector, measured: Evaluation, fit_s: float) -> dict[str, Any]:
    """Everything that goes to ``metrics.json``; ``train_s`` is all of fit: features, steps, statistics."""
    kinds, record, threshold = (LOCAL, GLOBAL, ALL), detector.record_, detector.fitted.decision.threshold
    both, local, semantic = (
        {kind: round(auroc(*against_nominal(measured, score, kind)), 4) for kind in kinds} for score in SCORES
    )
    # How much of a number is luck of the test images.
    spans = {k: bootstrap_interval(*against_nominal(measured, "score", k), auroc, n=300) for k in kinds}
    scores = {
        kind: np.array([row["score"] for row in measured.rows if (row["defect_type"] or NOMINAL) == kind])
        for kind in (NOMINAL, LOCAL, GLOBAL)
    }
    return {
        "auroc": both,
        "auroc_ed_only": local,
        "auroc_ee_only": semantic,
        "train_s": round(fit_s, 1),
        "predict_img_per_s": round(len(measured.rows) / measured.seconds, 2),
        "auroc_interval_95": {kind: [round(low, 4), round(high, 4)] for kind, (low, high) in spans.items()},
        "called_anomalous": {kind: round(float((one >= threshold.value).mean()), 4) for kind, one in scores.items()},
        "threshold": {"value": threshold.value, "promise": threshold.sentence},
        "images": {**record["images"], "test": {kind: len(one) for kind, one in scores.items()}},
        "failed": measured.failed,
        "training": record["training"],
        "seed": SEED,
        "teacher": record["teacher"],
        "size": record["size"],
        "settings": detector.config.to_dict(),
    }


def sections(metrics: dict[str, Any]) -> tuple[Section, Section]:
    """What was measured, and how it was made."""
    kinds = (LOCAL, GLOBAL, ALL)
    words = (
        "One model saw good textile images only. Local defects change a small spot, global ones the whole "
        "image. The local student (ED) rebuilds patches, the semantic student (EE) the whole image's meaning; "
        "their joint score is a Noisy-OR.",
        f"Threshold {metrics['threshold']['value']:.3f}: {metrics['threshold']['promise']}.",
    )
    keys = ("auroc", "auroc_ed_only", "auroc_ee_only")
    rows = [(name, *(metrics[key][k] for k in kinds)) for name, key in zip(SCORES.values(), keys, strict=True)]
    spans = ("95 % interval of both", *("{:.4f} to {:.4f}".format(*metrics["auroc_interval_95"][k]) for k in kinds))
    note = "1 is perfect, 0.5 is guessing. The interval is a bootstrap over the test images."
    areas = Table("Image AUROC against unseen good images", ("score", *kinds), (*rows, spans), note)
    counts, called = metrics["images"]["test"], metrics["called_anomalous"]
    calls = tuple((kind, counts[kind], f"{called[kind]:.1%}") for kind in counts)
    decisions = Table("Called anomalous at the threshold", ("kind", "images", "called anomalous"), calls)
    settings = {**metrics["settings"]["model"], **metrics["settings"]["train"], "size": metrics["size"]}
    made = [
        ("teacher weights", f"{metrics['teacher']['weights']}, hash {metrics['teacher']['hash']}"),
        ("steps taken", f"{metrics['training']['steps']} ({metrics['training']['stopped']})"),
        *((name, str(value)) for name, value in settings.items() if value != ""),
    ]
    table = Table("Settings", ("setting", "value"), tuple(made))
    return Section("Result", words, (areas, decisions)), Section("How it was made", (), (table,))
