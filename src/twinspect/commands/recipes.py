"""Recipes: one row per benchmark and protocol, with its settings and the published numbers beside ours.

docs/reproduce.md says where the settings come from and how they differ from the papers'. Published numbers are
percent, as their authors or a later paper report them; none was measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.errors import ConfigError, unknown_name
from twinspect.models.weights import SHORT_NAMES

INDUSTRIAL_SIZE, SEMANTIC_SIZE, STRUCTURAL_SIZE = 448, 224, 256


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
    published: tuple[Published, ...] = ()
    remark: str = ""  # what the sources leave open

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


def published_settings(steps: int, size: int, dropout: float = 0.2) -> RunConfig:
    """The Dinomaly line's settings for DINOv2 ViT-B/14 with registers; ``lr_ee`` is our reading."""
    return RunConfig(
        ModelConfig(teacher="dinov2-base", size=size, depth=8, dropout=dropout, ee_shrink=1),
        TrainConfig(
            steps=steps, batch=16, lr=2e-3, lr_ee=2e-4, warmup=100, weight_decay=1e-4, clip=0.1, easy_ramp=1000
        ),
    )  # fmt: skip


def structural_settings(steps: int, model: str) -> RunConfig:
    """RD4AD's settings; the falling learning rate and the clipped updates are this library's for every model."""
    return RunConfig(
        ModelConfig(model=model, teacher="wide-resnet50-2", size=STRUCTURAL_SIZE),
        TrainConfig(steps=steps, batch=16, lr=5e-3, warmup=100, weight_decay=0.0, clip=10.0),
    )


# Layout -> what it is called; training and test images of the official split.
_SETS = {
    "mvtec-ad": ("MVTec AD", (3_629, 1_725)), "visa": ("VisA", (8_659, 2_162)),
    "mvtec-loco": ("MVTec LOCO AD", (1_772, 1_568)), "real-iad": ("Real-IAD", (36_465, 114_585)),
    "cifar10": ("CIFAR-10", (50_000, 10_000)), "cifar100": ("CIFAR-100", (50_000, 10_000)),
    "fashion-mnist": ("Fashion-MNIST", (60_000, 10_000)), "view": ("View (Intel scenes)", (14_034, 3_000)),
}  # fmt: skip
# Method -> where its numbers are written.
_SOURCES = {
    "Dinomaly2": "Dinomaly2, 2025",
    "INP-Former": "INP-Former, CVPR 2025 (arXiv 2503.02424)",
    "dual-student paper": "arXiv 2509.24448, abstract",
    "dual-student paper (quoted)": "arXiv 2509.24448, second-hand",
    "Dinomaly-B": "Dinomaly, CVPR 2025 (arXiv 2405.14325)",
    "RD4AD": "RD4AD multi-class, second-hand",
    "GLASS": "GLASS, ECCV 2024",
    "UniNet": "UniNet, CVPR 2025",
    "GLAD": "GLAD, ECCV 2024",
    "InvAD": "InvAD (arXiv 2404.10760), second-hand",
    "SALAD (one model per class)": "SALAD, ICCV 2025 (arXiv 2509.02101)",
    "EfficientAD-M (one model per class)": "EfficientAD, WACV 2024",
    "GeneralAD-L": "GeneralAD, ECCV 2024 (arXiv 2407.12427)",
    "PANDA": "PANDA, CVPR 2021 (arXiv 2010.05903)",
    "UniAD": "UniAD, NeurIPS 2022 (arXiv 2206.03687)",
}
# The percentages of a method below are of these, as far as they are published.
_METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
_Numbers = Mapping[str, tuple[float, ...]]
_DUAL, _LONG = published_settings(10_000, INDUSTRIAL_SIZE), published_settings(50_000, INDUSTRIAL_SIZE, dropout=0.4)
_SHORT = published_settings(5_000, INDUSTRIAL_SIZE)  # Dinomaly's own number of steps for one class of Real-IAD
_SEMANTIC = published_settings(5_000, SEMANTIC_SIZE)
_SIZE = "The paper's input size and steps for semantic sets are not known: 224 pixels and 5,000 steps are ours."
_GAINS = (
    "The numbers of arXiv 2402.17091 itself were not at hand, only its gains over distillation methods in the multi-"
    "class setting (abstract): MVTec AD +3.9 detection and +1.5 localisation, VisA +1.2 and +2.5. The steps are ours."
)
_RD_MVTEC: _Numbers = {"RD4AD": (94.6, 96.1)}
_RD_VISA: _Numbers = {"RD4AD": (92.4, 98.1)}
_ONE_MVTEC: _Numbers = {"GLASS": (99.9,), "UniNet": (99.9,)}
_ONE_VISA: _Numbers = {"GLAD": (99.5,)}


def _row(
    name: str, layout: str, protocol: str, runs: int, settings: RunConfig, words: str, numbers: _Numbers,
    remark: str = "",
) -> Recipe:  # fmt: skip
    called, official = _SETS[layout]
    published = tuple(
        Published(system, dict(zip(_METRICS, percent, strict=False)), _SOURCES[system])
        for system, percent in numbers.items()
    )
    return Recipe(name, f"{called}, {words}", layout, protocol, runs, settings, official, published, remark)


def _semantic(layout: str, protocol: str, runs: int, words: str, numbers: _Numbers) -> Recipe:
    name = f"{layout}-{protocol.removesuffix('-super')}"
    return _row(name, layout, protocol, runs, _SEMANTIC, words, numbers, _SIZE)


def _structural(model: str, layout: str, classes: int, runs: int, numbers: _Numbers) -> Recipe:
    of_model = "system B" if model == "snl" else "plain reverse distillation (the base of system B)"
    if runs == 1:
        protocol, steps, words = "multi-class", 10_000, f"{of_model}, one model for {classes} classes"
    else:
        protocol, steps, words = "single-class", 3_000, f"{of_model}, one model per class"
    name, settings = f"{model}-{layout}-{protocol.removesuffix('-class')}", structural_settings(steps, model)
    return _row(name, layout, protocol, runs, settings, words, numbers, _GAINS)


_ROWS = (
    _row(
        "mvtec-ad-multi", "mvtec-ad", "multi-class", 1, _DUAL, "one model for 15 classes",
        {
            "Dinomaly2": (99.9,), "INP-Former": (99.7,), "dual-student paper": (99.7,),
            "Dinomaly-B": (99.6, 98.4, 69.3, 94.8), **_RD_MVTEC,
        },
    ),
    _row("mvtec-ad-single", "mvtec-ad", "single-class", 15, _DUAL, "one model per class", _ONE_MVTEC),
    _row(
        "visa-multi", "visa", "multi-class", 1, _DUAL, "one model for 12 classes",
        {
            "Dinomaly2": (99.3,), "INP-Former": (98.9,), "dual-student paper (quoted)": (98.8,),
            "Dinomaly-B": (98.7, 98.7, 53.2, 94.5), **_RD_VISA,
        },
    ),
    _row("visa-single", "visa", "single-class", 12, _DUAL, "one model per class", _ONE_VISA),
    _row(
        "real-iad-multi", "real-iad", "multi-class", 1, _LONG,
        "one model for 30 classes of five views; metrics per image, and per sample (highest view)",
        {
            "Dinomaly2": (92.1,), "INP-Former": (90.5,), "Dinomaly-B": (89.3, 98.8, 42.8, 93.9),
            "RD4AD": (82.4, 97.3),
        },
    ),
    _row(
        "real-iad-single", "real-iad", "single-class", 30, _SHORT, "one model per class", {"INP-Former": (92.1,)}
    ),
    _row(
        "mvtec-loco-multi", "mvtec-loco", "multi-class", 1, _DUAL,
        "one model for 5 classes; joint, logical and structural results, and AU-sPRO to 0.05",
        {
            "dual-student paper (quoted)": (86.1,), "InvAD": (82.3,), "SALAD (one model per class)": (96.1,),
            "EfficientAD-M (one model per class)": (90.7,),
        },
        "Steps for this set are not published: 10,000 as for the other industrial sets.",
    ),
    _semantic(
        "cifar10", "one-vs-rest", 10, "each class once as the normal one",
        {"GeneralAD-L": (99.3,), "PANDA": (96.2,)},
    ),
    _semantic(
        "cifar10", "unified", 4, "five classes normal, four splits",
        {"dual-student paper": (97.8,), "UniAD": (86.5,)},
    ),
    _semantic("cifar10", "leave-one-out", 10, "nine classes normal, the tenth is the anomaly", {}),
    _semantic(
        "cifar100", "one-vs-rest-super", 20, "each of the 20 super-classes once as the normal one",
        {"GeneralAD-L": (98.4,)},
    ),
    _semantic("cifar100", "unified", 4, "half of the 100 fine classes normal, four splits", {}),
    _semantic("fashion-mnist", "one-vs-rest", 10, "each class once as the normal one", {"PANDA": (95.6,)}),
    _semantic("view", "one-vs-rest", 6, "each class once as the normal one", {"GeneralAD-L": (95.9,)}),
    _semantic("view", "unified", 4, "three classes normal, four splits", {}),
    _structural("snl", "mvtec-ad", 15, 1, _RD_MVTEC),
    _structural("snl", "mvtec-ad", 15, 15, _ONE_MVTEC),
    _structural("snl", "visa", 12, 1, _RD_VISA),
    _structural("snl", "visa", 12, 12, _ONE_VISA),
    _structural("rd", "mvtec-ad", 15, 1, _RD_MVTEC),
    _structural("rd", "visa", 12, 1, _RD_VISA),
)  # fmt: skip
RECIPES = {row.name: row for row in _ROWS}


def find_recipe(name: str) -> Recipe:
    """A recipe by name."""
    if name not in RECIPES:
        raise ConfigError(unknown_name("recipe", name, RECIPES))
    return RECIPES[name]
