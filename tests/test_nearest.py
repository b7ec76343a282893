"""Distance from any normal image."""

import pytest
import torch
from test_statistics import correlated, normal

from twinspect.models.nearest import NearestNormal


def of_one_kind(images: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(images), dtype=torch.long)


def test_literal_transcription() -> None:
    """Unit vectors; full covariance within variants plus ridge; distances over the root of the neighbours' own."""
    images, fresh = correlated(60, 12) + 2.0, correlated(20, 12, seed=7) + 2.0
    variant = torch.arange(60) % 2
    module = NearestNormal(12)
    module.fit(images, variant, seed=0)
    unit = torch.nn.functional.normalize(images, dim=1).double()
    within = torch.cat([unit[variant == k] - unit[variant == k].mean(0) for k in (0, 1)])
    covariance = within.T @ within / 60
    inverse = torch.linalg.inv(covariance + 5.0 * covariance.trace() / 12 * torch.eye(12))
    for row, got in zip(torch.nn.functional.normalize(fresh, dim=1).double(), module(fresh), strict=True):
        plain, white = (_log_distance(row, unit, metric) for metric in (torch.eye(12).double(), inverse))
        assert float(got) == pytest.approx((2 * plain + white) / 3, abs=1e-3)


def _log_distance(row: torch.Tensor, unit: torch.Tensor, metric: torch.Tensor) -> float:
    def away(one: torch.Tensor) -> list[tuple[float, int]]:
        return sorted((float(torch.sqrt((one - other) @ metric @ (one - other))), i) for i, other in enumerate(unit))

    nearest = away(row)[:5]
    around = [sum(d for d, _ in away(unit[i])[1:3]) / 2 for _, i in nearest]
    mean = torch.tensor([d for d, _ in nearest]).mean(), torch.tensor(around).mean()
    return float(mean[0].log() - 0.5 * mean[1].log())


def test_what_lies_outside_the_kept_directions_counts() -> None:
    images = torch.cat([normal(50, 4), torch.zeros(50, 6)], 1) + 1.0
    module = NearestNormal(10, most=30, most_dims=3)
    module.fit(images, of_one_kind(images), seed=0)
    assert module.plain.bank_NR.shape == (30, 3)
    odd = images[:5].clone()
    odd[:, 9] += 6.0  # a direction in which no normal image has ever moved
    assert (module(odd) > module(images[:5]) + 0.4).all()


def test_the_same_step_is_odder_beside_images_that_lie_densely() -> None:
    centres = 4.0 * torch.nn.functional.one_hot(torch.arange(2), 8).float()
    dense, loose = 0.05 * normal(100, 8) + centres[0], 0.5 * normal(100, 8, seed=2) + centres[1]
    module = NearestNormal(8)
    module.fit(torch.cat([dense, loose]), torch.arange(2).repeat_interleave(100), seed=0)
    step = torch.zeros(8)
    step[7] = 2.5
    beside_dense, beside_loose = module(torch.stack([centres[0] + step, centres[1] + step]))
    assert beside_dense > beside_loose


def test_a_copy_of_a_normal_image_is_finite_and_least() -> None:
    images = normal(40, 6) + 1.0
    module = NearestNormal(6)
    module.fit(torch.cat([images, images[:3]]), of_one_kind(torch.cat([images, images[:3]])), seed=0)
    found = module(torch.cat([images[:3], -images[:3]]))
    assert found.isfinite().all()
    assert found[:3].max() < found[3:].min()


def test_one_normal_image() -> None:
    module = NearestNormal(6)
    module.fit(normal(1, 6) + 1.0, torch.zeros(1, dtype=torch.long), seed=0)
    assert module(normal(3, 6, seed=3)).isfinite().all()
