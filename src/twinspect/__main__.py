"""``python -m twinspect``."""

from twinspect.cli import app

if __name__ == "__main__":
    app()
