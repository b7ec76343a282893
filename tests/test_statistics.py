"""Statistics of good images against slow transcriptions: means and covariances, Mahalanobis distances, neighbours."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.covariance import OAS

from twinspect.models.statistics import (
    MOST_CHANNELS,
    NEIGHBOURS,
    PLACE_PRIOR,
    RIDGE,
    SPREAD_PRIOR,
    NearestImages,
    PositionGaussian,
    Standardiser,
    TokenGaussian,
    cross_fitted_tokens,
    left_out,
    shrunk_directions,
    whitening,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(count: int, dims: int, seed: int = 0) -> torch.Tensor:
    return normal(count, dims, seed=seed) @ normal(dims, dims, seed=seed + 1) + normal(dims, seed=seed + 2)


def none(count: int) -> torch.Tensor:
    """Everything in the first cluster."""
    return torch.zeros(count, dtype=torch.long)


# ------------------------------------------------------------------------------------ patches by position


def fitted(image_nND: torch.Tensor, cluster_n: torch.Tensor, window: int = 1) -> PositionGaussian:
    """Statistics of the images, by the module's own steps."""
    clusters = int(cluster_n.max()) + 1
    gaussian = PositionGaussian(image_nND.shape[2], round(image_nND.shape[1] ** 0.5), window)
    rows = gaussian.rows(image_nND)
    total = torch.zeros(clusters, *rows.shape[1:]).index_add(0, cluster_n, rows)
    gaussian.set_means(total, torch.bincount(cluster_n).float())
    away = rows - gaussian.means()[cluster_n]
    covariances = [away[cluster_n == k].flatten(0, 1).double() for k in range(clusters)]
    gaussian.whiten_KDD = torch.stack([whitening(one.T @ one / len(one), len(one)) for one in covariances]).half()
    return gaussian


def slow_means(image_nND: torch.Tensor) -> np.ndarray:
    """Of one cluster, as later images will find them: every position's drawn to the mean of all of them."""
    images = image_nND.double().numpy()
    centre = images.mean((0, 1))
    return (images.sum(0) + PLACE_PRIOR * centre) / (len(images) + PLACE_PRIOR)


def shrunk(covariance: np.ndarray, count: int) -> np.ndarray:
    """Covariance whose correlations are shrunk as Chen et al. (2010) say (OAS), with the ridge added to them."""
    scale, dims = np.sqrt(covariance.diagonal()).clip(1 / np.sqrt(RIDGE) / 65504), len(covariance)
    correlation = covariance / np.outer(scale, scale)
    squares, trace = (correlation**2).sum(), correlation.trace()
    weight = ((1 - 2 / dims) * squares + trace**2) / ((count + 1 - 2 / dims) * (squares - trace**2 / dims))
    correlation = (1 - min(1.0, weight)) * correlation + (min(1.0, weight) + RIDGE) * np.eye(dims)
    return correlation * np.outer(scale, scale)


def slow_distance(image_nND: torch.Tensor, row_D: torch.Tensor, place: int) -> float:
    """Mahalanobis distance of a patch over the root of the channels, by the covariance of `shrunk`."""
    mean = slow_means(image_nND)
    away = (image_nND.double().numpy() - mean).reshape(-1, image_nND.shape[2])
    covariance = shrunk(away.T @ away / len(away), len(away))
    difference = row_D.double().numpy() - mean[place]
    return float(np.sqrt(difference @ np.linalg.inv(covariance) @ difference / len(difference)))


@pytest.mark.parametrize("far", [0.0, 300.0])
def test_distance_of_a_patch_is_mahalanobis_from_the_mean_of_its_position(far: float) -> None:
    """Also where channels lie hundreds of spreads from zero, as those of a ViT do."""
    scale = torch.tensor([3.0, 1.0, 0.02, 50.0, 1.0])
    kinds = [
        scale * (correlated(30 * 9, 5, seed=s).reshape(30, 9, 5) + far + 2 * normal(9, 5, seed=s)) for s in range(4)
    ]
    cluster = torch.arange(4).repeat_interleave(30)
    gaussian = fitted(torch.cat(kinds), cluster)
    for v, own in enumerate(kinds):
        steps = own.sub(own.mean((0, 1))).sum(0).div(34).abs().amax(0) / 127
        apart = np.abs(gaussian.means()[v].numpy() - slow_means(own))
        assert (apart <= (0.51 * steps + 1e-5 * own.abs().amax((0, 1))).numpy()).all()  # kept in 8 bits
        fresh = own[:3] + scale * normal(3, 9, 5, seed=9)
        found = gaussian(fresh, none(3) + v)
        slow = [[slow_distance(kinds[v], fresh[b, p], p) for p in range(9)] for b in range(3)]
        np.testing.assert_allclose(found.flatten(1), slow, rtol=0.02)


def test_every_image_is_measured_by_its_own_cluster() -> None:
    kinds = [(k + 1) * normal(20, 4, 3, seed=k) + 10 * k for k in range(4)]
    cluster = torch.arange(4).repeat_interleave(20)
    together = fitted(torch.cat(kinds), cluster)
    fresh = torch.cat([one[:2] + 1.0 for one in kinds])
    which = torch.arange(4).repeat_interleave(2)
    mixed = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    found = together(fresh[mixed], which[mixed])
    for place, k in enumerate(which[mixed].tolist()):
        alone = fitted(kinds[k], none(20))(fresh[mixed][place : place + 1], none(1))
        torch.testing.assert_close(found[place : place + 1], alone, rtol=1e-3, atol=1e-3)


def test_squared_distances_are_averaged_over_the_window() -> None:
    images, fresh = normal(40, 64, 3), normal(2, 64, 3, seed=1)
    points, windows = (fitted(images, none(40), w) for w in (1, 3))
    squares = points(fresh, none(2)).square()
    padded = F.pad(squares[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    slow = [[[padded[b, y : y + 3, x : x + 3].mean().sqrt() for x in range(8)] for y in range(8)] for b in range(2)]
    torch.testing.assert_close(windows(fresh, none(2)), torch.tensor(slow))


def test_good_images_of_tomorrow_are_about_one_away_whatever_the_scale_of_a_channel() -> None:
    loud = torch.tensor([4.0, 1.0, 0.04, 200.0])
    gaussian = fitted(normal(200, 144, 4) * loud, none(200))
    fresh = normal(20, 144, 4, seed=9) * loud
    found = gaussian(fresh, none(20))
    assert float(found.square().mean()) == pytest.approx(1.0, abs=0.05)
    fresh[0, 65, 2] += 0.4  # ten spreads of the quiet channel, a tenth of one of the loud one
    assert int(gaussian(fresh, none(20))[0].argmax()) == 65


def test_a_whole_part_in_the_wrong_place_is_seen() -> None:
    """Left and right half look different on every good image; on an odd one they have changed places."""
    sides = torch.tensor([2.0, -2.0]).repeat_interleave(6).repeat(12)[None, :, None]
    gaussian = fitted(sides + normal(60, 144, 4), none(60))
    fresh = sides + normal(20, 144, 4, seed=3)
    usual = gaussian(fresh, none(20)).flatten(1).mean(1)
    odd = gaussian(fresh.reshape(20, 12, 12, 4).flip(2).flatten(1, 2), none(20)).flatten(1).mean(1)
    assert odd.min() > 2 * usual.max()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_leaving_an_image_out_of_the_means_is_exact(count: int) -> None:
    """The difference from the mean that the image itself is part of, made longer, is that from the others' mean."""
    images = 5.0 + normal(count, 9, 3).double()
    centre = images.mean((0, 1))
    mean = torch.from_numpy(slow_means(images))
    longer = left_out(torch.tensor([float(count)]), torch.ones(1))[0]
    for i in range(count):
        others = torch.cat([images[:i], images[i + 1 :]])
        without = (others.sum(0) + PLACE_PRIOR * centre) / (count - 1 + PLACE_PRIOR)
        torch.testing.assert_close(longer * (images[i] - mean), images[i] - without, rtol=1e-6, atol=1e-9)


def test_level_and_spread_of_a_position_scale_its_distance() -> None:
    gaussian = PositionGaussian(3, 4)
    level, spread = normal(2, 4, 4).abs(), normal(2, 4, 4, seed=1).abs() + 0.5
    gaussian.level_Khw, gaussian.spread_Khw = level, spread
    distance, cluster = normal(3, 4, 4, seed=2), torch.tensor([1, 0, 1])
    for b, v in enumerate(cluster.tolist()):
        slow = (distance[b] - level[v]) / spread[v]
        torch.testing.assert_close(gaussian.scaled(distance, cluster)[b], slow)


@pytest.mark.parametrize("count", [8, 500])
def test_whitening_makes_the_shrunk_covariance_the_identity(count: int) -> None:
    covariance = torch.cov(correlated(500, 12, seed=5).double().T)
    white = whitening(covariance, count)
    regular = torch.from_numpy(shrunk(covariance.numpy(), count))
    torch.testing.assert_close(white.T @ regular @ white, torch.eye(12).double(), rtol=1e-6, atol=1e-6)


def test_what_few_vectors_taught_does_not_lie_nearer_than_what_they_did_not() -> None:
    """The mean squared length of new vectors is 1 with many, and with few it grows less than without shrinkage."""
    rows = correlated(4000, 40, seed=1).double()
    new = rows[2000:]
    for count, most in ((2000, 1.1), (60, 1.6)):
        white = whitening(rows[:count].T @ rows[:count] / count, count)
        inverse = torch.linalg.inv(rows[:count].T @ rows[:count] / count)
        shrunk_square = float((new @ white).square().sum(1).mean() / 40)
        square = float(((new @ inverse) * new).sum(1).mean() / 40)
        assert 0.8 < shrunk_square < min(most, square)


def test_whitening_of_silent_channels_is_finite_in_fp16() -> None:
    """A channel that hardly moves or never, and one that copies another, must not make distances infinite."""
    rows = normal(100, 6).double()
    rows[:, 1], rows[:, 2], rows[:, 4] = 1e-5 * rows[:, 1], 0.0, 3.0 * rows[:, 0]
    for covariance in (torch.cov(rows.T), torch.zeros(6, 6).double()):
        white = whitening(covariance, 100).half()
        assert white.isfinite().all()
        assert float(white.diagonal().min()) > 0.0


def test_wide_features_are_rotated_down_the_same_way_every_time() -> None:
    dims = MOST_CHANNELS + 128
    first, again = PositionGaussian(dims, 2), PositionGaussian(dims, 2)
    x = normal(2, 4, dims)
    assert first.rows(x).shape == (2, 4, MOST_CHANNELS)
    assert torch.equal(first.rows(x), again.rows(x))
    gram = first.rotate_DR.T @ first.rotate_DR
    torch.testing.assert_close(gram, torch.eye(MOST_CHANNELS), rtol=1e-4, atol=1e-4)
    narrow = normal(2, 4, 8)
    assert PositionGaussian(8, 2).rows(narrow) is narrow


# ------------------------------------------------------------------------------------------------ tokens


def oas(row_nE: np.ndarray) -> np.ndarray:
    """Oracle-approximating shrinkage of the covariance of centred rows (Chen et al., 2010, eq. 23)."""
    count, dims = row_nE.shape
    own = row_nE.T @ row_nE / count
    trace, square = own.trace(), (own @ own).trace()
    rho = ((1 - 2 / dims) * square + trace**2) / ((count + 1 - 2 / dims) * (square - trace**2 / dims))
    rho = min(rho, 1.0)
    return (1 - rho) * own + rho * trace / dims * np.eye(dims)


@pytest.mark.parametrize(("count", "dims"), [(15, 10), (60, 10), (500, 10), (12, 40), (40, 300)])
def test_shrinkage_of_standardised_tokens_is_oas(count: int, dims: int) -> None:
    """Also where there are fewer images than dimensions."""
    rows = correlated(count, dims)
    centred = rows - rows.mean(0)
    scale, basis, weight, rest = (one.double().numpy() for one in shrunk_directions(centred))
    found = np.linalg.inv(rest * (np.eye(dims) - basis.T @ basis) + basis.T @ np.diag(weight) @ basis)
    scaled = centred.double().numpy() / centred.double().square().mean(0).sqrt().numpy()
    np.testing.assert_allclose(centred.numpy() / scale, scaled, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found, oas(scaled), rtol=1e-4, atol=1e-4)
    # scikit-learn leaves the 2 / E of both brackets out.
    np.testing.assert_allclose(found, OAS(assume_centered=True).fit(scaled).covariance_, atol=0.5 / dims)


def slow_token(fit_nE: torch.Tensor, token_E: torch.Tensor) -> float:
    """Mahalanobis distance over the root of the dimensions."""
    rows = (fit_nE - fit_nE.mean(0)).double().numpy()
    scale = np.sqrt(np.square(rows).mean(0))
    away = (token_E - fit_nE.mean(0)).double().numpy() / scale
    return float(np.sqrt(away @ np.linalg.inv(oas(rows / scale)) @ away / len(away)))


def test_distance_of_tokens_is_mahalanobis_by_the_shrunk_covariance_of_the_cluster() -> None:
    kinds = [correlated(40, 12, seed=s) for s in (0, 10)]
    tokens, which = torch.cat(kinds), torch.arange(2).repeat_interleave(40)
    gaussian = TokenGaussian(12)
    gaussian.fit(tokens, which, 2)
    fresh = torch.cat([correlated(5, 12, seed=20), correlated(5, 12, seed=30)])
    owner = torch.arange(10) % 2
    slow = [slow_token(kinds[k], row) for row, k in zip(fresh, owner.tolist(), strict=True)]
    np.testing.assert_allclose(gaussian(fresh, owner), slow, rtol=1e-3)


def test_of_wide_tokens_the_leading_directions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside them has one variance, the mean of what they leave."""
    monkeypatch.setattr("twinspect.models.statistics.MOST_DIRECTIONS", 5)
    tokens = correlated(60, 20)
    centred = tokens - tokens.mean(0)
    scale, basis, weight, rest = shrunk_directions(centred)
    assert basis.shape == (5, 20)
    covariance = oas((centred / scale).double().numpy())
    values, vectors = np.linalg.eigh(covariance)
    np.testing.assert_allclose(1 / weight, values[::-1][:5], rtol=1e-3)
    np.testing.assert_allclose(1 / rest, values[:15].mean(), rtol=1e-3)
    np.testing.assert_allclose(np.abs(basis.double().numpy() @ vectors[:, ::-1][:, :5]), np.eye(5), atol=0.02)


def test_cross_fitted_tokens_are_measured_by_statistics_of_the_other_folds() -> None:
    tokens, cluster, fold = correlated(60, 8), torch.arange(60) % 2, torch.arange(60) // 2 % 5
    found = cross_fitted_tokens(tokens, cluster, 2, fold)
    for i in range(0, 60, 7):
        gaussian = TokenGaussian(8)
        away = fold != fold[i]
        gaussian.fit(tokens[away], cluster[away], 2)
        assert float(found[i]) == float(gaussian(tokens[i : i + 1], cluster[i : i + 1])[0])
    seen = TokenGaussian(8)
    seen.fit(tokens, cluster, 2)
    assert found.mean() > 1.02 * seen(tokens, cluster).mean()  # images that were fitted seem too near
    fresh = correlated(4000, 8)[60:]
    assert float(found.mean()) == pytest.approx(float(seen(fresh, none(3940)).mean()), rel=0.1)


def test_cross_fitting_of_a_cluster_that_lies_in_one_fold() -> None:
    tokens, cluster = correlated(21, 8), torch.tensor([0] * 20 + [1])
    found = cross_fitted_tokens(tokens, cluster, 2, torch.arange(21) % 5)
    assert found.isfinite().all()
    assert found.max() < 10.0


def test_token_distance_is_near_one_on_good_images_and_large_off_them() -> None:
    tokens = correlated(300, 8)
    gaussian = TokenGaussian(8)
    gaussian.fit(tokens, none(300), 1)
    found = gaussian(tokens, none(300))
    assert float(found.square().mean()) == pytest.approx(1.0, abs=0.2)
    direction = torch.linalg.eigh(torch.cov(tokens.T)).eigenvectors[:, 0]  # where good images vary least
    odd = tokens.mean(0) + 8 * (tokens @ direction).std() * direction
    assert gaussian(odd[None], none(1)).item() > 1.2 * found.max().item()


# -------------------------------------------------------------------------------------------- neighbours


def slow_nearest(known_nF: torch.Tensor, row_F: torch.Tensor) -> float:
    unit = F.normalize(known_nF.half().double(), dim=1)
    similar = (unit @ F.normalize(row_F.double(), dim=0)).sort(descending=True).values
    return float(1.0 - similar[:NEIGHBOURS].mean())


def test_nearest_images_leave_the_image_itself_out() -> None:
    images, fresh = correlated(60, 12) + 2.0, correlated(20, 12, seed=7) + 2.0
    module = NearestImages(12)
    own = module.fit(images, seed=0)
    slow = [slow_nearest(torch.cat([images[:i], images[i + 1 :]]), images[i]) for i in range(60)]
    np.testing.assert_allclose(own, slow, atol=2e-3)
    np.testing.assert_allclose(module(fresh), [slow_nearest(images, row) for row in fresh], atol=2e-3)
    assert module(images).mean() < own.mean()  # beside itself an image is nearer


def test_of_many_images_some_are_kept_and_every_image_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinspect.models.statistics.MOST_BANK", 50)
    images = correlated(200, 12) + 2.0
    module, again = NearestImages(12), NearestImages(12)
    own = module.fit(images, seed=0)
    assert torch.equal(own, again.fit(images, seed=0))
    assert module.bank_nF.shape == (50, 12)
    kept = torch.zeros(200, dtype=torch.bool)
    kept[(F.normalize(images, dim=1) @ module.bank_nF.float().T).argmax(0)] = True
    assert int(kept.sum()) == 50
    torch.testing.assert_close(own[~kept], module(images[~kept]))
    assert (own[kept] > module(images[kept])).all()


def test_copies_opposites_and_one_image_alone() -> None:
    images = normal(40, 6) + 1.0
    module = NearestImages(6)
    module.fit(torch.cat([images, images[:3]]), seed=0)
    found = module(torch.cat([images[:3], -images[:3]]))
    assert found.isfinite().all()
    assert found[:3].max() < found[3:].min()
    for count in (1, 2):
        few = NearestImages(6)
        assert few.fit(images[:count], seed=0).isfinite().all()
        assert few(normal(3, 6, seed=3)).isfinite().all()


# ------------------------------------------------------------------------------------------ calibration


def test_standardised_readings_have_mean_zero_and_spread_one_by_cluster() -> None:
    owner = torch.arange(400) % 2
    scale, shift = torch.tensor([[1.0, 5.0], [0.01, 5.0]])[owner], torch.tensor([[0.0, 100.0], [7.0, -3.0]])[owner]
    reading = shift + scale * normal(400, 2)
    module = Standardiser(2)
    module.fit(reading, owner, 2)
    z = module(reading, owner)
    for k in range(2):
        torch.testing.assert_close(z[owner == k].mean(0), torch.zeros(2), rtol=0, atol=1e-4)
        slow = reading[owner == k].double().var(0, unbiased=False)
        pooled = (reading - module.mean_KR[owner]).double().square().mean(0)
        slow = (200 * slow + SPREAD_PRIOR * pooled) / (200 + SPREAD_PRIOR)
        torch.testing.assert_close(module.spread_KR[k], slow.sqrt().float(), rtol=1e-4, atol=0)


def test_a_spread_is_never_nothing() -> None:
    module = Standardiser(2)
    module.fit(torch.tensor([[5.0, 0.0]]).repeat(30, 1), none(30), 1)
    z = module(torch.tensor([[5.0, 0.0], [5.005, 0.0]]), none(2))
    assert z.isfinite().all()
    assert z[0].tolist() == [0.0, 0.0]
    assert float(z[1, 0]) == pytest.approx(1.0, rel=1e-2)  # a thousandth of the mean is one standard deviation
