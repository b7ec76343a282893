"""Normal statistics: whitening, moments, position scale, prototypes, shrinkage, surprise."""

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from twinspect.models.prototypes import Prototypes, repetition

from twinspect.models.layers import to_rows
from twinspect.models.statistics import (
    PLACE_PRIOR,
    Moments,
    PlaceMoments,
    PositionScale,
    ResidualMap,
    Surprise,
    TokenDistance,
    evenness,
    left_out,
    shrink_to_identity,
    surprises,
    whitening,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(count: int, dims: int, seed: int = 0) -> torch.Tensor:
    return normal(count, dims, seed=seed) @ normal(dims, dims, seed=seed + 1) + normal(dims, seed=seed + 2)


# ---------------------------------------------------------------------------- moments and whitening


def test_moments_equal_numpy_cov() -> None:
    rows = [correlated(300, 6), correlated(500, 6, seed=10)]
    moments = Moments(2, 6)
    for k, block in enumerate(rows):
        for part in block.split(70):
            moments.update(part, k)
    mean, covariance = moments.mean_and_covariance(prior=0.0)
    for k, block in enumerate(rows):
        np.testing.assert_allclose(mean[k], block.double().mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(covariance[k], np.cov(block.double().T, bias=True), rtol=1e-4, atol=1e-4)


def test_moments_of_a_small_prototype_are_drawn_to_the_pooled_ones() -> None:
    large, small = correlated(900, 4), correlated(10, 4, seed=10)
    moments = Moments(3, 4)
    moments.update(large, 0)
    moments.update(small, 1)
    _, covariance = moments.mean_and_covariance(prior=90.0)
    own = [np.cov(block.double().T, bias=True) for block in (large, small)]
    pooled = (900 * own[0] + 10 * own[1]) / 910
    np.testing.assert_allclose(covariance[1], 0.1 * own[1] + 0.9 * pooled, rtol=1e-2, atol=1e-2)
    assert torch.isfinite(covariance[2]).all()  # no vector at all: the pooled one stands in


def test_moments_far_from_zero_stay_positive() -> None:
    """Features of a ViT have channels whose mean is a thousand spreads from zero."""
    rows = normal(400, 8) + 1000.0
    moments = Moments(1, 8)
    for part in rows.split(50):
        moments.update(part, 0)
    _, covariance = moments.mean_and_covariance(prior=0.0)
    np.testing.assert_allclose(covariance[0], np.cov(rows.double().T, bias=True), atol=0.02)


@pytest.mark.parametrize("far", [0.0, 1000.0])
def test_place_moments_compare_every_image_with_the_others(far: float) -> None:
    """Against a transcription that leaves each image out of the mean of its positions, as later images are."""
    images = normal(12, 9, 3) * torch.tensor([3.0, 1.0, 0.3]) + 2 * normal(9, 3, seed=4) + far
    moments = PlaceMoments(2, 9, 3)
    for rows in images:
        moments.update(rows, 1)
    mean_KD, away_KND = moments.means()
    own = images.double().mean((0, 1))
    np.testing.assert_allclose(mean_KD[1], own, rtol=1e-6, atol=1e-5)
    drawn = (images.double().sum(0) + PLACE_PRIOR * own) / (12 + PLACE_PRIOR)
    np.testing.assert_allclose(mean_KD[1] + away_KND[1], drawn, rtol=1e-6, atol=1e-5)
    apart = []
    for i in range(12):
        others = torch.cat([images[:i], images[i + 1 :]]).double()
        apart.append(images[i] - (others.sum(0) + PLACE_PRIOR * own) / (11 + PLACE_PRIOR))
    rows = torch.cat(apart)
    np.testing.assert_allclose(moments.covariance(mean_KD, away_KND, 0.0)[1], rows.T @ rows / len(rows), rtol=1e-3)


def test_a_whole_part_in_the_wrong_place_is_seen() -> None:
    """Left and right half look different on every normal image; on an odd one they have changed places."""
    sides = torch.tensor([2.0, -2.0]).repeat_interleave(6)[None, None, None].expand(1, 4, 12, 12)
    owner = torch.zeros(60, dtype=torch.long)
    module = fitted_map(sides + normal(60, 4, 12, 12), owner)
    fresh = sides + normal(20, 4, 12, 12, seed=3)
    usual = module(rows_of(fresh), owner[:20]).flatten(1).mean(1)
    odd = module(rows_of(fresh.flip(3)), owner[:20]).flatten(1).mean(1)
    assert odd.min() > usual.max() + 1.0
    assert usual.mean().abs() < 0.2  # later images are as far from the means as the training images were


def test_whitening_gives_identity() -> None:
    covariance = torch.stack([torch.cov(correlated(500, 12, seed=s).double().T) for s in (0, 5)])
    white = whitening(covariance, 0.0)
    torch.testing.assert_close(white @ covariance @ white.transpose(1, 2), torch.eye(12).double().expand(2, -1, -1))
    flat = torch.zeros(1, 12, 12, dtype=torch.float64)  # a dead channel must not make it infinite
    flat[0, 0, 0] = 1.0
    assert torch.isfinite(whitening(flat, 1e-3)).all()


@pytest.mark.parametrize("count", [15, 60, 500])
def test_shrinkage_equals_scikit_learns_oas(count: int) -> None:
    rows = correlated(count, 10).double().numpy()
    own = np.cov(rows.T, bias=True)
    found = shrink_to_identity(torch.from_numpy(own)[None], torch.tensor(float(count)))[0]
    # scikit-learn's n + 1 in the numerator's place of Chen et al. differs in the third digit for small n.
    np.testing.assert_allclose(found, OAS().fit(rows).covariance_, rtol=0.05, atol=0.05 * own.trace() / 10)


# --------------------------------------------------------------------------------------- residual map


def rows_of(maps: torch.Tensor) -> torch.Tensor:
    return to_rows(maps.permute(0, 2, 3, 1))


def fitted_map(residuals: torch.Tensor, owner: torch.Tensor, count: int = 1) -> ResidualMap:
    module = ResidualMap(residuals.shape[1], residuals.shape[2])
    moments = PlaceMoments(count, module.positions, module.dims)
    for rows, k in zip(module.rows(rows_of(residuals)), owner.tolist(), strict=True):
        moments.update(rows, k)
    module.set_moments(moments)
    scale = PositionScale(count, 1, residuals.shape[2])
    longer = left_out(len(residuals) / count)
    scale.update(longer * module.length(rows_of(residuals), owner), owner)
    module.set_scale(scale)
    return module


def test_whitened_length_is_one_on_normal_images_whatever_the_channels_scales() -> None:
    loud = torch.tensor([4.0, 1.0, 0.4, 2.0])[None, :, None, None]
    owner = torch.zeros(40, dtype=torch.long)
    module = fitted_map(normal(40, 4, 12, 12) * loud, owner)
    fresh = normal(10, 4, 12, 12, seed=9) * loud
    length = module.length(rows_of(fresh), owner[:10])
    assert length.shape == (10, 1, 12, 12)
    assert length.square().mean().item() == pytest.approx(1.0, abs=0.1)
    small = fresh.clone()
    small[0, 2, 5, 5] += 4.0  # ten spreads of the quiet channel, one of the loud one
    z = module(rows_of(small), owner[:10])
    assert int(z[0].argmax()) == 5 * 12 + 5


def test_a_large_window_sees_a_weak_patch_and_a_small_one_still_sees_a_point() -> None:
    owner, images = torch.zeros(200, dtype=torch.long), normal(200, 6, 24, 24)
    modules = {}
    for windows in ((1,), (5,), (1, 5)):
        module = ResidualMap(6, 24, windows)
        moments = PlaceMoments(1, module.positions, 6)
        for rows in module.rows(rows_of(images)):
            moments.update(rows, 0)
        module.set_moments(moments)
        scale = PositionScale(1, len(windows), 24)
        scale.update(module.length(rows_of(images), owner), owner)
        module.set_scale(scale)
        modules[windows] = module
    patch, point = normal(100, 6, 24, 24, seed=3), normal(100, 6, 24, 24, seed=4)
    patch[:, :, 8:13, 8:13] *= 1.3
    point[:, :, 4, 4] += 4.0
    inside = {"patch": (patch, slice(8, 13)), "point": (point, slice(4, 5))}

    def found(windows: tuple[int, ...], kind: str) -> float:
        shown, where = inside[kind]
        maps = modules[windows](rows_of(shown), owner[:100])
        return (maps[:, where, where].flatten(1).amax(1) >= maps.flatten(1).amax(1)).float().mean().item()

    assert found((5,), "patch") > found((1,), "patch") + 0.2
    assert found((1,), "point") > found((5,), "point") + 0.2
    for kind in inside:
        assert found((1, 5), kind) > 0.8 * max(found((1,), kind), found((5,), kind))


def test_repetition_tells_production_from_photographs() -> None:
    shape = normal(1, 64)
    product = shape + 0.1 * normal(80, 64, seed=2)
    kinds = shape + 0.1 * normal(80, 64, seed=3) + normal(4, 64, seed=4).repeat_interleave(20, 0)
    photographs = normal(80, 64, seed=5)
    owner = torch.arange(3).repeat_interleave(80)
    one, several, none = repetition(torch.cat([product, kinds, photographs]), owner, 3).tolist()
    assert min(one, several) > 0.99
    assert none < 0.01
    assert repetition(photographs[:3], torch.zeros(3, dtype=torch.long), 1).tolist() == [1.0]  # too few to tell


def test_kinds_of_photographs_share_one_prototype_products_keep_theirs() -> None:
    kinds = 30.0 * normal(4, 24, seed=1).repeat_interleave(60, 0)
    tokens = kinds + normal(240, 24, seed=2)
    embeddings = normal(240, 24, seed=3)  # photographs: nothing repeats
    for start in (0, 60):  # two products
        embeddings[start : start + 60] = normal(1, 24, seed=4 + start) + 0.1 * normal(60, 24, seed=5 + start)
    prototypes = Prototypes(24)
    prototypes.fit(tokens, 0)
    assert prototypes.count == 4
    link_K = prototypes.join_varied(tokens, embeddings)
    owner = prototypes(tokens)
    assert prototypes.count == 3
    assert [len(set(owner[i : i + 60].tolist())) for i in range(0, 240, 60)] == [1, 1, 1, 1]
    assert owner[0] != owner[60]
    assert owner[120] == owner[180] == 2
    assert (link_K > 0.9).tolist() == [True, True, False]
    # Together they seem to repeat more than each does, as other kinds are far away: not believed.
    each = [repetition(embeddings[i : i + 60], torch.zeros(60, dtype=torch.long), 1) for i in (120, 180)]
    assert float(link_K[2]) == pytest.approx(float(sum(each)) / 2, rel=1e-4)


def test_evenness_tells_draws_of_one_gaussian_from_a_mixture() -> None:
    drawn = normal(200, 400).norm(dim=1)  # in 400 directions: all about equally far
    mixed = drawn * torch.where(torch.arange(200) % 2 == 0, 1.0, 1.5)
    even = evenness(torch.cat([drawn, mixed, drawn[:4]]), torch.tensor([0] * 200 + [1] * 200 + [2] * 4), 4)
    assert even[0] > 0.95
    assert even[1] < 0.05
    assert even[2:].tolist() == [0.0, 0.0]  # too few to tell


def test_surprises_of_every_prototype_have_mean_one() -> None:
    """One product's scores have a heavy tail, another's a light one; both give surprises of the same size."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(2).repeat_interleave(200)
    score = torch.cat([torch.rand(200, generator=generator), torch.rand(200, generator=generator) ** -0.7])
    curve = Surprise()
    curve.reset(2)
    curve.fit(score, owner, 2)
    said = curve(score, owner).clamp_min(0)
    for k in range(2):
        assert float(said[owner == k].mean()) == pytest.approx(1.0, abs=0.05)


def test_position_scale_removes_a_rim() -> None:
    """Zero padding makes the rim loud in every image; scaled by position it wins no more than its share."""
    loud = torch.ones(16, 16)
    loud[:2], loud[-2:], loud[:, :2], loud[:, -2:] = 1.5, 1.5, 1.5, 1.5
    images = normal(200, 6, 16, 16) * loud
    owner = torch.zeros(200, dtype=torch.long)
    module = fitted_map(images, owner)
    fresh = normal(200, 6, 16, 16, seed=5) * loud

    def rim_wins(maps: torch.Tensor) -> float:
        where = maps.flatten(1).argmax(1)
        return (loud.flatten()[where] > 1).float().mean().item()

    assert rim_wins(module.length(rows_of(fresh), owner)[:, 0]) > 0.95
    assert rim_wins(module(rows_of(fresh), owner)) < 0.85  # the rim is 0.44 of the area
    fresh[:, :, 8, 8] += 8.0
    assert (module(rows_of(fresh), owner).flatten(1).argmax(1) == 8 * 16 + 8).float().mean() > 0.9


def test_prototypes_have_their_own_scale() -> None:
    owner = torch.arange(60) % 2
    quiet_and_loud = normal(60, 4, 8, 8) * torch.where(owner == 0, 0.1, 5.0)[:, None, None, None]
    module = fitted_map(quiet_and_loud, owner, 2)
    probe = torch.full((2, 4, 8, 8), 1.0)
    z = module(rows_of(probe), torch.tensor([0, 1]))
    assert z[0].mean() > 3 > z[1].mean()


def test_wide_residuals_are_rotated_down_the_same_way_every_time() -> None:
    first, again = ResidualMap(96, 4, most_dims=32), ResidualMap(96, 4, most_dims=32)
    x = normal(2, 16, 96)
    assert first.rows(x).shape == (2, 16, 32)
    assert torch.equal(first.rows(x), again.rows(x))


# ---------------------------------------------------------------------------------------- prototypes


def clusters(each: int = 40, dims: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    centres = 6 * normal(3, dims, seed=7)
    owner = torch.arange(3).repeat_interleave(each)
    return centres[owner] + normal(3 * each, dims), owner


def test_prototypes_separate_clear_clusters() -> None:
    tokens, owner = clusters()
    module = Prototypes(tokens.shape[1])
    module.fit(tokens, seed=0)
    found = module(tokens)
    assert len(found.unique()) >= 3
    for k in found.unique().tolist():
        assert len(owner[found == k].unique()) == 1  # no prototype mixes two kinds of scene
    fresh, fresh_owner = clusters(10)
    for k in module(fresh).unique().tolist():
        assert len(fresh_owner[module(fresh) == k].unique()) == 1


@pytest.mark.parametrize("products", [2, 6, 15, 30, 40])
def test_any_number_of_products_is_told_apart(products: int) -> None:
    """Sixteen variants of forty products would mix them all; six products must not become seven."""
    owner = torch.arange(products).repeat_interleave(60)
    tokens = 2 * normal(products, 100, seed=8)[owner] + normal(60 * products, 100, seed=9)
    prototypes = Prototypes(tokens.shape[1])
    prototypes.fit(tokens, seed=0)
    assert prototypes.count == products
    assert len({(int(a), int(b)) for a, b in zip(owner, prototypes(tokens), strict=True)}) == products
    limited = Prototypes(tokens.shape[1], most=4)
    limited.fit(tokens, seed=0)
    assert limited.count <= 4


def test_prototypes_are_deterministic_and_bounded() -> None:
    tokens, _ = clusters()
    first, again = Prototypes(tokens.shape[1], most=2), Prototypes(tokens.shape[1], most=2)
    first.fit(tokens, seed=3)
    again.fit(tokens, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), again.buffers(), strict=True))
    assert len(first(tokens).unique()) <= 2


@pytest.mark.parametrize("count", [2, 6, 12])
def test_prototypes_of_a_handful_or_of_equal_images(count: int) -> None:
    for tokens in (normal(count, 16), torch.ones(count, 16)):
        module = Prototypes(16)
        module.fit(tokens, seed=0)
        assert 0 <= module(tokens).min()
        assert all(torch.isfinite(b.double()).all() for b in module.buffers())


def test_token_distance_is_near_one_on_normal_and_large_off_it() -> None:
    tokens = correlated(300, 8)
    owner = torch.zeros(300, dtype=torch.long)
    module = TokenDistance(8)
    module.fit(tokens, owner, 1)
    assert module(tokens, owner).square().mean().item() == pytest.approx(1.0, abs=0.2)
    direction = torch.linalg.eigh(torch.cov(tokens.T)).eigenvectors[:, 0]  # where normal images vary least
    odd = tokens.mean(0) + 8 * (tokens @ direction).std() * direction
    assert module(odd[None], owner[:1]).item() > 1.2 * module(tokens, owner).max().item()


# ------------------------------------------------------------------------------------------ surprise


def fitted_surprise(scores: torch.Tensor, owner: torch.Tensor | None = None, count: int = 1) -> Surprise:
    module = Surprise()
    module.fit(scores, torch.zeros(len(scores), dtype=torch.long) if owner is None else owner, count)
    return module


@pytest.mark.parametrize("count", [3, 20, 300])
def test_surprise_rises_strictly_and_never_saturates(count: int) -> None:
    scores = 5 + normal(count)
    module = fitted_surprise(scores)
    line = torch.linspace(float(scores.min()) - 3, float(scores.max()) + 30, 2000)
    values = module(line, torch.zeros(2000, dtype=torch.long))
    assert (values[1:] > values[:-1]).all()
    far = module(torch.tensor([1e2, 1e4, 1e6]), torch.zeros(3, dtype=torch.long))
    assert (far[1:] > 10 * far[:-1]).all()
    assert torch.isfinite(far).all()


def test_surprise_is_minus_log_of_the_share_of_normals_above() -> None:
    scores = normal(4000)
    module = fitted_surprise(scores)
    for level in (0.25, 0.5, 0.65, 0.8, 0.95):
        at = torch.quantile(scores, level)[None]
        found = module(at, torch.zeros(1, dtype=torch.long)).item()
        assert found == pytest.approx(-np.log1p(-level), rel=0.25, abs=0.1)


def test_surprise_follows_each_prototypes_own_scale() -> None:
    owner = torch.arange(400) % 2
    scores = torch.where(owner == 0, 5 + normal(400), 8 + 2 * normal(400, seed=1))
    module = fitted_surprise(scores, owner, 2)
    same = module(torch.tensor([8.0, 14.0]), torch.tensor([0, 1]))  # three spreads above either
    assert same[0].item() == pytest.approx(same[1].item(), rel=0.25)
    assert module(torch.tensor([10.0]), torch.tensor([0])) > 3 * module(torch.tensor([10.0]), torch.tensor([1]))


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 9.0], [2.0, 3.0]])
def test_surprise_of_ties_and_of_two_images_stays_finite_and_rising(scores: list[float]) -> None:
    module = fitted_surprise(torch.tensor(scores))
    values = module(torch.tensor([-5.0, 0.5, 1.5, 4.0, 20.0, 500.0]), torch.zeros(6, dtype=torch.long))
    assert torch.isfinite(values).all()
    assert (values[1:] > values[:-1]).all()


def test_curves_at_once_say_what_each_says_alone() -> None:
    owner = torch.arange(300) % 3
    scores = torch.stack([normal(300) + owner, 2 + normal(300, seed=1).abs(), 5 * normal(300, seed=2) ** 3], 1)
    curves = [fitted_surprise(column, owner, 3) for column in scores.unbind(1)]
    found = surprises(curves, scores, owner)
    slow = torch.zeros_like(found)
    for i, k in enumerate(owner.tolist()):
        for r, curve in enumerate(curves):
            z = (float(scores[i, r]) - float(curve.centre_K[k])) / float(curve.width_K[k])
            knots, bends = curve.knots_M.tolist(), curve.bends_M.tolist()
            bent = float(curve.start) + sum(max(0.0, z - m) * b for m, b in zip(knots, bends, strict=True))
            slow[i, r] = float(curve.rate_K[k]) * (bent - 0.05 * max(0.0, knots[0] - z))
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-4)
