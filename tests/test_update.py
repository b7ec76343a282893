"""Further good images without the old ones: as good as training on all, old classes as before, taken back exactly."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import Plan, write
from test_copies import scratched, wedge
from tiny import images_to_test, picture, run_config, save, train_samples
from typer.testing import CliRunner

from twinspect import Detector
from twinspect.bundle import read_bundle
from twinspect.cli import app
from twinspect.errors import BundleError, ConfigError, DataError
from twinspect.metrics import auroc
from twinspect.models.statistics import PositionGaussian, unwhitened, whitening

CONFIG = run_config("efficientnet-lite0", True, size=128, steps=4, depth=1)
ROUNDS, EACH = 5, 8


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cloth and a moulded part, with test images; the part's training images come in six portions."""
    root = tmp_path_factory.mktemp("data") / "line"
    write("mvtec-ad", root, Plan(size=96, train=16 + ROUNDS * EACH, good=16, defect=16))
    return root


def area(detector: Detector, root: Path, name: str) -> float:
    """Image AUROC of a class."""
    parts = [[p for p in images_to_test(root, label) if name in p.parts] for label in (0, 1)]
    scores = [r.score for part in parts for r in detector.predict(part, maps=False)]
    return auroc(np.array(scores), np.array([0] * len(parts[0]) + [1] * len(parts[1])))


def test_five_updates_are_as_good_as_training_on_all_and_leave_the_other_class_alone(products: Path) -> None:
    samples = train_samples(products)
    other, grown = sorted({s.class_name for s in samples})
    theirs, own = ([s for s in samples if s.class_name == name] for name in (other, grown))
    detector = Detector(config=CONFIG).fit([*theirs, *own[:16]], quiet=True)
    before = area(detector, products, other)
    for round_ in range(ROUNDS):
        detector.update(own[16 + EACH * round_ :][:EACH], quiet=True)
        assert area(detector, products, other) >= before - 0.005
    everything = Detector(config=CONFIG).fit(samples, quiet=True)
    assert area(detector, products, grown) >= area(everything, products, grown) - 0.01
    assert area(detector, products, other) >= area(everything, products, other) - 0.01
    updates = detector.record_["updates"]
    assert [one["classes"] for one in updates] == [{grown: EACH}] * ROUNDS
    assert np.mean([r.is_anomaly for r in detector.predict(images_to_test(products, 0))]) <= 0.15
    assert len(detector.fitted.decision.good) == len(everything.fitted.decision.good)


def test_false_alarms_that_are_given_back_are_good_from_then_on(products: Path, tmp_path: Path) -> None:
    own = [s for s in train_samples(products) if s.class_name == "weave"]
    detector = Detector(config=CONFIG).fit(own[:24], quiet=True)
    stained = [picture(300 + i).astype(float) * [1.0, 0.85, 0.7] for i in range(12)]
    stained = [one.clip(0, 255).astype(np.uint8) for one in stained]
    before = detector.predict(stained)
    assert np.mean([r.is_anomaly for r in before]) > 0.8
    detector.update(stained[:8], class_name="weave", quiet=True)
    after = detector.predict(stained[8:])
    assert np.median([r.score for r in after]) < 0.5 * np.median([r.score for r in before[8:]])
    assert not any(r.is_anomaly for r in detector.predict(stained[:8])[1:])


def test_a_new_class_is_what_training_on_both_makes_of_it(tmp_path: Path) -> None:
    cloth, wedges = [picture(i) for i in range(20)], [wedge(i) for i in range(20)]
    detector = Detector(config=CONFIG).fit(cloth, quiet=True)
    same = detector.predict(picture(70)).score
    detector.update(wedges, class_name="wedge", quiet=True)
    assert any(note.startswith("class wedge is new, beside normal;") for note in detector.record_["notes"])
    good, bad, old = detector.predict([wedge(90), scratched(wedge(91)), picture(70)])
    assert [one.predicted_class for one in (good, bad, old)] == ["wedge", "wedge", "normal"]
    assert bad.is_anomaly
    assert bad.score > 2 * good.score
    assert old.score == pytest.approx(same, rel=0.3)
    assert detector.fitted.decision.classes == ["normal", "wedge"]
    again = Detector.load(detector.save(tmp_path / "m.twin")).update([wedge(50)], class_name="wedge", quiet=True)
    assert len(again.record_["updates"]) == 2
    assert again.predict(wedge(3)).near[0] == "image 000003 in memory"


def test_what_cannot_be_learnt_is_said(quick: Detector, parts: Path, tmp_path: Path) -> None:
    own = train_samples(parts)
    (tmp_path / "text.png").write_text("no picture")
    for data, name, kind, words in (
        (own, None, DataError, "not learnt already"),
        (tmp_path, own[0].class_name, DataError, r"none of the 1 images can be read, such as .*text\.png"),
        ([picture(900)], None, ConfigError, "--class NAME"),
        ([picture(900 + i) for i in range(8)], "tile", DataError, "at least 9 are needed"),
    ):
        with pytest.raises(kind, match=words):
            copy.copy(quick).update(data, class_name=name, quiet=True)
    plain = Detector(config=run_config(scoring="plain")).fit(own, quiet=True)
    with pytest.raises(BundleError, match="scoring plain"):
        plain.update([picture(900)], quiet=True)


def test_the_command_learns_lists_and_takes_back(quick: Detector, tmp_path: Path) -> None:
    bundle = quick.save(tmp_path / "m.twin")
    original = bundle.read_bytes()
    name = quick.fitted.decision.classes[0]
    for number in range(3):
        save(tmp_path / "new" / f"{number}.png", picture(500 + number))
    run = CliRunner().invoke
    assert "nothing beyond" in run(app, ["update", str(bundle), "--list"]).output
    refused = run(app, ["update", str(bundle), str(tmp_path / "new")])
    assert refused.exit_code == 2
    assert "--class NAME" in refused.output
    done = run(app, ["update", str(bundle), str(tmp_path / "new"), "--class", name])
    assert done.exit_code == 0, done.output
    assert "1. " in done.output
    assert f"3 of {name}" in run(app, ["update", str(bundle), "--list"]).output
    assert (tmp_path / "m.twin.0").read_bytes() == original
    assert read_bundle(bundle).meta["record"]["updates"][0]["from"] == quick.fitted.decision.model_id
    other = tmp_path / "other.twin"
    done = run(app, ["update", str(bundle), str(tmp_path / "new"), "--class", name, "-o", str(other)])
    assert "already" in done.output
    save(tmp_path / "more" / "0.png", picture(600))
    done = run(app, ["update", str(bundle), str(tmp_path / "more"), "--class", name, "-o", str(other)])
    assert done.exit_code == 0, done.output
    undone = run(app, ["update", str(other), "--undo"])
    assert undone.exit_code == 2
    assert "written to a file of its own" in undone.output
    assert read_bundle(bundle).meta["decision"]["model_id"] in undone.output
    assert run(app, ["update", str(bundle), str(tmp_path / "more"), "--class", name]).output.count("2. 20") == 1
    undone = run(app, ["update", str(bundle), "--undo"]).output
    assert undone.startswith("taken back: 2. ")
    assert "thresholds are those of before it" in undone
    assert "taken back: 1. " in run(app, ["update", str(bundle), "--undo"]).output
    assert bundle.read_bytes() == original
    assert run(app, ["update", str(bundle), "--undo"]).exit_code == 2
    assert "one of the three" in run(app, ["update", str(bundle)]).output


def test_sums_and_covariances_are_read_off_the_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_nD = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    covariance = (rows_nD.T @ rows_nD / 200).double()
    found = unwhitened(whitening(covariance, 20_000).half())
    torch.testing.assert_close(found, covariance, rtol=0.02, atol=0.02 * float(covariance.diagonal().mean()))
    gaussian = PositionGaussian(6, 4)
    sums, images_V = torch.randn(2, 16, 6, generator=generator) * 30, torch.tensor([30.0, 5.0])
    gaussian.set_means(sums, images_V)
    torch.testing.assert_close(gaussian.sums(images_V), sums, rtol=0, atol=float(sums.abs().max()) / 100)
