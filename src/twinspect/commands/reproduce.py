"""``twinspect reproduce``: train and evaluate every split of a recipe, ours beside the published numbers.

``recipes.toml`` lists the recipes: benchmark and protocol, settings, published numbers.

Each split is written when it is finished, under a name made of what it depends on (its images, the settings, the
version), so a killed run loses one split at most, and typing the same command again goes on after the last one.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from twinspect._version import __version__
from twinspect.commands import results
from twinspect.commands.evaluate import defect_tables, leak_line, measure, remarks, run_facts
from twinspect.commands.options import ReproduceOptions
from twinspect.config import RunConfig
from twinspect.console import Console
from twinspect.data import Loaded
from twinspect.data.protocols import SEMANTIC, Split, find_leaks, make_splits
from twinspect.device import choose_device
from twinspect.errors import ConfigError, unknown_name
from twinspect.files import write_text
from twinspect.inference.predictor import Predictor, TorchRuntime
from twinspect.metrics import mean_of
from twinspect.models.weights import SHORT_NAMES, resolve_auto
from twinspect.report import FORMATS, Report, Section, Table
from twinspect.training.fit import fit
from twinspect.training.loop import remove_checkpoint
from twinspect.types import TEST, TRAIN

_METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")  # of the percentages of a published system


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
    published: tuple[dict[str, Any], ...]  # what others report: ``system``, ``percent`` by metric, ``source``
    remark: str  # what the sources leave open

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


def _recipe(name: str, row: dict[str, Any], tables: dict[str, Any]) -> Recipe:
    data, base = tables["set"][row["layout"]], tables["settings"][row["settings"]]
    settings = {section: {**base[section], **row.get(section, {})} for section in ("model", "train")}
    published = tuple(
        {"system": system, "percent": dict(zip(_METRICS, percent, strict=False)), "source": tables["source"][system]}
        for system, percent in row.get("published", {}).items()
    )
    return Recipe(
        name, f"{data['name']}, {row['words']}", row["layout"], row["protocol"], row["runs"],
        RunConfig.from_dict(settings), tuple(data["official"]), published, row.get("remark", base.get("remark", "")),
    )  # fmt: skip


_TABLES = tomllib.loads(files("twinspect.commands").joinpath("recipes.toml").read_text(encoding="utf-8"))
RECIPES = {name: _recipe(name, row, _TABLES) for name, row in _TABLES["recipe"].items()}


OURS = "twinspect (our re-implementation)"
ALONE = {"score_local": "local score alone", "score_semantic": "semantic score alone"}
# Values of an evaluation of which several splits are put together: dicts by class, and lists of sentences.
BY_CLASS = ("classes", "defects", "defects_auspro_005", "defect_decisions")
LISTS = ("undefined", "failed", "masks_not_used")
SplitResult = dict[str, Any]


def reproduce(options: ReproduceOptions, console: Console) -> None:
    """List the recipes, or run one."""
    if not options.recipe:
        for name, recipe in RECIPES.items():
            runs = f"{recipe.runs} runs of " if recipe.runs > 1 else ""
            steps, batch, size = recipe.settings.train.steps, recipe.settings.train.batch, recipe.settings.model.size
            console.say(f"{name:<28}{recipe.title}: {runs}{steps:,} steps of batch {batch} at {size} pixels")
        return
    if options.recipe not in RECIPES:
        raise ConfigError(unknown_name("recipe", options.recipe, RECIPES))
    recipe = RECIPES[options.recipe]
    if options.root is None:
        raise ConfigError(
            f"{recipe.name} needs the {recipe.layout} data set; type: twinspect reproduce {recipe.name} --root DIR"
        )
    teacher = resolve_auto() if options.teacher == "auto" else options.teacher  # the settings depend on it
    config = recipe.config(teacher, options.weights, options.seed, options.limit_steps, options.size)
    out = options.out or Path("reproduce-out") / recipe.name
    run_recipe(recipe, options.root, out, config, console, options.drop_leaks)


def run_recipe(
    recipe: Recipe, root: Path, out: Path, config: RunConfig, console: Console, without_leaks: bool = False
) -> dict[str, Any]:
    """Train and evaluate all splits of a recipe that are not finished yet; write the comparison, and return it.

    ``out`` has ``results.json`` beside the reports, and one file per split.
    """
    files = [out / f"results{suffix}" for suffix in FORMATS]
    results.check_outputs(files, option="--out")
    loaded = results.read_data(root, recipe.layout, None, console)
    pairs = find_leaks(loaded.samples)
    console.say(leak_line(pairs, "their training copies are left out" if without_leaks else ""))
    leaked = {sample for sample, _ in pairs} if without_leaks else set()
    samples = [sample for sample in loaded.samples if sample not in leaked]
    splits = make_splits(samples, recipe.protocol, config.train.seed)
    reasons = differences(recipe, loaded, config)
    for reason in reasons:
        console.warn(f"not comparable with the published numbers: {reason}")
    done: list[SplitResult] = []
    for number, split in enumerate(splits, start=1):
        console.say(f"split {number} of {len(splits)}: {split.describe()}")
        done.append(finished_or_run(split, out, config, console))
        values = summarise(recipe, config, done, len(splits), reasons)
        progress = {"protocol": recipe.protocol, "splits": f"{len(done)} of {len(splits)}"}
        facts = {**progress, **run_facts(values["config"])}
        report = Report(f"twinspect reproduce {recipe.name}", sections(recipe, values), facts, values)
        for path in files:
            report.write(path)
    console.say(*report.lines())
    console.say(f"results: {out / 'results.md'}, results.json, results.html")
    return values


def differences(recipe: Recipe, loaded: Loaded, config: RunConfig) -> list[str]:
    """Why numbers of this run must not be compared with the published ones; empty if nothing is known."""
    reasons = [] if config.model.pretrained else ["the teacher has random weights"]
    for name, used, published in (
        ("teacher", config.model.teacher, recipe.settings.model.teacher),
        ("input size", config.model.size, recipe.settings.model.size),
        ("steps", config.train.steps, recipe.settings.train.steps),
        ("scoring", config.model.scores(), recipe.settings.model.scores()),
    ):
        if used != published:
            reasons.append(f"{name} {used or 'by default'}, the recipe has {published}")
    train, test = counts = tuple(sum(s.split == part for s in loaded.samples) for part in (TRAIN, TEST))
    if counts != recipe.official:
        template = "{:,} training and {:,} test images"
        reasons.append(f"{template.format(train, test)}, the official split has {template.format(*recipe.official)}")
    return reasons


def run_key(split: Split, config: RunConfig) -> str:
    """16 hex digits of everything a split's result depends on: images, labels, settings, version."""
    settings = config.to_dict()
    for name in ("checkpoint_every", "cache_gb"):
        settings["train"].pop(name)
    text = json.dumps([split.name, split.hash, settings, __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished_or_run(split: Split, out: Path, config: RunConfig, console: Console) -> SplitResult:
    """The result of a split: read if an earlier run finished it, else made and written."""
    key = run_key(split, config)
    stem = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', split.name)}-{key}"
    path, work = out / "splits" / f"{stem}.json", out / "work" / stem
    with suppress(OSError, ValueError):  # not there, or damaged
        result: SplitResult = json.loads(path.read_text(encoding="utf-8"))
        console.say(f"finished before: {path.name}")
        return result
    result = run_split(split, config, work, console) | {"key": key}
    write_text(path, json.dumps(result))
    remove_checkpoint(work)
    return result


def run_split(split: Split, config: RunConfig, work: Path, console: Console) -> SplitResult:
    """Train on a split's normal images, calibrate on those set aside, measure on its test images."""
    began = time.monotonic()
    fitted = fit([*split.train, *split.calibration], config, work, console.progress)
    fit_s = time.monotonic() - began
    results.warn_of(fitted, console)
    runtime = TorchRuntime(fitted.model, choose_device(config.train.device))
    measured = measure(Predictor(runtime, fitted.decision, runtime.usual), split, console)
    result = {
        **measured.values,
        "counts": {"train": len(split.train), "calibration": len(split.calibration), "test": len(split.test)},
        "seconds": {"fit": round(fit_s, 1), "evaluate": round(measured.seconds, 1)},
        "record": fitted.record,
    }
    console.warn(*remarks(result))
    return result


def summarise(
    recipe: Recipe, config: RunConfig, done: Sequence[SplitResult], total: int, reasons: Sequence[str]
) -> dict[str, Any]:
    """Results of several splits as one: rows are classes (industrial) or splits (semantic), then their mean."""
    joined = {name: {row: v for result in done for row, v in result[name].items()} for name in BY_CLASS}
    record = done[0]["record"]
    alone = {name: {row["split"]["name"]: row["students"].get(name, {}) for row in done} for name in ALONE}
    students = {name: mean for name, rows in alone.items() if (mean := mean_of(rows))}
    return {
        "recipe": recipe.name, "layout": recipe.layout, "protocol": recipe.protocol,
        "complete": len(done) == total, "splits_done": len(done), "splits": total,
        **joined, "mean": mean_of(joined["classes"]), "students": students,
        **{name: [text for result in done for text in result[name]] for name in LISTS},
        "published": list(recipe.published),
        "not_comparable": list(reasons), "remark": recipe.remark,
        "runs": [
            {**result["split"], **result["counts"], **result["seconds"], "key": result["key"]} for result in done
        ],
        "config": {
            **config.to_dict(), "teacher": record["teacher"], "size": record["size"], "training": record["training"],
            "steps": record["training"]["steps"], "mask_rule": results.MASK_RULE, "map_size": results.MAP_SIZE,
        },
    }  # fmt: skip


def sections(recipe: Recipe, values: dict[str, Any]) -> list[Section]:
    """Comparison, own numbers in full, the splits, and what to know."""
    notes = [f"Not comparable with the published numbers: {text}." for text in values["not_comparable"]]
    if not values["complete"]:
        notes.append(f"Only {values['splits_done']} of {values['splits']} splits are finished: no final mean.")
    notes += [recipe.remark] if recipe.remark else []
    first = "split" if values["runs"][0]["kind"] == SEMANTIC else "class"
    rows = {**values["classes"], "mean": values["mean"]}
    columns = ("hash", "train", "calibration", "test", "fit", "evaluate")
    runs = [{"split": run["name"], **{column: run[column] for column in columns}} for run in values["runs"]]
    ours = Table.of(f"per {first} and mean", results.metric_rows(rows, first))
    return [
        Section("Beside the published numbers", tuple(notes), (comparison(recipe, values),)),
        Section("Ours in full", tuple(remarks(values)), (ours, *defect_tables(values))),
        Section("Splits", (), (Table.of("fit and evaluate in seconds", runs),), printed=False),
    ]


def comparison(recipe: Recipe, values: dict[str, Any]) -> Table:
    """Ours, the local and the semantic score alone, and what others report, in percent with the source."""
    metrics = list(dict.fromkeys(["image_auroc", *(m for p in recipe.published for m in p["percent"])]))
    ours = {OURS: values["mean"], **{ALONE[name]: row for name, row in values["students"].items()}}
    every = [(name, {m: 100 * v for m, v in row.items()}, "measured by this run") for name, row in ours.items()]
    every += [(p["system"], p["percent"], f"published: {p['source']}") for p in recipe.published]
    rows = []
    for system, percent, source in every:
        shown = {m: f"{percent[m]:.1f}" if m in percent else None for m in metrics}
        rows.append({"system": system, **shown, "source": source})
    return Table.of(f"{recipe.layout}, {recipe.protocol}, percent", rows)
