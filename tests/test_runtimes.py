"""An exported file runs without torch, in the full install and in the light one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from installed import needed
from tiny import images_to_test, picture

from twinspect.inference import load
from twinspect.inference.predictor import TorchRuntime
from twinspect.inference.regions import components

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "timm", "scipy", "pyarrow")


@pytest.fixture(scope="module")
def onnx_file(quick, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from twinspect.export import export, load_images

    out = tmp_path_factory.mktemp("export") / "model.onnx"
    export(quick.fitted, out, images=load_images(parts, quick.fitted.model.size))
    return out


def test_api_and_command_never_load_torch(onnx_file: Path, parts: Path) -> None:
    image = images_to_test(parts, 1)[0]
    code = f"""
import sys
from twinspect.inference import load
(result,) = load({str(onnx_file)!r}).predict({str(image)!r})
assert result.score == result.score and result.map is not None and not result.error
from typer.testing import CliRunner
from twinspect.cli import app
found = CliRunner().invoke(app, ["predict", {str(onnx_file)!r}, {str(image)!r}])
assert found.exit_code == 0, found.output
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_light_command(onnx_file: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from twinspect.commands.predict import main

    out = tmp_path / "rows.csv"
    images = [str(p) for p in images_to_test(parts, None)[:3]]
    assert main(["predict", str(onnx_file), *images, "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 4
    assert main(["predict", str(tmp_path / "none.onnx"), *images]) == 2
    assert "no such model" in capsys.readouterr().err


def test_an_export_in_capitals(onnx_file: Path, parts: Path, tmp_path: Path) -> None:
    for path in onnx_file.parent.iterdir():
        shutil.copy(path, tmp_path / path.name.replace("model.onnx", "MODEL.ONNX"))
    image = images_to_test(parts, 1)[0]
    renamed, named = (next(load(path).predict(image)) for path in (tmp_path / "MODEL.ONNX", onnx_file))
    assert renamed.score == named.score


@pytest.fixture
def cores() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for a test; conftest leaves one."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "images", "share"), [(2, 2, 1), (2, 5, 1), (5, 2, 2), (4, 3, 1)])
def test_images_of_a_batch_are_computed_side_by_side(
    cores, quick, monkeypatch: pytest.MonkeyPatch, threads: int, images: int, share: int
) -> None:
    import torch

    cores(threads)
    runtime, meeting = TorchRuntime(quick.fitted.model), threading.Barrier(2)
    pixels = np.arange(images, dtype=np.uint8).repeat(3).reshape(images, 1, 1, 3)

    def call(batch: np.ndarray) -> dict[str, np.ndarray]:
        if len(pixels) > 1 and batch[0, 0, 0, 0] < 2:  # the first two wait for each other, or would never meet
            meeting.wait(20)
        return {"first": batch[:, 0, 0, 0], "threads": np.full(len(batch), torch.get_num_threads())}

    monkeypatch.setattr(runtime, "call", call)
    found = runtime.run(pixels)
    assert found["first"].tolist() == list(range(images))
    assert found["threads"].tolist() == [share] * images
    assert torch.get_num_threads() == threads
    pixels = pixels[:1]
    assert runtime.run(pixels)["threads"].tolist() == [threads]


def test_scores_of_a_batch_do_not_depend_on_its_size_or_on_the_number_of_threads(cores, quick) -> None:
    import torch

    size = quick.fitted.model.size
    pixels = np.stack([picture(i, size, size) for i in range(5)])
    cores(1)
    single = TorchRuntime(quick.fitted.model)
    expected = [single.run(one[None]) for one in pixels]
    cores(2)
    runtime = TorchRuntime(quick.fitted.model)
    for batch in (2, 3, 5):
        found = runtime.run(pixels[:batch])
        for name in found:
            np.testing.assert_array_equal(found[name], np.concatenate([one[name] for one in expected[:batch]]))
    assert torch.get_num_threads() == 2


def test_threads_are_as_before_when_a_call_fails(cores, quick, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    cores(2)
    runtime = TorchRuntime(quick.fitted.model)

    def fails(_: np.ndarray) -> None:
        raise ValueError("out of memory")

    monkeypatch.setattr(runtime, "call", fails)
    with pytest.raises(ValueError, match="out of memory"):
        runtime.run(np.zeros((2, 1, 1, 3), np.uint8))
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(runtime, "call", lambda batch: {"images": np.array([len(batch)])})
    assert runtime.run(np.zeros((3, 1, 1, 3), np.uint8))["images"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (2, 2), (20, 8)])
def test_the_usual_batch_has_an_image_for_every_thread(cores, bundle: Path, threads: int, batch: int) -> None:
    cores(threads)
    assert load(bundle).batch == batch
    assert load(bundle, batch=5).batch == 5


def test_components_equal_scipys() -> None:
    from scipy import ndimage

    rng = np.random.default_rng(0)
    for trial in range(60):
        values = rng.normal(size=rng.integers(1, 30, 2)).astype(np.float32)
        values = ndimage.gaussian_filter(values, 1) if trial % 2 else values
        mask = values >= rng.normal() * 0.5
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        found = components(mask, values)
        assert np.array_equal(found.label_HW, labels)
        if count:
            assert found.peak_R.tolist() == ndimage.maximum(values, labels, np.arange(1, count + 1)).tolist()
            boxes = [(y.start, x.start, y.stop, x.stop) for y, x in ndimage.find_objects(labels)]
            assert boxes == [tuple(box) for box in found.box_R4]


@pytest.mark.slow
def test_light_install_in_an_empty_environment(onnx_file: Path, parts: Path, tmp_path: Path) -> None:
    """Built as pip builds it; what it depends on is copied from this environment, so that no registry is needed."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(where, text=True).strip())
    copied = tmp_path / "tree"  # a build leaves folders behind; not in the checkout
    left_out = shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    for name in ("src", "packaging"):
        shutil.copytree(ROOT / name, copied / name, ignore=left_out)
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-compile", "--quiet"]
    install = [sys.executable, "-m", "pip", "install", *offline, "--target", site, copied / "packaging" / "runtime"]
    made = subprocess.run(install, capture_output=True, text=True, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    (light,) = metadata.distributions(path=[str(site)])
    for package in needed(light.requires or []).values():
        for file in package.files or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), site / file)
    size = _megabytes(site)
    assert 50 < size < 150, size
    run = [python, "-B", "-m", "twinspect.commands.predict", "predict", onnx_file, images_to_test(parts, 1)[0]]
    found = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "weave" in found.stdout or "ring" in found.stdout
    gone = subprocess.run([python, "-c", "import torch"], capture_output=True, cwd=tmp_path)
    assert gone.returncode
    (tmp_path / "model.twin").touch()
    refused = subprocess.run([*run[:5], "model.twin", *run[6:]], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2
    assert "light runtime" in refused.stderr
    assert "twinspect export model.twin --out model.onnx" in refused.stderr
    assert "install torch" not in refused.stderr


def _megabytes(folder: Path) -> float:
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
