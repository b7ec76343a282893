"""``twinspect predict`` and ``info`` of the light install: exported models only, standard library and numpy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from twinspect._version import __version__
from twinspect.console import NOTHING_SCORED, Console, end_on_sigterm, plain_streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    plain_streams()
    end_on_sigterm()
    try:
        with Console() as console:
            if options.command == "predict":
                return _predict(options, console)
            from twinspect.inference.runtimes import export_info

            console.result(json.dumps(export_info(options.model), indent=1))
            return 0
    except SystemExit as stopped:
        return int(stopped.code or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("twinspect", description="Runs exported twinspect models without torch.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="score images")
    predict.add_argument("model", type=Path, help="exported model (.onnx)")
    predict.add_argument("paths", nargs="+", help="images, folders, quoted globs, @lists, tar or zip files")
    predict.add_argument("-o", "--out", default="", help="table to write: .csv or .jsonl; - prints JSON lines")
    predict.add_argument("--threads", type=int, default=0, help="threads of the runtime; 0 is its own choice")
    predict.add_argument("--batch", type=int, default=0, help="images per call; 0 is 1")
    predict.add_argument("--class", dest="class_name", default=None, help="class of all images")
    predict.add_argument("--workers", type=int, default=-1, help="decoding processes; -1 is automatic, 0 is threads")
    predict.add_argument("--restart", action="store_true", help="drop what an unfinished run left")
    commands.add_parser("info", help="say what a model is").add_argument("model", type=Path)
    return parser


def _predict(options: argparse.Namespace, console: Console) -> int:
    from twinspect.inference.bulk import run, say_totals
    from twinspect.inference.job import Job

    job = Job(
        str(options.model), tuple(options.paths), options.out, threads=options.threads, batch=options.batch,
        class_name=options.class_name, workers=options.workers, restart=options.restart,
    )  # fmt: skip
    totals = run(job, console)
    (console.warn if job.on_stdout else console.say)(say_totals(totals, job.out))
    return NOTHING_SCORED if totals.nothing_scored else 0


if __name__ == "__main__":
    sys.exit(main())
