"""What people see: lines, one progress bar with rate and time left, errors without tracebacks."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from twinspect.errors import TwinspectError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PLAIN_SECONDS = 10.0  # how often a stage reports where there is no terminal


class Console:
    """Context of a command: prints, shows progress, turns our own errors into exit code 2.

    Args:
        quiet: print nothing but what is asked for (progress and remarks go to stderr anyway).
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._began = self._said = 0.0
        self._first = 0

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
        if isinstance(error, TwinspectError):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if isinstance(error, KeyboardInterrupt):
            print(
                "stopped; training, or predict --out, resumes when the same command is typed again", file=sys.stderr
            )
            raise SystemExit(130) from None
        if isinstance(error, OSError) and error.filename and not isinstance(error, BrokenPipeError):
            print(f"error: {error.filename}: {error.strerror or error}", file=sys.stderr)
            raise SystemExit(2) from None

    def say(self, text: str) -> None:
        """One line on stdout."""
        self.finish()
        if not self.quiet:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """One line on stderr."""
        self.finish()
        print(f"note: {text}", file=sys.stderr, flush=True)

    def result(self, text: str) -> None:
        """What was asked for, on stdout, also when quiet."""
        self.finish()
        print(text, flush=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` of a stage is done (total 0: not known); the first word names the stage.

        Rate and time left count from the first call, so that what an earlier run did does not flatter them.
        """
        name = stage.split("  ")[0]
        if name != self._stage:
            self.finish()
            self._stage, self._began, self._said = name, time.monotonic(), time.monotonic()
            self._first = done
            self._open(name, total)
        rate = (done - self._first) / max(time.monotonic() - self._began, 1e-9)
        if self._bar is not None and self._task is not None:
            text = f"{stage}  {rate:.1f}/s" if done > self._first else stage
            self._bar.update(self._task, completed=done, total=total or None, description=text)
        elif time.monotonic() - self._said > _PLAIN_SECONDS:
            self._said = time.monotonic()
            left = f", {(total - done) / max(rate, 1e-9):.0f} s left" if total else ""
            print(f"{stage}: {done}/{total or '?'}, {rate:.1f}/s{left}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Close the bar of the stage that was running."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None
        self._stage = ""

    def _open(self, name: str, total: int) -> None:
        if not sys.stderr.isatty():
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=RichConsole(stderr=True),
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task(name, total=total or None)
