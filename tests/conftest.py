"""Shared fixtures: a home folder of our own, tiny pictures with exact defects, one small trained detector."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Pictures of 64 pixels gain nothing from threads, which on a busy machine wait for each other: three times slower.
# Before torch is imported, and in the environment, so that processes started by tests compute the same bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hostile import TRIED
from layouts import Plan, write
from tiny import RANDOM, good_folder, run_config, train_samples


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many hostile inputs were tried."""
    if TRIED:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(TRIED.items()))
        terminalreporter.write_line(f"hostile inputs: {sum(TRIED.values()):,} ({kinds})")


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches and fetched weights of the tests never touch the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWINSPECT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A test that runs a model with other threads leaves none of them to the next: sums would end in other bits."""
    import torch

    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes in MVTec layout, 96 px: 12 good training images, 4 good and 6 defect test images each."""
    root = tmp_path_factory.mktemp("data") / "parts"
    write("mvtec-ad", root, Plan(size=96, train=12, good=4, defect=6))
    return root


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory):
    """Trained with the embedded teacher on 32 pictures of cloth: small, but it sees and finds painted defects."""
    from twinspect import Detector

    folder = good_folder(tmp_path_factory.mktemp("data") / "cloth", 32)
    config = run_config("efficientnet-lite0", pretrained=True, size=128, steps=4, depth=1)
    return Detector(config=config).fit(folder)


@pytest.fixture(scope="session")
def bundle(detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`detector`, saved."""
    return detector.save(tmp_path_factory.mktemp("bundle") / "parts.twin")


@pytest.fixture(scope="session")
def documents_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What README, docs and examples speak of; see `documents.made`."""
    from documents import made

    return made(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="session")
def quick(parts):
    """A random-teacher detector for tests where only the plumbing counts (0.2 seconds)."""
    from twinspect import Detector

    return Detector(config=run_config(RANDOM)).fit(train_samples(parts))


@pytest.fixture(scope="session")
def model(quick, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`quick`, saved."""
    return quick.save(tmp_path_factory.mktemp("model") / "tiny.twin")
