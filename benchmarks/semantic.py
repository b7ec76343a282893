"""All semantic protocols on small copies of CIFAR-10 and View, beside a nearest-neighbour baseline.

Both use the same frozen teacher and the same images. The baseline is the mean cosine distance of an image's pooled
embedding to its nearest normal images; of the teacher's embeddings the one that is best on average over a protocol's
splits is shown, chosen with the test labels, in the baseline's favour. `accuracy.py` has more baselines, intervals;
this script has every protocol, and takes the baseline's embeddings at the model's own input size.

Teacher features are computed once and cached (folder of TWINSPECT_HOME, or the user's cache), so a split costs its
training steps only. Every split is written when it is finished; the same command goes on after the last one.

    python benchmarks/semantic.py --data DIR            # DIR holds cifar10/ and scenes/ (class folders)
    python benchmarks/semantic.py --data DIR --sets view --protocols unified --steps 50 --limit 40   # a quick look
"""

import argparse
import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from baselines import nearest_distance
from problems import code_hash, limited, of_split, ours
from teacher_bank import place

from twinspect import data as data_room
from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.data.protocols import make_splits
from twinspect.files import write_text
from twinspect.metrics import auroc, mean_of
from twinspect.models.contract import build_model
from twinspect.models.teachers import create_teacher
from twinspect.report import Table
from twinspect.training.fit import sized, usual_sides
from twinspect.training.source import FeatureSource, cache_folder

SETS = {"cifar10": ("cifar10", "cifar10"), "view": ("scenes", "view")}  # name -> folder, layout
PROTOCOLS = ("one-vs-rest", "unified", "leave-one-out")
STUDENTS = {"joint": "twinspect", "local student": "local student", "semantic student": "semantic student"}
KNN = "kNN, best embedding"
BASELINE = 2  # its version; results of another one are not taken up


def pooled_embeddings(config, samples, console):
    """Place of an image -> row, and one N x D matrix per embedding: the teacher's global tokens, then its head's."""
    model = build_model(config.model)
    source = FeatureSource(model, samples, cache_folder(model, len(samples), config.train.cache_gb), console.progress)
    found = [observed for observed, _ in source.batches(range(len(source)))]
    tokens = torch.cat([observed.tokens[0] for observed in found]).float()
    head = torch.cat([observed.embedding_BF for observed in found]).float()
    stages = [*torch.split(tokens, list(model.teacher.info.token_channels), dim=1), head]
    return {place(s): row for row, s in enumerate(source.samples)}, stages


def nearest(problem, rows, stages, count):
    """AUROC of the nearest-neighbour baseline for every embedding."""
    known, tested = ([rows[place(s)] for s in samples] for samples in (problem.known, problem.test))
    labels = [s.label for s in problem.test]
    return [auroc(nearest_distance(unit[known], unit[tested], count), labels) for unit in stages]


def run_protocol(name, protocol, samples, embedded, args, config, done, console):
    """One line per split, kept in ``done`` and on disk; the entries of this run."""
    entries = []
    for split in make_splits(samples, protocol, args.seed):
        settings = [name, split.name, split.hash, config.to_dict(), args.neighbours, BASELINE, code_hash()]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        if key in done:
            console.say(f"{name} {split.name}: finished before")
            entries.append(done[key])
            continue
        problem = of_split(name, protocol, split)
        scores, _, seconds = ours(problem, config, console)
        labels = [s.label for s in split.test]
        result = {shown: auroc(scores[reading], labels) for reading, shown in STUDENTS.items()} | seconds
        stages = nearest(problem, *embedded, args.neighbours)
        done[key] = {"set": name, "protocol": protocol, "split": split.name, "hash": split.hash,
                     "test": len(split.test), **result, "knn": stages}  # fmt: skip
        entries.append(done[key])
        write_text(args.out, json.dumps(done, indent=1) + "\n")
        shown = ", ".join(f"{k} {result[k]:.4f}" for k in STUDENTS.values())
        console.say(f"{name} {split.name} [{split.hash}]: {shown}, kNN {max(stages):.4f}; fit {result['fit_s']} s")
    return entries


def table_of(entries, args):
    """Mean over the splits of every set and protocol."""
    rows = []
    for name in args.sets:
        for protocol in args.protocols:
            found = [r for r in entries if (r["set"], r["protocol"]) == (name, protocol)]
            if not found:
                continue
            means = mean_of({r["split"]: {n: r[n] for n in STUDENTS.values()} for r in found})
            stages = np.mean([r["knn"] for r in found], axis=0)
            best = int(stages.argmax())
            numbers = (*(means[n] for n in STUDENTS.values()), float(stages[best]))
            rows.append((f"{name} {protocol}", len(found), *numbers, best + 1))
    columns = ("set and protocol", "splits", *STUDENTS.values(), KNN, "of it")
    return Table("image AUROC, mean over splits", columns, tuple(rows))


def config_of(args):
    """Library defaults but for what was asked."""
    train = TrainConfig(seed=args.seed) if not args.steps else TrainConfig(seed=args.seed, steps=args.steps)
    return RunConfig(ModelConfig(teacher=args.teacher, size=args.size), train)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=os.environ.get("TWINSPECT_SHARED_DATA", ""), help="or TWINSPECT_SHARED_DATA"
    )
    parser.add_argument("--sets", type=lambda text: text.split(","), default=list(SETS))
    parser.add_argument("--protocols", type=lambda text: text.split(","), default=list(PROTOCOLS))
    parser.add_argument("--teacher", default="efficientnet-lite0")
    parser.add_argument("--size", type=int, default=0, help="input side; 0: what fit takes for such images")
    parser.add_argument("--steps", type=int, default=0, help="0 takes the library's default")
    parser.add_argument("--limit", type=int, default=0, help="images per class, training and test each; 0: all")
    parser.add_argument("--neighbours", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/semantic.json"), help="one entry per finished split")
    args = parser.parse_args()
    if not args.data:
        parser.error("name the folder that holds cifar10/ and scenes/: --data DIR, or set TWINSPECT_SHARED_DATA")
    for given, known in ((args.sets, SETS), (args.protocols, PROTOCOLS)):
        if set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(set(given) - set(known)))}; accepted: {', '.join(known)}")
    return args


def main() -> None:
    args, began = parsed(), time.monotonic()
    config = config_of(args)
    done = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    entries = []
    with Console() as console:
        for name in args.sets:
            folder, layout = SETS[name]
            samples = limited(data_room.load(Path(args.data) / folder, layout).samples, args.limit)
            console.say(f"{name}: {len(samples):,} images")
            own = replace(config, model=sized(config.model, create_teacher(args.teacher), usual_sides(samples)))
            embedded = pooled_embeddings(own, samples, console)
            for protocol in args.protocols:
                entries += run_protocol(name, protocol, samples, embedded, args, own, done, console)
        table = table_of(entries, args)
        for line in table.lines():
            console.say(line)
        seconds = round(time.monotonic() - began, 1)
        settings = {"size": args.size, "limit": args.limit, **config.to_dict()}
        console.say(json.dumps({"columns": table.columns, "rows": table.rows, "seconds": seconds, **settings}))


if __name__ == "__main__":
    main()
