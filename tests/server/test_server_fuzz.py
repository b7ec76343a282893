"""Requests of strangers, made from our own OpenAPI and against it: the documented answer, and never a 500."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hostile import corpus, damaged, edits, inputs, tried, whole_files
from hypothesis import given
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import Running, encoded, form, predictor

from twinspect.server.app import build_app
from twinspect.server.log import InspectionLog
from twinspect.server.settings import Settings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SCHEMA = schemathesis.openapi.from_dict(build_app(Settings(), {"bright": predictor()}).openapi())
HEAD = "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = InspectionLog(str(tmp_path_factory.mktemp("log") / "log.db"))
    limits = {"max_body_mb": 2.0, "max_megapixels": 1.0, "body_timeout_s": 3.0, "header_timeout_s": 3.0}
    with Running(log=log, **limits) as found:
        for _ in range(3):  # so that the log has rows
            found.post(encoded())
        yield found
        assert found.post(encoded()).status == 200
        assert b"twinspect_request_bytes 0.0" in found.get("/metrics").body
    log.close()


@inputs(300)
@given(data=st.data())
def test_requests_of_our_own_description(server: Running, data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(sorted(SCHEMA.get_all_operations(), key=lambda one: one.ok().label))).ok()
    mode = data.draw(st.sampled_from([schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]))
    try:
        case = data.draw(operation.as_strategy(generation_mode=mode))
    except schemathesis.errors.SchemathesisError:
        return  # nothing can be wrong with a request without parameters
    case.call_and_validate(base_url=f"http://127.0.0.1:{server.port}", checks=CHECKS)
    tried("requests")


@inputs(300)
@given(st.sampled_from(sorted(whole_files())), edits(), st.booleans())
def test_damaged_uploads(server: Running, name: str, changes: Any, in_form: bool) -> None:
    raw = damaged(whole_files()[name], changes)
    answer = server.post(raw, name=name) if in_form else server.post_raw(raw)
    assert answer.status == 200 or (answer.status, answer.code) == (422, "bad_image")
    tried("uploads")


def test_every_hostile_file_of_a_request_has_its_own_answer(server: Running) -> None:
    files = [(name, raw) for name, raw in corpus() if len(raw) < 60_000]
    for start in range(0, len(files), 24):
        part = files[start : start + 24]
        body, headers = form(*part)
        found = server.ask("POST", "/v1/predict?keep=false", body, headers).json["results"]
        assert [one["name"] for one in found] == [name for name, _ in part]
        assert all(bool(one["error"]) != (one["score"] is not None and bool(one["answer"])) for one in found)
    tried("uploads of several", len(files))


@inputs(250)
@given(edits(5))
def test_damaged_forms(server: Running, changes: Any) -> None:
    body, headers = form(("a.png", encoded()), ("b.png", encoded()))
    answer = server.ask(
        "POST", "/v1/predict?keep=false", damaged(body, changes, b"\r\n--\"; name*=utf-8''%00\xff"), headers
    )
    assert answer.status == 200 or answer.status in (400, 413, 415, 422)
    assert answer.status == 200 or answer.code
    tried("forms")


WORDS = st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=20)


@inputs(250)
@given(
    st.sampled_from(["GET", "POST", "HEAD", "PUT", "OPTIONS", "BREW", ""]), st.one_of(WORDS, st.sampled_from(["/",
    "/v1/log", "/v1/log/%2e%2e%2f/picture", "//", "/v1/predict?class=%ff", "*", "http://x/"])),
    st.lists(st.tuples(st.sampled_from(["Content-Length", "Transfer-Encoding", "Content-Type", "Origin", "Range",
    "Expect", "X-Request-ID", "Authorization", "X"]), WORDS), max_size=3),
    st.binary(max_size=40),
)  # fmt: skip
def test_raw_bytes(server: Running, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> None:
    text = HEAD.format(method=method, path=path, headers="".join(f"{name}: {value}\r\n" for name, value in headers))
    with server.socket() as raw:
        raw.sendall(text.encode("latin-1") + body)
        raw.shutdown(socket.SHUT_WR)
        said = b""
        while part := raw.recv(65536):
            said += part
    assert not said or said.startswith((b"HTTP/1.1 2", b"HTTP/1.1 3", b"HTTP/1.1 4", b"HTTP/1.1 100")), said[:200]
    tried("raw requests")


@inputs(150)
@given(st.text(max_size=12), st.text(max_size=12))
def test_feedback_of_anything(server: Running, verdict: str, note: str) -> None:
    answer = server.ask(
        "POST",
        "/v1/log/1/feedback",
        json.dumps({"verdict": verdict, "note": note}),
        {"Content-Type": "application/json"},
    )
    assert answer.status == 200 or answer.code
    assert server.get("/v1/log").status == 200
    tried("feedback")
