"""Ed25519 signatures: that a bundle or an export comes from whoever holds a key, and was not changed since.

What is signed are the sha256 of all its parts: weights, statistics, settings and thresholds. A bundle carries its
signature itself, an export in the JSON file beside it, so that a model and its signature come and go together. Keys
are PEM files, as ``openssl genpkey -algorithm ed25519`` makes them.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twinspect.bundle import add_signature, read_bundle
from twinspect.errors import BundleError, ConfigError
from twinspect.files import write_text
from twinspect.inference.runtimes import companion, is_export, read_export

_PURPOSE = b"twinspect model, version 1\n"  # so that no signature of anything else can be taken for one of a model
_SIGNATURE = "signature"


_MAKE_KEY = {
    "private": "openssl genpkey -algorithm ed25519 -out key.pem",
    "public": "openssl pkey -in key.pem -pubout -out key.pub",
}


def sign(path: Path, key_file: Path) -> None:
    """Sign a bundle or an export; a signature that is there is replaced.

    Raises:
        BundleError: not a whole model.
        ConfigError: not a private key, or the package of signatures is not installed.
    """
    key = _key(key_file, "private")
    hashes, _ = _parts(path)
    text = base64.b64encode(key.sign(_statement(hashes))).decode("ascii")
    if is_export(path):
        write_text(companion(path), json.dumps({**hashes, _SIGNATURE: text}, indent=1) + "\n")
    else:
        add_signature(path, text)


def verify(path: Path, key_file: Path) -> None:
    """Refuse a model that the key's holder has not signed as it is now.

    Raises:
        BundleError: no signature, another key's, or the model was changed.
        ConfigError: not a public key, or the package of signatures is not installed.
    """
    key = _key(key_file, "public")
    hashes, text = _parts(path)
    if not text:
        raise BundleError(f"{path} is not signed; whoever holds the key types: twinspect sign {path.name} --key KEY")
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(base64.b64decode(text, validate=True), _statement(hashes))
    except (InvalidSignature, ValueError):
        raise BundleError(
            f"{path}: its signature is not that of {key_file}, or the model was changed after it was signed; "
            "get it again from whoever trained it"
        ) from None


@contextmanager
def verified(path: Path, key_file: Path) -> Iterator[Path]:
    """A copy of a model that nobody else can write: what is opened is what was verified. Raises as `verify`."""
    with tempfile.TemporaryDirectory(prefix="twinspect-", ignore_cleanup_errors=True) as folder:
        beside = (companion(path), path.with_suffix(".bin")) if is_export(path) else ()
        try:
            for part in (path, *beside):
                if part == path or part.is_file():
                    shutil.copyfile(part, Path(folder) / part.name)
        except OSError as error:
            raise BundleError(f"{path}: cannot be copied to be verified ({error.strerror or error})") from None
        copy = Path(folder) / path.name
        try:
            verify(copy, key_file)
        except BundleError as error:
            raise BundleError(str(error).replace(str(copy), str(path))) from None
        yield copy


def _parts(path: Path) -> tuple[dict[str, Any], str]:
    """What is signed of a model, which is found to be whole, and the signature it has."""
    if not is_export(path):
        content = read_bundle(path)
        return content.hashes, content.signature
    read_export(path)
    values = dict(json.loads(companion(path).read_text(encoding="utf-8")))
    return values, str(values.pop(_SIGNATURE, ""))


def _statement(values: dict[str, Any]) -> bytes:
    return _PURPOSE + json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _key(file: Path, kind: str) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ed25519
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError:
        raise ConfigError("signatures need the package cryptography; type: pip install 'twinspect[sign]'") from None
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
