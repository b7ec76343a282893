"""The benchmarks' baselines, their bank of features and their intervals, on arrays whose answer is known."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import picture, run_config, save
from torch import Tensor

from twinspect.console import Console
from twinspect.data import load
from twinspect.inference.predictor import Predictor, TorchRuntime
from twinspect.metrics import auroc
from twinspect.training.fit import fit
from twinspect.types import TEST, TRAIN, Sample

FOLDER = str(Path(__file__).parents[1] / "benchmarks")


def module(name: str) -> ModuleType:
    """A benchmark's module, found as Python finds it when a script of that folder runs."""
    sys.path.insert(0, FOLDER)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(FOLDER)


def normal_patches(images: int, seed: int, positions: int = 4, dims: int = 6) -> Tensor:
    """N x P x D: a mean per position, and a spread that differs by channel."""
    random = torch.Generator().manual_seed(seed)
    means = torch.arange(positions).float()[:, None] * 10
    return means + torch.randn(images, positions, dims, generator=random) * torch.linspace(0.1, 2.0, dims)


def batched(patches: Tensor) -> Any:
    return lambda: iter(patches.split(7))


# --------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize("greedy", [True, False])
def test_memory_gives_the_distance_to_the_nearest_patch(greedy: bool) -> None:
    patches, tested = normal_patches(20, 0), normal_patches(3, 1)
    memory = module("baselines").PatchMemory(80, 80, greedy).fit(batched(patches), 20)
    slow = torch.stack([(row - patches.flatten(0, 1)).norm(dim=1).min() for row in tested.flatten(0, 1)])
    torch.testing.assert_close(memory.distance(tested), slow.reshape(3, 4), rtol=1e-3, atol=1e-3)


def test_scaled_channels_count_alike() -> None:
    patches = normal_patches(50, 0)
    memory = module("baselines").PatchMemory(200, 200, False, scaled=True).fit(batched(patches), 50)
    again = module("baselines").PatchMemory(200, 200, False, scaled=True).fit(batched(patches * 7), 50)
    tested = normal_patches(3, 1)
    torch.testing.assert_close(memory.distance(tested), again.distance(tested * 7), rtol=1e-3, atol=1e-3)


def test_greedy_choice_covers_what_a_random_one_misses() -> None:
    random = torch.Generator().manual_seed(0)
    crowd, lonely = torch.randn(2000, 8, generator=random) * 0.01, torch.eye(8) * 50
    points = torch.cat([crowd, lonely])
    chosen = module("baselines").greedy_subset(points, 9, random)
    assert len(set(chosen.tolist())) == 9
    assert set(range(2000, 2008)) <= set(chosen.tolist())


def test_greedy_choice_of_copies_names_no_point_twice() -> None:
    chosen = module("baselines").greedy_subset(torch.ones(12, 100), 20, torch.Generator().manual_seed(0))
    assert sorted(chosen.tolist()) == list(range(12))


def test_position_gaussian_is_the_mahalanobis_distance_of_each_position() -> None:
    patches, tested = normal_patches(200, 0), normal_patches(2, 1)
    model = module("baselines").PositionGaussian(dims=100, ridge=1e-6).fit(batched(patches), 200)
    for p in range(4):
        own = patches[:, p].double().numpy()
        inverse = np.linalg.inv(np.cov(own.T))
        for b in range(2):
            away = tested[b, p].double().numpy() - own.mean(0)
            assert float(model.distance(tested)[b, p]) == pytest.approx((away @ inverse @ away) ** 0.5, rel=1e-2)


def test_position_gaussian_knows_where_a_patch_belongs() -> None:
    patches = normal_patches(100, 0)
    model = module("baselines").PositionGaussian(dims=3).fit(batched(patches), 100)
    memory = module("baselines").PatchMemory(400, 400, False).fit(batched(patches), 100)
    moved = patches[:5].flip(1)  # normal patches, each at another place
    assert float(model.distance(moved).min()) > 3 * float(model.distance(patches).max())
    assert float(memory.distance(moved).max()) < 0.1


# ---------------------------------------------------------------------------------------------- pooled


def test_nearest_distance_is_the_mean_cosine_distance() -> None:
    known = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    found = module("baselines").nearest_distance(known, torch.tensor([[5.0, 0.0], [1.0, 1.0]]), 2)
    torch.testing.assert_close(found, torch.tensor([0.5, 1 - 0.5**0.5]))


def test_a_mean_per_class_finds_what_lies_between_two_classes() -> None:
    random = torch.Generator().manual_seed(0)
    one, other = torch.randn(100, 5, generator=random), torch.randn(100, 5, generator=random)
    known = torch.cat([one - 10, other + 10])
    tested = torch.cat([torch.randn(50, 5, generator=random) - 10, torch.randn(50, 5, generator=random)])
    labels = np.repeat([0, 1], 50)
    distance = module("baselines").gaussian_distance
    assert auroc(distance(known, tested, ["one"] * 100 + ["other"] * 100).numpy(), labels) == 1.0
    assert auroc(distance(known, tested).numpy(), labels) < 0.5


def test_every_reading_of_a_map() -> None:
    flat = torch.zeros(2, 20, 20)
    flat[1, 0, 0] = 9.0
    found = module("baselines").image_scores(flat)
    assert {name: values.tolist() for name, values in found.items()} == {
        "max": [0.0, 9.0],
        "max of 3 x 3 means": [0.0, 2.25],  # a corner has three neighbours
        "top 1 %": [0.0, 2.25],
        "mean": [0.0, pytest.approx(9 / 400)],
    }


# ------------------------------------------------------------------------------------------- intervals


def test_weighted_auroc_is_the_auroc_of_the_drawn_images() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 9, 60).astype(float), rng.integers(0, 2, 60)
    weights = module("problems").draw_weights([f"class/{label}" for label in labels], draws=20)
    found = module("problems").weighted_auroc(scores, labels, weights)
    for value, row in zip(found, weights.astype(int), strict=True):
        assert value == pytest.approx(auroc(scores.repeat(row), labels.repeat(row)))
    assert len(set(found.tolist())) > 10


def test_draws_of_a_stratum_do_not_depend_on_the_others() -> None:
    weights = module("problems").draw_weights(["a"] * 5 + ["b"] * 3, draws=10)
    assert (weights[:, :5].sum(1) == 5).all()
    assert (weights[:, 5:].sum(1) == 3).all()
    np.testing.assert_array_equal(weights[:, :5], module("problems").draw_weights(["a"] * 5, draws=10))


# ------------------------------------------------------------------------------------ the whole benchmark


def test_the_bank_gives_the_same_patches_whatever_is_asked_for(tmp_path: Path) -> None:
    from twinspect.models.teachers import create_teacher
    from twinspect.types import silent

    samples = [Sample(save(tmp_path / f"{n}.png", picture(n)), TRAIN, "cloth") for n in range(5)]
    bank = module("teacher_bank").Bank(create_teacher("efficientnet-lite0"), [*samples, samples[0]], 64, 4, silent)
    assert bank.at([samples[3], samples[0]]) == [3, 0]
    every = torch.cat(list(bank.patches((3, 5), range(5), 2)()))
    assert every.shape == (5, 16, 40 + 112)
    torch.testing.assert_close(next(bank.patches((3, 5), [3, 0])()), every[[3, 0]])
    assert {name: tuple(v.shape) for name, v in bank.pooled.items()}["head"] == (5, 1280)


def test_baselines_run_go_on_and_show_the_best(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = module("accuracy")
    out = tmp_path / "accuracy.json"
    words = f"--data {parts.parent} --sets parts --methods knn,padim --sizes 64 --out {out}".split()
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *words])
    accuracy.main()
    entries = accuracy.Store(out).entries
    assert len(entries) == len(accuracy.VARIANTS["knn"]) + len(accuracy.VARIANTS["padim"])
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    best = max(headline(e) for e in entries.values() if e["method"] == "knn")
    assert f"| kNN of pooled embeddings | {best:.4f} |" in table
    pixel = max(pixel_mean(e) for e in entries.values() if e["method"] == "padim")
    assert f" {pixel:.4f} |" in next(line for line in table.splitlines() if "PaDiM" in line)
    # Nothing is left to do: no teacher is asked for.
    monkeypatch.setattr(accuracy, "Bank", None)
    accuracy.main()
    assert out.with_suffix(".md").read_text(encoding="utf-8") == table


def test_ours_stands_beside_a_baseline(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy, out = module("accuracy"), tmp_path / "accuracy.json"
    words = f"--data {parts.parent} --sets parts --methods knn,ours-a --sizes 64 --size 64 --steps 2 --out {out}"
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *words.split()])
    accuracy.main()
    table = out.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    rows = {line.split(" | ")[0]: line.split(" | ") for line in table if line.startswith("| ")}
    own = next(e for e in accuracy.Store(out).entries.values() if e["method"] == "ours-a")
    assert own["seconds"] >= own["fit_s"] > 0
    joint = np.mean([part["auroc"] for part in own["found"]["joint"].values()])
    assert rows["| A, joint"][1] == f"{joint:.4f}"
    assert rows["| A, joint"][6] == f"{pixel_mean(own):.4f}"
    assert rows["| A, local student"][6:8] == ["-", "-"]
    assert " to " in rows["| kNN of pooled embeddings"][3]


def headline(entry: dict[str, Any]) -> float:
    return float(np.mean([part["auroc"] for part in entry["found"][""].values()]))


def pixel_mean(entry: dict[str, Any]) -> float:
    return float(np.mean([row["pixel_auroc"] for row in entry["pixel"].values()]))


def test_limits_keep_every_kind_of_image() -> None:
    samples = [Sample(Path(f"{n}.png"), TRAIN, "a") for n in range(9)]
    samples += [Sample(Path(f"t{n}.png"), TEST, "a", n % 2) for n in range(8)]
    kept = module("problems").limited(samples, 3)
    assert [(s.split, s.label) for s in kept].count((TRAIN, 0)) == 3
    assert [(s.split, s.label) for s in kept].count((TEST, 1)) == 3
    assert set(module("problems").limited(samples, 0)) == set(samples)


# ------------------------------------------------------------------------------------------- ablations


def test_what_remembers_answers_as_a_predictor_and_asks_the_teacher_once(
    detector: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ablations, fitted = module("ablations"), detector.fitted
    images = [picture(90 + i, 160, 120) for i in range(3)]
    remembering = ablations.Remembering(fitted.model, {})
    found = list(remembering.predict(images))
    expected = list(Predictor(TorchRuntime(fitted.model), fitted.decision).predict(images))
    for one, other in zip(found, expected, strict=True):
        for name in ("score", "score_local", "score_semantic", "map"):  # features in 16 bits
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=2e-2, atol=2e-2)
    monkeypatch.setattr(ablations, "observe", lambda *_: pytest.fail("the teacher was asked again"))
    assert [one.score for one in remembering.predict(images[1:])] == [one.score for one in found[1:]]
    assert [len(one) for one in remembering.readings] == [3, 2]


def test_plain_students_are_trained_and_calibrated_as_fit_does_it(parts: Path) -> None:
    ablations, samples = module("ablations"), load(parts).samples
    config = run_config("test_efficientnet", scoring="plain")
    trained = ablations.trained_on(samples, config, Console())
    model, fitted = ablations.scored(trained, config, Console()), fit(samples, config)
    images = [picture(i, 96, 96) for i in range(2)]
    expected = Predictor(TorchRuntime(fitted.model), fitted.decision).predict(images)
    for one, other in zip(ablations.Remembering(model, {}).predict(images), expected, strict=True):
        np.testing.assert_allclose(
            [one.score, one.score_local], [other.score, other.score_local], rtol=1e-2, atol=1e-2
        )


def test_readings_of_two_students() -> None:
    readings = module("ablations").READINGS
    said = {"score": np.array([3.0]), "local": np.array([1.0]), "semantic": np.array([2.0])}
    said["raw"] = np.array([[0.2, 0.6]])
    expected = {"joint": 3.0, "local": 1.0, "semantic": 2.0, "max": 2.0, "sum": 3.0, "raw": 1 - 0.9 * 0.7}
    assert {name: float(read(said)[0]) for name, read in readings.items()} == pytest.approx(expected)


def test_every_row_of_the_ablations_is_a_configuration_that_can_be_built() -> None:
    ablations = module("ablations")
    args = SimpleNamespace(teacher="test_vit", weights="", size=64, width=0, steps=1, batch=4, lr=1e-3, lr_ee=1e-3)
    for system, rows in ablations.SYSTEMS.items():
        args.system = system
        configs = [ablations.config_of(row, 0, args) for row in rows.values()]
        assert len({str(config) for config in configs}) == len({(r.student, str(r.scoring)) for r in rows.values()})
