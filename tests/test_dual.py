"""System A: sizes of the students, plain and default scores, and what a defect does to them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from tiny import RANDOM, RANDOM_CNN, images_to_test, picture, run_config, train_samples

from twinspect import Detector
from twinspect.config import ModelConfig, TrainConfig
from twinspect.errors import ConfigError
from twinspect.losses import encoder_decoder_loss, encoder_encoder_loss, noisy_or_loss
from twinspect.models.contract import Observed, build_model, fit_size
from twinspect.models.dual import DualModel
from twinspect.models.layers import surprise
from twinspect.models.scorer import LayerGroup
from twinspect.models.statistics import NearestImages, TokenGaussian
from twinspect.models.teachers import Backbone, create_teacher
from twinspect.training.fit import choose_images, fit_scales
from twinspect.training.normal import _Fitting, fit_statistics
from twinspect.training.source import FeatureSource
from twinspect.types import silent


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def meta_model(teacher: str, size: int, **shape: float) -> DualModel:
    """A model without memory: shapes and counts only."""
    with torch.device("meta"):
        frozen = create_teacher(teacher, pretrained=False)
        return DualModel(frozen, ModelConfig(**shape), size)  # type: ignore[arg-type]


def test_published_size_of_the_encoder_decoder() -> None:
    """ViT-B/14 with registers: bottleneck and eight linear-attention blocks, about 61 M trainable weights."""
    model = meta_model("dinov2-base", 448)
    assert count(model.student.local) == pytest.approx(61e6, rel=0.02)
    # The other student is the teacher's own architecture.
    assert count(model.student.semantic) == pytest.approx(count(model.teacher), rel=0.1)


def test_sizes_of_the_decoder() -> None:
    """Any width has whole heads; the decoder of a ViT answers for two groups of its layers, as wide as they are."""
    assert meta_model(RANDOM_CNN, 64, width=100).student.local.blocks[0].attention.heads == 2
    with pytest.raises(ConfigError, match="--width 128: with test_vit as teacher it is 64; leave it out"):
        meta_model(RANDOM, 64, width=128)
    with pytest.raises(ConfigError, match="--depth 1: .* type 2 or more"):
        meta_model(RANDOM, 64, depth=1)


def test_depth_dial_makes_the_encoder_encoder_cheaper() -> None:
    full, half = (meta_model("dinov2-small", 112, ee_depth=d) for d in (1.0, 0.5))
    assert count(half.student.semantic) < 0.65 * count(full.student.semantic)
    assert count(half.student.local) == count(full.student.local)


def test_depth_dial_keeps_a_part_of_every_stage_of_a_cnn() -> None:
    full, half, least = (Backbone("resnet18", depth) for depth in (1.0, 0.5, 0.01))
    assert [len(half.net.get_submodule(f"layer{i}")) for i in range(1, 5)] == [1] * 4
    assert count(least) == count(half) < 0.5 * count(full)
    x = torch.randn(2, 3, 64, 64)
    assert [m.shape for m in half.features(x).maps] == [m.shape for m in full.features(x).maps]


def test_all_positions_of_both_groups_are_compared() -> None:
    model = build_model(run_config(RANDOM_CNN).model).train()
    x = torch.randn(2, 3, 64, 64)
    observed, small = model.observe(x), model.shrink(x)
    groups, trunk = model.groups(observed)
    torch.manual_seed(0)
    expected = encoder_decoder_loss(groups, model.student.local(trunk), 0.0).mean()
    torch.manual_seed(0)
    assert float(model.losses(observed, small, 0, TrainConfig())["local"]) == pytest.approx(float(expected.detach()))


def test_groups_of_a_cnn_are_halves_of_its_levels_on_one_grid() -> None:
    model = build_model(run_config("efficientnet-lite0", size=128).model)
    channels = model.teacher.info.channels
    half = len(channels) // 2
    assert model.groups.widths == [sum(channels[:half]), sum(channels[half:])]
    groups, trunk = model.groups(model.observe(torch.randn(1, 3, 128, 128)))
    assert [tuple(one.shape) for one in groups] == [(1, 64, width) for width in model.groups.widths]
    assert torch.equal(torch.cat(groups, 2), trunk)


def test_class_and_register_tokens_go_through_the_decoder_but_are_not_compared() -> None:
    model = build_model(run_config("test_vit2", size=64).model).eval()
    observed = model.observe(torch.randn(2, 3, 64, 64))
    groups, trunk = model.groups(observed)
    assert [tuple(one.shape) for one in groups] == [(2, 16, 64)] * 2
    assert trunk.shape == (2, 17, 64)
    other = observed._replace(prefix_BMPD=observed.prefix_BMPD + 1.0)
    same, moved = model.groups(other)
    assert all(torch.equal(a, b) for a, b in zip(groups, same, strict=True))
    before, after = model.student.local(trunk), model.student.local(moved)
    assert [one.shape for one in before] == [one.shape for one in groups]
    assert not torch.equal(before[0], after[0])  # linear attention carries them to every patch


def test_recentred_targets_lose_what_the_class_token_says() -> None:
    """Layer norm of patches minus class token; what the decoder sees stays as it is."""
    plain, recentred = (build_model(run_config(RANDOM, recentre=on).model) for on in (False, True))
    observed = plain.observe(torch.randn(2, 3, 64, 64))
    (groups, trunk), (found, same) = plain.groups(observed), recentred.groups(observed)
    assert torch.equal(trunk, same)
    for g, (patches, target) in enumerate(zip(groups, found, strict=True)):
        away = patches - observed.prefix_BMPD[:, g, :1]
        away = away - away.mean(2, keepdim=True)
        torch.testing.assert_close(target, away / away.square().mean(2, keepdim=True).sqrt(), rtol=1e-4, atol=1e-4)
    for teacher in (RANDOM_CNN, "test_vit2"):
        with pytest.raises(ConfigError, match="no class token"):
            build_model(run_config(teacher, recentre=True).model)


def test_the_decoder_of_a_vit_starts_small_and_learns_as_published() -> None:
    model = build_model(run_config("test_vit").model)
    weight = model.student.local.blocks[0].mlp[0].weight
    assert float(weight.detach().abs().max()) <= 0.03
    assert float(weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    local, semantic = model.parameter_groups(TrainConfig())
    assert (local["amsgrad"], local["eps"]) == (True, 1e-10)
    assert "amsgrad" not in semantic
    assert "amsgrad" not in build_model(run_config(RANDOM_CNN).model).parameter_groups(TrainConfig())[0]


@pytest.mark.parametrize("rank", [6, 16])
def test_the_decoder_of_a_cnn_starts_from_principal_components(rank: int) -> None:
    """A start rebuilds features of a few dimensions, of more as well as principal components can, and no others."""
    torch.manual_seed(0)
    student = build_model(run_config(RANDOM_CNN, width=8, dropout=0.0).model).student.local
    dims, draw = student.head.out_features, torch.Generator().manual_seed(1)
    basis_RD = torch.randn(rank, dims, generator=draw)
    length, wide = len(student.position_NW), torch.linspace(1.0, 0.2, rank)

    def drawn(images: int) -> torch.Tensor:
        trunk_BND = (torch.randn(images, length, rank, generator=draw) * wide) @ basis_RD
        return trunk_BND / basis_RD.square().sum(0).sqrt()

    good_BND = drawn(200)
    with torch.no_grad():
        student.start(lambda: good_BND.split(50))
        new_BND = drawn(50)
        student.eval()
        rest = 1.0 - F.cosine_similarity(torch.cat(student(new_BND), 2), new_BND, dim=2).mean()
        axes_DW = torch.linalg.svd(good_BND.flatten(0, 1), full_matrices=False).Vh[:8].T
        best = 1.0 - F.cosine_similarity(new_BND @ axes_DW @ axes_DW.T, new_BND, dim=2).mean()
        odd_BND = torch.randn(50, length, dims, generator=draw)
        odd = 1.0 - F.cosine_similarity(torch.cat(student(odd_BND), 2), odd_BND, dim=2).mean()
    assert best - 1e-4 <= rest <= best + 0.05
    assert odd > rest + 0.3


@pytest.mark.parametrize("depth", [0.3, 0.5, 1.0])
def test_a_shallower_student_answers_for_every_level(depth: float) -> None:
    model = build_model(run_config(ee_depth=depth, ee_tokens="all").model)
    x = torch.randn(2, 3, 64, 64)
    tokens = model.student.semantic(model.shrink(x))
    assert [t.shape for t in tokens] == [(2, c) for c in model.teacher.info.token_channels]


@pytest.mark.parametrize("depth", [0.5, 1.0])
def test_the_encoder_encoder_may_answer_for_the_last_block_alone(depth: float) -> None:
    model = build_model(run_config(ee_depth=depth).model).eval()
    x = torch.randn(2, 3, 64, 64)
    observed, small = model.observe(x), model.shrink(x)
    (said,) = model.predictions(observed, small)[2:]
    last = model.standardised(observed.tokens[0])[:, -model.teacher.info.token_channels[-1] :]
    expected = 1.0 - F.cosine_similarity(last, said, dim=1)
    torch.testing.assert_close(model.plain(observed, small).semantic_BR[:, 0], expected)
    with pytest.raises(ConfigError, match="last, all"):
        run_config(ee_tokens="first")
    with pytest.raises(ConfigError, match="--model dual only"):
        run_config(model="snl", ee_tokens="all")


@pytest.mark.parametrize(("reading", "same"), [("n2", True), ("n3", True), ("n1", False)])
def test_students_trained_together_are_students_trained_apart(reading: str, same: bool) -> None:
    """They share no weight, and -log(1 - P) is a sum over them; only n1 weighs one by the other."""
    model = build_model(run_config(RANDOM_CNN, dropout=0.0).model).train()
    x = torch.randn(2, 3, 64, 64)
    observed, small = model.observe(x), model.shrink(x)
    groups, trunk = model.groups(observed)
    local_B = encoder_decoder_loss(groups, model.student.local(trunk))
    weights = list(model.student.local.parameters())
    semantic_B = encoder_encoder_loss(model.targets(observed)[2:], model.student.semantic(small))
    together = torch.autograd.grad(noisy_or_loss(local_B, semantic_B, reading), weights, retain_graph=True)
    alone = torch.autograd.grad(noisy_or_loss(local_B, torch.zeros_like(semantic_B), reading), weights)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(together, alone, strict=True)) == same


def test_size_dials() -> None:
    thin, wide = (build_model(run_config("test_efficientnet", width=w).model) for w in (16, 64))
    assert count(thin.student.local) < count(wide.student.local)
    flat, deep = (build_model(run_config("test_efficientnet", depth=d).model) for d in (1, 3))
    assert count(flat.student.local) < count(deep.student.local)


# ------------------------------------------------------------------------------------------- plain scoring


@pytest.fixture(scope="module", params=[RANDOM_CNN, RANDOM])
def plain(request: pytest.FixtureRequest, parts: Path) -> Detector:
    return Detector(config=run_config(request.param, scoring="plain")).fit(train_samples(parts))


def squares(model: DualModel, paths: list[Path]) -> torch.Tensor:
    from twinspect.data.images import read_rgb, resize_rgb

    pixels = np.stack([resize_rgb(read_rgb(path), model.size) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@torch.no_grad()
def paper_readings(model: DualModel, pixels: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """Maps, and both students' distances (B x 2), as the paper states them."""
    x = model.teacher.normalise(pixels)
    observed, small = model.observe(x), model.shrink(x)
    groups, trunk = model.groups(observed)
    pairs = zip(groups, model.student.local(trunk), strict=True)
    distance = torch.stack([1 - (t * s).sum(2) / t.norm(dim=2) / s.norm(dim=2) for t, s in pairs]).mean(0)
    side = round(distance.shape[1] ** 0.5)
    maps = distance.reshape(-1, 1, side, side)
    maps = F.interpolate(maps, size=(model.scorer.map_side,) * 2, mode="bilinear", align_corners=False)
    top = int(0.01 * maps[0].numel())
    local = maps.flatten(1).sort(1, descending=True).values[:, :top].mean(1)
    scaled = (observed.tokens[0] - model.standardised.mean_E) / model.standardised.scale_E
    t, (s,) = scaled[:, -model.teacher.info.token_channels[-1] :], model.student.semantic(small)
    semantic = 1 - (t * s).sum(1) / t.norm(dim=1) / s.norm(dim=1)
    return maps, torch.stack([local, semantic], 1).double().numpy()


def test_plain_scores_are_the_paper_and_nothing_else(plain: Detector, parts: Path) -> None:
    """Top 1 % of the mean of 1 - cos, 1 - cos of class tokens, and the Noisy-OR of both students' probabilities."""
    model = plain.fitted.model
    assert isinstance(model, DualModel)
    held = [s.image for s in choose_images(train_samples(parts), plain.config)[1]]
    _, good = paper_readings(model, squares(model, held))
    pixels = squares(model, images_to_test(parts, None))
    maps, readings = paper_readings(model, pixels)
    lower = norm.cdf((readings - good.mean(0)) / good.std(0))  # probability that a good image's distance is lower
    joint = 1 - (1 - lower[:, 0]) * (1 - lower[:, 1])
    with torch.no_grad():
        out = model(pixels)
    torch.testing.assert_close(out.map_B1HW, maps, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.readings_BR, readings, rtol=1e-4, atol=1e-5)
    z = torch.stack([out.score_local_B, out.score_semantic_B], 1).double().numpy()
    np.testing.assert_allclose(norm.cdf(z), lower, atol=2e-3)
    np.testing.assert_allclose(1 - np.exp(-out.score_B.double().numpy()), joint, atol=2e-3)
    np.testing.assert_allclose(out.score_B, -norm.logsf(z).sum(1), rtol=2e-3, atol=1e-5)


def test_plain_scoring_keeps_no_statistics_of_good_images_but_its_calibration(plain: Detector) -> None:
    scorer = plain.fitted.model.scorer
    kinds = (LayerGroup, TokenGaussian, NearestImages)
    assert not [module for module in scorer.modules() if isinstance(module, kinds)]
    sizes = {name: value.numel() for name, value in scorer.state_dict().items() if not name.startswith("clusters.")}
    assert sum(sizes.values()) <= 16, sizes
    default = build_model(run_config(RANDOM_CNN).model).scorer
    assert {type(module) for module in default.modules()} >= set(kinds)


def test_plain_thresholds_go_by_the_images_that_were_held_out(plain: Detector, parts: Path) -> None:
    decision = plain.fitted.decision
    training, held = choose_images(train_samples(parts), plain.config)
    assert len(decision.good) == len(held)
    assert set(decision.good.key) == set(decision.held)
    assert len(decision.trained) == len(training)
    assert not set(decision.trained) & set(decision.held)
    scores = sorted(result.score for result in plain.predict([s.image for s in held]))
    np.testing.assert_allclose(scores, sorted(decision.good.score), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------ default scoring


def test_default_score_is_the_noisy_or_of_the_calibrated_students(detector: Detector, parts: Path) -> None:
    model = detector.fitted.model
    pixels = squares(model, images_to_test(parts, None))
    with torch.no_grad():
        out = model(pixels)
    link = model.scorer.clusters.link_K[out.cluster_B]
    torch.testing.assert_close(out.score_B, link * surprise(out.score_local_B) + surprise(out.score_semantic_B))
    assert len(out.score_B.unique()) == len(pixels)  # nothing saturates, no ties


def test_scores_of_both_students_are_reported_beside_the_joint_one(detector: Detector, parts: Path) -> None:
    results = detector.predict(images_to_test(parts, None))
    for name in ("score", "score_local", "score_semantic"):
        assert len({getattr(r, name) for r in results}) == len(results)


def test_local_surprise_counts_by_its_link() -> None:
    scorer = build_model(run_config(RANDOM_CNN).model).scorer
    scorer.standardise_students.fit(torch.randn(40, 2), torch.arange(40) % 2, 2)
    students = torch.tensor([[3.0, 3.0], [3.0, 3.0]])
    owner = torch.tensor([0, 1])
    scorer.clusters.link_K = torch.tensor([1.0, 1.0])
    whole, _ = scorer.joined(students, owner)
    scorer.clusters.link_K = torch.tensor([1.0, 0.1])
    found, z = scorer.joined(students, owner)
    torch.testing.assert_close(whole - found, torch.stack([torch.tensor(0.0), 0.9 * surprise(z[1, 0])]))


def test_a_student_counts_by_its_skill_in_predicting_good_images(parts: Path) -> None:
    """1 where it says what the teacher says, 0 where the mean of good images says it better."""
    torch.manual_seed(0)
    model = build_model(run_config(RANDOM_CNN).model).eval()
    source = FeatureSource(model, train_samples(parts), None, silent)
    train_at, held_at = list(range(16)), list(range(16, 24))
    fit_scales(model, source, train_at, 0)
    scorer = model.scorer
    local, semantic = 0, scorer.local_count

    def weights() -> list[float]:
        fit_statistics(model, source, train_at, held_at, 0, silent)
        others = [i for i in range(len(scorer.weight_R)) if i not in (local, semantic)]
        assert scorer.weight_R[others].tolist() == [1.0] * len(others)
        return [float(scorer.weight_R[i]) for i in (local, semantic)]

    assert weights() == [0.0, 0.0]  # not trained at all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "predictions", lambda observed, small: model.targets(observed))
        assert weights() == pytest.approx([1.0, 1.0], abs=1e-5)
    with pytest.MonkeyPatch.context() as patch:  # the local student knows everything, the other nothing
        own = model.predictions

        def mixed(observed: Observed, small: torch.Tensor) -> list[torch.Tensor]:
            pairs = zip(model.targets(observed), own(observed, small), strict=True)
            return [target if target.dim() == 3 else said for target, said in pairs]

        patch.setattr(model, "predictions", mixed)
        assert weights() == pytest.approx([1.0, 0.0], abs=1e-5)
    for skill, weight in ((0.5, 0.0), (0.75, 0.0), (0.875, 0.5)):  # half as far from the teacher as the mean is: 0.5
        with pytest.MonkeyPatch.context() as patch:
            part = torch.tensor([1.0 - skill, 1.0], dtype=torch.float64)
            patch.setattr(_Fitting, "_apart", lambda self, *given, part=part: part.expand(len(given[-1]), 2))
            assert weights() == [weight, weight]


def test_nothing_is_cropped_when_an_image_is_brought_to_size() -> None:
    image = torch.zeros(1, 3, 40, 90)
    image[..., 0, 0] = image[..., -1, -1] = 255.0
    small = fit_size(image, 20)
    assert small.shape == (1, 3, 20, 20)
    assert small[..., 0, 0].max() > 0
    assert small[..., -1, -1].max() > 0
    same = torch.rand(1, 3, 20, 20)
    assert fit_size(same, 20) is same


def test_same_seed_builds_the_same_students() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(4)
        models.append(build_model(run_config(RANDOM).model))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_a_defect_raises_the_map_where_it_is(detector: Detector) -> None:
    clean = picture(500)
    spoiled = clean.copy()
    spoiled[60:72, 20:32] = 255
    good, bad = detector.predict([clean, spoiled])
    assert bad.score > good.score
    assert bad.score_local > good.score_local
    row, column = np.unravel_index(int(bad.map.argmax()), bad.map.shape)
    assert 52 <= row < 80
    assert 12 <= column < 40
