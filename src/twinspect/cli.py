"""The command line: one row a command, whose options are the fields of its dataclass.

Heavy imports live inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from twinspect.commands import options as of
from twinspect.config import ModelConfig, TrainConfig, check_options, flag_of
from twinspect.inference.job import Job
from twinspect.server.settings import Settings


@dataclass(frozen=True, slots=True)
class Command:
    """A row of `COMMANDS`. Its function gets the options, a dict of the settings if it has some, and a `Console`."""

    name: str  # what is typed, such as ``data inspect``
    run: str  # ``module:function`` of ``twinspect.commands``
    options: type  # dataclass; its docstring is the help, its fields that have a help are the options
    example: str = ""  # what may follow the name; stands under the help
    settings: tuple[type, ...] = ()  # further dataclasses whose fields are options too
    optional: bool = False  # whether a setting that is not typed is None, and not its default
    shown: tuple[str, ...] = ()  # options that ``--help`` shows; empty for all. ``--help-all`` shows the others

    def add_to(self, app: typer.Typer) -> None:
        """Make it a command of an app."""

        def run(**typed: Any) -> None:
            from twinspect.console import Console

            typed.pop("help_all", None)
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}
            chosen = {option.name: values.pop(option.name) for option in fields(self.options)}
            options = self.options(**{name: value for name, value in chosen.items() if value is not None})
            quiet = chosen.get("json_file") == "-" or chosen.get("as_json") is True
            module, _, function = self.run.partition(":")
            with Console(quiet) as console:
                check_options(options)
                called = getattr(import_module(f"twinspect.commands.{module}"), function)
                called(options, *([values] if self.settings else []), console)

        run.__signature__ = inspect.Signature(list(self._parameters()))  # type: ignore[attr-defined]
        example = f"\b\nExample:\n  twinspect {self.name} {self.example}".rstrip()
        app.command(self.name.split()[-1], cls=_WithExample, help=self.options.__doc__, epilog=example)(run)

    def _parameters(self) -> Iterator[inspect.Parameter]:
        for kind in (self.options, *self.settings):
            hints = get_type_hints(kind)
            for option in sorted(fields(kind), key=lambda field: field.name not in kind.__annotations__):
                if "help" in option.metadata:  # its own options come before those that several commands have
                    yield self._parameter(option, hints[option.name], self.optional and kind in self.settings)
        if self.shown:
            info = typer.Option("--help-all", callback=_help_all, is_eager=True, help="Show every option, and stop.")
            yield _keyword("help_all", False, Annotated[bool, info])

    def _parameter(self, option: Any, hint: Any, optional: bool) -> inspect.Parameter:
        """A field as typer reads it: several values are a list there, None where none is given."""
        default = inspect.Parameter.empty if option.default is MISSING else option.default
        values = next((get_args(kind) for kind in (hint, *get_args(hint)) if get_origin(kind) is tuple), ())
        # Typer would write <list[Path]> and <float,float>.
        metavar = " ".join(f"<{value.__name__.lower()}>" for value in values if value is not ...) or None
        if get_origin(hint) is tuple and get_args(hint)[-1] is ...:
            hint = list[get_args(hint)[0]]  # type: ignore[misc]
        if optional or default == ():
            hint, default = hint | None, None
        text = option.metadata["help"]
        if option.metadata.get("argument"):
            info = typer.Argument(help=text, metavar=option.name.upper())
        else:
            flags, hidden = flag_of(option).split(), bool(self.shown) and option.name not in self.shown
            flags = ["-o", *flags] if "--out" in flags else flags
            info = typer.Option(*flags, help=text, show_default=not optional, hidden=hidden, metavar=metavar)
        return _keyword(option.name, default, Annotated[hint, info])


class _WithExample(TyperCommand):
    """Shows its example also above an error in what was typed."""

    def get_usage(self, ctx: Any) -> str:
        """The first lines of such an error."""
        return f"{super().get_usage(ctx)}\n{self.epilog}".replace("\b\nExample:\n  ", "Example: ")


def _keyword(name: str, default: Any, hint: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _help_all(context: typer.Context, value: bool) -> None:
    if value:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help())
        raise typer.Exit


# In the order in which one works.
COMMANDS = (
    Command("doctor", "doctor:doctor", of.DoctorOptions),
    Command("demo", "demo:demo", of.DemoOptions, "--quick -o demo-out"),
    Command("fetch", "doctor:fetch", of.FetchOptions, "dinov2-base"),
    Command("data inspect", "data:inspect", of.InspectOptions, "data/ --leaks"),
    Command("data manifest", "data:manifest", of.ManifestOptions, "data/ -o data.csv"),
    Command(
        "fit", "fit:fit", of.FitOptions, "data/ -o model.twin", (ModelConfig, TrainConfig), True,
        ("out", "effort", "config", "teacher", "size", "steps", "roi", "device"),
    ),
    Command("info", "info:info", of.InfoOptions, "model.twin"),
    Command("eval", "evaluate:evaluate", of.EvalOptions, "model.twin data/ -o report.html"),
    Command("compare", "compare:compare", of.CompareOptions, "old.twin new.twin data/ --report compare.html"),
    Command("diagnose", "diagnose:diagnose", of.DiagnoseOptions, "model.twin data/ --report classes.html"),
    Command(
        "calibrate", "calibrate:calibrate", of.CalibrateOptions, "model.twin good-day2/ --max-fpr 0.01",
        shown=("max_fpr", "class_name", "add", "unsure", "labels", "rule", "from_log", "out", "report"),
    ),
    Command(
        "predict", "predict:predict", Job, "model.twin new/ -o table.csv --overlays pictures/",
        shown=("out", "report", "class_name", "overlays", "masks", "coco", "watch", "fail_on", "device", "runtime"),
    ),
    Command(
        "update", "fit:update", of.UpdateOptions, "model.twin false-alarms/ --class bottle",
        shown=("class_name", "listed", "undo", "out"),
    ),
    Command("drift", "calibrate:drift", of.DriftOptions, "model.twin monday.csv tuesday.csv"),
    Command(
        "serve", "deploy:serve", of.ServeOptions, "model.twin --port 8000", (Settings,),
        shown=("host", "port", "api_key_file", "log", "log_days", "runtime", "threads", "queue"),
    ),
    Command("export", "deploy:export", of.ExportCommandOptions, "model.twin -o model.onnx --images new/"),
    Command("sign", "deploy:sign", of.SignOptions, "model.twin --key key.pem"),
    Command("check", "deploy:check", of.CheckOptions, "model.onnx model.twin new/"),
    Command("bench", "deploy:bench", of.BenchOptions, "model.twin --batch 1,16"),
    Command("reproduce", "reproduce:reproduce", of.ReproduceOptions, "mvtec-ad-multi --root mvtec_ad/ -o results/"),
)  # fmt: skip


class _InOrder(TyperGroup):
    """Shows the commands in the order of `COMMANDS`; typer puts groups last."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names."""
        return list(dict.fromkeys(row.name.split()[0] for row in COMMANDS))


app = typer.Typer(
    name="twinspect",
    no_args_is_help=True,
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(
    name="data",
    help="Show how a data set is read, or write it as a table.",
    epilog="\b\nExample:\n  twinspect data inspect data/",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app)
for _row in COMMANDS:
    _row.add_to(data_app if _row.name.startswith("data ") else app)


def _say_version(value: bool) -> None:
    if value:
        from twinspect._version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
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
