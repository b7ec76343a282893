"""One decode for training, prediction and serving: every kind of file becomes RGB or a sentence."""

import contextlib
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny import picture, save

from twinspect.data.images import ImageLimits, is_image, pil_rgb, read_mask, read_rgb, resize_rgb
from twinspect.errors import ImageError


def header_only_png(path: Path, width: int, height: int) -> Path:
    """A PNG that promises a size and holds next to nothing: a decompression bomb's first hundred bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    path.write_bytes(body)
    return path


def test_rgb_file_is_read_as_it_is(tmp_path: Path) -> None:
    pixels = picture(0, 30, 50)
    assert np.array_equal(read_rgb(save(tmp_path / "a.png", pixels)), pixels)
    assert np.array_equal(read_rgb((tmp_path / "a.png").read_bytes()), pixels)
    assert np.array_equal(pil_rgb(Image.fromarray(pixels)), pixels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp", "ppm", "gif"])
def test_every_accepted_format(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", picture())
    assert is_image(path)
    found = read_rgb(path)
    assert found.shape == (96, 96, 3)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - picture()).mean() < 12


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:8, :8] = 255  # the corner that must move
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = read_rgb(tmp_path / "a.jpg")
    assert found.shape == (60, 40, 3)
    assert found[:6, -6:].mean() > 200
    assert found[:6, :6].mean() < 60
    with Image.open(tmp_path / "a.jpg") as opened:
        assert np.array_equal(pil_rgb(opened), found)


def test_sixteen_bit_grey_has_a_fixed_window(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "full.png")
    Image.fromarray(values // 4).save(tmp_path / "dark.png")
    full, dark = read_rgb(tmp_path / "full.png"), read_rgb(tmp_path / "dark.png")
    assert full.max() == 255
    assert dark.max() == pytest.approx(64, abs=1)  # not stretched to its own range
    assert (full[..., 0] == full[..., 2]).all()
    with Image.open(tmp_path / "dark.png") as opened:
        assert np.array_equal(pil_rgb(opened), dark)


def test_float_images(tmp_path: Path) -> None:
    unit = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    Image.fromarray(unit).save(tmp_path / "unit.tif")
    Image.fromarray(unit * 255).save(tmp_path / "bytes.tif")
    assert np.abs(read_rgb(tmp_path / "unit.tif").astype(int) - read_rgb(tmp_path / "bytes.tif")).max() <= 1
    holes = unit.copy()
    holes[3, 3] = np.nan
    Image.fromarray(holes).save(tmp_path / "nan.tif")
    assert read_rgb(tmp_path / "nan.tif")[3, 3].tolist() == [0, 0, 0]


def test_cmyk_palette_grey_alpha_and_one_bit(tmp_path: Path) -> None:
    base = Image.fromarray(picture())
    base.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    base.convert("P").save(tmp_path / "palette.png")
    base.convert("L").save(tmp_path / "grey.png")
    base.convert("1").save(tmp_path / "bit.png")
    clear = base.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(base.size))
    clear.save(tmp_path / "alpha.png")
    for name in ("cmyk.jpg", "palette.png", "grey.png", "bit.png", "alpha.png"):
        assert read_rgb(tmp_path / name).shape == (96, 96, 3)
    for name in ("cmyk.jpg", "palette.png"):
        assert np.abs(read_rgb(tmp_path / name).astype(int) - picture()).mean() < 25
    alpha = read_rgb(tmp_path / "alpha.png").astype(float)
    assert alpha[:8].mean() < 0.2 * alpha[-8:].mean()  # see-through is black


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    for suffix in ("gif", "webp", "png", "tif"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(
            path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {})
        )
        assert read_rgb(path)[5, 5].tolist() == [255, 0, 0], suffix


@pytest.mark.parametrize("keep", [0, 20, 200, 0.5, 0.95])
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp", "gif"])
def test_truncated_files_name_themselves(tmp_path: Path, suffix: str, keep: float) -> None:
    whole = save(tmp_path / f"w.{suffix}", picture()).read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(ImageError, match=rf"cut\.{suffix}: "):
        read_rgb(cut)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif", "bmp"])
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, suffix: str) -> None:
    whole = bytearray(save(tmp_path / f"w.{suffix}", picture()).read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / f"x.{suffix}"
    for _ in range(40):
        spoiled = bytearray(whole)
        for place in rng.integers(0, len(whole), 8):
            spoiled[place] = int(rng.integers(256))
        path.write_bytes(spoiled)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(ImageError):
                assert read_rgb(path, ImageLimits(max_pixels=1_000_000)).ndim == 3


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    with pytest.raises(ImageError, match=r"empty\.png: the file is empty \(0 bytes\); copy it again"):
        read_rgb(empty)
    text = tmp_path / "text.png"
    text.write_text("hello")
    with pytest.raises(ImageError, match=r"text\.png: not an image that can be read; accepted: bmp, gif, "):
        read_rgb(text)
    with pytest.raises(ImageError, match=r"none\.png: cannot be opened \(No such file or directory\)"):
        read_rgb(tmp_path / "none.png")
    with pytest.raises(ImageError, match="cannot be opened"):
        read_rgb(tmp_path)
    thin = save(tmp_path / "thin.png", picture(0, 50, 1))
    with pytest.raises(ImageError, match=r"thin\.png: 1 x 50 pixels; at least 2 per side are needed"):
        read_rgb(thin)
    with pytest.raises(ImageError, match="PIL image: 1 x 50 pixels"):
        pil_rgb(Image.fromarray(picture(0, 50, 1)))


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (65_535, 65_535), (2_000_000, 1_000)])
def test_decompression_bomb_is_refused_on_its_header(tmp_path: Path, width: int, height: int) -> None:
    path = header_only_png(tmp_path / "bomb.png", width, height)
    with pytest.raises(ImageError, match=r"bomb\.png: .*(more than|limit).*100,000,000"):
        read_rgb(path)


def test_no_warning_below_our_own_limit(tmp_path: Path) -> None:
    path = header_only_png(tmp_path / "large.png", 9_900, 9_900)  # 98 Mpx: Pillow warns from 89 on
    with pytest.raises(ImageError, match="damaged or truncated"):
        read_rgb(path)


def test_threads_leave_the_warning_filters_alone(tmp_path: Path) -> None:
    files = [save(tmp_path / f"{i}.png", picture(i)) for i in range(8)]
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_rgb, files * 20))
    assert warnings.filters == before


def test_draft_decodes_large_jpegs_smaller(tmp_path: Path) -> None:
    image = Image.new("RGB", (1600, 1200), "grey")
    ImageDraw.Draw(image).rectangle([0, 0, 400, 300], fill="white")
    image.save(tmp_path / "a.jpg")
    draft = read_rgb(tmp_path / "a.jpg", draft_side=256)
    assert 256 <= min(draft.shape[:2]) < 1200
    full = resize_rgb(read_rgb(tmp_path / "a.jpg"), 64).astype(int)
    assert np.abs(resize_rgb(draft, 64) - full).mean() < 2


def test_resize_keeps_everything_and_nothing_is_done_twice() -> None:
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[0, 0] = pixels[-1, -1] = 255
    small = resize_rgb(pixels, 50)
    assert small.shape == (50, 50, 3)
    assert small[0, 0].max() > 0 < small[-1, -1].max()
    square = picture(0, 50, 50)
    assert resize_rgb(square, 50) is square


def test_names_of_images() -> None:
    assert is_image(Path("a/B.JPG"))
    assert not is_image(Path("a/._b.jpg"))
    assert not is_image(Path("a/b.txt"))


def test_masks(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[3:5, 4:9] = 1  # any value above zero is defect
    expected = mask > 0
    for mode in ("L", "RGB", "1", "I;16"):
        source = Image.fromarray(mask * 255) if mode == "1" else Image.fromarray(mask)
        image = Image.fromarray(mask.astype(np.uint16) * 700) if mode == "I;16" else source.convert(mode)
        image.save(tmp_path / "m.png")
        assert np.array_equal(read_mask(tmp_path / "m.png"), expected), mode
    opaque = Image.fromarray(mask).convert("LA")
    opaque.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png"), expected)
    (tmp_path / "m.png").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"m\.png: mask cannot be read"):
        read_mask(tmp_path / "m.png")


def test_limits_are_the_callers() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "PNG")
    with pytest.raises(ImageError, match="image bytes: 96 x 96 pixels are more than the limit of 1,000"):
        read_rgb(buffer.getvalue(), ImageLimits(max_pixels=1000))
    with pytest.raises(ImageError, match="up.png: 96 x 96"):
        read_rgb(buffer.getvalue(), ImageLimits(min_side=100), name="up.png")
