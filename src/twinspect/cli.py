"""The command line: one row a command. Heavy imports live inside the commands."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from twinspect.commands import Command
from twinspect.commands import options as of
from twinspect.config import ModelConfig, TrainConfig
from twinspect.server.settings import Settings

# Every command in the order in which one works.
COMMANDS = (
    Command("doctor", "doctor:doctor", of.DoctorOptions, "twinspect doctor"),
    Command("demo", "demo:demo", of.DemoOptions, "twinspect demo --quick -o demo-out"),
    Command("fetch", "fetch:fetch", of.FetchOptions, "twinspect fetch dinov2-base"),
    Command("data inspect", "data:inspect", of.InspectOptions, "twinspect data inspect data/ --leaks"),
    Command("data manifest", "data:manifest", of.ManifestOptions, "twinspect data manifest data/ -o data.csv"),
    Command(
        "fit", "fit:fit", of.FitOptions, "twinspect fit data/ -o model.twin", (ModelConfig, TrainConfig), True,
        ("out", "effort", "config", "teacher", "size", "steps", "roi", "device"),
    ),
    Command("info", "info:info", of.InfoOptions, "twinspect info model.twin"),
    Command("eval", "evaluate:evaluate", of.EvalOptions, "twinspect eval model.twin data/ -o report.html"),
    Command(
        "compare", "compare:compare", of.CompareOptions,
        "twinspect compare old.twin new.twin data/ --report compare.html",
    ),
    Command(
        "diagnose", "diagnose:diagnose", of.DiagnoseOptions,
        "twinspect diagnose model.twin data/ --report classes.html",
    ),
    Command(
        "calibrate", "calibrate:calibrate", of.CalibrateOptions,
        "twinspect calibrate model.twin good-day2/ --max-fpr 0.01",
        shown=("max_fpr", "class_name", "add", "unsure", "labels", "rule", "from_log", "out", "report"),
    ),
    Command(
        "predict", "predict:predict", of.PredictOptions,
        "twinspect predict model.twin new/ -o table.csv --overlays pictures/",
        shown=(
            "out", "report", "class_name", "overlays", "masks", "coco", "watch", "fail_on", "device", "runtime",
        ),
    ),
    Command(
        "update", "update:update", of.UpdateOptions, "twinspect update model.twin false-alarms/",
        shown=("class_name", "listed", "undo", "out"),
    ),
    Command("drift", "drift:drift", of.DriftOptions, "twinspect drift model.twin monday.csv tuesday.csv"),
    Command(
        "serve", "serve:serve", of.ServeOptions, "twinspect serve model.twin --port 8000", (Settings,),
        shown=("host", "port", "api_key_file", "log", "log_days", "runtime", "threads", "queue"),
    ),
    Command(
        "export", "export:export", of.ExportCommandOptions, "twinspect export model.twin -o model.onnx --images new/"
    ),
    Command("sign", "sign:sign", of.SignOptions, "twinspect sign model.twin --key key.pem"),
    Command("check", "export:check", of.CheckOptions, "twinspect check model.onnx model.twin new/"),
    Command("bench", "bench:bench", of.BenchOptions, "twinspect bench model.twin --batch 1,16"),
    Command(
        "reproduce", "reproduce:reproduce", of.ReproduceOptions,
        "twinspect reproduce mvtec-ad-multi --root mvtec_ad/ -o results/",
    ),
)  # fmt: skip


class _InOrder(TyperGroup):
    """Shows the commands in the order of `COMMANDS`; typer puts groups last."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        names = dict.fromkeys(row.name.split()[0] for row in COMMANDS)
        self.commands = {name: self.commands[name] for name in names}


app = typer.Typer(
    name="twinspect",
    help="Generalist visual anomaly detection: one model, many classes, good images only.",
    no_args_is_help=True,
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(
    name="data",
    help="Look at data sets, list them in manifests.",
    epilog="\b\nExample:\n  twinspect data inspect data/",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app)
for _row in COMMANDS:
    _row.add_to(data_app if _row.name.startswith("data ") else app)


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
