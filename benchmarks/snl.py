"""Ablation of system B: what each structural term, the residual aggregation and the statistics add.

Rows build on each other from plain reverse distillation; every row is trained on all classes at once and, where
asked for, on each class alone. Beside image and pixel metrics stands the interference (`twinspect diagnose`), which
needs no anomaly. The control row shows what the closed-form statistics do for the plain loss.

Teacher features are cached, and every finished run is written; the same command goes on after the last one. Small on
purpose (128 pixels, a few hundred steps), as it was made for two CPU cores.

    python benchmarks/snl.py --data DIR/parts                                   # all rows, one seed, multi-class
    python benchmarks/snl.py --data DIR/parts --seeds 0,1,2 --single baseline,statistics
    python benchmarks/snl.py --data DIR/parts --rows baseline,spatial --size 96 --steps 20     # a quick look
"""

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from statistics import mean, stdev

import torch

from twinspect import data as data_room
from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.diagnose import Plan, diagnose
from twinspect.evaluation import evaluate, test_samples
from twinspect.inference.predictor import Predictor
from twinspect.inference.runtimes import TorchRuntime
from twinspect.report import Section, Table
from twinspect.reproduce import code_hash
from twinspect.results import markdown, write_text
from twinspect.training.fit import fit

PLAIN = {"model": "snl", "cram": 0, "scoring": "plain"}
ALL_TERMS = "spatial,channel,intra,inter"
# Row -> (how it is called in the table, settings of the model).
ROWS = {
    "baseline": ("plain reverse distillation", {"model": "rd"}),
    "spatial": ("+ spatial", {**PLAIN, "terms": "spatial"}),
    "channel": ("+ channel", {**PLAIN, "terms": "spatial,channel"}),
    "intra": ("+ intra", {**PLAIN, "terms": "spatial,channel,intra"}),
    "inter": ("+ inter", {**PLAIN, "terms": ALL_TERMS}),
    "cram": ("+ CRAM", {**PLAIN, "terms": ALL_TERMS, "cram": 32}),
    "statistics": ("+ statistics (snl)", {"model": "snl"}),
    "control": ("baseline + statistics", {"model": "snl", "terms": "flat", "cram": 0}),
    "forward": ("plain forward distillation", {"model": "fd"}),
    "snl-forward": ("snl, forward", {"model": "snl", "direction": "forward"}),
}
DEFAULT_ROWS = ("baseline", "spatial", "channel", "intra", "inter", "cram", "statistics", "control")
METRICS = ("image_auroc", "pixel_auroc", "aupro")
INTERFERENCE = ("mixup_auroc", "cutpaste_auroc")


def config_of(row, seed, args):
    model = ModelConfig(teacher=args.teacher, size=args.size, **ROWS[row][1])
    return RunConfig(model, TrainConfig(steps=args.steps, lr=args.lr, seed=seed, batch=args.batch))


def measured(samples, config, plan, console):
    """Train on the normal images of some samples, test on their test images."""
    began = time.monotonic()
    fitted = fit(samples, config, None, console.progress)
    trained = time.monotonic() - began
    predictor = Predictor(TorchRuntime(fitted.model), fitted.decision, batch=8)
    table = evaluate(predictor, test_samples(samples), console.progress).table
    found = {"classes": table["classes"], "terms": fitted.record["training"], "fit_s": round(trained, 1)}
    found["prototypes"] = fitted.record["prototypes"]
    if plan is not None:
        found["interference"] = diagnose(predictor, samples, plan, console.progress).mean()
    return found | {"seconds": round(time.monotonic() - began, 1)}


def multi_class(samples, config, plan, console):
    found = measured(samples, config, plan, console)
    return found | {"mean": mean_of_classes(found["classes"])}


def single_class(samples, config, plan, console):
    """One model a class; the same number of steps each."""
    parts = {
        name: measured([s for s in samples if s.class_name == name], config, None, console)
        for name in sorted({s.class_name for s in samples})
    }
    classes = {name: part["classes"][name] for name, part in parts.items()}
    return {
        "classes": classes,
        "mean": mean_of_classes(classes),
        "seconds": sum(p["seconds"] for p in parts.values()),
    }


def mean_of_classes(classes):
    """Mean of every metric over the classes that have it."""
    return {
        m: mean(row[m] for row in classes.values() if m in row)
        for m in METRICS
        if any(m in r for r in classes.values())
    }


def run(row, seed, mode, samples, args, done, console):
    """A finished run, from the file or made now."""
    config = config_of(row, seed, args)
    settings = [row, mode, config.to_dict(), args.count, code_hash(), sorted(map(str, samples))]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    if key not in done:
        plan = Plan(count=args.count, seed=0)
        made = {"multi": multi_class, "single": single_class}[mode](samples, config, plan, console)
        done[key] = {"row": row, "seed": seed, "mode": mode, "config": config.to_dict(), **made}
        write_text(args.out, json.dumps(done, indent=1) + "\n")
        console.say(f"{row} {mode} seed {seed}: {say(done[key])}")
    return done[key]


def say(entry):
    values = {**entry["mean"], **entry.get("interference", {})}
    shown = ", ".join(f"{name} {values[name]:.4f}" for name in (*METRICS, *INTERFERENCE) if name in values)
    return f"{shown}; {entry['seconds']:.0f} s"


def spread(values):
    """Percent, with the standard deviation over seeds where there are several."""
    shown = f"{100 * mean(values):.1f}"
    return shown if len(values) < 2 else f"{shown} ± {100 * stdev(values):.1f}"


def table_of(entries, args):
    columns = ("row", *METRICS, *INTERFERENCE, "single-class image_auroc", "drop", "seeds")
    rows = []
    for row in args.rows:
        multi = [e for e in entries if e["row"] == row and e["mode"] == "multi"]
        single = {e["seed"]: e["mean"]["image_auroc"] for e in entries if e["row"] == row and e["mode"] == "single"}
        if not multi:
            continue
        numbers = [spread([e["mean"][m] for e in multi]) if m in multi[0]["mean"] else "-" for m in METRICS]
        numbers += [spread([e["interference"][m] for e in multi]) for m in INTERFERENCE]
        drops = [single[e["seed"]] - e["mean"]["image_auroc"] for e in multi if e["seed"] in single]
        numbers += [spread(list(single.values())), spread(drops)] if drops else ["-", "-"]
        rows.append((ROWS[row][0], *numbers, len(multi)))
    return Table("ablation, mean over classes, percent", columns, tuple(rows))


def class_table(entries, args):
    """Image AUROC per class, mean over seeds."""
    names = sorted({name for e in entries for name in e["classes"]})
    rows = []
    for row in args.rows:
        for mode in ("multi", "single"):
            own = [e for e in entries if e["row"] == row and e["mode"] == mode]
            if own:
                values = (spread([e["classes"][n]["image_auroc"] for e in own]) for n in names)
                rows.append((f"{ROWS[row][0]}, {mode}", *values))
    return Table("image AUROC per class, percent", ("row", *names), tuple(rows))


def listed(text):
    return [part for part in text.split(",") if part]


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("TWINSPECT_SHARED_DATA", "")
    parser.add_argument("--data", default=str(Path(shared) / "parts") if shared else "", help="several classes")
    parser.add_argument("--rows", type=listed, default=list(DEFAULT_ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--single", type=listed, default=[], help="rows that are also trained class by class")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in listed(text)], default=[0])
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--count", type=int, default=8, help="images per pair of classes and kind")
    parser.add_argument("--out", type=Path, default=Path("runs/snl.json"), help="one entry per finished run")
    args = parser.parse_args()
    if not args.data:
        parser.error("name a data set of several classes: --data DIR, or set TWINSPECT_SHARED_DATA")
    unknown = {*args.rows, *args.single} - set(ROWS)
    if unknown:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; accepted: {', '.join(ROWS)}")
    return args


def main() -> None:
    args = parsed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    samples = data_room.load(Path(args.data)).samples
    done = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    with Console() as console:
        jobs = [(row, seed, "multi") for seed in args.seeds for row in args.rows]
        jobs += [(row, seed, "single") for seed in args.seeds for row in args.single]
        entries = [run(*job, samples, args, done, console) for job in jobs]
        facts = {"teacher": args.teacher, "input size": str(args.size), "steps": str(args.steps), "code": code_hash()}
        facts |= {"mask rule": "> 0", "map size": "original image", "threads": str(torch.get_num_threads())}
        parts = (table_of(entries, args), class_table(entries, args))
        console.say(markdown(f"Ablation of system B on {Path(args.data).name}", [Section("Rows", (), parts)], facts))


if __name__ == "__main__":
    main()
