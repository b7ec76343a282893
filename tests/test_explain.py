"""Why an image is called what it is: the students' shares, the nearest good image, and where all that is told."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluation import call
from test_report import Page
from tiny import picture, run_config, save

from twinspect import Detector
from twinspect.inference.result import Result, _surprise
from twinspect.models.layers import surprise


def spoiled(number: int = 900) -> np.ndarray:
    pixels = picture(number)
    pixels[40:60, 40:60] = 255
    return pixels


def test_surprise_of_one_number_is_that_of_tensors() -> None:
    z = torch.linspace(-6, 60, 200, dtype=torch.float64)
    ours = [_surprise(float(one)) for one in z]
    np.testing.assert_allclose(ours, surprise(z).numpy(), rtol=2e-3, atol=1e-9)


def test_shares_add_up_to_the_score(detector: Detector) -> None:
    model, image = detector.fitted.model, torch.from_numpy(spoiled()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        out = model(image)
    link = model.scorer.clusters.link_K[out.cluster_B]
    local, semantic = link * surprise(out.score_local_B), surprise(out.score_semantic_B)
    expected = float(local / (local + semantic))
    assert detector.predict(spoiled()).share_local == pytest.approx(expected, abs=5e-3)
    assert 0.0 < expected < 1.0


def test_a_family_without_a_semantic_student_has_no_share_for_it() -> None:
    z = 3.0
    result = Result("x", score=_surprise(z), score_local=z, score_semantic=0.0)
    assert result.share_local == 1.0
    assert math.isnan(Result("x").share_local)


def test_the_nearest_good_image_is_the_most_similar_one(detector: Detector) -> None:
    decision, model = detector.fitted.decision, detector.fitted.model
    assert len(decision.bank) == len(decision.thumbnails) == len(model.scorer.nearest.bank_nF) == 32
    for place in (0, 7, 31):  # a training image is nearest to itself
        found = detector.predict(decision.bank[place])
        assert found.nearest == decision.bank[place]
        near, whole = found.nearest_image, found.rgb
        assert near.size == (96, 96)
        assert np.abs(np.asarray(near).astype(int) - whole).mean() < 12
        assert len(found.near[1]) < 9_000


def test_explain_says_what_the_row_says(detector: Detector) -> None:
    found = detector.predict(spoiled())
    said = found.explain()
    assert repr(found) == f"Result({found.path!r}, {said['text']})"
    assert json.loads(json.dumps(said)) == said
    assert said["answer"] == "anomaly"
    assert said["severity"] == pytest.approx(found.score / found.threshold)
    assert sum(said["shares"].values()) == pytest.approx(1.0)
    assert said["regions"] == [dataclasses.asdict(region) for region in found.regions]
    assert said["nearest"] == found.row()["nearest"] != ""
    assert f"{found.severity:.2f} times the threshold" in said["text"]
    assert found.nearest in said["text"]
    assert Result("y", error="y: broken").explain()["text"] == "y: broken"


def test_what_the_bundle_keeps_comes_back_and_can_be_left_out(
    detector: Detector, bundle: Path, tmp_path: Path
) -> None:
    image = save(tmp_path / "bad.png", spoiled())
    loaded = Detector.load(bundle).predict(image)
    assert loaded.near == detector.predict(image).near != ("", b"")
    thin = dataclasses.replace(detector.fitted, decision=dataclasses.replace(detector.fitted.decision, thumbnails=()))
    from twinspect.bundle import save as write

    write(thin, tmp_path / "none.twin")
    found = Detector.load(tmp_path / "none.twin").predict(image)
    assert found.nearest == loaded.nearest
    assert found.nearest_image is None
    assert found.overlay().size


def test_fit_keeps_no_pictures_where_none_are_wanted(parts: Path) -> None:
    config = run_config(thumbnails=0)
    assert Detector(config=config).fit(parts).fitted.decision.thumbnails == ()


def test_an_update_keeps_names_and_pictures_in_step(quick: Detector, parts: Path, tmp_path: Path) -> None:
    fresh = [save(tmp_path / "new" / f"{i}.png", picture(500 + i)) for i in range(3)]
    before = quick.fitted.decision.bank
    updated = Detector.load(quick.save(tmp_path / "m.twin")).update(tmp_path / "new", class_name="weave")
    decision = updated.fitted.decision
    assert len(decision.bank) == len(decision.thumbnails) == len(updated.fitted.model.scorer.nearest.bank_nF)
    assert set(decision.bank) == {*before, *map(str, fresh)}
    for path in (before[0], str(fresh[2])):
        found = updated.predict(path)
        assert found.nearest == path
        assert np.abs(np.asarray(found.nearest_image).astype(int) - found.image()).mean() < 12


def test_a_report_shows_the_nearest_good_image(bundle: Path, tmp_path: Path) -> None:
    image = save(tmp_path / "bad.png", spoiled())
    code, _, error = call("predict", bundle, image, "--report", tmp_path / "r.html", "--out", tmp_path / "t.csv")
    assert code == 0, error
    html = (tmp_path / "r.html").read_text()
    assert not Page(html).open
    assert html.count('alt="Nearest good training image"') == html.count("<li><div") > 0
    header, row = (tmp_path / "t.csv").read_text().splitlines()
    named = dict(zip(header.split(","), row.split(","), strict=False))
    assert "nearest" in named
    assert "share_local" in named


def test_an_anomaly_without_a_region_says_where_the_map_is_highest() -> None:
    grid = np.zeros((4, 8), np.float32)
    grid[3, 1] = 2.0
    result = Result("x", score=2.0, threshold=1.0, answer="anomaly", is_anomaly=True, width=80, height=40, grid=grid)
    assert "the map is highest at (15, 35)" in result.explain()["text"]
    assert "highest" not in dataclasses.replace(result, answer="good", is_anomaly=False).reasons()
