"""System B: stages, students of both directions, the residual aggregation, plain and default scores."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import RANDOM, RANDOM_CNN, run_config, train_samples

from twinspect import Detector
from twinspect.config import FAMILIES, RunConfig, TrainConfig
from twinspect.data.images import read_rgb, resize_rgb
from twinspect.errors import ConfigError
from twinspect.losses import flat_cosine_distance
from twinspect.models import snl
from twinspect.models.contract import Selection, build_model, fit_size
from twinspect.models.layers import surprise
from twinspect.models.snl import STAGES, ConvReverse, Cram, Stages, StructuralModel
from twinspect.models.teachers import create_teacher
from twinspect.training.fit import choose_images
from twinspect.training.loop import _batches

CNN_64 = {"channels": (16, 24, 40), "sides": (16, 8, 4)}


def model_of(name: str = "snl", teacher: str = RANDOM_CNN, **changes: object) -> StructuralModel:
    torch.manual_seed(0)
    model = build_model(run_config(teacher, model=name, **changes).model)
    assert isinstance(model, StructuralModel)
    return model


def trained(parts: Path, name: str = "snl", teacher: str = RANDOM_CNN, **changes: object) -> Detector:
    return Detector(config=run_config(teacher, model=name, **changes)).fit(train_samples(parts))


def noise(count: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1)).float()


# -------------------------------------------------------------------------------------- configuration


def test_baselines_are_configurations_of_the_same_file() -> None:
    rd, fd = (run_config(model=name).model.structure() for name in ("rd", "fd"))
    same = run_config(model="snl", terms="flat", cram=0, scoring="plain").model.structure()
    assert rd == dataclasses.replace(same, model="rd")
    assert fd == dataclasses.replace(same, model="fd", direction="forward", cram_place="stages")
    full = RunConfig.from_dict({"model": {"model": "snl"}}).model.structure()
    assert (full.direction, list(full.weights_of_terms())) == ("reverse", ["spatial", "channel", "intra", "inter"])
    assert (full.cram, full.cram_place, full.scoring) == (32, "bottleneck", "default")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "rd", "terms": "spatial"}, "terms: for --model snl only, not rd; rd has terms flat"),
        ({"model": "rd", "direction": "forward"}, "--model snl"),
        ({"model": "dual", "direction": "forward"}, "direction: for --model snl only, not dual"),
        ({"model": "snl", "direction": "backward"}, "reverse, forward"),
        ({"model": "snl", "terms": "spatial,spacial"}, "'spatial'"),
        ({"model": "snl", "terms": "spatial,spatial"}, "named twice"),
        ({"model": "snl", "terms": "flat,intra:much"}, "'much' is no weight; type a number, such as intra:0.1"),
        ({"model": "snl", "terms": "flat,intra:0"}, "must be above 0"),
        ({"model": "snl", "cram": 1}, "one centre is a mean"),
        ({"model": "snl", "direction": "forward", "cram_place": "bottleneck"}, "a forward student has none"),
        ({"model": "snl", "cram_place": "decoder"}, "bottleneck, stages"),
        ({"model": "snl", "scoring": "plan"}, "'plain'"),
        ({"model": "rd", "affinity_map": 1.0}, "--model snl only"),
        ({"model": "snl", "affinity_map": -1.0}, "--affinity-map -1.0: accepted 0 or more"),
        ({"model": "snl", "affinity_map": 1.0, "scoring": "published"}, "has none"),
        ({"model": "snl", "affinity_side": 1}, "--affinity-side 1: accepted 2 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_what_to_type(changes: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run_config(**changes)


def test_the_direction_of_a_baseline_may_be_said() -> None:
    assert run_config(model="fd", direction="forward").model.structure().direction == "forward"


# -------------------------------------------------------------------------------------------- student


def test_stages_of_a_cnn_keep_their_own_grids_and_a_vit_gives_thirds() -> None:
    cnn = model_of(teacher="efficientnet-lite0", size=128)
    assert cnn.stages.channels == [24, 40, 112]  # last stages of strides 4, 8 and 16
    assert cnn.stages.map_sides == [32, 16, 8]
    vit = model_of(teacher=RANDOM)
    assert sorted(i for part in vit.selection.levels for i in part) == list(range(len(vit.teacher.info.channels)))
    assert len(set(vit.stages.map_sides)) == 1


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("teacher", [RANDOM, RANDOM_CNN, "test_convnext"])
def test_students_answer_in_the_shapes_of_the_stages(direction: str, teacher: str) -> None:
    for place in ("stages", "bottleneck") if direction == "reverse" else ("stages",):
        model = model_of(teacher=teacher, direction=direction, cram_place=place, cram=4).eval()
        x = model.teacher.normalise(noise())
        pixels = model.shrink(x)
        assert pixels.shape[-1] == (64 if direction == "forward" else 0)
        with torch.no_grad():
            stages, predicted = model.answer(model.observe(x), pixels)
        assert [p.shape for p in predicted] == [s.shape for s in stages]


def test_a_reverse_student_sees_only_the_teacher_and_a_forward_one_only_pixels() -> None:
    for direction in ("reverse", "forward"):
        model = model_of(direction=direction, cram=0).eval()
        x = model.teacher.normalise(noise())
        seen, pixels = model.observe(x), model.shrink(x)
        other = seen._replace(maps=tuple(m + 1 for m in seen.maps))
        with torch.no_grad():
            before, after = (model.answer(o, pixels)[1] for o in (seen, other))
        assert torch.equal(before[0], after[0]) == (direction == "forward")


def test_width_dial_and_bottleneck() -> None:
    wide = ConvReverse((24, 40, 112), (16, 8, 4), width=0, depth=1, rectified=False, centres=0)
    assert [rise[0].body[-2].out_channels for rise in wide.rise] == [112, 64, 64]
    student = ConvReverse(**CNN_64, width=8, depth=1, rectified=False, centres=0)
    shapes = []
    student.at_bottleneck.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
    stages = [torch.randn(2, c, s, s) for c, s in zip(CNN_64["channels"], CNN_64["sides"], strict=True)]
    found = student(stages, torch.zeros(2, 3, 0, 0))
    assert shapes == [(2, 64, 2, 2)]  # half the coarsest grid: nothing fine gets through
    assert [f.shape for f in found] == [s.shape for s in stages]


# ----------------------------------------------------------------------------------------------- cram


def test_the_narrowest_student_has_a_channel_inside() -> None:
    student = ConvReverse(**CNN_64, width=1, depth=1, rectified=False, centres=0)
    assert min(len(weight) for weight in student.parameters()) == 1


def test_cram_equals_its_formula_vector_by_vector() -> None:
    torch.manual_seed(0)
    cram = Cram(3, 4).eval()
    x = torch.randn(2, 3, 2, 2)
    with torch.no_grad():
        found = cram(x)
        for b in range(2):
            for u in range(4):
                vector = x[b, :, u // 2, u % 2]
                weight = (cram.assign.weight[:, :, 0, 0] @ vector + cram.assign.bias).softmax(0)
                central = sum(weight[k] * cram.centres_KD[k] for k in range(4))
                rest = sum(weight[k] * (vector - cram.centres_KD[k]) for k in range(4))
                expected = cram.mix(rest[None, :, None, None])[0, :, 0, 0] + central
                torch.testing.assert_close(found[b, :, u // 2, u % 2], expected)


def test_cram_with_identity_does_nothing_and_with_zero_leaves_centres_only() -> None:
    cram, x = Cram(3, 4), torch.randn(2, 3, 2, 2)
    cram.mix = torch.nn.Identity()
    torch.testing.assert_close(cram(x), x)
    cram.mix = torch.nn.Module()
    cram.mix.forward = torch.zeros_like  # type: ignore[method-assign]
    cram.initialise(torch.eye(3).repeat(5, 1) * 10, seed=0)
    found = cram(torch.tensor([9.0, 1.0, 0.0])[None, :, None, None])[0, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor([10.0, 0.0, 0.0]), atol=0.2, rtol=0)


def test_centres_start_on_clusters_of_normal_features() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0]])
    rows = truth.repeat(40, 1) + 0.1 * torch.randn(120, 2, generator=generator)
    cram = Cram(2, 3)
    cram.initialise(rows, seed=0)
    assert torch.cdist(truth, cram.centres_KD.detach()).amin(1).max() < 0.2
    with torch.no_grad():
        weight = cram.assign(rows[:, :, None, None])[:, :, 0, 0].softmax(1)
    assert torch.equal(weight.argmax(1), torch.cdist(rows, cram.centres_KD).argmin(1))
    assert weight.amax(1).min() > 0.9
    few = Cram(2, 5)
    few.initialise(rows[:3], seed=0)  # fewer vectors than centres
    assert torch.isfinite(few.assign.weight).all()


def test_training_starts_from_k_means_centres(parts: Path) -> None:
    detector = trained(parts, cram=4, steps=1, lr=1e-9)
    untouched = model_of(cram=4)
    (own,) = (m for m in detector.fitted.model.student.modules() if isinstance(m, Cram))
    (random,) = (m for m in untouched.student.modules() if isinstance(m, Cram))
    assert own.centres_KD.shape == random.centres_KD.shape
    assert float((own.centres_KD - random.centres_KD).detach().abs().mean()) > 0.05


# --------------------------------------------------------------------------------------------- losses


def test_terms_are_summed_over_stages_and_can_be_switched_off() -> None:
    model = model_of(terms="flat,spatial,channel,intra,inter", cram=0).train()
    x = model.teacher.normalise(noise())
    observed, pixels = model.observe(x), model.shrink(x)
    terms = model.losses(observed, pixels, 0, TrainConfig())
    assert list(terms) == ["loss", "flat", "spatial", "channel", "intra", "inter"]
    parts = sum(float(value) for name, value in terms.items() if name != "loss")
    assert float(terms["loss"].detach()) == pytest.approx(parts, rel=1e-5)
    assert not any(value.requires_grad for name, value in terms.items() if name != "loss")
    with torch.no_grad():
        stages, predicted = model.answer(observed, pixels)
    flat = sum(float(flat_cosine_distance(t, s).mean()) for t, s in zip(stages, predicted, strict=True))
    assert float(terms["flat"]) == pytest.approx(flat, rel=1e-4)
    only = model_of("rd").train()
    assert list(only.losses(only.observe(x), only.shrink(x), 0, TrainConfig())) == ["loss", "flat"]


def test_a_term_counts_by_its_weight() -> None:
    model = model_of(terms="flat, intra:0.1", cram=0).train()
    x = model.teacher.normalise(noise())
    terms = model.losses(model.observe(x), model.shrink(x), 0, TrainConfig())
    assert float(terms["loss"].detach()) == pytest.approx(
        float(terms["flat"]) + 0.1 * float(terms["intra"]), rel=1e-5
    )


def test_the_inter_affinity_joins_the_batch_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(terms="inter", cram=0).eval()
    x = model.teacher.normalise(noise(2))
    seen = []
    monkeypatch.setattr(snl, "gather_batch", lambda part: seen.append(part.shape[0]) or part.repeat(2, 1, 1))
    model.losses(model.observe(x), model.shrink(x), 0, TrainConfig())
    assert seen == [2, 2] * len(model.stages.channels)


# -------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def rd4ad(model: StructuralModel, pixels: torch.Tensor) -> torch.Tensor:
    """Cosine distances of the stages, raised to the finest grid, summed, raised to the map's size."""
    x = model.teacher.normalise(fit_size(pixels, model.size))
    observed = model.observe(x)
    stages, predicted = model.answer(observed, model.shrink(x))
    assert torch.equal(stages[0], observed.maps[model.stages.at[0]])  # raw features, nothing standardised
    distances = [1 - (t * s).sum(1) / t.norm(dim=1) / s.norm(dim=1) for t, s in zip(stages, predicted, strict=True)]
    side = max(model.stages.map_sides)
    summed = sum(F.interpolate(d[:, None], size=(side, side), mode="bilinear") for d in distances)
    return F.interpolate(summed, size=(model.scorer.map_side,) * 2, mode="bilinear")


@pytest.mark.parametrize("name", ["rd", "fd"])
def test_plain_scores_are_those_of_reverse_distillation(name: str, parts: Path) -> None:
    """Score = surprise of the maximum of the map in standard deviations of images held out: rising with it."""
    detector = trained(parts, name)
    model = detector.fitted.model.eval()
    assert isinstance(model, StructuralModel)
    pixels, held = noise(12), choose_images(train_samples(parts), detector.config)[1]
    good = torch.from_numpy(np.stack([resize_rgb(read_rgb(s.image), model.size) for s in held])).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = model(pixels)
    map_B1HW = rd4ad(model, pixels)
    torch.testing.assert_close(out.map_B1HW, map_B1HW, rtol=1e-4, atol=1e-5)
    peak_B, good_n = map_B1HW.amax((1, 2, 3)), rd4ad(model, good).amax((1, 2, 3))
    torch.testing.assert_close(out.readings_BR, peak_B[:, None], rtol=1e-4, atol=1e-5)
    z = ((peak_B - good_n.mean()) / good_n.std(correction=0)).double()
    torch.testing.assert_close(out.score_local_B.double(), z, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(out.score_B, surprise(out.score_local_B))
    assert not out.score_semantic_B.any()  # no semantic student: nothing is said
    assert (out.score_B[peak_B.argsort()].diff() > 0).all()
    assert not model.scorer.gaussians()


def test_the_affinity_map_joins_the_plain_map(parts: Path, tmp_path: Path) -> None:
    """M = D / mean D + w A / mean A, both sums over stages, the means those of the good images held out."""
    weight, grid = 0.5, 4
    settings = {"affinity_map": weight, "affinity_side": grid, "scoring": "plain"}
    detector = trained(parts, "snl", **settings)
    model = Detector.load(detector.save(tmp_path / "b.twin")).fitted.model.eval()  # the means are in the bundle
    assert isinstance(model, StructuralModel)
    side = max(model.stages.map_sides)

    @torch.no_grad()
    def both(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        observed = model.observe(model.teacher.normalise(fit_size(pixels, model.size)))
        stages, predicted = model.answer(observed, model.shrink(pixels))
        features, affinities = torch.zeros(len(pixels), side, side), torch.zeros(len(pixels), side, side)
        for t, s in zip(stages, predicted, strict=True):
            raise_to = {"size": (side, side), "mode": "bilinear"}
            features += F.interpolate(1 - F.cosine_similarity(t, s)[:, None], **raise_to)[:, 0]
            one, other = (F.normalize(F.adaptive_avg_pool2d(x, grid).flatten(2), dim=1) for x in (t, s))
            apart = (one.transpose(1, 2) @ one - other.transpose(1, 2) @ other).abs().mean(2)
            affinities += F.interpolate(apart.reshape(-1, 1, grid, grid), **raise_to)[:, 0]
        return features, affinities

    held = choose_images(train_samples(parts), detector.config)[1]
    good = np.stack([resize_rgb(read_rgb(s.image), model.size) for s in held])
    means = [one.mean() for one in both(torch.from_numpy(good).permute(0, 3, 1, 2))]
    torch.testing.assert_close(model.map_means_2, torch.stack(means), rtol=1e-3, atol=1e-5)
    pixels = noise(3)
    features, affinities = both(pixels)
    expected = model.scorer.finish(features / means[0] + weight * affinities / means[1])
    with torch.no_grad():
        out = model(pixels)
    torch.testing.assert_close(out.map_B1HW, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(out.readings_BR[:, 0], out.map_B1HW.amax((1, 2, 3)))


def test_default_scoring_joins_what_good_images_teach(parts: Path) -> None:
    model = trained(parts, "snl").fitted.model.eval()
    assert isinstance(model, StructuralModel)
    scorer = model.scorer
    assert scorer.gaussians()
    assert all(float(one.whiten_KDD.float().diagonal(dim1=1, dim2=2).std()) > 0 for one in scorer.gaussians())
    pixels = noise(3, model.size)
    with torch.no_grad():
        out = model(pixels)
    torch.testing.assert_close(out.readings_BR[:, 0], rd4ad(model, pixels).amax((1, 2, 3)))
    link = scorer.clusters.link_K[out.cluster_B]
    torch.testing.assert_close(out.score_B, link * surprise(out.score_local_B) + surprise(out.score_semantic_B))
    grids = zip(model.stages.map_sides, model.stages.channels, strict=True)
    assert [t.shape for t in model.targets(model.observe(pixels))] == [(3, n * n, d) for n, d in grids]


def test_a_student_that_fails_everywhere_scores_higher_than_one_that_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("rd").eval()
    observed = model.observe(model.teacher.normalise(noise(2, model.size)))
    said = [torch.stack([stage[0], -stage[1]]) for stage in model.stages.of(observed.maps)]
    monkeypatch.setattr(model.student, "forward", lambda stages, pixels: said)
    with torch.no_grad():
        out = model.score(observed, noise(2)[:, :, :0, :0])
    assert float(out.readings_BR[0, 0]) == pytest.approx(0.0, abs=1e-5)
    assert float(out.readings_BR[1, 0]) == pytest.approx(2.0 * len(said), abs=1e-4)
    assert float(out.score_B[1]) > float(out.score_B[0])


@pytest.mark.parametrize("name", ["snl", "rd", "fd"])
def test_trains_predicts_and_comes_back_from_its_bundle(name: str, parts: Path, tmp_path: Path) -> None:
    detector = trained(parts, name)
    again = Detector.load(detector.save(tmp_path / "b.twin"))
    assert again.config.model.model == name
    image = np.full((70, 90, 3), 128, np.uint8)
    first, second = detector.predict(image), again.predict(image)
    assert first.score == second.score
    assert first.map.shape == (70, 90)
    assert set(detector.record_["parameters"]) == {"teacher", "local", "statistics_bytes"}


def test_a_killed_run_resumes_to_the_same_weights(parts: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, _: int) -> None:
        if stage.startswith("training") and done == 3:
            raise KeyboardInterrupt

    whole = trained(parts, steps=4)
    config = run_config(RANDOM_CNN, model="snl", steps=4)
    with pytest.raises(KeyboardInterrupt):
        Detector(config=config).fit(train_samples(parts), work=tmp_path, progress=stop)
    resumed = Detector(config=config).fit(train_samples(parts), work=tmp_path)
    for a, b in zip(whole.fitted.model.student.parameters(), resumed.fitted.model.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_input_side_where_none_is_asked_for() -> None:
    sizes = {}
    for name in FAMILIES:
        config = dataclasses.replace(run_config(RANDOM_CNN, model=name).model, size=0)
        sizes[name] = build_model(config).size
    assert sizes == {"dual": 512, "snl": 256, "rd": 256, "fd": 256}


def test_the_paper_like_teacher_gives_its_first_three_layers() -> None:
    with torch.device("meta"):
        teacher = create_teacher("wide-resnet50-2", pretrained=False)
        stages = Stages(teacher.info, Selection(teacher.info, 256, STAGES))
    assert stages.channels == [256, 512, 1024]
    assert stages.map_sides == [64, 32, 16]


def test_batches_mix_classes() -> None:
    """The loop's permutation mixes: inter-affinity compares images of all classes."""
    classes = [i // 50 for i in range(200)]
    batches = [part for _, part in _batches(range(200), TrainConfig(steps=26, batch=16), 0)]
    assert all(len({classes[i] for i in part}) > 1 for part in batches)


@pytest.mark.slow
def test_an_export_says_what_the_model_says(parts: Path, tmp_path: Path) -> None:
    """`export` compares with torch itself and refuses to write what differs."""
    from twinspect.export import export
    from twinspect.inference import load

    detector = trained(parts, width=16, cram=4, scoring="plain", affinity_map=1.0, affinity_side=3)  # divides no side
    out = tmp_path / "model.onnx"
    found = export(detector.fitted, out)
    assert not found.problems()
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    (theirs,) = load(out).predict([image])
    assert theirs.score == pytest.approx(detector.predict(image).score, rel=1e-3, abs=1e-3)
