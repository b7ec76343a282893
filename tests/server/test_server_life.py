"""Load, time and change: overload, timeouts, batching, new versions under way, stopping without losing anything."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import BRIGHT, DARK, Answer, Brightness, Command, Running, encoded, post, predictor
from tiny import picture, save
from typer.testing import CliRunner

from twinspect import Detector
from twinspect.cli import app as commands
from twinspect.errors import BundleError, ConfigError
from twinspect.server.log import Filter, InspectionLog
from twinspect.server.service import _trim_memory
from twinspect.server.settings import Settings, named_paths, read_key


def together(server: Running, count: int, *queries: str) -> list[Answer]:
    """So many clients at once."""
    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(server.post, encoded(seed=n), query=queries[0] if queries else "") for n in range(count)]
        return [job.result(30) for job in jobs]


# ------------------------------------------------------------------------------------------------ load


def test_images_of_many_clients_share_calls_of_the_model() -> None:
    model = Brightness(call_s=0.3)
    with Running({"bright": predictor(model)}) as server:
        answers = together(server, 16)
        text = server.get("/metrics").body.decode()
    assert {a.status for a in answers} == {200}
    assert sum(model.batches) == 16
    assert len(model.batches) <= 6
    assert 'twinspect_batch_images_sum{bundle="bright"} 16.0' in text


def test_batching_can_be_turned_off() -> None:
    model = Brightness(call_s=0.01)
    with Running({"bright": predictor(model)}, max_batch=1) as server:
        together(server, 8)
    assert model.batches == [1] * 8


def test_overload_is_refused_at_once_and_everything_accepted_is_answered() -> None:
    model = Brightness(image_s=0.1)
    with Running({"bright": predictor(model)}, queue=4, max_batch=1) as server:
        assert server.post(encoded()).status == 200  # so that the time of an image is known
        answers = together(server, 16)
        good = [a for a in answers if a.status == 200]
        busy = [a for a in answers if a.status == 429]
        assert len(good) + len(busy) == 16
        assert len(good) >= 4
        assert len(busy) >= 4
        assert {a.code for a in busy} == {"busy"}
        assert all(1 <= int(a.headers["retry-after"]) <= 20 for a in busy)
        assert sum(model.batches) == 1 + len(good)
        assert server.post(encoded()).status == 200


def test_a_request_that_never_fits_is_told_so() -> None:
    with Running(queue=2, max_files=8) as server:
        answer = server.post(*(encoded(seed=n) for n in range(3)))
        assert (answer.status, answer.code) == (413, "too_many")


def test_an_answer_that_takes_too_long_is_given_up_and_the_queue_moves_on() -> None:
    model = Brightness(call_s=1.0)
    with Running({"bright": predictor(model)}, timeout_s=1.6, max_batch=1) as server:
        answers = together(server, 4)
        assert sorted(a.status for a in answers) == [200, 504, 504, 504]
        assert {a.code for a in answers if a.status == 504} == {"timeout"}
        time.sleep(1.1)
        assert server.post(encoded()).status == 200
        assert b"twinspect_images_accepted 0.0" in server.get("/metrics").body
    assert len(model.batches) <= 3  # whoever gave up was not computed


def test_a_lone_client_does_not_wait_for_company() -> None:
    with Running(max_wait_ms=5000.0) as server:
        server.post(encoded())
        began = time.monotonic()
        assert server.post(encoded()).status == 200
        assert time.monotonic() - began < 3.0


def test_an_application_has_threads_only_while_it_serves() -> None:
    def threads() -> set[str]:
        return {thread.name for thread in threading.enumerate() if "-lone" in thread.name}

    lone = Running({"lone": predictor()})  # one that is built and never runs leaves nothing to close
    assert threads() == set()
    with lone as server:
        assert server.post(encoded()).status == 200
        assert threads() == {"model-lone_0"}
    assert threads() == set()


def test_answers_are_sent_without_delay() -> None:
    with Running() as server, server.socket() as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 200")
        (connection,) = server.server.server_state.connections
        own = connection.transport.get_extra_info("socket")
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


# -------------------------------------------------------------------------------------------- versions


class Files:
    """Stands for files of models: the content of a file is the id of the model in it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bright.twin"
        self.write("one")

    def write(self, text: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(text)
        os.replace(new, self.path)

    def open(self, path: Path):
        if path.read_text() == "damaged":
            raise BundleError(f"{path} is not a whole bundle")
        return predictor(Brightness(call_s=0.02), model_id=path.read_text())

    def running(self, **settings: object) -> Running:
        return Running({"bright": self.path}, None, self.open, **settings)


def test_new_versions_come_into_service_without_a_dropped_request(tmp_path: Path) -> None:
    files = Files(tmp_path)
    stop, answers, others = threading.Event(), [], set(threading.enumerate())  # servers of other tests may run
    with files.running(queue=64) as server:

        def client() -> None:
            while not stop.is_set():
                answers.append(server.post(encoded()))

        clients = [threading.Thread(target=client) for _ in range(4)]
        for one in clients:
            one.start()
        for version in ("two", "three", "four"):
            time.sleep(0.25)
            files.write(version)
            assert server.post_json("/v1/models/bright/reload").json["model_id"] == version
        time.sleep(0.25)
        stop.set()
        for one in clients:
            one.join(20)
        deadline = time.monotonic() + 5
        while (
            sum(t.name == "model-bright_0" for t in threading.enumerate() if t not in others) > 1
        ):  # old versions end
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert {a.status for a in answers} == {200}
    seen = [a.json["model_id"] for a in answers]
    assert set(seen) == {"one", "two", "three", "four"}


def test_files_are_watched_and_a_damaged_one_leaves_the_old_version_in_service(tmp_path: Path) -> None:
    files = Files(tmp_path)

    def version() -> tuple[str, str]:
        (model,) = server.get("/v1/models").json["models"]
        return model["model_id"], model["trouble"]

    def wait_for(wanted: str, trouble: bool) -> None:
        until = time.monotonic() + 10
        while not ((found := version())[0] == wanted and bool(found[1]) == trouble):
            assert time.monotonic() < until, found
            time.sleep(0.05)

    with files.running(watch_s=0.05) as server:
        assert version() == ("one", "")
        files.write("two")
        wait_for("two", False)
        files.write("damaged")
        wait_for("two", True)
        assert "not a whole bundle" in version()[1]
        assert server.post(encoded()).json["model_id"] == "two"
        files.path.unlink()  # gone for good: still the old one
        time.sleep(0.2)
        assert server.post(encoded()).status == 200
        files.write("three")
        wait_for("three", False)
        assert b'twinspect_reloads_total{bundle="bright",outcome="failed"} 1.0' in server.get("/metrics").body


def test_reloading_what_has_no_file_or_does_not_exist() -> None:
    with Running() as server:
        assert server.post_json("/v1/models/bright/reload").code == "no_file"
        assert server.post_json("/v1/models/..%2Fother/reload").status == 404
        assert server.post_json("/v1/models/other/reload").code == "unknown_bundle"


# ------------------------------------------------------------------------------- the command as it is run


@pytest.fixture(scope="module")
def folder(quick: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle and an image."""
    root = tmp_path_factory.mktemp("serve")
    quick.save(root / "parts.twin")
    save(root / "a.png", picture(3))
    return root


@pytest.mark.slow
def test_sigterm_finishes_what_was_accepted_and_keeps_it_in_the_log(folder: Path, quick: Detector) -> None:
    command = Command(folder, "parts.twin", "--log", "stop.db", "--max-batch", "1")
    image = (folder / "a.png").read_bytes()
    expected = quick.predict(folder / "a.png").score
    assert post(command.url, image)["results"][0]["score"] == pytest.approx(expected, rel=1e-3)
    with ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(post, command.url, image) for _ in range(12)]
        until = time.monotonic() + 10
        while not any(job.done() for job in jobs):
            assert time.monotonic() < until
            time.sleep(0.002)
        code, errors = command.stop()
        answers = [job.result(30) for job in jobs if not job.exception(30)]
    assert code == 0, errors
    log = InspectionLog(str(folder / "stop.db"), create=False)
    kept = {row["request_id"] for row in log.query(Filter(limit=100))}
    log.close()
    assert {a["request_id"] for a in answers} <= kept
    lines = [json.loads(line) for line in errors.splitlines()]
    answered = {one["request_id"] for one in lines if one.get("route") == "/v1/predict" and one["status"] == 200}
    assert answered == kept  # accepted, kept and answered are the same requests
    assert len(answered) - 1 >= len(answers) >= 1
    assert "a.png" not in errors  # no names, no content


def run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    found = subprocess.run(
        [sys.executable, "-m", "twinspect", "serve", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip
    return found.returncode, found.stderr


def test_command_says_what_is_wrong_before_it_loads_a_model(folder: Path) -> None:
    code, said = run(folder, "parts.twin", "--host", "0.0.0.0")
    assert (code, "--api-key-file" in said) == (2, True)
    code, said = run(folder, "parts.twin", "--host", "0.0.0.0", TWINSPECT_API_KEY="short")
    assert (code, "16 or more" in said, "short" in said.replace("short'", "")) == (2, True, False)
    code, said = run(folder, "none.twin")
    assert (code, "no such model: none.twin" in said) == (2, True)


# -------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"host": "0.0.0.0"}, "--api-key-file"),
        ({"host": "192.168.1.5"}, "--api-key-file"),
        ({"host": "example.org"}, "--api-key-file"),
        ({"api_key": "short"}, "16 or more"),
        ({"api_key": "ümlaut" * 5}, "16 or more"),
        ({"queue": 0}, "--queue 0"),
        ({"timeout_s": -1.0}, "--timeout -1"),
        ({"max_wait_ms": -1.0}, "--max-wait-ms"),
        ({"max_wait_ms": float("nan")}, "--max-wait-ms"),
        ({"port": 70000}, "--port 70000"),
        ({"max_body_mb": 600.0}, "--max-memory-mb"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_option(values: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**values)


def test_key_is_not_shown_and_comes_from_file_or_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("0123456789abcdef-secret\n")
    settings = Settings(host="0.0.0.0", api_key=read_key(file))
    assert "secret" not in repr(settings)
    assert read_key(None, {"TWINSPECT_API_KEY": " k "}) == "k"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(tmp_path / "none")


def test_a_port_that_is_taken_is_said() -> None:
    from twinspect.server.app import prepared

    with Running() as server, pytest.raises(ConfigError, match=f"{server.port}.*--port"):
        prepared(server.app, Settings(port=server.port))


def test_models_are_named_by_file_or_by_hand(tmp_path: Path) -> None:
    for name in ("a.twin", "b.onnx"):
        (tmp_path / name).write_bytes(b"x")
    a, b = str(tmp_path / "a.twin"), str(tmp_path / "b.onnx")
    assert list(named_paths([a, f"light={b}"])) == ["a", "light"]
    for given, said in (([a, f"a={b}"], "two models are called a"), ([f"a/b={a}"], "cannot be part of an address")):
        with pytest.raises(ConfigError, match=said):
            named_paths(given)


def test_paths_may_hold_equals_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    swept = Path("runs/lr=0.1/seed=2/m.twin")
    swept.parent.mkdir(parents=True)
    for path in (swept, Path("a=b.twin"), Path("lr=1.twin")):
        path.write_bytes(b"x")
    assert named_paths([str(swept)]) == {"m": swept}
    assert named_paths([f"best={swept}"]) == {"best": swept}
    assert named_paths([str(tmp_path / swept)]) == {"m": tmp_path / swept}
    with pytest.raises(ConfigError, match=r"'lr=1' cannot be part of an address.*type NAME=lr=1\.twin"):
        named_paths(["lr=1.twin"])
    assert named_paths(["rate=lr=1.twin"]) == {"rate": Path("lr=1.twin")}
    with pytest.raises(ConfigError, match=r"no such model: runs/lr=0\.1/other\.twin\."):
        named_paths(["runs/lr=0.1/other.twin"])


def test_levels_of_a_bright_and_a_dark_image_differ() -> None:
    """The stand-in model tells them apart, or nothing above would mean anything."""
    with Running() as server:
        found = server.post(encoded(DARK), encoded(BRIGHT)).json["results"]
        assert [one["answer"] for one in found] == ["good", "anomaly"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only this C library keeps memory for every thread")
def test_memory_that_a_reload_has_freed_goes_back_to_the_system() -> None:
    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def fill() -> bytearray:
        blocks = [bytearray(b"x" * 100_000) for _ in range(2000)]  # too small to be given back one by one
        return blocks[-1]  # above all others, so that they are not given back without being asked for

    with ThreadPoolExecutor(1) as thread:
        last = thread.submit(fill).result()
        before = resident_mb()
        _trim_memory()
        assert before - resident_mb() > 100
    assert len(last) == 100_000


@pytest.mark.parametrize("given", [("--log-required",), ("--log-days", "3"), ("--log-thumbnails", "320")])
def test_options_of_a_log_are_refused_without_one(tmp_path: Path, given: tuple[str, ...]) -> None:
    found = CliRunner().invoke(commands, ["serve", str(tmp_path / "m.twin"), "--log", "none", *given])
    assert found.exit_code == 2
    assert f"{given[0]} contradicts --log none" in found.output
