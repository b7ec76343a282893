"""Is the exported model the model that was measured? Two runtimes side by side on the same pixels. No torch.

Gaps are relative to max(1, |reference|), for scores and for every value of the maps alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from twinspect.data import load
from twinspect.data.images import resize_rgb
from twinspect.data.painting import damaged, part, spot
from twinspect.data.samples import read_sample_rgb
from twinspect.decide.decision import ANOMALY, Decision
from twinspect.errors import DataError, TwinspectError
from twinspect.inference.decode import decode, expand
from twinspect.inference.predictor import Runtime
from twinspect.metrics import auroc

Pixels = NDArray[np.uint8]
Scores = NDArray[np.float64]
FEWEST = 32  # images an export is compared on
FEWEST_RANKED = 8


class ParityError(TwinspectError):
    """An export does not say what the model says."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What an export of one precision must keep.

    Attributes:
        score: largest gap of the joint score; None leaves it to the ranking.
        map: largest gap of any map value.
        rank: smallest rank correlation of the scores.
        auroc: largest change of the image AUROC (mean over classes), where labels are given.
    """

    score: float | None
    map: float | None
    rank: float
    auroc: float


TOLERANCES = {
    "fp32": Tolerance(1e-4, 1e-3, 0.999, 0.001),
    # Ten bits of a teacher's features move the score of real parts by up to 7 % at a rank correlation of 0.999.
    "fp16": Tolerance(0.1, 0.2, 0.99, 0.005),
    "int8": Tolerance(None, None, 0.95, 0.005),
}


@dataclass(frozen=True, slots=True)
class CheckImages:
    """Pixels to compare on.

    Attributes:
        squares: uint8 RGB at the model's size.
        labels: 0 normal, 1 anomaly, None unknown; one a square.
        classes: class names, for the mean AUROC.
        raw: a few images at their own size, for exports that resize themselves.
        synthetic: painted, because no images were given.
    """

    squares: Sequence[Pixels]
    labels: Sequence[int | None]
    classes: Sequence[str]
    raw: Sequence[Pixels] = ()
    synthetic: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found.

    Attributes:
        images: compared, those at their own size included.
        synthetic: whether they were painted.
        score_gap, map_gap: largest relative gaps.
        cluster_changes: images whose nearest cluster differs.
        rank: rank correlation of the joint scores; None below 8 images.
        auroc: (reference, export) mean image AUROC over classes, where labels allow.
        decisions: images (not painted ones) that were judged.
        changed: of them, how many got another answer from the export than from the model, by more than rounding of
            their scores (the tolerance of fp32).
        good_called_bad: (reference, export) good images called anomalous.
    """

    images: int
    synthetic: bool
    score_gap: float
    map_gap: float
    cluster_changes: int
    rank: float | None
    auroc: tuple[float, float] | None
    decisions: int
    changed: int
    good_called_bad: tuple[int, int]

    @property
    def broken(self) -> bool:
        """Whether the export gives no usable numbers at all."""
        return not bool(np.isfinite([self.score_gap, self.map_gap]).all())

    @property
    def loss(self) -> tuple[float, float]:
        """By which exports of one model are put in order, the best first."""
        return (float("inf") if self.broken else self.changed, -(self.rank or 0.0))

    def problems(self, precision: str) -> list[str]:
        """Why an export of this precision is refused; empty when it is accepted."""
        limit = TOLERANCES[precision]
        problems = []
        if self.broken:
            problems.append("a score or map value is not finite")
        if self.changed:
            problems.append(self._decisions())
        if limit.score is not None and self.score_gap > limit.score:
            problems.append(f"scores differ by up to {self.score_gap:.2g} (accepted {limit.score:g})")
        if limit.map is not None and self.map_gap > limit.map:
            problems.append(f"map values differ by up to {self.map_gap:.2g} (accepted {limit.map:g})")
        if self.auroc is not None:
            change = abs(self.auroc[1] - self.auroc[0])
            if change > limit.auroc:
                problems.append(
                    f"image AUROC {self.auroc[0]:.4f} became {self.auroc[1]:.4f} (accepted {limit.auroc:g})"
                )
        if self.rank is not None and self.rank < limit.rank or (self.rank is None and limit.score is None):
            rank = "unknown (too few images)" if self.rank is None else f"{self.rank:.3f}"
            problems.append(f"rank correlation of the scores is {rank} (accepted {limit.rank:g})")
        return problems

    def lines(self) -> Iterator[str]:
        """What to say to people."""
        kind = "painted images (give real ones with --images)" if self.synthetic else "images"
        yield (
            f"compared with torch on {self.images} {kind}: scores differ by up to {self.score_gap:.2g}, "
            f"map values by {self.map_gap:.2g}"
            + (f", another cluster on {self.cluster_changes} images" if self.cluster_changes else "")
        )
        if self.rank is not None:
            yield f"rank correlation of scores {self.rank:.4f}"
        if self.auroc is not None:
            yield f"image AUROC {self.auroc[0]:.4f} with torch, {self.auroc[1]:.4f} exported"
        if self.decisions:
            yield self._decisions()

    def _decisions(self) -> str:
        if not self.changed:
            return f"the answers for all {self.decisions} images are the same"
        ours, theirs = self.good_called_bad
        return (
            f"the answers for {self.changed} of {self.decisions} images differ "
            f"(good images called bad: {ours} with torch, {theirs} exported)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def compare(
    reference: Runtime,
    export: Runtime,
    images: CheckImages,
    decision: Decision,
    progress: Callable[[str, int, int], None],
) -> Comparison:
    """Run both on the same pixels, one at a time and in threes in turn.

    Args:
        reference: the model itself.
        export: what is judged.
        images: at least 32 where the caller has them.
        decision: of the model, which judges the scores of both.
        progress: called with (stage, done, total).
    """
    gaps, maps, changes = [0.0], [0.0], 0
    ours: list[_Said] = []
    theirs: list[_Said] = []
    parts = [*_parts(images.squares), *([one[None]] for one in images.raw)]
    for done, (pixels,) in enumerate(parts):
        a, b = reference.run(pixels), export.run(pixels)
        gaps.append(_gap(a["score_B"], b["score_B"]))
        maps.append(_gap(a["map_B1HW"], b["map_B1HW"]))
        changes += int((a["cluster_B"] != b["cluster_B"]).sum())
        ours += _said(a)
        theirs += _said(b)
        progress("comparing with torch", done + 1, len(parts))
    count = len(images.squares)
    first, second = (np.array([one.score for one in answer[:count]], dtype=np.float64) for answer in (ours, theirs))
    judged = 0 if images.synthetic else count  # painted images are all anomalies
    known = [name if name in decision.classes else None for name in images.classes]
    answers = [
        [decision.judge(*one, name).answer for one, name in zip(answer[:judged], known[:judged], strict=True)]
        for answer in (ours, theirs)
    ]
    changed = [
        x != y and not _alike(a, b) for a, b, x, y in zip(ours[:judged], theirs[:judged], *answers, strict=True)
    ]
    bad = [
        sum(x == ANOMALY and label != 1 for x, label in zip(one, images.labels[:judged], strict=True))
        for one in answers
    ]
    return Comparison(
        len(ours), images.synthetic, max(gaps), max(maps), changes,
        rank_correlation(first, second) if count >= FEWEST_RANKED else None,
        _aurocs(first, second, images), judged, sum(changed), (bad[0], bad[1]),
    )  # fmt: skip


class _Said(NamedTuple):
    """What `Decision.judge` asks about an image."""

    score: float
    cluster: int
    distance: float


def _said(out: Mapping[str, NDArray[Any]]) -> list[_Said]:
    distance_B = out.get("cluster_distance_B", np.full(len(out["score_B"]), np.nan))
    columns = (one.tolist() for one in (out["score_B"], out["cluster_B"], distance_B))
    return [_Said(*values) for values in zip(*columns, strict=True)]


def _alike(a: _Said, b: _Said) -> bool:
    """Whether two answers can differ only because a score lies on the threshold itself."""
    limit = TOLERANCES["fp32"].score or 0.0
    return a.cluster == b.cluster and abs(a.score - b.score) <= limit * max(1.0, abs(a.score))


def _parts(squares: Sequence[Pixels]) -> Iterator[list[Pixels]]:
    place, turn = 0, 0
    while place < len(squares):
        count = (1, 3)[turn % 2]
        yield [np.stack(squares[place : place + count])]
        place, turn = place + count, turn + 1


def _gap(reference: NDArray[Any], export: NDArray[Any]) -> float:
    if reference.shape != export.shape:
        return float("inf")
    gap = np.abs(reference - export) / np.maximum(1.0, np.abs(reference))
    return float(gap.max()) if np.isfinite(gap).all() else float("inf")


def rank_correlation(first: Scores, second: Scores) -> float:
    """Spearman's rank correlation; 1 where one of them has no spread."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    if not (np.ptp(first) and np.ptp(second)):
        return 1.0
    return float(spearmanr(first, second).statistic)


def _aurocs(first: Scores, second: Scores, images: CheckImages) -> tuple[float, float] | None:
    """Mean over the classes that hold both labels, None without any."""
    label = np.array([-1 if label is None else label for label in images.labels])
    names = np.array(images.classes)
    classes = [(names == name) & (label >= 0) for name in sorted(set(images.classes))]
    both = [rows for rows in classes if set(label[rows]) == {0, 1}]
    if not both:
        return None
    ours, theirs = (float(np.mean([auroc(scores[rows], label[rows]) for rows in both])) for scores in (first, second))
    return ours, theirs


def load_images(source: Any, size: int, most: int = 100) -> CheckImages:
    """Good images (a path, folder, glob or list), spread evenly when there are more than ``most``.

    Raises:
        DataError: none found, or one cannot be read.
    """
    images = [decode(item, size, pixels=i < 4) for i, item in enumerate(spread(list(expand(source)), most))]
    for image in images:
        if image.error:
            raise DataError(image.error)
    squares = [image.square for image in images if image.square is not None]
    raw = [image.rgb for image in images if image.rgb is not None]
    return CheckImages(squares, [None] * len(squares), [""] * len(squares), raw)


def load_labelled(root: Path, size: int, most: int = 300) -> CheckImages:
    """Labelled test images of a data set folder, spread evenly over classes and labels.

    Raises:
        DataError: no labelled test images of both kinds.
    """
    samples = [s for s in load(root).samples if s.split == "test" and s.label is not None]
    halves = [[s for s in samples if s.label == label] for label in (0, 1)]
    if not all(halves):
        raise DataError(f"{root}: no labelled test images of both kinds (good and bad); give good ones with --images")
    chosen = [s for half in halves for s in spread(half, most // 2)]
    raw = [read_sample_rgb(s) for s in chosen[:4]]
    squares = [resize_rgb(read_sample_rgb(s, draft_side=size), size) for s in chosen]
    return CheckImages(squares, [s.label for s in chosen], [s.class_name for s in chosen], raw)


def painted(size: int, count: int = FEWEST, seed: int = 0) -> CheckImages:
    """Painted parts, for exports without any images at hand; every second one with a defect."""
    rng = np.random.default_rng(seed)
    squares = [part(i, rng, size) for i in range(count)]
    squares = [damaged(one, [spot(rng, size)]) if i % 2 else one for i, one in enumerate(squares)]
    raw = [part(i, rng, size * 2)[: size + 17 * (i + 1)] for i in range(4)]
    return CheckImages(squares, [None] * count, [""] * count, raw, synthetic=True)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of the items, evenly over their order."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]
