"""Files of strangers: thousands of damaged pictures, lists and bundles. Each is read, or refused in words."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import damaged, edits, in_words, inputs, tried, whole_files
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import picture, save

from twinspect import Detector
from twinspect import data as data_room
from twinspect.bundle import BundleContent, load, read_bundle, write_bundle
from twinspect.commands.info import describe
from twinspect.data.images import array_rgb, count_pictures, read_mask, read_rgb, read_sized_rgb
from twinspect.errors import BundleError, ConfigError, DataError, ImageError
from twinspect.inference.sources import walk
from twinspect.inference.streams import Item, Stream

SMALL = 1_000_000
SECONDS = 20.0  # more than any small file may take, on a busy machine
NAMES = sorted(whole_files())


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Pillow warns of odd files; that is its right, and no error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --------------------------------------------------------------------------------------------- pictures


@inputs(2200)
@given(st.sampled_from(NAMES), edits(), st.sampled_from(NAMES), st.booleans())
def test_damaged_pictures(name: str, changes: list[hostile.Edit], other: str, draft: bool) -> None:
    raw = damaged(whole_files()[name], changes, whole_files()[other])
    began = time.monotonic()
    try:
        rgb, shape = read_sized_rgb(raw, SMALL, "x.tif", 8 if draft else 0)
    except ImageError as error:
        in_words(error, "x.tif")
    else:
        assert rgb.dtype == np.uint8
        assert rgb.ndim == 3
        assert rgb.shape[2] == 3
        assert min(shape) >= 2
        assert shape[0] * shape[1] <= SMALL
        assert draft or rgb.shape[:2] == shape
        assert np.array_equal(rgb, read_sized_rgb(raw, SMALL, "x.tif", 8 if draft else 0)[0])
    assert time.monotonic() - began < SECONDS
    tried("pictures")


@inputs(500)
@given(st.sampled_from(NAMES), edits())
def test_damaged_masks_and_counts(tmp_path: Path, name: str, changes: list[hostile.Edit]) -> None:
    path = tmp_path / f"m.{name.rpartition('.')[2]}"
    path.write_bytes(damaged(whole_files()[name], changes))
    assert count_pictures(path) >= 0
    try:
        mask = read_mask(path)
        assert mask.dtype == np.bool_
        assert mask.ndim == 2
    except ImageError as error:
        in_words(error, path.name)
    tried("masks")


@inputs(300)
# Of a picture written as numbers in text, nobody can tell that the last digit is missing.
@given(st.sampled_from([name for name in NAMES if name != "text.ppm"]), st.floats(0, 1, exclude_max=True))
def test_a_picture_that_is_cut_off_is_refused_or_whole(name: str, share: float) -> None:
    """Half a picture over grey would be scored as an anomaly, or its missing half as good."""
    raw = whole_files()[name]
    try:
        found = read_rgb(raw[: int(share * len(raw))], SMALL, "x.png")
        assert np.array_equal(found, read_rgb(raw, SMALL))  # what is missing is of another frame, or behind the end
    except ImageError as error:
        in_words(error, "x.png")
    tried("cut pictures")


SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)
KINDS = st.sampled_from(
    "bool uint8 uint16 uint32 int8 int16 int64 float16 float32 float64 complex64 U3 O M8[s]".split()
)


@inputs(300)
@given(SHAPES, KINDS, st.floats(), st.integers(0, 3))
def test_arrays(shape: tuple[int, ...], kind: str, value: float, spoilt: int) -> None:
    values = np.zeros(shape, kind)
    if values.dtype.kind == "f" and values.size:
        with np.errstate(all="ignore"):
            values.flat[: spoilt + 1] = value
    try:
        rgb = array_rgb(values)
        assert rgb.shape == (*rgb.shape[:2], 3)
        assert rgb.dtype == np.uint8
        assert rgb.flags.c_contiguous
    except ImageError as error:
        in_words(error, "accepted")
    tried("arrays")


READ_ALL = """
import json, resource, sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
import hostile
from twinspect.data.images import read_rgb
from twinspect.errors import ImageError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
said = {}
for name, raw in hostile.corpus():
    try:
        said[name] = list(read_rgb(raw, name=name).shape)
    except ImageError as error:
        said[name] = str(error)
print(json.dumps([said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def test_the_corpus_in_a_process_of_its_own() -> None:
    """A codec that dies would take the tests with it; and memory is measured from a fresh start."""
    command = [sys.executable, "-c", READ_ALL, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said, grown_mb = json.loads(done.stdout)
    assert len(said) >= 300
    for name, answer in said.items():
        assert isinstance(answer, list) or (answer.startswith(f"{name}: ") and len(answer) > len(name) + 10)
    assert grown_mb < 800  # the largest accepted picture has 81 million pixels: 243 MB
    tried("corpus", len(said))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as files, without what would be decoded to hundreds of megabytes."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, raw in hostile.corpus():
        if name != "bomb packed.tif":
            (folder / name).write_bytes(raw)
    return folder


def test_predict_gives_every_hostile_file_its_row(quick: Detector, corpus: Path) -> None:
    names = sorted(path.name for path in corpus.iterdir())
    results = list(quick.predict(corpus, maps=False))
    assert [Path(result.path).name for result in results] == names
    for result in results:
        assert bool(result.error) != (np.isfinite(result.score) and bool(result.answer))
    assert sum(bool(result.error) for result in results) > 100
    tried("rows of predict", len(results))


def test_fit_learns_what_it_can_read_and_names_the_rest(corpus: Path, tmp_path: Path) -> None:
    from tiny import run_config

    good = tmp_path / "good"
    for number in range(12):
        save(good / f"good-{number}.png", picture(number))
    chosen = sorted(corpus.iterdir())[::8]
    for path in chosen:
        (good / path.name).write_bytes(path.read_bytes())
    detector = Detector(config=run_config()).fit(good)
    unread = {skipped.path.name for skipped in detector.skipped_}
    readable = set()
    for path in good.iterdir():
        try:
            read_rgb(path)
            readable.add(path.name)
        except ImageError:
            pass
    assert unread == {path.name for path in good.iterdir()} - readable
    copies = int(next(note for note in detector.record_["notes"] if "copies" in note).split()[0])
    assert sum(detector.record_["images"].values()) + copies == len(list(good.iterdir()))
    tried("files of fit", len(chosen))


# ------------------------------------------------------------------------------------------------ lists


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with names that trip up lists."""
    folder = tmp_path_factory.mktemp("listed")
    for number, name in enumerate(FILES):
        save(folder / name, picture(number % 3, 16, 16))
    return folder


FILES = ("a.png", "b c.png", "d,e.png", "f;g.png", "h'i.png", 'j"k.png', "ü.png", "中.png", "l#m.png", "=n.png",
"-o.png", "sub/p.png", "sub/q\tr.png", "1.png", "nan.png", "null.png", "true.png")  # fmt: skip
CELLS = st.one_of(
    st.sampled_from(FILES), st.text(max_size=12), st.integers(-2, 2**70), st.floats(), st.booleans(), st.none(),
    st.sampled_from(["good", "bad", "OK", "NG", "train", "test", "0", "1", "nan", "a.png;b c.png", "../a.png",
    "/etc/passwd", "~", "C:\\x"]),
)  # fmt: skip
COLUMNS = st.sampled_from(
    "image path filename label split class_name mask defect_type group record score model_id is_good other img_path "
    "anomaly clsname".split()
)
TABLES = st.lists(st.dictionaries(COLUMNS, CELLS, max_size=5), max_size=5)


def as_csv(rows: list[dict[str, Any]], separator: str) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, delimiter=separator, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def written(folder: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    """Rows as one of the files that people list images in."""
    if kind == "parquet":
        texts = [{name: None if cell is None else str(cell) for name, cell in row.items()} for row in rows]
        table = pa.Table.from_pylist(
            [{n: c.encode("utf-8", "replace").decode() if c else c for n, c in row.items()} for row in texts]
        )
        pq.write_table(table, folder / "x.parquet")
        return folder / "x.parquet"
    text = {
        "jsonl": lambda: "\n".join(json.dumps(row) for row in rows), "json": lambda: json.dumps(rows),
        "train.json": lambda: "\n".join(json.dumps(row) for row in rows),
        "meta.json": lambda: json.dumps({"train": {"a": rows}, "test": {"b": rows}}),
        "csv": lambda: as_csv(rows, ","), "tsv": lambda: as_csv(rows, "\t"), "txt": lambda: as_csv(rows, ";"),
    }[kind]()  # fmt: skip
    path = folder / (kind if "." in kind else f"x.{kind}")
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


KINDS_OF_LIST = st.sampled_from(["csv", "tsv", "txt", "jsonl", "json", "train.json", "meta.json", "parquet"])


def read_every_way(path: Path) -> None:
    """As training data, by its folder, and as what to predict."""
    for source in (path, path.parent):
        try:
            found = data_room.load(source)
            assert found.samples or found.skipped or found.notes
        except DataError as error:
            in_words(error)
    for text in (str(path), f"@{path}"):
        try:
            assert all(isinstance(one, (Item, Stream)) for one in walk(text))
        except (DataError, ConfigError) as error:
            in_words(error)


@inputs(350)
@given(TABLES, KINDS_OF_LIST)
def test_lists_of_anything(listed: Path, rows: list[dict[str, Any]], kind: str) -> None:
    path = written(listed, rows, kind)
    try:
        read_every_way(path)
    finally:
        path.unlink()
    tried("lists of anything")


@inputs(350)
@given(
    st.sampled_from(["csv", "tsv", "txt", "jsonl", "json", "train.json", "meta.json", "parquet"]),
    edits(6),
    st.sampled_from(["", "utf-16", "utf-8-sig"]),
)
def test_damaged_lists(listed: Path, kind: str, changes: list[hostile.Edit], encoding: str) -> None:
    rows = [{"image": name, "label": number % 2, "split": "test", "mask": ""} for number, name in enumerate(FILES)]
    if kind == "meta.json":
        rows = [{"img_path": name, "anomaly": 0, "mask_path": "", "specie_name": ""} for name in FILES]
    if kind == "train.json":
        rows = [{"filename": name, "label": 0, "clsname": "a"} for name in FILES]
    path = written(listed, rows, kind)
    raw = path.read_bytes()
    if encoding and kind != "parquet":
        raw = raw.decode().encode(encoding)
    path.write_bytes(damaged(raw, changes, b"\"',;\t\n\r\0{}[]sep=\xff\xfe#@"))
    try:
        read_every_way(path)
    finally:
        path.unlink()
    tried("damaged lists")


@inputs(250)
@given(st.lists(st.sampled_from(FILES), min_size=1, max_size=9), st.sampled_from([",", ";", "\t"]), st.booleans())
def test_no_row_of_a_whole_table_is_lost(listed: Path, names: list[str], separator: str, marked: bool) -> None:
    rows = [{"image": name, "split": "test", "label": number % 2} for number, name in enumerate(names)]
    path = listed / "whole.csv"
    path.write_text(as_csv(rows, separator), encoding="utf-8-sig" if marked else "utf-8", newline="")
    found = data_room.load(path).samples
    assert [(s.image.relative_to(listed).as_posix(), s.label) for s in found] == [
        (r["image"], r["label"]) for r in rows
    ]
    assert [item.path for item in walk(str(path))] == [str(listed / name) for name in names]
    path.unlink()
    tried("whole tables")


# No path holds NUL, and a list that begins with one is refused.
LINES = st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"]), max_size=30)


@inputs(250)
@given(st.lists(st.one_of(LINES, st.sampled_from(FILES)), max_size=8))
def test_no_line_of_a_list_is_lost(listed: Path, lines: list[str]) -> None:
    path = listed / "lines.lst"
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    wanted = [line for line in lines if line and not line.startswith("#")]
    try:
        assert len(list(walk(f"@{path}"))) == len(wanted)
    except DataError as error:
        in_words(error, "holds no path")
        assert not wanted
    tried("lines")


@inputs(200)
@given(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [
                "~nobody-of-that-name/x",
                "a" * 5000,
                "a/" * 3000,
                "\0",
                "**\0",
                "[",
                "file://",
                "http://",
                "s3://",
                "@",
                "@@",
                "",
            ]
        ),
    )
)
@example("a\0/**/b")
def test_any_text_as_a_source(listed: Path, text: str) -> None:
    here = os.getcwd()
    os.chdir(listed)
    try:
        for read in (lambda: list(walk(text)), lambda: data_room.load(text)):
            try:
                read()
            except (DataError, ConfigError) as error:
                in_words(error)
    finally:
        os.chdir(here)
    tried("sources")


# ---------------------------------------------------------------------------------------------- bundles


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A bundle's frame around little."""
    path = tmp_path_factory.mktemp("little") / "a.twin"
    write_bundle(path, {"config": {}, "record": {"a": [1, 2.5, "x"]}}, os.urandom(300))
    return path.read_bytes()


@inputs(900)
@given(edits(5))
def test_damaged_bundles_are_refused_or_hold_what_was_written(
    little: bytes, tmp_path: Path, changes: list[hostile.Edit]
) -> None:
    whole, path = tmp_path / "whole.twin", tmp_path / "x.twin"
    whole.write_bytes(little)
    path.write_bytes(damaged(little, changes, b"PK\x05\x06PK\x01\x02"))
    try:
        assert read_bundle(path) == read_bundle(whole)
    except BundleError as error:
        in_words(error, "x.twin")
    tried("damaged bundles")


JSON = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.sampled_from([10**400, -1, 0, [], {}, [[]],
    ""]),
)  # fmt: skip


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a tree of JSON something stands; of long lists the first and the last."""
    yield here
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*here, name))
    elif isinstance(value, list) and value:
        for number in {0, len(value) - 1}:
            yield from places(value[number], (*here, number))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """The tree with something else there."""
    if not place:
        return new
    copied = value.copy()
    copied[place[0]] = changed(value[place[0]], place[1:], new)
    return copied


@pytest.fixture(scope="module")
def content(quick: Detector, tmp_path_factory: pytest.TempPathFactory) -> BundleContent:
    return read_bundle(quick.save(tmp_path_factory.mktemp("forged") / "quick.twin"))


def forge(path: Path, meta: dict[str, Any], tensors: bytes) -> None:
    """A bundle whose hashes fit: what somebody who knows the format can make."""
    import hashlib
    import zipfile

    parts = {"bundle.json": json.dumps(meta).encode(), "model.safetensors": tensors}
    hashes = {name: hashlib.sha256(body).hexdigest() for name, body in parts.items()}
    with zipfile.ZipFile(path, "w") as file:
        for name, body in {**parts, "sha256.json": json.dumps(hashes).encode()}.items():
            file.writestr(name, body)


@inputs(120)
@given(st.data())
def test_forged_bundles_are_refused_or_work(content: BundleContent, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.twin"
    everywhere = [p for p in places(content.meta) if p[:2] != ("config", "model")]  # a larger model is no fault
    meta = changed(content.meta, data.draw(st.sampled_from(everywhere)), data.draw(JSON))
    forge(path, meta, content.tensors)
    for read in (load, describe):
        try:
            read(path)
        except (BundleError, ConfigError) as error:
            in_words(error, "x.twin")
    tried("forged bundles")
