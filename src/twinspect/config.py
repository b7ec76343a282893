"""Settings of a run: frozen dataclasses whose checks speak the user's language.

Each field says its default and its help once; ``twinspect fit`` has an option for each. One dial, ``effort``, sets
what costs time; every other field has one default for all data sets and classes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from twinspect.errors import ConfigError, DataError, check_range, unknown_name
from twinspect.files import read_text

T = TypeVar("T")

SMALLEST, LARGEST = 64, 4096  # input side in pixels; memory grows with its square
LARGEST_BATCH = 1 << 16
LARGEST_SEED = 2**32 - 1  # seeds are multiplied by the step, and generators take 64 bits
LARGEST_THUMBNAIL = 512  # pixels; two thousand of them would be larger than the model
_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
MOST_TILES = 48  # each has statistics of its own
CHANGES = ("jpeg", "light", "shift")  # what a camera may do to an image that is good all the same
NOISY_OR = ("n1", "n2", "n3")
EE_TOKENS = ("all", "last")
PRECISIONS = ("auto", "fp32", "bf16")
POSES = ("auto", "fixed", "free")
DIRECTIONS = ("reverse", "forward")
TERMS = ("flat", "spatial", "channel", "intra", "inter")
CHANNEL_READINGS = ("kl", "kl_mean", "cosine")
CRAM_PLACES = ("bottleneck", "stages")
OF_MACHINE = ("device", "compile")  # what a model does not depend on, and another machine may lack
SCORINGS = ("plain", "default", "published")


# The one dial: what costs time. Everything else is the same at every position; docs/results.md has what each gives.
EFFORTS: dict[str, dict[str, dict[str, Any]]] = {
    "instant": {"model": {}, "train": {"steps": 0}},
    "fast": {"model": {"size": 256}, "train": {"steps": 30}},
    "default": {"model": {}, "train": {}},
}


def of_effort(name: str) -> dict[str, dict[str, Any]]:
    """Settings of a position of the dial; what is given beside it wins.

    Raises:
        ConfigError: no such position.
    """
    if name not in EFFORTS:
        raise ConfigError(unknown_name("effort", name, tuple(EFFORTS)))
    return EFFORTS[name]


@dataclass(frozen=True, slots=True)
class Structure:
    """A structural model with everything decided; see `twinspect.models.snl`."""

    direction: str
    terms: Mapping[str, float]
    cram: int
    cram_place: str
    cram_add_back: bool
    scoring: str
    channel_reading: str
    temperature: float
    affinity_side: int
    affinity_map: float


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models: one file that is an `models.contract.AnomalyModel`, and one row of `FAMILIES`.

    Attributes:
        module: the file; its function ``build(teacher, config, size)`` gives the untrained model.
        summary: for ``fit --help``.
        cnn_size: input side where none is asked for, with a CNN as the teacher; 0 takes the teacher's. RD4AD's 256
            for structural models: their finest stage has four times the positions of the dual model's.
        own: settings of `ModelConfig` that may be chosen in this family and are refused in others without them.
        preset: settings that hold where nothing else is asked for.
    """

    module: str
    summary: str
    cnn_size: int = 0
    own: tuple[str, ...] = ()
    preset: Mapping[str, Any] = field(default_factory=dict)


_SNL = "twinspect.models.snl"
_SNL_OWN = (
    "direction", "terms", "cram", "cram_place", "cram_add_back", "channel_reading", "temperature", "affinity_side",
    "affinity_map",
)  # fmt: skip
_SNL_PRESET = {"direction": "reverse", "terms": "spatial,channel,intra,inter", "cram": 32, "scoring": "default"}
_FLAT = {"direction": "reverse", "terms": "flat", "cram": 0, "scoring": "plain"}
FAMILIES: dict[str, Family] = {
    "dual": Family("twinspect.models.dual", "two students, local and semantic", own=("recentre", "ee_tokens")),
    "snl": Family(_SNL, "structural", 256, _SNL_OWN, _SNL_PRESET),
    "rd": Family(_SNL, "plain reverse distillation", 256, preset=_FLAT),
    "fd": Family(_SNL, "plain forward distillation", 256, preset={**_FLAT, "direction": "forward"}),
}


def _setting(default: T, text: str) -> T:
    """A field with its default and its help."""
    found: T = field(default=default, metadata={"help": text})
    return found


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What is built: teacher, students, input size."""

    model: str = _setting(
        "dual", "Family: " + "; ".join(f"{name} ({row.summary})" for name, row in FAMILIES.items()) + "."
    )
    teacher: str = _setting("auto", "Short name, any timm name, or auto.")
    weights: str = _setting("", "Local weights file of the teacher; empty searches the known places on disk.")
    pretrained: bool = _setting(True, "False builds a random-weight teacher, for tests of shape and speed only.")
    size: int = _setting(0, "Input side in pixels; 0 takes the teacher's default.")
    tiles: str = _setting(
        "", "RxC: cut pictures into R rows and C columns of overlapping tiles; auto: as their size needs."
    )
    width: int = _setting(0, "Width of the Encoder-Decoder; 0 takes the teacher's width (ViT) or 64 (CNN).")
    depth: int = _setting(
        0,
        "Blocks of the Encoder-Decoder, 0 takes 8 (ViT) or 1 (CNN); of a structural student 6 (ViT) or 3 a stage.",
    )
    dropout: float = _setting(0.2, "Noise of the bottleneck; 0.4 suits very large and varied sets.")
    ee_shrink: int = _setting(
        0,
        "Factor by which the Encoder-Encoder's input is smaller; 0 takes 1 (ViT) or about size / 64 (CNN).",
    )
    ee_depth: float = _setting(
        0.0,
        "Share of the teacher's blocks (of a CNN's: of every stage) in the Encoder-Encoder; 0 takes 1 (ViT) or 0.25.",
    )
    ee_tokens: str = _setting(
        "all",
        "dual: class tokens that the Encoder-Encoder learns and is compared in: those of all blocks, or of the last.",
    )
    recentre: bool = _setting(
        False,
        "dual, with a ViT: the Encoder-Decoder rebuilds patches minus the class token, layer-normed (Dinomaly2).",
    )
    direction: str = _setting(
        "",
        "snl: reverse (bottleneck and decoder) or forward (an encoder from scratch); empty takes reverse.",
    )
    terms: str = _setting(
        "",
        "snl: loss terms of flat, spatial, channel, intra and inter, separated by commas; a weight may follow "
        "(spatial,intra:0.1). Empty takes the last four.",
    )
    cram: int = _setting(-1, "snl: centres of the residual aggregation; 0 leaves it out, -1 takes 32.")
    cram_place: str = _setting(
        "",
        "snl: bottleneck (reverse only) or stages; empty takes the first that is possible.",
    )
    cram_add_back: bool = _setting(
        True,
        "snl: whether the residual aggregation adds the centres back to what of the residuals passes.",
    )
    scoring: str = _setting(
        "",
        "plain: the students' own distances, as in the papers; default: beside them statistics of good images; "
        "published: plain, with the map and image score of the public code (Dinomaly, RD4AD). Empty takes "
        "default, plain for rd and fd.",
    )
    channel_reading: str = _setting(
        "kl", "snl: reading of the channel term: kl (sum over positions), kl_mean (mean over them) or cosine."
    )
    temperature: float = _setting(
        1.0,
        "snl: of the channel term's softmax, in spreads of a channel on normal images.",
    )
    affinity_side: int = _setting(
        16,
        "snl: grid that maps are pooled to for affinities within an image; memory is its fourth power.",
    )
    affinity_map: float = _setting(
        0.0,
        "snl: weight of the affinity difference map beside the feature distance map, each divided by its mean on "
        "good images; 0 leaves it out.",
    )

    def __post_init__(self) -> None:
        tiles_of(self.tiles)
        if self.model not in FAMILIES:
            raise ConfigError(unknown_name("model", self.model, FAMILIES))
        _check(
            self.size == 0 or SMALLEST <= self.size <= LARGEST,
            f"--size {self.size}: at least {SMALLEST} pixels and at most {LARGEST:,}, or 0 for the default",
        )
        for name in ("width", "depth", "ee_shrink"):
            _check(getattr(self, name) >= 0, f"{name} {getattr(self, name)}: at least 1, or 0 (automatic)")
        _check(0.0 <= self.dropout < 1.0, f"dropout {self.dropout}: accepted 0 <= dropout < 1")
        _check(0.0 <= self.ee_depth <= 1.0, f"ee_depth {self.ee_depth}: accepted 0 (automatic) to 1")
        _check(self.ee_tokens in EE_TOKENS, unknown_name("ee_tokens", self.ee_tokens, EE_TOKENS))
        _check(not self.scoring or self.scoring in SCORINGS, unknown_name("scoring", self.scoring, SCORINGS))
        self._refuse_others_settings()
        if "terms" in FAMILIES[self.model].preset:
            self._check_structure()

    def scores(self) -> str:
        """The scoring that is meant."""
        return self.scoring or str(FAMILIES[self.model].preset.get("scoring", "default"))

    def structure(self) -> Structure:
        """The structural model that is meant, presets filled in; of structural families only."""
        preset = FAMILIES[self.model].preset
        direction = self.direction or preset["direction"]
        terms = _weighed(self.terms or preset["terms"])
        cram = preset["cram"] if self.cram < 0 else self.cram
        place = self.cram_place or ("bottleneck" if direction == "reverse" else "stages")
        return Structure(
            direction, terms, cram, place, self.cram_add_back, self.scores(),
            self.channel_reading, self.temperature, self.affinity_side, self.affinity_map,
        )  # fmt: skip

    def _refuse_others_settings(self) -> None:
        family, default = FAMILIES[self.model], {f.name: f.default for f in dataclasses.fields(self)}
        for name in (name for other in FAMILIES.values() for name in other.own if name not in family.own):
            if getattr(self, name) not in (default[name], family.preset.get(name, default[name])):
                owner = next(key for key, row in FAMILIES.items() if name in row.own)
                fixed = f"; {self.model} has {name} {family.preset[name]}" if name in family.preset else ""
                raise ConfigError(f"{name}: for --model {owner} only, not {self.model}{fixed}")

    def _check_structure(self) -> None:
        found = self.structure()
        _check(found.direction in DIRECTIONS, unknown_name("direction", found.direction, DIRECTIONS))
        _check(found.cram_place in CRAM_PLACES, unknown_name("cram_place", found.cram_place, CRAM_PLACES))
        _check(
            self.channel_reading in CHANNEL_READINGS,
            unknown_name("channel reading", self.channel_reading, CHANNEL_READINGS),
        )
        _check(self.temperature > 0, f"temperature {self.temperature}: accepted above 0")
        _check(self.affinity_side >= 2, f"affinity_side {self.affinity_side}: at least 2")
        _check(found.cram != 1, "cram 1: one centre is a mean; accepted 0 (none) or 2 and more")
        _check(self.affinity_map >= 0, f"affinity_map {self.affinity_map}: accepted 0 (none) or a weight above 0")
        _check(
            not self.affinity_map or found.scoring != "published",
            "affinity_map: the map of scoring published has none; type scoring = plain",
        )
        _check(
            self.cram_add_back or bool(found.cram and found.cram_place == "bottleneck"),
            "cram_add_back false: for a residual aggregation at the bottleneck only; behind a stage its output would "
            "never be negative, which features are",
        )
        if found.cram and found.direction == "forward":
            _check(found.cram_place == "stages", "cram_place bottleneck: a forward student has none; type stages")


def tiles_of(text: str) -> tuple[int, int]:
    """Rows and columns that --tiles names; (1, 1) for none, and for auto before pictures were seen.

    Raises:
        ConfigError: anything else, or more than `MOST_TILES`.
    """
    found = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text or "1x1")
    if text == "auto":
        return 1, 1
    accepted = f"--tiles {text}: accepted auto, or rows x columns such as 3x4, at most {MOST_TILES} in all"
    if found is None or int(found[1]) * int(found[2]) > MOST_TILES:
        raise ConfigError(accepted)
    return int(found[1]), int(found[2])


def tolerated(text: str) -> tuple[str, ...]:
    """Kinds of change that --tolerate names.

    Raises:
        ConfigError: an unknown one.
    """
    kinds = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in kinds:
        _check(name in CHANGES, unknown_name("--tolerate", name, CHANGES))
    return kinds


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How it is trained."""

    steps: int = _setting(100, "Optimiser steps; 0 trains no students and learns statistics of good images only.")
    batch: int = _setting(16, "Images per step.")
    seed: int = _setting(0, "Seed of weights, order, noise and splits.")
    lr: float = _setting(2e-3, "Peak learning rate of the Encoder-Decoder; falls to a tenth along a cosine.")
    lr_ee: float = _setting(1e-3, "Peak learning rate of the Encoder-Encoder.")
    warmup: int = _setting(10, "Steps of linear warm-up.")
    weight_decay: float = _setting(1e-4, "Decoupled weight decay.")
    clip: float = _setting(0.1, "Largest gradient norm of each student.")
    noisy_or: str = _setting("n2", "Reading of the Noisy-OR objective: n1, n2 or n3.")
    easy_ramp: int = _setting(1000, "Steps over which the easy share of positions rises to 0.9 (hard mining).")
    precision: str = _setting(
        "auto",
        "fp32, bf16 (autocast of the students, and of a teacher that is asked at every step), or auto: bf16 on a "
        "GPU.",
    )
    device: str = _setting("auto", "auto (a GPU where there is one), cpu, cuda or cuda:1.")
    compile: bool = _setting(
        False,
        "Compile the students (torch.compile): minutes at the start, which pay in long runs on a GPU.",
    )
    pose: str = _setting(
        "auto",
        "How products of at most 8 good images lie: fixed, free (in any pose: turned copies are learnt too), or auto "
        "(as the images look).",
    )
    time_budget_s: float = _setting(0.0, "Stop training after so many seconds; 0 means no limit.")
    checkpoint_every: int = _setting(20, "Steps between checkpoints that a killed run resumes from.")
    tolerate: str = _setting(
        "",
        "Changes of good images that are no anomaly: jpeg, light, shift, separated by commas. Altered copies are "
        "learnt, at most 50 a class and kind.",
    )
    holdout: float = _setting(0.2, "Share of the good training images that the students do not see.")
    thumbnails: int = _setting(
        96, "Longest side in pixels of the good images that the bundle keeps to show beside alarms; 0 keeps none."
    )
    drop_outliers: int = _setting(
        0, "Number of good images to leave out: those least like the others, which fit lists in any case."
    )
    cache_gb: float = _setting(20.0, "Largest teacher-feature cache on disk; 0 turns it off.")

    def __post_init__(self) -> None:
        _check(self.steps >= 0, f"--steps {self.steps}: 0 (no students) or more")
        _check(2 <= self.batch <= LARGEST_BATCH, f"--batch {self.batch}: at least 2, at most {LARGEST_BATCH:,}")
        check_range("--seed", self.seed, 0, LARGEST_SEED)
        check_range("--thumbnails", self.thumbnails, 0, LARGEST_THUMBNAIL)
        _check(self.cache_gb >= 0, f"--cache-gb {self.cache_gb:g}: accepted 0 (no cache) or 10^9 bytes")
        _check(self.drop_outliers >= 0, f"--drop-outliers {self.drop_outliers}: accepted 0 (none) or more")
        for name in ("warmup", "weight_decay", "easy_ramp"):
            _check(getattr(self, name) >= 0, f"{name} {getattr(self, name)}: accepted 0 or more")
        for name in ("clip", "checkpoint_every"):
            _check(getattr(self, name) > 0, f"{name} {getattr(self, name)}: accepted above 0")
        tolerated(self.tolerate)
        _check(self.noisy_or in NOISY_OR, unknown_name("Noisy-OR reading", self.noisy_or, NOISY_OR))
        _check(self.pose in POSES, unknown_name("pose", self.pose, POSES))
        _check(self.precision in PRECISIONS, unknown_name("precision", self.precision, PRECISIONS))
        _check(0.05 <= self.holdout <= 0.5, f"holdout {self.holdout}: accepted 0.05 to 0.5")
        _check(self.lr > 0 and self.lr_ee > 0, "learning rates must be above 0")
        _check(self.time_budget_s >= 0, f"--time-budget {self.time_budget_s}: accepted 0 (no limit) or seconds")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        scoring = self.model.scores()
        _check(
            self.train.steps > 0 or scoring == "default",
            f"--steps 0: scoring {scoring} has nothing but its students, which must be trained; give --steps 1 or "
            "more",
        )

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
            return cls.from_dict(tomllib.loads(read_text(path)))
        except (DataError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as TOML ({error})") from None


def _build(kind: type[T], values: Any) -> T:
    if not isinstance(values, dict):
        raise ConfigError(f"{values!r} stands where a table of settings is needed, such as [model] or [train]")
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in defaults:
            raise ConfigError(unknown_name("setting", key, defaults))
        wanted = type(defaults[key])
        if type(value) is not wanted and (wanted, type(value)) != (float, int):
            raise ConfigError(f"{key} {value!r}: {_KINDS[wanted]} is needed")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} {value}: a finite number is needed")
    return kind(**values)


def _weighed(text: str) -> dict[str, float]:
    """Loss terms with their weights, from a list such as ``spatial,intra:0.1``."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition(":"))
        _check(name in TERMS, unknown_name("term", name, TERMS))
        _check(name not in found, f"terms {text!r}: {name} is named twice")
        try:
            found[name] = float(number or 1.0)
        except ValueError:
            raise ConfigError(f"terms {text!r}: {number!r} is no weight; type a number, such as {name}:0.1") from None
        _check(0.0 < found[name] < math.inf, f"terms {text!r}: the weight of {name} must be above 0")
    return found


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
