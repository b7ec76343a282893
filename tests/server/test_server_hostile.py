"""Strangers: whatever they send, they get the right status or are cut off, and the next good request is answered."""

from __future__ import annotations

import io
import socket
import struct
import time
import zipfile
import zlib

import pytest
from serving import BOUNDARY, BRIGHT, DARK, Answer, Brightness, Running, encoded, form, predictor

from twinspect.server.log import Filter, InspectionLog

HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
NAMES = (
    "../../../etc/passwd", "..\\..\\windows\\win.ini", "/etc/shadow", "a\x00b.png", "<script>alert(1)</script>.png",
    "'; DROP TABLE twinspect_inspections; --", "x" * 5000 + ".png", "\r\nSet-Cookie: a=b", "....//....//x.png", "",
)  # fmt: skip


@pytest.fixture(scope="module")
def server():
    limits = {"max_body_mb": 2.0, "max_memory_mb": 8.0, "max_files": 8, "max_megapixels": 1.0, "queue": 16}
    with Running(body_timeout_s=2.0, header_timeout_s=2.0, timeout_s=10.0, **limits) as found:
        yield found


@pytest.fixture(autouse=True)
def _lives(server: Running):
    """After every attack a good image gets its answer, and nothing is left reserved."""
    yield
    until = time.monotonic() + 10
    while b"twinspect_request_bytes 0.0" not in (text := server.get("/metrics").body):
        assert time.monotonic() < until, text
        time.sleep(0.05)
    assert b"twinspect_images_accepted 0.0" in text
    assert server.post(encoded(BRIGHT)).json["results"][0]["answer"] == "anomaly"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + png_chunk(b"IEND", b"")


def exchange(server: Running, data: bytes, wait: float = 8.0) -> bytes:
    """Send bytes as they are and read until the other side closes."""
    found = b""
    with server.socket() as raw:
        raw.settimeout(wait)
        try:
            raw.sendall(data)
            while part := raw.recv(65536):
                found += part
        except TimeoutError:
            found += b"<still open>"
        except ConnectionError:
            pass  # closed too: a reset is what comes when some of what was sent had not been read
    return found


# --------------------------------------------------------------------------------------------- images


BOMBS = {
    "more pixels than allowed": png(2000, 2000),
    "a header of four gigapixels": png(65535, 65535),
    "a text of gigabytes": png(100, 100, png_chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(200_000_000), 9))),
    "cut off": encoded()[:-30],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/owned) (w) file closefile showpage\n",
    "pdf": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "zip": b"PK\x03\x04" + bytes(100),
    "elf": b"\x7fELF" + bytes(200),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_and_files_that_are_no_images(server: Running, data: bytes) -> None:
    began = time.monotonic()
    answer = server.post_raw(data)
    assert (answer.status, answer.code) == (422, "bad_image")
    assert time.monotonic() - began < 5


def test_a_small_picture_that_unpacks_to_a_gigabyte_is_not_unpacked(server: Running) -> None:
    began = time.monotonic()
    data = png(100, 100, png_chunk(b"IDAT", zlib.compress(bytes(1_000_000_000), 1)[:1_900_000]))
    packed = time.monotonic() - began
    began = time.monotonic()
    assert server.post_raw(data).status in (200, 422)
    assert time.monotonic() - began < max(1.0, packed / 10)


def zip_behind(image: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("../../evil.sh", "rm -rf /")
    return image + out.getvalue()


POLYGLOTS = {
    "image and zip": zip_behind(encoded(DARK)),
    "jpeg and html": encoded(DARK, kind="JPEG") + b"<html><script>alert(1)</script>",
    "gif and javascript": encoded(DARK, kind="GIF") + b"/**/=1;alert(1)",
    "png that calls itself html": encoded(DARK),
}


@pytest.mark.parametrize("name", POLYGLOTS)
def test_polyglots_are_images_and_nothing_else(server: Running, name: str) -> None:
    answer = server.post(POLYGLOTS[name], name="a.html", query="?maps=inline")
    assert answer.status == 200
    assert answer.json["results"][0]["answer"] == "good"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert b"alert" not in answer.body


@pytest.mark.parametrize("name", NAMES)
def test_names_are_labels_never_paths(name: str, log: InspectionLog, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with Running(log=log) as server:
        body, headers = form((name.replace("\r\n", "%0D%0A").replace('"', "%22"), encoded()))
        found = server.ask("POST", "/v1/predict", body, headers)
        if found.status == 400:  # with a zero byte, or thousands of them, it is no form at all
            assert "\x00" in name or len(name) > 4096
            return
        shown = found.json["results"][0]["name"]
        assert len(shown) <= 200
        assert not set(shown) & set("/\\\x00\r\n")
        assert log.query(Filter())[0]["name"] == shown
        assert "set-cookie" not in found.headers
    new = [p for p in sorted(tmp_path.rglob("*")) if p not in before]
    assert {p.name.split("-")[0] for p in new} <= {"inspections.db"}


# ---------------------------------------------------------------------------------------------- amount


def test_ten_thousand_files_in_one_request(server: Running) -> None:
    body, headers = form(*((f"{n}.png", b"x") for n in range(10_000)))
    answer = server.ask("POST", "/v1/predict", body, headers)
    assert (answer.status, answer.code) == (413, "too_many")
    assert "8 images" in answer.json["error"]["message"]


def test_ten_thousand_fields_in_one_request(server: Running) -> None:
    parts = b"".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="f{n}"\r\n\r\nx\r\n'.encode() for n in range(10_000)
    )
    answer = server.ask("POST", "/v1/predict", parts + f"--{BOUNDARY}--\r\n".encode(), form()[1])
    assert (answer.status, answer.code) == (400, "bad_form")


def test_a_part_with_an_endless_head(server: Running) -> None:
    body = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=".encode() + b"x" * 1_900_000
    began = time.monotonic()
    answer = server.ask("POST", "/v1/predict", body, form()[1])
    assert answer.status == 400
    assert time.monotonic() - began < 5


def test_more_bytes_than_allowed_by_announcement_or_by_surprise(server: Running) -> None:
    big = bytes(3_000_000)
    answer = server.post_raw(big)
    assert (answer.status, answer.code) == (413, "too_large")
    chunks = (big[i : i + 100_000] for i in range(0, len(big), 100_000))
    answer = server.ask("POST", "/v1/predict", chunks, {"Content-Type": "image/png"})
    assert (answer.status, answer.code) == (413, "too_large")
    answer = server.ask("POST", "/v1/log/1/feedback", big, {"Content-Type": "application/json"})
    assert (answer.status, answer.code) == (413, "too_large")


def test_memory_of_all_requests_together_is_limited(server: Running) -> None:
    holders = [server.socket() for _ in range(4)]  # 8 MB announced, not sent
    for one in holders:
        one.sendall(HEAD % 2_000_000)
    time.sleep(0.2)
    answer = server.post_raw(bytes(1_000_000))
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (429, "busy", "1")
    for one in holders:
        one.close()


# ------------------------------------------------------------------------------------------------ time


def test_a_body_that_does_not_come(server: Running) -> None:
    head = (
        b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc"
    )
    began = time.monotonic()
    found = exchange(server, head)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"too_slow"' in found.replace(b": ", b":")
    assert b"still open" not in found
    assert time.monotonic() - began < 7


def test_a_body_that_trickles(server: Running) -> None:
    with server.socket() as raw:
        raw.sendall(HEAD % 1000)
        for _ in range(26):  # a byte every tenth of a second is not progress enough
            raw.sendall(b"x")
            time.sleep(0.1)
        assert raw.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_does_not_end(server: Running) -> None:
    began = time.monotonic()
    with server.socket() as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n")
        try:
            for number in range(60):
                raw.sendall(f"X-{number}: y\r\n".encode())
                time.sleep(0.1)
            closed = raw.recv(100) == b""
        except ConnectionError:
            closed = True
    assert closed
    assert time.monotonic() - began < 7


def test_a_connection_on_which_nothing_is_said(server: Running) -> None:
    assert exchange(server, b"") == b""


def test_a_second_request_that_does_not_end_on_a_connection_kept_open(server: Running) -> None:
    found = exchange(server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /healthz HTT")
    assert found.count(b"HTTP/1.1 200") == 1
    assert b"still open" not in found


def test_many_slow_clients_do_not_stop_a_good_one(server: Running) -> None:
    raws = [server.socket() for _ in range(100)]
    for raw in raws:
        raw.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
    began = time.monotonic()
    assert server.post(encoded()).status == 200
    assert time.monotonic() - began < 1.9  # before the slow ones are cut off
    for raw in raws:
        raw.close()


class Detailed(Brightness):
    """Gives maps of 5 MB."""

    def run(self, pixels_BHWC):
        out = super().run(pixels_BHWC)
        return {**out, "map_B1HW": out["map_B1HW"].repeat(128, axis=2).repeat(128, axis=3)}


def test_a_client_that_does_not_take_its_answer_is_cut_off() -> None:
    with Running({"bright": predictor(Detailed())}, body_timeout_s=0.5) as server:
        body, headers = form(*((f"{n}.png", encoded()) for n in range(5)))
        head = "".join(f"{k}: {v}\r\n" for k, v in {**headers, "Content-Length": len(body)}.items())
        with server.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.sendall(f"POST /v1/predict?maps=inline HTTP/1.1\r\nHost: localhost\r\n{head}\r\n".encode() + body)
            # About 28 MB come; none are read.
            until = time.monotonic() + 10
            while not (found := set(server.server.server_state.connections)):
                assert time.monotonic() < until
            while server.server.server_state.connections & found:
                assert time.monotonic() < until
                time.sleep(0.05)
        assert server.post(encoded()).status == 200


# --------------------------------------------------------------------------------------------- protocol


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS on a plain port
        b"HELLO\r\n\r\n",
        b"GET / HTTP/9.9\r\nConnection: close\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxx",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000 + b"\r\nConnection: close\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_closed(server: Running, data: bytes) -> None:
    found = exchange(server, data)
    assert b"still open" not in found
    assert found == b"" or found.startswith(b"HTTP/1.1 4")


def test_a_client_that_goes_away_in_the_middle(server: Running) -> None:
    for size in (0, 10, 900):
        with server.socket() as raw:
            raw.sendall(HEAD % 1000 + bytes(size))
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a goodbye


def test_a_client_that_goes_away_before_its_answer() -> None:
    slow = Brightness(call_s=0.3)
    with Running({"bright": predictor(slow)}) as server:
        body, headers = form(("a.png", encoded()))
        text = "".join(
            f"{k}: {v}\r\n" for k, v in {**headers, "Content-Length": len(body), "Host": "localhost"}.items()
        )
        with server.socket() as raw:
            raw.sendall(f"POST /v1/predict HTTP/1.1\r\n{text}\r\n".encode() + body)
            time.sleep(0.1)
        assert isinstance(server.post(encoded()), Answer)
        assert b"twinspect_images_accepted 0.0" in server.get("/metrics").body
