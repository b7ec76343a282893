"""Ed25519 signatures: that a bundle or an export comes from whoever holds a key, and was not changed since.

What is signed is the whole file: weights, statistics, settings and thresholds. The signature lies beside it, with
``.sig`` behind the file's name, so that nothing of a model need be read to verify it. Keys are PEM files, as
``openssl genpkey -algorithm ed25519`` makes them.
"""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twinspect.bundle import read_bundle
from twinspect.errors import BundleError, ConfigError
from twinspect.files import read_text, sha256_of, write_text
from twinspect.inference.runtimes import companion, is_export, read_export

_PURPOSE = b"twinspect model, version 2\n"  # so that no signature of anything else can be taken for one of a model
_MAKE_KEY = {
    "private": "openssl genpkey -algorithm ed25519 -out key.pem",
    "public": "openssl pkey -in key.pem -pubout -out key.pub",
}


def signature_file(path: Path) -> Path:
    """Where the signature of a model lies."""
    return path.with_name(f"{path.name}.sig")


def sign(path: Path, key_file: Path) -> None:
    """Sign a bundle or an export, anew if it is signed; a BundleError where it is not a whole model."""
    key = _key(key_file, "private")
    if is_export(path):
        read_export(path)
    else:
        read_bundle(path)
    write_text(signature_file(path), base64.b64encode(key.sign(_statement(path))).decode("ascii") + "\n")


def verify(path: Path, key_file: Path) -> None:
    """Refuse, by a BundleError, a model that the key's holder has not signed as it is now."""
    key = _key(key_file, "public")
    if not signature_file(path).is_file():
        raise BundleError(f"{path} is not signed; whoever holds the key types: twinspect sign {path.name} --key KEY")
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(base64.b64decode(read_text(signature_file(path)).strip(), validate=True), _statement(path))
    except (InvalidSignature, ValueError, OSError):
        raise BundleError(
            f"{path}: its signature is not that of {key_file}, or the model was changed after it was signed; "
            "get it again from whoever trained it, with its .sig"
        ) from None
    if is_export(path):
        read_export(path)  # it names the sha256 of the other files


@contextmanager
def verified(path: Path, key_file: Path) -> Iterator[Path]:
    """A copy of a model that nobody else can write: what is opened is what was verified. Raises as `verify`."""
    with tempfile.TemporaryDirectory(prefix="twinspect-", ignore_cleanup_errors=True) as folder:
        beside = (companion(path), path.with_suffix(".bin")) if is_export(path) else ()
        try:
            for part in (path, signature_file(path), *beside):
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


def _statement(path: Path) -> bytes:
    """What is signed: of a bundle the sha256, of an export that of the JSON beside it."""
    return _PURPOSE + sha256_of(companion(path) if is_export(path) else path).encode()


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
