import subprocess
import sys

import numpy as np
import pytest
from metrics_reference import aupro, auspro, pixel_metrics

from twinspect.errors import DataError
from twinspect.metrics.pixels import (
    COARSEST,
    FINEST,
    MemoryBudget,
    PagedCounts,
    ScoreHistogram,
    bins_of,
    edges_of,
    keys_of,
    summarise,
)

SMALL = 96 << 10


def empty(limit=128 << 20):
    return ScoreHistogram(MemoryBudget(limit))


def is_exact(histogram):
    return histogram.budget.drop == FINEST


def filled(maps, masks, limit=128 << 20):
    histogram = empty(limit)
    for m, g in zip(maps, masks, strict=True):
        histogram.update(m, g)
    return histogram


def same_state(a, b):
    assert (a.totals, a.budget.drop) == (b.totals, b.budget.drop)
    for mine, theirs in zip(a.tables, b.tables, strict=True):
        np.testing.assert_array_equal(mine.pages(), theirs.pages())
        np.testing.assert_array_equal(mine.rows(mine.pages()), theirs.rows(theirs.pages()))


def test_exact_against_scikit_learn(scored):
    maps, masks = scored
    summary = summarise([filled(maps, masks)])
    for name, value in pixel_metrics(maps, masks).items():
        assert summary.values[f"pixel_{name}"] == pytest.approx(value, abs=1e-9), name
    assert summary.error_bound == 0.0


@pytest.mark.parametrize("limit", [SMALL, 400 << 10])
def test_coarse_results_stay_inside_their_own_bound(scored, limit):
    maps, masks = scored
    histogram = filled(maps, masks, limit)
    summary = summarise([histogram])
    exact = {f"pixel_{name}": value for name, value in pixel_metrics(maps, masks).items()}
    exact |= {"aupro": aupro(maps, masks, 0.3), "aupro_005": aupro(maps, masks, 0.05)}
    for name, value in exact.items():
        assert abs(summary.values[name] - value) <= summary.bounds[name] + 1e-9, name


def test_coarse_saturated_overlap_stays_inside_its_bound():
    rng = np.random.default_rng(0)
    maps = list(rng.lognormal(0, 9, (4, 20, 20)).astype(np.float32))
    mask = np.zeros((20, 20), bool)
    mask[3:9, 3:9] = True
    regions = [[(mask, 9)], [], [(mask.T, 36)], []]
    histogram = empty(SMALL)
    for m, r in zip(maps, regions, strict=True):
        histogram.update(m, regions=r)
    summary = summarise([histogram])
    assert not is_exact(histogram)
    exact = auspro(maps, regions, 0.05)
    assert abs(summary.values["auspro_005"] - exact) <= summary.bounds["auspro_005"] + 1e-9


def test_ties_at_round_values_stay_exact_when_coarse():
    """Half the pixels at 0 or 1 exactly, the others everywhere: the piles add nothing to the bound."""
    rng = np.random.default_rng(0)
    maps = rng.lognormal(0, 20, (30, 32, 32)).astype(np.float32)
    maps[rng.random(maps.shape) < 0.5] = 0.0
    maps[rng.random(maps.shape) < 0.5] = 1.0
    masks = list(rng.random(maps.shape) < 0.2)
    histogram = filled(list(maps), masks, 4 << 20)
    assert histogram.budget.drop > 5
    summary = summarise([histogram])
    assert summary.error_bound < 1e-3
    assert (
        abs(summary.values["pixel_auroc"] - pixel_metrics(maps, masks)["auroc"])
        <= summary.bounds["pixel_auroc"] + 1e-9
    )


def test_bound_is_below_the_promise_for_smooth_scores():
    """Eight megabytes are enough for 1e-4 on half a million different scores over four decades."""
    rng = np.random.default_rng(0)
    masks = rng.random((32, 128, 128)) < 0.03
    maps = (10.0 ** rng.uniform(-4, 0, masks.shape) * (1 + masks)).astype(np.float32)
    histogram = filled(list(maps), list(masks), 8 << 20)
    summary = summarise([histogram])
    assert 0 < summary.error_bound < 1e-4
    for name, value in pixel_metrics(maps, masks).items():
        assert abs(summary.values[f"pixel_{name}"] - value) <= 1e-4


@pytest.mark.parametrize("limit", [SMALL, 1 << 20, 128 << 20])
def test_any_order_and_any_split_give_the_same_bits(limit):
    rng = np.random.default_rng(5)
    maps = list(rng.lognormal(0, 12, (12, 24, 24)).astype(np.float32))
    maps[7] = maps[7] * 0 + 1
    masks = [rng.random((24, 24)) < 0.1 if i % 2 else None for i in range(12)]
    one = filled(maps, masks, limit)
    for seed in range(3):
        turn = np.random.default_rng(seed).permutation(12)
        parts = [
            filled([maps[i] for i in part], [masks[i] for i in part], limit)
            for part in np.array_split(turn, seed + 2)
        ]
        total = empty(limit)
        for part in parts:
            total.merge(part)
        same_state(one, total)
        np.testing.assert_array_equal(
            list(summarise([one]).values.values()), list(summarise([total]).values.values())
        )
        assert summarise([one]).bounds == summarise([total]).bounds


def test_resolution_is_the_finest_that_fits():
    rng = np.random.default_rng(1)
    maps = rng.lognormal(0, 12, (6, 24, 24)).astype(np.float32)
    histogram = filled(maps, [None] * 6, 1 << 20)
    drop = histogram.budget.drop
    assert FINEST < drop < COARSEST
    assert histogram.budget.used <= 1 << 20
    budget = MemoryBudget(1 << 40)
    budget.drop = drop - 1
    PagedCounts(budget).add(keys_of(maps))
    assert budget.used > 1 << 20


def test_memory_stays_within_the_limit():
    rng = np.random.default_rng(2)
    histogram = empty(2 << 20)
    held = []
    for _ in range(60):
        scores = (rng.normal(size=(64, 64)) * 10.0 ** rng.integers(-20, 20)).astype(np.float32)
        histogram.update(scores, rng.random((64, 64)) < 0.05)
        held.append(histogram.budget.used)
    assert max(held) <= 2 << 20
    assert histogram.totals.pixels == 60 * 64 * 64
    assert sum(t._values.nbytes for t in histogram.tables) < 1.5 * (2 << 20)


def test_coarsest_step_admits_everything():
    histogram = filled([np.linspace(-1e30, 1e30, 100).reshape(10, 10)], [np.eye(10)], 1)
    assert histogram.budget.drop == COARSEST
    assert summarise([histogram]).values["pixel_auroc"] > 0


def test_keys_keep_order_and_bins_their_edges():
    rng = np.random.default_rng(0)
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    scores = np.concatenate(
        (rng.normal(size=500), 10.0 ** rng.uniform(-38, 38, 500), [tiny, -tiny, huge, -huge, 0, 1])
    ).astype(np.float32)
    scores = np.unique(scores)
    keys = keys_of(scores)
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert keys_of(np.float32([-0.0]))[0] == keys_of(np.float32([0.0]))[0]
    for drop in range(FINEST, COARSEST + 1):
        bins = bins_of(keys, drop)
        assert (np.diff(bins.astype(np.int64)) >= 0).all()
        edges = edges_of(bins, drop)
        assert (edges <= keys).all()
        np.testing.assert_array_equal(bins_of(edges, drop), bins)


def test_folding_pages_is_binning_again():
    rng = np.random.default_rng(0)
    keys = keys_of(rng.normal(size=3000).astype(np.float32) * np.float32(1e-3))
    fine, coarse = MemoryBudget(1 << 40), MemoryBudget(1 << 40)
    a, b = PagedCounts(fine), PagedCounts(coarse)
    a.add(keys)
    for step in range(1, 8):
        fine.coarsen()
        coarse.drop = FINEST + step
        b = PagedCounts(coarse)
        b.add(keys)
        pages = b.pages()
        np.testing.assert_array_equal(a.pages(), pages)
        np.testing.assert_array_equal(a.rows(pages), b.rows(pages))
        assert a.nbytes == b.nbytes


def test_maps_are_compared_at_float32():
    scores = 1 + 1e-12 * np.arange(16.0).reshape(4, 4)
    mask = np.arange(16).reshape(4, 4) >= 12
    assert summarise([filled([scores], [mask])]).values["pixel_auroc"] == 0.5
    assert summarise([filled([np.arange(16.0).reshape(4, 4)], [mask])]).values["pixel_auroc"] == 1.0


@pytest.mark.parametrize("normal_first", [False, True])
@pytest.mark.parametrize("above", [0, 5])
@pytest.mark.parametrize("normals", [3, 20])
def test_bounds_hold_for_the_worst_order_inside_one_bin(normal_first, above, normals):
    """All scores but a few share the coarsest bin, where the true order is the best or the worst possible."""
    rise = np.arange(60, dtype=np.float32) * 2.0**-23
    scores = 1 + rise + np.float32(2.0**-22)
    normal = np.arange(60) >= 60 - normals if normal_first else np.arange(60) < normals
    extra = np.full(above, 9.0, np.float32)
    scores, truth = np.append(scores, extra), np.append(~normal, np.arange(above) % 2 == 0)
    summary = summarise([filled([scores[None]], [truth[None]], 1)])
    exact = pixel_metrics([scores[None]], [truth[None]])
    for name in ("auroc", "ap", "f1max"):
        error = abs(summary.values[f"pixel_{name}"] - exact[name])
        assert error <= summary.bounds[f"pixel_{name}"] + 1e-12, name
        assert error > 0 or name == "f1max"


def test_magnitudes_beyond_float32_keep_their_order_or_tie():
    maps, masks = [np.array([[1e300, 2e300, -1e300, 1e-300]])], [np.array([[1, 0, 0, 0]])]
    assert summarise([filled(maps, masks)]).values["pixel_auroc"] == pytest.approx(2.5 / 3)


@pytest.mark.parametrize("dtype", [np.float16, np.uint8, np.int64, bool])
def test_maps_of_any_kind_of_numbers(dtype):
    assert summarise([filled([np.eye(3, dtype=dtype)], [np.eye(3)])]).values["pixel_auroc"] == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_is_named_and_not_counted(bad):
    histogram = empty()
    scores = np.zeros((4, 5), np.float32)
    scores[2, 3] = bad
    with pytest.raises(DataError, match=r"bracket 7\.png.*row 2, column 3"):
        histogram.update(scores, name="bracket 7.png")
    with pytest.raises(DataError, match="score map of a map has 1 values"):
        histogram.update(scores)
    assert histogram.totals.pixels == 0
    assert histogram.tables.all.nbytes == 0


@pytest.mark.parametrize(
    ("scores", "mask", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), "must be the same"),
        (np.zeros((1, 2, 3)), None, "accepted: \\(height, width\\)"),
        (np.zeros((0, 3)), None, "not empty"),
        (np.array([["a"]]), None, "real numbers"),
        (np.array([[1j]]), None, "real numbers"),
        (np.zeros((1, 1)), np.array([["x"]]), "non-zero = defect"),
    ],
)
def test_unusable_maps_and_masks(scores, mask, message):
    with pytest.raises(DataError, match=message):
        empty().update(scores, mask)


def test_undefined_is_nan():
    assert all(np.isnan(v) for v in summarise([empty()]).values.values())
    for mask in (None, np.ones((2, 2))):
        values = summarise([filled([np.eye(2)], [mask])]).values
        assert all(np.isnan(v) for v in values.values())


def test_merging_leaves_the_other_as_it_is():
    rng = np.random.default_rng(0)
    a = filled([rng.normal(size=(30, 30))], [None], SMALL)
    b = filled([np.ones((3, 3), np.float32)], [np.eye(3)], SMALL)
    a.merge(b)
    same_state(b, filled([np.ones((3, 3), np.float32)], [np.eye(3)], SMALL))


def test_no_torch():
    code = "import sys, twinspect.metrics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
