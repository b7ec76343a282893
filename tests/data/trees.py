"""Folders of tiny pictures from a few words: what lies where, and what a loader made of it."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from tiny import save

from twinspect.data import Loaded, load

MARKED = np.zeros((16, 16), np.uint8)
MARKED[4:8, 4:8] = 255


def tree(root: Path, **folders: int | str) -> Path:
    """Pictures, as many as said, masks (a name with ``*`` in front, black ones with ``.``) or the text of a file."""
    for name, content in folders.items():
        path = root / name.lstrip("*.")
        if isinstance(content, str):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            continue
        for number in range(content):
            file = path.parent / path.name.format(number) if path.suffix else path / f"{number:03d}.png"
            save(file, MARKED * (name[0] != ".") if name[0] in "*." else colour(file.relative_to(root)))
    return root


def colour(name: Path) -> np.ndarray:
    """A picture of its own for every name."""
    rng = np.random.default_rng(zlib.crc32(name.as_posix().encode()))
    return rng.integers(60, 200, (16, 16, 3), dtype=np.uint8)


def seen(found: Loaded | Path) -> dict[tuple[str, str, int | None], int]:
    """How many images of which folder have which split and label."""
    loaded = load(found) if isinstance(found, Path) else found
    return dict(
        Counter((s.image.parent.relative_to(loaded.root).as_posix(), s.split, s.label) for s in loaded.samples)
    )


def learnt(found: Loaded | Path) -> set[str]:
    """Folders whose images are learnt as good."""
    return {folder for folder, split, label in seen(found) if split != "test" and label != 1}
