"""Settings of a run: frozen dataclasses whose checks speak the user's language.

A string under each field is its help. One dial, ``effort``, sets what costs time; every other field
has one default for all data sets and classes.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from twinspect.errors import ConfigError, unknown_name

T = TypeVar("T")

NOISY_OR = ("n1", "n2", "n3")
PRECISIONS = ("fp32", "bf16")
MODELS = ("dual",)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What is built: teacher, students, input size."""

    model: str = "dual"
    """Family of the model."""
    teacher: str = "auto"
    """Short name, any timm name, or auto."""
    weights: str = ""
    """Local weights file of the teacher; empty searches the known places on disk."""
    pretrained: bool = True
    """False builds a random-weight teacher, for tests of shape and speed only."""
    size: int = 0
    """Input side in pixels; 0 takes the teacher's default."""
    width: int = 0
    """Width of the Encoder-Decoder; 0 takes the teacher's width (ViT) or 128 (CNN)."""
    depth: int = 0
    """Blocks of the Encoder-Decoder; 0 takes 8 (ViT) or 3 (CNN)."""
    dropout: float = 0.2
    """Noise of the bottleneck; 0.4 suits very large and varied sets."""
    ee_shrink: int = 0
    """Factor by which the Encoder-Encoder's input is smaller; 0 takes 1 (ViT) or about size / 128 (CNN)."""
    ee_depth: float = 1.0
    """Share of the teacher's blocks in the Encoder-Encoder (ViT only)."""
    view_shrink: int = 0
    """Factor by which the view for global tokens is smaller; 0 takes 1 (ViT) or about size / 256 (CNN)."""
    clusters: int = 16
    """Largest number of scene prototypes for the residual statistics; the data choose how many."""

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError(unknown_name("model", self.model, MODELS))
        _check(self.size == 0 or self.size >= 64, f"--size {self.size}: at least 64 pixels, or 0 for the default")
        _check(0.0 <= self.dropout < 1.0, f"dropout {self.dropout}: accepted 0 <= dropout < 1")
        _check(0.0 < self.ee_depth <= 1.0, f"ee_depth {self.ee_depth}: accepted 0 < ee_depth <= 1")
        _check(self.clusters >= 1, f"clusters {self.clusters}: at least 1")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How it is trained."""

    steps: int = 100
    """Optimiser steps."""
    batch: int = 16
    """Images per step."""
    seed: int = 0
    """Seed of weights, order, noise and splits."""
    lr: float = 2e-3
    """Peak learning rate of the Encoder-Decoder; falls to a tenth along a cosine."""
    lr_ee: float = 1e-3
    """Peak learning rate of the Encoder-Encoder."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    clip: float = 0.1
    """Largest gradient norm of each student."""
    noisy_or: str = "n2"
    """Reading of the Noisy-OR objective: n1, n2 or n3."""
    easy_ramp: int = 1000
    """Steps over which the easy share of positions rises to 0.9 (hard mining)."""
    precision: str = "fp32"
    """fp32 or bf16 (autocast of the students)."""
    time_budget_s: float = 0.0
    """Stop training after so many seconds; 0 means no limit."""
    checkpoint_every: int = 20
    """Steps between checkpoints that a killed run resumes from."""
    holdout: float = 0.2
    """Share of the normal training images kept for calibration."""
    cache_gb: float = 20.0
    """Largest teacher-feature cache on disk; 0 turns it off."""

    def __post_init__(self) -> None:
        _check(self.steps >= 1, f"--steps {self.steps}: at least 1")
        _check(self.batch >= 2, f"--batch {self.batch}: at least 2")
        _check(self.noisy_or in NOISY_OR, unknown_name("Noisy-OR reading", self.noisy_or, NOISY_OR))
        _check(self.precision in PRECISIONS, unknown_name("precision", self.precision, PRECISIONS))
        _check(0.05 <= self.holdout <= 0.5, f"holdout {self.holdout}: accepted 0.05 to 0.5")
        _check(self.lr > 0 and self.lr_ee > 0, "learning rates must be above 0")
        _check(self.time_budget_s >= 0, f"--time-budget {self.time_budget_s}: accepted 0 (no limit) or seconds")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Build from a nested dict; unknown keys are refused with the nearest accepted name."""
        for key in values:
            if key not in ("model", "train"):
                raise ConfigError(unknown_name("section", key, ("model", "train")))
        return cls(_build(ModelConfig, values.get("model", {})), _build(TrainConfig, values.get("train", {})))

    @classmethod
    def from_toml(cls, path: Path) -> RunConfig:
        """Read a TOML file with the tables ``[model]`` and ``[train]``."""
        try:
            return cls.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as TOML ({error})") from None


def _build(kind: type[T], values: dict[str, Any]) -> T:
    names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(unknown_name("setting", key, names))
    return kind(**values)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
