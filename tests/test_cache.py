"""Feature cache: computed once, never the wrong image's, never in the way."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import RANDOM, RANDOM_CNN, good_folder, picture, run_config, save, train_samples

from twinspect import Detector
from twinspect.errors import DataError
from twinspect.models.dual import DualModel
from twinspect.models.observed import Observed
from twinspect.storage import build_model
from twinspect.training import cache as cache_module
from twinspect.training import source as source_module
from twinspect.training.cache import FeatureCache, KnownFiles, RecordLayout, image_key
from twinspect.training.source import FeatureSource, cache_folder
from twinspect.types import TRAIN, Sample, silent

LAYOUT = RecordLayout(((2, 3, 3), (4, 1, 1)), ((3, 2, 2),), (2, 3, 4), (5, 5), 3, 4)


def record(seed: int) -> torch.Tensor:
    """The record of one image, as a batch of one."""
    generator = torch.Generator().manual_seed(seed)
    maps, coarse = (
        tuple(torch.randn(1, *shape, generator=generator) for shape in shapes)
        for shapes in (LAYOUT.map_shapes, LAYOUT.coarse_shapes)
    )
    *tokens, embedding = (torch.randn(1, dims, generator=generator) for dims in (*LAYOUT.token_dims, 3))
    prefix = torch.randn(1, *LAYOUT.prefix_shape, generator=generator)
    return LAYOUT.pack(Observed(maps, coarse, tuple(tokens), embedding, prefix), torch.full((1, 3, 4, 4), seed))


def key(number: int) -> bytes:
    return image_key(bytes([number]))


def filled(root: Path, numbers: range) -> FeatureCache:
    cache = FeatureCache(root, "space", LAYOUT)
    for number in numbers:
        cache.add([key(number)], record(number))
    cache.flush()
    return cache


def model_of(teacher: str = RANDOM, size: int = 64) -> DualModel:
    torch.manual_seed(0)
    return build_model(run_config(teacher, size=size).model)


def samples_of(folder: Path) -> list[Sample]:
    return [Sample(p, TRAIN, "a") for p in sorted(folder.iterdir())]


class Counting:
    """Progress and a count of the images that the teacher was shown."""

    def __init__(self, model: DualModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen = 0
        observe = model.observe

        def counted(x: torch.Tensor) -> Observed:
            self.seen += len(x)
            return observe(x)

        monkeypatch.setattr(model, "observe", counted)


# -------------------------------------------------------------------------------------------- records


def test_records_come_back(tmp_path: Path) -> None:
    cache = filled(tmp_path, range(5))
    observed, small = LAYOUT.unpack(cache.read([key(3), key(1), key(3)]))
    assert [tuple(m.shape) for m in observed.maps] == [(3, 2, 3, 3), (3, 4, 1, 1)]
    assert torch.equal(observed.maps[0][0], observed.maps[0][2])
    expected = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(observed.maps[0][0], expected, rtol=1e-3, atol=1e-3)  # fp16
    assert small[1].unique().tolist() == [1]
    assert key(9) not in cache


def test_another_process_reads_and_appends(tmp_path: Path) -> None:
    filled(tmp_path, range(3))
    second = filled(tmp_path, range(3, 6))
    third = FeatureCache(tmp_path, "space", LAYOUT)
    assert all(key(n) in second for n in range(6))
    assert all(key(n) in third for n in range(6))
    assert LAYOUT.unpack(third.read([key(4)]))[1].unique().tolist() == [4]


def test_other_spaces_and_layouts_are_apart(tmp_path: Path) -> None:
    filled(tmp_path, range(3))
    assert key(0) not in FeatureCache(tmp_path, "other teacher", LAYOUT)
    assert key(0) not in FeatureCache(tmp_path, "space", replace(LAYOUT, small_side=8))


@pytest.mark.parametrize("suffix", [".data", ".index"])
def test_what_a_crash_cut_off_is_forgotten_and_the_rest_kept(tmp_path: Path, suffix: str) -> None:
    filled(tmp_path, range(4))
    file = next(tmp_path.rglob(f"*{suffix}"))
    file.write_bytes(file.read_bytes()[:-10])
    cache = FeatureCache(tmp_path, "space", LAYOUT)
    assert [key(n) in cache for n in range(4)] == [True, True, True, False]
    assert LAYOUT.unpack(cache.read([key(2)]))[1].unique().tolist() == [2]
    cache.add([key(3)], record(3))
    cache.flush()
    assert LAYOUT.unpack(cache.read([key(3)]))[1].unique().tolist() == [3]


def test_missing_data_and_a_damaged_index_line(tmp_path: Path) -> None:
    filled(tmp_path, range(3))
    index = next(tmp_path.rglob("*.index"))
    raw = bytearray(index.read_bytes())
    raw[30] ^= 0xFF  # in the second line
    index.write_bytes(raw)
    cache = FeatureCache(tmp_path, "space", LAYOUT)
    assert [key(n) in cache for n in range(3)] == [True, False, True]
    next(tmp_path.rglob("*.data")).unlink()
    assert key(0) not in FeatureCache(tmp_path, "space", LAYOUT)


def test_features_beyond_fp16_stay_finite(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "space", LAYOUT)
    huge, coarse = (
        tuple(torch.full((1, *shape), 1e6) for shape in shapes)
        for shapes in (LAYOUT.map_shapes, LAYOUT.coarse_shapes)
    )
    prefix = torch.full((1, *LAYOUT.prefix_shape), -1e6)
    observed = Observed(huge, coarse, (torch.zeros(1, 5), torch.zeros(1, 5)), torch.zeros(1, 3), prefix)
    cache.add([key(0)], LAYOUT.pack(observed, torch.zeros(1, 3, 4, 4)))
    cache.flush()
    found = LAYOUT.unpack(cache.read([key(0)]))[0]
    assert all(torch.isfinite(m).all() for m in (*found.maps, *found.coarse, found.prefix_BMPD))


@pytest.mark.parametrize("coarse", [(), ((1, 2, 1),)])
@pytest.mark.parametrize("prefix", [(0, 0, 0), (2, 1, 2)])
@pytest.mark.parametrize("small_side", [3, 4])
def test_records_of_any_length(
    small_side: int, prefix: tuple[int, int, int], coarse: tuple[tuple[int, int, int], ...], tmp_path: Path
) -> None:
    """An odd number of bytes puts every other record where numbers of two bytes cannot lie."""
    views = 1 + len(coarse)
    layout = RecordLayout(((2, 3, 3), (1, 1, 1)), coarse, prefix, (3,) * views, 2, small_side)
    assert layout.size % 2 == small_side % 2
    cache = FeatureCache(tmp_path, "space", layout)
    for number in range(3):
        maps = tuple(torch.full((1, *shape), float(number + i)) for i, shape in enumerate(layout.map_shapes))
        halves = tuple(torch.full((1, *shape), number + 0.5) for shape in coarse)
        tokens = tuple(torch.full((1, 3), 0.1 + number + 10 * view) for view in range(views))
        observed = Observed(maps, halves, tokens, torch.full((1, 2), -1.0), torch.full((1, *prefix), 0.5 - number))
        cache.add([key(number)], layout.pack(observed, torch.full((1, 3, small_side, small_side), 10 + number)))
    cache.flush()
    observed, small = layout.unpack(cache.read([key(n) for n in (2, 0, 1)]))
    assert [m.dtype for m in (*observed.maps, *observed.coarse)] == [torch.float32] * (1 + views)
    assert observed.maps[0][:, 1, 2, 0].tolist() == [2.0, 0.0, 1.0]
    assert observed.maps[1].flatten().tolist() == [3.0, 1.0, 2.0]
    assert [one[:, 0, 1, 0].tolist() for one in observed.coarse] == [[2.5, 0.5, 1.5]] * len(coarse)
    assert torch.equal(observed.prefix_BMPD, torch.tensor([-1.5, 0.5, -0.5])[:, None, None, None].expand(3, *prefix))
    for view, token_BE in enumerate(observed.tokens):
        assert torch.equal(token_BE[:, 2], torch.tensor([2.1, 0.1, 1.1]) + 10 * view)
    assert torch.equal(observed.embedding_BF, torch.full((3, 2), -1.0))
    assert small.flatten(1).unique(dim=1).flatten().tolist() == [12, 10, 11]
    tokens, embedding_BF = layout.unpack_vectors(cache.read([key(n) for n in (2, 0, 1)], span=layout.vectors))
    assert all(torch.equal(a, b) for a, b in zip(tokens, observed.tokens, strict=True))
    assert torch.equal(embedding_BF, observed.embedding_BF)


def test_a_file_cut_off_while_it_is_used(tmp_path: Path) -> None:
    cache = filled(tmp_path, range(2))
    file = next(tmp_path.rglob("*.data"))
    file.write_bytes(file.read_bytes()[:-3])
    assert LAYOUT.unpack(cache.read([key(0)]))[1].unique().tolist() == [0]
    with pytest.raises(DataError, match="has become shorter.*--cache-gb 0"):
        cache.read([key(1)])


def test_a_record_of_another_size_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected"):
        FeatureCache(tmp_path, "space", LAYOUT).add([key(0)], record(0)[:, 1:])


# --------------------------------------------------------------------------------- places that refuse


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "features").write_text("x")
    with pytest.raises(DataError, match=r"cannot be written or read .*TWINSPECT_HOME.*--cache-gb 0"):
        FeatureCache(tmp_path / "features", "space", LAYOUT)


def test_a_full_disk_is_said_and_the_cache_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path, "space", LAYOUT)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    cache.add([key(0)], record(0))
    with pytest.raises(DataError, match="No space left on device.* --cache-gb 0"):
        cache.flush()
    monkeypatch.undo()
    cache.add([key(0)], record(0))  # shown to the teacher again
    cache.flush()
    assert LAYOUT.unpack(cache.read([key(0)]))[1].unique().tolist() == [0]


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's error comes out in the caller's, soon after; what was written before stays."""
    cache, flushed, synced = FeatureCache(tmp_path, "space", LAYOUT), [], os.fsync

    def full_later(file: int) -> None:
        if len(flushed) == 2:
            raise OSError(28, "No space left on device")
        flushed.append(file)
        synced(file)

    monkeypatch.setattr("os.fsync", full_later)
    portion, added = 8, []

    def fill() -> None:
        for number in range(64):
            added.append(number)
            first = number * portion
            cache.add([key(n) for n in range(first, first + portion)], torch.cat([record(0)] * portion))

    with pytest.raises(DataError, match=r"No space left on device.* --cache-gb 0"):
        fill()
    assert len(added) < 16  # not only at the end of a long pass
    cache._thread.shutdown()
    kept = FeatureCache(tmp_path, "space", LAYOUT)
    assert [key(n) in kept for n in (0, 2 * portion - 1, 2 * portion)] == [True, True, False]


def test_an_index_never_names_what_is_not_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, seen = FeatureCache(tmp_path, "space", LAYOUT), []

    def look(file: int) -> None:
        named = sum(len(one.read_bytes()) for one in tmp_path.rglob("*.index")) // 28
        seen.append((named, os.fstat(file).st_size // LAYOUT.size))

    monkeypatch.setattr("os.fsync", look)
    for number in range(30):
        cache.add([key(number)], record(number))
    cache.flush()
    assert len(seen) > 2
    assert [named for named, _ in seen] == [0, *(written for _, written in seen[:-1])]
    assert seen[-1][1] == 30


def test_too_large_a_cache_is_not_made() -> None:
    model = model_of()
    assert cache_folder(model, 10, 20.0) is not None
    assert cache_folder(model, 10, 0.0) is None
    assert cache_folder(model, 10**9, 20.0) is None


# ------------------------------------------------------------------------------------------- source


def test_decoding_runs_a_bounded_way_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels of 90 images that wait for a slow teacher would be too much, and so would be waiting for each."""
    folder = good_folder(tmp_path / "good", 3)
    samples = [replace(one, group=str(n)) for n in range(30) for one in samples_of(folder)]
    (folder / "001.png").write_bytes(b"no image")
    model, decoded, gaps, order = model_of(RANDOM_CNN), [], [], []
    read = source_module.read_square

    def counted(sample: Sample, size: int) -> np.ndarray:
        decoded.append(sample)
        return read(sample, size)

    def note(_stage: str, done: int, _total: int) -> None:
        time.sleep(0.002)  # decoding is faster than any teacher
        gaps.append(len(decoded) - done)
        order.append(done)

    monkeypatch.setattr(source_module, "read_square", counted)
    source = FeatureSource(model, samples, tmp_path / "cache", note)
    assert order == list(range(1, 91))
    assert 8 < max(gaps) <= 32
    assert source.samples == [one for one in samples if one.image.name != "001.png"]
    assert [one.path.name for one in source.skipped] == ["001.png"] * 30


@pytest.mark.parametrize("teacher", [RANDOM, RANDOM_CNN])
def test_tokens_alone_are_those_of_whole_records(teacher: str, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 5)
    model = model_of(teacher)
    on = FeatureSource(model, samples_of(folder), tmp_path / "cache", silent)
    off = FeatureSource(model, samples_of(folder), None, silent)
    whole = on.batch([4, 0, 2])[0]
    tokens, embedding_nF = on.vectors([4, 0, 2])
    assert len(tokens) == len(whole.tokens) == 1 + model.selection.second_view
    assert all(torch.equal(a, b) for a, b in zip(tokens, whole.tokens, strict=True))
    assert torch.equal(embedding_nF, whole.embedding_BF)
    torch.testing.assert_close((tokens, embedding_nF), off.vectors([4, 0, 2]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("teacher", [RANDOM, RANDOM_CNN, "efficientnet-lite0"])
def test_cache_off_equals_cache_on(teacher: str, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 5)
    model = model_of(teacher)
    on = FeatureSource(model, samples_of(folder), tmp_path / "cache", silent)
    off = FeatureSource(model, samples_of(folder), None, silent)
    (first, small), (second, same) = on.batch([4, 0, 2]), off.batch([4, 0, 2])
    torch.testing.assert_close(first.tokens, second.tokens, rtol=1e-3, atol=1e-3)
    assert len(first.coarse) == len(model.selection.coarse_levels)
    for a, b in zip((*first.maps, *first.coarse), (*second.maps, *second.coarse), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * float(b.abs().max()))
    assert torch.equal(small, same)
    assert on.keys == off.keys


@pytest.mark.parametrize("teacher", [RANDOM, RANDOM_CNN])
def test_training_without_a_cache(teacher: str, parts: Path) -> None:
    detector = Detector(config=run_config(teacher, cache_gb=0.0)).fit(parts)
    assert np.isfinite(detector.predict(picture()).score)


def test_a_home_that_cannot_be_written_costs_the_cache_only(
    tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TWINSPECT_HOME", str(tmp_path / "file" / "home"))
    assert Detector(config=run_config()).fit(train_samples(parts)).record_["images"]["train"] > 0


def test_second_run_shows_the_teacher_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = good_folder(tmp_path / "good", 6)
    model = model_of()
    counting = Counting(model, monkeypatch)
    FeatureSource(model, samples_of(folder), tmp_path / "cache", silent)
    assert counting.seen == 6
    FeatureSource(model, samples_of(folder), tmp_path / "cache", silent)
    assert counting.seen == 6
    save(folder / "003.png", picture(99))  # changed: another address
    save(folder / "copy.png", picture(0))  # the same pixels as 000.png, the same file
    source = FeatureSource(model, samples_of(folder), tmp_path / "cache", silent)
    assert counting.seen == 7
    plain = FeatureSource(model, samples_of(folder), None, silent)
    torch.testing.assert_close(source.batch([3])[0].tokens, plain.batch([3])[0].tokens, rtol=1e-3, atol=1e-3)


def test_files_known_from_an_earlier_run_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, notes = good_folder(tmp_path / "good", 4), tmp_path / "notes"
    (folder / "bad.png").write_text("not an image")
    monkeypatch.setattr(cache_module, "_SETTLED_NS", -1)  # these files were written this moment
    model, read = model_of(), Reads(monkeypatch)
    for root in (tmp_path / "cache", None):
        first = FeatureSource(model, samples_of(folder), root, silent, KnownFiles(notes))
        read.names.clear()
        again = FeatureSource(model, samples_of(folder), root, silent, KnownFiles(notes))
        assert again.keys == first.keys
        assert [skipped.path.name for skipped in again.skipped] == ["bad.png"]
        assert set(read.names) == {"bad.png"}  # what could not be read is tried again
    save(folder / "002.png", picture(77))
    changed = FeatureSource(model, samples_of(folder), tmp_path / "cache", silent, KnownFiles(notes))
    assert "002.png" in read.names
    assert changed.keys[2] == image_key((folder / "002.png").read_bytes()) != first.keys[2]
    assert changed.keys[:2] + changed.keys[3:] == first.keys[:2] + first.keys[3:]


class Reads:
    """Names of the files whose content was read whole, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        read = Path.read_bytes

        def noted(path: Path) -> bytes:
            if path.suffix == ".png":
                self.names.append(path.name)
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", noted)


def test_a_file_of_this_moment_is_not_noted_and_damaged_notes_are_left_out(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", picture(0))
    fresh = KnownFiles(tmp_path / "notes")
    fresh.note(file, file.stat(), b"k" * 16)
    assert fresh.find(file) is None  # it may change again within one tick of the clock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "_SETTLED_NS", -1)
        fresh.note(file, file.stat(), b"k" * 16)
    assert fresh.find(file) == b"k" * 16
    fresh.save()
    assert KnownFiles(tmp_path / "notes").find(file) == b"k" * 16
    notes = next((tmp_path / "notes").iterdir())
    notes.write_bytes(b"x" + notes.read_bytes()[1:] + b"torn")
    assert KnownFiles(tmp_path / "notes").find(file) is None
    assert KnownFiles(tmp_path / "notes").find(tmp_path / "absent.png") is None


def test_notes_that_cannot_be_written_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_SETTLED_NS", -1)
    (tmp_path / "notes").write_text("a file in the place of the folder")
    source = FeatureSource(
        model_of(), samples_of(good_folder(tmp_path / "good", 2)), None, silent, KnownFiles(tmp_path / "notes")
    )
    assert len(source) == 2


def test_other_teacher_weights_and_sizes_have_their_own_features(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 2)
    torch.manual_seed(1)
    other = build_model(run_config().model)
    for model in (model_of(), other, model_of(size=96), model_of(RANDOM_CNN)):
        FeatureSource(model, samples_of(folder), tmp_path / "cache", silent)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_progress_counts_every_image(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 5)
    (folder / "002.png").write_bytes(b"")
    calls: list[tuple[str, int, int]] = []
    for root in (tmp_path / "cache", None):
        calls.clear()
        source = FeatureSource(model_of(), samples_of(folder), root, lambda *call: calls.append(call))
        assert [(done, total) for _, done, total in calls] == [(n, 5) for n in range(1, 6)]
        assert len(source) == 4
        assert [s.path.name for s in source.skipped] == ["002.png"]
