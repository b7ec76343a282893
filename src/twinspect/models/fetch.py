"""``twinspect fetch``: the only code of this library that downloads. Explicit, resumable, verified.

The hub is asked for the commit behind a revision and for the sha256 of the file (the etag of its large-file
storage); the bytes must agree. Commit and sha256 are written beside the file, and every later load compares.
The table below names repositories but no commits: a pin that nobody has checked would be worth nothing. Pin
with ``--revision`` and ``--sha256``, or copy them from the record of a machine that you trust.

Why not ``hf_hub_download``: since huggingface-hub 2 it deletes what a killed process had downloaded.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from twinspect.errors import ConfigError, WeightsError, unknown_name
from twinspect.models.weights import (
    EMBEDDED,
    SHORT_NAMES,
    file_sha256,
    find_weights,
    record_file,
    store_dir,
    store_name,
    stored_file,
    three_ways,
    verify_record,
)

Progress = Callable[[str, int, int], None]

# Short name -> hub repository of the timm weights; the file is always model.safetensors.
REPOSITORIES = {
    "dinov2-small": "timm/vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2-base": "timm/vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-large": "timm/vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2-small-noreg": "timm/vit_small_patch14_dinov2.lvd142m",
    "dinov2-base-noreg": "timm/vit_base_patch14_dinov2.lvd142m",
    "dinov2-large-noreg": "timm/vit_large_patch14_dinov2.lvd142m",
    "dinov3-small": "timm/vit_small_patch16_dinov3.lvd1689m",
    "dinov3-base": "timm/vit_base_patch16_dinov3.lvd1689m",
    "wide-resnet50-2": "timm/wide_resnet50_2.racm_in1k",
}
FILE = "model.safetensors"
_ATTEMPTS = 4  # connections of one run; a later run goes on from the same byte
_TIMEOUT_S = 30.0
_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Remote:
    """A file on the hub as its metadata describe it; ``sha256`` is empty where the hub does not tell."""

    repo: str
    revision: str
    sha256: str
    size: int
    url: str
    token: str


def silent(_stage: str, _done: int, _total: int) -> None:
    """Progress for callers that want none."""


def fetch(name: str, progress: Progress = silent, revision: str = "", sha256: str = "") -> Path:
    """Download a teacher's weights into the store, verify them, and return the file.

    What is there already, and still is what was fetched, is not downloaded again. An interrupted download
    goes on from its last byte.

    Args:
        name: short name of a teacher or a timm name (``model.tag``).
        progress: called with (stage, done MiB, all MiB).
        revision: commit or branch of the hub repository; empty takes ``main`` as it is now.
        sha256: what the file must have; empty takes the hub's word.

    Raises:
        ConfigError: unknown name, or ``sha256`` is not one.
        WeightsError: no network, offline mode, a file that is not what the hub or ``sha256`` says, a full disk.
    """
    if name in EMBEDDED:
        return find_weights(name).path
    sha256 = sha256.lower()
    if sha256 and not _SHA256.fullmatch(sha256):
        raise ConfigError(f"--sha256 {sha256}: 64 hex digits are needed")
    repo = repository(name)
    present = _present(name, revision, sha256)
    if present is not None:
        return present
    remote = _describe(name, repo, revision)
    if sha256 and remote.sha256 and sha256 != remote.sha256:
        raise WeightsError(
            f"{repo} at {remote.revision[:12]} has a file of sha256 {remote.sha256}, asked for was {sha256}; "
            "name the commit that has it with --revision"
        )
    return _download(name, remote, sha256 or remote.sha256, progress)


def repository(name: str) -> str:
    """Hub repository of a short name or a timm name.

    Raises:
        ConfigError: neither of them, or timm knows no file on the hub for it.
    """
    if name in REPOSITORIES:
        return REPOSITORIES[name]
    from twinspect.models.timm_import import timm

    if not timm.is_model(name):
        raise ConfigError(unknown_name("teacher", name, SHORT_NAMES) + ", or any timm name")
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise ConfigError(f"timm knows no weights of {name} on the hub; pass a local file with --weights FILE")
    return str(config.hf_hub_id)


def is_offline() -> bool:
    """Whether the user forbids the hub (``HF_HUB_OFFLINE``)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _present(name: str, revision: str, sha256: str) -> Path | None:
    """The stored file, if it is whole and is what was asked for."""
    path = stored_file(name)
    if path is None:
        return None
    record = record_file(path)
    if not record.is_file():  # put there by hand: its owner knows what it is
        return path if not sha256 or file_sha256(path) == sha256 else None
    try:
        verify_record(path)
        known = json.loads(record.read_text(encoding="utf-8"))
    except WeightsError:
        return None
    agrees = sha256 in ("", known["sha256"]) and revision in ("", known.get("revision"))
    return path if agrees else None


def _describe(name: str, repo: str, revision: str) -> Remote:
    """Ask the hub which commit a revision is, and what the file must look like."""
    if is_offline():
        raise WeightsError(f"HF_HUB_OFFLINE is set, so {name} is not fetched. {three_ways(name)}")
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT") or None
    url = hf_hub_url(repo, FILE, revision=revision or "main", endpoint=endpoint)
    try:
        found = get_hf_file_metadata(url, timeout=_TIMEOUT_S, endpoint=endpoint)
    except Exception as error:  # the hub's client raises dozens of kinds, of three libraries
        raise WeightsError(_no_answer(name, url, error)) from None
    if not found.size or not found.commit_hash:
        raise WeightsError(f"{url} gave no size or commit; is HF_ENDPOINT a hub? {three_ways(name)}")
    etag = found.etag or ""
    own_host = urlsplit(found.location).netloc == urlsplit(url).netloc
    return Remote(
        repo, found.commit_hash, etag if _SHA256.fullmatch(etag) else "", found.size, found.location,
        (get_token() or "") if own_host else "",
    )  # fmt: skip


def _download(name: str, remote: Remote, sha256: str, progress: Progress) -> Path:
    from filelock import FileLock, Timeout

    path = store_dir() / store_name(name)
    part = path.with_name(f"{path.name}.{(sha256 or remote.revision)[:16]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=0):
            if not (sha256 and path.is_file() and file_sha256(path) == sha256):
                _fill(part, remote, name, progress)
                found = _verified(part, remote, sha256)
                path.unlink(missing_ok=True)  # an older file must never stand beside the new record
                _write_record(path, remote, found)
                os.replace(part, path)
    except Timeout:
        raise WeightsError(f"another process is fetching {name}; wait for it") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be written ({error.strerror or error})") from None
    return path


def _fill(part: Path, remote: Remote, name: str, progress: Progress) -> None:
    """Append what is missing, over several connections if need be."""
    reason: Exception | str = ""
    for _ in range(_ATTEMPTS):
        with part.open("ab") as file:
            if file.tell() > remote.size:
                _restart(file)
            try:
                _receive(file, remote, lambda done: progress(f"fetching {name} (MiB)", done >> 20, remote.size >> 20))
            except _NetworkError as error:
                reason = error
            if file.tell() == remote.size:
                return
    raise WeightsError(_no_answer(name, remote.url, reason or "the connection ends too early"))


def _receive(file: BinaryIO, remote: Remote, tell: Callable[[int], None]) -> None:
    start = file.tell()
    request = urllib.request.Request(remote.url, headers={"User-Agent": "twinspect", "Range": f"bytes={start}-"})
    if remote.token:  # never sent on to another host by a redirect
        request.add_unredirected_header("Authorization", f"Bearer {remote.token}")
    if start == remote.size:
        return
    with _open(request) as response:
        if start and response.status != 206:  # the server sends everything from the first byte
            _restart(file)
        while chunk := _read(response):
            file.write(chunk)
            tell(file.tell())


def _restart(file: BinaryIO) -> None:
    file.truncate(0)
    file.seek(0)


class _NetworkError(Exception):
    """The other side failed; not our disk, although both are OSErrors."""


def _open(request: urllib.request.Request) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except (OSError, HTTPException) as error:
        raise _NetworkError(str(error)) from None


def _read(response: Any) -> bytes:
    try:
        chunk: bytes = response.read(_CHUNK)
    except (OSError, HTTPException) as error:
        raise _NetworkError(str(error)) from None
    return chunk


def _verified(part: Path, remote: Remote, sha256: str) -> str:
    found = file_sha256(part)
    if sha256 and found != sha256:
        part.unlink()
        raise WeightsError(
            f"the file fetched from {remote.repo} has sha256 {found}, expected {sha256}; it was deleted. "
            "Try again; if it happens twice, the file or the way to it is tampered with"
        )
    return found


def _write_record(path: Path, remote: Remote, sha256: str) -> None:
    record = {"repo": remote.repo, "file": FILE, "revision": remote.revision, "sha256": sha256, "size": remote.size}
    record_file(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _no_answer(name: str, url: str, error: Exception | str) -> str:
    first = "".join(str(error).strip().splitlines()[:1])
    foreign = isinstance(error, Exception) and not isinstance(error, _NetworkError)
    said = f"{type(error).__name__}: {first}" if foreign else first
    return f"{urlsplit(url).netloc} cannot be reached or refuses {name} ({said}). {three_ways(name)}"


def fetch_lines(name: str, revision: str, sha256: str, progress: Progress) -> list[str]:
    """``twinspect fetch``: what to tell the user afterwards."""
    path = fetch(name, progress, revision, sha256)
    if name in EMBEDDED:
        return [f"{name} comes inside a Python package, nothing needs fetching: {path}"]
    record = record_file(path)
    if not record.is_file():
        return [f"{name} was put there by hand and is left alone: {path}"]
    known = json.loads(record.read_text(encoding="utf-8"))
    return [
        f"weights of {name}: {path} ({known['size'] / 1e6:.0f} MB)",
        f"from {known['repo']} at {known['revision']}, sha256 {known['sha256']} (verified at every load)",
    ]
