"""What do few good images give? One to eight a class, decisions with 30, and named products with 12 to 50 each.

    python benchmarks/small_sets.py --data DIR --out small.json                 # decisions and products
    python benchmarks/small_sets.py --data DIR --parts shots --size 256 --limit 30
    python benchmarks/small_sets.py --data DIR --parts decisions --counts 30 --draws 3
    python benchmarks/small_sets.py --data DIR --parts products --products casting,metal_nut,pill_dirt

decisions: one model a folder (parts, parts2) from so many randomly drawn good images of every class, a few draws; all
test images; share of defects found and of good images called bad at the default threshold, mean over classes.

shots: one model a folder from 1, 2, 4 and 8 random good images of every class, beside PatchCore (`baselines`) from
the same images and features: greedy choice of 4,000 patches of stages 3 and 5, a memory for each class, whose name it
is told; of its ways to read a map the one that is best on the test images. ``--limit``: test images of a kind.

products: some products in one model against a model of each product alone, image AUROC of every product, and how many
test images are taken for the right product. What is finished is written and not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from baselines import READINGS, PatchMemory, image_scores
from problems import Store, code_hash, key_of, limited
from torch.nn import functional

from twinspect import data as data_room
from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.console import Console
from twinspect.metrics import auroc
from twinspect.models.contract import build_model
from twinspect.report import Table
from twinspect.training.fit import fit
from twinspect.training.source import FeatureSource, cache_folder
from twinspect.types import TEST, TRAIN, Sample

FOLDERS = ("parts", "parts2")


def drawn(samples: list[Sample], count: int, seed: int) -> list[Sample]:
    """``count`` random good training images of every class, and all test images."""
    kept = [s for s in samples if s.split == TEST]
    for name in sorted({s.class_name for s in samples}):
        own = [s for s in samples if s.class_name == name and s.split == TRAIN]
        order = np.random.default_rng([seed, len(own)]).permutation(len(own))[:count]
        kept += [own[i] for i in sorted(order)]
    return kept


def judged(samples: list[Sample], args: argparse.Namespace, console: Console) -> dict[str, dict[str, float]]:
    """Train on the training images, score the test images: class -> AUROC, found, false alarms, class right."""
    config = RunConfig(ModelConfig(size=args.size), TrainConfig(steps=args.steps, seed=args.seed))
    fitted = fit(samples, config, None, console.progress)
    model, decision = fitted.model.eval(), fitted.decision
    test = [s for s in samples if s.split == TEST]
    source = FeatureSource(model, test, cache_folder(model, 20_000, config.train.cache_gb), console.progress)
    scores: list[float] = []
    clusters: list[int] = []
    with torch.inference_mode():
        for observed, small in source.batches(range(len(source))):
            out = model.score(observed, small)
            scores += out.score_B.tolist()
            clusters += out.cluster_B.tolist()
    names = np.array([s.class_name for s in source.samples])
    bad = np.array([s.label == 1 for s in source.samples])
    called = np.array([decision.judge(s, k)["answer"] == "anomaly" for s, k in zip(scores, clusters, strict=True)])
    predicted = np.array([decision.class_of_cluster[k] for k in clusters])
    found = {}
    for name in sorted(set(names)):
        at = names == name
        found[name] = {
            "auroc": auroc(np.array(scores)[at], bad[at].astype(int)),
            "found": float(called[at & bad].mean()),
            "false_alarms": float(called[at & ~bad].mean()),
            "class": float((predicted[at] == name).mean()),
        }
    return found


def once(store: Store, console: Console, args: argparse.Namespace, samples: list[Sample], **facts: object) -> dict:
    """The entry of a run, made where it is not there yet."""
    lines = [str(s.image.relative_to(args.data)) for s in samples]
    key = key_of(facts, lines, args.size, args.steps, args.seed, code_hash())
    if key not in store.entries:
        store.add(key, {**facts, "classes": judged(samples, args, console)})
    entry = store.entries[key]
    numbers = {k: np.mean([row[k] for row in entry["classes"].values()]) for k in ("auroc", "found", "false_alarms")}
    console.say(" ".join(map(str, facts.values())) + "".join(f"  {k} {v:.3f}" for k, v in numbers.items()))
    return entry


def decisions(args: argparse.Namespace, store: Store, console: Console) -> Table:
    """A line a folder and number of images: mean, and worst draw."""
    body = []
    for count in args.counts:
        for folder in FOLDERS:
            samples = list(data_room.load(args.data / folder).samples)
            runs = [
                once(
                    store,
                    console,
                    args,
                    drawn(samples, count, draw),
                    part="decisions",
                    set=folder,
                    n=count,
                    draw=draw,
                )
                for draw in range(args.draws)
            ]
            rows = [[r[k] for k in ("auroc", "found", "false_alarms")] for e in runs for r in e["classes"].values()]
            draws = [np.mean([r["false_alarms"] for r in e["classes"].values()]) for e in runs]
            body.append((folder, count, *(f"{v:.3f}" for v in np.mean(rows, 0)), f"{max(draws):.3f}"))
    columns = ("folder", "good images a class", "image AUROC", "found", "false alarms", "false alarms, worst draw")
    return Table("Default threshold from few good images", columns, tuple(body))


def patches_of(source: FeatureSource, at: list[int], levels: list[int]) -> torch.Tensor:
    """Stages joined on the grid of the finest, each averaged over 3 x 3: B x P x D."""
    maps = next(source.ahead([at]))[0].maps
    near = [functional.avg_pool2d(maps[i].float(), 3, 1, 1, count_include_pad=False) for i in levels]
    side = near[0].shape[-1]
    return (
        torch.cat([functional.interpolate(one, side, mode="bilinear") for one in near], 1).flatten(2).mT.contiguous()
    )


def patch_memory(samples: list[Sample], args: argparse.Namespace, console: Console) -> dict[str, dict[str, float]]:
    """PatchCore from the training images of each class: class -> reading -> AUROC on its test images."""
    model = build_model(ModelConfig(size=args.size))
    source = FeatureSource(model, samples, cache_folder(model, 20_000, 20.0), console.progress)
    levels = [model.teacher.levels.index(stage) for stage in (3, 5)]
    found = {}
    for name in sorted({s.class_name for s in samples}):
        own = [i for i, s in enumerate(source.samples) if s.class_name == name]
        known = [i for i in own if source.samples[i].split == TRAIN]
        memory = PatchMemory(4000, 100_000, greedy=True)
        memory.fit(lambda known=known: (patches_of(source, [i], levels) for i in known), len(known))
        test = [i for i in own if source.samples[i].split == TEST]
        distance = torch.cat(
            [memory.distance(patches_of(source, test[i : i + 8], levels)) for i in range(0, len(test), 8)]
        )
        side = round(distance.shape[1] ** 0.5)
        bad = np.array([source.samples[i].label for i in test])
        read = image_scores(distance.reshape(-1, side, side))
        found[name] = {reading: auroc(read[reading].numpy(), bad) for reading in READINGS}
    return found


def shots(args: argparse.Namespace, store: Store, console: Console) -> Table:
    """A line a folder and number of images: both AUROCs, and decisions of ours."""
    body = []
    for folder, count in ((folder, count) for folder in FOLDERS for count in (1, 2, 4, 8)):
        every = list(data_room.load(args.data / folder).samples)
        test = limited([s for s in every if s.split == TEST], args.limit)
        ours, theirs = [], []
        for draw in range(args.draws):
            samples = [*test, *(s for s in drawn(every, count, draw) if s.split == TRAIN)]
            facts = {"part": "shots", "set": folder, "n": count, "draw": draw}
            ours += once(store, console, args, samples, **facts)["classes"].values()
            key = key_of("patchcore", facts, [str(s.image) for s in samples], args.size)
            if key not in store.entries:
                store.add(key, {**facts, "patchcore": patch_memory(samples, args, console)})
            theirs += store.entries[key]["patchcore"].values()
        best = max(np.mean([row[reading] for row in theirs]) for reading in READINGS)
        means = [np.mean([row[k] for row in ours]) for k in ("auroc", "found", "false_alarms")]
        body.append((folder, count, *(f"{v:.3f}" for v in (means[0], best, *means[1:]))))
    columns = ("folder", "good images a class", "ours", "PatchCore", "found", "false alarms")
    return Table("A few good images, image AUROC", columns, tuple(body))


def products(args: argparse.Namespace, store: Store, console: Console) -> Table:
    """A line a number of images and product: in one model, in a model of its own, and right class."""
    every = [s for folder in FOLDERS for s in data_room.load(args.data / folder).samples]
    body = []
    for count in args.products_counts:
        samples = drawn([s for s in every if s.class_name in args.products], count, 0)
        together = once(store, console, args, samples, part="products", n=count, of="together")
        for name in args.products:
            own = [s for s in samples if s.class_name == name]
            alone = once(store, console, args, own, part="products", n=count, of=name)["classes"][name]
            row = together["classes"][name]
            numbers = (f"{row['auroc']:.3f}", f"{alone['auroc']:.3f}", f"{100 * row['class']:.1f} %")
            body.append((count, name, *numbers))
    columns = ("good images", "product", "AUROC, one model", "AUROC, its own model", "class right")
    return Table("Named products", columns, tuple(body))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds parts/ and parts2/")
    parser.add_argument("--parts", default="decisions,products")
    parser.add_argument("--counts", default="30", help="good images a class, of decisions")
    parser.add_argument("--products-counts", default="12,20,30,50")
    parser.add_argument("--products", default="casting,metal_nut,pill_dirt")
    parser.add_argument(
        "--limit", type=int, default=0, help="test images of every class and kind, of shots; 0 takes all"
    )
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=TrainConfig().steps, help="0: no students (fit --effort instant)"
    )
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("small.json"))
    args = parser.parse_args()
    args.counts = [int(n) for n in args.counts.split(",")]
    args.products_counts = [int(n) for n in args.products_counts.split(",")]
    args.products = args.products.split(",")
    console, store = Console(), Store(args.out)
    makers = {"shots": shots, "decisions": decisions, "products": products}
    for part in args.parts.split(","):
        print("\n".join(makers[part](args, store, console).lines()))


if __name__ == "__main__":
    main()
