"""Frames of video files, cameras and network streams as images, read by OpenCV (extra ``video``). No torch.

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
from twinspect.inference.archives import Item
from twinspect.inference.stores import is_url

if TYPE_CHECKING:
    import cv2

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg")
CAMERA = "camera:"
_ENDLESS = (CAMERA, "rtsp://", "rtsps://", "rtmp://", "udp://", "tcp://")
_RETRY_SECONDS = 2.0  # between attempts to open a source that broke off
_LOOK_SECONDS = 0.5  # a wait no longer than this can be stopped by Ctrl-C on every system


def is_endless(source: object) -> bool:
    """Whether a source is a camera (``camera:0``) or a stream of video from the network."""
    return isinstance(source, str) and source.lower().startswith(_ENDLESS)


def file_frames(path: str) -> Iterator[Item]:
    """Every frame of a video file; one that cannot be read becomes an item with an error."""
    try:
        capture = _opened(path)
    except DataError as error:
        yield Item(path, error=str(error))
        return
    number = 0
    while (pixels := _next(capture)) is not None:
        yield Item(f"{path}#{number}", pixels=pixels)
        number += 1
    capture.release()
    if not number:
        yield Item(path, error=f"{path}: no frame of the video can be decoded; copy it again, or convert it to H.264")


def live_frames(source: str) -> Iterator[Item]:
    """The newest frame of a camera or network stream, each time that one is asked for. It does not end.

    Frames are numbered as the source gave them. A source that breaks off gives one item with an error, then frames
    again once it is back. One that cannot be opened now raises a DataError at once.
    """
    return _followed(_opened(source), source)


def _followed(capture: cv2.VideoCapture | None, source: str) -> Iterator[Item]:
    name, first = _without_password(source), 0
    while True:
        if capture is not None:
            for number, pixels in _newest(capture, first):
                first = number + 1
                yield Item(f"{name}#{number}", pixels=pixels)
            yield Item(name, error=f"{name}: gives no more frames; it is opened again every {_RETRY_SECONDS:g} s")
        time.sleep(_RETRY_SECONDS)
        try:
            capture = _opened(source)
        except DataError:
            capture = None


def _newest(capture: cv2.VideoCapture, first: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Number and pixels of the newest frame, each time that one is asked for; a thread reads all of them."""
    held: Queue[tuple[int, NDArray[np.uint8]] | None] = Queue(1)
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
            f"{_without_password(source)} cannot be opened as a video; give camera:0, an address such as "
            "rtsp://HOST/PATH, or a file"
        )
    return capture


def _without_password(source: str) -> str:
    """What rows and messages call a source: an address without the user's name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", source)
