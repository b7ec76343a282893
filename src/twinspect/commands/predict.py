"""``twinspect predict``: a `Job`, its progress and reports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from twinspect.console import FAILED_ON, NOTHING_SCORED, Console
from twinspect.errors import ConfigError
from twinspect.files import is_url
from twinspect.inference.bulk import run, say_totals
from twinspect.inference.job import Job
from twinspect.inference.outputs import places

if TYPE_CHECKING:
    from twinspect.commands.results import Review
    from twinspect.inference.result import Result


def predict(job: Job, console: Console) -> None:
    """Run a job, with reports if they are asked for."""
    review = None
    if job.report:
        from twinspect.commands.results import Review, check_outputs

        check_outputs(job.report)
        if job.share[1] > 1 or is_url(job.out):
            raise ConfigError("--report reads the whole table: give --out on this disk, and no --shard")
        review = Review()
    if job.keeps_parts and not is_url(job.out) and not (folder := Path(job.out).parent).exists():
        console.warn(f"--out {job.out}: the folder {folder} is not there; it is made")
    totals = run(job, console, review.add if review is not None else None)
    say = console.warn if job.prints_rows else console.say
    say(say_totals(totals, job.out), *(f"{option[2:]}: {os.path.dirname(file)}" for option, file in places(job)))
    if review is not None:
        write_reports(job, review, console)
    if totals.nothing_scored:
        raise SystemExit(NOTHING_SCORED)
    if totals.fails(job.fail_on):
        raise SystemExit(FAILED_ON)


def write_reports(job: Job, review: Review, console: Console) -> None:
    """Reports of a finished run; the images to look at are scored once more for their pictures."""
    from twinspect.commands.results import publish, shows_pictures
    from twinspect.inference.predictor import load_predictor
    from twinspect.inference.sources import by_name
    from twinspect.report import Report, Section

    answers, name = review.answers(), job.model.name

    def again(names: list[str]) -> Iterator[Result]:
        predictor = load_predictor(job.model, job.threads, job.batch, job.device, job.precision)
        return predictor.predict([by_name(name) for name in names], class_name=job.class_name or None)

    images = sum(len(review.columns(class_name)[0]) for class_name in review.classes)
    facts = {"model": name, "images": f"{images}", "not scored": f"{review.errors}"}
    values = {
        "errors": review.errors,
        "classes": {row[0]: {"images": row[1], "called anomalous": row[2]} for row in answers.rows},
        "other_thresholds": review.other_thresholds(),
    }
    pictures = review.sections(again if shows_pictures(job.report) else None)
    sections = [Section("Answers", (), (answers,), printed=False), *pictures, *review.remarks()]
    publish(Report(f"{name} on {', '.join(job.sources[:3])}", sections, facts, values), job, console)
