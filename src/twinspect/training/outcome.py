"""What a run leaves: the decision with its thresholds, the record, and a memory that further images can be added to.

The bundle keeps `normal.GoodImages` as the model's memory, a few kB an image and no pixels. Sums of patch features
need no place of their own: they are read off the statistics. So an `update` does without the images that the model
learnt from. The students stay as they are; a new class is judged by statistics alone. Thresholds are made anew from
all good images that are kept, with the budgets that were set.
"""

from __future__ import annotations

import copy
import io
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from twinspect.bundle import Fitted, model_id
from twinspect.config import TrainConfig
from twinspect.data.images import file_bytes
from twinspect.data.protocols import count_once
from twinspect.data.samples import read_sample_rgb
from twinspect.decide.decision import ROI_SIDE, Decision, image_id, mixed_up, odd_images
from twinspect.device import granted_threads
from twinspect.errors import BundleError, ConfigError, DataError, TrainingError, listed
from twinspect.inference.decode import speaker
from twinspect.models.contract import AnomalyModel
from twinspect.models.weights import licence
from twinspect.training.derived import FEW, Copy, Tile, picture_of
from twinspect.training.normal import GoodImages, add_statistics
from twinspect.training.source import FeatureSource, cache_folder, image_key
from twinspect.types import Progress, Sample

LISTED = 10  # images that are least like the others, at least, in the record
MOST = 4096  # images; of more nothing is kept: they change little when some join them, and would take 25 MB and more
MAP_TOP = 16.0  # end of the colour scale over the usual highest value of a good image; see `colourise`
_NAMED = 20  # images of an update that the record names


def of_pictures(good: GoodImages, samples: Sequence[Sample], classes: Sequence[str]) -> tuple[GoodImages, list[int]]:
    """What is said of pictures by their tiles, as `tiles.joined` has it; and the place of the tile that speaks.

    Readings, tokens and embeddings stay those of the tiles.
    """
    places: dict[Sample, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        places[picture_of(sample)].append(place)
    scores, owners = good.score_n.tolist(), [classes[k] for k in good.cluster_n.tolist()]
    spoken = [tiles[speaker([scores[i] for i in tiles], [owners[i] for i in tiles])] for tiles in places.values()]
    highest = [torch.stack([column[tiles].amax() for tiles in places.values()]) for column in good[:3]]
    names, groups, keys = ([column[i] for i in spoken] for column in good[-3:])
    for i, picture in enumerate(places):
        if picture.in_file and not isinstance(picture, Copy):  # named by its file, as where it is seen whole
            keys[i] = image_id(image_key(file_bytes(picture.image)))
    return good._replace(
        score_n=highest[0], peak_n=highest[1], distance_n=highest[2], cluster_n=good.cluster_n[spoken],
        counted_n=good.counted_n[spoken], class_name=tuple(names), group=tuple(groups), key=tuple(keys),
    ), spoken  # fmt: skip


def classes_of_clusters(cluster_n: NDArray[np.int64], classes: Sequence[str], count: int) -> tuple[str, ...]:
    """Most common training class of each cluster; empty for one no image belongs to."""
    counts: list[Counter[str]] = [Counter() for _ in range(count)]
    for name, k in zip(classes, cluster_n.tolist(), strict=True):
        counts[k][name] += 1
    return tuple(counter.most_common(1)[0][0] if counter else "" for counter in counts)


def by_score(samples: Sequence[Sample], good: GoodImages) -> list[int]:
    """Places of the images that count for thresholds, copies left out, by falling score."""
    return [
        i
        for i in np.argsort(-good.score_n.double().numpy(), kind="stable").tolist()
        if good.counted_n[i] and not isinstance(samples[i], Copy)
    ]


def odd_notes(samples: Sequence[Sample], good: GoodImages, decision: Decision) -> list[str]:
    """A sentence for every class with images that score as anomalies would, and what to do about them."""
    order, notes, odd = by_score(samples, good), list[str](), set[int]()
    for name in sorted({samples[i].class_name for i in order}):
        places = [i for i in order if samples[i].class_name == name]
        score_N, names = good.score_n.double().numpy()[places], [samples[i].name for i in places]
        text, positions = odd_images(name, score_N, names, decision.rule(name).image.value)
        odd.update(places[k] for k in positions)
        notes += [f"{text}. Leave out what is bad"] if text else []
    if odd and odd == set(order[: len(odd)]):  # what the option leaves out
        notes[-1] += f" (--drop-outliers {len(odd)})"
    return notes


def outcome_of(
    model: AnomalyModel,
    samples: Sequence[Sample],
    held: Collection[int],
    good: GoodImages,
    config: TrainConfig,
) -> tuple[Decision, dict[str, Any], bytes]:
    """Thresholds and what else answers need, the record of model and images, and what images can be added to.

    The last is empty where that is not possible. ``held`` are places of the samples that the students were not
    trained on, ``good`` is what `fit_statistics` returns of all.
    """
    classes = classes_of_clusters(good.cluster_n.numpy(), good.class_name, model.scorer.clusters.count)
    tiles = next((sample.tiles for sample in samples if isinstance(sample, Tile)), (1, 1))
    places = list(range(len(samples)))  # of the images, or of one tile of every picture
    if tiles != (1, 1):
        good, places = of_pictures(good, samples, classes)
    pictures, held_out = [picture_of(samples[i]) for i in places], [i in held for i in places]
    plain, nearest = model.scorer.plain, model.scorer.nearest
    scores = good.scores(classes)
    bank = [picture_of(samples[i]) for i in nearest.kept] if nearest is not None else []
    side = config.thumbnails if tiles == (1, 1) else 0  # there would be one for every tile
    roi = None
    if model.roi_SS is not None:  # on the grid that pictures are drawn from
        at = ((np.arange(ROI_SIDE) + 0.5) * model.size / ROI_SIDE).astype(int)
        roi = model.roi_SS.cpu().numpy()[np.ix_(at, at)]
    decision = Decision(
        scores, classes, (0.0, MAP_TOP * float(np.median(scores.peak))), model_id=model_id(model),
        trained=frozenset(key for key, out in zip(good.key, held_out, strict=True) if not (plain and out)),
        held=frozenset(key for key, out in zip(good.key, held_out, strict=True) if out),
        bank=tuple(sample.name for sample in bank), thumbnails=small_pictures(bank, side) if side else (),
        roi=roi, tiles=tiles,
    )  # fmt: skip
    learnt = [p for p, out in zip(pictures, held_out, strict=True) if not out and not isinstance(p, Copy)]
    teacher = model.teacher
    terms = licence(teacher.name) if teacher.weights != "random" else "none (random weights)"
    record = {
        "teacher": {
            "name": teacher.name, "arch": teacher.info.arch, "weights": teacher.weights, "licence": terms,
            "hash": teacher.hash(),
        },
        "size": model.size,
        "classes": dict(sorted(Counter(picture.class_name for picture in learnt).items())),
        "images": {"train": len(learnt), "calibration": sum(held_out)},
        **sizes(model),
        "student_weights": {} if plain else model.scorer.student_weights(),
        "least_like": [
            {
                "path": pictures[i].name, "class_name": pictures[i].class_name, "score": float(good.score_n[i]),
            }
            for i in by_score(pictures, good)[: max(LISTED, config.drop_outliers)]
        ],
        "notes": odd_notes(pictures, good, decision),
    }  # fmt: skip
    no_update = plain or tiles != (1, 1) or len(samples) > MOST
    return decision, record, b"" if no_update else good.to_bytes()


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


def sizes(model: AnomalyModel) -> dict[str, Any]:
    """For the record: clusters, numbers of weights by part, bytes of statistics."""
    parts = {"teacher": model.teacher, **dict(model.student.named_children())}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    parameters["statistics_bytes"] = sum(b.nbytes for b in model.scorer.state_dict().values())
    return {"clusters": model.scorer.clusters.count, "parameters": parameters}


# ------------------------------------------------------------------------------------------- further good images


def update(fitted: Fitted, samples: Sequence[Sample], class_name: str | None, progress: Progress) -> Fitted:
    """A model that has learnt further good images; the one given stays as it is.

    Good images of ``train`` and ``calibration`` are learnt, as ``class_name``, known or new; None takes the data's
    classes, all of which must be known. Raises as `Detector.update`.
    """
    if not fitted.memory:
        raise BundleError(
            "this model keeps nothing that images can be added to (scoring plain, tiles, or more than 4,096 good "
            "images); train it again with all images: twinspect fit DATA"
        )
    before, notes = GoodImages.from_bytes(fitted.memory), list[str]()
    fresh = _named(fitted, samples, class_name, notes)
    model = copy.deepcopy(fitted.model)
    source = FeatureSource(model, fresh, cache_folder(model, len(fresh), fitted.config.train.cache_gb), progress)
    if not len(source) and source.skipped:
        unread = source.skipped[0]
        raise DataError(f"none of the {len(fresh)} images can be read, such as {unread.path}: {unread.reason}")
    there = set(before.key)
    images = [i for i, key in enumerate(source.keys) if image_id(key) not in there]
    if len(images) < len(source):
        notes.append(f"{len(source) - len(images)} of {len(source)} images left out: the model knows them already")
    if not images:
        raise DataError("no good image that the model has not learnt already; give a folder of new good images")
    counts = Counter(source.samples[i].class_name for i in images)
    for name, count in counts.items():
        if name in fitted.decision.classes:
            continue
        if count <= FEW:
            raise DataError(f"class {name} is new and has {count} good images; at least {FEW + 1} are needed")
        notes.append(
            f"class {name} is new, beside {listed(fitted.decision.classes)}; if it was meant to be one of these, "
            "take the update back with --undo"
        )
    good, classes = add_statistics(
        model, source, images, before, fitted.decision.class_of_cluster, fitted.config.train.seed, progress
    )  # fmt: skip
    if not good.score_n.isfinite().all():
        raise TrainingError("the model gives scores that are not finite with these images; train it again with all")
    decision = fitted.decision
    if set(decision.good.key) - there:
        notes.append("thresholds are made from the images that were learnt; calibrate again with those of other days")
    if decision.fixed:
        notes.append("thresholds from labelled images or by hand are gone, as scores have changed; set them again")
    learnt = [source.samples[i] for i in images]
    bank = _bank(fitted, model, len(before.key), learnt)
    new = replace(
        decision, bank=tuple(name for name, _ in bank),
        thumbnails=tuple(picture for _, picture in bank) if decision.thumbnails else (),
        good=good.scores(classes), class_of_cluster=classes, fixed={}, model_id=model_id(model),
        trained=decision.trained.union(good.key[len(before.key) :]),
    )  # fmt: skip
    record = copy.deepcopy(fitted.record)
    record["classes"] = dict(sorted((Counter(record["classes"]) + counts).items()))
    record["images"]["train"] += len(images)
    record |= sizes(model)
    record["notes"] = [*notes, *filter(None, [mixed_up(model.scorer.clusters.taken)])]
    entry = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "classes": dict(sorted(counts.items())),
        "images": [sample.name for sample in learnt[:_NAMED]], "from": decision.model_id,
    }  # fmt: skip
    record.setdefault("updates", []).append(entry)
    return Fitted(model, new, fitted.config, record, source.skipped, good, good.to_bytes())


def _bank(fitted: Fitted, model: AnomalyModel, old: int, learnt: Sequence[Sample]) -> list[tuple[str, bytes]]:
    """Names and small pictures of the images that others are compared with; empty ones where they are not known."""
    decision, nearest = fitted.decision, model.scorer.nearest
    known = len(decision.bank) == old
    names = (*(decision.bank if known else ("",) * old), *(sample.name for sample in learnt))
    small = (b"",) * len(names)
    if decision.thumbnails:
        before = decision.thumbnails if known else (b"",) * old
        small = (*before, *small_pictures(learnt, fitted.config.train.thumbnails))
    return [(names[i], small[i]) for i in nearest.kept] if nearest is not None else []


def _named(fitted: Fitted, samples: Sequence[Sample], class_name: str | None, notes: list[str]) -> list[Sample]:
    """Good images, each once, with the class that they are learnt as."""
    good = [s for s in samples if s.is_good]
    distinct, sentences = count_once(good, [s for s in samples if s.label == 1])
    notes += sentences
    if class_name is not None:
        return [replace(sample, class_name=class_name) for sample in distinct]
    known = fitted.decision.classes
    if strange := sorted({sample.class_name for sample in distinct} - set(known)):
        raise ConfigError(
            f"class {', '.join(strange[:3])} is not one that the model knows ({', '.join(known)}); say whose images "
            "these are with --class NAME, which may also be a new class"
        )
    return distinct
