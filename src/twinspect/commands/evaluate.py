"""``twinspect eval``: a bundle against labelled data; split, hash and leaks stand beside the numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twinspect import evaluation
from twinspect.commands.options import EvalOptions
from twinspect.commands.results import (
    MAP_SIZE,
    MASK_RULE,
    check_outputs,
    grouped,
    mean_of,
    metric_table,
    publish,
    read_data,
    say_tables,
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
from twinspect.decide.recalibrate import image_key
from twinspect.detector import Detector
from twinspect.errors import ConfigError, DataError
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


def evaluate(options: EvalOptions, console: Console) -> None:
    """Score the test images of a data set, print the metrics and write them where asked.

    Raises:
        SystemExit: 1, where no image could be scored.
    """
    check_outputs(options.report, options.json_file)
    detector = Detector.load(options.bundle, options.weights)
    predictor, recorded = detector.predictor(), detector.record_.get("split", {})
    loaded = read_data(options.data, options.layout, options.images, console)
    test = choose_test(loaded, options.split or recorded.get("name", ""), detector.config.train.seed, [predictor])
    if recorded.get("name") == test.name and recorded["hash"] != test.hash:
        console.warn(f"the bundle was trained on another {test.name} [{recorded['hash']}]: check for shared images")
    pairs = find_leaks([*test.known, *test.samples]) if options.leaks or options.drop_leaks else []
    test = without_leaks(test, pairs) if options.drop_leaks else test
    console.say(test.describe())
    if options.leaks or options.drop_leaks:
        console.say(leak_line(pairs, "left out of the test" if options.drop_leaks else ""))
    measured = evaluation.evaluate(predictor, test.samples, console.progress, pooled=test.pooled)
    review = Review(test.pooled)
    for row in measured.rows:
        review.add(row)
    values = as_values(options, loaded, detector, test, measured, pairs)
    values["other_thresholds"] = review.other_thresholds()
    # Masks are not spoken of again if the data's summary did.
    masks_named = any("no mask" in note for note in loaded.notes)
    notes = grouped((text for text in values["undefined"] if not (masks_named and "mask" in text)), values["classes"])
    for line in (*problems(values, _SHOWN), *notes):
        console.warn(line)
    say_tables(tables(values), console)

    def again(names: list[str]) -> Iterator[Result]:
        samples = {sample.name: sample for sample in test.samples}
        return predictor.predict([samples[name] for name in names])

    def sections(pictures: bool) -> list[Section]:
        first, *others = tables(values)
        parts = [first, *others] if not values["decisions"] else others
        more = [Section("Decisions", (), (first,))] if values["decisions"] else []
        more += [*review.sections(again if pictures else None), Section("Metrics", (), tuple(parts))]
        lines = (*notes, *problems(values))
        return [*more, Section("Remarks", lines)] if lines else more

    publish(options, f"{options.bundle.name} on {options.data.name}", facts(values), values, sections, console)
    if not measured.rows:
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
    test = tuple(evaluation.test_samples(samples))
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


def without_leaks(test: TestSet, pairs: Sequence[Pair]) -> TestSet:
    """The test set without images that are also training images: the model has seen those.

    Raises:
        DataError: none is left.
    """
    leaked = {sample for _, sample in pairs}
    unseen = tuple(sample for sample in test.samples if sample not in leaked)
    if not unseen:
        raise DataError("every test image is also a training image; nothing is left to measure on")
    return replace(test, samples=unseen, hash=content_hash([(TEST, unseen)])) if leaked else test


def leak_line(pairs: Sequence[Pair], dropped: str) -> str:
    """One sentence about images on both sides; ``dropped`` says what was done with them, empty for nothing."""
    if not pairs:
        return "leak check: no test image is byte-equal to a training image"
    count = len({sample for _, sample in pairs})
    first = f"first: {pairs[0][1].image} = {pairs[0][0].image}"
    action = dropped or "they flatter the numbers; --drop-leaks leaves them out"
    return f"leak check: {count:,} test images are byte-equal to training images ({first}): {action}"


def as_values(
    options: EvalOptions,
    loaded: Loaded,
    detector: Detector,
    test: TestSet,
    measured: evaluation.Evaluation,
    pairs: Sequence[Pair],
) -> dict[str, Any]:
    """Everything found, ready for JSON: ``classes``, ``mean``, ``config`` and more."""
    values = {
        **measured.table,
        "defects_mean": evaluation.shared_defects(measured.table["defects"]),
        "students": {name: table["mean"] for name, table in measured.students.items()},
        "decisions": measured.decisions,
        "defect_decisions": by_defect(measured.rows, test.pooled),
        "decisions_mean": {k: v for k, v in mean_of(measured.decisions).items() if k.endswith("_rate")},
        "split": {"name": test.name, "hash": test.hash, "kind": SEMANTIC if test.pooled else INDUSTRIAL},
        "failed": measured.failed,
        "masks_not_used": measured.masks,
        "config": {
            "bundle": options.bundle.name, "data": options.data.name, "layout": loaded.layout,
            "seconds": round(measured.seconds, 2), "test_images": len(measured.rows), "failed": len(measured.failed),
            "mask_rule": MASK_RULE, "map_size": MAP_SIZE, **detector.config.to_dict(), **detector.record_,
        },
    }  # fmt: skip
    if options.leaks or options.drop_leaks:
        leaked = [[str(test_one.image), str(known.image)] for known, test_one in pairs]
        values["leaks"] = {"pairs": leaked, "dropped": options.drop_leaks}
    if options.intervals:
        values["intervals"] = measured.intervals(seed=detector.config.train.seed)
    return values


def by_defect(rows: Sequence[dict[str, Any]], pooled: str) -> dict[str, dict[str, dict[str, float]]]:
    """Defects found at the thresholds in use: class -> defect type -> counts, as `count_calls` gives them."""
    calls = defaultdict(list)
    for row in rows:
        if row["label"]:
            calls[pooled or row["true_class"]].append((row["defect_type"], 1, row["is_anomaly"]))
    return {name: evaluation.count_calls(calls[name]) for name in sorted(calls)}


def problems(values: Mapping[str, Any], most: int | None = None) -> Iterator[str]:
    """Images that were not scored and masks that were not used: all of them, or the first of many."""
    for what, key in (("not scored", "failed"), ("mask not used, image metrics only", "masks_not_used")):
        lines = values[key]
        yield from (f"{what}: {line}" for line in lines[:most])
        if most is not None and len(lines) > most:
            yield f"{what}: {len(lines) - most:,} more (all of them are in the JSON)"


def tables(values: dict[str, Any]) -> list[Table]:
    """The tables of an evaluation."""
    shown = [decision_table(values)] if values["decisions"] else []
    if values["mean"]:  # undefined with one label only, which a remark says
        shown.append(metric_table("metrics", values["classes"], values["mean"]))
        students = {f"{name} alone": row for name, row in values["students"].items()}
        shown.append(metric_table("mean of each student alone", students, first="score"))
    shown += defect_tables(values)
    if intervals := values.get("intervals"):
        rows = {
            name: {metric: f"{low:.4f} - {high:.4f}" for metric, (low, high) in row.items()}
            for name, row in intervals.items()
        }
        shown.append(metric_table("95 % bootstrap intervals over the test images", rows))
    return shown


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
        counts = (f"{one['found']} of {one['defects']}", f"{100 * one['found_rate']:.1f}") if one else ("", "")
        rows.append((name, kind, *(counts if calls else ()), *numbers))

    for name in sorted({*calls, *(name for by_class, _ in shown for name in by_class)}):
        by_kind = [by_class.get(name, {}) for by_class, _ in shown]
        for kind in dict.fromkeys((*calls.get(name, {}), *(kind for one in by_kind for kind in one))):
            row(name, kind, (one.get(kind, "-") for one in by_kind))
    means = [evaluation.shared_defects(by_class) for by_class, _ in shown]
    for kind in dict.fromkeys(kind for mean in means for kind in mean):
        row("mean of classes", kind, (mean.get(kind, "-") for mean in means))
    if any(means):
        row("mean of classes", "mean of the types", (sum(m.values()) / len(m) if m else "-" for m in means))
    columns = ("class", "defect", *(("found", "found, %") if calls else ()), *(title for _, title in shown))
    return [Table("defect types", columns, tuple(rows))] if rows else []


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
