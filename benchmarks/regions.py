"""Do areas of regions measure defects? Ratio of a region's area to the mask's, on defect images with masks.

python benchmarks/regions.py model.twin DATA [--most 40]

Two ratios: of all regions to the whole mask, in images in which they overlap; and of the regions whose highest place
lies on the mask (2 % of the longer side around it) to the parts of the mask that they touch. Beside it the
intersection over union of regions and mask, the mean of all images with a region.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twinspect import data
from twinspect.data.samples import read_sample_mask
from twinspect.inference import load
from twinspect.inference.regions import components, region_mask, resize_map
from twinspect.inference.result import Result


def main() -> None:
    """Print one line a class, then all images together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--most", type=int, default=40, help="images of a class")
    options = parser.parse_args()
    predictor = load(options.model)
    samples = [s for s in data.load(options.data).samples if s.label == 1 and s.masks]
    every: list[tuple[float, float, float]] = []
    print(
        f"{'class':<20} {'images':>7} {'ratio':>7} {'0.5-2':>7} | {'on it':>7} {'ratio':>7} {'0.5-2':>7} | {'IoU':>5}"
    )
    for name in sorted({s.class_name for s in samples}):
        own = [s for s in samples if s.class_name == name]
        own = own[:: max(1, len(own) // options.most)][: options.most]
        found = []
        for sample, result in zip(own, predictor.predict(own, pixels=False, class_name=name), strict=True):
            if result.regions:
                found.append(measured(result, read_sample_mask(sample, (result.height, result.width))))
        every += found
        print(f"{name:<20} {said(found)}", flush=True)
    print(f"{'all':<20} {said(every)}")


def measured(result: Result, mask: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Both ratios of an image, NaN where nothing overlaps, and the intersection over union."""
    inside, heat = region_mask(result.grid, mask.shape, result.threshold_region), resize_map(result.grid, *mask.shape)
    near, regions = round(0.02 * max(mask.shape)), components(inside, heat)
    on_mask = np.zeros(mask.shape, bool)
    for i in range(len(regions.area_R)):
        own = regions.label_HW == i + 1
        y, x = np.unravel_index(np.where(own, heat, -np.inf).argmax(), mask.shape)
        if mask[max(0, y - near) : y + near + 1, max(0, x - near) : x + near + 1].any() and (own & mask).any():
            on_mask |= own
    label = components(mask, heat).label_HW
    touched = np.isin(label, np.setdiff1d(label[on_mask], 0))
    return (
        inside.sum() / mask.sum() if (inside & mask).any() else np.nan,
        on_mask.sum() / touched.sum() if on_mask.any() else np.nan,
        (inside & mask).sum() / (inside | mask).sum(),
    )


def said(found: list[tuple[float, float, float]]) -> str:
    """Images counted, median ratio, and share within half and twice, for both ratios; mean overlap."""
    values, parts = np.array(found).reshape(-1, 3), []
    for ratios in values.T[:2]:
        kept = ratios[np.isfinite(ratios)]
        inside = np.mean((kept >= 0.5) & (kept <= 2.0)) if len(kept) else np.nan
        parts.append(f"{len(kept):>7} {np.median(kept) if len(kept) else np.nan:>7.2f} {inside:>7.2f}")
    return " | ".join([*parts, f"{values[:, 2].mean() if len(values) else np.nan:>5.2f}"])


if __name__ == "__main__":
    main()
