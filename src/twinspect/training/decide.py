"""After training: a decision from the held-out good images, with the scores that prediction gives them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from twinspect.decision import Decision, image_id
from twinspect.inference.predictor import classes_of_prototypes
from twinspect.models.contract import AnomalyModel
from twinspect.rules import GoodScores
from twinspect.training.source import FeatureSource
from twinspect.training.statistics import Held


def decide(
    model: AnomalyModel,
    source: FeatureSource,
    train_at: Sequence[int],
    train_prototypes: Tensor,
    held_at: Sequence[int],
    held: Held,
    map_scale: tuple[float, float],
) -> Decision:
    """Calibration scores of the held-out images and the classes of the prototypes.

    Args:
        model: trained and calibrated.
        source: images.
        train_at: positions of the training images.
        train_prototypes: of the training images (n), as `fit_statistics` returns them.
        held_at: positions of the images held out.
        held: of the images held out, as `calibrate` returns it.
        map_scale: ends of the colour scale.
    """
    names = [source.samples[i].class_name for i in train_at]
    owners = np.asarray(train_prototypes.cpu().numpy(), dtype=np.int64)
    classes = classes_of_prototypes(owners, names, model.scorer.prototypes.count)
    trained = tuple(sorted({image_id(source.keys[i]) for i in train_at}))
    good = _good_scores(source, held_at, held, classes)
    return Decision(good, classes, map_scale, model_id=model_id(model), trained=trained)


def _good_scores(
    source: FeatureSource, held_at: Sequence[int], held: Held, class_of_prototype: Sequence[str]
) -> GoodScores:
    samples = [source.samples[i] for i in held_at]
    return GoodScores(
        held.score_N.double().numpy(),
        held.peak_N.double().numpy(),
        held.distance_N.double().numpy(),
        tuple(sample.class_name for sample in samples),
        tuple(class_of_prototype[k] for k in held.prototype_N.tolist()),
        tuple(sample.group for sample in samples),
        tuple(image_id(source.keys[i]) for i in held_at),
    )


def model_id(model: AnomalyModel) -> str:
    """Name of a trained model: hash of its normal statistics, which no two trainings share."""
    digest = hashlib.sha256()
    for name, value in sorted(model.scorer.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
