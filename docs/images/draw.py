"""Draw the README's picture with the demo's own model: a good image, a local and a global defect, and their maps.

python docs/images/draw.py demo-out/demo.twin docs/images/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from twinspect import Detector
from twinspect.commands.demo import FULL, NOMINAL, find_images, split

SIDE, GAP, TEXT = 176, 8, 26


def main(bundle: str, target: str) -> None:
    """Take the median image of each kind by score, so that the picture flatters nobody."""
    detector = Detector.load(bundle)
    _, test = split(find_images(), FULL)
    kinds = dict.fromkeys(sample.defect_type or NOMINAL for sample in test)
    chosen = []
    for kind in kinds:
        found = [r for r in detector.predict([s.image for s in test if (s.defect_type or NOMINAL) == kind][:41])]
        chosen.append((kind, sorted(found, key=lambda r: r.score)[len(found) // 2]))
    width = len(chosen) * 2 * SIDE + (len(chosen) + 1) * GAP
    picture = Image.new("RGB", (width, SIDE + TEXT + 2 * GAP), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    for place, (kind, result) in enumerate(chosen):
        left = GAP + place * (2 * SIDE + GAP)
        for step, one in enumerate((Image.fromarray(result.image()), result.overlay(words=False))):
            picture.paste(one.resize((SIDE, SIDE)), (left + step * SIDE, TEXT + GAP))
        said = "called anomalous" if result.is_anomaly else "called good"
        pen.text((left, GAP), f"{kind}: score {result.score:.1f}, {said}", "black", font)
    picture.quantize(112, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target}: {Path(target).stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(*sys.argv[1:3])
