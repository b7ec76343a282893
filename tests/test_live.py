"""Sources that do not end: cameras and streams, watched folders, paths from a pipe; and videos, which do."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_bulk import Silent, job
from tiny import picture, save

from twinspect import Detector
from twinspect.errors import ConfigError, DataError, TwinspectError
from twinspect.inference import streams
from twinspect.inference.bulk import run
from twinspect.inference.sources import by_name, walk, watch

cv2 = pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six frames, 96 x 64, each brighter than the one before."""
    path = tmp_path_factory.mktemp("clip") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    for number in range(6):
        writer.write(np.full((64, 96, 3), (20, 60, 40 * number + 5), np.uint8))  # OpenCV takes BGR
    writer.release()
    return path


# ------------------------------------------------------------------------------------------------ videos


def test_every_frame_of_a_video_in_rgb(quick: Detector, clip: Path) -> None:
    results = quick.predict(clip)
    assert [one.path for one in results] == [f"{clip}#{number}" for number in range(6)]
    assert [(one.width, one.height) for one in results] == [(96, 64)] * 6
    for number, one in enumerate(results):
        assert np.abs(one.rgb.mean((0, 1)) - (40 * number + 5, 60, 20)).max() < 6
    assert results[3].score == quick.predict(results[3].rgb).score


def test_a_table_of_a_video_goes_on(model: Path, clip: Path, tmp_path: Path) -> None:
    one = job(model, f"{tmp_path}/t/", clip, part_rows=4)
    assert run(one, Silent()).rows == 6
    next(Path(one.out).glob("part-00000000-000001*")).unlink()
    again = run(one, Silent())
    assert (again.rows, again.before) == (6, 4)
    assert by_name(f"{clip}#5").name == f"{clip}#5"
    assert by_name(f"{clip}#6").error


def test_a_damaged_video_is_a_row(quick: Detector, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:300])
    [row] = quick.predict(tmp_path / "cut.mp4")
    assert "cut.mp4" in row.error


@pytest.mark.parametrize("name", ["long.avi", "long.mkv"])
def test_a_video_that_ends_before_it_says_has_a_last_row(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    for number in range(40):
        writer.write(np.random.default_rng(number).integers(0, 255, (64, 96, 3)).astype(np.uint8))
    writer.release()
    assert [item.error for item in streams.Stream(str(path)).items()] == [""] * 40
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *whole, last = streams.Stream(str(path)).items()
    assert 15 < len(whole) < 25
    assert not any(item.error for item in whole)
    assert last.error.startswith(f"{path}: damaged video after {len(whole)} images (it says that it has 40 frames")


def test_what_cannot_be_opened_is_said(monkeypatch: pytest.MonkeyPatch, quick: Detector) -> None:
    with pytest.raises(DataError, match=r"rtsp://127.0.0.1:9/x cannot be opened;"):
        walk("rtsp://me:secret@127.0.0.1:9/x")
    with pytest.raises(DataError, match="camera:99 cannot be opened"):
        next(quick.predict("camera:99", stream=True))
    with pytest.raises(ConfigError, match="stream=True"):
        quick.predict("camera:0")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(TwinspectError, match=r"pip install 'twinspect\[video\]'"):
        walk("camera:0")


# ---------------------------------------------------------------------------------------------- streams


class Line:
    """A camera on the network: JPEGs ten milliseconds apart, their brightness the frame's number modulo 200."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://operator:secret@127.0.0.1:{self.socket.getsockname()[1]}"
        self.sent, self.connections, self.broken = 0, 0, False
        self.noise = np.random.default_rng(0).integers(
            0, 50, (200, 200, 3), np.uint8
        )  # FFmpeg looks at a megabyte first
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self.socket.accept()
            except OSError:  # closed
                return
            self.connections += 1
            with peer:
                while not self.broken:
                    body = io.BytesIO()
                    Image.fromarray(self.noise + np.uint8(self.sent % 200)).save(body, "JPEG", quality=95)
                    try:
                        peer.sendall(body.getvalue())
                    except OSError:
                        break
                    self.sent += 1
                    time.sleep(0.01)
            self.broken = False


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.socket.close()


def test_a_stream_gives_its_newest_frame_and_is_opened_again(
    quick: Detector, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "RETRY_SECONDS", 0.05)
    results = quick.predict(line.address, stream=True)
    first = next(results)
    time.sleep(0.5)  # a slow model: the frames of this time are passed over
    late = [next(results) for _ in range(2)][-1]
    numbers = [int(one.path.rpartition("#")[2]) for one in (first, late)]
    assert numbers[1] - numbers[0] > 10  # from a queue it would be the second after the first
    apart = (float(late.rgb.mean() - line.noise.mean()) - numbers[1]) % 200
    assert min(apart, 200 - apart) < 3, "the number is not that of the frame"
    line.broken = True
    lost = next(one for one in results if one.error)
    assert "gives no more frames" in lost.error
    back = next(one for one in results if not one.error)
    assert line.connections == 2
    assert int(back.path.rpartition("#")[2]) > numbers[1]
    assert "secret" not in first.path + lost.path + lost.error
    results.close()


# ----------------------------------------------------------------------------------------------- folders


def test_a_watched_folder_gives_whole_files_once_and_again_when_overwritten(tmp_path: Path) -> None:
    body = save(tmp_path / "old.png", picture()).read_bytes()
    found = watch(tmp_path)
    assert next(found).name == str(tmp_path / "old.png")
    slow = tmp_path / "late" / "slow.png"
    slow.parent.mkdir()

    def write_slowly() -> None:
        with slow.open("wb") as file:
            for part in np.array_split(np.frombuffer(body, np.uint8), 8):
                file.write(part.tobytes())
                file.flush()
                time.sleep(0.1)

    writer = threading.Thread(target=write_slowly)
    writer.start()
    one = next(found)
    assert (one.name, slow.read_bytes()) == (str(slow), body)
    writer.join()
    slow.unlink()
    save(tmp_path / "old.png", picture(1))
    assert next(found).name == str(tmp_path / "old.png")
    with pytest.raises(DataError, match="is no folder"):
        watch(tmp_path / "old.png")


def started(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "twinspect", "predict", *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_watched_folder_on_the_command_line(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "0.png", picture())
    with started(model, tmp_path, "--watch", "-o", "-") as process:
        for name in ("0.png", "1.png"):
            save(tmp_path / name, picture(1)) if name == "1.png" else None
            assert json.loads(process.stdout.readline())["path"] == str(tmp_path / name)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        assert "Traceback" not in process.stderr.read()


def test_paths_from_a_pipe_are_answered_one_by_one(model: Path, tmp_path: Path) -> None:
    with started(model, "@-", "-o", "-", "--fail-on", "error") as process:
        for name in ("a.png", "b.png", "none.png"):
            if name != "none.png":
                save(tmp_path / name, picture())
            print(tmp_path / name, file=process.stdin, flush=True)
            row = json.loads(process.stdout.readline())  # the next path is not written before
            assert (row["path"], bool(row["error"])) == (str(tmp_path / name), name == "none.png")
        process.stdin.close()
        assert process.wait(30) == 3


def test_fail_on(model: Path, bundle: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from twinspect.cli import app

    good, bad = save(tmp_path / "g.png", picture(3)), picture(4)
    bad[30:60, 30:60] = (255, 0, 0)
    anomaly, broken = save(tmp_path / "a.png", bad), tmp_path / "b.png"
    broken.write_bytes(b"x")

    def code(on: str, *paths: Path) -> int:
        words = ["predict", str(bundle), *map(str, paths), *(["--fail-on", on] if on else [])]
        return CliRunner().invoke(app, words).exit_code

    assert [code(on, good, anomaly) for on in ("", "error", "anomaly")] == [0, 0, 3]
    assert [code(on, good, broken) for on in ("", "error", "anomaly")] == [0, 3, 3]
    assert code("anomaly", good) == 0
    assert code("anomoly", good) == 2
    endless = job(bundle, "-", anomaly.parent, watch=True, fail_on="anomaly")
    listener = Silent()
    assert run(endless, listener).bad == 1  # and it ended
    assert json.loads(listener.lines[-1])["is_anomaly"]


def test_what_a_source_without_an_end_cannot_do(tmp_path: Path) -> None:
    for source, changes in (("camera:0", {}), ("@-", {}), (tmp_path, {"watch": True})):
        with pytest.raises(ConfigError, match="writes no table"):
            job(tmp_path, "t.csv", source, **changes).check()
    with pytest.raises(ConfigError, match="is given alone"):
        job(tmp_path, "-", "camera:0", "camera:1").check()
