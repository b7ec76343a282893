"""The model card says what the bundle says, of every class, and names what limits it."""

from pathlib import Path

from tiny import RANDOM_CNN, picture, run_config
from typer.testing import CliRunner

from twinspect import Detector
from twinspect.cli import app


def printed(path: Path) -> str:
    found = CliRunner().invoke(app, ["info", str(path), "--card"])
    assert found.exit_code == 0, found.output
    return found.stdout


def test_card_names_data_teacher_settings_promises_and_limits(bundle: Path, detector) -> None:
    text = printed(bundle)
    record, decision = detector.record_, detector.fitted.decision
    assert text.startswith("# Model card: parts.twin\n")
    for title in ("Data", "Settings", "Thresholds and what they promise", "Known limits"):
        assert f"\n## {title}\n" in text
    assert f"model: {decision.model_id}" in text
    assert f"licence of the teacher's weights: {record['teacher']['licence']}" in text
    assert record["teacher"]["hash"] in text
    taught = record["images"]["train"]
    assert f"| cloth | {record['classes']['cloth']} | {len(decision.good.class_name)} |" in text
    assert f"{taught} taught the students" in text
    assert decision.threshold.sentence in text
    assert "| model.size | 128 |" in text
    assert "| train.seed | 0 |" in text
    assert "train.lr" not in text  # has its default
    assert "Too few good images for a false-alarm rate of 2 %: cloth." in text  # 32 of the 49 that it takes
    assert "The teacher is a small one." in text


def test_card_tells_what_was_learnt_after_other_images_calibrated(bundle: Path, detector, tmp_path: Path) -> None:
    """`calibrate` notes the number of its images in the record; the card must not take it for what was learnt."""
    from layouts import Plan, write

    write("folder", tmp_path / "good", Plan(size=64, classes=1, train=60, seed=3))
    ready = tmp_path / "ready.twin"
    command = ["calibrate", str(bundle), str(tmp_path / "good"), "--class", "cloth", "-o", str(ready)]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    learnt = len(detector.fitted.decision.trained)
    assert f"\n{learnt} good images, {detector.record_['images']['train']} taught the students, and" in printed(ready)


def test_card_counts_what_was_kept_with_plain_scoring_and_what_was_learnt_later(quick, tmp_path: Path) -> None:
    config = run_config(RANDOM_CNN, scoring="plain")
    plain = Detector(config=config).fit([picture(i) for i in range(12)], quiet=True)
    taught, kept = plain.record_["images"]["train"], len(plain.fitted.decision.held)
    assert kept
    text = printed(plain.save(tmp_path / "plain.twin"))
    assert f"\n12 good images, {taught} taught the students, and {kept} were kept to measure them." in text
    assert "kept to measure them. Left out: 0. " in text
    more = Detector.load(quick.save(tmp_path / "quick.twin"))
    taught = more.record_["images"]["train"]
    more.update([picture(i) for i in range(80, 83)], class_name=next(iter(more.record_["classes"])), quiet=True)
    text = printed(more.save(tmp_path / "more.twin"))
    assert f", {taught} taught the students, and " in text
    assert "; 3 were learnt later, by updates; weight of the students in the scores (0 to 1): local 0." in text


def test_card_of_an_export_is_that_of_its_bundle(quick, tmp_path: Path) -> None:
    """From the metadata beside it, so that no runtime is needed."""
    from twinspect.bundle import write_beside

    fitted = quick.fitted
    path = tmp_path / "parts.onnx"
    path.write_bytes(b"graph")
    meta = {"runtime": "openvino", "size": 64, "check": {}, "writer": "1", "record": fitted.record}
    write_beside(path, meta | {"decision": fitted.decision.to_dict(), "config": fitted.config.to_dict()})
    text, own = printed(path), printed(quick.save(tmp_path / "parts.twin"))
    assert "written by: twinspect 1, exported for openvino" in text
    assert text.split("- model:", 1)[1] == own.split("- model:", 1)[1]
    assert "The teacher is a small one." not in text  # it is a random one
    assert "none (random weights)" in text
