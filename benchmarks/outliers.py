"""Are broken images among the training images the first that `fit` lists?

    python benchmarks/outliers.py --data DIR --good 27 --bad 3 --draws 1

Of every class of parts and parts2 random good training images and random defects from its test make one training set;
a model without students (``--steps 0``) lists what is least like the others. Found: broken ones among the first so
many, as there are.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from twinspect import data as data_room
from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.report import Table
from twinspect.training.fit import fit
from twinspect.types import TEST, TRAIN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds parts/ and parts2/")
    parser.add_argument("--good", type=int, default=27)
    parser.add_argument("--bad", type=int, default=3)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--size", type=int, default=0)
    args = parser.parse_args()
    console, body = Console(), []
    every = [s for folder in ("parts", "parts2") for s in data_room.load(args.data / folder).samples]
    for name in sorted({s.class_name for s in every}):
        known = [s for s in every if s.class_name == name and s.split == TRAIN]
        defects = [s for s in every if s.class_name == name and s.split == TEST and s.label == 1]
        first = []
        for draw in range(args.draws):
            rng = np.random.default_rng([draw, len(known)])
            good = [known[i] for i in rng.permutation(len(known))[: args.good]]
            bad = [defects[i] for i in rng.permutation(len(defects))[: args.bad]]
            mixed = [*good, *(replace(s, split=TRAIN, label=0, masks=()) for s in bad)]
            config = RunConfig(ModelConfig(size=args.size), TrainConfig(steps=0))
            listed = fit(mixed, config, None, console.progress).record["least_like"]
            broken = {str(s.image) for s in bad}
            first.append(sum(row["path"] in broken for row in listed[: args.bad]))
        body.append((name, f"{np.mean(first):.1f} of {args.bad}"))
        console.say(f"{name}: {body[-1][1]}")
    print("\n".join(Table("Broken images among the first listed", ("class", "found"), tuple(body)).lines()))


if __name__ == "__main__":
    main()
