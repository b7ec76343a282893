"""The page in a real browser: a picture goes in, its overlay shows, feedback is kept."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright import sync_api as playwright

sys.path.insert(0, str(Path(__file__).parent / "server"))
from serving import BRIGHT, DARK, Running, encoded, predictor

from twinspect.data.samples import read_roi
from twinspect.server.log import Filter, InspectionLog

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
KEY = "0123456789abcdef-secret"
REFUSED = "Failed to load resource: the server responded with a status of 4"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if BROWSER is None:
        pytest.skip("no chromium on this machine; type: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[InspectionLog]:
    found = InspectionLog(str(tmp_path / "inspections.db"))
    yield found
    found.close()


@pytest.fixture
def server(log: InspectionLog) -> Iterator[Running]:
    models = {"bright": predictor(), "two": predictor(model_id="second", classes=("bolt", "nut"))}
    with Running(models, log) as found:
        yield found


@pytest.fixture
def page(browser, server: Running) -> Iterator[object]:
    """The page, open; at the end nothing may have gone wrong in it or have been asked of anybody else."""
    context = browser.new_context(viewport={"width": 1180, "height": 1200})
    found = context.new_page()
    trouble: list[str] = []
    found.on("pageerror", lambda error: trouble.append(str(error)))
    # A refused request is a line in the console too; what the page says about it is tested where it happens.
    found.on("console", lambda line: trouble.append(line.text) if line.type == "error" else None)
    own = f"http://127.0.0.1:{server.port}/"
    allowed = (own, "blob:", "data:")
    found.on("request", lambda asked: None if asked.url.startswith(allowed) else trouble.append(asked.url))
    found.goto(own)
    yield found
    context.close()
    assert [line for line in trouble if not line.startswith(REFUSED)] == []


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Good, and bad in the top right quarter."""
    pixels = np.full((160, 240, 3), DARK, np.uint8)
    good = tmp_path / "good part.png"
    Image.fromarray(pixels).save(good)
    pixels[:80, 120:] = BRIGHT
    bad = tmp_path / "bad.jpg"
    Image.fromarray(pixels).save(bad, quality=95)
    return [good, bad]


def upload(page, files: list[Path]) -> None:
    page.set_input_files("#files", [str(p) for p in files])
    page.locator("#status", has_text=f"{len(files)} scored").wait_for()


def shown(page, name: str) -> np.ndarray:
    """RGB of a picture of the page."""
    script = """id => {
        const image = document.getElementById(id), c = document.createElement("canvas");
        c.width = image.naturalWidth; c.height = image.naturalHeight;
        const draw = c.getContext("2d");
        draw.drawImage(image, 0, 0);
        return [c.width, c.height, ...draw.getImageData(0, 0, c.width, c.height).data];
    }"""
    page.wait_for_function(f"document.getElementById('{name}').naturalWidth > 0")
    width, height, *values = page.evaluate(script, name)
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def test_upload_overlay_slider_and_feedback(page, images: list[Path], log: InspectionLog) -> None:
    upload(page, images)
    assert page.inner_text("#answer") == "anomaly"
    facts = page.inner_text("#facts")
    for word in ("local student", "semantic student", "p-value", "severity", "0.0083", "bad.jpg"):
        assert word in facts
    heat, image = shown(page, "heat"), shown(page, "image")
    assert heat.shape == image.shape == (160, 240, 3)
    assert image[:60, 140:].mean() > 200
    reddish = heat[..., 0].astype(int) - heat[..., 1]
    assert reddish[10:60, 140:].mean() > reddish[100:].mean() + 30  # red where it is bright
    page.locator("#opacity").fill("0")
    assert page.evaluate("getComputedStyle(document.getElementById('heat')).opacity") == "0"
    assert page.locator("#regions tr").count() == 1
    page.click("#verdicts [data-verdict=false_alarm]")
    page.locator("#verdicts [data-verdict=false_alarm][aria-pressed=true]").wait_for()
    assert [(r["name"], r["feedback"]) for r in log.query(Filter())] == [
        ("bad.jpg", "false_alarm"),
        ("good part.png", ""),
    ]


def test_a_region_of_interest_is_drawn_and_saved_for_fit(page, images: list[Path], tmp_path: Path) -> None:
    upload(page, images)
    shown(page, "heat")
    page.click("#roi")
    box = page.locator("#draw").bounding_box()
    assert page.locator("#roi-save").is_hidden()
    corners = [[(0.25, 0.1), (0.75, 0.1), (0.75, 0.6), (0.25, 0.6)], [(0.1, 0.8), (0.3, 0.8), (0.2, 0.95)]]
    for polygon in corners:
        for number, (x, y) in enumerate(polygon, 1):
            click = page.mouse.dblclick if number == len(polygon) else page.mouse.click
            click(box["x"] + x * box["width"], box["y"] + y * box["height"])
    with page.expect_download() as loading:
        page.click("#roi-save")
    loading.value.save_as(tmp_path / loading.value.suggested_filename)
    roi = read_roi(tmp_path / "roi.json")
    assert roi.shape == (160, 240)
    expected = np.zeros((160, 240), bool)
    expected[16:96, 60:180] = True
    assert (roi ^ expected)[:115].mean() < 0.01
    assert roi[115:].sum() == pytest.approx(0.5 * 48 * 24, rel=0.1)
    assert "--roi roi.json" in page.inner_text("#status")
    assert page.locator("#draw").is_hidden()


def test_history_is_filtered_and_takes_feedback(page, images: list[Path], log: InspectionLog) -> None:
    upload(page, images)
    page.locator("#rows tr").nth(1).wait_for()
    page.select_option("#f-answer", "good")
    page.locator("#rows tr", has_text="bad.jpg").wait_for(state="detached")
    assert page.locator("#rows tr").count() == 1
    page.click("#rows [data-verdict=missed]")
    page.locator("#rows [data-verdict=missed][aria-pressed=true]").wait_for()
    assert log.query(Filter(feedback="missed"))[0]["name"] == "good part.png"
    page.select_option("#f-answer", "")
    page.fill("#f-name", "BAD")
    page.press("#f-name", "Enter")
    page.locator("#rows tr", has_text="good part.png").wait_for(state="detached")
    page.fill("#f-name", "'; DROP TABLE x")
    page.press("#f-name", "Enter")
    page.locator("#rows", has_text="nothing kept that fits").wait_for()
    assert len(log.query(Filter())) == 2


def test_keyboard_alone(page, images: list[Path], log: InspectionLog) -> None:
    upload(page, images)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowLeft")
    page.locator("#answer", has_text="good").wait_for()
    page.keyboard.press("m")
    page.locator("#verdicts [data-verdict=missed][aria-pressed=true]").wait_for()
    page.keyboard.press("h")
    assert page.locator("#opacity-out").inner_text() == "0 %"
    page.focus("#opacity")
    page.keyboard.press("ArrowRight")
    assert page.locator("#opacity-out").inner_text() == "1 %"
    assert log.query(Filter(feedback="missed"))[0]["name"] == "good part.png"
    for _ in range(40):  # every control can be reached, and shows that it was
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "f-answer":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_paste_drop_and_bad_files(page, server: Running) -> None:
    script = """([kind, bytes, name, type]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], name, { type }));
        const target = document.getElementById("drop");
        target.dispatchEvent(kind === "drop" ? new DragEvent(kind, { dataTransfer: data, bubbles: true })
            : new ClipboardEvent(kind, { clipboardData: data, bubbles: true }));
    }"""
    page.evaluate(script, ["drop", list(encoded(DARK)), "dropped.png", "image/png"])
    page.locator("#facts", has_text="dropped.png").wait_for()
    page.evaluate(script, ["paste", list(encoded(BRIGHT)), "pasted.png", "image/png"])
    page.locator("#facts", has_text="pasted.png").wait_for()
    page.evaluate(
        script, ["drop", list(b"<script>alert(1)</script>"), "<img src=x onerror=alert(1)>.html", "text/html"]
    )
    page.locator("#status.bad", has_text="not an image").wait_for()
    assert page.locator("#strip button").count() == 2


def test_images_that_come_before_the_models_are_known_wait_for_them(page, images: list[Path]) -> None:
    asked: list[playwright.Route] = []
    page.route("**/v1/models", lambda route: asked.append(route))
    page.reload()
    page.set_input_files("#files", [str(p) for p in images])
    page.wait_for_timeout(300)
    asked[0].continue_()
    page.locator("#status", has_text="2 scored").wait_for()
    assert page.locator("#strip button").count() == 2


def test_camera(page, log: InspectionLog) -> None:
    page.click("#camera")
    page.locator("#viewfinder").wait_for()
    page.wait_for_timeout(300)
    page.click("#shoot")
    page.locator("#status", has_text="1 scored").wait_for()
    assert log.query(Filter())[0]["name"].startswith("camera-")
    page.click("#camera-off")
    assert page.locator("#viewfinder").is_hidden()


def test_models_classes_and_drift_light(page, images: list[Path], server: Running, log: InspectionLog) -> None:
    page.select_option("#bundle", "two")
    page.select_option("#class", "nut")
    upload(page, images[:1])
    assert (log.query(Filter())[0]["bundle"], log.query(Filter())[0]["class_name"]) == ("two", "nut")
    page.locator("#light.green", has_text="none").wait_for()
    same = [encoded(DARK + 25, seed=n) for n in range(8)]
    for _ in range(14):
        server.post(*same, query="?bundle=bright")
    page.select_option("#bundle", "bright")
    page.locator("#light.red").wait_for()
    page.click("#light")
    assert "image" in page.inner_text("#drift-message")
    page.click("#drift-reset")
    page.locator("#light.grey").wait_for()


def test_a_row_of_the_log_opens_as_a_picture(browser, log: InspectionLog) -> None:
    with Running({"bright": predictor()}, log, log_thumbnails=24) as server:
        server.post(encoded(BRIGHT))
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.get_by_role("button", name="picture", exact=True).click()
        image = page.locator("#rows td img")
        image.wait_for()
        page.wait_for_function("document.querySelector('#rows td img').naturalWidth === 24")
        page.get_by_role("button", name="picture", exact=True).click()
        assert image.count() == 0
        page.close()


def test_a_phone_in_the_dark(browser, server: Running, images: list[Path]) -> None:
    context = browser.new_context(viewport=PHONE, color_scheme="dark", has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    upload(page, images)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(v) for v in ground.removeprefix("rgb(").removesuffix(")").split(",")) < 60
    heights = page.evaluate("[...document.querySelectorAll('button')].map(b => b.offsetHeight).filter(h => h)")
    assert min(heights) >= 36  # large enough for a finger
    context.close()


def test_below_a_path_of_a_proxy_everything_is_found(browser, images: list[Path]) -> None:
    with Running(root_path="/line/7") as server:
        context = browser.new_context()
        page = context.new_page()
        own, asked = f"http://127.0.0.1:{server.port}/line/7", []
        page.on("request", lambda one: asked.append(one.url))
        page.goto(own)
        upload(page, images)
        assert page.inner_text("#answer") == "anomaly"
        assert [url for url in asked if not url.startswith((own, "blob:", "data:"))] == []
        context.close()


def test_a_key_is_asked_for_once(browser) -> None:
    with Running(api_key=KEY) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.fill("#key", KEY)
        page.click("#key-ok")
        page.locator("#bundle option", has_text="bright").wait_for(state="attached")
        page.reload()
        page.locator("#bundle option", has_text="bright").wait_for(state="attached")
        assert page.locator("#ask").is_hidden()
        context.close()


def test_the_page_of_the_api_lists_the_operations(page, server: Running) -> None:
    """With the answers of the real description, and nothing of it from elsewhere (see `page`)."""
    page.goto(f"http://127.0.0.1:{server.port}/docs")
    page.locator("#operations-default-predict_v1_predict_post").wait_for()
    assert page.locator(".opblock").count() >= 10
    page.locator("#operations-default-predict_v1_predict_post").click()
    page.get_by_text("Score one or several images.").first.wait_for()


def test_the_page_of_the_api_sends_the_key_that_was_given(browser, log: InspectionLog) -> None:
    with Running({"bright": predictor()}, log, api_key=KEY) as server:
        own = f"http://127.0.0.1:{server.port}/"
        found = browser.new_context().new_page()
        found.goto(f"{own}docs")
        found.locator("text=no key or a wrong one").wait_for()
        found.evaluate("key => sessionStorage.setItem('key', key)", KEY)
        found.reload()
        found.locator(".opblock").first.wait_for()
        found.context.close()
