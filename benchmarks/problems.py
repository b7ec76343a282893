"""What the accuracy benchmarks are measured on, with paired bootstrap intervals, and how our own models are run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import twinspect
from twinspect import data as data_room
from twinspect.commands.evaluate import metrics_of
from twinspect.config import RunConfig
from twinspect.console import Console
from twinspect.data.protocols import SEMANTIC, Split, by_class, content_hash, make_splits
from twinspect.errors import DataError
from twinspect.files import write_text
from twinspect.inference.predictor import Predictor, TorchRuntime
from twinspect.metrics import auroc
from twinspect.training.fit import fit
from twinspect.training.source import FeatureSource, cache_folder
from twinspect.types import Sample

DRAWS = 400
MODEL_CODE = ("models", "training", "losses.py")
PIXEL = ("pixel_auroc", "aupro")
FOLDERS = {
    "parts": ("parts", "auto"),
    "parts2": ("parts2", "auto"),
    "scenes": ("scenes", "view"),
    "cifar10": ("cifar10", "cifar10"),
}
SETS = ("parts", "parts2", "textile", "scenes", "cifar10")


@dataclass(frozen=True)
class Problem:
    """One training and the numbers that come out of its test.

    Attributes:
        set: name of the data.
        protocol: of which this is one run.
        name: of this run.
        known: normal images to learn from, those for calibration included.
        test: labelled images.
        parts: name of a number -> the test images that it is made of.
        headline: the part that stands for all; empty takes the mean of the parts.
        semantic: whether the whole scene makes an image normal, so that there are no masks.
    """

    set: str
    protocol: str
    name: str
    known: tuple[Sample, ...]
    test: tuple[Sample, ...]
    parts: dict[str, NDArray[np.int64]]
    headline: str
    semantic: bool

    @cached_property
    def hash(self) -> str:
        """12 hex digits of images, labels and parts; where the data lie plays no role."""
        more = (f"{name} {at.tolist()}" for name, at in self.parts.items())
        return content_hash((("known", self.known), ("test", self.test)), more)

    @cached_property
    def masked(self) -> frozenset[str]:
        """Classes with pixel metrics."""
        return frozenset(s.class_name for s in self.test if s.masks)

    def judge(self, scores: Sequence[float] | NDArray) -> dict[str, dict]:
        """Part -> its AUROC and that of ``DRAWS`` bootstrap draws."""
        values, labels = np.asarray(scores, np.float64), np.array([s.label for s in self.test])
        weights = draw_weights([self._stratum(s) for s in self.test])
        return {
            name: {
                "auroc": auroc(values[at], labels[at]),
                "draws": np.round(weighted_auroc(values[at], labels[at], weights[:, at]), 5).tolist(),
            }
            for name, at in self.parts.items()
        }

    def rates(self, called: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
        """Part -> share of defects found and of good images called bad."""
        bad = np.array([s.label == 1 for s in self.test])
        found = {}
        for name, at in self.parts.items():
            here, wrong = called[at], bad[at]
            found[name] = {"found": float(here[wrong].mean()), "false_alarms": float(here[~wrong].mean())}
        return found

    def _stratum(self, sample: Sample) -> str:
        """Images that are drawn from together.

        For semantic sets the true class, which is the same in every split: then the draws of all splits of a protocol
        hold the same images, as the splits share theirs.
        """
        return sample.class_name if self.semantic else f"{sample.class_name}/{sample.label}/{self._kind(sample)}"

    def _kind(self, sample: Sample) -> str:
        return sample.defect_type if self.headline else ""


def draw_weights(strata: Sequence[str], draws: int = DRAWS) -> NDArray[np.float64]:
    """How often each image is drawn, draws x images: with replacement within every stratum.

    Depends on a stratum's name and size only: methods and splits can be compared draw by draw.
    """
    names, weights = np.array(strata), np.zeros((draws, len(strata)))
    for name in sorted(set(strata)):
        at = np.flatnonzero(names == name)
        digest = hashlib.sha256(name.encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        weights[:, at] = rng.multinomial(len(at), np.full(len(at), 1 / len(at)), size=draws)
    return weights


def weighted_auroc(scores: NDArray, labels: NDArray, weights: NDArray) -> NDArray[np.float64]:
    """AUROC for every row of weights (draws x images); ties count half."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    bad = np.add.reduceat(weights[:, order] * labels[order], starts, axis=1)
    good = np.add.reduceat(weights[:, order] * (1 - labels[order]), starts, axis=1)
    below = good.cumsum(1) - good / 2
    return (bad * below).sum(1) / (bad.sum(1) * good.sum(1))


# ------------------------------------------------------------------------------------------------ sets


def limited(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """The first ``limit`` images of every class: training, good and defect test images each; 0 keeps all."""
    kept = []
    for members in by_class(samples).values():
        for part in sorted({(s.split, str(s.label)) for s in members}):
            own = [s for s in members if (s.split, str(s.label)) == part]
            kept += own[:: max(1, len(own) // limit)][:limit] if limit else own
    return kept


def problems_of(name: str, data: Path, limit: int) -> list[Problem]:
    """All runs of a set."""
    if name == "textile":
        return [textile(limit)]
    folder, layout = FOLDERS[name]
    samples = limited(data_room.load(data / folder, layout).samples, limit)
    protocols = ("multi-class",) if name.startswith("parts") else ("one-vs-rest", "unified")
    return [of_split(name, p, split) for p in protocols for split in make_splits(samples, p)]


def of_split(name: str, protocol: str, split: Split) -> Problem:
    """One number for a semantic split, one per class for an industrial one."""
    semantic, names = split.kind == SEMANTIC, np.array([s.class_name for s in split.test])
    parts = {name: np.flatnonzero(names == name) for name in sorted(set(names.tolist()))}
    if semantic:
        parts = {split.name.partition("/")[2]: np.arange(len(split.test))}
    known = (*split.train, *split.calibration)
    return Problem(name, protocol, split.name, known, split.test, parts, "", semantic)


def textile(limit: int) -> Problem:
    """The split of the demo; its headline is local and global defects together."""
    from twinspect.commands.demo import FULL, find_images, split

    training, test = (limited(part, limit) for part in split(find_images(), FULL))
    kinds = np.array([s.defect_type for s in test])
    parts = {kind: np.flatnonzero((kinds == kind) | (kinds == "")) for kind in ("local", "global")}
    parts["all"] = np.arange(len(test))
    return Problem("textile", "demo", "textile", tuple(training), tuple(test), parts, "all", False)


# -------------------------------------------------------------------------------------------- our models

READINGS = {"score": "joint", "score_local": "local student", "score_semantic": "semantic student"}


def ours(problem: Problem, config: RunConfig, console: Console) -> tuple[dict, dict, dict]:
    """Train and test: reading -> scores, class -> pixel metrics of the joint map, and facts: seconds, decisions."""
    began = time.monotonic()
    fitted = fit(problem.known, config, None, console.progress)
    trained = time.monotonic() - began
    found, called = cached_scores(fitted, problem, config, console)
    pixel: dict[str, dict] = {}
    if problem.masked:
        predictor = Predictor(TorchRuntime(fitted.model), fitted.decision, batch=8)
        masked = [s for s in problem.test if s.class_name in problem.masked]
        evaluation = metrics_of(predictor, masked, console.progress)
        if failed := evaluation.values["failed"]:
            raise DataError(f"images that cannot be scored: {'; '.join(failed)}")
        pixel = {n: {m: row[m] for m in PIXEL} for n, row in evaluation.values["classes"].items()}
    total = time.monotonic() - began
    facts = {"seconds": round(total, 1), "fit_s": round(trained, 1), "test_s": round(total - trained, 1)}
    return found, pixel, {**facts, "decisions": problem.rates(called)}


def cached_scores(
    fitted, problem: Problem, config: RunConfig, console: Console
) -> tuple[dict[str, NDArray], NDArray[np.bool_]]:
    """Joint score and both students' of the test images, from cached features, and which are called bad."""
    model = fitted.model.eval()
    count = len(problem.known) + len(problem.test)
    source = FeatureSource(model, problem.test, cache_folder(model, count, config.train.cache_gb), console.progress)
    if source.skipped:
        raise DataError(f"images that cannot be read: {'; '.join(s.reason for s in source.skipped)}")
    with torch.inference_mode():
        outputs = [model.score(observed, small) for observed, small in source.batches(range(len(source)))]
    found = {
        shown: torch.cat([getattr(out, f"{field}_B") for out in outputs]).numpy() for field, shown in READINGS.items()
    }
    clusters = torch.cat([out.cluster_B for out in outputs]).tolist()
    verdicts = [fitted.decision.judge(float(s), k) for s, k in zip(found["joint"], clusters, strict=True)]
    return found, np.array([verdict["is_anomaly"] for verdict in verdicts])


class Store:
    """Finished entries by key, in one JSON file that is written whenever one is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def add(self, key: str, entry: dict) -> None:
        """Keep an entry, on disk at once."""
        self.entries[key] = entry
        write_text(self.path, json.dumps(self.entries) + "\n")


@cache
def code_hash() -> str:
    """12 hex digits of the code that makes and scores a model: results of other code are not taken up."""
    root, digest = Path(twinspect.__file__).parent, hashlib.sha256()
    for name in MODEL_CODE:
        files = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / name]
        for path in files:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def key_of(*settings: object) -> str:
    """16 hex digits of whatever JSON can write."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
