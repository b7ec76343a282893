"""Large pictures in overlapping tiles: where tiles lie, their pixels, and one answer of theirs. No torch.

A model sees each tile as an image of its own, and knows every place of the picture as a cluster of its own. A picture
is as anomalous as its most anomalous tile. Its map is put together of theirs; where they overlap, the middle of a
tile counts more than its rim. Next to each other they share a fifth of a side, so that a defect smaller than that is
whole in one of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinspect.data.images import resize_rgb

OVERLAP = 0.2  # of a tile's side
_HIGHEST = ("score_B", "score_local_B", "score_semantic_B", "cluster_distance_B")
Tiles = tuple[int, int]  # rows, columns


def reach(count: int) -> float:
    """A picture's side in sides of a tile, of which so many stand side by side."""
    return count - (count - 1) * OVERLAP


def boxes(rgb_HWC: NDArray[np.uint8], tiles: Tiles) -> list[tuple[slice, slice]]:
    """Rows and columns of the pixels of every tile of a picture, row by row."""
    down, right = (_spans(side, count) for side, count in zip(rgb_HWC.shape[:2], tiles, strict=True))
    return [(rows, columns) for rows in down for columns in right]


def _spans(side: int, count: int) -> list[slice]:
    length = side / reach(count)
    starts = [min(round(i * (1 - OVERLAP) * length), side - 1) for i in range(count)]
    return [slice(start, min(side, max(start + 1, round(start + length)))) for start in starts]


def cut(rgb_HWC: NDArray[np.uint8], size: int, tiles: Tiles) -> NDArray[np.uint8]:
    """A picture as the model sees it: S x S x 3, or T x S x S x 3 of several tiles."""
    if tiles == (1, 1):
        return resize_rgb(rgb_HWC, size)
    return np.stack([resize_rgb(rgb_HWC[box], size) for box in boxes(rgb_HWC, tiles)])


def speaker(score_T: Sequence[float], class_T: Sequence[str]) -> int:
    """The tile whose class and cluster are the picture's: the most anomalous of the class that most tiles show."""
    name = Counter(class_T).most_common(1)[0][0]
    return max((i for i, class_name in enumerate(class_T) if class_name == name), key=lambda i: score_T[i])


def joined(out: Mapping[str, NDArray[Any]], tiles: Tiles, classes: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Answers of B x T tiles as answers of B pictures, named as `Outputs`; ``classes`` are those of the clusters."""
    by_picture = {name: values.reshape(-1, tiles[0] * tiles[1], *values.shape[1:]) for name, values in out.items()}
    pairs = zip(by_picture["score_B"], by_picture["cluster_B"], strict=True)
    spoken = [speaker(score_T, [classes[int(k)] for k in cluster_T]) for score_T, cluster_T in pairs]
    answers = {name: values[np.arange(len(spoken)), spoken] for name, values in by_picture.items()}
    answers |= {name: by_picture[name].max(1) for name in _HIGHEST if name in by_picture}
    answers["map_B1HW"] = np.stack([blended(map_T1hw[:, 0], tiles)[None] for map_T1hw in by_picture["map_B1HW"]])
    return answers


def blended(map_Thw: NDArray[np.float32], tiles: Tiles) -> NDArray[np.float32]:
    """One map of those of the tiles, at their scale."""
    height, width = map_Thw.shape[1:]
    sides = round(height * reach(tiles[0])), round(width * reach(tiles[1]))
    weight_hw = np.minimum.outer(*(np.minimum(np.arange(n), np.arange(n)[::-1]) + 1.0 for n in (height, width)))
    total, weight = np.zeros(sides), np.zeros(sides)
    for place, map_hw in enumerate(map_Thw):
        row, column = divmod(place, tiles[1])
        top = min(round(row * (1 - OVERLAP) * height), sides[0] - height)
        left = min(round(column * (1 - OVERLAP) * width), sides[1] - width)
        total[top : top + height, left : left + width] += weight_hw * map_hw
        weight[top : top + height, left : left + width] += weight_hw
    return np.asarray(total / weight, dtype=np.float32)
