"""Compare settings, and any other detector, on the same labelled images with the same metrics.

python examples/benchmark.py data/ --effort fast default
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image

from twinspect import Detector, Sample
from twinspect.data import load
from twinspect.metrics import Evaluator


def distance_from_mean(train: list[Sample], test: list[Sample]) -> dict[str, float]:
    """A detector of your own in the place of this one: how far an image is from the mean of the good ones."""

    def small(sample: Sample) -> np.ndarray:
        return np.asarray(Image.open(sample.image).convert("RGB").resize((32, 32)), dtype=np.float64)

    means = {
        name: np.mean([small(s) for s in train if s.class_name == name], axis=0)
        for name in {s.class_name for s in train}
    }
    evaluator = Evaluator(pixel=False)
    for sample in test:
        score = float(np.abs(small(sample) - means[sample.class_name]).mean())
        evaluator.update(score, int(sample.label or 0), sample.class_name, sample.defect_type)
    return evaluator.compute()["mean"]


def trained(effort: str, train: list[Sample], test: list[Sample]) -> dict[str, float]:
    """Train and measure twinspect."""
    detector = Detector(effort=effort).fit(train)
    evaluator = Evaluator(pixel=False)
    for sample, result in zip(test, detector.predict([s.image for s in test], stream=True, maps=False), strict=True):
        evaluator.update(result.score, int(sample.label or 0), sample.class_name, sample.defect_type)
    return evaluator.compute()["mean"]


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data set with labelled test images")
    parser.add_argument("--effort", nargs="+", default=["fast", "default"], help="settings to compare")
    given = parser.parse_args()

    samples = load(given.data).samples
    train = [s for s in samples if s.split == "train" and s.label == 0]
    test = [s for s in samples if s.split == "test" and s.label is not None]
    print(f"{len(train)} good images to learn, {len(test)} to test")
    for name in ("distance from the mean", *given.effort):
        began = time.monotonic()
        own = name == "distance from the mean"
        found = distance_from_mean(train, test) if own else trained(name, train, test)
        print(f"{name}: image AUROC {found['image_auroc']:.3f}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
