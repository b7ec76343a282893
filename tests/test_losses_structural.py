"""Structural terms against slow literal transcriptions with loops; gradients; memory; two processes as one."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twinspect.losses import affinity_distance, channel_loss, inter_affinity_loss, intra_affinity_loss, spatial_loss
from twinspect.models.snl import gather_batch

SHAPES = [(2, 3, 4, 4), (1, 5, 2, 3), (3, 2, 1, 2)]
TERMS: dict[str, Callable[..., Tensor]] = {
    "spatial": spatial_loss,
    "channel": channel_loss,
    "intra": intra_affinity_loss,
    "inter": inter_affinity_loss,
}


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def vectors(features: Tensor) -> list[list[list[float]]]:
    """Image, position, channel."""
    return [[[float(v) for v in row] for row in image.flatten(1).T] for image in features]


def slow_spatial(teacher: Tensor, student: Tensor) -> float:
    values = [
        1 - cosine(a, b)
        for one, other in zip(vectors(teacher), vectors(student), strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return sum(values) / len(values)


def slow_channel(teacher: Tensor, student: Tensor) -> float:
    values = []
    for one, other in zip(teacher, student, strict=True):
        for a, b in zip(one, other, strict=True):
            p = [math.exp(x) for x in a.flatten().tolist()]
            q = [math.exp(x) for x in b.flatten().tolist()]
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            values.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    return sum(values) / len(values)


def slow_intra(teacher: Tensor, student: Tensor) -> float:
    values = []
    for one, other in zip(vectors(teacher), vectors(student), strict=True):
        for i in range(len(one)):
            for j in range(len(one)):
                values.append((cosine(one[i], one[j]) - cosine(other[i], other[j])) ** 2)
    return sum(values) / len(values)


def slow_affinity_map(teacher: Tensor, student: Tensor) -> Tensor:
    """At position u the mean over v of |A_T(u, v) - A_S(u, v)|."""
    out = torch.zeros(len(teacher), *teacher.shape[-2:])
    for b, (one, other) in enumerate(zip(vectors(teacher), vectors(student), strict=True)):
        for u in range(len(one)):
            apart = [abs(cosine(one[u], one[v]) - cosine(other[u], other[v])) for v in range(len(one))]
            out[b].view(-1)[u] = sum(apart) / len(apart)
    return out


def slow_inter(teacher: Tensor, student: Tensor) -> float:
    values, one, other = [], vectors(teacher), vectors(student)
    for position in range(len(one[0])):
        for i in range(len(one)):
            for j in range(len(one)):
                a = cosine(one[i][position], one[j][position])
                values.append((a - cosine(other[i][position], other[j][position])) ** 2)
    return sum(values) / len(values)


@pytest.mark.parametrize("shape", SHAPES)
def test_terms_equal_their_transcriptions(shape: tuple[int, ...]) -> None:
    teacher, student = maps(*shape), maps(*shape, seed=1)
    assert float(spatial_loss(teacher, student)) == pytest.approx(slow_spatial(teacher, student), abs=1e-5)
    assert float(channel_loss(teacher, student)) == pytest.approx(slow_channel(teacher, student), abs=1e-5)
    assert float(intra_affinity_loss(teacher, student)) == pytest.approx(slow_intra(teacher, student), abs=1e-5)
    assert float(inter_affinity_loss(teacher, student)) == pytest.approx(slow_inter(teacher, student), abs=1e-5)
    torch.testing.assert_close(affinity_distance(teacher, student), slow_affinity_map(teacher, student))


def pooled(features: Tensor, side: int) -> Tensor:
    """Means of side x side blocks, by loops."""
    batch, channels, height, _ = features.shape
    step = height // side
    out = torch.zeros(batch, channels, side, side)
    for y in range(side):
        for x in range(side):
            out[:, :, y, x] = features[:, :, y * step : (y + 1) * step, x * step : (x + 1) * step].mean((2, 3))
    return out


def test_affinities_of_large_maps_are_those_of_their_pooled_ones() -> None:
    teacher, student = maps(2, 3, 8, 8), maps(2, 3, 8, 8, seed=1)
    small = pooled(teacher, 4), pooled(student, 4)
    assert float(intra_affinity_loss(teacher, student, side=4)) == pytest.approx(slow_intra(*small), abs=1e-5)
    assert float(inter_affinity_loss(teacher, student, side=4)) == pytest.approx(slow_inter(*small), abs=1e-5)
    torch.testing.assert_close(affinity_distance(teacher, student, side=4), slow_affinity_map(*small))


def test_the_affinity_map_is_highest_where_one_position_relates_to_the_others_in_another_way() -> None:
    teacher = maps(1, 8, 4, 4)
    student = teacher.clone()
    student[0, :, 2, 1] *= -1
    found = affinity_distance(teacher, student)[0]
    assert int(found.argmax()) == 2 * 4 + 1
    assert float(found[2, 1]) > 5 * float(found.flatten().sort().values[-2])
    torch.testing.assert_close(affinity_distance(teacher, 3 * teacher), torch.zeros(1, 4, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", list(TERMS))
def test_gradient_reaches_the_student_only_and_is_the_numerical_one(name: str) -> None:
    teacher, student = maps(2, 3, 2, 2).requires_grad_(), maps(2, 3, 2, 2, seed=1).requires_grad_()
    TERMS[name](teacher, student).backward()
    assert teacher.grad is None
    assert student.grad is not None
    step = 1e-2
    for place in [(0, 0, 0, 0), (1, 2, 1, 0)]:
        moved = []
        for sign in (1, -1):
            other = student.detach().clone()
            other[place] += sign * step
            moved.append(float(TERMS[name](teacher, other)))
        assert float(student.grad[place]) == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=2e-3)


@pytest.mark.parametrize("name", list(TERMS))
def test_a_student_that_agrees_loses_nothing_and_dead_features_stay_finite(name: str) -> None:
    teacher = maps(2, 4, 3, 3)
    assert float(TERMS[name](teacher, teacher)) == pytest.approx(0.0, abs=1e-5)
    dead = torch.zeros(2, 4, 3, 3, requires_grad=True)
    loss = TERMS[name](teacher, dead)
    loss.backward()
    assert torch.isfinite(loss.detach())
    assert dead.grad is not None
    assert torch.isfinite(dead.grad).all()


def test_structure_is_blind_to_what_it_should_be_blind_to() -> None:
    """Affinities ignore a rotation of all features; spatial and flat distances do not."""
    teacher = maps(3, 4, 3, 3)
    turn = torch.linalg.qr(maps(4, 4, seed=2)).Q
    turned = torch.einsum("ij,bjhw->bihw", turn, teacher)
    assert float(intra_affinity_loss(teacher, turned)) == pytest.approx(0.0, abs=1e-6)
    assert float(inter_affinity_loss(teacher, turned)) == pytest.approx(0.0, abs=1e-6)
    assert float(spatial_loss(teacher, turned)) > 0.1
    # Images that all look alike to the student are what inter-affinity objects to.
    same = teacher[:1].expand(3, -1, -1, -1)
    assert float(inter_affinity_loss(teacher, same)) > 0.1
    assert float(inter_affinity_loss(same, same)) == pytest.approx(0.0, abs=1e-6)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize(("side", "most"), [(16, 16**4), (32, 32**4), (64, 64**4)])
def test_a_large_stage_allocates_affinities_of_the_pooled_grid_only(side: int, most: int) -> None:
    """A 64 x 64 stage must not allocate 4096 x 4096 for an image unless asked."""
    teacher, student = maps(1, 2, 64, 64), maps(1, 2, 64, 64, seed=1).requires_grad_()
    with Largest() as seen:
        intra_affinity_loss(teacher, student, side=side).backward()
    assert seen.elements == max(most, teacher.numel())


# ------------------------------------------------------------------------------------------ two processes


def student_of(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), torch.nn.Tanh(), torch.nn.Conv2d(6, 4, 1))


def batch() -> tuple[Tensor, Tensor]:
    return maps(6, 3, 5, 5), maps(6, 4, 5, 5, seed=1)


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        pixels, teacher = (part.chunk(2)[rank] for part in batch())
        student = student_of(0)
        loss = inter_affinity_loss(teacher, student(pixels), gather=gather_batch)
        loss.backward()
        for parameter in student.parameters():  # what data-parallel training does
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
        grads = [parameter.grad for parameter in student.parameters()]
        torch.save((loss.detach(), grads), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_give_the_loss_and_gradient_of_the_doubled_batch(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch is built without torch.distributed")
    mp.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    pixels, teacher = batch()
    student = student_of(0)
    loss = inter_affinity_loss(teacher, student(pixels), gather=gather_batch)  # one process: the part is the batch
    loss.backward()
    alone = inter_affinity_loss(teacher[:3], student(pixels[:3]))
    assert float(alone.detach()) != pytest.approx(float(loss.detach()), rel=1e-2)  # without it the loss is another
    for rank in range(2):
        found, grads = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, loss.detach())
        for parameter, grad in zip(student.parameters(), grads, strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-7)
