"""``twinspect fetch``: the only code of this library that downloads. Explicit and verified.

`huggingface_hub` speaks with the hub: endpoint, mirror, token and proxy are its own settings (``HF_ENDPOINT``,
``HF_TOKEN`` ...), and a connection that breaks goes on from its last byte. What is ours is the record. The hub is
asked for the commit behind a revision and for the sha256 of the file (the etag of its large-file storage); the bytes
must agree. Commit and sha256 are written beside the file, and every later load compares.

timm names the repositories, but nobody names commits: a pin that nobody has checked would be worth nothing. Pin with
``--revision`` and ``--sha256``, or copy them from the record of a machine that you trust.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from twinspect.errors import ConfigError, WeightsError
from twinspect.files import lock, sha256_of
from twinspect.models.teachers import architecture
from twinspect.models.timm_import import timm
from twinspect.models.weights import (
    EMBEDDED,
    find_weights,
    licence,
    record_file,
    store_dir,
    store_name,
    stored_file,
    three_ways,
    verify_record,
)
from twinspect.types import Progress, silent

T = TypeVar("T")

FILE = "model.safetensors"
_TIMEOUT_S = 30.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(name: str, progress: Progress = silent, revision: str = "", sha256: str = "") -> Path:
    """Download a teacher's weights into the store, verify them, and return the file.

    What is there already, and still is what was fetched, is not downloaded again. ``revision`` is a commit or branch
    of the hub repository (empty: ``main`` as it is now), ``sha256`` what the file must have (empty: what the hub
    says). A ConfigError for an unknown name, or if another process is fetching the same; else a WeightsError.
    """
    if name in EMBEDDED:
        return find_weights(name).path
    sha256 = sha256.lower()
    if sha256 and not _SHA256.fullmatch(sha256):
        raise ConfigError(f"--sha256 {sha256}: 64 hex digits are needed")
    repo = repository(name)
    if (present := _present(name, revision, sha256)) is not None:
        return present
    path = store_dir() / store_name(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(lock(Path(f"{path}.lock"), f"another process is fetching {name}; wait for it")):
            _download(name, repo, revision, sha256, path, progress)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written ({error.strerror or error})") from None
    return path


def _download(name: str, repo: str, revision: str, sha256: str, path: Path, progress: Progress) -> None:
    """Into a folder beside the file; the file is replaced only by verified bytes."""
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT") or None
    url = hf_hub_url(repo, FILE, revision=revision or "main", endpoint=endpoint)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise WeightsError(f"HF_HUB_OFFLINE is set, so {name} is not fetched. {three_ways(name)}")
    remote = _answered(
        name, url, lambda: get_hf_file_metadata(url, token=get_token(), timeout=_TIMEOUT_S, endpoint=endpoint)
    )
    if not remote.size or not remote.commit_hash:
        raise WeightsError(f"{url} gave no size or commit; is HF_ENDPOINT a hub? {three_ways(name)}")
    commit, etag, size = str(remote.commit_hash), remote.etag or "", int(remote.size)
    promised = etag if _SHA256.fullmatch(etag) else ""  # files outside the large-file storage have another etag
    if sha256 and promised and sha256 != promised:
        raise WeightsError(
            f"{repo} at {commit[:12]} has a file of sha256 {promised}, asked for was {sha256}; "
            "name the commit that has it with --revision"
        )
    folder = path.with_name(f"{path.name}.incoming")
    bar = _bar(lambda done: progress(f"fetching {name} (MiB)", done >> 20, size >> 20))
    options: dict[str, Any] = {"endpoint": endpoint, "etag_timeout": _TIMEOUT_S, "tqdm_class": bar}
    try:
        file = _answered(name, url, lambda: hf_hub_download(repo, FILE, revision=commit, local_dir=folder, **options))
        digest, expected = sha256_of(Path(file)), sha256 or promised
        if expected and digest != expected:
            raise WeightsError(
                f"the file fetched from {repo} has sha256 {digest}, expected {expected}; it was deleted. "
                "Try again; if it happens twice, the file or the way to it is tampered with"
            )
        path.unlink(missing_ok=True)  # an older file must never stand beside the new record
        record = {"repo": repo, "file": FILE, "revision": commit, "sha256": digest, "size": size}
        record_file(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(file, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answered(name: str, url: str, call: Callable[[], T]) -> T:
    """What the hub answers; what it or the way to it refuses becomes a sentence, what our disk refuses is raised."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return call()
    except Exception as error:  # the hub's client raises dozens of kinds, of three libraries
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        hub = urlsplit(url)
        refused = error.response if isinstance(error, HfHubHTTPError) else None
        if refused is not None and refused.status_code in (401, 403):
            raise WeightsError(
                f"{hub.netloc} gives {name} only to accounts that have access (licence: {licence(name)}). Read and "
                f"accept the terms at {hub.scheme}://{hub.netloc}/{repository(name)}, make a token in the settings "
                f"of your account, and type: hf auth login (or set HF_TOKEN). {three_ways(name)}"
            ) from None
        first = "".join(str(error).strip().splitlines()[:1])
        raise WeightsError(
            f"{hub.netloc} cannot be reached or refuses {name} ({type(error).__name__}: {first}). {three_ways(name)}"
        ) from None


def _bar(tell: Callable[[int], None]) -> type:
    """The hub's progress bar, drawn by our own."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # untyped
        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            super().__init__(disable=True)
            self.n = initial

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            tell(int(self.n))

    return Bar


def repository(name: str) -> str:
    """Hub repository of a short name or a timm name; a ConfigError where timm knows none."""
    config = timm.get_pretrained_cfg(architecture(name))
    if config is None or not config.hf_hub_id:
        raise ConfigError(f"timm knows no weights of {name} on the hub; pass a local file with --weights FILE")
    return str(config.hf_hub_id)


def _present(name: str, revision: str, sha256: str) -> Path | None:
    """The stored file, if it is whole and is what was asked for."""
    path = stored_file(name)
    if path is None:
        return None
    try:
        known = verify_record(path)
    except WeightsError:
        return None
    if not known:  # put there by hand: its owner knows what it is
        return path if not sha256 or sha256_of(path) == sha256 else None
    return path if sha256 in ("", known["sha256"]) and revision in ("", known.get("revision")) else None


def fetch_lines(name: str, revision: str, sha256: str, progress: Progress) -> list[str]:
    """``twinspect fetch``: what to tell the user afterwards."""
    path = fetch(name, progress, revision, sha256)
    if name in EMBEDDED:
        return [f"{name} comes inside a Python package, nothing needs fetching: {path}"]
    if not record_file(path).is_file():
        return [f"{name} was put there by hand and is left alone: {path}"]
    known = json.loads(record_file(path).read_text(encoding="utf-8"))
    return [
        f"weights of {name}: {path} ({known['size'] / 1e6:.0f} MB), licence: {licence(name)}",
        f"from {known['repo']} at {known['revision']}, sha256 {known['sha256']} (verified at every load)",
    ]
