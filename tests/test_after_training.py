"""What is learnt from good images after training: each is scored by statistics that did not see it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from painting import part
from scipy.ndimage import uniform_filter
from test_statistics import shrunk, slow_token
from tiny import RANDOM, RANDOM_CNN, run_config, save

from twinspect.config import TrainConfig
from twinspect.models.contract import AnomalyModel, Observed, build_model
from twinspect.models.scorer import TOP_SHARE
from twinspect.models.statistics import NEIGHBOURS, PLACE_PRIOR, SPREAD_PRIOR
from twinspect.training.fit import fit_scales
from twinspect.training.normal import fit_statistics
from twinspect.training.outcome import outcome_of
from twinspect.training.source import FeatureSource
from twinspect.types import TRAIN, Sample, silent

PLAIN = [
    {"teacher": RANDOM_CNN, "scoring": "plain"},
    {"teacher": RANDOM, "scoring": "plain"},
    {"teacher": RANDOM_CNN, "model": "rd"},
    {"teacher": RANDOM, "model": "snl", "scoring": "plain"},
]
DEFAULT = [{"teacher": RANDOM_CNN}, {"teacher": RANDOM}, {"teacher": RANDOM_CNN, "model": "snl"}]
TRAINED, HELD = list(range(0, 24, 2)), list(range(1, 24, 2))


def named(options: dict[str, Any]) -> str:
    return "-".join(options.values())


def source_of(options: dict[str, Any], folder: Path, cached: bool) -> tuple[AnomalyModel, FeatureSource]:
    """An untrained model with scales, and 24 pictures of two products in two classes."""
    samples = []
    for index, name in enumerate(("weave", "ring")):
        for number in range(12):
            pixels = part(index, np.random.default_rng([index, number]), 64)
            samples.append(Sample(save(folder / name / f"{number:02d}.png", pixels), TRAIN, name))
    torch.manual_seed(0)
    model = build_model(run_config(**options).model).eval()
    source = FeatureSource(model, samples, folder / "cache" if cached else None, silent)
    fit_scales(model, source, TRAINED, 0)
    return model, source


# ------------------------------------------------------------------------------------------------- plain


@pytest.mark.parametrize("options", PLAIN, ids=named)
@pytest.mark.parametrize("cached", [True, False])
def test_images_held_out_have_the_scores_of_prediction(options: dict[str, Any], cached: bool, tmp_path: Path) -> None:
    model, source = source_of(options, tmp_path, cached)
    good = fit_statistics(model, source, TRAINED, HELD, 0, silent)
    with torch.no_grad():
        out = model.score(*next(source.ahead([list(range(24))])))
    assert good.counted_n.tolist() == [i in HELD for i in range(24)]
    peak_B = out.map_B1HW.flatten(1).amax(1)
    expected = good._replace(
        score_n=out.score_B,
        peak_n=peak_B,
        distance_n=out.cluster_distance_B,
        cluster_n=out.cluster_B,
        readings_nR=out.readings_BR,
    )
    torch.testing.assert_close(good[:8], expected[:8], rtol=1e-4, atol=1e-5)
    z = torch.stack([out.score_local_B, out.score_semantic_B], 1)[HELD]
    torch.testing.assert_close(z.mean(0), torch.zeros(2), atol=1e-3, rtol=0)
    made = outcome_of(model, source.samples, HELD, good, TrainConfig(thumbnails=0))[0]
    assert made.good.score.tolist() == good.score_n[HELD].double().tolist()
    assert made.good.class_name.tolist() == [source.samples[i].class_name for i in HELD]
    assert made.class_of_cluster == ("ring", "weave")
    assert len(made.trained) == len(TRAINED)


# ----------------------------------------------------------------------------------------------- default


def test_covariances_of_many_images_are_of_both_halves_and_of_all_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("twinspect.training.normal._HALF_IMAGES", 3)
    model, source = source_of({"teacher": RANDOM_CNN}, tmp_path, True)
    passes, batches = [], source.batches

    def recorded(indices: Sequence[int]) -> Iterator[tuple[Observed, torch.Tensor]]:
        passes.append(sorted(indices))
        yield from batches(indices)

    monkeypatch.setattr(source, "batches", recorded)
    fit_statistics(model, source, list(range(24)), [], 0, silent, students=False)
    first = [0, 1, 4, 5, 8, 9]  # of twelve images of a class: three of each half, from the first to the last names
    assert passes[1] == [*first, *(12 + i for i in first)]


class Slow:
    """A transcription of cross-fitting for sets whose classes are one cluster each."""

    def __init__(self, model: AnomalyModel, source: FeatureSource) -> None:
        self.model = model
        with torch.no_grad():
            self.observed, _ = next(source.ahead([list(range(24))]))
        names = [one.class_name for one in source.samples]
        self.own = [np.array([i for i in range(24) if names[i] == name]) for name in sorted(set(names))]

    def distances(self, g: int) -> np.ndarray:
        """Of patches (n x h x w): from the means without the image, by the covariance of the other half."""
        gaussian = self.model.scorer.gaussians()[g]
        side, feature_nND = gaussian.side, gaussian.patches(self.observed).double().numpy()
        found = np.zeros((24, side, side))
        for own in self.own:
            rows, centre = feature_nND[own], feature_nND[own].mean((0, 1))
            total, count = rows.sum(0) + PLACE_PRIOR * centre, len(own) + PLACE_PRIOR - 1
            away = np.stack([row - (total - row) / count for row in rows])
            for half in (0, 1):
                others = away[1 - half :: 2].reshape(-1, rows.shape[2])
                inverse = np.linalg.inv(shrunk(others.T @ others / len(others), len(others)))
                square = np.einsum("bnd,de,bne->bn", away[half::2], inverse, away[half::2]) / rows.shape[2]
                maps = square.reshape(-1, side, side)
                found[own[half::2]] = np.sqrt(
                    uniform_filter(maps, (0, gaussian.window, gaussian.window), mode="nearest")
                )
        return found

    def local(self, g: int) -> np.ndarray:
        """Top shares of distances in spreads above their level, both of the other images (n)."""
        distance, found = self.distances(g), np.zeros(24)
        for own in self.own:
            for i in own:
                others = distance[own[own != i]]
                level = uniform_filter(others.mean(0), 3, mode="nearest")
                variance = uniform_filter(others.var(0), 3, mode="nearest")
                count = len(others)
                spread = np.sqrt((count * variance + SPREAD_PRIOR * variance.mean()) / (count + SPREAD_PRIOR))
                z = np.sort(((distance[i] - level) / np.maximum(spread, 1e-3 * level)).ravel())[::-1]
                found[i] = z[: max(1, int(z.size * TOP_SHARE))].mean()
        return found

    def tokens(self, view: int) -> np.ndarray:
        """Distances of tokens by the images of the other four folds (n)."""
        token_nE = self.observed.tokens[view]
        fold = np.zeros(24, int)
        fold[torch.randperm(24, generator=torch.Generator().manual_seed(0)).numpy()] = np.arange(24) % 5
        found = np.zeros(24)
        for own in self.own:
            for i in own:
                found[i] = slow_token(token_nE[own[fold[own] != fold[i]]], token_nE[i])
        return found

    def nearest(self) -> np.ndarray:
        """Mean cosine distance of the five nearest other images, of whatever class (n)."""
        unit = F.normalize(self.observed.embedding_BF.double(), dim=1)
        distance = 1 - unit @ unit.T + 9 * torch.eye(24).double()
        return distance.sort(1).values[:, :NEIGHBOURS].mean(1).numpy()

    def calibration(self, reading_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and spread of a reading in every class."""
        mean = np.array([reading_n[own].mean() for own in self.own])
        square = np.array([np.square(reading_n[own] - m).sum() for own, m in zip(self.own, mean, strict=True)])
        spread = np.sqrt((square + SPREAD_PRIOR * square.sum() / 24) / (12 + SPREAD_PRIOR))
        return mean, np.maximum(spread, 1e-3 * np.abs(mean))


@pytest.mark.parametrize("options", DEFAULT, ids=named)
def test_readings_are_calibrated_by_what_statistics_without_the_image_say(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model, source = source_of(options, tmp_path, cached=True)
    fit_statistics(model, source, TRAINED, HELD, 0, silent)
    scorer, slow = model.scorer, Slow(model, source)
    assert scorer.clusters.count == 2
    first = scorer.student_readings[0]
    readings = {first + i: slow.local(g) for i, g in enumerate(scorer.scored)}
    first = scorer.local_count + scorer.student_readings[1]
    readings |= {first + view: slow.tokens(view) for view in range(len(scorer.tokens))}
    readings[len(scorer.weight_R) - 1] = slow.nearest()
    assert len(readings) == len(scorer.weight_R) - sum(scorer.student_readings)
    for r, reading_n in readings.items():
        mean, spread = slow.calibration(reading_n)
        np.testing.assert_allclose(scorer.standardise.mean_KR[:, r], mean, rtol=2e-2, atol=1e-3, err_msg=str(r))
        np.testing.assert_allclose(scorer.standardise.spread_KR[:, r], spread, rtol=2e-2, err_msg=str(r))


@pytest.mark.parametrize("options", DEFAULT, ids=named)
def test_maps_have_one_level_and_one_spread_and_positions_their_own(options: dict[str, Any], tmp_path: Path) -> None:
    model, source = source_of(options, tmp_path, cached=True)
    fit_statistics(model, source, TRAINED, HELD, 0, silent)
    scorer, slow = model.scorer, Slow(model, source)
    for g, gaussian in enumerate(scorer.gaussians()):
        distance = slow.distances(g)
        for k, own in enumerate(slow.own):
            assert float(scorer.map_level_KG[k, g]) == pytest.approx(distance[own].mean(), rel=5e-3)
            assert float(scorer.map_spread_KG[k, g]) == pytest.approx(distance[own].std(), rel=1e-2)
            level = uniform_filter(distance[own].mean(0), 3, mode="nearest")
            np.testing.assert_allclose(gaussian.level_Khw[k], level, rtol=1e-2)


@pytest.mark.parametrize("options", DEFAULT, ids=named)
@pytest.mark.parametrize("cached", [True, False])
def test_all_good_images_count_and_prediction_scores_those_it_has_seen_lower(
    options: dict[str, Any], cached: bool, tmp_path: Path
) -> None:
    model, source = source_of(options, tmp_path, cached)
    good = fit_statistics(model, source, TRAINED, HELD, 0, silent)
    with torch.no_grad():
        out = model.score(*next(source.ahead([list(range(24))])))
    assert good.counted_n.all()
    assert torch.equal(good.cluster_n, out.cluster_B)
    assert out.score_B.mean() < good.score_n.mean()
    assert out.cluster_distance_B.mean() < good.distance_n.mean()
    every = (*good[:6], *good.tokens, good.embedding_nF, *out)
    assert all(one.double().isfinite().all() for one in every)
    made = outcome_of(model, source.samples, HELD, good, TrainConfig(thumbnails=0))[0]
    assert len(made.good) == len(made.trained) == 24
    assert len(made.held) == len(HELD)
    assert made.class_of_cluster == ("ring", "weave")


def test_students_readings_of_images_they_were_trained_on_are_raised_to_those_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student that is two units better on what it has learnt leaves no trace of that in the calibration."""
    model, source = source_of(DEFAULT[0], tmp_path, cached=True)
    noise = torch.randn(24, 2, generator=torch.Generator().manual_seed(0)).abs() + 3.0
    plain, gone = model.plain, []

    def partial(observed: Any, small: torch.Tensor) -> Any:
        at = list(range(len(gone), len(gone) + len(small)))
        gone.extend(at)
        own = noise[at] - torch.tensor([2.0 * (i in TRAINED) for i in at])[:, None]
        return plain(observed, small)._replace(local_BR=own[:, :1], semantic_BR=own[:, 1:])

    monkeypatch.setattr(model, "plain", partial)
    fit_statistics(model, source, TRAINED, HELD, 0, silent)
    scorer = model.scorer
    assert len(gone) == 24
    for k, own in enumerate((range(12, 24), range(12))):
        held = [i for i in own if i in HELD]
        students = [0, scorer.local_count]
        torch.testing.assert_close(scorer.standardise.mean_KR[k, students], noise[held].mean(0), rtol=1e-4, atol=1e-4)
        assert (scorer.standardise.spread_KR[k, students] < 0.9).all()
