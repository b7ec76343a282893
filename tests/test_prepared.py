"""A model made ready to predict says what the trained one says, and leaves it as it was."""

import copy

import numpy as np
import torch
from tiny import RANDOM, RANDOM_CNN, picture, run_config, same_tensors

from twinspect import Detector
from twinspect.models.contract import AnomalyModel, Outputs, build_model
from twinspect.models.fold import prepared


def assert_same(model: AnomalyModel, image: torch.Tensor, tolerance: float) -> None:
    with torch.no_grad():
        for name, expected, found in zip(Outputs._fields, model(image), prepared(model)(image), strict=True):
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_a_trained_model_says_the_same(detector: Detector) -> None:
    model = copy.deepcopy(detector.fitted.model)
    model.scorer.weight_R.fill_(1.0)  # its students learnt too little to be asked
    size = model.size
    image = torch.from_numpy(np.stack([picture(i, size, size) for i in range(5)])).permute(0, 3, 1, 2).clone()
    image[0, :, 20:30, 20:30] = 255
    assert_same(model, image, 1e-4)


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


def test_a_vit_without_batch_norms_is_not_copied() -> None:
    model = build_model(run_config(RANDOM).model).eval()
    assert prepared(model) is model
