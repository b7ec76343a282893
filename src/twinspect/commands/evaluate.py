"""``twinspect eval``: a bundle against labelled data; split, hash and leaks stand beside the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twinspect import data as data_room
from twinspect.commands.options import EvalOptions
from twinspect.commands.results import (
    MAP_SIZE,
    MASK_RULE,
    check_outputs,
    grouped,
    mean_of,
    metric_table,
    publish_json,
    text_table,
    write_results,
)
from twinspect.commands.review import Review
from twinspect.console import NOTHING_SCORED, Console
from twinspect.data import Loaded
from twinspect.data.leaks import find_leaks
from twinspect.data.protocols import (
    INDUSTRIAL,
    SEMANTIC,
    Split,
    content_hash,
    default_protocol,
    find_split,
    is_semantic,
    make_splits,
)
from twinspect.decide.decision import count_calls
from twinspect.decide.recalibrate import image_key
from twinspect.detector import Detector
from twinspect.errors import ConfigError, DataError
from twinspect.evaluation import Evaluation, evaluate, shared_defects, test_samples
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result
from twinspect.report import Section, Table
from twinspect.types import TEST, Sample

AS_GIVEN = "test as the data say"
_DECISIONS = "An image is called bad from the threshold of its predicted class on (severity 1)."
_SHOWN = 20  # files with one kind of problem that are named
Pair = tuple[Sample, Sample]


@dataclass(frozen=True, slots=True)
class TestSet:
    """What is measured on.

    Attributes:
        name: split name, or the words for the data's own test split.
        hash: 12 hex digits that change with any image, label or mask listed.
        known: training and calibration images, for the leak check.
        samples: labelled test images.
        pooled: name under which all classes count as one (semantic splits), else empty.
    """

    name: str
    hash: str
    known: tuple[Sample, ...]
    samples: tuple[Sample, ...]
    pooled: str = ""

    def describe(self) -> str:
        """One line with name, hash and counts."""
        normal = sum(sample.label == 0 for sample in self.samples)
        return (
            f"{self.name} [{self.hash}]: {len(self.samples):,} test images ({normal:,} normal, "
            f"{len(self.samples) - normal:,} anomalous)"
        )


def eval_command(options: EvalOptions, console: Console) -> None:
    """Score the test images of a data set, print the metrics and write them where asked.

    Raises:
        SystemExit: 1, where no image could be scored.
    """
    check_outputs(options.report, options.json_file)
    detector = Detector.load(options.bundle, options.weights)
    loaded = data_room.load(options.data, options.layout, options.images)
    for line in loaded.summary():
        console.say(line)
    recorded = detector.record_.get("split", {})
    test = choose_test(
        loaded, options.split or recorded.get("name", ""), detector.config.train.seed, [detector.predictor()]
    )
    if recorded.get("name") == test.name and recorded["hash"] != test.hash:
        console.warn(f"the bundle was trained on another {test.name} [{recorded['hash']}]: check for shared images")
    pairs = leaked_pairs(test) if options.leaks or options.drop_leaks else []
    test = without_leaks(test, pairs) if options.drop_leaks else test
    console.say(test.describe())
    if options.leaks or options.drop_leaks:
        console.say(leak_line(pairs, "left out of the test" if options.drop_leaks else ""))
    found = evaluate(detector.predictor(), test.samples, console.progress, pooled=test.pooled)
    review = Review(test.pooled)
    for row in found.rows:
        review.add(row)
    values = {
        **as_values(options, loaded, detector, test, found, pairs),
        "other_thresholds": review.other_thresholds(),
    }
    notes = remarks(values, loaded)
    for line in problems(found):
        console.warn(line)
    for line in notes:
        console.warn(line)
    samples = {sample.name: sample for sample in test.samples}

    def again(names: list[str]) -> Iterator[Result]:
        return detector.predictor().predict([samples[name] for name in names])

    publish(options, values, notes, lambda pictures: review.sections(again if pictures else None), console)
    if not found.rows:
        raise SystemExit(NOTHING_SCORED)


def choose_test(loaded: Loaded, name: str, seed: int, predictors: Sequence[Predictor] = ()) -> TestSet:
    """The test set of a named split, or the data's own labelled test images.

    Where a set has no good test image (a folder of good images, or good and bad ones side by side), its good images
    are test images, but for those that one of ``predictors`` has learnt.

    Raises:
        ConfigError: no such split, or the set is semantic and no split was named.
        DataError: there is no labelled test image.
    """
    if name and name != AS_GIVEN:
        return of_split(find_split(loaded.samples, name, seed))
    if is_semantic(loaded.samples):
        accepted = ", ".join(s.name for s in make_splits(loaded.samples, default_protocol(loaded.samples), seed))
        raise ConfigError(
            "this set says which class an image shows, and not whether it is good: name what the model was "
            f"trained on with --split, such as one-vs-rest/{loaded.classes[0]}, {accepted}"
        )
    samples: Sequence[Sample] = loaded.samples
    if predictors and not any(s.split == TEST and s.label == 0 for s in samples):
        samples = unlearnt_as_test(samples, predictors)
    test = tuple(test_samples(samples))
    known = tuple(s for s in samples if s.split != TEST)
    return TestSet(AS_GIVEN, content_hash([(TEST, test)]), known, test)


def unlearnt_as_test(samples: Sequence[Sample], predictors: Sequence[Predictor]) -> list[Sample]:
    """The same samples, the good ones that no model has learnt moved to the test split."""
    return [
        replace(one, split=TEST, label=0)
        if one.split != TEST and one.label in (0, None) and not any(has_learnt(p, one) for p in predictors)
        else one
        for one in samples
    ]


def has_learnt(predictor: Predictor, sample: Sample) -> bool:
    """Whether a model was trained on an image, by its content; of one that cannot be read, not."""
    try:
        return predictor.decision.has_learnt(image_key(sample, predictor.runtime.size))
    except (DataError, OSError):  # said when it is scored
        return False


def of_split(split: Split) -> TestSet:
    """A protocol's split as what is measured on."""
    pooled = split.name.partition("/")[2] or split.name if split.kind == SEMANTIC else ""
    return TestSet(split.name, split.hash, (*split.train, *split.calibration), split.test, pooled)


def leaked_pairs(test: TestSet) -> list[Pair]:
    """Byte-equal pairs of a training (or calibration) image and a test image."""
    return find_leaks([*test.known, *test.samples])


def without_leaks(test: TestSet, pairs: Sequence[Pair]) -> TestSet:
    """The test set without images that are also training images: the model has seen those.

    Raises:
        DataError: none is left.
    """
    leaked = {sample for _, sample in pairs}
    kept = tuple(sample for sample in test.samples if sample not in leaked)
    if not kept:
        raise DataError("every test image is also a training image; nothing is left to measure on")
    return replace(test, samples=kept, hash=content_hash([(TEST, kept)])) if leaked else test


def leak_line(pairs: Sequence[Pair], dropped: str) -> str:
    """One sentence about images on both sides; ``dropped`` says what was done with them, empty for nothing."""
    if not pairs:
        return "leak check: no test image is byte-equal to a training image"
    count = len({sample for _, sample in pairs})
    first = f"first: {pairs[0][1].image} = {pairs[0][0].image}"
    action = dropped or "they flatter the numbers; --drop-leaks leaves them out"
    return f"leak check: {count:,} test images are byte-equal to training images ({first}): {action}"


def as_values(
    options: EvalOptions, loaded: Loaded, detector: Detector, test: TestSet, found: Evaluation, pairs: Sequence[Pair]
) -> dict[str, Any]:
    """Everything found, ready for JSON: ``classes``, ``mean``, ``config`` and more."""
    values = {
        **found.table,
        "defects_mean": shared_defects(found.table["defects"]),
        "students": {name: table["mean"] for name, table in found.students.items()},
        "decisions": found.decisions,
        "defect_decisions": by_defect(found.rows, test.pooled),
        "decisions_mean": {k: v for k, v in mean_of(found.decisions).items() if k.endswith("_rate")},
        "split": {"name": test.name, "hash": test.hash, "kind": SEMANTIC if test.pooled else INDUSTRIAL},
        "failed": found.failed,
        "masks_not_used": found.masks,
        "config": {
            "bundle": options.bundle.name, "data": options.data.name, "layout": loaded.layout,
            "seconds": round(found.seconds, 2), "test_images": len(found.rows), "failed": len(found.failed),
            "mask_rule": MASK_RULE, "map_size": MAP_SIZE, **detector.config.to_dict(), **detector.record_,
        },
    }  # fmt: skip
    if options.leaks or options.drop_leaks:
        leaked = [[str(test_one.image), str(known.image)] for known, test_one in pairs]
        values["leaks"] = {"pairs": leaked, "dropped": options.drop_leaks}
    if options.intervals:
        values["intervals"] = found.intervals(seed=detector.config.train.seed)
    return values


def by_defect(rows: Sequence[dict[str, Any]], pooled: str) -> dict[str, dict[str, dict[str, float]]]:
    """Defects found at the thresholds in use: class -> defect type -> counts, as `count_calls` gives them."""
    bad = [row for row in rows if row["label"]]
    names = {(pooled or row["true_class"]): None for row in bad}
    return {
        name: count_calls(
            (row["defect_type"], 1, row["is_anomaly"]) for row in bad if (pooled or row["true_class"]) == name
        )
        for name in sorted(names)
    }


def remarks(values: dict[str, Any], loaded: Loaded) -> list[str]:
    """What is undefined and why; masks are not spoken of again if the data's summary did."""
    said = any("no mask" in note for note in loaded.notes)
    sentences = [text for text in values["undefined"] if not (said and "mask" in text)]
    return grouped(sentences, values["classes"])


def problems(found: Evaluation) -> Iterator[str]:
    """Images that were not scored and masks that were not used, the first of many."""
    for what, lines in (("not scored", found.failed), ("mask not used, image metrics only", found.masks)):
        yield from (f"{what}: {line}" for line in lines[:_SHOWN])
        if len(lines) > _SHOWN:
            yield f"{what}: {len(lines) - _SHOWN:,} more (all of them are in the JSON)"


def problem_lines(values: dict[str, Any]) -> Iterator[str]:
    """All of them, for a document."""
    yield from (f"Not scored: {text}" for text in values["failed"])
    yield from (f"Mask not used: {text}" for text in values["masks_not_used"])


def publish(
    options: EvalOptions, values: dict[str, Any], notes: Sequence[str], shown: Callable[[bool], list[Section]],
    console: Console,
) -> None:  # fmt: skip
    """Print the tables and write the files asked for; ``shown`` gives more for these, with pictures or not."""
    for line in metric_lines(values):
        console.say(line)
    publish_json(options.json_file, values, console)
    title = f"{options.bundle.name} on {options.data.name}"
    for path in options.report:
        found = sections(
            values, notes, [] if path.suffix.lower() == ".json" else shown(path.suffix.lower() == ".html")
        )
        write_results(path, title, found, facts(values), values)
        console.say(f"wrote {path}")


def metric_lines(values: dict[str, Any]) -> Iterator[str]:
    """Metrics as aligned text tables: classes and mean, defect types, each student alone."""
    for table in tables(values):
        yield from text_table(table)


def tables(values: dict[str, Any]) -> list[Table]:
    """The tables of an evaluation."""
    found = [decision_table(values)] if values["decisions"] else []
    if values["mean"]:  # undefined with one label only, which a remark says
        found.append(metric_table("metrics", values["classes"], values["mean"]))
        students = {f"{name} alone": row for name, row in values["students"].items()}
        columns = list(dict.fromkeys(metric for row in students.values() for metric in row))
        rows = tuple((name, *(row.get(metric, "-") for metric in columns)) for name, row in students.items())
        found.append(Table("mean of each student alone", ("score", *columns), rows))
    found += defect_tables(values)
    if values.get("intervals"):
        found.append(_interval_table(values["intervals"]))
    return found


def decision_table(values: dict[str, Any]) -> Table:
    """Defects found and good images called bad, beside image AUROC; a column that no class has is left out."""
    counts, mean = values["decisions"], {**values["mean"], **values["decisions_mean"]}
    rows = {name: {**values["classes"].get(name, {}), **row} for name, row in counts.items()}
    rows |= {"mean": mean} if len(rows) > 1 else {}
    columns: dict[str, list[str | float]] = {}
    if "image_auroc" in mean:
        columns["image AUROC"] = [row.get("image_auroc", "-") for row in rows.values()]
    for title, part, whole in (("defects found", "found", "defects"), ("false alarms", "false_alarms", "good")):
        rate = f"{part.removesuffix('s')}_rate"
        if rate in mean:
            columns[title] = [f"{row[part]} of {row[whole]}" if part in row else "" for row in rows.values()]
            columns[f"{title}, %"] = [f"{100 * row[rate]:.1f}" if rate in row else "-" for row in rows.values()]
    body = tuple(zip(rows, *columns.values(), strict=True))
    return Table("decisions at the thresholds in use", ("class", *columns), body, _DECISIONS)


def defect_tables(values: dict[str, Any]) -> list[Table]:
    """Per class and defect type: what was found, image AUROC against its good images, AU-sPRO where defined."""
    measured = [
        (values.get(key, {}), title)
        for key, title in (("defects", "image AUROC"), ("defects_auspro_005", "AU-sPRO to 0.05"))
    ]
    shown = [(by_class, title) for by_class, title in measured if by_class]
    calls = values.get("defect_decisions", {})
    rows: list[tuple[str | float, ...]] = []

    def row(name: str, kind: str, numbers: Iterable[float | str]) -> None:
        one = calls.get(name, {}).get(kind)
        told = (f"{one['found']} of {one['defects']}", f"{100 * one['found_rate']:.1f}") if one else ("", "")
        rows.append((name, kind, *(told if calls else ()), *numbers))

    for name in sorted({*calls, *(name for by_class, _ in shown for name in by_class)}):
        own = [by_class.get(name, {}) for by_class, _ in shown]
        for kind in dict.fromkeys((*calls.get(name, {}), *(kind for one in own for kind in one))):
            row(name, kind, (one.get(kind, "-") for one in own))
    means = [shared_defects(by_class) for by_class, _ in shown]
    for kind in dict.fromkeys(kind for mean in means for kind in mean):
        row("mean of classes", kind, (mean.get(kind, "-") for mean in means))
    if any(means):
        row("mean of classes", "mean of the types", (sum(m.values()) / len(m) if m else "-" for m in means))
    columns = ("class", "defect", *(("found", "found, %") if calls else ()), *(title for _, title in shown))
    return [Table("defect types", columns, tuple(rows))] if rows else []


def _interval_table(intervals: dict[str, dict[str, Sequence[float]]]) -> Table:
    names = list(dict.fromkeys(metric for row in intervals.values() for metric in row))
    rows = tuple(
        (name, *(f"{row[m][0]:.4f} - {row[m][1]:.4f}" if m in row else "-" for m in names))
        for name, row in intervals.items()
    )
    return Table("95 % bootstrap intervals over the test images", ("class", *names), rows)


def sections(values: dict[str, Any], notes: Sequence[str], more: Sequence[Section] = ()) -> list[Section]:
    """The same tables for a document, with what is undefined; ``more`` comes after the decisions."""
    every = tables(values)
    first = len(every[:1]) if values["decisions"] else 0
    shown = [Section("Decisions", (), tuple(every[:first]))] if first else []
    shown += [*more, Section("Metrics", (), tuple(every[first:]))]
    lines = [*notes, *problem_lines(values)]
    return [*shown, Section("Remarks", tuple(lines))] if lines else shown


def facts(values: dict[str, Any]) -> dict[str, str]:
    """What must stand beside the numbers."""
    config, split = values["config"], values["split"]
    leaks = values.get("leaks")
    return {
        "split": f"{split['name']} [{split['hash']}]",
        "test images": f"{config['test_images']}",
        "teacher": f"{config['teacher']['name']} ({config['teacher']['hash']})",
        "input size": f"{config['size']}",
        "steps": f"{config['training']['steps']}",
        "seed": f"{config['train']['seed']}",
        "mask rule": config["mask_rule"],
        "map size": config["map_size"],
        "leaks": "not looked for" if leaks is None else f"{len(leaks['pairs'])} pairs",
    }
