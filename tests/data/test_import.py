"""Importing the data package is cheap: no torch, no pyarrow."""

import subprocess
import sys


def test_no_heavy_import() -> None:
    code = (
        "import sys, twinspect.data.protocols\n"
        "print([name for name in ('torch', 'pyarrow', 'pandas', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
