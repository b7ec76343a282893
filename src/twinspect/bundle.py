"""The files that hold a trained model: bundles, what lies beside exports, and signatures.

A bundle is safetensors and JSON in a zip, each with its sha256. Never pickle. It holds the teacher as well, so that
prediction needs no network and no package of weights. Beside an export (``model.onnx``, ``model.xml``) lies
``model.onnx.json``: how the model came to be, its threshold, the comparison that it passed, and the sha256 of every
file of the export. A signature (Ed25519) lies beside either, with ``.sig`` behind the file's name, so that nothing of
a model need be read to verify it. Keys are PEM files, as ``openssl genpkey -algorithm ed25519`` makes them.

`load` and `save` make models of bundles; nothing else here knows torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from twinspect import files
from twinspect._version import __version__
from twinspect.config import RunConfig
from twinspect.decide.decision import Decision
from twinspect.errors import NONSENSE, BundleError, ConfigError, refuse_version, required
from twinspect.types import Skipped

if TYPE_CHECKING:
    from twinspect.models.contract import AnomalyModel
    from twinspect.training.normal import GoodImages

FORMAT = 8  # raised when the statistics of a model, or what is made of them, change: 8 has one level of clusters
SUFFIX = ".twin"
EXPORT_FORMAT = 3  # raised when a reader of an older library would misunderstand the JSON beside an export
EXPORTS = {".onnx": "onnx", ".xml": "openvino"}  # ending of an export -> what runs it
_OF_EXPORT = ("runtime", "size", "decision", "record", "config", "check", "writer")
_META, _TENSORS, _MEMORY, _HASHES = "bundle.json", "model.safetensors", "memory.safetensors", "sha256.json"
# What zip and json raise on files that are cut off, changed, encrypted, or something else altogether.
_NOT_WHOLE = (*NONSENSE, zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError)
_PURPOSE = b"twinspect model, version 2\n"  # so that no signature of anything else can be taken for one of a model
_MAKE_KEY = {
    "private": "openssl genpkey -algorithm ed25519 -out key.pem",
    "public": "openssl pkey -in key.pem -pubout -out key.pub",
}
_MOST_UNPACKED = 50  # times as many bytes as packed: weights do not shrink like that


class BundleContent(NamedTuple):
    """What a bundle holds."""

    meta: dict[str, Any]  # plain JSON values
    tensors: bytes  # safetensors
    memory: bytes = b""  # the same, of good images, for updates; empty where nothing is kept of them


def write_bundle(path: Path, meta: Mapping[str, Any], tensors: bytes, memory: bytes = b"") -> None:
    """Write a bundle whole or not at all; an OutputError where it cannot be written."""
    head = {"format": FORMAT, "twinspect": __version__, **meta}
    parts = {_META: json.dumps(head, indent=1, allow_nan=False).encode(), _TENSORS: tensors}
    if memory:
        parts[_MEMORY] = memory
    hashes = {name: hashlib.sha256(body).hexdigest() for name, body in parts.items()}
    refuse_unwritable(path)
    with files.replacing(path) as raw, zipfile.ZipFile(raw, "w") as file:
        for name, body in {**parts, _HASHES: json.dumps(hashes).encode()}.items():
            # Level 9 takes three times as long, for 1 % less.
            file.writestr(zipfile.ZipInfo(name), body, zipfile.ZIP_DEFLATED, compresslevel=1)


def refuse_unwritable(path: Path) -> None:
    """As `files.refuse_unwritable`, for a bundle; called before training, so that no work is lost."""
    files.refuse_unwritable(path, "--out", f"model{SUFFIX}", _looks_like_bundle)


def _looks_like_bundle(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(64)
    return head[:2] == b"PK" and _META.encode() in head


def keep_old(path: Path) -> str:
    """Keep the bundle that is about to be replaced as ``NAME.bak``, and say so; empty where there is none."""
    if not path.is_file():
        return ""
    backup = path.with_name(f"{path.name}.bak")
    copy_whole(path, backup)
    return f"kept the model that was there as {backup} (--force keeps none)"


def copy_whole(path: Path, to: Path) -> None:
    """Copy a file; a crash leaves the whole copy or none."""
    with path.open("rb") as old, files.replacing(to) as copy:
        shutil.copyfileobj(old, copy)


def read_bundle(path: Path) -> BundleContent:
    """Read and verify a bundle; a BundleError where it is damaged, changed, or of another format."""
    if path.is_dir():
        raise BundleError(
            f"{path} is a folder, and a model's file (NAME{SUFFIX}) is needed in its place; the model stands before "
            f"the images. Make one with: twinspect fit {path} --out model{SUFFIX}"
        )
    if not path.is_file():
        made = path.with_suffix(SUFFIX) if path.name else path
        raise BundleError(f"no such model: {path}.{files.near_names(path)} Type: twinspect fit DATA --out {made}")
    try:
        with zipfile.ZipFile(path) as file:
            parts = {_META: _member(file, _META)}
            meta = json.loads(parts[_META])
            older = f"Train it again, as its statistics are others: twinspect fit DATA --out {path}"
            refuse_version(path, meta["format"], FORMAT, meta["twinspect"], older)
            names = file.namelist()
            parts |= {name: _member(file, name) for name in (_TENSORS, _MEMORY) if name in names}
            hashes = dict(json.loads(_member(file, _HASHES)))
    except _NOT_WHOLE as error:
        if path.suffix.lower() in EXPORTS:
            raise BundleError(f"{path} is an export; give the model that it was made from (NAME{SUFFIX})") from None
        raise BundleError(
            f"{path} is not a whole bundle, or no model ({error}); copy it again, or give a file that fit wrote"
        ) from None
    if absent := {_TENSORS, *hashes} - parts.keys():
        raise BundleError(f"{path} is not a whole bundle ({', '.join(sorted(absent))} is missing); copy it again")
    for name, body in parts.items():
        if hashes.get(name) != hashlib.sha256(body).hexdigest():
            raise BundleError(f"{path}: {name} does not match its sha256; the file was changed or damaged")
    return BundleContent(meta, parts[_TENSORS], parts.get(_MEMORY, b""))


def _member(file: zipfile.ZipFile, name: str) -> bytes:
    """A member; one that unpacks to far more than any model does is refused: it could fill the memory."""
    info = file.getinfo(name)
    if info.file_size > _MOST_UNPACKED * max(info.compress_size, 100_000):
        raise ValueError(f"{name} would unpack to {info.file_size:,} bytes from {info.compress_size:,}")
    return file.read(name)


def is_export(path: Path | str) -> bool:
    """Whether a path names an exported model (.onnx, .xml) rather than a bundle."""
    return Path(path).suffix.lower() in EXPORTS


def companion(path: Path) -> Path:
    """The JSON file beside an export."""
    return path.with_name(f"{path.name}.json")


def files_of(path: Path) -> list[Path]:
    """A model's file, and those beside an export that belong to it, as far as they are there."""
    beside = (path.with_suffix(".bin"), companion(path)) if is_export(path) else ()
    return [file for file in (path, *beside) if file.is_file()]


def write_beside(path: Path, meta: Mapping[str, Any]) -> None:
    """Write beside an export what it says of itself (see `read_meta`), with the sha256 of its files."""
    hashes = {part.suffix: files.sha256_of(part) for part in (path, path.with_suffix(".bin")) if part.is_file()}
    head = {"format": EXPORT_FORMAT, "writer": __version__, "files": hashes}
    companion(path).write_text(json.dumps({**head, **meta}, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_meta(path: Path) -> dict[str, Any]:
    """What a bundle or an export says of itself, verified; no model is built and no runtime is loaded.

    Both have ``config``, ``record`` and ``decision``, ``format``, and ``twinspect``, the version that wrote it. An
    export has ``runtime``, ``size`` (input side in pixels) and ``check`` (the comparison that it passed), too. A
    BundleError where the model is missing, damaged, changed since, or made for another version of the library.
    """
    if not is_export(path):
        return read_bundle(path).meta
    if not path.is_file():
        advice = f"Make one with: twinspect export MODEL --out {path}"
        raise BundleError(f"no such model: {path}.{files.near_names(path)} {advice}")
    home = companion(path)
    if not home.is_file():
        raise BundleError(
            f"{home.name} must lie beside {path}: it holds the threshold, without which no decision can be made. "
            "Copy both, or type: twinspect export MODEL --out NEW.onnx"
        )
    try:
        meta = dict(json.loads(home.read_text(encoding="utf-8")))
        older = f"Export its bundle again: twinspect export MODEL --out {path.name}"
        refuse_version(path, meta.get("format", 0), EXPORT_FORMAT, meta.get("writer", "of an unknown version"), older)
        ending = path.suffix.lower()
        for suffix in {ending, *meta["files"]}:
            part = path if suffix == ending else path.with_suffix(suffix)
            if not part.is_file():
                raise BundleError(f"{part} is missing; an export is moved with all its files")
            if files.sha256_of(part) != meta["files"][suffix]:
                raise BundleError(f"{part} was changed or damaged after it was exported (sha256); export it again")
        return {name: meta[name] for name in ("format", *_OF_EXPORT)} | {"twinspect": meta["writer"]}
    except KeyError as error:
        raise BundleError(f"{home}: its metadata lack {error}; export it again") from None
    except (*NONSENSE, OSError, RecursionError) as error:
        raise BundleError(f"{home} is damaged or not an export ({error}); copy it again or export again") from None


@dataclass(slots=True)
class Fitted:
    """A trained model and the record of how it came to be."""

    model: AnomalyModel
    decision: Decision
    config: RunConfig
    record: dict[str, Any]
    skipped: list[Skipped] = field(default_factory=list)
    good: GoodImages | None = None  # of a model that was just trained
    memory: bytes = b""  # what further images can be added to; see `training.outcome`


def model_id(model: AnomalyModel) -> str:
    """Name of a trained model: hash of its normal statistics, which no two trainings share."""
    digest = hashlib.sha256()
    for name, value in sorted(model.scorer.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def save(fitted: Fitted, path: Path) -> Path:
    """Write a bundle; an OutputError where it cannot be written."""
    from safetensors.torch import save as to_bytes

    tensors = {name: value.contiguous() for name, value in fitted.model.state_dict().items()}
    config, decision = fitted.config.to_dict(), fitted.decision.to_dict()
    meta = {"config": config, "record": fitted.record, "decision": decision}
    write_bundle(path, meta, to_bytes(tensors), fitted.memory)
    return path


def load(path: Path) -> Fitted:
    """Read a bundle back; a BundleError where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    from twinspect.models.contract import build_model
    from twinspect.models.teachers import create_teacher

    meta, parts, memory = read_bundle(path)
    try:
        config, record = RunConfig.from_dict(meta["config"]), meta["record"]
        tensors = from_bytes(parts)
        model = build_model(config.model, create_teacher(record["teacher"]["name"], pretrained=False))
        model.roi_SS = tensors.get("roi_SS")
        for name, buffer in list(model.named_buffers()):
            stored = tensors.get(name, buffer)
            if stored.shape != buffer.shape:  # its number of clusters is learnt
                owner, _, last = name.rpartition(".")
                model.get_submodule(owner).register_buffer(last, stored.new_empty(stored.shape))
        model.load_state_dict(tensors)
        model.eval()
        model.teacher.weights = record["teacher"]["weights"]
        decision = Decision.from_dict(meta["decision"], str(path))
    except (*NONSENSE, RuntimeError, AssertionError, SafetensorError) as error:
        raise BundleError(f"{path}: its parts do not fit together ({str(error)[:300]})") from None
    if decision.model_id != (id_of_model := model_id(model)):
        raise BundleError(
            f"{path}: its thresholds were made with another model (id {decision.model_id or 'unknown'}, this one is "
            f"{id_of_model}); scores of two models cannot be compared. Type: twinspect calibrate MODEL GOOD"
        )
    return Fitted(model, decision, config, record, memory=memory)


def signature_file(path: Path) -> Path:
    """Where the signature of a model lies."""
    return path.with_name(f"{path.name}.sig")


def sign(path: Path, key_file: Path) -> None:
    """Sign a bundle or an export, anew if it is signed; a BundleError where it is not a whole model."""
    key = _key(key_file, "private")
    read_meta(path)
    files.write_text(signature_file(path), base64.b64encode(key.sign(_statement(path))).decode("ascii") + "\n")


def verify(path: Path, key_file: Path) -> None:
    """Refuse, by a BundleError, a model that the key's holder has not signed as it is now."""
    key = _key(key_file, "public")
    if not signature_file(path).is_file():
        raise BundleError(f"{path} is not signed; whoever holds the key types: twinspect sign {path.name} --key KEY")
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(base64.b64decode(files.read_text(signature_file(path)).strip(), validate=True), _statement(path))
    except (InvalidSignature, ValueError, OSError):
        raise BundleError(
            f"{path}: its signature is not that of {key_file}, or the model was changed after it was signed; "
            "get it again from whoever trained it, with its .sig"
        ) from None
    if is_export(path):
        read_meta(path)  # it names the sha256 of the other files


@contextmanager
def verified(path: Path, key_file: Path) -> Iterator[Path]:
    """A copy of a model that nobody else can write: what is opened is what was verified. Raises as `verify`."""
    with tempfile.TemporaryDirectory(prefix="twinspect-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder) / path.name
        try:
            for part in {path, signature_file(path), *files_of(path)}:
                if part == path or part.is_file():
                    shutil.copyfile(part, copy.with_name(part.name))
            verify(copy, key_file)
        except OSError as error:
            raise BundleError(f"{path}: cannot be copied to be verified ({error.strerror or error})") from None
        except BundleError as error:
            raise BundleError(str(error).replace(str(copy), str(path))) from None
        yield copy


def _statement(path: Path) -> bytes:
    """What is signed: of a bundle the sha256, of an export that of the JSON beside it."""
    return _PURPOSE + files.sha256_of(companion(path) if is_export(path) else path).encode()


def _key(file: Path, kind: str) -> Any:
    required("cryptography", "a signature", "twinspect[sign]")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    try:
        body = file.read_bytes()
        key = load_pem_private_key(body, None) if kind == "private" else load_pem_public_key(body)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise ConfigError(
            f"{file}: no {kind} key in a PEM file without password ({error}). Type: {_MAKE_KEY[kind]}"
        ) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
        raise ConfigError(f"{file}: a key of another kind than Ed25519. Type: {_MAKE_KEY[kind]}")
    return key
