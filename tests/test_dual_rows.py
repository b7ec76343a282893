"""The dual model works on rows; a slow transcription works on maps, as the formulas are written. Both must agree."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import RANDOM, RANDOM_CNN, picture, run_config

from twinspect import Detector
from twinspect.models.contract import Observed, Outputs
from twinspect.models.dual import DualModel
from twinspect.models.groups import LevelGroups
from twinspect.models.layers import DecoderBlock, from_rows, to_map, to_tokens
from twinspect.models.statistics import ResidualMap, Surprise
from twinspect.scoring import noisy_or, top_mean
from twinspect.training.fit import build_model


def slow_resample(maps: torch.Tensor, side: int) -> torch.Tensor:
    if maps.shape[-1] > side and maps.shape[-1] % side == 0:
        return F.avg_pool2d(maps, maps.shape[-1] // side)
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)


def slow_groups(groups: LevelGroups, observed: Observed) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Maps of the layer groups, and the decoder's input: maps of a CNN, tokens of a ViT."""
    if groups.averaged:
        levels = []  # every level as its group's mean: the mean of all levels is then the mean of these
        for g, members in enumerate(groups.levels):
            tokens = torch.cat([observed.prefix_BMPD[:, g], to_tokens(observed.maps[g])], 1)
            levels += [tokens] * len(members)
        return list(observed.maps), torch.stack(levels).mean(0)
    scaled = []
    for i, one in enumerate(observed.maps):
        mean, scale = groups.get_buffer(f"mean_{i}"), groups.get_buffer(f"scale_{i}")
        scaled.append((one - mean[:, None, None]) / scale[:, None, None])
    found = [
        torch.cat([slow_resample(scaled[i], side) for i in members], 1)
        for members, side in zip(groups.members, groups.sides, strict=True)
    ]
    return found, torch.cat([slow_resample(one, groups.trunk_side) for one in scaled], 1)


def slow_block(block: DecoderBlock, x: torch.Tensor) -> torch.Tensor:
    """Linear attention head by head, then the MLP."""
    attention, tokens = block.attention, block.norm_1(x)
    parts = F.linear(tokens, attention.qkv.weight, attention.qkv.bias).chunk(3, 2)
    mixed = []
    for q, k, v in zip(*(part.chunk(attention.heads, 2) for part in parts), strict=True):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        weights = q @ k.transpose(1, 2)
        mixed.append(weights @ v / weights.sum(2, keepdim=True).clamp_min(1e-6))
    x = x + F.linear(torch.cat(mixed, 2), attention.out.weight, attention.out.bias)
    first, act, second = block.mlp
    hidden = act(F.linear(block.norm_2(x), first.weight, first.bias))
    return x + F.linear(hidden, second.weight, second.bias)


def slow_decoder(model: DualModel, trunk: torch.Tensor) -> list[torch.Tensor]:
    """Predicted maps of the groups."""
    local = model.student.local
    if local.averaged:
        x = local.bottleneck.net(trunk)
        outputs = list(itertools.accumulate(local.blocks, lambda y, block: slow_block(block, y), initial=x))[1:]
        half, prefix = len(outputs) // 2, model.teacher.info.prefix_tokens
        return [to_map(torch.stack(part).mean(0)[:, prefix:]) for part in (outputs[half:], outputs[:half])]
    x = local.bottleneck.net(to_tokens(trunk))
    x = x + local.position_TW
    for block in local.blocks:
        x = slow_block(block, x)
    maps = [to_map(F.linear(x, head.weight, head.bias)) for head in local.heads]
    return [F.pixel_shuffle(m, f) for m, f in zip(maps, model.groups.factors, strict=True)]


def slow_z_map(module: ResidualMap, residual: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Whitened length at every position, image by image, in spreads above its normal level."""
    maps = []
    for one, k in zip(residual, owner.tolist(), strict=True):
        away = torch.stack([from_rows(column[None], module.factor)[0] for column in module.away_KND[k].float().T])
        rows = (one - away).flatten(1).T - module.mean_KD[k]
        square = (rows @ module.whiten_KDD[k].T).square().mean(1).reshape(1, 1, *one.shape[1:])
        own = []
        for w, window in enumerate(module.windows):
            padded = F.pad(square, (window // 2,) * 4, mode="replicate")
            length = F.avg_pool2d(padded, window, 1).sqrt()[0, 0]
            own.append((length - module.level_KWhw[k, w]) / module.spread_KWhw[k, w])
        maps.append(torch.stack(own).amax(0))
    return torch.stack(maps)


def said(curve: Surprise, score: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    z = (score - curve.centre_K[owner]) / curve.width_K[owner]
    bent = curve.start + ((z[:, None] - curve.knots_M).clamp_min(0) * curve.bends_M).sum(1)
    return curve.rate_K[owner] * (bent - 0.05 * (curve.knots_M[0] - z).clamp_min(0))


def slow_scores(model: DualModel, out: Outputs, observed: Observed, small: torch.Tensor) -> dict[str, torch.Tensor]:
    """Readings of the groups and the scores made of all readings."""
    scorer, owner = model.scorer, out.cluster_B
    groups, trunk = slow_groups(model.groups, observed)
    predicted = slow_decoder(model, trunk)
    residuals = [
        t - scorer.gain(g)[:, None, None] * s for g, (t, s) in enumerate(zip(groups, predicted, strict=True))
    ]
    maps = [slow_z_map(module, r, owner) for module, r in zip(scorer.maps_of_groups(), residuals, strict=True)]
    tops = [top_mean(one, plan.share) for one, plan in zip(maps, scorer.plans, strict=True)]
    readings = torch.cat([torch.stack(tops, 1), out.groups_BG[:, len(tops) :]], 1)
    parts = [said(curve, one, owner) for curve, one in zip(scorer.curves(), readings.unbind(1), strict=False)]
    local = sum(parts[: len(tops)]) + 4.0 * parts[-3]
    link = scorer.link_K[owner]
    near = (1 - link) * (1 - scorer.even_K[owner])
    semantic = (0.25 + 0.75 * (1 - near)) * parts[-2] + near * parts[-1]
    last = [said(curve, one, owner) for curve, one in zip(scorer.curves()[-2:], (local, semantic), strict=True)]
    doubts = [0.5 * one.sign() * one.abs() ** 2.5 for one in last]
    return {
        "groups_BG": readings,
        "score_local_B": local,
        "score_semantic_B": semantic,
        "score_B": noisy_or(link * doubts[0], doubts[1])[0],
    }


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_rows_score_as_the_transcription_on_maps(kind: str, detector: Detector, quick: Detector) -> None:
    model = (detector if kind == "cnn" else quick).fitted.model
    size = model.shape.size
    pixels = torch.from_numpy(np.stack([picture(i, size, size) for i in range(5)])).permute(0, 3, 1, 2).clone()
    pixels[0, :, 20:30, 20:30] = 255
    with torch.no_grad():
        x = model.teacher.normalise(pixels)
        observed, small = model.observe(x), model.shrink(x)
        out = model(pixels)
        slow = slow_scores(model, out, observed, small)
    for name, expected in slow.items():
        torch.testing.assert_close(
            getattr(out, name), expected, rtol=1e-3, atol=1e-3, msg=lambda t, n=name: f"{n} {t}"
        )


def test_pixels_are_normalised_and_shrunk_as_written() -> None:
    model = build_model(run_config(RANDOM_CNN, size=64, ee_shrink=2).model)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(one)[:, None, None] for one in (model.teacher.info.mean, model.teacher.info.std))
    slow = (pixels.float() / 255 - mean) / std
    x = model.teacher.normalise(pixels)
    torch.testing.assert_close(x, slow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.shrink(x), F.avg_pool2d(slow, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("teacher", [RANDOM, RANDOM_CNN, "resnet18"])
def test_every_teacher_trains_on_rows_as_the_transcription_does(teacher: str) -> None:
    """Same predictions and the same gradient of the local loss."""
    torch.manual_seed(0)
    model = build_model(run_config(teacher, size=64).model).eval()
    observed = model.observe(torch.randn(2, 3, 64, 64))
    groups, trunk = model.groups(observed)
    predicted = model.student.local(trunk)
    slow, slow_trunk = slow_groups(model.groups, observed)
    slow_predicted = slow_decoder(model, slow_trunk)
    weight = model.student.local.bottleneck.net[1].weight
    grads = []
    for pairs in (zip(groups, predicted, strict=True), zip(slow, slow_predicted, strict=True)):
        loss = sum((1 - F.cosine_similarity(t.flatten(1), s.flatten(1))).sum() for t, s in pairs)
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)
    for rows, maps in zip(predicted, slow_predicted, strict=True):
        assert rows.shape == (2, maps.shape[2] ** 2, maps.shape[1])
        torch.testing.assert_close(rows.square().mean((1, 2)), maps.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
