"""Is the exported model the model that was measured? Two runtimes side by side on the same pixels. No torch.

Gaps are relative to max(1, |reference|), for scores and for every value of the maps alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.data.painting import damaged, part, spot
from twinspect.decide.decision import Decision
from twinspect.errors import DataError, TwinspectError
from twinspect.inference.decode import decode, expand
from twinspect.inference.predictor import Runtime
from twinspect.types import Progress

Pixels = NDArray[np.uint8]
FEWEST = 32  # images that an export should be compared on
ROUNDING = 1e-4  # gap of two scores that are the same
# Precision -> largest gap of the joint score, and of any map value. Ten bits of a teacher's features move the score
# of real parts by up to 7 % at a rank correlation of 0.999.
TOLERANCES = {"fp32": (ROUNDING, 1e-3), "fp16": (0.1, 0.2)}


class ParityError(TwinspectError):
    """An export does not say what the model says."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found.

    Attributes:
        images: compared.
        synthetic: whether they were painted; their answers are not compared, as all are anomalies.
        score_gap, map_gap: largest relative gaps.
        cluster_changes: images whose nearest cluster differs.
        changed: images that got another answer from the export than from the model, by more than rounding of their
            scores.
    """

    images: int
    synthetic: bool
    score_gap: float
    map_gap: float
    cluster_changes: int
    changed: int

    def problems(self, precision: str) -> list[str]:
        """Why an export of this precision is refused; empty when it is accepted."""
        problems = [self._answers()] if self.changed else []
        gaps = (("scores", self.score_gap), ("map values", self.map_gap))
        for (what, gap), limit in zip(gaps, TOLERANCES[precision], strict=True):
            if not np.isfinite(gap):
                problems.append(f"{what} are not finite, or of another shape")
            elif gap > limit:
                problems.append(f"{what} differ by up to {gap:.2g} (accepted {limit:g})")
        return problems

    def lines(self) -> Iterator[str]:
        """What to say to people."""
        kind = "painted images (give real ones with --images)" if self.synthetic else "images"
        clusters = f", another cluster on {self.cluster_changes} images" if self.cluster_changes else ""
        yield (
            f"compared with torch on {self.images} {kind}: scores differ by up to {self.score_gap:.2g}, "
            f"map values by {self.map_gap:.2g}{clusters}"
        )
        if not self.synthetic:
            yield self._answers()
            if self.images < FEWEST:
                yield f"only {self.images} images were compared; {FEWEST} or more say more"

    def _answers(self) -> str:
        if not self.changed:
            return f"the answers for all {self.images} images are the same"
        return f"the answers for {self.changed} of {self.images} images differ"


def compare(
    reference: Runtime, export: Runtime, images: Sequence[Pixels], decision: Decision, progress: Progress
) -> Comparison:
    """Run both on the same pixels, one image at a time and three in turn.

    ``images`` are uint8 RGB of the model's size, at least 32 where the caller has them; without any some are painted.
    ``decision`` judges the scores of both.
    """
    squares = images or painted(reference.size)
    ours, theirs = list[Mapping[str, NDArray[Any]]](), list[Mapping[str, NDArray[Any]]]()
    for batch in _batches(squares):
        ours.append(reference.run(batch))
        theirs.append(export.run(batch))
        progress("comparing with torch", sum(len(out["score_B"]) for out in ours), len(squares))
    a, b = _joined(ours), _joined(theirs)
    same_cluster = a["cluster_B"] == b["cluster_B"]
    alike = same_cluster & (np.abs(a["score_B"] - b["score_B"]) <= ROUNDING * np.maximum(1.0, np.abs(a["score_B"])))
    answers = zip(_answers(a, decision), _answers(b, decision), alike, strict=True)
    changed = sum(ours != theirs and not rounded for ours, theirs, rounded in answers) if images else 0
    gaps = _gap(a["score_B"], b["score_B"]), _gap(a["map_B1HW"], b["map_B1HW"])
    return Comparison(len(squares), not images, *gaps, int((~same_cluster).sum()), changed)


def _batches(squares: Sequence[Pixels]) -> Iterator[Pixels]:
    place, count = 0, 1
    while place < len(squares):
        yield np.stack(squares[place : place + count])
        place, count = place + count, 4 - count


def _joined(outputs: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([one[name] for one in outputs]) for name in outputs[0]}


def _answers(out: Mapping[str, NDArray[Any]], decision: Decision) -> list[str]:
    distance_B = out.get("cluster_distance_B", np.full(len(out["score_B"]), np.nan))
    columns = (one.tolist() for one in (out["score_B"], out["cluster_B"], distance_B))
    return [decision.judge(*one).answer for one in zip(*columns, strict=True)]


def _gap(reference: NDArray[Any], export: NDArray[Any]) -> float:
    if reference.shape != export.shape:
        return float("inf")
    gap = np.abs(reference - export) / np.maximum(1.0, np.abs(reference))
    return float(gap.max()) if np.isfinite(gap).all() else float("inf")


def load_images(source: Any, size: int, most: int = 100) -> list[Pixels]:
    """Images (a path, folder, glob or list), spread evenly over their order when there are more than ``most``.

    Raises:
        DataError: none found, or one cannot be read.
    """
    items, squares = list(expand(source)), list[Pixels]()
    for item in items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]:
        image = decode(item, size)
        if image.square is None:
            raise DataError(image.error)
        squares.append(image.square)
    return squares


def painted(size: int, count: int = FEWEST, seed: int = 0) -> list[Pixels]:
    """Painted parts, for exports without any images at hand; every second one with a defect."""
    rng = np.random.default_rng(seed)
    squares = [part(i, rng, size) for i in range(count)]
    return [damaged(one, [spot(rng, size)]) if i % 2 else one for i, one in enumerate(squares)]
