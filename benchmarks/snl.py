"""Ablation of system B: what each structural term, the affinity map and the residual aggregation add.

Plain reverse distillation (rd), rd plus one thing at a time, then the paper's terms together and everything; all with
plain scoring. Every row is trained on all classes at once and, where asked for, on each class alone. Beside image and
pixel metrics stands the interference (`twinspect diagnose`), which needs no anomaly. Rows on demand: forward
distillation, and what the closed-form statistics of scoring ``default`` do for both.

Teacher features are cached, a student is trained once for all rows that differ in scoring only, and what is finished
is written; the same command goes on after the last one. Small on purpose (128 pixels, a few hundred steps), as it was
made for two CPU cores.

    python benchmarks/snl.py --data DIR/parts                                   # all rows, one seed, multi-class
    python benchmarks/snl.py --data DIR/parts2 --seeds 0,1,2 --single baseline,all
    python benchmarks/snl.py --data DIR/parts --rows baseline --size 96 --steps 5 --count 1 --normals 4  # a look
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
from twinspect.commands.reproduce import code_hash
from twinspect.commands.results import markdown, write_text
from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.diagnose import Plan, diagnose
from twinspect.evaluation import evaluate, test_samples
from twinspect.inference.predictor import Predictor
from twinspect.inference.runtimes import TorchRuntime
from twinspect.report import Section, Table
from twinspect.training.copies import add_copies
from twinspect.training.decide import decide
from twinspect.training.fit import build_model, cache_folder, choose_images, fit
from twinspect.training.resume import take_over
from twinspect.training.source import FeatureSource
from twinspect.training.statistics import fit_statistics

TERMS = "spatial,channel,intra,inter"
# Student -> settings of its training. Scoring is learnt after training, so one student serves several rows.
STUDENTS = {
    "rd": {"terms": "flat", "cram": 0},
    "spatial": {"terms": "spatial", "cram": 0},
    "channel": {"terms": "flat,channel", "cram": 0},
    "channel-mean": {"terms": "flat,channel", "cram": 0, "channel_reading": "kl_mean"},
    "channel-cosine": {"terms": "flat,channel", "cram": 0, "channel_reading": "cosine"},
    "intra": {"terms": "flat,intra", "cram": 0},
    "inter": {"terms": "flat,inter", "cram": 0},
    "cram": {"terms": "flat", "cram": 32},
    "cram-residuals": {"terms": "flat", "cram": 32, "cram_add_back": False},
    "terms": {"terms": TERMS, "cram": 0},
    "all": {"terms": TERMS, "cram": 32},
    "all-residuals": {"terms": TERMS, "cram": 32, "cram_add_back": False},
    "all-mean": {"terms": TERMS, "cram": 32, "channel_reading": "kl_mean"},
    "fd": {"terms": "flat", "cram": 0, "direction": "forward"},
    "forward": {"terms": TERMS, "cram": 32, "direction": "forward"},
}
PLAIN, DEFAULT = {"scoring": "plain"}, {"scoring": "default"}
MAPS = {"scoring": "plain", "affinity_map": 1.0}
# Row -> (its name in the table, student, scoring). ``baseline`` is what ``--model rd`` gives, ``snl`` the default.
ROWS = {
    "baseline": ("rd: plain reverse distillation", "rd", PLAIN),
    "spatial": ("rd, spatial in place of flat", "spatial", PLAIN),
    "channel": ("rd + channel (sum over positions)", "channel", PLAIN),
    "channel-mean": ("rd + channel (mean over positions)", "channel-mean", PLAIN),
    "channel-cosine": ("rd + channel (cosine)", "channel-cosine", PLAIN),
    "intra": ("rd + intra", "intra", PLAIN),
    "inter": ("rd + inter", "inter", PLAIN),
    "affinity": ("rd + affinity map", "rd", MAPS),
    "cram": ("rd + CRAM, centres added back", "cram", PLAIN),
    "cram-residuals": ("rd + CRAM, residuals alone", "cram-residuals", PLAIN),
    "terms": ("the four terms", "terms", PLAIN),
    "terms-affinity": ("the four terms + affinity map", "terms", MAPS),
    "terms-cram": ("the four terms + CRAM", "all", PLAIN),
    "all": ("all: four terms, CRAM, affinity map", "all", MAPS),
    "all-residuals": ("all, CRAM's residuals alone", "all-residuals", MAPS),
    "all-mean": ("all, channel's mean over positions", "all-mean", MAPS),
    "control": ("rd, default scoring", "rd", DEFAULT),
    "snl": ("four terms, CRAM, default scoring (snl as shipped)", "all", DEFAULT),
    "fd": ("fd: plain forward distillation", "fd", PLAIN),
    "forward": ("four terms, CRAM, forward", "forward", PLAIN),
}
ON_DEMAND = ("channel-cosine", "control", "snl", "fd", "forward")
MULTI = "multi"  # what is trained on: all classes, or else the name of one
METRICS = ("image_auroc", "pixel_auroc", "aupro")
INTERFERENCE = ("mixup_auroc", "cutpaste_auroc")


def config_of(row, seed, args):
    _, student, scoring = ROWS[row]
    model = ModelConfig(
        model="snl", teacher=args.teacher, size=args.size, width=args.width, **STUDENTS[student], **scoring
    )
    return RunConfig(model, TrainConfig(steps=args.steps, lr=args.lr, seed=seed, batch=args.batch))


def rescored(fitted, samples, config, console):
    """A trained student under another scoring: statistics and decision are learnt anew, weights stay."""
    model = build_model(config.model, fitted.model.teacher)
    take_over(model, fitted.model)
    training, held, _ = add_copies(*choose_images(samples, config))
    root = cache_folder(model, len(training) + len(held), config.train.cache_gb)
    source = FeatureSource(model, [*training, *held], root, console.progress)
    train_at, held_at = range(len(training)), range(len(training), len(source))
    good = fit_statistics(model, source, train_at, held_at, config.train.seed, console.progress)
    return model, decide(model, source, train_at, held_at, good)


def measured(rows, samples, configs, plan, console):
    """Train one student on the normal images of some samples; (row, values) under the scoring of every row."""
    began = time.monotonic()
    fitted = fit(samples, configs[rows[0]], None, console.progress)
    trained = time.monotonic() - began
    for row in rows:
        began, model, decision = time.monotonic(), fitted.model, fitted.decision
        if row != rows[0]:
            model, decision = rescored(fitted, samples, configs[row], console)
        predictor = Predictor(TorchRuntime(model), decision, batch=8)
        classes = evaluate(predictor, test_samples(samples), console.progress).table["classes"]
        found = {"classes": classes, "mean": mean_of_classes(classes), "training": fitted.record["training"]}
        if plan is not None:
            found["interference"] = diagnose(predictor, samples, plan, console.progress).mean()
        yield row, {**found, "fit_s": round(trained, 1), "test_s": round(time.monotonic() - began, 1)}


def mean_of_classes(classes):
    """Mean of every metric over the classes that have it."""
    return {
        m: mean(row[m] for row in classes.values() if m in row)
        for m in METRICS
        if any(m in r for r in classes.values())
    }


def run(rows, seed, mode, samples, args, done, console):
    """Entries of rows that share a student: from the file, or made now. ``mode``: multi, or the name of a class."""
    configs = {row: config_of(row, seed, args) for row in rows}
    keys = {row: key_of(configs[row], mode, samples, args) for row in rows}
    missing = [row for row in rows if keys[row] not in done]
    own = samples if mode == MULTI else [s for s in samples if s.class_name == mode]
    plan = Plan(count=args.count, normals=args.normals) if mode == MULTI else None
    for row, values in measured(missing, own, configs, plan, console) if missing else ():
        done[keys[row]] = {"row": row, "seed": seed, "mode": mode, "config": configs[row].to_dict(), **values}
        write_text(args.out, json.dumps(done, indent=1) + "\n")
        console.say(f"{row}, {mode}, seed {seed}: {say(values)}")
    return [done[key] for key in keys.values()]


def key_of(config, mode, samples, args):
    """What a finished entry must agree with: settings, images, code."""
    settings = [mode, config.to_dict(), args.count, args.normals, code_hash(), sorted(map(str, samples))]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def say(entry):
    crossed = {name: entry["interference"][name] for name in INTERFERENCE if "interference" in entry}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in {**entry["mean"], **crossed}.items())
    return f"{shown}; trained {entry['fit_s']:.0f} s, tested {entry['test_s']:.0f} s"


def jobs_of(rows, mode, seed):
    """Rows that share a student go together."""
    students = dict.fromkeys(ROWS[row][1] for row in rows)
    return [([row for row in rows if ROWS[row][1] == student], seed, mode) for student in students]


def spread(values):
    """Percent, with the standard deviation over seeds where there are several."""
    shown = f"{100 * mean(values):.1f}"
    return shown if len(values) < 2 else f"{shown} ± {100 * stdev(values):.1f}"


def classes_of(row, seed, single, entries):
    """Metrics by class of a row: from the run on all classes, or from one run a class."""
    own = [e for e in entries if (e["row"], e["seed"]) == (row, seed) and (e["mode"] != MULTI) == single]
    return {name: values for e in own for name, values in e["classes"].items()}


def table_of(entries, args):
    """Means over classes; what single-class training gains is shown where every class has been trained alone."""
    columns = ("row", *METRICS, *INTERFERENCE, "single-class image_auroc", "drop", "seeds")
    rows = []
    for row in args.rows:
        multi = [e for e in entries if e["row"] == row and e["mode"] == MULTI]
        numbers = [spread([e["mean"][m] for e in multi]) if m in multi[0]["mean"] else "-" for m in METRICS]
        numbers += [spread([e["interference"][m] for e in multi]) for m in INTERFERENCE]
        alone = {e["seed"]: classes_of(row, e["seed"], True, entries) for e in multi}
        whole = [e for e in multi if alone[e["seed"]].keys() == e["classes"].keys()]
        single = [mean_of_classes(alone[e["seed"]])["image_auroc"] for e in whole]
        drops = [value - e["mean"]["image_auroc"] for value, e in zip(single, whole, strict=True)]
        numbers += [spread(single), spread(drops)] if whole else ["-", "-"]
        rows.append((ROWS[row][0], *numbers, len(multi)))
    return Table("ablation, mean over classes, percent", columns, tuple(rows))


def class_table(entries, args):
    """Image AUROC per class, mean over seeds."""
    names = sorted({name for e in entries for name in e["classes"]})
    rows = []
    for row in args.rows:
        for single, word in ((False, "all classes"), (True, "one class")):
            own = [found for seed in args.seeds if (found := classes_of(row, seed, single, entries))]
            values = [[found[n]["image_auroc"] for found in own if n in found] for n in names]
            if own:
                rows.append((f"{ROWS[row][0]}, {word}", *(spread(v) if v else "-" for v in values)))
    return Table("image AUROC per class, percent", ("row", *names), tuple(rows))


def listed(text):
    return [part for part in text.split(",") if part]


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("TWINSPECT_SHARED_DATA", "")
    parser.add_argument("--data", default=str(Path(shared) / "parts") if shared else "", help="several classes")
    usual = [row for row in ROWS if row not in ON_DEMAND]
    parser.add_argument("--rows", type=listed, default=usual, help=f"of {', '.join(ROWS)}")
    parser.add_argument("--single", type=listed, default=[], help="rows that are also trained class by class")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in listed(text)], default=[0])
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=0, help="of the decoder's finest stage; 0: the library's own")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--count", type=int, default=8, help="images per pair of classes and kind")
    parser.add_argument("--normals", type=int, default=40, help="normal images per class they are compared with")
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
        jobs = [job for seed in args.seeds for job in jobs_of(args.rows, MULTI, seed)]
        names = sorted({s.class_name for s in samples}) if args.single else []
        jobs += [job for seed in args.seeds for name in names for job in jobs_of(args.single, name, seed)]
        entries = [entry for job in jobs for entry in run(*job, samples, args, done, console)]
        facts = {"teacher": args.teacher, "input size": str(args.size), "steps": str(args.steps)}
        facts |= {"decoder width": str(args.width or "the library's own"), "code": code_hash()}
        facts |= {"mask rule": "> 0", "map size": "original image", "threads": str(torch.get_num_threads())}
        parts = (table_of(entries, args), class_table(entries, args))
        console.say(markdown(f"Ablation of system B on {Path(args.data).name}", [Section("Rows", (), parts)], facts))


if __name__ == "__main__":
    main()
