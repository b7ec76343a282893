"""The command line: parse, call one function, say what happened. Heavy imports live inside the commands."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from twinspect.commands import usual
from twinspect.commands.data import Images, data_app
from twinspect.commands.diagnose import diagnose
from twinspect.commands.predict import predict
from twinspect.commands.serve import serve
from twinspect.config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from twinspect.console import Console

app = typer.Typer(
    name="twinspect",
    help="Generalist visual anomaly detection: one model, many classes, good images only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app)
app.command()(diagnose)
app.command()(usual("host", "port", "api_key_file", "log", "log_days", "runtime", "threads", "queue")(serve))

Data = Annotated[Path, typer.Argument(help="Folder of a data set, or a plain folder of good images.")]
Bundle = Annotated[Path, typer.Argument(help="Trained model (.twin).")]
Weights = Annotated[Optional[Path], typer.Option(help="Local weights file of the teacher.")]  # noqa: UP045
Runtime = Annotated[str, typer.Option(help="auto, torch, onnx or openvino; auto is what the file was made for.")]
Threads = Annotated[int, typer.Option(help="CPU threads of the runtime; 0 is its own choice.")]
Seed = Annotated[int, typer.Option(help="Seed of weights, order, noise and splits.")]


# Options of settings whose name is not the setting's.
_FLAGS = {"time_budget_s": "--time-budget", "pretrained": "--pretrained/--random-teacher"}


def _say_version(wanted: bool) -> None:
    if wanted:
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
    from twinspect.console import end_lost

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


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every setting of a run."""
    signature = inspect.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    for one in (*fields(ModelConfig), *fields(TrainConfig)):
        name = one.name.replace("_", "-")
        flag = _FLAGS.get(one.name, f"--{name}/--no-{name}" if one.default is True else f"--{name}")
        option = typer.Option(flag, help=one.metadata["help"], show_default=False)
        kind: Any = Annotated[type(one.default) | None, option]
        own.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return command


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
@_with_settings
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
        fit_command(data, layout, config, chosen, out, work, thin, console, images, split, resume_from, forget, roi)


@app.command("eval")
def evaluate(
    bundle: Bundle,
    data: Data,
    json_file: Annotated[str, typer.Option("--json", help="Write metrics as JSON to a file, or - to print.")] = "",
    out: Annotated[Optional[list[Path]], typer.Option(help="Results file: .md, .html or .json.")] = None,  # noqa: UP045
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
        bundle, data, layout, images, split, str(weights or ""), json_file, tuple(out or ()), intervals, leaks,
        drop_leaks,
    )  # fmt: skip
    with _console(quiet=json_file == "-") as console:
        eval_command(options, console)


@app.command()
def reproduce(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; without one they are listed.")] = "",
    root: Annotated[Optional[Path], typer.Option(help="Folder of the data set.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Folder for results.")] = None,  # noqa: UP045
    teacher: Annotated[str, typer.Option(help="Instead of the recipe's teacher.")] = "",
    weights: Weights = None,
    seed: Seed = 0,
    limit_steps: Annotated[int, typer.Option(help="Train so many steps at most; 0: the recipe's.")] = 0,
    size: Annotated[int, typer.Option(help="Input side in pixels; 0: the recipe's.")] = 0,
    drop_leaks: Annotated[bool, typer.Option("--drop-leaks", help="Do not train on copies of test images.")] = False,
) -> None:
    """Train and evaluate a benchmark's protocol in one go, ours beside the published numbers."""
    from twinspect.commands.reproduce import Choices, reproduce_command

    choices = Choices(recipe, root, out, teacher, str(weights or ""), seed, limit_steps, size, drop_leaks)
    with _console() as console:
        reproduce_command(choices, console)


app.command()(usual("out", "class_name", "maps", "masks", "overlays", "coco", "device", "runtime", "batch")(predict))


@app.command()
def export(
    bundle: Bundle,
    out: Annotated[Path, typer.Option(help="File to write: .onnx or .xml (OpenVINO).")],
    format: Annotated[str, typer.Option(help="onnx or openvino; empty reads it from --out.")] = "",
    precision: Annotated[str, typer.Option(help="fp32, int8, or fp16 (OpenVINO).")] = "fp32",
    batch: Annotated[int, typer.Option(help="Fix the number of images per call; 0 leaves it open.")] = 0,
    any_size: Annotated[bool, typer.Option("--any-size", help="Let the graph itself resize images.")] = False,
    images: Annotated[Optional[Path], typer.Option(help="Good images, 32 or more, to prove it on.")] = None,  # noqa: UP045
    data: Annotated[Optional[Path], typer.Option(help="Labelled data set, to compare image AUROC.")] = None,  # noqa: UP045
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Write it although some answers differ from the model's.")
    ] = False,
    weights: Weights = None,
) -> None:
    """Write the model as one graph for another runtime, after it agreed with torch on images."""
    from twinspect.commands.export import export_command
    from twinspect.inference.export import ExportOptions, format_of

    with _console() as console:
        options = ExportOptions(format_of(out, format), precision, batch, any_size, accept_loss)
        export_command(bundle, out, options, images, data, str(weights or ""), console)


@app.command()
def check(
    export: Annotated[Path, typer.Argument(help="Exported model (.onnx or .xml).")],
    bundle: Bundle,
    images: Annotated[Path, typer.Argument(help="Images, 32 or more: a file, folder or quoted glob.")],
    data: Annotated[Optional[Path], typer.Option(help="Labelled data set, to compare image AUROC.")] = None,  # noqa: UP045
    runtime: Runtime = "auto",
    weights: Weights = None,
) -> None:
    """Compare an exported model with its bundle on images of your own; exit code 2 where they differ."""
    from twinspect.commands.export import check_command

    with _console() as console:
        check_command(export, bundle, images, data, runtime, str(weights or ""), console)


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="Bundle (.twin) or exported model.")],
    runtime: Runtime = "auto",
    batch: Annotated[str, typer.Option(help="Images per call, separated by commas.")] = "1,16",
    threads: Threads = 0,
    images: Annotated[Optional[Path], typer.Option(help="Images to decode; painted JPEGs without.")] = None,  # noqa: UP045
    seconds: Annotated[float, typer.Option(help="Spent on each batch size.")] = 10.0,
    weights: Weights = None,
) -> None:
    """Measure images per second, latency, memory and the share of every stage; the last line is JSON."""
    from twinspect.commands.bench import bench_command

    with _console() as console:
        bench_command(model, runtime, batch, threads, images, seconds, str(weights or ""), console)


@app.command()
@usual("max_fpr", "class_name", "add", "unsure", "labels", "rule", "from_log", "out", "report")
def calibrate(
    bundle: Bundle,
    good: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Good images not trained on; none: new budgets only."),
    ] = None,
    max_fpr: Annotated[float, typer.Option(help="Share of good images that may be called bad; 0: as before.")] = 0.0,
    class_name: Annotated[str, typer.Option("--class", help="Class of all images and of the budgets.")] = "",
    group: Annotated[str, typer.Option(help="session: keep the budget in every session; none: over all.")] = "",
    add: Annotated[bool, typer.Option("--add", help="Add to the calibration images instead of replacing.")] = False,
    unsure: Annotated[tuple[float, float], typer.Option(help="Rates of good images called bad, bad or unsure.")] = (
        0.0,
        0.0,
    ),
    region_fpr: Annotated[float, typer.Option(help="Share of good images that may show a region.")] = 0.0,
    labels: Annotated[Optional[Path], typer.Option(help="Labelled images (CSV: image, label) to choose by.")] = None,  # noqa: UP045
    rule: Annotated[str, typer.Option(help="How labels choose: f1-max, min-cost or zero-miss.")] = "",
    miss_cost: Annotated[float, typer.Option(help="Cost of a miss, a false alarm costs 1: min-cost.")] = 0.0,
    source: Annotated[Optional[Path], typer.Option("--from", help="Take over from a copy of the same model.")] = None,  # noqa: UP045
    from_log: Annotated[str, typer.Option(help="Inspection log of twinspect serve: file or URL.")] = "",
    since: Annotated[str, typer.Option(help="With --from-log: decisions since a date or time.")] = "",
    out: Annotated[Optional[Path], typer.Option(help="Bundle to write; by default BUNDLE itself.")] = None,  # noqa: UP045
    report: Annotated[Optional[list[Path]], typer.Option(help="Report file: .html, .md or .json.")] = None,  # noqa: UP045
    json_file: Annotated[str, typer.Option("--json", help="Write values as JSON to a file, or - to print.")] = "",
    layout: Annotated[str, typer.Option(help="Layout of GOOD; auto detects it.")] = "auto",
    images: Images = None,
    weights: Weights = None,
) -> None:
    """Set thresholds with a stated false-alarm rate per class from good images; the model is not retrained."""
    from twinspect.commands.decisions import CalibrateOptions, calibrate_command, wanted

    with _console(quiet=json_file == "-") as console:
        asked = wanted(max_fpr, unsure, region_fpr, class_name, group, add, rule, miss_cost)
        options = CalibrateOptions(
            bundle,
            good,
            out,
            asked,
            labels,
            source,
            layout,
            images,
            str(weights or ""),
            tuple(report or ()),
            json_file,
            from_log,
            since,
        )
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
def drift(
    bundle: Bundle,
    tables: Annotated[list[Path], typer.Argument(help="Tables of twinspect predict, oldest first.")],
    false_alarm_rate: Annotated[float, typer.Option(help="Chance of any alarm, ever, if nothing changes.")] = 0.01,
    json_file: Annotated[str, typer.Option("--json", help="Write values as JSON to a file, or - to print.")] = "",
    report: Annotated[Optional[list[Path]], typer.Option(help="Report file: .html, .md or .json.")] = None,  # noqa: UP045
) -> None:
    """Say whether predictions still look like the calibration images, and if not, what changed."""
    from twinspect.commands.decisions import DriftOptions, drift_command

    with _console(quiet=json_file == "-") as console:
        drift_command(DriftOptions(bundle, tuple(tables), false_alarm_rate, json_file, tuple(report or ())), console)


@app.command()
def info(
    bundle: Bundle,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a bundle holds: teacher, classes, training, threshold and its promise."""
    from twinspect.commands.fit import info_lines

    with _console() as console:
        content = info_lines(bundle)
        console.say(json.dumps(content, indent=1) if as_json else "\n".join(f"{k}: {v}" for k, v in content.items()))


def _console(quiet: bool = False) -> Console:
    from twinspect.console import Console

    return Console(quiet)
