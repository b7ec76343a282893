"""Training: deterministic, resumable after kill -9, and clear about what stops it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import (
    RANDOM,
    RANDOM_CNN,
    good_folder,
    images_to_test,
    picture,
    run_config,
    same_tensors,
    save,
    train_samples,
)

from twinspect import Detector
from twinspect.bundle import Fitted
from twinspect.config import RunConfig
from twinspect.errors import ConfigError, DataError, OutputError, TrainingError
from twinspect.models.contract import build_model
from twinspect.training.fit import fit
from twinspect.training.loop import StableAdamW, WorkFolder
from twinspect.types import silent


def run(parts: Path, config: RunConfig, work: Path | None = None) -> Fitted:
    return fit(train_samples(parts), config, work, silent)


def weights(fitted: Fitted) -> dict[str, torch.Tensor]:
    return fitted.model.state_dict()


def log(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("teacher", [RANDOM, RANDOM_CNN])
def test_same_seed_gives_bit_identical_weights(teacher: str, parts: Path) -> None:
    first, again = (run(parts, run_config(teacher)) for _ in range(2))
    assert same_tensors(weights(first), weights(again))
    assert first.decision.to_dict() == again.decision.to_dict()
    other = run(parts, run_config(teacher, seed=1))
    assert not same_tensors(weights(first), weights(other))


def test_the_order_of_files_does_not_matter(parts: Path) -> None:
    samples = train_samples(parts)
    first = fit(samples, run_config(), None, silent)
    again = fit(samples[::-1], run_config(), None, silent)
    assert same_tensors(weights(first), weights(again))


def test_the_callers_random_state_does_not_matter(parts: Path) -> None:
    torch.manual_seed(123)
    first = run(parts, run_config())
    torch.manual_seed(456)
    assert same_tensors(weights(first), weights(run(parts, run_config())))


@pytest.mark.parametrize("teacher", [RANDOM, RANDOM_CNN])
def test_loss_falls(teacher: str, parts: Path, tmp_path: Path) -> None:
    run(parts, run_config(teacher, steps=16, warmup=2), tmp_path)
    rows = log(tmp_path)
    for term in ("loss", "local", "semantic"):
        assert sum(row[term] for row in rows[-4:]) < 0.9 * sum(row[term] for row in rows[:4])


@pytest.mark.parametrize("reading", ["n1", "n2", "n3"])
def test_every_reading_and_bf16_train(reading: str, parts: Path) -> None:
    fitted = run(parts, run_config(noisy_or=reading, precision="bf16"))
    assert math.isfinite(fitted.record["training"]["loss"])
    assert all(torch.isfinite(v.float()).all() for v in weights(fitted).values())


# ------------------------------------------------------------------------------------------ resume


_CHILD = """
import sys, time
from pathlib import Path
from tiny import run_config, train_samples
from twinspect.training.fit import fit
from twinspect.training.loop import StableAdamW, WorkFolder

def slow(stage, done, total):
    time.sleep(0.1 if stage.startswith("training") else 0)

fit(train_samples(Path(sys.argv[1])), run_config(sys.argv[3], steps=16, checkpoint_every=5), Path(sys.argv[2]), slow)
"""


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [RANDOM, RANDOM_CNN])
def test_resume_after_kill_9_gives_bit_identical_weights(teacher: str, parts: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(parts), str(work), teacher], cwd=Path(__file__).parent
    )
    wanted, limit = 7, time.monotonic() + 300  # a few steps past the checkpoint of step 5
    while time.monotonic() < limit and child.poll() is None:
        if (work / "train.jsonl").exists() and (work / "train.jsonl").read_bytes().count(b"\n") >= wanted:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    config = run_config(teacher, steps=16, checkpoint_every=5)
    stages: list[tuple[str, int]] = []
    resumed = fit(train_samples(parts), config, work, lambda stage, done, _: stages.append((stage.split()[0], done)))
    first_step = next(done for stage, done in stages if stage == "training")
    assert 5 < first_step < 16
    undisturbed = run(parts, config, tmp_path / "other")
    assert same_tensors(weights(resumed), weights(undisturbed))
    assert resumed.decision.to_dict() == undisturbed.decision.to_dict()
    assert [row["step"] for row in log(work)] == list(range(16))
    assert [row["loss"] for row in log(work)] == [row["loss"] for row in log(tmp_path / "other")]


def test_a_finished_run_whose_bundle_was_not_saved_is_taken_up_at_its_end(parts: Path, tmp_path: Path) -> None:
    first = run(parts, run_config(), tmp_path)
    again = run(parts, run_config(), tmp_path)
    assert same_tensors(weights(first), weights(again))
    assert again.record["training"]["steps"] == 3
    assert again.record["training"]["loss"] == first.record["training"]["loss"] > 0
    assert len(log(tmp_path)) == 3


@pytest.mark.parametrize("changes", [{"lr": 0.01}, {"seed": 5}, {"steps": 4}, {"teacher": RANDOM_CNN}])
def test_checkpoint_of_other_settings_is_refused(changes: dict[str, object], parts: Path, tmp_path: Path) -> None:
    run(parts, run_config(), tmp_path)
    with pytest.raises(TrainingError, match="made with other data or settings; delete the folder"):
        run(parts, run_config(**changes), tmp_path)


def test_checkpoint_of_other_data_or_teacher_is_refused(parts: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from twinspect.models.teachers import timm

    run(parts, run_config(), tmp_path / "a")
    with pytest.raises(TrainingError, match="other data or settings"):
        fit(train_samples(parts)[2:], run_config(), tmp_path / "a", silent)
    file = tmp_path / "w.safetensors"
    for seed in (0, 1):  # the same path, other weights
        torch.manual_seed(seed)
        save_file(timm.create_model(RANDOM, pretrained=False).state_dict(), file)
        config = run_config(pretrained=True, weights=str(file))
        if seed:
            with pytest.raises(TrainingError, match="other data or settings"):
                run(parts, config, tmp_path / "b")
        else:
            run(parts, config, tmp_path / "b")


def test_settings_that_change_no_weight_may_change(parts: Path, tmp_path: Path) -> None:
    run(parts, run_config(), tmp_path)
    run(parts, run_config(checkpoint_every=2, time_budget_s=99.0), tmp_path)


@pytest.mark.parametrize("body", [b"", b"garbage" * 100])
def test_damaged_checkpoint(body: bytes, parts: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(body)
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors is damaged .*delete it to start again"):
        run(parts, run_config(), tmp_path)


def test_log_with_a_torn_line(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    run(parts, run_config(), tmp_path)
    assert [row["step"] for row in log(tmp_path)] == [0, 1, 2]


def test_log_lines(parts: Path, tmp_path: Path) -> None:
    run(parts, run_config(), tmp_path)
    for row in log(tmp_path):
        assert row.keys() >= {"step", "loss", "local", "semantic", "images", "seconds"}
        assert row["images"] == 4


# --------------------------------------------------------------------------------------- what stops it


def test_time_budget(parts: Path, tmp_path: Path) -> None:
    fitted = run(parts, run_config(steps=100_000, time_budget_s=0.3), tmp_path)
    assert fitted.record["training"]["stopped"] == "time budget"
    assert 1 <= fitted.record["training"]["steps"] < 100_000
    assert fitted.record["training"]["seconds"] < 20


def test_loss_that_is_not_finite(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as stopped:
        run(parts, run_config(steps=30, warmup=1, lr=1e38, lr_ee=1e38), tmp_path)
    text = str(stopped.value)
    assert "loss is not finite at step" in text
    assert ".png" in text
    assert "--lr" in text


def test_too_few_images(tmp_path: Path, parts: Path) -> None:
    folder = good_folder(tmp_path / "n5", 5)
    with pytest.raises(DataError, match="5 good training images found; at least 8 are needed"):
        Detector(config=run_config(scoring="plain")).fit(folder)
    with pytest.raises(DataError, match="0 good training images"):
        Detector(config=run_config()).fit([])
    with pytest.raises(ConfigError, match="fit takes a folder, a glob, a list of Sample"):
        Detector(config=run_config()).fit([1, 2])


def test_unreadable_images_are_left_out_and_listed_in_order(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 16)
    (folder / "002.png").write_bytes(b"")
    (folder / "005.png").write_bytes((folder / "004.png").read_bytes()[:300])
    (folder / "009.png").write_text("not an image")
    detector = Detector(config=run_config()).fit(folder)
    assert [s.path.name for s in detector.skipped_] == ["002.png", "005.png", "009.png"]
    assert not any(str(s.path) in s.reason for s in detector.skipped_)  # whoever prints both says it once
    assert "0 bytes" in detector.skipped_[0].reason
    assert detector.record_["images"]["skipped"] == 3
    assert sum(detector.record_["images"].values()) == 16


def test_a_giant_file_is_left_out_before_it_fills_the_memory(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 16)
    os.truncate(folder / "003.png", 1 << 42)  # sparse: of its bytes the disk holds none
    detector = Detector(config=run_config(steps=0)).fit(folder)
    assert [s.path.name for s in detector.skipped_] == ["003.png"]
    assert "files above" in detector.skipped_[0].reason


def test_too_little_left_after_skipping(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 10)
    for number in range(6):
        (folder / f"{number:03d}.png").write_bytes(b"")
    with pytest.raises(DataError) as stopped:
        Detector(config=run_config()).fit(folder)
    text = str(stopped.value)
    assert "too little is left" in text
    assert "at least 6 and 2 are needed: give more good images or type --steps 0 (statistics alone)" in text
    assert "6 images cannot be read" in text
    assert str(folder / "000.png") in text


def test_of_a_few_images_an_unreadable_one_is_named_once(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 4)
    (folder / "001.png").write_bytes(b"")
    detector = Detector(config=run_config()).fit(folder)
    assert [one.path.name for one in detector.skipped_] == ["001.png"]
    assert len(detector.fitted.decision.good) == 3


def test_copies_of_one_image_count_as_one_and_promise_nothing(tmp_path: Path) -> None:
    for number in range(16):
        save(tmp_path / "copies" / f"{number}.png", picture(0))
    detector = Detector(config=run_config()).fit(tmp_path / "copies")
    notes = " ".join(detector.record_["notes"])
    assert "15 of 16 good images are copies of others" in notes
    assert "1 good image;" in notes
    assert "promises nothing" in notes


def test_no_steps_is_a_model_whose_students_say_nothing(parts: Path, tmp_path: Path) -> None:
    detector = Detector(config=run_config("efficientnet-lite0", True, size=128, steps=0)).fit(train_samples(parts))
    model = detector.fitted.model
    assert detector.record_["images"]["calibration"] == 0  # nothing is held out from students that do not learn
    assert not model.scorer.students_count()
    good, bad = ([r.score for r in detector.predict(images_to_test(parts, label))] for label in (0, 1))
    assert sum(b > g for b in bad for g in good) > 0.9 * len(bad) * len(good)
    again = Detector.load(detector.save(tmp_path / "m.twin"))
    assert [r.score for r in again.predict(images_to_test(parts, 0))] == pytest.approx(good)


def test_work_folder_that_cannot_be_made(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"work/train.jsonl cannot be written .*choose another --out or --work"):
        run(parts, run_config(), tmp_path / "file" / "work")
    told = list[tuple[str, int, int]]()
    with pytest.raises(OutputError):  # before the teacher sees an image
        fit(train_samples(parts), run_config(), tmp_path / "file" / "work", lambda *row: told.append(row))
    assert not told


def test_detector_leaves_the_log_and_no_checkpoint(parts: Path, tmp_path: Path) -> None:
    Detector(config=run_config()).fit(train_samples(parts), work=tmp_path / "w")
    assert [p.name for p in (tmp_path / "w").iterdir()] == ["train.jsonl"]


# ------------------------------------------------------------------------------------ what is recorded


def test_record_says_how_the_model_came_to_be(parts: Path) -> None:
    record = run(parts, run_config()).record
    assert record["teacher"]["name"] == RANDOM
    assert record["teacher"]["weights"] == "random"
    assert record["classes"].keys() == {"ring", "weave"}
    assert record["images"]["train"] + record["images"]["calibration"] == 24
    assert record["parameters"]["local"] > 0 < record["parameters"]["semantic"]
    json.dumps(record, allow_nan=False)


def test_calibration_images_are_not_trained_on(parts: Path) -> None:
    from twinspect.training.fit import choose_images

    training, held = choose_images(train_samples(parts), run_config())
    assert not {s.image for s in training} & {s.image for s in held}
    assert len(held) >= 2
    again = choose_images(train_samples(parts)[::-1], run_config())
    assert {s.image for s in again[1]} == {s.image for s in held}


@pytest.mark.parametrize(
    ("size", "teacher", "multiple", "legal"),
    [(150, RANDOM, 16, 144), (80, RANDOM, 16, 80), (64, "resnet18", 32, 128), (115, "resnet18", 32, 128)],
)
def test_other_sizes_are_brought_to_a_multiple(size: int, teacher: str, multiple: int, legal: int) -> None:
    model = build_model(run_config(teacher, size=size).model)
    assert (model.teacher.info.multiple, model.size) == (multiple, legal)


def test_teacher_is_untouched_by_training(parts: Path) -> None:
    from twinspect.models.teachers import create_teacher

    fitted = run(parts, run_config("efficientnet-lite0", pretrained=True, size=128, steps=1))
    assert fitted.model.teacher.hash() == create_teacher("efficientnet-lite0").hash()


def test_saving_a_large_state_takes_a_twentieth_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, takes = [0.0], [0.1]
    monkeypatch.setattr("twinspect.training.loop.time.monotonic", lambda: now[0])
    student = torch.nn.Linear(2, 2)
    folder = WorkFolder(tmp_path, student, StableAdamW(student.parameters(), lr=0.1), "print")

    def slow_save(*_: object, **__: object) -> None:
        now[0] += takes[0]
        (tmp_path / f"checkpoint.safetensors.{os.getpid()}.new").touch()

    monkeypatch.setattr("twinspect.training.loop.save_file", slow_save)
    for takes[0], next_due in ((0.1, 0.0), (3.0, 60.0)):
        assert folder.due
        folder.save(1, {})
        now[0] += next_due - 0.5
        assert folder.due is (next_due == 0.0)
        now[0] += 0.5
        assert folder.due
