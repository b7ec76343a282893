"""After training: learn the normal statistics of residuals, then calibrate on held-out normal images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinspect.models.dual import DualModel, residual
from twinspect.models.statistics import Moments, PositionScale
from twinspect.training.source import FeatureSource, Progress

_INIT_IMAGES = 256  # images that channel statistics are taken from; more change the third digit


@dataclass(frozen=True, slots=True)
class NormalScores:
    """Scores of held-out normal images (n each), kept in the bundle as the calibration set."""

    score: NDArray[np.float64]
    local: NDArray[np.float64]
    semantic: NDArray[np.float64]
    prototype: NDArray[np.int64]


@torch.no_grad()
def fit_scales(model: DualModel, source: FeatureSource, indices: Sequence[int], seed: int) -> None:
    """Before training: channel statistics of the teacher's maps and tokens on normal images."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [indices[i] for i in order[:_INIT_IMAGES]]
    tokens: list[Tensor] = []
    levels = range(len(model.groups.channels))
    sums = [torch.zeros(c, dtype=torch.float64) for c in model.groups.channels]
    squares = [torch.zeros(c, dtype=torch.float64) for c in model.groups.channels]
    counts = [0 for _ in levels]
    for _, observed, _ in source.batches(chosen):
        tokens.append(observed.token_BE)
        for i, one in enumerate(observed.maps):
            sums[i] += one.double().sum((0, 2, 3))
            squares[i] += one.double().square().sum((0, 2, 3))
            counts[i] += one.shape[0] * one.shape[2] * one.shape[3]
    for i in levels:
        mean = sums[i] / counts[i]
        variance = (squares[i] / counts[i] - mean.square()).clamp_min(0.0)
        model.groups.fit(i, mean.float(), variance.sqrt().float())
    model.tokens.fit(torch.cat(tokens))


@torch.no_grad()
def fit_statistics(
    model: DualModel, source: FeatureSource, indices: Sequence[int], seed: int, progress: Progress
) -> None:
    """Prototypes, residual covariances, token covariances and position scales, from training images."""
    model.eval()
    scorer = model.scorer
    tokens = torch.cat([model.tokens(observed.token_BE) for _, observed, _ in source.batches(indices, 64)])
    scorer.prototypes.fit(tokens, seed)
    prototype_N = scorer.prototypes(tokens)
    count = scorer.prototypes.count
    moments = [Moments(count, module.dims) for module in scorer.maps_of_groups()]
    missed: list[Tensor] = []
    for place, (part, groups, predicted, predicted_BE) in enumerate(_answers(model, source, indices)):
        progress("residual statistics", (place + 1) * len(part), 2 * len(indices))
        missed.append(predicted_BE)
        owners = prototype_N[place * 8 : place * 8 + len(part)].tolist()
        for module, gathered, t, s in zip(scorer.maps_of_groups(), moments, groups, predicted, strict=True):
            for rows, owner in zip(module.rows(residual(t, s)), owners, strict=True):
                gathered.update(rows, owner)
    for module, gathered in zip(scorer.maps_of_groups(), moments, strict=True):
        module.set_moments(gathered)
    variant_N, variants = scorer.prototypes.variant(tokens), scorer.prototypes.variants
    scorer.token_of_teacher.fit(tokens, variant_N, variants)
    said = torch.cat(missed)
    scorer.gain_E = (tokens * said).sum(0) / said.square().sum(0).clamp_min(1e-12)
    scorer.token_of_student.fit(tokens - scorer.gain_E * said, variant_N, variants)
    _fit_positions(model, source, indices, prototype_N, progress)


def _fit_positions(
    model: DualModel, source: FeatureSource, indices: Sequence[int], prototype_N: Tensor, progress: Progress
) -> None:
    count = model.scorer.prototypes.count
    scales = [PositionScale(count, side) for side in model.groups.sides]
    for place, (part, groups, predicted, _) in enumerate(_answers(model, source, indices)):
        progress("residual statistics", len(indices) + (place + 1) * len(part), 2 * len(indices))
        owner = prototype_N[place * 8 : place * 8 + len(part)]
        for module, scale, t, s in zip(model.scorer.maps_of_groups(), scales, groups, predicted, strict=True):
            scale.update(module.length(residual(t, s), owner), owner)
    for module, scale in zip(model.scorer.maps_of_groups(), scales, strict=True):
        module.set_scale(scale)


def _answers(model: DualModel, source: FeatureSource, indices: Sequence[int]):  # type: ignore[no-untyped-def]
    for part, observed, small in source.batches(indices, 8):
        groups, trunk = model.groups(observed.maps)
        predicted = model.student(trunk, small)
        yield part, groups, predicted.groups, torch.cat(predicted.tokens, 1)


@torch.no_grad()
def calibrate(model: DualModel, source: FeatureSource, indices: Sequence[int]) -> NormalScores:
    """Fit both surprise curves on held-out normal images and return their scores."""
    model.eval()
    count = model.scorer.prototypes.count
    curves = model.scorer.curves_of_groups()
    for curve in (*curves, model.scorer.surprise_local, model.scorer.surprise_semantic):
        curve.reset(count)
    groups, semantic, prototype = _raw_scores(model, source, indices)
    for g, curve in enumerate(curves):
        curve.fit(groups[:, g], prototype, count)
    model.scorer.surprise_semantic.fit(semantic, prototype, count)
    local = model.scorer.local(groups, prototype)
    model.scorer.surprise_local.fit(local, prototype, count)
    joint = model.scorer.surprise_local(local, prototype) + model.scorer.surprise_semantic(semantic, prototype)
    return NormalScores(joint.double().numpy(), local.double().numpy(), semantic.double().numpy(), prototype.numpy())


def _raw_scores(model: DualModel, source: FeatureSource, indices: Sequence[int]) -> tuple[Tensor, ...]:
    parts = []
    for _, observed, small in source.batches(indices, 8):
        out = model.score(observed, small)
        parts.append((out.groups_BG, out.score_semantic_B, out.prototype_B))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
