"""Further good images for a trained model: `update` adds them; ``fit --resume-from`` trains anew with all.

An update does without the images that the model learnt from. The students stay as they are; a new class is judged by
statistics alone. Thresholds are made anew from all good images that are kept, with the budgets that were set.

Going on with ``fit --resume-from`` keeps the students' weights and the teacher's channel statistics. Everything else
(clusters, covariances, thresholds) is learnt anew from the images at hand, so the old ones must be among them. What
was trained on stays training, what was held out stays held out.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from twinspect.bundle import Fitted, model_id
from twinspect.data.protocols import count_once
from twinspect.decide.decision import Decision, image_id, mixed_up
from twinspect.errors import BundleError, ConfigError, DataError, TrainingError, listed
from twinspect.models.contract import AnomalyModel
from twinspect.training.derived import FEW
from twinspect.training.normal import add_statistics
from twinspect.training.outcome import GoodImages, sizes, small_pictures
from twinspect.training.source import FeatureSource, cache_folder
from twinspect.types import TEST, Progress, Sample

_NAMED = 20  # images of an update that the record names


def update(fitted: Fitted, samples: Sequence[Sample], class_name: str | None, progress: Progress) -> Fitted:
    """A model that has learnt further good images; the one given stays as it is.

    Good images of ``train`` and ``calibration`` are learnt, as ``class_name``, known or new; None takes the data's
    classes, all of which must be known. Raises as `Detector.update`.
    """
    if not fitted.memory:
        raise BundleError(
            "this model keeps nothing that images can be added to (scoring plain, tiles, more than 4,096 good "
            "images, or written before version 0.3); train it again with all images: twinspect fit DATA"
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
    good = [s for s in samples if s.split != TEST and s.label in (0, None)]
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


# ------------------------------------------------------------------------------------------------ fit --resume-from


def refuse_forgetting(decision: Decision, samples: Sequence[Sample], forget: bool) -> None:
    """A `DataError` where the data hold no good image of an old class, unless ``forget``."""
    present = {s.class_name for s in samples if s.split != TEST and s.label in (0, None)}
    missing = [name for name in decision.classes if name not in present]
    if missing and not forget:
        raise DataError(
            f"the data hold no good image of {', '.join(missing)}, which the bundle knows: what is normal is "
            f"learnt from all images at hand, so going on without them would forget them (classes found: "
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
