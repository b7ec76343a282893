"""System A: sizes of the students, the joint score, the residual, and what a defect does to it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import RANDOM, RANDOM_CNN, images_to_test, picture, run_config

from twinspect import Detector
from twinspect.config import TrainConfig
from twinspect.errors import ConfigError
from twinspect.losses import encoder_decoder_loss
from twinspect.models.contract import Observed, fit_size
from twinspect.models.dual import DualModel, DualShape
from twinspect.models.teachers import Backbone, create_teacher
from twinspect.scoring import noisy_or
from twinspect.training.fit import build_model


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def meta_model(teacher: str, size: int, **shape: float) -> DualModel:
    """A model without memory: shapes and counts only."""
    with torch.device("meta"):
        frozen = create_teacher(teacher, pretrained=False)
        return DualModel(frozen, DualShape(size, **shape))  # type: ignore[arg-type]


def test_published_size_of_the_encoder_decoder() -> None:
    """ViT-B/14 with registers: bottleneck and eight linear-attention blocks, about 61 M trainable weights."""
    model = meta_model("dinov2-base", 448)
    assert count(model.student.local) == pytest.approx(61e6, rel=0.02)
    # The other student is the teacher's own architecture.
    assert count(model.student.semantic) == pytest.approx(count(model.teacher), rel=0.1)


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


def test_a_step_compares_some_positions_others_at_the_next() -> None:
    model = build_model(run_config(RANDOM_CNN).model).train()
    config = TrainConfig(compared=0.25)
    kept = [model.compared(step, config) for step in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert len(kept[0].unique()) == len(kept[0]) == model.groups.trunk_side**2 // 4

    def loss(observed: Observed, share: float) -> float:
        torch.manual_seed(0)
        return float(model.losses(observed, small, 0, TrainConfig(compared=share))["local"])

    x = torch.randn(2, 3, 64, 64)
    observed, small = model.observe(x), model.shrink(x)
    groups, trunk = model.groups(observed)
    torch.manual_seed(0)
    said = model.student.local(trunk)
    torch.manual_seed(0)
    some = model.student.local(trunk, kept[0].expand(2, -1))
    for own, part, factor in zip(said, some, model.groups.factors, strict=True):
        blocks = own.reshape(2, -1, factor**2 * own.shape[2])[:, kept[0]]
        torch.testing.assert_close(part.reshape(blocks.shape), blocks)
    assert loss(observed, 0.25) != loss(observed, 1.0)
    torch.manual_seed(0)
    expected = encoder_decoder_loss(groups, model.student.local(trunk), 0.0).mean()
    assert loss(observed, 1.0) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_every_position_of_a_vit_is_compared() -> None:
    assert build_model(run_config().model).compared(0, TrainConfig()) is None


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


@pytest.mark.parametrize("depth", [0.3, 0.5, 1.0])
def test_a_shallower_student_answers_for_every_level(depth: float) -> None:
    model = build_model(run_config(ee_depth=depth).model)
    x = torch.randn(2, 3, 64, 64)
    tokens = model.student.semantic(model.shrink(x))
    assert [t.shape for t in tokens] == [(2, c) for c in model.teacher.info.token_channels]


def test_size_dials() -> None:
    thin, wide = (build_model(run_config("test_efficientnet", width=w).model) for w in (16, 64))
    assert count(thin.student.local) < count(wide.student.local)
    flat, deep = (build_model(run_config("test_efficientnet", depth=d).model) for d in (1, 3))
    assert count(flat.student.local) < count(deep.student.local)


def test_joint_score_is_the_noisy_or_of_the_calibrated_students(detector: Detector, parts: Path) -> None:
    from twinspect.data.images import read_rgb, resize_rgb

    model = detector.fitted.model
    squares = [resize_rgb(read_rgb(p), model.shape.size) for p in images_to_test(parts, None)]
    with torch.no_grad():
        out = model(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2))
    local, semantic = out.surprise_local_B.double(), out.surprise_semantic_B.double()
    joint, probability = noisy_or(local, semantic)
    torch.testing.assert_close(out.score_B.double(), joint, rtol=1e-4, atol=1e-4)
    p, q = -torch.expm1(-local), -torch.expm1(-semantic)
    torch.testing.assert_close(probability, 1 - (1 - p) * (1 - q))
    assert len(out.score_B.unique()) == len(squares)  # nothing saturates, no ties


def test_raw_scores_are_reported_beside_the_joint_one(detector: Detector, parts: Path) -> None:
    results = detector.predict(images_to_test(parts, None))
    for name in ("score", "score_local", "score_semantic"):
        assert len({getattr(r, name) for r in results}) == len(results)


def test_residual_forgives_a_students_length_and_ignores_one_that_knows_nothing() -> None:
    scorer = build_model(run_config("test_efficientnet").model).scorer
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(3, 64, dims, generator=generator) for dims in (len(scorer.gain(g)) for g in range(2))]
    knows, guesses = [3.0 * t for t in groups], [torch.randn(t.shape, generator=generator) for t in groups]
    for said, left in ((knows, 0.0), (guesses, 1.0), ([torch.zeros_like(t) for t in groups], 1.0)):
        scorer.fit_gains([(groups, said)])
        for g, (teacher, student) in enumerate(zip(groups, said, strict=True)):
            share = scorer.residual(g, teacher, student).square().sum() / teacher.square().sum()
            assert float(share) == pytest.approx(left, abs=0.02)


def test_a_student_in_its_normal_range_adds_little() -> None:
    """Doubt grows faster than surprise: beside a clear defect, ordinary noise of the other student moves little."""
    scorer = build_model(run_config("test_efficientnet").model).scorer
    clear, usual = torch.tensor([6.0]), torch.tensor([1.0])
    for curve in (scorer.surprise_local, scorer.surprise_semantic):
        curve.fit(torch.linspace(0, 1, 50), torch.zeros(50, dtype=torch.long), 1)
    owner = torch.zeros(1, dtype=torch.long)
    both = scorer.joined(clear, usual, owner)
    torch.testing.assert_close(both[0], both[1] + both[2])  # the Noisy-OR of two tempered probabilities
    local, semantic = float(both[1]), float(both[2])
    plain = float(scorer.surprise_semantic(usual, owner)) / float(scorer.surprise_local(clear, owner))
    assert semantic / local == pytest.approx(plain**2.5, rel=1e-3)


def test_local_surprise_counts_by_its_link() -> None:
    scorer = build_model(run_config("test_efficientnet").model).scorer
    owner = torch.tensor([0, 1])
    for curve in scorer.curves():
        curve.reset(2)
    scorer.link_K = torch.tensor([1.0, 0.1])
    _, local, semantic = scorer.joined(torch.full((2,), 3.0), torch.full((2,), 3.0), owner)
    assert float(local[1]) == pytest.approx(0.1 * float(local[0]))
    assert float(semantic[1]) == pytest.approx(float(semantic[0]))


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
