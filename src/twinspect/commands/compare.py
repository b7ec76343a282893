"""``twinspect compare``: two models on the same labelled images. What differs, and whether that may be luck."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.bundle import files_of
from twinspect.commands import results
from twinspect.commands.evaluate import (
    Evaluation,
    choose_test,
    has_learnt,
    measure,
    remarks,
    test_facts,
    unknown_classes,
    untested,
)
from twinspect.commands.options import CompareOptions
from twinspect.console import NOTHING_SCORED, Console
from twinspect.data.protocols import Split
from twinspect.inference.predictor import Predictor, load_predictor
from twinspect.metrics import auroc
from twinspect.report import Case, Cases, Report, Section, Table, case_of

_SHOWN = 24  # pictures, those that the models differ on most
_SPEED = "Speed is of this run, one model after the other, files to results; twinspect bench measures it properly."
_PAIRED = (
    "Every draw takes the same images for both models. Where the interval holds 0, the difference may be luck of the "
    "test images."
)
_LABELS = ("good", "defect")
Row = Mapping[str, Any]  # of `Evaluation.rows`
Pair = tuple[Row, Row]  # what the first and the second model say of one image


def compare(options: CompareOptions, console: Console) -> None:
    """Score the test images with both models, say what differs and write it where asked."""
    results.check_outputs(options.report, options.json_file)
    paths = (options.first, options.second)
    predictors = [load_predictor(path, device=options.device) for path in paths]
    loaded = results.read_data(options.data, options.layout, options.images, console)
    split = choose_test(loaded, options.split, options.seed, predictors)
    console.say(split.describe())
    measured = []
    for path, predictor in zip(paths, predictors, strict=True):
        if seen := sum(has_learnt(predictor, sample) for sample in split.test):
            console.warn(f"{path.name} has learnt {seen} of the test images, which flatters it")
        console.warn(*(f"{path.name}: {line}" for line in unknown_classes(split, predictor.decision.classes)))
        console.say(f"scoring with {path.name}")
        measured.append(measure(predictor, split, console))
    values = as_values(options, split, measured)
    console.warn(*remarks(values))
    first, second = values["right"].values()
    words = (
        f"The models answer {first + second} of {values['images']} images differently: the first model is right on "
        f"{first}, the second on {second}."
    )
    if not first + second:
        words = f"Both models give the same answer to all {values['images']} images."
    sections = [
        Section("Comparison", untested(values["first"]["decisions"]), tuple(tables(values))),
        Section("Decisions that differ", (words,)),
        Section("Images that they differ on", (), (_listed(values["differ"]),), printed=False),
    ]
    if results.shows_pictures(options.report) and values["differ"]:
        sections.append(Section("Largest differences", (), (_pictures(values["differ"], predictors, split),)))
    facts = {**test_facts(split, values["images"]), "seed": f"{options.seed}"}
    title = f"{paths[0].name} and {paths[1].name}"
    results.publish(Report(title, sections, facts, values), options, console)
    if not values["images"]:
        raise SystemExit(NOTHING_SCORED)


def as_values(options: CompareOptions, split: Split, measured: Sequence[Evaluation]) -> dict[str, Any]:
    """Everything measured, ready for JSON; ``first`` and ``second`` are the models in the order they were given."""
    second = {row["path"]: row for row in measured[1].rows}
    pairs = [(row, second[row["path"]]) for row in measured[0].rows if row["path"] in second]
    models = {
        key: {
            "file": str(path), "model_id": next((row["model_id"] for row in evaluation.rows), ""),
            "mb": round(sum(file.stat().st_size for file in files_of(path)) / 1e6, 2),
            "images_per_s": round(len(evaluation.rows) / max(evaluation.seconds, 1e-9), 2),
            "model_ms": round(median(row["ms"] for row in evaluation.rows), 2) if evaluation.rows else None,
            **{name: evaluation.values[name] for name in ("mean", "classes", "decisions")},
        }
        for key, path, evaluation in zip(("first", "second"), (options.first, options.second), measured, strict=True)
    }  # fmt: skip
    differ = _differing(pairs)
    first_right = sum(row["first"]["is_anomaly"] == bool(row["label"]) for row in differ)
    return {
        **models,
        "images": len(pairs),
        "split": {"name": split.name, "hash": split.hash},
        "auroc_difference": auroc_difference(pairs, options.draws, options.seed),
        "right": {"first": first_right, "second": len(differ) - first_right},  # of those that differ
        "differ": differ,
        **{
            name: sorted({*measured[0].values[name], *measured[1].values[name]})
            for name in ("failed", "masks_not_used")
        },
    }


def auroc_difference(pairs: Sequence[Pair], draws: int, seed: int) -> dict[str, Any]:
    """Image AUROC of the second model less that of the first, by class and their mean, with bootstrap intervals.

    Paired: a draw takes the same images for both, good ones and defects of every class each with replacement.
    Classes without both labels are left out.
    """
    members: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        members[pair[0]["true_class"]].append(pair)
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
        areas = {"first": float(first), "second": float(second), "difference": float(second - first)}
        by_class[name] = {**areas, "low": low, "high": high}
    return by_class


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
            }
            for name, area in values["auroc_difference"].items()
        ]  # fmt: skip
        yield Table.of("image AUROC", areas, _PAIRED)


def _listed(differ: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for row in differ:
        cells = {"image": Path(row["path"]).name, "class": row["class"], "truth": _LABELS[row["label"]]}
        for key in ("first", "second"):
            cells[f"severity, {key}"] = _severity(row[key]) + (" (called)" if row[key]["is_anomaly"] else "")
        rows.append(cells)
    return Table.of("decisions that differ", rows, "Severity is score / threshold, called bad from 1 on.")


def _severity(answer: Row) -> str:
    return "-" if answer["severity"] is None else f"{answer['severity']:.2f}"


def _pictures(differ: Sequence[dict[str, Any]], predictors: Sequence[Predictor], split: Split) -> Cases:
    """Image, map of the first and of the second model, of the images that they differ on most."""
    samples, rows = {sample.name: sample for sample in split.test}, differ[:_SHOWN]
    answers = (predictor.predict([samples[row["path"]] for row in rows]) for predictor in predictors)
    cases = []
    for row, first, second in zip(rows, *answers, strict=True):
        severity = ", ".join(_severity(row[key]) for key in ("first", "second"))
        words = f"{Path(row['path']).name}: {row['class']}, {_LABELS[row['label']]}, severity {severity}"
        first_case, second_case = case_of(first, ""), case_of(second, "")
        cases.append(Case(words, first_case.image, first_case.overlay, second_case.overlay))
    note = "Each map has the colours of its own model."
    return Cases("Image and both maps", tuple(cases), first.scale, note, "Map of the second model")
