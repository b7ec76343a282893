"""Painted pictures: same plan, same bytes; masks are exactly what was painted."""

from pathlib import Path

import numpy as np
import pytest
from layouts import DEFECTS, WRITERS, Plan, scene, write
from painting import PARTS, damaged, part


def content(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("layout", [name for name in WRITERS if name != "manifest"])
def test_same_plan_same_bytes(tmp_path: Path, layout: str) -> None:
    for name in ("a/set", "b/set"):
        write(layout, tmp_path / name, Plan(seed=4))
    write(layout, tmp_path / "c/set", Plan(seed=5))
    assert content(tmp_path / "a/set") == content(tmp_path / "b/set")
    assert content(tmp_path / "a/set") != content(tmp_path / "c/set")


@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("index", range(len(PARTS) + 1))
@pytest.mark.parametrize("size", [16, 64])
def test_masks_are_exact(kind: str, index: int, size: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        clean = part(index, rng, size)
        mask = DEFECTS[kind](rng, size)
        changed = (damaged(clean, [mask]) != clean).any(axis=2)
        assert mask.any()
        assert not mask.all()
        assert np.array_equal(changed, mask)


def test_classes_differ_and_images_of_one_class_too() -> None:
    a, b = (scene(0, 10, np.random.default_rng(s), 32) for s in (0, 1))
    assert not np.array_equal(a, b)
    colours = [scene(i, 10, np.random.default_rng(0), 32).reshape(-1, 3).mean(0).round() for i in range(10)]
    assert len({tuple(c) for c in colours}) == 10
    grey = scene(3, 10, np.random.default_rng(0), 28, grey=True)
    assert np.array_equal(grey[..., 0], grey[..., 2])
