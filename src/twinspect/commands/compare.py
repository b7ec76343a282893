"""``twinspect compare``: two models on the same labelled images. What differs, and whether that may be luck."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from twinspect.commands import results
from twinspect.commands.evaluate import TestSet, choose_test, has_learnt, problems
from twinspect.commands.options import CompareOptions
from twinspect.console import NOTHING_SCORED, Console
from twinspect.evaluation import Evaluation, evaluate
from twinspect.inference.predictor import Predictor
from twinspect.inference.runtimes import companion, is_export, load_predictor
from twinspect.metrics import auroc
from twinspect.report import Case, Cases, Section, Table, case_of

_SHOWN = 24  # pictures, those that the models differ on most
Row = Mapping[str, Any]  # of `Evaluation.rows`
Pair = tuple[Row, Row]  # what the first and the second model say of one image
# Whether the first and the second model judge an image rightly.
_JUDGED = {(True, True): "both", (True, False): "first_only", (False, True): "second_only", (False, False): "neither"}


def compare(options: CompareOptions, console: Console) -> None:
    """Score the test images with both models, say what differs and write it where asked."""
    results.check_outputs(options.report, options.json_file)
    paths = (options.first, options.second)
    predictors = [load_predictor(path, device=options.device) for path in paths]
    loaded = results.read_data(options.data, options.layout, options.images, console)
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
        results.say_tables([table], console)
        console.say(table.note)
    pictures = _pictures(values, predictors, test) if results.shows_pictures(options.report) else ()
    facts = {"data": f"{test.name} [{test.hash}]", "test images": f"{values['images']}", "seed": f"{options.seed}"}
    title = f"{paths[0].name} and {paths[1].name}"
    results.publish(options, title, facts, values, sections(values, pictures), console)
    if not values["images"]:
        raise SystemExit(NOTHING_SCORED)


def as_values(options: CompareOptions, test: TestSet, measured: Sequence[Evaluation]) -> dict[str, Any]:
    """Everything found, ready for JSON; ``first`` and ``second`` are the models in the order they were given."""
    second = {row["path"]: row for row in measured[1].rows}
    pairs = [(row, second[row["path"]]) for row in measured[0].rows if row["path"] in second]
    models = {
        key: {
            "file": str(path), "model_id": next((row["model_id"] for row in evaluation.rows), ""),
            "mb": round(size_of(path) / 1e6, 2),
            "images_per_s": round(len(evaluation.rows) / max(evaluation.seconds, 1e-9), 2),
            "model_ms": round(median(row["ms"] for row in evaluation.rows), 2) if evaluation.rows else None,
            "mean": evaluation.table["mean"], "classes": evaluation.table["classes"],
            "decisions": evaluation.decisions,
        }
        for key, path, evaluation in zip(("first", "second"), (options.first, options.second), measured, strict=True)
    }  # fmt: skip
    return {
        **models,
        "images": len(pairs),
        "split": {"name": test.name, "hash": test.hash},
        "auroc_difference": auroc_difference(pairs, test.pooled, options.draws, options.seed),
        "decisions": _decisions(pairs),
        "differ": _differing(pairs),
        "failed": sorted({line for evaluation in measured for line in evaluation.failed}),
        "masks_not_used": sorted({line for evaluation in measured for line in evaluation.masks}),
    }


def auroc_difference(pairs: Sequence[Pair], pooled: str, draws: int, seed: int) -> dict[str, Any]:
    """Image AUROC of the second model less that of the first, by class and their mean, with bootstrap intervals.

    Paired: a draw takes the same images for both, good ones and defects of every class each with replacement.

    Returns:
        Class (and ``mean``) -> ``first``, ``second``, ``difference``, ``low`` and ``high`` (95 %), and
        ``other_sign``, the share of draws in which the difference has the other sign (and half of those in which
        there is none). Empty where no class has both labels.
    """
    members: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        members[pooled or pair[0]["true_class"]].append(pair)
    rng = np.random.default_rng(seed)
    exact: dict[str, NDArray[np.float64]] = {}
    drawn: dict[str, NDArray[np.float64]] = {}
    for name, of_class in sorted(members.items()):
        label = np.array([row["label"] for row, _ in of_class])
        if label.min() == label.max():
            continue
        score = np.array([[row["score"] for row in pair] for pair in of_class]).T
        exact[name] = np.array([auroc(model_score, label) for model_score in score])
        kinds = [np.flatnonzero(label == kind) for kind in (0, 1)]
        taken = (np.concatenate([rng.choice(kind, len(kind)) for kind in kinds]) for _ in range(draws))
        drawn[name] = np.array([auroc(score[1, at], label[at]) - auroc(score[0, at], label[at]) for at in taken])
    if not exact:
        return {}
    exact["mean"], drawn["mean"] = np.mean(list(exact.values()), axis=0), np.mean(list(drawn.values()), axis=0)
    by_class = {}
    for name, (first, second) in exact.items():
        low, high = np.quantile(drawn[name], (0.025, 0.975)).tolist()
        other = np.mean(drawn[name] * (second - first) < 0.0) + 0.5 * np.mean(drawn[name] == 0.0)
        by_class[name] = {
            "first": float(first), "second": float(second), "difference": float(second - first), "low": low,
            "high": high, "other_sign": float(other) if second != first else 0.5,
        }  # fmt: skip
    return by_class


def _decisions(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How many images both, one or neither model judges rightly, by label; and McNemar's exact p-value."""
    counts: dict[str, Any] = {kind: dict.fromkeys(_JUDGED.values(), 0) for kind in ("good", "defects")}
    for first, second in pairs:
        bad = bool(first["label"])
        right = _JUDGED[first["is_anomaly"] == bad, second["is_anomaly"] == bad]
        counts["defects" if bad else "good"][right] += 1
    first_only, second_only = (sum(counts[kind][word] for kind in counts) for word in ("first_only", "second_only"))
    differ = first_only + second_only
    return {**counts, "p_value": float(binomtest(first_only, differ).pvalue) if differ else 1.0}


def _differing(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Images that the models decide differently on, the clearest difference first."""
    names = ("score", "threshold", "severity", "is_anomaly")
    differ = [
        {
            "path": first["path"], "class": first["true_class"], "label": first["label"],
            "first": {name: first[name] for name in names}, "second": {name: second[name] for name in names},
        }
        for first, second in pairs
        if first["is_anomaly"] != second["is_anomaly"]
    ]  # fmt: skip
    return sorted(
        differ, key=lambda row: -abs((row["second"]["severity"] or 0.0) - (row["first"]["severity"] or 0.0))
    )


def _severity(answer: Row) -> str:
    return "-" if answer["severity"] is None else f"{answer['severity']:.2f}"


def size_of(path: Path) -> int:
    """Bytes of a model, an export's other files included."""
    beside = (path.with_suffix(".bin"), companion(path)) if is_export(path) else ()
    return sum(file.stat().st_size for file in (path, *beside) if file.is_file())


def tables(values: dict[str, Any]) -> Iterator[Table]:
    """The comparison as tables."""
    models = (values["first"], values["second"])
    # Folders tell two files of one name apart.
    names = [Path(model["file"]).name for model in models]
    names = names if names[0] != names[1] else [model["file"] for model in models]
    cells: dict[str, list[str | float]] = {
        metric: [model["mean"].get(metric, "-") for model in models]
        for metric in dict.fromkeys(metric for model in models for metric in model["mean"])
    }
    for words, part, whole in (("defects found", "found", "defects"), ("false alarms", "false_alarms", "good")):
        cells[words] = []
        for model in models:
            count, total = (sum(row[key] for row in model["decisions"].values()) for key in (part, whole))
            cells[words].append(f"{count} of {total}")
    for words, key in (("file, MB", "mb"), ("images/s", "images_per_s"), ("model, ms an image", "model_ms")):
        cells[words] = [f"{model[key]}" for model in models]
    rows = tuple((name, *both) for name, both in cells.items())
    yield Table("both models", ("mean of classes", *names), rows, _SPEED)
    if values["auroc_difference"]:
        areas = [
            {
                "class": name, "first": area["first"], "second": area["second"],
                "difference": f"{area['difference']:+.4f}",
                "95 % interval": f"{area['low']:+.4f} to {area['high']:+.4f}",
                "other sign": f"{100 * area['other_sign']:.1f} %",
            }
            for name, area in values["auroc_difference"].items()
        ]  # fmt: skip
        yield Table.of("image AUROC", areas, _PAIRED)
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
        truth = "defect" if row["label"] else "good"
        cells = {"image": Path(row["path"]).name, "class": row["class"], "truth": truth}
        for key in ("first", "second"):
            cells[f"severity, {key}"] = _severity(row[key]) + (" (called)" if row[key]["is_anomaly"] else "")
        rows.append(cells)
    listed = Table.of("all of them", rows, "Severity is score / threshold, called bad from 1 on.")
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
    answers = (predictor.predict([samples[row["path"]] for row in rows]) for predictor in predictors)
    cases = []
    for row, first, second in zip(rows, *answers, strict=True):
        both = ", ".join(_severity(row[key]) for key in ("first", "second"))
        words = f"{Path(row['path']).name}: {row['class']}, {'defect' if row['label'] else 'good'}, severity {both}"
        first_case, second_case = case_of(first, ""), case_of(second, "")
        cases.append(Case(words, first_case.image, first_case.overlay, second_case.overlay))
    note = "Each map has the colours of its own model."
    return (Cases("Largest differences", tuple(cases), first.scale, note, "Map of the second model"),)
