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
