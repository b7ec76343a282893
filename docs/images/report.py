"""Photograph a part of a report: the sections of a heading.

python docs/images/report.py report.html "Pictures" docs/images/report.png   (needs the extra dev, and chromium)
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH = 1080


def main(report: str, *rest: str) -> None:
    """The named sections in one picture, or the whole page where none is named."""
    *titles, target = rest
    shot = Path(target).with_suffix(".png")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.goto(Path(report).resolve().as_uri())
        hidden = [s for s in page.query_selector_all("section") if s.query_selector("h2").inner_text() not in titles]
        for section in hidden if titles else []:
            section.evaluate("element => element.remove()")
        page.screenshot(path=shot, full_page=True)
        browser.close()
    with Image.open(shot) as picture:
        if target.endswith(".webp"):
            picture.convert("RGB").save(target, quality=70, method=6)
            shot.unlink()
        else:
            few = picture.convert("RGB").quantize(160, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            few.save(target, optimize=True)
    print(f"{target}: {Path(target).stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
