"""Small blocks shared by the students. Shapes: B images, N tokens, D width, h w grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearAttention(nn.Module):
    """Softmax-free multi-head attention, feature map elu + 1 (Katharopoulos et al., 2020).

    It cannot focus on single tokens, which keeps a decoder from copying anomalies through (Dinomaly,
    CVPR 2025). Cost is linear in N: keys and values are summed before queries see them.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """B x N x D to B x N x D."""
        batch, count, width = x_BND.shape
        qkv = self.qkv(x_BND).reshape(batch, count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Sums over N in fp32: thousands of positive terms lose digits in bf16.
        q, k, v = (F.elu(q) + 1).float(), (F.elu(k) + 1).float(), v.float()
        with torch.autocast(x_BND.device.type, enabled=False):
            context = k.transpose(-1, -2) @ v
            norm = (q @ k.sum(-2, keepdim=True).transpose(-1, -2)).clamp_min(1e-6)
            mixed = (q @ context) / norm
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, count, width).to(x_BND.dtype))
        return out


class DecoderBlock(nn.Module):
    """Pre-norm transformer block with linear attention."""

    def __init__(self, width: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = LinearAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BND: Tensor) -> Tensor:
        """B x N x D to B x N x D."""
        x_BND = x_BND + self.attention(self.norm_1(x_BND))
        out: Tensor = x_BND + self.mlp(self.norm_2(x_BND))
        return out


class NoisyBottleneck(nn.Module):
    """MLP D_in -> ratio D -> D whose dropout is the noise that makes reconstruction a denoising task (Dinomaly)."""

    def __init__(self, width_in: int, width: int, dropout: float, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * ratio)
        self.net = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(width_in, hidden), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden, width), nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x_BND: Tensor) -> Tensor:
        """B x N x D_in to B x N x D."""
        out: Tensor = self.net(x_BND)
        return out


def resample(map_BDhw: Tensor, side: int) -> Tensor:
    """Bring a square map to side x side: mean pooling downwards by whole factors, else bilinear."""
    here = map_BDhw.shape[-1]
    if here == side:
        return map_BDhw
    if here > side and here % side == 0:
        return F.avg_pool2d(map_BDhw, here // side)
    return F.interpolate(map_BDhw, size=(side, side), mode="bilinear", align_corners=False)


def to_tokens(map_BDhw: Tensor) -> Tensor:
    """B x D x h x w to B x (h*w) x D."""
    return map_BDhw.flatten(2).transpose(1, 2)


def to_map(tokens_BND: Tensor) -> Tensor:
    """B x (h*h) x D to B x D x h x h."""
    batch, count, width = tokens_BND.shape
    side = int(round(count**0.5))
    return tokens_BND.transpose(1, 2).reshape(batch, width, side, side)


def whole_divisor(size: int, wanted: int, multiple: int) -> int:
    """The largest factor up to ``wanted`` that leaves a whole side, a multiple of the patch."""
    return next(f for f in range(max(1, wanted), 0, -1) if size % f == 0 and (size // f) % multiple == 0)
