"""Is a model that learnt in portions as good as one that learnt everything at once?

    python benchmarks/update.py --data DIR --folder parts2 --first 40 --each 20 --rounds 5 --size 256 --limit 30

One model of all classes from the first random good images of each, then `update` with further ones of every class,
round by round; beside it the model of all these images. Image AUROC, mean and class by class, and decisions.
Students are not trained (``--steps 0``): they stay as they are in an update.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from problems import limited

from twinspect import data as data_room
from twinspect.bundle import Fitted
from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.metrics import auroc
from twinspect.training.fit import fit
from twinspect.training.outcome import update
from twinspect.training.source import FeatureSource, cache_folder
from twinspect.types import TEST, TRAIN, Sample


def measured(fitted: Fitted, test: list[Sample], console: Console) -> dict[str, tuple[float, float, float]]:
    """Class -> AUROC, share of defects found, share of good images called bad; from cached features."""
    model = fitted.model.eval()
    source = FeatureSource(model, test, cache_folder(model, 20_000, 20.0), console.progress)
    scores, called = [], []
    for observed, small in source.batches(range(len(source))):
        with torch.inference_mode():
            out = model.score(observed, small)
        for score, cluster in zip(out.score_B.tolist(), out.cluster_B.tolist(), strict=True):
            scores.append(score)
            called.append(fitted.decision.judge(score, cluster)["answer"] == "anomaly")
    names, bad = np.array([s.class_name for s in test]), np.array([s.label == 1 for s in test])
    found = {}
    for name in sorted(set(names)):
        at = names == name
        rates = (np.array(called)[at & kind].mean() for kind in (bad, ~bad))
        found[name] = (auroc(np.array(scores)[at], bad[at].astype(int)), *rates)
    return found


def line(title: str, found: dict[str, tuple[float, float, float]]) -> str:
    means = np.mean(list(found.values()), 0)
    classes = " ".join(f"{name} {row[0]:.3f}" for name, row in found.items())
    return f"{title}: AUROC {means[0]:.4f}, found {means[1]:.3f}, false alarms {means[2]:.3f}; {classes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds parts/ and parts2/")
    parser.add_argument("--folder", default="parts2")
    parser.add_argument("--first", type=int, default=40)
    parser.add_argument("--each", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--limit", type=int, default=0, help="test images of every class and kind; 0 takes all")
    args = parser.parse_args()
    console = Console()
    samples = list(data_room.load(args.data / args.folder).samples)
    test = limited([s for s in samples if s.split == TEST], args.limit)
    portions: list[list[Sample]] = [[] for _ in range(args.rounds + 1)]
    for name in sorted({s.class_name for s in samples}):
        own = [s for s in samples if s.class_name == name and s.split == TRAIN]
        order = np.random.default_rng([0, len(own)]).permutation(len(own))
        for place, i in enumerate(order[: args.first + args.rounds * args.each]):
            portions[max(0, (place - args.first) // args.each + 1)].append(own[i])
    config = RunConfig(ModelConfig(size=args.size), TrainConfig(steps=args.steps))
    fitted = fit(portions[0], config, None, console.progress)
    console.say(line(f"{len(portions[0])} images", measured(fitted, test, console)))
    for number, portion in enumerate(portions[1:], 1):
        began = time.process_time()
        fitted = update(fitted, portion, None, console.progress) if portion else fitted
        seconds = time.process_time() - began
        found = measured(fitted, test, console)
        console.say(line(f"update {number}, {len(portion)} images, {seconds:.0f} s of processor time", found))
    everything = fit([s for portion in portions for s in portion], config, None, console.progress)
    console.say(line("all at once", measured(everything, test, console)))


if __name__ == "__main__":
    main()
