"""Ablations of both systems with plain scoring: what each part of our reading of the two papers is worth.

*snl*, system B: plain reverse distillation (rd), rd plus one thing at a time, then the paper's terms together and
everything. Beside image and pixel metrics stands the interference (`twinspect diagnose`), which needs no anomaly.
*dual*, system A: readings of the Noisy-OR in training, ways to join the two students at inference, sizes and tokens
of the Encoder-Encoder and, with a ViT, Dinomaly2's targets.

Every row is trained on all classes at once and, where asked for, on each class alone. The teacher is asked once about
an image, and a student is trained once for all rows that differ in scoring only. What is finished is written; the
same command goes on after the last one.

    python benchmarks/ablations.py snl --data DIR/parts                                 # all rows, one seed
    python benchmarks/ablations.py snl --data DIR/parts2 --seeds 0,1,2 --single baseline,all
    python benchmarks/ablations.py dual --data DIR/parts --size 256 --steps 300
    python benchmarks/ablations.py dual --data DIR/parts --rows dual,recentre --teacher dinov2-small --lr-ee 2e-4
    python benchmarks/ablations.py snl --data DIR/parts --rows baseline --size 96 --steps 5 --count 1 --normals 4
"""

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from problems import code_hash
from torch import Tensor

from twinspect import data as data_room
from twinspect.commands.diagnose import interference
from twinspect.commands.evaluate import metrics_of, test_samples
from twinspect.commands.options import DiagnoseOptions
from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.files import write_text
from twinspect.inference.decode import Decoding, as_item, decode
from twinspect.inference.result import Result
from twinspect.metrics import auroc
from twinspect.models.contract import AnomalyModel, Observed, build_model
from twinspect.report import Report, Section, Table
from twinspect.training.derived import add_copies
from twinspect.training.fit import choose_images, fit_scales, take_over
from twinspect.training.loop import train
from twinspect.training.normal import fit_statistics
from twinspect.training.source import FeatureSource, cache_folder, image_key, observe, pack, space_of, unpack
from twinspect.types import Sample

TERMS = "spatial,channel,intra,inter"
# Student -> settings of its training. Scoring is learnt after training, so one student serves several rows.
STUDENTS: dict[str, dict[str, Any]] = {
    "rd": {"terms": "flat", "cram": 0},
    "spatial": {"terms": "spatial", "cram": 0},
    "channel": {"terms": "flat,channel", "cram": 0},
    "intra": {"terms": "flat,intra", "cram": 0},
    "inter": {"terms": "flat,inter", "cram": 0},
    "cram": {"terms": "flat", "cram": 32},
    "terms": {"terms": TERMS, "cram": 0},
    "all": {"terms": TERMS, "cram": 32},
    "fd": {"terms": "flat", "cram": 0, "direction": "forward"},
    "forward": {"terms": TERMS, "cram": 32, "direction": "forward"},
    "dual": {},
    "n1": {"noisy_or": "n1"},
    "n3": {"noisy_or": "n3"},
    "ee-all": {"ee_tokens": "all"},
    "ee-half": {"ee_depth": 0.5},
    "ee-whole": {"ee_depth": 1.0},
    "ee-half-pixels": {"ee_shrink": 2},
    "recentre": {"recentre": True},
}
PLAIN, DEFAULT = {"scoring": "plain"}, {"scoring": "default"}
MAPS = {"scoring": "plain", "affinity_map": 1.0}


class Row(NamedTuple):
    """A row of a table: its name there, who was trained, and how that is scored and read (`READINGS`)."""

    title: str
    student: str
    scoring: Mapping[str, Any] = PLAIN
    reading: str = "joint"


# ``baseline`` is what ``--model rd`` gives, ``snl`` and ``dual`` are the library's own, the latter plainly scored.
SNL = {
    "baseline": Row("rd: plain reverse distillation", "rd"),
    "spatial": Row("rd, spatial in place of flat", "spatial"),
    "channel": Row("rd + channel", "channel"),
    "intra": Row("rd + intra", "intra"),
    "inter": Row("rd + inter", "inter"),
    "affinity": Row("rd + affinity map", "rd", MAPS),
    "affinity-quarter": Row("rd + affinity map, weight 0.25", "rd", MAPS | {"affinity_map": 0.25}),
    "affinity-fine": Row("rd + affinity map on 32 x 32", "rd", MAPS | {"affinity_side": 32}),
    "cram": Row("rd + CRAM", "cram"),
    "terms": Row("the four terms", "terms"),
    "terms-affinity": Row("the four terms + affinity map", "terms", MAPS),
    "terms-cram": Row("the four terms + CRAM", "all"),
    "all": Row("all: four terms, CRAM, affinity map", "all", MAPS),
    "control": Row("rd, default scoring", "rd", DEFAULT),
    "snl": Row("four terms, CRAM, default scoring (snl as shipped)", "all", DEFAULT),
    "fd": Row("fd: plain forward distillation", "fd"),
    "forward": Row("four terms, CRAM, forward", "forward"),
}
DUAL = {
    "dual": Row("n2, joined by Noisy-OR (default)", "dual"),
    "ed": Row("the same student, ED alone", "dual", reading="local"),
    "ee": Row("the same student, EE alone", "dual", reading="semantic"),
    "max": Row("the same student, maximum", "dual", reading="max"),
    "sum": Row("the same student, sum", "dual", reading="sum"),
    "raw": Row("the same student, Noisy-OR of raw distances", "dual", reading="raw"),
    "n1": Row("trained with n1", "n1"),
    "n3": Row("trained with n3", "n3"),
    "ee-all": Row("EE on the tokens of all blocks", "ee-all"),
    "ee-all-alone": Row("EE on the tokens of all blocks, EE alone", "ee-all", reading="semantic"),
    "ee-half": Row("EE of half the blocks", "ee-half"),
    "ee-half-alone": Row("EE of half the blocks, EE alone", "ee-half", reading="semantic"),
    "ee-whole": Row("EE of all blocks", "ee-whole"),
    "ee-whole-alone": Row("EE of all blocks, EE alone", "ee-whole", reading="semantic"),
    "ee-pixels": Row("EE on half the side", "ee-half-pixels"),
    "ee-pixels-alone": Row("EE on half the side, EE alone", "ee-half-pixels", reading="semantic"),
    "recentre": Row("recentred targets", "recentre"),
    "recentre-ed": Row("recentred targets, ED alone", "recentre", reading="local"),
}
SYSTEMS = {"snl": SNL, "dual": DUAL}
ON_DEMAND = ("control", "snl", "fd", "forward", "recentre", "recentre-ed")
MULTI = "multi"  # what is trained on: all classes, or else the name of one
METRICS = ("image_auroc", "pixel_auroc", "aupro")
INTERFERENCE = ("mixup_auroc", "cutpaste_auroc")
# From the two students' calibrated scores (standard deviations), their raw distances, and the Noisy-OR of both.
READINGS = {
    "joint": lambda said: said["score"],
    "local": lambda said: said["local"],
    "semantic": lambda said: said["semantic"],
    "max": lambda said: np.maximum(said["local"], said["semantic"]),
    "sum": lambda said: said["local"] + said["semantic"],
    "raw": lambda said: 1.0 - (1.0 - said["raw"] / 2.0).prod(1),
}


class Seen(NamedTuple):
    """The teacher's answer to an image, as the feature cache has it, and the image's size in pixels."""

    parts: dict[str, Tensor]
    height: int
    width: int


class Remembering:
    """What `evaluate` and `interference` ask for scores: it decodes an image, and shows it to the teacher, once.

    Args:
        model: trained and calibrated.
        seen: images by path or pixels, for models whose teacher's answers are the same.

    Attributes:
        readings: raw ones of every image that was asked for, in order.
    """

    def __init__(self, model: AnomalyModel, seen: dict[str, dict[Any, Seen]]) -> None:
        self.model, space = model.eval(), space_of(model)
        if space not in seen:
            seen.clear()  # no two spaces in memory at once
        self.seen = seen.setdefault(space, {})
        self.readings: list[NDArray[np.float32]] = []

    def predict(self, source: Sequence[Any], maps: bool = True, pixels: bool = False) -> Iterator[Result]:
        """Scores and map of every image; no thresholds."""
        for start in range(0, len(source), 16):
            part = [self._look(item) for item in source[start : start + 16]]
            observed, small = unpack({name: torch.cat([one.parts[name] for one in part]) for name in part[0].parts})
            with torch.inference_mode():
                out = self.model.score(observed, self.model.teacher.normalise(small))
            self.readings.append(out.readings_BR.numpy())
            for i, (item, one) in enumerate(zip(source[start : start + 16], part, strict=True)):
                scores = (float(said[i]) for said in (out.score_B, out.score_local_B, out.score_semantic_B))
                result = Result(as_item(item).name, *scores, is_anomaly=False, height=one.height, width=one.width)
                result.grid = out.map_B1HW[i, 0].numpy()
                yield result

    def _look(self, item: Any) -> Seen:
        key = item.image if isinstance(item, Sample) else image_key(item)
        if key not in self.seen:
            found = decode(item, Decoding(self.model.size))
            if found.square is None:
                raise SystemExit(found.error)
            parts = pack(*observe(self.model, torch.from_numpy(np.stack([found.square]))))
            self.seen[key] = Seen(parts, found.height, found.width)
        return self.seen[key]


def config_of(row: Row, seed: int, args: argparse.Namespace) -> RunConfig:
    """What is typed, what the row sets, the seed."""
    own = {f.name for f in dataclasses.fields(TrainConfig)}
    settings = STUDENTS[row.student]
    trained = {name: value for name, value in settings.items() if name in own}
    built = {name: value for name, value in settings.items() if name not in own} | dict(row.scoring)
    model = ModelConfig(
        model=args.system, teacher=args.teacher, weights=args.weights, size=args.size, width=args.width, **built
    )
    rates = {"lr": args.lr, "lr_ee": args.lr_ee}
    return RunConfig(model, TrainConfig(steps=args.steps, seed=seed, batch=args.batch, **rates, **trained))


class Trained(NamedTuple):
    """A trained student, and the good images as `fit` divides them."""

    model: AnomalyModel
    source: FeatureSource
    train_at: range
    held_at: range
    numbers: dict[str, Any]  # what `train` says


def trained_on(samples: Sequence[Sample], config: RunConfig, console: Console) -> Trained:
    """Train as `fit` does."""
    training, held, _ = add_copies(*choose_images(samples, config))
    torch.manual_seed(config.train.seed)
    model = build_model(config.model)
    root = cache_folder(model, len(training) + len(held), config.train.cache_gb)
    source = FeatureSource(model, [*training, *held], root, console.progress)
    train_at, held_at = range(len(training)), range(len(training), len(source))
    fit_scales(model, source, train_at, config.train.seed)
    numbers = train(model, source, train_at, config.train, None, console.progress)
    return Trained(model.eval(), source, train_at, held_at, numbers)


@torch.no_grad()
def scored(trained: Trained, config: RunConfig, console: Console) -> AnomalyModel:
    """The student under a scoring, calibrated; with a plain one only the images held out are looked at for that."""
    model = build_model(config.model, trained.model.teacher).eval()
    take_over(model, trained.model)
    source = trained.source
    if not model.scorer.plain:
        fit_statistics(model, source, trained.train_at, trained.held_at, config.train.seed, console.progress)
        return model

    def held() -> Iterator[tuple[Observed, Tensor]]:
        return source.batches(trained.held_at)

    model.fit_plain(held)
    plain = [model.plain(*batch) for batch in held()]
    reading_nR = torch.cat([torch.cat([one.local_BR, one.semantic_BR], 1) for one in plain])
    nobody = torch.zeros(len(reading_nR), dtype=torch.int64)
    model.scorer.calibrate(reading_nR, nobody, torch.ones_like(nobody, dtype=torch.bool))
    return model


def measured(rows, samples, configs, plan, seen, console):
    """Train one student on the normal images of some samples; (name, values) under the scoring of every row."""
    began = time.monotonic()
    trained = trained_on(samples, next(iter(configs.values())), console)
    fit_s = round(time.monotonic() - began, 1)
    for scoring in dict.fromkeys(str(row.scoring) for row in rows.values()):
        own = {name: row for name, row in rows.items() if str(row.scoring) == scoring}
        began = time.monotonic()
        predictor = Remembering(scored(trained, configs[next(iter(own))], console), seen)
        evaluation = metrics_of(predictor, test_samples(samples), console.progress)
        said = {name: np.array([row[field] for row in evaluation.rows]) for name, field in SCORES.items()}
        said["raw"] = np.concatenate(predictor.readings)
        crossed = {} if plan is None else interference(predictor, samples, plan, console.progress).mean()
        for name, row in own.items():
            classes = read_as(row.reading, evaluation, said)
            found = {"classes": classes, "mean": mean_of_classes(classes), "training": trained.numbers}
            found |= {"fit_s": fit_s, "test_s": round(time.monotonic() - began, 1)}
            yield name, found | ({"interference": crossed} if crossed and row.reading == "joint" else {})


SCORES = {"score": "score", "local": "score_local", "semantic": "score_semantic"}


def read_as(reading, evaluation, said):
    """Metrics by class with another image score; those of pixels belong to the map and stay."""
    table = evaluation.values["classes"]
    if reading == "joint":
        return table
    scores, labels = READINGS[reading](said), np.array([row["label"] for row in evaluation.rows])
    names = np.array([row["true_class"] for row in evaluation.rows])
    kept = {n: {m: row[m] for m in METRICS[1:] if m in row} for n, row in table.items()}
    return {n: {"image_auroc": auroc(scores[names == n], labels[names == n]), **row} for n, row in kept.items()}


def mean_of_classes(classes):
    """Mean of every metric over the classes that have it."""
    return {
        m: mean(row[m] for row in classes.values() if m in row)
        for m in METRICS
        if any(m in r for r in classes.values())
    }


def run(rows, seed, mode, samples, args, done, seen, console):
    """Entries of rows that share a student: from the file, or made now. ``mode``: multi, or the name of a class."""
    configs = {name: config_of(row, seed, args) for name, row in rows.items()}
    keys = {name: key_of(name, configs[name], mode, samples, args) for name in rows}
    missing = {name: row for name, row in rows.items() if keys[name] not in done}
    own = samples if mode == MULTI else [s for s in samples if s.class_name == mode]
    plan = (
        DiagnoseOptions(Path(), Path(), count=args.count, normals=args.normals)
        if mode == MULTI and args.count
        else None
    )
    wanted = {name: configs[name] for name in missing}
    for name, values in measured(missing, own, wanted, plan, seen, console) if missing else ():
        done[keys[name]] = {"row": name, "seed": seed, "mode": mode, "config": configs[name].to_dict(), **values}
        write_text(args.out, json.dumps(done, indent=1) + "\n")
        console.say(f"{name}, {mode}, seed {seed}: {say(values)}")
    return [done[key] for key in keys.values()]


def key_of(name, config, mode, samples, args):
    """What a finished entry must agree with: row, settings, images, code."""
    settings = [name, mode, config.to_dict(), args.count, args.normals, code_hash(), sorted(map(str, samples))]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def say(entry):
    crossed = {name: entry["interference"][name] for name in INTERFERENCE if "interference" in entry}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in {**entry["mean"], **crossed}.items())
    return f"{shown}; trained {entry['fit_s']:.0f} s, tested {entry['test_s']:.0f} s"


def jobs_of(rows, mode, seed):
    """Rows that share a student go together."""
    students = dict.fromkeys(row.student for row in rows.values())
    return [({n: row for n, row in rows.items() if row.student == one}, seed, mode) for one in students]


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
    for row, shown in args.rows.items():
        multi = [e for e in entries if e["row"] == row and e["mode"] == MULTI]
        numbers = [spread([e["mean"][m] for e in multi]) if m in multi[0]["mean"] else "-" for m in METRICS]
        crossed = [e["interference"] for e in multi if "interference" in e]
        numbers += [spread([one[m] for one in crossed]) if crossed else "-" for m in INTERFERENCE]
        alone = {e["seed"]: classes_of(row, e["seed"], True, entries) for e in multi}
        whole = [e for e in multi if alone[e["seed"]].keys() == e["classes"].keys()]
        single = [mean_of_classes(alone[e["seed"]])["image_auroc"] for e in whole]
        drops = [value - e["mean"]["image_auroc"] for value, e in zip(single, whole, strict=True)]
        numbers += [spread(single), spread(drops)] if whole else ["-", "-"]
        rows.append((shown.title, *numbers, len(multi)))
    return Table("ablation, mean over classes, percent", columns, tuple(rows))


def class_table(entries, args):
    """Image AUROC per class, mean over seeds."""
    names = sorted({name for e in entries for name in e["classes"]})
    rows = []
    for row, shown in args.rows.items():
        for single, word in ((False, "all classes"), (True, "one class")):
            own = [found for seed in args.seeds if (found := classes_of(row, seed, single, entries))]
            values = [[found[n]["image_auroc"] for found in own if n in found] for n in names]
            if own:
                rows.append((f"{shown.title}, {word}", *(spread(v) if v else "-" for v in values)))
    return Table("image AUROC per class, percent", ("row", *names), tuple(rows))


def listed(text):
    return [part for part in text.split(",") if part]


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = os.environ.get("TWINSPECT_SHARED_DATA", "")
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--data", default=str(Path(shared) / "parts") if shared else "", help="several classes")
    parser.add_argument("--rows", type=listed, default=[], help="all but those on demand, unless named")
    parser.add_argument("--single", type=listed, default=[], help="rows that are also trained class by class")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in listed(text)], default=[0])
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--weights", default="", help="local file of the teacher's weights")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--width", type=int, default=0, help="of the decoder (snl: its finest stage); 0: the library's"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=TrainConfig().lr)
    parser.add_argument("--lr-ee", type=float, default=TrainConfig().lr_ee)
    parser.add_argument(
        "--count", type=int, default=8, help="images per pair of classes and kind; 0: no interference"
    )
    parser.add_argument("--normals", type=int, default=40, help="normal images per class they are compared with")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations.json"), help="one entry per finished run")
    args = parser.parse_args()
    if not args.data:
        parser.error("name a data set of several classes: --data DIR, or set TWINSPECT_SHARED_DATA")
    rows = SYSTEMS[args.system]
    unknown = {*args.rows, *args.single} - set(rows)
    if unknown:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; accepted: {', '.join(rows)}")
    args.rows = {name: rows[name] for name in args.rows or [n for n in rows if n not in ON_DEMAND]}
    args.single = {name: rows[name] for name in args.single}
    return args


def main() -> None:
    args = parsed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    samples = data_room.load(Path(args.data)).samples
    done = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    seen: dict[str, dict[Any, Seen]] = {}
    with Console() as console:
        jobs = [job for seed in args.seeds for job in jobs_of(args.rows, MULTI, seed)]
        names = sorted({s.class_name for s in samples}) if args.single else []
        jobs += [job for seed in args.seeds for name in names for job in jobs_of(args.single, name, seed)]
        entries = [entry for job in jobs for entry in run(*job, samples, args, done, seen, console)]
        facts = {"teacher": args.teacher, "input size": str(args.size), "steps": str(args.steps)}
        facts |= {"decoder width": str(args.width or "the library's own"), "code": code_hash()}
        facts |= {"mask rule": "> 0", "map size": "original image", "threads": str(torch.get_num_threads())}
        parts = (table_of(entries, args), class_table(entries, args))
        title = f"Ablation of {args.system} on {Path(args.data).name}"
        console.say(Report(title, [Section("Rows", (), parts)], facts).markdown())


if __name__ == "__main__":
    main()
