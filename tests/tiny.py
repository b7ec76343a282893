"""Small settings, samples and pictures for tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from painting import weave
from PIL import Image

from twinspect.config import RunConfig
from twinspect.data import load
from twinspect.types import TEST, TRAIN, Sample

# Development images, where somebody has them beside the checkout.
SHARED = Path(os.environ.get("TWINSPECT_SHARED_DATA") or Path(__file__).parents[1].parent / "shared" / "data")
RANDOM = "test_vit"  # timm's own test networks: 0.3 M weights
RANDOM_CNN = "test_efficientnet"


def run_config(teacher: str = RANDOM, pretrained: bool = False, **changes: Any) -> RunConfig:
    """Few steps, thin students; ``changes`` are fields of either section."""
    model: dict[str, Any] = {"teacher": teacher, "pretrained": pretrained, "size": 64, "depth": 2}
    train: dict[str, Any] = {"steps": 3, "batch": 4, "checkpoint_every": 1}
    for name, value in changes.items():
        section = train if name in RunConfig().to_dict()["train"] else model
        section[name] = value
    return RunConfig.from_dict({"model": model, "train": train})


def train_samples(root: Path) -> list[Sample]:
    """The training samples of a data set."""
    return [s for s in load(root).samples if s.split == TRAIN]


def images_to_test(root: Path, label: int | None) -> list[Path]:
    """Test images, of one label if asked."""
    return [s.image for s in load(root).samples if s.split == TEST and label in (None, s.label)]


def picture(number: int = 0, height: int = 96, width: int = 96) -> np.ndarray:
    """A clean woven texture of any shape."""
    side = max(height, width)
    return weave(np.random.default_rng(number), side)[:height, :width].copy()


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    """Write a picture, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def good_folder(root: Path, count: int) -> Path:
    """A plain folder of good images."""
    for number in range(count):
        save(root / f"{number:03d}.png", picture(number))
    return root


def same_tensors(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two state dicts agree in names and in every bit."""
    return first.keys() == second.keys() and all(
        first[k].shape == second[k].shape and bool((first[k] == second[k]).all()) for k in first
    )
