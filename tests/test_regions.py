"""Region lists: boxes and areas in original pixels, against a literal flood fill; a budget per image."""

from __future__ import annotations

import numpy as np
import pytest

from twinspect.inference import result as regions
from twinspect.inference.result import find_regions, resize_map

PEAKS = np.arange(1.0, 100.0)


def flood(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """8-connected regions, literally."""
    left, found = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        waiting, region = [left.pop()], set()
        while waiting:
            y, x = waiting.pop()
            region.add((int(y), int(x)))
            near = {(y + a, x + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            waiting += near
        found.append(region)
    return found


@pytest.mark.parametrize("shape", [(20, 20), (64, 48), (33, 90), (7, 5)])
def test_regions_against_flood_fill(shape: tuple[int, int]) -> None:
    grid = np.random.default_rng(0).random((20, 20), dtype=np.float32)
    grid[3:6, 4:9] += 2
    found = find_regions(grid, shape, 0.9, PEAKS)
    resized = resize_map(grid, *shape)
    expected = flood(resized >= 0.9)
    assert len(found) == len(expected)
    assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)
    ours = {(r.x, r.y, r.width, r.height, r.area, round(r.score, 5)) for r in found}
    theirs = set()
    for pixels in expected:
        ys, xs = [p[0] for p in pixels], [p[1] for p in pixels]
        score = round(float(max(resized[p] for p in pixels)), 5)
        theirs.add((min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1, len(pixels), score))
    assert ours == theirs


def test_p_value_of_a_region_counts_good_maps() -> None:
    grid = np.zeros((8, 8), np.float32)
    grid[2, 2] = 95.0
    (region,) = find_regions(grid, (8, 8), 90.0, PEAKS)
    assert region.p_value == pytest.approx((1 + 5) / 100)
    assert region.to_dict() == {
        "x": 2, "y": 2, "width": 1, "height": 1, "area": 1, "score": 95.0, "p_value": region.p_value,
    }  # fmt: skip


def test_a_quiet_map_has_no_region_whatever_its_size() -> None:
    grid = np.random.default_rng(0).random((16, 16), dtype=np.float32)
    for shape in ((16, 16), (500, 300), (3, 3)):
        assert find_regions(grid, shape, float(np.nextafter(grid.max(), np.float32(9))), PEAKS) == []


def test_large_images_are_measured_on_a_smaller_map(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = np.zeros((32, 32), np.float32)
    grid[8:16, 4:12] = 50.0
    exact = find_regions(grid, (600, 900), 10.0, PEAKS)[0]
    monkeypatch.setattr(regions, "MOST_PIXELS", 20_000)
    rough = find_regions(grid, (600, 900), 10.0, PEAKS)[0]
    assert rough.area == pytest.approx(exact.area, rel=0.1)
    for name in ("x", "y", "width", "height"):
        assert getattr(rough, name) == pytest.approx(getattr(exact, name), abs=12)
    assert rough.x + rough.width <= 900
    assert rough.y + rough.height <= 600


def test_a_noisy_map_lists_the_strongest_hundred() -> None:
    grid = np.zeros((64, 64), np.float32)
    grid[::3, ::3] = np.random.default_rng(0).random((22, 22)) + 1
    found = find_regions(grid, (64, 64), 0.5, PEAKS)
    assert len(found) == regions.MOST_REGIONS
    assert found[0].score == pytest.approx(float(grid.max()))
