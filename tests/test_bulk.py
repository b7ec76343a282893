"""Long runs: nothing lost, nothing twice, whatever happens in between; and the files beside the table."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import picture, save

from twinspect import Detector
from twinspect.commands.calibrate import read_predictions
from twinspect.errors import ConfigError, DataError, OutputError, TwinspectError
from twinspect.inference.bulk import Totals, _count, check_outputs, run, say_totals, store_of, units
from twinspect.inference.job import Job
from twinspect.inference.outputs import Part, PartStore
from twinspect.inference.sources import walk_all


class Silent:
    """Listens and remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.seen: list[tuple[int, int]] = []

    def result(self, text: str) -> None:
        self.lines.append(text)

    warn = result

    def progress(self, stage: str, done: int, total: int) -> None:
        self.seen.append((done, total))


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images in two folders, one of them broken, and a shard of six."""
    root = tmp_path_factory.mktemp("shots")
    for number in range(40):
        save(root / ("late" if number > 24 else "") / f"{number:03d}.png", picture(number % 7, 40, 50))
    (root / "003.png").write_bytes(b"")
    with tarfile.open(root / "shard.tar", "w") as file:
        for number in range(6):
            body = io.BytesIO()
            Image.fromarray(picture(100 + number, 40, 50)).save(body, "PNG")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(body.getvalue())
            file.addfile(info, io.BytesIO(body.getvalue()))
    return root


def job(model: Path, out: Path | str, *sources: object, **changes: Any) -> Job:
    fields: dict[str, Any] = {"workers": 0, "part_rows": 4, "batch": 3} | changes
    return Job(model, tuple(str(s) for s in sources), str(out), **fields)


def table(path: Path) -> list[dict[str, Any]]:
    """Rows without the one column that is a time."""
    return pq.read_table(path).drop(["ms"]).to_pylist()


def runs(one: Job) -> tuple[Totals, Silent]:
    listener = Silent()
    return run(one, listener), listener


@pytest.fixture(scope="module")
def whole(model: Path, shots: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The table of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "t.parquet"
    totals, listener = runs(job(model, out, shots))
    assert (totals.rows, totals.errors, totals.before) == (46, 1, 0)
    assert [done for done, _ in listener.seen] == sorted(done for done, _ in listener.seen)
    assert [p.name for p in out.parent.iterdir()] == ["t.parquet"]
    return table(out)


# ------------------------------------------------------------------------------------------------- rows


def test_rows_and_columns(whole: list[dict[str, Any]], quick: Detector, shots: Path) -> None:
    wanted = {
        "path", "class_name", "score", "threshold", "is_anomaly", "p_value", "margin", "n_regions",
        "max_region_area", "map_path", "mask_path", "model_id",
    }  # fmt: skip
    assert wanted <= whole[0].keys()
    alone = list(quick.predict(shots))
    assert [row["path"] for row in whole] == [result.path for result in alone]
    for row, result in zip(whole, alone, strict=True):
        assert bool(row["error"]) == bool(result.error)
        if not row["error"]:
            assert row["score"] == pytest.approx(result.score, rel=1e-3, abs=1e-3)
            assert row["margin"] == row["score"] - row["threshold"]
            assert row["severity"] == row["score"] / row["threshold"]
            assert row["is_anomaly"] == (row["margin"] >= 0)
    assert whole[3]["path"].endswith("003.png")
    assert whole[3]["score"] is None


@pytest.mark.parametrize("changes", [{"workers": 2}, {"workers": 1, "batch": 1, "part_rows": 100}])
def test_processes_batches_and_parts_change_nothing(
    model: Path, shots: Path, whole: list[dict[str, Any]], tmp_path: Path, changes: dict[str, int]
) -> None:
    runs(job(model, tmp_path / "t.parquet", shots, **changes))
    found = table(tmp_path / "t.parquet")
    assert [row["path"] for row in found] == [row["path"] for row in whole]
    if changes.get("batch", 3) == 3:
        assert found == whole
    scores = [[row["score"] for row in rows if row["score"] is not None] for rows in (found, whole)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-3)


def test_row_groups_are_few_and_times_are_measured(model: Path, shots: Path, tmp_path: Path) -> None:
    runs(job(model, tmp_path / "t.parquet", shots))
    file = pq.ParquetFile(tmp_path / "t.parquet")
    assert file.metadata.num_row_groups == 1
    times = file.read().column("ms").to_pylist()
    assert sum(time is None for time in times) == 1
    assert all(time > 0 for time in times if time is not None)


def test_without_a_table_lines_are_said(model: Path, shots: Path) -> None:
    totals, listener = runs(job(model, "", shots / "late", shots / "003.png"))
    assert (totals.rows, totals.errors, len(listener.lines)) == (16, 1, 16)
    assert listener.lines[-1].startswith("ERROR")


def test_names_that_are_no_text(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", picture())
    os.rename(tmp_path / "in" / "a.png", os.fsencode(tmp_path / "in") + b"/\xff\xfe.png")
    for suffix in (".parquet", ".csv", ".jsonl"):
        runs(job(model, tmp_path / f"t{suffix}", tmp_path / "in"))
    assert table(tmp_path / "t.parquet")[0]["path"].endswith(r"\udcff\udcfe.png")
    assert r"\udcff" in (tmp_path / "t.csv").read_text()
    assert json.loads((tmp_path / "t.jsonl").read_text())["error"] == ""


# ----------------------------------------------------------------------------------------------- resume


def first_parts(one: Job, wanted: int) -> None:
    """Run until so many parts are stored, then break off as if the machine had gone."""

    class Gone(Exception):
        pass

    class Breaks(Silent):
        def progress(self, stage: str, done: int, total: int) -> None:
            super().progress(stage, done, total)
            if len(self.seen) == wanted:
                raise Gone

    with pytest.raises(Gone):
        run(one, Breaks())


@pytest.mark.parametrize("stored", [1, 5, 11])
def test_a_run_that_broke_off_goes_on(
    model: Path, shots: Path, whole: list[dict[str, Any]], tmp_path: Path, stored: int
) -> None:
    one = job(model, tmp_path / "t.parquet", shots)
    first_parts(one, stored)
    totals, _ = runs(one)
    assert totals.before == min(4 * stored, 44)
    assert table(tmp_path / "t.parquet") == whole


def test_a_shard_that_broke_off_goes_on_inside(
    model: Path, shots: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    one = job(model, tmp_path / "t.parquet", shots / "shard.tar")
    first_parts(one, 1)
    totals, _ = runs(one)
    assert (totals.before, totals.rows) == (4, 6)
    assert table(tmp_path / "t.parquet") == whole[-6:]


def test_a_run_that_died_while_joining_goes_on(
    model: Path, shots: Path, whole: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job(model, tmp_path / "t.parquet", shots)
    with monkeypatch.context() as patch:
        patch.setattr("twinspect.inference.bulk.join", lambda parts, out: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(one, Silent())
    totals, _ = runs(one)
    assert totals.before == totals.rows == 46
    assert table(tmp_path / "t.parquet") == whole


def test_changed_input_is_refused(model: Path, tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path / "in" / f"{number:02d}.png", picture())
    one = job(model, tmp_path / "t.csv", tmp_path / "in")
    first_parts(one, 2)
    save(tmp_path / "in" / "00a.png", picture())
    with pytest.raises(DataError, match="files were added, removed, renamed or overwritten.*--restart"):
        run(one, Silent())
    totals, _ = runs(replace(one, restart=True))
    assert (totals.rows, totals.before) == (13, 0)
    assert not (tmp_path / "t.csv.parts").exists()


def overwritten_image(root: Path) -> Path:
    save(root / "01.png", picture(50))
    return root


def overwritten_member(root: Path) -> Path:
    path = root.parent / "s.tar"
    with tarfile.open(path, "w") as file:
        for one in sorted(root.iterdir()):
            file.add(one, one.name)
    return path


def overwritten_cell(root: Path) -> Path:
    path = root.parent / "images.parquet"
    pq.write_table(pa.table({"image": [one.read_bytes() for one in sorted(root.iterdir())]}), path)
    return path


def manifest_of(root: Path) -> Path:
    path = root.parent / "l.csv"
    path.write_text("image\n" + "".join(f"{root.name}/{one.name}\n" for one in sorted(root.iterdir())))
    return path


SAME_NAMES: dict[str, Callable[[Path], str]] = {
    "folder": lambda root: str(root),
    "glob": lambda root: f"{root}/*.png",
    "url": lambda root: f"file://{root}",
    "manifest": lambda root: str(manifest_of(root)),
    "archive": lambda root: str(overwritten_member(root)),
    "archive in a store": lambda root: f"file://{overwritten_member(root)}",
    "encoded images": lambda root: str(overwritten_cell(root)),
}


@pytest.mark.parametrize("source", SAME_NAMES)
@pytest.mark.parametrize("finished", [True, False])
def test_other_images_under_the_same_names_are_refused(
    model: Path, tmp_path: Path, source: str, finished: bool
) -> None:
    root = tmp_path / "cam"
    for number in range(6):
        save(root / f"{number:02d}.png", picture(number))
    one = job(model, f"{tmp_path}/t/" if finished else tmp_path / "t.csv", SAME_NAMES[source](root), part_rows=2)
    runs(one) if finished else first_parts(one, 2)
    again = runs(one)[0] if finished else None
    assert again is None or again.before == 6
    save(root / "01.png", picture(50))
    SAME_NAMES[source](root)
    with pytest.raises(DataError, match="files were added, removed, renamed or overwritten"):
        run(one, Silent())
    totals, _ = runs(replace(one, restart=True))
    assert (totals.rows, totals.before) == (6, 0)


def test_input_that_shrank_is_refused(model: Path, tmp_path: Path) -> None:
    for number in range(8):
        save(tmp_path / "in" / f"{number:02d}.png", picture())
    one = job(model, f"{tmp_path}/t/", tmp_path / "in")
    runs(one)
    for number in range(4, 8):
        (tmp_path / "in" / f"{number:02d}.png").unlink()
    with pytest.raises(DataError, match="rows of images that are no longer given"):
        run(one, Silent())


def test_other_settings_are_refused(model: Path, shots: Path, tmp_path: Path) -> None:
    one = job(model, tmp_path / "t.csv", shots)
    first_parts(one, 1)
    with pytest.raises(ConfigError, match="unfinished or finished run with another class; type the same command"):
        run(replace(one, class_name="ring"), Silent())
    with pytest.raises(ConfigError, match="another masks, part-rows"):
        run(replace(one, part_rows=5, masks=str(tmp_path)), Silent())


def test_a_run_that_failed_before_its_first_part_is_no_obstacle(model: Path, shots: Path, tmp_path: Path) -> None:
    one = job(model, tmp_path / "t.csv", shots)
    with pytest.raises(ConfigError, match="unknown class 'nope'"):
        run(replace(one, class_name="nope"), Silent())
    with pytest.raises(DataError, match="--submission takes images of MVTec AD 2"):
        run(replace(one, submission=str(tmp_path / "sub")), Silent())
    assert run(one, Silent()).before == 0
    assert not (tmp_path / "t.csv.parts").exists()


def test_a_run_of_an_older_version_is_refused(model: Path, shots: Path, tmp_path: Path) -> None:
    one = job(model, tmp_path / "t.csv", shots)
    first_parts(one, 1)
    settings = tmp_path / "t.csv.parts" / "_run.json"
    older = json.loads(settings.read_text())
    del older["names-of-parts"]
    settings.write_text(json.dumps(older))
    with pytest.raises(ConfigError, match="run with another names-of-parts"):
        run(one, Silent())


def test_an_archive_that_ends_with_a_full_part_is_not_scored_again(model: Path, shots: Path, tmp_path: Path) -> None:
    one = job(model, f"{tmp_path}/t/", shots / "shard.tar", part_rows=3)
    assert runs(one)[0].before == 0
    again, _ = runs(one)
    assert (again.rows, again.before) == (6, 6)


def test_two_runs_at_once_are_refused(model: Path, shots: Path, tmp_path: Path) -> None:
    one = job(model, tmp_path / "t.csv", shots)
    held = store_of(one).lock("")
    with pytest.raises(ConfigError, match="another run is writing"):
        run(one, Silent())
    held.close()
    assert runs(one)[0].rows == 46


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for left-over processes in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda one: one.name)
def test_a_kill_loses_nothing_and_leaves_no_process(model: Path, tmp_path: Path, how: signal.Signals) -> None:
    source = tmp_path / "in"
    first = save(source / "0000.png", picture())
    for number in range(1, 200):
        os.link(first, source / f"{number:04d}.png")
    runs(job(model, tmp_path / "calm.parquet", source))
    out = tmp_path / "t.parquet"
    command = [
        sys.executable, "-m", "twinspect", "predict", model, source, "--out", out, "--part-rows", "4", "--batch", "3",
        "--workers", "1",
    ]  # fmt: skip
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: len(list(tmp_path.glob("t.parquet.parts/part-*"))) > 3)
    workers = children(process.pid)
    os.kill(process.pid, how)
    said, _ = process.communicate()
    assert workers
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers))
    assert not out.exists()
    if how == signal.SIGTERM:
        assert process.returncode == 143
        assert "the same command goes on from here" in said.decode()
        assert "Traceback" not in said.decode()
        assert not list(tmp_path.glob("t.parquet.parts/_tmp-*"))
    found = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "of them by an earlier run" in found.stdout
    assert table(out) == table(tmp_path / "calm.parquet")


def children(parent: int) -> list[int]:
    stats = [p.read_text().rsplit(")", 1) for p in Path("/proc").glob("[0-9]*/stat") if p.exists()]
    return [int(head.split(" ", 1)[0]) for head, tail in stats if int(tail.split()[1]) == parent]


def wait_for(happened: Any, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)


# ------------------------------------------------------------------------------------- folders and shards


def test_machines_share_a_folder(model: Path, shots: Path, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    out = f"{tmp_path}/t/"
    for number in (2, 0, 1):
        runs(job(model, out, shots, shard=f"{number}/3"))
    assert sum((Path(out) / f"_SUCCESS-{n}-of-3").exists() for n in range(3)) == 3
    assert sorted(table(Path(out)), key=lambda row: str(row["path"])) == sorted(whole, key=lambda r: str(r["path"]))
    assert sum(1 for _ in read_predictions(Path(out), str(whole[0]["model_id"]))) == 46
    again, _ = runs(job(model, out, shots, shard="1/3"))
    assert again.before == again.rows > 0


def test_rows_go_to_a_url(model: Path, shots: Path, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    one = job(model, f"file://{tmp_path}/t", f"file://{shots}")
    first_parts(one, 2)
    totals, _ = runs(one)
    assert (totals.rows, totals.before) == (46, 8)
    found = table(tmp_path / "t")
    assert [row["score"] for row in found] == [row["score"] for row in whole]
    assert [row["path"] for row in found] == [row["path"] for row in whole]
    assert not list((tmp_path / "t").glob("_tmp-*"))


def test_units_cut_the_input(shots: Path) -> None:
    found = list(units(walk_all([str(shots / "late"), str(shots / "shard.tar"), str(shots / "late")]), 6))
    assert [0 if one.is_stream else len(one.content) for one in found] == [6, 6, 3, 0, 6, 6, 3]
    assert [one.number for one in found] == list(range(7))


def test_part_names_say_everything(tmp_path: Path) -> None:
    part = Part(12, 3, 256, 4, 1, "0123456789abcdef", ".csv")
    assert Part.of(part.name) == part
    assert Part.of("part-1.csv") is None
    store = PartStore(str(tmp_path / "p"), ".csv")
    store.begin({"x": 1}, restart=False)
    store.put(part, b"row\n", b"")
    assert store.of_unit(12, part.digest) == []  # the first three parts are missing
    (tmp_path / "p" / "mine.txt").write_text("x")
    store.clear(all_of_it=True)
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shard": "4/4", "out": "t/"}, "--shard 4/4: accepted 0/N to N-1/N"),
        ({"shard": "3"}, "--shard 3: accepted 0/N"),
        ({"shard": "a/b"}, "--shard a/b: accepted 0/N"),
        ({"shard": "-1/4"}, "--shard -1/4: accepted 0/N"),
        ({"shard": "0/2", "out": "t.csv"}, "--shard writes parts to one folder"),
        ({"shard": "0/2", "out": "-"}, "--shard writes parts to one folder"),
        ({"coco": "c.json"}, "give --out FILE as well"),
        ({"coco": "c.json", "out": "-"}, "give --out FILE as well"),
        ({"part_rows": -1}, "--part-rows -1"),
        ({"overlay_format": "gif"}, "unknown --overlay-format 'gif'.*Accepted: jpg, png"),
        ({"overlay_side": 70_000}, "--overlay-side 70000: accepted 0 to 65,000"),
        ({"actors": 2}, "need --engine ray"),
        ({"engine": "ray"}, "give --out"),
        ({"engine": "spark"}, "unknown --engine 'spark'"),
        ({"engine": "ray", "out": "t/", "actors": -1}, "--actors -1: accepted 0"),
        ({"engine": "ray", "out": "t/", "actor_cpus": 0}, "--actor-cpus 0: accepted 0.01"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Job(Path("m.twin"), ("x",), **changes).check()


def test_a_table_of_another_kind_is_refused(shots: Path) -> None:
    with pytest.raises(ConfigError, match=r"accepted endings are \.parquet, \.csv, \.jsonl"):
        run(job(Path("no model is opened"), "t.xlsx", shots), Silent())


def test_full_disk_is_said_and_leaves_no_draft(
    model: Path, shots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job(model, tmp_path / "t.csv", shots)
    first_parts(one, 2)

    def full(_number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("twinspect.files.os.fsync", full)
        with pytest.raises(TwinspectError, match="cannot be written .No space left on device"):
            run(one, Silent())
    assert not list((tmp_path / "t.csv.parts").glob("_tmp*"))
    assert runs(one)[0].before == 8


def test_nothing_scored(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_text("x")
    for out in ("", tmp_path / "t.csv", f"{tmp_path}/t/", f"{tmp_path}/t/"):  # the last one again, finished before
        totals, _ = runs(job(model, out, tmp_path / "in"))
        assert totals.nothing_scored
    save(tmp_path / "in" / "3.png", picture())
    assert not runs(job(model, tmp_path / "t.csv", tmp_path / "in"))[0].nothing_scored
    assert not Totals().nothing_scored  # a machine without a share of the work has not failed


# ------------------------------------------------------------------------------------- outputs beforehand


@pytest.mark.parametrize(
    ("name", "folder", "sources"),
    [
        *((name, "in/pictures", ["in"]) for name in ("masks", "overlays", "submission")),
        ("overlays", "in", ["in"]),
        ("overlays", "in/a/b", ["file://in"]),
        ("overlays", "in", ["in/*.png"]),
        ("masks", "in/pictures", ["in/**/*.png"]),
        ("submission", "in", ["in/*.tif*"]),
        ("overlays", "in", ["in/a.png", "in/b.png"]),  # as a shell expands in/*.png
        ("overlays", "in/pictures", ["other", "in"]),
    ],
)
def test_pictures_are_not_put_among_the_images(tmp_path: Path, name: str, folder: str, sources: list[str]) -> None:
    for file in ("in/a.png", "in/b.png", "in/c.tiff", "other/a.png"):
        save(tmp_path / file, picture())
    placed = [one.replace("in", f"{tmp_path}/in", 1).replace("other", f"{tmp_path}/other") for one in sources]
    pictures = {"overlay_format": "png", name: f"{tmp_path}/{folder}"}
    with pytest.raises(ConfigError, match=f"--{name} .*images are read from there.*choose a folder outside"):
        run(job(Path("no model is opened"), tmp_path / "t.csv", *placed, **pictures), Silent())


def test_pictures_that_no_later_run_would_take_for_images(model: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", picture())
    for source, options in (
        (tmp_path, {"overlays": f"{tmp_path}/.pictures"}),
        (tmp_path, {"maps": f"{tmp_path}/maps"}),  # .npz is no picture
        (path, {"overlays": str(tmp_path)}),
    ):
        one = job(model, "", source, **options)
        assert runs(one)[0].rows == runs(one)[0].rows == 1
    check_outputs(job(model, "", f"{tmp_path}/*.jpg", masks=str(tmp_path)))


@pytest.mark.parametrize(
    "changes",
    [
        {"out": "{}/file/t.csv"},
        {"out": "{}/t.csv", "coco": "{}/file/c.json"},
        {"out": "{}/t.csv", "coco": "{}"},
        {"maps": "{}/file"},
        {"masks": "{}/file/masks"},
    ],
)
def test_outputs_that_cannot_be_written_are_found_before_the_work(
    shots: Path, tmp_path: Path, changes: dict[str, str]
) -> None:
    (tmp_path / "file").write_text("x")
    placed = {"out": "", **{key: value.format(tmp_path) for key, value in changes.items()}}
    one = job(Path("no model is opened"), placed.pop("out"), shots, **placed)
    with pytest.raises(OutputError, match="cannot be written|is a folder"):
        run(one, Silent())


def test_a_file_of_another_kind_is_not_replaced(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", picture())
    texts = {
        "notes.csv": "my notes\n", "list.csv": "image,label\nin/a.png,0\n", "x.jsonl": '{"image": "in/a.png"}\n',
        "y.parquet": "no table", "z.csv": "\0\1\2",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(OutputError, match="holds something else; move it away, or choose another --out"):
            run(job(model, tmp_path / name, tmp_path / "in"), Silent())
        assert (tmp_path / name).read_text() == text
    (tmp_path / "c.json").write_text('{"images": []}')
    coco = {"coco": str(tmp_path / "c.json")}
    with pytest.raises(OutputError, match="holds something else; move it away, or choose another --coco"):
        run(job(model, tmp_path / "t.csv", tmp_path / "in", **coco), Silent())
    (tmp_path / "c.json").unlink()
    for suffix in (".csv", ".jsonl", ".parquet"):  # our own are, and so is an empty file
        (tmp_path / f"t{suffix}").touch()
        for _ in range(2):
            assert runs(job(model, tmp_path / f"t{suffix}", tmp_path / "in", **coco))[0].rows == 1


# ----------------------------------------------------------------------------------- rows as the next input


def test_a_list_of_names_of_rows_is_an_input(
    model: Path, shots: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    wanted = [whole[number] for number in (4, 42, 44, 2)]
    gone = [f"{shots}/shard.tar#gone.png", f"{shots}/gone.tar#1.png"]
    (tmp_path / "some.txt").write_text("\n".join([*(row["path"] for row in wanted), *gone]))
    runs(job(model, tmp_path / "t.parquet", f"@{tmp_path}/some.txt"))
    found = table(tmp_path / "t.parquet")
    assert [row["path"] for row in found] == [*(row["path"] for row in wanted), *gone]
    assert [row["score"] for row in found[:4]] == pytest.approx([row["score"] for row in wanted], rel=1e-3)
    assert all("not in the file" in row["error"] for row in found[4:])


def test_images_are_counted_beside_the_work(shots: Path) -> None:
    for sources, expected in ((("late", "000.png"), 16), (("late", "shard.tar"), 0), (("gone",), 0)):
        totals = Totals()
        _count([str(shots / name) for name in sources], totals)
        assert totals.expected == expected


def test_rows_on_standard_output(model: Path, shots: Path, whole: list[dict[str, Any]]) -> None:
    totals, listener = runs(job(model, "-", shots))
    rows = [json.loads(line) for line in listener.lines]
    assert [row["path"] for row in rows] == [row["path"] for row in whole]
    assert [row.keys() - {"ms"} for row in rows] == [row.keys() for row in whole]
    scores = [[row["score"] for row in found if row["score"] is not None] for found in (rows, whole)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3, abs=1e-3)  # a batch holds other images here
    assert say_totals(totals, "-").endswith("1 could not be read")


def test_archives_from_python(quick: Detector, shots: Path) -> None:
    found = quick.predict(shots / "shard.tar")
    assert [result.path for result in found] == [f"{shots / 'shard.tar'}#{n}.png" for n in range(6)]
    assert all(result.map is not None for result in found)


def test_files_of_several_pictures_are_counted(model: Path, tmp_path: Path) -> None:
    pages = [Image.fromarray(picture(number)) for number in range(3)]
    for name in ("a.tif", "b.gif"):
        (tmp_path / "new").mkdir(exist_ok=True)
        pages[0].save(tmp_path / "new" / name, save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "new" / "c.tif")
    for out in (str(tmp_path / "t.csv"), ""):
        totals = run(Job(model, (str(tmp_path / "new"),), out), Silent())
        assert (totals.rows, totals.errors, totals.several) == (3, 0, 2)
        assert say_totals(totals, "").endswith("2 files with several pictures: the first of each was read")
