"""The table of thresholds that ``fit``, ``calibrate`` and reports show: rows, rules, and what it says of them."""

from __future__ import annotations

import numpy as np

from twinspect.calibration import Threshold
from twinspect.decision import Decision
from twinspect.rules import Budget, GoodScores
from twinspect.thresholds import MOST_LINES, threshold_lines, threshold_table


def decision(sizes: dict[str, int], **changes: object) -> Decision:
    rng = np.random.default_rng(0)
    names = tuple(name for name, size in sizes.items() for _ in range(size))
    scale = np.array([5.0 if name.startswith("wide") else 1.0 for name in names])
    scores, unknown = scale * rng.exponential(size=len(names)), np.full(len(names), np.nan)
    good = GoodScores(scores, unknown, unknown, names, names)
    return Decision(good, tuple(sizes), (0.0, 8.0), **{"budget": Budget(0.01), **changes})


def test_every_rule_is_named_and_explained_once() -> None:
    fixed = {"labelled": Threshold(2.0, 0.1, False, "chosen")}
    made = decision({"big": 150, "wide": 40, "narrow": 80, "tiny": 5, "labelled": 120}, fixed=fixed)
    table = threshold_table(made)
    rules = {row[0]: row[-2] for row in table.rows}
    assert rules == {
        "big": "own images", "wide": "own tail", "narrow": "small classes", "tiny": "small classes",
        "labelled": "labels", "all classes": "own images",
    }  # fmt: skip
    for name in set(rules.values()):
        assert table.note.count(f"{name}: ") == 1
    assert "every class: " not in table.note
    values = dict(zip(table.columns, next(row for row in table.rows if row[0] == "wide"), strict=True))
    assert values["good images"] == 40
    assert values["budget"] == "1 %"
    assert values["called bad"] == 0
    assert values["threshold"] == made.rule("wide").image.value > made.rule("narrow").image.value
    assert list(threshold_lines(made))[-1] == "labelled: chosen"
    called = next(row for row in table.rows if row[0] == "labelled")[-1]
    assert called == int((made.good.score[made.good.of_class("labelled", given=True)] >= 2.0).sum()) > 0


def test_too_few_images_are_not_called_a_promise() -> None:
    assert "too few images to promise the budget" in threshold_table(decision({"a": 9})).note
    assert "a model and no promise" in threshold_table(decision({"a": 60})).note
    assert "whatever the scores look like" in threshold_table(decision({"a": 99})).note
    assert "every class: too few images to say" in threshold_table(decision({"a": 150, "b": 9})).note


def test_a_third_answer_has_its_column() -> None:
    table = threshold_table(decision({"a": 120}, budget=Budget(0.01, unsure=0.1)))
    assert table.columns[3:5] == ("unsure from", "threshold")
    assert table.rows[0][3] < table.rows[0][4]


def test_of_many_classes_one_row_is_printed() -> None:
    few, many = (decision({f"c{i}": 20 for i in range(count)}) for count in (MOST_LINES - 1, MOST_LINES))
    assert len(list(threshold_lines(few))) == 2 + MOST_LINES + 1
    lines = list(threshold_lines(many))
    assert len(lines) == 4
    assert lines[2].startswith("  all classes")
    assert "twinspect info" in lines[0]
