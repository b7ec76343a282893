"""``twinspect fit``: settings from the dial, a file and options; training; what was learnt, in words.

``update``: further good images into a bundle; what was learnt is listed, and taken back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from twinspect import files
from twinspect.bundle import Fitted, copy_whole, keep_old, load, read_bundle, refuse_unwritable, save
from twinspect.commands.calibrate import threshold_section
from twinspect.commands.info import outlier_lines
from twinspect.commands.options import FitOptions, UpdateOptions
from twinspect.commands.results import checked_model, read_data, warn_of
from twinspect.config import LARGEST, OF_MACHINE, ModelConfig, RunConfig, TrainConfig, of_effort
from twinspect.console import Console
from twinspect.data.protocols import find_split
from twinspect.data.samples import read_roi
from twinspect.errors import BundleError, ConfigError
from twinspect.inference.decode import Tiles, reach
from twinspect.models.weights import explain_auto, resolve_auto
from twinspect.training.distributed import joined
from twinspect.training.fit import fit as train
from twinspect.training.fit import fitting_tiles
from twinspect.training.loop import LOCK, LOG, leave_work, remove_checkpoint
from twinspect.training.outcome import update as learn_more
from twinspect.training.source import features_folder

_COARSE = 2.0  # pixels of a picture that a pixel of the model covers, from which on this is said
_NO_TERMS = ("steps", "seconds", "stopped")  # entries of a training record that are no loss terms


def fit(options: FitOptions, settings: Mapping[str, Any], console: Console) -> None:
    """Read, train, calibrate, write the bundle; a setting of `ModelConfig` or `TrainConfig` is None if not typed."""
    config, before = configured(options, settings)
    group = joined(config.train.device)
    console.quiet |= not group.leads
    checked_model(options.out, options.out)
    folder = options.work or options.out.with_name(f"{options.out.name}.work")
    files.refuse_unwritable(folder / LOG, "--work")
    busy = f"another fit is writing {folder} now; wait for it, or take another --out or --work"
    with closing(files.lock(folder / LOCK, busy)) if group.leads else nullcontext():
        try:
            fitted = learn(options, config, before, folder, console)
            if group.leads:
                leave(options, fitted, folder, console)
        finally:
            if group.leads and folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()  # nothing was begun, or all of it is done


def learn(options: FitOptions, config: RunConfig, before: Fitted | None, folder: Path, console: Console) -> Fitted:
    """Read the data and train."""
    if config.train.cache_gb and (reason := files.why_unwritable(features_folder())):
        console.warn(
            f"no feature cache: {features_folder()} cannot be written ({reason}); training takes longer. Set another "
            "folder with TWINSPECT_HOME"
        )
    roi = read_roi(options.roi) if options.roi is not None else None
    loaded = read_data(options.data, options.layout, options.images, console)
    split = find_split(loaded.samples, options.split, config.train.seed) if options.split else None
    if split is not None:
        console.say(split.describe())
    if config.model.teacher == "auto" and before is None:
        console.say(explain_auto(resolve_auto()))
    samples = loaded.samples if split is None else (*split.train, *split.calibration)
    fitted = train(samples, config, folder, console.progress, before, options.forget, roi)
    if split is not None:
        fitted.record["split"] = {"name": split.name, "hash": split.hash}
    return fitted


def leave(options: FitOptions, fitted: Fitted, folder: Path, console: Console) -> None:
    """Write the bundle, say what it holds, and clear up."""
    out = options.out
    warn_of(fitted, console)
    if not options.force and (note_of_old := keep_old(out)):
        console.warn(note_of_old)
    save(fitted, out)
    console.say(*report_lines(fitted, out))
    if options.work is None:
        console.say(f"training log {leave_work(folder, out.with_name(f'{out.stem}.train.jsonl'))}")
    else:
        remove_checkpoint(folder)


def configured(options: FitOptions, typed: Mapping[str, Any]) -> tuple[RunConfig, Fitted | None]:
    """Settings of a run, and the model that it goes on from. What was typed wins over the position of the dial."""
    dial, before = of_effort(options.effort), None
    chosen = {}
    for section, kind in (("model", ModelConfig), ("train", TrainConfig)):
        values = {field.name: typed[field.name] for field in fields(kind)}
        chosen[section] = dial[section] | {name: value for name, value in values.items() if value is not None}
    if options.resume_from is not None:
        before = load(options.resume_from)
        of_bundle = before.config.to_dict()["model"]
        if other := [name for name, value in chosen["model"].items() if value != of_bundle[name]]:
            raise ConfigError(f"--resume-from keeps the bundle's model; leave out: {', '.join(other)}")
    return merged(options.config, chosen, None if before is None else before.config), before


def merged(config_file: Path | None, chosen: dict[str, dict[str, Any]], before: RunConfig | None = None) -> RunConfig:
    """Settings of a TOML file, or of the run to go on from, under what is chosen on the command line."""
    base: dict[str, dict[str, Any]] = {"model": {}, "train": {}} if before is None else before.to_dict()
    for name in OF_MACHINE:  # the one that the bundle comes from may be another
        base["train"].pop(name, None)
    if config_file is not None:
        from_file = RunConfig.from_toml(config_file).to_dict()
        base = from_file if before is None else {**base, "train": from_file["train"]}
    return RunConfig.from_dict({section: {**base[section], **options} for section, options in chosen.items()})


def report_lines(fitted: Fitted, out: Path) -> Iterator[str]:
    """What a finished training run says."""
    record, decision = fitted.record, fitted.decision
    training, counts = record["training"], record["parameters"]
    terms = ", ".join(f"{name} {value:.4f}" for name, value in training.items() if name not in _NO_TERMS)
    yield (
        f"trained {training['steps']} steps in {training['seconds']} s ({training['stopped']}); {terms}"
        if training["steps"]
        else "statistics of good images only: no steps, so the students say nothing"
    )
    if memory := record.get("memory"):
        peak = f"{memory['peak_mb']:.0f} MB" if memory["peak_mb"] else "unknown here"
        gpu = f", of the GPU {memory['gpu_peak_mb']:.0f} MB" if memory.get("gpu_peak_mb") else ""
        steps = f"; steps of {memory['batch']} images a process" if memory["batch"] else ""
        yield f"peak memory {peak}{gpu}{steps}"
    yield from pixel_lines(record, decision.tiles)
    yield (
        f"parameters: teacher {counts['teacher'] / 1e6:.1f} M frozen, "
        + "".join(f"{name} student {counts[name] / 1e6:.1f} M, " for name in ("local", "semantic") if name in counts)
        + f"statistics {counts['statistics_bytes'] / 1e6:.1f} MB"
    )
    yield from threshold_section(decision).lines()
    yield from outlier_lines(record)
    yield f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)"


def pixel_lines(record: dict[str, Any], tiles: Tiles) -> Iterator[str]:
    """What a pixel of the model covers, where it is more than two of the pictures', and what sees smaller defects."""
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


def update(options: UpdateOptions, console: Console) -> None:
    """Learn the good images of ``new``, or list what was learnt, or take the last of it back."""
    bundle = options.model
    if (options.new is None) == (not options.listed and not options.undo):
        raise ConfigError("give a folder of new good images, or --list, or --undo: one of the three")
    if options.listed:
        lines = update_lines(read_bundle(bundle).meta["record"])
        console.say(*(lines or [f"{bundle} has learnt nothing beyond its training"]))
        return
    if options.new is None:
        console.say(_taken_back(bundle))
        return
    out = checked_model(options.out, bundle)
    fitted = load(bundle)
    loaded = read_data(options.new, options.layout, options.images, console)
    after = learn_more(fitted, loaded.samples, options.class_name or None, console.progress)
    warn_of(after, console)
    if out == bundle:
        before = _model_before(bundle, len(after.record["updates"]))
        refuse_unwritable(before)
        copy_whole(bundle, before)
        console.say(f"the model before is kept as {before}; twinspect update {bundle} --undo takes it back")
    save(after, out)
    console.say(update_lines(after.record)[-1], *threshold_section(after.decision).lines())
    console.say(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


def update_lines(record: dict[str, Any]) -> list[str]:
    """One line for every update of a model."""
    lines = []
    for number, entry in enumerate(record.get("updates", ()), 1):
        counts = ", ".join(f"{count} of {name}" for name, count in entry["classes"].items())
        first, more = entry["images"][0], sum(entry["classes"].values()) - 1
        lines.append(f"{number}. {entry['date']}: {counts} ({first}{f' and {more} more' if more else ''})")
    return lines


def _model_before(bundle: Path, updates: int) -> Path:
    """Where a model of so many updates has the one before the last of them."""
    return bundle.with_name(f"{bundle.name}.{updates - 1}")


def _taken_back(bundle: Path) -> str:
    """Put the model before the last update into its place."""
    record = read_bundle(bundle).meta["record"]
    updates = record.get("updates", [])
    if not updates:
        raise BundleError(f"{bundle} has learnt nothing beyond its training; there is nothing to take back")
    last, before = updates[-1], _model_before(bundle, len(updates))
    model_id = read_bundle(before).meta["decision"]["model_id"] if before.is_file() else "not there"
    if model_id != last["from"]:
        raise BundleError(
            f"the last update of {bundle} was made from model {last['from']}, and {before} is {model_id}: it was "
            "moved, or this update was written to a file of its own, and the bundle updated has not changed"
        )
    os.replace(before, bundle)
    return f"taken back: {update_lines(record)[-1]}; thresholds are those of before it, too"
