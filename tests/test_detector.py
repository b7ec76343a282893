"""The Python face: what fit takes, what comes back."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import RANDOM, good_folder, picture, run_config, same_tensors, save

from twinspect import Detector, Sample
from twinspect.commands.calibrate import threshold_section
from twinspect.detector import as_samples
from twinspect.errors import ConfigError, DataError, ImageError
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


# ---------------------------------------------------------------------------------- what fit takes


def test_fit_takes_images_in_memory_and_learns_the_same(tmp_path: Path) -> None:
    arrays = [picture(i) for i in range(12)]
    images = [Image.fromarray(one) for one in arrays]
    given = [
        arrays,
        np.stack(arrays),
        images,
        [one[..., ::-1] for one in arrays],
        (one for one in images),
    ]
    states = [
        Detector(config=run_config()).fit(one, quiet=True, bgr=number == 3).fitted.model.state_dict()
        for number, one in enumerate(given)
    ]
    assert all(same_tensors(states[0], other) for other in states[1:])


def test_fit_takes_a_glob_folders_in_a_list_and_a_mixture(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "line", 6)
    paths = sorted(folder.iterdir())
    for source in (str(folder / "*.png"), [folder], [str(folder / "00[0-5].png")]):
        assert [sample.image for sample in as_samples(source)] == paths
    mixed = as_samples([paths[0], picture(1), paths[2].read_bytes(), Image.open(paths[3])])
    assert [sample.in_file for sample in mixed] == [True, False, False, False]
    assert len({sample.image for sample in mixed}) == 4
    assert all(
        (sample.pixels == picture(number)).all() for number, sample in enumerate(mixed) if sample.pixels is not None
    )


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        ([1, 2], ConfigError, "a list of Sample, or good images: paths, arrays, PIL images"),
        ([b"no image"], DataError, "<bytes>"),
        ([np.full((8, 8, 3), 300.0)], ImageError, "0 to 1"),
        ("*.nothing", DataError, "nothing found"),
    ],
)
def test_what_holds_no_image_is_refused(data: object, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        as_samples(data)


def test_copies_in_memory_count_once(tmp_path: Path) -> None:
    arrays = [picture(i) for i in range(10)]
    detector = Detector(config=run_config()).fit([*arrays, picture(0)], quiet=True)
    assert "1 of 11 good images are copies of others" in " ".join(detector.record_["notes"])


def test_progress_is_shown_unless_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = good_folder(tmp_path / "line", 4)
    Detector(config=run_config()).fit(folder, quiet=True)
    assert capsys.readouterr() == ("", "")
    Detector(config=run_config()).fit(folder)
    assert "4 good images; no students" in capsys.readouterr().err


# ------------------------------------------------------------------------------- what comes back


def test_a_list_of_results_keeps_no_pixels_of_files_and_draws_all_the_same(quick: Detector, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "new", 3)
    listed, streamed = quick.predict(folder), list(quick.predict(folder, stream=True))
    assert all(one.rgb is None for one in listed)
    for one, other in zip(listed, streamed, strict=True):
        assert one.overlay().tobytes() == other.overlay().tobytes()
    assert quick.predict([picture(0), picture(1)])[1].rgb is not None  # these have no file to be read from again


def test_arrays_of_opencv(quick: Detector) -> None:
    rgb = picture(5)
    assert quick.predict(rgb[..., ::-1], bgr=True).score == quick.predict(rgb).score
    assert quick.predict(rgb[..., ::-1]).score != quick.predict(rgb).score


def test_the_threshold_can_be_set(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "line", 10)
    detector = Detector(config=run_config()).fit(folder, quiet=True)
    promised, score = detector.threshold, detector.predict(folder / "000.png").score
    detector.threshold = score - 1
    assert detector.threshold == score - 1
    assert detector.predict(folder / "000.png").is_anomaly
    assert "set by hand" in "".join(threshold_section(detector.fitted.decision).lines())
    again = Detector.load(detector.save(tmp_path / "m.twin"))
    assert again.threshold == score - 1
    detector.threshold = {"line": score + 1}
    assert not detector.predict(folder / "000.png").is_anomaly
    detector.threshold = None
    assert detector.threshold == promised
    for wrong in ("high", float("nan"), True):
        with pytest.raises(ConfigError, match="a finite number, or None"):
            detector.threshold = wrong
    with pytest.raises(ConfigError, match="unknown class 'screw'"):
        detector.threshold = {"screw": 1.0}


def test_what_it_says_of_itself(quick: Detector) -> None:
    assert repr(Detector("efficientnet-lite0")) == "Detector(efficientnet-lite0, not fitted)"
    text = repr(quick)
    assert "64 px, classes: " in text
    assert f"threshold {quick.threshold:.3g}" in text
