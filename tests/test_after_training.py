"""Statistics and calibration after training: every image is looked at as often as needed, not more."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RANDOM, RANDOM_CNN, good_folder, run_config

from twinspect.training.decide import decide
from twinspect.training.fit import build_model, silent
from twinspect.training.source import FeatureSource
from twinspect.training.statistics import calibrate, fit_scales, fit_statistics
from twinspect.types import TRAIN, Sample

MODELS = [
    {"teacher": RANDOM},
    {"teacher": RANDOM_CNN},
    {"teacher": RANDOM_CNN, "model": "snl", "scoring": "plain"},
    {"teacher": RANDOM_CNN, "model": "snl", "scoring": "joint"},
]


@pytest.mark.parametrize("options", MODELS, ids=lambda one: "-".join(one.values()))
@pytest.mark.parametrize("cached", [True, False])
def test_held_out_images_scored_once_have_the_scores_of_prediction(
    options: dict[str, Any], cached: bool, tmp_path: Path
) -> None:
    samples = [Sample(path, TRAIN, "cloth") for path in sorted(good_folder(tmp_path / "good", 30).iterdir())]
    torch.manual_seed(0)
    model = build_model(run_config(**options).model)
    source = FeatureSource(model, samples, tmp_path / "cache" if cached else None, silent)
    train_at, held_at = list(range(20)), list(range(20, 30))
    fit_scales(model, source, train_at, 0)
    owners = fit_statistics(model, source, train_at, 0, silent)
    held = calibrate(model, source, held_at)
    with torch.no_grad():
        out = model.score(*source.batch(held_at))
        tokens = torch.cat([source.batch([i])[0].token_BE for i in train_at])
        assert torch.equal(owners, model.scorer.prototypes(model.tokens(tokens)))
    assert torch.equal(held.cluster_n, out.cluster_B)
    for ours, theirs in (
        (held.score_N, out.score_B),
        (held.peak_N, out.map_B1HW.flatten(1).amax(1)),
        (held.distance_N, out.cluster_distance_B),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    good = decide(model, source, train_at, owners, held_at, held, (0.0, 8.0)).good
    assert good.score.tolist() == held.score_N.double().tolist()
    assert good.class_name == ("cloth",) * 10
