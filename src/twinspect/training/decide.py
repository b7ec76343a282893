"""After training: a decision from the scores of good images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from twinspect.decision import Decision, image_id
from twinspect.inference.predictor import classes_of_clusters
from twinspect.models.contract import AnomalyModel
from twinspect.rules import GoodScores
from twinspect.training.source import FeatureSource
from twinspect.training.statistics import GoodImages

MAP_SCALE = (0.0, 64.0)  # ends of the colour scale, in standard deviations: good images stay below 8, see `colourise`
_PLAIN = 16.0  # the high end where maps are distances of a scale of their own: over the usual highest of a good image


def decide(
    model: AnomalyModel, source: FeatureSource, train_at: Sequence[int], held_at: Sequence[int], good: GoodImages
) -> Decision:
    """Scores of the good images and the classes of the clusters.

    Args:
        model: trained and calibrated.
        source: images.
        train_at: positions of the images that the students were trained on.
        held_at: positions of the others.
        good: what `fit_statistics` returns of both, in the order of positions.
    """
    images = sorted([*train_at, *held_at])
    names = [source.samples[i].class_name for i in images]
    owners = np.asarray(good.cluster_n.numpy(), dtype=np.int64)
    classes = classes_of_clusters(owners, names, model.scorer.clusters.count)
    learnt = train_at if model.scorer.plain else images
    trained, held = (tuple(sorted({image_id(source.keys[i]) for i in at})) for at in (learnt, held_at))
    counted = good.counted_n.numpy()
    samples = [source.samples[i] for i, wanted in zip(images, counted, strict=True) if wanted]
    keys = tuple(image_id(source.keys[i]) for i, wanted in zip(images, counted, strict=True) if wanted)
    scores = GoodScores(
        good.score_n.double().numpy()[counted],
        good.peak_n.double().numpy()[counted],
        good.distance_n.double().numpy()[counted],
        tuple(sample.class_name for sample in samples),
        tuple(classes[k] for k in owners[counted]),
        tuple(sample.group for sample in samples),
        keys,
    )
    scale = (0.0, _PLAIN * float(np.median(scores.peak))) if model.scorer.plain else MAP_SCALE
    return Decision(scores, classes, scale, model_id=model_id(model), trained=trained, held=held)


def model_id(model: AnomalyModel) -> str:
    """Name of a trained model: hash of its normal statistics, which no two trainings share."""
    digest = hashlib.sha256()
    for name, value in sorted(model.scorer.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
