import numpy as np
import pytest
from metrics_reference import aupro as slow_aupro
from metrics_reference import auspro as slow_auspro

from twinspect.errors import DataError
from twinspect.metrics.pixels import (
    REGION_METRICS,
    UNIT,
    MemoryBudget,
    ScoreHistogram,
    connected_regions,
    keys_of,
    region_weights,
    summarise,
)


def area(name, maps, masks=None, regions=None):
    """A metric of `REGION_METRICS`."""
    histogram, nothing = ScoreHistogram(MemoryBudget(1 << 27)), [None] * len(maps)
    for m, mask, pairs in zip(maps, masks or nothing, regions or nothing, strict=True):
        histogram.update(m, mask, regions=pairs)
    return summarise([histogram]).values[name]


@pytest.mark.parametrize("limit", [0.3, 0.05, 1.0, 0.001])
def test_aupro_is_the_literal_definition(scored, limit, monkeypatch):
    monkeypatch.setitem(REGION_METRICS, "aupro", ("pro", limit))
    maps, masks = scored
    assert area("aupro", maps, masks) == pytest.approx(slow_aupro(maps, masks, limit), abs=1e-9)


def overlapping_regions(masks):
    """Each mask one region; a second, overlapping and unconnected one; areas below, at and above the size."""
    out = [[(m, s)] if m.any() else [] for m, s in zip(masks, (1, 1, 4, 20, 10**6, 50, 1, 1), strict=True)]
    second = np.zeros_like(masks[2])
    second[0, 0] = second[3, 3] = second[10:, 10:] = True
    out[2].append((second, 7))
    return out


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_auspro_is_the_literal_definition(scored, limit, monkeypatch):
    monkeypatch.setitem(REGION_METRICS, "auspro_005", ("spro", limit))
    maps, masks = scored
    regions = overlapping_regions(masks)
    assert area("auspro_005", maps, regions=regions) == pytest.approx(slow_auspro(maps, regions, limit), abs=1e-9)


def test_saturation_at_full_size_of_connected_regions_is_pro(monkeypatch):
    monkeypatch.setitem(REGION_METRICS, "aupro", ("pro", 0.05))
    rng = np.random.default_rng(0)
    mask = np.zeros((9, 9), bool)
    mask[2:5, 2:7] = True
    maps = list(rng.normal(size=(2, 9, 9)).astype(np.float32))
    regions = [[(mask, mask.sum())], []]
    assert area("auspro_005", maps, regions=regions) == area("aupro", maps, [mask, None])


def test_corner_contact_is_one_region():
    mask = np.eye(4, dtype=bool)
    where, number, count = connected_regions(mask)
    assert count == 1
    assert where.tolist() == [0, 5, 10, 15]
    assert set(number) == {0}


def test_weights_of_a_region_sum_to_the_unit_and_saturate():
    rng = np.random.default_rng(0)
    keys = keys_of(rng.integers(0, 5, 60).astype(np.float32))
    number = rng.permutation(np.repeat([0, 1, 2], [7, 13, 40]))
    areas = np.array([7, 3, 1])
    ranked, weights = region_weights(keys, number, areas)
    edges = np.cumsum([0, 7, 13, 40])
    for i, area in enumerate(areas):
        part = slice(edges[i], edges[i + 1])
        assert weights[part].sum() == UNIT
        assert (np.diff(ranked[part].astype(np.int64)) >= 0).all()
        assert (weights[part] > 0).sum() == area
        assert (weights[part][-area:] > 0).all()


def test_best_and_worst():
    mask = np.zeros((10, 10), bool)
    mask[3:5, 3:6] = True
    assert area("aupro", [mask.astype(float)], [mask]) == 1.0
    assert area("aupro_005", [-mask.astype(float)], [mask]) == 0.0


def test_undefined_without_regions_or_without_normal_pixels():
    maps = [np.ones((3, 3))]
    assert np.isnan(area("aupro", maps))
    assert np.isnan(area("aupro", maps, [np.ones((3, 3))]))
    assert np.isnan(area("auspro_005", maps, regions=[[]]))


def test_bad_area():
    with pytest.raises(DataError, match="saturation area"):
        ScoreHistogram(MemoryBudget(1 << 27)).update(np.ones((3, 3)), regions=[(np.ones((3, 3)), 0)])
