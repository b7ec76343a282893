"""After training: a decision from the held-out good images, scored on the same path as in prediction."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from twinspect.decision import Decision, image_id
from twinspect.inference.predictor import classes_of_prototypes
from twinspect.models.contract import AnomalyModel
from twinspect.rules import GoodScores
from twinspect.training.source import FeatureSource


def decide(
    model: AnomalyModel,
    source: FeatureSource,
    train_at: Sequence[int],
    held_at: Sequence[int],
    map_scale: tuple[float, float],
) -> Decision:
    """Calibration scores of the held-out images (positions ``held_at``) and the classes of the prototypes."""
    names = [source.samples[i].class_name for i in train_at]
    count = model.scorer.prototypes.count
    classes = classes_of_prototypes(_prototypes(model, source, train_at), names, count)
    good = score_held(model, source, held_at, classes)
    trained = tuple(sorted({image_id(source.keys[i]) for i in train_at}))
    return Decision(good, classes, map_scale, model_id=model_id(model), trained=trained)


@torch.no_grad()
def score_held(
    model: AnomalyModel, source: FeatureSource, held_at: Sequence[int], class_of_prototype: Sequence[str]
) -> GoodScores:
    """Scores of good images of a source."""
    model.eval()
    parts = [model.score(observed, small) for _, observed, small in source.batches(held_at)]
    peak = torch.cat([out.map_B1HW.flatten(1).amax(1) for out in parts])

    def column(values_B: torch.Tensor) -> NDArray[np.float64]:
        return values_B.double().cpu().numpy()

    samples = [source.samples[i] for i in held_at]
    return GoodScores(
        column(torch.cat([out.score_B for out in parts])),
        column(peak),
        column(torch.cat([out.prototype_distance_B for out in parts])),
        tuple(sample.class_name for sample in samples),
        tuple(class_of_prototype[int(k)] for out in parts for k in out.prototype_B),
        tuple(sample.group for sample in samples),
        tuple(image_id(source.keys[i]) for i in held_at),
    )


@torch.no_grad()
def _prototypes(model: AnomalyModel, source: FeatureSource, at: Sequence[int]) -> NDArray[np.int64]:
    parts = [model.scorer.prototypes(model.tokens(observed.token_BE)) for _, observed, _ in source.batches(at)]
    return np.asarray(torch.cat(parts).cpu().numpy(), dtype=np.int64)


def model_id(model: AnomalyModel) -> str:
    """Name of a trained model: hash of its normal statistics, which no two trainings share."""
    digest = hashlib.sha256()
    for name, value in sorted(model.scorer.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
