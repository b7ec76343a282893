"""The Python face: what fit takes, what comes back."""

from pathlib import Path

from tiny import RANDOM, good_folder, picture, run_config, same_tensors, save

from twinspect import Detector, Sample
from twinspect.inference.decode import is_single
from twinspect.types import TRAIN


def test_fit_takes_a_folder_paths_or_samples_and_gives_the_same(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 12)
    paths = sorted(folder.iterdir())
    sources = [folder, str(folder), paths, [str(p) for p in paths], [Sample(p, TRAIN, "normal") for p in paths]]
    models = [Detector(config=run_config()).fit(source).fitted.model.state_dict() for source in sources]
    assert all(same_tensors(models[0], other) for other in models[1:])


def test_fit_returns_itself_and_keeps_what_was_asked(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 10)
    stages: list[str] = []
    detector = Detector(config=run_config())
    assert detector.fit(folder, steps=2, seed=9, progress=lambda stage, done, total: stages.append(stage)) is detector
    assert (detector.config.train.steps, detector.config.train.seed) == (2, 9)
    assert detector.record_["training"]["steps"] == 2
    assert {stage.split()[0] for stage in stages} >= {"teacher", "training", "statistics"}
    before = detector.predict(picture()).score
    assert detector.fit(folder, seed=10).predict(picture()).score != before  # the old predictor is forgotten


def test_readme_form(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 10)
    detector = Detector(RANDOM, size=64, pretrained=False).fit(folder, steps=1)
    result = detector.predict(folder / "000.png")
    assert result.is_anomaly in (True, False)
    assert result.class_name


def test_what_counts_as_one_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", picture())
    assert all(is_single(one) for one in (path, str(path), picture(), picture()[..., 0]))
    assert not any(is_single(many) for many in (tmp_path, [path], (path,), picture()[None], str(tmp_path / "*.png")))
