"""The drift light of one served model: a monitor that several threads may ask, and that a restart does not reset."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from twinspect.decision import Decision
from twinspect.drift import NONE, Alarm, DriftMonitor
from twinspect.inference.result import Result


class DriftLight:
    """Watches the results of one model.

    Args:
        decision: of the bundle; its calibration images are what is compared with.
        rate: largest chance of any false alarm, ever.
        kept: state of an earlier run with the same `fingerprint`.
    """

    def __init__(self, decision: Decision, rate: float, kept: Mapping[str, Any] | None = None) -> None:
        self._decision, self._rate, self._lock = decision, rate, threading.Lock()
        self.fingerprint = fingerprint(decision, rate)
        self._monitor = DriftMonitor.from_dict(decision.good, kept) if kept else DriftMonitor(decision.good, rate)

    def watch(self, results: Sequence[Result]) -> list[Alarm]:
        """Show results to the monitor; alarms they raised."""
        with self._lock:
            return [
                alarm
                for one in results
                if not one.error
                for alarm in self._monitor.update(one.score, one.predicted_class, one.cluster_distance)
            ]

    @property
    def alarmed(self) -> bool:
        """Whether any alarm was raised since the last reset."""
        with self._lock:
            return bool(self._monitor.alarms)

    def report(self) -> dict[str, Any]:
        """What the monitor says, with a light: ``green`` or ``red``, ``grey`` before the first image."""
        # From a copy, so that results are watched while this looks at thousands of scores.
        found = DriftMonitor.from_dict(self._decision.good, self.state()).report().to_dict()
        light = "grey" if not found["images"] else "green" if found["kind"] == NONE else "red"
        return {"light": light, **found}

    def reset(self) -> None:
        """Start again, after the cause was found and put right."""
        with self._lock:
            self._monitor = DriftMonitor(self._decision.good, self._rate)

    def state(self) -> dict[str, Any]:
        """Plain values for JSON."""
        with self._lock:
            return self._monitor.to_dict()


def fingerprint(decision: Decision, rate: float) -> str:
    """The same only for the same calibration images and rate."""
    text = json.dumps([decision.model_id, rate, decision.good.to_dict()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
