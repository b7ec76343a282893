"""Calibration images out of the inspection log: decisions, and what operators said about them.

Good are images that were called good and not reported as missed, and false alarms. Bad are reported misses and
confirmed alarms. An alarm without feedback is neither: it is left out, and counted, because leaving out good
images with high scores makes thresholds too low.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from twinspect.decide.conformal import GoodScores
from twinspect.decide.decision import GOOD, UNSURE, Decision
from twinspect.decide.recalibrate import Scored
from twinspect.errors import ConfigError, DataError
from twinspect.server.log import CONFIRMED, FALSE_ALARM, MISSED, InspectionLog


@dataclass(frozen=True, slots=True)
class Logged:
    """Good images of a log; good and bad ones; and sentences on what was left out."""

    good: Scored
    labelled: Scored
    notes: tuple[str, ...]


def learn(log: InspectionLog, decision: Decision, since: str = "", class_name: str | None = None) -> Logged:
    """Good and bad images of a log, without looking at a picture again.

    Rows of other models than the decision's are left out, as their scores cannot be compared, and those from before
    ``since``, an ISO date or time (local where it names no zone).

    Raises:
        ConfigError: not a time, or an unknown class.
        DataError: no good image in it.
        LogError: the log cannot be read.
    """
    decision.checked_class(class_name)
    labelled: dict[int | None, list[Mapping[Any, Any]]] = {0: [], 1: [], None: []}
    for row in log.scan(decision.model_id, milliseconds(since)):
        if class_name in (None, row["class_name"]) and row["score"] is not None:
            labelled[label_of(row["answer"], row["feedback"])].append(row)
    good, bad, unknown = labelled[0], labelled[1], len(labelled[None])
    if not good:
        raise DataError(
            f"{log.described} holds no good image of this model (id {decision.model_id}) among "
            f"{len(bad) + unknown} decisions that fit; score some with: twinspect serve BUNDLE"
        )
    notes = [f"{len(good)} good and {len(bad)} bad images from the log"]
    if unknown:
        points = 100 * unknown / (len(good) + unknown)
        notes.append(
            f"{unknown} alarms without feedback are left out; were all of them false alarms, their rate could be "
            f"up to {points:.2g} percentage points above the promise: give feedback on the page and calibrate again"
        )
    return Logged(_scored(good, []), _scored(good, bad), tuple(notes))


def label_of(answer: str, feedback: str) -> int | None:
    """0 for a good image, 1 for a bad one, None for nobody knows."""
    if feedback == FALSE_ALARM:
        return 0
    if feedback == MISSED:
        return 1
    if answer == GOOD:
        return 0
    return 1 if feedback == CONFIRMED and answer != UNSURE else None


def milliseconds(text: str) -> int | None:
    """An ISO date or time as UTC milliseconds; None for an empty text."""
    if not text:
        return None
    try:
        return int(datetime.fromisoformat(text).timestamp() * 1000)
    except (ValueError, OverflowError, OSError):
        raise ConfigError(f"--since {text!r}: accepted a date or time such as 2026-11-22T06:00") from None


def _scored(good: Sequence[Mapping[Any, Any]], bad: Sequence[Mapping[Any, Any]]) -> Scored:
    rows = [*good, *bad]
    names = ("score", "peak", "cluster_distance", "class_name", "predicted_class", "session", "image_key")
    columns: list[Any] = [[row[name] for row in rows] for name in names]
    labels = np.repeat([0, 1], [len(good), len(bad)])
    return Scored(GoodScores(*columns), tuple(row["name"] for row in rows), labels, ())
