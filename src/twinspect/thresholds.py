"""The thresholds of a decision as a table for people, with one sentence on what they are worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from twinspect.decision import Decision, promises
from twinspect.report import Table
from twinspect.results import text_table
from twinspect.rules import ALL, LABELS, OWN, SESSIONS, SMALL, TAIL, Rule

MOST_LINES = 8  # classes up to which every threshold is printed; twinspect info lists them all

# What a rule is worth, by its name in the table; the order is from most to least.
_WORTH = {
    OWN: "at most the budget on average, whatever the scores look like",
    SESSIONS: "at most the budget on average in every session with images enough",
    SMALL: "at most the budget over these classes together, for each alone it is a model",
    ALL: "too few images to say; a model",
    TAIL: "about the budget if its scores end like an exponential, a model and no promise",
    LABELS: "as few as among the labelled images at best, no promise",
}
_TOO_FEW = "too few images to promise the budget"


def threshold_table(decision: Decision) -> Table:
    """One row a class: good images, budget, threshold, the rule that decided it, and good images it calls bad."""
    found = list(promises(decision))
    third = any(rule.unsure is not None for _, rule in found)
    columns = (
        "class",
        "good images",
        "budget",
        *(("unsure from",) if third else ()),
        "threshold",
        "rule",
        "called bad",
    )
    rows = []
    for name, rule in found:
        images, called = own_counts(decision, rule)
        unsure = (rule.unsure.value if rule.unsure is not None else "-",) if third else ()
        budget = "-" if rule.basis == LABELS else f"{100 * rule.image.max_fpr:g} %"
        rows.append((name, images, budget, *unsure, rule.image.value, rule.basis, called))
    return Table("Thresholds by class", columns, tuple(rows), _worth(decision))


def own_counts(decision: Decision, rule: Rule) -> tuple[int, int]:
    """Good images of a rule's class, and how many of them its threshold calls bad."""
    own = decision.good.of_class(rule.class_name, given=True)
    return int(own.sum()), int((decision.good.score[own] >= rule.image.value).sum())


def _worth(decision: Decision) -> str:
    """One sentence: what the rules in the table say about the next good images, taken like these."""
    rules = [rule for _, rule in promises(decision)]
    few = any(rule.basis == OWN and not rule.image.guaranteed for rule in rules)
    said = {**_WORTH, OWN: _TOO_FEW} if few else _WORTH
    parts = [f"{name}: {text}" for name, text in said.items() if name in {rule.basis for rule in rules}]
    return f"Of the next good images taken like these, called bad by the rule {'; '.join(parts)}."


def threshold_lines(decision: Decision, most: int = MOST_LINES) -> Iterator[str]:
    """The table for the terminal, what it is worth, and what thresholds chosen on labels were chosen by.

    Of more than ``most`` rows only the last is shown, which is for all classes together.
    """
    table = threshold_table(decision)
    if len(table.rows) > most:
        title = f"threshold for {len(table.rows) - 1} classes (each: twinspect info)"
        table = dataclasses.replace(table, title=title, rows=table.rows[-1:])
    yield from text_table(table)
    yield table.note
    for name, rule in promises(decision):
        if rule.basis == LABELS:
            yield f"{name}: {rule.image.sentence}"
