"""Results and detectors in other people's tools: pandas, notebooks, scikit-learn (COCO: `test_pictures`)."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from test_bulk import job, runs, table
from tiny import images_to_test, picture, run_config

from twinspect import Detector, TwinspectError
from twinspect.inference.result import Result, columns


def test_a_result_is_plain_json(detector: Detector) -> None:
    scratched = picture(5)
    scratched[30:50, 20:60] = (255, 0, 0)
    found = detector.predict(scratched)
    assert found.regions
    said = found.to_dict()
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert list(said) == [column.name for column in columns()]
    assert (said["score"], said["regions"]) == (found.score, [asdict(region) for region in found.regions])
    assert Result("gone", error="gone: no such file").to_dict()["score"] is None


def test_results_become_a_frame_like_the_table(quick: Detector, parts: Path, tmp_path: Path) -> None:
    images = images_to_test(parts, None)[:5]
    frame = quick.predict([*images, tmp_path / "gone.png"]).to_pandas()
    runs(job(quick.save(tmp_path / "m.twin"), tmp_path / "t.parquet", *images))
    rows = pandas.DataFrame(table(tmp_path / "t.parquet"))
    assert [name for name in frame.columns if name != "ms"] == [name for name in rows.columns if name != "ms"]
    np.testing.assert_allclose(frame["score"][:5], rows["score"], rtol=1e-4)
    assert frame["path"][:5].tolist() == rows["path"].tolist()
    assert pandas.isna(frame["score"][5])
    assert "gone.png" in frame["error"][5]
    row = quick.predict(images[0]).to_pandas()
    assert row["path"] == str(images[0])
    assert isinstance(row["regions"], list)


def test_a_notebook_shows_the_overlay(detector: Detector) -> None:
    found = detector.predict(picture(5))
    with Image.open(io.BytesIO(found._repr_png_())) as shown:
        assert shown.width == 96
        assert shown.height > 96
    (bare,) = detector.predict([picture(5)], maps=False)
    assert bare._repr_png_() is None


def test_scikit_learn_habits(quick: Detector, parts: Path, tmp_path: Path) -> None:
    images = images_to_test(parts, None)
    scores = quick.score_samples(images)
    np.testing.assert_allclose(scores, [-one.score for one in quick.predict(images, maps=False)], rtol=1e-4)
    labels = ["good" not in path.parts for path in images]
    auroc = roc_auc_score(labels, [one.score for one in quick.predict(images, maps=False)])
    assert roc_auc_score(labels, -scores) == pytest.approx(auroc, abs=1e-3)
    assert np.isnan(quick.score_samples([images[0], tmp_path / "gone.png"])[1])
    made = Detector("efficientnet-lite0", size=64, config=run_config())
    again = clone(made)
    assert again.get_params() == made.get_params()
    assert again.config == made.config
    with pytest.raises(TwinspectError, match="not trained yet"):
        _ = again.fitted
