"""Frames of video files, cameras and network streams, read by OpenCV (extra ``video``). No torch.

Every frame of a file is given. Of a camera or a network stream the newest one is: a thread reads all of them, so that
an answer is about now, however slow the model is. Such a source does not end; one that breaks off is opened again.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from twinspect.errors import DataError, TwinspectError
from twinspect.inference.stores import CAMERA, is_url

if TYPE_CHECKING:
    import cv2

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg")
RETRY_SECONDS = 2.0  # between attempts to open a source that broke off
_LOOK_SECONDS = 0.5  # a wait no longer than this can be stopped by Ctrl-C on every system
Frame = tuple[int, NDArray[np.uint8]]  # its number, and H x W x 3 in RGB


def file_frames(path: str) -> Iterator[Frame]:
    """Every frame of a video file; a DataError where it cannot be opened."""
    capture, numbers = _opened(path), count()
    while (pixels := _next(capture)) is not None:
        yield next(numbers), pixels
    capture.release()


def live_frames(source: str) -> Iterator[Frame | None]:
    """The newest frame of a camera or network stream, each time that one is asked for. It does not end.

    Frames are numbered as the source gave them. A source that breaks off gives None, then frames again once it is
    back. One that cannot be opened now raises a DataError at once.
    """
    return _followed(_opened(source), source)


def _followed(capture: cv2.VideoCapture | None, source: str) -> Iterator[Frame | None]:
    first = 0
    while True:
        if capture is not None:
            for number, pixels in _newest(capture, first):
                first = number + 1
                yield number, pixels
            yield None
        time.sleep(RETRY_SECONDS)
        try:
            capture = _opened(source)
        except DataError:
            capture = None


def _newest(capture: cv2.VideoCapture, first: int) -> Iterator[Frame]:
    """Number and pixels of the newest frame, each time that one is asked for; a thread reads all of them."""
    held: Queue[Frame | None] = Queue(1)
    unwanted = threading.Event()

    def read() -> None:
        for number in count(first):
            if unwanted.is_set() or (pixels := _next(capture)) is None:
                break
            with suppress(Empty):
                held.get_nowait()  # the frame before, which nobody took
            held.put((number, pixels))
        capture.release()
        held.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            try:
                frame = held.get(timeout=_LOOK_SECONDS)
            except Empty:
                continue
            if frame is None:
                return
            yield frame
    finally:
        unwanted.set()
        with suppress(Empty):
            held.get_nowait()  # so that the thread can put its end


def _next(capture: cv2.VideoCapture) -> NDArray[np.uint8] | None:
    ok, bgr = capture.read()
    return np.ascontiguousarray(bgr[..., ::-1]) if ok else None


def _opened(source: str) -> cv2.VideoCapture:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what goes wrong is said by us
    try:
        import cv2
    except ImportError:
        raise TwinspectError(
            f"{source}: videos and cameras need OpenCV; type: pip install 'twinspect[video]'"
        ) from None
    cv2.utils.logging.setLogLevel(0)
    if source.lower().startswith(CAMERA):
        device = source[len(CAMERA) :]
        capture = cv2.VideoCapture(int(device) if device.isdecimal() else device)
    else:
        capture = cv2.VideoCapture(source if is_url(source) else str(Path(source).resolve()))
    if not capture.isOpened():
        raise DataError(
            f"{without_password(source)} cannot be opened as a video; give camera:0, an address such as "
            "rtsp://HOST/PATH, or a file"
        )
    return capture


def without_password(source: str) -> str:
    """What rows and messages call a source: an address without the user's name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", source)
