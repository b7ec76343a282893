"""What every model must do with every kind of teacher, at any size."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import picture, run_config, same_tensors, train_samples

from twinspect import Detector
from twinspect.config import FAMILIES, TrainConfig
from twinspect.models.contract import AnomalyModel, build_model
from twinspect.training.fit import fit
from twinspect.types import silent

TEACHERS = ["test_vit", "test_vit3", "test_efficientnet", "test_resnet", "test_convnext", "efficientnet-lite0"]
MATRIX = [(model, teacher) for model in FAMILIES for teacher in TEACHERS]
SCORES = ("score_B", "score_local_B", "score_semantic_B")
_made: dict[tuple[str, str], AnomalyModel] = {}


@pytest.fixture(params=MATRIX, ids="-".join)
def model(request: pytest.FixtureRequest, parts: Path) -> AnomalyModel:
    """A model after one step of training, built once for each row of the matrix."""
    return made(*request.param, parts)


def made(name: str, teacher: str, parts: Path) -> AnomalyModel:
    if (name, teacher) not in _made:
        config = run_config(teacher, model=name, steps=1)
        _made[name, teacher] = fit(train_samples(parts), config, None, silent).model
    return _made[name, teacher].eval()


def batch(count: int = 3, height: int = 96, width: int = 96) -> torch.Tensor:
    return torch.from_numpy(np.stack([picture(i, height, width) for i in range(count)])).permute(0, 3, 1, 2)


@torch.no_grad()
def test_shapes_and_finiteness(model: AnomalyModel) -> None:
    out = model(batch())
    assert out.map_B1HW.shape[:2] == (3, 1)
    assert out.map_B1HW.shape[2] == out.map_B1HW.shape[3]
    for name in SCORES:
        assert getattr(out, name).shape == (3,)
    for name, value in out._asdict().items():
        assert torch.isfinite(value.double()).all(), name


@torch.no_grad()
def test_any_image_size(model: AnomalyModel) -> None:
    for height, width in ((97, 131), (40, 200), (model.size, model.size), (30, 30)):
        out = model(batch(1, height, width))
        assert torch.isfinite(out.score_B).all()
        assert out.map_B1HW.shape == (1, 1, model.scorer.map_side, model.scorer.map_side)


@torch.no_grad()
def test_batch_equals_single(model: AnomalyModel) -> None:
    together = model(batch())
    for i in range(3):
        alone = model(batch()[i : i + 1])
        for name in (*SCORES, "map_B1HW"):
            a, b = getattr(together, name)[i : i + 1], getattr(alone, name)
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * (1 + float(b.abs().max())), msg=name)


@torch.no_grad()
def test_repeats_bit_for_bit_and_takes_float_pixels(model: AnomalyModel) -> None:
    first, again, floats = model(batch()), model(batch()), model(batch().float())
    for name in (*SCORES, "map_B1HW"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        torch.testing.assert_close(getattr(first, name), getattr(floats, name), rtol=1e-3, atol=1e-3)


def test_gradients_only_in_the_student(model: AnomalyModel) -> None:
    model.train()
    x = model.teacher.normalise(batch(4, model.size, model.size))
    terms = model.losses(model.observe(x), model.shrink(x), 0, TrainConfig())
    model.zero_grad(set_to_none=True)
    terms["loss"].backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got
    assert all(name.startswith("student.") for name in got)
    for part, _ in model.student.named_children():
        assert any(name.startswith(f"student.{part}.") for name in got)
    assert not any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("student."))
    assert not any(module.training for module in model.teacher.modules())
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("name", "teacher"), MATRIX)
def test_loss_falls_on_one_batch(name: str, teacher: str, parts: Path) -> None:
    torch.manual_seed(0)
    model = made(name, teacher, parts)
    fresh = build_model(run_config(teacher, model=name).model, model.teacher)
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("scorer.")}, strict=False)
    x = fresh.teacher.normalise(batch(4, fresh.size, fresh.size))
    observed, small = fresh.observe(x), fresh.shrink(x)
    optimiser = torch.optim.Adam(fresh.student.parameters(), 2e-3)
    fresh.train()
    losses = []
    for step in range(12):
        terms = fresh.losses(observed, small, step, TrainConfig())
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        losses.append(float(terms["loss"].detach()))
    assert all(math.isfinite(value) for value in losses)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("name", "teacher"), [*MATRIX[:4], *((name, t) for name in list(FAMILIES)[1:] for t in TEACHERS[1:3])]
)
def test_save_and_load_give_identical_outputs(name: str, teacher: str, parts: Path, tmp_path: Path) -> None:
    first = Detector(config=run_config(teacher, model=name, steps=1)).fit(train_samples(parts))
    again = Detector.load(first.save(tmp_path / "m.twin"))
    assert same_tensors(first.fitted.model.state_dict(), again.fitted.model.state_dict())
    with torch.no_grad():
        a, b = first.fitted.model(batch()), again.fitted.model(batch())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
