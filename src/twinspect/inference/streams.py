"""Images by reference (`Item`), files that hold many (`Stream`: tar, zip, Parquet, video), and cameras. No torch.

Videos, cameras and network streams are read by OpenCV (extra ``video``). Every frame of a file is given. Of a camera
or a network stream the newest one is: a thread reads all of them, so that an answer is about now, however slow the
model is. Such a source does not end; one that breaks off is opened again.
"""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinspect import files
from twinspect.data.images import ACCEPTED, MOST_BYTES, is_image
from twinspect.data.manifest import path_column
from twinspect.data.scan import is_hidden
from twinspect.data.tables import parquet_columns
from twinspect.errors import DataError, TwinspectError, required
from twinspect.files import is_url
from twinspect.inference.job import CAMERA

if TYPE_CHECKING:
    import cv2

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
_IMAGE_BYTES = ("image", "img", "jpg", "png", "bytes")  # columns of encoded images in other people's tables
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg")
RETRY_SECONDS = 2.0  # between attempts to open a source that broke off
_ENCRYPTED = 0x1  # flag of a file in a zip
_LOOK_SECONDS = 0.5  # a wait no longer than this can be stopped by Ctrl-C on every system
Frame = tuple[int, NDArray[np.uint8]]  # its number, and H x W x 3 in RGB


@dataclass(frozen=True, slots=True)
class Item:
    """One image, by reference, so that another process can read it."""

    name: str  # what the table's ``path`` column says; ``archive#member`` inside an archive
    path: str = ""  # file or URL that holds it; empty where ``data`` or ``error`` says all
    record: int | None = None  # position inside a container file
    data: bytes | None = field(default=None, repr=False)  # encoded, where it had to be read to be listed
    pixels: Any = field(default=None, repr=False, compare=False)  # in memory: an array or a PIL image
    error: str = ""  # why it must not be read
    state: str = ""  # size and time of change of a file in a store, where its listing said them

    @property
    def identity(self) -> str:
        """Its name with size and time of change of its file: another file under the same name has another one."""
        return f"{self.name}\0{self.state or files.state(self.path)}"

    @property
    def is_file(self) -> bool:
        """Whether it is a whole file of this disk."""
        in_memory = self.data is not None or self.pixels is not None
        return not (in_memory or self.error or self.record is not None or is_url(self.path))

    def items(self) -> Iterator[Item]:
        """Itself: so that files that are images and files that hold images are read alike."""
        return iter([self])


@dataclass(frozen=True, slots=True)
class Stream:
    """An archive, a table of encoded images, or a video (path or URL), read in order by whoever scores it."""

    path: str

    @property
    def identity(self) -> str:
        """As `Item.identity`, of the whole file."""
        return f"{self.path}\0{files.state(self.path)}"

    def items(self) -> Iterator[Item]:
        """Its images; damage becomes a last item with an error."""
        lower, count = self.path.lower(), 0
        if lower.endswith(VIDEOS):
            frames = file_frames(self.path)
            images: Iterator[Item] = (Item(f"{self.path}#{number}", pixels=pixels) for number, pixels in frames)
            kind, nothing = "video", "no frame of the video can be decoded"
        elif lower.endswith(".parquet"):
            images, kind, nothing = _cells(self.path), "table", "no image in the table"
        else:
            images = _zip_members(self.path) if lower.endswith(".zip") else _tar_members(self.path)
            kind, nothing = "archive", f"no image in the archive (looked for {ACCEPTED})"
        try:
            for item in images:
                count += 1
                yield item
        except Exception as error:  # of the disk, the store, the unpacker or pyarrow
            if isinstance(error, TwinspectError) and not isinstance(error, DataError):
                raise  # a package is missing
            words = str(error).partition("\n")[0].rstrip(":")  # tarfile lists what each of its readers says
            reason = f"damaged {kind} after {count} images ({words}); copy it again"
            yield Item(self.path, error=f"{self.path}: {reason}")
        else:
            if not count:
                yield Item(self.path, error=f"{self.path}: {nothing}")


def image_column(path: str) -> tuple[str, bool]:
    """Name of a Parquet table's column with images, and whether it holds their bytes instead of paths.

    A DataError where it cannot be read, or has no such column.
    """
    with files.open_file(path) as file:
        columns = parquet_columns(path, file)
    for name, kind in columns.items():
        if name.lower() in _IMAGE_BYTES and "binary" in kind:
            return name, True
    if name := path_column(name for name, kind in columns.items() if "string" in kind):
        return name, False
    raise DataError(f"{path}: columns {', '.join(columns)}; a column image (paths, or encoded images) is needed")


def _cells(path: str) -> Iterator[Item]:
    import pyarrow.parquet as pq

    number, (column, _) = 0, image_column(path)
    with files.open_file(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(16, columns=[column]):
            for cell in batch.column(0).to_pylist():
                raw = cell.get("bytes") if isinstance(cell, dict) else cell
                name, body = f"{path}#{number}", raw if isinstance(raw, bytes) else b""
                refusal = _refusal("", len(body))
                yield Item(name, error=f"{name}: {refusal}") if refusal else Item(name, data=body)
                number += 1


def _tar_members(path: str) -> Iterator[Item]:
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(files.open_file(path))
        # Without seeking, tarfile reads as much as a header says, which may be a terabyte, block by block.
        archive = opened.enter_context(tarfile.open(fileobj=file, mode="r:*" if file.seekable() else "r|*"))
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header it has seen
            if member.isdir() or not _is_image(member.name):
                continue
            name, refusal = f"{path}#{member.name}", _refusal(member.name, member.size)
            if not refusal and (not member.isreg() or member.issparse()):
                refusal = "a link, device or sparse file; only plain files of an archive are read"
            body = archive.extractfile(member) if not refusal else None
            yield Item(name, data=body.read() if body else None, error=f"{name}: {refusal}" if refusal else "")
        if file.seekable():  # a tar that is cut within a header or before one ends like a whole one for tarfile
            archive.fileobj.seek(archive.offset)
            if len(archive.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                raise DataError("it has no end")


def _zip_members(path: str) -> Iterator[Item]:
    with files.open_file(path) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.is_dir() or not _is_image(member.filename):
                continue
            name = f"{path}#{member.filename}"
            refusal = _refusal(member.filename, member.file_size)  # no more than the header says is ever unpacked
            if member.flag_bits & _ENCRYPTED:
                refusal = "it is encrypted; unpack the archive with its password first"
            try:
                body = archive.read(member) if not refusal else None
            except Exception as error:  # damaged, or packed in a way that Python lacks
                body, refusal = None, f"cannot be unpacked ({error})"
            yield Item(name, data=body, error=f"{name}: {refusal}" if refusal else "")


def _refusal(name: str, size: int) -> str:
    parts = name.replace("\\", "/").split("/")  # a Path would keep every name that it has seen
    if (len(parts) > 1 and not parts[0]) or ".." in parts:
        return "the name leaves the archive; refused"
    return f"{size:,} bytes; an image file of that size is not read" if size > MOST_BYTES else ""


def _is_image(name: str) -> bool:
    folders = name.replace("\\", "/").split("/")[:-1]
    return is_image(name) and not any(is_hidden(folder) for folder in folders if folder not in (".", ".."))


# ----------------------------------------------------------------------------------------------- frames


def file_frames(path: str) -> Iterator[Frame]:
    """Every frame of a video file; a DataError where it cannot be opened, or ends before it says."""
    import cv2

    capture, number = _opened(path), 0
    while (pixels := _next(capture)) is not None:
        yield number, pixels
        number += 1
    promised = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))  # some formats state a duration, and this is an estimate
    capture.release()
    if number < promised - max(2, promised // 50):
        raise DataError(f"it says that it has {promised:,} frames, and the others cannot be decoded")


def live_frames(source: str) -> Iterator[Frame | None]:
    """The newest frame of a camera or network stream, each time that one is asked for. It does not end.

    Frames are numbered as the source gave them. A source that breaks off gives None, then frames again once it is
    back. One that cannot be opened now raises a DataError at once.
    """
    return _newest(_opened(source), source)


def _newest(capture: cv2.VideoCapture, source: str) -> Iterator[Frame | None]:
    """Number and pixels of the newest frame, each time that one is asked for; a thread reads all of them."""
    held: Queue[Frame | None] = Queue(1)
    unwanted = threading.Event()

    def read(capture: cv2.VideoCapture | None) -> None:
        number = 0
        while not unwanted.is_set():
            if capture is not None and (pixels := _next(capture)) is not None:
                with suppress(Empty):
                    held.get_nowait()  # the frame before, which nobody took
                held.put((number, pixels))
                number += 1
                continue
            if capture is not None:
                capture.release()
                held.put(None)  # once the last frame is taken
            capture = None
            unwanted.wait(RETRY_SECONDS)
            with suppress(DataError):
                capture = _opened(source)

    threading.Thread(target=read, args=(capture,), daemon=True).start()
    try:
        while True:
            with suppress(Empty):
                yield held.get(timeout=_LOOK_SECONDS)
    finally:
        unwanted.set()
        with suppress(Empty):
            held.get_nowait()  # so that the thread can put its end


def _next(capture: cv2.VideoCapture) -> NDArray[np.uint8] | None:
    ok, bgr = capture.read()
    return np.ascontiguousarray(bgr[..., ::-1]) if ok else None


def _opened(source: str) -> cv2.VideoCapture:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what goes wrong is said by us
    required("cv2", f"{without_password(source)}: a video or camera", "twinspect[video]")
    import cv2

    cv2.utils.logging.setLogLevel(0)
    if source.lower().startswith(CAMERA):
        device = source[len(CAMERA) :]
        capture = cv2.VideoCapture(int(device) if device.isdecimal() else device)
    else:
        capture = cv2.VideoCapture(source if is_url(source) else str(Path(source).resolve()))
    if not capture.isOpened():
        raise DataError(
            f"{without_password(source)} cannot be opened; give a camera that is there (camera:0, camera:1), an "
            "address such as rtsp://HOST/PATH, or a video file"
        )
    return capture


def without_password(source: str) -> str:
    """What rows and messages call a source: an address without the user's name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", source)
