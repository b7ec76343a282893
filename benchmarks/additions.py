"""What is each addition of scoring ``default`` worth? Starts at ``plain`` and adds one thing at a time.

    python benchmarks/additions.py --data DIR --sets parts,parts2,textile --out additions.json
    python benchmarks/additions.py --data DIR --sets parts2 --limit 20 --steps 5 --size 256     # a quick look
    python benchmarks/additions.py --table additions.json                                       # the table again
    python benchmarks/additions.py --data DIR --sets parts,parts2 --limit 30 --constants --out constants.json

The students of a problem are trained once. Statistics of good images are then learnt four times (the first four
additions change what is learnt); every other row reads the same answers again. A row holds the mean over classes of
image AUROC, and of pixel AUROC where there are masks (maps and masks at 128 x 128: coarser than `twinspect eval`).
Labels are read here to judge; nothing that is learnt reads them. What is finished is written and not done again.

``--constants`` tries other values of every constant that was chosen by looking at data, one at a time, and says which
value each set would have had if it had been chosen on the other sets (leave-one-set-out).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from problems import Problem, Store, code_hash, key_of, problems_of
from torch import Tensor

from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.data.samples import read_sample_mask, read_sample_rgb
from twinspect.metrics import auroc
from twinspect.models import clusters as clusters_room
from twinspect.models import scorer as scorer_room
from twinspect.models import statistics as statistics_room
from twinspect.models.contract import AnomalyModel
from twinspect.report import Table
from twinspect.training import normal as fitting_room
from twinspect.training.fit import choose_images, fit
from twinspect.training.normal import GoodImages, fit_statistics
from twinspect.training.source import FeatureSource, cache_folder

MASK_SIDE = 128


@dataclass(frozen=True)
class Row:
    """One line of the table: what is in use.

    Attributes:
        name: what this row adds to the one above.
        clusters: statistics and calibration are kept for every product.
        places: means of features are kept for every position.
        scaled: distances are standardised at every position before an image's reading is taken.
        groups: number of layer groups, in the order of `ORDER`.
        views: of the global tokens, whose distances are read.
        nearest: whether the distance from the nearest good images is read.
        link: whether local readings count less where good images do not repeat each other.
        skill: whether the students' readings count by their skill, instead of fully.
    """

    name: str
    clusters: bool = False
    places: bool = False
    scaled: bool = False
    groups: int = 0
    views: int = 0
    nearest: bool = False
    link: bool = False
    skill: bool = False

    @property
    def learnt(self) -> tuple[bool, bool, bool]:
        """What its statistics were learnt with."""
        return self.clusters, self.places, self.scaled


def rows() -> list[Row]:
    """The list of additions, each on top of the one before."""
    found = [Row("plain: the two students")]
    steps = [
        ("+ Mahalanobis distance of patches, middle group", {"groups": 1}),
        ("+ statistics for every product", {"clusters": True}),
        ("+ means of positions", {"places": True}),
        ("+ readings scaled at every position", {"scaled": True}),
        ("+ fine group", {"groups": 2}),
        ("+ finest stage alone", {"groups": 3}),
        ("+ regions of the deepest stages (score only)", {"groups": 4}),
        ("+ deep group (map only)", {"groups": 5}),
        ("+ deep group of the coarse view (map only)", {"groups": 6}),
        ("+ Mahalanobis distance of global tokens", {"views": 1}),
        ("+ global tokens of a second view", {"views": 2}),
        ("+ nearest good images", {"nearest": True}),
        ("+ link: less weight of local readings on photographs", {"link": True}),
        ("+ students weighed by skill (default)", {"skill": True}),
    ]
    for name, change in steps:
        found.append(replace(found[-1], name=name, **change))
    return found


# Layer groups of a CNN by `group_plans`: middle, fine, finest stage, regions, deep, deep of the coarse view.
ORDER = (2, 1, 0, 5, 3, 4)


@contextmanager
def learning(row: Row) -> Iterator[None]:
    """Statistics are learnt with what the row has."""
    kept = statistics_room.PLACE_PRIOR, fitting_room._level_and_spread, clusters_room.Clusters.fit
    if not row.places:
        statistics_room.PLACE_PRIOR = 1e12
    if not row.scaled:
        fitting_room._level_and_spread = lambda total, square, count: (total * 0, torch.ones_like(total))
    if not row.clusters:
        clusters_room.Clusters.fit = lambda self, token, *_, **__: _one_cluster(self, token)
    try:
        yield
    finally:
        statistics_room.PLACE_PRIOR, fitting_room._level_and_spread, clusters_room.Clusters.fit = kept


def _one_cluster(clusters: clusters_room.Clusters, token_nE: Tensor) -> Tensor:
    clusters.link_K = torch.ones(1)
    clusters.project_EP, clusters.centres_KP = torch.zeros(token_nE.shape[1], 1), torch.zeros(1, 1)
    return torch.zeros(len(token_nE), dtype=torch.int64)


@dataclass(frozen=True)
class Answers:
    """What the model says of the good images and of the test images, before any weighing."""

    good: GoodImages
    reading_tR: Tensor
    cluster_t: Tensor
    distances: list[Tensor]  # a group each: masked test images x h x w, fp16
    plain_mhw: Tensor


@torch.inference_mode()
def answers_of(model: AnomalyModel, good: GoodImages, source: FeatureSource, masked: NDArray[np.int64]) -> Answers:
    """Readings of all test images, maps of those of classes with masks."""
    readings, clusters, maps, plains = [], [], [], []
    wanted = set(masked.tolist())
    for observed, small in source.batches(range(len(source))):
        start = sum(len(one) for one in readings)
        plain = model.plain(observed, small)
        cluster_B = model.scorer.clusters(observed.tokens[0])
        distances = model.scorer.distances(observed, cluster_B)
        readings.append(model.scorer.readings(plain, observed, distances, cluster_B))
        clusters.append(cluster_B)
        chosen = [i for i in range(len(small)) if start + i in wanted]
        maps.append([one[chosen].half() for one in distances])
        plains.append(plain.map_Bhw[chosen])
    joined = [torch.cat(column) for column in zip(*maps, strict=True)]
    return Answers(good, torch.cat(readings), torch.cat(clusters), joined, torch.cat(plains))


def weigh(model: AnomalyModel, row: Row, answers: Answers, at: NDArray[np.int64]) -> tuple[NDArray, Tensor]:
    """Image scores of the test images and maps of the masked ones, by what the row uses."""
    scorer, good = model.scorer, answers.good
    local, semantic = scorer.student_readings
    first = scorer.local_count + semantic
    order = [i for i in ORDER if i < len(scorer.patches)][: row.groups]
    place = {g: local + i for i, g in enumerate(scorer.scored)}
    weight_R = torch.zeros_like(scorer.weight_R)
    students = [*range(local), *range(scorer.local_count, first)]
    weight_R[students] = SKILL[id(model)][students] if row.skill else 1.0
    weight_R[[place[g] for g in order if g in place]] = 1.0
    weight_R[[first + i for i in range(row.views)]] = 1.0
    if row.nearest:
        weight_R[-1] = 1.0
    scorer.weight_R.copy_(weight_R)
    link_K = scorer.clusters.link_K.clone()
    if not row.link:
        scorer.clusters.link_K = torch.ones_like(link_K)
    scorer.calibrate(good.readings_nR, good.cluster_n, torch.ones_like(good.counted_n))
    score, _ = scorer.joined(scorer.students(answers.reading_tR, answers.cluster_t), answers.cluster_t)
    scorer.clusters.link_K = link_K
    if not len(at):
        return score.numpy(), torch.zeros(0)
    if not order:
        return score.numpy(), scorer.finish(answers.plain_mhw)
    return score.numpy(), torch.cat(maps_of(scorer, answers, at, order))


def maps_of(
    scorer: scorer_room.Scorer, answers: Answers, at: NDArray[np.int64], groups: Sequence[int]
) -> list[Tensor]:
    """Anomaly maps, by some layer groups, of the masked images, which stand at ``at`` of all; in parts."""
    found = []
    for i in range(0, len(at), 32):
        part = at[i : i + 32]
        distances = [d[i : i + 32].float() for d in answers.distances]
        surprises = scorer.surprises(distances, answers.cluster_t[part])
        found.append(surprises[:, [i for i, g in enumerate(scorer.mapped) if g in groups]].sum(1, keepdim=True))
    return found


SKILL: dict[int, Tensor] = {}


def masks_of(problem: Problem, at: NDArray[np.int64]) -> Tensor:
    """Masks of some test images at `MASK_SIDE`."""
    found = []
    for sample in (problem.test[i] for i in at):
        if sample.label == 0:
            found.append(torch.zeros(MASK_SIDE, MASK_SIDE, dtype=torch.bool))
            continue
        mask = read_sample_mask(sample, read_sample_rgb(sample).shape[:2])
        whole = torch.from_numpy(mask.astype(np.float32))[None, None]
        found.append(F.interpolate(whole, (MASK_SIDE, MASK_SIDE), mode="area")[0, 0] >= 0.5)
    return torch.stack(found)


def judge(problem: Problem, at: NDArray[np.int64], masks: Tensor, score: NDArray, maps: Tensor) -> dict:
    """Image AUROC of every part of the problem, pixel AUROC of every masked class."""
    labels = np.array([s.label for s in problem.test])
    parts = {name: auroc(score[own], labels[own]) for name, own in problem.parts.items()}
    pixel = {}
    for name in sorted(problem.masked):
        own = [i for i, place in enumerate(at) if problem.test[place].class_name == name]
        small = F.interpolate(maps[own], (MASK_SIDE, MASK_SIDE), mode="bilinear")[:, 0]
        pixel[name] = auroc(small.flatten().numpy(), masks[own].flatten().numpy().astype(int))
    return {"parts": parts, "pixel": pixel, "headline": problem.headline}


def run_problem(problem: Problem, args: argparse.Namespace, store: Store, console: Console) -> None:
    """Train once, learn the statistics of every kind, judge every row."""
    config = RunConfig(ModelConfig(size=args.size), TrainConfig(steps=args.steps, seed=args.seed))
    key = key_of(problem.hash, config.to_dict(), code_hash())
    if key in store.entries:
        return
    fitted = fit(problem.known, config, None, console.progress)
    model = fitted.model.eval()
    SKILL[id(model)] = model.scorer.weight_R.clone()
    training, held = choose_images(problem.known, config)
    folder = cache_folder(model, len(problem.known) + len(problem.test), config.train.cache_gb)
    known = FeatureSource(model, [*training, *held], folder, console.progress)
    tested = FeatureSource(model, problem.test, folder, console.progress)
    at = np.array([i for i, s in enumerate(problem.test) if s.class_name in problem.masked], np.int64)
    masks = masks_of(problem, at) if len(at) else torch.zeros(0)
    found: dict[str, dict] = {}
    seen: dict[tuple[bool, bool, bool], Answers] = {}
    state = {}
    for row in rows():
        row_key = row.learnt
        if row_key not in seen:
            if row_key == (True, True, True):
                model = fitted.model = build_again(fitted, state)
                good = fitted.good
            else:
                state = state or {name: one.clone() for name, one in model.state_dict().items()}
                places = range(len(training)), range(len(training), len(training) + len(held))
                with learning(row):
                    good = fit_statistics(model, known, *map(list, places), args.seed, console.progress)
            seen = {row_key: answers_of(model, good, tested, at)}
        answers = seen[row_key]
        score, maps = weigh(model, row, answers, at)
        found[row.name] = judge(problem, at, masks, score, maps)
        console.say(f"{problem.set} {problem.name}: {row.name}: {headline(found[row.name])}")
    store.add(key, {"set": problem.set, "protocol": problem.protocol, "problem": problem.name, "rows": found})


CONSTANTS: dict[str, tuple[float, ...]] = {
    "PLACE_PRIOR": (1.0, 4.0, 16.0),
    "SPREAD_PRIOR": (2.0, 8.0, 32.0),
    "RIDGE": (3e-4, 3e-3, 3e-2),
    "NEIGHBOURS": (1, 5, 15),
    "TOP_SHARE": (0.001, 0.005, 0.02),
    "WINDOW": (10, 20, 40),
    "GAP": (3.2, 5.0, 8.0),
}
_ROOMS = (statistics_room, fitting_room, scorer_room, clusters_room)


@contextmanager
def another(model: AnomalyModel, name: str, value: float) -> Iterator[None]:
    """A constant has another value, wherever it is used."""
    rooms = [room for room in _ROOMS if hasattr(room, name)]
    scorer, kept = model.scorer, getattr(rooms[0], name)
    windows = [one.window for one in scorer.gaussians()]
    for room in rooms:
        setattr(room, name, value)
    for gaussian in scorer.gaussians():
        gaussian.window = scorer_room._window(gaussian.plan.stride)
    try:
        yield
    finally:
        for room in rooms:
            setattr(room, name, kept)
        for gaussian, window in zip(scorer.gaussians(), windows, strict=True):
            gaussian.window = window


def run_constants(problem: Problem, args: argparse.Namespace, store: Store, console: Console) -> None:
    """Train once; learn and judge again with every other value of every constant."""
    config = RunConfig(ModelConfig(size=args.size), TrainConfig(steps=args.steps, seed=args.seed))
    training, held = choose_images(problem.known, config)
    parts = list(range(len(training))), list(range(len(training), len(training) + len(held)))
    at = np.array([i for i, s in enumerate(problem.test) if s.class_name in problem.masked], np.int64)
    masks = masks_of(problem, at) if len(at) else torch.zeros(0)
    fitted = None
    for name, values in CONSTANTS.items():
        for value in values:
            key = key_of(problem.hash, config.to_dict(), code_hash(), name, value)
            if key in store.entries:
                continue
            if fitted is None:
                fitted = fit(problem.known, config, None, console.progress)
                model = fitted.model.eval()
                folder = cache_folder(model, len(problem.known) + len(problem.test), config.train.cache_gb)
                known = FeatureSource(model, [*training, *held], folder, console.progress)
                tested = FeatureSource(model, problem.test, folder, console.progress)
            with another(model, name, value):
                good = fit_statistics(model, known, *parts, args.seed, console.progress)
                answers = answers_of(model, good, tested, at)
                scorer = model.scorer
                students = scorer.students(answers.reading_tR, answers.cluster_t)
                score, _ = scorer.joined(students, answers.cluster_t)
                maps = maps_of(scorer, answers, at, range(len(scorer.patches)))
                found = judge(problem, at, masks, score.numpy(), torch.cat(maps) if maps else torch.zeros(0))
            console.say(f"{problem.set}: {name} {value:g}: {headline(found)}")
            store.add(key, {"set": problem.set, "constant": name, "value": value, "found": found})


def table_of_constants(store: Store) -> Table:
    """A line a constant: image AUROC of every set with each value, and the value that the other sets choose."""
    entries = list(store.entries.values())
    sets = sorted({e["set"] for e in entries})
    body = []
    for name, values in CONSTANTS.items():
        by = {(e["set"], e["value"]): e["found"] for e in entries if e["constant"] == name}
        numbers = {k: _image(found) for k, found in by.items()}
        if len(numbers) < len(sets) * len(values):
            continue
        cells = [" / ".join(f"{numbers[s, v]:.4f}" for v in values) for s in sets]
        picks = []
        for s in sets:
            others = [o for o in sets if o != s] or [s]
            picks.append(f"{max(values, key=lambda v: np.mean([numbers[o, v] for o in others])):.3g}")
        body.append((name, " / ".join(f"{v:.3g}" for v in values), *cells, ", ".join(picks)))
    return Table("Constants", ("constant", "values", *sets, "chosen without " + ", ".join(sets)), tuple(body))


def _image(found: dict) -> float:
    return found["parts"].get(found["headline"]) or float(np.mean(list(found["parts"].values())))


def _pixel(found: dict) -> float:
    return float(np.mean(list(found["pixel"].values())))


def build_again(fitted, state: dict[str, Tensor]) -> AnomalyModel:
    """The model as `fit` left it."""
    model = fitted.model
    for name, value in state.items():
        room, _, leaf = name.rpartition(".")
        owner = model.get_submodule(room)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value.clone()
    return model


def headline(found: dict) -> str:
    pixel = f", pixel {_pixel(found):.4f}" if found["pixel"] else ""
    return f"image {_image(found):.4f}{pixel}"


def table_of(store: Store) -> Table:
    """One row an addition; a column for the images and one for the pixels of every set and protocol."""
    columns = sorted({(e["set"], e["protocol"]) for e in store.entries.values()})
    body = []
    for row in rows():
        cells: list[str] = []
        for one in columns:
            own = [e["rows"][row.name] for e in store.entries.values() if (e["set"], e["protocol"]) == one]
            image = [_image(e) for e in own]
            pixel = [v for e in own for v in e["pixel"].values()]
            cells += [f"{np.mean(image):.4f}", f"{np.mean(pixel):.4f}" if pixel else "-"]
        body.append((row.name, *cells))
    names = [f"{a} {b} {kind}" for a, b in columns for kind in ("image", "pixel")]
    return Table("Additions", ("in use", *names), tuple(body))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds parts/, parts2/, scenes/ and cifar10/")
    parser.add_argument("--sets", default="parts,parts2,textile")
    parser.add_argument("--limit", type=int, default=0, help="images of every kind in a class; 0 takes all")
    parser.add_argument("--steps", type=int, default=TrainConfig().steps)
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("additions.json"))
    parser.add_argument("--constants", action="store_true", help="other values of every constant, instead")
    parser.add_argument("--table", type=Path, help="only print the table of a file")
    args = parser.parse_args()
    console = Console()
    store = Store(args.table or args.out)
    if args.table is None:
        for name in args.sets.split(","):
            for problem in problems_of(name, args.data, args.limit):
                (run_constants if args.constants else run_problem)(problem, args, store, console)
    print("\n".join((table_of_constants if args.constants else table_of)(store).lines()))


if __name__ == "__main__":
    main()
