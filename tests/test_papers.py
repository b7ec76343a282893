"""Our networks give the numbers of the public code that they follow: see docs/papers.md and benchmarks/parity.py.

The golden files hold what *that* code gave for a small case, in double precision: of every tensor its length and a
few of its values. Weights, images and gradients are drawn alike on both sides. To write them anew, with a checkout of
the code in DIR: ``python benchmarks/parity.py dinomaly --code DIR --golden tests/golden/dinomaly.json``.
"""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from tiny import RANDOM, RANDOM_CNN, picture, run_config, train_samples

from twinspect import Detector
from twinspect.models.layers import published_map
from twinspect.models.teachers import create_teacher

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """The benchmark, which makes our side of the small cases."""
    place = Path(__file__).parents[1] / "benchmarks" / "parity.py"
    spec = importlib.util.spec_from_file_location("parity", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def largest_difference(ours: dict[str, list[float]], theirs: dict[str, list[float]], kind: str) -> float:
    """Of all tensors of a kind, relative to the typical size of the tensor's values."""
    found = 0.0
    for name in (name for name in theirs if name.startswith(kind)):
        scale = max(map(abs, theirs[name][1:])) or 1.0
        found = max(found, abs(ours[name][0] / theirs[name][0] - 1.0))
        found = max(found, *(abs(a - b) / scale for a, b in zip(ours[name][1:], theirs[name][1:], strict=True)))
    return found


def gradient_length(values: dict[str, list[float]]) -> float:
    """Of all weights together."""
    return math.hypot(*(value[0] for name, value in values.items() if name.startswith("gradient")))


@pytest.mark.parametrize("paper", ["dinomaly", "rd4ad"])
def test_the_small_case_gives_their_numbers(paper: str, parity: ModuleType) -> None:
    theirs = json.loads((GOLDEN / f"{paper}.json").read_text(encoding="utf-8"))
    ours = parity.probes(parity.small_case(paper))
    assert ours.keys() == theirs.keys()
    exact = ["prediction", "map", "score", "loss"]
    exact += ["features", "target", "gradient"] if paper == "dinomaly" else ["statistics"]
    for kind in exact:
        assert largest_difference(ours, theirs, kind) < 2e-5, kind
    assert largest_difference(ours, theirs, "update") < parity.UPDATE_LIMIT
    if paper == "rd4ad":  # rounding decides which gradients a ReLU lets pass; together they hardly differ
        assert gradient_length(ours) == pytest.approx(gradient_length(theirs), rel=1e-2)


# ------------------------------------------------------------------------------- what a switch sets to theirs


@pytest.mark.parametrize(("teacher", "model"), [(RANDOM, "dual"), (RANDOM_CNN, "rd")])
def test_published_scoring_goes_the_whole_way(teacher: str, model: str, parts: Path, tmp_path: Path) -> None:
    detector = Detector(config=run_config(teacher, model=model, scoring="published")).fit(train_samples(parts))
    again = Detector.load(detector.save(tmp_path / "b.twin"))
    image = picture(500)
    first, second = detector.predict(image), again.predict(image)
    assert first.score == second.score
    assert first.map.shape == image.shape[:2]
    with torch.no_grad():
        out = detector.fitted.model(torch.from_numpy(image).permute(2, 0, 1)[None])
    side = detector.fitted.model.size  # which RD4AD leaves it at
    assert out.map_B1HW.shape[-1] == (256 if model == "dual" else side)
    assert float(out.readings_BR[0, 0]) <= float(out.map_B1HW.max()) + 1e-6


def test_published_map_of_reverse_distillation_is_scipys() -> None:
    distances = [torch.rand(2, side, side, generator=torch.Generator().manual_seed(side)) for side in (16, 8, 4)]
    map_B1SS, score_B = published_map(distances, 64, "rd4ad")
    raised = [F.interpolate(one[:, None], size=64, mode="bilinear", align_corners=True)[:, 0] for one in distances]
    for summed, found, score in zip(torch.stack(raised).sum(0), map_B1SS[:, 0], score_B, strict=True):
        expected = torch.from_numpy(gaussian_filter(summed.numpy(), sigma=4))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert float(score) == pytest.approx(float(expected.max()), rel=1e-5)


def test_published_map_of_dinomaly_by_hand() -> None:
    """Groups averaged at the input's side, brought to 256, blurred by 5 x 5 with zeros outside, top 1 % averaged."""
    distances = [torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    map_B1SS, score_B = published_map(distances, 56, "dinomaly")
    mean = torch.stack(
        [F.interpolate(one[:, None], size=56, mode="bilinear", align_corners=True) for one in distances]
    )
    wide = F.pad(F.interpolate(mean.mean(0), size=256, mode="bilinear", align_corners=False), (2,) * 4)[0, 0]
    weight = torch.tensor([math.exp(-(x**2) / 32) for x in range(-2, 3)])
    kernel = torch.outer(weight, weight) / weight.sum() ** 2
    for row, column in ((0, 0), (0, 128), (255, 255), (100, 7)):
        expected = float((wide[row : row + 5, column : column + 5] * kernel).sum())
        assert float(map_B1SS[0, 0, row, column]) == pytest.approx(expected, rel=1e-4)
    top = map_B1SS.flatten().sort(descending=True).values[: int(256 * 256 * 0.01)]
    assert float(score_B[0]) == pytest.approx(float(top.mean()), rel=1e-6)


def test_positions_are_resampled_once_for_a_side() -> None:
    teacher = create_teacher("dinov2-small", pretrained=False)
    x = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    before = teacher.features(x).maps[0]
    teacher.resample_positions(56)
    table = teacher.net.pos_embed.clone()
    assert table.shape == (1, 16, 384)
    assert not torch.equal(before, teacher.features(x).maps[0])
    teacher.resample_positions(56)
    assert torch.equal(table, teacher.net.pos_embed)
    assert not teacher.net.pos_embed.requires_grad
    with_class = create_teacher("dinov2-small-noreg", pretrained=False)
    first = with_class.net.pos_embed[:, :1].clone()
    with_class.resample_positions(56)
    assert torch.equal(with_class.net.pos_embed[:, :1], first)  # the class token's position is left alone
    rotary = create_teacher("dinov3-small", pretrained=False)
    rotary.resample_positions(64)
    assert rotary.features(torch.zeros(1, 3, 64, 64)).maps[0].shape[-1] == 4
