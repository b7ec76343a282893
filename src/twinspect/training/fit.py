"""One training run from samples to a trained, calibrated model."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from twinspect.config import MOST_TILES, OF_MACHINE, ModelConfig, RunConfig, tiles_of
from twinspect.data.images import read_sized_rgb
from twinspect.data.leaks import count_once
from twinspect.data.protocols import carve_calibration
from twinspect.data.roi import fit_roi
from twinspect.data.samples import read_sample_rgb
from twinspect.decide.conformal import suspicious_tail
from twinspect.decide.decision import Decision, image_id, mixed_up, pack_roi
from twinspect.decide.rules import GoodScores
from twinspect.device import granted_threads, in_fp32, keep_freed_memory, peak_mb
from twinspect.errors import ConfigError, DataError, TrainingError
from twinspect.files import cache_home, why_unwritable
from twinspect.inference.tiles import OVERLAP, Tiles, speaker
from twinspect.models.contract import AnomalyModel
from twinspect.models.teachers import Teacher
from twinspect.models.weights import licence
from twinspect.storage import Fitted, build_model, model_id, teacher_of
from twinspect.training.cache import KnownFiles, image_key
from twinspect.training.copies import Altered, add_copies, few_classes
from twinspect.training.distributed import Group, joined
from twinspect.training.few import fit_few
from twinspect.training.loop import TrainReport, train
from twinspect.training.memory import MOST, remember
from twinspect.training.normal import GoodImages, fit_scales
from twinspect.training.resume import changes, keep_sides, refuse_forgetting, take_over
from twinspect.training.source import FeatureSource, Tile, in_tiles, picture_of, record_layout
from twinspect.training.tolerate import Disturbed, add_disturbed
from twinspect.types import CALIBRATION, TRAIN, Progress, Sample, Skipped, silent

MAP_TOP = 16.0  # end of the colour scale over the usual highest value of a good image; see `colourise`
FEWEST = 8  # images below which students learn nothing, and scoring plain has nothing else
LISTED = 10  # images that are least like the others, kept in the record
_SMALL_IMAGE = 160  # pixels a side up to which images are shown smaller than the teacher's default
_SMALLEST, _LARGEST, _ENLARGED = 128, 256, 6  # sides that small images are shown at; how far they are enlarged
_MEASURED = 8  # images whose sides are read off
_FINE = 3.0  # pixels of a picture that a pixel of the model may cover, for --tiles auto
_SIZED_BY = 32  # images whose sides are looked at


def sized(config: ModelConfig, teacher: Teacher, samples: Sequence[Sample]) -> ModelConfig:
    """The configuration with a smaller input side where none was asked for and the images are small.

    Pixels that an image does not have say nothing and cost time; a thumbnail that is enlarged too far is a blur to a
    teacher that was trained on photographs.
    """
    if config.size or teacher.is_vit:
        return config
    sides = []
    for sample in samples[:: max(1, len(samples) // _SIZED_BY)]:
        with suppress(DataError, OSError):  # reported when all images are read
            sides.append(max(read_sample_rgb(sample).shape[:2]))
    if not sides or np.median(sides) > _SMALL_IMAGE:
        return config
    side = 32 * round(_ENLARGED * float(np.median(sides)) / 32)
    return replace(config, size=min(_LARGEST, max(_SMALLEST, side)))


def usual_sides(samples: Sequence[Sample]) -> tuple[int, int]:
    """Median height and width of some pictures in pixels; (0, 0) where none of them can be read."""
    sides = []
    for sample in samples[:: max(1, len(samples) // _MEASURED)]:
        with suppress(DataError, OSError):
            whole = read_sized_rgb(sample.image, draft_side=1)[1] if sample.in_file else read_sample_rgb(sample).shape
            sides.append(whole[:2])
    height, width = np.median(sides, axis=0) if sides else (0, 0)
    return int(height), int(width)


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
            stays, so that a result that could not be saved is not lost: see `resume.remove_checkpoint`.
        progress: called with (stage, done, total).
        resume: go on from this model instead of from scratch; its classes must be among ``samples``.
        forget: let go of classes of ``resume`` that are not.
        roi: region of interest in the pixels of the images, H x W, true inside: pixels outside are neither learnt nor
            scored. None takes that of ``resume``.

    Raises:
        DataError: too few usable images (the message lists what was skipped), or old classes are missing.
        TrainingError: a loss that is not finite, a checkpoint of another run, or no place for one; of several
            processes, one that is gone or has other images.

    Under ``torchrun`` the processes share every batch and all return the same model; see `training.distributed`.
    """
    group = joined(config.train.device)
    if resume is not None:
        if resume.config.model.tiles:
            raise ConfigError("a model that sees tiles cannot be gone on from; train it anew on all images")
        refuse_forgetting(resume.decision, samples, forget)
    keep_freed_memory()
    progress = progress if group.leads else silent
    with in_fp32(group.device.type):
        dropped = _outliers(samples, config, progress, group, roi) if config.train.drop_outliers else []
        paths = {one["path"] for one in dropped}
        kept = [s for s in samples if s.name not in paths]
        fitted = _fitted(kept, config, work, progress, resume, group, roi)
    fitted.record["dropped"] = dropped
    return fitted


def _outliers(
    samples: Sequence[Sample], config: RunConfig, progress: Progress, group: Group, roi: NDArray[np.bool_] | None
) -> list[dict[str, Any]]:
    """The good images that are least like the others, as many as shall be left out; a model without students tells.

    Raises:
        ConfigError: more than a third of the good images.
    """
    wanted = config.train.drop_outliers
    quick = RunConfig(replace(config.model, scoring="default"), replace(config.train, steps=0))
    listed = _fitted(samples, quick, None, progress, None, group, roi, wanted).record["least_like"]
    good = sum(s.split in (TRAIN, CALIBRATION) and s.label in (0, None) for s in samples)
    if 3 * wanted > good:
        raise ConfigError(f"--drop-outliers {wanted}: at most a third of the {good} good images can be left out")
    return list(listed[:wanted])


def _fitted(
    samples: Sequence[Sample],
    config: RunConfig,
    work: Path | None,
    progress: Progress,
    resume: Fitted | None,
    group: Group,
    roi: NDArray[np.bool_] | None,
    listed: int = LISTED,
) -> Fitted:
    notes: list[str] = []
    training, held = choose_images(samples, config, notes)
    with_few = config.model.scores() == "default" and not config.model.tiles
    few = few_classes([*training, *held]) if with_few else frozenset[str]()
    only_few = few.issuperset({sample.class_name for sample in training})
    if only_few:
        config = replace(config, train=replace(config.train, steps=0))
    training, held, sentences = add_copies(training, held, config.train.pose, few)
    training, held, more = add_disturbed(training, held, config.train.tolerate, config.train.seed)
    notes += [*sentences, *more]
    torch.manual_seed(config.train.seed)
    teacher = resume.model.teacher if resume is not None else teacher_of(config.model)
    if resume is None:
        config = replace(config, model=sized(config.model, teacher, training))
    model = build_model(config.model, teacher).to(group.device)  # built on the CPU: a seed means the same everywhere
    sides = usual_sides(training)
    tiles = tiles_of(config.model.tiles) if config.model.tiles != "auto" else fitting_tiles(sides, model.size)
    config = replace(config, model=replace(config.model, tiles="" if tiles == (1, 1) else f"{tiles[0]}x{tiles[1]}"))
    if resume is not None and roi is None:
        model.roi_SS = resume.model.roi_SS
    elif roi is not None:
        model.roi_SS = _roi(roi, model, training).to(group.device)
    if model.roi_SS is not None and tiles != (1, 1):
        raise ConfigError("a region of interest is one for whole pictures: leave --tiles or --roi out")
    training, held = in_tiles(training, tiles), in_tiles(held, tiles)
    source = _source(model, [*training, *held], config.train.cache_gb, progress, group)
    train_at, held_at = _positions(source, training, held)
    if resume is not None:
        train_at, held_at = keep_sides(source, train_at, held_at, resume.decision)
    students = not only_few and (config.train.steps > 0 or resume is not None)
    skipped = list({one.path: one for one in source.skipped}.values())  # copies cannot be read either
    _refuse_too_few(train_at, held_at, skipped, students)
    if resume is not None:
        take_over(model, resume.model)
    else:
        fit_scales(model, source, train_at, config.train.seed)
    if work is not None and group.leads:
        _make_folder(work)
    origin = resume.decision.model_id if resume is not None else ""
    fingerprint = _fingerprint(config, model.teacher.hash() + origin, source.keys)
    group.refuse_difference("images or settings", fingerprint, len(source))
    report = train(model, source, train_at, config.train, work, progress, fingerprint, group)
    with _enough_variety():
        good = fit_few(model, source, train_at, held_at, few, config.train.seed, progress, students)
    if not good.score_n.isfinite().all():
        raise TrainingError("the trained model gives scores that are not finite; train again with a lower --lr")
    decision = decision_of(model, source, train_at, held_at, good, config.train.thumbnails)
    images = sorted([*train_at, *held_at])
    no_update = model.scorer.plain or len(images) > MOST or tiles != (1, 1)
    memory = b"" if no_update else remember(good, source, images).to_bytes()
    record = _record(model.cpu(), source, train_at, held_at, report)
    record["images"]["skipped"] = len(skipped)
    samples = [source.samples[i] for i in images]
    shown, spoken = of_pictures(good, samples, decision.class_of_cluster)
    record["least_like"] = least_like([picture_of(samples[place]) for place in spoken], shown, listed)
    taken = model.scorer.clusters.taken if tiles == (1, 1) else {}  # tiles of a picture may be alike
    record["notes"] = [*notes, *filter(None, [mixed_up(taken)])]
    record["sides"] = list(sides)
    record["memory"] = _memory(report.batch, group.device)
    if resume is not None:
        record["resumed"] = {"from": origin, "classes": changes(resume.decision, decision)}
    return Fitted(model, decision, config, record, skipped, good, memory)


def _roi(roi_HW: NDArray[np.bool_], model: AnomalyModel, samples: Sequence[Sample]) -> Tensor:
    """A region of interest at the model's size; the first image that can be read says how they are shaped."""
    for sample in samples:
        with suppress(DataError, OSError):  # reported when all images are read
            shape = read_sample_rgb(sample).shape[:2]
            break
    else:
        shape = roi_HW.shape
    return torch.from_numpy(fit_roi(roi_HW, model.size, (shape[0], shape[1])))


def decision_of(
    model: AnomalyModel,
    source: FeatureSource,
    train_at: Sequence[int],
    held_at: Sequence[int],
    good: GoodImages,
    thumbnails: int = 0,
) -> Decision:
    """What good images' scores and the clusters' classes make of a trained model.

    Args:
        model: trained and calibrated.
        source: images.
        train_at: positions of the images that the students were trained on.
        held_at: positions of the others.
        good: what `fit_statistics` returns of both, in the order of positions.
        thumbnails: longest side of the pictures to keep of the images; 0 keeps none.
    """
    images = sorted([*train_at, *held_at])
    names = [picture_of(source.samples[i]).class_name for i in images]
    classes = classes_of_clusters(good.cluster_n.numpy(), names, model.scorer.clusters.count)
    good, spoken = of_pictures(good, [source.samples[i] for i in images], classes)
    rows, images = images, [images[place] for place in spoken]
    owners, held = np.asarray(good.cluster_n.numpy(), dtype=np.int64), set(held_at)
    id_of = {i: _content_id(source, i) for i in images}
    learnt = [i for i in images if i not in held] if model.scorer.plain else images
    trained, kept = (tuple(sorted({id_of[i] for i in at})) for at in (learnt, [i for i in images if i in held]))
    counted = good.counted_n.numpy()
    samples = [picture_of(source.samples[i]) for i, counts in zip(images, counted, strict=True) if counts]
    keys = tuple(id_of[i] for i, counts in zip(images, counted, strict=True) if counts)
    scores = GoodScores(
        good.score_n.double().numpy()[counted],
        good.peak_n.double().numpy()[counted],
        good.distance_n.double().numpy()[counted],
        tuple(sample.class_name for sample in samples),
        tuple(classes[k] for k in owners[counted]),
        tuple(sample.group for sample in samples),
        keys,
    )
    nearest, tiles = model.scorer.nearest, next((s.tiles for s in source.samples if isinstance(s, Tile)), (1, 1))
    bank = [picture_of(source.samples[rows[i]]) for i in nearest.kept] if nearest is not None else []
    side = thumbnails if tiles == (1, 1) else 0  # there would be one for every tile
    scale = (0.0, MAP_TOP * float(np.median(scores.peak)))
    return Decision(
        scores, classes, scale, model_id=model_id(model), trained=trained, held=kept, tiles=tiles,
        bank=tuple(sample.name for sample in bank), thumbnails=small_pictures(bank, side) if side else (),
        roi="" if model.roi_SS is None else pack_roi(model.roi_SS.cpu().numpy()),
    )  # fmt: skip


def of_pictures(good: GoodImages, samples: Sequence[Sample], classes: Sequence[str]) -> tuple[GoodImages, list[int]]:
    """What is said of pictures by their tiles, as `tiles.joined` has it; and the place of the tile that speaks."""
    if not any(isinstance(sample, Tile) for sample in samples):
        return good, list(range(len(samples)))
    places: dict[Sample, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        places[picture_of(sample)].append(place)
    score_n, owner_n = good.score_n.tolist(), [classes[k] for k in good.cluster_n.tolist()]
    spoken = [own[speaker([score_n[i] for i in own], [owner_n[i] for i in own])] for own in places.values()]
    highest = [torch.stack([one[own].amax() for own in places.values()]) for one in good[:3]]
    return good._replace(
        score_n=highest[0], peak_n=highest[1], distance_n=highest[2], cluster_n=good.cluster_n[spoken],
        counted_n=good.counted_n[spoken],
    ), spoken  # fmt: skip


def _content_id(source: FeatureSource, position: int) -> str:
    """`image_id` of a picture, also where only its tiles have keys."""
    sample = source.samples[position]
    picture = picture_of(sample)
    whole = picture is sample or type(picture) is not Sample or not picture.in_file
    return image_id(source.keys[position] if whole else image_key(picture.image.read_bytes()))


def small_pictures(samples: Sequence[Sample], side: int) -> tuple[bytes, ...]:
    """JPEGs of images, ``side`` pixels at most; empty where one cannot be read."""

    def small(sample: Sample) -> bytes:
        body = io.BytesIO()
        with suppress(DataError, OSError):
            picture = Image.fromarray(read_sample_rgb(sample, draft_side=side))
            picture.thumbnail((side, side))
            picture.save(body, "JPEG", quality=75, optimize=True)
        return body.getvalue()

    with ThreadPoolExecutor(granted_threads() or None) as pool:
        return tuple(pool.map(small, samples))


def classes_of_clusters(cluster_n: NDArray[np.int64], classes: Sequence[str], count: int) -> tuple[str, ...]:
    """Most common training class of each cluster; empty for one no image belongs to."""
    owners = [Counter(c for c, k in zip(classes, cluster_n, strict=True) if k == one) for one in range(count)]
    return tuple(counter.most_common(1)[0][0] if counter else "" for counter in owners)


def _source(
    model: AnomalyModel, samples: Sequence[Sample], cache_gb: float, progress: Progress, group: Group
) -> FeatureSource:
    root = cache_folder(model, len(samples), cache_gb)

    def known() -> KnownFiles | None:
        return KnownFiles(features_folder()) if cache_gb and not why_unwritable(features_folder()) else None

    if group.local_world > 1:  # each process prepares its share of what all then read
        FeatureSource(model, group.share_of_work(samples), root, progress, known())
        group.barrier()
    return FeatureSource(model, samples, root, progress, known())


def _memory(batch: int, device: torch.device) -> dict[str, Any]:
    gpu = {"gpu_peak_mb": torch.cuda.max_memory_reserved(device) / 1e6} if device.type == "cuda" else {}
    return {"peak_mb": peak_mb(), **gpu, "batch": batch}


@contextmanager
def _enough_variety() -> Iterator[None]:
    """Images that are copies of each other leave nothing to learn a spread from; numpy's words say little."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise DataError(
            "the good images are too much alike to learn how good ones differ (copies of one image?); "
            "give images of different parts or moments"
        ) from error


def choose_images(
    samples: Sequence[Sample], config: RunConfig, notes: list[str] | None = None
) -> tuple[list[Sample], list[Sample]]:
    """Normal training images, and those held out for calibration (by the data set itself or carved).

    Copies are counted once, so that no image that is held out was learnt.

    Args:
        samples: of any splits.
        config: how much is held out, and the seed.
        notes: takes sentences about copies that were left out.

    Raises:
        DataError: too few good images; the message says how many are copies.
    """
    good = [s for s in samples if s.split in (TRAIN, CALIBRATION) and s.label in (0, None)]
    distinct, sentences = count_once(good, [s for s in samples if s.label == 1])
    normal = [s for s in distinct if s.split == TRAIN]
    fewest = 1 if config.model.scores() == "default" else FEWEST
    if len(normal) < fewest:
        raise DataError(
            f"{len(normal)} good training images found; at least {fewest} are needed, 50 or more per class are "
            "better. Give a folder of good images, or one with train/good inside"
            + "".join(f". {n}" for n in sentences)
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


def cache_folder(model: AnomalyModel, images: int, limit_gb: float) -> Path | None:
    """Where features are cached; None when they need more than ``limit_gb``, or the folder cannot be written."""
    folder = features_folder()
    return None if record_layout(model).size * images > limit_gb * 1e9 or why_unwritable(folder) else folder


def features_folder() -> Path:
    """Where features, and what is known of files, are kept."""
    return cache_home() / "features"


def _positions(
    source: FeatureSource, training: Sequence[Sample], held: Sequence[Sample]
) -> tuple[list[int], list[int]]:
    held_set = set(held)
    inside = [i for i, sample in enumerate(source.samples) if sample not in held_set]
    return inside, [i for i, sample in enumerate(source.samples) if sample in held_set]


def _refuse_too_few(train_at: list[int], held_at: list[int], skipped: list[Skipped], students: bool) -> None:
    least = (FEWEST - 2, 2) if students else (1, 0)
    if len(train_at) >= least[0] and len(held_at) >= least[1]:
        return
    reasons = "\n".join(f"  {s.path}: {s.reason}" for s in skipped[:10])
    raise DataError(
        f"too little is left: {len(train_at)} images to train and {len(held_at)} to calibrate, after "
        f"{len(skipped)} were skipped:\n{reasons}"
    )


def _record(
    model: AnomalyModel, source: FeatureSource, train_at: list[int], held_at: list[int], report: TrainReport
) -> dict[str, Any]:
    teacher = model.teacher
    pictures = dict.fromkeys(picture_of(source.samples[i]) for i in train_at)
    shown = [one for one in pictures if not isinstance(one, (Altered, Disturbed))]
    held = {picture_of(source.samples[i]) for i in held_at}
    counts = Counter(sample.class_name for sample in shown)
    return {
        "teacher": {
            "name": teacher.name,
            "arch": teacher.info.arch,
            "weights": teacher.weights,
            "licence": licence(teacher.name) if teacher.weights != "random" else "none (random weights)",
            "hash": teacher.hash(),
        },
        "size": model.size,
        "classes": dict(sorted(counts.items())),
        "images": {"train": len(shown), "calibration": len(held), "skipped": len(source.skipped)},
        "clusters": model.scorer.clusters.count,
        "variants": model.scorer.clusters.variants,
        "training": {
            "steps": report.steps,
            "seconds": round(report.seconds, 1),
            "stopped": report.stopped,
            **{name: round(value, 6) for name, value in report.terms.items()},
        },
        "parameters": parameter_counts(model),
    }


def parameter_counts(model: AnomalyModel) -> dict[str, int]:
    """Numbers of weights: teacher (frozen), students by part (trained), and bytes of the normal statistics."""

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    return {
        "teacher": count(model.teacher),
        **{name: count(part) for name, part in model.student.named_children()},
        "statistics_bytes": sum(b.numel() * b.element_size() for b in model.scorer.state_dict().values()),
    }


def least_like(samples: Sequence[Sample], good: GoodImages, most: int) -> list[dict[str, Any]]:
    """Good images by falling score, each scored by statistics that did not see it.

    Returns:
        ``path``, ``class_name``, ``score``, and ``apart``: whether it scores apart from the rest of its class, as an
        anomaly among the good ones would (`conformal.suspicious_tail`).
    """
    score_n = good.score_n.double().numpy()
    seen = np.array(
        [bool(c) and not isinstance(s, (Altered, Disturbed)) for c, s in zip(good.counted_n, samples, strict=True)]
    )
    apart: set[int] = set()
    for name in {sample.class_name for sample in samples}:
        own = np.flatnonzero(seen & np.array([sample.class_name == name for sample in samples]))
        apart.update(own[suspicious_tail(score_n[own])].tolist())
    order = [i for i in np.argsort(-score_n, kind="stable").tolist() if seen[i]][:most]
    return [
        {
            "path": samples[i].name,
            "class_name": samples[i].class_name,
            "score": round(float(score_n[i]), 3),
            "apart": i in apart,
        }
        for i in order
    ]


def _make_folder(work: Path) -> None:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"folder {work} cannot be made ({error.strerror}); choose another --out or --work"
        ) from None


def _fingerprint(config: RunConfig, teacher_hash: str, keys: Sequence[bytes]) -> str:
    """What a checkpoint must agree with: settings that shape the weights, the teacher, the images in order."""
    settings = config.to_dict()
    for name in ("time_budget_s", "checkpoint_every", "cache_gb", "thumbnails", *OF_MACHINE):
        settings["train"].pop(name)
    digest = hashlib.sha256(json.dumps([settings, teacher_hash], sort_keys=True).encode())
    for key in keys:
        digest.update(key)
    return digest.hexdigest()
