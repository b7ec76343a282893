"""Every loss against a slow literal transcription with loops; gradients; the edge cases."""

import math

import pytest
import torch

from twinspect.losses import (
    easy_limit,
    easy_share,
    encoder_decoder_loss,
    encoder_encoder_loss,
    flat_cosine_distance,
    noisy_or_loss,
    position_cosine_distance,
    soften_easy,
)
from twinspect.models.layers import to_tokens

SHAPES = [(2, 3, 4, 4), (1, 5, 2, 3), (3, 1, 1, 2)]


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    """The same maps as B x N x D."""
    return to_tokens(maps(*shape, seed=seed))


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def slow_flat(teacher: torch.Tensor, student: torch.Tensor) -> list[float]:
    """1 - cos(vec F_T, vec F_S), one image after the other."""
    values = []
    for image in range(teacher.shape[0]):
        a, b = [], []
        for c in range(teacher.shape[1]):
            for y in range(teacher.shape[2]):
                for x in range(teacher.shape[3]):
                    a.append(float(teacher[image, c, y, x]))
                    b.append(float(student[image, c, y, x]))
        values.append(1 - cosine(a, b))
    return values


def slow_positions(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = teacher.shape
    out = torch.zeros(batch, height, width)
    for i in range(batch):
        for y in range(height):
            for x in range(width):
                a = [float(teacher[i, c, y, x]) for c in range(channels)]
                b = [float(student[i, c, y, x]) for c in range(channels)]
                out[i, y, x] = 1 - cosine(a, b)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_equal_their_transcription(shape: tuple[int, ...]) -> None:
    teacher, student = maps(*shape), maps(*shape, seed=1)
    assert flat_cosine_distance(teacher, student).tolist() == pytest.approx(slow_flat(teacher, student), abs=1e-6)
    torch.testing.assert_close(
        position_cosine_distance(teacher, student), slow_positions(teacher, student), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("distance", [flat_cosine_distance, position_cosine_distance])
def test_distances_are_symmetric_and_zero_at_equality(distance) -> None:
    teacher, student = maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(distance(teacher, student), distance(student, teacher))
    assert distance(teacher, teacher).abs().max() < 1e-6
    assert distance(teacher, 7 * teacher).abs().max() < 1e-6  # length does not count
    assert (distance(teacher, -teacher) - 2).abs().max() < 1e-6


def test_group_losses_are_means_of_their_terms() -> None:
    teacher = [maps(2, 3, 4, 4), maps(2, 6, 2, 2, seed=1)]
    student = [maps(2, 3, 4, 4, seed=2), maps(2, 6, 2, 2, seed=3)]
    first, second = (slow_flat(t, s) for t, s in zip(teacher, student, strict=True))
    slow = [(first[0] + second[0]) / 2, (first[1] + second[1]) / 2]
    found = encoder_decoder_loss([to_tokens(t) for t in teacher], [to_tokens(s) for s in student])
    assert found.tolist() == pytest.approx(slow, abs=1e-6)
    tokens = [maps(2, 5), maps(2, 8, seed=1), maps(2, 5, seed=4)]
    guesses = [maps(2, 5, seed=5), maps(2, 8, seed=6), maps(2, 5, seed=7)]
    slow = [
        sum(1 - cosine(t[i].tolist(), s[i].tolist()) for t, s in zip(tokens, guesses, strict=True)) / 3
        for i in range(2)
    ]
    assert encoder_encoder_loss(tokens, guesses).tolist() == pytest.approx(slow, abs=1e-6)
    same = [to_tokens(t) for t in teacher]
    assert encoder_decoder_loss(same, same).abs().max() < 1e-6
    assert encoder_encoder_loss(tokens, tokens).abs().max() < 1e-6


def test_another_number_of_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        encoder_decoder_loss([rows(1, 2, 2, 2)], [rows(1, 2, 2, 2)] * 2)
    with pytest.raises(ValueError, match="shorter|longer"):
        encoder_encoder_loss([maps(1, 2)] * 2, [maps(1, 2)])


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_gradient_reaches_the_student_only(share: float) -> None:
    teacher, student = rows(2, 3, 4, 4).requires_grad_(), rows(2, 3, 4, 4, seed=1).requires_grad_()
    encoder_decoder_loss([teacher], [student], share).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    token, guess = maps(2, 5).requires_grad_(), maps(2, 5, seed=1).requires_grad_()
    encoder_encoder_loss([token], [guess]).sum().backward()
    assert token.grad is None
    assert guess.grad is not None
    assert guess.grad.abs().sum() > 0


def test_hard_mining_keeps_values_and_shrinks_gradients_of_easy_positions() -> None:
    cosine_BN, sums = maps(2, 36), [maps(2, 36, seed=seed).requires_grad_() for seed in (1, 2)]
    share, factor = 0.6, 0.1
    hard = cosine_BN.flatten().sort().values[: int(72 * (1 - share))]  # 28 of 72 positions
    easy = cosine_BN > hard[-1]
    assert int(easy.sum()) == 44
    softened = soften_easy(cosine_BN, sums, share)
    for one, own in zip(softened, sums, strict=True):
        torch.testing.assert_close(one, own)
        one.sum().backward()  # the gradient of every element is then its factor
        torch.testing.assert_close(own.grad, torch.where(easy, factor, 1.0))
    assert soften_easy(cosine_BN, sums, 0.0) == sums


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_hard_mining_scales_the_loss_gradient_too(share: float) -> None:
    teacher = rows(2, 8, 4, 4)
    plain = (teacher + 0.5 * rows(2, 8, 4, 4, seed=1)).requires_grad_()
    mined = plain.detach().clone().requires_grad_()
    first = flat_cosine_distance(teacher, plain)
    second = encoder_decoder_loss([teacher], [mined], share)
    torch.testing.assert_close(first, second)
    weight = torch.tensor([1.0, 3.0])
    (weight * first).sum().backward()
    (weight * second).sum().backward()
    assert plain.grad is not None
    distance = position_cosine_distance(teacher.transpose(1, 2)[..., None], plain.detach().transpose(1, 2)[..., None])
    easy = distance[..., 0] < easy_limit(distance, share)
    assert easy.float().mean() == share
    torch.testing.assert_close(mined.grad, plain.grad * torch.where(easy, 0.1, 1.0)[..., None])


@pytest.mark.parametrize(("count", "share", "hard"), [(72, 0.6, 28), (100, 0.9, 9), (100, 0.5, 50), (5, 0.9, 1)])
def test_easy_limit_is_the_smallest_distance_of_the_hard_positions(count: int, share: float, hard: int) -> None:
    """Dinomaly rounds their number down, in floating point: 9 of 100 at 0.9."""
    distance = torch.randperm(count, generator=torch.Generator().manual_seed(0)).float()
    assert int((distance >= easy_limit(distance, share)).sum()) == hard


def test_easy_share_rises_linearly_then_stays() -> None:
    assert easy_share(0, 1000) == 0.0
    assert easy_share(500, 1000) == pytest.approx(0.45)
    assert easy_share(1000, 1000) == easy_share(9999, 1000) == pytest.approx(0.9)
    assert easy_share(3, 0) == pytest.approx(0.9)


@pytest.mark.parametrize("reading", ["n1", "n2", "n3"])
def test_noisy_or_readings_equal_their_formulas(reading: str) -> None:
    local, semantic = torch.rand(7), torch.rand(7) * 1.9
    slow = []
    for a, b in zip(local.tolist(), semantic.tolist(), strict=True):
        if reading == "n3":
            slow.append(a + b)
            continue
        joint = 1 - (1 - a / 2) * (1 - b / 2)
        slow.append(joint if reading == "n1" else -math.log(1 - joint))
    assert noisy_or_loss(local, semantic, reading).item() == pytest.approx(sum(slow) / len(slow), rel=1e-5)
    zero = torch.zeros(3)
    assert noisy_or_loss(zero, zero, reading).item() == 0.0
    assert noisy_or_loss(local, semantic, reading).item() == pytest.approx(
        noisy_or_loss(semantic, local, reading).item(), rel=1e-6
    )


@pytest.mark.parametrize("reading", ["n1", "n2", "n3"])
def test_noisy_or_starts_with_gradients_and_survives_the_extremes(reading: str) -> None:
    local, semantic = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)  # orthogonal at the start
    noisy_or_loss(local, semantic, reading).backward()
    assert local.grad is not None
    assert semantic.grad is not None
    assert local.grad.min() > 0
    assert semantic.grad.min() > 0
    far = torch.full((2,), 2.0)  # students that point the other way
    assert math.isfinite(noisy_or_loss(far, far, reading).item())
