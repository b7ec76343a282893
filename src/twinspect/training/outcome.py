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
        samples = [picture_of(source.samples[i]) for i in images]
        texts = (
            tuple(sample.class_name for sample in samples),
            tuple(sample.group for sample in samples),
            tuple(_content_id(source, i) for i in images),
        )
        if before is not None:
            texts = tuple(getattr(before, name) + new for name, new in zip(_TEXTS, texts, strict=True))
        return cls(good, *texts)

    def scores(self, classes: Sequence[str]) -> GoodScores:
        """The images that count for thresholds; ``classes`` is the class of every cluster."""
        good = self.good
        score, peak, distance = (column.double().numpy() for column in (good.score_n, good.peak_n, good.distance_n))
        predicted = [classes[k] for k in good.cluster_n.tolist()]
        texts = (np.array(column) for column in (self.class_name, predicted, self.group, self.key))
        return GoodScores(score, peak, distance, *texts).take(good.counted_n.numpy())

    def to_bytes(self) -> bytes:
        """As safetensors, with the texts as JSON in its header."""
        from safetensors.torch import save

        good = self.good._asdict()
        tensors: dict[str, torch.Tensor] = {name: tensor for name, tensor in good.items() if name != "tokens"}
        tensors |= {f"tokens.{view}": in_fp16(token_nE) for view, token_nE in enumerate(self.good.tokens)}
        tensors["embedding_nF"] = in_fp16(self.good.embedding_nF)
        texts = {name: list(getattr(self, name)) for name in _TEXTS}
        return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"texts": json.dumps(texts)})

    @classmethod
    def from_bytes(cls, body: bytes) -> Memory:
        """Rebuild from `to_bytes`.

        Raises:
            ValueError, KeyError: it is something else.
        """
        from safetensors.torch import load

        head: dict[str, Any] = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        texts, tensors = json.loads(head["__metadata__"]["texts"]), load(body)
        views = sorted(name for name in tensors if name.startswith("tokens."))
        good = {name: tensors[name] for name in GoodImages._fields if name != "tokens"}
        good["embedding_nF"] = good["embedding_nF"].float()
        tokens = tuple(tensors[name].float() for name in views)
        return cls(GoodImages(**good, tokens=tokens), *(tuple(texts[name]) for name in _TEXTS))


def decision_of(
    model: AnomalyModel, source: FeatureSource, held: Collection[int], good: GoodImages, thumbnails: int = 0
) -> Decision:
    """What good images' scores and the clusters' classes make of a trained model.

    Args:
        model: trained and calibrated.
        source: good images.
        held: positions of those that the students were not trained on.
        good: what `fit_statistics` returns of all, in the order of positions.
        thumbnails: longest side of the pictures to keep of the images; 0 keeps none.
    """
    names = [picture_of(sample).class_name for sample in source.samples]
    classes = classes_of_clusters(good.cluster_n.numpy(), names, model.scorer.clusters.count)
    good, images = of_pictures(good, source.samples, classes)
    memory = Memory.of(good, source, images)
    scores = memory.scores(classes)
    held_out = {key for key, i in zip(memory.key, images, strict=True) if i in held}
    trained = {key for key, i in zip(memory.key, images, strict=True) if not (model.scorer.plain and i in held)}
    nearest, tiles = model.scorer.nearest, next((s.tiles for s in source.samples if isinstance(s, Tile)), (1, 1))
    bank = [picture_of(source.samples[i]) for i in nearest.kept] if nearest is not None else []
    side = thumbnails if tiles == (1, 1) else 0  # there would be one for every tile
    return Decision(
        scores, classes, (0.0, MAP_TOP * float(np.median(scores.peak))), model_id=model_id(model),
        trained=tuple(sorted(trained)), held=tuple(sorted(held_out)), tiles=tiles,
        bank=tuple(sample.name for sample in bank), thumbnails=small_pictures(bank, side) if side else (),
        roi=None if model.roi_SS is None else _for_pictures(model.roi_SS.cpu().numpy()),
    )  # fmt: skip


def _for_pictures(roi_SS: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A region of interest on the grid that pictures are drawn from."""
    at = ((np.arange(ROI_SIDE) + 0.5) * len(roi_SS) / ROI_SIDE).astype(int)
    return np.asarray(roi_SS[np.ix_(at, at)])


def of_pictures(good: GoodImages, samples: Sequence[Sample], classes: Sequence[str]) -> tuple[GoodImages, list[int]]:
    """What is said of pictures by their tiles, as `tiles.joined` has it; and the place of the tile that speaks."""
    if not any(isinstance(sample, Tile) for sample in samples):
        return good, list(range(len(samples)))
    places: dict[Sample, list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        places[picture_of(sample)].append(place)
    score_n, owner_n = good.score_n.tolist(), [classes[k] for k in good.cluster_n.tolist()]
    spoken = [tiles[speaker([score_n[i] for i in tiles], [owner_n[i] for i in tiles])] for tiles in places.values()]
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


def record_of(model: AnomalyModel, source: FeatureSource, held: Collection[int], skipped: int) -> dict[str, Any]:
    """What a bundle says of its model and images: plain numbers and texts, for JSON.

    Args:
        model: trained.
        source: good images.
        held: positions of those that the students were not trained on.
        skipped: images that could not be read.
    """
    teacher = model.teacher
    learnt = dict.fromkeys(picture_of(sample) for i, sample in enumerate(source.samples) if i not in held)
    shown = [picture for picture in learnt if not isinstance(picture, Copy)]
    calibration = len({picture_of(source.samples[i]) for i in held})
    return {
        "teacher": {
            "name": teacher.name,
            "arch": teacher.info.arch,
            "weights": teacher.weights,
            "licence": licence(teacher.name) if teacher.weights != "random" else "none (random weights)",
            "hash": teacher.hash(),
        },
        "size": model.size,
        "classes": dict(sorted(Counter(sample.class_name for sample in shown).items())),
        "images": {"train": len(shown), "calibration": calibration, "skipped": skipped},
        "clusters": model.scorer.clusters.count,
        "variants": model.scorer.clusters.variants,
        "parameters": parameter_counts(model),
    }


def parameter_counts(model: AnomalyModel) -> dict[str, int]:
    """Numbers of weights: teacher (frozen), students by part (trained), and bytes of the normal statistics."""
    parts = {"teacher": model.teacher, **dict(model.student.named_children())}
    return {
        **{name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "statistics_bytes": sum(b.numel() * b.element_size() for b in model.scorer.state_dict().values()),
    }


def least_like(samples: Sequence[Sample], good: GoodImages, most: int) -> list[dict[str, Any]]:
    """Good images by falling score, each scored by statistics that did not see it.

    Returns:
        ``path``, ``class_name``, ``score``, and ``apart``: whether it scores apart from the rest of its class, as an
        anomaly among the good ones would (`conformal.suspicious_tail`).
    """
    score_n = good.score_n.double().numpy()
    seen = np.array([bool(c) and not isinstance(s, Copy) for c, s in zip(good.counted_n, samples, strict=True)])
    apart: set[int] = set()
    for name in {sample.class_name for sample in samples}:
        members = np.flatnonzero(seen & np.array([sample.class_name == name for sample in samples]))
        apart.update(members[suspicious_tail(score_n[members])].tolist())
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
