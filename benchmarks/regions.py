"""Do areas of regions measure defects? Ratio of a region's area to the mask's, on defect images with masks.

python benchmarks/regions.py model.twin DATA [--most 40]

Counted are images in which a region overlaps the mask; beside it the same for pixels above the threshold alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from twinspect import data
from twinspect.data.samples import read_sample_mask
from twinspect.inference import load
from twinspect.inference.regions import region_mask, resize_map


def main() -> None:
    """Print one line a class, then all images together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--most", type=int, default=40, help="images of a class")
    options = parser.parse_args()
    predictor = load(options.model)
    samples = [s for s in data.load(options.data).samples if s.label == 1 and s.masks]
    every: list[tuple[float, float]] = []
    print(f"{'class':<20} {'images':>7} {'ratio':>7} {'0.5-2':>7} | {'at one':>7} {'ratio':>7} {'0.5-2':>7}")
    for name in sorted({s.class_name for s in samples}):
        own = [s for s in samples if s.class_name == name]
        own = own[:: max(1, len(own) // options.most)][: options.most]
        found = []
        for sample, result in zip(own, predictor.predict(own, pixels=False, class_name=name), strict=True):
            shape = (result.height, result.width)
            mask = read_sample_mask(sample, shape)
            both = (
                region_mask(result.grid, shape, result.threshold_region),
                resize_map(result.grid, *shape) >= result.threshold_region,
            )
            found.append(tuple(one.sum() / mask.sum() if (one & mask).any() else np.nan for one in both))
        every += found
        print(f"{name:<20} {said(found)}", flush=True)
    print(f"{'all':<20} {said(every)}")


def said(found: list[tuple[float, ...]]) -> str:
    """Images counted, median ratio, and share within half and twice, for both ways."""
    parts = []
    for ratios in np.array(found).T:
        kept = ratios[np.isfinite(ratios)]
        inside = np.mean((kept >= 0.5) & (kept <= 2.0)) if len(kept) else np.nan
        parts.append(f"{len(kept):>7} {np.median(kept) if len(kept) else np.nan:>7.2f} {inside:>7.2f}")
    return " | ".join(parts)


if __name__ == "__main__":
    main()
