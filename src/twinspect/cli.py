"""The command line: parse, call one function, say what happened. Heavy imports live inside the commands."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from twinspect.commands import takes, usual, with_settings
from twinspect.commands.options import (
    BenchOptions,
    CalibrateOptions,
    CheckOptions,
    CompareOptions,
    DiagnoseOptions,
    DriftOptions,
    EvalOptions,
    ExportCommandOptions,
    FitOptions,
    InspectOptions,
    ManifestOptions,
    PredictOptions,
    ReproduceOptions,
    SignOptions,
    UpdateOptions,
)
from twinspect.commands.serve import serve
from twinspect.config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from twinspect.console import Console

# Every command in the order in which one works, with the example that stands under its help.
EXAMPLES = {
    "doctor": "twinspect doctor",
    "demo": "twinspect demo --quick -o demo-out",
    "fetch": "twinspect fetch dinov2-base",
    "data": "twinspect data inspect data/",
    "data inspect": "twinspect data inspect data/ --leaks",
    "data manifest": "twinspect data manifest data/ -o data.csv",
    "fit": "twinspect fit data/ -o model.twin",
    "info": "twinspect info model.twin",
    "eval": "twinspect eval model.twin data/ -o report.html",
    "compare": "twinspect compare old.twin new.twin data/ --report compare.html",
    "diagnose": "twinspect diagnose model.twin data/ --report classes.html",
    "calibrate": "twinspect calibrate model.twin good-day2/ --max-fpr 0.01",
    "predict": "twinspect predict model.twin new/ -o table.csv --overlays pictures/",
    "update": "twinspect update model.twin false-alarms/",
    "drift": "twinspect drift model.twin monday.csv tuesday.csv",
    "serve": "twinspect serve model.twin --port 8000",
    "export": "twinspect export model.twin -o model.onnx --images new/",
    "sign": "twinspect sign model.twin --key key.pem",
    "check": "twinspect check model.onnx model.twin new/",
    "bench": "twinspect bench model.twin --batch 1,16",
    "reproduce": "twinspect reproduce mvtec-ad-multi --root mvtec_ad/ -o results/",
}


class _Commands(TyperGroup):
    """All commands, with what they have in common: their order, an example, and ``-o`` for every ``--out``."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        order = list(EXAMPLES)
        place = {name: order.index(name) if name in EXAMPLES else len(order) for name in self.commands}
        self.commands = {name: self.commands[name] for name in sorted(self.commands, key=place.__getitem__)}
        _complete(self, "")


def _complete(group: Any, prefix: str) -> None:
    for name, command in group.commands.items():
        if example := EXAMPLES.get(prefix + name):
            command.epilog = f"\b\nExample:\n  {example}"
        for option in command.params:
            if "--out" in option.opts:
                option.opts.insert(0, "-o")
        if hasattr(command, "commands"):
            _complete(command, f"{prefix}{name} ")


app = typer.Typer(
    name="twinspect",
    help="Generalist visual anomaly detection: one model, many classes, good images only.",
    no_args_is_help=True,
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(
    name="data", help="Look at data sets, list them in manifests.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app)
app.command()(usual("host", "port", "api_key_file", "log", "log_days", "runtime", "threads", "queue")(serve))

Bundle = Annotated[Path, typer.Argument(help="Trained model (.twin).")]


def _say_version(asked: bool) -> None:
    if asked:
        from twinspect._version import __version__

        typer.echo(__version__)
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and stop.")
]


@app.callback()
def main(version: Version = False) -> None:
    """Generalist visual anomaly detection: one model, many classes, good images only."""
    from twinspect.console import plain_streams
    from twinspect.device import share_cores

    plain_streams()
    share_cores()


def run() -> None:
    """The command line as a process."""
    from twinspect.console import end_lost, end_on_sigterm

    end_on_sigterm()
    try:
        app()
    except OSError as error:
        if error.errno is None:
            raise
        end_lost(error)  # only --help and --version are printed outside of a Console, which ends in its own words


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html, metrics.json and the model.")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run of about a minute.")] = False,
) -> None:
    """Train on good textile images, find local and global defects, write a report."""
    from twinspect.commands.demo import run_demo

    with _console() as console:
        run_demo(out, quick, console)


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, device, teachers and their weights."""
    from twinspect.commands.doctor import examine

    with _console() as console:
        for line in examine():
            console.say(line)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Short name of a teacher, such as dinov2-base, or a timm name.")],
    revision: Annotated[str, typer.Option(help="Commit or branch of the hub repository; empty takes main.")] = "",
    sha256: Annotated[str, typer.Option(help="Refuse any other file; empty takes the hub's word.")] = "",
) -> None:
    """Download a teacher's weights, verify them, and record their commit and sha256."""
    from twinspect.models.fetch import fetch_lines

    with _console() as console:
        for line in fetch_lines(name, revision, sha256, console.progress):
            console.say(line)


@app.command()
@usual(
    "out",
    "effort",
    "config",
    "resume_from",
    "model",
    "teacher",
    "size",
    "steps",
    "pose",
    "drop_outliers",
    "roi",
    "device",
)
@with_settings(ModelConfig, TrainConfig, optional=True)
@with_settings(FitOptions)
def fit(**given: Any) -> None:
    """Learn from good images what is usual, and write one model file (a bundle)."""
    from twinspect.commands.fit import fit_command

    options = FitOptions(**{one.name: given.pop(one.name) for one in fields(FitOptions)})
    with _console() as console:
        fit_command(options, given, console)


@app.command("eval")
@takes(EvalOptions)
def evaluate(options: EvalOptions) -> None:
    """Measure a model on labelled test images: defects found, false alarms and AUROC by class."""
    from twinspect.commands.evaluate import eval_command

    with _console(quiet=options.json_file == "-") as console:
        eval_command(options, console)


@app.command()
@takes(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Score the same labelled images with two models: accuracy, decisions that differ, speed and size."""
    from twinspect.commands.compare import compare_command

    with _console(quiet=options.json_file == "-") as console:
        compare_command(options, console)


@app.command()
@takes(DiagnoseOptions)
def diagnose(options: DiagnoseOptions) -> None:
    """Measure how classes interfere, without any anomaly: is one class noticed inside another?"""
    from twinspect.commands.diagnose import diagnose_command

    with _console(quiet=options.json_file == "-") as console:
        diagnose_command(options, console)


@data_app.command("inspect")
@takes(InspectOptions)
def data_inspect(options: InspectOptions) -> None:
    """Say what is there: layout, classes, counts, masks, what is skipped and why."""
    from twinspect.commands.data import inspect

    with _console(quiet=options.as_json) as console:
        inspect(options, console)


@data_app.command("manifest")
@takes(ManifestOptions)
def data_manifest(options: ManifestOptions) -> None:
    """Write one row per image: image, split, class_name, label, defect_type, mask, group, record."""
    from twinspect.commands.data import manifest

    with _console() as console:
        manifest(options, console)


@app.command()
@takes(ReproduceOptions)
def reproduce(options: ReproduceOptions) -> None:
    """Train and evaluate a benchmark's protocol in one go, ours beside the published numbers."""
    from twinspect.commands.reproduce import reproduce_command

    with _console() as console:
        reproduce_command(options, console)


@app.command()
@usual("out", "report", "class_name", "overlays", "masks", "coco", "watch", "fail_on", "device", "runtime")
@takes(PredictOptions)
def predict(options: PredictOptions) -> None:
    """Score images; one that cannot be read becomes a row with an error, and a run that was killed goes on.

    Of a source without an end (camera, network stream, --watch) each image is answered before the next is asked for,
    and --fail-on ends the run. Exit code 1: none of the images could be read.
    """
    from twinspect.commands.predict import predict_command

    with _console() as console:
        predict_command(options, console)


@app.command()
@takes(ExportCommandOptions)
def export(options: ExportCommandOptions) -> None:
    """Write the model as one graph for another runtime, after it agreed with torch on images."""
    from twinspect.commands.export import export_command

    with _console() as console:
        export_command(options, console)


@app.command()
@takes(SignOptions)
def sign(options: SignOptions) -> None:
    """Sign a model, so that `serve --require-signature` takes it; or verify it with --check."""
    from twinspect.errors import ConfigError
    from twinspect.signature import sign as sign_model
    from twinspect.signature import verify

    with _console() as console:
        if options.key is not None and options.check is None:
            sign_model(options.model, options.key)
            console.say(f"signed {options.model}")
        elif options.check is not None and options.key is None:
            verify(options.model, options.check)
            console.say(f"{options.model} is as the holder of {options.check} signed it")
        else:
            raise ConfigError("give --key KEY to sign, or --check KEY to verify")


@app.command()
@takes(CheckOptions)
def check(options: CheckOptions) -> None:
    """Compare an exported model with its bundle on images of your own; exit code 2 where they differ."""
    from twinspect.commands.export import check_command

    with _console() as console:
        check_command(options, console)


@app.command()
@takes(BenchOptions)
def bench(options: BenchOptions) -> None:
    """Measure images per second, latency, memory and the share of every stage; the last line is JSON."""
    from twinspect.commands.bench import bench_command

    with _console() as console:
        bench_command(options, console)


@app.command()
@usual("max_fpr", "class_name", "add", "unsure", "labels", "rule", "from_log", "out", "report")
@takes(CalibrateOptions)
def calibrate(options: CalibrateOptions) -> None:
    """Set thresholds with a stated false-alarm rate per class from good images; the model is not retrained."""
    from twinspect.commands.decisions import calibrate_command

    with _console(quiet=options.json_file == "-") as console:
        calibrate_command(options, console)


@app.command()
@usual("class_name", "listed", "undo", "out")
@takes(UpdateOptions)
def update(options: UpdateOptions) -> None:
    """Learn new good images, after false alarms or of a new class, without the old ones."""
    from twinspect.commands.update import update_command

    with _console() as console:
        update_command(options, console)


@app.command()
@takes(DriftOptions)
def drift(options: DriftOptions) -> None:
    """Say whether predictions still look like the calibration images, and if not, what changed."""
    from twinspect.commands.decisions import drift_command

    with _console(quiet=options.json_file == "-") as console:
        drift_command(options, console)


@app.command()
def info(
    bundle: Bundle,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    as_card: Annotated[bool, typer.Option("--card", help="Print a model card in Markdown.")] = False,
) -> None:
    """Say what a model holds: teacher, classes, training, threshold and its promise."""
    from twinspect.commands.card import card
    from twinspect.commands.fit import info_lines, info_text

    with _console() as console:
        if as_card:
            console.result(card(bundle))
            return
        content = info_lines(bundle)
        console.say(json.dumps(content, indent=1) if as_json else "\n".join(info_text(content)))


def _console(quiet: bool = False) -> Console:
    from twinspect.console import Console

    return Console(quiet)
