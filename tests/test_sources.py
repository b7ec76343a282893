"""What can be pointed at: the order is fixed, nothing is held, and hostile input becomes a row with an error."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from tiny import picture, save

from twinspect.errors import DataError
from twinspect.inference.decode import Decoding, ahead, decode, expand
from twinspect.inference.sources import walk, walk_all, would_find
from twinspect.inference.streams import Item, Stream


def png(number: int = 0) -> bytes:
    body = io.BytesIO()
    Image.fromarray(picture(number)).save(body, "PNG")
    return body.getvalue()


def member(name: str, body: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, body


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for info, body in members:
            file.addfile(info, io.BytesIO(body))
    return path


def names(source: object) -> list[str]:
    return [item.name for item in expand(source)]


def errors(source: object) -> dict[str, str]:
    """Error of each image once it is decoded; empty for good ones."""
    return {item.name: decode(item, Decoding(64)).error for item in expand(source)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "new"
    for name in ("b.png", "a/z.png", "a/b/c.png", "a.png", "aa/1.jpg", "Z.png", ".hidden.png", "a/notes.txt"):
        save(root / name, picture()) if not name.endswith(".txt") else (root / name).write_text("x")
    return root


# --------------------------------------------------------------------------------------- folders and lists


def test_folder_is_walked_in_the_order_of_sorted_paths(folder: Path) -> None:
    wanted = sorted(p for p in folder.rglob("*") if p.suffix in (".png", ".jpg") and not p.name.startswith("."))
    assert names(folder) == [str(p) for p in wanted]
    assert names(str(folder)) == names([folder]) == names(iter([folder])) == names(folder)


def test_folder_is_walked_lazily(folder: Path) -> None:
    found = walk(folder)
    first = next(found)
    (folder / "aa" / "1.jpg").unlink()  # a folder is listed when the walk gets there
    assert first.name.endswith("Z.png")
    assert not any(one.name.endswith("1.jpg") for one in found)


def test_links_to_folders_are_followed_and_no_folder_is_read_twice(folder: Path) -> None:
    before = names(folder)
    save(folder.parent / "elsewhere" / "x.png", picture())
    (folder / "lot").symlink_to(folder.parent / "elsewhere")
    (folder / "again").symlink_to(folder.parent / "elsewhere")
    for name in ("loop", "a/up", "aa/loop"):
        (folder / name).symlink_to(folder, target_is_directory=True)
    expected = sorted([*before, str(folder / "again" / "x.png")])
    assert sorted(names(folder)) == expected
    assert sorted(names(f"{folder}/**/*.*g")) == expected


def test_a_deep_glob_is_that_of_python(folder: Path) -> None:
    import glob
    import os

    here = os.getcwd()
    os.chdir(folder)
    try:
        for pattern in ("**/*.png", "a/**", "**/b/*.png", "**/**/*.png", "./**/*.png", "a*/**/*.*", "**"):
            found = [one for one in glob.glob(pattern, recursive=True) if os.path.isfile(one)]
            assert sorted(names(pattern)) == sorted({str(Path(one)) for one in found}), pattern
    finally:
        os.chdir(here)


def test_broken_links_and_pipes_are_rows(folder: Path) -> None:
    before = set(names(folder))
    (folder / "lot").symlink_to("/nowhere/lot")
    (folder / "gone.png").symlink_to("/nowhere/gone.png")
    (folder / "gone.txt").symlink_to("/nowhere/gone.txt")
    os.mkfifo(folder / "pipe.png")
    found = {name: text for name, text in errors(folder).items() if name not in before}
    assert list(found) == [str(folder / name) for name in ("gone.png", "lot", "pipe.png")]
    assert all(found.values())


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".Trash-1000/files", "__MACOSX", "@eaDir", "$RECYCLE.BIN"])
def test_hidden_folders_are_passed_over(folder: Path, name: str) -> None:
    before = names(folder)
    hidden = save(folder / name / "x.png", picture()).parent
    save(folder / "a" / name / "x.png", picture())
    with tarfile.open(folder / "s.tar", "w") as file:
        file.add(folder / name, f"in/{name}")
        file.add(folder / "b.png", "./in/b.png")
    with zipfile.ZipFile(folder / "s.zip", "w") as packed:
        packed.write(folder / "b.png", f"{name}/x.png")
        packed.write(folder / "b.png", "b.png")
    expected = [*before, f"{folder}/s.tar#./in/b.png", f"{folder}/s.zip#b.png"]
    assert sorted(names(folder)) == sorted(expected)
    assert sorted(names(f"{folder}/**/*.png")) == sorted(one for one in before if one.endswith(".png"))
    with pytest.raises(DataError, match="nothing found"):
        names(f"{folder}/*/x.png")
    assert names(hidden) == names([hidden / "x.png"]) == [str(hidden / "x.png")]  # named by whoever asks


def test_a_source_without_images_among_others_is_a_row(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sources = [str(folder / "b.png"), str(tmp_path / "empty"), f"{tmp_path}/*.bmp", "gone.png"]
    found = [(one.name, bool(decode(one, Decoding(64)).error)) for one in walk_all(sources)]
    assert found == [(sources[0], False), *((one, True) for one in sources[1:])]
    (tmp_path / "l.csv").write_text('image\n"b.png\n')
    for bad in (f"@{tmp_path}/none.txt", f"{tmp_path}/l.csv"):  # a mistake of the command, found before the work
        with pytest.raises(DataError, match="no such list|line 2: not valid CSV"):
            walk_all([str(folder / "b.png"), bad])


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lists_and_tables_in_every_encoding_of_windows(folder: Path, encoding: str) -> None:
    wanted = [str(folder / name) for name in ("b.png", "a/z.png", "Z.png")]
    lines = ["b.png", "# comment", r"a\z.png" if os.sep == "/" else "a/z.png", '"Z.png"  ']
    (folder / "l.txt").write_bytes("\r\n".join(lines).encode(encoding))
    assert names(f"@{folder}/l.txt") == wanted
    for separator in ",;\t":
        rows = [separator.join(row) for row in (("Image", "label"), ("b.png", "0"), ("a/z.png", "1"), ("Z.png", "0"))]
        (folder / "l.csv").write_bytes("\r\n".join(rows).encode(encoding))
        assert names(folder / "l.csv") == wanted
    rows = "".join(f'{{"image": "{name}"}}\n' for name in ("b.png", "a/z.png", "Z.png"))
    (folder / "l.jsonl").write_bytes(rows.encode(encoding))
    assert names(folder / "l.jsonl") == wanted


def test_a_list_with_zero_bytes(folder: Path) -> None:
    (folder / "l.txt").write_bytes(b"b.png\0a.png\0")  # of find -print0
    (text,) = errors(f"@{folder}/l.txt").values()
    assert "holds a zero byte here; save the list as UTF-8, one path a line" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('image,split\n"b.png,test\na.png,test\n', "line 2: not valid CSV"),
        ('image,split\nb.png,"test\na.png,test\n', "line 2: not valid CSV"),
        ('image,split\na.png,test\n"b.png,test\nZ.png",test\n', "line 3: not valid CSV .one cell holds several rows"),
        ('image,split\nb.png,"test\na.png,test\nZ.png,test"\n', "line 2: not valid CSV .one cell holds several rows"),
        ('image\nb.png\n"a.png\nZ.png"\n', "line 3: not valid CSV .one cell holds several rows"),
        ("image,split\nb,1.png,test\n", "line 2: more cells than the header has"),
        ('"image,split\nb.png,test\n', "not valid CSV"),
        ("image\n", "holds no row"),
        ("", "holds no row"),
    ],
)
def test_tables_that_would_be_misread_are_refused(folder: Path, text: str, words: str) -> None:
    (folder / "l.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        walk(folder / "l.csv")


def test_cells_of_several_lines_and_empty_last_cells_are_read(folder: Path) -> None:
    (folder / "l.csv").write_text('image,note,by\nb.png,"a scratch,\non the left",me\na.png,,,\n')
    assert names(folder / "l.csv") == [str(folder / "b.png"), str(folder / "a.png")]


def test_what_a_walk_would_find_again(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    again = [
        (folder, "o.png"), (folder, "sub/o.png"), (folder.parent / "link", "o.png"), (f"{folder}/*.png", "o.png"),
        (f"{folder}/**/*.png", "sub/o.png"), (f"{folder.parent}/n*/*.png", "o.png"), (f"file://{folder}", "o.png"),
    ]  # fmt: skip
    assert all(would_find(str(source), str(folder / file)) for source, file in again)
    never = [
        (folder / "a", "o.png"), (folder, ".sub/o.png"), (f"{folder}/*.png", "sub/o.png"),
        (f"{folder}/*.jpg", "o.png"),
        (f"{folder}/**/*.jpg", "sub/o.png"), (folder / "b.png", "o.png"), (f"@{folder}/l.txt", "o.png"),
    ]  # fmt: skip
    assert not any(would_find(str(source), str(folder / file)) for source, file in never)
    assert would_find("s3://b/new", "s3://b/new/pictures/o.png")
    assert not would_find("s3://b/new", "s3://b/newer/o.png")


@pytest.mark.parametrize("at", ["", "@"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "image,label\na.png,OK\nb.png,NG\n"),
        ("t.tsv", "label\timage\nOK\ta.png\nNG\tb.png\n"),
        ("t.jsonl", '{"image": "a.png", "label": 0},\n{"image": "b.png", "label": 1},\n'),
    ],
)
def test_tables_are_read_with_and_without_an_at_sign(tmp_path: Path, at: str, name: str, text: str) -> None:
    for number, image in enumerate(("a.png", "b.png")):
        save(tmp_path / image, picture(number))
    (tmp_path / name).write_text(text)
    found = [item.path for item in walk(f"{at}{tmp_path / name}") if isinstance(item, Item)]
    assert found == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_a_list_may_be_called_csv_and_a_wrong_line_of_json_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", picture())
    (tmp_path / "list.csv").write_text("a.png\na.png\n")
    assert len(list(walk(f"@{tmp_path / 'list.csv'}"))) == 2
    (tmp_path / "t.jsonl").write_text('{"image": "a.png"}\n{"image": \n')
    with pytest.raises(DataError, match=r"t.jsonl line 2: not valid JSON"):
        list(walk(tmp_path / "t.jsonl"))


def test_list_of_paths(folder: Path) -> None:
    listed = folder / "list.txt"
    listed.write_text("# mine\nb.png\n\na/z.png\nnone.png\n" + str(folder / "Z.png") + "\n", encoding="utf-8-sig")
    found = errors(f"@{listed}")
    assert list(found) == [str(folder / n) for n in ("b.png", "a/z.png", "none.png", "Z.png")]
    assert [bool(text) for text in found.values()] == [False, False, True, False]
    inside = save(folder / "lot.zip#1" / "a.png", picture())  # a folder, and no archive
    listed.write_text(str(inside))
    assert errors(f"@{listed}") == {str(inside): ""}
    with pytest.raises(DataError, match="no such list: .*none.txt"):
        walk("@none.txt")
    listed.write_text("# nothing\n")
    with pytest.raises(DataError, match="the list holds no path"):
        walk(f"@{listed}")


def test_missing_file_among_others_stays_in(folder: Path) -> None:
    found = [one.name for one in walk_all([str(folder / "b.png"), "gone.png"])]
    assert found == [str(folder / "b.png"), "gone.png"]
    with pytest.raises(DataError, match="nothing found at gone.png"):
        list(walk_all(["gone.png"]))


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device here")
def test_devices_and_giants_are_not_read(tmp_path: Path) -> None:
    assert "pipes and devices are not read" in decode(Item("/dev/zero", "/dev/zero"), Decoding(64)).error
    giant = tmp_path / "giant.png"
    with giant.open("wb") as file:
        file.truncate((1 << 30) + 1)
    assert "files above 1,073,741,824 are not read" in decode(giant, Decoding(64)).error


# ---------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize(
    ("name", "mode"),
    [("s.tar", "w"), ("s.tar.gz", "w:gz"), ("s.tgz", "w:gz"), ("s.TAR.XZ", "w:xz"), ("s.tar.bz2", "w:bz2")],
)
def test_archive_members_equal_their_files(tmp_path: Path, name: str, mode: str) -> None:
    bodies = {f"{n:04d}.png": png(n) for n in range(3)}
    pairs = [pair for key, body in bodies.items() for pair in (member(key, body), member(f"{key[:4]}.json", b"{}"))]
    path = archive(tmp_path / name, *pairs, mode=mode)
    items = list(expand(path))
    assert [item.name for item in items] == [f"{path}#{key}" for key in bodies]
    for item, body in zip(items, bodies.values(), strict=True):
        (tmp_path / "one.png").write_bytes(body)
        assert np.array_equal(decode(item, Decoding(64)).square, decode(tmp_path / "one.png", Decoding(64)).square)
    assert [type(one) for one in walk(tmp_path)] == [Item, Stream]  # shards in a folder are found as well


def test_zip_members_equal_their_files(tmp_path: Path) -> None:
    path = tmp_path / "s.ZIP"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(3):
            file.writestr(f"in/{number}.png", png(number))
        file.writestr("in/notes.txt", "x")
        file.writestr("in/bad.png", "junk")
        file.writestr("../up.png", png())
        file.writestr("/abs.png", png())
    found = {name.split("#")[1]: text for name, text in errors(path).items()}
    assert [bool(text) for text in found.values()] == [False] * 3 + [True] * 3
    assert list(found) == ["in/0.png", "in/1.png", "in/2.png", "in/bad.png", "../up.png", "/abs.png"]
    assert [type(one) for one in walk(tmp_path)] == [Stream]
    path.write_bytes(path.read_bytes()[:300])
    assert "damaged archive after 0 images" in errors(path)[str(path)]


def test_encrypted_members_and_empty_archives_are_said_in_a_few_words(tmp_path: Path) -> None:
    path, empty = tmp_path / "locked.zip", tmp_path / "empty.tar"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.png", png())
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\3\4") + 6] |= 1
    raw[raw.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(raw)
    name = f"{path}#a.png"
    assert errors(path) == {name: f"{name}: it is encrypted; unpack the archive with its password first"}
    empty.touch()
    assert errors(empty)[str(empty)].endswith("(file could not be opened successfully); copy it again")


def test_a_zip_member_that_unpacks_to_more_than_it_says_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", b"\0" * 50_000_000)
    raw = path.read_bytes()
    size = struct.pack("<I", 50_000_000)
    path.write_bytes(raw.replace(size, struct.pack("<I", 1000)))
    (item,) = expand(path)
    assert item.error or len(item.data) <= 1000


def test_hostile_members_become_errors(tmp_path: Path) -> None:
    path = archive(
        tmp_path / "bad.tar",
        member("../../etc/up.png", png()),
        member("/abs.png", png()),
        member("a\\..\\..\\w.png", png()),
        member("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("device.png", type=tarfile.CHRTYPE),
        member("folder.png", type=tarfile.DIRTYPE),
        member("empty.png", b""),
        member("text.png", b"not an image"),
        member("good.png", png()),
    )
    found = {name.split("#")[1]: text for name, text in errors(path).items()}
    assert "folder.png" not in found
    for name in ("../../etc/up.png", "/abs.png", "a\\..\\..\\w.png"):
        assert "leaves the archive; refused" in found[name]
    for name in ("link.png", "device.png"):
        assert "only plain files" in found[name]
    assert "0 bytes" in found["empty.png"]
    assert "not an image" in found["text.png"]
    assert found["good.png"] == ""


def test_bomb_in_an_archive_is_not_unpacked(tmp_path: Path) -> None:
    info = tarfile.TarInfo("zeros.png")
    info.size = 1 << 40
    (tmp_path / "bomb.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    first, *_ = expand(tmp_path / "bomb.tar")
    assert "1,099,511,627,776 bytes; an image file of that size is not read" in first.error


def test_damaged_archives_say_so_in_a_last_row(tmp_path: Path) -> None:
    whole = archive(tmp_path / "w.tar", *(member(f"{n}.png", png(n)) for n in range(3))).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: len(whole) // 4])
    found = errors(cut)
    assert list(found)[-1] == str(cut)
    assert "damaged archive after" in found[str(cut)]
    end = whole.index(b"2.png")  # where the header of the last member begins
    for place in (end, end + 200):
        cut.write_bytes(whole[:place])
        assert [text.partition(": ")[2] for text in errors(cut).values() if text] == [
            "damaged archive after 2 images (it has no end); copy it again"
        ]
    for body in (b"", b"junk" * 500, b"\0" * 10_240):
        cut.write_bytes(body)
        (text,) = errors(cut).values()
        assert "damaged archive" in text or "no image in the archive" in text
    zipped = tmp_path / "z.tar.gz"
    zipped.write_bytes(b"\x1f\x8b junk")
    assert "damaged archive" in errors(zipped)[str(zipped)]


def test_walking_an_archive_keeps_no_headers(tmp_path: Path) -> None:
    import tracemalloc

    path = archive(tmp_path / "many.tar", *(member(f"{n:06d}.png", b"x" * 10) for n in range(4000)))
    tracemalloc.start()
    count = sum(1 for _ in Stream(str(path)).items())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000
    assert peak < 400_000  # tarfile itself would keep more than 1 kB a member


# ------------------------------------------------------------------------------------------------ tables


def test_manifests(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = ["b.png", "a/z.png", "../outside.png", "none.png"]
    pq.write_table(pa.table({"image": paths, "label": [0, 1, 0, 0]}), folder / "m.parquet")
    (folder / "m.csv").write_text("image_path,label\n" + "".join(f"{p},0\n" for p in paths))
    for name in ("m.parquet", "m.csv"):
        found = errors(folder / name)
        assert list(found)[:2] == [str(folder / "b.png"), str(folder / "a/z.png")]
        assert list(found.values())[:2] == ["", ""]
        assert "points outside" in found["../outside.png"]
        assert "cannot be opened" in found[str(folder / "none.png")]
    records = [3.0, float("nan")]  # as data frames hold whole numbers where a cell is empty
    pq.write_table(pa.table({"image": paths[:2], "record": records}), folder / "m.parquet")
    assert [(one.name, one.record) for one in walk(folder / "m.parquet") if isinstance(one, Item)] == [
        (f"{folder / 'b.png'}#3", 3), (str(folder / "a/z.png"), None),
    ]  # fmt: skip
    (folder / "m.csv").write_text("thing\nx\n")
    with pytest.raises(DataError, match="image .* is needed"):
        walk(folder / "m.csv")


def test_table_of_encoded_images(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [{"bytes": png(n), "path": "x"} for n in range(20)]}), path)
    assert [type(one) for one in walk(path)] == [Stream]
    assert errors(path) == {f"{path}#{n}": "" for n in range(20)}
    pq.write_table(pa.table({"image": pa.array([png(), None, b"junk"])}), path)
    assert [bool(text) for text in errors(path).values()] == [False, True, True]
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)
    assert list(errors(path).values()) == [f"{path}: no image in the table"]
    path.write_bytes(b"PAR1 junk")
    with pytest.raises(DataError, match="cannot be read as a table"):
        walk(path)


# -------------------------------------------------------------------------------------------------- URLs


def test_a_file_url_is_its_path(folder: Path) -> None:
    assert names(f"file://{folder}") == names(folder)
    assert names(f"file://{folder}/b.png") == [str(folder / "b.png")]
    (folder / "l.txt").write_text(f"file://{folder}/b.png")
    assert names(f"@{folder}/l.txt") == [str(folder / "b.png")]
    with pytest.raises(DataError, match="nothing found at"):
        walk(f"file://{folder}/gone.png")


@pytest.fixture
def store(folder: Path) -> Iterator[str]:
    """The folder with archives and tables of images, in a store."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    archive(folder / "s.tar", member("x.png", png()))
    archive(folder / "t.tar.gz", member("y.png", png()), mode="w:gz")
    with zipfile.ZipFile(folder / "u.zip", "w") as file:
        file.writestr("z.png", png())
        file.writestr(".ipynb_checkpoints/z.png", png())
    pq.write_table(pa.table({"image": [png(n) for n in range(3)]}), folder / "v.parquet")
    save(folder / ".Trash-1000" / "x.png", picture())
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/set", recursive=True)
    yield "memory://set"
    system.rm("/set", recursive=True)


def test_a_folder_of_a_store_is_walked_as_one_of_this_disk(folder: Path, store: str) -> None:
    found = errors(store)
    assert list(found) == [name.replace(str(folder), store) for name in names(folder)]
    assert [name.rpartition("/")[2] for name in found][-3:] == ["s.tar#x.png", "t.tar.gz#y.png", "u.zip#z.png"]
    assert set(found.values()) == {""}
    assert errors(f"{store}/b.png") == {f"{store}/b.png": ""}
    assert errors(f"{store}/v.parquet") == {f"{store}/v.parquet#{n}": "" for n in range(3)}
    for name in ("b.png", "s.tar", "u.zip", "v.parquet"):
        fsspec.filesystem("memory").pipe(f"/set/{name}", b"junk")
        (text,) = errors(f"{store}/{name}").values()
        assert "not an image" in text or "damaged" in text
    with pytest.raises(DataError, match="nothing found at memory://set/gone.png"):
        walk(f"{store}/gone.png")
    with pytest.raises(DataError, match="no file system for it .*nosuchscheme"):
        walk("nosuchscheme://x/y")
    with pytest.raises(DataError, match="no file system for it .*adlfs"):  # what to install
        walk("abfs://x/y")


# ------------------------------------------------------------------------------------------ decoding pool


class Deadly:
    """An image whose decoder dies, as a crash inside a codec would."""

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        os._exit(9)


def test_image_that_kills_its_decoder_costs_its_own_row_only(folder: Path) -> None:

    items = list(expand(folder))
    items = [*items[:2], Deadly(), *items[2:], Deadly(), items[0]]
    found = list(ahead(enumerate(items), Decoding(64), 1, processes=True))
    assert [tag for tag, _ in found] == list(range(len(items)))
    for item, (_, image) in zip(items, found, strict=True):
        if isinstance(item, Deadly):
            assert "its decoder died" in image.error
        else:
            assert np.array_equal(image.square, decode(item, Decoding(64)).square)
