"""Large pictures with a small spot: found as a whole, and in tiles?

    python benchmarks/large.py [--size 512] [--good 10] [--spot 15]

Pictures of 5000 x 4000 pixels are painted (a metal sheet: a gradient, fine lines, grain) and kept as JPEG.
A model without students sees them as a whole, another one with --tiles auto. Then good pictures and ones with a dark
spot somewhere are scored. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import zoom

from twinspect import Detector
from twinspect.config import ModelConfig, RunConfig, TrainConfig

HEIGHT, WIDTH = 4000, 5000


def sheet(number: int, spot: int, path: Path) -> tuple[int, int]:
    """Write one picture; where the spot is."""
    rng = np.random.default_rng(number)
    lines = rng.normal(0, 3, HEIGHT)[:, None] + 25 * np.linspace(-1, 1, WIDTH)[None] ** 2
    grain = zoom(rng.normal(0, 14, (HEIGHT // 8, WIDTH // 8)), 8, order=1)  # spots of about the defect's size
    grey = 140 + lines + grain + rng.normal(0, 4, (HEIGHT, WIDTH))
    y, x = (int(rng.integers(60, side - 60)) for side in (HEIGHT, WIDTH))
    if spot:
        away = np.hypot(*np.ogrid[-60:60, -60:60])
        grey[y - 60 : y + 60, x - 60 : x + 60] -= 70 * (away <= spot / 2)
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB").save(path, quality=95)
    return y, x


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--good", type=int, default=10)
    parser.add_argument("--spot", type=int, default=15)
    given = parser.parse_args(arguments)
    found = []
    with tempfile.TemporaryDirectory() as room:
        train, good, bad = (Path(room) / name for name in ("train", "good", "bad"))
        for folder in (train, good, bad):
            folder.mkdir()
        for number in range(given.good):
            sheet(number, 0, train / f"{number}.jpg")
        for number in range(4):
            sheet(100 + number, 0, good / f"{number}.jpg")
        places = [sheet(200 + number, given.spot, bad / f"{number}.jpg") for number in range(4)]
        for tiles in ("", "auto"):
            began = time.perf_counter()
            config = RunConfig(ModelConfig(size=given.size, tiles=tiles), TrainConfig(steps=0))
            detector = Detector(config=config).fit(sorted(train.iterdir()))
            fitted = time.perf_counter()
            predictor = detector.predictor()
            kept = [predictor.predict(folder, pixels=False) for folder in (good, bad)]
            good_results, bad_results = (list(one) for one in kept)
            seconds = (time.perf_counter() - fitted) / 8
            near = []
            for result, place in zip(bad_results, places, strict=True):
                peak = np.unravel_index(result.grid.argmax(), result.grid.shape)
                scale = np.array([HEIGHT, WIDTH]) / result.grid.shape
                near.append(float(np.hypot(*((np.array(peak) + 0.5) * scale - place))))
            row = {
                "tiles": detector.config.model.tiles or "1x1", "found": sum(bool(r.is_anomaly) for r in bad_results),
                "of": len(bad_results), "peak_off_px": [round(one) for one in near],
                "severity": [round(r.severity, 2) for r in bad_results],
                "good_severity": [round(r.severity, 2) for r in good_results],
                "fit_s": round(fitted - began), "s_per_picture": round(seconds, 1),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }  # fmt: skip
            found.append(row)
            print(json.dumps(row), flush=True)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
