"""The same numbers again: loss curves of every family, on one thread and on several, against stored ones.

After a deliberate change of the training type: python tests/test_reproducible.py > tests/golden/curves.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import RANDOM_CNN, picture, run_config

from twinspect import Detector
from twinspect.config import FAMILIES
from twinspect.training.resume import LOG

GOLDEN = Path(__file__).parent / "golden" / "curves.json"
STEPS, PIXELS = 8, 64
# Relative. Other threads, machines and versions add in another order, which moves the seventh
# digit. Students with batch statistics, here over maps of 2 x 2, make a hundredth of it in eight steps.
CLOSE, LOOSE = 1e-3, 5e-2
WITH_BATCH_STATISTICS = ("snl", "rd")


def curves(family: str, work: Path) -> dict[str, list[float]]:
    """Loss of every step on painted pictures, and scores of two good ones and of the same with a dark square."""
    config = run_config(
        RANDOM_CNN, model=family, size=PIXELS, steps=STEPS, batch=8, depth=1, cache_gb=0.0, checkpoint_every=STEPS
    )
    detector = Detector(config=config)
    torch.manual_seed(0)
    detector.fit([picture(number) for number in range(24)], work=work, quiet=True)
    good = [picture(900 + number) for number in range(2)]
    bad = [np.where(np.add.outer(np.arange(96), np.arange(96))[..., None] < 50, 20, one) for one in good]
    results = detector.predict([*good, *(one.astype(np.uint8) for one in bad)])
    lines = [json.loads(line) for line in (work / LOG).read_text().splitlines()]
    return {"loss": [line["loss"] for line in lines], "score": [one.score for one in results]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threads", [1, 3])
def test_curves_are_the_stored_ones(family: str, threads: int, tmp_path: Path) -> None:
    torch.set_num_threads(threads)
    found = curves(family, tmp_path)
    assert found["loss"][-1] < found["loss"][0]
    assert len(found["loss"]) == STEPS
    close = LOOSE if family in WITH_BATCH_STATISTICS else CLOSE
    assert found["loss"] == pytest.approx(json.loads(GOLDEN.read_text())[family], rel=close)
    assert max(found["score"][:2]) < min(found["score"][2:])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        json.dump({name: curves(name, Path(place) / name)["loss"] for name in FAMILIES}, sys.stdout, indent=1)
        sys.stdout.write("\n")
