"""The commands, end to end on tiny data: what they write, what they say, how they fail."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import RANDOM, RANDOM_CNN, good_folder, images_to_test, picture, save
from typer.testing import CliRunner, Result

from twinspect import console as console_room
from twinspect.bundle import read_bundle
from twinspect.cli import app
from twinspect.console import Console
from twinspect.errors import DataError, TwinspectError

TINY = ["--teacher", RANDOM, "--random-teacher", "--size", "64", "--steps", "2", "--batch", "4"]


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def ok(*words: object) -> Result:
    found = run(*words)
    assert found.exit_code == 0, (found.stdout, found.stderr, found.exception)
    return found


def failed(*words: object) -> str:
    """What people see of a failure: one sentence, no traceback, exit code 2."""
    found = run(*words)
    assert found.exit_code == 2, (found.stdout, found.stderr, found.exception)
    assert isinstance(found.exception, SystemExit)
    assert "Traceback" not in found.stderr
    return found.stderr


# --------------------------------------------------------------------------------------------- fit


def test_fit_writes_a_bundle_and_its_log_only(tmp_path: Path) -> None:
    data = good_folder(tmp_path / "good", 12)
    out = tmp_path / "not" / "yet" / "there" / "m.twin"
    found = ok("fit", data, "--out", out, *TINY)
    assert sorted(p.name for p in out.parent.iterdir()) == ["m.train.jsonl", "m.twin"]
    assert len((out.parent / "m.train.jsonl").read_text().splitlines()) == 2
    for words in ("trained 2 steps", "parameters: teacher", "threshold", f"wrote {out}", "training log"):
        assert words in found.stdout


def test_fit_with_a_work_folder_leaves_the_log_in_it(tmp_path: Path) -> None:
    data = good_folder(tmp_path / "good", 12)
    ok("fit", data, "--out", tmp_path / "m.twin", "--work", tmp_path / "w", *TINY)
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["train.jsonl"]
    assert not list(tmp_path.glob("*.work"))


def test_fit_lists_what_it_left_out(tmp_path: Path) -> None:
    data = good_folder(tmp_path / "good", 12)
    (data / "003.png").write_bytes(b"")
    found = ok("fit", data, "--out", tmp_path / "m.twin", *TINY)
    assert "left out" in found.stderr
    assert "003.png: the file is empty" in found.stderr


def test_fit_explains_auto(tmp_path: Path) -> None:
    data = good_folder(tmp_path / "good", 12)
    found = ok("fit", data, "--out", tmp_path / "m.twin", "--steps", 1, "--batch", 2, "--size", 128)
    assert "teacher efficientnet-lite0 (embedded, small)" in found.stdout
    assert "twinspect fetch dinov2-base" in found.stdout
    assert read_bundle(tmp_path / "m.twin").meta["record"]["teacher"]["name"] == "efficientnet-lite0"


def test_fit_refuses_a_bad_out_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("twinspect.commands.fit.train", never)
    data = good_folder(tmp_path / "good", 12)
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in failed("fit", data, "--out", tmp_path / "file" / "m.twin", *TINY)
    assert "is a folder; choose another --out" in failed("fit", data, "--out", tmp_path, *TINY)
    found = failed("fit", data, "--out", tmp_path / "m.txt", *TINY)
    assert f"a model's file ends in .twin; type --out {tmp_path / 'm.twin'}" in found


def test_an_overwritten_model_is_kept_once(tmp_path: Path) -> None:
    data, out = good_folder(tmp_path / "good", 24), tmp_path / "m.twin"
    backup = tmp_path / "m.twin.bak"
    assert "kept" not in ok("fit", data, "-o", out, *TINY).stderr
    first = out.read_bytes()
    assert f"kept the model that was there as {backup}" in ok("fit", data, "-o", out, *TINY, "--seed", 1).stderr
    assert (backup.read_bytes(), out.read_bytes() == first) == (first, False)
    ok("calibrate", out, "--max-fpr", 0.2, "--force")
    assert backup.read_bytes() == first
    second = out.read_bytes()
    assert str(backup) in ok("calibrate", out, "--max-fpr", 0.1).stderr
    assert (backup.read_bytes(), out.read_bytes() == second) == (second, False)


def test_a_table_on_standard_output_is_alone_there(bundle: Path, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "in", 2)
    found = ok("predict", bundle, folder, "-o", "-")
    assert [json.loads(line)["path"] for line in found.stdout.splitlines()] == sorted(map(str, folder.iterdir()))
    assert "2 images: " in found.stderr


def test_fit_keeps_the_checkpoint_when_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = good_folder(tmp_path / "good", 12), tmp_path / "m.twin"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    ok("fit", data, "--out", tmp_path / "first.twin", *TINY)  # the feature cache is filled now
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in failed("fit", data, "--out", out, *TINY)
    monkeypatch.undo()
    assert (tmp_path / "m.twin.work" / "checkpoint.safetensors").is_file()
    ok("fit", data, "--out", out, *TINY)
    assert not (tmp_path / "m.twin.work").exists()


def test_fit_takes_settings_from_toml_and_options_win(tmp_path: Path) -> None:
    data = good_folder(tmp_path / "good", 12)
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'[model]\nteacher = "{RANDOM_CNN}"\npretrained = false\nsize = 128\nwidth = 32\ndepth = 1\n'
        "[train]\nsteps = 3\nbatch = 4\nseed = 7\ntime_budget_s = 500.0\n"
    )
    ok("fit", data, "--config", toml, "--out", tmp_path / "a.twin")
    config = read_bundle(tmp_path / "a.twin").meta["config"]
    assert (config["model"]["teacher"], config["model"]["pretrained"], config["model"]["size"]) == (
        RANDOM_CNN,
        False,
        128,
    )
    assert [config["train"][k] for k in ("steps", "batch", "seed", "time_budget_s")] == [3, 4, 7, 500.0]
    ok("fit", data, "--config", toml, "--out", tmp_path / "b.twin", "--steps", 1, "--seed", 0)
    train = read_bundle(tmp_path / "b.twin").meta["config"]["train"]
    assert [train[k] for k in ("steps", "batch", "seed")] == [1, 4, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nstep = 3\n", "unknown setting 'step'. Did you mean 'steps'"),
        ("[trian]\nsteps = 3\n", "unknown section 'trian'. Did you mean 'train'"),
        ("[train\n", "cannot be read as TOML"),
        ('[train]\nnoisy_or = "n9"\n', "unknown --noisy-or 'n9'"),
    ],
)
def test_fit_refuses_bad_toml(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    data = good_folder(tmp_path / "good", 8)
    assert words in failed("fit", data, "--config", tmp_path / "run.toml", "--out", tmp_path / "m.twin")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--teacher", "effcientnet-lite0"], "Did you mean 'efficientnet-lite0'"),
        (["--teacher", "effnet"], "Did you mean 'efficientnet-lite"),
        (["--model", "snl", "--terms", "foo"], "unknown --terms 'foo'"),
        (["--config", "no.toml"], "error: no.toml: cannot be read (No such file or directory)\n"),
        (["--teacher", "dinov2-base"], "Three ways to get them"),
        (["--size", "32"], "accepted 64 to 4,096"),
        (["--size", "100000"], "accepted 64 to 4,096"),
        (["--seed", "-5"], "--seed -5: accepted 0 to"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999: accepted 0 to"),
        (["--cache-gb", "-5"], "--cache-gb -5.0: accepted 0 or more"),
        (["--lr", "nan"], "lr nan: a finite number is needed"),
        (["--steps", "-1"], "--steps -1: accepted 0 or more"),
        (["--batch", "1"], "--batch 1: accepted 2 to 65,536"),
        (["--noisy-or", "n4"], "Accepted: n1, n2, n3"),
        (["--precision", "fp8"], "Accepted: auto, fp32, bf16"),
        (["--model", "dul"], "Did you mean 'dual'"),
        (["--layout", "mvtec"], "unknown layout 'mvtec'"),
        (["--weights", "none.pth", "--teacher", RANDOM], "no such weights file: none.pth"),
    ],
)
def test_fit_refuses_bad_options(tmp_path: Path, words: list[str], sentence: str) -> None:
    data = good_folder(tmp_path / "good", 8)
    assert sentence in failed("fit", data, "--out", tmp_path / "m.twin", *words)
    assert not (tmp_path / "m.twin").exists()


def test_fit_of_bad_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no such file or folder" in failed("fit", tmp_path / "none", *TINY)
    roi = tmp_path / "none.png"  # which is read first: it takes no time
    assert f"--roi {roi}: no such file" in failed("fit", tmp_path / "none", "--roi", roi, *TINY)
    assert "no images that can be read; found: nothing" in failed("fit", tmp_path / "empty", *TINY)
    bad = good_folder(tmp_path / "only" / "scratch", 3)
    said = failed("fit", bad.parent, *TINY)
    assert f"All 3 images are taken as defects, because of the name of their folder ({bad})" in said
    assert f"twinspect fit {bad} --layout folder" in said
    one = good_folder(tmp_path / "one", 1)
    plain = ("--scoring", "plain", "--out", tmp_path / "m.twin")
    assert "1 good training images found; at least 8" in failed("fit", one, *plain, *TINY)


# ----------------------------------------------------------------------------------- eval, info, predict


def test_eval_writes_metrics(bundle: Path, parts: Path, tmp_path: Path) -> None:
    found = ok("eval", bundle, parts, "--json", tmp_path / "m.json")
    values = json.loads((tmp_path / "m.json").read_text())
    assert values["classes"].keys() == {"ring", "weave"}
    for row in (*values["classes"].values(), values["mean"]):
        assert row.keys() >= {"image_auroc", "image_ap", "image_f1max", "pixel_auroc", "aupro"}
        assert all(0 <= v <= 1 for v in row.values() if isinstance(v, float))
    assert values["config"]
    assert "mean" in found.stdout


def test_eval_prints_json_alone(bundle: Path, parts: Path) -> None:
    found = ok("eval", bundle, parts, "--json", "-")
    assert json.loads(found.stdout)["mean"]


def test_eval_says_first_that_no_good_image_was_tested(bundle: Path, tmp_path: Path) -> None:
    save(tmp_path / "data" / "bad" / "0.png", picture(5))
    sentence = "No good image was tested"
    assert sentence in ok("eval", bundle, tmp_path / "data").stdout
    assert sentence in ok("compare", bundle, bundle, tmp_path / "data").stdout
    save(tmp_path / "data" / "good" / "0.png", picture(900))  # not learnt
    assert sentence not in ok("eval", bundle, tmp_path / "data").stdout


def test_predict_says_where_pictures_lie_and_which_folder_is_made(bundle: Path, tmp_path: Path) -> None:
    save(tmp_path / "new" / "0.png", picture(5))
    table, pictures = tmp_path / "none" / "x.csv", tmp_path / "pictures"
    found = ok("predict", bundle, tmp_path / "new", "--out", table, "--overlays", pictures)
    assert f"the folder {table.parent} is not there; it is made" in found.stderr
    assert found.stdout.splitlines()[-1] == f"overlays: {pictures}"


def test_a_wrong_command_line_is_answered_with_the_example() -> None:
    assert "Example: twinspect fit data/ -o model.twin" in failed("fit", "a", "b")


def test_eval_names_a_class_that_the_model_does_not_know(bundle: Path, tmp_path: Path) -> None:
    save(tmp_path / "held" / "good" / "0.png", picture(900))
    note = "does not know a class held, as the data call them"
    assert note in ok("eval", bundle, tmp_path / "held").stderr
    (tmp_path / "held").rename(tmp_path / "ring")
    assert note not in ok("eval", bundle, tmp_path / "ring").stderr


def test_eval_without_labelled_images(bundle: Path, tmp_path: Path) -> None:
    assert "twinspect predict MODEL PATH" in failed("eval", bundle, good_folder(tmp_path / "good", 3))


def test_info(bundle: Path) -> None:
    text = ok("info", bundle).stdout
    assert "efficientnet-lite0" in text
    assert text.count("will be called bad, at best") == len(
        json.loads(ok("info", bundle, "--json").stdout)["thresholds"]
    )
    assert json.loads(ok("info", bundle, "--json").stdout)["teacher"]["name"] == "efficientnet-lite0"
    assert "no such model" in failed("info", bundle.with_name("none.twin"))
    assert "the model stands before the images" in failed("info", bundle.parent)
    assert f"Did you mean '{bundle}'?" in failed("info", bundle.with_name("prats.twin"))


def test_predict_prints_lines(bundle: Path, parts: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    found = ok("predict", bundle, parts / "weave" / "test" / "good", tmp_path / "bad.png")
    lines = found.stdout.splitlines()
    assert len(lines) == 6
    assert lines[4].startswith("ERROR")
    assert "bad.png" in lines[4]
    assert lines[-1].startswith("5 images: ")
    assert "1 could not be read" in lines[-1]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_predict_writes_a_table(bundle: Path, tmp_path: Path, suffix: str) -> None:
    folder = good_folder(tmp_path / "new", 5)
    (folder / "002.png").write_bytes(b"")
    out = tmp_path / "deep" / f"t{suffix}"
    ok("predict", bundle, folder, "--out", out, "--batch", 2, "--workers", 0)
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(out).to_pylist()
    elif suffix == ".csv":
        import csv

        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(row["path"]).name for row in rows] == [f"{n:03d}.png" for n in range(5)]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False, False]
    assert rows[2]["score"] in (None, "")
    assert all(np.isfinite(float(row["score"])) for n, row in enumerate(rows) if n != 2)
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_predict_writes_maps_and_overlays(bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "new"
    save(folder / "a.png", picture(0, 60, 90))
    (folder / "b.png").write_bytes(b"")
    ok("predict", bundle, folder, "--maps", tmp_path / "maps", "--overlays", tmp_path / "over")
    with np.load(tmp_path / "maps" / "000000-000000_a.npz") as file:
        assert file["map"].shape == (60, 90)
        assert file["map"].dtype == np.float16
    with Image.open(tmp_path / "over" / "000000-000000_a.jpg") as image:
        assert image.width == 90
    assert len(list((tmp_path / "maps").iterdir())) == len(list((tmp_path / "over").iterdir())) == 1


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_predict_that_breaks_off_leaves_no_whole_looking_table(
    bundle: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twinspect.inference.predictor import TorchRuntime

    out = tmp_path / f"t{suffix}"
    ok("predict", bundle, good_folder(tmp_path / "old", 1), "--out", out, "--workers", 0)
    yesterday = out.read_bytes()
    inner, calls = TorchRuntime.run, []

    def breaks(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise DataError("the machine went away")
        return inner(self, pixels)

    monkeypatch.setattr(TorchRuntime, "run", breaks)
    folder = good_folder(tmp_path / "new", 8)
    again = ["predict", bundle, folder, "--out", out, "--batch", 2, "--workers", 0, "--part-rows", 4]
    broken = failed(*again)
    assert f"{out} is there already: this run replaces it" in broken
    assert "the machine went away" in broken
    assert out.read_bytes() == yesterday
    kept = list(out.with_name(f"{out.name}.parts").glob("part-*"))
    assert [path.suffix for path in kept] == [suffix]
    found = ok(*again)
    assert "an earlier run scored 4 images; going on with the others" in found.stderr
    assert "8 images (4 of them by an earlier run)" in found.stdout
    assert sum(calls) == 10  # the call that broke off, and four batches: nothing is done twice
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("t.")] == [out.name]


def test_predict_refusals(bundle: Path, parts: Path, tmp_path: Path) -> None:
    image = images_to_test(parts, None)[0]
    assert "accepted endings are .parquet, .csv, .jsonl" in failed("predict", bundle, image, "--out", "t.xlsx")
    assert "--batch -1: accepted 0 to 4,096" in failed("predict", bundle, image, "--batch", -1)
    assert "nothing found at" in failed("predict", bundle, tmp_path / "none.png")
    assert re.search(rf"Did you mean .*{image.name}'", failed("predict", bundle, image.with_name("02.png")))
    (tmp_path / "file").write_text("x")
    assert "cannot be written" in failed("predict", bundle, image, "--out", tmp_path / "file" / "t.csv")
    assert str(tmp_path / "file") in failed("predict", bundle, image, "--maps", tmp_path / "file")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["predict", "M", "D", "--batch", 10**6], "--batch 1000000: accepted 0 to 4,096"),
        (["predict", "M", "D", "--workers", 10**9], "--workers 1000000000: accepted -1 to 512"),
        (["predict", "M", "D", "--threads", 10**9], "--threads 1000000000: accepted 0 to 1,024"),
        (["predict", "M", "D", "--part-rows", 10**9], "--part-rows 1000000000: accepted 0 to"),
        (["bench", "M", "--seconds", "nan"], "--seconds nan: accepted 0.001 to 86,400"),
        (["bench", "M", "--threads", 10**9], "--threads 1000000000: accepted 0 to 1,024"),
        (["serve", "M", "--threads", 10**9], "--threads 1000000000: accepted 0 to 1,024"),
        (["bench", "M", "--batch", f"1,{10**9}"], "--batch 1,1000000000: accepted numbers from 1 to 4,096"),
        (["diagnose", "M", "D", "--seed", -5], "--seed -5: accepted 0 to"),
        (["diagnose", "M", "D", "--count", 10**9], "--count 1000000000: accepted 1 to 10,000"),
        (["reproduce", "mvtec-ad-multi", "--root", "D", "--seed", -5], "--seed -5: accepted 0 to"),
        (["drift", "M", "t.csv", "--false-alarm-rate", "nan"], "--false-alarm-rate nan: accepted"),
    ],
)
def test_numbers_out_of_range_are_refused(
    bundle: Path, parts: Path, words: list[object], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[0] == "drift":
        ok("predict", bundle, parts / "weave" / "test" / "good", "--out", "t.csv", "--workers", 0)
    assert sentence in failed(*({"M": bundle, "D": parts}.get(str(word), word) for word in words))


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "M", "D", "--json", "X/a.json"],
        ["eval", "M", "D", "--out", "X/a.md"],
        ["calibrate", "M", "D", "--out", "new.twin", "--report", "X/a.md"],
        ["calibrate", "M", "D", "--out", "X/a.twin"],
        ["drift", "M", "t.csv", "--json", "X/a.json"],
        ["diagnose", "M", "D", "--report", "X/a.html"],
        ["data", "manifest", "D", "--out", "X/a.csv"],
        ["fit", "D", "--out", "new.twin", "--work", "X/work"],
        ["demo", "--out", "X/demo"],
        ["reproduce", "mvtec-ad-multi", "--root", "D", "--out", "X/out"],
        ["predict", "M", "D", "--out", "X/a.csv"],
    ],
)
def test_outputs_that_cannot_be_written_are_found_before_the_work(
    parts: Path, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle is none: whoever reads it first has begun the work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "X").write_text("x")
    (tmp_path / "M").write_text("no bundle")
    found = failed(*(parts if word == "D" else word for word in words))
    assert "X/" in found
    assert "cannot be written" in found


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["eval", "M", "D", "--json", "mine"], "mine"),
        (["eval", "M", "D", "--out", "mine.md"], "mine.md"),
        (["drift", "M", "t.csv", "--json", "mine.json"], "mine.json"),
        (["data", "manifest", "D", "--out", "mine.csv"], "mine.csv"),
        (["fit", "D", "--out", "mine.twin"], "mine.twin"),
        (["calibrate", "M", "D", "--out", "mine.twin"], "mine.twin"),
    ],
)
def test_files_of_another_kind_are_not_replaced(
    bundle: Path, parts: Path, words: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("image,comment\na.png,mine\n")
    named = {"M": bundle, "D": parts}
    said = failed(*(named.get(word, word) for word in words))
    assert f"{name} exists and holds something else; move it away" in said
    assert (tmp_path / name).read_text() == "image,comment\na.png,mine\n"


@pytest.mark.parametrize(
    "words",
    [["calibrate", "M", "D"], ["update", "M", "D"], ["export", "M", "--out", "new.onnx"], ["check", "M", "M", "D"]],
)
def test_an_export_in_the_place_of_a_model(
    words: list[str], parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.onnx").write_bytes(b"a graph")
    named = {"M": "mine.onnx", "D": parts}
    said = failed(*(named.get(word, word) for word in words))
    assert "mine.onnx is an export; give the model that it was made from (NAME.twin)" in said
    assert (tmp_path / "mine.onnx").read_bytes() == b"a graph"


def test_results_of_an_earlier_run_are_replaced(bundle: Path, parts: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"r{suffix}" for suffix in (".md", ".html", ".json")]
    for _ in range(2):
        outs = [word for path in files for word in ("--out", path)]
        ok("eval", bundle, parts, *outs, "--json", tmp_path / "v.json")
        ok("data", "manifest", parts, "--out", tmp_path / "m.csv")
        ok("data", "manifest", parts, "--out", tmp_path / "m.parquet")
    assert json.loads((tmp_path / "v.json").read_text())["written_by"].startswith("twinspect ")


def test_exit_code_where_nothing_could_be_scored(bundle: Path, parts: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(parts / "weave", bad / "weave")
    for path in (bad / "weave" / "test").rglob("*.png"):
        path.write_text("x")
    for words in (["predict", bundle, bad / "weave" / "test"], ["eval", bundle, bad, "--json", tmp_path / "m.json"]):
        found = run(*words)
        assert found.exit_code == 1
        assert "Traceback" not in found.output
    assert json.loads((tmp_path / "m.json").read_text())["failed"]
    table = run("predict", bundle, bad / "weave" / "test", "--out", tmp_path / "t.csv", "--workers", 0)
    assert table.exit_code == 1
    assert (tmp_path / "t.csv").is_file()
    assert run("predict", bundle, parts / "weave" / "test" / "good").exit_code == 0


# ----------------------------------------------------------------------------------------- the process


def test_python_m_twinspect(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "twinspect", "info", str(tmp_path / "none.twin")], capture_output=True, text=True
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: no such model")
    assert found.stdout == ""


def test_no_arguments_show_the_commands() -> None:
    found = run()
    for name in ("demo", "doctor", "fetch", "fit", "eval", "predict", "info"):
        assert name in found.output


def test_console_turns_our_errors_into_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code, words in (
        (DataError("the data are bad"), 2, "error: the data are bad"),
        (KeyboardInterrupt(), 130, "the same command goes on from here"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied"),
    ):
        with pytest.raises(SystemExit) as stopped, Console():
            raise error
        assert stopped.value.code == code
        assert words in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), Console():  # ours: shown in full
        _ = 1 / 0


def process(words: list[object], stdout: int, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "twinspect", *map(str, words)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **environment})


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_a_code_page_lacks_are_escaped(bundle: Path, tmp_path: Path, encoding: str) -> None:
    for name in ("a.png", "\u90e8\u54c1.png", "\u0161roub.png"):
        save(tmp_path / "in" / name, picture())
    os.rename(tmp_path / "in" / "a.png", os.fsencode(tmp_path / "in") + b"/\xff.png")
    words = ["predict", bundle, tmp_path / "in"]
    found = process(words, subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.decode(encoding).splitlines()
    assert len(lines) == 4
    shown = "\u90e8\u54c1.png" if encoding == "utf-8" else r"\u90e8\u54c1.png"
    assert lines[1].endswith(shown)
    assert lines[2].endswith(r"\udcff.png")


def test_names_that_a_terminal_would_obey_are_escaped(bundle: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", picture())
    os.rename(tmp_path / "in" / "a.png", tmp_path / "in" / "\x1b[2J\nANOMALY\u202eb.png")
    (tmp_path / "in" / "\nx.png").write_bytes(b"no image")
    found = CliRunner().invoke(app, ["predict", str(bundle), str(tmp_path / "in")])
    lines = found.output.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("ERROR ")
    assert lines[1].endswith(r"\x1b[2J\nANOMALY\u202eb.png")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_full_standard_output(bundle: Path, tmp_path: Path) -> None:
    words = ["predict", bundle, good_folder(tmp_path / "in", 2)]
    with open("/dev/full", "wb") as full:
        for more in ([], ["--out", tmp_path / "t.csv", "--workers", 0], ["--help"]):
            found = process([*words, *more], full.fileno())
            assert found.returncode == 2
            text = found.stderr.decode()
            assert "error: standard output cannot be written (No space left on device)" in text
            assert text.count("\n") == 1
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 3  # the work was done


def test_a_reader_that_leaves(bundle: Path, tmp_path: Path) -> None:
    words = ["predict", bundle, good_folder(tmp_path / "in", 2)]
    for more, code in (([], 141), (["--out", tmp_path / "t.csv", "--workers", 0], 0)):
        reading, writing = os.pipe()
        os.close(reading)
        found = process([*words, *more], writing)
        os.close(writing)
        assert (found.returncode, found.stderr) == (code, b"")
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 3


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are None where a process has none, and remarks must not end a run."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with Console() as console:
        console.say("a line")
        console.warn("a remark")
        console.progress("training", 1, 2)
    with pytest.raises(TwinspectError, match="standard output is closed"):
        Console().result("the answer")


def test_too_little_memory_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")):
        with pytest.raises(SystemExit) as stopped, Console():
            raise error
        assert stopped.value.code == 2
        assert "error: not enough memory (" in capsys.readouterr().err


def test_progress_without_a_terminal_is_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Console() as console:
        for done in range(1, 4):
            console.progress("reading", done, 3)
    assert capsys.readouterr().err == ""  # short stages say nothing
    monkeypatch.setattr(console_room, "_PLAIN_SECONDS", -1.0)
    with Console() as console:
        for done in range(1, 4):
            console.progress(f"training  loss {done}", done, 3)
        console.say("a line between")
        console.progress("exporting", 0, 1)
    found = capsys.readouterr()
    lines = found.err.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("training  loss 3: 3/3, ")
    assert lines[3] == "exporting"  # a single step has no rate
    assert "\x1b" not in found.err
    assert found.out == "a line between\n"


def test_progress_on_a_terminal_is_one_bar(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    code = (
        "from twinspect.console import Console\n"
        "with Console() as c:\n"
        "    for i in range(5): c.progress(f'training  loss {i}', i + 1, 5)\n"
    )
    master, slave = pty.openpty()
    done = subprocess.run([sys.executable, "-c", code], stderr=slave, stdout=subprocess.PIPE, text=True)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 4096):
            shown += part
    except OSError:
        pass  # the other end is closed
    os.close(master)
    assert done.returncode == 0
    assert b"training  loss 4" in shown
    assert b"5/5" in shown
    assert done.stdout == ""


def test_quiet_prints_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(quiet=True) as console:
        console.say("talk")
        console.result("answer")
        console.warn("careful")
    assert capsys.readouterr() == ("answer\n", "note: careful\n")
