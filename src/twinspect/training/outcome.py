"""What a run leaves: the good images that it learnt from, the decision with its thresholds, and the record.

The bundle keeps `GoodImages` as the model's memory, a few kB an image and no pixels, so that others can join later
(`training.update`). Sums of patch features need no place of their own: they are read off the statistics
(`training.normal`).
"""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from twinspect.bundle import model_id
from twinspect.data.samples import read_sample_rgb
from twinspect.decide.decision import ROI_SIDE, Decision, GoodScores, image_id, odd_images
from twinspect.device import granted_threads
from twinspect.errors import DataError
from twinspect.inference.decode import speaker
from twinspect.models.contract import AnomalyModel
from twinspect.models.layers import in_fp16
from twinspect.models.weights import licence
from twinspect.training.derived import Copy, Tile, picture_of
from twinspect.training.source import image_key
from twinspect.types import Sample

LISTED = 10  # images that are least like the others, kept in the record
MOST = 4096  # images; of more nothing is kept: they change little when some join them, and would take 25 MB and more
MAP_TOP = 16.0  # end of the colour scale over the usual highest value of a good image; see `colourise`
_TEXTS = ("class_name", "group", "key")


class GoodImages(NamedTuple):
    """What the model says of the good images, each scored by statistics that did not see it; on the CPU."""

    score_n: Tensor  # joint scores
    peak_n: Tensor  # highest values of the maps
    distance_n: Tensor  # from the clusters
    cluster_n: Tensor  # indices of the clusters
    counted_n: Tensor  # whether the image counts for thresholds: with plain scoring only those held out
    readings_nR: Tensor  # raw, as `Outputs` has them
    tokens: tuple[Tensor, ...]  # global tokens, n x E a view
    embedding_nF: Tensor  # what the teacher's own classifier would see
    class_name: tuple[str, ...] = ()  # this and the next two: as in `GoodScores`
    group: tuple[str, ...] = ()
    key: tuple[str, ...] = ()

    def scores(self, classes: Sequence[str]) -> GoodScores:
        """The images that count for thresholds; ``classes`` is the class of every cluster."""
        score, peak, distance = (column.double().numpy() for column in self[:3])
        predicted = [classes[k] for k in self.cluster_n.tolist()]
        texts = (np.array(column) for column in (self.class_name, predicted, self.group, self.key))
        return GoodScores(score, peak, distance, *texts).take(self.counted_n.numpy())

    def to_bytes(self) -> bytes:
        """As safetensors, with the texts as JSON in its header."""
        tensors = self._asdict()
        texts = {name: tensors.pop(name) for name in _TEXTS}
        views = {f"tokens.{view}": in_fp16(token_nE) for view, token_nE in enumerate(tensors.pop("tokens"))}
        tensors |= views | {"embedding_nF": in_fp16(self.embedding_nF)}
        return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"texts": json.dumps(texts)})

    @classmethod
    def from_bytes(cls, body: bytes) -> GoodImages:
        """Rebuild from `to_bytes`."""
        head: dict[str, Any] = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        texts = json.loads(head["__metadata__"]["texts"])
        columns: dict[str, Any] = load(body)
        columns["tokens"] = tuple(columns.pop(name).float() for name in sorted(columns) if name.startswith("tokens."))
        columns["embedding_nF"] = columns["embedding_nF"].float()
        return cls(**columns | {name: tuple(texts[name]) for name in _TEXTS})


def texts_of(samples: Sequence[Sample], keys: Sequence[bytes]) -> list[tuple[str, ...]]:
    """The columns ``class_name``, ``group`` and ``key`` of samples with these keys of a source."""
    pictures = [picture_of(sample) for sample in samples]
    names = tuple(picture.class_name for picture in pictures)
    return [names, tuple(picture.group for picture in pictures), tuple(map(image_id, keys))]


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
            keys[i] = image_id(image_key(picture.image.read_bytes()))
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
    thumbnails: int = 0,
    listed: int = LISTED,
) -> tuple[Decision, dict[str, Any], bytes]:
    """Thresholds and what else answers need, the record of model and images, and what images can be added to.

    The last is empty where that is not possible. ``held`` are places of the samples that the students were not
    trained on, ``good`` is what `fit_statistics` returns of all. ``thumbnails`` is the longest side of the pictures
    to keep (0: none), ``listed`` how many images that are least like the others are in the record.
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
    side = thumbnails if tiles == (1, 1) else 0  # there would be one for every tile
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
        "least_like": [
            {
                "path": pictures[i].name, "class_name": pictures[i].class_name,
                "score": round(float(good.score_n[i]), 3),
            }
            for i in by_score(pictures, good)[:listed]
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
