"""New calibration images, budgets or labels into a decision; the model stays as it is. No torch.

Score images with `score_images`, then `recalibrate`. What was done, and what looks wrong, comes back as
sentences; what cannot be promised is refused.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinspect.data.images import file_bytes, resize_rgb
from twinspect.data.samples import read_sample_rgb
from twinspect.decide.decision import (
    FEWEST,
    Budget,
    Decision,
    GoodScores,
    Threshold,
    conformal_threshold,
    image_id,
    labelled_threshold,
    odd_images,
    refuse_unsupported,
)
from twinspect.errors import ConfigError, DataError
from twinspect.types import CALIBRATION, Progress, Sample

if TYPE_CHECKING:
    from twinspect.inference.predictor import Predictor

_FEWEST_LABELLED = 5  # defects, and good images, that a class needs for a threshold of its own


@dataclass(frozen=True, slots=True)
class Scored:
    """Images with scores, as calibration images are kept, and those that could not be read, with reasons."""

    rows: GoodScores
    names: tuple[str, ...]  # paths
    label_N: NDArray[np.int64]  # 1 defect, 0 good (or not known), as the data say
    failed: tuple[str, ...]


def good_samples(samples: Sequence[Sample]) -> list[Sample]:
    """Good images to calibrate with: those of the set's own calibration split, else of its training split."""
    good = [s for s in samples if s.is_good]
    good = [s for s in good if s.split == CALIBRATION] or good
    if not good:
        raise DataError("no good images found; give a folder of good images, or one with a folder good inside")
    return good


def score_images(
    predictor: Predictor, samples: Sequence[Sample], class_name: str | None, progress: Progress
) -> Scored:
    """Score good or labelled images for calibration.

    Their class is ``class_name``; where it is None, the data's if the bundle knows it, else the predicted.
    A score that is not finite raises a DataError.
    """
    known = set(predictor.decision.classes)
    rows, names, labels, failed = [], [], [], []
    results = predictor.predict(list(samples), maps=False, pixels=False, class_name=class_name)
    for done, (sample, result) in enumerate(zip(samples, results, strict=True)):
        progress("scoring", done + 1, len(samples))
        if result.error and result.width:
            raise DataError(result.error)  # it was read, but its score is not finite
        if result.error:
            failed.append(result.error)
            continue
        name = class_name or (sample.class_name if sample.class_name in known else result.predicted_class)
        key = key_of(sample, predictor.runtime.size)
        numbers = (result.score, result.peak, result.cluster_distance)
        rows.append((*numbers, name, result.predicted_class, sample.group, key))
        names.append(result.path)
        labels.append(int(sample.label == 1))
    good = GoodScores(*(zip(*rows, strict=True) if rows else [()] * 7))
    return Scored(good, tuple(names), np.array(labels, np.int64), tuple(failed))


def key_of(sample: Sample, size: int) -> str:
    """Name of an image as training gives it: by its file, or by its pixels at the model's size."""
    if sample.in_file:
        return image_id(hashlib.sha256(file_bytes(sample.image)).digest())
    return image_id(hashlib.sha256(resize_rgb(read_sample_rgb(sample, draft_side=size), size).tobytes()).digest())


def recalibrate(
    decision: Decision,
    scored: Scored | None = None,
    labelled: Scored | None = None,
    max_fpr: float | None = None,
    unsure: float | None = None,
    class_name: str | None = None,
    add: bool = False,
    rule: str = "f1-max",
    miss_cost: float = 1.0,
) -> tuple[Decision, list[str]]:
    """A new decision of the same model, and sentences on what was done and what looks wrong.

    Args:
        decision: that of now; None for any of the others leaves that as it is.
        scored: good images.
        labelled: good and bad images that choose thresholds.
        max_fpr: see `Budget`.
        unsure: see `Budget`.
        class_name: the only class whose budgets change.
        add: keep the calibration images there are, instead of replacing those of the classes given.
        rule: by which labelled images choose.
        miss_cost: of a missed defect, where a false alarm costs 1.

    Raises:
        ConfigError: a budget that so few images cannot support.
        DataError: too few images.
    """
    decision.checked_class(class_name)
    notes: list[str] = []
    good, fixed = decision.good, dict(decision.fixed)
    if scored is not None:
        good = _with_new(decision, scored, add, notes)
    if len(good) < FEWEST:
        raise DataError(
            f"{len(good)} good images to calibrate with; at least {FEWEST} are needed, and a rate of 1 % takes 99"
        )
    if max_fpr is not None:
        for name in [name for name in fixed if class_name in (None, name)]:
            notes.append(f"{name}: its threshold from labelled images gives way to one from good images")
            del fixed[name]
    if labelled is not None:
        fixed |= _fixed_thresholds(labelled, rule, miss_cost, notes)
    after = replace(decision, good=good, fixed=fixed)
    if max_fpr is not None or unsure is not None:
        # A rate without --unsure asks for two answers.
        new = Budget(max_fpr if max_fpr is not None else decision.budget_of(class_name or "").max_fpr, unsure)
        if class_name is None:
            after = replace(after, budget=new, budgets={})
        else:
            after = replace(after, budgets={**decision.budgets, class_name: new})
    if class_name is None:
        budgets = [after.budget, *after.budgets.values()]
    else:  # budgets of other classes stay, and their sentences say what they are worth
        budgets, good = [after.budget_of(class_name)], good.take(good.of_class(class_name))
    try:
        for budget in budgets:
            refuse_unsupported(len(good), budget.max_fpr, "--unsure" if budget.unsure else "--max-fpr")
    except ConfigError as error:  # images that were left out may be why there are too few
        raise ConfigError("; ".join([str(error), *notes])) from None
    if scored is not None:
        notes += _odd_images(after, scored)
    return after, notes


def _odd_images(decision: Decision, scored: Scored) -> Iterator[str]:
    """What looks like an anomaly among the calibration images of the classes that ``scored`` images are of."""
    names = dict(zip(scored.rows.key, scored.names, strict=True))
    for class_name in sorted(set(scored.rows.class_name)):
        good = decision.good.take(decision.good.of_class(class_name))
        known = [names.get(key, "an earlier image") for key in good.key]
        if text := odd_images(class_name, good.score, known, decision.rule(class_name).image.value)[0]:
            yield f"{text}. Take out what is bad and calibrate again"


def _with_new(decision: Decision, scored: Scored, add: bool, notes: list[str]) -> GoodScores:
    """The new images beside those of other classes, or beside all that are there.

    Images that the model learnt from, copies, and those that are there already are left out.
    """
    learnt, copy = "the model was trained on them, so they score too well", "they are copies of others given"
    there, old = "they are among the calibration images already", decision.good
    again = dict.fromkeys(set(old.key) - {""} if add else (), there)
    reasons, at = Counter[str](), list[int]()
    for place, key in enumerate(scored.rows.key):
        reason = learnt if key in decision.trained else again.get(key, "")
        again.setdefault(key, copy)
        reasons[reason] += 1
        at += [] if reason else [place]
    new = scored.rows.take(np.array(at, np.intp))
    total = len(scored.rows)
    notes += [f"{reasons[why]} of {total} images left out: {why}" for why in (learnt, copy, there) if reasons[why]]
    if not at:
        raise DataError(f"no image to calibrate with: {'; '.join(notes) or 'none was given, or none can be read'}")
    if add:
        notes.append(f"{len(new)} good images added to {len(old)}")
        return old.join(new)
    before, now = Counter(old.class_name), Counter(new.class_name)
    if others := sorted(before.keys() - now.keys()):
        notes.append(f"calibrated {', '.join(sorted(now))}; the images of {', '.join(others)} stay as they are")
    for name, count in sorted(now.items()):
        if count < before[name]:
            notes.append(f"{name}: {count} in the place of {before[name]} earlier ones; --add would keep both")
    return old.take(np.array([name not in now for name in old.class_name], dtype=np.bool_)).join(new)


def _fixed_thresholds(labelled: Scored, rule: str, miss_cost: float, notes: list[str]) -> dict[str, Threshold]:
    """Thresholds of every labelled class; one with few labels takes that of all labelled images together."""
    rows, labels = labelled.rows, labelled.label_N
    together = labelled_threshold(rows.score, labels, rule, miss_cost)
    thresholds = {}
    for name in sorted(set(rows.class_name)):
        of_class = rows.of_class(name)
        bad, good = int((labels[of_class] == 1).sum()), int((labels[of_class] == 0).sum())
        thresholds[name] = together
        if min(bad, good) >= _FEWEST_LABELLED:
            thresholds[name] = labelled_threshold(rows.score[of_class], labels[of_class], rule, miss_cost)
        else:
            notes.append(
                f"{name}: {bad} defects and {good} good images are labelled, {_FEWEST_LABELLED} of each "
                "are needed for a threshold of its own; that of all labelled images is used"
            )
    notes.append("thresholds were chosen on labelled images; measure on others, or the numbers flatter")
    return thresholds


def sessions(decision: Decision) -> list[dict[str, Any]]:
    """Leave-one-session-out: how many images of a session a threshold from the others would call bad; a row each."""
    rows: list[dict[str, Any]] = []
    for class_name in decision.classes:
        good = decision.good.take(decision.good.of_class(class_name))
        names = sorted(set(good.group) - {""})
        for name in names if len(names) > 1 else ():
            score, others = good.score[good.group == name], good.score[good.group != name]
            called = int((score >= conformal_threshold(others, decision.budget_of(class_name).max_fpr).value).sum())
            row = {"session": f"{class_name}: {name}", "good images": len(score), "called bad": called}
            rows.append({**row, "rate": called / len(score)})
    return rows
