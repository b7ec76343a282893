"""Decode one image file to 8-bit RGB, the same way for training, prediction and serving.

No torch here: a light runtime reads images with this file alone. Geometry rule: nothing is ever
cropped. The model resizes the whole image to its own square input, and maps are resized back.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from twinspect.errors import ImageError

MOST_PIXELS = 100_000_000  # width times height, checked on the header before any pixel is decoded
MOST_BYTES = 1 << 30  # longest file that is read into memory at all
_LEAST_SIDE = 2  # shortest side in pixels that still makes sense to score
_OPENING = threading.Lock()
_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_OVERSHOOT = 0.05  # of floats beyond 0 and 1, as interpolation and gain leave them; they are clipped
# The file formats of the endings below. Pillow knows dozens more, and some of them start programs (EPS) or are
# meant for other things than photographs; whatever an upload calls itself, they are refused.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "PPM", "GIF", "JPEG2000", "AVIF")
ACCEPTED = "PNG, JPEG, TIFF, BMP, WebP, GIF, PPM, JPEG 2000, AVIF"  # for messages
SUFFIXES = frozenset(  # HEIC is not read, but phones and chats also call a JPEG so
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .bmp .dib .tif .tiff .webp .ppm .pgm .pbm .pnm .pfm .gif .jp2 .j2k .jpx "
    ".avif .heic .heif .hif".split()
)
SEVERAL_SUFFIXES = frozenset({".tif", ".tiff", ".gif", ".webp", ".apng", ".avif"})  # may hold several pictures
# Pictures and volumes that people have and that are not read: worth other words than "not an image file".
UNREAD_SUFFIXES = frozenset(
    ".jxl .dng .cr2 .cr3 .nef .arw .raw .psd .exr .hdr .svg .ico .tga .pcx .dcm .dicom .nii .czi "
    ".lif .nd2 .npy .npz .pdf".split()
)
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
_PHOTOMETRIC, _BITS, _PLANES = 262, 258, 284  # TIFF tags; 0 means that white is zero, 2 one plane for each channel
_GREY_OR_RGB = (0, 1, 2)  # values of the first of them
_MANY = 0.02  # of an image's values: more than ringing at edges and noise around zero
_BLOCK = 1 << 22  # values that become 8 bits at a time
_RINGING = 8  # of 255: what black becomes at most in a format that changes values
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NOTES = frozenset(  # chunks that no pixel depends on: of colour profiles, texts and printers
    b"iCCP gAMA cHRM sRGB cICP pHYs tIME bKGD hIST sPLT sBIT tEXt zTXt iTXt".split()
)
_PNG_TURNS = (b"Raw profile type ", b"XML:com.adobe.xmp")  # texts that may hold EXIF
_GREY_MODES = ("1", "L", "LA", "La")  # of Pillow, with 8 bits or fewer
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange height and width


def is_image(path: Path | str) -> bool:
    """Whether the name looks like an image and is not a hidden file (``._x.jpg`` from other systems)."""
    name = os.path.basename(path)  # a Path for every string would be most of the time that listing a folder takes
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def read_rgb(
    source: Path | bytes, max_pixels: int = MOST_PIXELS, name: str = "", draft_side: int = 0
) -> NDArray[np.uint8]:
    """Decode a file or its bytes to an H x W x 3 array of 8-bit RGB.

    EXIF rotation is applied; more than 8 bits become 8 by `eight_bit`; palettes, CMYK and alpha become RGB (alpha
    over black); of an animation, or a TIFF of several pages, the first picture counts. ``draft_side`` > 0 lets a
    JPEG be decoded at a half, quarter or eighth of its size as long as the short side stays at least that long.
    An ImageError says what was found instead of an image, and what to do about it.
    """
    return read_sized_rgb(source, max_pixels, name, draft_side)[0]


def read_sized_rgb(
    source: Path | bytes, max_pixels: int = MOST_PIXELS, name: str = "", draft_side: int = 0
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """As `read_rgb`, with the (height, width) of the whole image: a draft has fewer pixels than that."""
    label = name or (str(source) if isinstance(source, Path) else "image bytes")
    with _picture(source, label, max_pixels) as picture:
        if not isinstance(picture, Image.Image):
            rgb = _values_to_rgb(picture, label)
            return rgb, (rgb.shape[0], rgb.shape[1])
        width, height = picture.size
        if draft_side > 0:
            scale = min(draft_side / min(width, height), 1.0)
            picture.draft("RGB", (round(width * scale), round(height * scale)))
        drafted = picture.size != (width, height)
        sideways = drafted and _orientation(picture) in _SIDEWAYS
        rgb = _to_rgb(picture, label)
        # A TIFF turns itself while it is decoded, so that its header's size is not to be trusted.
        shape = ((width, height) if sideways else (height, width)) if drafted else (rgb.shape[0], rgb.shape[1])
        return rgb, shape


def read_header(path: Path) -> tuple[tuple[int, int], bool]:
    """(height, width) of an image file as it is shown, and whether it is a grey one; no pixel is decoded.

    Raises as `read_rgb`.
    """
    with _picture(path, str(path)) as picture:
        if not isinstance(picture, Image.Image):
            return (picture.shape[0], picture.shape[1]), picture.ndim == 2
        width, height = picture.size
        shape = (width, height) if _orientation(picture) in _SIDEWAYS else (height, width)
        return shape, picture.mode in _GREY_MODES or _is_deep(picture)


def pil_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """A PIL image to H x W x 3 RGB, by the same rules as its file; raises as `read_rgb`."""
    label = "PIL image"
    with _refusals(label):
        _check_size(image.size, label)
        return _to_rgb(image, label)


def array_rgb(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Pixels in memory to H x W x 3 RGB, by the rules of files: 16 bits by their full range, alpha over black.

    ``values`` are H x W, H x W x C or C x H x W, where C is 1 (grey), 3 (RGB) or 4 (RGBA): uint8, uint16, or floats
    from 0 to 1. Anything else is an ImageError that says what to type.
    """
    layers = values[..., None] if values.ndim == 2 else values
    if layers.ndim == 3 and layers.shape[2] not in _CHANNELS and layers.shape[0] in _CHANNELS:
        layers = np.moveaxis(layers, 0, -1)
    if layers.ndim != 3 or layers.shape[2] not in _CHANNELS or min(layers.shape[:2]) < _LEAST_SIDE:
        raise ImageError(
            f"array of shape {values.shape}; accepted H x W (grey), H x W x C or C x H x W, where C is 1 (grey), "
            f"3 (RGB) or 4 (RGBA), at least {_LEAST_SIDE} pixels per side; a stack of images has four dimensions"
        )
    kind = values.dtype
    if kind not in (np.uint8, np.uint16) and kind.kind != "f":
        advice = {"b": "a.astype('uint8') * 255", **dict.fromkeys("iu", "a.astype('uint8') if a is within 0..255")}
        type_it = f", so type: {advice[kind.kind]}" if kind.kind in advice else ""
        raise ImageError(f"array of type {kind}; accepted uint8, uint16, or floats from 0 to 1{type_it}")
    low, high = (float(values.min()), float(values.max())) if kind.kind == "f" else (0.0, 1.0)
    if not (-_OVERSHOOT <= low and high <= 1 + _OVERSHOOT):  # not a number is refused as well
        raise ImageError(
            f"array of type {kind} with values from {low:g} to {high:g}; accepted floats from 0 to 1, so type: "
            "a / 255 if a is within 0..255, and undo any normalisation"
        )
    return _values_to_rgb(layers, "array")


def read_mask(path: Path) -> NDArray[np.bool_]:
    """Decode a ground-truth mask to H x W booleans; any value above zero is defect. Raises as `read_rgb`.

    Of a palette mask the index counts, not its colour: index 0 is the background, as annotation tools write it. Of a
    mask in a format that changes values (JPEG and such), half of its largest value counts: it rings around edges.
    """
    values, exact = read_mask_values(path)
    if values.ndim == 3 and values.shape[2] in (2, 4):
        values = values[..., :-1]  # alpha says nothing about the defect
    largest = values if values.ndim == 2 else values.max(axis=2)
    return np.asarray(largest > (0 if exact else max(largest.max() / 2, _RINGING)), dtype=np.bool_)


def read_mask_values(path: Path) -> tuple[NDArray[Any], bool]:
    """A mask's own values, upright, H x W or H x W x channels, and whether its format keeps values exactly."""
    with _picture(path, f"{path}: mask") as picture:
        if not isinstance(picture, Image.Image):
            return picture, True
        changes = picture.format in ("JPEG", "MPO", "JPEG2000", "AVIF")
        changes |= picture.info.get("compression") in ("jpeg", "webp")
        if picture.format == "WEBP":
            stream: Any = picture.fp  # type: ignore[attr-defined]  # closed once the pixels are decoded
            changes = b"VP8L" not in stream.getvalue()[:4096]
        return _values(picture), not changes


def eight_bit(values: NDArray[Any], label: str = "image") -> NDArray[np.uint8]:
    """Values of any type to 8 bits, by a window that does not follow the image's own range.

    Images of one camera must stay comparable, so integers of more than 8 bits are divided by 257 (the 16-bit range).
    Floats lie in 0 to 1, 0 to 255 or 0 to 65,535, whichever holds all but the few largest values; a little
    overshoot (interpolation, gain) and single hot pixels do not change the range. What is not a number is 0. An
    ImageError refuses values of which nothing says what is black and white.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind in "iu" and values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise ImageError(f"{label}: whole numbers outside of 0 to 65,535; save it with 16 bits, or as floats 0 to 1")
    scale = _float_scale(values) if values.dtype.kind == "f" else 1 / 257
    eight, outside = np.empty(values.shape, np.uint8), 0
    rows = max(1, _BLOCK * len(values) // max(values.size, 1))
    for start in range(0, len(values), rows):  # the whole image would be there four times, with eight bytes a value
        scaled = values[start : start + rows].astype(np.float64) * scale
        eight[start : start + rows] = np.fmin(np.fmax(scaled, 0), 255).round()  # not a number: 0
        outside += int((((scaled < -255 * _OVERSHOOT) | (scaled > 510)) & np.isfinite(scaled)).sum())
    if outside > _MANY * values.size:
        raise ImageError(
            f"{label}: {outside / values.size:.0%} of the values lie outside of black and white, which for floats "
            "are 0 and 1, 255 or 65,535; undo any normalisation, or save it as floats from 0 to 1"
        )
    return eight


def resize_rgb(rgb: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize H x W x 3 to size x size with an antialiased bilinear filter; the aspect is not kept."""
    if rgb.shape[:2] == (size, size):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BILINEAR))


def made_up_rgb(rng: np.random.Generator, side: int) -> NDArray[np.uint8]:
    """A picture where none is given, side x side x 3: soft colours under the noise of a sensor."""
    soft = resize_rgb(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), side)
    return (soft + rng.normal(0, 4, soft.shape)).clip(0, 255).astype(np.uint8)


def count_pictures(path: Path) -> int:
    """How many pictures a file of a format that can hold several holds; 1 for any other, and for a damaged one."""
    suffix = path.suffix.lower()
    with suppress(Exception):  # whoever reads the file says what is wrong with it
        if suffix in (".tif", ".tiff"):
            with _tifffile("").TiffFile(path) as file:
                # Counted first: iterating goes round for ever where a damaged page leads back to itself.
                places = range(len(file.pages))
                return sum(not file.pages[place].is_reduced for place in places)  # smaller copies of a page are none
        if suffix in SEVERAL_SUFFIXES:
            with Image.open(path, formats=_FORMATS) as image:
                return int(getattr(image, "n_frames", 1))
    return 1


@contextmanager
def _picture(source: Path | bytes, label: str, max_pixels: int = MOST_PIXELS) -> Iterator[Image.Image | NDArray[Any]]:
    """A file or its bytes, opened and of an accepted size; a kind of TIFF that Pillow lacks comes as its values."""
    raw = file_bytes(source, label) if isinstance(source, Path) else source
    if not raw:
        raise ImageError(f"{label}: the file is empty (0 bytes); copy it again from its source")
    with _refusals(label, raw):
        opened = _opened(raw)
        if opened is None:
            yield _tiff_values(raw, label, max_pixels)
            return
        with opened as image:
            _check_size(image.size, label, max_pixels)
            yield image


def file_bytes(path: Path, label: str = "") -> bytes:
    """Content of a plain file; a device or pipe would be read for ever, and a giant would fill the memory."""
    label = label or str(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ImageError(f"{label}: not a plain file; pipes and devices are not read")
        if status.st_size > MOST_BYTES:
            raise ImageError(f"{label}: {status.st_size:,} bytes; files above {MOST_BYTES:,} are not read")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{label}: cannot be opened ({error.strerror or error})") from None


@contextmanager
def _refusals(label: str, raw: bytes = b"") -> Iterator[None]:
    """What a bad file raises becomes an ImageError that names it: Pillow's plug-ins raise nearly anything."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{label}: {_unread(raw)}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{label}: more than {MOST_PIXELS:,} pixels; resize it or cut it into tiles") from None
    except Exception as error:
        raise ImageError(f"{label}: damaged or truncated image ({error}); copy it again from its source") from None


def _unread(raw: bytes) -> str:
    if raw[4:8] == b"ftyp" and raw[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        return "a HEIC picture, and HEIC is not read; save it as JPEG or PNG"
    if raw.lstrip()[:1] == b"<":
        return "text (HTML, XML or SVG), and not an image; was a web page saved in place of the image?"
    return f"not an image that can be read; accepted: {ACCEPTED}"


def _opened(raw: bytes) -> Image.Image | None:
    """Bytes as an image whose header was read; None for a TIFF of a kind that Pillow lacks."""
    # Our own limit, checked on the header, replaces Pillow's warning at 89 Mpx. The lock is for threads that
    # decode at the same time: filters are global, and catch_warnings would restore each other's.
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            opened = Image.open(io.BytesIO(_without_notes(raw)), formats=_FORMATS)
            tags: Any = getattr(opened, "tag_v2", {})
            uncompressed = opened.info.get("compression", "raw") == "raw"
            # Of planes with more than 8 bits that are not compressed, Pillow makes other pixels.
            misread = tags.get(_PLANES) == 2 and max(tags.get(_BITS, (8,))) > 8 and uncompressed
            return None if misread else opened
        except Exception:
            if raw[:4] in _TIFF:
                return None
            if raw[:8] != _PNG:
                raise
            return Image.open(io.BytesIO(_without_notes(raw, texts_that_turn=False)), formats=_FORMATS)


def _without_notes(raw: bytes, texts_that_turn: bool = True) -> bytes:
    """A PNG without what no pixel depends on: Pillow refuses the file for a damaged or very large note."""
    if raw[:8] != _PNG:
        return raw
    chunks, place = [_PNG], 8
    while place + 8 <= len(raw):
        length = int.from_bytes(raw[place : place + 4], "big")
        kind, start, end = raw[place + 4 : place + 8], place + 8, place + 12 + length
        if kind not in _PNG_NOTES or (texts_that_turn and raw[start : start + 17] in _PNG_TURNS):
            chunks.append(raw[place:end])
        place = end
    return b"".join(chunks)


def _tiff_values(raw: bytes, label: str, max_pixels: int) -> NDArray[Any]:
    """First page of a TIFF that Pillow lacks (half floats, floats in colour), upright: H x W or H x W x channels."""
    with _tifffile(label).TiffFile(io.BytesIO(raw)) as file:
        page = file.pages[0]
        _check_size((page.imagewidth, page.imagelength), label, max_pixels)
        if page.samplesperpixel > 4 or page.axes not in ("YX", "YXS", "SYX"):
            raise ImageError(
                f"{label}: a TIFF of {page.samplesperpixel} channels and axes {page.axes}; accepted: one picture of "
                "1 (grey), 3 (RGB) or 4 (RGB and alpha) channels"
            )
        if page.photometric not in _GREY_OR_RGB:
            raise ImageError(
                f"{label}: {page.photometric.name} colours with more than 8 bits; save it as RGB or grey"
            )
        values: NDArray[Any] = page.asarray(maxworkers=1)
        tag = page.tags.get(ExifTags.Base.Orientation.value)
        white_is_zero = page.photometric == 0
    if values.dtype.kind not in "biuf":
        raise ImageError(f"{label}: a TIFF of {values.dtype} values; accepted: whole numbers and floats")
    values = np.moveaxis(values, 0, -1) if page.axes == "SYX" else values
    if values.shape[:2] != (page.imagelength, page.imagewidth):
        raise ImageError(f"{label}: damaged or truncated image (it has no pixels); copy it again from its source")
    return _turned(_negative(values) if white_is_zero else values, tag.value if tag is not None else 1)


def _tifffile(label: str) -> Any:
    try:
        import tifffile
    except ImportError:
        raise ImageError(f"{label}: this kind of TIFF is read by tifffile; type: pip install tifffile") from None
    log = logging.getLogger("tifffile")
    if not log.handlers:
        log.addHandler(logging.NullHandler())  # it speaks of every odd tag, on standard error where nobody listens
    return tifffile


def _turned(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """An array upright, by its EXIF orientation; Pillow's function fails where it cannot write the EXIF anew."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values[::-1] if orientation in (3, 4, 7, 8) else values


def _check_size(size: tuple[int, int], label: str, max_pixels: int = MOST_PIXELS) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{label}: {width} x {height} pixels are more than the limit of {max_pixels:,}; "
            "resize it or cut it into tiles"
        )
    if min(width, height) < _LEAST_SIDE:
        raise ImageError(f"{label}: {width} x {height} pixels; at least {_LEAST_SIDE} per side are needed")


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # EXIF that cannot be read turns nothing
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _is_deep(image: Image.Image) -> bool:
    """Whether it is grey, of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _values(image: Image.Image) -> NDArray[Any]:
    """An image's own values, upright, H x W or H x W x channels; of grey, white is the largest."""
    image.load()  # a TIFF turns itself here, and only then says that it lies right
    values = np.asarray(image)
    if _is_deep(image) and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # Pillow inverts 8 bits only
        values = _negative(values)
    return _turned(values, _orientation(image))


def _negative(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind != "f":
        return np.asarray((255 if values.dtype.itemsize == 1 else 65535) - values.astype(np.int64))
    return np.asarray(255 / _float_scale(values) - values)


def _to_rgb(image: Image.Image, label: str) -> NDArray[np.uint8]:
    if _is_deep(image):
        return _values_to_rgb(_values(image), label)
    image.load()  # see `_values`
    see_through = image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info)
    values = np.asarray(image.convert("RGBA" if see_through else "RGB"))
    return _values_to_rgb(_turned(values, _orientation(image)), label)


def _values_to_rgb(values: NDArray[Any], label: str) -> NDArray[np.uint8]:
    """Values of any type, H x W or H x W x 1 to 4 channels, to RGB; alpha over black."""
    channels = values[..., None] if values.ndim == 2 else values
    colour = channels[..., :-1] if channels.shape[2] in (2, 4) else channels
    eight = eight_bit(colour, label)
    if colour is not channels:
        opaque = eight_bit(channels[..., -1:], label) / np.float64(255)
        eight = (eight * opaque).round().astype(np.uint8)
    return np.array(np.broadcast_to(eight, (*eight.shape[:2], 3)), order="C")


def _float_scale(values: NDArray[Any]) -> float:
    finite = np.isfinite(values)
    count = int(finite.sum())
    if not count:
        return 1.0
    rare = min(1 + count // 10_000, count - 1)  # overshoot and hot pixels, which say nothing of the range
    # Twice the end of a range is more than any overshoot, and as good as black in the next one.
    if int(((values > 2) & finite).sum()) <= rare:
        return 255.0
    return 1.0 if int(((values > 510) & finite).sum()) <= rare else 1 / 257
