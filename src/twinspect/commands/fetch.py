"""``twinspect fetch``: the only command that downloads."""

from __future__ import annotations

from twinspect.commands.options import FetchOptions
from twinspect.console import Console
from twinspect.models.fetch import fetch_lines


def fetch(options: FetchOptions, console: Console) -> None:
    """Download, verify and record a teacher's weights."""
    for line in fetch_lines(options.name, options.revision, options.sha256, console.progress):
        console.say(line)
