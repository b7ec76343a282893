"""Region lists: boxes and areas in original pixels, against a literal flood fill; a budget per image."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from twinspect.inference import regions
from twinspect.inference.regions import find_regions, resize_map, strongest_place

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


def literal(grid: np.ndarray, shape: tuple[int, int], threshold: float) -> list[set[tuple[int, int]]]:
    """Regions as `regions.connected` says in words, pixel by pixel."""
    heat, level = resize_map(grid, *shape), float(np.median(grid))
    reach = [round(regions.NEARBY * side) for side in grid.shape]
    nearby = np.empty_like(grid)
    for y, x in np.ndindex(grid.shape):
        rows, columns = (slice(max(0, at - r), at + r + 1) for at, r in zip((y, x), reach, strict=True))
        nearby[y, x] = grid[rows, columns].max()
    near = resize_map(nearby, *shape)
    high = heat >= level + regions.OF_NEARBY * (near - level)
    chosen = np.zeros(shape, bool)
    for pixels in flood(high & (heat >= level + regions.OF_PEAK * (threshold - level))):
        peak = max(heat[p] for p in pixels)
        for p in pixels:
            chosen[p] = heat[p] >= level + regions.OF_PEAK * (peak - level)
    for pixels in flood(chosen):
        ordered = sorted(pixels, key=lambda p: heat[p], reverse=True)
        strong = [heat[p] - level >= regions.STRONG * (near[p] - level) for p in ordered]
        kept = max(1, round((sum(strong) / len(ordered)) ** 2 * len(ordered))) if strong[0] else 0
        for p in pixels:
            chosen[p] = kept > 0 and heat[p] >= heat[ordered[kept - 1]]
    for pixels in flood(heat >= threshold):
        if not any(chosen[p] for p in pixels):
            for p in pixels:
                chosen[p] = True
    return [pixels for pixels in flood(chosen) if max(heat[p] for p in pixels) >= threshold]


@pytest.mark.parametrize("shape", [(40, 40), (64, 48), (33, 90), (7, 5)])
def test_regions_against_their_rule_in_words(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    grid = rng.random((40, 40)).astype(np.float32)
    grid[3:9, 4:14] += 5
    grid[6:8, 20:23] += 1.2  # weak, beside a strong one
    grid[30, 30] += 3
    found = find_regions(grid, shape, 1.3, PEAKS)
    resized, expected = resize_map(grid, *shape), literal(grid, shape, 1.3)
    assert len(found) == len(expected) > (1 if min(shape) > 30 else 0)
    assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)
    ours = {(r.x, r.y, r.width, r.height, r.area, round(r.score, 5)) for r in found}
    theirs = set()
    for pixels in expected:
        ys, xs = [p[0] for p in pixels], [p[1] for p in pixels]
        score = round(float(max(resized[p] for p in pixels)), 5)
        theirs.add((min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1, len(pixels), score))
    assert ours == theirs
    mask = np.zeros(shape, bool)
    for pixels in expected:
        mask[tuple(np.array(sorted(pixels)).T)] = True
    np.testing.assert_array_equal(regions.region_mask(grid, shape, 1.3), mask)


@pytest.mark.parametrize("side", [40, 80, 160])
def test_an_area_measures_the_defect_and_not_its_strength(side: int) -> None:
    """A square defect under a blurred map, from hardly seen to very strong."""
    truth = np.zeros((512, 512))
    truth[100 : 100 + side, 200 : 200 + side] = 1.0
    blur = np.exp(-0.5 * (np.arange(-40, 41) / 6.0) ** 2)
    for axis in (0, 1):
        truth = np.apply_along_axis(np.convolve, axis, truth, blur / blur.sum(), "same")
    grid = truth.reshape(128, 4, 128, 4).mean((1, 3)).astype(np.float32)
    areas = []
    for height in (5.5, 12.0, 50.0):
        (region,) = find_regions(height * grid, (512, 512), 5.0, PEAKS)
        areas.append(region.area / side**2)
    assert all(0.5 <= area <= 2.0 for area in areas), areas
    assert max(areas) == pytest.approx(min(areas), rel=0.02)


def test_a_weak_region_beside_a_strong_one_is_not_lost() -> None:
    grid = np.zeros((128, 128), np.float32)
    grid[60, 60], grid[60, 64] = 50.0, 9.0
    found = find_regions(grid, (128, 128), 8.0, PEAKS)
    assert [(r.x, r.y, r.score) for r in found] == [(60, 60, 50.0), (64, 60, 9.0)]


@pytest.mark.parametrize("shape", [(128, 128), (1500, 2000)])
def test_the_flank_of_a_strong_defect_is_no_region_of_its_own(shape: tuple[int, int]) -> None:
    y, x = np.mgrid[:128, :128]
    radius = np.hypot(y - 50, x - 60)
    blot, spot = np.exp(-0.5 * (radius / 12) ** 4), np.exp(-0.5 * (radius / 1.5) ** 2)
    (region,) = find_regions((100 * blot + 300 * spot).astype(np.float32), shape, 30.0, PEAKS)
    assert region.width < 0.05 * shape[1]
    assert region.x < 60 / 128 * shape[1] < region.x + region.width


def test_p_value_of_a_region_counts_good_maps() -> None:
    grid = np.zeros((8, 8), np.float32)
    grid[2, 2] = 95.0
    (region,) = find_regions(grid, (8, 8), 90.0, PEAKS)
    assert region.p_value == pytest.approx((1 + 5) / 100)
    assert asdict(region) == {
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


@pytest.mark.parametrize("shape", [(40, 40), (500, 400), (20, 30)])
def test_strongest_place_of_a_weak_map_is_a_region(shape: tuple[int, int]) -> None:
    grid = np.random.default_rng(0).random((40, 40)).astype(np.float32)
    grid[10:14, 20:24] += 2
    assert not find_regions(grid, shape, 50.0, PEAKS)
    (region,) = find_regions(grid, shape, strongest_place(grid, shape), PEAKS)
    y, x = 12 / 40 * shape[0], 22 / 40 * shape[1]
    assert region.x <= x < region.x + region.width
    assert region.y <= y < region.y + region.height


def test_a_flat_map_above_its_threshold_is_one_region() -> None:
    (region,) = find_regions(np.ones((8, 8), np.float32), (20, 30), 0.5, PEAKS)
    assert (region.x, region.y, region.width, region.height, region.area) == (0, 0, 30, 20, 600)


def test_a_flat_map_has_no_strongest_place() -> None:
    assert strongest_place(np.ones((8, 8), np.float32), (20, 20)) == float("inf")
