"""``calibrate --from-log``: what operators said moves thresholds, and what is not known is said."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from log_cases import result
from serving import decision
from typer.testing import CliRunner

from twinspect import Detector
from twinspect.bundle import read_bundle
from twinspect.cli import app
from twinspect.decide.decision import Decision
from twinspect.decide.recalibrate import recalibrate
from twinspect.errors import ConfigError, DataError
from twinspect.server.log import Inspection, InspectionLog, label_of, learn, milliseconds


def fill(log: InspectionLog, scores, model_id: str = "bright", start: int = 0, class_name: str = "part") -> list[int]:
    """Decisions with a threshold of 2.6; every image its own."""
    rows = [
        Inspection(
            result(f"{start + n}.png", "anomaly" if s >= 2.6 else "good", float(s), model_id=model_id,
                   class_name=class_name, cluster_distance=1.0),
            f"{start + n:016x}", "bright", "r", f"shift-{n % 2}", 1_000_000 + start + n,
        )
        for n, s in enumerate(scores)
    ]  # fmt: skip
    return log.append(rows)


def test_few_images_in_the_place_of_many_are_spoken_of(log: InspectionLog) -> None:
    before = decision(classes=("part", "lid"))  # 60 images each
    fill(log, [1.5, 1.6])
    _, notes = recalibrate(before, learn(log, before)[0], max_fpr=0.05)
    assert "part: 2 in the place of 60 earlier ones; --add would keep both" in notes
    _, notes = recalibrate(before, learn(log, before)[0], max_fpr=0.05, add=True)
    assert not any("in the place of" in note for note in notes)


@pytest.mark.parametrize(
    ("answer", "feedback", "label"),
    [
        ("good", "", 0), ("good", "confirmed", 0), ("good", "missed", 1), ("anomaly", "", None),
        ("anomaly", "confirmed", 1), ("anomaly", "false_alarm", 0), ("unsure", "", None),
        ("unsure", "confirmed", None), ("unsure", "missed", 1), ("unsure", "false_alarm", 0),
    ],
)  # fmt: skip
def test_what_answer_and_feedback_say_together(answer: str, feedback: str, label: int | None) -> None:
    assert label_of(answer, feedback) == label


def test_false_alarms_raise_the_threshold_until_the_promise_holds(log: InspectionLog) -> None:
    """A shifted line: one good image in four is called bad; operators say so; the new threshold keeps the budget."""
    rng = np.random.default_rng(1)
    before = decision()
    limit = before.rule("part").image.value
    good = rng.uniform(1.4, 3.0, 400)
    numbers = fill(log, good)
    for number, score in zip(numbers, good, strict=True):
        if score >= 2.6:
            log.give_feedback(number, "false_alarm")
    false_alarms_too, _, _ = learn(log, before)
    assert len(false_alarms_too.rows) == 400
    after, notes = recalibrate(before, false_alarms_too)
    new = after.rule("part").image.value
    assert not any("--add" in note for note in notes)  # 400 images replace 120
    fresh = rng.uniform(1.4, 3.0, 20_000)
    assert (fresh >= limit).mean() > 0.2
    assert new > limit
    assert (fresh >= new).mean() < 0.02


def test_misses_are_not_taken_for_good_and_labels_can_choose(log: InspectionLog) -> None:
    good, bad = fill(log, np.linspace(1.0, 2.0, 120)), fill(log, np.linspace(2.2, 2.5, 20), start=200)
    for number in bad:
        log.give_feedback(number, "missed")
    found, labelled, _ = learn(log, decision())
    assert len(found.rows) == len(good)
    assert labelled.label_N.sum() == len(bad)
    after, _ = recalibrate(decision(), found, labelled, rule="zero-miss")
    assert 2.0 < after.rule("part").image.value < 2.2


def test_alarms_without_feedback_are_left_out_and_the_price_is_said(log: InspectionLog) -> None:
    fill(log, [*np.linspace(1.0, 2.0, 90), *np.linspace(3.0, 4.0, 10)])
    good, _, notes = learn(log, decision())
    assert len(good.rows) == 90
    assert "10 alarms without feedback" in notes[1]
    assert "10 percentage points" in notes[1]


def test_rows_of_other_models_times_and_classes_do_not_count(log: InspectionLog) -> None:
    fill(log, [1.0] * 3, model_id="other")
    fill(log, [1.1] * 4, start=10)
    fill(log, [1.2] * 5, start=20, class_name="nut")
    both = decision(classes=("part", "nut"))
    assert len(learn(log, both)[0].rows) == 9
    assert len(learn(log, both, class_name="nut")[0].rows) == 5
    assert len(learn(log, both, since="1970-01-01T00:16:40.015+00:00")[0].rows) == 5
    with pytest.raises(DataError, match="no good image of this model"):
        learn(log, decision(model_id="third"))
    with pytest.raises(ConfigError, match="unknown class"):
        learn(log, both, class_name="bolt")


def test_times() -> None:
    assert milliseconds("") is None
    assert milliseconds("1970-01-01T00:00:01+00:00") == 1000
    for wrong in ("yesterday", "2026-13-01", "9" * 40):
        with pytest.raises(ConfigError, match="--since"):
            milliseconds(wrong)


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def saved(quick: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick.save(tmp_path_factory.mktemp("learn") / "parts.twin")


def calibrate(bundle: Path, *options: str):
    return CliRunner().invoke(app, ["calibrate", str(bundle), *options])


def test_command_writes_a_bundle_with_the_logs_images(saved: Path, log: InspectionLog, tmp_path: Path) -> None:
    before = Decision.from_dict(read_bundle(saved).meta["decision"])
    name = before.classes[0]
    scores = np.random.default_rng(0).uniform(5, 9, 120)
    numbers = fill(log, scores, model_id=before.model_id, class_name=name)
    for number in numbers:
        log.give_feedback(number, "false_alarm") if scores[number - 1] >= 2.6 else None
    out = tmp_path / "new.twin"
    file = log.described.removeprefix("sqlite:///")
    found = calibrate(saved, "--from-log", file, "--class", name, "--max-fpr", "0.01", "--out", str(out))
    assert found.exit_code == 0, found.output
    after = Decision.from_dict(read_bundle(out).meta["decision"])
    rule = after.rule(name)
    assert rule.image.guaranteed
    assert len(rule.scores) == 120
    assert 5 < rule.image.value < 9.01
    assert after.model_id == before.model_id
    assert not math.isnan(after.good.distance[-1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--from-log", "none.db"), "no such inspection log"),
        (("GOOD", "--from-log", "x.db"), "leave GOOD and --labels out"),
        (("--since", "2026-01-01"), "no effect without --from-log"),
        (("--from-log", "mysql://x/y"), "cannot be used|accepted sqlite or postgresql"),
    ],
)
def test_command_refuses_what_makes_no_sense(saved: Path, options: tuple[str, ...], said: str) -> None:
    found = calibrate(saved, *options)
    assert found.exit_code == 2
    assert any(word in found.output for word in said.split("|")), found.output
