"""Fetching weights from a hub on the loopback address: resume, verification, refusals."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from twinspect.errors import ConfigError, WeightsError
from twinspect.models import fetch as fetching
from twinspect.models.fetch import REPOSITORIES, fetch, fetch_lines
from twinspect.models.timm_import import timm
from twinspect.models.weights import (
    EMBEDDED,
    SHORT_NAMES,
    WeightsSource,
    file_sha256,
    find_weights,
    load_state,
    record_file,
    store_dir,
)

NAME = "dinov2-small"
BODY = save({"weight": torch.arange(300_000, dtype=torch.float32)})
SHA = hashlib.sha256(BODY).hexdigest()
COMMIT = "c" * 40


@dataclass
class Hub:
    """What the fake hub does, and what it was asked."""

    body: bytes = BODY
    etag: str = SHA
    cut_after: int = 0
    ranges: bool = True
    requests: list[tuple[str, str, str]] = field(default_factory=list)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            state.requests.append(("HEAD", self.path, ""))
            if "/resolve/main/" not in self.path and f"/resolve/{COMMIT}/" not in self.path:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{state.etag}"')
            self.send_header("Content-Length", str(len(state.body)))
            self.end_headers()

        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            state.requests.append(("GET", self.path, wanted))
            start = int(wanted[6:-1]) if wanted and state.ranges else 0
            rest = state.body[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            if state.cut_after:
                rest, state.cut_after = rest[: state.cut_after], 0
            self.wfile.write(rest)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TWINSPECT_HOME", str(tmp_path / "home"))
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def gets(hub: Hub) -> list[str]:
    return [wanted for method, _, wanted in hub.requests if method == "GET"]


def test_fetch_writes_file_and_record_and_needs_no_network_again(hub: Hub) -> None:
    seen: list[tuple[str, int, int]] = []
    path = fetch(NAME, lambda *args: seen.append(args))
    assert path.read_bytes() == BODY
    assert json.loads(record_file(path).read_text()) == {
        "repo": REPOSITORIES[NAME], "file": "model.safetensors", "revision": COMMIT, "sha256": SHA, "size": len(BODY),
    }  # fmt: skip
    assert seen[-1][1:] == (len(BODY) >> 20, len(BODY) >> 20)
    assert find_weights(NAME).path == path
    asked = len(hub.requests)
    assert fetch(NAME) == path
    assert len(hub.requests) == asked
    assert not list(store_dir().glob("*.part"))


def test_a_broken_connection_goes_on_from_its_last_byte(hub: Hub) -> None:
    hub.cut_after = 500_000
    assert fetch(NAME).read_bytes() == BODY
    assert gets(hub) == ["bytes=0-", "bytes=500000-"]


def test_a_killed_run_goes_on_from_its_last_byte(hub: Hub) -> None:
    store_dir().mkdir(parents=True)
    (store_dir() / f"{NAME}.safetensors.{SHA[:16]}.part").write_bytes(BODY[:700_000])
    assert fetch(NAME).read_bytes() == BODY
    assert gets(hub) == ["bytes=700000-"]


def test_a_complete_part_is_only_verified(hub: Hub) -> None:
    store_dir().mkdir(parents=True)
    (store_dir() / f"{NAME}.safetensors.{SHA[:16]}.part").write_bytes(BODY)
    assert fetch(NAME).read_bytes() == BODY
    assert gets(hub) == []


@pytest.mark.parametrize("length", [100, len(BODY) + 5])
def test_a_server_without_ranges_and_a_part_too_long(hub: Hub, length: int) -> None:
    hub.ranges = False
    store_dir().mkdir(parents=True)
    (store_dir() / f"{NAME}.safetensors.{SHA[:16]}.part").write_bytes((BODY + b"extra")[:length])
    assert fetch(NAME).read_bytes() == BODY


def test_wrong_bytes_are_deleted_and_refused(hub: Hub) -> None:
    hub.body = BODY[:-1] + b"\x7f"
    with pytest.raises(WeightsError, match=f"expected {SHA}; it was deleted"):
        fetch(NAME)
    assert not list(store_dir().glob("*.safetensors*.part"))
    assert not list(store_dir().glob("*.safetensors"))


def test_sha256_and_revision_pin(hub: Hub) -> None:
    with pytest.raises(WeightsError, match="asked for was"):
        fetch(NAME, sha256="0" * 64)
    with pytest.raises(ConfigError, match="64 hex digits"):
        fetch(NAME, sha256="abc")
    path = fetch(NAME, revision=COMMIT, sha256=SHA.upper())
    assert path.read_bytes() == BODY
    with pytest.raises(WeightsError, match="three ways|Three ways"):
        fetch(NAME, revision="d" * 40)
    assert path.read_bytes() == BODY


def test_a_hub_that_tells_no_sha256_is_recorded_and_pinned_by_the_user(hub: Hub) -> None:
    hub.etag = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(WeightsError, match="it was deleted"):
        fetch(NAME, sha256="0" * 64)
    path = fetch(NAME)
    assert json.loads(record_file(path).read_text())["sha256"] == SHA


def test_a_file_changed_after_it_was_fetched_is_refused_and_fetched_again(hub: Hub) -> None:
    path = fetch(NAME)
    path.write_bytes(BODY[:-1] + b"\x7f")
    with pytest.raises(WeightsError, match="damaged or replaced"):
        load_state(torch.nn.Linear(1, 1), find_weights(NAME), NAME)
    assert fetch(NAME).read_bytes() == BODY
    record_file(path).write_text("{")
    with pytest.raises(WeightsError, match="is damaged"):
        load_state(torch.nn.Linear(1, 1), WeightsSource(path, "x"), NAME)
    assert file_sha256(fetch(NAME)) == SHA


def test_a_file_put_there_by_hand_is_left_alone(hub: Hub) -> None:
    store_dir().mkdir(parents=True)
    own = store_dir() / f"{NAME}.pth"
    own.write_bytes(b"mine")
    assert fetch(NAME) == own
    assert "by hand" in fetch_lines(NAME, "", "", fetching.silent)[0]
    assert hub.requests == []


def test_offline_and_unreachable_name_the_three_ways(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"cannot be reached.*\(1\).*\(2\) .*--weights FILE.*\(3\)"):
        fetch(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE is set.*\(1\).*\(2\).*\(3\)"):
        fetch(NAME)


def test_a_connection_that_always_breaks_keeps_what_came(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_ATTEMPTS", 1)
    hub.cut_after = 400_000
    with pytest.raises(WeightsError, match="cannot be reached"):
        fetch(NAME)
    (part,) = store_dir().glob("*.part")
    assert part.stat().st_size == 400_000
    assert fetch(NAME).read_bytes() == BODY


def test_embedded_names_need_nothing(hub: Hub) -> None:
    name = "efficientnet-lite0"
    assert fetch(name).is_file()
    assert "nothing needs fetching" in fetch_lines(name, "", "", fetching.silent)[0]
    assert hub.requests == []


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'dinov2-base'"):
        fetch("dinov2-bas")


def test_two_at_once_do_not_mix(hub: Hub) -> None:
    from filelock import FileLock

    store_dir().mkdir(parents=True)
    with FileLock(store_dir() / f"{NAME}.safetensors.lock"), pytest.raises(WeightsError, match="another process"):
        fetch(NAME)


def test_every_short_name_has_a_repository_that_timm_agrees_with() -> None:
    assert set(REPOSITORIES) | set(EMBEDDED) == set(SHORT_NAMES)
    for name, repo in REPOSITORIES.items():
        assert timm.get_pretrained_cfg(SHORT_NAMES[name]).hf_hub_id == repo
    assert fetching.repository("vit_small_patch8_224.dino").startswith("timm/")
