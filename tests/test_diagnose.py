"""Cross-class images are what they say, and a model that knows its classes notices them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import RANDOM, good_folder, run_config, save, train_samples
from typer.testing import CliRunner

from twinspect import Detector
from twinspect.cli import app
from twinspect.commands.diagnose import (
    CUTPASTE,
    MEASURES,
    MIXUP,
    composites,
    cutpaste,
    interference,
    matrices,
    mixup,
    normal_images,
    sentences,
)
from twinspect.commands.options import DiagnoseOptions
from twinspect.config import check_options
from twinspect.data import load
from twinspect.errors import ConfigError, DataError
from twinspect.inference.result import Result
from twinspect.types import CALIBRATION, TEST, TRAIN, Sample


def silent(_stage: str, _done: int, _total: int) -> None:
    pass


def plan(**settings: int | str) -> DiagnoseOptions:
    return DiagnoseOptions(Path("a.twin"), Path("data"), **settings)


@pytest.fixture
def colours(tmp_path: Path) -> list[Sample]:
    """Three classes of flat colour, with a little noise: red, green, blue."""
    rng, samples = np.random.default_rng(0), []
    for place, name in enumerate(("red", "green", "blue")):
        for number in range(4):
            pixels = rng.integers(0, 20, (40, 60, 3)).astype(np.uint8)
            pixels[..., place] += 200
            path = save(tmp_path / name / f"{number}.png", pixels)
            samples.append(Sample(path, TEST if number > 1 else TRAIN, name))
    return samples


class Truth:
    """A predictor with one rule: how many (and which) pixels are not of the image's main colour."""

    blind: bool = False

    def predict(self, source, maps: bool = True, pixels: bool = True):  # type: ignore[no-untyped-def]
        from twinspect.inference.decode import as_item

        for item in source:
            rgb = item if isinstance(item, np.ndarray) else np.asarray(_read(item))
            main = rgb.reshape(-1, 3).astype(int).sum(0).argmax()
            grid = 255.0 - rgb[..., main].astype(np.float32) + rgb.sum(2) - rgb[..., main]
            grid = np.zeros_like(grid) if self.blind else grid
            result = Result(as_item(item).name, score=float(grid.max()), width=rgb.shape[1], height=rgb.shape[0])
            result.grid, result.rgb = grid, rgb
            yield result


def _read(sample: Sample) -> np.ndarray:
    from twinspect.data.samples import read_sample_rgb

    return read_sample_rgb(sample)


# ------------------------------------------------------------------------------------------- the images


def test_mixup_is_the_weighted_sum() -> None:
    base, other = np.full((8, 6, 3), 100, np.uint8), np.full((8, 6, 3), 200, np.uint8)
    image = mixup(base, other, np.random.default_rng(0))
    assert image.shape == base.shape
    assert 130 <= image[0, 0, 0] <= 150  # 30 to 50 % of the other
    assert (image == image[0, 0, 0]).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_paste_changes_exactly_the_recorded_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 100, (50, 80, 3)).astype(np.uint8)
    other = rng.integers(150, 256, (50, 80, 3)).astype(np.uint8)
    image, mask = cutpaste(base, other, rng)
    assert np.array_equal((image != base).any(2), mask)
    assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()  # a rectangle
    assert 0.01 < mask.mean() < 0.2
    assert (image[mask] >= 150).all()  # from the other image, unchanged


def test_a_paste_looks_for_a_place_where_it_can_be_seen() -> None:
    """Two black images that differ in one corner: a piece of black on black could be found by nobody."""
    base, other = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    other[:32, :32] = 255
    changed = []
    for seed in range(20):
        image, mask = cutpaste(base, other, np.random.default_rng(seed))
        changed.append(float(image[mask].mean()))
    assert min(changed) >= 12.0


def test_images_repeat_for_a_seed_and_do_not_depend_on_other_classes(colours: list[Sample]) -> None:
    chosen = normal_images(colours, plan())

    def made(seed: int) -> list[np.ndarray]:
        return [rgb for _, rgb, _ in composites(chosen["red"], chosen["blue"], CUTPASTE, 3, seed)]

    assert all(np.array_equal(a, b) for a, b in zip(made(0), made(0), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(made(0), made(1), strict=True))
    base, rgb, mask = next(composites(chosen["red"], chosen["blue"], MIXUP, 8, 0))
    assert (base.class_name, mask) == ("red", None)
    assert rgb.shape == (40, 60, 3)


# --------------------------------------------------------------------------------------- normal images


def test_normal_images_are_unseen_ones_where_there_are_some(colours: list[Sample]) -> None:
    chosen = normal_images(colours, plan())
    assert {s.split for members in chosen.values() for s in members} == {TEST}
    train_only = [s for s in colours if s.split == TRAIN]
    assert {s.split for s in normal_images(train_only, plan())["red"]} == {TRAIN}
    held = [Sample(s.image, CALIBRATION, s.class_name) if s.split == TEST else s for s in colours]
    assert {s.split for s in normal_images(held, plan())["red"]} == {CALIBRATION}
    spoiled = [Sample(s.image, s.split, s.class_name, 1) if s.split == TEST else s for s in colours]
    assert {s.split for s in normal_images(spoiled, plan())["red"]} == {TRAIN}  # defects are never used


def test_refusals_say_what_to_do(colours: list[Sample]) -> None:
    one = [s for s in colours if s.class_name == "red"]
    with pytest.raises(DataError, match=r"1 class found \(red\).*one folder per class"):
        normal_images(one, plan())
    with pytest.raises(DataError, match="class green has 1 normal image"):
        normal_images([*one, next(s for s in colours if s.class_name == "green")], plan())
    for settings, word in (({"count": 0}, "--count 0"), ({"normals": 1}, "--normals 1")):
        with pytest.raises(ConfigError, match=word):
            check_options(plan(**settings))


# -------------------------------------------------------------------------------------------- measures


def test_a_model_that_sees_other_classes_gets_one_and_a_blind_one_a_half(colours: list[Sample]) -> None:
    found = interference(Truth(), colours, plan(count=4), silent)  # type: ignore[arg-type]
    assert found.mean() == pytest.approx(dict.fromkeys(MEASURES, 1.0), abs=0.02)
    assert "no class hides in another: the lowest value is 1.000" in list(sentences(found))[1]
    blind = Truth()
    blind.blind = True
    found = interference(blind, colours, plan(count=4), silent)  # type: ignore[arg-type]
    assert [found.mean()[name] for name in MEASURES[:3]] == pytest.approx([0.5] * 3)


def test_which_class_hides_which_is_found_in_its_own_cell(colours: list[Sample]) -> None:
    """A model that is blind to blue in red only: one low cell, in the row of red and the column of blue."""

    class Partly(Truth):
        def predict(self, source, maps: bool = True, pixels: bool = True):  # type: ignore[no-untyped-def]
            for result in super().predict(source, maps, pixels):
                red, blue = (int((result.rgb[..., i] > 90).sum()) for i in (0, 2))
                if red > blue > 0:
                    result.grid = np.zeros_like(result.grid)
                    result.score = 0.0
                yield result

    found = interference(Partly(), colours, plan(count=4), silent)  # type: ignore[arg-type]
    assert found.classes == ["blue", "green", "red"]
    assert [(p["base"], p["other"]) for p in found.pairs if p["cutpaste_auroc"] < 0.5] == [("red", "blue")]
    said = list(sentences(found))
    assert len(said) == 2
    assert said[1].startswith("blue hides in red: Mixup AUROC")
    table = next(iter(matrices(found)))
    assert table.columns == ("class", "blue", "green", "red", "mean")
    assert [row[0] for row in table.rows] == found.classes
    assert len(found.pairs) == 6


def test_classes_that_are_taken_for_another_are_named(colours: list[Sample]) -> None:
    class Colourblind(Truth):
        def predict(self, source, maps: bool = True, pixels: bool = True):  # type: ignore[no-untyped-def]
            for result in super().predict(source, maps, pixels):
                main = result.rgb.reshape(-1, 3).astype(int).sum(0).argmax()
                result.predicted_class = ("red", "red", "blue")[main]
                yield result

    found = interference(Colourblind(), colours, plan(count=2), silent)  # type: ignore[arg-type]
    count = sum(s.class_name == "green" and s.split == TEST for s in colours)
    assert f"{count} of {count} good images of green are taken for red" in list(sentences(found))[-1]
    assert not any("of red are taken" in text or "of blue are taken" in text for text in sentences(found))
    assert sum(row["images"] for row in found.values()["predicted_class"]) == 3 * count


def test_results_are_plain(colours: list[Sample]) -> None:
    two = [sample for sample in colours if sample.class_name in ("red", "blue")]
    found = interference(Truth(), two, plan(count=2), silent)  # type: ignore[arg-type]
    values = json.loads(json.dumps(found.values(), allow_nan=False))
    assert [(p["base"], p["other"]) for p in values["pairs"]] == [("blue", "red"), ("red", "blue")]
    assert values["normal_images_from"] == {"red": TEST, "blue": TEST}


# --------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def bundles(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("diagnose")
    return {
        name: Detector(config=run_config(RANDOM, model=name)).fit(train_samples(parts)).save(folder / f"{name}.twin")
        for name in ("dual", "snl")
    }


@pytest.mark.parametrize("name", ["dual", "snl"])
def test_command_prints_matrices_and_writes_json_and_report(
    name: str, bundles: dict[str, Path], parts: Path, tmp_path: Path
) -> None:
    report, table, values = tmp_path / "r.html", tmp_path / "r.md", tmp_path / "r.json"
    done = CliRunner().invoke(
        app,
        ["diagnose", str(bundles[name]), str(parts), "--count", "2", "--report", str(report), "--report", str(table),
         "--json", str(values)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(values.read_text())
    classes = load(parts).classes
    assert found["classes"] == sorted(classes)
    assert len(found["pairs"]) == len(classes) * (len(classes) - 1)
    for word in (*classes, "Mixup", "CutPaste", "mean over 2 ordered pairs", "hide"):
        assert word in done.stdout
    html = report.read_text()
    assert html.count("data:image/jpeg") >= 4
    assert "https://" not in html
    assert "| class |" in table.read_text()


def test_command_prints_json_alone_and_refuses_in_words(
    bundles: dict[str, Path], parts: Path, tmp_path: Path
) -> None:
    run = ["diagnose", str(bundles["snl"]), str(parts), "--count", "1"]
    done = CliRunner().invoke(app, [*run, "--json", "-"])
    assert done.exit_code == 0
    assert set(json.loads(done.stdout)["mean"]) == set(MEASURES)
    plain = good_folder(tmp_path / "plain", 4)
    done = CliRunner().invoke(app, ["diagnose", str(bundles["snl"]), str(plain)])
    assert done.exit_code == 2
    assert "at least two" in done.stderr
    done = CliRunner().invoke(app, [*run, "--report", str(tmp_path / "r.pdf")])
    assert done.exit_code == 2
    assert ".html" in done.stderr


@pytest.mark.parametrize("normals", [1, 40])
def test_images_that_cannot_be_read_are_left_out(
    bundles: dict[str, Path], parts: Path, tmp_path: Path, normals: int
) -> None:
    shutil.copytree(parts, tmp_path / "set")
    first, second = (by_class[0] for by_class in normal_images(load(tmp_path / "set").samples, plan()).values())
    for sample in (first, second):
        sample.image.write_bytes(b"")
    run = ["diagnose", str(bundles["snl"]), str(tmp_path / "set"), "--count", "4", "--normals", str(normals + 1)]
    done = CliRunner().invoke(app, [*run, "--json", "-"])
    assert done.exit_code == 0, done.output
    failed = json.loads(done.stdout)["failed"]
    assert [line.count(str(sample.image)) for line, sample in zip(failed, (first, second), strict=True)] == [1, 1]


def test_a_trained_model_notices_other_classes_better_than_chance(tmp_path: Path) -> None:
    """The embedded teacher on flat colours: a paste of another colour is no normal image of any class."""
    rng, root = np.random.default_rng(0), tmp_path / "set"
    for place, name in enumerate(("red", "green")):
        for number in range(24):
            pixels = rng.integers(0, 60, (64, 64, 3)).astype(np.uint8)
            pixels[..., place] += 150
            save(root / name / "train" / "good" / f"{number}.png", pixels)
    config = run_config("efficientnet-lite0", model="rd", pretrained=True, steps=6, width=16)
    detector = Detector(config=config).fit(train_samples(root))
    found = interference(detector.predictor(), load(root).samples, plan(count=6, normals=12), silent)
    assert found.mean()["cutpaste_auroc"] > 0.8
    assert found.mean()["pixel_auroc"] > 0.7
