"""A model made ready to predict says what the trained one says, and leaves it as it was."""

import numpy as np
import pytest
import torch
from tiny import RANDOM, RANDOM_CNN, picture, run_config, same_tensors

from twinspect import Detector
from twinspect.models.contract import AnomalyModel, Outputs
from twinspect.models.prepared import MergedMap, prepared
from twinspect.models.statistics import ResidualMap
from twinspect.training.fit import build_model


def assert_same(model: AnomalyModel, image: torch.Tensor, tolerance: float) -> None:
    with torch.no_grad():
        for name, expected, found in zip(Outputs._fields, model(image), prepared(model)(image), strict=True):
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_a_trained_model_says_the_same(detector: Detector) -> None:
    model = detector.fitted.model
    size = model.shape.size
    image = torch.from_numpy(np.stack([picture(i, size, size) for i in range(5)])).permute(0, 3, 1, 2).clone()
    image[0, :, 20:30, 20:30] = 255
    # The means of positions are fp16; they are rounded once more where the prototype's mean joins them.
    assert_same(model, image, 2e-3)


def test_an_untrained_one_says_the_same_and_stays_trainable() -> None:
    model = build_model(run_config(RANDOM_CNN).model).eval()
    torch.manual_seed(1)
    for module in model.student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    ready = prepared(model)
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in one.student.modules()) for one in (model, ready)]
    assert norms[1] < norms[0] / 2
    assert_same(model, torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8), 1e-5)
    assert ready.teacher is model.teacher
    assert same_tensors(kept, model.state_dict())
    assert all(parameter.requires_grad for parameter in model.student.parameters())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("most_dims", [512, 5])
def test_heads_gains_and_scales_merge_into_the_whitening(count: int, most_dims: int) -> None:
    """Also for groups so wide that they are rotated to fewer directions first."""
    from twinspect.models.layers import BlockHead

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    own, head = ResidualMap(8, 4, (1, 3), 2, most_dims=most_dims), BlockHead(6, 8, 2)
    width = own.dims
    own.mean_KD, own.away_KND = drawn(count, width), drawn(count, 16, width).half()
    own.whiten_KDD, own.level_KWhw = drawn(count, width, width).tril(), drawn(count, 2, 4, 4)
    own.spread_KWhw = drawn(count, 2, 4, 4).abs() + 0.5
    gain, mean, scale = drawn(8), drawn(8), drawn(8).abs() + 0.5
    rows, x, owner = drawn(5, 16, 8), drawn(5, 4, 6), torch.arange(5) % count
    with torch.no_grad():
        expected = own((rows - mean) / scale - gain * head(x), owner)
        ready = MergedMap(own, head, gain, mean, scale)
        found = ready(rows, torch.nn.functional.pad(x, (0, 1), value=1.0), owner)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


def test_a_vit_without_batch_norms_is_not_copied() -> None:
    model = build_model(run_config(RANDOM).model).eval()
    assert prepared(model) is model
