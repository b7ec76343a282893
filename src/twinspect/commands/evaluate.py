"""``twinspect eval``: a bundle against labelled data; split, hash and leaks stand beside the numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from twinspect import evaluation
from twinspect.commands import results
from twinspect.commands.options import EvalOptions
from twinspect.commands.results import Again, Review
from twinspect.console import NOTHING_SCORED, Console
from twinspect.data import Loaded
from twinspect.data.protocols import INDUSTRIAL, SEMANTIC, Split, find_leaks, find_split, is_semantic, make_splits
from twinspect.decide.recalibrate import key_of
from twinspect.detector import Detector
from twinspect.errors import ConfigError, DataError, listed
from twinspect.evaluation import Evaluation
from twinspect.inference.predictor import Predictor
from twinspect.metrics import mean_of
from twinspect.report import Report, Section, Table
from twinspect.types import TEST, Sample

AS_GIVEN = "labelled test images"
SHOWN = 20  # files with one kind of problem that are named
Pair = tuple[Sample, Sample]


def evaluate(options: EvalOptions, console: Console) -> None:
    """Score the test images of a data set, print the metrics and write them where asked."""
    results.check_outputs(options.report, options.json_file)
    detector = Detector.load(options.bundle)
    predictor, config, recorded = detector.predictor(), detector.config, detector.record_.get("split", {})
    loaded = results.read_data(options.data, options.layout, options.images, console)
    split = choose_test(loaded, options.split or recorded.get("name", ""), config.train.seed, [predictor])
    if recorded.get("name") == split.name and recorded["hash"] != split.hash:
        console.warn(f"the bundle was trained on another {split.name} [{recorded['hash']}]: check for shared images")
    pairs = find_leaks([*split.train, *split.calibration, *split.test])
    split = without_leaks(split, pairs) if options.drop_leaks else split
    console.say(split.describe())
    console.say(leak_line(pairs, "left out of the test" if options.drop_leaks else ""))
    measured = measure(predictor, split, console)
    review = Review(measured.rows, pooled(split))
    values = {**values_of(measured, split), "other_thresholds": review.other_thresholds()}
    values["config"] = {
        "bundle": options.bundle.name, "data": options.data.name, "layout": loaded.layout,
        "seconds": round(measured.seconds, 2), "test_images": len(measured.rows), "failed": len(measured.failed),
        "mask_rule": results.MASK_RULE, "map_size": results.MAP_SIZE, **config.to_dict(), **detector.record_,
    }  # fmt: skip
    leaked = [[str(tested.image), str(known.image)] for known, tested in pairs]
    values["leaks"] = {"pairs": leaked, "dropped": options.drop_leaks}
    if options.intervals:
        values["intervals"] = measured.joint.intervals(seed=config.train.seed)
    console.warn(*unknown_classes(split, predictor.decision.classes), *remarks(values))
    again = again_with(predictor, split) if results.shows_pictures(options.report) else None
    facts = {
        **test_facts(split, len(measured.rows)),
        "copies of training images among them": f"{len({tested for _, tested in pairs})}",
        **run_facts(values["config"]),
    }
    title = f"{options.bundle.name} on {options.data.name}"
    shown = sections(values, review, again)
    results.publish(Report(title, shown, facts, values), options, console)
    if not measured.rows:
        raise SystemExit(NOTHING_SCORED)


# ------------------------------------------------------------------------------------------------- what is measured


def choose_test(loaded: Loaded, name: str, seed: int, predictors: Sequence[Predictor] = ()) -> Split:
    """A split by its name, or the data's own labelled test images beside all others.

    Where a set has no good test image (a folder of good images, or good and bad ones side by side), its good images
    are test images, but for those that one of ``predictors`` has learnt.
    """
    samples: Sequence[Sample] = loaded.samples
    if name and name != AS_GIVEN:
        return find_split(samples, name, seed)
    if is_semantic(samples):
        accepted = ", ".join(split.name for split in make_splits(samples, seed=seed))
        raise ConfigError(
            "this set says which class an image shows, and not whether it is good: name what the model was "
            f"trained on with --split, such as one-vs-rest/{loaded.classes[0]}, {accepted}"
        )
    if predictors and not any(s.split == TEST and s.label == 0 for s in samples):
        samples = [
            replace(s, split=TEST, label=0)
            if s.split != TEST and s.label in (0, None) and not any(has_learnt(p, s) for p in predictors)
            else s
            for s in samples
        ]
    others = tuple(s for s in samples if s.split != TEST)
    return Split(AS_GIVEN, INDUSTRIAL, others, (), tuple(evaluation.test_samples(samples)))


def has_learnt(predictor: Predictor, sample: Sample) -> bool:
    """Whether a model was trained on an image, by its content; of one that cannot be read, not."""
    try:
        return key_of(sample, predictor.runtime.size) in predictor.decision.trained
    except (DataError, OSError):  # said when it is scored
        return False


def without_leaks(split: Split, pairs: Sequence[Pair]) -> Split:
    """The split without test images that are also training images: the model has seen those."""
    leaked = {sample for _, sample in pairs}
    unseen = tuple(sample for sample in split.test if sample not in leaked)
    if not unseen:
        raise DataError("every test image is also a training image; nothing is left to measure on")
    return replace(split, test=unseen)


def leak_line(pairs: Sequence[Pair], dropped: str) -> str:
    """One sentence about images on both sides; ``dropped`` says what was done with them, empty for nothing."""
    if not pairs:
        return "leak check: no test image is a copy of a training image"
    count = len({sample for _, sample in pairs})
    first = f"first: {pairs[0][1].image} = {pairs[0][0].image}"
    action = dropped or "they flatter the numbers; --drop-leaks leaves them out"
    return f"leak check: {count:,} test images are copies of training images ({first}): {action}"


def unknown_classes(split: Split, known: Sequence[str]) -> list[str]:
    """A sentence about classes that the model does not know, as where a folder of images has another name."""
    names = sorted({sample.class_name for sample in split.test} - {*known})
    if pooled(split) or not names or not known:
        return []
    return [
        f"the model does not know a class {listed(names)}, which is the name of the folder: each image is judged as "
        f"the class that it looks like most. The model knows {listed(known)}; rename the folder if it is one of these"
    ]


def pooled(split: Split) -> str:
    """Name under which all classes count as one, of a semantic split; empty where each class has its own metrics."""
    return split.name.partition("/")[2] or split.name if split.kind == SEMANTIC else ""


def measure(predictor: Predictor, split: Split, console: Console) -> Evaluation:
    """Score a split's test images and compare with their labels."""
    return evaluation.evaluate(predictor, split.test, console.progress, pooled=pooled(split))


def again_with(predictor: Predictor, split: Split) -> Again:
    """Scores test images once more by their names, for pictures."""
    samples = {sample.name: sample for sample in split.test}
    return lambda names: predictor.predict([samples[name] for name in names])


def values_of(measured: Evaluation, split: Split) -> dict[str, Any]:
    """Everything that was measured on a split, ready for JSON: ``classes``, ``mean`` and more."""
    calls = defaultdict(list)
    for row in measured.rows:
        if row["label"]:
            calls[pooled(split) or row["true_class"]].append((row["defect_type"], 1, row["is_anomaly"]))
    return {
        **measured.table,
        "undefined": results.grouped(measured.table["undefined"], measured.table["classes"]),
        "defects_mean": evaluation.shared_defects(measured.table["defects"]),
        "students": {name: table["mean"] for name, table in measured.students.items()},
        "decisions": measured.decisions,
        "defect_decisions": {name: evaluation.count_calls(calls[name]) for name in sorted(calls)},
        "decisions_mean": {k: v for k, v in mean_of(measured.decisions).items() if k.endswith("_rate")},
        "split": {"name": split.name, "hash": split.hash, "kind": split.kind},
        "failed": measured.failed,
        "masks_not_used": measured.masks,
    }


# ------------------------------------------------------------------------------------------------------ the report


def remarks(values: Mapping[str, Any]) -> list[str]:
    """Files that do not count and metrics that are not defined, with reasons; of many files the first ones."""
    lines = []
    for what, key in (("not scored", "failed"), ("mask not used, image metrics only", "masks_not_used")):
        lines += [f"{what}: {line}" for line in values[key][:SHOWN]]
        if len(values[key]) > SHOWN:
            lines.append(f"{what}: {len(values[key]) - SHOWN:,} more (all of them are in the JSON)")
    return [*lines, *values.get("undefined", ())]


def test_facts(split: Split, images: int) -> dict[str, str]:
    """What was tested: numbers of two reports can be compared if these are the same."""
    which = split.name if split.name == AS_GIVEN else f"test images of {split.name}"
    return {"tested on": f"{images} {which}", "hash of the data (images, labels, masks)": split.hash}


def run_facts(config: Mapping[str, Any]) -> dict[str, str]:
    """What must stand beside the numbers of a trained model; ``config`` has its settings and its record."""
    return {
        "teacher": f"{config['teacher']['name']} ({config['teacher']['hash']})",
        "input size": f"{config['size']}",
        "training steps": f"{config['training']['steps']}",
        "seed": f"{config['train']['seed']}",
        "defect pixels of a mask": f"values {results.MASK_RULE}",
        "maps are measured at": f"the size of the {results.MAP_SIZE}",
    }


def sections(values: Mapping[str, Any], review: Review, again: Again | None) -> list[Section]:
    """Decisions, other thresholds, pictures, metrics, and what else to know; see `Review.sections`."""
    lines, untested = remarks(values), list[str]()
    if values["decisions"] and not any(row.get("good") for row in values["decisions"].values()):
        untested = [
            "No good image was tested, so nothing is known of false alarms. Images that the model learnt do not "
            "count: give a folder that also has good images which were not learnt."
        ]
    return [
        Section("Decisions", tuple(untested), tuple(decision_tables(values))),
        *review.sections(again),
        Section("Metrics", (), tuple(metric_tables(values))),
        *([Section("Remarks", tuple(lines), printed=False)] if lines else []),
    ]


def decision_tables(values: Mapping[str, Any]) -> Iterator[Table]:
    """Defects found and good images called bad, beside image AUROC."""
    rows = {name: {**values["classes"].get(name, {}), **row} for name, row in values["decisions"].items()}
    if len(rows) > 1:
        rows["mean"] = {**values["mean"], **values["decisions_mean"]}
    note = "An image is called bad if its score reaches the threshold of the class that it looks like most."
    shown = [{"class": name, "image AUROC": row.get("image_auroc"), **calls(row)} for name, row in rows.items()]
    if shown:
        yield Table.of("decisions at the thresholds in use", shown, note)


def calls(row: Mapping[str, Any]) -> dict[str, str | None]:
    """Cells of what `evaluation.count_calls` says of a class."""
    cells: dict[str, str | None] = {}
    for words, part, whole, rate in (
        ("defects found", "found", "defects", "found_rate"),
        ("false alarms", "false_alarms", "good", "false_alarm_rate"),
    ):
        cells[words] = f"{row[part]} of {row[whole]}" if row.get(whole) else None
        cells[f"{words}, %"] = f"{100 * row[rate]:.1f}" if rate in row else None
    return cells


def metric_tables(values: Mapping[str, Any]) -> Iterator[Table]:
    """Metrics by class, of each student alone, by defect type, and intervals where they were asked for."""
    if values["mean"]:  # undefined with one label only, which a remark says
        students = {f"{name} alone": row for name, row in values["students"].items()}
        yield Table.of("metrics", results.metric_rows({**values["classes"], "mean": values["mean"]}))
        yield Table.of("mean of each student alone", results.metric_rows(students, "score"))
    yield from defect_tables(values)
    if intervals := values.get("intervals"):
        rows = {
            name: {metric: f"{low:.4f} - {high:.4f}" for metric, (low, high) in row.items()}
            for name, row in intervals.items()
        }
        yield Table.of("95 % bootstrap intervals over the test images", results.metric_rows(rows))


def defect_tables(values: Mapping[str, Any]) -> Iterator[Table]:
    """Per class and defect type: what was found, image AUROC against its good images, AU-sPRO where defined."""
    measured = {"image AUROC": values["defects"], "AU-sPRO to 0.05": values.get("defects_auspro_005", {})}
    rows: list[dict[str, Any]] = []
    for name, kinds in values.get("defect_decisions", {}).items():
        for kind, row in kinds.items():
            areas = {title: by_class.get(name, {}).get(kind) for title, by_class in measured.items()}
            rows.append({"class": name, "defect": kind, **calls(row), **areas})
    means = {title: evaluation.shared_defects(by_class) for title, by_class in measured.items()}
    for mean in means.values():
        if mean:
            mean["mean of the types"] = sum(mean.values()) / len(mean)
    for kind in dict.fromkeys(kind for mean in means.values() for kind in mean):
        areas = {title: mean.get(kind) for title, mean in means.items()}
        rows.append({"class": "mean of classes", "defect": kind, **areas})
    if rows:
        yield Table.of("defect types", rows)
