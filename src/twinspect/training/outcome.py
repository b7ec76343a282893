"""What a run leaves: the good images that it learnt from, the thresholds that follow from them, and the record.

`Memory` keeps global tokens, embeddings and readings of every good image, a few kB each and no pixels, so that others
can join them later. Sums of patch features need no place of their own: they are read off the statistics
(`training.normal`).
"""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load, save

from twinspect.data.samples import read_sample_rgb
from twinspect.decide.conformal import suspicious_tail
from twinspect.decide.decision import ROI_SIDE, Decision, image_id
from twinspect.decide.rules import GoodScores
from twinspect.device import granted_threads
from twinspect.errors import DataError
from twinspect.inference.tiles import speaker
from twinspect.models.contract import AnomalyModel
from twinspect.models.layers import in_fp16
from twinspect.models.weights import licence
from twinspect.storage import model_id
from twinspect.training.cache import image_key
from twinspect.training.copies import Copy
from twinspect.training.normal import GoodImages
from twinspect.training.source import FeatureSource, Tile, picture_of
from twinspect.types import Sample

LISTED = 10  # images that are least like the others, kept in the record
MOST = 4096  # images; of more nothing is kept: they change little when some join them, and would take 25 MB and more
MAP_TOP = 16.0  # end of the colour scale over the usual highest value of a good image; see `colourise`
_TEXTS = ("class_name", "group", "key")


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Good images that a model learnt from, one place per image in every field.

    Attributes:
        good: what the model said of them.
        class_name, group, key: as in `GoodScores`.
    """

    good: GoodImages
    class_name: tuple[str, ...]
    group: tuple[str, ...]
    key: tuple[str, ...]

    @classmethod
    def of(
        cls, good: GoodImages, source: FeatureSource, images: Sequence[int], before: Memory | None = None
    ) -> Memory:
        """The good images of ``before``, then those at some positions of a source."""
        samples = [(picture_of(source.samples[i]), i) for i in images]
        rows = [(sample.class_name, sample.group, _content_id(source, i)) for sample, i in samples]
        if before is not None:
            rows = [*zip(before.class_name, before.group, before.key, strict=True), *rows]
        return cls(good, *zip(*rows, strict=True))

    def scores(self, classes: Sequence[str]) -> GoodScores:
        """The images that count for thresholds; ``classes`` is the class of every cluster."""
        good = self.good
        score, peak, distance = (column.double().numpy() for column in good[:3])
        predicted = [classes[k] for k in good.cluster_n.tolist()]
        texts = (np.array(column) for column in (self.class_name, predicted, self.group, self.key))
        return GoodScores(score, peak, distance, *texts).take(good.counted_n.numpy())

    def to_bytes(self) -> bytes:
        """As safetensors, with the texts as JSON in its header."""
        tensors = self.good._asdict()
        views = tensors.pop("tokens")
        tensors |= {f"tokens.{view}": in_fp16(token_nE) for view, token_nE in enumerate(views)}
        tensors["embedding_nF"] = in_fp16(self.good.embedding_nF)
        texts = {name: list(getattr(self, name)) for name in _TEXTS}
        return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"texts": json.dumps(texts)})

    @classmethod
    def from_bytes(cls, body: bytes) -> Memory:
        """Rebuild from `to_bytes`.

        Raises:
            ValueError, KeyError: it is something else.
        """
        head: dict[str, Any] = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        texts, tensors = json.loads(head["__metadata__"]["texts"]), load(body)
        tokens = tuple(tensors.pop(name).float() for name in sorted(tensors) if name.startswith("tokens."))
        tensors["embedding_nF"] = tensors["embedding_nF"].float()
        return cls(GoodImages(**tensors, tokens=tokens), *(tuple(texts[name]) for name in _TEXTS))


def outcome_of(
    model: AnomalyModel,
    source: FeatureSource,
    held: Collection[int],
    good: GoodImages,
    thumbnails: int = 0,
    listed: int = LISTED,
) -> tuple[Decision, dict[str, Any], bytes]:
    """Thresholds and what else answers need, the record of model and images, and what images can be added to.

    The last is empty where that is not possible.

    Args:
        model: trained and calibrated.
        source: good images.
        held: positions of those that the students were not trained on.
        good: what `fit_statistics` returns of all, in the order of positions.
        thumbnails: longest side of the pictures to keep of the images; 0 keeps none.
        listed: how many of those that are least like the others are in the record.
    """
    names = [picture_of(sample).class_name for sample in source.samples]
    classes = classes_of_clusters(good.cluster_n.numpy(), names, model.scorer.clusters.count)
    tiles = next((sample.tiles for sample in source.samples if isinstance(sample, Tile)), (1, 1))
    images = list(range(len(source)))
    if tiles != (1, 1):
        good, images = _of_pictures(good, source.samples, classes)
    pictures = [picture_of(source.samples[i]) for i in images]
    memory, plain, nearest = Memory.of(good, source, images), model.scorer.plain, model.scorer.nearest
    scores = memory.scores(classes)
    bank = [picture_of(source.samples[i]) for i in nearest.kept] if nearest is not None else []
    side = thumbnails if tiles == (1, 1) else 0  # there would be one for every tile
    decision = Decision(
        scores, classes, (0.0, MAP_TOP * float(np.median(scores.peak))), model_id=model_id(model),
        trained=tuple(sorted({key for key, i in zip(memory.key, images, strict=True) if not (plain and i in held)})),
        held=tuple(sorted({key for key, i in zip(memory.key, images, strict=True) if i in held})),
        bank=tuple(sample.name for sample in bank), thumbnails=small_pictures(bank, side) if side else (),
        roi=None if model.roi_SS is None else _for_pictures(model.roi_SS.cpu().numpy()), tiles=tiles,
    )  # fmt: skip
    learnt = [p for p, i in zip(pictures, images, strict=True) if i not in held and not isinstance(p, Copy)]
    record = {
        "teacher": _teacher(model),
        "size": model.size,
        "classes": dict(sorted(Counter(picture.class_name for picture in learnt).items())),
        "images": {"train": len(learnt), "calibration": sum(i in held for i in images)},
        **sizes(model),
        "least_like": least_like(pictures, good, listed),
    }
    no_update = plain or tiles != (1, 1) or len(source) > MOST
    return decision, record, b"" if no_update else memory.to_bytes()


def _for_pictures(roi_SS: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A region of interest on the grid that pictures are drawn from."""
    at = ((np.arange(ROI_SIDE) + 0.5) * len(roi_SS) / ROI_SIDE).astype(int)
    return np.asarray(roi_SS[np.ix_(at, at)])


def _of_pictures(good: GoodImages, samples: Sequence[Sample], classes: Sequence[str]) -> tuple[GoodImages, list[int]]:
    """What is said of pictures by their tiles, as `tiles.joined` has it; and the place of the tile that speaks."""
    places: dict[Sample, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        places[picture_of(sample)].append(place)
    scores, owners = good.score_n.tolist(), [classes[k] for k in good.cluster_n.tolist()]
    spoken = [tiles[speaker([scores[i] for i in tiles], [owners[i] for i in tiles])] for tiles in places.values()]
    highest = [torch.stack([column[tiles].amax() for tiles in places.values()]) for column in good[:3]]
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
    counts: list[Counter[str]] = [Counter() for _ in range(count)]
    for name, k in zip(classes, cluster_n.tolist(), strict=True):
        counts[k][name] += 1
    return tuple(counter.most_common(1)[0][0] if counter else "" for counter in counts)


def _teacher(model: AnomalyModel) -> dict[str, str]:
    teacher = model.teacher
    terms = licence(teacher.name) if teacher.weights != "random" else "none (random weights)"
    return {
        "name": teacher.name, "arch": teacher.info.arch, "weights": teacher.weights, "licence": terms,
        "hash": teacher.hash(),
    }  # fmt: skip


def sizes(model: AnomalyModel) -> dict[str, Any]:
    """For the record: clusters, numbers of weights by part, bytes of statistics."""
    parts = {"teacher": model.teacher, **dict(model.student.named_children())}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    parameters["statistics_bytes"] = sum(b.numel() * b.element_size() for b in model.scorer.state_dict().values())
    clusters = model.scorer.clusters
    return {"clusters": clusters.count, "parameters": parameters}


def least_like(samples: Sequence[Sample], good: GoodImages, most: int) -> list[dict[str, Any]]:
    """Good images by falling score, each scored by statistics that did not see it.

    Returns:
        ``path``, ``class_name``, ``score``, and ``apart``: whether it scores apart from the rest of its class, as an
        anomaly among the good ones would (`conformal.suspicious_tail`).
    """
    score_n, names = good.score_n.double().numpy(), np.array([sample.class_name for sample in samples])
    seen = np.array([bool(c) and not isinstance(s, Copy) for c, s in zip(good.counted_n, samples, strict=True)])
    apart = np.zeros(len(samples), bool)
    for name in set(names):
        members = np.flatnonzero(seen & (names == name))
        apart[members[suspicious_tail(score_n[members])]] = True
    order = [i for i in np.argsort(-score_n, kind="stable").tolist() if seen[i]][:most]
    return [
        {
            "path": samples[i].name,
            "class_name": samples[i].class_name,
            "score": round(float(score_n[i]), 3),
            "apart": bool(apart[i]),
        }
        for i in order
    ]
