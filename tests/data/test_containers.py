"""Container files: what real ones hold is read, everything else is refused without running it."""

import gzip
import io
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from layouts import Plan, cifar_python, idx, write

from twinspect.data import load
from twinspect.data.containers import open_container, read_idx, read_record
from twinspect.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3)]


def test_our_python2_pickle_is_what_pickle_itself_understands(tmp_path: Path) -> None:
    cifar_python(tmp_path / "train", IMAGES, [5, 0, 99], fine=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = pickle.loads((tmp_path / "train").read_bytes(), encoding="bytes")  # our own file, written above
    assert batch[b"fine_labels"] == [5, 0, 99]
    assert batch[b"data"].shape == (3, 3072)
    container = open_container(tmp_path / "train")
    assert list(container.labels or ()) == [5, 0, 99]
    for index, rgb in enumerate(IMAGES):
        assert np.array_equal(container.rgb(index), rgb)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_pickled_by_numpy_itself(tmp_path: Path, protocol: int) -> None:
    data = np.stack([rgb.transpose(2, 0, 1).ravel() for rgb in IMAGES])
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": data, b"labels": [1, 2, 3], b"batch_label": b""}, protocol))
    assert np.array_equal(open_container(path).rgb(2), IMAGES[2])


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("evil-was-here"),))


@pytest.mark.parametrize("where", ["alone", "inside"])
def test_evil_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    content = Evil() if where == "alone" else {b"data": Evil(), b"labels": []}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="refused and nothing in it was run"):
        load(tmp_path, "cifar10")
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": b"x", b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"labels": [1, 1]}),
        pickle.dumps({b"data": np.zeros((2, 30), np.uint8), b"labels": [1, 1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["a"]}),
    ],
    ids=["empty", "text", "list", "no array", "float", "narrow", "labels", "text labels"],
)
def test_wrong_pickles_are_data_errors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match="data_batch_1"):
        load(tmp_path, "cifar10")


def test_cifar_label_out_of_range(tmp_path: Path) -> None:
    cifar_python(tmp_path / "data_batch_1", IMAGES, [1, 2, 10], fine=False)
    with pytest.raises(DataError, match="label 10; cifar10 has 0 to 9"):
        load(tmp_path, "cifar10")


def test_missing_batches_are_noted(tmp_path: Path) -> None:
    cifar_python(tmp_path / "data_batch_1", IMAGES, [1, 2, 3], fine=False)
    assert "1 of the 6 official files of cifar10 were found" in load(tmp_path).notes


@pytest.mark.parametrize("name", ["a-idx3-ubyte", "a-idx3-ubyte.gz"])
@pytest.mark.parametrize("damage", ["head", "short", "long", "empty", "type"])
def test_damaged_idx(tmp_path: Path, name: str, damage: str) -> None:
    raw = struct.pack(">BBBB3I", 0, 0, 8, 3, 2, 4, 4) + bytes(32)
    raw = {
        "head": b"abc" + raw,
        "short": raw[:-1],
        "long": raw + b"x",
        "empty": b"",
        "type": raw[:2] + b"\x0d" + raw[3:],
    }[damage]
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(DataError, match="a-idx3"):
        read_idx(path)


def test_truncated_gz(tmp_path: Path) -> None:
    write("fashion-mnist", tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="damaged or cannot be read"):
        load(tmp_path)


def test_idx_labels_must_be_there_and_fit(tmp_path: Path) -> None:
    for name in ("few", "none"):
        write("fashion-mnist", tmp_path / name, Plan(shape="plain"))
    idx(tmp_path / "few" / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(DataError, match="3 labels for 12 images"):
        load(tmp_path / "few")
    (tmp_path / "none" / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="0 labels for 12 images.*labels-idx1 beside them"):
        load(tmp_path / "none")


def test_record_out_of_range_and_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    cifar_python(path, IMAGES, [1, 2, 3], fine=False)
    with pytest.raises(DataError, match="no record 3; the file holds 3"):
        read_record(path, 3)
    cifar_python(path, IMAGES[::-1][:2], [1, 2], fine=False)
    assert np.array_equal(read_record(path, 0), IMAGES[2])


def test_parquet_with_plain_bytes_and_named_labels(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(stream, "PNG")
    table = pa.table({"image": [stream.getvalue(), b"junk"], "label": ["cat", "plane"]})
    pq.write_table(table, tmp_path / "train-0.parquet")
    found = load(tmp_path)
    assert found.layout == "cifar10"
    assert [s.class_name for s in found.samples] == ["cat", "airplane"]
    assert np.array_equal(read_record(tmp_path / "train-0.parquet", 0), IMAGES[0])
    with pytest.raises(DataError, match="record 1"):
        read_record(tmp_path / "train-0.parquet", 1)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 junk")
    with pytest.raises(DataError, match="not a Parquet file"):
        load(tmp_path, "cifar10")
