"""Photograph the server's page with the demo's own model and images.

python docs/images/page.py demo-out/demo.twin docs/images/page.webp   (needs the extras dev and server, and chromium)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from twinspect.commands.demo import FULL, NOMINAL, find_images, split
from twinspect.inference import load
from twinspect.server.app import address_of, build_app, prepared
from twinspect.server.log import InspectionLog
from twinspect.server.settings import Settings

WIDTH, HEIGHT = 1080, 1340


def main(bundle: str, target: str) -> None:
    """One image of each kind; the one with the local defect is shown, an alarm is confirmed."""
    _, test = split(find_images(), FULL)
    chosen: dict[str, Path] = {}
    for sample in test:
        chosen.setdefault(sample.defect_type or NOMINAL, sample.image)
    with tempfile.TemporaryDirectory() as folder:
        log = InspectionLog(str(Path(folder) / "inspections.db"))
        settings = Settings(port=0)
        app = build_app(settings, {"textile": load(bundle)}, log)
        server, listening = prepared(app, settings)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            shot = str(Path(folder) / "page.png")
            photograph(address_of(listening), [str(p) for p in chosen.values()], shot)
            with Image.open(shot) as picture:
                picture.convert("RGB").save(target, quality=70, method=6)
        finally:
            server.should_exit = True
            thread.join()
            log.close()
    print(f"{target}: {Path(target).stat().st_size // 1000} kB, kinds {', '.join(chosen)}")


def photograph(address: str, images: list[str], target: str) -> None:
    """Upload, wait, confirm, save."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(address)
        page.set_input_files("#files", images)
        page.locator("#status", has_text=f"{len(images)} scored").wait_for(timeout=120_000)
        page.click("#strip .anomaly")
        page.click("#verdicts [data-verdict=confirmed]")
        page.locator("#rows [aria-pressed=true]").wait_for()
        page.locator("#light.green").wait_for()
        page.mouse.move(0, 0)
        page.screenshot(path=target)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
