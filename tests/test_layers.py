"""Blocks of the students, and folding of batch norms, against slow transcriptions."""

import pytest
import torch
import torch.nn.functional as F

from twinspect.models.fold import fold_batch_norms
from twinspect.models.layers import (
    DecoderBlock,
    LinearAttention,
    Noise,
    NoisyBottleneck,
    Resample,
    Shrink,
    pool,
    standardise,
    to_map,
    to_tokens,
)
from twinspect.models.teachers import timm


def slow_attention(module: LinearAttention, x: torch.Tensor) -> torch.Tensor:
    """sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j), phi = elu + 1, query by query."""
    batch, count, width = x.shape
    size = width // module.heads
    q, k, v = module.qkv(x).split(width, dim=2)
    out = torch.zeros(batch, count, width)
    for b in range(batch):
        for h in range(module.heads):
            part = slice(h * size, (h + 1) * size)
            for i in range(count):
                weights = [(F.elu(q[b, i, part]) + 1) @ (F.elu(k[b, j, part]) + 1) for j in range(count)]
                out[b, i, part] = sum(w * v[b, j, part] for j, w in enumerate(weights)) / sum(weights)
    return module.out(out)


@pytest.mark.parametrize(("width", "heads", "bundles"), [(12, 3, 1), (256, 8, 2), (192, 3, 3)])
def test_linear_attention_equals_its_transcription(width: int, heads: int, bundles: int) -> None:
    torch.manual_seed(0)
    module, x = LinearAttention(width, heads), torch.randn(2, 7, width)
    assert module.bundles == bundles
    torch.testing.assert_close(module(x), slow_attention(module, x), rtol=1e-4, atol=1e-5)
    order = torch.randperm(7)
    torch.testing.assert_close(module(x)[:, order], module(x[:, order]))  # no position in it


def test_width_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="width 10 is not a multiple of 3 heads"):
        LinearAttention(10, 3)


def test_linear_attention_in_bf16_keeps_its_type() -> None:
    module, x = LinearAttention(16, 2).bfloat16(), torch.randn(1, 50, 16, dtype=torch.bfloat16)
    found = module(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), module.float()(x.float()), rtol=0.05, atol=0.05)


def test_blocks_keep_shape_and_noise_is_for_training_only() -> None:
    x = torch.randn(2, 9, 16)
    assert DecoderBlock(16, 2)(x).shape == x.shape
    bottleneck = NoisyBottleneck(16, 8, 0.4, 4.0)
    assert bottleneck(x).shape == (2, 9, 8)
    assert not torch.equal(bottleneck.train()(x), bottleneck(x))
    assert torch.equal(bottleneck.eval()(x), bottleneck(x))


@pytest.mark.parametrize("p", [0.0, 0.2, 0.4, 0.9])
def test_noise_silences_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.rand(40, 50, 61, requires_grad=True)
    out = Noise(p)(x)
    silent = out == 0
    assert float(silent.float().mean()) == pytest.approx(round(256 * p) / 256, abs=0.005)
    assert float(out.detach().mean()) == pytest.approx(0.5, abs=0.01)
    out.sum().backward()
    assert torch.equal(x.grad == 0, silent)
    # No pattern from the bytes of a drawn number: neighbours at any distance are silent independently.
    flat = silent.flatten().float() - silent.float().mean()
    for apart in (1, 4, 8, 16):
        assert abs(float((flat[:-apart] * flat[apart:]).mean())) < 0.003
    assert torch.equal(Noise(p).eval()(x), x)
    assert Noise(0.999)(x).isfinite().all()


def test_tokens_and_maps_are_inverse() -> None:
    maps = torch.randn(2, 5, 6, 6)
    assert torch.equal(to_map(to_tokens(maps)), maps)
    assert torch.equal(to_tokens(maps)[0, 7], maps[0, :, 1, 1])


def test_resample_is_torchs_pooling_and_bilinear_interpolation() -> None:
    maps = torch.randn(2, 3, 8, 8)
    assert Resample(8, 8)(maps) is maps
    for side in (1, 2, 4):
        expected = F.avg_pool2d(maps, 8 // side)
        torch.testing.assert_close(Resample(8, side)(maps), expected)
    for side in (3, 5, 12, 16, 19):
        expected = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
        torch.testing.assert_close(Resample(8, side)(maps), expected)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_shrink_is_antialiased_interpolation(factor: int) -> None:
    """Away from the rim, where torch weighs fewer pixels and `Shrink` repeats the last one."""
    images = torch.randn(2, 3, 12 * factor, 24 * factor)
    found = Shrink(factor)(images)
    expected = F.interpolate(images, scale_factor=1 / factor, mode="bilinear", antialias=True)
    assert found.shape == expected.shape
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-5, atol=1e-5)
    constant = torch.full((1, 3, 8 * factor, 8 * factor), 2.5)
    torch.testing.assert_close(Shrink(factor)(constant), constant[..., :8, :8])


@pytest.mark.parametrize("factor", [2, 4])
def test_shrink_lets_no_fine_texture_through(factor: int) -> None:
    """Means of blocks alias stripes that are finer than a block; weighted means leave little of them."""
    stripes = torch.cos(torch.arange(96.0) * 2 * torch.pi * 5 / 12).expand(1, 1, 96, 96)
    inside = (..., slice(2, -2), slice(2, -2))
    left, of_blocks = (f(stripes)[inside].std() for f in (Shrink(factor), lambda x: F.avg_pool2d(x, factor)))
    assert left < 0.3 * of_blocks


def test_pool_of_the_last_axes() -> None:
    pixels = torch.randn(2, 3, 12, 8)
    torch.testing.assert_close(pool(pixels, 4), F.avg_pool2d(pixels, 4))


def test_standardise_is_minus_mean_over_scale() -> None:
    maps, mean, scale = torch.randn(2, 3, 4, 4), torch.randn(3), torch.rand(3) + 1e-3
    slow = torch.stack([(maps[:, c] - mean[c]) / scale[c] for c in range(3)], 1)
    torch.testing.assert_close(standardise(maps, mean, scale), slow, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["resnet18", "tf_efficientnet_lite0", "test_resnet", "mobilenetv3_small_050", "convnext_atto"]
)
def test_folded_batch_norms_compute_the_same(name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics of a network that has seen something
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
    net.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = net.forward_intermediates(x, intermediates_only=True)
        fold_batch_norms(net)
        after = net.forward_intermediates(x, intermediates_only=True)
    assert net.training is False
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))
