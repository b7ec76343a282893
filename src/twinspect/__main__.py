"""``python -m twinspect``."""

from twinspect.cli import run

if __name__ == "__main__":
    run()
