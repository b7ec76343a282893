"""``twinspect eval``: a bundle against labelled data; split, hash and leaks stand beside the numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twinspect import evaluation
from twinspect.commands import results
from twinspect.commands.options import EvalOptions
from twinspect.commands.review import Again, Review
from twinspect.console import NOTHING_SCORED, Console
from twinspect.data import Loaded, protocols
from twinspect.data.leaks import find_leaks
from twinspect.decide.recalibrate import image_key
from twinspect.detector import Detector
from twinspect.errors import ConfigError, DataError
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result
from twinspect.report import Section, Table
from twinspect.types import TEST, Sample

AS_GIVEN = "test as the data say"
# Title of a column, what is counted, of how many, and the share's name.
_DECISIONS = (
    ("defects found", "found", "defects", "found_rate"),
    ("false alarms", "false_alarms", "good", "false_alarm_rate"),
)
SHOWN = 20  # files with one kind of problem that are named
Pair = tuple[Sample, Sample]


@dataclass(frozen=True, slots=True)
class TestSet:
    """What is measured on."""

    name: str  # of the split, or `AS_GIVEN`
    hash: str  # 12 hex digits that change with any image, label or mask listed
    known: tuple[Sample, ...]  # training and calibration images, for the leak check
    samples: tuple[Sample, ...]  # labelled test images
    pooled: str = ""  # name under which all classes count as one (semantic splits)

    def describe(self) -> str:
        """One line with name, hash and counts."""
        normal = sum(sample.label == 0 for sample in self.samples)
        return (
            f"{self.name} [{self.hash}]: {len(self.samples):,} test images ({normal:,} normal, "
            f"{len(self.samples) - normal:,} anomalous)"
        )


def evaluate(options: EvalOptions, console: Console) -> None:
    """Score the test images of a data set, print the metrics and write them where asked."""
    results.check_outputs(options.report, options.json_file)
    detector = Detector.load(options.bundle, options.weights)
    predictor, config, recorded = detector.predictor(), detector.config, detector.record_.get("split", {})
    loaded = results.read_data(options.data, options.layout, options.images, console)
    test = choose_test(loaded, options.split or recorded.get("name", ""), config.train.seed, [predictor])
    if recorded.get("name") == test.name and recorded["hash"] != test.hash:
        console.warn(f"the bundle was trained on another {test.name} [{recorded['hash']}]: check for shared images")
    pairs = find_leaks([*test.known, *test.samples])
    test = without_leaks(test, pairs) if options.drop_leaks else test
    console.say(test.describe())
    console.say(leak_line(pairs, "left out of the test" if options.drop_leaks else ""))
    measured = evaluation.evaluate(predictor, test.samples, console.progress, pooled=test.pooled)
    review = Review(measured.rows, test.pooled)
    values = {**values_of(measured, test), "other_thresholds": review.other_thresholds()}
    values["config"] = {
        "bundle": options.bundle.name, "data": options.data.name, "layout": loaded.layout,
        "seconds": round(measured.seconds, 2), "test_images": len(measured.rows), "failed": len(measured.failed),
        "mask_rule": results.MASK_RULE, "map_size": results.MAP_SIZE, **config.to_dict(), **detector.record_,
    }  # fmt: skip
    leaked = [[str(tested.image), str(known.image)] for known, tested in pairs]
    values["leaks"] = {"pairs": leaked, "dropped": options.drop_leaks}
    if options.intervals:
        values["intervals"] = measured.joint.intervals(seed=config.train.seed)
    # Masks are not spoken of again if the data's summary did.
    masks_named = any("no mask" in note for note in loaded.notes)
    notes = [text for text in values["undefined"] if not (masks_named and "mask" in text)]
    for line in (*problems(values, SHOWN), *notes):
        console.warn(line)
    results.say_tables(tables(values), console)

    def again(names: list[str]) -> Iterator[Result]:
        samples = {sample.name: sample for sample in test.samples}
        return predictor.predict([samples[name] for name in names])

    shown = sections(values, notes, review, again if results.shows_pictures(options.report) else None)
    facts = {
        "split": f"{test.name} [{test.hash}]",
        "test images": f"{len(measured.rows)}",
        **run_facts(values["config"]),
        "leaks": f"{len(pairs)} pairs",
    }
    title = f"{options.bundle.name} on {options.data.name}"
    results.publish(options, title, facts, values, shown, console)
    if not measured.rows:
        raise SystemExit(NOTHING_SCORED)


def choose_test(loaded: Loaded, name: str, seed: int, predictors: Sequence[Predictor] = ()) -> TestSet:
    """The test set of a named split, or the data's own labelled test images.

    Where a set has no good test image (a folder of good images, or good and bad ones side by side), its good images
    are test images, but for those that one of ``predictors`` has learnt.
    """
    samples: Sequence[Sample] = loaded.samples
    if name and name != AS_GIVEN:
        return of_split(protocols.find_split(samples, name, seed))
    if protocols.is_semantic(samples):
        accepted = ", ".join(split.name for split in protocols.make_splits(samples, seed=seed))
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
    test = tuple(evaluation.test_samples(samples))
    known = tuple(s for s in samples if s.split != TEST)
    return TestSet(AS_GIVEN, protocols.content_hash([(TEST, test)]), known, test)


def has_learnt(predictor: Predictor, sample: Sample) -> bool:
    """Whether a model was trained on an image, by its content; of one that cannot be read, not."""
    try:
        return image_key(sample, predictor.runtime.size) in predictor.decision.trained
    except (DataError, OSError):  # said when it is scored
        return False


def of_split(split: protocols.Split) -> TestSet:
    """A protocol's split as what is measured on."""
    pooled = split.name.partition("/")[2] or split.name if split.kind == protocols.SEMANTIC else ""
    return TestSet(split.name, split.hash, (*split.train, *split.calibration), split.test, pooled)


def without_leaks(test: TestSet, pairs: Sequence[Pair]) -> TestSet:
    """The test set without images that are also training images: the model has seen those."""
    leaked = {sample for _, sample in pairs}
    unseen = tuple(sample for sample in test.samples if sample not in leaked)
    if not unseen:
        raise DataError("every test image is also a training image; nothing is left to measure on")
    return replace(test, samples=unseen, hash=protocols.content_hash([(TEST, unseen)])) if leaked else test


def leak_line(pairs: Sequence[Pair], dropped: str) -> str:
    """One sentence about images on both sides; ``dropped`` says what was done with them, empty for nothing."""
    if not pairs:
        return "leak check: no test image is byte-equal to a training image"
    count = len({sample for _, sample in pairs})
    first = f"first: {pairs[0][1].image} = {pairs[0][0].image}"
    action = dropped or "they flatter the numbers; --drop-leaks leaves them out"
    return f"leak check: {count:,} test images are byte-equal to training images ({first}): {action}"


def values_of(measured: evaluation.Evaluation, test: TestSet) -> dict[str, Any]:
    """Everything that was measured on a test set, ready for JSON: ``classes``, ``mean`` and more."""
    calls = defaultdict(list)
    for row in measured.rows:
        if row["label"]:
            calls[test.pooled or row["true_class"]].append((row["defect_type"], 1, row["is_anomaly"]))
    kind = protocols.SEMANTIC if test.pooled else protocols.INDUSTRIAL
    return {
        **measured.table,
        "undefined": results.grouped(measured.table["undefined"], measured.table["classes"]),
        "defects_mean": evaluation.shared_defects(measured.table["defects"]),
        "students": {name: table["mean"] for name, table in measured.students.items()},
        "decisions": measured.decisions,
        "defect_decisions": {name: evaluation.count_calls(calls[name]) for name in sorted(calls)},
        "decisions_mean": {k: v for k, v in results.mean_of(measured.decisions).items() if k.endswith("_rate")},
        "split": {"name": test.name, "hash": test.hash, "kind": kind},
        "failed": measured.failed,
        "masks_not_used": measured.masks,
    }


def problems(values: Mapping[str, Any], most: int | None = None) -> Iterator[str]:
    """Images that were not scored and masks that were not used: all of them, or the first of many."""
    for what, key in (("not scored", "failed"), ("mask not used, image metrics only", "masks_not_used")):
        lines = values[key]
        yield from (f"{what}: {line}" for line in lines[:most])
        if most is not None and len(lines) > most:
            yield f"{what}: {len(lines) - most:,} more (all of them are in the JSON)"


def run_facts(config: Mapping[str, Any]) -> dict[str, str]:
    """What must stand beside the numbers of a trained model; ``config`` has its settings and its record."""
    return {
        "teacher": f"{config['teacher']['name']} ({config['teacher']['hash']})",
        "input size": f"{config['size']}",
        "steps": f"{config['training']['steps']}",
        "seed": f"{config['train']['seed']}",
        "mask rule": results.MASK_RULE,
        "map size": results.MAP_SIZE,
    }


def sections(values: Mapping[str, Any], notes: Sequence[str], review: Review, again: Again | None) -> list[Section]:
    """Decisions, other thresholds, pictures, metrics, and what else to know; see `Review.sections`."""
    shown, remarks = tables(values), (*notes, *problems(values))
    return [
        Section("Decisions", (), tuple(shown[:1])),
        *review.sections(again),
        Section("Metrics", (), tuple(shown[1:])),
        *([Section("Remarks", remarks)] if remarks else []),
    ]


def tables(values: Mapping[str, Any]) -> list[Table]:
    """The tables of an evaluation."""
    shown = [decision_table(values)] if values["decisions"] else []
    if values["mean"]:  # undefined with one label only, which a remark says
        students = {f"{name} alone": row for name, row in values["students"].items()}
        shown.append(results.metric_table("metrics", {**values["classes"], "mean": values["mean"]}))
        shown.append(results.metric_table("mean of each student alone", students, first="score"))
    shown += defect_tables(values)
    if intervals := values.get("intervals"):
        rows = {
            name: {metric: f"{low:.4f} - {high:.4f}" for metric, (low, high) in row.items()}
            for name, row in intervals.items()
        }
        shown.append(results.metric_table("95 % bootstrap intervals over the test images", rows))
    return shown


def decision_table(values: Mapping[str, Any]) -> Table:
    """Defects found and good images called bad, beside image AUROC."""
    rows = {name: {**values["classes"].get(name, {}), **row} for name, row in values["decisions"].items()}
    if len(rows) > 1:
        rows["mean"] = {**values["mean"], **values["decisions_mean"]}
    shown = []
    for name, row in rows.items():
        cells = {"class": name, "image AUROC": row.get("image_auroc")}
        for title, part, whole, rate in _DECISIONS:
            cells[title] = f"{row[part]} of {row[whole]}" if row.get(whole) else None
            cells[f"{title}, %"] = f"{100 * row[rate]:.1f}" if rate in row else None
        shown.append(cells)
    note = "An image is called bad from the threshold of its predicted class on (severity 1)."
    return Table.of("decisions at the thresholds in use", shown, note)


def defect_tables(values: Mapping[str, Any]) -> list[Table]:
    """Per class and defect type: what was found, image AUROC against its good images, AU-sPRO where defined."""
    measured = {"image AUROC": values["defects"], "AU-sPRO to 0.05": values.get("defects_auspro_005", {})}
    rows = []
    for name, kinds in values.get("defect_decisions", {}).items():
        for kind, calls in kinds.items():
            counts = {
                "found": f"{calls['found']} of {calls['defects']}",
                "found, %": f"{100 * calls['found_rate']:.1f}",
            }
            areas = {title: by_class.get(name, {}).get(kind) for title, by_class in measured.items()}
            rows.append({"class": name, "defect": kind, **counts, **areas})
    means = {title: evaluation.shared_defects(by_class) for title, by_class in measured.items()}
    for mean in means.values():
        if mean:
            mean["mean of the types"] = sum(mean.values()) / len(mean)
    for kind in dict.fromkeys(kind for mean in means.values() for kind in mean):
        areas = {title: mean.get(kind) for title, mean in means.items()}
        rows.append({"class": "mean of classes", "defect": kind, **areas})
    return [Table.of("defect types", rows)] if rows else []
