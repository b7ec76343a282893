"""Loss terms as pure functions. Every one has a slow literal transcription in tests/test_losses.py.

Shapes: B images, D channels, h w grid positions, N = h * w, P pooled positions, G groups, L levels. The
teacher side carries no gradient: callers pass tensors from a frozen teacher, and the functions detach them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

_EPS = 1e-8


def flat_cosine_distance(teacher_BDhw: Tensor, student_BDhw: Tensor) -> Tensor:
    """1 - cos(vec F_T, vec F_S), one value per image over all positions and channels (B).

    Source: the Encoder-Decoder loss of arXiv 2509.24448, one layer group.
    """
    vectors = teacher_BDhw.detach().flatten(1).float(), student_BDhw.flatten(1).float()
    # `F.cosine_similarity` copies both, which are the largest tensors of a step.
    lengths = [torch.linalg.vector_norm(vector, dim=1).clamp_min(_EPS) for vector in vectors]
    distance_B: Tensor = 1.0 - (vectors[0] * vectors[1]).sum(1) / lengths[0] / lengths[1]
    return distance_B


def position_cosine_distance(teacher_BDhw: Tensor, student_BDhw: Tensor) -> Tensor:
    """1 - cos over channels at every position: B x h x w."""
    return 1.0 - F.cosine_similarity(teacher_BDhw.detach().float(), student_BDhw.float(), dim=1, eps=_EPS)


def easy_share(step: int, ramp_steps: int) -> float:
    """Share of positions treated as easy at a step: linear from 0 to 0.9 (Dinomaly)."""
    return 0.9 * min(1.0, step / max(1, ramp_steps))


def soften_easy(cosine_BN: Tensor, sums: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return sums per position (B x N each) with the gradient of the easiest positions scaled by f = 0.1.

    Easy are the ``share`` positions of the batch nearest to the teacher: all below `easy_limit`. Values do not
    change, only gradients: x -> f * x + (1 - f) * stopgrad(x). Whatever a loss takes from a position passes
    through its sums, so that scaling their gradients scales that of its features, which are far larger. Source:
    Dinomaly's loose loss.
    """
    if share <= 0.0:
        return list(sums)
    with torch.no_grad():
        distance_BN = 1.0 - cosine_BN
        keep = torch.where(distance_BN < easy_limit(distance_BN, share), 0.1, 1.0)
    return [keep * sum_BN + ((1.0 - keep) * sum_BN).detach() for sum_BN in sums]


def easy_limit(distance_BN: Tensor, share: float) -> Tensor:
    """The smallest distance of the hard positions of a batch, which are int(count * (1 - share)) (Dinomaly).

    Like torch's own functions it can be replaced by a `TorchFunctionMode`.
    """
    if has_torch_function_unary(distance_BN):
        return handle_torch_function(easy_limit, (distance_BN,), distance_BN, share)
    count = distance_BN.numel()
    hard = max(1, int(count * (1 - share)))
    return torch.kthvalue(distance_BN.flatten(), count - hard + 1).values


def encoder_decoder_loss(
    teacher_groups: Sequence[Tensor], student_groups: Sequence[Tensor], share_easy: float = 0.0
) -> Tensor:
    """L_ED per image (B): mean over groups (B x N x D each) of 1 - cos of the flattened group features.

    Source: arXiv 2509.24448; hard mining as in Dinomaly (``share_easy`` of positions get small gradients).
    """
    terms = [
        _mined_distance(t.detach().float(), s.float(), share_easy)
        for t, s in zip(teacher_groups, student_groups, strict=True)
    ]
    return torch.stack(terms).mean(0)


def _mined_distance(teacher_BND: Tensor, student_BND: Tensor, share_easy: float) -> Tensor:
    """`flat_cosine_distance` from sums over channels, which hard mining needs as well."""
    shared_BN = (teacher_BND * student_BND).sum(2)
    length_BN = torch.linalg.vector_norm(student_BND, dim=2)
    own_BN = torch.linalg.vector_norm(teacher_BND, dim=2)
    with torch.no_grad():
        cosine_BN = shared_BN / own_BN.clamp_min(_EPS) / length_BN.clamp_min(_EPS)
    shared_BN, length_BN = soften_easy(cosine_BN, (shared_BN, length_BN), share_easy)
    lengths = [torch.linalg.vector_norm(length, dim=1).clamp_min(_EPS) for length in (own_BN, length_BN)]
    distance_B: Tensor = 1.0 - shared_BN.sum(1) / lengths[0] / lengths[1]
    return distance_B


def encoder_encoder_loss(teacher_tokens: Sequence[Tensor], student_tokens: Sequence[Tensor]) -> Tensor:
    """L_EE per image (B): mean over levels of 1 - cos between class tokens (B x D_l each).

    Source: our reading of arXiv 2509.24448 (sparse supervision by class tokens only).
    """
    terms = [
        1.0 - F.cosine_similarity(t.detach().float(), s.float(), dim=1, eps=_EPS)
        for t, s in zip(teacher_tokens, student_tokens, strict=True)
    ]
    return torch.stack(terms).mean(0)


def noisy_or_loss(local_B: Tensor, semantic_B: Tensor, reading: str) -> Tensor:
    """Joint objective of two per-image distances in [0, 2] (scalar), on normal images P -> 0.

    Readings of "Noisy-OR objective" (arXiv 2509.24448), P = 1 - (1 - p_ED)(1 - p_EE):
        n1: minimise P with p = L / 2 (with p = L both gradients vanish where both distances are 1).
        n2: minimise -log(1 - p_ED) - log(1 - p_EE) with p = L / 2.
        n3: p = 1 - exp(-s), which turns n2 into the plain sum of the distances.
    """
    if reading == "n3":
        return (local_B + semantic_B).mean()
    p_local, p_semantic = (local_B / 2).clamp(0.0, 1.0 - 1e-6), (semantic_B / 2).clamp(0.0, 1.0 - 1e-6)
    if reading == "n1":
        return (1.0 - (1.0 - p_local) * (1.0 - p_semantic)).mean()
    return -(torch.log1p(-p_local) + torch.log1p(-p_semantic)).mean()


# ------------------------------------------------------- structural terms (arXiv 2402.17091, our reading)


def spatial_loss(teacher_BDhw: Tensor, student_BDhw: Tensor) -> Tensor:
    """1 - cos over channels, mean over positions and images (scalar).

    Differs from `flat_cosine_distance` in that every position counts the same, however short its features are.
    """
    return position_cosine_distance(teacher_BDhw, student_BDhw).mean()


def channel_loss(teacher_BDhw: Tensor, student_BDhw: Tensor) -> Tensor:
    """Where in the image a channel answers, compared channel by channel (scalar, mean over channels and images).

    KL(teacher || student) of their softmaxes over positions.
    """
    log_t, log_s = (F.log_softmax(x.flatten(2).float(), dim=2) for x in (teacher_BDhw.detach(), student_BDhw))
    return (log_t.exp() * (log_t - log_s)).sum(2).mean()


def intra_affinity_loss(teacher_BDhw: Tensor, student_BDhw: Tensor, side: int = 16) -> Tensor:
    """How alike any two positions of one image are, compared between teacher and student (scalar).

    Affinity of two positions: cosine of their features. Mean over images of the mean squared difference of both
    N x N matrices. Maps are first pooled to at most ``side`` x ``side``, because memory is B x N^2.
    """
    return _affinity_difference(teacher_BDhw, student_BDhw, side).square().mean()


def affinity_distance(teacher_BDhw: Tensor, student_BDhw: Tensor, side: int = 16) -> Tensor:
    """How differently a position relates to the others of its image, in the student and in the teacher.

    The map at position u is the mean over v of |A_T(u, v) - A_S(u, v)|, A as in `intra_affinity_loss`: B x h x w of
    the pooled grid.
    """
    difference_BP = _affinity_difference(teacher_BDhw, student_BDhw, side).abs().mean(2)
    return difference_BP.reshape(-1, *_pooled(teacher_BDhw, side))


def _affinity_difference(teacher_BDhw: Tensor, student_BDhw: Tensor, side: int) -> Tensor:
    t_BPD, s_BPD = (_unit_positions(x, side) for x in (teacher_BDhw.detach(), student_BDhw))
    return t_BPD @ t_BPD.transpose(1, 2) - s_BPD @ s_BPD.transpose(1, 2)


def inter_affinity_loss(
    teacher_BDhw: Tensor,
    student_BDhw: Tensor,
    side: int = 4,
    gather: Callable[[Tensor], Tensor] = lambda part_B: part_B,
) -> Tensor:
    """How alike any two images of the batch are at a position, compared between teacher and student (scalar).

    Mean over positions, pooled to at most ``side`` x ``side``, of the mean squared difference of both B x B
    matrices of cosines. Only a batch that mixes classes says how classes relate. With ``gather``
    (`twinspect.models.snl.gather_batch`) the batch is joined over all processes.
    """
    t_PBD, s_PBD = (gather(_unit_positions(x, side)).transpose(0, 1) for x in (teacher_BDhw.detach(), student_BDhw))
    return (t_PBD @ t_PBD.transpose(1, 2) - s_PBD @ s_PBD.transpose(1, 2)).square().mean()


def _unit_positions(map_BDhw: Tensor, side: int) -> Tensor:
    """Unit feature vectors of a map pooled to at most side x side: B x P x D."""
    pooled = F.adaptive_avg_pool2d(map_BDhw.float(), _pooled(map_BDhw, side))
    return F.normalize(pooled.flatten(2).transpose(1, 2), dim=2, eps=_EPS)


def _pooled(map_BDhw: Tensor, side: int) -> tuple[int, int]:
    height, width = map_BDhw.shape[-2:]
    return min(side, height), min(side, width)
