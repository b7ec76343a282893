"""``twinspect diagnose``: which class hides which, as matrices in the terminal, JSON and a report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from twinspect import data
from twinspect.commands import results
from twinspect.commands.options import DiagnoseOptions
from twinspect.console import Console
from twinspect.decide.decision import mixed_up
from twinspect.diagnose import KINDS, Composite, Diagnosis, Plan
from twinspect.diagnose import diagnose as run
from twinspect.inference import load
from twinspect.inference.result import Result
from twinspect.report import Case, Cases, Report, Section, Table, case_of

_TITLES = {
    "mixup_auroc": "Mixup: image AUROC of two classes laid over each other, against normal images of the row's class",
    "cutpaste_auroc": "CutPaste: image AUROC of a piece of the column's class pasted into the row's class",
    "pixel_auroc": "CutPaste: pixel AUROC of finding the pasted piece",
    "aupro": "CutPaste: AUPRO (to 0.3) of finding the pasted piece",
}
_TEXT = (
    "Normal images of different classes were laid over each other (Mixup) or pasted into each other (CutPaste). "
    "A model that knows its classes scores them as anomalous; one in which classes interfere lets them pass. "
    "0.5 is guessing, 1 is certain."
)
_HARDEST = 5  # pictures of each kind in a report
_HIDDEN = 0.9  # AUROC below which a class is said to hide in another


def diagnose(options: DiagnoseOptions, console: Console) -> None:
    """Load, make images, score, say what was found, write the files asked for."""
    names = tuple(name.strip() for name in options.classes.split(",") if name.strip())
    plan = Plan(options.count, options.normals, options.seed, names)
    results.check_outputs(options.report, options.json_file)
    predictor = load(options.bundle, weights=options.weights)
    samples = data.load(options.data, options.layout, options.images).samples
    passed: dict[str, list[tuple[float, Case]]] = {kind: [] for kind in KINDS}  # the lowest scores of each kind

    def visit(made: Composite, result: Result) -> None:
        passed[made.kind].append((result.score, case_of(result, made.kind)))
        passed[made.kind] = sorted(passed[made.kind], key=lambda pair: pair[0])[:_HARDEST]

    pictures = results.shows_pictures(options.report)
    diagnosis = run(predictor, samples, plan, console.progress, visit if pictures else None)
    for failure in diagnosis.failed:
        console.warn(f"left out {failure}")
    sections = [Section("Which class hides which", (_TEXT, *sentences(diagnosis)), tuple(matrices(diagnosis)))]
    if pictures:
        scale = predictor.decision.map_scale
        cases = (Cases(kind, tuple(case for _, case in of_kind), scale) for kind, of_kind in passed.items())
        sections.append(Section("What passed most easily", (), tuple(cases)))
    model_id = predictor.decision.model_id
    values = {
        "bundle": options.bundle.name, "data": options.data.name, "model_id": model_id, "seed": options.seed,
        "count": options.count, "normals": options.normals, **diagnosis.values(),
    }  # fmt: skip
    facts = {
        "model": f"{options.bundle.name} ({model_id})",
        "data": options.data.name,
        "images per pair and kind": str(options.count),
        "normal images per class": f"up to {options.normals} of {', '.join(sorted(set(diagnosis.splits.values())))}",
        "seed": str(options.seed),
    }
    report = Report(f"How classes interfere in {options.bundle.name}", sections, facts, values)
    results.publish(report, options, console)


def matrices(diagnosis: Diagnosis) -> Iterator[Table]:
    """One table per measure: row = the class whose image it is, column = the class that intrudes."""
    for measure, title in _TITLES.items():
        rows = []
        for base, values in zip(diagnosis.classes, diagnosis.matrix(measure), strict=True):
            numbers = [value for value in values if value is not None]
            shown = ("-" if value is None else value for value in values)
            rows.append((base, *shown, sum(numbers) / len(numbers)))
        yield Table(title, ("class", *diagnosis.classes, "mean"), tuple(rows))


def sentences(diagnosis: Diagnosis) -> Iterator[str]:
    """The means, which class hides which, and which classes are mixed up."""
    mean = diagnosis.mean()
    yield (
        f"mean over {len(diagnosis.pairs)} ordered pairs: Mixup AUROC {mean['mixup_auroc']:.3f}, CutPaste AUROC "
        f"{mean['cutpaste_auroc']:.3f}, pixel AUROC {mean['pixel_auroc']:.3f}, AUPRO {mean['aupro']:.3f}"
    )
    hardest = sorted(diagnosis.pairs, key=_lowest)[:3]
    for pair in hardest:
        if _lowest(pair) < _HIDDEN:
            yield (
                f"{pair['other']} hides in {pair['base']}: Mixup AUROC {pair['mixup_auroc']:.3f}, CutPaste AUROC "
                f"{pair['cutpaste_auroc']:.3f}"
            )
    first = hardest[0]
    if _lowest(first) >= _HIDDEN:
        lowest = f"the lowest value is {_lowest(first):.3f}, {first['other']} in {first['base']}"
        yield f"no class hides in another: {lowest}"
    if mixed := mixed_up(diagnosis.taken):
        yield mixed


def _lowest(pair: dict[str, Any]) -> float:
    return float(min(pair["mixup_auroc"], pair["cutpaste_auroc"]))
