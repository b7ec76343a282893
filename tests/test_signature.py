"""Signed models: what the key's holder signed is served, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from tiny import good_folder
from typer.testing import CliRunner

from twinspect import Detector
from twinspect.bundle import (
    companion,
    read_bundle,
    sign,
    signature_file,
    verified,
    verify,
    write_beside,
    write_bundle,
)
from twinspect.cli import app
from twinspect.errors import BundleError, ConfigError


def write_keys(folder: Path, name: str, key=None) -> SimpleNamespace:
    key = key or ed25519.Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo))
    return SimpleNamespace(private=private, public=public)


@pytest.fixture
def keys(tmp_path: Path) -> SimpleNamespace:
    return write_keys(tmp_path, "ours")


@pytest.fixture
def model(quick: Detector, tmp_path: Path) -> Path:
    return quick.save(tmp_path / "parts.twin")


def test_a_signed_bundle_is_verified_and_is_the_same_model(model: Path, keys: SimpleNamespace) -> None:
    before = read_bundle(model)
    with pytest.raises(BundleError, match=r"is not signed; .* twinspect sign parts.twin --key KEY"):
        verify(model, keys.public)
    sign(model, keys.private)
    sign(model, keys.private)  # again: the signature is replaced
    verify(model, keys.public)
    assert read_bundle(model) == before
    with verified(model, keys.public) as copy:
        assert copy != model
        assert copy.read_bytes() == model.read_bytes()
    assert not copy.exists()


def test_other_keys_and_every_change_are_refused(model: Path, keys: SimpleNamespace, tmp_path: Path) -> None:
    sign(model, keys.private)
    with pytest.raises(BundleError, match="its signature is not that of"):
        verify(model, write_keys(tmp_path, "theirs").public)
    content = read_bundle(model)
    forged = tmp_path / "forged.twin"
    for change in ("decision", "record"):
        meta = {**content.meta, change: {**content.meta[change], "more": 1}}
        write_bundle(forged, {k: v for k, v in meta.items() if k not in ("format", "twinspect")}, content.tensors)
        signature_file(forged).unlink(missing_ok=True)
        with pytest.raises(BundleError, match="is not signed"):
            verify(forged, keys.public)
        shutil.copyfile(signature_file(model), signature_file(forged))
        with pytest.raises(BundleError, match="its signature is not that of"), verified(forged, keys.public):
            pass
    for nonsense in (b"", b"\xff\xfe", b"not base64!", signature_file(model).read_bytes()[:40]):
        signature_file(model).write_bytes(nonsense)
        with pytest.raises(BundleError, match="its signature is not that of"):
            verify(model, keys.public)


def test_exports_carry_their_signature_beside_them(
    model: Path, keys: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = {field: {} for field in ("decision", "record", "config", "check")}
    meta |= {"runtime": "onnx", "size": 32}
    export = tmp_path / "a.onnx"
    export.write_bytes(b"graph")
    write_beside(export, meta)
    sign(export, keys.private)
    verify(export, keys.public)
    text = companion(export).read_text()
    companion(export).write_text(json.dumps({**json.loads(text), "runtime": "openvino"}))
    with pytest.raises(BundleError, match="the model was changed after it was signed"):
        verify(export, keys.public)
    companion(export).write_text(text)
    export.write_bytes(b"other")
    with pytest.raises(BundleError, match="was changed or damaged after it was exported"):
        verify(export, keys.public)


def test_what_is_no_key_is_said(model: Path, keys: SimpleNamespace, tmp_path: Path) -> None:
    other = write_keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    for file, match in (
        (keys.public, "no private key in a PEM file"), (other.private, "a key of another kind than Ed25519"),
        (tmp_path / "none", "cannot be read"), (model, "no private key"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            sign(model, file)
    with pytest.raises(ConfigError, match=r"no public key .* openssl pkey -in key.pem -pubout"):
        verify(model, keys.private)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_keys_of_openssl_on_the_command_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in ("genpkey -algorithm ed25519 -out key.pem", "pkey -in key.pem -pubout -out key.pub"):
        subprocess.run(["openssl", *line.split()], check=True)
    found = CliRunner().invoke(app, ["sign", "parts.twin", "--key", "key.pem"])
    assert (found.exit_code, found.stdout) == (0, "signed parts.twin\n")
    found = CliRunner().invoke(app, ["sign", "parts.twin", "--check", "key.pub"])
    assert (found.exit_code, found.stdout) == (0, "parts.twin is as the holder of key.pub signed it\n")
    assert CliRunner().invoke(app, ["sign", "parts.twin"]).exit_code == 2
    good = good_folder(tmp_path / "good", 20)
    found = CliRunner().invoke(app, ["calibrate", "parts.twin", str(good), "--class", "ring", "--max-fpr", "0.1"])
    assert found.exit_code == 0, found.output
    assert "the new thresholds are not signed; type: twinspect sign parts.twin --key KEY" in found.output
    assert CliRunner().invoke(app, ["sign", "parts.twin", "--check", "key.pub"]).exit_code == 2


def test_the_server_takes_signed_models_only_also_when_it_reads_them_again(
    quick: Detector, model: Path, keys: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twinspect.server import app as running

    line = ["serve", str(model), "--require-signature", str(keys.public), "--log", "none"]
    found = CliRunner().invoke(app, line)
    assert (found.exit_code, "parts.twin is not signed" in found.output) == (2, True)
    sign(model, keys.private)

    def serve_app(served, settings, started) -> None:
        from starlette.testclient import TestClient

        with TestClient(served, base_url="http://localhost") as client:
            assert client.post("/v1/models/parts/reload").status_code == 200
            signature_file(model).unlink()
            answer = client.post("/v1/models/parts/reload")
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "not_accepted")
            assert "is not signed" in client.get("/v1/models").json()["models"][0]["trouble"]
            assert client.get("/readyz").status_code == 200

    monkeypatch.setattr(running, "serve", serve_app)
    found = CliRunner().invoke(app, line, catch_exceptions=False)
    assert found.exit_code == 0, found.output
