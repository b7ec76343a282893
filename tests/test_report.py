"""Reports: self-contained, small, accessible, and nothing from outside is taken as markup."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from twinspect.errors import TwinspectError
from twinspect.inference.outputs import encode
from twinspect.inference.result import Result
from twinspect.report import Axis, Case, Cases, Histogram, Report, RocCurve, Section, Table, case_of

VOID = {"meta", "img", "br", "path", "circle", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects tags with attributes and checks that they are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def result(score: float = 3.0, name: str = "a/b.png") -> Result:
    rng = np.random.default_rng(0)
    return Result(
        name, score=score, threshold=2.0, is_anomaly=score > 2, width=300, height=200, scale=(0.0, 8.0),
        grid=rng.random((12, 12), dtype=np.float32) * 8,
        rgb=rng.integers(0, 256, (200, 300, 3), dtype=np.uint8),
    )  # fmt: skip


def everything(cases: int = 2) -> list[Section]:
    picture = case_of(result(), "local")
    return [
        Section(
            "One",
            ("Words with <b>marks</b>.",),
            (
                Table("Numbers", ("class", "auroc", "count"), (("a <i>", 0.98765, 12), ("b", 1.0, 3)), "a note"),
                RocCurve("ROC: x & y", [0, 0, 1], [0, 0.5, 1], (0.25, 0.5)),
                Histogram("Scores", {"good": [1, 2, 3], "<bad>": [4.0, 9.0]}, threshold=3.5),
            ),
        ),
        Section("Two", (), (Cases("Worst", (picture,) * cases, (0.0, 8.0), "note"),)),
    ]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("r") / "deep" / "r.html"
    return Report("A <title>", everything(), {"Teacher": "t&t"}).write(path).read_text(encoding="utf-8")


def drawn(chart: Histogram | RocCurve) -> str:
    """The chart as it stands in a page."""
    page = Report("t", [Section("s", (), (chart,))]).html()
    return page[page.index('<div class="chart') : page.index("</figure>")]


def heights(chart: str) -> list[list[float]]:
    """Of the bars of every group, in percent."""
    rows = re.findall(r'<div class="bars s\d">(.*?)</div>', chart)
    return [[float(height) for height in re.findall(r"height: ([0-9.]+)%", row)] for row in rows]


def test_nothing_outside_is_referred_to(html: str) -> None:
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", html)
    page = Page(html)
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert sources
    assert all(source and source.startswith("data:image/jpeg;base64,") for source in sources)


def test_markup_is_closed_and_content_escaped(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert "<b>marks" not in html
    assert "A &lt;title&gt;" in html
    assert "&lt;bad&gt;" in html
    assert "x &amp; y" in html


def test_every_picture_and_chart_has_words(html: str) -> None:
    page = Page(html)
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    charts = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(charts) == 2
    assert all(len(chart["aria-label"] or "") > 20 for chart in charts)
    anchors = {attrs.get("id") for _, attrs in page.tags}
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert all(link and link.startswith("#") and link[1:] in anchors for link in links)
    assert dict(page.tags[0][1]) == {"lang": "en"}
    assert "prefers-color-scheme: dark" in html


def test_headings_and_table_cells(html: str) -> None:
    assert "0.9877" in html
    assert '<td class="number">12</td>' in html
    assert html.count('scope="row"') == 2


def test_contrast_of_text_in_both_modes(html: str) -> None:
    light, dark = html.split("prefers-color-scheme: dark")
    for half in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", half))
        for name in ("text", "soft", "link"):
            assert contrast(colours[name], colours["card"]) >= 4.5, name
        for name in ("s0", "s1", "s2"):
            assert contrast(colours[name], colours["back"]) >= 3.0, name


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_thousand_noisy_pictures_stay_under_five_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8))
    case = Case("noise", noise, noise)
    path = Report("many", [Section("all", (), (Cases("c", (case,) * 1000, (0, 1)),))]).write(tmp_path / "r.html")
    assert path.stat().st_size < 5_000_000
    assert "were left out to keep this file small" in path.read_text(encoding="utf-8")


def test_a_result_without_a_map_is_refused() -> None:
    with pytest.raises(ValueError, match="no map to draw"):
        case_of(Result("x.png", error="damaged"), "local")


def test_a_file_in_the_way_gives_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TwinspectError, match="cannot be written"):
        Report("t", everything()).write(tmp_path / "file" / "r.html")


@pytest.mark.parametrize("values", [[], [0.0], [-3.0, -2.0], [0, 0, 0], [1e-9, 2e-9], [1.0, 1e6], [0.1, 0.2, 5e4]])
def test_histograms_of_odd_values(values: list[float]) -> None:
    shown = drawn(Histogram("h", {"good": values, "none": []}, threshold=None))
    assert "nan" not in shown
    assert "inf" not in shown
    assert [max(row) for row in heights(shown)] == [100.0 if values else 0.0, 0.0]


def test_a_long_tail_shares_the_last_bar_and_good_images_stay_visible() -> None:
    good = np.linspace(1.0, 3.0, 50)
    shown = drawn(Histogram("h", {"good": good, "bad": [1e4, 2e4]}, 4.0))
    assert "the last bar: this and more" in shown
    bars = [[place for place, height in enumerate(row) if height] for row in heights(shown)]
    assert bars[0][-1] - bars[0][0] >= 3
    assert bars[1] == [47]
    assert "this and more" not in drawn(Histogram("h", {"good": good}, 4.0))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-2, 3), (0, 1e-6), (0, 123456)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = Axis(low, high).ticks()
    assert 3 <= len(ticks) <= 13
    assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in ticks)


def test_many_points_make_a_small_chart_with_both_ends() -> None:
    x = np.linspace(0, 1, 100_000)
    shown = drawn(RocCurve("ROC", x, x**2, (0.5, 0.25)))
    assert len(shown) < 20_000
    points = re.search(r'class="line" d="M([^"]+)"', shown)[1].split("L")
    assert (points[0], points[-1]) == ("0.0 100.0", "100.0 0.0")
    assert "left: 50.0%; bottom: 25.0%" in shown


def test_a_table_of_dicts_has_a_dash_where_a_row_has_no_value() -> None:
    table = Table.of(
        "t", [{"class": "a", "auroc": 0.5, "x": None}, {"class": "b", "auroc": None, "found": 3}], "a note"
    )
    assert table.columns == ("class", "auroc", "found")
    assert table.rows == (("a", 0.5, "-"), ("b", "-", 3))


def test_headings_stand_over_their_values_and_a_dash_among_numbers() -> None:
    table = Table("t", ("class", "rule", "score"), (("a", "own", 1.0), ("b", "own", "-")))
    page = Report("x", [Section("s", (), (table,))]).html()
    assert '<th scope="col">rule</th><th scope="col" class="number">score</th>' in page
    assert '<td>own</td><td class="number">1.0000</td>' in page
    assert '<td>own</td><td class="number">-</td>' in page
    assert "fixed scale" not in page


@pytest.mark.parametrize("value", [0.5, 9.5])
def test_the_threshold_is_written_inside_the_chart(value: float) -> None:
    """Beyond the last bar its words would leave the picture."""
    shown = drawn(Histogram("h", {"good": np.linspace(0, 9, 50)}, threshold=value))
    words = re.search(r'class="threshold" style="left: ([0-9.]+)%"><span( class="left")?>threshold', shown)
    place, side = words.groups()
    assert bool(side) == (float(place) > 50)
    assert ">good<" not in shown


def test_a_caption_says_how_severe_a_score_is() -> None:
    assert case_of(result(3.0), "local").caption == "b.png: local, score 3.00, severity 1.50, called anomalous"


@pytest.mark.parametrize("threshold", [math.nan, 0.0])
def test_there_is_no_severity_without_a_threshold(threshold: float) -> None:
    found = Result("a.png", score=3.0, threshold=threshold)
    assert math.isnan(found.severity)
    assert '"severity": null' in encode([found.row()], ".jsonl").decode()


def test_severity_is_not_clamped() -> None:
    assert Result("a.png", score=1e6, threshold=2.0).severity == 5e5
