"""Copies of good images as a camera might have taken them, and what they are worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import good_folder, picture, run_config, save

from twinspect import Detector
from twinspect.config import RunConfig
from twinspect.data.images import resize_rgb
from twinspect.errors import ConfigError
from twinspect.models.statistics import NearestImages, left_out
from twinspect.training.derived import Copy, add_tolerated, lit, packed, read_square, same_image, shifted
from twinspect.types import TRAIN, Sample


def test_what_a_camera_does() -> None:
    pixels = picture(0, 60, 100)
    moved = shifted(pixels, 0.05, -0.1)
    assert (moved[5:, :90] == pixels[:55, 10:]).all()
    assert (moved[:5, :90] == pixels[0, 10:]).all()
    assert (lit(np.full((2, 2, 3), 240, np.uint8), 1.1) == 255).all()
    assert (lit(np.full((2, 2, 3), 100, np.uint8), 0.9) == 90).all()
    loss = [float(np.abs(packed(pixels, quality).astype(int) - pixels).mean()) for quality in (50, 90)]
    assert loss[0] > loss[1] > 0


def test_copies_are_made_of_the_whole_image_and_always_the_same(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", picture(0, 300, 300))
    for seed in range(4):
        one = Copy(path, TRAIN, "a", kind="jpeg", seed=seed)
        quality = int(np.random.default_rng(seed).integers(50, 90, endpoint=True))
        assert (read_square(one, 64) == resize_rgb(packed(picture(0, 300, 300), quality), 64)).all()
    both = [Copy(path, TRAIN, "a", kind=kind, seed=1).changed(picture(0)) for kind in ("light", "shift")]
    assert not (both[0] == picture(0)).all()
    assert not (both[1] == picture(0)).all()


def test_copies_stay_on_the_side_of_their_image(tmp_path: Path) -> None:
    train = [Sample(tmp_path / f"{i}.png", TRAIN, "a") for i in range(80)]
    held = [Sample(tmp_path / f"h{i}.png", TRAIN, "a") for i in range(8)]
    few = [Sample(tmp_path / f"b{i}.png", TRAIN, "b") for i in range(3)]
    first, second, [note] = add_tolerated([*train, *few], held, "shift, jpeg,shift", 0)
    assert first[:83] == [*train, *few]
    copies = [one for one in (*first, *second) if isinstance(one, Copy)]
    assert {one.image for one in second} == {one.image for one in held}
    counts = {(c, k): sum(o.class_name == c and o.kind == k for o in copies) for c in "ab" for k in ("shift", "jpeg")}
    assert counts == {("a", "shift"): 44, ("a", "jpeg"): 44, ("b", "shift"): 3, ("b", "jpeg"): 3}
    assert len({one.seed for one in copies}) == len(copies)
    assert "94 altered copies of 91 images" in note
    assert add_tolerated(train, held, "", 0) == (train, held, [])
    together = [*train[:2], copies[0], *[Copy(train[0].image, TRAIN, "a", seed=s) for s in range(2)]]
    assert same_image(together) == [0, 1, 0, 3, 4]  # copies of what hardly varies stand for images of their own


def test_an_image_and_its_copies_are_left_out_together() -> None:
    generator = torch.Generator().manual_seed(0)
    own_nF = torch.randn(9, 16, generator=generator)
    noise = 0.05 * torch.randn(9, 16, generator=generator)
    image_n = torch.arange(9).repeat(2)
    unit = F.normalize(torch.cat([own_nF, own_nF + noise]), dim=1)
    bank = unit.half().float()
    found = NearestImages(16).fit(torch.cat([own_nF, own_nF + noise]), 0, image_n)
    for i in range(18):
        others = bank[[j for j in range(18) if j % 9 != i % 9]]
        assert float(found[i]) == pytest.approx(float(1 - (unit[i] @ others.T).topk(5).values.mean()), abs=1e-5)

    values = torch.tensor([1.0, 2.0, 4.0, 7.0, 7.0, 7.0])  # the last one twice copied
    prior = 4.0  # images that stand for the mean of all positions, here 0
    mean, without = values.sum() / (6 + prior), values[:3].sum() / (3 + prior)
    longer = left_out(torch.tensor([6.0]), torch.tensor([3]))
    assert float((7 - mean) * longer) == pytest.approx(float(7 - without))


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="--tolerate 'lite'. Did you mean 'light'"):
        RunConfig.from_dict({"train": {"tolerate": "jpeg,lite"}})


@pytest.mark.slow
def test_what_is_tolerated_is_no_longer_called_bad(tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "good", 24)
    fresh = [picture(number) for number in range(100, 112)]
    defects = [picture(number) for number in range(100, 104)]
    for one in defects:
        one[30:60, 30:60] = (255, 0, 0)
    called = {}
    for tolerate in ("", "jpeg,light"):
        config = run_config("efficientnet-lite0", pretrained=True, size=128, steps=4, depth=1, tolerate=tolerate)
        detector = Detector(config=config).fit(folder)
        assert all(one.is_anomaly for one in detector.predict(defects))
        altered = [packed(one, 60) for one in fresh] + [lit(one, factor) for one in fresh for factor in (0.9, 1.1)]
        called[tolerate] = sum(bool(one.is_anomaly) for one in detector.predict(altered))
    assert called["jpeg,light"] <= 4 < called[""], called
    assert any("48 altered copies of 24 images" in note for note in detector.record_["notes"])
