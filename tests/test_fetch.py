"""Fetching weights from a hub on the loopback address: redirects, resume, verification, refusals."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from twinspect.errors import ConfigError, WeightsError
from twinspect.files import lock, sha256_of
from twinspect.models.weights import (
    EMBEDDED,
    SHORT_NAMES,
    fetch,
    fetch_lines,
    find_weights,
    licence,
    load_state,
    record_file,
    repository,
    store_dir,
    stored_file,
)

NAME = "dinov2-small"
BODY = save({"weight": torch.arange(300_000, dtype=torch.float32)})
SHA = hashlib.sha256(BODY).hexdigest()
COMMIT = "c" * 40


@dataclass
class Hub:
    """What the hub and the host of its large files do, and what they were asked.

    Attributes:
        body: bytes of the file.
        etag: of the file; a sha256 for what lies in the large-file storage.
        cut_after: bytes after which the next answer ends.
        ranges: whether parts of the file can be asked for.
        renamed: whether the repository has another name now, to which the hub redirects.
        refuse: status and error code of every answer, if there is one.
        requests: host (hub or files), method, path, range, token.
    """

    body: bytes = BODY
    etag: str = SHA
    cut_after: int = 0
    ranges: bool = True
    renamed: bool = False
    refuse: tuple[int, str] | None = None
    requests: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    url: str = ""
    files_url: str = ""

    def gets(self) -> list[str]:
        """Ranges that the host of the files was asked for."""
        return [wanted for host, method, _, wanted, _ in self.requests if (host, method) == ("files", "GET")]


class Quiet(BaseHTTPRequestHandler):
    state: Hub
    host = ""

    def note(self) -> None:
        headers = self.headers
        asked = (headers.get("Range", ""), headers.get("Authorization", ""))
        self.state.requests.append((self.host, self.command, self.path, *asked))

    def answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class HubHandler(Quiet):
    """The hub itself: tells commit, size and etag, and sends on to the host of the files."""

    host = "hub"

    def do_HEAD(self) -> None:
        self.note()
        state = self.state
        if state.refuse is not None:
            self.answer(state.refuse[0], X_Error_Code=state.refuse[1], Content_Length="0")
        elif state.renamed and "/renamed/" not in self.path:
            self.answer(307, Location=self.path.replace("/timm/", "/renamed/"), Content_Length="0")
        elif "/resolve/main/" not in self.path and f"/resolve/{COMMIT}/" not in self.path:
            self.answer(404, X_Error_Code="RevisionNotFound", Content_Length="0")
        else:
            self.answer(
                302, Location=f"{state.files_url}/blob", X_Repo_Commit=COMMIT, X_Linked_Size=str(len(BODY)),
                X_Linked_Etag=f'"{state.etag}"', ETag=f'"{COMMIT}"', Content_Length="0",
            )  # fmt: skip

    do_GET = do_HEAD


class FilesHandler(Quiet):
    """The host that keeps the large files."""

    host = "files"

    def do_GET(self) -> None:
        self.note()
        state, wanted = self.state, self.headers.get("Range", "")
        start = int(wanted[6:-1]) if wanted and state.ranges else 0
        rest = state.body[start:]
        self.answer(206 if start else 200, Content_Length=str(len(rest)))
        if state.cut_after:
            rest, state.cut_after = rest[: state.cut_after], 0
        self.wfile.write(rest)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state, servers = Hub(), []
    for handler in (HubHandler, FilesHandler):
        served = type(handler.__name__, (handler,), {"state": state})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), served))
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    state.url = f"http://127.0.0.1:{servers[0].server_port}"
    state.files_url = f"http://localhost:{servers[1].server_port}"  # another host, as for the real hub
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TWINSPECT_HOME", str(tmp_path / "home"))
    yield state
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        server.server_close()
        thread.join()


def test_fetch_writes_file_and_record_and_needs_no_network_again(hub: Hub) -> None:
    path = fetch(NAME)
    assert path.read_bytes() == BODY
    assert json.loads(record_file(path).read_text()) == {
        "repo": repository(NAME), "file": "model.safetensors", "revision": COMMIT, "sha256": SHA, "size": len(BODY),
    }  # fmt: skip
    assert find_weights(NAME)[0] == path
    asked = len(hub.requests)
    assert fetch(NAME) == path
    assert len(hub.requests) == asked
    assert sorted(p.name for p in store_dir().iterdir()) == [path.name, f"{path.name}.json", f"{path.name}.lock"]


def test_the_commit_is_asked_for_once_and_used_from_then_on(hub: Hub) -> None:
    fetch(NAME)
    paths = [path for host, _, path, _, _ in hub.requests if host == "hub"]
    assert "/resolve/main/" in paths[0]
    assert all(f"/resolve/{COMMIT}/" in path for path in paths[1:])


def test_a_renamed_repository_is_followed(hub: Hub) -> None:
    hub.renamed = True
    assert fetch(NAME).read_bytes() == BODY
    assert any("/renamed/" in path for _, _, path, _, _ in hub.requests)


def test_a_token_goes_to_the_hub_and_to_nobody_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch(NAME).read_bytes() == BODY
    assert {token for host, *_, token in hub.requests if host == "hub"} == {"Bearer hf_secret"}
    assert {token for host, *_, token in hub.requests if host == "files"} == {""}


def test_a_broken_connection_goes_on_from_its_last_byte(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)  # what is written at a time
    hub.cut_after = 550_000
    assert fetch(NAME).read_bytes() == BODY
    assert hub.gets() == ["", "bytes=500000-"]


def test_a_server_without_ranges_sends_everything_again(hub: Hub) -> None:
    hub.ranges, hub.cut_after = False, 500_000
    assert fetch(NAME).read_bytes() == BODY


@pytest.mark.parametrize("body", [BODY[:-1] + b"\x7f", b"version https://git-lfs.github.com/spec/v1\n"])
def test_wrong_bytes_are_deleted_and_refused(body: bytes, hub: Hub) -> None:
    """The right number of other bytes; and the pointer of the large-file storage instead of the file."""
    hub.body = body
    with pytest.raises(WeightsError, match=f"expected {SHA}; it was deleted" if len(body) == len(BODY) else "size"):
        fetch(NAME)
    assert [p.name for p in store_dir().iterdir()] == [f"{NAME}.safetensors.lock"]


def test_sha256_and_revision_pin(hub: Hub) -> None:
    with pytest.raises(WeightsError, match=f"expected {'0' * 64}; it was deleted"):
        fetch(NAME, sha256="0" * 64)
    assert stored_file(NAME) is None
    with pytest.raises(ConfigError, match="64 hex digits"):
        fetch(NAME, sha256="abc")
    path = fetch(NAME, revision=COMMIT, sha256=SHA.upper())
    assert path.read_bytes() == BODY
    with pytest.raises(WeightsError, match="RevisionNotFoundError.*Three ways"):
        fetch(NAME, revision="d" * 40)
    assert path.read_bytes() == BODY


def test_a_hub_that_tells_no_sha256_is_recorded_and_pinned_by_the_user(hub: Hub) -> None:
    hub.etag = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(WeightsError, match="it was deleted"):
        fetch(NAME, sha256="0" * 64)
    path = fetch(NAME)
    assert json.loads(record_file(path).read_text())["sha256"] == SHA


@pytest.mark.parametrize("refuse", [(401, "GatedRepo"), (403, "GatedRepo"), (401, ""), (403, "")])
def test_a_gated_model_says_what_to_do(refuse: tuple[int, str], hub: Hub) -> None:
    hub.refuse = refuse
    with pytest.raises(WeightsError) as caught:
        fetch("dinov3-small")
    said = str(caught.value)
    assert "licence: DINOv3 License" in said
    assert f"accept the terms at {hub.url}/{repository('dinov3-small')}, make a token" in said
    assert "hf auth login (or set HF_TOKEN). Three ways" in said


@pytest.mark.parametrize(
    ("refuse", "says"),
    [
        ((404, "EntryNotFound"), "EntryNotFoundError: 404"),
        ((404, "RepoNotFound"), "RepositoryNotFoundError: 404"),
        ((500, ""), "refuses dinov2-small"),
    ],
)
def test_other_refusals_name_the_three_ways(refuse: tuple[int, str], says: str, hub: Hub) -> None:
    hub.refuse = refuse
    with pytest.raises(WeightsError, match=rf"{says}.*\(1\).*\(2\) .*--weights FILE.*\(3\)"):
        fetch(NAME)


def test_a_host_that_is_no_hub_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.files_url)
    monkeypatch.setattr(FilesHandler, "do_HEAD", lambda self: self.answer(200, Content_Length="5"), raising=False)
    with pytest.raises(WeightsError, match="does not seem to be served by a Hugging Face Hub.*Three ways"):
        fetch(NAME)


def test_a_file_changed_after_it_was_fetched_is_refused_and_fetched_again(hub: Hub) -> None:
    path = fetch(NAME)
    path.write_bytes(BODY[:-1] + b"\x7f")
    with pytest.raises(WeightsError, match="damaged or replaced"):
        load_state(torch.nn.Linear(1, 1), path, NAME)
    assert fetch(NAME).read_bytes() == BODY
    record_file(path).write_text("{")
    with pytest.raises(WeightsError, match="is damaged"):
        load_state(torch.nn.Linear(1, 1), path, NAME)
    assert sha256_of(fetch(NAME)) == SHA


def test_a_file_put_there_by_hand_is_left_alone(hub: Hub) -> None:
    store_dir().mkdir(parents=True)
    own = store_dir() / f"{NAME}.pth"
    own.write_bytes(b"mine")
    assert fetch(NAME) == own
    assert "by hand" in fetch_lines(NAME, "", "")[0]
    assert hub.requests == []


def test_offline_and_unreachable_name_the_three_ways(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"cannot be reached.*\(1\).*\(2\) .*--weights FILE.*\(3\)"):
        fetch(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE is set.*\(1\).*\(2\).*\(3\)"):
        fetch(NAME)


def test_a_full_disk_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(WeightsError, match=r"cannot be written \(No space left on device\)"):
        fetch(NAME)


def test_licences() -> None:
    assert {licence(name) for name in SHORT_NAMES if not name.startswith("dinov3")} == {"apache-2.0"}
    assert licence("dinov3-base") == "DINOv3 License, Meta's own terms (access on request)"
    assert licence("no such network") == "not stated"


def test_embedded_names_need_nothing(hub: Hub) -> None:
    name = "efficientnet-lite0"
    assert fetch(name).is_file()
    assert "nothing needs fetching" in fetch_lines(name, "", "")[0]
    assert hub.requests == []


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'dinov2-base'"):
        fetch("dinov2-bas")


def test_two_at_once_do_not_mix(hub: Hub) -> None:
    store_dir().mkdir(parents=True)
    with (
        closing(lock(store_dir() / f"{NAME}.safetensors.lock", "")),
        pytest.raises(ConfigError, match="another process is fetching"),
    ):
        fetch(NAME)


def test_every_short_name_has_a_repository() -> None:
    for name in set(SHORT_NAMES) - set(EMBEDDED):
        assert repository(name).startswith(f"timm/{SHORT_NAMES[name]}.")
    assert repository("dinov2-base") == "timm/vit_base_patch14_reg4_dinov2.lvd142m"
    assert repository("vit_small_patch8_224.dino") == "timm/vit_small_patch8_224.dino"
