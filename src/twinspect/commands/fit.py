"""What the commands do, apart from parsing; each function is one command."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinspect.commands.options import FitOptions
from twinspect.config import LARGEST, OF_MACHINE, ModelConfig, RunConfig, TrainConfig, of_effort
from twinspect.console import Console
from twinspect.detector import Detector
from twinspect.errors import NONSENSE, BundleError, ConfigError

if TYPE_CHECKING:
    from twinspect.inference.tiles import Tiles
    from twinspect.storage import Fitted

_COARSE = 2.0  # pixels of a picture that a pixel of the model covers, from which on this is said
_LEAST_LIKE = 5  # training images that are shown
_NO_TERMS = ("steps", "seconds", "stopped")  # entries of a training record that are no loss terms


def fit_command(options: FitOptions, settings: Mapping[str, Any], console: Console) -> None:
    """``twinspect fit``: read, train, calibrate, write the bundle.

    Args:
        options: what is read and written.
        settings: of `ModelConfig` and `TrainConfig`; None is not given: the dial's value, a TOML file's, or the
            default then holds.
        console: where to speak.
    """
    from twinspect import files
    from twinspect.bundle import refuse_unwritable
    from twinspect.training.distributed import joined
    from twinspect.training.resume import LOCK, LOG

    chosen = with_effort(options.effort, settings)
    before = start_from(options.resume_from, chosen["model"]) if options.resume_from is not None else None
    config = merged(options.config, chosen, before.config if before is not None else None)
    group = joined(config.train.device)
    console.quiet |= not group.leads
    refuse_unwritable(options.out)
    folder = options.work or options.out.with_name(f"{options.out.name}.work")
    files.refuse_unwritable(folder / LOG, "--work")
    busy = f"another fit is writing {folder} now; wait for it, or take another --out or --work"
    with closing(files.lock(folder / LOCK, busy)) if group.leads else nullcontext():
        try:
            fitted = learn(options, config, before, folder, console)
            if group.leads:
                leave(options, fitted, config, folder, console)
        finally:
            if group.leads and folder.is_dir() and [one.name for one in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()  # nothing was begun, or all of it is done


def learn(options: FitOptions, config: RunConfig, before: Fitted | None, folder: Path, console: Console) -> Fitted:
    """Read the data and train."""
    from twinspect import data as data_room
    from twinspect import files
    from twinspect.data.protocols import find_split
    from twinspect.data.roi import read_roi
    from twinspect.models.weights import explain_auto, resolve_auto
    from twinspect.training.fit import fit
    from twinspect.training.source import features_folder

    if config.train.cache_gb and (reason := files.why_unwritable(features_folder())):
        console.warn(
            f"no feature cache: {features_folder()} cannot be written ({reason}); training takes longer. Set another "
            "folder with TWINSPECT_HOME"
        )
    loaded = data_room.load(options.data, options.layout, options.images)
    for line in loaded.summary():
        console.say(line)
    split = find_split(loaded.samples, options.split, config.train.seed) if options.split else None
    if split is not None:
        console.say(split.describe())
    if config.model.teacher == "auto" and before is None:
        console.say(explain_auto(resolve_auto()))
    samples = loaded.samples if split is None else (*split.train, *split.calibration)
    roi = read_roi(options.roi) if options.roi is not None else None
    fitted = fit(samples, config, folder, console.progress, before, options.forget, roi)
    if split is not None:
        fitted.record["split"] = {"name": split.name, "hash": split.hash}
    return fitted


def leave(options: FitOptions, fitted: Fitted, config: RunConfig, folder: Path, console: Console) -> None:
    """Write the bundle, say what it holds, and clear up."""
    from twinspect.bundle import keep_old
    from twinspect.training.resume import leave_work, remove_checkpoint

    out = options.out
    for note in fitted.record["notes"]:
        console.warn(note)
    for skipped in fitted.skipped:
        console.warn(f"left out {skipped.path}: {skipped.reason}")
    detector = Detector(config=config)
    detector._fitted = fitted
    if not options.force and (kept := keep_old(out)):
        console.warn(kept)
    detector.save(out, options.thin)
    for line in report_lines(detector, out):
        console.say(line)
    if options.work is None:
        console.say(f"training log {leave_work(folder, out.with_name(f'{out.stem}.train.jsonl'))}")
    else:
        remove_checkpoint(folder)


def with_effort(effort: str, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by section, those of the dial's position in the place of what is not given."""
    dial = of_effort(effort)
    return {
        section: {
            one.name: dial[section].get(one.name) if settings[one.name] is None else settings[one.name]
            for one in fields(kind)
        }
        for section, kind in (("model", ModelConfig), ("train", TrainConfig))
    }


def start_from(bundle: Path, chosen: dict[str, Any]) -> Fitted:
    """The model to go on from.

    Raises:
        ConfigError: options that would change its shape.
    """
    from twinspect.storage import load

    fitted = load(bundle, str(chosen.get("weights") or ""))
    own = fitted.config.to_dict()["model"]
    other = [name for name, value in chosen.items() if name != "weights" and value not in (None, own[name])]
    if other:
        raise ConfigError(f"--resume-from keeps the bundle's model; leave out: {', '.join(other)}")
    chosen["weights"] = None
    return fitted


def merged(config_file: Path | None, chosen: dict[str, dict[str, Any]], before: RunConfig | None = None) -> RunConfig:
    """Settings of a TOML file, or of the run to go on from, under the options given on the command line."""
    base: dict[str, dict[str, Any]] = {"model": {}, "train": {}} if before is None else before.to_dict()
    for name in OF_MACHINE:  # the one that the bundle comes from may be another
        base["train"].pop(name, None)
    if config_file is not None:
        given = RunConfig.from_toml(config_file).to_dict()
        base = given if before is None else {**base, "train": given["train"]}
    values = {
        section: {**base[section], **{k: v for k, v in options.items() if v is not None}}
        for section, options in chosen.items()
    }
    return RunConfig.from_dict(values)


def report_lines(detector: Detector, out: Path) -> Iterator[str]:
    """What a finished training run says."""
    from twinspect.commands.decisions import threshold_lines

    record, decision = detector.record_, detector.fitted.decision
    training, counts = record["training"], record["parameters"]
    terms = ", ".join(f"{name} {value:.4f}" for name, value in training.items() if name not in _NO_TERMS)
    yield (
        f"trained {training['steps']} steps in {training['seconds']} s ({training['stopped']}); {terms}"
        if training["steps"]
        else "statistics of good images only: no steps, so the students say nothing"
    )
    if memory := record.get("memory"):
        yield memory_line(memory)
    yield from pixel_lines(record, detector.fitted.decision.tiles)
    yield (
        f"parameters: teacher {counts['teacher'] / 1e6:.1f} M frozen, "
        + "".join(f"{name} student {counts[name] / 1e6:.1f} M, " for name in ("local", "semantic") if name in counts)
        + f"statistics {counts['statistics_bytes'] / 1e6:.1f} MB"
    )
    yield from threshold_lines(decision)
    yield from outlier_lines(record)
    for row in record.get("resumed", {}).get("classes", ()):
        yield str(row["sentence"])
    yield f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)"


def outlier_lines(record: dict[str, Any]) -> Iterator[str]:
    """The training images that are least like the others, and those that were left out for it."""

    def named(rows: list[dict[str, Any]]) -> str:
        return ", ".join(f"{row['path']} ({row['score']:.1f})" for row in rows)

    if dropped := record.get("dropped"):
        yield f"left out, as they are least like the others (--drop-outliers): {named(dropped)}"
    listed = record["least_like"]
    yield f"training images least like the others (score): {named(listed[:_LEAST_LIKE])}"
    if apart := [row for row in listed if row["apart"]]:
        yield (
            f"{len(apart)} of them score{'s' if len(apart) == 1 else ''} apart from the rest, as anomalies among the "
            f"good ones would; look at them, and leave them out with --drop-outliers {len(apart)} if they are bad"
        )


def pixel_lines(record: dict[str, Any], tiles: Tiles) -> Iterator[str]:
    """What a pixel of the model covers, where it is more than two of the pictures', and what sees smaller defects."""
    from twinspect.inference.tiles import reach
    from twinspect.training.fit import fitting_tiles

    (height, width), size = record["sides"], record["size"]
    covers = max(height / reach(tiles[0]), width / reach(tiles[1])) / size
    if covers <= _COARSE:
        return
    rows, columns = fitting_tiles((height, width), size)
    finer = [f"--tiles {rows}x{columns}"] if rows * columns > tiles[0] * tiles[1] else []
    yield (
        f"one pixel of the model covers {covers:.1f} of yours ({width} x {height}, seen "
        + (f"in {tiles[0]} x {tiles[1]} tiles of {size}" if tiles != (1, 1) else f"at {size}")
        + f"): defects under about {3 * covers:.0f} pixels may be missed; "
        + " or ".join([*finer, f"--size {min(LARGEST, 2 * size)}"])
        + " sees smaller ones"
    )


def memory_line(memory: dict[str, Any]) -> str:
    """Peak memory, and the batch that it was needed for."""
    peak = f"peak memory {memory['peak_mb']:.0f} MB" if memory["peak_mb"] else "peak memory unknown here"
    gpu = f", of the GPU {memory['gpu_peak_mb']:.0f} MB" if memory.get("gpu_peak_mb") else ""
    steps = f"; steps of {memory['batch']} images a process" if memory["batch"] else ""
    return peak + gpu + steps


def info_lines(bundle: Path) -> dict[str, Any]:
    """What a bundle says of itself, without building the model."""
    from twinspect.bundle import read_bundle
    from twinspect.decide.decision import Decision, promises
    from twinspect.decide.rules import class_sentence
    from twinspect.inference.runtimes import export_info, is_export

    if is_export(bundle):
        return export_info(bundle)
    meta = read_bundle(bundle).meta
    decision = Decision.from_dict(meta.get("decision", {}), str(bundle))
    learnt = hashlib.sha256("".join(decision.trained).encode()).hexdigest()  # their ids are sorted
    try:
        return {
            "written by": f"twinspect {meta['twinspect']}, format {meta['format']}",
            "learnt from": f"{len(decision.trained)} images, sha256 of their ids {learnt[:16]}",
            "seed": meta["config"]["train"]["seed"],
            "thin": meta["thin"],
            **meta["record"],
            "model_id": decision.model_id,
            "threshold": decision.threshold.value,
            "promise": decision.threshold.sentence,
            "thresholds": {
                name: {"value": rule.image.value, "rule": rule.basis, "promise": class_sentence(rule)}
                for name, rule in promises(decision)
            },
            "config": meta["config"],
        }
    except NONSENSE as error:
        raise BundleError(f"{bundle}: its parts do not fit together ({error})") from None


def info_text(content: dict[str, Any]) -> Iterator[str]:
    """The same as aligned lines: one fact a line, then the thresholds; settings are for ``--json``."""
    from twinspect.commands.results import text_table
    from twinspect.report import Table

    apart = ("thresholds", "config", "least_like", "dropped")
    facts = dict(_flat({k: v for k, v in content.items() if k not in apart}))
    width = max(map(len, facts))
    yield from (f"{name:<{width}}  {value}" for name, value in facts.items())
    if "least_like" in content:
        yield from outlier_lines(content)
    if rows := tuple((name, row["value"], row["rule"]) for name, row in content.get("thresholds", {}).items()):
        yield from text_table(Table("thresholds", ("class", "threshold", "from"), rows))


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}, ")
        elif value not in ([], ""):
            several = value if isinstance(value, list) else [value]
            told = (", ".join(map(str, one.values())) if isinstance(one, dict) else str(one) for one in several)
            yield f"{above}{name}", "; ".join(told)
