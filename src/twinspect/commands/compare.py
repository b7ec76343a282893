"""``twinspect compare``: two models on the same labelled images. What differs, and whether that may be luck."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.commands.evaluate import TestSet, choose_test, has_learnt, problems
from twinspect.commands.options import CompareOptions
from twinspect.commands.results import check_outputs, publish, read_data, say_tables
from twinspect.console import NOTHING_SCORED, Console
from twinspect.evaluation import Evaluation, evaluate
from twinspect.inference.predictor import Predictor
from twinspect.inference.runtimes import is_export, load_predictor
from twinspect.metrics import auroc
from twinspect.report import Case, Cases, Section, Table, case_of

_SHOWN = 24  # pictures, those that the models differ on most
Rows = Mapping[str, Mapping[str, Any]]  # of a model's results, by path
Pair = tuple[Rows, Rows]


def compare(options: CompareOptions, console: Console) -> None:
    """Score the test images with both models, say what differs and write it where asked.

    Raises:
        SystemExit: 1, where no image could be scored by both.
    """
    check_outputs(options.report, options.json_file)
    paths = (options.first, options.second)
    predictors = [load_predictor(path, device=options.device) for path in paths]
    loaded = read_data(options.data, options.layout, options.images, console)
    test = choose_test(loaded, options.split, options.seed, predictors)
    console.say(test.describe())
    measured = []
    for path, predictor in zip(paths, predictors, strict=True):
        if seen := sum(has_learnt(predictor, sample) for sample in test.samples):
            console.warn(f"{path.name} has learnt {seen} of the test images, which flatters it")
        console.say(f"scoring with {path.name}")
        measured.append(evaluate(predictor, test.samples, console.progress, pooled=test.pooled))
    values = as_values(options, test, measured)
    for line in problems(values, 2 * _SHOWN):
        console.warn(line)
    for table in tables(values):
        say_tables([table], console)
        if table.note:
            console.say(table.note)
    facts = {"data": f"{test.name} [{test.hash}]", "test images": f"{values['images']}", "seed": f"{options.seed}"}

    def shown(pictures: bool) -> list[Section]:
        return sections(values, _pictures(values, predictors, test) if pictures else ())

    publish(options, f"{paths[0].name} and {paths[1].name}", facts, values, shown, console)
    if not values["images"]:
        raise SystemExit(NOTHING_SCORED)


def as_values(options: CompareOptions, test: TestSet, measured: Sequence[Evaluation]) -> dict[str, Any]:
    """Everything found, ready for JSON; ``first`` and ``second`` are the models in the order they were given."""
    rows = ({row["path"]: row for row in measured[0].rows}, {row["path"]: row for row in measured[1].rows})
    both = [path for path in rows[0] if path in rows[1]]
    models = {
        key: {
            "file": str(path), "model_id": next((row["model_id"] for row in one.rows), ""),
            "mb": round(size_of(path) / 1e6, 2), "images_per_s": round(len(one.rows) / max(one.seconds, 1e-9), 2),
            "model_ms": round(median(row["ms"] for row in one.rows), 2) if one.rows else None,
            "mean": one.table["mean"], "classes": one.table["classes"], "decisions": one.decisions,
        }
        for key, path, one in zip(("first", "second"), (options.first, options.second), measured, strict=True)
    }  # fmt: skip
    return {
        **models,
        "images": len(both),
        "split": {"name": test.name, "hash": test.hash},
        "auroc_difference": auroc_difference(rows, both, test.pooled, options.draws, options.seed),
        "decisions": _decisions(rows, both),
        "differ": _differing(rows, both),
        "failed": sorted({line for one in measured for line in one.failed}),
        "masks_not_used": sorted({line for one in measured for line in one.masks}),
    }


def auroc_difference(rows: Pair, paths: Sequence[str], pooled: str, draws: int, seed: int) -> dict[str, Any]:
    """Image AUROC of the second model less that of the first, by class and their mean, with bootstrap intervals.

    Paired: a draw takes the same images for both, good ones and defects of every class each with replacement.

    Returns:
        Class (and ``mean``) -> ``first``, ``second``, ``difference``, ``low`` and ``high`` (95 %), and
        ``other_sign``, the share of draws in which the difference has the other sign (and half of those in which
        there is none). Empty where no class has both labels.
    """
    members: dict[str, list[str]] = {}
    for path in paths:
        members.setdefault(pooled or rows[0][path]["true_class"], []).append(path)
    rng, drawn = np.random.default_rng(seed), []
    exact: dict[str, list[float]] = {}
    for name, paths_of_class in sorted(members.items()):
        label = np.array([rows[0][path]["label"] for path in paths_of_class])
        if len(set(label.tolist())) < 2:
            continue
        score = np.array([[one[path]["score"] for path in paths_of_class] for one in rows])
        exact[name] = [auroc(one, label) for one in score]
        kinds = [np.flatnonzero(label == kind) for kind in (0, 1)]
        taken = (np.concatenate([rng.choice(kind, len(kind)) for kind in kinds]) for _ in range(draws))
        drawn.append([auroc(score[1, at], label[at]) - auroc(score[0, at], label[at]) for at in taken])
    if not exact:
        return {}
    exact["mean"] = np.mean(list(exact.values()), axis=0).tolist()
    differences = [*np.array(drawn), np.mean(drawn, axis=0)]
    return {name: _interval(exact[name], one) for name, one in zip(exact, differences, strict=True)}


def _interval(exact: Sequence[float], drawn: NDArray[np.float64]) -> dict[str, float]:
    difference = exact[1] - exact[0]
    low, high = np.quantile(drawn, (0.025, 0.975))
    other = np.mean(drawn * difference < 0.0) + 0.5 * np.mean(drawn == 0.0)
    return {
        "first": exact[0], "second": exact[1], "difference": difference, "low": float(low), "high": float(high),
        "other_sign": float(other) if difference else 0.5,
    }  # fmt: skip


def _decisions(rows: Pair, paths: Sequence[str]) -> dict[str, Any]:
    """How many images both, one or neither model judges rightly, by label; and McNemar's exact p-value."""
    counts: dict[str, Any] = {}
    for kind, label in (("good", 0), ("defects", 1)):
        of_kind = [path for path in paths if rows[0][path]["label"] == label]
        right = [tuple(bool(one[path]["is_anomaly"]) == bool(label) for one in rows) for path in of_kind]
        words = {"both": (True, True), "first_only": (True, False), "second_only": (False, True)}
        counts[kind] = {word: right.count(pair) for word, pair in words.items()}
        counts[kind]["neither"] = right.count((False, False))
    one, other = (sum(counts[kind][word] for kind in ("good", "defects")) for word in ("first_only", "second_only"))
    tail = sum(math.comb(one + other, k) for k in range(min(one, other) + 1)) / 2 ** (one + other)
    return {**counts, "p_value": min(1.0, 2.0 * tail)}


def _differing(rows: Pair, paths: Sequence[str]) -> list[dict[str, Any]]:
    """Images that the models decide differently on, the clearest difference first."""
    names, (first, second) = ("score", "threshold", "severity", "is_anomaly"), rows
    differ = [
        {
            "path": path, "class": first[path]["true_class"], "label": first[path]["label"],
            "first": {name: first[path][name] for name in names},
            "second": {name: second[path][name] for name in names},
        }
        for path in paths
        if first[path]["is_anomaly"] != second[path]["is_anomaly"]
    ]  # fmt: skip
    return sorted(differ, key=lambda row: -abs(row["second"]["severity"] - row["first"]["severity"]))


def size_of(path: Path) -> int:
    """Bytes of a model, an export's other files included."""
    beside = (path.with_suffix(".bin"), path.with_name(f"{path.name}.json")) if is_export(path) else ()
    return sum(one.stat().st_size for one in (path, *beside) if one.is_file())


def tables(values: dict[str, Any]) -> Iterator[Table]:
    """The comparison as tables."""
    models = (values["first"], values["second"])
    # Folders tell two files of one name apart.
    names = [Path(one["file"]).name for one in models]
    names = names if names[0] != names[1] else [one["file"] for one in models]
    rows: list[tuple[str | float, ...]] = [
        (metric, *(one["mean"].get(metric, "-") for one in models))
        for metric in dict.fromkeys(metric for one in models for metric in one["mean"])
    ]
    for words, part, whole in (("defects found", "found", "defects"), ("false alarms", "false_alarms", "good")):
        totals = [sum(row[whole] for row in one["decisions"].values()) for one in models]
        counts = [sum(row[part] for row in one["decisions"].values()) for one in models]
        rows.append((words, *(f"{count} of {total}" for count, total in zip(counts, totals, strict=True))))
    rows += [
        (words, *(f"{one[key]}" for one in models))
        for words, key in (("file, MB", "mb"), ("images/s", "images_per_s"), ("model, ms an image", "model_ms"))
    ]
    yield Table("both models", ("mean of classes", *names), tuple(rows), _SPEED)
    if values["auroc_difference"]:
        body = []
        for name, one in values["auroc_difference"].items():
            interval, other = f"{one['low']:+.4f} to {one['high']:+.4f}", f"{100 * one['other_sign']:.1f} %"
            body.append((name, one["first"], one["second"], f"{one['difference']:+.4f}", interval, other))
        columns = ("class", "first", "second", "difference", "95 % interval", "other sign")
        yield Table("image AUROC", columns, tuple(body), _PAIRED)
    counts = values["decisions"]
    judged = tuple((kind, *counts[kind].values()) for kind in ("good", "defects"))
    note = f"Chance of a difference as large without any (McNemar, exact): {counts['p_value']:.3f}."
    yield Table("judged rightly by", ("images", "both", "first only", "second only", "neither"), judged, note)


_SPEED = "Speed is of this run, one model after the other, files to results; twinspect bench measures it properly."
_PAIRED = (
    "Every draw takes the same images for both models. Where the interval holds 0, the difference may be luck of the "
    "test images. other sign: share of draws in which the other model was ahead."
)


def sections(values: dict[str, Any], cases: Sequence[Cases]) -> list[Section]:
    """The comparison for a document."""
    rows = []
    for row in values["differ"]:
        answers = (row["first"], row["second"])
        severity = (f"{one['severity']:.2f}{' (called)' if one['is_anomaly'] else ''}" for one in answers)
        rows.append((Path(row["path"]).name, row["class"], "defect" if row["label"] else "good", *severity))
    columns = ("image", "class", "truth", "severity, first", "severity, second")
    listed = Table("all of them", columns, tuple(rows), "Severity is score / threshold, called bad from 1 on.")
    return [
        Section("Comparison", (), tuple(tables(values))),
        Section("Decisions that differ", (f"{len(rows)} of {values['images']} images.",), (listed, *cases)),
    ]


def _pictures(values: dict[str, Any], predictors: Sequence[Predictor], test: TestSet) -> tuple[Cases, ...]:
    """Image, map of the first and of the second model, of the images that they differ on most."""
    samples = {sample.name: sample for sample in test.samples}
    rows = values["differ"][:_SHOWN]
    if not rows:
        return ()
    differing = [samples[row["path"]] for row in rows]
    cases, scale = [], (0.0, 1.0)
    for row, *results in zip(rows, *(predictor.predict(differing) for predictor in predictors), strict=True):
        one, other = (case_of(result, "") for result in results)
        both = ", ".join(f"{row[key]['severity']:.2f}" for key in ("first", "second"))
        words = f"{Path(row['path']).name}: {row['class']}, {'defect' if row['label'] else 'good'}, severity {both}"
        cases.append(Case(words, one.image, one.overlay, other.overlay))
        scale = results[0].scale
    note = "Each map has the colours of its own model."
    return (Cases("Largest differences", tuple(cases), scale, note, "Map of the second model"),)
