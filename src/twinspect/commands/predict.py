"""``twinspect predict``: a `Job`, its progress and reports.

`main` is the command line of the light install, which lacks what makes the other one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from twinspect._version import __version__
from twinspect.config import flag_of
from twinspect.console import FAILED_ON, NOTHING_SCORED, Console, end_on_sigterm, plain_streams
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


# ------------------------------------------------------------------------------------- the light install

# The options that need nothing which this install lacks.
_LIGHT = ("out", "class_name", "batch", "threads", "workers", "restart")


def main(arguments: Sequence[str] | None = None) -> int:
    """``twinspect predict`` of exported models with numpy and the standard library; the exit code."""
    options = vars(_parser().parse_args(arguments))
    plain_streams()
    end_on_sigterm()
    job = Job(**{**options, "sources": tuple(options["sources"])})
    try:
        with Console() as console:
            predict(job, console)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("twinspect", description="Runs exported twinspect models without torch.")
    parser.add_argument("--version", action="version", version=__version__)
    command = parser.add_subparsers(required=True).add_parser("predict", help="score images")
    command.add_argument("model", type=Path, help="exported model (.onnx)")
    command.add_argument("sources", nargs="+", help="images, folders, quoted globs, @lists, tar or zip files")
    for row in (row for row in fields(Job) if row.name in _LIGHT):
        flags = ["-o"] * (row.name == "out") + [flag_of(row)]
        shared = {"dest": row.name, "default": row.default, "help": row.metadata["help"]}
        if isinstance(row.default, bool):
            command.add_argument(*flags, action="store_true", **shared)
        else:
            command.add_argument(*flags, type=type(row.default), **shared)
    return parser


if __name__ == "__main__":
    sys.exit(main())
