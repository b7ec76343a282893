"""The command line: parse, call one function, say what happened. Heavy imports live inside the commands."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from twinspect.commands import takes, usual, with_settings
from twinspect.commands.options import (
    BenchOptions,
    CalibrateOptions,
    CheckOptions,
    DiagnoseOptions,
    DriftOptions,
    ExportCommandOptions,
    InspectOptions,
    ManifestOptions,
    ReproduceOptions,
)
from twinspect.commands.predict import predict
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
    "diagnose": "twinspect diagnose model.twin data/ --report classes.html",
    "calibrate": "twinspect calibrate model.twin good-day2/ --max-fpr 0.01",
    "predict": "twinspect predict model.twin new/ -o table.csv --overlays pictures/",
    "update": "twinspect update model.twin false-alarms/",
    "drift": "twinspect drift model.twin monday.csv tuesday.csv",
    "serve": "twinspect serve model.twin --port 8000",
    "export": "twinspect export model.twin -o model.onnx --images new/",
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

Data = Annotated[Path, typer.Argument(help="Folder of a data set, or a plain folder of good images.")]
Bundle = Annotated[Path, typer.Argument(help="Trained model (.twin).")]
Images = Annotated[Optional[Path], typer.Option(help="Folder that the paths of a manifest are relative to.")]  # noqa: UP045
Weights = Annotated[Optional[Path], typer.Option(help="Local weights file of the teacher.")]  # noqa: UP045
Force = Annotated[bool, typer.Option("--force", help="Replace a model without keeping the old one as FILE.bak.")]


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
def fit(
    data: Data,
    out: Annotated[Path, typer.Option(help="Bundle to write.")] = Path("model.twin"),
    effort: Annotated[
        str, typer.Option(help="instant: statistics only, no students; fast: half the input side, fewer steps.")
    ] = "default",
    config: Annotated[Optional[Path], typer.Option(help="TOML file of settings; options given here win.")] = None,  # noqa: UP045
    resume_from: Annotated[Optional[Path], typer.Option(help="Bundle to go on from; DATA holds all classes.")] = None,  # noqa: UP045
    roi: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Region of interest: mask image (white inside) or LabelMe polygons; the rest is ignored."),
    ] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Drop classes of that bundle that DATA lacks.")] = False,
    layout: Annotated[str, typer.Option(help="Layout of DATA; auto detects it.")] = "auto",
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder that the paths of a manifest are relative to."),
    ] = None,
    split: Annotated[str, typer.Option(help="Learn a protocol's split only, such as one-vs-rest/cat.")] = "",
    work: Annotated[Optional[Path], typer.Option(help="Folder for checkpoint and log.")] = None,  # noqa: UP045
    thin: Annotated[bool, typer.Option("--thin", help="Leave the teacher's weights out of the bundle.")] = False,
    force: Force = False,
    **settings: Any,
) -> None:
    """Learn what normal looks like from good images and write one bundle."""
    from twinspect.commands.fit import fit_command
    from twinspect.config import of_effort

    # None is "not given": the dial's value, a TOML file's, or the default then holds.
    chosen = {
        section: {one.name: settings[one.name] for one in fields(kind)}
        for section, kind in (("model", ModelConfig), ("train", TrainConfig))
    }
    with _console() as console:
        for section, values in of_effort(effort).items():
            chosen[section] |= {name: value for name, value in values.items() if chosen[section].get(name) is None}
        fit_command(
            data, layout, config, chosen, out, work, thin, console, images, split, resume_from, forget, force, roi
        )


@app.command("eval")
def evaluate(
    bundle: Bundle,
    data: Data,
    json_file: Annotated[str, typer.Option("--json", help="Write metrics as JSON to a file, or - to print.")] = "",
    report: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            "--report", "--out", help="Report file: .html (with charts and the wrong images), .md or .json."
        ),
    ] = None,
    layout: Annotated[str, typer.Option(help="Layout of DATA; auto detects it.")] = "auto",
    images: Images = None,
    split: Annotated[str, typer.Option(help="A protocol's split, such as one-vs-rest/cat.")] = "",
    intervals: Annotated[bool, typer.Option("--intervals", help="Add 95 % bootstrap intervals.")] = False,
    leaks: Annotated[bool, typer.Option(help="Look for byte-equal training and test images.")] = True,
    drop_leaks: Annotated[bool, typer.Option("--drop-leaks", help="Leave out test images seen in training.")] = False,
    weights: Weights = None,
) -> None:
    """Measure a model on labelled test images: per class and mean, both students alone."""
    from twinspect.commands.evaluate import EvalOptions, eval_command

    options = EvalOptions(
        bundle, data, layout, images, split, str(weights or ""), json_file, tuple(report or ()), intervals, leaks,
        drop_leaks,
    )  # fmt: skip
    with _console(quiet=json_file == "-") as console:
        eval_command(options, console)


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


app.command()(
    usual("out", "report", "class_name", "overlays", "masks", "coco", "watch", "fail_on", "device", "runtime")(
        predict
    )
)


@app.command()
@takes(ExportCommandOptions)
def export(options: ExportCommandOptions) -> None:
    """Write the model as one graph for another runtime, after it agreed with torch on images."""
    from twinspect.commands.export import export_command

    with _console() as console:
        export_command(options, console)


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
def update(
    bundle: Bundle,
    new: Annotated[Optional[Path], typer.Argument(help="New good images: a folder in any layout.")] = None,  # noqa: UP045
    class_name: Annotated[str, typer.Option("--class", help="Class of all of them, known or new.")] = "",
    listed: Annotated[bool, typer.Option("--list", help="Say what was learnt since training.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take the last update back.")] = False,
    out: Annotated[Optional[Path], typer.Option(help="Bundle to write; by default BUNDLE itself.")] = None,  # noqa: UP045
    layout: Annotated[str, typer.Option(help="Layout of NEW; auto detects it.")] = "auto",
    weights: Weights = None,
) -> None:
    """Learn new good images, after false alarms or of a new class, without the old ones."""
    from twinspect.commands.update import update_command

    with _console() as console:
        update_command(bundle, new, class_name, out, listed, undo, str(weights or ""), layout, console)


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
