"""What commands may be told: a dataclass a command, whose docstring is its help; a field an option.

`cli` makes the command line of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twinspect.config import RULES, SEEDS, Range, argument, option
from twinspect.inference.job import THREADS

_MODEL = "Trained model (.twin)."


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


@dataclass(frozen=True)
class CalibrateOptions(ReadsData, Reports):
    """Set thresholds from good images for a false-alarm rate. The model itself stays as it is."""

    model: Path = argument(_MODEL)
    good: Path | None = argument(
        "Good images that the model has not learnt; without: those of before, for another rate.", None
    )
    max_fpr: float | None = option(
        "Share of good images that may be called bad, such as 0.01; without: as before.", None
    )
    class_name: str = option("Class of all images given; only its thresholds change.", "", "--class")
    add: bool = option("Add to the calibration images instead of replacing.", False, "--add")
    unsure: tuple[float, float] | None = option(
        "Two shares of good images: called bad; called bad or unsure (a third answer).", None
    )
    labels: Path | None = option("Labelled images (CSV: image, label) to choose thresholds by.", None)
    rule: str = option("How labels choose: f1-max (by default), min-cost or zero-miss.", "", accepts=RULES)
    miss_cost: float = option("For --rule min-cost: cost of a missed defect; a false alarm costs 1.", 1.0)
    from_log: str = option("Inspection log of twinspect serve: file or URL.", "")
    since: str = option("With --from-log: decisions since a date or time.", "")
    out: Path | None = option("Model to write; by default MODEL itself.", None)
    force: bool = option("Replace a model without keeping the old one as FILE.bak.", False, "--force")


@dataclass(frozen=True)
class DriftOptions(Reports):
    """Say whether new images still look like the calibration images. If not, say what changed."""

    model: Path = argument(_MODEL)
    tables: tuple[Path, ...] = argument("Tables of twinspect predict, oldest first.")
    false_alarm_rate: float = option("Chance of any alarm, ever, if nothing changes.", 0.01)


@dataclass(frozen=True)
class ReproduceOptions:
    """Train and test on a public benchmark. Our numbers stand beside the published ones."""

    recipe: str = argument("Name of a recipe; without one they are listed.", "")
    root: Path | None = option("Folder of the data set.", None)
    out: Path | None = option("Folder for results; without: reproduce-out/RECIPE.", None)
    teacher: str = option("Instead of the recipe's teacher.", "")
    weights: str = option("File with the teacher's weights, if no known place has them.", "")
    seed: int = option("Seed of weights, order, noise and splits.", 0, accepts=SEEDS)
    limit_steps: int = option("Train so many steps at most; 0: the recipe's.", 0)
    size: int = option("Input side in pixels; 0: the recipe's.", 0)
    drop_leaks: bool = option("Do not train on copies of test images.", False, "--drop-leaks")


@dataclass(frozen=True)
class ExportCommandOptions:
    """Write a model for another runtime: ONNX or OpenVINO. It is first compared with the original on images."""

    model: Path = argument(_MODEL)
    out: Path = option("File to write: .onnx or .xml (OpenVINO).")
    images: Path | None = option("Images, 32 or more, to prove it on: a file, folder or quoted glob.", None)


@dataclass(frozen=True)
class CheckOptions:
    """Compare an exported model with its original on your images. Exit code 2: they differ."""

    export: Path = argument("Exported model (.onnx or .xml).")
    model: Path = argument(_MODEL)
    images: Path = argument("Images, 32 or more: a file, folder or quoted glob.")


@dataclass(frozen=True)
class BenchOptions:
    """Measure images per second, latency and memory."""

    model: Path = argument("Bundle (.twin) or exported model.")
    batch: str = option("Images per call, separated by commas.", "1,16")
    threads: int = option("CPU threads of the runtime; 0 is its own choice.", 0, accepts=THREADS)
    device: str = option("Where a bundle (.twin) runs: auto, cpu, cuda or cuda:1.", "auto")
    images: Path | None = option("Images to decode; without it made-up JPEGs.", None)
    seconds: float = option("Spent on each batch size.", 10.0, accepts=Range(0.001, 86_400))
    as_json: bool = option("Print everything as one line of JSON.", False, "--json")


@dataclass(frozen=True)
class DiagnoseOptions(ReadsData, Reports):
    """Measure whether products hide each other's defects. It needs good images of two or more, and no defect."""

    model: Path = argument("Trained model (.twin), or an exported one.")
    data: Path = argument("Folder of a data set with normal images of two classes or more.")
    count: int = option("Images of each kind per ordered pair of classes.", 8, accepts=Range(1, 10_000))
    normals: int = option("Normal images of each class to compare with.", 40, accepts=Range(2, 1_000_000))
    seed: int = option("Seed of everything drawn.", 0, accepts=SEEDS)


@dataclass(frozen=True)
class CompareOptions(ReadsData, Reports):
    """Compare two models on the same labelled images. Accuracy, answers that differ, speed and size."""

    first: Path = argument("A trained model (.twin), or an exported one.")
    second: Path = argument("Another, which is compared with the first.")
    data: Path = argument("Labelled data set; its test images are scored by both.")
    split: str = option("A protocol's split, such as one-vs-rest/cat.", "")
    draws: int = option("Bootstrap draws of the test images.", 1000, accepts=Range(1, 100_000))
    seed: int = option("Seed of the draws and splits.", 0, accepts=SEEDS)
    device: str = option("Where trained models (.twin) run: auto, cpu, cuda or cuda:1.", "auto")


@dataclass(frozen=True)
class InspectOptions(ReadsData):
    """Show how a data set is read: layout, classes, counts, masks, what is left out and why."""

    path: Path = argument("Folder or manifest of a data set.")
    leaks: bool = option("Look for test images that are copies of training images.", False, "--leaks")
    as_json: bool = option("Print everything as JSON.", False, "--json")


@dataclass(frozen=True)
class ManifestOptions(ReadsData):
    """Write a data set as a table. Columns: image, split, class_name, label, defect_type, mask, group, record."""

    path: Path = argument("Folder or manifest of a data set.")
    out: Path = option("Manifest to write: .parquet or .csv.")


@dataclass(frozen=True)
class EvalOptions(ReadsData):
    """Measure a model on labelled images. By class: defects found, false alarms, AUROC."""

    model: Path = argument(_MODEL)
    data: Path = argument("Data set with labelled test images: good ones and defects.")
    report: tuple[Path, ...] = option("Report: .html (with the wrong images), .md or .json.", (), "--report --out")
    json_file: str = option("Write metrics as JSON to a file, or - to print.", "", "--json")
    split: str = option("A protocol's split, such as one-vs-rest/cat.", "")
    drop_leaks: bool = option("Leave out test images seen in training.", False, "--drop-leaks")
    device: str = option("Where the model runs: auto (a GPU where there is one), cpu, cuda or cuda:1.", "auto")


@dataclass(frozen=True)
class SignOptions:
    """Sign a model, or verify its signature. `serve --require-signature` takes signed models only."""

    model: Path = argument("Trained or exported model (.twin, .onnx, .xml).")
    key: Path | None = option("Private key to sign with (PEM, Ed25519).", None)
    check: Path | None = option("Public key to verify with, instead of signing.", None)


@dataclass(frozen=True)
class UpdateOptions(ReadsData):
    """Learn new good images without the old ones. They may be false alarms, or a new product."""

    model: Path = argument(_MODEL)
    new: Path | None = argument("New good images: a folder in any layout.", None)
    class_name: str = option("Class of all of them, known or new.", "", "--class")
    listed: bool = option("Say what was learnt since training.", False, "--list")
    undo: bool = option("Take the last update back.", False, "--undo")
    out: Path | None = option("Model to write; by default MODEL itself.", None)


@dataclass(frozen=True)
class FitOptions(ReadsData):
    """Learn from good images, and write one model file."""

    data: Path = argument("Folder of a data set, or a plain folder of good images.")
    out: Path = option("Bundle to write.", Path("model.twin"))
    effort: str = option(
        "fast: half the input side and fewer steps, for a first try; instant: statistics only, no students.",
        "default",
    )
    config: Path | None = option("TOML file of settings; options given here win.", None)
    resume_from: Path | None = option("Model to go on from; DATA must hold its classes, too.", None)
    roi: Path | None = option(
        "Region of interest: where to look. Mask image (white inside) or LabelMe polygons.", None
    )
    forget: bool = option("With --resume-from: drop classes that DATA lacks.", False, "--forget")
    split: str = option("Learn a protocol's split only, such as one-vs-rest/cat.", "")
    work: Path | None = option(
        "Folder for checkpoints and the training log; without: OUT.work, as long as it runs.", None
    )
    force: bool = option("Replace a model without keeping the old one as FILE.bak.", False, "--force")


@dataclass(frozen=True)
class DoctorOptions:
    """Say what this machine has, and what is missing."""


@dataclass(frozen=True)
class DemoOptions:
    """Try everything on pictures of textile. It trains, finds small and global defects, and writes a report."""

    out: Path = option("Folder for report.html, metrics.json and the model.", Path("demo-out"))
    quick: bool = option("A smaller run of about a minute.", False, "--quick")


@dataclass(frozen=True)
class FetchOptions:
    """Download the weights of a teacher. They are verified, and their commit and sha256 recorded."""

    name: str = argument("Short name of a teacher, such as dinov2-base, or a timm name.")
    revision: str = option("Commit or branch of the hub repository; empty takes main.", "")
    sha256: str = option("Refuse any other file; empty takes the hub's word.", "")


@dataclass(frozen=True)
class InfoOptions:
    """Say what a model holds, and what its thresholds promise."""

    model: Path = argument(_MODEL)
    as_json: bool = option("Print everything as JSON.", False, "--json")
    as_card: bool = option("Print a model card in Markdown.", False, "--card")


@dataclass(frozen=True)
class ServeOptions:
    """Answer images over HTTP, with a page for operators. It keeps an inspection log."""

    models: tuple[str, ...] = argument("Trained or exported models: FILE or NAME=FILE.")
    api_key_file: Path | None = option("File with the API key; or set TWINSPECT_API_KEY.", None)
    log: str = option("Inspection log: file, database URL or none; without: TWINSPECT_LOG, else inspections.db.", "")
    threads: int = option("CPU threads of each model; 0 is the runtime's own choice.", 0, accepts=THREADS)
    require_signature: Path | None = option("Public key: serve only models that its holder has signed.", None)
