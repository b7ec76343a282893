"""What people see: lines, one progress bar with rate and time left, errors without tracebacks."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from twinspect.errors import TwinspectError

if TYPE_CHECKING:
    from rich.progress import Progress

_PLAIN_SECONDS = 10.0  # how often a stage reports where there is no terminal
# What a terminal obeys, and what turns the direction of text; names of files may hold it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)
NOTHING_SCORED = 1  # exit code of a command that went through its images and could read none
FAILED_ON = 3  # of one that was asked to say by it that there were anomalies, or images that cannot be read
_SIGINT, _SIGPIPE, _SIGTERM = 130, 141, 143  # what a shell reports: Ctrl-C, the reader has gone, told to end


class Terminated(KeyboardInterrupt):
    """SIGTERM: from a service manager, a queue of jobs, ``docker stop`` or ``kill``."""


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does: children are ended, drafts are removed, a sentence is said."""

    def leave(_number: int, _frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, leave)


class Console:
    """Context of a command: prints, shows progress, turns our own errors into exit code 2."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet  # print nothing but what is asked for (progress and remarks go to stderr anyway)
        self._bar: Progress | None = None
        self._stage = ""
        self._began = self._shown_at = 0.0
        self._first = 0
        self._lost: OSError | None = None  # why nothing more can be printed

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
        if isinstance(error, KeyboardInterrupt):
            _say("stopped; if this was fit, or predict with a table, the same command goes on from here")
            raise SystemExit(_SIGTERM if isinstance(error, Terminated) else _SIGINT) from None
        if reason := _in_words(error):
            _stop(reason)
        if error is None and self._lost is not None and not isinstance(self._lost, BrokenPipeError):
            _stop(f"{_lost_words(self._lost)}; everything else is done")

    def say(self, *lines: str) -> None:
        """Lines on stdout. Where they cannot be written, the command does its work all the same."""
        self.finish()
        if lines and not self.quiet and self._lost is None:
            try:
                print(_harmless("\n".join(lines)), flush=True)
            except OSError as error:
                self._lost = error
                drop_output()

    def warn(self, *notes: str) -> None:
        """Lines on stderr."""
        self.finish()
        for note in notes:
            _say(f"note: {note}")

    def result(self, text: str) -> None:
        """What was asked for, on stdout, also when quiet.

        Raises:
            TwinspectError: it cannot be written.
            SystemExit: its reader has gone (``| head``).
        """
        self.finish()
        if sys.stdout is None:
            raise TwinspectError("standard output is closed, and the answer goes there; open it, or write to a file")
        try:
            print(_harmless(text), flush=True)
        except OSError as error:
            drop_output()
            if isinstance(error, BrokenPipeError):
                raise SystemExit(_SIGPIPE) from None
            raise TwinspectError(_lost_words(error)) from None

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` of a stage is done (total 0: not known); the first word names the stage.

        Rate and time left count from the first call, so that what an earlier run did does not flatter them.
        """
        name = stage.split("  ")[0]
        if name != self._stage:
            self.finish()
            self._stage, self._first, self._bar = name, done, _bar(name, total)
            self._began = self._shown_at = time.monotonic()
        rate = (done - self._first) / max(time.monotonic() - self._began, 1e-9)
        if self._bar is not None:
            text = f"{stage}  {rate:.1f}/s" if done > self._first and total != 1 else stage
            self._bar.update(self._bar.task_ids[0], completed=done, total=total or None, description=text)
        elif time.monotonic() - self._shown_at > _PLAIN_SECONDS:
            self._shown_at = time.monotonic()
            if total == 1:  # a single step has no rate
                _say(stage)
                return
            left = f", {(total - done) / max(rate, 1e-9):.0f} s left" if total else ""
            _say(f"{stage}: {done}/{total or '?'}, {rate:.1f}/s{left}")

    def finish(self) -> None:
        """Close the bar of the stage that was running."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._stage = None, ""


def _bar(name: str, total: int) -> Progress | None:
    """A running bar with one task; None where there is no terminal, or rich is not installed (the light install)."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=RichConsole(stderr=True))
    bar.add_task(name, total=total or None)
    bar.start()
    return bar


def plain_streams() -> None:
    """Let both streams take every name: letters that a code page lacks, and bytes that are no text, are escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _harmless(text: str) -> str:
    """Text with control characters written as numbers, but for ends of lines and tabs."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def drop_output() -> None:
    """Send to nowhere what standard output still holds, or Python would fail on it once more when it ends."""
    with suppress(OSError, ValueError, AttributeError):  # no file behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _in_words(error: BaseException | None) -> str:
    """What a person is told of an error that is no fault of the program; empty for a fault."""
    if isinstance(error, TwinspectError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError):
        return f"{error.filename or 'the system says'}: {error.strerror or error}"
    text = str(error).splitlines()[0] if str(error) else ""
    # torch raises a RuntimeError of its own; asking for its class would load torch.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(text)):
        text = text or "for the next array"
        return f"not enough memory ({text}); a smaller --size, --batch or --workers needs less"
    return ""


def end_lost(error: OSError) -> NoReturn:
    """End a command whose output was lost, with a sentence and exit code 2."""
    drop_output()
    _stop(_lost_words(error))


def _lost_words(error: OSError) -> str:
    return f"standard output cannot be written ({error.strerror or error})"


def _stop(reason: str) -> NoReturn:
    _say(f"error: {reason}")
    raise SystemExit(2) from None


def _say(text: str) -> None:
    """One line on stderr, if somebody listens."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(_harmless(text), file=sys.stderr, flush=True)
