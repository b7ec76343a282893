"""Good and hostile requests mixed, for a while: the server lives, answers, and does not grow.

For longer: python benchmarks/server.py simulated --only soak --long 1800.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SECONDS = 12.0
GROWTH_MB = 12.0  # allowed between the first and the last quarter, after a tenth of the time
LEFT = 24  # files and threads of an idle server


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The benchmark, whose clients these are."""
    path = Path(__file__).parents[2] / "benchmarks" / "server.py"
    spec = importlib.util.spec_from_file_location("server_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_overload_beside_hostile_clients(bench: ModuleType, tmp_path: Path) -> None:
    image = bench.painted(tmp_path / "a.jpg")
    found = bench.storm(bench.SIMULATED, image, tmp_path, 3.0, 4)
    assert found["alive"]
    assert set(found["status"]) <= {200, 429}
    assert found["scored"] == found["answered"] > 0
    assert found["hostile_requests"] > 10
    assert not [one for one in found["hostile_outcomes"] if one.rpartition(": ")[2] in ("200", "500")]


@pytest.mark.slow
def test_soak(bench: ModuleType, tmp_path: Path) -> None:
    image = bench.painted(tmp_path / "a.jpg").read_bytes()
    with bench.started(bench.SIMULATED, tmp_path, "--max-body-mb", "2") as server:
        found = bench.soak(server, image, SECONDS)
    assert found["alive"]
    said = {line.rpartition(": ")[0]: set() for line in found["outcomes"]}
    for line in found["outcomes"]:
        name, _, outcome = line.rpartition(": ")
        said[name].add(outcome)
    assert set(said) == {name for name, _ in bench.ATTACKS}  # everything was tried
    expected = {
        "good image": "200", "good batch": "200", "no image": "422", "cut image": "422", "bomb": "422",
        "empty": "422", "wrong type": "415", "10,000 files": "413", "too large": "413", "unknown bundle": "404",
        "foreign page": "403", "sql": "400",
    }  # fmt: skip
    assert {name: said[name] for name in expected} == {name: {code} for name, code in expected.items()}
    assert found["rss_mb_last_quarter"] - found["rss_mb_first_quarter"] < GROWTH_MB, found
    assert max(found["files_and_threads"]) < LEFT, found
