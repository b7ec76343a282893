"""Distances to maps and scores: pure functions against their definitions."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from twinspect.models.layers import smooth, surprise, top_mean, upsample


def test_top_mean_is_the_mean_of_the_largest() -> None:
    maps = torch.randn(3, 10, 20, generator=torch.Generator().manual_seed(0))
    for share in (0.01, 0.1, 0.5, 1.0):
        count = int(200 * share)
        expected = [sum(sorted(m.flatten().tolist(), reverse=True)[:count]) / count for m in maps]
        assert top_mean(maps, share).tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(top_mean(maps, 0.0001), maps.flatten(1).max(1).values)  # at least one position


def test_a_defect_in_the_corner_counts_as_much_as_one_in_the_middle() -> None:
    corner, middle = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    corner[0, 0, 0] = middle[0, 8, 8] = 5.0
    assert top_mean(corner, 0.01) == top_mean(middle, 0.01)


def test_smooth_equals_scipy() -> None:
    from scipy.ndimage import gaussian_filter

    image = torch.randn(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    for mirrored, mode in ((True, "reflect"), (False, "constant")):
        expected = gaussian_filter(image[0, 0].double().numpy(), 4.0, mode=mode, truncate=2.0)
        found = smooth(image, 8, mirrored)[0, 0].double()
        torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-5, rtol=1e-4)
    constant = torch.full((2, 1, 32, 32), 3.25)
    torch.testing.assert_close(smooth(constant, 8, mirrored=True), constant)


def test_upsample_keeps_place_and_constants() -> None:
    maps = torch.zeros(1, 8, 8)
    maps[0, 1, 6] = 1.0
    large = upsample(maps, 64)
    assert large.shape == (1, 1, 64, 64)
    row, column = divmod(int(large.argmax()), 64)
    assert (row // 8, column // 8) == (1, 6)
    torch.testing.assert_close(upsample(torch.full((1, 8, 8), 2.5), 20), torch.full((1, 1, 20, 20), 2.5))


def test_surprise_is_minus_log_of_the_normal_tail() -> None:
    """Exact to single precision up to 3 standard deviations, then to a thousandth (Birnbaum)."""
    near, far = np.linspace(-3.0, 2.99, 300), np.linspace(3.0, 30.0, 300)
    np.testing.assert_allclose(surprise(torch.from_numpy(near)), -norm.logsf(near), rtol=1e-9)
    np.testing.assert_allclose(surprise(torch.from_numpy(near).float()), -norm.logsf(near), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(surprise(torch.from_numpy(far)), -norm.logsf(far), rtol=1.1e-3)


def test_surprise_rises_strictly_and_never_overflows() -> None:
    line = torch.cat([torch.arange(-4.0, 40.0, 0.005), torch.tensor([1e2, 1e3, 1e6, 1e20])])
    found = surprise(line)
    assert found.isfinite().all()
    assert (found[1:] > found[:-1]).all()
    assert (surprise(torch.tensor([-1e20, -1e3, -10.0])) >= 0.0).all()  # no image is less than not surprising


def test_surprises_add_up_to_the_noisy_or() -> None:
    z = torch.linspace(-2.9, 2.9, 20, dtype=torch.float64)
    p, q = torch.from_numpy(norm.cdf(z)), torch.from_numpy(norm.cdf(z.flip(0)))
    joint = 1 - (1 - p) * (1 - q)
    torch.testing.assert_close(surprise(z) + surprise(z.flip(0)), -torch.log1p(-joint))
