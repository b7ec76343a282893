"""One training run from samples to a trained, calibrated model.

Copies of a picture vouch for it, so cross-fitting would flatter a class of a few images and their copies. Of such a
class every image is left out together with its copies, one after another, and scored by what is learnt from the rest
(`fit_few`). These scores calibrate the class. One image alone cannot be left out; its copies' highest score decides.

Going on with ``fit --resume-from`` keeps the students' weights and the teacher's channel statistics. Everything else
(clusters, covariances, thresholds) is learnt anew from the images at hand, so the old ones must be among them. What
was trained on stays training, what was held out stays held out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinspect.bundle import Fitted
from twinspect.config import MOST_TILES, OF_MACHINE, ModelConfig, RunConfig, tiles_of
from twinspect.data.images import read_header
from twinspect.data.protocols import carve_calibration, count_once
from twinspect.data.samples import fit_roi, read_sample_rgb
from twinspect.decide.decision import Decision, image_id, mixed_up
from twinspect.device import gpu_arithmetic, keep_freed_memory, peak_mb
from twinspect.errors import ConfigError, DataError, TrainingError, listed
from twinspect.files import refuse_unwritable
from twinspect.inference.decode import OVERLAP, Tiles
from twinspect.models.contract import AnomalyModel, Outputs, build_model
from twinspect.models.teachers import Teacher, create_teacher
from twinspect.training.derived import Copy, add_copies, add_tolerated, by_class, few_classes, in_tiles
from twinspect.training.distributed import Group, joined
from twinspect.training.loop import LOG, train
from twinspect.training.normal import GoodImages, fit_statistics
from twinspect.training.outcome import outcome_of
from twinspect.training.source import FeatureSource, cache_folder
from twinspect.types import CALIBRATION, TRAIN, Progress, Sample, Skipped, silent

FEWEST = 8  # images below which students learn nothing, and scoring plain has nothing else
_SMALL_IMAGE = 160  # pixels a side up to which images are shown smaller than the teacher's default
_SMALLEST, _LARGEST, _ENLARGED = 128, 256, 6  # sides that small images are shown at; how far they are enlarged
_FINE = 3.0  # pixels of a picture that a pixel of the model may cover, for --tiles auto
_MEASURED = 32  # images whose sides are read off, for tiles and for the input side

_HEADERS = 200  # images of a class whose headers are read, to see whether they are taken alike
_INIT_IMAGES = 256  # images that channel statistics are taken from; more change the third digit
_START_IMAGES = 64  # images that a student is started from
_OTHER_SIDE = 1.5  # factor of width or height from which on it is said that they are not


def usual_sides(samples: Sequence[Sample]) -> tuple[int, int]:
    """Median height and width of some pictures in pixels; (0, 0) where none of them can be read."""
    sides = []
    for sample in samples[:: max(1, len(samples) // _MEASURED)]:
        with suppress(DataError, OSError):  # reported when all images are read
            shape = read_header(sample.image)[0] if sample.in_file else read_sample_rgb(sample).shape
            sides.append(shape[:2])
    height, width = np.median(sides, axis=0) if sides else (0, 0)
    return int(height), int(width)


def taken_differently(samples: Sequence[Sample]) -> list[str]:
    """A sentence for every class whose files differ in width or height, or are grey and in colour."""
    notes = []
    for name, members in sorted(by_class(sample for sample in samples if sample.in_file).items()):
        shapes, grey = list[tuple[int, int]](), list[bool]()
        for sample in members[:: math.ceil(len(members) / _HEADERS)]:
            with suppress(DataError, OSError):  # reported when all images are read
                shape, without_colours = read_header(sample.image)
                shapes.append(shape)
                grey.append(without_colours)
        differs = []
        if any(max(sides) >= _OTHER_SIDE * min(sides) for sides in zip(*shapes, strict=True)):
            low, high = (f"{width} x {height}" for height, width in (min(shapes), max(shapes)))
            differs.append(f"its images have different sizes, such as {low} and {high}")
        if 0 < sum(grey) < len(grey):
            differs.append(f"{sum(grey)} of {len(grey)} images are grey, the others in colour")
        if differs:
            notes.append(
                f"class {name}: {'; '.join(differs)}. Differences between good images hide defects: take them alike, "
                "or give each kind a class of its own"
            )
    return notes


def sized(config: ModelConfig, teacher: Teacher, sides: tuple[int, int]) -> ModelConfig:
    """The configuration with a smaller input side where none was asked for and the images are small.

    Pixels that an image does not have say nothing and cost time; a thumbnail that is enlarged too far is a blur to a
    teacher that was trained on photographs.
    """
    if config.size or teacher.info.vit or not 0 < max(sides) <= _SMALL_IMAGE:
        return config
    side = 32 * round(_ENLARGED * max(sides) / 32)
    return replace(config, size=min(_LARGEST, max(_SMALLEST, side)))


def fitting_tiles(sides: tuple[int, int], size: int) -> Tiles:
    """Rows and columns of tiles in which one pixel of the model covers about `_FINE` of the picture's, or more."""
    fine = _FINE
    while True:
        rows, columns = (max(1, math.ceil((side / (fine * size) - OVERLAP) / (1 - OVERLAP) - 0.1)) for side in sides)
        if rows * columns <= MOST_TILES:
            return rows, columns
        fine *= 1.1


def fit(
    samples: Sequence[Sample],
    config: RunConfig,
    work: Path | None = None,
    progress: Progress = silent,
    resume: Fitted | None = None,
    forget: bool = False,
    roi: NDArray[np.bool_] | None = None,
) -> Fitted:
    """Train on the good training images of ``samples`` and calibrate (`training.normal` says on which).

    Args:
        samples: of any splits; only normal images of ``train`` (and ``calibration``) are used.
        config: what to build and how to train it.
        work: folder for checkpoint and log; a killed run with the same settings resumes from it. The checkpoint
            stays, so that a result that could not be saved is not lost: see `loop.remove_checkpoint`.
        progress: called with (stage, done, total).
        resume: go on from this model instead of from scratch; its classes must be among ``samples``.
        forget: let go of classes of ``resume`` that are not.
        roi: region of interest in the pixels of the images, H x W, true inside: pixels outside are neither learnt nor
            scored. None takes that of ``resume``.

    Raises:
        DataError: too few usable images (the message lists what was skipped), or old classes are missing.
        OutputError: no place for checkpoint and log.
        TrainingError: a loss that is not finite, or a checkpoint of another run; of several processes, one that is
            gone or has other images.

    Under ``torchrun`` the processes share every batch and all return the same model; see `training.distributed`.
    """
    group = joined(config.train.device)
    progress = progress if group.leads else silent
    if resume is not None:
        if resume.config.model.tiles:
            raise ConfigError("training cannot go on from a model with tiles; train a new one on all images")
        refuse_forgetting(resume.decision, samples, forget)
    if work is not None and group.leads:
        refuse_unwritable(work / LOG, "--out or --work")
    keep_freed_memory()
    with gpu_arithmetic(group.device.type):
        dropped = _outliers(samples, config, progress, group, roi) if config.train.drop_outliers else []
        paths = {row["path"] for row in dropped}
        rest = [s for s in samples if s.name not in paths]
        fitted = _fitted(rest, config, work, progress, resume, group, roi)
    fitted.record["dropped"] = dropped
    return fitted


def _outliers(
    samples: Sequence[Sample], config: RunConfig, progress: Progress, group: Group, roi: NDArray[np.bool_] | None
) -> list[dict[str, Any]]:
    """Good images that are to be left out, as a model without students tells."""
    count = config.train.drop_outliers
    good = sum(sample.is_good for sample in samples)
    if 3 * count > good:
        raise ConfigError(f"--drop-outliers {count}: at most a third of the {good} good images can be left out")
    quick = RunConfig(replace(config.model, scoring="default"), replace(config.train, steps=0))
    return list(_fitted(samples, quick, None, progress, None, group, roi).record["least_like"][:count])


def _fitted(
    samples: Sequence[Sample],
    config: RunConfig,
    work: Path | None,
    progress: Progress,
    resume: Fitted | None,
    group: Group,
    roi: NDArray[np.bool_] | None,
) -> Fitted:
    """A run from images to a calibrated model."""
    training, held_out, few, notes = _images(samples, config)
    only_few = few.issuperset({sample.class_name for sample in training})
    if only_few:
        config = replace(config, train=replace(config.train, steps=0))
    torch.manual_seed(config.train.seed)
    sides = usual_sides(training)
    model, config, tiles = _model(config, sides, resume, roi, group)
    source = _source(model, in_tiles([*training, *held_out], tiles), config, progress, group)
    apart = set(in_tiles(held_out, tiles))
    held = {i for i, sample in enumerate(source.samples) if sample in apart}
    if resume is not None:
        held = keep_sides(source.keys, held, resume.decision)
    train_at = [i for i in range(len(source)) if i not in held]
    students = not only_few and (config.train.steps > 0 or resume is not None)
    skipped = list({image.path: image for image in source.skipped}.values())  # copies cannot be read either
    _refuse_too_few(len(train_at), len(held), skipped, students, model.scorer.plain)
    if resume is not None:
        take_over(model, resume.model)
    else:
        fit_scales(model, source, train_at, config.train.seed)
    origin = resume.decision.model_id if resume is not None else ""
    fingerprint = _fingerprint(config, model.teacher.hash() + origin, source.keys)
    group.refuse_difference(fingerprint, len(source))
    numbers = train(model, source, train_at, config.train, work, progress, fingerprint, group)
    try:
        good = fit_few(model, source, train_at, sorted(held), few, config.train.seed, progress, students)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise DataError(
            "the good images are too much alike to learn how good ones differ (copies of one image?); "
            "give images of different parts or moments"
        ) from error
    if not good.score_n.isfinite().all():
        raise TrainingError("the trained model gives scores that are not finite; train again with a lower --lr")
    decision, record, memory = outcome_of(model, source.samples, held, good, config.train)
    record["images"]["skipped"] = len(skipped)
    mixed = mixed_up(model.scorer.clusters.taken if tiles == (1, 1) else {})
    batch = min(config.train.batch, len(train_at)) // group.world if config.train.steps else 0
    record |= {
        "training": numbers,
        "notes": [*notes, *record["notes"], *([mixed] if mixed else [])],
        "sides": list(sides),
        "memory": _memory(group.device) | {"batch": batch},
    }
    if resume is not None:
        record["resumed"] = {"from": origin}
    return Fitted(model.cpu(), decision, config, record, skipped, good, memory)


def _images(
    samples: Sequence[Sample], config: RunConfig
) -> tuple[list[Sample], list[Sample], frozenset[str], list[str]]:
    """Images to train on and to hold out, with their copies; classes of a few images; sentences for the user."""
    notes: list[str] = []
    training, held_out = choose_images(samples, config, notes)
    notes += taken_differently([*training, *held_out])
    with_few = config.model.scores() == "default" and not config.model.tiles
    few = few_classes([*training, *held_out]) if with_few else frozenset[str]()
    training, held_out, copied = add_copies(training, held_out, config.train.pose, few)
    training, held_out, asked = add_tolerated(training, held_out, config.train.tolerate, config.train.seed)
    return training, held_out, few, [*notes, *copied, *asked]


def _model(
    config: RunConfig,
    sides: tuple[int, int],
    resume: Fitted | None,
    roi: NDArray[np.bool_] | None,
    group: Group,
) -> tuple[AnomalyModel, RunConfig, Tiles]:
    """The untrained model, what its settings come to on these images, and the tiles that it sees them in."""
    asked = config.model
    if resume is not None:
        teacher = resume.model.teacher
    else:
        teacher = create_teacher(asked.teacher, asked.weights, asked.pretrained)
        config = replace(config, model=sized(asked, teacher, sides))
    model = build_model(config.model, teacher).to(group.device)  # built on the CPU: a seed means the same everywhere
    tiles = tiles_of(config.model.tiles) if config.model.tiles != "auto" else fitting_tiles(sides, model.size)
    config = replace(config, model=replace(config.model, tiles="" if tiles == (1, 1) else f"{tiles[0]}x{tiles[1]}"))
    if roi is not None:
        fitting = fit_roi(roi, model.size, sides if all(sides) else (roi.shape[0], roi.shape[1]))
        model.roi_SS = torch.from_numpy(fitting).to(group.device)
    elif resume is not None:
        model.roi_SS = resume.model.roi_SS
    if model.roi_SS is not None and tiles != (1, 1):
        raise ConfigError("a region of interest (--roi) does not work with --tiles; leave one of them out")
    return model, config, tiles


def _source(
    model: AnomalyModel, samples: Sequence[Sample], config: RunConfig, progress: Progress, group: Group
) -> FeatureSource:
    """What the teacher says of all images; of several processes each prepares its share of what all then read."""
    root = cache_folder(model, len(samples), config.train.cache_gb)
    if group.local_world > 1:
        FeatureSource(model, samples[group.local_rank :: group.local_world], root, progress)
        group.gathered(None)
    return FeatureSource(model, samples, root, progress)


def _refuse_too_few(to_train: int, held: int, skipped: Sequence[Skipped], students: bool, plain: bool) -> None:
    """A `DataError` where too few good images are left."""
    least = (FEWEST - 2, 2) if students else (1, 0)
    if to_train < least[0] or held < least[1]:
        reasons = "".join(f"\n  {image.path}: {image.reason}" for image in skipped[:10])
        advice = " or type --steps 0 (statistics alone)" if students and not plain else ""
        raise DataError(
            f"too little is left: {to_train} images to train and {held} to calibrate; at least {least[0]} "
            f"and {least[1]} are needed: give more good images{advice}. {len(skipped)} images cannot be read{reasons}"
        )


def _memory(device: torch.device) -> dict[str, float | None]:
    """The most memory that this process has had, in MB: its own, and of a GPU."""
    gpu = {"gpu_peak_mb": torch.cuda.max_memory_reserved(device) / 1e6} if device.type == "cuda" else {}
    return {"peak_mb": peak_mb(), **gpu}


def choose_images(
    samples: Sequence[Sample], config: RunConfig, notes: list[str] | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Normal training images, and those held out for calibration (by the data set itself or carved).

    Copies are counted once, so that no image that is held out was learnt; ``notes`` takes sentences about them. A
    `DataError` where there are too few.
    """
    good = [s for s in samples if s.is_good]
    distinct, sentences = count_once(good, [s for s in samples if s.label == 1])
    normal = [s for s in distinct if s.split == TRAIN]
    fewest = 1 if config.model.scores() == "default" else FEWEST
    if len(normal) < fewest:
        raise DataError(
            f"{len(normal)} good training images found; at least {fewest} {'is' if fewest == 1 else 'are'} needed, "
            f"50 or more per class are better. {_advice(samples)}{''.join(f'. {n}' for n in sentences)}"
        )
    if notes is not None:
        notes += sentences
    if held := [s for s in distinct if s.split == CALIBRATION]:
        return normal, held
    if not config.train.steps:
        return normal, []  # nothing is held out from students that do not learn
    few = few_classes(normal) if fewest == 1 else ()  # they have none to spare
    many = [s for s in normal if s.class_name not in few]
    minimum = min(20, len(many) // 4)
    train_part, held = carve_calibration(many, config.train.holdout, config.train.seed, minimum)
    return [*train_part, *(s for s in normal if s.class_name in few)], list(held)


def _advice(samples: Sequence[Sample]) -> str:
    """What to type where good images are lacking."""
    folders = sorted({str(sample.image.parent) for sample in samples if sample.label == 1})
    if not folders or any(sample.label == 0 for sample in samples):
        return "Give a folder of good images, or one with train/good inside"
    return (
        f"All {len(samples)} images are taken as defects, because of the name of their folder ({listed(folders)}). "
        f"If they are good, rename it to good, or type: twinspect fit {folders[0]} --layout folder"
    )


def _fingerprint(config: RunConfig, teacher_hash: str, keys: Sequence[bytes]) -> str:
    """What a checkpoint must agree with: settings that shape the weights, the teacher, the images in order."""
    settings = config.to_dict()
    for name in ("time_budget_s", "checkpoint_every", "cache_gb", "thumbnails", *OF_MACHINE):
        settings["train"].pop(name)
    digest = hashlib.sha256(json.dumps([settings, teacher_hash], sort_keys=True).encode())
    for key in keys:
        digest.update(key)
    return digest.hexdigest()


@torch.no_grad()
def fit_scales(model: AnomalyModel, source: FeatureSource, indices: Sequence[int], seed: int) -> None:
    """Before training: channel statistics of the teacher's maps and tokens, then the student's own start."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [indices[i] for i in order[:_INIT_IMAGES]]
    channels = model.selection.channels
    sums = [torch.zeros(2, c, dtype=torch.float64, device=model.device) for c in channels]
    counts, tokens = [0] * len(channels), []
    for observed, _ in source.batches(chosen):
        tokens.append(observed.tokens[0])
        for i, map_BDhw in enumerate(observed.maps):
            wide = map_BDhw.double()
            sums[i] += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
            counts[i] += wide[:, 0].numel()
    for i, (total, count) in enumerate(zip(sums, counts, strict=True)):
        mean, square = total / count
        model.selection.fit(i, mean.float(), (square - mean.square()).clamp_min(0.0).sqrt().float())
    model.standardised.fit(torch.cat(tokens))
    model.initialise(lambda: source.batches(chosen[:_START_IMAGES]), seed)


# ------------------------------------------------------------------------------------------ classes of a few images


@torch.no_grad()
def fit_few(
    model: AnomalyModel,
    source: FeatureSource,
    train_at: Sequence[int],
    held_at: Sequence[int],
    few: frozenset[str],
    seed: int,
    progress: Progress,
    students: bool,
) -> GoodImages:
    """`fit_statistics` of all images of a source, with classes of a few (``few``) calibrated on images left out.

    Copies count for no threshold.
    """
    places: dict[str, dict[object, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in train_at:
        sample = source.samples[i]
        if sample.class_name in few:
            places[sample.class_name][sample.image, sample.record].append(i)
    classes = [list(images.values()) for images in places.values()]  # of each for every image: it and its copies
    left_out = _left_out(model, source, classes, seed, progress)
    divide = {s.class_name for s in source.samples} != few
    good = fit_statistics(model, source, train_at, held_at, seed, progress, students, divide)
    if not classes:
        return good
    readings_nR, peak_n, distance_n = good.readings_nR.clone(), good.peak_n.clone(), good.distance_n.clone()
    local, semantic = model.scorer.student_readings
    relearnt_R = torch.ones(readings_nR.shape[1], dtype=torch.bool)  # the students' own readings stay as they are
    relearnt_R[:local] = relearnt_R[model.scorer.local_count : model.scorer.local_count + semantic] = False
    for away, out in left_out:
        readings_nR[away] = torch.where(relearnt_R, out.readings_BR.cpu(), readings_nR[away])
        peak_n[away] = out.map_B1HW.amax((1, 2, 3)).cpu()
        distance_n[away] = out.cluster_distance_B.cpu()
    columns = (readings_nR, good.cluster_n, torch.ones_like(good.counted_n))
    score_n: Tensor = model.scorer.calibrate(*(column.to(model.device) for column in columns))[0].cpu()
    counted_n = good.counted_n.clone()
    for images in classes:
        for i in (i for copies in images for i in copies):
            sample = source.samples[i]
            counted_n[i] &= not isinstance(sample, Copy) or sample.tolerated
        if len(images) == 1:
            for column in (score_n, peak_n, distance_n):
                column[images[0]] = column[images[0]].amax()
    return good._replace(
        score_n=score_n, peak_n=peak_n, distance_n=distance_n, counted_n=counted_n, readings_nR=readings_nR
    )


def _left_out(
    model: AnomalyModel, source: FeatureSource, classes: list[list[list[int]]], seed: int, progress: Progress
) -> list[tuple[list[int], Outputs]]:
    """For every turn: places of an image of each class and its copies, and what statistics that saw neither say."""
    several = [images for images in classes if len(images) > 1]
    everything = {i for images in classes for copies in images for i in copies}
    turns, answers = max((len(images) for images in several), default=0), list[tuple[list[int], Outputs]]()
    for turn in range(turns):
        progress("leaving images out", turn + 1, turns)
        away = [i for images in several for copies in images[turn : turn + 1] for i in copies]
        fit_statistics(model, source, sorted(everything - set(away)), [], seed, silent, students=False, divide=False)
        model.scorer.asks_students = False
        outs = [model.score(*batch) for batch in source.batches(away)]
        model.scorer.asks_students = True
        answers.append((away, Outputs(*map(torch.cat, zip(*outs, strict=True)))))
    return answers


# ------------------------------------------------------------------------------------------------ fit --resume-from


def refuse_forgetting(decision: Decision, samples: Sequence[Sample], forget: bool) -> None:
    """A `DataError` where the data hold no good image of an old class, unless ``forget``."""
    present = {s.class_name for s in samples if s.is_good}
    missing = [name for name in decision.classes if name not in present]
    if missing and not forget:
        raise DataError(
            f"the data hold no good image of {', '.join(missing)}, which the bundle knows (classes found: "
            f"{', '.join(sorted(present)) or 'none'}). Give one folder with all classes, old and new, or type "
            "--forget to drop them"
        )


def keep_sides(keys: Sequence[bytes], held: set[int], decision: Decision) -> set[int]:
    """Positions to hold out of images with these keys, every known image on the side where it was."""
    trained = decision.trained - decision.held
    names = [image_id(key) for key in keys]
    return {i for i, name in enumerate(names) if name in decision.held or (i in held and name not in trained)}


def take_over(model: AnomalyModel, before: AnomalyModel) -> None:
    """Give a new model the students and channel statistics of a trained one; a `DataError` if shapes differ."""
    try:
        for part in ("student", "selection", "standardised"):
            getattr(model, part).load_state_dict(getattr(before, part).state_dict())
    except RuntimeError:
        raise DataError(
            "the bundle's students have another shape than the settings ask for; going on keeps teacher, size, "
            "width and depth, so leave those options out"
        ) from None
