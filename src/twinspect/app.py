"""What the commands do, apart from parsing; each function is one command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinspect.config import RunConfig
from twinspect.console import Console
from twinspect.detector import Detector
from twinspect.errors import ConfigError
from twinspect.inference.result import Result


def fit_command(
    data: Path,
    layout: str,
    config_file: Path | None,
    chosen: dict[str, dict[str, Any]],
    out: Path,
    work: Path | None,
    thin: bool,
    console: Console,
) -> None:
    """``twinspect fit``: read, train, calibrate, write the bundle."""
    from twinspect import data as data_room
    from twinspect.models.weights import explain_auto, resolve_auto
    from twinspect.training.fit import fit

    config = merged(config_file, chosen)
    loaded = data_room.load(data, layout)
    for line in loaded.summary():
        console.say(line)
    if config.model.teacher == "auto":
        console.say(explain_auto(resolve_auto()))
    folder = work or out.with_name(f"{out.name}.work")
    fitted = fit(loaded.samples, config, folder, console.progress)
    for skipped in fitted.skipped:
        console.warn(f"left out {skipped.path}: {skipped.reason}")
    detector = Detector(config=config)
    detector._fitted = fitted
    detector.save(out, thin)
    for line in report_lines(detector, out):
        console.say(line)


def merged(config_file: Path | None, chosen: dict[str, dict[str, Any]]) -> RunConfig:
    """Settings of a TOML file under the options given on the command line."""
    base = RunConfig.from_toml(config_file).to_dict() if config_file else {"model": {}, "train": {}}
    values = {
        section: {**base[section], **{k: v for k, v in options.items() if v is not None}}
        for section, options in chosen.items()
    }
    return RunConfig.from_dict(values)


def report_lines(detector: Detector, out: Path) -> Iterator[str]:
    """What a finished training run says."""
    record, decision = detector.record_, detector.fitted.decision
    training, counts = record["training"], record["parameters"]
    yield (
        f"trained {training['steps']} steps in {training['seconds']} s ({training['stopped']}); "
        f"local {training.get('local', 0):.4f}, semantic {training.get('semantic', 0):.4f}"
    )
    yield (
        f"parameters: teacher {counts['teacher'] / 1e6:.1f} M frozen, local student {counts['local'] / 1e6:.1f} M, "
        f"semantic student {counts['semantic'] / 1e6:.1f} M, statistics {counts['statistics_bytes'] / 1e6:.1f} MB"
    )
    yield f"threshold {decision.threshold.value:.3f}: {decision.threshold.sentence}"
    yield f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)"


def eval_command(bundle: Path, data: Path, layout: str, json_file: str, weights: str, console: Console) -> None:
    """``twinspect eval``: metrics per class and mean, as a table and as JSON."""
    from twinspect import data as data_room
    from twinspect.evaluation import evaluate, test_samples

    detector = Detector.load(bundle, weights)
    loaded = data_room.load(data, layout)
    for line in loaded.summary():
        console.say(line)
    found = evaluate(detector.predictor(), test_samples(loaded.samples), console.progress)
    for failure in found.failed:
        console.warn(f"not scored: {failure}")
    values = {
        **found.table,
        "students": {name: table["mean"] for name, table in found.students.items()},
        "config": {
            "bundle": bundle.name, "data": data.name, "layout": loaded.layout, "seconds": round(found.seconds, 2),
            "images": len(found.rows), "failed": len(found.failed), "mask_rule": "> 0",
            "map_size": "original image", **detector.config.to_dict(), **detector.record_,
        },
    }  # fmt: skip
    if json_file == "-":
        console.result(json.dumps(values, indent=1))
    elif json_file:
        Path(json_file).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for line in metric_lines(values):
        console.say(line)


def metric_lines(values: dict[str, Any]) -> Iterator[str]:
    """Metrics as an aligned text table: one row a class, then the mean."""
    rows = {**values["classes"], "mean": values["mean"]}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max(len(name) for name in rows)
    yield " " * width + "".join(f"{name:>13}" for name in names)
    for name, row in rows.items():
        cells = "".join(f"{row[m]:13.4f}" if m in row else f"{'-':>13}" for m in names)
        yield f"{name:<{width}}{cells}"
    for name, row in values["students"].items():
        yield f"{name} alone: " + ", ".join(f"{metric} {value:.4f}" for metric, value in row.items())


def predict_command(
    bundle: Path,
    paths: list[str],
    out: Path | None,
    maps: Path | None,
    overlays: Path | None,
    batch: int,
    weights: str,
    console: Console,
) -> None:
    """``twinspect predict``: rows to the terminal or a table, pictures on request."""
    from twinspect.inference.predictor import expand
    from twinspect.inference.table import TableWriter

    if batch < 1:
        raise ConfigError(f"--batch {batch}: at least 1")
    items = list(expand(paths))
    predictor = Detector.load(bundle, weights).predictor()
    predictor.batch = batch
    writer = TableWriter(out) if out is not None else None
    bad = errors = 0
    results = predictor.predict(items, maps=bool(maps or overlays), pixels=bool(overlays))
    try:
        for done, result in enumerate(results):
            save_pictures(result, done, maps, overlays)
            bad, errors = bad + int(bool(result.is_anomaly)), errors + int(bool(result.error))
            if writer is not None:
                writer.add(result.row())
                console.progress("scoring", done + 1, len(items))
            else:
                console.say(say_result(result))
    finally:
        if writer is not None:
            writer.close()
    console.say(f"{len(items)} images: {bad} anomalous, {errors} could not be read" + (f"; {out}" if out else ""))


def save_pictures(result: Result, number: int, maps: Path | None, overlays: Path | None) -> None:
    """Write an image's raw map and overlay; names keep the file's stem and stay unique by number."""
    import numpy as np

    if result.error:
        return
    stem = f"{number:06d}_{Path(result.path).stem}"
    if maps is not None and result.map is not None:
        maps.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(maps / f"{stem}.npz", map=result.map.astype(np.float16))
    if overlays is not None:
        result.save_overlay(overlays / f"{stem}.png")


def say_result(result: Result) -> str:
    """One line for one image."""
    if result.error:
        return f"ERROR    {result.error}"
    word = "ANOMALY" if result.is_anomaly else "good"
    return f"{word:<8} score {result.score:9.3f}  p {result.p_value:.4f}  {result.class_name}  {result.path}"


def info_lines(bundle: Path) -> dict[str, Any]:
    """What a bundle says of itself, without building the model."""
    from twinspect.bundle import read_bundle
    from twinspect.inference.predictor import Decision

    meta = read_bundle(bundle).meta
    threshold = Decision.from_dict(meta["decision"]).threshold
    return {
        "written by": f"twinspect {meta['twinspect']}, format {meta['format']}",
        "thin": meta["thin"],
        **meta["record"],
        "threshold": threshold.value,
        "promise": threshold.sentence,
        "config": meta["config"],
    }
