"""After training: learn the normal statistics of residuals, then calibrate on held-out normal images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twinspect.models.contract import AnomalyModel
from twinspect.models.statistics import PlaceMoments, PositionScale, left_out
from twinspect.training.source import FeatureSource, Progress

_INIT_IMAGES = 256  # images that channel statistics are taken from; more change the third digit
_START_IMAGES = 64  # images that a student is started from, and its gains are taken from


@torch.no_grad()
def fit_scales(model: AnomalyModel, source: FeatureSource, indices: Sequence[int], seed: int) -> None:
    """Before training: channel statistics of the teacher's maps and tokens, then the student's own start."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [indices[i] for i in order[:_INIT_IMAGES]]
    tokens: list[Tensor] = []
    levels = range(len(model.groups.channels))
    sums = [torch.zeros(c, dtype=torch.float64, device=model.device) for c in model.groups.channels]
    squares = [torch.zeros_like(one) for one in sums]
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
    few = chosen[:_START_IMAGES]
    model.initialise(lambda: ((observed, small) for _, observed, small in source.batches(few)), seed)


@torch.no_grad()
def fit_statistics(
    model: AnomalyModel, source: FeatureSource, indices: Sequence[int], seed: int, progress: Progress
) -> Tensor:
    """Prototypes, residual covariances, token covariances and position scales, from training images.

    Returns:
        The prototype of every training image (n).
    """
    model.eval()
    scorer = model.scorer
    raw, embeddings = source.vectors(indices)
    tokens = model.tokens(raw)
    scorer.prototypes.fit(tokens, seed)
    link_K = scorer.prototypes.join_varied(tokens, embeddings)
    prototype_N: Tensor = scorer.prototypes(tokens)
    count = scorer.prototypes.count
    modules = scorer.maps_of_groups()
    if modules:
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()
        scorer.fit_gains(_groups(model, source, [indices[i] for i in order[:_START_IMAGES]]))
    moments = [PlaceMoments(count, module.positions, module.dims, model.device) for module in modules]
    said: list[Tensor] = []
    for done, (owner, pairs, said_BE) in enumerate(_residuals(model, source, indices, prototype_N)):
        progress("residual statistics", min((done + 1) * source.portion, len(indices)), 2 * len(indices))
        said.append(said_BE)
        for module, gathered, residual_BND in zip(modules, moments, pairs, strict=True):
            for rows, k in zip(module.rows(residual_BND), owner.tolist(), strict=True):
                gathered.update(rows, k)
    for module, gathered in zip(modules, moments, strict=True):
        module.set_moments(gathered)
    scorer.fit_tokens(tokens, torch.cat(said), embeddings, link_K, seed)
    if modules:
        _fit_positions(model, source, indices, prototype_N, progress)
    return prototype_N


def _fit_positions(
    model: AnomalyModel, source: FeatureSource, indices: Sequence[int], prototype_N: Tensor, progress: Progress
) -> None:
    modules = model.scorer.maps_of_groups()
    count = model.scorer.prototypes.count
    shapes = [module.level_KWhw.shape for module in modules]
    scales = [PositionScale(count, windows, side, model.device) for _, windows, side, _ in shapes]
    # A training image is nearer to a mean that it is a part of than an image that comes later.
    longer_K = torch.tensor([left_out(images) for images in torch.bincount(prototype_N, minlength=count).tolist()])
    longer_K = longer_K.to(model.device)
    for done, (owner, pairs, _) in enumerate(_residuals(model, source, indices, prototype_N)):
        progress(
            "residual statistics", len(indices) + min((done + 1) * source.portion, len(indices)), 2 * len(indices)
        )
        for module, scale, residual_BND in zip(modules, scales, pairs, strict=True):
            scale.update(longer_K[owner][:, None, None, None] * module.length(residual_BND, owner), owner)
    for module, scale in zip(modules, scales, strict=True):
        module.set_scale(scale)


def _residuals(
    model: AnomalyModel, source: FeatureSource, indices: Sequence[int], prototype_N: Tensor
) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
    """(prototype of each image, residuals by group where statistics are kept of them, student's tokens B x E)."""
    scorer, start = model.scorer, 0
    for part, observed, small in source.batches(indices):
        groups, predicted = model.answer(observed, small)
        pairs = zip(groups, predicted.groups, strict=True) if len(scorer.residuals) else ()
        said = torch.cat(predicted.tokens, 1) if predicted.tokens else observed.token_BE.new_zeros(len(part), 0)
        residuals = [scorer.residual(g, t, s) for g, (t, s) in enumerate(pairs)]
        yield prototype_N[start : start + len(part)], residuals, said
        start += len(part)


def _groups(
    model: AnomalyModel, source: FeatureSource, indices: Sequence[int]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    for _, observed, small in source.batches(indices):
        groups, predicted = model.answer(observed, small)
        yield groups, predicted.groups


class Held(NamedTuple):
    """What the calibrated model says of the held-out normal images: `Outputs` of the same names, all on the CPU.

    Attributes:
        score_N: joint scores.
        peak_N: highest values of the maps.
        distance_N: distances from the prototypes.
        prototype_N: indices of the prototypes.
    """

    score_N: Tensor
    peak_N: Tensor
    distance_N: Tensor
    prototype_N: Tensor


@torch.no_grad()
def calibrate(model: AnomalyModel, source: FeatureSource, indices: Sequence[int]) -> Held:
    """Fit the calibration curves on held-out normal images.

    Every image is scored once: maps, distances and prototypes do not depend on the curves, and the joint score that
    `Scorer.calibrate` forms of the readings is the one that prediction forms of them.
    """
    model.eval()
    for curve in model.scorer.curves():
        curve.reset(model.scorer.prototypes.count)
    rows = []
    for _, observed, small in source.batches(indices):
        out = model.score(observed, small)
        peak_B = out.map_B1HW.flatten(1).amax(1)
        readings = (out.groups_BG, out.score_local_B, out.score_semantic_B, out.prototype_B)
        rows.append((*readings, peak_B, out.prototype_distance_B))
    groups, local, semantic, prototype, peak, distance = (torch.cat(column) for column in zip(*rows, strict=True))
    joint = model.scorer.calibrate(groups, local, semantic, prototype)
    return Held(joint.cpu(), peak.cpu(), distance.cpu(), prototype.cpu())
