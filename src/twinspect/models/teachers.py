"""Teachers: any timm network or the embedded EfficientNet-Lite, behind one narrow contract.

A `Backbone` turns normalised pixels into `Features` (patch maps and one global token per level) and
states channels, strides and input statistics as attributes. A `Teacher` is a Backbone frozen for life.
The same `Backbone`, untrained and trainable, is the Encoder-Encoder student of system A.

Weights are found offline first and never downloaded here: see `twinspect.models.weights`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twinspect.errors import ConfigError, TwinspectError, unknown_name
from twinspect.models.fold import fold_batch_norms
from twinspect.models.layers import standardise
from twinspect.models.weights import SHORT_NAMES, find_weights, load_state, resolve_auto
from twinspect.types import Features

_MISSING = ("torchvision::nms", "torchvision::qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# Dinomaly rebuilds eight blocks, in two groups: 2, 3 ... 9 of a ViT of 12 blocks, 4, 6 ... 18 of one of 24.
_VIT_TWELFTHS = range(2, 10)


def _import_timm() -> Any:
    """Timm, also beside a torchvision whose compiled operators do not load.

    Timm imports torchvision. The torchvision wheel of the default index is compiled against the CUDA build of torch;
    beside a CPU build its operators stay unregistered, and its import dies with ``operator torchvision::nms does not
    exist``. We use none of them, so declaring the two schemas that its import asks for is enough.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    except ModuleNotFoundError as error:
        raise TwinspectError(f"{error}; type: pip install twinspect") from None
    for operator in _MISSING:
        torch.library.define(operator, _SCHEMA)
    for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]  # half-imported modules must not be found again
    return importlib.import_module("timm")


timm = _import_timm()


@dataclass(frozen=True, slots=True)
class BackboneInfo:
    """What the rest of the library may know about a backbone."""

    arch: str  # as timm names it
    vit: bool  # else a CNN
    channels: tuple[int, ...]  # D_l of each map level, fine to coarse for a CNN
    strides: tuple[int, ...]  # pixels per grid step of each map level
    token_channels: tuple[int, ...]  # D_l of each global token
    embedding_channels: int  # F of the embedding
    multiple: int  # input sides must be a multiple of this
    default_size: int  # input side in pixels that suits a two-core CPU (CNN) or the published recipe (ViT)
    mean: tuple[float, ...]  # input statistics for RGB in [0, 1]
    std: tuple[float, ...]
    prefix_tokens: int = 0  # P, class and register tokens in front of a ViT's patches; 0 for a CNN
    class_token: bool = False  # whether the first of them is a class token
    rectified: bool = False  # whether the maps end in a ReLU, so that no value is below 0 (ResNet)


class Backbone(nn.Module):
    """A timm network that answers with `Features` for normalised B x 3 x H x W input.

    ``depth`` is the share of the blocks to build (0 < depth <= 1); a CNN keeps that share of every stage.
    ``img_size`` is only a hint for ViT position tables. A ConfigError where it exposes no intermediate features.
    """

    def __init__(self, arch: str, depth: float = 1.0, img_size: int | None = None) -> None:
        super().__init__()
        self.net, vit = _create(arch, depth, img_size)
        self._extra = _extra(self.net)
        self.levels, self.token_levels, self.info = (_read_vit if vit else _read_cnn)(arch, self.net)

    def features(self, x_B3HW: Tensor) -> Features:
        """Maps (one per level, NCHW) and global tokens (one per token level, B x D)."""
        if self.info.vit:
            return self._vit_features(x_B3HW)
        maps = self.net.forward_intermediates(x_B3HW, indices=self.levels, intermediates_only=True, **self._extra)
        return Features(tuple(maps), tuple(level.mean((2, 3)) for level in maps))

    def drop_head(self) -> None:
        """Let go of what only classifies: a CNN's classifier and the widened stage before it."""
        if not self.info.vit:
            self.net.reset_classifier(0)
            if _has_wide_head(self.net):
                self.net.conv_head, self.net.bn2 = nn.Identity(), nn.Identity()

    def embedding(self, features: Features) -> Tensor:
        """What the network's own classifier would see of these features: B x F.

        EfficientNets widen their last stage once more before pooling, and that space tells objects apart best;
        for other networks it is the last global token.
        """
        if not _has_wide_head(self.net):
            return features.tokens[-1]
        wide: Tensor = self.net.bn2(self.net.conv_head(features.maps[-1]))
        return wide.mean((2, 3))

    def _vit_features(self, x_B3HW: Tensor) -> Features:
        asked, has_prefix = sorted({*self.levels, *self.token_levels}), self.net.num_prefix_tokens > 0
        pairs = self.net.forward_intermediates(
            x_B3HW, indices=asked, intermediates_only=True, return_prefix_tokens=has_prefix, output_fmt="NCHW"
        )
        if not has_prefix:  # timm then gives maps alone
            pairs = [(level, level.new_zeros(level.shape[0], 0, level.shape[1])) for level in pairs]
        by_level = dict(zip(asked, pairs, strict=True))
        maps, prefix = (tuple(by_level[level][which] for level in self.levels) for which in (0, 1))
        levels = (by_level[level] for level in self.token_levels)
        tokens = tuple(p[:, 0] if self.info.class_token else level.mean((2, 3)) for level, p in levels)
        return Features(maps, tokens, prefix)


class Teacher(Backbone):
    """A Backbone that nothing outside can train: eval mode, no gradients, features under no_grad."""

    mean_3: Tensor
    std_3: Tensor

    def __init__(self, name: str, arch: str) -> None:
        super().__init__(arch)
        self.name = name
        self.weights = "random"
        self.register_buffer("mean_3", torch.tensor(self.info.mean), persistent=False)
        self.register_buffer("std_3", torch.tensor(self.info.std), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode whatever is asked: batch-norm statistics, dropout and depth stay frozen."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Teacher:
        """Stay without gradients whatever is asked."""
        return super().requires_grad_(False)

    def normalise(self, image_BCHW: Tensor) -> Tensor:
        """Scale uint8 RGB (or float in 0..255) B x 3 x H x W to the statistics the teacher was trained with."""
        return standardise(image_BCHW.to(self.mean_3.dtype), 255.0 * self.mean_3, 255.0 * self.std_3)

    @torch.no_grad()
    def features(self, x_B3HW: Tensor) -> Features:
        """Features of normalised input, never part of a gradient graph."""
        super().train(False)  # for callers who switched a module inside, past `train`
        return super().features(x_B3HW)

    @torch.no_grad()
    def resample_positions(self, size: int) -> None:
        """Bring a ViT's position table to an input side in pixels as Dinomaly's code does.

        Bicubic with a tenth of a position added to the wanted side, as DINOv2 does without registers. Left alone,
        timm resamples the table at every size antialiased, as DINOv2 does with registers. A network without a table
        of learnt positions, or with one of this side, stays as it is.
        """
        net, side = self.net, size // self.info.multiple
        table = getattr(net, "pos_embed", None)
        if table is None or tuple(net.patch_embed.grid_size) == (side, side):
            return
        here = net.patch_embed.grid_size[0]
        front, patches_1ND = table[:, : table.shape[1] - here**2], table[:, table.shape[1] - here**2 :]
        scale = (side + 0.1) / here
        grid = patches_1ND.reshape(1, here, here, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        net.set_input_size(img_size=size)
        net.pos_embed.copy_(torch.cat([front, grid.flatten(2).transpose(1, 2)], 1))

    def hash(self) -> str:
        """16 hex digits of the sha256 over names, shapes and bytes of all tensors: equal teachers, equal hashes."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.net.state_dict().items()):
            value = tensor.cpu().contiguous()
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def create_teacher(name: str = "auto", weights: Path | str = "", pretrained: bool = True) -> Teacher:
    """Build a frozen teacher by short name (``dinov2-base``, ``efficientnet-lite0``) or any timm name.

    ``auto`` takes ``dinov2-base`` if its weights are on disk, else the embedded network. ``weights`` is a local
    safetensors or ``.pth`` file; by default the known places on disk are searched. Not ``pretrained`` gives random
    ones. An unknown name raises a ConfigError, weights that are not on disk or damaged a WeightsError.
    """
    name = resolve_auto() if name == "auto" else name
    arch = architecture(name)
    # Found before the network is built, which takes seconds for a large one.
    found = find_weights(name, Path(weights) if weights else None) if pretrained else None
    teacher = Teacher(name, arch)
    if found is not None:
        path, teacher.weights = found
        load_state(teacher.net, path, name)
    if not teacher.info.vit:
        teacher.net.reset_classifier(0)  # after loading: files hold it, and nothing here asks it
        fold_batch_norms(teacher.net)
    return teacher


def architecture(name: str) -> str:
    """Timm's name of a network, from a short name or from timm's own; a ConfigError for any other."""
    arch = SHORT_NAMES.get(name, name)
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=2, cutoff=0.8)
        raise ConfigError(unknown_name("teacher", name, ["auto", *SHORT_NAMES, *near]) + ", or any timm name")
    return arch


def _create(arch: str, depth: float, img_size: int | None) -> tuple[Any, bool]:
    module = timm.models.model_entrypoint(arch).__module__.rsplit(".", 1)[-1]
    is_vit = module in {"vision_transformer", "eva", "beit", "deit"}
    options: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True} if is_vit else {}
    if is_vit and img_size:
        options["img_size"] = img_size
    if is_vit and depth < 1.0:
        full = len(timm.create_model(arch, pretrained=False, num_classes=0).blocks)
        options["depth"] = max(2, round(full * depth))
    net = timm.create_model(arch, pretrained=False, **options)
    if not is_vit and depth < 1.0:
        _thin_stages(net, depth)
    if not hasattr(net, "forward_intermediates"):
        raise ConfigError(f"{arch} exposes no intermediate features in this timm; choose another teacher")
    return net, is_vit


def _thin_stages(net: Any, depth: float) -> None:
    """Drop the last of the blocks that repeat each other in every stage of a CNN.

    Which ones do is read from a tiny forward pass: rows whose blocks are all of one class, and behind the first of
    which nothing changes its shape. A network without such rows keeps all it has.
    """
    shapes: dict[int, tuple[Any, Any]] = {}

    def note(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        shapes[id(block)] = getattr(inputs[0], "shape", None), getattr(output, "shape", None)

    rows = [row for row in net.modules() if type(row) is nn.Sequential and len(row) > 1]
    hooks = [block.register_forward_hook(note) for row in rows for block in row]
    _cnn_stages(net)
    for hook in hooks:
        hook.remove()
    for row in rows:
        first, *others = row
        repeats = [type(block) is type(first) and len(set(shapes.get(id(block), (0, 1)))) == 1 for block in others]
        if all(repeats):
            del row[math.ceil(depth * len(row)) :]


def _cnn_stages(net: Any) -> list[tuple[int, int]]:
    """(channels, stride) of every intermediate a CNN returns, read from a tiny forward pass."""
    net.eval()
    try:
        with torch.no_grad():
            maps = net.forward_intermediates(torch.zeros(1, 3, 64, 64), intermediates_only=True, **_extra(net))
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{type(net).__name__} takes images of its own size only ({error}); choose another teacher"
        ) from None
    net.train()
    return [(m.shape[1], 64 // m.shape[2]) for m in maps]


def _read_vit(arch: str, net: Any) -> tuple[list[int], list[int], BackboneInfo]:
    """Indices of the levels whose maps, and of those whose global tokens are used; and what they are like."""
    depth, patch, width, config = len(net.blocks), net.patch_embed.patch_size[0], net.embed_dim, net.pretrained_cfg
    first = min(2, depth - 1)
    levels = list(range(first, max(2, round(depth * 10 / 12))))  # none of three blocks: a student
    if depth >= 12:
        levels = [round(depth * i / 12) for i in _VIT_TWELFTHS]
        first = levels[0]
    token_levels = list(range(first, depth))
    return levels, token_levels, BackboneInfo(
        arch, True, (width,) * len(levels), (patch,) * len(levels), (width,) * len(token_levels), width, patch,
        448 // patch * patch, tuple(config["mean"]), tuple(config["std"]), net.num_prefix_tokens,
        class_token=net.cls_token is not None,
    )  # fmt: skip


def _read_cnn(arch: str, net: Any) -> tuple[list[int], list[int], BackboneInfo]:
    stages, config = _cnn_stages(net), net.pretrained_cfg
    levels = [i for i, (_, stride) in enumerate(stages) if stride >= 4]
    if not levels:
        raise ConfigError("this CNN has no stage with a stride of 4 pixels or more; choose another teacher")
    channels, strides = zip(*(stages[i] for i in levels), strict=True)
    wide = net.conv_head.out_channels if _has_wide_head(net) else channels[-1]
    rectified = isinstance(net, timm.models.ResNet) and isinstance(net.act1, nn.ReLU)
    return levels, levels, BackboneInfo(
        arch, False, channels, strides, channels, wide, max(strides), 512, tuple(config["mean"]),
        tuple(config["std"]), rectified=rectified,
    )  # fmt: skip


def _has_wide_head(net: Any) -> bool:
    return hasattr(net, "conv_head") and hasattr(net, "bn2")


def _extra(net: Any) -> dict[str, bool]:
    """What makes an EfficientNet of timm give all its blocks; other networks do not know it."""
    return {"extra_blocks": True} if "extra_blocks" in inspect.signature(net.forward_intermediates).parameters else {}
