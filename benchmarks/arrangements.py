"""Do logical faults among real parts show: wrong counts, missing, extra or swapped parts?

    PYTHONPATH=src python benchmarks/arrangements.py --data DIR/parts [--sets fixed,free] [--steps 20]

Pictures of trays are put together from good training photographs of real parts (MVTec layout), each shifted a little
in its cell and turned by half at random. No part is defective; only what lies where is wrong. Trays to learn from, to
calibrate on (``validation``) and to test on share no photograph, as they would not on a line. Sets:

* fixed: two each of four kinds and an empty cell, every kind at its place (200 good trays);
* free: the same in any order (200);
* kits: four places that hold one of two allowed kits (150);
* pairs: two places with the same kind, any of four (150);
* many: fifteen parts of six kinds with fixed counts, in any order (150).

One model a set, the library's defaults but for the number of steps. A table for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from problems import Problem, ours

from twinspect import data as data_room
from twinspect.config import RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.data.images import resize_rgb
from twinspect.data.samples import read_sample_rgb
from twinspect.metrics import auroc
from twinspect.report import Table
from twinspect.types import TEST, TRAIN

KINDS = ("casting", "magnetic_tile", "cubes", "piston", "pcb", "fabric")
A, B, C, D, E, F = range(6)  # positions in the given kinds
PART = 128  # side of a part in pixels
Cells = list[int | None]  # kind of part in every cell, None for an empty one
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Tray:
    """A kind of tray.

    Attributes:
        fill: gives the cells of a good tray, or of one with a named fault.
        faults: names of the faults.
        side: cells a side.
        slack: pixels that a part may lie off the middle of its cell.
        good: training trays; there are 50 to calibrate on, 80 good ones to test on and 40 of every fault.
    """

    fill: Callable[[random.Random, str], Cells]
    faults: tuple[str, ...]
    side: int
    slack: int
    good: int


def box(ordered: bool, base: Cells) -> Callable[[random.Random, str], Cells]:
    """Trays with fixed counts, at their places or in any order; the last cell is the empty one."""

    def fill(rng: random.Random, fault: str) -> Cells:
        cells, at = list(base), rng.randrange(len(base) - 1)
        others = [kind for kind in sorted({k for k in base if k is not None}) if kind != cells[at]]
        if fault == "count":
            cells[at] = rng.choice(others)
        elif fault == "missing":
            cells[at] = None
        elif fault == "extra":
            cells[-1] = rng.choice(others)
        elif fault == "swapped":
            other = rng.choice([i for i in range(len(base) - 1) if cells[i] != cells[at]])
            cells[at], cells[other] = cells[other], cells[at]
        if not ordered:
            rng.shuffle(cells)
        return cells

    return fill


def kit(rng: random.Random, fault: str) -> Cells:
    """One of two kits, each with its own order."""
    cells: Cells = list(rng.choice([(A, B, C, D), (E, A, D, B)]))
    first, second = rng.sample(range(4), 2)
    if fault == "swapped":
        cells[first], cells[second] = cells[second], cells[first]
    elif fault == "mixed":
        cells[first] = rng.choice([kind for kind in range(5) if kind not in cells])
    elif fault == "missing":
        cells[first] = None
    return cells


def pair(rng: random.Random, fault: str) -> Cells:
    """Two parts of one kind beside each other, two empty cells below."""
    kind = rng.choice((A, C, D, E))
    cells: Cells = [kind, kind, None, None]
    if fault == "unequal":
        cells[1] = rng.choice([other for other in (A, C, D, E) if other != kind])
    elif fault == "third":
        cells[2] = kind
    elif fault == "single":
        cells[1] = None
    return cells


FOUR: Cells = [A, A, B, B, C, C, D, D, None]
SIX: Cells = [A] * 3 + [B] * 3 + [C] * 2 + [D] * 2 + [E] * 3 + [F] * 2 + [None]
TRAYS = {
    "fixed": Tray(box(True, FOUR), ("count", "extra", "missing", "swapped"), 3, 12, 200),
    "free": Tray(box(False, FOUR), ("count", "extra", "missing"), 3, 12, 200),
    "kits": Tray(kit, ("missing", "mixed", "swapped"), 2, 30, 150),
    "pairs": Tray(pair, ("single", "third", "unequal"), 2, 20, 150),
    "many": Tray(box(False, SIX), ("count", "missing"), 4, 8, 150),
}


def photographs(data: Path, kinds: tuple[str, ...]) -> list[tuple[list[Picture], ...]]:
    """Good training photographs of every kind at the size of a part: to learn from, calibrate and test on."""
    samples = data_room.load(data).samples
    found = []
    for kind in kinds:
        own = [s for s in samples if s.class_name == kind and s.split == TRAIN and s.label == 0]
        if len(own) < 8:
            raise SystemExit(f"{data} has {len(own)} good training images of {kind}; 8 are needed. See --kinds")
        shown = [resize_rgb(read_sample_rgb(s, draft_side=PART), PART) for s in own]
        half, rest = len(shown) // 2, 3 * len(shown) // 4
        found.append((shown[:half], shown[half:rest], shown[rest:]))
    return found


def painted(cells: Cells, tray: Tray, parts: list[list[Picture]], rng: random.Random) -> Picture:
    """A tray's picture: parts on a grey ground with a little noise."""
    cell, noise = PART + 2 * tray.slack, np.random.default_rng(rng.randrange(1 << 30))
    side = tray.side * cell
    ground = (np.array([60, 62, 66]) + noise.normal(0, 3, (side, side, 3))).clip(0, 255).astype(np.uint8)
    for i, kind in enumerate(cells):
        if kind is not None:
            top, left = ((i // tray.side) * cell, (i % tray.side) * cell)
            y, x = top + rng.randrange(2 * tray.slack + 1), left + rng.randrange(2 * tray.slack + 1)
            ground[y : y + PART, x : x + PART] = np.rot90(rng.choice(parts[kind]), rng.choice((0, 2)))
    return ground


def written(folder: Path, tray: Tray, parts: list[tuple[list[Picture], ...]], seed: int) -> Path:
    """All trays of a set, in MVTec layout."""
    rng = random.Random(seed)
    plan = [("train/good", tray.good, "", 0), ("validation/good", 50, "", 1), ("test/good", 80, "", 2)]
    plan += [(f"test/{fault}", 40, fault, 2) for fault in tray.faults]
    for place, count, fault, use in plan:
        (folder / place).mkdir(parents=True)
        for number in range(count):
            picture = painted(tray.fill(rng, fault), tray, [own[use] for own in parts], rng)
            Image.fromarray(picture).save(folder / place / f"{number:04d}.png", compress_level=1)
    return folder


def measured(
    name: str, root: Path, config: RunConfig, console: Console
) -> list[tuple[str, str, float, float, float]]:
    """Rows of (set, fault, AUROC of the joint score and of both students), all faults together last."""
    samples = data_room.load(root).samples
    known, test = (tuple(s for s in samples if (s.split == TEST) == wanted) for wanted in (False, True))
    kinds, labels = np.array([s.defect_type for s in test]), np.array([s.label for s in test])
    at = {
        fault: np.flatnonzero((kinds == fault) | (labels == 0)) for fault in sorted(set(kinds[labels == 1].tolist()))
    }
    at["all"] = np.arange(len(test))
    scores, _, _ = ours(Problem(name, "trays", name, known, test, at, "all", True), config, console)
    return [(name, fault, *(auroc(one[i], labels[i]) for one in scores.values())) for fault, i in at.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="MVTec layout with the kinds as classes")
    parser.add_argument("--kinds", default=",".join(KINDS), help="six classes of it")
    parser.add_argument("--sets", default=",".join(TRAYS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names, kinds = args.sets.split(","), tuple(args.kinds.split(","))
    if unknown := set(names) - set(TRAYS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; accepted: {', '.join(TRAYS)}")
    if len(kinds) != len(KINDS):
        parser.error(f"{len(kinds)} kinds; six are needed")
    config, parts, rows = (
        RunConfig(train=TrainConfig(steps=args.steps, seed=args.seed)),
        photographs(args.data, kinds),
        [],
    )
    with Console() as console, tempfile.TemporaryDirectory() as folder:
        for name in names:
            root = written(Path(folder) / name, TRAYS[name], parts, args.seed)
            rows += measured(name, root, config, console)
        columns = ("set", "fault", "joint", "local student", "semantic student")
        for line in Table("image AUROC", columns, tuple(rows)).lines():
            console.say(line)
        console.say(json.dumps({"rows": rows, "steps": args.steps, "seed": args.seed}))


if __name__ == "__main__":
    main()
