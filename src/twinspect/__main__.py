"""``python -m twinspect``."""

from twinspect.cli import app

app()
