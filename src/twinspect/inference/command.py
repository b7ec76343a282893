"""``twinspect predict`` and ``info`` of the light install: exported models only, standard library and numpy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from twinspect._version import __version__
from twinspect.errors import TwinspectError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        return _info(given.model) if given.command == "info" else _predict(given)
    except TwinspectError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("twinspect", description="Runs exported twinspect models without torch.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    predict = commands.add_parser("predict", help="score images")
    predict.add_argument("model", type=Path, help="exported model (.onnx)")
    predict.add_argument("paths", nargs="+", help="images, folders or quoted globs")
    predict.add_argument("--out", type=Path, help="table to write: .csv or .jsonl")
    predict.add_argument("--threads", type=int, default=0, help="threads of the runtime; 0 is its own choice")
    predict.add_argument("--batch", type=int, default=0, help="images per call; 0 is 1")
    predict.add_argument("--class", dest="class_name", default=None, help="class of all images")
    commands.add_parser("info", help="say what a model is").add_argument("model", type=Path)
    return parser


def _info(model: Path) -> int:
    from twinspect.inference.exported import export_info

    print(json.dumps(export_info(model), indent=1))
    return 0


def _predict(given: argparse.Namespace) -> int:
    from twinspect.inference import load
    from twinspect.inference.table import TableWriter

    predictor = load(given.model, threads=given.threads, batch=given.batch)
    writer = TableWriter(given.out) if given.out else None
    for result in predictor.predict(given.paths, maps=False, pixels=False, class_name=given.class_name):
        if writer is not None:
            writer.add(result.row())
        else:
            print(f"{result.error or result.answer:<8} {result.score:9.3f}  {result.class_name}  {result.path}")
    if writer is not None:
        writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
