"""Do the promises hold? Coverage, predicted classes, unknown classes and drift, on real good images.

    python benchmarks/decisions.py model.twin --data DIR/parts        six products, one model
    python benchmarks/decisions.py textile.twin --data textile        images of conformal-clip-data
    python benchmarks/decisions.py model.twin --data DIR/parts --leave-one-out      unknown classes, too
    python benchmarks/decisions.py model.twin --data DIR/parts --out decisions.json

Without --data the folder parts of TWINSPECT_SHARED_DATA is taken. Good test images that the model was not
trained on are scored once (and once more for each brightness); everything else is resampling of those scores.

Coverage: the good images are cut at random into calibration and test, many times; thresholds come from one
half, the rate of good images called bad from the other. Cuts of a fixed set are exchangeable, so the promise
is that the mean over cuts is at most the budget, up to the error of so many cuts (3 standard errors).
Drift: calibration images and stream are drawn with replacement from the good images, then from the same
images made brighter or darker; a stream of undrifted images must raise an alarm no more often than stated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinspect import Detector
from twinspect import data as data_room
from twinspect.bundle import Fitted
from twinspect.data.samples import read_sample_rgb
from twinspect.decide.decision import Budget, Decision, GoodScores
from twinspect.decide.drift import DriftMonitor
from twinspect.decide.recalibrate import score_images
from twinspect.metrics import auroc
from twinspect.models.clusters import Clusters
from twinspect.models.contract import AnomalyModel
from twinspect.models.statistics import TokenGaussian, cross_fitted_tokens
from twinspect.report import Table
from twinspect.training.fit import choose_images
from twinspect.training.outcome import classes_of_clusters
from twinspect.training.source import FeatureSource, cache_folder
from twinspect.types import TEST, Sample

BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.10)
FACTORS = (1.1, 0.9)
Values = dict[str, Any]


def samples_of(name: str) -> list[Sample]:
    """All samples of a data set, or of the demo's textile images."""
    if name != "textile":
        return list(data_room.load(Path(name)).samples)
    from twinspect.commands.demo import FULL, find_images, split

    training, test = split(find_images(), FULL)
    return [*training, *test]


def progress(stage: str, done: int, total: int) -> None:
    if done == total or done % 100 == 0:
        print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------- coverage


class Cuts:
    """Counts over random cuts, of one budget and class."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.found: list[float] = []
        self.unpromised = 0
        self.bases: dict[str, int] = {}

    def add(self, called: NDArray[np.bool_], found: NDArray[np.bool_], guaranteed: bool, basis: str) -> None:
        """One cut: which good images were called bad, which defects were found."""
        if len(called):
            self.rates.append(float(called.mean()))
        if len(found):
            self.found.append(float(found.mean()))
        self.unpromised += not guaranteed
        self.bases[basis] = self.bases.get(basis, 0) + 1


def coverage(decision: Decision, good: GoodScores, bad: GoodScores, splits: int, seed: int) -> list[Values]:
    """Per budget and class: mean rate of good images called bad, and of defects found, over cuts into halves."""
    rng = np.random.default_rng(seed)
    classes = sorted(set(good.predicted))
    cuts: dict[tuple[float, str], Cuts] = {}
    for _ in range(splits):
        inside = rng.permutation(len(good)) < len(good) // 2
        half, rest = good.take(inside), good.take(~inside)
        for budget in BUDGETS:
            made = dataclasses.replace(decision, good=half, budget=Budget(budget), budgets={}, fixed={})
            called, found = np.zeros(len(rest), dtype=bool), np.zeros(len(bad), dtype=bool)
            promised = True
            for name in classes:
                rule = made.rule(name, given=False)
                own, theirs = rest.of_class(name, given=False), bad.of_class(name, given=False)
                called[own], found[theirs] = (
                    rest.score[own] >= rule.image.value,
                    bad.score[theirs] >= rule.image.value,
                )
                cuts.setdefault((budget, name), Cuts()).add(
                    called[own], found[theirs], rule.image.guaranteed, rule.basis
                )
                promised &= rule.image.guaranteed
            # A promise for all images needs one for every class; the pooled threshold has its own.
            cuts.setdefault((budget, "all images"), Cuts()).add(called, found, promised, "by class")
            every = made.rule("").image
            cuts.setdefault((budget, "pooled"), Cuts()).add(
                rest.score >= every.value, bad.score >= every.value, every.guaranteed, "one threshold"
            )
    return [_coverage_row(key, one) for key, one in cuts.items()]


def _coverage_row(key: tuple[float, str], cuts: Cuts) -> Values:
    budget, name = key
    mean, error = float(np.mean(cuts.rates)), float(np.std(cuts.rates) / math.sqrt(len(cuts.rates)))
    own = cuts.unpromised == 0
    return {
        "budget": budget, "class": name, "mean": mean, "error": error, "splits": len(cuts.rates),
        "rule": max(cuts.bases, key=lambda basis: cuts.bases[basis]), "promised": own,
        "holds": mean <= budget + 3 * error if own else None,
        "found": float(np.mean(cuts.found)) if cuts.found else math.nan,
    }  # fmt: skip


def as_fitted(decision: Decision, good: GoodScores) -> list[Values]:
    """The bundle's own thresholds on these good images."""
    rows = []
    for name in sorted(set(good.class_name)):
        own, rule = good.of_class(name, given=True), decision.rule(name)
        called = int((good.score[own] >= rule.image.value).sum())
        rows.append(
            {
                "class": name, "images": int(own.sum()), "called": called, "rate": called / int(own.sum()),
                "budget": rule.image.max_fpr, "calibration_images": len(rule.scores), "rule": rule.basis,
            }
        )  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------ classes, known or not


def class_accuracy(predicted: Sequence[str], samples: Sequence[Sample]) -> list[Values]:
    """Share of test images (good and defect) whose class is predicted, by class and in all."""
    rows = []
    for name in [*sorted({s.class_name for s in samples}), "all"]:
        hits = [one == s.class_name for one, s in zip(predicted, samples, strict=True)
                if name in ("all", s.class_name)]  # fmt: skip
        rows.append({"class": name, "images": len(hits), "accuracy": float(np.mean(hits))})
    return rows


class Scenes(NamedTuple):
    """What the frozen teacher says of images, one row each; students have no part in known and unknown classes."""

    token_NE: Tensor
    embedding_NF: Tensor
    class_name: NDArray[np.str_]
    part: NDArray[np.str_]


def scenes(model: AnomalyModel, parts: dict[str, Sequence[Sample]], cache_gb: float) -> Scenes:
    """Show images to the teacher, or take what it said of them when they were last trained on."""
    samples = [s for members in parts.values() for s in members]
    source = FeatureSource(model, samples, cache_folder(model, len(samples), cache_gb), progress)
    if source.skipped:
        raise SystemExit(f"cannot be read: {source.skipped[0].path}: {source.skipped[0].reason}")
    seen = [(one.tokens[0], one.embedding_BF) for one, _ in source.batches(range(len(samples)))]
    tokens, embeddings = (torch.cat(column) for column in zip(*seen, strict=True))
    names = [name for name, members in parts.items() for _ in members]
    return Scenes(tokens, embeddings, np.array([s.class_name for s in samples]), np.array(names))


@torch.no_grad()
def leave_one_out(detector: Detector, samples: Sequence[Sample]) -> list[Values]:
    """For every class: how well its good images stand apart by `class_p`, if the model has not seen the class.

    The distance behind it is the Mahalanobis distance of the teacher's tokens from the nearest cluster. That is
    learnt anew without each class, by the steps that `fit` takes; students would not change it.
    """
    train, held = choose_images(samples, detector.config)
    test = [s for s in samples if s.split == TEST and s.label == 0]
    seen = scenes(
        detector.fitted.model.eval(), {"train": train, "held": held, "test": test}, detector.config.train.cache_gb
    )
    return [_left_out(detector.fitted, seen, name) for name in sorted({s.class_name for s in train})]


def _left_out(fitted: Fitted, seen: Scenes, name: str) -> Values:
    known = seen.class_name != name
    learnt = torch.from_numpy(np.isin(seen.part, ("train", "held")) & known)
    token, names = seen.token_NE, seen.class_name[learnt.numpy()].tolist()
    clusters = Clusters(token.shape[1])
    seed = fitted.config.train.seed
    cluster_n = clusters.fit(token[learnt], seen.embedding_NF[learnt], names, seed)
    length = TokenGaussian(token.shape[1])
    length.fit(token[learnt], cluster_n, clusters.count)
    order = torch.randperm(len(cluster_n), generator=torch.Generator().manual_seed(seed))
    fitted_on = cross_fitted_tokens(token[learnt], cluster_n, clusters.count, order % 5)
    cluster = clusters(token)
    distance = length(token, cluster)
    distance[learnt] = fitted_on
    distance, cluster = distance.double().numpy(), cluster.numpy()
    owners = classes_of_clusters(cluster[learnt.numpy()], names, clusters.count)
    own = learnt.numpy()
    nothing = np.zeros(int(own.sum()))
    predicted = tuple(owners[k] for k in cluster[own])
    good = GoodScores(nothing, nothing, distance[own], tuple(names), predicted, [""] * len(names), [""] * len(names))
    decision = Decision(good, owners, (0.0, 1.0), Budget())
    test = seen.part == "test"
    said = [decision.judge(0.0, int(k), float(d)) for k, d in zip(cluster[test], distance[test], strict=True)]
    p, flagged = np.array([one["class_p"] for one in said]), np.array([bool(one["unknown_class"]) for one in said])
    unknown = (~known[test]).astype(int)
    return {
        "class": name, "unknown": int(unknown.sum()), "known": int((1 - unknown).sum()),
        "auroc_distance": float(auroc(distance[test], unknown)), "auroc_p": float(auroc(-p, unknown)),
        "flagged_unknown": float(flagged[unknown == 1].mean()), "flagged_known": float(flagged[unknown == 0].mean()),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------- drift


def brightened(samples: Sequence[Sample], factor: float) -> list[NDArray[np.uint8]]:
    return [np.clip(read_sample_rgb(s).astype(np.float32) * factor, 0, 255).round().astype(np.uint8) for s in samples]


def drawn(good: GoodScores, rng: np.random.Generator, count: int) -> GoodScores:
    """Images drawn with replacement."""
    return good.take(rng.integers(0, len(good), count))


def first_alarm(monitor: DriftMonitor, rows: GoodScores) -> int | None:
    """Number (from 1) of the image that raises the first alarm."""
    for number, row in enumerate(zip(rows.score, rows.predicted, rows.distance, strict=True), start=1):
        if monitor.update(float(row[0]), row[1], float(row[2])):
            return number
    return None


def delays(good: GoodScores, moved: GoodScores, options: argparse.Namespace) -> list[Values]:
    """Images until an alarm after a change, with and without a quiet time before it."""
    rows = []
    for quiet in (0, 1000):
        found: list[int | None] = []
        kinds: list[str] = []
        for run in range(options.runs):
            rng = np.random.default_rng((options.seed, quiet, run))
            monitor = DriftMonitor(drawn(good, rng, len(good)), options.rate, run)
            if first_alarm(monitor, drawn(good, rng, quiet)) is not None:
                continue
            found.append(first_alarm(monitor, drawn(moved, rng, options.patience)))
            kinds.append(monitor.report().kind)
        seen = [n if n is not None else math.inf for n in found]
        quantiles = np.quantile(seen, (0.1, 0.5, 0.9), method="higher").tolist() if seen else [math.inf] * 3
        rows.append(
            {
                "quiet": quiet, "runs": len(found), "missed": found.count(None),
                "delay": [None if q == math.inf else int(q) for q in quantiles],
                "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            }
        )  # fmt: skip
    return rows


def false_alarms(good: GoodScores, options: argparse.Namespace) -> Values:
    """Share of undrifted streams with any alarm."""
    alarms = 0
    for run in range(options.runs):
        rng = np.random.default_rng((options.seed, 7, run))
        monitor = DriftMonitor(drawn(good, rng, len(good)), options.rate, run)
        alarms += first_alarm(monitor, drawn(good, rng, options.stream)) is not None
    return {"streams": options.runs, "images": options.stream, "alarms": alarms, "stated": options.rate}


# ---------------------------------------------------------------------------------------------- tables


def table(title: str, rows: Sequence[Values], note: str = "") -> Table:
    """Dictionaries as a table."""
    columns = tuple(rows[0]) if rows else ("nothing",)
    return Table(title, columns, tuple(tuple(_cell(row[c]) for c in columns) for row in rows), note)


def _cell(value: Any) -> str | int | float:
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:.4f}"
    return str(value)


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> Values:
    """Everything, as plain values; tables on the way."""
    detector = Detector.load(options.bundle)
    decision = detector.fitted.decision
    samples = samples_of(options.data)
    test = [s for s in samples if s.split == TEST and s.label is not None]
    scored = score_images(detector.predictor(), test, None, progress)
    if scored.failed:
        raise SystemExit(f"cannot be scored: {scored.failed[0]}")
    unseen = np.array([key not in decision.trained for key in scored.rows.key]) & (scored.label_N == 0)
    good, bad = scored.rows.take(unseen), scored.rows.take(scored.label_N == 1)
    kept = [s for s, k in zip(test, unseen, strict=True) if k]
    found: Values = {"bundle": Path(options.bundle).name, "good": len(good), "model_id": decision.model_id}
    found["coverage"] = coverage(decision, good, bad, options.splits, options.seed)
    found["as_fitted"] = as_fitted(decision, good)
    found["class_accuracy"] = class_accuracy(scored.rows.predicted, test)
    for name, title in (
        ("coverage", f"good images called bad, mean over {options.splits} cuts of {len(good)}"),
        ("as_fitted", "good images called bad at the bundle's own thresholds"),
        ("class_accuracy", "predicted class"),
    ):
        _say_table(say, title, found[name])
    if options.leave_one_out:
        found["unknown"] = leave_one_out(detector, samples)
        _say_table(say, "a class the model does not know (leave one out)", found["unknown"])
    found["false_alarms"] = false_alarms(good, options)
    _say_table(say, "drift: undrifted streams with an alarm", [found["false_alarms"]])
    for factor in FACTORS:
        moved = _moved(detector, kept, good, factor)
        found[f"brightness {factor:g}"] = delays(good, moved, options)
        _say_table(say, f"drift: images until an alarm, brightness x {factor:g}", found[f"brightness {factor:g}"])
    return found


def _moved(detector: Detector, samples: Sequence[Sample], good: GoodScores, factor: float) -> GoodScores:
    results = [
        detector.predictor().predict(brightened(samples[i : i + 16], factor), maps=False, pixels=False)
        for i in range(0, len(samples), 16)
    ]
    rows = [r for part in results for r in part]
    return GoodScores(
        [r.score for r in rows], [r.peak for r in rows], [r.cluster_distance for r in rows],
        [s.class_name for s in samples], [r.predicted_class for r in rows], [""] * len(rows), [""] * len(rows),
    )  # fmt: skip


def _say_table(say: Callable[[str], None], title: str, rows: Sequence[Values]) -> None:
    for line in table(title, rows).lines():
        say(line)
    say("")


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    shared = os.environ.get("TWINSPECT_SHARED_DATA", "")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a model fitted on the training images of the data")
    parser.add_argument("--data", default=str(Path(shared) / "parts") if shared else "", help="data set, or textile")
    parser.add_argument("--splits", type=int, default=200, help="random cuts")
    parser.add_argument("--runs", type=int, default=20, help="streams for drift")
    parser.add_argument("--stream", type=int, default=10_000, help="undrifted images in a stream")
    parser.add_argument(
        "--patience", type=int, default=2_000, help="drifted images after which a run counts as missed"
    )
    parser.add_argument("--rate", type=float, default=0.01, help="stated chance of a false drift alarm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--leave-one-out", action="store_true", help="forget each class in turn, and look whether it is noticed"
    )
    parser.add_argument("--out", default="", help="JSON file")
    options = parser.parse_args(args)
    if not options.data:
        parser.error("name the data set: --data DIR/parts, or set TWINSPECT_SHARED_DATA")
    return options


def main(args: Sequence[str] | None = None) -> Values:
    options, began = parse(args), time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        if options.leave_one_out:
            os.environ.setdefault("TWINSPECT_HOME", home)
        found = measure(options, print)
    found["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(found, indent=1)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
