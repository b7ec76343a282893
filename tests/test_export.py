"""Exports equal the model they come from, say what is wrong, and leave nothing half-written."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import images_to_test, picture

from twinspect.bundle import companion, read_meta
from twinspect.decide.decision import Threshold
from twinspect.errors import BundleError, ConfigError, OutputError, TwinspectError
from twinspect.export import (
    Comparison,
    ParityError,
    Pixels,
    check,
    compare,
    export,
    load_images,
    painted,
)
from twinspect.inference import load
from twinspect.inference.predictor import TorchRuntime, load_runtime


@pytest.fixture(scope="module")
def images(parts: Path, quick) -> list[Pixels]:
    return load_images(parts, quick.fitted.model.size)


@pytest.fixture(scope="module")
def onnx_file(quick, images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model.onnx"
    found = export(quick.fitted, out, images=images)
    assert not found.problems()
    assert sorted(p.name for p in out.parent.iterdir()) == ["model.onnx", "model.onnx.json"]
    return out


@pytest.mark.parametrize("count", [1, 3])
def test_every_output_equals_torch_at_any_batch(onnx_file: Path, quick, count: int) -> None:
    size = quick.fitted.model.size
    pixels = np.stack([picture(i, size, size) for i in range(count)])
    expected = TorchRuntime(quick.fitted.model).run(pixels)
    found = load_runtime(onnx_file)[0].run(pixels)
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_predictions_equal_those_of_the_bundle(onnx_file: Path, quick, parts: Path) -> None:
    paths = images_to_test(parts, None)
    ours, theirs = quick.predict(paths), list(load(onnx_file).predict(paths))
    for a, b in zip(ours, theirs, strict=True):
        assert a.path == b.path
        assert a.score == pytest.approx(b.score, rel=1e-4, abs=1e-4)
        assert (a.is_anomaly, a.class_name, a.width, a.height) == (b.is_anomaly, b.class_name, b.width, b.height)


def test_metadata_hold_decision_record_and_comparison(onnx_file: Path, quick) -> None:
    meta = read_meta(onnx_file)
    assert meta["decision"] == json.loads(json.dumps(quick.fitted.decision.to_dict()))
    assert meta["record"]["teacher"] == quick.record_["teacher"]
    assert meta["check"]["score_gap"] < 1e-4
    assert b"site-packages" not in onnx_file.read_bytes()


def test_check_accepts_the_export_and_refuses_another_model(onnx_file: Path, quick, images, tmp_path: Path) -> None:
    found, meta = check(onnx_file, quick.fitted, images)
    assert not found.problems()
    other = _copied(onnx_file, tmp_path, lambda values: values["decision"].update(model_id="0"))
    with pytest.raises(BundleError, match="exported from another model"):
        check(other, quick.fitted, images)


@pytest.mark.parametrize("place", [0.3, 0.7])
def test_a_changed_byte_is_refused(onnx_file: Path, tmp_path: Path, place: float) -> None:
    bad = _copied(onnx_file, tmp_path)
    body = bytearray(bad.read_bytes())
    body[int(len(body) * place)] ^= 1
    bad.write_bytes(body)
    with pytest.raises(BundleError, match="changed or damaged"):
        load(bad)


def test_damaged_renamed_and_missing_files(onnx_file: Path, tmp_path: Path) -> None:
    cut = _copied(onnx_file, tmp_path)
    cut.write_bytes(onnx_file.read_bytes()[:1000])
    with pytest.raises(BundleError, match="changed or damaged"):
        load(cut)
    for text in ("{", "[1]", '{"format": 3}'):
        companion(cut).write_text(text)
        with pytest.raises(BundleError, match="export it again|export again"):
            load(cut)
    companion(cut).unlink()
    with pytest.raises(BundleError, match=r"model\.onnx\.json must lie beside"):
        load(cut)
    shutil.copy(onnx_file, tmp_path / "new.onnx")
    shutil.copy(companion(onnx_file), tmp_path / "new.onnx.json")
    assert load(tmp_path / "new.onnx").decision.model_id
    with pytest.raises(BundleError, match="no such model"):
        load(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("version", "said"), [(99, "pip install --upgrade twinspect"), (0, "Export its bundle again")]
)
def test_other_versions_say_what_to_type(onnx_file: Path, tmp_path: Path, version: int, said: str) -> None:
    other = _copied(onnx_file, tmp_path, lambda values: values.update(format=version))
    with pytest.raises(BundleError, match=said):
        load(other)


def test_options_and_names_that_do_not_go_together(quick, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in .onnx, or in .xml"):
        export(quick.fitted, tmp_path / "m.pt2")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        export(quick.fitted, tmp_path / "file" / "model.onnx")


@pytest.fixture
def traced(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of `onnx_file` again, where tracing it once more would show nothing new."""
    import onnx

    monkeypatch.setattr("twinspect.export.to_onnx", lambda *_: onnx.load(str(onnx_file)))


def test_an_export_that_differs_is_refused_and_leaves_nothing(
    quick, images, traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Comparison, "problems", lambda self: ["scores differ by up to 1"])
    with pytest.raises(ParityError, match=r"scores differ by up to 1.*Nothing was written"):
        export(quick.fitted, tmp_path / "m.onnx", images=images)
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_nothing(quick, images, traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("twinspect.export.write_beside", full)
    with pytest.raises(OutputError, match="No space left"):
        export(quick.fitted, tmp_path / "m.onnx", images=images)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ending", "name"), [(".onnx", "onnxruntime"), (".xml", "openvino"), (".twin", "torch")])
def test_a_missing_runtime_says_what_to_type(monkeypatch: pytest.MonkeyPatch, ending: str, name: str) -> None:
    from twinspect.inference.predictor import RUNTIMES

    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TwinspectError, match=rf"m{ending} needs {name}, .*pip install '{name}'"):
        RUNTIMES[ending](Path(f"m{ending}"), 64) if ending in RUNTIMES else load(f"m{ending}")


def test_an_export_without_its_packages_says_what_to_type(
    quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(TwinspectError, match=r"m.xml needs onnxscript.*pip install 'twinspect\[openvino\]'"):
        export(quick.fitted, tmp_path / "m.xml")


def test_devices_that_no_machine_has(onnx_file: Path) -> None:
    with pytest.raises(ConfigError, match="--device tpu: accepted auto, cpu, cuda or cuda:1"):
        load(onnx_file, device="tpu")
    assert load(onnx_file, device="cuda").decision.model_id  # on the CPU where its runtime has no GPU


class Scores:
    """A runtime that gives prepared scores, whatever it is shown."""

    size = 8

    def __init__(self, *scores: float, clusters: tuple[int, ...] = ()) -> None:
        self.rows = list(zip(scores, clusters or [0] * len(scores), strict=True))

    def run(self, pixels_BHWC: np.ndarray) -> dict[str, np.ndarray]:
        rows, self.rows = self.rows[: len(pixels_BHWC)], self.rows[len(pixels_BHWC) :]
        score_B, cluster_B = (np.array(column) for column in zip(*rows, strict=True))
        return {"score_B": score_B, "cluster_B": cluster_B, "map_B1HW": np.zeros((len(rows), 1, 2, 2))}


def test_changed_answers_are_counted_by_class_and_rounding_is_none(quick) -> None:
    decision = dataclasses.replace(
        quick.fitted.decision, class_of_cluster=("ring", "weave"),
        fixed={"ring": Threshold(5.0, 0.01, False, ""), "weave": Threshold(9.0, 0.01, False, "")},
    )  # fmt: skip
    images = [picture(i, 8, 8) for i in range(4)]
    ours = Scores(4.0, 4.9999, 6.0, 7.0, clusters=(0, 0, 0, 1))
    theirs = Scores(6.0, 5.0001, 4.0, 7.0, clusters=(0, 0, 0, 0))
    # The first is called bad now, the second moved by rounding, the third is missed, the fourth is another class.
    found = compare(ours, theirs, images, decision, lambda *_: None)
    assert (found.images, found.changed) == (4, 3)
    said = "the answers for 3 of 4 images differ"
    assert said in list(found.lines())
    assert said in found.problems()
    same = compare(Scores(1, 2, 6, 7), Scores(1, 2, 6, 7), images, decision, lambda *_: None)
    assert not same.problems()
    assert "the answers for all 4 images are the same" in list(same.lines())
    broken = compare(Scores(1, 2, 6, 7), Scores(1, 2, np.nan, 7), images, decision, lambda *_: None)
    assert "scores are not finite, or of another shape" in broken.problems()
    moved = compare(Scores(1, 2, 6, 7), Scores(1.05, 2, 6, 7), images, decision, lambda *_: None)
    assert moved.problems() == ["scores differ by up to 0.05 (accepted 0.0001)"]


def test_painted_images_are_compared_where_there_are_none(quick) -> None:
    scores = [float(number) for number in range(len(painted(8)))]
    found = compare(Scores(*scores), Scores(*scores), (), quick.fitted.decision, lambda *_: None)
    assert (found.images, found.synthetic, found.changed) == (32, True, 0)
    assert "give real ones with --images" in next(found.lines())


@pytest.mark.slow
def test_openvino_equals_torch(quick, images, tmp_path: Path) -> None:
    out = tmp_path / "model.xml"
    assert not export(quick.fitted, out, images=images).problems()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.xml", "model.xml.json"]
    out.with_suffix(".bin").write_bytes(b"x" + out.with_suffix(".bin").read_bytes()[1:])
    with pytest.raises(BundleError, match="changed or damaged"):
        load(out)
    companion(out).unlink()
    with pytest.raises(BundleError, match="must lie beside"):
        load(out)


def _copied(source: Path, folder: Path, change=lambda values: None) -> Path:
    """A copy of an export, with other metadata."""
    shutil.copy(source, folder / source.name)
    values = json.loads(companion(source).read_text(encoding="utf-8"))
    change(values)
    companion(folder / source.name).write_text(json.dumps(values), encoding="utf-8")
    return folder / source.name
