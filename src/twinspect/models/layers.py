"""Small blocks shared by the students and the scorer: layers, maps of another size, scores of maps.

Shapes: B images, N tokens, D width, h w grid, H heads, G bundles of heads, C channels of a bundle, S input side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

_BUNDLE = 128  # channels up to which heads share a matrix product


class TokenLinear(nn.Linear):
    """A linear layer on B x N x D tokens, as one product of a matrix of all of them (exports fuse its bias then)."""

    def forward(self, x_BND: Tensor) -> Tensor:
        """B x N x D to B x N x D_out."""
        return _on_tokens(x_BND, self.weight, self.bias)


class LinearAttention(nn.Module):
    """Softmax-free multi-head attention, feature map elu + 1 (Katharopoulos et al., 2020).

    It cannot focus on single tokens, which keeps a decoder from copying anomalies through (Dinomaly,
    CVPR 2025). Cost is linear in N: keys and values are summed before queries see them.

    Narrow heads go in bundles, as block-diagonal matrices: tokens need not be sorted by head, and one product of
    useful size replaces several small ones that take longer together.
    """

    same_head_CC: Tensor
    own_head_CH: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = TokenLinear(width, width)
        size = width // heads
        fitting = [g for g in range(1, heads) if heads % g == 0 and width // g <= _BUNDLE]
        self.bundles = min(fitting, default=heads)
        own_head_CH = torch.eye(heads // self.bundles, dtype=torch.bool).repeat_interleave(size, 0)
        self.register_buffer("own_head_CH", own_head_CH, persistent=False)
        self.register_buffer("same_head_CC", own_head_CH.repeat_interleave(size, 1), persistent=False)

    def forward(self, x_BND: Tensor) -> Tensor:
        """B x N x D to B x N x D."""
        _, count, width = x_BND.shape
        parts = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        q, k, v = (_on_tokens(x_BND, weight, bias) for weight, bias in parts)
        # In bf16 too, sums over N are added up in fp32: by the products themselves, and by autocast's sum.
        q, k, v = (self._bundled(part) for part in (F.elu(q) + 1, F.elu(k) + 1, v))
        context = torch.where(self.same_head_CC, k.transpose(-1, -2) @ v, 0.0)
        total = torch.where(self.own_head_CH, k.sum(-2)[..., None], 0.0)
        norm = (q @ total).clamp_min(1e-6)[..., None]
        mixed = (q @ context).reshape(-1, self.bundles, count, norm.shape[-2], width // self.heads) / norm
        return cast(Tensor, self.out(mixed.flatten(3).transpose(1, 2).reshape(-1, count, width)))

    def _bundled(self, x_BND: Tensor) -> Tensor:
        """B x N x D to B x G x N x C."""
        _, count, width = x_BND.shape
        return x_BND.reshape(-1, count, self.bundles, width // self.bundles).transpose(1, 2)


class DecoderBlock(nn.Module):
    """Pre-norm transformer block with linear attention."""

    def __init__(self, width: int, heads: int, ratio: float = 4.0, eps: float = 1e-5) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.norm_1, self.norm_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = LinearAttention(width, heads)
        self.mlp = nn.Sequential(TokenLinear(width, hidden), nn.GELU(), TokenLinear(hidden, width))

    def forward(self, x_BND: Tensor) -> Tensor:
        """B x N x D to B x N x D."""
        x_BND = x_BND + self.attention(self.norm_1(x_BND))
        return cast(Tensor, x_BND + self.mlp(self.norm_2(x_BND)))


def start_small(module: nn.Module) -> None:
    """Dinomaly's start: weights of linear layers from a normal of 0.01 cut at three times that, biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.03, b=0.03)
            nn.init.zeros_(layer.bias)


class Noise(nn.Module):
    """Dropout whose random numbers are bytes: torch draws a number for every value, which takes most of a CPU's step.

    The chance ``p`` that a value becomes 0 is a whole number of 1/256.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return noise(x, self.p) if self.training and _of_256(self.p) else x


def noise(x: Tensor, p: float, rank: int = 0, world: int = 1) -> Tensor:
    """Values with 0 by chance, the rest grown; of several slices of a batch each is that of the whole batch's noise.

    Like torch's own functions it can be replaced by a `TorchFunctionMode`.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(noise, (x,), x, p)
    count, first = world * x.numel(), rank * len(x)
    drawn = torch.empty(-(-count // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    mask = (drawn.view(torch.uint8)[:count] < _of_256(p)).view(world * len(x), *x.shape[1:])
    return torch.where(mask[first : first + len(x)], 0.0, x).mul_(256.0 / (256 - _of_256(p)))


def _of_256(p: float) -> int:
    """The chance in steps of a byte; something always gets through."""
    return min(255, round(256 * p))


class AllSum(torch.autograd.Function):
    """Sum over the processes of a group; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        """Sum of every process's values."""
        ctx.group = group
        total: Tensor = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Sum of every process's gradient."""
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class NoisyBottleneck(nn.Module):
    """MLP D_in -> ratio D -> D whose dropout is the noise that makes reconstruction a denoising task (Dinomaly)."""

    def __init__(self, width_in: int, width: int, dropout: float, ratio: float) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.net = nn.Sequential(
            Noise(dropout), TokenLinear(width_in, hidden), nn.GELU(), Noise(dropout),
            TokenLinear(hidden, width), Noise(dropout),
        )  # fmt: skip

    def forward(self, x_BND: Tensor) -> Tensor:
        """B x N x D_in to B x N x D."""
        return cast(Tensor, self.net(x_BND))


def _on_tokens(x_BND: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = F.linear(x_BND.flatten(0, 1), weight, bias)
    return rows.reshape(-1, x_BND.shape[1], rows.shape[1])


def standardise(map_BDhw: Tensor, mean_D: Tensor, scale_D: Tensor) -> Tensor:
    """(map - mean) / scale of every channel, in one pass over the map: a batch norm that learns nothing."""
    nothing = 1e-30  # torch 2.11 refuses 0; beside a square of a scale this is lost in rounding
    return F.batch_norm(map_BDhw, mean_D, scale_D.square(), eps=nothing)


def pool(map_BDhw: Tensor, factor: int, lying: int = 1) -> Tensor:
    """Means of blocks of factor x factor positions.

    Torch pools four times as fast as it takes means. ONNX Runtime is slow at pooling maps whose channels lie last, or
    are few, and at means over two axes at once: exports take means over one axis after the other. ``lying`` is the
    axis of the channels in memory, 1 or 3.
    """
    if not torch.compiler.is_exporting():
        return F.avg_pool2d(map_BDhw, factor)
    grid = map_BDhw.movedim(1, lying)
    for axis in {1: (2, 3), 3: (1, 2)}[lying]:
        before, behind = grid.shape[1:axis], grid.shape[axis + 1 :]
        grid = grid.reshape(-1, *before, grid.shape[axis] // factor, factor, *behind).mean(axis + 1)
    return grid.movedim(lying, 1)


class Shrink(nn.Module):
    """Images smaller by a whole factor, each pixel a mean weighted by a triangle twice as wide as the factor.

    Means of blocks alone let fine texture through as noise, which a teacher sees: with them the tokens of woven glass
    fibre told defects apart with an AUROC of 0.82 instead of 0.96.
    """

    kernel_t: Tensor

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor, self.rim = factor, factor // 2
        at_t = torch.arange(-self.rim, factor + self.rim) + 0.5 - factor / 2
        weight_t = 1.0 - at_t.abs() / factor
        self.register_buffer("kernel_t", weight_t / weight_t.sum(), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """B x C x H x W to B x C x H/factor x W/factor."""
        if self.factor == 1:
            return x_BCHW
        channels, f = x_BCHW.shape[1], self.factor
        padded = F.pad(x_BCHW, (self.rim,) * 4, mode="replicate")
        row = self.kernel_t.to(x_BCHW.dtype).expand(channels, 1, 1, -1)
        lines = F.conv2d(padded, row, stride=(1, f), groups=channels)
        return F.conv2d(lines, row.transpose(2, 3), stride=(f, 1), groups=channels)


class Resample(nn.Module):
    """Brings square maps of one side to another: mean pooling downwards by whole factors, else bilinear.

    Bilinear weights are a matrix a side, and channels lie last in memory, where rows need them.
    """

    weight_oi: Tensor

    def __init__(self, here: int, side: int) -> None:
        super().__init__()
        self.factor = here // side if here % side == 0 else 0
        weight_oi = torch.zeros(0)
        if not self.factor:
            line = torch.eye(here)[None]
            weight_oi = F.interpolate(line, size=side, mode="linear", align_corners=False)[0].T.contiguous()
        self.register_buffer("weight_oi", weight_oi, persistent=False)

    def forward(self, map_BDhw: Tensor) -> Tensor:
        """B x D x h x h to B x D x side x side."""
        if self.factor:
            return pool(map_BDhw, self.factor, lying=3) if self.factor > 1 else map_BDhw
        with torch.autocast(map_BDhw.device.type, enabled=False):  # features are what is compared: fp32
            grid_BhwD = map_BDhw.float().permute(0, 2, 3, 1)
            lines = (self.weight_oi @ grid_BhwD.flatten(2)).reshape(-1, len(self.weight_oi), *grid_BhwD.shape[2:])
            return (self.weight_oi @ lines).permute(0, 3, 1, 2)


def to_tokens(map_BDhw: Tensor) -> Tensor:
    """B x D x h x w to B x (h*w) x D."""
    return map_BDhw.flatten(2).transpose(1, 2)


def to_map(tokens_BND: Tensor) -> Tensor:
    """B x (h*h) x D to B x D x h x h."""
    batch, count, width = tokens_BND.shape
    side = int(round(count**0.5))
    return tokens_BND.transpose(1, 2).reshape(batch, width, side, side)


def whole_divisor(size: int, most: int, multiple: int) -> int:
    """The largest factor up to ``most`` that leaves a whole side, a multiple of the patch."""
    return next(f for f in range(max(1, most), 0, -1) if size % f == 0 and (size // f) % multiple == 0)


def in_fp16(x: Tensor) -> Tensor:
    """Half precision with nothing infinite, for what is kept in bulk."""
    most = torch.finfo(torch.float16).max
    return x.to(torch.float16).clamp(-most, most)  # in this order: half the bytes to clamp


# ---------------------------------------------------------------------------------- from distances to maps and scores


def top_mean(map_Bhw: Tensor, share: float) -> Tensor:
    """Mean of the largest ``share`` of positions of each map (B); at least one position."""
    flat = map_Bhw.flatten(1)
    count = max(1, int(flat.shape[1] * share))
    return flat.topk(count, dim=1).values.mean(1)


def published_map(distances: Sequence[Tensor], size: int, name: str) -> tuple[Tensor, Tensor]:
    """Map (B x 1 x S x S) and image score (B) as the public code of ``dinomaly`` or ``rd4ad`` makes them.

    ``distances`` are 1 - cos of every layer group at every position, B x h x w each; ``size`` is the input's side.
    """
    raised = torch.stack(
        [F.interpolate(d[:, None], size=(size, size), mode="bilinear", align_corners=True) for d in distances]
    )
    if name == "rd4ad":  # scipy's blur, which is cut at four sigma
        map_B1SS = smooth(raised.sum(0), 16, mirrored=True)
        return map_B1SS, top_mean(map_B1SS, 0.0)
    joined = F.interpolate(raised.mean(0), size=(256, 256), mode="bilinear", align_corners=False)
    map_B1SS = smooth(joined, 2, mirrored=False)  # 5 x 5, of which sigma 4 makes nearly a box
    return map_B1SS, top_mean(map_B1SS, 0.01)


def smooth(map_B1hw: Tensor, radius: int, mirrored: bool) -> Tensor:
    """Gaussian of sigma 4, cut at ``radius`` positions; outside stand zeros, or the map again, edges included."""
    weight = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float32) ** 2) / 32.0)
    kernel = (weight / weight.sum()).to(map_B1hw)
    for axis in (2, 3) if mirrored else ():  # edges included, which no mode of F.pad does
        low = map_B1hw.narrow(axis, 0, radius).flip(axis)
        high = map_B1hw.narrow(axis, map_B1hw.shape[axis] - radius, radius).flip(axis)
        map_B1hw = torch.cat([low, map_B1hw, high], axis)
    map_B1hw = map_B1hw if mirrored else F.pad(map_B1hw, (radius,) * 4)
    return F.conv2d(F.conv2d(map_B1hw, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


def upsample(map_Bhw: Tensor, side: int) -> Tensor:
    """Square maps B x h x h to B x 1 x side x side, bilinear."""
    here, map_B1hw = map_Bhw.shape[-1], map_Bhw[:, None]
    if here == side:
        return map_B1hw
    if side % here == 0:  # by a factor, which exports as a constant
        return F.interpolate(map_B1hw, scale_factor=float(side // here), mode="bilinear", align_corners=False)
    return F.interpolate(map_B1hw, size=(side, side), mode="bilinear", align_corners=False)


_LIMIT = 30.0  # standard deviations beyond which a surprise grows in proportion


def surprise(z: Tensor) -> Tensor:
    """-log(1 - Phi(z)) in nats: how surprising z standard deviations above the mean are. Any shape.

    In a Noisy-OR, P = 1 - product of (1 - p), surprises add up, and images whose P rounds to 1 keep their order.
    Far out the asymptote of Birnbaum is used, exact to 0.1 %, and beyond 30 its tangent, so that nothing overflows.
    """
    near = z.clamp_max(3.0)
    exact = -torch.log(0.5 * (1.0 - torch.erf(near / math.sqrt(2.0))))
    far = z.clamp(3.0, _LIMIT)
    asymptote = 0.5 * far.square() + torch.log(math.sqrt(math.pi / 2.0) * (far + (far.square() + 4.0).sqrt()))
    return torch.where(z < 3.0, exact, asymptote) + _LIMIT * (z - _LIMIT).clamp_min(0.0)
