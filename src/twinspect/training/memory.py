"""What a bundle keeps of its good images, so that others can join them later: a few kB an image, no pixels.

Global tokens, embeddings and readings of every image. Sums of patch features need no place of their own: they are
read off the statistics (`training.normal`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from twinspect.decide.decision import image_id
from twinspect.decide.rules import GoodScores
from twinspect.models.layers import in_fp16
from twinspect.training.normal import GoodImages
from twinspect.training.source import FeatureSource

MOST = 4096  # images; of more nothing is kept: they change little when some join them, and would take 25 MB and more
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

    def scores(self, classes: tuple[str, ...]) -> GoodScores:
        """The images that count for thresholds; ``classes`` is the class of every cluster."""
        good = self.good
        score, peak, distance = (one.double().numpy() for one in (good.score_n, good.peak_n, good.distance_n))
        predicted = tuple(classes[k] for k in good.cluster_n.tolist())
        rows = GoodScores(score, peak, distance, self.class_name, predicted, self.group, self.key)
        return rows.take(good.counted_n.numpy())

    def to_bytes(self) -> bytes:
        """As safetensors, with the texts as JSON in its header."""
        from safetensors.torch import save

        good = self.good._asdict()
        tensors: dict[str, torch.Tensor] = {name: one for name, one in good.items() if name != "tokens"}
        tensors |= {f"tokens.{view}": in_fp16(one) for view, one in enumerate(self.good.tokens)}
        tensors["embedding_nF"] = in_fp16(self.good.embedding_nF)
        texts = {name: list(getattr(self, name)) for name in _TEXTS}
        return save({name: one.contiguous() for name, one in tensors.items()}, {"texts": json.dumps(texts)})

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


def remember(good: GoodImages, source: FeatureSource, images: list[int], before: Memory | None = None) -> Memory:
    """The memory of a model's good images, those of ``before`` first.

    Args:
        good: what the model says of all.
        source: where the new ones are from.
        images: their positions in it.
        before: what was kept already.
    """
    samples = [source.samples[i] for i in images]
    texts = (
        tuple(sample.class_name for sample in samples),
        tuple(sample.group for sample in samples),
        tuple(image_id(source.keys[i]) for i in images),
    )
    if before is not None:
        texts = tuple(getattr(before, name) + one for name, one in zip(_TEXTS, texts, strict=True))
    return Memory(good, *texts)
