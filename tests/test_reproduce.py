"""Every kind of recipe runs, offline, in seconds; a kill loses one split at most; published numbers have a source."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from layouts import Plan, write
from tiny import RANDOM
from typer.testing import CliRunner

from twinspect.cli import app
from twinspect.commands import reproduce as room
from twinspect.commands.reproduce import RECIPES, Recipe, is_vit
from twinspect.config import RunConfig
from twinspect.console import Console
from twinspect.data import DATASETS, load
from twinspect.data.protocols import PROTOCOLS, SEMANTIC, make_splits
from twinspect.metrics import mean_of

DOCS = Path(__file__).parents[1] / "docs" / "reproduce.md"


def small(recipe: Recipe, seed: int = 0) -> RunConfig:
    """Settings of a recipe with few steps, small images, a tiny random teacher and no cache."""
    base = recipe.config(RANDOM, seed=seed, limit_steps=2, size=64)
    narrow = {"width": 16, "depth": 1} if base.model.model != "dual" else {}
    train = replace(base.train, batch=8, cache_gb=0.0)
    return RunConfig(replace(base.model, pretrained=False, **narrow), train)


def write_small(recipe: Recipe, root: Path) -> None:
    """A painted set of the recipe's layout."""
    plan = Plan(size=48, train=16, calibration=6, good=3, defect=4)
    if recipe.layout == "real-iad":
        plan = Plan(size=48, train=4, good=1, defect=1)  # objects of five views
    elif recipe.settings.model.size == 224:
        plan = Plan(size=32, train=16, good=6)
    write(recipe.layout, root, plan)


def run_small(name: str, out: Path, seed: int = 0) -> dict:
    """Results of a recipe on its painted set."""
    recipe = RECIPES[name]
    write_small(recipe, out / "data")
    return room.run_recipe(recipe, out / "data", out, small(recipe, seed), Console(quiet=True))


# Every layout, protocol and family of models once.
DIFFERENT = (
    "mvtec-ad-single", "visa-multi", "real-iad-multi", "mvtec-loco-multi", "cifar10-leave-one-out",
    "cifar100-one-vs-rest", "fashion-mnist-one-vs-rest", "view-unified", "snl-visa-single", "rd-mvtec-ad-multi",
)  # fmt: skip


def test_recipes_that_are_run_are_of_every_kind() -> None:
    for of in (lambda row: row.layout, lambda row: row.protocol, lambda row: row.settings.model.model):
        assert {of(RECIPES[name]) for name in DIFFERENT} == {of(row) for row in RECIPES.values()}


@pytest.mark.parametrize("name", DIFFERENT)
def test_recipes_run_on_painted_sets(tmp_path: Path, name: str) -> None:
    recipe, out = RECIPES[name], tmp_path / "out"
    values = run_small(name, out)
    splits = make_splits(load(out / "data", recipe.layout).samples, recipe.protocol)
    assert values["complete"]
    assert values["splits"] == len(splits)
    assert [(r["name"], r["hash"]) for r in values["runs"]] == [(s.name, s.hash) for s in splits]
    assert len(list((out / "splits").iterdir())) == len(splits)
    assert list(out.rglob("*.safetensors")) == []
    assert values["mean"] == pytest.approx(mean_of(values["classes"]))
    semantic = splits[0].kind == SEMANTIC
    rows = [s.name.partition("/")[2] for s in splits] if semantic else sorted({x.class_name for x in splits[0].test})
    assert list(values["classes"]) == (rows if semantic or len(splits) == 1 else list(values["classes"]))
    assert all(0 <= row["image_auroc"] <= 1 for row in values["classes"].values())
    scores = ["score_local", "score_semantic"] if recipe.settings.model.model == "dual" else ["score_local"]
    assert list(values["students"]) == scores
    assert ("pixel_auroc" in values["mean"]) != semantic
    assert ("auspro_005" in values["mean"]) == (recipe.layout == "mvtec-loco")
    assert ("sample_auroc" in values["mean"]) == (recipe.layout == "real-iad")
    for suffix in ("md", "html"):
        text = (out / f"results.{suffix}").read_text(encoding="utf-8")
        assert "our re-implementation" in text
        assert "the paper's result" not in text
        assert all(p["source"] in text and f"{p['percent']['image_auroc']:.1f}" in text for p in recipe.published)
        assert "random weights" in text
        assert splits[0].hash in text


def test_the_embedded_teacher_through_the_command_line(tmp_path: Path) -> None:
    write_small(RECIPES["mvtec-loco-multi"], tmp_path / "data")
    words = ["reproduce", "mvtec-loco-multi", "--root", tmp_path / "data", "--out", tmp_path, "--limit-steps", 1]
    words = [str(word) for word in (*words, "--teacher", "efficientnet-lite0", "--size", 64)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "dual-student paper" in result.stdout
    assert "published: arXiv 2509.24448, second-hand" in result.stdout
    assert "logical_anomalies" in result.stdout
    assert "not comparable with the published numbers: steps 1" in result.stderr
    assert "not comparable with the published numbers: scoring default, the recipe has plain" in result.stderr
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["config"]["steps"] == 1
    assert values["config"]["teacher"]["name"] == "efficientnet-lite0"


def test_a_killed_run_goes_on_and_finished_splits_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPES["visa-single"]
    root, out, config = tmp_path / "data", tmp_path / "out", small(recipe)
    write_small(recipe, root)
    real, names = room.run_split, []

    def dies_at_the_second(split, config, work, console):
        names.append(split.name)
        if len(names) == 2:
            raise KeyboardInterrupt
        return real(split, config, work, console)

    monkeypatch.setattr(room, "run_split", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        room.run_recipe(recipe, root, out, config, Console(quiet=True))
    partial = json.loads((out / "results.json").read_text())
    assert not partial["complete"]
    assert "Only 1 of 2 splits are finished" in (out / "results.md").read_text()
    values = room.run_recipe(recipe, root, out, config, Console())
    assert values["complete"]
    assert names == ["single-class/candle", "single-class/capsules", "single-class/capsules"]
    assert values["classes"]["candle"] == partial["classes"]["candle"]
    assert capsys.readouterr().out.count("finished before") == 1
    monkeypatch.setattr(room, "run_split", None)
    again = room.run_recipe(recipe, root, out, config, Console(quiet=True))
    assert again["classes"] == values["classes"]


def test_other_settings_or_damage_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES["mvtec-ad-multi"]
    write_small(recipe, tmp_path / "data")
    (split,) = make_splits(load(tmp_path / "data").samples)
    base, other = small(recipe), small(recipe, 1)
    key = room.run_key(split, base)
    assert key != room.run_key(split, other)
    assert key == room.run_key(split, small(recipe))
    runs: list[str] = []
    monkeypatch.setattr(room, "run_split", lambda split, *_: runs.append(split.name) or {})
    for _ in range(2):
        assert room.finished_or_run(split, tmp_path, base, Console(quiet=True))["key"] == key
    assert len(runs) == 1
    (path,) = (tmp_path / "splits").iterdir()
    path.write_text('{"key": "')
    assert room.finished_or_run(split, tmp_path, base, Console(quiet=True))["key"] == key
    assert len(runs) == 2


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    first, second, third = (
        run_small("view-one-vs-rest", tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 5))
    )
    assert first["classes"] == second["classes"]
    assert [r["hash"] for r in first["runs"]] != [r["hash"] for r in third["runs"]]


def test_training_copies_of_test_images_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = RECIPES["mvtec-ad-multi"]
    root, config = tmp_path / "data", small(recipe)
    write_small(recipe, root)
    good = root / "ring" / "test" / "good" / "000.png"
    (root / "ring" / "train" / "good" / "copy.png").write_bytes(good.read_bytes())
    full = room.run_recipe(recipe, root, tmp_path / "full", config, Console())
    less = room.run_recipe(recipe, root, tmp_path / "less", config, Console(), without_leaks=True)
    said = capsys.readouterr().out
    assert "they flatter the numbers" in said
    assert "their training copies are left out" in said
    (one,), (two,) = full["runs"], less["runs"]
    assert one["train"] + one["calibration"] == two["train"] + two["calibration"] + 1
    assert one["test"] == two["test"]


def test_recipes_are_listed_and_refusals_say_what_to_type() -> None:
    result = CliRunner().invoke(app, ["reproduce"])
    assert result.exit_code == 0
    assert all(name in result.stdout for name in RECIPES)
    result = CliRunner().invoke(app, ["reproduce", "cifar10-unifed"])
    assert result.exit_code == 2
    assert "Did you mean 'cifar10-unified'" in result.stderr
    result = CliRunner().invoke(app, ["reproduce", "visa-multi"])
    assert result.exit_code == 2
    assert "--root DIR" in result.stderr


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_page_says_runs_and_published_numbers(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.layout in DATASETS
    assert recipe.protocol in PROTOCOLS
    (row,) = (line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |"))
    runs, published = row.strip("| ").split(" | ")[-2:]
    assert int(runs) == recipe.runs
    assert all(
        f"{p['system'].split(' (')[0]} {p['percent']['image_auroc']:.1f}" in published for p in recipe.published
    )
    assert len(re.findall(r"\d+\.\d", published)) >= len(recipe.published)
    assert all(p["source"] for p in recipe.published)


def test_settings_are_the_published_ones_for_a_vit_and_the_defaults_for_a_cnn() -> None:
    recipe = RECIPES["mvtec-ad-multi"]
    config = recipe.config(seed=3)
    assert (config.model.teacher, config.model.size, config.train.steps) == ("dinov2-base", 448, 10_000)
    assert (config.train.lr, config.train.batch, config.train.warmup, config.train.clip) == (2e-3, 16, 100, 0.1)
    assert config.train.seed == 3
    assert recipe.config("dinov2-small").train.steps == 10_000
    assert recipe.config(limit_steps=7, size=224).train.steps == 7
    assert RECIPES["real-iad-multi"].config().model.dropout == 0.4
    cnn = recipe.config("efficientnet-lite0")
    assert cnn.train == RunConfig().train
    assert cnn.model.size == 0
    assert is_vit("dinov3-base")
    assert not is_vit("wide-resnet50-2")
