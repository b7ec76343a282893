"""Hostile input, made from seeds: damaged picture files, and how many inputs each fuzz test tries.

``TWINSPECT_FUZZ=20`` makes it twenty times as many; the inputs of a number are always the same.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import tifffile
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

FACTOR = int(os.environ.get("TWINSPECT_FUZZ", "1"))
TRIED: Counter[str] = Counter()  # inputs by test; tests/conftest.py prints them
Edit = tuple[int, int, int]
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_PNG = b"\x89PNG\r\n\x1a\n"


def inputs(count: int) -> settings:
    """Settings of a test that tries so many inputs: no clock, no memory of earlier runs, always the same inputs."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=count * FACTOR, derandomize=True, deadline=None, database=None, suppress_health_check=slow
    )


def tried(test: str, count: int = 1) -> None:
    """Count inputs for the summary at the end of a run."""
    TRIED[test] += count


def in_words(error: Exception, name: str = "") -> None:
    """A refusal is one that a person can act on: it names what it refuses and says something of it."""
    assert name in str(error)
    assert len(str(error)) > len(name) + 10


# ------------------------------------------------------------------------------------------ whole files


def pixels(height: int = 20, width: int = 26, channels: int = 3) -> np.ndarray:
    """Noise over a gradient: no part of it is like another, so that damage shows."""
    rng = np.random.default_rng(height * width * channels)
    ramp = np.linspace(40, 180, height)[:, None, None] + np.linspace(0, 40, width)[None, :, None]
    return (ramp + rng.normal(0, 12, (height, width, channels))).clip(0, 255).astype(np.uint8).squeeze()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """One file, in memory."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tiff(values: np.ndarray, **options: Any) -> bytes:
    """One TIFF by tifffile, which writes what Pillow cannot."""
    out = io.BytesIO()
    tifffile.imwrite(out, values, **options)
    return out.getvalue()


@cache
def whole_files() -> dict[str, bytes]:
    """Small files that can be read: every format, and the kinds of it that have a code path of their own."""
    rgb = Image.fromarray(pixels())
    grey, frames = rgb.convert("L"), [Image.fromarray(pixels() // k) for k in (2, 3)]
    clear = rgb.copy()
    clear.putalpha(grey)
    deep = pixels().astype(np.uint16)[..., 0] * 200
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a part"
    notes = PngImagePlugin.PngInfo()
    notes.add_text("note", "x" * 60)
    notes.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>", zip=True)
    found = {
        "rgb.png": encoded(rgb, "PNG", pnginfo=notes, exif=exif), "grey.png": encoded(grey, "PNG"),
        "bit.png": encoded(rgb.convert("1"), "PNG"), "palette.png": encoded(rgb.convert("P"), "PNG"),
        "clear.png": encoded(clear, "PNG", icc_profile=b"p" * 200), "deep.png": encoded(Image.fromarray(deep), "PNG"),
        "greyalpha.png": encoded(clear.convert("LA"), "PNG"),
        "clear palette.png": encoded(rgb.convert("P"), "PNG", transparency=3),
        "moving.png": encoded(rgb, "PNG", save_all=True, append_images=frames),
        "rgb.jpg": encoded(rgb, "JPEG", exif=exif), "grey.jpg": encoded(grey, "JPEG"),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True, icc_profile=b"p" * 500),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"), "large.jpg": encoded(rgb.resize((400, 300)), "JPEG"),
        "pair.mpo": encoded(rgb, "MPO", save_all=True, append_images=frames),
        "rgb.bmp": encoded(rgb, "BMP"), "palette.bmp": encoded(rgb.convert("P"), "BMP"),
        "rgb.dib": encoded(rgb, "DIB"), "rgb.gif": encoded(rgb, "GIF"),
        "moving.gif": encoded(rgb, "GIF", save_all=True, append_images=frames, duration=9),
        "lossy.webp": encoded(rgb, "WEBP", exif=exif), "lossless.webp": encoded(clear, "WEBP", lossless=True),
        "moving.webp": encoded(rgb, "WEBP", save_all=True, append_images=frames),
        "rgb.ppm": encoded(rgb, "PPM"), "grey.pgm": encoded(grey, "PPM"), "bit.pbm": encoded(rgb.convert("1"), "PPM"),
        "float.pfm": encoded(Image.fromarray(pixels()[..., 0].astype(np.float32)), "PPM"),
        "text.ppm": b"P3 4 3 255\n" + b" ".join(str(v).encode() for v in range(36)),
        "rgb.jp2": encoded(rgb, "JPEG2000"), "rgb.avif": encoded(rgb, "AVIF", speed=10),
        "plain.tif": encoded(rgb, "TIFF"), "lzw.tif": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "jpeg.tif": encoded(rgb, "TIFF", compression="jpeg"), "fax.tif": encoded(rgb.convert("1"),
        "TIFF", compression="group4"),
        "cmyk.tif": encoded(rgb.convert("CMYK"), "TIFF"), "lab.tif": encoded(Image.new("LAB", (26, 20), (90, 9, 9)),
        "TIFF"),
        "int32.tif": encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "turned.tif": encoded(rgb, "TIFF", tiffinfo={274: 6}),
        "deep.tif": tiff(deep, photometric="miniswhite"), "deep colour.tif": tiff(pixels().astype(np.uint16) * 200),
        "half.tif": tiff((pixels() / 255).astype(np.float16), photometric="rgb", compression="zlib"),
        "float.tif": tiff((pixels()[..., 0] / 255).astype(np.float32)),
        "double.tif": tiff(pixels()[..., 0] / 255, photometric="minisblack"),
        "planes.tif": tiff(np.moveaxis(pixels(), -1, 0), photometric="rgb", planarconfig="separate"),
        "tiles.tif": tiff(pixels(64, 64), photometric="rgb", tile=(32, 32), compression="zlib"),
        "big.tif": tiff(pixels(), photometric="rgb", bigtiff=True),
        "motorola.tif": tiff(pixels(), photometric="rgb", byteorder=">"),
        "pages.tif": tiff(np.stack([pixels()] * 3), photometric="rgb"),
    }  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------- damage


def edits(most: int = 4) -> st.SearchStrategy[list[Edit]]:
    """What is done to a file: (kind, place, value) each, read by `damaged`."""
    return st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 1 << 20), st.integers(0, 1 << 16)), min_size=1, max_size=most
    )


def damaged(raw: bytes, changes: list[Edit], other: bytes = b"") -> bytes:
    """A file after some edits: cut, changed bytes and numbers, parts left out, doubled, moved or from elsewhere."""
    found = bytearray(raw)
    for kind, where, value in changes:
        if not found:
            break
        # Half of all edits go to the head, where sizes, offsets and types are.
        place = where // 2 % min(len(found), 200) if where % 2 else where // 2 % len(found)
        length = 1 + value % 64
        number = _NUMBERS[value % len(_NUMBERS)]
        if kind == 0:
            del found[place:]
        elif kind in (1, 2):
            found[place] = value & 0xFF
        elif kind == 3:
            found[place] ^= 1 << value % 8
        elif kind == 4:
            found[place : place + 4] = struct.pack(">I" if value & 1 else "<I", number)
        elif kind == 5:
            found[place : place + 2] = struct.pack(">H" if value & 1 else "<H", number & 0xFFFF)
        elif kind == 6:
            del found[place : place + length]
        elif kind == 7:
            found[place:place] = found[place : place + length]
        else:
            found[place:place] = other[value % max(len(other), 1) :][:length]
    return bytes(found)


# ---------------------------------------------------------------------------------------------- corpus


def chunk(kind: bytes, data: bytes, wrong_sum: bool = False) -> bytes:
    """One chunk of a PNG."""
    total = zlib.crc32(kind + data) ^ wrong_sum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", total)


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of a header and any chunks."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return _PNG + head + b"".join(chunks) + chunk(b"IEND", b"")


def _with_chunk(raw: bytes, *extra: bytes) -> bytes:
    return raw[:33] + b"".join(extra) + raw[33:]


def _ifd(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    """A classic little-endian TIFF with one directory of (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + struct.pack("<I", following)


def _tiff_of(width: int, height: int, *more: tuple[int, int, int, int], bits: int = 8, following: int = 0) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 1000)]  # fmt: skip
    own = {tag for tag, *_ in more}
    return _ifd(sorted([*(t for t in tags if t[0] not in own), *more]), following) + bytes(1200)


def _segment(raw: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment behind its first two bytes."""
    return raw[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + raw[2:]


def _bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def bombs() -> dict[str, bytes]:
    """Small files that claim, or unpack to, more than any memory has."""
    zeros = zlib.compress(bytes(50_000_000), 9)
    names = {
        f"bomb {w}x{h}.png": png(w, h, chunk(b"IDAT", zeros[:4000])) for w, h in
        ((20_000, 20_000), (65_535, 65_535), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (2**31 - 1, 1),
        (10_001, 10_000), (0, 0))
    }  # fmt: skip
    names |= {
        f"bomb {w}x{h} {bits}.tif": _tiff_of(w, h, bits=bits) for w, h, bits in
        ((40_000, 40_000, 8), (2**32 - 1, 2**32 - 1, 8), (9_999, 9_999, 64), (2**31, 2, 16), (0, 5, 8), (5, 0, 8))
    }  # fmt: skip
    names |= {
        "bomb text.png": png(9, 9, chunk(b"zTXt", b"c\0\0" + zeros)), "bomb profile.png": png(9, 9, chunk(b"iCCP",
        b"c\0\0" + zeros)),
        "bomb itxt.png": png(9, 9, chunk(b"iTXt", b"c\0\1\0\0\0" + zeros)),
        "bomb data.png": png(9, 9, chunk(b"IDAT", zeros)),
        "bomb.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
        + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x16" + bytes(22) + b"\0;",
        "bomb.bmp": _bmp(60_000, 60_000),
        "bomb negative.bmp": _bmp(-5, -(2**31)),
        "bomb.ppm": b"P6 99999 99999 255\n" + bytes(100), "bomb digits.ppm": b"P6 " + b"9" * 5000 + b" 1 255\n",
        "bomb.jpg": whole_files()["rgb.jpg"].replace(struct.pack(">HH", 20, 26), struct.pack(">HH", 65_500, 65_500)),
        "bomb.webp": b"RIFF"
        + struct.pack("<I", 40) + b"WEBPVP8X" + struct.pack("<II", 10, 0x10) + b"\xff" * 6 + bytes(12),
        "bomb.jp2": whole_files()["rgb.jp2"].replace(struct.pack(">II", 20, 26),
        struct.pack(">II", 2**31 - 1, 2**31 - 1)),
        "bomb channels.tif": _tiff_of(5000, 5000, (277, 3, 1, 65_535)),
        "bomb depth.tif": _tiff_of(3000, 3000, (32_997, 4, 1, 100_000)),
        "bomb strips.tif": _tiff_of(100, 100, (273, 4, 2**31, 8)), "bomb tag.tif": _tiff_of(50, 50,
        (270, 2, 2**32 - 1, 8)),
        "bomb doubles.tif": _tiff_of(9_999, 9_999, (258, 3, 1, 64), (339, 3, 1, 3), (277, 3, 1, 1)),
        "bomb packed.tif": tiff(np.zeros((9_000, 9_000), np.float16), compression="zlib"),
    }  # fmt: skip
    return names


def oddities() -> dict[str, bytes]:
    """Files that are strange rather than damaged: huge or wrong notes, loops, odd modes, two kinds in one."""
    whole = whole_files()
    jpg, rgb, tif = whole["rgb.jpg"], whole["rgb.png"], whole["plain.tif"]
    loop = struct.pack("<I", 8)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("../../evil.sh", "rm -rf /")
    exifs = {
        "empty": b"", "short": b"Exif\0\0", "no order": b"Exif\0\0XX*\0\x08\0\0\0",
        "far": b"Exif\0\0II*\0" + b"\xff" * 4,
        "loop": b"Exif\0\0II*\0\x08\0\0\0\0\0" + loop, "many": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(3000),
        "orientation 0": b"Exif\0\0" + _ifd([(274, 3, 1, 0)]),
        "orientation 99": b"Exif\0\0" + _ifd([(274, 3, 1, 99)]),
        "orientation text": b"Exif\0\0" + _ifd([(274, 2, 4, 0x41414141)]),
        "orientation two": b"Exif\0\0" + _ifd([(274, 3, 2, 0x00060003)]),
        "orientation fraction": b"Exif\0\0" + _ifd([(274, 5, 1, 8)]),
        "inner loop": b"Exif\0\0" + _ifd([(0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8)]),
        "noise": b"Exif\0\0" + np.random.default_rng(0).bytes(2000),
    }  # fmt: skip
    found = {f"exif {name}.jpg": _segment(jpg, 0xE1, body) for name, body in exifs.items()}
    found |= {f"exif {name}.png": _with_chunk(rgb, chunk(b"eXIf", body[6:])) for name, body in exifs.items()}
    notes = {
        "xmp": (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<x" * 20_000), "icc": (0xE2,
        b"ICC_PROFILE\0\x01\x01" + b"?" * 60_000),
        "icc short": (0xE2, b"ICC_PROFILE\0\xff"), "photoshop": (0xED, b"Photoshop 3.0\x008BIM" + b"\xff" * 40),
        "adobe": (0xEE, b"Adobe\0"), "comment": (0xFE, b"\xff\xd8\xff" * 20_000), "mpf": (0xE2,
        b"MPF\0II*\0" + b"\xff" * 8),
    }  # fmt: skip
    found |= {f"note {name}.jpg": _segment(jpg, *body) for name, body in notes.items()}
    found |= {
        "wrong sum.png": _with_chunk(rgb, chunk(b"tEXt", b"a\0b", True)),
        "two heads.png": _with_chunk(rgb, rgb[8:33]),
        "unknown chunk.png": _with_chunk(rgb, chunk(b"ABCD", b"x" * 99)),
        "no name.png": _with_chunk(rgb, chunk(b"\0\0\0\0", b"")),
        "long text.png": _with_chunk(rgb, chunk(b"tEXt", b"a\0" + b"x" * 2_000_000)),
        "gamma.png": _with_chunk(rgb, chunk(b"gAMA", b"")), "suggested.png": _with_chunk(rgb, chunk(b"cHRM", b"1")),
        "transparency.png": _with_chunk(rgb, chunk(b"tRNS", b"\0")), "frames.png": _with_chunk(rgb, chunk(b"acTL",
        b"\xff" * 8)),
        "depth 3.png": png(9, 9, depth=3), "colour 7.png": png(9, 9, colour=7), "head only.png": rgb[:33],
        "magic only.png": _PNG,
        "next is self.tif": _tiff_of(20, 20, following=8), "next is far.tif": _tiff_of(20, 20, following=2**32 - 1),
        "no entries.tif": b"II*\0\x08\0\0\0\0\0\0\0\0\0", "no directory.tif": b"II*\0\0\0\0\0",
        "magic only.tif": b"MM\0*",
        "magic only.big.tif": b"II+\0\x08\0\0\0" + b"\xff" * 8, "odd bits.tif": _tiff_of(20, 20, bits=13),
        "bits 0.tif": _tiff_of(20, 20, bits=0), "compression 9.tif": _tiff_of(20, 20, (259, 3, 1, 999)),
        "rows 0.tif": _tiff_of(20, 20, (278, 4, 1, 0)), "photometric.tif": _tiff_of(20, 20, (262, 3, 1, 32_803)),
        "orientation 9.tif": _tiff_of(20, 20, (274, 3, 1, 9)), "predictor.tif": _tiff_of(20, 20, (317, 3, 1, 77)),
        "complex.tif": tiff(np.ones((20, 20), np.complex64)),
        "channels 9.tif": tiff(np.ones((20, 20, 9), np.uint8), photometric="minisblack", planarconfig="contig"),
        "volume.tif": tiff(np.ones((9, 20, 20), np.uint8), photometric=0, volumetric=True, tile=(16, 16, 16)),
        "not a number.tif": tiff(np.full((20, 20), np.nan, np.float32)),
        "infinite.tif": tiff(np.full((20, 20), np.inf, np.float32)),
        "nothing finite.tif": tiff(np.full((20, 20, 3), -np.inf, np.float16), photometric="rgb"),
        "signed.tif": tiff(np.full((20, 20), -5, np.int16)),
        "large numbers.tif": tiff(np.full((20, 20), 2**40, np.uint64)),
        "one pixel.png": encoded(Image.new("RGB", (1, 1)), "PNG"), "line.png": encoded(Image.new("L", (5000, 2)),
        "PNG"),
        "luma.jpg": encoded(Image.new("YCbCr", (9, 9)), "JPEG"),
        "and zip.png": rgb + packed.getvalue(), "and html.jpg": jpg + b"<html><script>alert(1)</script>",
        "and script.gif": whole["rgb.gif"] + b"/**/=1;alert(1)", "and tiff.png": rgb + tif,
        "html.png": b"<!DOCTYPE html><html>",
        "zip.jpg": packed.getvalue(), "elf.png": b"\x7fELF" + bytes(300),
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n(w) file",
        "pdf.png": b"%PDF-1.4\n%%EOF", "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "mark.png": b"\xef\xbb\xbf" + rgb,
        "heic.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "empty.png": b"", "zero.png": b"\0",
        "zeros.jpg": bytes(4096),
        "text mode.png": rgb.replace(b"\r\n", b"\n"), "line ends.png": rgb.replace(b"\n", b"\r\n"),
        "lfs.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
        "json.jpg": b'{"error": "not found"}', "base64.png": b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ",
    }  # fmt: skip
    return found


def corpus() -> Iterator[tuple[str, bytes]]:
    """Hostile files, each with a name of its own: every whole file damaged in every simple way, bombs, oddities."""
    whole = whole_files()
    ways: dict[str, Callable[[bytes], bytes]] = {
        "cut": lambda raw: raw[: len(raw) // 2], "tail": lambda raw: raw[: max(len(raw) - 9, 1)],
        "head": lambda raw: raw[:40],
        "hole": lambda raw: raw[: len(raw) // 2] + bytes(64) + raw[len(raw) // 2 + 64 :],
        "magic": lambda raw: b"\xff\xd8\xff\xe0" + raw[4:], "doubled": lambda raw: raw + raw,
        "shift": lambda raw: raw[:20] + b"\0" + raw[20:],
    }  # fmt: skip
    for number, (name, raw) in enumerate(whole.items()):
        stem, _, ending = name.rpartition(".")
        for way, change in ways.items():
            yield f"{stem} {way}.{ending}", change(raw)
        rng = np.random.default_rng(number)
        flips = [(3, int(place), int(bit)) for place, bit in rng.integers(0, 1 << 16, (12, 2))]
        yield f"{stem} flips.{ending}", damaged(raw, flips)
    yield from bombs().items()
    yield from oddities().items()
