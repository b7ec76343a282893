"""The thresholds of a decision as a table for people, with one sentence on what they are worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from twinspect.commands.results import text_table
from twinspect.decision import Decision, promises
from twinspect.report import Table
from twinspect.rules import EVERY, HAND, LABELS, SESSIONS, Rule

MOST_LINES = 8  # classes up to which every threshold is printed; twinspect info lists them all


def threshold_table(decision: Decision) -> Table:
    """One row a class: good images, threshold, false alarms to expect, and good images that it calls bad."""
    found = list(promises(decision))
    third = any(rule.unsure is not None for _, rule in found)
    columns = (
        "class",
        "good images",
        *(("unsure from",) if third else ()),
        "threshold",
        "false alarms",
        "called bad",
    )
    rows = []
    for name, rule in found:
        images, called = own_counts(decision, rule)
        unsure = (rule.unsure.value if rule.unsure is not None else "-",) if third else ()
        rows.append((name, images, *unsure, rule.image.value, false_alarms(rule), called))
    return Table("Thresholds by class", columns, tuple(rows), _NOTE)


def false_alarms(rule: Rule) -> str:
    """Share of the next good images that will be called bad, as far as the images behind a rule can say."""
    if rule.basis == LABELS:
        return "chosen on labelled images"
    if rule.basis == HAND:
        return HAND
    if rule.basis == EVERY:
        return "unknown: no good image of this class"
    if rule.images == 1:
        return "unknown: one good image"
    share = f"{100 * rule.image.max_fpr:g} %" if rule.image.guaranteed else f"1 in {rule.images + 1}"
    return f"at most {share} in every session" if rule.basis == SESSIONS else f"about {share}"


_NOTE = (
    "false alarms: share of the next good images, taken like these, that will be called bad. called bad: how many of "
    "the good images here the threshold calls bad."
)


def own_counts(decision: Decision, rule: Rule) -> tuple[int, int]:
    """Good images of a rule's class, and how many of them its threshold calls bad."""
    own = decision.good.of_class(rule.class_name, given=True)
    return int(own.sum()), int((decision.good.score[own] >= rule.image.value).sum())


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
