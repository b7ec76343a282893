"""Answer images as a camera delivers them, one by one, say how long each took, and act on what is found.

python examples/camera_loop.py model.twin camera:0             a camera (needs the extra video)
python examples/camera_loop.py model.twin rtsp://10.0.0.7/1    a network stream, or the name of a video file
python examples/camera_loop.py model.twin shots/               a folder, for a try without a camera
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from twinspect.inference import load


def act(name: str, score: float) -> None:
    """What your line does with an anomaly: stop the belt, switch a lamp, keep the picture."""
    print(f"  anomaly: {name}, score {score:.2f}")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model.twin, or an export such as model.onnx")
    parser.add_argument("source", help="camera:0, rtsp://..., a video file or a folder")
    parser.add_argument("--class", dest="class_name", help="product on the line, if you know it")
    given = parser.parse_args()

    predictor = load(given.model)
    began = time.perf_counter()
    # Each image is answered before the next one is taken; of a camera that is always its newest one.
    for number, result in enumerate(predictor.predict(given.source, class_name=given.class_name)):
        now = time.perf_counter()
        print(f"{number}: {result.error or result.answer}, severity {result.severity:.2f}, {now - began:.3f} s")
        began = now
        if result.is_anomaly:
            act(result.path, result.score)


if __name__ == "__main__":
    main()
