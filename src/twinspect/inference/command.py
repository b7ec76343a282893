"""``twinspect predict`` and ``info`` of the light install: exported models only, standard library and numpy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from twinspect._version import __version__
from twinspect.bundle import read_meta
from twinspect.config import flag_of
from twinspect.console import NOTHING_SCORED, Console, end_on_sigterm, plain_streams
from twinspect.inference.job import Job

# The options of `Job` that need nothing which this install lacks.
_OFFERED = ("out", "class_name", "batch", "threads", "workers", "restart")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    plain_streams()
    end_on_sigterm()
    try:
        with Console() as console:
            if options.pop("command") == "predict":
                return _predict(Job(**{**options, "sources": tuple(options["sources"])}), console)
            meta = read_meta(options["model"])
            facts = {"written by": f"twinspect {meta['twinspect']}", "model_id": meta["decision"].get("model_id", "")}
            if "runtime" in meta:  # an export
                made_for = f"{meta['runtime']}, {meta['size']} x {meta['size']}, uint8 RGB, channels last"
                facts |= {"export": made_for, "compared with torch": meta["check"]}
            console.result(json.dumps(facts | meta["record"], indent=1))
            return 0
    except SystemExit as stopped:
        return int(stopped.code or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("twinspect", description="Runs exported twinspect models without torch.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="score images")
    predict.add_argument("model", type=Path, help="exported model (.onnx)")
    predict.add_argument("sources", nargs="+", help="images, folders, quoted globs, @lists, tar or zip files")
    for option in (option for option in fields(Job) if option.name in _OFFERED):
        flags = ["-o"] * (option.name == "out") + [flag_of(option)]
        shared = {"dest": option.name, "default": option.default, "help": option.metadata["help"]}
        if isinstance(option.default, bool):
            predict.add_argument(*flags, action="store_true", **shared)
        else:
            predict.add_argument(*flags, type=type(option.default), **shared)
    commands.add_parser("info", help="say what a model is").add_argument("model", type=Path)
    return parser


def _predict(job: Job, console: Console) -> int:
    from twinspect.inference.bulk import run, say_totals

    totals = run(job, console)
    (console.warn if job.prints_rows else console.say)(say_totals(totals, job.out))
    return NOTHING_SCORED if totals.nothing_scored else 0


if __name__ == "__main__":
    sys.exit(main())
