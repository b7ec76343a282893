"""The dual model works on rows; a slow transcription works on maps, as the formulas are written. Both must agree."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from tiny import RANDOM, RANDOM_CNN, picture, run_config

from twinspect import Detector
from twinspect.models.contract import Observed, Outputs, build_model
from twinspect.models.dual import TOP_SHARE as PLAIN_SHARE
from twinspect.models.dual import DualModel
from twinspect.models.layers import DecoderBlock, to_map, to_tokens
from twinspect.models.scorer import TOP_SHARE, GroupPlan, Scorer
from twinspect.models.statistics import NEIGHBOURS, PositionGaussian, Standardiser, TokenGaussian


def slow_resample(maps: torch.Tensor, side: int) -> torch.Tensor:
    if maps.shape[-1] > side and maps.shape[-1] % side == 0:
        return F.avg_pool2d(maps, maps.shape[-1] // side)
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)


def slow_groups(model: DualModel, observed: Observed) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Maps of the layer groups, and the decoder's input: maps of a CNN, tokens of a ViT."""
    selection = model.selection
    if model.teacher.info.vit:
        levels = []  # every level as its group's mean: the mean of all levels is then the mean of these
        for g, members in enumerate(selection.levels):
            tokens = torch.cat([observed.prefix_BMPD[:, g], to_tokens(observed.maps[g])], 1)
            levels += [tokens] * len(members)
        return list(observed.maps), torch.stack(levels).mean(0)
    scaled = []
    for i, one in enumerate(observed.maps):
        mean, scale = selection.get_buffer(f"mean_{i}"), selection.get_buffer(f"scale_{i}")
        scaled.append(slow_resample((one - mean[:, None, None]) / scale[:, None, None], model.groups.side))
    half = len(scaled) // 2
    return [torch.cat(scaled[:half], 1), torch.cat(scaled[half:], 1)], torch.cat(scaled, 1)


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
    if model.teacher.info.vit:
        x = local.bottleneck.net(trunk)
        outputs = list(itertools.accumulate(local.blocks, lambda y, block: slow_block(block, y), initial=x))[1:]
        half, prefix = len(outputs) // 2, model.teacher.info.prefix_tokens
        return [to_map(torch.stack(part).mean(0)[:, prefix:]) for part in (outputs[half:], outputs[:half])]
    x = local.bottleneck.net(to_tokens(trunk))
    x = x + local.position_NW
    for block in local.blocks:
        x = slow_block(block, x)
    maps = to_map(F.linear(x, local.head.weight, local.head.bias))
    return list(torch.split(maps, model.groups.widths, 1))


def slow_token_of_last_level(model: DualModel, observed: Observed) -> torch.Tensor:
    """What the Encoder-Encoder should say: the standardised global token of the last level."""
    scaled = (observed.tokens[0] - model.standardised.mean_E) / model.standardised.scale_E
    return scaled[:, -model.teacher.info.token_channels[-1] :]


def full_size(scorer: Scorer, maps: torch.Tensor) -> torch.Tensor:
    """B x h x w to the size of the outputs, B x H x W."""
    return F.interpolate(maps[:, None], size=(scorer.map_side,) * 2, mode="bilinear", align_corners=False)[:, 0]


def largest(one: torch.Tensor, share: float) -> float:
    """Mean of the largest share of one map's positions."""
    values = sorted(one.flatten().tolist(), reverse=True)
    return float(np.mean(values[: max(1, int(len(values) * share))]))


def slow_plain(model: DualModel, observed: Observed, small: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over groups of 1 - cos at every position; the top 1 % of it, and 1 - cos of class tokens."""
    groups, trunk = slow_groups(model, observed)
    pairs = zip(groups, slow_decoder(model, trunk), strict=True)
    maps = full_size(model.scorer, torch.stack([1 - F.cosine_similarity(t, s, dim=1) for t, s in pairs]).mean(0))
    local = torch.tensor([largest(one, PLAIN_SHARE) for one in maps])
    (said,) = model.student.semantic(small)
    semantic = 1 - F.cosine_similarity(slow_token_of_last_level(model, observed), said, dim=1)
    return maps, torch.stack([local, semantic], 1)


# ------------------------------------------------------------------------------- statistics of good images


def slow_features(plan: GroupPlan, side: int, observed: Observed) -> torch.Tensor:
    """Features of a layer group, B x D x h x w."""
    maps = observed.coarse if plan.coarse else observed.maps
    if plan.region == 1:
        return torch.cat([slow_resample(maps[i], side) for i in plan.maps], 1)
    half, rows = plan.region // 2, []
    for y, x in np.ndindex(side, side):  # maps lie on the grid of the group already
        part = [
            maps[i][:, :, half * y : half * y + plan.region, half * x : half * x + plan.region] for i in plan.maps
        ]
        rows.append(torch.cat(part, 1).mean((2, 3)))
    return torch.stack(rows, 2).unflatten(2, (side, side))


def slow_distance(one: PositionGaussian, features: torch.Tensor, cluster: int) -> torch.Tensor:
    """Root mean square of one image's whitened differences, over windows: h x w."""
    rows = features.flatten(1).T
    rows = rows @ one.rotate_DR if one.rotate_DR.numel() else rows
    mean = one.centre_KD[cluster] + one.step_KD[cluster] * one.place_KND[cluster]
    white = (rows - mean) @ one.whiten_KDD[cluster].float()
    square = white.square().mean(1).reshape(1, 1, one.side, one.side)
    padded = F.pad(square, (one.window // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, one.window, 1).sqrt()[0, 0]


def slow_token(one: TokenGaussian, token: torch.Tensor, cluster: int) -> float:
    """Mahalanobis distance over the root of the dimensions, by the full inverse covariance."""
    away = ((token - one.centre_KE[cluster]) / one.scale_KE[cluster]).double()
    basis = one.basis_KRE[cluster].double()
    beside = torch.eye(len(away), dtype=torch.float64) - basis.T @ basis
    inverse = one.rest_K[cluster] * beside + basis.T @ one.weight_KR[cluster].double().diag() @ basis
    return float((away @ inverse @ away / len(away)).sqrt())


def z_of(one: Standardiser, row: torch.Tensor, cluster: int) -> np.ndarray:
    return ((row - one.mean_KR[cluster]) / one.spread_KR[cluster]).double().numpy()


def slow_surprise(z: np.ndarray) -> np.ndarray:
    """-log of the normal tail; beyond 30 standard deviations its tangent."""
    return -norm.logsf(np.minimum(z, 30.0)) + 30.0 * np.maximum(z - 30.0, 0.0)


def slow_scores(model: DualModel, observed: Observed, small: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of default scoring, image by image."""
    scorer, found = model.scorer, []
    _, plain = slow_plain(model, observed, small)
    groups = scorer.gaussians()
    features = [slow_features(one.plan, one.side, observed) for one in groups]
    bank = scorer.nearest.bank_nF.float()
    for b in range(len(plain)):
        clusters = scorer.clusters
        apart = (observed.tokens[0][b] @ clusters.project_EP - clusters.centres_KP).square().sum(1)
        k = int(apart.argmin())
        maps = [slow_distance(one, f[b], k) for one, f in zip(groups, features, strict=True)]
        scaled = [(m - one.level_Khw[k]) / one.spread_Khw[k]
                  for m, one in zip(maps, groups, strict=True) if one.plan.scored]  # fmt: skip
        local = [float(plain[b, 0]), *(largest(one, TOP_SHARE) for one in scaled)]
        tokens = zip(scorer.token_gaussians(), observed.tokens, strict=True)
        away = 1 - F.cosine_similarity(observed.embedding_BF[b : b + 1], bank, dim=1)
        near = away.sort().values[:NEIGHBOURS]
        semantic = [float(plain[b, 1]), *(slow_token(one, t[b], k) for one, t in tokens), float(near.mean())]
        reading = torch.tensor([*local, *semantic])
        z, weight, link = z_of(scorer.standardise, reading, k), scorer.weight_R.numpy(), float(clusters.link_K[k])
        weight = np.r_[weight[:-1], weight[-1] * (1 - link)]  # nearest images count where images do not repeat
        counted = weight * np.r_[slow_surprise(z[: len(local)]), z[len(local) :]]
        both = torch.tensor([counted[: len(local)].sum(), counted[len(local) :].sum()])
        z = z_of(scorer.standardise_students, both, k)
        large = []
        for g, (m, one) in enumerate(zip(maps, groups, strict=True)):
            if not one.plan.mapped:
                continue
            spread = np.maximum(one.spread_Khw[k].numpy(), float(scorer.map_spread_KG[k, g]))
            surprising = slow_surprise((m.numpy() - float(scorer.map_level_KG[k, g])) / spread)
            large.append(full_size(scorer, torch.from_numpy(surprising).float()[None]))
        found.append({
            "map_B1HW": torch.stack(large).sum(0),
            "score_B": torch.tensor(link * slow_surprise(z[0]) + slow_surprise(z[1])),
            "score_local_B": torch.tensor(z[0]), "score_semantic_B": torch.tensor(z[1]),
            "cluster_B": torch.tensor(k), "cluster_distance_B": reading[len(local) + 1], "readings_BR": reading,
            "nearest_B": away.argmin(),
        })  # fmt: skip
    return {name: torch.stack([one[name] for one in found]) for name in Outputs._fields}


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_rows_score_as_the_transcription_on_maps(kind: str, detector: Detector, quick: Detector) -> None:
    model = (detector if kind == "cnn" else quick).fitted.model
    size = model.size
    pixels = torch.from_numpy(np.stack([picture(i, size, size) for i in range(5)])).permute(0, 3, 1, 2).clone()
    pixels[0, :, 20:30, 20:30] = 255
    with torch.no_grad():
        x = model.teacher.normalise(pixels)
        observed, small = model.observe(x), model.shrink(x)
        out = model(pixels)
        slow = slow_scores(model, observed, small)
    for name, expected in slow.items():
        found = getattr(out, name)
        torch.testing.assert_close(
            found.double(),
            expected.double().reshape(found.shape),
            rtol=2e-3,
            atol=2e-3,
            msg=lambda t, n=name: f"{n} {t}",
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
    slow, slow_trunk = slow_groups(model, observed)
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
