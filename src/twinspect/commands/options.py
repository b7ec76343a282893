"""What commands may be told: a dataclass a command, whose docstring is its help; a field an option.

`cli` makes the command line of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twinspect.config import RULES, SEEDS, Range, argument, option

_BUNDLE = "Trained model (.twin)."


@dataclass(frozen=True, kw_only=True)
class ReadsData:
    """Options of commands that read a data set."""

    layout: str = option("Layout of the data; auto detects it.", "auto")
    images: Path | None = option("Folder that the paths of a manifest are relative to.", None)


@dataclass(frozen=True, kw_only=True)
class Reports:
    """Options of commands that publish a `report.Report`."""

    report: tuple[Path, ...] = option("Report file: .html (with charts and pictures), .md or .json.", ())
    json_file: str = option("Write values as JSON to a file, or - to print.", "", "--json")


@dataclass(frozen=True, kw_only=True)
class BuildsModel:
    """Options of commands that need the teacher of a model."""

    weights: str = option("Local weights file of the teacher.", "")


@dataclass(frozen=True)
class CalibrateOptions(ReadsData, Reports, BuildsModel):
    """Set thresholds with a stated false-alarm rate per class from good images; the model is not retrained."""

    bundle: Path = argument(_BUNDLE)
    good: Path | None = argument("Good images that the model has not seen; without them only rates change.", None)
    max_fpr: float | None = option("Share of good images that may be called bad; without: as set before.", None)
    class_name: str = option("Class of all images given; only its thresholds change.", "", "--class")
    group: str = option("session: keep the rate in every session; none: over all.", "", accepts=("session", "none"))
    add: bool = option("Add to the calibration images instead of replacing.", False, "--add")
    unsure: tuple[float, float] | None = option("Two rates of good images: called bad; called bad or unsure.", None)
    region_fpr: float | None = option("Share of good images that may show a region; without: as --max-fpr.", None)
    labels: Path | None = option("Labelled images (CSV: image, label) to choose by.", None)
    rule: str = option("How labels choose: f1-max, min-cost or zero-miss.", "", accepts=RULES)
    miss_cost: float | None = option("For --rule min-cost: cost of a missed defect; a false alarm costs 1.", None)
    from_log: str = option("Inspection log of twinspect serve: file or URL.", "")
    since: str = option("With --from-log: decisions since a date or time.", "")
    out: Path | None = option("Bundle to write; by default BUNDLE itself.", None)
    force: bool = option("Replace a model without keeping the old one as FILE.bak.", False, "--force")


@dataclass(frozen=True)
class DriftOptions(Reports):
    """Say whether predictions still look like the calibration images, and if not, what changed."""

    bundle: Path = argument(_BUNDLE)
    tables: tuple[Path, ...] = argument("Tables of twinspect predict, oldest first.")
    false_alarm_rate: float = option("Chance of any alarm, ever, if nothing changes.", 0.01)


@dataclass(frozen=True)
class ReproduceOptions(BuildsModel):
    """Train and evaluate a benchmark's protocol in one go, ours beside the published numbers."""

    recipe: str = argument("Name of a recipe; without one they are listed.", "")
    root: Path | None = option("Folder of the data set.", None)
    out: Path | None = option("Folder for results; without: reproduce-out/RECIPE.", None)
    teacher: str = option("Instead of the recipe's teacher.", "")
    seed: int = option("Seed of weights, order, noise and splits.", 0, accepts=SEEDS)
    limit_steps: int = option("Train so many steps at most; 0: the recipe's.", 0)
    size: int = option("Input side in pixels; 0: the recipe's.", 0)
    drop_leaks: bool = option("Do not train on copies of test images.", False, "--drop-leaks")


@dataclass(frozen=True)
class ExportCommandOptions(BuildsModel):
    """Write the model as one graph for another runtime, after it agreed with torch on images."""

    bundle: Path = argument(_BUNDLE)
    out: Path = option("File to write: .onnx or .xml (OpenVINO).")
    images: Path | None = option("Images, 32 or more, to prove it on: a file, folder or quoted glob.", None)


@dataclass(frozen=True)
class CheckOptions(BuildsModel):
    """Compare an exported model with its bundle on images of your own; exit code 2 where they differ."""

    export: Path = argument("Exported model (.onnx or .xml).")
    bundle: Path = argument(_BUNDLE)
    images: Path = argument("Images, 32 or more: a file, folder or quoted glob.")


@dataclass(frozen=True)
class BenchOptions(BuildsModel):
    """Measure images per second, latency and memory; the last line is JSON."""

    model: Path = argument("Bundle (.twin) or exported model.")
    batch: str = option("Images per call, separated by commas.", "1,16")
    threads: int = option("CPU threads of the runtime; 0 is its own choice.", 0)
    images: Path | None = option("Images to decode; without it painted JPEGs.", None)
    seconds: float = option("Spent on each batch size.", 10.0, accepts=Range(0.001, 86_400))


@dataclass(frozen=True)
class DiagnoseOptions(ReadsData, Reports, BuildsModel):
    """Measure how classes interfere, without any anomaly: is one class noticed inside another?"""

    bundle: Path = argument("Trained model (.twin), or an exported one.")
    data: Path = argument("Folder of a data set with normal images of two classes or more.")
    count: int = option("Images of each kind per ordered pair of classes.", 8, accepts=Range(1, 10_000))
    normals: int = option("Normal images of each class to compare with.", 40, accepts=Range(2, 1_000_000))
    classes: str = option("Only these classes, separated by commas.", "")
    seed: int = option("Seed of everything drawn.", 0, accepts=SEEDS)


@dataclass(frozen=True)
class CompareOptions(ReadsData, Reports):
    """Score the same labelled images with two models: accuracy, decisions that differ, speed and size."""

    first: Path = argument("A model: bundle (.twin) or exported.")
    second: Path = argument("Another, which is compared with the first.")
    data: Path = argument("Labelled data set; its test images are scored by both.")
    split: str = option("A protocol's split, such as one-vs-rest/cat.", "")
    draws: int = option("Bootstrap draws of the test images.", 1000, accepts=Range(1, 100_000))
    seed: int = option("Seed of the draws and splits.", 0, accepts=SEEDS)
    device: str = option("Of bundles: auto, cpu, cuda or cuda:1.", "auto")


@dataclass(frozen=True)
class InspectOptions(ReadsData):
    """Say what is there: layout, classes, counts, masks, what is skipped and why."""

    path: Path = argument("Folder or manifest of a data set.")
    protocol: str = option("Also list the splits of a protocol; all lists those of every protocol.", "")
    leaks: bool = option("Look for byte-equal training and test images.", False, "--leaks")
    seed: int = option("Seed of the splits.", 0, accepts=SEEDS)
    as_json: bool = option("Print everything as JSON.", False, "--json")


@dataclass(frozen=True)
class ManifestOptions(ReadsData):
    """Write one row per image: image, split, class_name, label, defect_type, mask, group, record."""

    path: Path = argument("Folder or manifest of a data set.")
    out: Path = option("Manifest to write: .parquet or .csv.")


@dataclass(frozen=True)
class EvalOptions(ReadsData, BuildsModel):
    """Measure a model on labelled test images: defects found, false alarms and AUROC by class."""

    bundle: Path = argument(_BUNDLE)
    data: Path = argument("Data set with labelled test images: good ones and defects.")
    report: tuple[Path, ...] = option("Report: .html (with the wrong images), .md or .json.", (), "--report --out")
    json_file: str = option("Write metrics as JSON to a file, or - to print.", "", "--json")
    split: str = option("A protocol's split, such as one-vs-rest/cat.", "")
    intervals: bool = option("Add 95 % bootstrap intervals.", False, "--intervals")
    drop_leaks: bool = option("Leave out test images seen in training.", False, "--drop-leaks")


@dataclass(frozen=True)
class SignOptions:
    """Sign a model, so that `serve --require-signature` takes it; or verify it with --check."""

    model: Path = argument("Trained or exported model (.twin, .onnx, .xml).")
    key: Path | None = option("Private key to sign with (PEM, Ed25519).", None)
    check: Path | None = option("Public key to verify with, instead of signing.", None)


@dataclass(frozen=True)
class UpdateOptions(ReadsData, BuildsModel):
    """Learn new good images, after false alarms or of a new class, without the old ones."""

    bundle: Path = argument(_BUNDLE)
    new: Path | None = argument("New good images: a folder in any layout.", None)
    class_name: str = option("Class of all of them, known or new.", "", "--class")
    listed: bool = option("Say what was learnt since training.", False, "--list")
    undo: bool = option("Take the last update back.", False, "--undo")
    out: Path | None = option("Bundle to write; by default BUNDLE itself.", None)


@dataclass(frozen=True)
class FitOptions(ReadsData):
    """Learn from good images what is usual, and write one model file (a bundle)."""

    data: Path = argument("Folder of a data set, or a plain folder of good images.")
    out: Path = option("Bundle to write.", Path("model.twin"))
    effort: str = option("instant: statistics only, no students; fast: half the input side, fewer steps.", "default")
    config: Path | None = option("TOML file of settings; options given here win.", None)
    resume_from: Path | None = option("Bundle to go on from; DATA holds all classes.", None)
    roi: Path | None = option("Region of interest: mask image (white inside) or LabelMe polygons.", None)
    forget: bool = option("With --resume-from: drop classes that DATA lacks.", False, "--forget")
    split: str = option("Learn a protocol's split only, such as one-vs-rest/cat.", "")
    work: Path | None = option("Folder for checkpoint and log.", None)
    thin: bool = option("Leave the teacher's weights out of the bundle.", False, "--thin")
    force: bool = option("Replace a model without keeping the old one as FILE.bak.", False, "--force")


@dataclass(frozen=True)
class DoctorOptions:
    """Say what this machine has: versions, device, teachers and their weights."""


@dataclass(frozen=True)
class DemoOptions:
    """Train on good textile images, find local and global defects, write a report."""

    out: Path = option("Folder for report.html, metrics.json and the model.", Path("demo-out"))
    quick: bool = option("A smaller run of about a minute.", False, "--quick")


@dataclass(frozen=True)
class FetchOptions:
    """Download a teacher's weights, verify them, and record their commit and sha256."""

    name: str = argument("Short name of a teacher, such as dinov2-base, or a timm name.")
    revision: str = option("Commit or branch of the hub repository; empty takes main.", "")
    sha256: str = option("Refuse any other file; empty takes the hub's word.", "")


@dataclass(frozen=True)
class InfoOptions:
    """Say what a model holds: teacher, classes, training, threshold and its promise."""

    bundle: Path = argument(_BUNDLE)
    as_json: bool = option("Print everything as JSON.", False, "--json")
    as_card: bool = option("Print a model card in Markdown.", False, "--card")


@dataclass(frozen=True)
class ServeOptions:
    """Answer images over HTTP, with a page at /, an inspection log and metrics."""

    bundles: tuple[str, ...] = argument("Bundles or exported models: FILE or NAME=FILE.")
    api_key_file: Path | None = option("File with the API key; or set TWINSPECT_API_KEY.", None)
    log: str = option("Inspection log: file, database URL or none; without: TWINSPECT_LOG, else inspections.db.", "")
    threads: int = option("CPU threads of each model; 0 is the runtime's own choice.", 0)
    require_signature: Path | None = option("Public key: serve only models that its holder has signed.", None)
