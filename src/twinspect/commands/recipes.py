"""Recipes: benchmark and protocol, settings, and the published numbers beside ours. ``recipes.toml`` lists them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from twinspect.config import RunConfig
from twinspect.errors import ConfigError, unknown_name
from twinspect.models.weights import SHORT_NAMES

_METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")  # of the percentages of a published system


@dataclass(frozen=True, slots=True)
class Published:
    """What somebody else reports: percent by metric."""

    system: str
    values: Mapping[str, float]
    source: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to run, and what to print beside it."""

    name: str
    title: str
    layout: str
    protocol: str
    runs: int  # how many models the protocol trains
    settings: RunConfig  # for a DINOv2 teacher, or any for system B
    official: tuple[int, int]  # training and test images of the official split
    published: tuple[Published, ...]
    remark: str  # what the sources leave open

    @property
    def cost(self) -> str:
        """What has to be computed."""
        model, train = self.settings.model, self.settings.train
        runs = f"{self.runs} runs of " if self.runs > 1 else ""
        return f"{runs}{train.steps:,} steps of batch {train.batch} at {model.size} pixels"

    def config(
        self, teacher: str = "", weights: str = "", seed: int = 0, limit_steps: int = 0, size: int = 0
    ) -> RunConfig:
        """Settings of a run; dual-student ones are for a ViT, and the library's defaults take over for others."""
        name = teacher or self.settings.model.teacher
        base = self.settings if is_vit(name) or self.settings.model.model != "dual" else RunConfig()
        steps = min(limit_steps or base.train.steps, base.train.steps)
        model = replace(base.model, teacher=name, weights=weights, size=size or base.model.size)
        return RunConfig(model, replace(base.train, seed=seed, steps=steps))


def is_vit(teacher: str) -> bool:
    """Whether a teacher's name stands for a vision transformer."""
    return SHORT_NAMES.get(teacher, teacher).startswith(("vit", "test_vit", "deit", "eva", "beit"))


def find_recipe(name: str) -> Recipe:
    """A recipe by name."""
    if name not in RECIPES:
        raise ConfigError(unknown_name("recipe", name, RECIPES))
    return RECIPES[name]


def _recipe(name: str, row: dict[str, Any], tables: dict[str, Any]) -> Recipe:
    data, base = tables["set"][row["layout"]], tables["settings"][row["settings"]]
    settings = {section: {**base[section], **row.get(section, {})} for section in ("model", "train")}
    published = tuple(
        Published(system, dict(zip(_METRICS, percent, strict=False)), tables["source"][system])
        for system, percent in row.get("published", {}).items()
    )
    return Recipe(
        name, f"{data['name']}, {row['words']}", row["layout"], row["protocol"], row["runs"],
        RunConfig.from_dict(settings), tuple(data["official"]), published, row.get("remark", base.get("remark", "")),
    )  # fmt: skip


_TABLES = tomllib.loads(files("twinspect.commands").joinpath("recipes.toml").read_text(encoding="utf-8"))
RECIPES = {name: _recipe(name, row, _TABLES) for name, row in _TABLES["recipe"].items()}
