"""How accurate are our models beside classical detectors on the same frozen teacher, by one recipe for all sets?

parts (six real products, one model), textile (the demo's split), scenes and cifar10 (one class normal, or half of
them). Ours: system A with its defaults, jointly and each student alone; system B where asked for (``--methods
ours-b``, slow). Baselines: nearest patch neighbours, a Gaussian per position, nearest neighbours and Mahalanobis
distance of pooled embeddings. A baseline is run over a grid of input sizes, stages and ways to read a map, and the
best of all is shown, chosen *with the test labels, in the baseline's favour*; pixel metrics are each the best of the
grid, too. Ours has one setting for everything. Intervals are bootstrap intervals over test images, drawn alike for
all methods.

Every finished entry is written at once, and the same command goes on after a kill; tables are made of all entries in
the file that fit the command, so ours and the baselines may be run one after the other.

    python benchmarks/accuracy.py --data DIR                 # DIR holds parts/, scenes/ and cifar10/
    python benchmarks/accuracy.py --data DIR --methods baselines --sets parts --sizes 256
    python benchmarks/accuracy.py --data DIR --limit 20 --steps 10 --size 128 --sizes 128      # a quick look
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from baselines import PatchMemory, PositionGaussian, gaussian_distance, image_scores, nearest_distance
from problems import DRAWS, PIXEL, SETS, Problem, Store, code_hash, key_of, ours, problems_of
from scipy.ndimage import gaussian_filter
from teacher_bank import Bank
from torch.nn import functional

from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.data.samples import read_sample_mask, read_sample_rgb
from twinspect.device import keep_freed_memory
from twinspect.files import write_text
from twinspect.metrics import Evaluator
from twinspect.models.teachers import create_teacher
from twinspect.report import Report, Section, Table

OURS = {
    "ours-a": ("dual", "default"), "ours-b": ("snl", "default"),
    "ours-a-plain": ("dual", "plain"), "ours-b-plain": ("snl", "plain"),
}  # fmt: skip
BASELINES = {
    "patchcore": "nearest patch neighbours (PatchCore-like)",
    "padim": "Gaussian per position (PaDiM-like)",
    "knn": "kNN of pooled embeddings",
    "mahalanobis": "Mahalanobis of pooled embeddings",
}
VERSION = 1  # of the baselines; results of another version are not taken up
RATES = ("found", "false_alarms")  # at the default threshold
BLUR = 4.0  # pixels of the original image, as both papers smooth their maps


@dataclass(frozen=True)
class Scale:
    """What depends on the kind of set: what is small counts in an industrial one, the scene in a semantic one."""

    sizes: tuple[int, ...]
    grid: int
    memory: int
    candidates: int


SCALES = {False: Scale((256, 384, 512), 64, 4000, 100_000), True: Scale((128, 192, 256), 16, 1000, 20_000)}
EMBEDDINGS = ("head", "stage 7", "stage 6", "stage 5")


@dataclass(frozen=True)
class Variant:
    """One setting of a baseline at one input size."""

    stages: str
    detail: str
    run: Callable[[Bank, Problem, Scale, int], np.ndarray | torch.Tensor]

    @property
    def name(self) -> str:
        """For keys and tables."""
        return f"{self.stages}, {self.detail}"


def patch_variant(stages, detail, make):
    """A detector on patches of some stages."""

    def run(bank, problem, scale, seed):
        known = bank.patches(stages, bank.at(problem.known))
        detector = make(scale, seed).fit(known, len(problem.known))
        side = bank.side(stages)
        parts = [detector.distance(p) for p in bank.patches(stages, bank.at(problem.test), 4)()]
        return torch.cat(parts).unflatten(1, (side, side))

    return Variant("+".join(map(str, stages)), detail, run)


def pooled_variant(stage, detail, distance):
    """A distance between pooled embeddings."""

    def run(bank, problem, scale, seed):
        known, tested = (bank.pooled[stage][bank.at(samples)] for samples in (problem.known, problem.test))
        return distance(known, tested, [s.class_name for s in problem.known])

    return Variant(stage, detail, run)


def memory(greedy, scaled):
    return lambda scale, seed: PatchMemory(scale.memory, scale.candidates, greedy, scaled, seed)


def gaussian(dims):
    return lambda scale, seed: PositionGaussian(dims, seed=seed)


VARIANTS = {
    "patchcore": [
        patch_variant((3, 5), "greedy", memory(True, False)),
        patch_variant((3, 5), "random", memory(False, False)),
        patch_variant((3, 5), "greedy, scaled channels", memory(True, True)),
        patch_variant((5, 7), "greedy", memory(True, False)),
    ],
    "padim": [patch_variant(stages, "100 channels", gaussian(100)) for stages in ((2, 3, 5), (3, 5), (5, 7))],
    "knn": [
        pooled_variant(stage, f"{k} nearest", lambda known, tested, _, k=k: nearest_distance(known, tested, k))
        for stage in EMBEDDINGS
        for k in (1, 2, 5)
    ],
    "mahalanobis": [
        pooled_variant(
            stage, detail, lambda known, tested, names, use=use: gaussian_distance(known, tested, use(names))
        )
        for stage in EMBEDDINGS
        for detail, use in (("one mean", lambda names: None), ("a mean per class", lambda names: names))
    ],
}


# --------------------------------------------------------------------------------------------- running


def run_baselines(problems, args, store, console):
    """All settings of all baselines on the problems of one set; one pass of the teacher per input size."""
    scale = SCALES[problems[0].semantic]
    settings = [(m, v) for m in args.methods if m in BASELINES for v in VARIANTS[m]]
    for size, seed in itertools.product(args.sizes or scale.sizes, args.seed):
        fixed = (VERSION, args.teacher, size, seed, scale.grid, scale.memory, scale.candidates)
        keys = {(m, v.name, p.name): key_of(*fixed, m, v.name, p.hash) for m, v in settings for p in problems}
        if all(key in store.entries for key in keys.values()):
            continue
        images = [s for p in problems for s in (*p.known, *p.test)]
        bank = Bank(create_teacher(args.teacher), images, size, scale.grid, console.progress)
        for method, variant in settings:
            facts = {"method": method, "teacher": args.teacher, "size": size, "variant": variant.name, "seed": seed}
            for problem in problems:
                key = keys[method, variant.name, problem.name]
                if key not in store.entries:
                    keep(store, key, problem, facts, *one_baseline(bank, problem, variant, scale, seed))
            own = [store.entries[keys[method, variant.name, p.name]] for p in problems]
            console.say(line_of(own, problems[0].headline))


def one_baseline(bank, problem, variant, scale, seed):
    """Reading -> image scores, class -> pixel metrics, seconds without the teacher's."""
    began = time.monotonic()
    with torch.inference_mode():
        found = variant.run(bank, problem, scale, seed)
    seconds = {"seconds": round(time.monotonic() - began, 1)}
    if found.ndim == 1:
        return {"": found.numpy()}, {}, seconds
    scores = {reading: values.numpy() for reading, values in image_scores(found).items()}
    return scores, pixel_metrics(problem, found) if problem.masked else {}, seconds


def pixel_metrics(problem, map_Bhw):
    """Class -> pixel metrics of maps brought to the size of each image and smoothed, for classes with masks."""
    evaluator = Evaluator()
    for sample, own in zip(problem.test, map_Bhw, strict=True):
        if sample.class_name not in problem.masked:
            continue
        shape = read_sample_rgb(sample).shape[:2]
        full = functional.interpolate(own[None, None], size=shape, mode="bilinear", align_corners=False)[0, 0]
        mask = read_sample_mask(sample, shape)
        smooth = gaussian_filter(full.numpy(), BLUR)
        evaluator.update(0.0, sample.label, sample.class_name, map_HW=smooth, mask_HW=mask, name=str(sample.image))
    classes = evaluator.compute()["classes"]
    return {name: {metric: row[metric] for metric in PIXEL} for name, row in classes.items()}


def run_ours(problems, args, store, console):
    """System A, and B where asked for, with the library's defaults but for what was typed."""
    for method, seed in itertools.product((m for m in OURS if m in args.methods), args.seed):
        family, scoring = OURS[method]
        model = ModelConfig(model=family, scoring=scoring, teacher=args.teacher, size=args.size)
        config = RunConfig(model, TrainConfig(seed=seed, steps=args.steps or TrainConfig().steps))
        facts = {"method": method, "teacher": args.teacher, **shown_of(args), "seed": seed}
        for problem in problems:
            key = key_of(problem.hash, config.to_dict(), code_hash())
            if key not in store.entries:
                keep(store, key, problem, facts, *ours(problem, config, console))
            console.say(line_of([store.entries[key]], problem.headline))


def shown_of(args):
    """What tells runs of ours apart in the store, beside the seed."""
    steps = args.steps or TrainConfig().steps
    return {"size": args.size or "default", "variant": f"{steps} steps", "code": code_hash()}


def keep(store, key, problem, facts, scores, pixel, seconds):
    """Judge image scores (reading -> scores) and store everything."""
    found = {reading: problem.judge(values) for reading, values in scores.items()}
    where = {"set": problem.set, "protocol": problem.protocol, "problem": problem.name, "hash": problem.hash}
    store.add(key, {**where, **facts, **seconds, "found": found, "pixel": pixel})


def line_of(entries, part):
    """One line for entries that differ in their problem only."""
    first, seconds = entries[0], sum(entry["seconds"] for entry in entries)
    values = {r: headline([entry["found"][r] for entry in entries], part)[0] for r in first["found"]}
    numbers = ", ".join(f"{r} {v:.4f}".strip() for r, v in values.items())
    name = first["problem"] if len(entries) == 1 else f"mean of {len(entries)} runs"
    setting = f"{first['method']}, {first['size']} px, {first['variant']}, seed {first['seed']}"
    return f"{first['set']} {name}: {setting}: {numbers} in {seconds:.0f} s"


# ---------------------------------------------------------------------------------------------- tables


def headline(found, part):
    """(AUROC, draws) of one part, or the mean over all parts of all problems."""
    rows = [row for parts in found for name, row in parts.items() if not part or name == part]
    return float(np.mean([r["auroc"] for r in rows])), np.mean([r["draws"] for r in rows], axis=0)


def settings_of(entries, problems):
    """(method, size, variant, reading) -> seed -> part results of all problems; unfinished ones are left out."""
    found = {}
    for entry in entries:
        for reading, parts in entry["found"].items():
            setting = (entry["method"], entry["size"], entry["variant"], reading)
            found.setdefault(setting, {}).setdefault(entry["seed"], {})[entry["problem"]] = (parts, entry)
    names = [p.name for p in problems]
    whole = {
        setting: {seed: [own[n] for n in names] for seed, own in seeds.items() if set(names) <= set(own)}
        for setting, seeds in found.items()
    }
    return {setting: seeds for setting, seeds in whole.items() if seeds}


def summed(setting, seeds, part):
    """Numbers of one setting, mean over its seeds."""
    found = [headline([parts for parts, _ in runs], part) for runs in seeds.values()]
    names = [name for parts, _ in next(iter(seeds.values())) for name in parts]
    runs = [run for own in seeds.values() for run in own]
    per_part = {n: float(np.mean([parts[n]["auroc"] for parts, _ in runs if n in parts])) for n in names}
    pixel = {m: [row[m] for _, entry in runs for row in entry["pixel"].values()] for m in PIXEL}
    decided = [row for _, entry in runs for row in entry.get("decisions", {}).values() if setting[3] == "joint"]
    return {
        "method": setting[0], "size": setting[1], "variant": setting[2], "reading": setting[3],
        "auroc": float(np.mean([value for value, _ in found])), "draws": np.mean([d for _, d in found], axis=0),
        "seeds": sorted(seeds), "spread": float(np.std([value for value, _ in found])), "parts": per_part,
        "pixel": {m: float(np.mean(values)) for m, values in pixel.items() if values},
        "seconds": float(sum(entry["seconds"] for _, entry in runs)) / len(seeds),
        "decided": {k: float(np.mean([row[k] for row in decided])) for k in RATES if decided},
    }  # fmt: skip


def best_rows(entries, problems):
    """Every reading of ours, and of every baseline the setting with the best image AUROC."""
    rows = [summed(s, seeds, problems[0].headline) for s, seeds in settings_of(entries, problems).items()]
    # The map is that of the joint score, so the students alone have no pixel metrics.
    shown = [row if row["reading"] == "joint" else row | {"pixel": {}} for row in rows if row["method"] in OURS]
    for method in BASELINES:
        own = [row for row in rows if row["method"] == method]
        if own:
            best = dict(max(own, key=lambda row: row["auroc"]), tried=len(own))
            # Each pixel metric in the baseline's favour, too, whatever its setting.
            best["pixel"] = {m: max(r["pixel"][m] for r in own) for m in PIXEL if any(m in r["pixel"] for r in own)}
            shown.append(best)
    return shown


def interval(draws):
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{low:.3f} to {high:.3f}"


def title_of(row):
    if row["method"] in OURS:
        family, scoring = OURS[row["method"]]
        return f"{'A' if family == 'dual' else 'B'}{' plain' * (scoring == 'plain')}, {row['reading']}"
    return BASELINES[row["method"]]


def table_of(name, protocol, rows):
    """One set and protocol: rows of `best_rows`."""
    parts = list(rows[0]["parts"]) if protocol in ("multi-class", "demo") else []
    metrics = [m for m in PIXEL if any(m in row["pixel"] for row in rows)]
    columns = (
        "method",
        "image AUROC",
        "95 %",
        "A joint - this",
        *parts,
        *metrics,
        "found",
        "false alarms",
        "setting",
        "of",
        "seeds",
        "seconds",
    )
    joint = next((r for r in rows if r["method"] == "ours-a" and r["reading"] == "joint"), None)
    body = []
    for row in rows:
        reading = row["reading"] if row["method"] in BASELINES else ""
        setting = ", ".join(v for v in (f"{row['size']} px", row["variant"], reading) if v)
        less = "-" if joint in (None, row) else interval(joint["draws"] - row["draws"])
        spread = f" ± {row['spread']:.4f}" if len(row["seeds"]) > 1 else ""
        decided = (row["decided"].get(k, "-") for k in RATES)
        numbers = (*(row["parts"][n] for n in parts), *(row["pixel"].get(m, "-") for m in metrics), *decided)
        seeds = " ".join(map(str, row["seeds"]))
        body.append(
            (title_of(row), f"{row['auroc']:.4f}{spread}", interval(row["draws"]), less, *numbers, setting,
             row.get("tried", 1), seeds, round(row["seconds"]))
        )  # fmt: skip
    return Table(f"{name}, {protocol}", columns, tuple(body))


NOTE = (
    "Baselines: the best of a grid of settings (their number under 'of'), chosen with the test labels, in the "
    "baseline's favour; each pixel metric is the best of the grid as well. Ours: one setting for all. Intervals: "
    f"{DRAWS} bootstrap draws of the test images, the same for all methods, so that differences are paired. Seconds: "
    "ours training and test with cached teacher features where there are some; baselines without the teacher's time."
)


def report(problems_by_set, args, store):
    """Markdown and JSON beside the store."""
    tables, values = [], {}
    for name, problems in problems_by_set.items():
        for protocol in dict.fromkeys(p.protocol for p in problems):
            own = [p for p in problems if p.protocol == protocol]
            hashes = {p.hash for p in own}
            entries = [e for e in store.entries.values() if e["hash"] in hashes and wanted(e, args)]
            rows = best_rows(entries, own)
            if rows:
                tables.append(table_of(name, protocol, rows))
                values[f"{name} {protocol}"] = [{k: v for k, v in r.items() if k != "draws"} for r in rows]
    facts = {"teacher": args.teacher, "images per class": str(args.limit or "all"), "code": code_hash()}
    facts |= {"threads": str(torch.get_num_threads()), "mask rule": "> 0", "map size": "original image"}
    text = Report(
        "Accuracy beside classical baselines", [Section("Tables", (NOTE,), tuple(tables))], facts
    ).markdown()
    write_text(args.out.with_suffix(".md"), text)
    write_text(args.out.with_suffix(".table.json"), json.dumps({"facts": facts, "tables": values}, indent=1) + "\n")
    return text


def wanted(entry, args):
    """Whether an entry of the store belongs in this run's tables: ours only of this code and setting."""
    if entry["seed"] not in args.seed or entry["method"] not in args.methods or entry["teacher"] != args.teacher:
        return False
    return entry["method"] in BASELINES or all(entry[name] == value for name, value in shown_of(args).items())


def listed(kind):
    return lambda text: [kind(part) for part in text.split(",") if part]


def methods_of(names):
    """``baselines`` stands for all of them."""
    return [m for name in names for m in (BASELINES if name == "baselines" else [name])]


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=os.environ.get("TWINSPECT_SHARED_DATA", ""), help="or TWINSPECT_SHARED_DATA"
    )
    parser.add_argument("--sets", type=listed(str), default=list(SETS), help=f"of {', '.join(SETS)}")
    parser.add_argument(
        "--methods", type=listed(str), default=["ours-a", "baselines"],
        help=f"of {', '.join((*OURS, 'baselines', *BASELINES))}",
    )  # fmt: skip
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--size", type=int, default=0, help="input side of ours; 0 takes the library's default")
    parser.add_argument("--sizes", type=listed(int), default=[], help="input sides of the baselines")
    parser.add_argument("--steps", type=int, default=0, help="0 takes the library's default")
    parser.add_argument("--limit", type=int, default=0, help="images per class, split and label; 0: all")
    parser.add_argument("--seed", type=listed(int), default=[0], help="one or several")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy.json"), help="one entry per finished run")
    args = parser.parse_args()
    args.methods = methods_of(args.methods)
    for given, known in ((args.sets, SETS), (args.methods, (*OURS, *BASELINES))):
        if set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(set(given) - set(known)))}; accepted: {', '.join(known)}")
    if not args.data and set(args.sets) != {"textile"}:
        parser.error("name the folder that holds parts/, scenes/ and cifar10/: --data DIR, or TWINSPECT_SHARED_DATA")
    return args


def main() -> None:
    args = parsed()
    keep_freed_memory()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    store, found = Store(args.out), {}
    with Console() as console:
        for name in args.sets:
            found[name] = problems_of(name, Path(args.data), args.limit)
            run_baselines(found[name], args, store, console)
            run_ours(found[name], args, store, console)
            report(found, args, store)
        console.say(report(found, args, store))


if __name__ == "__main__":
    main()
