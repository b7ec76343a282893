"""Evaluation with a real tiny model: every metric that the data allow, and clear words where they do not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from layouts import Plan, write
from PIL import Image
from tiny import RANDOM, run_config
from typer.testing import CliRunner

from twinspect import Detector
from twinspect.cli import app
from twinspect.commands import evaluate as room
from twinspect.commands.evaluate import (
    AS_GIVEN,
    choose_test,
    count_calls,
    metric_tables,
    metrics_of,
    shared_defects,
    without_leaks,
)
from twinspect.data import load
from twinspect.data.protocols import find_leaks
from twinspect.data.samples import read_regions
from twinspect.errors import ConfigError, DataError
from twinspect.inference.result import Result
from twinspect.metrics import mean_of
from twinspect.metrics.pixels import MemoryBudget, ScoreHistogram, summarise
from twinspect.types import TEST, Sample


def silent(_stage: str, _done: int, _total: int) -> None:
    """No progress."""


class Spoilt:
    """A predictor whose answers are changed by a function, for what a real one must never do."""

    def __init__(self, inner, change) -> None:
        self.inner, self.change = inner, change

    def predict(self, samples: Sequence[Sample], maps: bool = True, pixels: bool = True) -> Iterator[Result]:
        """The inner predictor's results, changed."""
        for result in self.inner.predict(samples, maps=maps, pixels=pixels):
            self.change(result)
            yield result


def call(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of a command."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def loco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes in LOCO layout."""
    root = tmp_path_factory.mktemp("loco") / "loco"
    write("mvtec-loco", root, Plan(size=48, train=12, calibration=4, good=4, defect=6))
    return root


@pytest.fixture(scope="module")
def detector_of_loco(loco: Path) -> Detector:
    """A random teacher: only the plumbing counts."""
    return Detector(config=run_config(RANDOM)).fit(loco)


@pytest.fixture(scope="module")
def bundle_of_loco(detector_of_loco: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved."""
    return detector_of_loco.save(tmp_path_factory.mktemp("bundles") / "loco.twin")


def auspro(images: list[tuple]) -> float:
    """Saturated overlap of (map, regions, kind)."""
    histogram = ScoreHistogram(MemoryBudget(1 << 27))
    for heat, regions, _ in images:
        histogram.update(heat, regions=regions)
    return summarise([histogram]).values["auspro_005"]


def test_loco_has_saturated_overlap_of_every_annotated_region(loco: Path, detector_of_loco: Detector) -> None:
    samples = room.test_samples(load(loco).samples)
    kept: dict[str, list] = {}
    predictor = detector_of_loco.predictor()
    for sample, result in zip(samples, predictor.predict(samples), strict=True):
        shape = (result.height, result.width)
        regions = read_regions(sample, shape) if sample.label else []
        kept.setdefault(sample.class_name, []).append((result.map, regions, sample.defect_type))
    found = metrics_of(predictor, samples, silent)
    for name, row in found.values["classes"].items():
        assert row["auspro_005"] == pytest.approx(auspro(kept[name]), abs=1e-6)
        for kind, value in found.values["defects_auspro_005"][name].items():
            part = [image for image in kept[name] if image[2] in ("", kind)]
            assert value == pytest.approx(auspro(part), abs=1e-6)
    assert set(shared_defects(found.values["defects"])) == {"logical_anomalies", "structural_anomalies"}
    assert {"pixel_auroc", "aupro", "image_auroc"} <= set(found.values["mean"])
    assert all(set(mean) == {"image_auroc", "image_ap", "image_f1max"} for mean in found.values["students"].values())


def test_a_score_that_is_the_same_for_all_images_is_not_measured(loco: Path) -> None:
    """Plain reverse distillation has no semantic student: an AUROC of one half would be made up."""
    detector = Detector(config=run_config(RANDOM, model="rd", depth=1)).fit(loco, quiet=True)
    found = metrics_of(detector.predictor(), room.test_samples(load(loco).samples), silent)
    assert list(found.values["students"]) == list(found.values["student_defects"]) == ["score_local"]


def test_samples_of_several_views(tmp_path: Path) -> None:
    write("real-iad", tmp_path, Plan(size=48, train=3, good=2, defect=2))
    detector = Detector(config=run_config(RANDOM)).fit(tmp_path)
    found = metrics_of(detector.predictor(), room.test_samples(load(tmp_path).samples), silent)
    assert all("sample_auroc" in row for row in found.values["classes"].values())


def test_without_masks_pixel_metrics_are_absent_and_this_is_said(tmp_path: Path, bundle_of_loco: Path) -> None:
    write("mvtec-ad", tmp_path / "set", Plan(shape="no-masks", size=48))
    code, said, problem = call("eval", bundle_of_loco, tmp_path / "set", "--json", tmp_path / "out.json")
    assert code == 0
    values = json.loads((tmp_path / "out.json").read_text())
    assert set(values["mean"]) == {"image_auroc", "image_ap", "image_f1max"}
    assert said.count("have no mask") == 1
    assert problem.count("no mask marks the defects") == 1


def test_masks_that_cannot_be_used_cost_pixel_metrics_of_their_images_only(
    tmp_path: Path, bundle_of_loco: Path
) -> None:
    write("mvtec-ad", tmp_path / "set", Plan(classes=1, size=48, train=3, good=3, defect=6))
    samples = load(tmp_path / "set").samples
    whole = [s for s in samples if s.label == 1]
    cut, larger, black, other, gone, fine = (s.masks[0] for s in whole)
    cut.write_bytes(cut.read_bytes()[:60])
    Image.new("L", (49, 48), 255).save(larger)
    Image.new("L", (48, 48)).save(black)
    other.write_text("no image")
    gone.unlink()
    code, said, problem = call("eval", bundle_of_loco, tmp_path / "set", "--json", tmp_path / "out.json")
    assert code == 0, problem
    values = json.loads((tmp_path / "out.json").read_text())
    assert {"image_auroc", "pixel_auroc", "aupro"} <= set(values["mean"])
    assert [sum(path.name in text for text in values["masks_not_used"]) for path in (cut, larger, black, other)] == [
        1
    ] * 4
    assert not any(fine.name in text for text in values["masks_not_used"])
    assert problem.count("mask not used, image metrics only:") == 4
    assert f"{black}: marks no pixel, and" in problem
    assert "1 of 6 defects have no mask" in said
    only = [replace(s, masks=(fine,)) if s == whole[-1] else replace(s, masks=()) for s in samples if s.split == TEST]
    pixels = metrics_of(Detector.load(bundle_of_loco).predictor(), only, silent).values["mean"]["pixel_auroc"]
    assert values["mean"]["pixel_auroc"] == pytest.approx(pixels, abs=1e-9)


def test_mask_of_a_good_image_and_regions_that_say_nothing(
    loco: Path, detector_of_loco: Detector, tmp_path: Path
) -> None:
    shutil.copytree(loco, tmp_path / "loco")
    samples = room.test_samples(load(tmp_path / "loco").samples)
    marked = next(s for s in samples if s.label == 1)
    good = next(s for s in samples if s.label == 0)
    empty = next(s for s in samples if s.label == 1 and s != marked)
    for path in empty.masks:
        Image.new("L", (48, 48)).save(path)
    wrong = [replace(s, masks=marked.masks) if s == good else s for s in samples]
    found = metrics_of(detector_of_loco.predictor(), wrong, silent)
    assert len(found.rows) == len(samples)
    assert sorted(text.partition(": ")[2] for text in found.values["masks_not_used"]) == sorted(
        [f"marks a defect, and {good.image} is called good", f"marks no pixel, and {empty.image} is called a defect"]
    )


@pytest.mark.parametrize("inside", [0, 255])
def test_a_mask_with_its_colours_exchanged_is_not_used(tmp_path: Path, bundle_of_loco: Path, inside: int) -> None:
    write("mvtec-ad", tmp_path / "set", Plan(classes=1, size=48, train=3, good=3, defect=4))
    samples = room.test_samples(load(tmp_path / "set").samples)
    mask = next(s for s in samples if s.label == 1).masks[0]
    values = np.full((48, 48), 255, np.uint8)
    values[10:20, 10:20] = inside
    Image.fromarray(values).save(mask)
    found = metrics_of(Detector.load(bundle_of_loco).predictor(), samples, silent)
    assert [text.partition(" of ")[0] for text in found.values["masks_not_used"]] == [
        f"{mask}: marks the whole border"
    ]
    assert len(found.rows) == len(samples)


def test_some_masks_missing(tmp_path: Path, bundle_of_loco: Path) -> None:
    write("mvtec-ad", tmp_path / "set", Plan(size=48, good=3, defect=4))
    shutil.rmtree(tmp_path / "set" / "ring" / "ground_truth")
    _, said, problem = call("eval", bundle_of_loco, tmp_path / "set", "--json", tmp_path / "out.json")
    values = json.loads((tmp_path / "out.json").read_text())
    assert "pixel_auroc" in values["classes"]["weave"]
    assert "pixel_auroc" not in values["classes"]["ring"]
    assert values["mean_over"]["pixel_auroc"] == 1
    assert said.count("have no mask") == 1
    metrics = "pixel_auroc, aupro, aupro_005, pixel_ap, pixel_f1max"
    assert problem.count(f"mean of {metrics} is over the 1 of 2 classes where it is defined") == 1


@pytest.mark.parametrize(("removed", "kind"), [("good", "defects"), ("defects", "good")])
def test_one_label_only_is_undefined_not_half(tmp_path: Path, bundle_of_loco: Path, removed: str, kind: str) -> None:
    write("mvtec-ad", tmp_path / "set", Plan(size=48, good=3, defect=4))
    for folder in (tmp_path / "set" / "ring" / "test").iterdir():
        if (folder.name == "good") == (removed == "good"):
            shutil.rmtree(folder)
    code, said, problem = call("eval", bundle_of_loco, tmp_path / "set", "--json", tmp_path / "out.json")
    assert code == 0
    values = json.loads((tmp_path / "out.json").read_text())
    assert "image_auroc" not in values["classes"]["ring"]
    assert values["mean"]["image_auroc"] == values["classes"]["weave"]["image_auroc"]
    assert f"ring: no AUROC and the like, as all {values['images']['ring']} images are {kind}" in problem
    metrics = said.partition("metrics")[2].splitlines()
    assert next(line for line in metrics if line.split()[:1] == ["ring"]).split()[1:4] == ["-", "-", "-"]


@pytest.mark.parametrize("field", ["score", "score_local", "score_semantic", "map"])
def test_a_score_that_is_not_finite_stops_with_the_name(loco: Path, detector_of_loco: Detector, field: str) -> None:
    samples = room.test_samples(load(loco).samples)
    bad = str(samples[5].image)

    def spoil(result: Result) -> None:
        if result.path != bad:
            return
        if field == "map":
            result.grid = np.full_like(result.grid, np.inf)
        else:
            setattr(result, field, math.nan)

    with pytest.raises(DataError, match="finite") as caught:
        metrics_of(Spoilt(detector_of_loco.predictor(), spoil), samples, silent)
    assert bad in str(caught.value)


def test_an_image_that_cannot_be_read_is_named_and_the_rest_counts(tmp_path: Path, bundle_of_loco: Path) -> None:
    write("mvtec-ad", tmp_path / "set", Plan(size=48, good=3, defect=4))
    (tmp_path / "set" / "ring" / "test" / "good" / "001.png").write_bytes(b"not an image")
    _, said, problem = call("eval", bundle_of_loco, tmp_path / "set", "--json", tmp_path / "out.json")
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["config"]["failed"] == 1
    assert "001.png" in problem
    assert values["images"]["ring"] == 6


def test_results_files_and_schema(tmp_path: Path, loco: Path, bundle_of_loco: Path) -> None:
    outs = [tmp_path / f"results{suffix}" for suffix in (".md", ".html", ".json")]
    words = [word for path in outs for word in ("--out", path)]
    code, said, _ = call("eval", bundle_of_loco, loco, *words)
    assert code == 0
    values = json.loads(outs[2].read_text())
    assert {"classes", "mean", "config"} <= set(values)
    assert values["leaks"] == {"pairs": [], "dropped": False}
    shown = values["split"]
    for text in (said, outs[0].read_text(), outs[1].read_text()):
        assert shown["hash"] in text
        assert "logical_anomalies" in text
        assert f"{values['mean']['auspro_005']:.4f}" in text
    assert "http" not in outs[1].read_text().replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "| ring |" in outs[0].read_text()


def test_json_alone_on_stdout(loco: Path, bundle_of_loco: Path) -> None:
    code, said, _ = call("eval", bundle_of_loco, loco, "--json", "-")
    assert code == 0
    assert set(json.loads(said)["classes"]) == {"ring", "weave"}


def test_a_results_file_of_another_kind_is_refused_before_any_work(tmp_path: Path, bundle_of_loco: Path) -> None:
    code, _, problem = call("eval", bundle_of_loco, tmp_path, "--out", tmp_path / "results.xlsx")
    assert code == 2
    assert "results.md" in problem


def test_leaks_are_reported_and_left_out_on_request(tmp_path: Path, bundle_of_loco: Path) -> None:
    root = tmp_path / "set"
    write("mvtec-ad", root, Plan(size=48, good=3, defect=4))
    shutil.copy(root / "ring" / "train" / "good" / "000.png", root / "ring" / "test" / "good" / "same.png")
    _, said, _ = call("eval", bundle_of_loco, root, "--json", tmp_path / "all.json")
    assert "1 test images are copies of training images" in said
    assert "--drop-leaks" in said
    _, said, _ = call("eval", bundle_of_loco, root, "--drop-leaks", "--json", tmp_path / "less.json")
    assert "left out of the test" in said
    full, less = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("all", "less"))
    assert full["images"]["ring"] == less["images"]["ring"] + 1
    assert full["split"]["hash"] != less["split"]["hash"]


def test_nothing_left_after_leaks(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path, Plan(size=48, train=2, good=1, defect=1))
    loaded = load(tmp_path)
    only = replace(choose_test(loaded, "", 0), test=tuple(s for s in loaded.samples if s.split == TEST)[:1])
    pairs = [(only.train[0], only.test[0])]
    with pytest.raises(DataError, match="nothing is left"):
        without_leaks(only, pairs)
    assert find_leaks([*only.train, *only.test]) == []


def test_a_semantic_split_is_learnt_and_measured_by_name(tmp_path: Path) -> None:
    data, bundle = tmp_path / "cifar", tmp_path / "cat.twin"
    write("cifar10", data, Plan(train=20, good=6, classes=3))
    options = ("--teacher", RANDOM, "--random-teacher", "--steps", 2, "--size", 64, "--cache-gb", 0)
    code, said, problem = call("fit", data, "--out", bundle, "--split", "one-vs-rest/automobile", *options)
    assert (code, problem) == (0, "")
    assert "one-vs-rest/automobile (hash " in said
    code, said, _ = call("eval", bundle, data, "--json", tmp_path / "out.json")  # the bundle knows its split
    assert code == 0
    values = json.loads((tmp_path / "out.json").read_text())
    assert set(values["classes"]) == {"automobile"}
    assert values["split"]["name"] == "one-vs-rest/automobile"
    assert values["split"]["hash"] in said
    assert set(values["defects"]["automobile"]) == {"airplane", "bird"}
    assert values["images"]["automobile"] == 18
    code, _, problem = call("eval", bundle, data, "--split", "one-vs-rest/dog")
    assert code == 2
    assert "one-vs-rest/bird" in problem


def test_a_semantic_set_without_a_split_says_what_to_type(tmp_path: Path) -> None:
    write("cifar10", tmp_path, Plan(train=4, good=2))
    with pytest.raises(ConfigError, match="--split"):
        choose_test(load(tmp_path), "", 0)


def test_fit_and_eval_of_a_manifest_whose_images_lie_elsewhere(tmp_path: Path) -> None:
    write("mvtec-ad", tmp_path / "set", Plan(size=48, train=12, good=3, defect=4))
    listed, bundle = tmp_path / "lists" / "parts.parquet", tmp_path / "parts.twin"
    assert call("data", "manifest", tmp_path / "set", "--out", listed)[0] == 0
    options = ("--teacher", RANDOM, "--random-teacher", "--steps", 2, "--size", 64, "--cache-gb", 0)
    images = ("--images", tmp_path / "set")
    assert call("fit", listed, *images, "--out", bundle, *options)[0] == 0
    code, said, _ = call("eval", bundle, listed, *images)
    assert code == 0
    assert AS_GIVEN in said
    assert "pixel_auroc" in said
    code, _, problem = call("eval", bundle, listed)
    assert code == 2
    assert "rows cannot be used" in problem


def test_no_labelled_test_image_says_what_to_do(tmp_path: Path) -> None:
    write("folder", tmp_path, Plan(shape="flat"))
    with pytest.raises(DataError, match="twinspect predict"):
        choose_test(load(tmp_path), "", 0)


def test_mean_is_over_the_rows_that_have_it() -> None:
    assert mean_of({"a": {"m": 1.0, "n": 0.5}, "b": {"m": 0.0}}) == {"m": 0.5, "n": 0.5}
    assert shared_defects({"a": {"x": 1.0}, "b": {"x": 0.0}}) == {}
    assert shared_defects({"a": {"x": 1.0, "y": 0.0}, "b": {"x": 0.0, "y": 0.0}}) == {"x": 0.5, "y": 0.0}


def test_lines_show_a_dash_where_nothing_is_defined() -> None:
    values = {
        "classes": {"a": {"m": 0.25}, "b": {}}, "mean": {"m": 0.25}, "students": {"score_local": {"m": 0.5}},
        "defects": {},
    }  # fmt: skip
    values |= {"decisions": {}, "decisions_mean": {}}
    lines = [line for table in metric_tables(values) for line in table.lines()]
    assert any(line.split() == ["b", "-"] for line in lines)
    assert any(line.split() == ["a", "0.2500"] for line in lines)


def test_decisions_at_the_thresholds_stand_beside_auroc(tmp_path: Path, loco: Path, bundle_of_loco: Path) -> None:
    outputs = [tmp_path / f"r{suffix}" for suffix in (".md", ".html")]
    written = [word for path in outputs for word in ("--out", path)]
    code, said, _ = call("eval", bundle_of_loco, loco, "--json", tmp_path / "r.json", *written)
    assert code == 0
    values = json.loads((tmp_path / "r.json").read_text())
    detector = Detector.load(bundle_of_loco)
    samples = room.test_samples(load(loco).samples)
    for name, counts in values["decisions"].items():
        own = [s for s in samples if s.class_name == name]
        called = [r.is_anomaly for r in detector.predictor().predict(own)]
        found = sum(c for s, c in zip(own, called, strict=True) if s.label)
        alarms = sum(c for s, c in zip(own, called, strict=True) if not s.label)
        assert counts == {
            "defects": 6, "found": found, "found_rate": found / 6,
            "good": 4, "false_alarms": alarms, "false_alarm_rate": alarms / 4,
        }  # fmt: skip
        assert f"{found} of 6" in said
        assert f"{alarms} of 4" in said
    rates = [row["found_rate"] for row in values["decisions"].values()]
    assert values["decisions_mean"]["found_rate"] == pytest.approx(np.mean(rates))
    heading = next(line for line in said.splitlines() if "defects found" in line)
    assert "image AUROC" in heading
    assert "false alarms" in heading
    for path in outputs:
        assert "decisions at the thresholds in use" in path.read_text()


def test_only_good_images_give_their_false_alarms_and_no_empty_columns(tmp_path: Path, bundle_of_loco: Path) -> None:
    write("mvtec-ad", tmp_path / "set", Plan(classes=1, size=48, good=3, defect=4))
    for folder in (tmp_path / "set").glob("*/test/*"):
        if folder.name != "good":
            shutil.rmtree(folder)
    code, said, problem = call("eval", bundle_of_loco, tmp_path / "set", "--json", tmp_path / "r.json")
    assert code == 0
    (counts,) = json.loads((tmp_path / "r.json").read_text())["decisions"].values()
    assert set(counts) == {"defects", "found", "good", "false_alarms", "false_alarm_rate"}
    assert "false alarms" in said
    assert not [word for word in ("defects found", "AUROC", "alone", "metrics") if word in said]
    assert "no AUROC and the like" in problem
    assert "no mask" not in problem  # nothing is there to be marked


def test_only_defects_give_what_is_found() -> None:
    rows = [{"true_class": name, "label": 1, "is_anomaly": called} for name, called in (("b", 1), ("a", 0), ("a", 1))]
    counts = count_calls(rows, "true_class")
    assert counts == {
        "a": {"defects": 2, "found": 1, "good": 0, "false_alarms": 0, "found_rate": 0.5},
        "b": {"defects": 1, "found": 1, "good": 0, "false_alarms": 0, "found_rate": 1.0},
    }
