"""Text from any editor, outputs that are whole or not there, and homes that are not one's own."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from twinspect.errors import DataError, OutputError
from twinspect.files import cache_home, read_text, refuse_unwritable, replacing, why_unwritable, write_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_of_every_encoding(tmp_path: Path, encoding: str) -> None:
    text = "a = 1\nname = '\u90e8\u54c1'\n"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "a.txt") == text


def test_what_is_no_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text .*; save it as UTF-8"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(DataError, match="cannot be read .No such file"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "empty.txt").touch()
    assert read_text(tmp_path / "empty.txt") == ""


def test_a_file_appears_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "first \udcff")  # a byte of a name that is no text
    assert path.read_text() == r"first \udcff"
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half" * (1 // 0))

    def full(_number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"a\.txt cannot be written .No space left on device"):
        with replacing(path) as file:
            file.write(b"half")
    assert [one.name for one in path.parent.iterdir()] == ["a.txt"]
    assert path.read_text() == r"first \udcff"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_drafts_of_killed_writers_are_swept_up_and_no_others(tmp_path: Path) -> None:
    out, other = tmp_path / "m.twin", tmp_path / "other.twin"
    script = (
        "import sys, os, signal; from pathlib import Path; from twinspect.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    for path in (out, other):
        assert subprocess.run([sys.executable, "-c", script, path]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert not out.exists()
    with replacing(out) as slow:  # another writer of the same file, while this one is at work
        slow.write(b"slow")
        write_text(out, "quick")
        assert out.read_text() == "quick"
        assert len(list(tmp_path.iterdir())) == 3
    assert out.read_text() == "slow"
    write_text(other, "whole")
    assert {path.name for path in tmp_path.iterdir()} == {out.name, other.name}


def test_devices_are_written_and_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "full").symlink_to("/dev/full")
    for name in ("null", "full"):
        refuse_unwritable(tmp_path / name, "--json")
    write_text(tmp_path / "null", "x")
    with pytest.raises(OutputError, match="full cannot be written .No space left on device"):
        write_text(tmp_path / "full", "x")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["full", "null"]
    assert all(one.is_symlink() for one in tmp_path.iterdir())


def test_what_cannot_be_written_is_found_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refuse_unwritable(tmp_path / "deep" / "a.json", "--json")
    refuse_unwritable(tmp_path / "file", "--json", ours=lambda path: path.read_text() == "mine")
    assert (tmp_path / "file").read_text() == "mine"
    assert not any((tmp_path / "deep").iterdir())
    for path, words in (
        (tmp_path / "file" / "a.json", "cannot be written .*; choose another --json"),
        (tmp_path, "is a folder; choose another --json, such as .*x.json"),
        (tmp_path / ("n" * 300), "cannot be written .File name too long"),
    ):
        with pytest.raises(OutputError, match=words):
            refuse_unwritable(path, "--json", "x.json")
    with pytest.raises(OutputError, match="file exists and holds something else; move it away"):
        refuse_unwritable(tmp_path / "file", "--json", ours=lambda path: False)
    assert why_unwritable(tmp_path / "deep") == ""
    assert why_unwritable(tmp_path / "file" / "x") == "Not a directory"


def test_where_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINSPECT_HOME", str(tmp_path))
    assert cache_home() == tmp_path
    monkeypatch.delenv("TWINSPECT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_home() == tmp_path / "cache" / "twinspect"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == tmp_path / ".cache" / "twinspect"


def test_a_user_without_any_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_number: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("TWINSPECT_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_home() == Path("/.cache/twinspect")
