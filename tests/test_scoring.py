"""Distances to maps and scores: pure functions against their definitions."""

import pytest
import torch

from twinspect.scoring import gaussian_kernel, noisy_or, smooth, top_mean, upsample


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


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_smooth_keeps_constants_and_the_rim(sigma: float) -> None:
    kernel = gaussian_kernel(sigma)
    assert kernel.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert kernel.numel() % 2 == 1
    torch.testing.assert_close(kernel, kernel.flip(0))
    constant = torch.full((2, 1, 32, 32), 3.25)
    torch.testing.assert_close(smooth(constant, kernel), constant)
    spot = torch.zeros(1, 1, 33, 33)
    spot[0, 0, 0, 0] = 1.0
    assert int(smooth(spot, kernel).argmax()) == 0


def test_smooth_equals_scipy() -> None:
    from scipy.ndimage import gaussian_filter

    image = torch.randn(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    expected = gaussian_filter(image[0, 0].double().numpy(), 2.0, mode="nearest", truncate=3.0)
    torch.testing.assert_close(
        smooth(image, gaussian_kernel(2.0))[0, 0].double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-4
    )


def test_upsample_keeps_place_and_constants() -> None:
    maps = torch.zeros(1, 8, 8)
    maps[0, 1, 6] = 1.0
    large = upsample(maps, 64)
    assert large.shape == (1, 1, 64, 64)
    row, column = divmod(int(large.argmax()), 64)
    assert (row // 8, column // 8) == (1, 6)
    torch.testing.assert_close(upsample(torch.full((1, 8, 8), 2.5), 20), torch.full((1, 1, 20, 20), 2.5))


def test_noisy_or_is_the_joint_probability() -> None:
    p, q = torch.rand(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    surprise, joint = noisy_or(-torch.log1p(-p), -torch.log1p(-q))
    torch.testing.assert_close(joint, 1 - (1 - p) * (1 - q))
    torch.testing.assert_close(surprise, -torch.log1p(-joint))


def test_noisy_or_still_ranks_where_the_probability_is_one() -> None:
    local, semantic = torch.tensor([40.0, 60.0, 900.0]), torch.tensor([1.0, 1.0, 1.0])
    surprise, joint = noisy_or(local, semantic)
    assert joint.tolist() == [1.0, 1.0, 1.0]
    assert surprise.tolist() == sorted(set(surprise.tolist()))
