"""The command line: parse, call one function, say what happened. Heavy imports live inside the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

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

Data = Annotated[Path, typer.Argument(help="Folder of a data set, or a plain folder of good images.")]
Bundle = Annotated[Path, typer.Argument(help="Trained model (.twin).")]
Teacher = Annotated[str, typer.Option(help="auto, a short name (twinspect doctor lists them) or any timm name.")]
Weights = Annotated[Optional[Path], typer.Option(help="Local weights file of the teacher.")]  # noqa: UP045
Seed = Annotated[int, typer.Option(help="Seed of weights, order, noise and splits.")]


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Generalist visual anomaly detection: one model, many classes, good images only."""
    if version:
        from twinspect._version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html, metrics.json and the model.")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run of about a minute.")] = False,
) -> None:
    """Train on good textile images, find local and global defects, write a report."""
    from twinspect.demo import run_demo

    with _console() as console:
        run_demo(out, quick, console)


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, device, teachers and their weights."""
    from twinspect.doctor import examine

    with _console() as console:
        for line in examine():
            console.say(line)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Short name of a teacher, such as dinov2-base.")],
) -> None:
    """Download a teacher's weights (pinned revision, resumable) and verify them."""
    from twinspect.models.fetch import fetch as fetch_weights

    with _console() as console:
        console.say(f"weights of {name} are in {fetch_weights(name, console.progress)}")


@app.command()
def fit(
    data: Data,
    out: Annotated[Path, typer.Option(help="Bundle to write.")] = Path("model.twin"),
    model: Annotated[str, typer.Option(help="Model family.")] = "dual",
    teacher: Teacher = "auto",
    weights: Weights = None,
    size: Annotated[int, typer.Option(help="Input side in pixels; 0 takes the teacher's default.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimiser steps; 0 takes the default.")] = 0,
    batch: Annotated[int, typer.Option(help="Images per step; 0 takes the default.")] = 0,
    lr: Annotated[float, typer.Option(help="Learning rate of the Encoder-Decoder; 0 takes the default.")] = 0.0,
    noisy_or: Annotated[str, typer.Option(help="Reading of the Noisy-OR objective: n1, n2 or n3.")] = "",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "",
    time_budget: Annotated[float, typer.Option(help="Stop training after so many seconds; 0: no limit.")] = 0.0,
    cache_gb: Annotated[float, typer.Option(help="Largest feature cache; 0 turns it off.")] = -1.0,
    seed: Seed = 0,
    layout: Annotated[str, typer.Option(help="Layout of DATA; auto detects it.")] = "auto",
    config: Annotated[Optional[Path], typer.Option(help="TOML file; options given here win.")] = None,  # noqa: UP045
    work: Annotated[Optional[Path], typer.Option(help="Folder for checkpoint and log.")] = None,  # noqa: UP045
    thin: Annotated[bool, typer.Option("--thin", help="Leave the teacher's weights out of the bundle.")] = False,
    random_teacher: Annotated[
        bool,
        typer.Option("--random-teacher", help="Random teacher weights, for tests of shape and speed only."),
    ] = False,
) -> None:
    """Learn what normal looks like from good images and write one bundle."""
    from twinspect.app import fit_command

    chosen: dict[str, dict[str, Any]] = {
        "model": {
            "model": model, "teacher": teacher, "weights": str(weights or ""), "size": size,
            "pretrained": not random_teacher,
        },
        "train": {
            "steps": steps or None, "batch": batch or None, "lr": lr or None, "noisy_or": noisy_or or None,
            "precision": precision or None, "time_budget_s": time_budget, "seed": seed,
            "cache_gb": cache_gb if cache_gb >= 0 else None,
        },
    }  # fmt: skip
    with _console() as console:
        fit_command(data, layout, config, chosen, out, work, thin, console)


@app.command("eval")
def evaluate(
    bundle: Bundle,
    data: Data,
    json_file: Annotated[str, typer.Option("--json", help="Write metrics as JSON to a file, or - to print.")] = "",
    layout: Annotated[str, typer.Option(help="Layout of DATA; auto detects it.")] = "auto",
    weights: Weights = None,
) -> None:
    """Measure a model on labelled test images: per class and mean, both students alone."""
    from twinspect.app import eval_command

    with _console(quiet=json_file == "-") as console:
        eval_command(bundle, data, layout, json_file, str(weights or ""), console)


@app.command()
def predict(
    bundle: Bundle,
    paths: Annotated[list[str], typer.Argument(help="Images, folders or quoted globs.")],
    out: Annotated[Optional[Path], typer.Option(help="Table to write: .parquet, .csv or .jsonl.")] = None,  # noqa: UP045
    maps: Annotated[Optional[Path], typer.Option(help="Folder for raw maps (float16 .npz).")] = None,  # noqa: UP045
    overlays: Annotated[Optional[Path], typer.Option(help="Folder for overlay pictures.")] = None,  # noqa: UP045
    batch: Annotated[int, typer.Option(help="Images per call of the model.")] = 4,
    weights: Weights = None,
) -> None:
    """Score images; one that cannot be read becomes a row with an error and the run goes on."""
    from twinspect.app import predict_command

    with _console() as console:
        predict_command(bundle, paths, out, maps, overlays, batch, str(weights or ""), console)


@app.command()
def info(
    bundle: Bundle,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a bundle holds: teacher, classes, training, threshold and its promise."""
    from twinspect.app import info_lines

    with _console() as console:
        content = info_lines(bundle)
        console.say(json.dumps(content, indent=1) if as_json else "\n".join(f"{k}: {v}" for k, v in content.items()))


def _console(quiet: bool = False) -> Console:
    from twinspect.console import Console

    return Console(quiet)


def run() -> None:
    """Entry point of ``python -m twinspect``."""
    app()


if __name__ == "__main__":
    sys.exit(run())
