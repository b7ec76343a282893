"""``twinspect predict``: options to a `Job`, and its progress to the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from twinspect.commands.options import PredictOptions
from twinspect.console import FAILED_ON, NOTHING_SCORED, Console
from twinspect.errors import ConfigError
from twinspect.inference.bulk import Engine, run, say_totals
from twinspect.inference.job import Job
from twinspect.inference.pictures import PictureOptions
from twinspect.inference.stores import is_url

if TYPE_CHECKING:
    from twinspect.commands.review import Review
    from twinspect.inference.result import Result


def predict(options: PredictOptions, console: Console) -> None:
    """Run a job, with reports if they are asked for."""
    pictures = PictureOptions(
        options.maps, options.masks, options.overlays, options.submission, options.coco,
        options.overlay_format, options.overlay_side,
    )  # fmt: skip
    job = Job(
        str(options.bundle), options.paths, options.out, pictures, options.threads,
        options.batch, options.weights, options.device, options.class_name or None, options.workers,
        options.part_rows, shard_of(options.shard), options.restart, options.watch, options.fail_on,
    )  # fmt: skip
    engine, review = chosen_engine(options, job.keeps_parts), None
    if options.report:
        from twinspect.commands.results import check_outputs
        from twinspect.commands.review import Review

        check_outputs(options.report)
        if job.shard[1] > 1 or is_url(job.out):
            raise ConfigError("--report reads the whole table: give --out on this disk, and no --shard")
        review = Review()
    totals = run(job, console, engine, review.add if review is not None else None)
    (console.warn if job.on_stdout else console.say)(say_totals(totals, options.out))
    if review is not None:
        write_reports(options, job, review, console)
    if totals.nothing_scored:
        raise typer.Exit(NOTHING_SCORED)
    if totals.fails(options.fail_on):
        raise typer.Exit(FAILED_ON)


def write_reports(options: PredictOptions, job: Job, review: Review, console: Console) -> None:
    """Reports of a finished run; the images to look at are scored once more for their pictures."""
    from twinspect.commands.results import publish, shows_pictures
    from twinspect.inference.runtimes import load_predictor
    from twinspect.inference.sources import by_name
    from twinspect.report import Report, Section

    answers, name = review.answers(), Path(job.model).name

    def again(names: list[str]) -> Iterator[Result]:
        predictor = load_predictor(job.model, job.threads, job.batch, job.weights, job.device)
        return predictor.predict([by_name(name) for name in names], class_name=job.class_name)

    images = sum(len(review.columns(class_name)[0]) for class_name in review.classes)
    facts = {"model": name, "images": f"{images}", "not scored": f"{review.errors}"}
    values = {
        "errors": review.errors,
        "classes": {row[0]: {"images": row[1], "called anomalous": row[2]} for row in answers.rows},
        "other_thresholds": review.other_thresholds(),
    }
    pictures = review.sections(again if shows_pictures(options.report) else None)
    sections = [Section("Answers", (), (answers,), printed=False), *pictures]
    publish(Report(f"{name} on {', '.join(job.sources[:3])}", sections, facts, values), options, console)


def shard_of(text: str) -> tuple[int, int]:
    """``I/N`` as two numbers."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal()):
        raise ConfigError(f"--shard {text}: accepted I/N, such as 0/4 on the first of four machines")
    return int(number), int(of)


def chosen_engine(options: PredictOptions, keeps_parts: bool) -> Engine | None:
    """The engine of that name; None is this process."""
    ray = (options.actors, options.actor_cpus, options.actor_gpus, options.ray_address)
    if options.engine == "local":
        if ray != (0, 1.0, 0.0, ""):
            raise ConfigError("--actors, --actor-cpus, --actor-gpus and --ray-address need --engine ray")
        return None
    if not keeps_parts:
        raise ConfigError("--engine ray writes a table; give --out FILE")
    from twinspect.inference.on_ray import RayEngine

    return RayEngine(*ray)
