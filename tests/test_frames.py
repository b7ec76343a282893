"""What can be given to `predict` in Python: every image gives one result, and what is no image is refused."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import picture, save

from twinspect import Detector
from twinspect.errors import DataError, ImageError
from twinspect.inference.decode import is_live, is_single

PIXELS = picture(3, 40, 60)
OPAQUE = np.dstack([PIXELS, np.full((40, 60), 255, np.uint8)])
GREY = PIXELS[..., 0]


def png(pixels: np.ndarray = PIXELS) -> bytes:
    body = io.BytesIO()
    Image.fromarray(pixels).save(body, "PNG")
    return body.getvalue()


def just_written() -> io.BytesIO:
    """Whoever has saved an image into a buffer left it at its end."""
    body = io.BytesIO()
    Image.fromarray(PIXELS).save(body, "PNG")
    return body


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("frames")
    for number in range(3):
        save(root / f"{number}.png", np.roll(PIXELS, number, axis=0))
    (root / "bad.txt").write_text("no image")
    return root


# ----------------------------------------------------------------------------------------------- one image

COLOURS: dict[str, Callable[[], Any]] = {
    "float64": lambda: PIXELS / 255,
    "float32": lambda: (PIXELS / 255).astype(np.float32),
    "uint16": lambda: PIXELS.astype(np.uint16) * 257,
    "C x H x W": lambda: PIXELS.transpose(2, 0, 1),
    "RGBA": lambda: OPAQUE,
    "floats, C x H x W, RGBA": lambda: OPAQUE.transpose(2, 0, 1) / 255,
    "tensor": lambda: torch.from_numpy(PIXELS),
    "tensor as torchvision has it": lambda: (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255).requires_grad_(),
    "memoryview": lambda: memoryview(PIXELS),
    "bytes": png,
    "bytearray": lambda: bytearray(png()),
    "BytesIO": lambda: io.BytesIO(png()),
    "BytesIO at its end": just_written,
    "PIL": lambda: Image.fromarray(PIXELS),
    "PIL RGBA": lambda: Image.fromarray(OPAQUE),
}
GREYS: dict[str, Callable[[], Any]] = {
    "H x W": lambda: GREY,
    "H x W x 1": lambda: GREY[..., None],
    "1 x H x W": lambda: GREY[None],
    "uint16": lambda: GREY.astype(np.uint16) * 257,
    "floats": lambda: GREY / 255,
    "PIL 16 bits": lambda: Image.fromarray(GREY.astype(np.uint16) * 257),
    "PIL floats": lambda: Image.fromarray((GREY / 255).astype(np.float32)),
    "file of 16 bits": lambda: png(GREY.astype(np.uint16) * 257),
}


@pytest.mark.parametrize("kind", COLOURS)
def test_every_kind_of_image_gives_the_same_answer(quick: Detector, kind: str) -> None:
    result = quick.predict(COLOURS[kind]())
    assert (result.score, result.height, result.width, result.error) == (quick.predict(PIXELS).score, 40, 60, "")
    assert result.rgb is not None
    assert np.array_equal(result.rgb, PIXELS)


@pytest.mark.parametrize("kind", GREYS)
def test_every_kind_of_grey_image_gives_the_same_answer(quick: Detector, kind: str) -> None:
    result = quick.predict(GREYS[kind]())
    assert result.score == quick.predict(np.repeat(GREY[..., None], 3, axis=2)).score


def test_transparency_is_black_as_in_files(quick: Detector) -> None:
    half = OPAQUE.copy()
    half[:20, :, 3] = 0
    seen = quick.predict(half)
    assert not seen.rgb[:20].any()
    assert np.array_equal(seen.rgb, quick.predict(png(half)).rgb)


def test_floats_a_little_beyond_their_range_are_clipped(quick: Detector) -> None:
    values = PIXELS / 255
    values[0, 0], values[0, 1] = 1.03, -0.02
    assert quick.predict(values).rgb[0, :2].tolist() == [[255] * 3, [0] * 3]


def test_an_open_file_is_read_from_its_start(quick: Detector, files: Path) -> None:
    with open(files / "1.png", "rb") as file:
        file.read(100)
        result = quick.predict(file)
    assert result.path == str(files / "1.png")
    assert result.score == quick.predict(files / "1.png").score
    with pytest.raises(ImageError, match="cannot be read .*closed"):
        quick.predict(file)
    with open(files / "1.png") as text, pytest.raises(ImageError, match="open files with 'rb'"):
        quick.predict(text)


WRONG: list[tuple[Any, str]] = [
    (np.zeros((8, 8, 3), np.int64), r"array of type int64; accepted uint8, .*a\.astype\('uint8'\) if"),
    (np.zeros((8, 8), bool), r"array of type bool; .*\* 255"),
    (PIXELS.astype(np.float32), r"values from \d+ to \d+; accepted floats from 0 to 1, so type: a / 255"),
    ((PIXELS / 255 - 0.45) / 0.22, "undo any normalisation"),
    (np.full((8, 8, 3), np.nan), "values from nan to nan"),
    (torch.zeros(3, 8, 8, dtype=torch.int32), "array of type int32"),
    (np.zeros((8, 8, 2), np.uint8), r"array of shape \(8, 8, 2\); accepted H x W \(grey\)"),
    (np.zeros((40, 8, 8), np.uint8), "a stack of images has four dimensions"),
    (np.zeros((0, 8, 3), np.uint8), r"array of shape \(0, 8, 3\)"),
    (np.zeros((1, 8, 3), np.uint8), "at least 2 pixels per side"),
    (np.zeros(5, np.uint8), r"array of shape \(5,\)"),
    (np.zeros((1, 2, 8, 8, 3), np.uint8), "array of shape"),
    (None, "NoneType, which cv2.imread returns for a file that it cannot read; accepted a path"),
    ({"a": 1}, "dict; accepted a path"),
    (7, "int; accepted a path"),
    (io.StringIO("x"), "StringIO gives str instead of bytes"),
    (b"junk", "not an image that can be read"),
    (b"", "0 bytes"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG)
def test_what_is_no_image_is_refused(quick: Detector, wrong: Any, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        quick.predict(wrong)
    with pytest.raises(ImageError, match=words):
        next(quick.predict(wrong, stream=True))


@pytest.mark.parametrize(("wrong", "words"), WRONG[:-2])
def test_what_is_no_image_is_refused_among_others(quick: Detector, wrong: Any, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        quick.predict([PIXELS, wrong, PIXELS])
    with pytest.raises(ImageError, match=words):
        quick.predict(one for one in (PIXELS, wrong))


def test_a_single_file_that_cannot_be_read_raises_and_one_of_several_is_a_row(quick: Detector, files: Path) -> None:
    bad = files / "bad.txt"
    for source in (bad, str(bad)):
        with pytest.raises(ImageError, match="bad.txt: not an image that can be read"):
            quick.predict(source)
        with pytest.raises(ImageError, match="bad.txt: not an image that can be read"):
            next(quick.predict(source, stream=True))
    for several in ([bad], iter([bad]), [b"junk"], [files / "0.png", bad], [png(), b"junk"]):
        result = quick.predict(several)[-1]
        assert "not an image" in result.error
        assert result.is_anomaly is None


# --------------------------------------------------------------------------------------------- many images


def test_every_iterable_gives_one_result_for_each(quick: Detector, files: Path) -> None:
    paths = sorted(files.glob("*.png"))
    expected = [quick.predict(path).score for path in paths]
    images = [np.roll(PIXELS, number, axis=0) for number in range(3)]
    sources: dict[str, Any] = {
        "generator": (path for path in paths),
        "iterator": iter(paths),
        "map": map(str, paths),
        "deque": deque(paths),
        "dict values": dict.fromkeys(paths).keys(),
        "generator of arrays": (image for image in images),
        "generator of bytes": (path.read_bytes() for path in paths),
        "generator of lists": ([image] for image in images),
        "stack": np.stack(images),
        "stack of tensors": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        "generator of stacks": (part for part in (np.stack(images[:2]), np.stack(images[2:]))),
        "array of names": np.array([str(path) for path in paths]),
        "list with a generator": [paths[0], (image for image in images[1:])],
        "loader": torch.utils.data.DataLoader([torch.from_numpy(one) for one in images], batch_size=2),
    }
    for kind, source in sources.items():
        results = quick.predict(source)
        assert isinstance(results, list), kind
        assert [result.score for result in results] == pytest.approx(expected, rel=1e-3), kind
    found = {Path(result.path).name: result.score for result in quick.predict(files.glob("*.png"))}
    assert [found[path.name] for path in paths] == pytest.approx(expected, rel=1e-3)


def test_a_data_frame_is_its_column_of_paths(quick: Detector, files: Path) -> None:
    pandas = pytest.importorskip("pandas")
    paths = [str(path) for path in sorted(files.glob("*.png"))]
    frame = pandas.DataFrame({"label": [0, 1, 0], "image_path": paths})
    assert [result.path for result in quick.predict(frame)] == paths
    with pytest.raises(ImageError, match=r"DataFrame without a column of paths.*df\['COLUMN'\]"):
        quick.predict(frame[["label"]])
    assert [result.path for result in quick.predict(frame["image_path"])] == paths


def test_iterables_without_images(quick: Detector) -> None:
    assert quick.predict(iter([])) == []
    assert list(quick.predict((one for one in ()), stream=True)) == []
    with pytest.raises(DataError, match="nothing found at an empty path"):
        quick.predict("")


class Camera:
    """Knows what was taken and what was answered; has no length, as a camera has none."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            self.taken += 1
            yield np.roll(PIXELS, self.taken, axis=0)


@pytest.mark.parametrize("face", ["detector", "predictor"])
def test_a_live_source_is_answered_before_its_next_image_is_taken(quick: Detector, face: str) -> None:
    camera = Camera()
    found = quick.predict(camera, stream=True) if face == "detector" else quick.predictor().predict(camera)
    for number in range(1, 6):
        next(found)
        assert camera.taken == number
    found.close()


def test_a_buffer_that_is_written_again_is_read_in_time(quick: Detector) -> None:
    buffer = np.zeros_like(PIXELS)

    def frames() -> Iterator[np.ndarray]:
        for number in range(8):
            buffer[:] = np.roll(PIXELS, 5 * number, axis=1)
            yield buffer

    expected = [quick.predict(np.roll(PIXELS, 5 * number, axis=1)).score for number in range(8)]
    assert [result.score for result in quick.predict(frames())] == pytest.approx(expected, rel=1e-3)
    assert [result.score for result in quick.predict(frames(), stream=True)] == pytest.approx(expected, rel=1e-3)


def test_what_is_single_and_what_is_live(files: Path) -> None:
    single = [files / "0.png", str(files / "0.png"), PIXELS, GREY, png(), io.BytesIO(png()), Image.fromarray(PIXELS)]
    several = [files, str(files / "*.png"), [PIXELS], (PIXELS,), PIXELS[None], np.array(["a.png"])]
    live = [iter([PIXELS]), (one for one in [PIXELS]), files.glob("*"), Camera()]
    assert all(is_single(one) and not is_live(one) for one in single)
    assert not any(is_single(one) or is_live(one) for one in several)
    assert all(is_live(one) and not is_single(one) for one in live)


def test_fit_takes_any_iterable_of_paths(files: Path) -> None:
    from twinspect.detector import as_samples
    from twinspect.errors import ConfigError

    assert [sample.image.name for sample in as_samples(path for path in sorted(files.glob("*.png")))] == [
        "0.png",
        "1.png",
        "2.png",
    ]
    for wrong in (None, 3, iter([None])):
        with pytest.raises(ConfigError, match="fit takes a folder"):
            as_samples(wrong)
