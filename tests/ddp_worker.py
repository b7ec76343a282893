"""One process of a run that goes wrong on purpose; started by torchrun from test_distributed.py.

python ddp_worker.py DATA WORK fail|other-data STEP
"""

import sys
from pathlib import Path

from tiny import RANDOM, run_config, train_samples

from twinspect.console import Console
from twinspect.errors import DataError
from twinspect.training.distributed import joined
from twinspect.training.fit import fit
from twinspect.training.source import FeatureSource


def main(data: Path, work: Path, what: str, step: int) -> None:
    """Rank 1 breaks off at a step, or has one image less than rank 0."""
    config = run_config(RANDOM, steps=20, batch=8, easy_ramp=10, checkpoint_every=5)
    samples, steps = train_samples(data), [0]
    if joined().rank == 1 and what == "other-data":
        samples = samples[:-1]
    if joined().rank == 1 and what == "fail":
        read = FeatureSource._prepare

        def breaks(self: FeatureSource, indices: list[int]) -> object:
            steps[0] += len(indices) == 4  # only slices of a step are so long
            if steps[0] > step:
                raise DataError("the disk of rank 1 went away")
            return read(self, indices)

        FeatureSource._prepare = breaks
    fit(samples, config, work)


if __name__ == "__main__":
    with Console():
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
