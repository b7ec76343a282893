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

from twinspect.bundle import refuse_unwritable
from twinspect.commands import results
from twinspect.commands.evaluate import AS_GIVEN, again_with, measure, sections
from twinspect.commands.options import DemoOptions
from twinspect.commands.results import Review
from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.data.protocols import INDUSTRIAL, Split
from twinspect.detector import Detector
from twinspect.errors import DataError
from twinspect.models.weights import DEFAULT_EMBEDDED
from twinspect.report import Report, Section, Table
from twinspect.types import TEST, TRAIN, Sample

PACKAGE, TEXTILE = "conformal_clip_data", "textile"
NOMINAL, LOCAL, GLOBAL = "nominal", "local", "global"
# Key in metrics.json -> what the score is called in the report.
SCORES = {
    "auroc": "both students (Noisy-OR)",
    "auroc_ed_only": "local student alone (ED)",
    "auroc_ee_only": "semantic student alone (EE)",
}
_WORDS = (
    "One model saw good textile images only. Local defects change a small spot, global ones the whole image. The "
    "local student (ED) rebuilds patches, the semantic student (EE) the whole image's meaning; their joint score is "
    "a Noisy-OR."
)


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How much the demo does."""

    train: int  # nominal images to learn from, those held out for calibration included
    test: int  # images of each kind to evaluate on
    steps: int
    budget_s: float  # seconds after which training stops, on machines slower than two cores


FULL = DemoSize(train=400, test=300, steps=TrainConfig().steps, budget_s=90.0)
QUICK = DemoSize(train=120, test=60, steps=40, budget_s=35.0)


def demo(options: DemoOptions, console: Console) -> None:
    """Train, evaluate, and write ``report.html``, ``metrics.json`` and ``demo.twin`` to a folder."""
    run_on(find_images(), options.out, QUICK if options.quick else FULL, console)


def run_on(root: Path, out: Path, size: DemoSize, console: Console) -> None:
    """`demo` on a folder with ``nominal``, ``local`` and ``global`` images, with a given size."""
    bundle, page, numbers = out / "demo.twin", out / "report.html", out / "metrics.json"
    refuse_unwritable(bundle)
    results.check_outputs([page], str(numbers), "--out")
    training, tested = split(root, size)
    console.say(
        f"learning from {len(training)} good textile images with teacher {DEFAULT_EMBEDDED}; "
        f"testing on {len(tested)} others (label 1 = anomaly, higher score = more anomalous)"
    )
    train = TrainConfig(steps=size.steps, time_budget_s=size.budget_s)
    detector = Detector(config=RunConfig(ModelConfig(teacher=DEFAULT_EMBEDDED), train))
    began = time.monotonic()
    detector.fit(training, progress=console.progress, quiet=True)
    train_s = round(time.monotonic() - began, 1)
    detector.save(bundle)
    predictor, whole = detector.predictor(), Split(AS_GIVEN, INDUSTRIAL, tuple(training), (), tuple(tested))
    measured = measure(predictor, whole, console)
    speed, metrics = round(len(measured.rows) / measured.seconds, 2), measured.values
    defects = (metrics["defects"], *metrics["student_defects"].values())
    means = (metrics["mean"], *metrics["students"].values())
    areas = {
        key: {**of_class[TEXTILE], "all": mean["image_auroc"]}
        for key, of_class, mean in zip(SCORES, defects, means, strict=True)
    }
    review, threshold = Review(measured.rows), detector.fitted.decision.threshold
    values = {
        **areas, "train_s": train_s, "predict_img_per_s": speed, **metrics,
        "other_thresholds": review.other_thresholds(), "record": detector.record_,
        "settings": detector.config.to_dict(),
    }  # fmt: skip
    rows = [{"score": SCORES[key], **row} for key, row in areas.items()]
    shown = Table.of("Image AUROC against unseen good images", rows, "1 is perfect, 0.5 is guessing.")
    words = (_WORDS, f"Threshold {threshold.value:.3f}: {threshold.sentence}.")
    images = detector.record_["images"]
    facts = {
        "Learned from": f"{images['train'] + images['calibration']} good images",
        "Tested on": f"{len(measured.rows)} images",
        "Teacher": DEFAULT_EMBEDDED,
        "Training": f"{train_s} s",
        "Prediction": f"{speed} images/s",
    }
    parts = [Section("Result", words, (shown,)), *sections(values, review, again_with(predictor, whole))]
    report = Report("twinspect demo: textile", parts, facts, values)
    for path in (page, numbers):
        report.write(path)
    console.say(*report.lines(), f"training took {train_s} s, prediction {speed} images/s")
    console.say(f"report: {page}\nnumbers: {numbers}\nmodel: {bundle}")


def find_images() -> Path:
    """Folder of the textile images inside the installed package, found without running its code."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            'the demo needs the images of the package conformal-clip-data; type: pip install "twinspect[demo]"'
        )
    return Path(spec.origin).parent / "data" / "textile_images" / "simulated"


def split(root: Path, size: DemoSize) -> tuple[list[Sample], list[Sample]]:
    """Seeded split: nominal images to learn from, and other nominal, local and global ones to test."""
    files = {kind: sorted((root / kind).glob("*.jpg")) for kind in (NOMINAL, LOCAL, GLOBAL)}
    if len(files[NOMINAL]) <= size.train or not files[LOCAL] or not files[GLOBAL]:
        raise DataError(f"{root} holds too few images; more than {size.train} nominal ones and defects are needed")
    rng = random.Random(0)
    for paths in files.values():
        rng.shuffle(paths)
    training = [Sample(path, TRAIN, TEXTILE) for path in files[NOMINAL][: size.train]]
    rest = {**files, NOMINAL: files[NOMINAL][size.train :]}
    test = [
        Sample(path, TEST, TEXTILE, int(kind != NOMINAL), "" if kind == NOMINAL else kind)
        for kind, paths in rest.items()
        for path in paths[: size.test]
    ]
    return training, test
