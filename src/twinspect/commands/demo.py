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
from twinspect.charts import Histogram, LineChart, Series
from twinspect.commands.results import check_outputs, text_table, write_json
from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.detector import Detector
from twinspect.errors import DataError
from twinspect.evaluation import Evaluation, evaluate
from twinspect.inference.result import Result
from twinspect.metrics import auroc, bootstrap_interval, roc_curve
from twinspect.models.weights import DEFAULT_EMBEDDED
from twinspect.report import Gallery, Section, Table, write_report
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


def run_demo(out: Path, quick: bool, console: Console) -> None:
    """Train, evaluate, and write ``report.html``, ``metrics.json`` and ``demo.twin`` to a folder.

    Raises:
        DataError: the package of images is not installed.
    """
    run_on(find_images(), out, QUICK if quick else FULL, console)


def run_on(root: Path, out: Path, size: DemoSize, console: Console) -> None:
    """`run_demo` on a folder with ``nominal``, ``local`` and ``global`` images, with a given size."""
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
    gallery = Gallery()

    def visit(sample: Sample, result: Result) -> None:
        gallery.add(result, kind_of(sample), sample.label == 1)

    measured = evaluate(detector.predictor(), test, console.progress, visit)
    metrics = measure(detector, measured, fit_s)
    write_json(numbers, metrics)
    write_report(page, "twinspect demo: textile", sections(metrics, measured, detector, gallery), facts(metrics))
    for table in (_auroc_table(metrics), _decision_table(metrics)):
        for line in text_table(table):
            console.say(line)
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


def column(measured: Evaluation, score: str, kind: str) -> NDArray[np.float64]:
    """Scores of the test images of one kind."""
    return np.array([row[score] for row in measured.rows if (row["defect_type"] or NOMINAL) == kind])


def against_nominal(measured: Evaluation, score: str, kind: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores and labels of the nominal images and of the defects of one kind (or all)."""
    good = column(measured, score, NOMINAL)
    bad = np.concatenate([column(measured, score, k) for k in ((LOCAL, GLOBAL) if kind == ALL else (kind,))])
    return np.concatenate([good, bad]), np.repeat([0, 1], [len(good), len(bad)])


def measure(detector: Detector, measured: Evaluation, fit_s: float) -> dict[str, Any]:
    """Everything that goes to ``metrics.json``; ``train_s`` is all of fit: features, steps, statistics."""
    tables = {
        score: {kind: round(auroc(*against_nominal(measured, score, kind)), 4) for kind in (LOCAL, GLOBAL, ALL)}
        for score in SCORES
    }
    record, threshold = detector.record_, detector.fitted.decision.threshold
    scores = {kind: column(measured, "score", kind) for kind in (NOMINAL, LOCAL, GLOBAL)}
    return {
        "auroc": tables["score"],
        "auroc_ed_only": tables["score_local"],
        "auroc_ee_only": tables["score_semantic"],
        "train_s": round(fit_s, 1),
        "predict_img_per_s": round(len(measured.rows) / measured.seconds, 2),
        "auroc_interval_95": {kind: interval(measured, kind) for kind in (LOCAL, GLOBAL, ALL)},
        "called_anomalous": {
            kind: round(float((values >= threshold.value).mean()), 4) for kind, values in scores.items()
        },
        "threshold": {"value": threshold.value, "promise": threshold.sentence},
        "images": {
            **record["images"],
            "test": {kind: len(values) for kind, values in scores.items()},
        },
        "failed": measured.failed,
        "training": record["training"],
        "seed": SEED,
        "teacher": record["teacher"],
        "size": record["size"],
        "settings": detector.config.to_dict(),
    }


def interval(measured: Evaluation, kind: str) -> list[float]:
    """95 % bootstrap interval of the joint AUROC: how much of a number is luck of the test images."""
    low, high = bootstrap_interval(*against_nominal(measured, "score", kind), auroc, n=300)
    return [round(low, 4), round(high, 4)]


def sections(metrics: dict[str, Any], measured: Evaluation, detector: Detector, gallery: Gallery) -> list[Section]:
    """The report: what was measured, how scores fall, the hardest and clearest images, how it was made."""
    scale = detector.fitted.decision.map_scale
    return [
        Section("Result", _result_words(metrics), (_auroc_table(metrics), _decision_table(metrics))),
        Section("ROC curves", (), _roc_charts(measured)),
        Section(
            "Scores by kind",
            ("A higher score is more anomalous. Every row has its own height; the axis is common.",),
            _histograms(measured, detector.fitted.decision.threshold.value),
        ),
        Section(
            "Hardest images",
            ("Of each kind, the images whose score speaks most against the truth: what this model gets wrong.",),
            gallery.cases(hardest=True, scale=scale),
        ),
        Section("Clearest images", (), gallery.cases(hardest=False, scale=scale)),
        Section("How it was made", (), (_settings_table(metrics),)),
    ]


def facts(metrics: dict[str, Any]) -> dict[str, str]:
    """Short statements for the head of the report."""
    images = metrics["images"]
    return {
        "Learned from": f"{images['train']} good images, {images['calibration']} more set the threshold",
        "Tested on": ", ".join(f"{count} {kind}" for kind, count in images["test"].items()),
        "Teacher": metrics["teacher"]["name"],
        "Training": f"{metrics['train_s']} s",
        "Prediction": f"{metrics['predict_img_per_s']} images/s",
    }


def _result_words(metrics: dict[str, Any]) -> tuple[str, ...]:
    return (
        "One model saw good textile images only. Local defects change a small spot, global ones the whole "
        "image. The local student (ED) rebuilds patches, the semantic student (EE) the whole image's meaning; "
        "their joint score is a Noisy-OR.",
        f"Threshold {metrics['threshold']['value']:.3f}: {metrics['threshold']['promise']}.",
    )


def _auroc_table(metrics: dict[str, Any]) -> Table:
    kinds = (LOCAL, GLOBAL, ALL)
    keys = ("auroc", "auroc_ed_only", "auroc_ee_only")
    rows = [(name, *(metrics[key][k] for k in kinds)) for name, key in zip(SCORES.values(), keys, strict=True)]
    spans = (f"{low:.4f} to {high:.4f}" for low, high in (metrics["auroc_interval_95"][k] for k in kinds))
    note = "1 is perfect, 0.5 is guessing. The interval is a bootstrap over the test images."
    title = "Image AUROC against unseen good images"
    return Table(title, ("score", *kinds), (*rows, ("95 % interval of both", *spans)), note)


def _decision_table(metrics: dict[str, Any]) -> Table:
    counts, called = metrics["images"]["test"], metrics["called_anomalous"]
    rows = tuple((kind, counts[kind], f"{called[kind]:.1%}") for kind in counts)
    return Table("Called anomalous at the threshold", ("kind", "images", "called anomalous"), rows)


def _roc_charts(measured: Evaluation) -> tuple[LineChart, ...]:
    def chart(title: str, lines: list[tuple[str, str, str]]) -> LineChart:
        curves = ((name, roc_curve(*against_nominal(measured, score, kind))) for name, score, kind in lines)
        series = tuple(Series(name, fpr, tpr) for name, (fpr, tpr, _) in curves)
        return LineChart(title, "false positive rate", "true positive rate", series)

    joint = chart("Joint score, by kind of defect", [(kind, "score", kind) for kind in (LOCAL, GLOBAL, ALL)])
    names = {"score": "both", "score_local": "local student", "score_semantic": "semantic student"}
    return joint, chart("All defects, by student", [(name, score, ALL) for score, name in names.items()])


def _histograms(measured: Evaluation, threshold: float) -> tuple[Histogram, ...]:
    return tuple(
        Histogram(
            name[:1].upper() + name[1:],
            "score",
            {kind: column(measured, score, kind) for kind in (NOMINAL, LOCAL, GLOBAL)},
            threshold if score == "score" else None,
        )
        for score, name in SCORES.items()
    )


def _settings_table(metrics: dict[str, Any]) -> Table:
    settings = {**metrics["settings"]["model"], **metrics["settings"]["train"], "size": metrics["size"]}
    training = metrics["training"]
    rows = [
        ("teacher weights", f"{metrics['teacher']['weights']}, hash {metrics['teacher']['hash']}"),
        ("steps taken", f"{training['steps']} ({training['stopped']})"),
        *((name, str(value)) for name, value in settings.items() if value != ""),
    ]
    return Table("Settings", ("setting", "value"), tuple(rows))
