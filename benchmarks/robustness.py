"""How often good images turn bad when the camera changes, with and without `fit --tolerate`.

    python benchmarks/robustness.py DATA [--classes a,b] [--train 40] [--test 12] [--tolerate jpeg,light,shift]

DATA holds a folder per class in the layout of MVTec AD. One model a class, of its first training images, with the
settings of `--effort fast`. Its test images, good and defective, are scored as they are and altered: good ones that
are called bad, and defects found. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twinspect import Detector
from twinspect.config import ModelConfig, RunConfig, TrainConfig, of_effort
from twinspect.data import load
from twinspect.data.samples import read_sample_rgb
from twinspect.training.derived import lit, packed, shifted
from twinspect.types import TEST, TRAIN, Sample

CHANGES: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    "as it is": lambda pixels: pixels,
    "JPEG 60": lambda pixels: packed(pixels, 60),
    "light +10 %": lambda pixels: lit(pixels, 1.1),
    "light -10 %": lambda pixels: lit(pixels, 0.9),
    "shift 2 %": lambda pixels: shifted(pixels, 0.02, 0.02),
}


def some(samples: Sequence[Sample], count: int) -> list[Sample]:
    """So many, spread over all."""
    return [samples[int(i)] for i in np.linspace(0, len(samples) - 1, min(count, len(samples)))]


def called(detector: Detector, samples: Sequence[Sample]) -> dict[str, float]:
    """Share called bad under every change."""
    pixels = [read_sample_rgb(sample) for sample in samples]
    found = {}
    for name, change in CHANGES.items():
        results = detector.predict([change(one) for one in pixels], maps=False)
        found[name] = sum(bool(one.is_anomaly) for one in results) / len(results)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--classes", default="")
    parser.add_argument("--train", type=int, default=40)
    parser.add_argument("--test", type=int, default=12)
    parser.add_argument("--tolerate", default="jpeg,light,shift")
    given = parser.parse_args(arguments)
    dial = of_effort("fast")
    config = RunConfig(ModelConfig(**dial["model"]), TrainConfig(**dial["train"]))
    rows = []
    samples = load(given.data).samples
    for name in sorted(
        {s.class_name for s in samples} & set(given.classes.split(",")) or {s.class_name for s in samples}
    ):
        own = [s for s in samples if s.class_name == name]
        train = some([s for s in own if s.split == TRAIN], given.train)
        good, bad = (some([s for s in own if s.split == TEST and s.label == label], given.test) for label in (0, 1))
        for tolerate in ("", given.tolerate):
            settings = replace(config, train=replace(config.train, tolerate=tolerate))
            detector = Detector(config=settings).fit(train)
            row = {"class": name, "tolerate": tolerate, "good": called(detector, good), "bad": called(detector, bad)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    for tolerate in ("", given.tolerate):
        for label in ("good", "bad"):
            mean = {c: np.mean([r[label][c] for r in rows if r["tolerate"] == tolerate]) for c in CHANGES}
            print(f"{tolerate or '-':18} {label}: " + ", ".join(f"{c} {value:.3f}" for c, value in mean.items()))
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
