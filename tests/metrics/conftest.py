import numpy as np
import pytest

SHAPE = (13, 17)


def masks(rng, count):
    """Good images, one pixel, two blobs touching at a corner, a ring, noise, and one nearly full."""
    out = [np.zeros(SHAPE, bool) for _ in range(count)]
    out[1][4, 5] = True
    out[2][1:4, 1:4] = out[2][4:7, 4:6] = True
    out[3][2:9, 3:12] = True
    out[3][4:7, 5:10] = False
    out[4] = rng.random(SHAPE) < 0.1
    out[5][1:, :] = True
    return out


def score_maps(name, rng, count):
    shape = (count, *SHAPE)
    makers = {
        "continuous": lambda: rng.normal(size=shape),
        "all equal": lambda: np.full(shape, -3.5),
        "two values": lambda: rng.integers(0, 2, shape),
        "tiny to huge": lambda: 10.0 ** rng.uniform(-30, 30, shape) * rng.choice([-1, 1], shape),
        "negative": lambda: -np.exp(rng.normal(size=shape)),
        "tiny differences": lambda: 1 + 2.0**-23 * rng.integers(0, 400, shape),
        "heavy ties": lambda: rng.integers(0, 9, shape) / 8,
        "integers": lambda: rng.integers(-1000, 1000, shape),
        "denormal": lambda: 1e-44 * rng.integers(-5, 6, shape),
        "zero heap": lambda: np.maximum(rng.normal(size=shape), 0) * -1.0,
    }
    return list(makers[name]().astype(np.float32))


NAMES = (
    "continuous",
    "all equal",
    "two values",
    "tiny to huge",
    "negative",
    "tiny differences",
    "heavy ties",
    "integers",
    "denormal",
    "zero heap",
)


@pytest.fixture(params=NAMES)
def scored(request):
    """Adversarial maps and their masks."""
    rng = np.random.default_rng(NAMES.index(request.param))
    return score_maps(request.param, rng, 8), masks(rng, 8)
