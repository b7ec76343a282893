"""Feature cache: computed once, never the wrong image's, never in the way."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import RANDOM, RANDOM_CNN, good_folder, picture, run_config, save, train_samples

from twinspect import Detector
from twinspect.errors import DataError
from twinspect.models.contract import Observed, build_model
from twinspect.models.dual import DualModel
from twinspect.training import source as source_module
from twinspect.training.source import FeatureCache, FeatureSource, cache_folder, image_key, pack, unpack
from twinspect.types import TRAIN, Sample, silent


def answer(number: int, small_side: int = 4) -> tuple[Observed, torch.Tensor]:
    """A teacher's answer to one image, as a batch of one."""
    generator = torch.Generator().manual_seed(number)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    observed = Observed(
        (drawn(2, 3, 3), drawn(4, 1, 1)), (drawn(3, 2, 2),), (drawn(5), drawn(5)), drawn(3), drawn(0, 0, 0)
    )
    return observed, torch.full((1, 3, small_side, small_side), number, dtype=torch.uint8)


def key(number: int) -> bytes:
    return image_key(bytes([number]))


def filled(root: Path, numbers: range) -> FeatureCache:
    cache = FeatureCache(root, "space")
    for number in numbers:
        cache.write([key(number)], pack(*answer(number)))
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


def test_answers_come_back(tmp_path: Path) -> None:
    cache = filled(tmp_path, range(5))
    observed, small = unpack(cache.read([key(3), key(1), key(3)]))
    for part, expected in zip(
        (*observed.maps, *observed.coarse), [*answer(3)[0].maps, *answer(3)[0].coarse], strict=True
    ):
        torch.testing.assert_close(part[[0, 2]], expected.expand(2, -1, -1, -1), rtol=1e-3, atol=1e-3)  # fp16
    for part, expected in zip(observed.tokens, answer(1)[0].tokens, strict=True):
        assert torch.equal(part[1:2], expected)
    assert torch.equal(observed.embedding_BF[1:2], answer(1)[0].embedding_BF)
    assert observed.prefix_BMPD.shape == (3, 0, 0, 0)
    assert {part.dtype for part in (*observed.maps, observed.prefix_BMPD)} == {torch.float32}
    assert small[1].unique().tolist() == [1]
    assert key(9) not in cache


def test_many_maps_stay_in_order(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "space")
    maps = tuple(torch.full((2, 1, 1, 1), float(i)) for i in range(12))
    observed = Observed(maps, (), (torch.zeros(2, 3),), torch.zeros(2, 3), torch.zeros(2, 2, 1, 2))
    cache.write([key(0), key(1)], pack(observed, torch.zeros(2, 3, 0, 0, dtype=torch.uint8)))
    back, small = unpack(cache.read([key(1)]))
    assert [float(one) for one in back.maps] == list(range(12))
    assert back.coarse == ()
    assert small.shape == (1, 3, 0, 0)


def test_another_process_reads_and_adds(tmp_path: Path) -> None:
    first = filled(tmp_path, range(3))
    filled(tmp_path, range(2, 6))
    assert all(key(n) in first for n in range(6))
    assert unpack(first.read([key(4)]))[1].unique().tolist() == [4]
    assert key(0) not in FeatureCache(tmp_path, "other teacher")


@pytest.mark.parametrize("kept", [0, 5, -10])
def test_a_file_that_was_cut_off_is_computed_again(tmp_path: Path, kept: int) -> None:
    cache = filled(tmp_path, range(2))
    file = next(tmp_path.rglob(f"{key(1).hex()}*"))
    file.write_bytes(file.read_bytes()[:kept])
    assert [key(n) in cache for n in range(2)] == [True, False]
    with pytest.raises(DataError, match="--cache-gb 0"):
        cache.read([key(1)])
    filled(tmp_path, range(1, 2))
    assert unpack(cache.read([key(1)]))[1].unique().tolist() == [1]


def test_features_beyond_fp16_stay_finite(tmp_path: Path) -> None:
    cache, (observed, small) = FeatureCache(tmp_path, "space"), answer(0)
    huge = observed._replace(maps=tuple(torch.full_like(one, 1e6) for one in observed.maps))
    cache.write([key(0)], pack(huge, small))
    assert all(torch.isfinite(one).all() for one in unpack(cache.read([key(0)]))[0].maps)


# --------------------------------------------------------------------------------- places that refuse


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "features").write_text("x")
    with pytest.raises(DataError, match=r"cannot be written or read .*TWINSPECT_HOME.*--cache-gb 0"):
        FeatureCache(tmp_path / "features", "space")


def test_a_disk_that_fills_up_on_the_way_is_said_soon_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = samples_of(good_folder(tmp_path / "good", 3)) * 40
    samples = [Sample(one.image, TRAIN, "a", pixels=picture(number, 32, 32)) for number, one in enumerate(samples)]
    model, written, looked = model_of(), [], []
    write_bytes = Path.write_bytes

    def full(path: Path, body: bytes) -> int:
        if len(written) == 10:
            write_bytes(path, body[:7])
            raise OSError(28, "No space left on device")
        written.append(path)
        return write_bytes(path, body)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"No space left on device.* --cache-gb 0"):
        FeatureSource(model, samples, tmp_path / "cache", lambda _, done, __: looked.append(done))
    assert len(looked) < 60  # not only at the end of a long pass
    assert len([file for file in (tmp_path / "cache").rglob("*") if file.is_file()]) == 10
    monkeypatch.undo()
    FeatureSource(model, samples, tmp_path / "cache", silent)
    assert len([file for file in (tmp_path / "cache").rglob("*") if file.is_file()]) == 120


def test_too_large_a_cache_is_not_made(tmp_path: Path) -> None:
    model = model_of()
    FeatureSource(model, samples_of(good_folder(tmp_path / "good", 1)), tmp_path / "cache", silent)
    size = next((tmp_path / "cache").rglob("*.safetensors")).stat().st_size
    assert cache_folder(model, 10, 10 * size / 1e9) is not None
    assert cache_folder(model, 10, 9 * size / 1e9) is None
    assert cache_folder(model, 10, 0.0) is None


# ------------------------------------------------------------------------------------------- source


def test_decoding_runs_a_bounded_way_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels of 90 images that wait for a slow teacher would be too much, and so would be waiting for each."""
    folder = good_folder(tmp_path / "good", 3)
    samples = [replace(one, group=str(n)) for n in range(30) for one in samples_of(folder)]
    (folder / "001.png").write_bytes(b"no image")
    model, decoded, gaps, order = model_of(RANDOM_CNN), [], [], []
    read = source_module.read_rgb

    def counted(raw: bytes, name: str, draft_side: int) -> np.ndarray:
        decoded.append(raw)
        return read(raw, name=name, draft_side=draft_side)

    def note(_stage: str, done: int, _total: int) -> None:
        time.sleep(0.002)  # decoding is faster than any teacher
        gaps.append(len(decoded) - done)
        order.append(done)

    monkeypatch.setattr(source_module, "read_rgb", counted)
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
    whole = next(on.ahead([[4, 0, 2]]))[0]
    tokens, embedding_nF = on.vectors([4, 0, 2])
    assert len(tokens) == len(whole.tokens) == len(model.selection.shrinks)
    assert all(torch.equal(a, b) for a, b in zip(tokens, whole.tokens, strict=True))
    assert torch.equal(embedding_nF, whole.embedding_BF)
    torch.testing.assert_close((tokens, embedding_nF), off.vectors([4, 0, 2]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("teacher", [RANDOM, RANDOM_CNN, "efficientnet-lite0"])
def test_cache_off_equals_cache_on(teacher: str, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 5)
    model = model_of(teacher)
    on = FeatureSource(model, samples_of(folder), tmp_path / "cache", silent)
    off = FeatureSource(model, samples_of(folder), None, silent)
    (first, small), (second, same) = next(on.ahead([[4, 0, 2]])), next(off.ahead([[4, 0, 2]]))
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
    torch.testing.assert_close(
        next(source.ahead([[3]]))[0].tokens, next(plain.ahead([[3]]))[0].tokens, rtol=1e-3, atol=1e-3
    )


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
