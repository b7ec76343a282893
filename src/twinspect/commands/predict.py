"""``twinspect predict``: options to a `Job`, and its progress to the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from twinspect.commands.review import Review
    from twinspect.console import Console
    from twinspect.inference.bulk import Engine
    from twinspect.inference.job import Job
    from twinspect.inference.result import Result


def predict(
    bundle: Annotated[Path, typer.Argument(help="Trained model (.twin) or exported model.")],
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Images, folders, quoted globs, @lists, tar and zip files, tables, URLs, videos, camera:0, "
            "rtsp://..., or @- for paths from standard input."
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            help="Table to write: .parquet, .csv, .jsonl, or a folder (DIR/, or a URL) of Parquet parts; - prints "
            "rows as JSON lines, -.csv as CSV."
        ),
    ] = "",
    class_name: Annotated[str, typer.Option("--class", help="Class of all images; empty predicts it.")] = "",
    maps: Annotated[str, typer.Option(help="Folder for raw maps (float16).")] = "",
    map_format: Annotated[str, typer.Option(help="npz or tiff.")] = "npz",
    masks: Annotated[str, typer.Option(help="Folder for masks (PNG, 255 in the regions).")] = "",
    overlays: Annotated[str, typer.Option(help="Folder for pictures: image under its map, regions, answer.")] = "",
    overlay_format: Annotated[str, typer.Option(help="jpg or png.")] = "jpg",
    overlay_side: Annotated[int, typer.Option(help="Their longest side in pixels; 0: the image's own.")] = 1600,
    coco: Annotated[str, typer.Option(help="COCO file of all regions.")] = "",
    report: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="Report file: .html (with charts and the images to look at), .md or .json."),
    ] = None,
    submission: Annotated[
        str, typer.Option(help="Folder for MVTec AD 2's submission: maps and thresholded maps.")
    ] = "",
    batch: Annotated[
        int, typer.Option(help="Images per call of the model; 0: one for each CPU thread, 16 on a GPU.")
    ] = 0,
    workers: Annotated[int, typer.Option(help="Processes that decode; -1: automatic, 0: threads.")] = -1,
    weights: Annotated[Optional[Path], typer.Option(help="Local weights file of the teacher.")] = None,  # noqa: UP045
    runtime: Annotated[
        str, typer.Option(help="auto, torch, onnx or openvino; auto is what the file was made for.")
    ] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of the runtime; 0 is its own choice.")] = 0,
    device: Annotated[str, typer.Option(help="Of a bundle: auto, cpu, cuda or cuda:1.")] = "auto",
    part_rows: Annotated[int, typer.Option(help="Rows written at a time; 0: 256, or 4096 in a folder.")] = 0,
    watch: Annotated[bool, typer.Option("--watch", help="Go on with images that arrive in the folders.")] = False,
    fail_on: Annotated[
        str,
        typer.Option(help="Exit code 3: anomaly: an image is one, or cannot be read; error: one cannot be read."),
    ] = "",
    restart: Annotated[bool, typer.Option("--restart", help="Drop what an unfinished run left.")] = False,
    shard: Annotated[str, typer.Option(help="I/N: only this machine's share, into one folder.")] = "0/1",
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    actors: Annotated[int, typer.Option(help="Ray: models; 0: as many as fit.")] = 0,
    actor_cpus: Annotated[float, typer.Option(help="Ray: CPUs of an actor.")] = 1.0,
    actor_gpus: Annotated[float, typer.Option(help="Ray: GPUs of an actor.")] = 0.0,
    ray_address: Annotated[str, typer.Option(help="Ray: running cluster.")] = "",
) -> None:
    """Score images; one that cannot be read becomes a row with an error, and a run that was killed goes on.

    Of a source without an end (camera, network stream, --watch) each image is answered before the next is asked for,
    and --fail-on ends the run. Exit code 1: none of the images could be read.
    """
    from twinspect.console import FAILED_ON, NOTHING_SCORED, Console

    with Console() as console:
        from twinspect.inference.bulk import run, say_totals
        from twinspect.inference.job import Job
        from twinspect.inference.pictures import PictureOptions

        pictures = PictureOptions(
            maps, map_format, masks, overlays, submission, bool(coco), overlay_format, overlay_side
        )
        job = Job(
            str(bundle), tuple(paths), out, pictures, coco, runtime, threads, batch, str(weights or ""), device,
            class_name or None, workers, part_rows, shard_of(shard), restart, watch, fail_on,
        )  # fmt: skip
        chosen = chosen_engine(engine, job.keeps_parts, actors, actor_cpus, actor_gpus, ray_address)
        review = reviewed(job, report or [])
        totals = run(job, console, chosen, review.add if review is not None else None)
        (console.warn if job.on_stdout else console.say)(say_totals(totals, out))
        if review is not None:
            write_reports(job, report or [], review, console)
        if totals.nothing_scored:
            raise typer.Exit(NOTHING_SCORED)
        if totals.fails(fail_on):
            raise typer.Exit(FAILED_ON)


def reviewed(job: Job, reports: Sequence[Path]) -> Review | None:
    """What gathers rows for reports, or None where none are wanted.

    Raises:
        ConfigError: a report that cannot be written, or whose rows lie on several machines.
    """
    if not reports:
        return None
    from twinspect.commands.results import check_outputs
    from twinspect.commands.review import Review
    from twinspect.errors import ConfigError
    from twinspect.inference.remote import is_url

    check_outputs(reports)
    if job.shard[1] > 1 or is_url(job.out):
        raise ConfigError("--report reads the whole table: give --out on this disk, and no --shard")
    return Review()


def write_reports(job: Job, reports: Sequence[Path], review: Review, console: Console) -> None:
    """Reports of a finished run; the images to look at are scored once more for their pictures."""
    from twinspect.commands.results import write_results
    from twinspect.inference.runtimes import load_predictor
    from twinspect.inference.sources import named
    from twinspect.report import Section

    def again(names: list[str]) -> Iterator[Result]:
        predictor = load_predictor(job.model, job.runtime, job.threads, job.batch, job.weights, job.device)
        return predictor.predict(list(named(names)), class_name=job.class_name)

    answers = review.answers()
    values = {
        "errors": review.errors,
        "classes": {str(name): dict(zip(answers.columns[1:3], rest, strict=False)) for name, *rest in answers.rows},
        "other_thresholds": review.other_thresholds(),
    }
    images = sum(len(review.columns(name)[0]) for name in review.classes)
    facts = {"model": Path(job.model).name, "images": f"{images}", "not scored": f"{review.errors}"}
    for path in reports:
        more = review.sections(again if path.suffix.lower() == ".html" else None)
        title = f"{Path(job.model).name} on {', '.join(job.sources[:3])}"
        write_results(path, title, [Section("Answers", (), (answers,)), *more], facts, values)
        console.say(f"wrote {path}")


def shard_of(text: str) -> tuple[int, int]:
    """``I/N`` as two numbers.

    Raises:
        ConfigError: anything else.
    """
    from twinspect.errors import ConfigError

    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal()):
        raise ConfigError(f"--shard {text}: accepted I/N, such as 0/4 on the first of four machines")
    return int(number), int(of)


def chosen_engine(name: str, keeps_parts: bool, actors: int, cpus: float, gpus: float, address: str) -> Engine | None:
    """The engine of that name; None is this process.

    Raises:
        ConfigError: an unknown name, Ray without a table, or Ray's options without Ray.
    """
    from twinspect.errors import ConfigError, unknown_name

    if name not in ("local", "ray"):
        raise ConfigError(unknown_name("engine", name, ("local", "ray")))
    if name == "local":
        if actors or gpus or address or cpus != 1.0:
            raise ConfigError("--actors, --actor-cpus, --actor-gpus and --ray-address need --engine ray")
        return None
    if not keeps_parts:
        raise ConfigError("--engine ray writes a table; give --out FILE")
    from twinspect.inference.on_ray import RayEngine

    return RayEngine(actors, cpus, gpus, address)
