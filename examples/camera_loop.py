"""Answer images as a camera delivers them, one by one, and say how long each took.

python examples/camera_loop.py model.twin --camera 0        a camera, through the package opencv-python-headless
python examples/camera_loop.py model.twin --folder shots/   a folder instead, for a try without a camera
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twinspect.inference import load


def from_camera(number: int) -> Iterator[Any]:
    """Images of a camera, H x W x 3, RGB, until it stops."""
    import cv2

    camera = cv2.VideoCapture(number)
    try:
        while True:
            there, picture = camera.read()
            if not there:
                return
            yield np.ascontiguousarray(picture[:, :, ::-1])  # OpenCV delivers BGR, which would score wrongly
    finally:
        camera.release()


def from_folder(folder: Path) -> Iterator[Any]:
    """Images of a folder in the order of their names, as a camera would deliver them."""
    for path in sorted(folder.iterdir()):
        yield np.asarray(Image.open(path).convert("RGB"))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model.twin, or an export such as model.onnx")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--camera", type=int, help="number of a camera")
    source.add_argument("--folder", type=Path, help="folder of images")
    parser.add_argument("--class", dest="class_name", help="product on the line, if you know it")
    given = parser.parse_args()

    predictor = load(given.model)
    pictures = from_camera(given.camera) if given.folder is None else from_folder(given.folder)
    began = time.perf_counter()
    # A generator is answered image by image, before its next image is taken.
    for number, result in enumerate(predictor.predict(pictures, class_name=given.class_name)):
        now = time.perf_counter()
        print(f"{number}: {result.answer}, score {result.score:.2f} of {result.threshold:.2f}, {now - began:.3f} s")
        began = now


if __name__ == "__main__":
    main()
