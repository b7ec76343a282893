"""What clients get: answers, maps, log, feedback, drift, models, OpenAPI; what they are told when it goes wrong."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter
from serving import BOUNDARY, BRIGHT, DARK, Broken, Running, encoded, form, predictor

from twinspect import Detector
from twinspect.errors import ConfigError, TwinspectError
from twinspect.server import schema
from twinspect.server.log import Filter, InspectionLog
from twinspect.server.settings import Settings

KEY = "0123456789abcdef-secret"


@pytest.fixture
def server(log: InspectionLog):
    with Running({"bright": predictor()}, log) as found:
        yield found


@pytest.fixture
def both(log: InspectionLog):
    models = {"bright": predictor(), "two": predictor(model_id="second", classes=("bolt", "nut"))}
    with Running(models, log) as found:
        yield found


# --------------------------------------------------------------------------------------------- answers


def test_a_form_with_one_image_is_answered_and_kept(server: Running, log: InspectionLog) -> None:
    answer = server.post(encoded(BRIGHT), name="part 1.png")
    assert answer.status == 200
    TypeAdapter(schema.PredictAnswer).validate_json(answer.body, strict=True)
    (one,) = answer.json["results"]
    assert (one["answer"], one["is_anomaly"], one["class_name"], one["error"]) == ("anomaly", True, "part", "")
    assert one["score"] == pytest.approx(BRIGHT / 25.5, rel=0.05)
    assert (one["width"], one["height"], one["n_regions"]) == (48, 40, 1)
    assert one["severity"] == pytest.approx(one["score"] / one["threshold"])
    assert one["p_value"] == pytest.approx(1 / 121)
    (kept,) = log.query(Filter())
    assert (kept["id"], kept["name"], kept["score"]) == (one["log_id"], "part 1.png", one["score"])
    assert kept["severity"] == one["severity"]
    assert kept["request_id"] == answer.json["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", "IMAGE/JPEG; q=1"])
def test_the_body_may_be_the_image(server: Running, kind: str) -> None:
    answer = server.post_raw(encoded(DARK), kind, **{"X-Filename": "C:\\pics\\a.png"})
    assert answer.status == 200
    assert answer.json["results"][0]["answer"] == "good"
    assert answer.json["results"][0]["name"] == "a.png"


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ("filename*=utf-8''geh%C3%A4use.png", "gehäuse.png"),  # requests with urllib3 1
        ("filename=\"=?utf-8?B?Z2Vow6R1c2UucG5n?=\"; filename*=utf-8''geh%C3%A4use.png", "gehäuse.png"),  # .NET
        ("filename*=ISO-8859-1'de'geh%E4use.png; filename=gehause.png", "gehäuse.png"),
        ("FileName*0*=utf-8''geh%C3%A4; filename*1=\"use.png\"", "gehäuse.png"),
        ('filename="gehäuse; 2.png"', "gehäuse; 2.png"),
        ("filename*=utf-8''..%2F..%2Fetc%2Fpasswd%00%0A.png", "passwd  .png"),
        ("filename*=no-such-code''a%FF.png", "aÿ.png"),
        ("filename*=plain.png", "plain.png"),
        ('filename=""', "image-0"),
    ],
)
def test_every_way_to_write_a_name_is_read(server: Running, disposition: str, name: str) -> None:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; {disposition}\r\n\r\n'
    body = head.encode() + encoded() + f"\r\n--{BOUNDARY}--\r\n".encode()
    answer = server.ask("POST", "/v1/predict", body, form()[1])
    assert answer.status == 200, answer.body
    assert [one["name"] for one in answer.json["results"]] == [name]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_the_name_beside_a_body_that_is_the_image(server: Running, encoding: str) -> None:
    answer = server.post_raw(encoded(), **{"X-Filename": "gehäuse.png".encode(encoding)})
    assert answer.json["results"][0]["name"] == "gehäuse.png"


def test_answers_of_a_batch_are_in_order_and_one_bad_file_stops_nothing(server: Running, log: InspectionLog) -> None:
    levels = [DARK, BRIGHT, DARK + 10, BRIGHT - 10]
    answer = server.post(*(encoded(level) for level in levels[:2]), b"no image", *(encoded(x) for x in levels[2:]))
    assert answer.status == 200
    found = answer.json["results"]
    assert [one["answer"] for one in found] == ["good", "anomaly", "", "good", "anomaly"]
    assert "2.png: not an image" in found[2]["error"]
    assert found[2]["score"] is found[2]["log_id"] is None
    assert len(log.query(Filter())) == 4


def test_scores_are_those_of_the_predictor(quick: Detector, parts, log: InspectionLog) -> None:
    paths = sorted(parts.rglob("test/*/*.png"))[:6]
    with Running({"real": quick.predictor()}, log) as server:
        found = [server.post(path.read_bytes()).json["results"][0] for path in paths]
        together = server.post(*(path.read_bytes() for path in paths)).json["results"]
    for path, one, other in zip(paths, found, together, strict=True):
        expected = quick.predict(path)
        for name in ("score", "score_local", "score_semantic", "p_value", "threshold", "peak", "class_p"):
            assert one[name] == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-3), name
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-3), name
        assert one["class_name"] == expected.class_name
        assert [r["x"] for r in one["regions"]] == [r.x for r in expected.regions]


def test_a_class_may_be_given_and_an_unknown_one_is_refused(both: Running) -> None:
    found = both.post(encoded(), query="?bundle=two&class=nut").json["results"][0]
    assert (found["class_name"], found["predicted_class"]) == ("nut", "bolt")
    refused = both.post(encoded(), query="?bundle=two&class=nutt")
    assert (refused.status, refused.code) == (422, "not_accepted")
    assert "Did you mean 'nut'" in refused.json["error"]["message"]


def test_several_bundles_by_name(both: Running) -> None:
    assert both.post(encoded(), query="?bundle=bright").json["model_id"] == "bright"
    unnamed = both.post(encoded())
    assert (unnamed.status, unnamed.code) == (400, "which_bundle")
    assert unnamed.json["error"]["message"].endswith("add bundle=NAME: bright, two")
    assert both.post(encoded(), query="?bundle=two").json["model_id"] == "second"
    refused = both.post(encoded(), query="?bundle=three")
    assert (refused.status, refused.code) == (404, "unknown_bundle")
    models = both.get("/v1/models")
    TypeAdapter(schema.ModelsAnswer).validate_json(models.body, strict=True)
    assert [(m["bundle"], m["classes"], m["runtime"]) for m in models.json["models"]] == [
        ("bright", ["part"], "Brightness"),
        ("two", ["bolt", "nut"], "Brightness"),
    ]


# ------------------------------------------------------------------------------------------------ maps


def test_a_map_comes_with_its_answer_where_it_is_asked_for(server: Running) -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:32, 64:] = 255  # the top right quarter
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    (one,) = server.post(out.getvalue(), query="?maps=inline").json["results"]
    inline = one["map"]
    grid = np.frombuffer(base64.b64decode(inline["data"]), "<f4").reshape(inline["rows"], inline["columns"])
    assert grid[:4, 4:].min() > 9
    assert grid[4:].max() < 1
    assert (inline["dtype"], inline["scale"]) == ("float32", one["map_scale"])
    (drawn,) = server.post(out.getvalue(), query="?maps=overlay").json["results"]
    with Image.open(io.BytesIO(base64.b64decode(drawn["overlay"]))) as picture:
        assert (picture.size, picture.format) == ((128, 64), "JPEG")
        red, _, blue = np.asarray(picture, int)[8:24, 80:112].mean((0, 1))
    assert red - blue > 50
    assert (one["overlay"], drawn["map"]) == ("", None)
    wide = server.post(encoded(side=1500), query="?maps=overlay").json["results"][0]
    with Image.open(io.BytesIO(base64.b64decode(wide["overlay"]))) as picture:
        assert max(picture.size) == 1024
    plain = server.post(encoded()).json["results"][0]
    assert (plain["map"], plain["overlay"]) == (None, "")


# ------------------------------------------------------------------------------------------- the log


def test_log_is_queried_and_takes_feedback(both: Running) -> None:
    both.post(encoded(BRIGHT), encoded(DARK), query="?bundle=bright&session=night")
    both.post(encoded(DARK, seed=9), query="?bundle=two&class=nut")
    found = both.get("/v1/log?answer=anomaly")
    TypeAdapter(schema.LogAnswer).validate_json(found.body, strict=True)
    (alarm,) = found.json["rows"]
    assert alarm["session"] == "night"
    assert [r["class_name"] for r in both.get("/v1/log?class=nut").json["rows"]] == ["nut"]
    page = both.get("/v1/log?limit=2").json
    rest = both.get(f"/v1/log?limit=2&before={page['next']}").json
    assert [r["id"] for r in page["rows"] + rest["rows"]] == [3, 2, 1]
    assert rest["next"] is None
    assert both.get(f"/v1/log?until_ms={alarm['at_ms'] - 5000}").json["rows"] == []
    answer = both.post_json(f"/v1/log/{alarm['id']}/feedback", {"verdict": "false_alarm", "note": "dust"})
    assert (answer.status, answer.json["feedback"], answer.json["note"]) == (200, "false_alarm", "dust")
    wrong = both.post_json(f"/v1/log/{alarm['id']}/feedback", {"verdict": "missed"})
    assert (wrong.status, wrong.code) == (422, "not_accepted")
    assert both.post_json("/v1/log/99/feedback", {"verdict": "missed"}).code == "no_such_row"


def test_a_row_of_the_log_opens_again_as_a_picture(log: InspectionLog) -> None:
    with Running({"bright": predictor()}, log, log_thumbnails=24) as server:
        server.post(encoded(BRIGHT), encoded(DARK), b"no image")
        server.post(encoded(BRIGHT), query="?keep=false")
        rows = server.get("/v1/log").json["rows"]
        assert [row["picture"] for row in rows] == [True, True]
        dark, bright = (server.get(f"/v1/log/{row['id']}/picture") for row in rows)
        for answer in (dark, bright):
            assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
            assert Image.open(io.BytesIO(answer.body)).size == (24, 20)
        assert (
            np.asarray(Image.open(io.BytesIO(bright.body))).mean()
            > np.asarray(Image.open(io.BytesIO(dark.body))).mean()
        )
        assert server.post_json(f"/v1/log/{rows[0]['id']}/feedback", {"verdict": "missed"}).json["picture"] is True
        missing = server.get("/v1/log/99/picture")
        assert (missing.status, missing.code) == (404, "no_such_row")
        assert "serve --log-thumbnails 320 keeps them" in missing.json["error"]["message"]
    assert log.prune(-1.0) == 2
    with pytest.raises(TwinspectError, match="no picture of decision"):
        log.picture(rows[0]["id"])
    with Running({"bright": predictor()}, log) as server:  # by default none is kept
        server.post(encoded(BRIGHT))
        (row,) = server.get("/v1/log").json["rows"]
        assert row["picture"] is False
        assert server.get(f"/v1/log/{row['id']}/picture").code == "no_such_row"


@pytest.mark.parametrize(
    "query",
    [
        "answer=bad", "feedback='%20OR%201=1", "limit=0", "limit=99999", "before=-1", "before=" + "9" * 30,
        "since_ms=abc", "since_ms=" + "9" * 30, "name=" + "x" * 300,
    ],
)  # fmt: skip
def test_filters_that_mean_nothing_are_refused(server: Running, query: str) -> None:
    answer = server.get(f"/v1/log?{query}")
    assert answer.status in (400, 422)
    assert answer.code in ("bad_request", "not_accepted")


def test_sql_in_filters_finds_nothing_and_harms_nothing(server: Running, log: InspectionLog) -> None:
    server.post(encoded())
    nasty = "%27%3B%20DROP%20TABLE%20twinspect_inspections%3B%20--"
    for name in ("class", "bundle", "session", "name"):
        assert server.get(f"/v1/log?{name}={nasty}").json["rows"] == []
    assert len(log.query(Filter())) == 1


def test_trials_are_not_kept_and_not_watched(server: Running, log: InspectionLog) -> None:
    assert server.post(encoded(), query="?keep=false").json["results"][0]["log_id"] is None
    assert log.query(Filter()) == []
    assert server.get("/v1/drift").json["drift"][0]["light"] == "grey"


def test_without_a_log() -> None:
    with Running() as server:
        assert server.post(encoded()).json["results"][0]["log_id"] is None
        assert server.get("/v1/log").code == "no_log"
        assert server.post_json("/v1/log/1/feedback", {"verdict": "missed"}).code == "no_log"


# ---------------------------------------------------------------------------------------------- drift


def test_drift_light_turns_red_and_can_be_reset() -> None:
    with Running() as server:
        images = [encoded(DARK + 25, seed=n) for n in range(8)]  # good by threshold, but all at the upper end
        for _ in range(12):
            server.post(*images)
        until = time.monotonic() + 20
        (found,) = server.get("/v1/drift").json["drift"]
        while found["images"] < 96 and time.monotonic() < until:  # the monitor looks beside the answers
            (found,) = server.get("/v1/drift").json["drift"]
        assert found["light"] == "red"
        assert found["images"] == 96
        assert b'twinspect_drift_alarm{bundle="bright"} 1.0' in server.get("/metrics").body
        assert server.post_json("/v1/drift/bright/reset").json["drift"][0]["light"] == "grey"
        assert server.post_json("/v1/drift/none/reset").status == 404


# ------------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize(
    ("data", "status"), [(b"", 422), (b"hello", 422), (encoded()[:100], 422), (b"GIF89a" + b"<script>" * 50, 422)]
)
def test_one_image_that_is_none_is_the_clients_mistake(server: Running, data: bytes, status: int) -> None:
    for answer in (server.post_raw(data), server.post(data)):
        assert (answer.status, answer.code) == (status, "bad_image")


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_broken_model_is_our_mistake_and_tells_no_secrets(how: str, log: InspectionLog) -> None:
    with Running({"bright": predictor(Broken(how))}, log) as server:
        answer = server.post(encoded())
        assert (answer.status, answer.code) == (500, "internal" if how == "raises" else "model_damaged")
        assert b"secret" not in answer.body
        assert server.get("/healthz").status == 200
    assert log.query(Filter()) == []


@pytest.mark.parametrize("kind", ["text/html", "application/json", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_refused(server: Running, kind: str) -> None:
    answer = server.post_raw(encoded(), kind)
    assert (answer.status, answer.code) == (415, "wrong_type")
    assert "multipart/form-data" in answer.json["error"]["message"]


def test_forms_that_cannot_be_read_are_refused(server: Running) -> None:
    body, headers = form(("a.png", encoded()), field="other")
    answer = server.ask("POST", "/v1/predict", body, headers)
    assert answer.code == "no_image"
    assert "'other' with a file; type: curl -F file=@" in answer.json["error"]["message"]
    body, _ = form(("a.png", encoded()), ("b.png", encoded()))
    for cut in (1, 5, 100, len(body) // 2):  # the last image was passed over once
        assert server.ask("POST", "/v1/predict", body[: -4 - cut], headers).code == "bad_form"
    named = body.replace(b'; filename="a.png"', b"").replace(b'; filename="b.png"', b"")
    unnamed = server.ask("POST", "/v1/predict", named, headers)
    assert "'file' with text, 'file' with text; type: curl -F file=@" in unnamed.json["error"]["message"]
    for kind in ("multipart/form-data", "multipart/form-data; boundary=somethingelse"):
        assert server.ask("POST", "/v1/predict", body, {"Content-Type": kind}).code in ("bad_form", "no_image")
    assert server.ask("POST", "/v1/predict", b"", headers).code in ("bad_form", "no_image")
    assert server.post_json("/v1/log/1/feedback", ["x"]).code == "bad_request"
    broken = server.ask("POST", "/v1/log/1/feedback", b"{", {"Content-Type": "application/json"})
    assert (broken.status, broken.code) == (400, "bad_request")
    form_type = {"Content-Type": "application/x-www-form-urlencoded"}  # of curl -d without a header
    plain = server.ask("POST", "/v1/log/1/feedback", b'{"verdict": "missed"}', form_type)
    for one in (broken, plain):
        assert "Content-Type: application/json" in one.json["error"]["message"]


def test_a_misspelt_verdict_does_not_take_feedback_back(server: Running) -> None:
    number = server.post(encoded(BRIGHT)).json["results"][0]["log_id"]
    where = f"/v1/log/{number}/feedback"
    assert server.post_json(where, {"verdict": "confirmed"}).status == 200
    wrong = server.post_json(where, {"verdikt": "false_alarm"})
    assert (wrong.status, wrong.code) == (400, "bad_request")
    assert wrong.json["error"]["message"] == "verdict is missing; verdikt 'false_alarm': accepted verdict and note"
    assert server.get("/v1/log?limit=1").json["rows"][0]["feedback"] == "confirmed"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"verdict": "bad"}, "verdict 'bad': accepted '', 'false_alarm', 'missed' or 'confirmed'"),
        ({"verdict": None}, "verdict None: accepted '', 'false_alarm', 'missed' or 'confirmed'"),
        ({"verdict": "missed", "note": 7}, "note 7: accepted text"),
        ({}, "verdict is missing"),
    ],
)
def test_wrong_feedback_is_told_what_is_accepted(server: Running, body: dict[str, Any], words: str) -> None:
    answer = server.post_json("/v1/log/1/feedback", body)
    assert (answer.status, answer.json["error"]["message"]) == (400, words)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("log?feedback=bad", "feedback 'bad': accepted '', 'none', 'false_alarm', 'missed' or 'confirmed'"),
        ("log?limit=0", "limit '0': accepted 1 or more"),
        ("log?limit=501", "limit '501': accepted 500 or less"),
        ("log?since_ms=1.5", "since_ms '1.5': accepted a whole number"),
        ("log/x/picture", "number 'x': accepted a whole number"),
        (f"log?name={300 * 'x'}", f"name '{79 * 'x'}: accepted at most 200 characters"),
    ],
)
def test_wrong_parameters_are_told_what_is_accepted(server: Running, path: str, words: str) -> None:
    answer = server.get(f"/v1/{path}")
    assert (answer.status, answer.json["error"]["message"]) == (400, words)


@pytest.mark.parametrize("path", ["/v1/log?class_name=part", "/v1/drift?bundle=x"])
def test_unknown_parameters_are_refused_not_passed_over(server: Running, path: str) -> None:
    answer = server.get(path)
    assert (answer.status, answer.code) == (400, "bad_request")
    assert "unknown parameter" in answer.json["error"]["message"]
    typed = server.post(encoded(), query="?clas=part")
    assert "Did you mean 'class'" in typed.json["error"]["message"]


@pytest.mark.parametrize("query", ["maps=all", "keep=perhaps", "session=" + "x" * 300, "bundle=" + "x" * 300])
def test_query_values_that_mean_nothing_are_refused(server: Running, query: str) -> None:
    assert server.post(encoded(), query=f"?{query}").code == "bad_request"


def test_unknown_paths_and_methods(server: Running) -> None:
    assert (server.get("/v2/predict").status, server.get("/v2/predict").code) == (404, "not_found")
    wrong = server.get("/v1/predict")
    assert (wrong.status, wrong.code, wrong.headers["allow"]) == (405, "wrong_method", "POST")
    assert wrong.json["error"]["message"] == "GET /v1/predict: accepted POST"
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/../page.html"):
        assert server.get(path).status == 404


def test_head_is_answered_like_get_without_a_body(server: Running) -> None:
    for path in ("/", "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/log", "/openapi.json"):
        got, head = server.get(path), server.ask("HEAD", path)
        assert (head.status, head.body) == (got.status, b"") == (200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
        if path != "/metrics":  # its numbers grow with every request
            assert head.headers["content-length"] == str(len(got.body))
    assert [server.ask("HEAD", path).status for path in ("/nothing", "/v1/predict", "/v1/log/9/picture")] == [
        404,
        405,
        404,
    ]
    raw = server.socket()
    with raw:  # the connection goes on behind the head: nothing of a body is sent
        raw.sendall(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = b""
        while b'"ok"' not in found:
            found += raw.recv(1 << 16)
    assert found.count(b"HTTP/1.1 200") == 2
    assert b"<html" not in found


def test_a_log_that_is_full_does_not_stop_the_line_unless_it_must(log: InspectionLog, monkeypatch) -> None:
    from twinspect.server.log import LogError

    def full(rows):
        raise LogError("the inspection log x cannot be used: database or disk is full", full=True)

    monkeypatch.setattr(log, "append", full)
    with Running(log=log) as server:
        answer = server.post(encoded())
        assert (answer.status, answer.json["results"][0]["log_id"]) == (200, None)
        assert "disk is full" in answer.json["log_error"]
        assert b"twinspect_log_errors_total 1.0" in server.get("/metrics").body
    with Running(log=log, log_required=True) as server:
        answer = server.post(encoded())
        assert (answer.status, answer.code) == (507, "log_full")
        assert server.get("/readyz").status == 200


# ------------------------------------------------------------------------------- what machines look at


def test_health_readiness_and_metrics(server: Running) -> None:
    assert server.get("/healthz").json == {"status": "ok"}
    assert server.get("/readyz").json == {"status": "ready"}
    server.post(encoded(DARK), encoded(BRIGHT), b"none")
    server.get("/v1/log/77777777/picture")
    text = server.get("/metrics").body.decode()
    for line in (
        'twinspect_images_total{answer="good",bundle="bright"} 1.0',
        'twinspect_images_total{answer="anomaly",bundle="bright"} 1.0',
        'twinspect_images_total{answer="error",bundle="bright"} 1.0',
        'twinspect_requests_total{route="/v1/predict",status="200"} 1.0',
        'twinspect_requests_total{route="/v1/log/{number}/picture",status="404"} 1.0',
        "twinspect_images_accepted 0.0",
        "twinspect_request_bytes 0.0",
    ):
        assert line in text, line
    assert "77777777" not in text


def test_openapi_describes_every_route_and_the_real_answers(server: Running) -> None:
    found = server.get("/openapi.json").json
    assert {"/v1/predict", "/v1/log", "/v1/log/{number}/feedback", "/v1/drift"} <= set(found["paths"])
    predict = found["paths"]["/v1/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {"multipart/form-data", "image/*", "application/octet-stream"}
    assert {"200", "401", "413", "415", "422", "429", "507"} <= set(predict["responses"])
    described = set(found["components"]["schemas"]["ImageAnswer"]["properties"])
    assert described == set(server.post(encoded()).json["results"][0])


def test_the_page_of_the_api_loads_nothing_from_elsewhere(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    page = server.get("/docs")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "://" not in page.body.decode()
    for name in re.findall(r'(?:src|href)="(docs/[^"]+)"', page.body.decode()):
        assert server.get(f"/{name}").status == 200, name
    for path in ("/docs/../app.py", "/docs/%2e%2e/%2e%2e/__init__.py", "/docs/nothing.js"):
        assert server.get(path).status == 404
    monkeypatch.setattr("twinspect.server.app.find_spec", lambda name: None)
    assert (server.get("/docs").status, server.get("/docs").code) == (404, "no_docs")


def test_numbers_that_json_has_no_word_for_become_null(server: Running) -> None:
    def refuse(word: str) -> float:
        raise AssertionError(word)

    body = server.post(encoded()).body
    assert json.loads(body, parse_constant=refuse)["results"][0]["threshold_unsure"] is None
    assert math.isfinite(json.loads(body)["results"][0]["score"])


def test_the_page_loads_nothing_from_elsewhere(server: Running) -> None:
    answer = server.get("/")
    text = answer.body.decode()
    assert answer.headers["content-type"].startswith("text/html")
    assert "://" not in text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    wanted = {
        "x-content-type-options": "nosniff", "x-frame-options": "DENY", "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin", "cross-origin-resource-policy": "same-origin",
    }  # fmt: skip
    assert wanted.items() <= dict(answer.headers).items()
    assert text.count("<script>") == text.count("<style>") == policy.count("'sha256-") - 1 == 1


# ------------------------------------------------------------------------------------------- the key


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the function made for it, and as digests of one length, whatever length is sent."""
    from twinspect.server import guard

    compared: list[tuple[bytes, bytes]] = []
    real = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    with Running(api_key=KEY) as server:
        for key in ("x", KEY[:-1], KEY, KEY + "x", "ü" * 300):
            server.headers = {"X-API-Key": key}
            assert server.get("/v1/models").status == (200 if key == KEY else 401)
    assert len(compared) == 5
    assert {len(one) for pair in compared for one in pair} == {32}


def test_key_is_asked_for_everywhere_but_on_the_open_paths() -> None:
    with Running(api_key=KEY) as server:
        own = server.headers
        server.headers = {}
        for path in ("/", "/healthz", "/readyz", "/docs", "/docs/swagger-ui.css"):
            assert server.get(path).status == 200
            assert server.ask("HEAD", path).status == 200
        assert server.ask("HEAD", "/v1/models").status == 401
        for path in ("/v1/models", "/v1/log", "/v1/drift", "/metrics", "/openapi.json", "/nothing"):
            answer = server.get(path)
            assert (answer.status, answer.code) == (401, "wrong_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert server.post(encoded()).status == 401
        for wrong in (KEY[:-1], KEY + "x", KEY.upper(), "", "ü" * 23):
            assert server.get("/v1/models", **{"X-API-Key": wrong}).status == 401
            assert server.get("/v1/models", Authorization=f"Bearer {wrong}").status == 401
        assert server.get("/v1/models", Authorization=f"bearer {KEY}").status == 200
        assert server.get("/v1/models", **own).status == 200
        assert server.get("/v1/models", Host="any.name", **own).status == 200


def test_without_a_key_other_sites_cannot_reach_in_through_a_browser() -> None:
    with Running() as server:
        assert server.get("/v1/models", Host="rebound.example").code == "other_host"
        assert server.get("/v1/models", Host=f"localhost:{server.port}").status == 200
        assert server.get("/v1/models", Host="[::1]:80").status == 200
        for name in (f"LOCALHOST:{server.port}", "Localhost", "LocalHost.", "[0:0:0:0:0:0:0:1]", "127.1.2.3"):
            assert server.get("/v1/models", Host=name).status == 200, name
        for name in ("LOCALHOST.example", "localhost.example:80", "127.0.0.1.example", ""):
            assert server.get("/v1/models", Host=name).code == "other_host", name
        mixed = {"Host": "LocalHost:8000", "Origin": "http://localhost:8000"}
        assert server.ask("POST", "/v1/drift/bright/reset", b"", mixed).status == 200
        answer = server.ask("POST", "/v1/drift/bright/reset", b"", {"Origin": "https://evil.example"})
        assert (answer.status, answer.code) == (403, "other_origin")
        own = f"http://127.0.0.1:{server.port}"
        assert server.ask("POST", "/v1/drift/bright/reset", b"", {"Origin": own}).status == 200


@pytest.mark.parametrize("stripped", [True, False])
def test_below_a_path_of_a_proxy(stripped: bool) -> None:
    """Some proxies take their own part of the path away before they pass a request on, some do not."""
    with Running(root_path="/line/7", api_key=KEY) as server:
        own, server.headers = server.headers, {}
        at = "" if stripped else "/line/7"
        for path in ("/healthz", "/readyz", "/") if stripped else ("/healthz", "/readyz", "/", ""):
            assert server.get(at + path).status == 200
            assert server.ask("HEAD", at + path).status == 200
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert server.get(at + path).status == 401
        server.headers = own
        assert server.get(f"{at}/nothing").code == "not_found"
        assert server.get("/line/77/v1/models").code == "not_found"
        body, headers = form(("a.png", encoded()))
        assert server.ask("POST", f"{at}/v1/predict", body, headers).status == 200
        assert server.get(f"{at}/openapi.json").json["servers"] == [{"url": "/line/7"}]
        assert b'="/v1/predict"' in server.get(f"{at}/metrics").body  # counted under its route


@pytest.mark.parametrize("root", ["line", "/line/", "/", "//line", "/a b", '/"x', "https://factory.example/line"])
def test_root_paths_that_are_none(root: str) -> None:
    with pytest.raises(ConfigError, match=r"--root-path .*accepted a path such as /inspect"):
        Settings(root_path=root)


def test_answers_carry_what_browsers_need_and_request_ids_are_kept_or_made() -> None:
    with Running() as server:
        answer = server.get("/healthz", **{"X-Request-ID": "line-7_1"})
        assert answer.headers["x-request-id"] == "line-7_1"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "server" not in answer.headers
        assert server.get("/healthz", **{"X-Request-ID": "a b\tc"}).headers["x-request-id"].isalnum()
