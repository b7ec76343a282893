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
import tifffile
from PIL import Image, ImageDraw, PngImagePlugin
from tiny import picture, save

from twinspect.data.images import (
    count_pictures,
    is_image,
    pil_rgb,
    read_mask,
    read_rgb,
    read_sized_rgb,
    resize_rgb,
)
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


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "jfif", "bmp", "dib", "tif", "webp", "ppm", "pnm", "gif", "jp2", "j2k", "avif"]
)
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
    expected = (unit * 255).round()
    for name, values in {"unit": unit, "bytes": unit * 255, "words": unit * 65535}.items():
        for change in ("as it is", "overshoot", "hot pixel", "hole", "infinite"):
            changed = values.copy()
            top = float(values.max())
            changed[3, 3] = {"overshoot": 1.01 * top, "hot pixel": 90 * top, "hole": np.nan, "infinite": np.inf}.get(
                change, changed[3, 3]
            )
            Image.fromarray(changed).save(tmp_path / "a.tif")
            found = read_rgb(tmp_path / "a.tif")[..., 0].astype(int)
            difference = np.abs(found - expected)
            difference[3, 3] = 0
            assert difference.max() <= 1, (name, change)
            assert found[3, 3] == {"hole": 0, "as it is": expected[3, 3]}.get(change, 255)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("alpha", [False, True])
def test_planes_of_colours(tmp_path: Path, kind: str, compression: str | None, alpha: bool) -> None:
    pixels = picture()
    full = {"uint8": 255, "uint16": 65535, "float32": 1}[kind]
    values = np.dstack([pixels, np.full((96, 96), 255, np.uint8)] if alpha else [pixels]) / 255 * full
    values = (values.round() if kind[0] == "u" else values).astype(kind)
    more = {"extrasamples": ["unassalpha"]} if alpha else {}
    tifffile.imwrite(
        tmp_path / "a.tif", np.moveaxis(values, 2, 0), photometric="rgb", planarconfig="separate",
        compression=compression, **more,
    )  # fmt: skip
    assert np.array_equal(read_rgb(tmp_path / "a.tif"), pixels)


@pytest.mark.parametrize("missing", [10, 18, 100])
def test_a_tiff_that_lacks_a_byte_is_counted_and_ends(tmp_path: Path, missing: int) -> None:
    """Its directory leads nowhere or back to itself: counting its pages went round until the memory was full."""
    tifffile.imwrite(tmp_path / "a.tif", picture(), photometric="rgb", byteorder=">")
    raw = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(raw[:missing] + raw[missing + 1 :])
    assert count_pictures(tmp_path / "a.tif") <= 1


def test_colours_that_are_no_rgb_in_many_bits(tmp_path: Path) -> None:
    ink = np.full((4, 8, 8), 9000, np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", ink, photometric="separated", planarconfig="separate")
    with pytest.raises(ImageError, match=r"a\.tif: SEPARATED colours"):
        read_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_floats_that_are_no_picture(tmp_path: Path, kind: str) -> None:
    grey = picture()[..., 0] / 255
    odd = {"standardised": (grey - 0.5) / 0.2, "halves": grey * 2 - 1, "counts": grey * 6e4 * 9}
    for name, values in odd.items():
        if kind == "float32" or name != "counts":
            tifffile.imwrite(tmp_path / "a.tif", values.astype(kind), photometric="minisblack")
            with pytest.raises(ImageError, match="of the values lie outside of black and white"):
                read_rgb(tmp_path / "a.tif")
    noisy = np.where(grey > 0.6, grey, np.random.default_rng(0).normal(0, 0.02, grey.shape))
    tifffile.imwrite(tmp_path / "a.tif", noisy.astype(kind), photometric="minisblack")
    assert read_rgb(tmp_path / "a.tif").max() > 150


@pytest.mark.parametrize("order", ["contig", "separate"])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "uint16", "uint32"])
@pytest.mark.parametrize("colour", [True, False])
def test_tiff_of_any_number_type(tmp_path: Path, kind: str, colour: bool, order: str) -> None:
    pixels = picture()[..., : 3 if colour else 1]
    values = (pixels / 255.0 if kind.startswith("f") else pixels * 257.0).astype(kind)
    values = np.moveaxis(values, -1, 0) if order == "separate" else values
    shape = {"photometric": "rgb", "planarconfig": order} if colour else {"photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "a.tif", values if colour else values.squeeze(), compression="zlib", **shape)
    found = read_rgb(tmp_path / "a.tif")
    assert found.shape == (96, 96, 3)
    assert np.abs(found.astype(int) - pixels).max() <= 1


def test_tiff_with_alpha_and_with_too_many_channels(tmp_path: Path) -> None:
    values = np.ones((8, 8, 4), np.float32)
    values[:4, :, 3] = 0
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    assert read_rgb(tmp_path / "a.tif")[[0, 7], 0].tolist() == [[0, 0, 0], [255, 255, 255]]
    tifffile.imwrite(
        tmp_path / "b.tif", np.ones((8, 8, 7), np.float32), photometric="minisblack", planarconfig="contig"
    )
    with pytest.raises(ImageError, match=r"b\.tif: a TIFF of 7 channels"):
        read_rgb(tmp_path / "b.tif")


@pytest.mark.parametrize("kind", ["uint32", "int32"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_whole_numbers_of_more_than_16_bits_are_refused_not_cut_off(
    tmp_path: Path, kind: str, photometric: str
) -> None:
    grey = np.linspace(0.0, 1.0, 64).reshape(8, 8)
    for name, top in (("fits.tif", 65535), ("large.tif", np.iinfo(kind).max)):
        tifffile.imwrite(tmp_path / name, (grey * top).astype(kind), photometric=photometric)
    expected = grey if photometric == "minisblack" else 1 - grey
    assert np.abs(read_rgb(tmp_path / "fits.tif")[..., 0] / 255 - expected).max() < 0.01
    with pytest.raises(ImageError, match=r"large.tif: whole numbers outside of 0 to 65,535; save it with 16 bits"):
        read_rgb(tmp_path / "large.tif")


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", "float16"])
def test_white_is_zero(tmp_path: Path, kind: str) -> None:
    top = np.iinfo(kind).max if kind.startswith("u") else 1
    grey = np.linspace(0, 1, 64).reshape(8, 8)
    tifffile.imwrite(tmp_path / "a.tif", (grey * top).astype(kind), photometric="miniswhite")
    assert np.abs(read_rgb(tmp_path / "a.tif")[..., 0] - 255 * (1 - grey)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "avif", "tif", "float tif", "jpg draft"])
def test_orientation_turns_pixels_and_shape_alike(tmp_path: Path, orientation: int, kind: str) -> None:
    pixels = np.zeros((320, 480, 3), np.uint8)
    pixels[:64, :96, 0] = pixels[:64, 96:] = pixels[128:, :96] = 255
    path = tmp_path / f"a.{kind.split()[0] if kind != 'float tif' else 'tif'}"
    if kind == "float tif":
        tag = [(274, 3, 1, orientation, True)]
        tifffile.imwrite(path, (pixels / 255).astype(np.float16), photometric="rgb", extratags=tag)
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"tiffinfo": {274: orientation}} if kind == "tif" else {"exif": exif}
        Image.fromarray(pixels).save(path, **options)
    turns = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1)}
    turns |= {6: np.rot90(pixels, -1), 7: turns[5][::-1, ::-1], 8: np.rot90(pixels)}
    found, shape = read_sized_rgb(path, draft_side=64 if kind == "jpg draft" else 0)
    assert shape == turns[orientation].shape[:2]
    if kind == "jpg draft":
        assert found.shape[0] < shape[0]
        found = np.asarray(Image.fromarray(found).resize(shape[::-1]))
    assert np.abs(found.astype(int) - turns[orientation]).mean() < 6
    with contextlib.suppress(OSError), Image.open(path) as opened:
        assert pil_rgb(opened).shape[:2] == shape


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_that_cannot_be_written_back(tmp_path: Path, suffix: str) -> None:
    entries = [(0x112, 3, 1, struct.pack("<HH", 6, 0)), (0x100, 9, 1, struct.pack("<i", -5))]
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + b"\0" * 4
    path = save(tmp_path / f"a.{suffix}", picture(0, 40, 60), exif=exif)
    assert read_rgb(path).shape == (60, 40, 3)
    with Image.open(path) as opened:
        assert pil_rgb(opened).shape == (60, 40, 3)
    assert read_mask(path).shape == (60, 40)


@pytest.mark.parametrize("where", ["profile", "text", "late text", "xmp", "bad sum"])
def test_large_or_damaged_notes_in_a_png_do_no_harm(tmp_path: Path, where: str) -> None:
    info = PngImagePlugin.PngInfo()
    if where in ("text", "xmp"):
        info.add_itxt("XML:com.adobe.xmp" if where == "xmp" else "note", "x" * (2 << 20), zip=True)
    profile = {"icc_profile": b"\0" * (2 << 20)} if where == "profile" else {}
    path = save(tmp_path / "a.png", picture(), pnginfo=info, **profile)
    if where in ("late text", "bad sum"):
        body = b"note\0\0" + zlib.compress(b"x" * (2 << 20)) if where == "late text" else b"note\0x"
        chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
        chunk = chunk[:-1] + b"?" if where == "bad sum" else chunk
        raw = path.read_bytes()
        path.write_bytes(raw[:33] + chunk + raw[33:] if where == "bad sum" else raw[:-12] + chunk + raw[-12:])
    assert np.array_equal(read_rgb(path), picture())


@pytest.mark.parametrize("kind", ["gAMA", "pHYs", "cHRM", "sRGB", "tIME", "bKGD", "sBIT"])
def test_damaged_numbers_in_a_png_that_no_pixel_needs_do_no_harm(tmp_path: Path, kind: str) -> None:
    raw = save(tmp_path / "a.png", picture()).read_bytes()
    for body, spoilt in ((b"\0", 0), (b"\0\0\xb1\x8f", 1)):  # too short; of a wrong sum
        name = kind.encode()
        crc = zlib.crc32(name + body) ^ spoilt
        (tmp_path / "a.png").write_bytes(
            raw[:33] + struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc) + raw[33:]
        )
        assert np.array_equal(read_rgb(tmp_path / "a.png"), picture())


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
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp", "gif", "jp2", "avif"])
def test_truncated_files_name_themselves(tmp_path: Path, suffix: str, keep: float) -> None:
    whole = save(tmp_path / f"w.{suffix}", picture()).read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(ImageError, match=rf"cut\.{suffix}: "):
        read_rgb(cut)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif", "bmp", "jp2", "avif"])
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
                assert read_rgb(path, max_pixels=1_000_000).ndim == 3


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    with pytest.raises(ImageError, match=r"empty\.png: the file is empty \(0 bytes\); copy it again"):
        read_rgb(empty)
    text = tmp_path / "text.png"
    text.write_text("hello")
    with pytest.raises(ImageError, match=r"text\.png: not an image that can be read; accepted: PNG, JPEG, TIFF, "):
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


def test_a_jpeg_that_a_phone_calls_heic_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "IMG_1.jpg", picture()).rename(tmp_path / "IMG_1.HEIC")
    assert is_image(path)
    assert read_rgb(path).shape == (96, 96, 3)


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
    with pytest.raises(ImageError, match=r"m\.png: mask: not an image that can be read"):
        read_mask(tmp_path / "m.png")


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif", "jp2", "tif"])
def test_masks_in_formats_that_change_values(tmp_path: Path, suffix: str) -> None:
    y, x = np.mgrid[:256, :256]
    truth = (x - 128) ** 2 + (y - 128) ** 2 < 900
    lossy = {"jp2": {"quality_layers": [20], "irreversible": True}, "tif": {"compression": "jpeg"}}
    path = save(tmp_path / f"m.{suffix}", truth.astype(np.uint8) * 255, **lossy.get(suffix, {"quality": 75}))
    assert abs(int(read_mask(path).sum()) - int(truth.sum())) < 0.03 * truth.sum()
    empty = save(tmp_path / f"e.{suffix}", np.zeros((64, 64), np.uint8), **lossy.get(suffix, {"quality": 75}))
    assert not read_mask(empty).any()


def test_masks_turned_by_their_exif_in_floats_and_without_loss(tmp_path: Path) -> None:
    truth = np.zeros((20, 30), np.uint8)
    truth[2:5, 3:9] = 1
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "m.png", truth, exif=exif)
    assert np.array_equal(read_mask(tmp_path / "m.png"), np.rot90(truth, -1) > 0)
    save(tmp_path / "m.webp", truth, lossless=True)
    assert np.array_equal(read_mask(tmp_path / "m.webp"), truth > 0)
    for kind in ("float16", "float32", "int16"):
        values = truth.astype(kind)
        values[0, 0] = -1
        tifffile.imwrite(tmp_path / "m.tif", values)
        assert np.array_equal(read_mask(tmp_path / "m.tif"), truth > 0), kind
    save(tmp_path / "m.png", truth)
    save(tmp_path / "m.png", truth, icc_profile=b"\0" * (2 << 20))
    assert np.array_equal(read_mask(tmp_path / "m.png"), truth > 0)


def test_words_for_what_people_give_instead(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(ImageError, match=r"a\.jpg: a HEIC picture, and HEIC is not read; save it as JPEG or PNG"):
        read_rgb(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_text("<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(ImageError, match="was a web page saved in place of the image"):
        read_rgb(tmp_path / "b.png")


def test_limits_are_the_callers() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "PNG")
    with pytest.raises(ImageError, match="image bytes: 96 x 96 pixels are more than the limit of 1,000"):
        read_rgb(buffer.getvalue(), max_pixels=1000)
