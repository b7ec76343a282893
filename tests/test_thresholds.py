"""The table of thresholds that ``fit``, ``calibrate`` and reports show: rows, rules, and what it says of them."""

from __future__ import annotations

import numpy as np

from twinspect.commands.calibrate import threshold_section
from twinspect.commands.evaluate import cautions
from twinspect.decide.decision import Budget, Decision, GoodScores, Threshold


def decision(sizes: dict[str, int], **changes: object) -> Decision:
    rng = np.random.default_rng(0)
    names = tuple(name for name, size in sizes.items() for _ in range(size))
    scale = np.array([5.0 if name.startswith("wide") else 1.0 for name in names])
    scores, unknown = scale * rng.exponential(size=len(names)), np.full(len(names), np.nan)
    good = GoodScores(scores, unknown, unknown, names, names, ("",) * len(names), ("",) * len(names))
    return Decision(good, tuple(sizes), (0.0, 8.0), **{"budget": Budget(0.01), **changes})


def rows_of(made: Decision) -> dict[str, dict[str, object]]:
    (table,) = threshold_section(made).tables
    return {str(row[0]): dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_every_class_has_its_own_threshold_and_says_how_often_it_is_wrong() -> None:
    fixed = {"labelled": Threshold(2.0, 0.1, False, "chosen")}
    made = decision({"big": 150, "wide": 40, "tiny": 5, "labelled": 120}, fixed=fixed)
    rows = rows_of(made)
    assert {name: row["false alarms"] for name, row in rows.items()} == {
        "big": "about 1 %", "wide": "about 1 in 41", "tiny": "about 1 in 6",
        "labelled": "chosen on labelled images", "all classes": "about 1 %",
    }  # fmt: skip
    assert {name: row["good images"] for name, row in rows.items()} == {
        "big": 150, "wide": 40, "tiny": 5, "labelled": 120, "all classes": 315
    }  # fmt: skip
    assert (rows["big"]["called bad"], rows["wide"]["called bad"], rows["tiny"]["called bad"]) == (0, 0, 0)
    assert rows["wide"]["threshold"] == made.rule("wide").image.value > made.rule("big").image.value
    called = rows["labelled"]["called bad"]
    assert called == int((made.good.score[made.good.of_class("labelled", given=True)] >= 2.0).sum()) > 0
    lines = list(threshold_section(made).lines())
    assert lines[0] == "labelled: chosen"
    assert threshold_section(made).tables[0].note in lines


def test_a_class_without_images_has_no_promise_of_its_own() -> None:
    unseen = Decision(decision({"a": 240}).good, ("a", "new"), (0.0, 8.0), Budget(0.01))
    assert rows_of(unseen)["new"]["false alarms"] == "unknown: no good image of this class"


def test_a_third_answer_has_its_column() -> None:
    (table,) = threshold_section(decision({"a": 120}, budget=Budget(0.01, unsure=0.1))).tables
    assert table.columns[2:4] == ("unsure from", "threshold")
    assert table.rows[0][2] < table.rows[0][3]


def test_every_class_has_its_row() -> None:
    lines = list(threshold_section(decision({f"c{i}": 20 for i in range(12)})).lines())
    assert [line.split()[0] for line in lines[2:14]] == sorted(f"c{i}" for i in range(12))
    assert lines[14].startswith("  all classes")


def test_eval_says_what_to_do_about_thresholds_that_do_not_keep_to_their_promise() -> None:
    def row(found: int, alarms: int, good: int = 50) -> dict[str, float]:
        return {"defects": 20, "found": found, "found_rate": found / 20, "good": good, "false_alarms": alarms}

    fixed = {"hand": Threshold(2.0, 0.0, False, "set by hand")}
    made = decision({name: 150 for name in ("fine", "moved", "high", "hard", "hand")}, fixed=fixed)
    found = {"fine": row(15, 3), "moved": row(15, 4), "high": row(4, 0), "hard": row(4, 0)}
    found |= {"hand": row(15, 40), "other": row(0, 50)}
    auroc = {"fine": 0.95, "moved": 0.95, "high": 0.93, "hard": 0.7, "hand": 0.95, "other": 0.95}
    values = {"decisions": found, "classes": {name: {"image_auroc": area} for name, area in auroc.items()}}
    moved, high = cautions(values, made)
    assert moved.startswith("moved: 4 of 50 good images are called bad, and about 1 % were expected")
    assert "twinspect update MODEL GOOD/ --class moved" in moved
    assert high.startswith("high: 4 of 20 defects are found, though most score above good images (AUROC 0.93)")
