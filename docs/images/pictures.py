"""Draw the pictures of overlays, reasons, regions of interest, tiles and the comparison, each from a real run.

python docs/images/pictures.py docs/images   (needs the extras dev and demo, and chromium; some minutes)

Textile images are those of the demo; the other products are painted here.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from report import main as photograph
from typer.testing import CliRunner

from twinspect import Detector
from twinspect.cli import app
from twinspect.commands.demo import QUICK, find_images, split
from twinspect.config import RunConfig, of_effort
from twinspect.inference.result import Result
from twinspect.models.weights import DEFAULT_EMBEDDED
from twinspect.types import TEST, Sample

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from painting import ring, weave

GAP, TEXT, SIDE = 10, 18, 360
SPOT = (1130, 420, 14)  # left, top and side of the small defect of a large picture


def main(target: str) -> None:
    """All of them."""
    folder = Path(target)
    good, test = split(find_images(), replace(QUICK, train=400))
    textile = instant().fit(good, quiet=True)
    defects = textile.predict([sample.image for sample in test if sample.defect_type == "local"])
    alarms = sorted((result for result in defects if result.is_anomaly), key=lambda result: result.score)
    middle = alarms[len(alarms) // 2]  # flatters nobody
    write(folder / "overlay.webp", [Image.fromarray(middle.image()), middle.overlay()], ["image", "--overlays"])
    write(
        folder / "why.webp",
        [middle.overlay(words=False), middle.nearest_image],
        ["map", "nearest good image"],
        middle,
    )
    region_of_interest(folder / "roi.webp")
    tiles(folder / "tiles.webp")
    compared(textile, instant(size=128).fit(good, quiet=True), [*good[:1], *test], folder / "compare.webp")


def instant(**model: object) -> Detector:
    """An untrained detector with the small teacher that comes with the package."""
    dial = of_effort("instant")
    return Detector(
        config=RunConfig.from_dict({**dial, "model": {**dial["model"], "teacher": DEFAULT_EMBEDDED, **model}})
    )


def region_of_interest(target: Path) -> None:
    """A turned part above a strip of clutter that is never twice the same."""
    inside = np.zeros((300, 300), np.uint8)
    inside[:236] = 255

    def part(number: int) -> np.ndarray:
        rng = np.random.default_rng(number)
        pixels = ring(rng, 300)
        blocks = rng.integers(40, 215, (4, 20, 3), dtype=np.uint8)
        pixels[240:] = np.kron(blocks, np.ones((15, 15, 1), np.uint8))
        return pixels

    bad = part(99)
    bad[80:96, 170:215] = 235
    with tempfile.TemporaryDirectory() as folder:
        mask = Path(folder) / "mask.png"
        Image.fromarray(inside).save(mask)
        result = instant(size=256).fit([part(i) for i in range(30)], roi=mask, quiet=True).predict(bad)
    shown = [Image.fromarray(bad), Image.fromarray(inside), result.overlay()]
    write(target, shown, ["image", "--roi mask.png", "its overlay"])


def tiles(target: Path) -> None:
    """One look at a picture of 2000 x 1500 pixels, and twelve."""

    def cloth(number: int) -> np.ndarray:
        return weave(np.random.default_rng(number), 2000)[:1500]

    left, top, side = SPOT
    bad = cloth(99)
    bad[top : top + side, left : left + side] = 20
    images, titles = [], []
    for option in ("", "3x4"):
        result = instant(size=512, tiles=option).fit([cloth(i) for i in range(16)], quiet=True).predict(bad)
        overlay = result.overlay(words=False)
        around = (left - 140, top - 140, left + 154, top + 154)
        images += [overlay, overlay.crop(around)]
        titles += [
            f"--tiles {option}: {result.answer}" if option else f"one look: {result.answer}",
            "around the spot",
        ]
    write(target, images, titles)


def compared(first: Detector, second: Detector, samples: Sequence[Sample], target: Path) -> None:
    """The report of ``compare`` on two models of the same images."""
    with tempfile.TemporaryDirectory() as folder:
        for sample in samples:
            part = f"test/{sample.defect_type or 'good'}" if sample.split == TEST else "train/good"
            place = Path(folder) / "data" / "textile" / part / sample.image.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(sample.image, place)
        names = [str(model.save(Path(folder) / name)) for model, name in ((first, "512.twin"), (second, "128.twin"))]
        report = Path(folder) / "compare.html"
        done = CliRunner().invoke(app, ["compare", *names, f"{folder}/data", "--report", str(report)])
        assert done.exit_code == 0, done.output
        photograph(str(report), "Comparison", "Decisions that differ", str(target))


def reasons(result: Result) -> str:
    """Why this answer, without the folder that the nearest image lies in here."""
    return result.reasons().replace(result.nearest, Path(result.nearest).name)


def write(
    target: Path, images: Sequence[Image.Image], titles: Sequence[str], explained: Result | None = None
) -> None:
    """Images side by side under their titles, above the reasons of a result."""
    scaled = [image.resize((round(image.width * SIDE / image.height), SIDE)) for image in images]
    lines = [line for part in reasons(explained).split("; ") for line in wrap(part, 84)] if explained else []
    width = sum(image.width + GAP for image in scaled) + GAP
    whole = Image.new("RGB", (width, SIDE + 3 * GAP + TEXT + len(lines) * (TEXT + 4)), "white")
    pen, font, left = ImageDraw.Draw(whole), ImageFont.load_default(15), GAP
    for image, title in zip(scaled, titles, strict=True):
        pen.text((left, GAP), title, "black", font)
        whole.paste(image, (left, GAP + TEXT + 4))
        left += image.width + GAP
    for number, line in enumerate(lines):
        pen.text((GAP, SIDE + 2 * GAP + TEXT + 6 + number * (TEXT + 4)), line, "black", font)
    whole.save(target, quality=80, method=6)
    print(f"{target}: {target.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(*sys.argv[1:2])
