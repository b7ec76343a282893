"""``twinspect eval``: a bundle against labelled data; split, hash and leaks stand beside the numbers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinspect.commands import results
from twinspect.commands.options import EvalOptions
from twinspect.commands.results import Again, Review
from twinspect.config import RunConfig
from twinspect.console import NOTHING_SCORED, Console
from twinspect.data import Loaded
from twinspect.data.protocols import INDUSTRIAL, SEMANTIC, Split, find_leaks, find_split, is_semantic, make_splits
from twinspect.data.samples import has_pixel_truth, read_regions, read_sample_mask
from twinspect.decide.decision import Decision
from twinspect.decide.recalibrate import key_of
from twinspect.detector import Detector
from twinspect.errors import ConfigError, DataError, listed
from twinspect.inference.predictor import Predictor
from twinspect.inference.result import Result
from twinspect.metrics import Evaluator, mean_of
from twinspect.report import Report, Section, Table
from twinspect.types import TEST, Progress, Sample

AS_GIVEN = "labelled test images"
_CLEAR, _FEW = 0.9, 0.5  # AUROC from which defects stand out, and share of them found below which it is said
SHOWN = 20  # files with one kind of problem that are named
Pair = tuple[Sample, Sample]
STUDENTS = ("score_local", "score_semantic")
_Mask = NDArray[np.bool_]
_Truth = tuple[_Mask | None, list[tuple[_Mask, float]] | None]  # a mask, or regions with their saturation areas


class Evaluation(NamedTuple):
    """What was measured: see `metrics_of`."""

    values: dict[str, Any]
    rows: list[dict[str, Any]]  # columns of a result, and the labels
    seconds: float  # wall time of decoding and prediction


def evaluate(options: EvalOptions, console: Console) -> None:
    """Score the test images of a data set, print the metrics and write them where asked."""
    results.check_outputs(options.report, options.json_file)
    detector = Detector.load(options.model, options.device)
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
    review = Review(measured.rows)
    values = {**measured.values, "other_thresholds": review.other_thresholds()}
    if not detector.record_["training"]["steps"]:  # it has no students
        values["students"] = values["student_defects"] = {}
    values["cautions"] = cautions(values, predictor.decision)
    values["config"] = {
        "bundle": options.model.name, "data": options.data.name, "layout": loaded.layout,
        "seconds": round(measured.seconds, 2), "test_images": len(measured.rows), "failed": len(values["failed"]),
        "mask_rule": results.MASK_RULE, "map_size": results.MAP_SIZE, **config.to_dict(), **detector.record_,
    }  # fmt: skip
    leaked = [[str(tested.image), str(known.image)] for known, tested in pairs]
    values["leaks"] = {"pairs": leaked, "dropped": options.drop_leaks}
    console.warn(*unknown_classes(split, predictor.decision.classes), *remarks(values))
    again = again_with(predictor, split) if results.shows_pictures(options.report) else None
    facts = {
        **test_facts(split, len(measured.rows)),
        "copies of training images among them": f"{len({tested for _, tested in pairs})}",
        **run_facts(values["config"]),
    }
    title = f"{options.model.name} on {options.data.name}"
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
            replace(s, split=TEST, label=0) if s.is_good and not any(has_learnt(p, s) for p in predictors) else s
            for s in samples
        ]
    others = tuple(s for s in samples if s.split != TEST)
    return Split(AS_GIVEN, INDUSTRIAL, others, (), tuple(test_samples(samples)))


def test_samples(samples: Sequence[Sample]) -> list[Sample]:
    """The labelled test images; a DataError where there are none."""
    labelled = [s for s in samples if s.split == TEST and s.label is not None]
    if not labelled:
        raise DataError(
            "no labelled test images found; eval needs images of defects (a folder such as bad/ beside good/, or "
            "test/good and test/scratch), or a table with labels. "
            "To score unlabelled images type: twinspect predict MODEL PATH"
        )
    return labelled


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
    if split.kind == SEMANTIC or not names or not known:
        return []
    what = "a class" if len(names) == 1 else "classes"
    return [
        f"the model does not know {what} {listed(names)}, as the data call them: each image is judged as the class "
        f"that it looks like most. The model knows {listed(known)}; rename a folder if it is one of these"
    ]


def measure(predictor: Predictor, split: Split, console: Console) -> Evaluation:
    """Score a split's test images and compare with their labels; the values name the split.

    Of a semantic split all classes count as one, which has the name of its part.
    """
    samples = split.test
    if split.kind == SEMANTIC:
        samples = tuple(replace(sample, class_name=split.name.partition("/")[2]) for sample in samples)
    measured = metrics_of(predictor, samples, console.progress, pixel=split.kind != SEMANTIC)
    measured.values["split"] = {"name": split.name, "hash": split.hash, "kind": split.kind}
    return measured


def again_with(predictor: Predictor, split: Split) -> Again:
    """Scores test images once more by their names, for pictures."""
    samples = {sample.name: sample for sample in split.test}
    return lambda names: predictor.predict([samples[name] for name in names])


def metrics_of(predictor: Predictor, samples: Sequence[Sample], progress: Progress, pixel: bool = True) -> Evaluation:
    """Score labelled samples and compute every metric; pixel metrics at the images' own resolution.

    An image that cannot be read, and a mask that cannot be read or does not fit its image, is listed and left out.
    Where the data state saturation areas (MVTec LOCO) every mask file is one region and AU-sPRO is added.
    Without ``pixel`` the images alone are compared.

    Returns:
        Values ready for JSON: those of `Evaluator.compute` of the joint score; ``students``, the mean image metrics
        of the local and the semantic score alone, but of none that is the same for all images; ``student_defects``,
        its image AUROC by class and type of defect; ``decisions`` by
        class, and ``defect_decisions`` also by type, at the thresholds in use (`count_calls`); ``decisions_mean``;
        ``failed``, images that could not be scored, and ``masks_not_used``, with reasons.

    Raises:
        DataError: a score or map that is not finite.
    """
    masked = {s.class_name for s in samples if s.masks and pixel}
    began, joint, students = time.monotonic(), Evaluator(pixel), {n: Evaluator(False) for n in STUDENTS}
    rows: list[dict[str, Any]] = []
    failed, masks_not_used = list[str](), list[str]()
    results = predictor.predict(samples, maps=bool(masked), pixels=False)
    for done, (sample, result) in enumerate(zip(samples, results, strict=True)):
        progress("evaluating", done + 1, len(samples))
        if result.error:
            failed.append(f"{result.path}: {result.error}")
            continue
        class_name = sample.class_name
        truth: _Truth = (None, None)
        use_map = sample.class_name in masked and has_pixel_truth(sample)
        if use_map and sample.masks:
            try:
                truth = _truth_of_pixels(sample, result)
            except DataError as error:
                use_map = False
                masks_not_used.append(str(error))
        joint.update(
            result.score, sample.label, class_name, sample.defect_type, result.map if use_map else None, *truth,
            name=result.path, group=sample.group,
        )  # fmt: skip
        for name, evaluator in students.items():
            score = getattr(result, name)
            evaluator.update(score, sample.label, class_name, sample.defect_type, name=f"{result.path} ({name})")
        labels = {"true_class": sample.class_name, "label": sample.label, "defect_type": sample.defect_type}
        rows.append({**result.row(), **labels})
    seconds, table = time.monotonic() - began, joint.compute()
    told = [name for name in STUDENTS if len({row[name] for row in rows}) > 1]  # a model may have no semantic reading
    alone = {name: students[name].compute() for name in told}
    decisions = count_calls(rows, "true_class")
    defects = {name: [row for row in rows if row["label"] and row["true_class"] == name] for name in decisions}
    values = {
        **table,
        "students": {name: table["mean"] for name, table in alone.items()},
        "student_defects": {name: table["defects"] for name, table in alone.items()},
        "decisions": decisions,
        "defect_decisions": {name: count_calls(of, "defect_type") for name, of in defects.items() if of},
        "decisions_mean": {k: v for k, v in mean_of(decisions).items() if k.endswith("_rate")},
        "failed": failed,
        "masks_not_used": masks_not_used,
    }
    return Evaluation(values, rows, seconds)


def _truth_of_pixels(sample: Sample, result: Result) -> _Truth:
    """The mask of an image, or its regions where the data set states saturation areas.

    A DataError where a mask cannot be used, or says another thing than the label.
    """
    shape = (result.height, result.width)
    names = ", ".join(str(path) for path in sample.masks)
    mask, regions = None, read_regions(sample, shape) if sample.label == 1 else None
    marks = bool(regions)
    if regions is None:
        mask = read_sample_mask(sample, shape)
        marks = bool(mask.any())
        if sample.label == 1 and all(edge.all() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])):
            raise DataError(
                f"{names}: marks the whole border of {sample.image}; are good and defect exchanged in it?"
            )
    if marks and sample.label == 0:
        raise DataError(f"{names}: marks a defect, and {sample.image} is called good")
    if not marks and sample.label == 1:
        raise DataError(f"{names}: marks no pixel, and {sample.image} is called a defect")
    return mask, regions


def count_calls(rows: Iterable[Mapping[str, Any]], by: str) -> dict[str, dict[str, float]]:
    """What the thresholds in use make of `Evaluation.rows`, by one of their columns; a share of none is absent."""
    counts: dict[str, dict[str, float]] = {}
    for row in rows:
        counted = counts.setdefault(row[by], dict.fromkeys(("defects", "found", "good", "false_alarms"), 0))
        counted["defects" if row["label"] else "good"] += 1
        counted["found" if row["label"] else "false_alarms"] += row["is_anomaly"]
    for counted in counts.values():
        for part, whole, rate in (("found", "defects", "found_rate"), ("false_alarms", "good", "false_alarm_rate")):
            if counted[whole]:
                counted[rate] = counted[part] / counted[whole]
    return dict(sorted(counts.items()))


def shared_defects(defects: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean over classes per defect type, if all classes have the same types (MVTec LOCO's two), else empty."""
    kinds = [tuple(sorted(row)) for row in defects.values()]
    if len(kinds) < 2 or len(set(kinds)) != 1 or len(kinds[0]) < 2:
        return {}
    return {kind: float(np.mean([row[kind] for row in defects.values()])) for kind in kinds[0]}


# ------------------------------------------------------------------------------------------------------ the report


def remarks(values: Mapping[str, Any]) -> list[str]:
    """Files that do not count and metrics that are not defined, with reasons; of many files the first ones."""
    lines = []
    for what, key in (("not scored", "failed"), ("mask not used, image metrics only", "masks_not_used")):
        lines += [f"{what}: {line}" for line in values[key][:SHOWN]]
        if len(values[key]) > SHOWN:
            lines.append(f"{what}: {len(values[key]) - SHOWN:,} more (all of them are in the JSON)")
    return [*lines, *values.get("undefined", ()), *values.get("cautions", ())]


def cautions(values: Mapping[str, Any], decision: Decision) -> list[str]:
    """What to do about classes with more false alarms than expected, or a threshold above most defects."""
    lines = []
    for name, row in values["decisions"].items():
        if name not in decision.classes or name in decision.fixed:  # what was set by hand or labels promises nothing
            continue
        rule, auroc = decision.rule(name, given=False), values["classes"].get(name, {}).get("image_auroc", 0.0)
        expected = max(rule.image.max_fpr, 1 / (len(rule.scores) + 1))
        if row["false_alarms"] > 2 + 3 * expected * row["good"]:
            lines.append(
                f"{name}: {row['false_alarms']} of {row['good']} good images are called bad, and about "
                f"{100 * expected:.0f} % were expected, so they differ from those that were learnt; to learn good "
                f"ones like them type: twinspect update MODEL GOOD/ --class {name}"
            )
        elif auroc >= _CLEAR and row.get("found_rate", 1.0) < _FEW:
            lines.append(
                f"{name}: {row['found']} of {row['defects']} defects are found, though most score above good images "
                f"(AUROC {auroc:.2f}): a few good training images set a high threshold. `twinspect info MODEL` names "
                "them; leave them out (fit --drop-outliers N), or allow more false alarms (calibrate --max-fpr 0.05)"
            )
    return lines


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
        "scoring": RunConfig.from_dict({part: config[part] for part in ("model", "train")}).model.scores(),
        "seed": f"{config['train']['seed']}",
        "defect pixels of a mask": f"values {results.MASK_RULE}",
        "maps are measured at": f"the size of the {results.MAP_SIZE}",
    }


def sections(values: Mapping[str, Any], review: Review, again: Again | None) -> list[Section]:
    """Decisions, other thresholds, pictures, metrics, and what else to know; see `Review.sections`."""
    lines = remarks(values)
    rows = {name: {**values["classes"].get(name, {}), **row} for name, row in values["decisions"].items()}
    if len(rows) > 1:
        rows["mean"] = {**values["mean"], **values["decisions_mean"]}
    note = "An image is called bad if its score reaches the threshold of the class that it looks like most."
    shown = [{"class": name, "image AUROC": row.get("image_auroc"), **calls(row)} for name, row in rows.items()]
    decisions = (Table.of("decisions at the thresholds in use", shown, note),) if shown else ()
    return [
        Section("Decisions", untested(values["decisions"]), decisions),
        *review.sections(again),
        Section("Metrics", (), tuple(metric_tables(values))),
        *([Section("Remarks", tuple(lines), printed=False)] if lines else []),
    ]


def untested(decisions: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """A sentence where images were scored and none of them is good."""
    if not decisions or any(row["good"] for row in decisions.values()):
        return ()
    return (
        "No good image was tested, so nothing is known of false alarms. Images that the model learnt do not count: "
        "give a folder that also has good images which were not learnt.",
    )


def calls(row: Mapping[str, Any]) -> dict[str, str | None]:
    """Cells of what `count_calls` says of a class."""
    cells: dict[str, str | None] = {}
    for words, part, whole, rate in (
        ("defects found", "found", "defects", "found_rate"),
        ("false alarms", "false_alarms", "good", "false_alarm_rate"),
    ):
        cells[words] = f"{row[part]} of {row[whole]}" if row.get(whole) else None
        cells[f"{words}, %"] = f"{100 * row[rate]:.1f}" if rate in row else None
    return cells


def metric_tables(values: Mapping[str, Any]) -> Iterator[Table]:
    """Metrics by class, of the local and the semantic score alone, and by defect type."""
    if values["mean"]:  # undefined with one label only, which a remark says
        students = {f"{name} alone": row for name, row in values["students"].items()}
        yield Table.of("metrics", results.metric_rows({**values["classes"], "mean": values["mean"]}))
        if students:
            yield Table.of("mean of each score alone", results.metric_rows(students, "score"))
    yield from defect_tables(values)


def defect_tables(values: Mapping[str, Any]) -> Iterator[Table]:
    """Per class and defect type: what was found, image AUROC against its good images, AU-sPRO where defined."""
    measured = {"image AUROC": values["defects"], "AU-sPRO to 0.05": values.get("defects_auspro_005", {})}
    rows: list[dict[str, Any]] = []
    for name, kinds in values.get("defect_decisions", {}).items():
        for kind, row in kinds.items():
            areas = {title: by_class.get(name, {}).get(kind) for title, by_class in measured.items()}
            rows.append({"class": name, "defect": kind, **calls(row), **areas})
    means = {title: shared_defects(by_class) for title, by_class in measured.items()}
    for mean in means.values():
        if mean:
            mean["mean of the types"] = sum(mean.values()) / len(mean)
    for kind in dict.fromkeys(kind for mean in means.values() for kind in mean):
        areas = {title: mean.get(kind) for title, mean in means.items()}
        rows.append({"class": "mean of classes", "defect": kind, **areas})
    if rows:
        yield Table.of("defect types", rows)
