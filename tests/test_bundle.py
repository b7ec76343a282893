"""Bundles: the same scores back, whole or not at all, and words for every way a file can be wrong."""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny import images_to_test, picture, run_config, same_tensors, train_samples

from twinspect import Detector
from twinspect.bundle import FORMAT, read_bundle, refuse_unwritable, write_bundle
from twinspect.errors import BundleError, OutputError


def scores(detector: Detector, files: list[Path]) -> list[tuple[float, ...]]:
    return [
        (r.score, r.score_local, r.score_semantic, r.p_value, r.threshold, float(r.map.sum()))
        for r in detector.predict(files)
    ]


def rewritten(bundle: Path, target: Path, honest: bool = True, **changed: bytes) -> Path:
    """A copy with some members replaced (dots in names as __); ``honest`` also fixes the hashes."""
    parts = {name.replace("__", "."): body for name, body in changed.items()}
    with zipfile.ZipFile(bundle) as old:
        members = {name: old.read(name) for name in old.namelist()} | parts
    if honest:
        hashed = {n: hashlib.sha256(b).hexdigest() for n, b in members.items() if n != "sha256.json"}
        members["sha256.json"] = json.dumps(hashed).encode()
    with zipfile.ZipFile(target, "w") as new:
        for name, body in members.items():
            new.writestr(name, body)
    return target


def meta_of(bundle: Path, **changes: object) -> bytes:
    return json.dumps(read_bundle(bundle).meta | changes).encode()


# ----------------------------------------------------------------------------------------- round trip


def test_round_trip_is_bit_identical(detector: Detector, bundle: Path, parts: Path) -> None:
    files = images_to_test(parts, None)
    again = Detector.load(bundle)
    assert scores(again, files) == scores(detector, files)
    assert again.record_ == detector.record_
    assert again.config == detector.config
    assert same_tensors(again.fitted.model.state_dict(), detector.fitted.model.state_dict())
    third = Detector.load(again.save(bundle.with_name("second.twin")))
    assert scores(third, files) == scores(detector, files)


@pytest.mark.parametrize("size", [0, 64, 112])
def test_random_vit_at_any_size_comes_back(size: int, parts: Path, tmp_path: Path) -> None:
    """Zero is the teacher's default; none of these is the side that the network was made for."""
    first = Detector(config=run_config(size=size, steps=1)).fit(train_samples(parts))
    again = Detector.load(first.save(tmp_path / "m.twin"))
    files = images_to_test(parts, 1)[:3]
    assert scores(again, files) == scores(first, files)


def test_no_pickle_inside(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as file:
        assert sorted(file.namelist()) == ["bundle.json", "memory.safetensors", "model.safetensors", "sha256.json"]
        for name in file.namelist():
            assert not file.read(name).startswith((b"\x80", b"PK"))
        json.loads(file.read("bundle.json"))


def test_loading_needs_no_weights_on_disk(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from twinspect.models import weights

    def refuse(*_: object) -> None:
        raise AssertionError("weights were looked for")

    monkeypatch.setattr(weights, "find_weights", refuse)
    monkeypatch.setattr("twinspect.models.teachers.find_weights", refuse)
    assert np.isfinite(Detector.load(bundle).predict(picture()).score)


def test_saving_before_fit_is_refused(tmp_path: Path) -> None:
    from twinspect.errors import TwinspectError

    with pytest.raises(TwinspectError, match=r"not trained yet; call fit\(data\)"):
        Detector().save(tmp_path / "m.twin")


# -------------------------------------------------------------------------------------- files gone wrong


@pytest.mark.parametrize("keep", [0, 3, 1000, -1, -200])
def test_truncated(bundle: Path, tmp_path: Path, keep: int) -> None:
    cut = tmp_path / "cut.twin"
    cut.write_bytes(bundle.read_bytes()[:keep])
    with pytest.raises(BundleError, match=r"cut\.twin is not a whole bundle.* copy it again"):
        Detector.load(cut)


def test_one_changed_byte_anywhere_is_noticed(quick: Detector, tmp_path: Path) -> None:
    raw = bytearray(quick.save(tmp_path / "m.twin").read_bytes())
    changed = tmp_path / "c.twin"
    for place in np.linspace(0, len(raw) - 1, 60).astype(int):
        raw[place] ^= 0x55
        changed.write_bytes(raw)
        raw[place] ^= 0x55
        try:
            read_bundle(changed)
        except BundleError:
            continue
        # What is not noticed must be a byte that carries nothing (a date or a flag of the zip container).
        assert read_bundle(changed) == read_bundle(tmp_path / "m.twin")


def test_tampered(bundle: Path, tmp_path: Path) -> None:
    decision = read_bundle(bundle).meta["decision"] | {"max_fpr": 0.5}
    changed = rewritten(bundle, tmp_path / "c.twin", honest=False, bundle__json=meta_of(bundle, decision=decision))
    with pytest.raises(BundleError, match=r"bundle\.json does not match its sha256; the file was changed or damaged"):
        Detector.load(changed)


def test_newer_format(bundle: Path, tmp_path: Path) -> None:
    newer = rewritten(
        bundle, tmp_path / "n.twin", bundle__json=meta_of(bundle, format=FORMAT + 1, twinspect="9.1"), what__else=b"x"
    )
    with pytest.raises(BundleError, match=rf"format {FORMAT + 1}, written by twinspect 9\.1; .*--upgrade twinspect"):
        Detector.load(newer)


def test_older_format(bundle: Path, tmp_path: Path) -> None:
    meta = meta_of(bundle, format=FORMAT - 1, twinspect="0.0.1")
    older = rewritten(bundle, tmp_path / "o.twin", bundle__json=meta, what__else=b"x")
    with pytest.raises(BundleError, match=rf"format {FORMAT - 1}, written by twinspect 0\.0\.1; .*Train it again"):
        Detector.load(older)


def test_other_kinds_of_file(tmp_path: Path, parts: Path) -> None:
    with pytest.raises(BundleError, match=r"no such model: .*none\.twin\..* Type: twinspect fit"):
        Detector.load(tmp_path / "none.twin")
    with pytest.raises(BundleError, match="is a folder, and a model"):
        Detector.load(tmp_path)
    with pytest.raises(BundleError, match="not a whole bundle"):
        Detector.load(images_to_test(parts, None)[0])
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("readme.txt", "x")
    with pytest.raises(BundleError, match="not a whole bundle"):
        Detector.load(tmp_path / "other.zip")
    for body in (b"[]", b"{}", b'{"format": "x"}', b"\xff"):
        with zipfile.ZipFile(tmp_path / "meta.twin", "w") as other:
            other.writestr("bundle.json", body)
        with pytest.raises(BundleError, match="not a whole bundle"):
            read_bundle(tmp_path / "meta.twin")


def test_parts_that_do_not_fit_together(bundle: Path, quick: Detector, tmp_path: Path) -> None:
    with zipfile.ZipFile(quick.save(tmp_path / "q.twin")) as other:
        foreign = other.read("model.safetensors")
    for name, change in (
        ("tensors", {"model__safetensors": foreign}),
        ("garbage", {"model__safetensors": b"12345678" * 9}),
        ("config", {"bundle__json": meta_of(bundle, config={"model": {"depth": "x"}, "train": {}})}),
        ("record", {"bundle__json": meta_of(bundle, record={})}),
        ("decision", {"bundle__json": meta_of(bundle, decision={"calibration": [1.0]})}),
    ):
        with pytest.raises(BundleError, match=r"m\.twin"):
            Detector.load(rewritten(bundle, tmp_path / f"{name}m.twin", **change))


def test_a_member_that_would_fill_the_memory_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.twin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bundle.json", b" " * 50_000_000)
    with pytest.raises(BundleError, match="would unpack to 50,000,000 bytes"):
        read_bundle(path)


# ---------------------------------------------------------------------------------------------- writing


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "folder" / "m.twin"
    write_bundle(path, {"a": 1}, b"first")
    assert [p.name for p in path.parent.iterdir()] == ["m.twin"]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"m\.twin cannot be written \(No space left on device\)"):
        write_bundle(path, {"a": 2}, b"second")
    assert [p.name for p in path.parent.iterdir()] == ["m.twin"]
    assert read_bundle(path).tensors == b"first"


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_bundle(tmp_path / name, {"a": 1}, b"tensors")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        write_bundle(tmp_path / "file" / "m.twin", {}, b"")
    with pytest.raises(OutputError, match=r"is a folder; choose another --out, such as .*model\.twin"):
        write_bundle(tmp_path / "folder", {}, b"")
    with pytest.raises(OutputError, match="cannot be written"):
        refuse_unwritable(tmp_path / "file" / "deeper" / "m.twin")
    assert shutil.os.listdir(tmp_path / "folder") == []
