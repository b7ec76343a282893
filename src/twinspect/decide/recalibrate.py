"""New calibration images, budgets or labels into a decision; the model stays as it is. No torch.

Score images with `score_images`, then `recalibrate`. What was done, and what looks wrong, comes back as
sentences; what cannot be promised is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinspect.data.images import resize_rgb
from twinspect.data.samples import read_sample_rgb
from twinspect.decide.conformal import (
    FEWEST,
    Threshold,
    conformal_threshold,
    labelled_threshold,
    refuse_unsupported,
    suspicious_tail,
)
from twinspect.decide.decision import Decision, image_id
from twinspect.decide.rules import Budget, GoodScores
from twinspect.errors import ConfigError, DataError, listed
from twinspect.types import CALIBRATION, TEST, TRAIN, Progress, Sample

if TYPE_CHECKING:
    from twinspect.inference.predictor import Predictor

_FEWEST_LABELLED = 5  # defects, and good images, that a class needs for a threshold of its own


@dataclass(frozen=True, slots=True)
class Request:
    """What a calibration shall change; None leaves it as it is."""

    max_fpr: float | None = None  # this and the next two: see `Budget`
    unsure: float | None = None
    region_fpr: float | None = None
    class_name: str | None = None  # class of all images, and the only one whose budgets change
    by_group: bool | None = None  # whether every session must keep the budget
    add: bool = False  # keep the calibration images there are, instead of replacing those of the classes given
    rule: str = ""  # by which labelled images choose thresholds
    miss_cost: float = 1.0  # of a missed defect, where a false alarm costs 1


@dataclass(frozen=True, slots=True)
class Scored:
    """Images with scores, as calibration images are kept, and those that could not be read, with reasons."""

    rows: GoodScores
    names: tuple[str, ...]  # paths
    label_N: NDArray[np.int64]  # 1 defect, 0 good (or not known), as the data say
    failed: tuple[str, ...]


def good_samples(samples: Sequence[Sample]) -> list[Sample]:
    """Good images to calibrate with: those of the set's own calibration split, else of its training split.

    Raises:
        DataError: there are none.
    """
    normal = [s for s in samples if s.split != TEST and s.label in (0, None)]
    held = [s for s in normal if s.split == CALIBRATION]
    good = held or [s for s in normal if s.split == TRAIN]
    if not good:
        raise DataError("no good images found; give a folder of good images, or one with a folder good inside")
    return good


def score_images(
    predictor: Predictor, samples: Sequence[Sample], class_name: str | None, root: Path | None, progress: Progress
) -> Scored:
    """Score good or labelled images for calibration.

    Their class is ``class_name``; where it is None, the data's if the bundle knows it, else the predicted.
    Sub-folders of ``root`` are sessions where the data name none.

    Raises:
        ConfigError: a class that the bundle does not know.
        DataError: a score that is not finite.
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
        group, key = sample.group or session_of(sample, root), image_key(sample, predictor.runtime.size)
        rows.append((result.score, result.peak, result.cluster_distance, name, result.predicted_class, group, key))
        names.append(result.path)
        labels.append(int(sample.label == 1))
    good = GoodScores(*(zip(*rows, strict=True) if rows else [()] * 7))
    return Scored(good, tuple(names), np.array(labels, np.int64), tuple(failed))


def session_of(sample: Sample, root: Path | None) -> str:
    """The sub-folder of ``root`` that an image lies in; empty for none."""
    if root is None or not sample.image.is_relative_to(root):
        return ""
    inside = sample.image.relative_to(root).parent.as_posix()
    return "" if inside == "." else inside


def image_key(sample: Sample, size: int) -> str:
    """As the training room names an image: by its file, or by its pixels at the model's size."""
    if sample.in_file:
        return image_id(hashlib.sha256(sample.image.read_bytes()).digest())
    return image_id(hashlib.sha256(resize_rgb(read_sample_rgb(sample, draft_side=size), size).tobytes()).digest())


def recalibrate(
    decision: Decision, request: Request, scored: Scored | None = None, labelled: Scored | None = None
) -> tuple[Decision, list[str]]:
    """A new decision of the same model, and sentences on what was done and what looks wrong.

    ``scored`` are good images (None keeps those there are), ``labelled`` good and bad ones that choose thresholds.

    Raises:
        ConfigError: a budget that the number of images cannot support, or no sessions to go by.
        DataError: too few images.
    """
    decision.checked_class(request.class_name)
    notes: list[str] = []
    good, fixed = decision.good, dict(decision.fixed)
    if scored is not None:
        good = _merged(decision, _fresh(decision, scored, request.add, notes), request.add, notes)
    if len(good) < FEWEST:
        raise DataError(
            f"{len(good)} good images to calibrate with; at least {FEWEST} are needed, and a rate of 1 % takes 99"
        )
    if request.max_fpr is not None:
        for name in list(fixed):
            if request.class_name in (None, name):
                notes.append(f"{name}: its threshold from labelled images gives way to the budget")
                del fixed[name]
    if labelled is not None:
        fixed |= _fixed_thresholds(labelled, request.rule or "f1-max", request.miss_cost, notes)
    budget, budgets = _budgets(decision, request)
    by_group = decision.by_group if request.by_group is None else request.by_group
    new = dataclasses.replace(decision, good=good, budget=budget, budgets=budgets, by_group=by_group, fixed=fixed)
    _refuse_promises(new, request.class_name)
    return new, notes


_LEARNT = "the model was trained on them, so they score too well"
_COPY = "they are copies of others given"
_THERE = "they are among the calibration images already"


def _fresh(decision: Decision, scored: Scored, add: bool, notes: list[str]) -> GoodScores:
    """The new images without those the model learnt from, copies, and those that are there already."""
    rows, trained, seen = scored.rows, set(decision.trained), set[str]()
    present = set(decision.good.key) - {""} if add else set()
    if not len(rows):
        raise DataError("no image to calibrate with: none was given, or none can be read")
    reasons = []
    for key in rows.key:
        reasons.append(_LEARNT if key in trained else _COPY if key in seen else _THERE if key in present else "")
        seen.add(key)
    usable = np.array([not reason for reason in reasons])
    for reason in (_LEARNT, _COPY, _THERE):
        if count := reasons.count(reason):
            notes.append(f"{count} of {len(rows)} images left out: {reason}")
    if not usable.any():
        raise DataError(f"none of the {len(rows)} images can be used: {'; '.join(notes)}")
    notes += _suspects(rows.take(usable), [n for n, use in zip(scored.names, usable, strict=True) if use])
    return rows.take(usable)


def _merged(decision: Decision, fresh: GoodScores, add: bool, notes: list[str]) -> GoodScores:
    """The new images beside those of other classes, or beside all that are there."""
    if add:
        notes.append(f"{len(fresh)} good images added to {len(decision.good)}")
        return decision.good.join(fresh)
    before, now = Counter(decision.good.class_name), Counter(fresh.class_name)
    if others := [f"{name} ({count})" for name, count in sorted(before.items()) if name not in now]:
        notes.append(
            f"calibrated {', '.join(sorted(now))}; earlier calibration images are kept for {', '.join(others)}"
        )
    for name, count in sorted(now.items()):
        if count < before[name]:
            notes.append(f"{name}: {count} in the place of {before[name]} earlier ones; --add would keep both")
    kept = np.array([name not in now for name in decision.good.class_name], dtype=np.bool_)
    return decision.good.take(kept).join(fresh)


def _suspects(rows: GoodScores, names: Sequence[str]) -> list[str]:
    """Sentences on images among the good ones that score apart from the rest of their class."""
    sentences = []
    for class_name in sorted(set(rows.class_name)):
        at = np.flatnonzero(rows.of_class(class_name, given=True))
        odd = at[suspicious_tail(rows.score[at])]
        if len(odd):
            named = listed([f"{names[i]} ({rows.score[i]:.1f})" for i in odd])
            sentences.append(
                f"{class_name}: {len(odd)} of {len(at)} images score far above the others, as if anomalies were "
                f"among the good ones; they raise the threshold. Look at {named}, take out what is bad and "
                "calibrate again"
            )
    return sentences


def _budgets(decision: Decision, request: Request) -> tuple[Budget, Mapping[str, Budget]]:
    """Of all classes, and of single ones."""
    if (request.max_fpr, request.unsure, request.region_fpr) == (None, None, None):
        return decision.budget, decision.budgets
    base = decision.budget_of(request.class_name or "")
    if request.max_fpr is None:
        new = Budget(base.max_fpr, request.unsure or base.unsure, request.region_fpr or base.region_fpr)
    else:  # without --unsure it asks for two answers; --region-fpr follows unless it is given
        new = Budget(request.max_fpr, request.unsure, request.region_fpr or request.max_fpr)
    if request.class_name is None:
        return new, {}
    return decision.budget, {**decision.budgets, request.class_name: new}


def _refuse_promises(decision: Decision, class_name: str | None) -> None:
    """Refuse what was asked for; budgets of other classes stay, and their sentences say what they are worth."""
    budgets, good = (decision.budget, *decision.budgets.values()), decision.good
    if class_name is not None:  # a class goes by its own images
        budgets, good = (decision.budget_of(class_name),), good.take(good.of_class(class_name, True))
    for budget in budgets:
        refuse_unsupported(len(good), budget.max_fpr)
        if peaks := int(np.isfinite(good.peak).sum()):
            refuse_unsupported(peaks, budget.region_fpr, "--region-fpr")
    if decision.by_group and not sessions(decision):
        raise ConfigError(
            "--group session: no class has two sessions. Name them in a manifest's column 'group', or give one "
            "sub-folder per session together with --class NAME"
        )


def _fixed_thresholds(labelled: Scored, rule: str, miss_cost: float, notes: list[str]) -> dict[str, Threshold]:
    """Thresholds of every labelled class; one with few labels takes that of all labelled images together."""
    together = labelled_threshold(labelled.rows.score, labelled.label_N, rule, miss_cost)
    thresholds = {}
    for name in sorted(set(labelled.rows.class_name)):
        of_class = labelled.rows.of_class(name, given=True)
        labels = labelled.label_N[of_class]
        bad, good = int(labels.sum()), int((labels == 0).sum())
        if min(bad, good) >= _FEWEST_LABELLED:
            thresholds[name] = labelled_threshold(labelled.rows.score[of_class], labels, rule, miss_cost)
        else:
            thresholds[name] = together
            notes.append(
                f"{name}: {bad} defects and {good} good images are labelled, {_FEWEST_LABELLED} of each "
                "are needed for a threshold of its own; that of all labelled images is used"
            )
    notes.append("thresholds were chosen on labelled images; measure on others, or the numbers flatter")
    return thresholds


def sessions(decision: Decision) -> list[dict[str, Any]]:
    """Leave-one-session-out: every session of a class against a threshold from the other sessions.

    Returns:
        One row a session: ``class_name``, ``group``, ``images``, and how many of them would be ``called`` bad.
    """
    left_out = []
    for class_name in decision.classes:
        rows = decision.good.take(decision.good.of_class(class_name, given=True))
        names = sorted(set(rows.group) - {""})
        for name in names if len(names) > 1 else ():
            inside = np.asarray(rows.group == name)
            limit = conformal_threshold(rows.score[~inside], decision.budget_of(class_name).max_fpr).value
            called = int((rows.score[inside] >= limit).sum())
            left_out.append({"class_name": class_name, "group": name, "images": int(inside.sum()), "called": called})
    return left_out
