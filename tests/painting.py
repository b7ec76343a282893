"""Small pictures that are made up: textures and parts, and a defect whose mask is exact.

Clean pictures stay within 40 to 215 and defects are painted with black or white on top, so that every pixel
of a mask really differs from the clean picture.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

RGB = NDArray[np.uint8]
Mask = NDArray[np.bool_]
LOW, HIGH = 40, 215


def weave(rng: np.random.Generator, size: int) -> RGB:
    """Woven cloth: two crossed gratings with a random phase."""
    x, y = grid(size)
    phase = rng.uniform(0, 2 * np.pi, 2)
    grey = 128 + 32 * np.sin(x * 50 + phase[0]) + 32 * np.sin(y * 50 + phase[1])
    return finished(grey[..., None] * np.array([1.0, 0.92, 0.8]), rng, 4)


def brushed(rng: np.random.Generator, size: int) -> RGB:
    """Brushed metal: noise that is long in one direction, under a soft light."""
    _, y = grid(size)
    lines = np.repeat(rng.normal(0, 14, (size, 1)), size, axis=1)
    return finished((150 + lines - 30 * (y - 0.5))[..., None] * np.array([0.95, 1.0, 1.05]), rng, 3)


def ring(rng: np.random.Generator, size: int) -> RGB:
    """A turned part: a bright ring on a dark ground, moved by a pixel or two."""
    x, y = grid(size)
    cx, cy = 0.5 + rng.uniform(-0.02, 0.02, 2)
    radius = np.hypot(x - cx, y - cy)
    grey = np.where((radius < 0.42) & (radius > 0.16), 180 - 80 * np.abs(radius - 0.29), 62)
    return finished(grey[..., None] * np.array([1.0, 0.95, 0.85]), rng, 4)


def board(rng: np.random.Generator, size: int) -> RGB:
    """A circuit board: pads in a grid on green."""
    x, y = grid(size)
    shift = rng.uniform(-0.01, 0.01, 2)
    pads = (np.abs((x + shift[0]) * 5 % 1 - 0.5) < 0.2) & (np.abs((y + shift[1]) * 5 % 1 - 0.5) < 0.2)
    colour = np.where(pads[..., None], np.array([190, 170, 90]), np.array([50, 105, 65]))
    return finished(colour.astype(np.float64), rng, 4)


PARTS: dict[str, Callable[[np.random.Generator, int], RGB]] = {
    "weave": weave,
    "ring": ring,
    "brushed": brushed,
    "board": board,
}


def part(index: int, rng: np.random.Generator, size: int) -> RGB:
    """A clean picture of the class with this number; beyond four, the four again in other tints."""
    paint = list(PARTS.values())[index % len(PARTS)]
    rgb = paint(rng, size)
    return np.roll(rgb, index // len(PARTS), axis=2) if index >= len(PARTS) else rgb


def spot(rng: np.random.Generator, size: int) -> Mask:
    """A filled ellipse."""
    centre, radius = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0.08, 0.16, 2) * size
    return drawn(size, lambda draw: draw.ellipse([*(centre - radius), *(centre + radius)], fill=1))


def damaged(rgb: RGB, masks: list[Mask]) -> RGB:
    """The picture with each mask painted white on dark or black on bright ground."""
    out = rgb.copy()
    for mask in masks:
        out[mask] = 255 if float(rgb[mask].mean()) < 128 else 0
    return out


def grid(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions x and y of all pixels, from 0 to 1."""
    axis = (np.arange(size) + 0.5) / size
    return np.meshgrid(axis, axis)[0], np.meshgrid(axis, axis)[1]


def finished(values: NDArray[np.float64], rng: np.random.Generator, noise: float) -> RGB:
    """Values with noise of so many grey levels, as 8 bits."""
    return (values + rng.normal(0, noise, values.shape)).clip(LOW, HIGH).astype(np.uint8)


def drawn(size: int, draw: Callable[[ImageDraw.ImageDraw], None]) -> Mask:
    """What is drawn on an empty picture, as a mask."""
    image = Image.new("L", (size, size))
    draw(ImageDraw.Draw(image))
    return np.asarray(image) > 0
