"""Settings of a run: frozen dataclasses whose checks speak the user's language.

Each field says its default and its help once; ``twinspect fit`` has an option for each. One dial, ``effort``, sets
what costs time; every other field has one default for all data sets and classes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from twinspect.errors import ConfigError, DataError, unknown_name
from twinspect.files import read_text

T = TypeVar("T")

SMALLEST, LARGEST = 64, 4096  # input side in pixels; memory grows with its square
MOST_TILES = 48  # each has statistics of its own
OF_MACHINE = ("device",)  # what a model does not depend on, and another machine may lack
CHANGES = ("jpeg", "light", "shift")  # what a camera may do to an image that is good all the same
RULES = ("f1-max", "min-cost", "zero-miss")  # how labelled images choose a threshold
# Settings that models of version 0.8 name, with the only value that is still known.
_GONE: dict[str, Any] = {"cram_add_back": True, "channel_reading": "kl", "temperature": 1.0}
_TERMS = ("flat", "spatial", "channel", "intra", "inter")
_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class Range(NamedTuple):
    """Numbers that an option accepts, both ends included."""

    low: float
    high: float = math.inf
    zero: str = ""  # what a 0 outside of the range means; empty where it is refused

    def refusal(self, value: float) -> str:
        """What is accepted instead of a value; empty where it is accepted."""
        if self.low <= value <= self.high or (self.zero and value == 0):
            return ""
        words = f"{self.low:,} to {self.high:,}" if self.high < math.inf else f"{self.low:,} or more"
        words = "a number above 0" if self == ABOVE_ZERO else words
        return f"accepted {words}{f', or 0 ({self.zero})' if self.zero else ''}"


ABOVE_ZERO = Range(math.nextafter(0.0, 1.0))
SEEDS = Range(0, 2**32 - 1)  # seeds are multiplied by the step, and generators take 64 bits


def argument(help: str, default: Any = MISSING) -> Any:
    """A field that is typed without a flag."""
    return field(default=default, metadata={"help": help, "argument": True})


def option(help: str, default: Any = MISSING, flag: str = "", accepts: Range | Collection[str] = ()) -> Any:
    """A field that is typed behind a flag.

    Args:
        help: what it does, for ``--help``.
        default: where it is not typed.
        flag: instead of one made of its name; several with spaces between.
        accepts: numbers or words that `check_options` accepts. Where it is empty any word and every number from 0 on
            is; the default always is.
    """
    return field(default=default, metadata={"help": help, "flag": flag, "accepts": accepts})


def flag_of(row: Field[Any]) -> str:
    """The flags of an option with spaces between, the main one first: ``time_budget_s`` is ``--time-budget``."""
    name = row.name.removesuffix("_s").replace("_", "-")
    return row.metadata.get("flag") or f"--{name}{f'/--no-{name}' if row.default is True else ''}"


def check_options(options: Any) -> None:
    """Refuse values of a dataclass's fields that their `option` does not accept, by a ConfigError."""
    for row in fields(options):
        value, accepts = getattr(options, row.name), row.metadata.get("accepts")
        if accepts is None or value == row.default:
            continue
        flag = flag_of(row).split()[0]
        if type(value) in (int, float):
            refusal = (accepts or Range(0)).refusal(value)
            _check(not refusal, f"{flag} {value}: {refusal}")
        elif accepts:
            _check(value in accepts, unknown_name(flag, value, accepts))


# The one dial: what costs time. Everything else is the same at every position; docs/results.md has what each gives.
EFFORTS: dict[str, dict[str, dict[str, Any]]] = {
    "instant": {"model": {}, "train": {"steps": 0}},
    "fast": {"model": {"size": 256}, "train": {"steps": 30}},
    "default": {"model": {}, "train": {}},
}


def of_effort(name: str) -> dict[str, dict[str, Any]]:
    """Settings of a position of the dial."""
    _check(name in EFFORTS, unknown_name("effort", name, EFFORTS))
    return EFFORTS[name]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models: one file that is an `models.contract.AnomalyModel`, and one row of `FAMILIES`."""

    module: str  # the file; its function ``build(teacher, config, size)`` gives the untrained model
    summary: str  # for ``fit --help``
    # Input side where none is asked for, with a CNN as the teacher; 0 takes the teacher's. RD4AD's 256 for structural
    # models: their finest stage has four times the positions of the dual model's.
    cnn_size: int = 0
    settings: tuple[str, ...] = ()  # those of `ModelConfig` that only this family (and others that name them) has
    preset: Mapping[str, Any] = field(default_factory=dict)  # hold where nothing else is asked for


_SNL = "twinspect.models.snl"
_FLAT = {"direction": "reverse", "terms": "flat", "cram": 0, "cram_place": "bottleneck", "scoring": "plain"}
FAMILIES: dict[str, Family] = {
    "dual": Family("twinspect.models.dual", "two students, local and semantic", settings=("recentre", "ee_tokens")),
    "snl": Family(
        _SNL, "structural", 256, ("direction", "terms", "cram", "cram_place", "affinity_side", "affinity_map"),
        {"direction": "reverse", "terms": "spatial,channel,intra,inter", "cram": 32},
    ),
    "rd": Family(_SNL, "plain reverse distillation", 256, preset=_FLAT),
    "fd": Family(
        _SNL, "plain forward distillation", 256, preset={**_FLAT, "direction": "forward", "cram_place": "stages"}
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What is built: teacher, students, input size."""

    model: str = option(
        f"Family: {'; '.join(f'{name} ({row.summary})' for name, row in FAMILIES.items())}.", "dual", accepts=FAMILIES
    )
    teacher: str = option("Short name, any timm name, or auto.", "auto")
    weights: str = option("Local weights file of the teacher; empty searches the known places on disk.", "")
    pretrained: bool = option(
        "Whether the teacher has trained weights; random ones are for tests of shape and speed only.", True,
        flag="--pretrained/--random-teacher",
    )  # fmt: skip
    size: int = option(
        "Side in pixels at which the model looks at pictures, larger for finer defects; 0: the teacher's.",
        0,
        accepts=Range(SMALLEST, LARGEST, "the teacher's default"),
    )
    tiles: str = option(
        "RxC: cut pictures into R rows and C columns of overlapping tiles; auto: as their size needs.", ""
    )
    width: int = option("Width of the Encoder-Decoder; 0: the teacher's (ViT) or 64 (CNN).", 0)
    depth: int = option("Blocks of the decoder; 0: 8 (ViT) or 1 (CNN), structural 6 (ViT) or 3 a stage (CNN).", 0)
    dropout: float = option(
        "Noise of the bottleneck; 0.4 suits very large and varied sets.", 0.2, accepts=Range(0, 0.99)
    )
    ee_shrink: int = option(
        "How much smaller the Encoder-Encoder's input is; 0: 1 (ViT) or about size / 64 (CNN).", 0
    )
    ee_depth: float = option(
        "Share of the teacher's blocks in the Encoder-Encoder; 0: 1 (ViT) or 0.25 (CNN).", 0.0, accepts=Range(0, 1)
    )
    ee_tokens: str = option(
        "dual: class tokens that the Encoder-Encoder learns: last block's or all.", "last", accepts=("last", "all")
    )
    recentre: bool = option(
        "dual, with a ViT: rebuild patches minus the class token, layer-normed (Dinomaly2).", False
    )
    direction: str = option(
        "snl: reverse (a decoder) or forward (an encoder); empty: reverse.", "", accepts=("reverse", "forward")
    )
    terms: str = option(
        "snl: loss terms of flat, spatial, channel, intra and inter, separated by commas; a weight may follow "
        "(spatial,intra:0.1). Empty takes the last four.", "",
    )  # fmt: skip
    cram: int = option("snl: centres of the residual aggregation; 0 leaves it out, -1 takes 32.", -1)
    cram_place: str = option(
        "snl: bottleneck (reverse only) or stages; empty: what is possible.", "", accepts=("bottleneck", "stages")
    )
    scoring: str = option(
        "plain: the students' own distances, as in the papers; default: beside them statistics of good images; "
        "published: plain, with the map and image score of the public code (Dinomaly, RD4AD). Empty takes "
        "default, plain for rd and fd.", "", accepts=("plain", "default", "published"),
    )  # fmt: skip
    affinity_side: int = option(
        "snl: grid of affinities in an image; memory grows with its fourth power.", 16, accepts=Range(2)
    )
    affinity_map: float = option("snl: weight of the affinity difference map in the map; 0 leaves it out.", 0.0)

    def __post_init__(self) -> None:
        check_options(self)
        tiles_of(self.tiles)
        self._refuse_others_settings()
        if self.terms:
            self.weights_of_terms()
        _check(self.cram != 1, "cram 1: one centre is a mean; accepted 0 (none) or 2 and more")
        _check(
            not self.affinity_map or self.scores() != "published",
            "affinity_map: the map of scoring published has none; type scoring = plain",
        )
        if self.cram and (self.direction or FAMILIES[self.model].preset.get("direction")) == "forward":
            _check(self.cram_place != "bottleneck", "cram_place bottleneck: a forward student has none; type stages")

    def scores(self) -> str:
        """The scoring that is meant."""
        return self.scoring or str(FAMILIES[self.model].preset.get("scoring", "default"))

    def structure(self) -> ModelConfig:
        """The same settings with the presets of a structural family filled in; see `twinspect.models.snl`."""
        preset = FAMILIES[self.model].preset
        direction = self.direction or preset["direction"]
        return dataclasses.replace(
            self,
            direction=direction,
            terms=self.terms or preset["terms"],
            cram=preset["cram"] if self.cram < 0 else self.cram,
            cram_place=self.cram_place or ("stages" if direction == "forward" else "bottleneck"),
            scoring=self.scores(),
        )

    def weights_of_terms(self) -> dict[str, float]:
        """Loss terms with their weights, from a list such as ``spatial,intra:0.1``."""
        weights: dict[str, float] = {}
        for part in self.terms.split(","):
            name, _, number = (word.strip() for word in part.partition(":"))
            _check(name in _TERMS, unknown_name("--terms", name, _TERMS))
            _check(name not in weights, f"--terms {self.terms}: {name} is named twice")
            try:
                weights[name] = float(number or 1.0)
            except ValueError:
                raise ConfigError(
                    f"--terms {self.terms}: {number!r} is no weight; type a number, such as {name}:0.1"
                ) from None
            _check(0.0 < weights[name] < math.inf, f"--terms {self.terms}: the weight of {name} must be above 0")
        return weights

    def _refuse_others_settings(self) -> None:
        family, default = FAMILIES[self.model], {f.name: f.default for f in fields(self)}
        for name in (name for other in FAMILIES.values() for name in other.settings if name not in family.settings):
            if getattr(self, name) not in (default[name], family.preset.get(name, default[name])):
                owner = next(key for key, row in FAMILIES.items() if name in row.settings)
                fixed = f"; {self.model} has {name} {family.preset[name]}" if name in family.preset else ""
                raise ConfigError(f"{name}: for --model {owner} only, not {self.model}{fixed}")


def tiles_of(text: str) -> tuple[int, int]:
    """Rows and columns that --tiles names; (1, 1) for none, and for auto before pictures were seen."""
    if text in ("", "auto"):
        return 1, 1
    match = re.fullmatch(r"([1-9]\d?)x([1-9]\d?)", text)
    if match is None or int(match[1]) * int(match[2]) > MOST_TILES:
        raise ConfigError(
            f"--tiles {text}: accepted auto, or rows x columns such as 3x4, at most {MOST_TILES} in all"
        )
    return int(match[1]), int(match[2])


def tolerated(text: str) -> tuple[str, ...]:
    """Kinds of change that --tolerate names."""
    kinds = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in kinds:
        _check(name in CHANGES, unknown_name("--tolerate", name, CHANGES))
    return kinds


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How it is trained."""

    steps: int = option("Optimiser steps; 0 trains no students: statistics of good images only.", 100)
    batch: int = option("Images per step.", 16, accepts=Range(2, 1 << 16))
    seed: int = option("Seed of weights, order, noise and splits.", 0, accepts=SEEDS)
    lr: float = option("Peak learning rate of the Encoder-Decoder; falls to a tenth.", 2e-3, accepts=ABOVE_ZERO)
    lr_ee: float = option("Peak learning rate of the Encoder-Encoder.", 1e-3, accepts=ABOVE_ZERO)
    warmup: int = option("Steps of linear warm-up.", 10)
    weight_decay: float = option("Decoupled weight decay.", 1e-4)
    clip: float = option("Largest gradient norm of each student.", 0.1, accepts=ABOVE_ZERO)
    noisy_or: str = option("Reading of the Noisy-OR objective: n1, n2 or n3.", "n2", accepts=("n1", "n2", "n3"))
    easy_ramp: int = option("Steps in which the easy share of positions rises to 0.9 (hard mining).", 1000)
    precision: str = option(
        "fp32, bf16 (autocast of the students), or auto: bf16 on a GPU.", "auto", accepts=("auto", "fp32", "bf16")
    )
    device: str = option("auto (a GPU where there is one), cpu, cuda or cuda:1.", "auto")
    pose: str = option(
        "How products of at most 8 good images lie: fixed, free (in any pose: turned copies are learnt too), or auto "
        "(as the images look).", "auto", accepts=("auto", "fixed", "free"),
    )  # fmt: skip
    time_budget_s: float = option("Stop training after so many seconds; 0 means no limit.", 0.0)
    checkpoint_every: int = option(
        "Steps between checkpoints that a killed run resumes from; more of them where saving takes long.", 20,
        accepts=Range(1),
    )  # fmt: skip
    tolerate: str = option("Changes of good images that are no anomaly: jpeg, light, shift, separated by commas.", "")
    holdout: float = option(
        "Share of good images on which the students are measured, and not trained.", 0.2, accepts=Range(0.05, 0.5)
    )
    thumbnails: int = option(
        "Longest side of the good images shown beside alarms; 0: none.", 96, accepts=Range(0, 512)
    )
    drop_outliers: int = option("Leave out so many good images: those least like the others.", 0)
    cache_gb: float = option("Largest teacher-feature cache on disk; 0 turns it off.", 20.0)

    def __post_init__(self) -> None:
        check_options(self)
        tolerated(self.tolerate)


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
            _check(key in ("model", "train"), unknown_name("section", key, ("model", "train")))
        return cls(_build(ModelConfig, values.get("model", {})), _build(TrainConfig, values.get("train", {})))

    @classmethod
    def from_toml(cls, path: Path) -> RunConfig:
        """Read a TOML file with the tables ``[model]`` and ``[train]``."""
        try:
            return cls.from_dict(tomllib.loads(read_text(path)))
        except DataError as error:
            raise ConfigError(str(error)) from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: cannot be read as TOML ({error})") from None


def _build(section: type[T], values: Any) -> T:
    _check(
        isinstance(values, dict), f"{values!r} stands where a table of settings is needed, such as [model] or [train]"
    )
    defaults = {field.name: field.default for field in fields(section)}  # type: ignore[arg-type]
    values = {name: value for name, value in values.items() if name not in _GONE or value != _GONE[name]}
    for name, value in values.items():
        if name not in defaults:
            raise ConfigError(unknown_name("setting", name, defaults))
        kind = type(defaults[name])
        _check(type(value) in (kind, int if kind is float else kind), f"{name} {value!r}: {_KINDS[kind]} is needed")
        _check(kind is not float or math.isfinite(value), f"{name} {value}: a finite number is needed")
    return section(**values)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
