"""``twinspect calibrate``, ``drift`` and ``fit --resume-from`` on a tiny model: what they do and what they refuse."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from layouts import Plan, write
from tiny import RANDOM, images_to_test, picture, run_config, save, train_samples
from typer.testing import CliRunner

from twinspect import Detector
from twinspect.bundle import read_bundle, write_bundle
from twinspect.cli import app
from twinspect.data.images import read_rgb
from twinspect.decide.decision import Decision
from twinspect.errors import BundleError, ConfigError, DataError

FEW = ("--max-fpr", "0.05")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("old") / "parts"
    write("mvtec-ad", root, Plan(size=64, train=30, good=6, defect=6))
    return root


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other good images of the same classes."""
    root = tmp_path_factory.mktemp("fresh") / "parts"
    write("mvtec-ad", root, Plan(seed=7, size=64, train=24, good=6, defect=6))
    return root


@pytest.fixture(scope="module")
def trained(old, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = Detector(config=run_config(RANDOM)).fit(train_samples(old))
    return found.save(tmp_path_factory.mktemp("trained") / "m.twin")


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(one) for one in args])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def decision_of(bundle: Path) -> Decision:
    return Decision.from_dict(read_bundle(bundle).meta["decision"])


def good_folder(root: Path, count: int, first: int = 500) -> Path:
    for number in range(count):
        save(root / f"{number:03d}.png", picture(first + number, 64, 64))
    return root


def table_of(trained: Path, out: Path, *images: object) -> Path:
    run("predict", trained, *images, "--out", out)
    return out


# ------------------------------------------------------------------------------------------- thresholds


def test_calibrate_replaces_scores_and_leaves_the_model(trained: Path, fresh: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "new.twin", tmp_path / "r.html"
    said = run("calibrate", trained, fresh, *FEW, "--out", out, "--report", report, "--json", tmp_path / "v.json")
    header, ring, weave, together, worth = said[said.index("Thresholds by class") :].splitlines()[1:6]
    assert header.split() == ["class", "good", "images", "threshold", "false", "alarms", "called", "bad"]
    assert ring.split()[:2] == ["ring", "24"]
    assert weave.split()[-4:-1] == ["about", "5", "%"]
    assert together.split()[:3] == ["all", "classes", "48"]
    assert worth.startswith("false alarms: share of the next good images, taken like these, that will be called bad.")
    before, after = decision_of(trained), decision_of(out)
    assert len(after.good) == 48
    assert not set(after.good.key) & set(before.good.key)
    assert read_bundle(out).tensors == read_bundle(trained).tensors
    values = json.loads((tmp_path / "v.json").read_text(encoding="utf-8"))
    assert set(values["classes"]) == {"ring", "weave", "all classes"}
    assert values["classes"]["ring"]["images"] == 24
    assert values["classes"]["ring"]["rule"] == "own images"
    assert int(ring.split()[-1]) == values["classes"]["ring"]["called"] <= 1
    page = report.read_text(encoding="utf-8")
    assert "Thresholds by class" in page
    assert "about 5 % of the next ones, taken like these, will be called bad" in page
    loaded = Detector.load(out)
    for path in images_to_test(fresh, None)[:6]:
        found = loaded.predict(path, class_name="ring")
        assert found.threshold == pytest.approx(values["classes"]["ring"]["threshold"])
        assert found.class_name == "ring"
        assert found.is_anomaly == (found.p_value <= 0.05)


def test_scores_in_the_bundle_are_those_of_predict(trained: Path, fresh: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.twin"
    run("calibrate", trained, fresh, *FEW, "--out", out)
    paths = sorted(p for p in fresh.glob("*/train/good/*.png"))
    scores = [r.score for r in Detector.load(out).predict(paths)]
    np.testing.assert_allclose(sorted(decision_of(out).good.score), sorted(scores), rtol=1e-4)


def test_add_keeps_what_was_there_and_takes_nothing_twice(trained: Path, fresh: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "a.twin", tmp_path / "b.twin"
    said = run("calibrate", trained, fresh, *FEW, "--add", "--out", out)
    count = len(decision_of(trained).good)
    assert f"48 good images added to {count}" in said
    assert len(decision_of(out).good) == count + 48
    said = run("calibrate", out, fresh, *FEW, "--add", "--out", again, code=2)
    assert "already" in said
    shutil.copytree(fresh / "ring" / "train" / "good", tmp_path / "twice" / "ring" / "good")
    for path in list((tmp_path / "twice" / "ring" / "good").glob("*.png")):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))
    said = run("calibrate", trained, tmp_path / "twice", *FEW, "--class", "ring", "--out", again)
    assert "24 of 48 images left out: they are copies" in said


def test_in_place_by_default(trained: Path, fresh: Path, tmp_path: Path) -> None:
    here = Path(shutil.copy(trained, tmp_path / "m.twin"))
    run("calibrate", here, fresh, *FEW)
    assert len(decision_of(here).good) == 48


def test_images_of_which_none_can_be_read(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "text.png").write_text("no picture")
    said = run("calibrate", trained, tmp_path / "new", *FEW, "--out", tmp_path / "x.twin", code=2)
    assert "text.png: not an image that can be read" in said
    assert "no image to calibrate with: none was given, or none can be read" in said


def test_training_images_are_left_out(trained: Path, old: Path, fresh: Path, tmp_path: Path) -> None:
    """Statistics are learnt from all of them, so none is left, also of those the students did not see."""
    said = run("calibrate", trained, old, *FEW, "--out", tmp_path / "x.twin", code=2)
    assert "no image to calibrate with: 60 of 60 images left out: the model was trained on them" in said
    assert not (tmp_path / "x.twin").exists()
    mixed = tmp_path / "mixed" / "weave" / "good"
    shutil.copytree(old / "weave" / "train" / "good", mixed)
    for path in (fresh / "weave" / "train" / "good").iterdir():
        shutil.copy(path, mixed / f"fresh_{path.name}")
    said = run("calibrate", trained, tmp_path / "mixed", *FEW, "--class", "weave", "--out", tmp_path / "x.twin")
    assert "30 of 54 images left out: the model was trained on them" in said
    mixed_folder, rate = tmp_path / "mixed", ("--max-fpr", 0.001)
    refused = run("calibrate", trained, mixed_folder, *rate, "--class", "weave", "--out", tmp_path / "y.twin", code=2)
    assert "24 good images cannot support it" in refused
    assert "30 of 54 images left out: the model was trained on them" in refused
    assert sum(name == "weave" for name in decision_of(tmp_path / "x.twin").good.class_name) == 24


def test_one_class_only_keeps_the_others(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.twin"
    said = run("calibrate", trained, good_folder(tmp_path / "g", 25), *FEW, "--class", "weave", "--out", out)
    assert "calibrated weave; the images of ring stay as they are" in said
    after = decision_of(out)
    assert sum(n == "weave" for n in after.good.class_name) == 25
    assert set(after.budgets) == {"weave"}
    assert after.budget_of("ring").max_fpr == decision_of(trained).budget.max_fpr


def test_new_budgets_alone_need_no_image(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.twin"
    run("calibrate", trained, "--unsure", 0.05, 0.2, "--out", out)
    after = decision_of(out)
    assert (after.budget.max_fpr, after.budget.unsure) == (0.05, 0.2)
    assert after.good.key.tolist() == decision_of(trained).good.key.tolist()
    answers = {r.answer for r in Detector.load(out).predict(images_to_test(trained_parts(out), None), maps=False)}
    assert answers <= {"good", "unsure", "anomaly"}


def test_what_changes_nothing_writes_nothing(trained: Path, tmp_path: Path) -> None:
    bundle = shutil.copy(trained, tmp_path / "m.twin")
    assert f"wrote {bundle}" in run("calibrate", bundle, "--max-fpr", 0.1)
    copy, before = tmp_path / "m.twin.bak", bundle.read_bytes()
    copy.unlink()
    assert f"nothing changes, {bundle} is as it was" in run("calibrate", bundle, "--max-fpr", 0.1)
    assert bundle.read_bytes() == before
    assert not copy.exists()


def trained_parts(bundle: Path) -> Path:
    root = bundle.parent / "seen"
    write("mvtec-ad", root, Plan(size=64, train=2, good=6, defect=6))
    return root


def test_sessions(trained: Path, tmp_path: Path) -> None:
    for number, day in enumerate(("monday", "night")):
        good_folder(tmp_path / "s" / day, 20, first=700 + 100 * number)
    out, paths = tmp_path / "x.twin", sorted((tmp_path / "s").rglob("*.png"))
    with (tmp_path / "days.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label", "group"))
        writer.writerows((path, 0, path.parent.name) for path in paths)
    said = run("calibrate", trained, tmp_path / "days.csv", *FEW, "--class", "weave", "--out", out)
    assert "weave: night" in said
    assert set(decision_of(out).good.group) >= {"monday", "night"}


def test_labels_choose_thresholds(trained: Path, fresh: Path, tmp_path: Path) -> None:
    manifest, out = fresh / "labels.csv", tmp_path / "x.twin"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label", "class_name"))
        for label in (0, 1):
            for path in images_to_test(fresh, label):
                writer.writerow((path.relative_to(fresh).as_posix(), label, path.relative_to(fresh).parts[0]))
    said = run("calibrate", trained, "--labels", manifest, "--rule", "zero-miss", *FEW, "--out", out)
    assert "chosen by zero-miss on 12 labelled images: 0 of 6 defects missed" in said
    assert "measure on others" in said
    loaded = Detector.load(out)
    for path in images_to_test(fresh, 1):
        assert loaded.predict(path, class_name=path.relative_to(fresh).parts[0]).is_anomaly
    said = run(
        "calibrate", trained, "--labels", manifest, "--rule", "min-cost", "--miss-cost", 30, *FEW, "--out", out
    )
    assert "min-cost (30 per miss)" in said
    assert "gives way" in run("calibrate", out, *FEW)
    assert not decision_of(out).fixed


# ---------------------------------------------------------------------------------------------- refusals


def test_a_budget_too_small_says_how_many_images_are_needed(trained: Path, fresh: Path, tmp_path: Path) -> None:
    said = run("calibrate", trained, fresh, "--max-fpr", 0.01, "--out", tmp_path / "x.twin", code=2)
    assert "48 good images cannot support it, at least 99 are needed (51 more)" in said
    assert not (tmp_path / "x.twin").exists()
    assert "--unsure 0.01: 48 good" in run(
        "calibrate", trained, fresh, "--unsure", 0.01, 0.1, "--out", tmp_path / "x.twin", code=2
    )


def test_fewer_than_twenty_images_are_refused(trained: Path, old: Path, tmp_path: Path) -> None:
    single = Detector(config=run_config(RANDOM)).fit([s for s in train_samples(old) if s.class_name == "ring"])
    bundle = single.save(tmp_path / "ring.twin")
    said = run("calibrate", bundle, good_folder(tmp_path / "g", 19), "--max-fpr", 0.1, code=2)
    assert "19 good images to calibrate with; at least 20 are needed" in said


def test_anomalies_in_the_folder_are_pointed_at(trained: Path, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "g", 40)
    odd = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for number in range(3):
        save(folder / f"odd{number}.png", np.roll(odd, number, 0))
    said = run("calibrate", trained, folder, "--class", "weave", *FEW, "--out", tmp_path / "x.twin")
    assert "class weave: 3 of 43 good images score far above the others (the threshold lies above them)" in said
    assert "odd0.png" in said


def test_one_odd_image_that_sets_the_threshold_is_named(trained: Path, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "g", 24)
    odd = save(folder / "odd.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    said = run("calibrate", trained, folder, "--class", "weave", "--max-fpr", 0.1, "--out", tmp_path / "x.twin")
    assert "the threshold lies above" not in said  # two of the images may be called bad: this one is
    said = run("calibrate", trained, folder, "--class", "weave", "--max-fpr", 0.04, "--out", tmp_path / "y.twin")
    assert f"1 of 25 good images scores far above the others (the threshold lies above it): {odd} (" in said
    assert "Take out what is bad and calibrate again" in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--class", "rings"), "Did you mean 'ring'"),
        (("--max-fpr", "1.5"), "between 0 and 1"),
        (("--unsure", "0.2", "0.1"), "must be the larger one"),
        (("--max-fpr", "0.1", "--unsure", "0.05", "0.2"), "say different things"),
        (("--rule", "best"), "f1-max"),
        (("--rule", "f1-max"), "name them with --labels"),
        (("--miss-cost", "3", "--rule", "zero-miss"), "no effect"),
        (("--report", "x.pdf"), "accepted endings"),
    ],
)
def test_options_that_make_no_sense(trained: Path, tmp_path: Path, args, words: str) -> None:
    assert words in run("calibrate", trained, *args, "--out", tmp_path / "x.twin", code=2)


def test_a_damaged_image_is_left_out_and_named(trained: Path, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "g", 24)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    said = run("calibrate", trained, folder, "--class", "weave", *FEW, "--out", tmp_path / "x.twin")
    assert "broken.png" in said
    assert len([n for n in decision_of(tmp_path / "x.twin").good.class_name if n == "weave"]) == 24


def test_nan_scores_are_refused(quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = quick.predictor()
    answer = predictor.runtime.run

    def broken(pixels):
        return {**answer(pixels), "score_B": np.full(len(pixels), np.nan, np.float32)}

    monkeypatch.setattr(predictor.runtime, "run", broken)
    with pytest.raises(DataError, match="not finite"):
        quick.calibrate(good_folder(tmp_path / "g", 24), max_fpr=0.05)


def test_thresholds_of_another_model_are_refused(trained: Path, old: Path, tmp_path: Path) -> None:
    other = Detector(config=run_config(RANDOM, seed=5)).fit(train_samples(old)).save(tmp_path / "other.twin")
    meta = {**read_bundle(trained).meta, "decision": read_bundle(other).meta["decision"]}
    write_bundle(tmp_path / "mixed.twin", meta, read_bundle(trained).tensors)
    with pytest.raises(BundleError, match="another model"):
        Detector.load(tmp_path / "mixed.twin")


# ------------------------------------------------------------------------------------------ from Python


def test_the_python_face(trained: Path, fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = Detector.load(trained)
    loaded.calibrate(fresh, max_fpr=0.05, unsure=0.2)
    assert "24 in the place of 30 earlier ones; --add would keep both" in capsys.readouterr().err
    Detector.load(trained).calibrate(fresh, max_fpr=0.05, quiet=True)
    assert capsys.readouterr() == ("", "")
    assert loaded.fitted.decision.budget.unsure == 0.2
    back = Detector.load(loaded.save(tmp_path / "x.twin"))
    path = images_to_test(fresh, 1)[0]
    assert back.predict(path).threshold_unsure == loaded.predict(path).threshold_unsure
    with pytest.raises(ConfigError, match="at least 999 are needed"):
        loaded.calibrate(fresh, max_fpr=0.001)
    with pytest.raises(ConfigError, match="Accepted: ring, weave"):
        loaded.predict(path, class_name="bolt")


def test_regions_and_classes_reach_the_tables(trained: Path, fresh: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = table_of(trained, tmp_path / "t.parquet", fresh / "ring" / "test")
    rows = pq.read_table(table).to_pylist()
    lines = table_of(trained, tmp_path / "t.jsonl", fresh / "ring" / "test").read_text("utf-8").splitlines()
    for row, line in zip(rows, lines, strict=True):
        regions = json.loads(row["regions"])
        assert row["n_regions"] == len(regions) == json.loads(line)["n_regions"]
        assert row["max_region_area"] == max((r["area"] for r in regions), default=0)
        assert (row["peak"] >= row["threshold_region"]) or not regions
        assert row["model_id"] == decision_of(trained).model_id
        assert row["predicted_class"] in ("ring", "weave")
        assert 0 < row["class_p"] <= 1
        assert all(r["x"] + r["width"] <= row["width"] and r["y"] + r["height"] <= row["height"] for r in regions)
    assert any(row["n_regions"] for row in rows)


# ------------------------------------------------------------------------------------------------ drift


def test_drift_from_tables(trained: Path, fresh: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "m.twin"
    run("calibrate", trained, fresh, *FEW, "--out", bundle)
    later = tmp_path / "later"
    write("mvtec-ad", later, Plan(seed=11, size=64, train=40))
    quiet = table_of(bundle, tmp_path / "quiet.parquet", later / "ring" / "train", later / "weave" / "train")
    said = run("drift", bundle, quiet, "--json", tmp_path / "d.json")
    assert "no drift in 80 images" in said
    values = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert values["kind"] == "none"
    for path in later.glob("*/train/good/*.png"):
        save(path, read_rgb(path) // 2)
    dark = table_of(bundle, tmp_path / "dark.csv", later / "ring" / "train", later / "weave" / "train")
    said = run("drift", bundle, quiet, dark, "--report", tmp_path / "d.html")
    assert "since about image" in said
    assert "Scores of calibration" in (tmp_path / "d.html").read_text(encoding="utf-8")


def test_drift_refuses_what_it_cannot_read(trained: Path, old: Path, fresh: Path, tmp_path: Path) -> None:
    assert "no such table" in run("drift", trained, tmp_path / "none.parquet", code=2)
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    assert "no column score" in run("drift", trained, tmp_path / "odd.csv", code=2)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 nothing")
    assert "cannot be read as a table" in run("drift", trained, tmp_path / "cut.parquet", code=2)
    (tmp_path / "text.doc").write_text("x", encoding="utf-8")
    assert "a table of images ends in" in run("drift", trained, tmp_path / "text.doc", code=2)
    (tmp_path / "empty.csv").write_text("score,error\n,broken\n", encoding="utf-8")
    assert "no scored image" in run("drift", trained, tmp_path / "empty.csv", code=2)
    (tmp_path / "word.csv").write_text("score\nhigh\n", encoding="utf-8")
    assert "not a number" in run("drift", trained, tmp_path / "word.csv", code=2)
    other = Detector(config=run_config(RANDOM, seed=5)).fit(train_samples(old)).save(tmp_path / "other.twin")
    table = table_of(other, tmp_path / "t.parquet", fresh / "ring" / "test" / "good")
    assert "come from another model" in run("drift", trained, table, code=2)


# ---------------------------------------------------------------------------------------------- resume


def test_resume_adds_a_class(trained: Path, old: Path, tmp_path: Path) -> None:
    everything = tmp_path / "all"
    shutil.copytree(old, everything)
    good_folder(everything / "bolt" / "train" / "good", 30)
    good_folder(everything / "bolt" / "test" / "good", 2, first=900)
    out = tmp_path / "new.twin"
    run("fit", everything, "--resume-from", trained, "--steps", 2, "--out", out)
    before, after = decision_of(trained), decision_of(out)
    assert set(after.classes) == {"bolt", "ring", "weave"}
    assert set(before.good.key) <= set(after.good.key)
    assert set(before.trained) <= set(after.trained)
    assert after.model_id != before.model_id
    assert read_bundle(out).meta["record"]["resumed"] == {"from": before.model_id}


def test_resume_refuses_to_forget(trained: Path, tmp_path: Path) -> None:
    only = tmp_path / "only"
    good_folder(only / "bolt" / "train" / "good", 30)
    good_folder(only / "bolt" / "test" / "good", 2, first=900)
    said = run("fit", only, "--resume-from", trained, "--steps", 2, "--out", tmp_path / "x.twin", code=2)
    assert "no good image of ring, weave" in said
    assert "--forget" in said
    run("fit", only, "--resume-from", trained, "--forget", "--steps", 2, "--out", tmp_path / "x.twin")
    assert decision_of(tmp_path / "x.twin").classes == ["bolt"]


def test_resume_keeps_the_model(trained: Path, old: Path, tmp_path: Path) -> None:
    said = run("fit", old, "--resume-from", trained, "--size", 128, "--out", tmp_path / "x.twin", code=2)
    assert "leave out: size" in said


def test_resume_starts_from_the_trained_students(trained: Path, old: Path) -> None:
    """With a rate of almost nothing the students stay where they were, not where a seed puts them."""
    first = Detector.load(trained)
    weights = {k: v.clone() for k, v in first.fitted.model.student.state_dict().items()}
    train = dataclasses.replace(first.config.train, steps=1, lr=1e-12, lr_ee=1e-12, weight_decay=0.0)
    first.config = dataclasses.replace(first.config, train=train)
    first.fit(train_samples(old), resume=True)
    after = first.fitted.model.student.state_dict()
    assert all(np.allclose(weights[k], after[k], atol=1e-6) for k in weights)


# ------------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_runs_on_tiny_data(trained: Path, fresh: Path, tmp_path: Path) -> None:
    place = Path(__file__).parents[1] / "benchmarks" / "decisions.py"
    spec = importlib.util.spec_from_file_location("decisions", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "d.json"
    args = f"{trained} --data {fresh} --splits 5 --runs 2 --stream 60 --patience 60 --leave-one-out --out {out}"
    found = module.main(args.split())
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["good"] == found["good"] == 12
    assert {row["class"] for row in written["coverage"]} >= {"all images", "pooled"}
    assert {row["class"] for row in written["unknown"]} == {"ring", "weave"}
    assert all(0 <= row["auroc_distance"] <= 1 for row in written["unknown"])
    assert written["false_alarms"] == {"streams": 2, "images": 60, "alarms": 0, "stated": 0.01}
    assert [row["quiet"] for row in written["brightness 1.1"]] == [0, 1000]
