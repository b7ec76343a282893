"""Our networks beside the public code that they follow: same weights, same images, same numbers.

    PYTHONPATH=src python benchmarks/parity.py dinomaly --code DIR [--teachers dinov2-small,dinov2-base] [--size 392]
    PYTHONPATH=src python benchmarks/parity.py dinomaly2 --code DIR
    PYTHONPATH=src python benchmarks/parity.py rd4ad --code DIR [--size 256]

DIR is a checkout of the public code that you bring (Dinomaly: guojiajeremy/Dinomaly, Apache-2.0; its preview of
Dinomaly2; RD4AD: hq-deng/RD4AD, MIT). It is imported and run, never copied. Both sides get the same random weights
and the same random images. Our side runs in fp32, as it always does. Dinomaly's network runs in double precision, so
that what differs is our rounding alone. RD4AD's runs in fp32 too: where a value is nearly zero, rounding decides
whether a ReLU lets a gradient pass. A difference is the largest one of a tensor, relative to the tensor's largest
value. docs/papers.md says what is compared with what, and what differs on purpose.

``--golden FILE`` writes a few numbers of *their* side, of a small case. The tests hold our side to them, so that CI
needs no checkout. The last line printed is JSON. Exit code 1: something differs by more than its limit.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from twinspect.config import ModelConfig, TrainConfig
from twinspect.losses import easy_share, encoder_decoder_loss, flat_cosine_distance
from twinspect.models.contract import build_model
from twinspect.models.layers import noise, published_map, to_map
from twinspect.models.snl import RD_BETAS, ConvReverse
from twinspect.models.teachers import Teacher, create_teacher
from twinspect.models.weights import SHORT_NAMES
from twinspect.training.loop import StableAdamW, make_optimiser

Values = dict[str, Tensor]
LIMIT = 1e-5
UPDATE_LIMIT = 2e-4  # a step is 0.002, and a weight between 1 and 2 is known to 1.2e-7
DROPOUT, LR = 0.2, 2e-3
DINOMALY_NORMS = (0.003, 0.08, 5.0, 0.001)  # gradients that surprise, that are clipped, and that become small again
MINED = 1000  # the step from which nine tenths of the positions are easy
RD_CHANNELS = (256, 512, 1024)  # WideResNet-50-2, layers 1 to 3
GOLDEN_SIZE = {"dinomaly": 70, "rd4ad": 64}

# Name of a weight of ours -> its name in their code, piece by piece.
DINOMALY_NAMES = (
    (r"^bottleneck\.net\.1\.", "bottleneck.0.fc1."), (r"^bottleneck\.net\.4\.", "bottleneck.0.fc2."),
    (r"^blocks\.", "decoder."), (r"\.norm_(\d)\.", r".norm\1."), (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.out\.", ".attn.proj."), (r"\.mlp\.0\.", ".mlp.fc1."), (r"\.mlp\.2\.", ".mlp.fc2."),
)  # fmt: skip
RD4AD_NAMES = (
    (r"^fuse\.0\.0\.", "bn.conv1."), (r"^fuse\.0\.1\.", "bn.bn1."), (r"^fuse\.0\.3\.", "bn.conv2."),
    (r"^fuse\.0\.4\.", "bn.bn2."), (r"^fuse\.1\.0\.", "bn.conv3."), (r"^fuse\.1\.1\.", "bn.bn3."),
    (r"^embed\.", "bn.bn_layer."), (r"^rise\.0\.", "decoder.layer1."), (r"^rise\.1\.", "decoder.layer2."),
    (r"^rise\.2\.", "decoder.layer3."), (r"\.body\.0\.", ".conv1."), (r"\.body\.1\.", ".bn1."),
    (r"\.body\.3\.", ".conv2."), (r"\.body\.4\.", ".bn2."), (r"\.body\.6\.", ".conv3."), (r"\.body\.7\.", ".bn3."),
    (r"^(bn\S*)\.shortcut\.", r"\1.downsample."), (r"^(decoder\S*)\.shortcut\.", r"\1.upsample."),
)  # fmt: skip


def renamed(name: str, names: Iterable[tuple[str, str]]) -> str:
    for pattern, theirs in names:
        name = re.sub(pattern, theirs, name)
    return name


# ------------------------------------------------------------------------------------------- same numbers


@torch.no_grad()
def fill(module: nn.Module, seed: int, spread: float = 0.0) -> None:
    """Random weights and statistics at which every part of a network matters; the same on every machine.

    Uniform numbers, as torch's normal ones differ in their last digits between processors.

    Args:
        module: whose weights and statistics are replaced.
        seed: of the numbers.
        spread: of the weights of layers; 0 keeps the spread of what goes through them.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in sorted(module.state_dict().items()):
        if not value.is_floating_point():
            continue
        drawn = 2.0 * torch.rand(value.shape, generator=generator) - 1.0
        kind = name.rpartition(".")[2]
        if kind in ("gamma", "running_var"):
            drawn = 0.6 + 0.4 * drawn
        elif kind == "weight" and value.dim() == 1:
            drawn = 1.0 + 0.2 * drawn
        elif kind == "weight":
            drawn *= math.sqrt(3.0) * (spread or math.sqrt(len(value) / value.numel()))
        else:
            drawn *= 0.1 if kind in ("bias", "running_mean") else 0.5
        value.copy_(drawn)


def images(count: int, size: int) -> Tensor:
    """Random RGB in 0..255, B x 3 x S x S."""
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(7)).float()


class SameNoise(TorchFunctionMode):
    """Gives our noise and torch's dropout the same masks, in the order in which they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(11)

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Called by torch for every function while the context is entered."""
        named = named or {}
        if function is noise:
            return self._dropped(*arguments)
        if function is F.dropout:
            x, p, training = [*arguments, *named.values()][:3]
            return self._dropped(x, p) if training and p else x
        return function(*arguments, **named)

    def _dropped(self, x: Tensor, p: float) -> Tensor:
        kept = torch.rand(x.shape, generator=self._generator) >= p  # in fp32 for both sides
        return x * kept / (1.0 - p)


# ----------------------------------------------------------------------------------------------- our side


def our_dinomaly(teacher: Teacher, size: int, recentre: bool = False) -> Any:
    """System A with a ViT at a size, scored as published; a shallow Encoder-Encoder, which takes no part."""
    config = ModelConfig(
        teacher=teacher.name, size=size, dropout=DROPOUT, ee_depth=0.1, recentre=recentre, scoring="published"
    )
    model = build_model(config, teacher)
    fill(model.student.local, seed=1, spread=0.01)  # as at the published start: where small numbers are normed
    return model


def dinomaly_answers(model: Any, image: Tensor) -> Values:
    """Features of the teacher's eight blocks, groups, predictions, map and score."""
    model.eval()
    x = model.teacher.normalise(image)
    features, found = model.teacher.features(x), {}
    for i, (one, prefix) in enumerate(zip(features.maps, features.prefix, strict=True)):
        found[f"features of target {i}"] = torch.cat([prefix, one.flatten(2).transpose(1, 2)], 1)
    with torch.no_grad():
        observed = model.observe(x)
        groups, trunk = model.groups(observed)
        predicted, plain = model.student.local(trunk), model.plain(observed, model.shrink(x))
    for i, (target, said) in enumerate(zip(groups, predicted, strict=True)):
        found |= {f"target of group {i}": to_map(target), f"prediction of group {i}": to_map(said)}
    return found | {"map": model.scorer.finish(plain.map_Bhw), "score": plain.local_BR[:, 0]}


def dinomaly_training(model: Any, image: Tensor) -> Values:
    """Loss and gradients at steps 0 and 1,000, then what the optimiser does."""
    model.student.train()
    config = TrainConfig(lr=LR, clip=0.1)
    optimiser, local = make_optimiser(model, config), model.student.local
    groups, trunk = model.groups(model.observe(model.teacher.normalise(image)))
    found: Values = {}
    for step in (0, MINED):
        with SameNoise():
            loss = encoder_decoder_loss(groups, local(trunk), easy_share(step, config.easy_ramp)).mean()
        optimiser.zero_grad()
        loss.backward()
        found[f"loss at step {step}"] = loss.detach()
        found |= {f"gradient at step {step} of {n}": p.grad.clone() for n, p in local.named_parameters()}
    return found | updates(dict(local.named_parameters()), optimiser, config.clip, DINOMALY_NORMS)


def updates(parameters: Mapping[str, nn.Parameter], optimiser: Any, clip: float, norms: Iterable[float]) -> Values:
    """What steps on drawn gradients change, by our names.

    An optimiser of Adam's kind moves a weight by its gradient's sign, whatever its size: on gradients of a network,
    rounding would decide where those that are nearly zero go.

    Args:
        parameters: of either side, by our names.
        optimiser: of the same side.
        clip: largest norm of all gradients together; 0 leaves them.
        norms: of the gradients of each step.
    """
    found: Values = {}
    generator = torch.Generator().manual_seed(3)
    for step, norm in enumerate(norms):
        before = {name: one.detach().clone() for name, one in parameters.items()}
        for _, one in sorted(parameters.items()):
            one.grad = (torch.rand(one.shape, generator=generator) - 0.5).to(one.dtype)
        total = torch.stack([one.grad.double().norm() for one in parameters.values()]).norm()
        for one in parameters.values():
            one.grad *= norm / total
        if clip:
            nn.utils.clip_grad_norm_(list(parameters.values()), clip)
        optimiser.step()
        found |= {f"update {step} of {name}": one.detach() - before[name] for name, one in parameters.items()}
    return found


def our_reverse(sides: tuple[int, int, int]) -> ConvReverse:
    """RD4AD's student for the stages of a WideResNet-50-2."""
    student = ConvReverse(RD_CHANNELS, sides, 0, 0, True, None)
    fill(student, seed=1)
    return student


def stages_of(count: int, sides: tuple[int, int, int]) -> list[Tensor]:
    """Random stages that end in a ReLU, without a teacher."""
    generator = torch.Generator().manual_seed(5)
    each = zip(RD_CHANNELS, sides, strict=True)
    return [(2.0 * torch.rand(count, c, s, s, generator=generator) - 1.0).relu() for c, s in each]


def reverse_answers(student: ConvReverse, stages: list[Tensor], size: int) -> Values:
    """Predictions, map and score."""
    student.eval()
    with torch.no_grad():
        predicted = student(stages, stages[0][:, :3, :0, :0])
    found = {f"prediction of stage {i + 1}": one for i, one in enumerate(predicted)}
    distances = [1.0 - F.cosine_similarity(t, s) for t, s in zip(stages, predicted, strict=True)]
    found["map"], found["score"] = published_map(distances, size, "rd4ad")
    return found


def reverse_training(student: ConvReverse, stages: list[Tensor]) -> Values:
    """Loss, gradients, running statistics, and what an optimiser step changes.

    A first step only: in later ones our updates are clipped where a gradient surprises, and Adam's are not.
    """
    student.train()
    predicted = student(stages, stages[0][:, :3, :0, :0])
    loss = torch.stack([flat_cosine_distance(t, s).mean() for t, s in zip(stages, predicted, strict=True)]).sum()
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"gradient of {n}": p.grad.clone() for n, p in student.named_parameters()}
    found |= {f"statistics {n}": b.clone() for n, b in student.named_buffers() if b.is_floating_point()}
    optimiser = StableAdamW(student.parameters(), lr=5e-3, betas=RD_BETAS, weight_decay=0.0)
    return found | updates(dict(student.named_parameters()), optimiser, 0.0, (1.0,))


def small_case(name: str) -> Values:
    """Our side of what ``--golden`` writes."""
    size = GOLDEN_SIZE[name]
    if name == "dinomaly":
        teacher = Teacher("dinov2-small", SHORT_NAMES["dinov2-small"])
        fill(teacher.net, seed=0)
        model, image = our_dinomaly(teacher, size), images(2, size)
        return dinomaly_answers(model, image) | dinomaly_training(model, image)
    sides = (size // 4, size // 8, size // 16)
    student, stages = our_reverse(sides), stages_of(2, sides)
    return reverse_answers(student, stages, size) | reverse_training(student, stages)


# --------------------------------------------------------------------------------------------- their side


class _Absent(ModuleType):
    """Stands for a package that their files import for functions that nothing here calls."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self


def import_theirs(code: Path, *names: str) -> list[Any]:
    """Modules of a checkout. Plotting packages that are missing are replaced by nothing."""
    if not code.is_dir():
        raise SystemExit(f"--code {code}: no such folder; give a checkout of the public code")
    for package in (
        "cv2",
        "matplotlib",
        "matplotlib.pyplot",
        "matplotlib.ticker",
        "pandas",
        "skimage",
        "adeval",
        "colorama",
    ):
        try:
            importlib.import_module(package)
        except ImportError:
            sys.modules[package] = _Absent(package)
    sys.path.insert(0, str(code))
    for name in names:  # a package of this name may be loaded already, such as Python's own `test`
        sys.modules.pop(name.partition(".")[0], None)
    try:
        return [importlib.import_module(name) for name in names]
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{code}: {error}. Is it a checkout of the public code, and is what it needs installed?"
        ) from None


def their_dinomaly(code: Path, teacher: Teacher, second: bool) -> tuple[Any, Any, Any]:
    """Their network, their `utils` and their optimisers; ``second`` for Dinomaly2's recentred targets."""
    uad, encoders, layers, utils, optimizers = import_theirs(
        code, "models.uad", "dinov2.models.vision_transformer", "models.vision_transformer", "utils", "optimizers"
    )
    size = {384: "vit_small", 768: "vit_base", 1024: "vit_large"}[teacher.net.embed_dim]
    encoder = getattr(encoders, size)(
        patch_size=14, img_size=518, block_chunks=0, init_values=1e-8, num_register_tokens=4,
        interpolate_antialias=False, interpolate_offset=0.1,
    )  # fmt: skip
    width, heads = encoder.embed_dim, encoder.num_heads
    bottleneck = nn.ModuleList([layers.bMlp(width, width * 4, width, drop=DROPOUT)])
    block = partial(
        layers.Block, dim=width, num_heads=heads, mlp_ratio=4.0, qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-8), attn=layers.LinearAttention2,
    )  # fmt: skip
    decoder = nn.ModuleList(block() for _ in range(8))
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    targets = [4, 6, 8, 10, 12, 14, 16, 18] if size == "vit_large" else list(range(2, 10))
    build = uad.Dinomaly if second else partial(uad.ViTill, mask_neighbor_size=0)
    model = build(
        encoder=encoder, bottleneck=bottleneck, decoder=decoder, target_layers=targets, fuse_layer_encoder=halves,
        fuse_layer_decoder=halves,
    )  # fmt: skip
    return model.double(), utils, optimizers


def their_encoder_state(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Values:
    """Names and shapes of timm to DINOv2's: the class token's position is a row of zeros there."""
    state = {name: value.clone() for name, value in ours.items() if name in theirs}
    table = ours["pos_embed"]
    state["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], 1)
    state["register_tokens"] = ours["reg_token"].clone()
    state["mask_token"] = torch.zeros_like(theirs["mask_token"])
    return state


def their_dinomaly_answers(model: Any, utils: Any, image: Tensor, teacher: Teacher) -> Values:
    model.eval()
    seen: list[Tensor] = []
    hooks = [
        model.encoder.blocks[i].register_forward_hook(lambda _m, _i, out: seen.append(out))
        for i in model.target_layers
    ]
    with torch.no_grad():
        targets, predicted = model(their_input(image, teacher))
    for hook in hooks:
        hook.remove()
    found = {f"features of target {i}": one for i, one in enumerate(seen)}
    for i, (target, said) in enumerate(zip(targets, predicted, strict=True)):
        found |= {f"target of group {i}": target, f"prediction of group {i}": said}
    anomaly, _ = utils.cal_anomaly_maps(targets, predicted, image.shape[-1])
    anomaly = F.interpolate(anomaly, size=256, mode="bilinear", align_corners=False)
    with torch.no_grad():
        found["map"] = utils.get_gaussian_kernel(kernel_size=5, sigma=4).double()(anomaly)
    ranked = torch.sort(found["map"].flatten(1), dim=1, descending=True)[0]
    found["score"] = ranked[:, : int(ranked.shape[1] * 0.01)].mean(1)
    return found


def their_input(image: Tensor, teacher: Teacher) -> Tensor:
    mean, std = (torch.tensor(one).double()[:, None, None] for one in (teacher.info.mean, teacher.info.std))
    return (image.double() / 255.0 - mean) / std


def their_dinomaly_training(
    model: Any, utils: Any, optimizers: Any, image: Tensor, teacher: Teacher, mapped: Mapping[str, str]
) -> Values:
    trainable = nn.ModuleDict({"bottleneck": model.bottleneck, "decoder": model.decoder})
    model.train()
    parameters, found = in_our_names(trainable, mapped), {}
    for step in (0, MINED):
        with SameNoise():
            targets, predicted = model(their_input(image, teacher))
        loss = utils.global_cosine_hm_percent(targets, predicted, p=min(0.9 * step / 1000, 0.9), factor=0.1)
        trainable.zero_grad()
        loss.backward()
        found[f"loss at step {step}"] = loss.detach()
        found |= {f"gradient at step {step} of {n}": p.grad.clone() for n, p in parameters.items()}
    parameters = in_our_names(trainable.float(), mapped)  # squares of small gradients are below what fp32 holds
    optimiser = optimizers.StableAdamW(
        [{"params": trainable.parameters()}], lr=LR, betas=(0.9, 0.999), weight_decay=1e-4, amsgrad=True, eps=1e-10
    )
    return found | updates(parameters, optimiser, 0.1, DINOMALY_NORMS)


def in_our_names(module: nn.Module, mapped: Mapping[str, str]) -> dict[str, Any]:
    """Their parameters by our names; what our side lacks is left out."""
    ours = {theirs: name for name, theirs in mapped.items()}
    return {ours[name]: one for name, one in module.named_parameters() if name in ours}


def their_reverse(code: Path, dtype: torch.dtype) -> tuple[Any, nn.ModuleDict, Any, Any]:
    """Their encoder, their student (bottleneck and decoder), their `main` and `test`."""
    resnet, de_resnet, main, test = import_theirs(code, "resnet", "de_resnet", "main", "test")
    encoder, bottleneck = resnet.wide_resnet50_2(pretrained=False)
    decoder = de_resnet.de_wide_resnet50_2(pretrained=False)
    return encoder.eval(), nn.ModuleDict({"bn": bottleneck, "decoder": decoder}).to(dtype), main, test


def their_reverse_answers(student: nn.ModuleDict, stages: list[Tensor], test: Any, size: int) -> Values:
    from scipy.ndimage import gaussian_filter

    student.eval()
    with torch.no_grad():
        predicted = student["decoder"](student["bn"](stages))
    found = {f"prediction of stage {i + 1}": one for i, one in enumerate(predicted)}
    maps = []
    for b in range(len(stages[0])):
        pairs = [s[b : b + 1] for s in stages], [p[b : b + 1] for p in predicted]
        summed, _ = test.cal_anomaly_map(*pairs, size, amap_mode="a")
        maps.append(torch.from_numpy(gaussian_filter(summed, sigma=4)))
    found["map"] = torch.stack(maps)[:, None]
    found["score"] = found["map"].amax((1, 2, 3))
    return found


def their_reverse_training(
    student: nn.ModuleDict, stages: list[Tensor], main: Any, mapped: Mapping[str, str]
) -> Values:
    student.train()
    loss = main.loss_fucntion(stages, student["decoder"](student["bn"](stages)))
    optimiser = torch.optim.Adam(student.parameters(), lr=5e-3, betas=(0.5, 0.999))
    loss.backward()
    parameters = in_our_names(student, mapped)  # a fourth convolution of theirs never runs
    found = {"loss": loss.detach()} | {f"gradient of {n}": p.grad.clone() for n, p in parameters.items()}
    buffers = dict(student.named_buffers())
    kept = [n for n in mapped if mapped[n] in buffers and buffers[mapped[n]].is_floating_point()]
    found |= {f"statistics {n}": buffers[mapped[n]].clone() for n in kept}
    return found | updates(parameters, optimiser, 0.0, (1.0,))


@torch.no_grad()
def take_weights(theirs: nn.Module, ours: nn.Module, names: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Copy our weights into their student; our name -> theirs.

    Raises:
        SystemExit: a weight of ours has no counterpart, or one of another shape.
    """
    state, mapped = theirs.state_dict(), {name: renamed(name, names) for name in ours.state_dict()}
    for name, value in ours.state_dict().items():
        other = state.get(mapped[name])
        if other is None or other.shape != value.shape:
            raise SystemExit(f"{name}: their code has no {mapped[name]} of shape {tuple(value.shape)}")
        other.copy_(value)
    return mapped


# ---------------------------------------------------------------------------------------------- comparing


class Comparison:
    """Differences found, printed as they are found."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.case = ""

    def add(self, what: str, pairs: Iterable[tuple[Tensor, Tensor]], limit: float = LIMIT) -> None:
        """The largest difference of some pairs (ours, theirs)."""
        found = max(difference(ours, theirs) for ours, theirs in pairs)
        self.rows.append({"case": self.case, "what": what, "difference": found, "limit": limit})
        print(f"{self.case:<16} {what:<40} {found:9.1e}   {'ok' if found <= limit else 'DIFFERS'}", flush=True)

    def each(self, ours: Values, theirs: Values) -> None:
        """All values by kind: what stands before a number or the name of a weight."""
        kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, value in ours.items():
            kind = re.sub(r"( of)?( group| stage| target)? (\S+\.\S+|\d)$", "", name)
            kinds.setdefault(kind, []).append((value, theirs[name]))
        for kind, pairs in kinds.items():
            self.add(f"{kind} ({len(pairs)})", pairs, UPDATE_LIMIT if kind.startswith("update") else LIMIT)

    @property
    def failed(self) -> bool:
        """Whether anything differs by more than its limit."""
        return any(not row["difference"] <= row["limit"] for row in self.rows)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    if ours.shape != theirs.shape:
        raise SystemExit(f"shapes differ: ours {tuple(ours.shape)}, theirs {tuple(theirs.shape)}")
    return float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def probes(values: Values) -> dict[str, list[float]]:
    """Of every tensor its length and a few of its values."""
    found = {}
    for name, value in values.items():
        flat = value.detach().flatten().double()
        at = (torch.arange(4) * (len(flat) - 1)) // 3 if len(flat) > 4 else torch.arange(len(flat))
        found[name] = [float(f"{x:.8g}") for x in (float(flat.norm()), *flat[at].tolist())]
    return found


# -------------------------------------------------------------------------------------------------- cases


def compare_dinomaly(given: argparse.Namespace, comparison: Comparison, name: str, size: int) -> Values:
    """Every value of one teacher; their side's, by our names."""
    second = given.paper == "dinomaly2"
    teacher = Teacher(name, SHORT_NAMES[name])
    fill(teacher.net, seed=0)
    theirs, utils, optimizers = their_dinomaly(given.code, teacher, second)
    theirs.encoder.load_state_dict(their_encoder_state(teacher.net.state_dict(), theirs.encoder.state_dict()))
    with tempfile.TemporaryDirectory() as folder:  # their encoder's file as our loader reads it
        file = Path(folder) / "encoder.pth"
        torch.save(theirs.encoder.state_dict(), file)
        loaded = create_teacher(name, file)
    pairs = zip(loaded.net.state_dict().values(), teacher.net.state_dict().values(), strict=True)
    comparison.add("teacher's weights, read from their file", pairs, 0.0)
    ours, image = our_dinomaly(loaded, size, second), images(given.images, size)
    mapped = take_weights(theirs, ours.student.local, DINOMALY_NAMES)
    values = their_dinomaly_answers(theirs, utils, image, teacher)
    comparison.each(dinomaly_answers(ours, image), values)
    if not second:
        trained = their_dinomaly_training(theirs, utils, optimizers, image, teacher, mapped)
        comparison.each(dinomaly_training(ours, image), trained)
        values |= trained
    return values


def compare_reverse(given: argparse.Namespace, comparison: Comparison, size: int, whole: bool) -> Values:
    """``whole`` with teacher and images, else the student on random stages, theirs in double precision."""
    encoder, theirs, main, test = their_reverse(given.code, torch.float32 if whole else torch.float64)
    sides = (size // 4, size // 8, size // 16)
    student, stages = our_reverse(sides), stages_of(given.images, sides)
    if whole:
        fill(encoder, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "encoder.pth"
            torch.save(encoder.state_dict(), file)
            teacher = create_teacher("wide-resnet50-2", file)
        config = ModelConfig(model="rd", teacher="wide-resnet50-2", size=size, scoring="published")
        model = build_model(config, teacher).eval()
        image = images(given.images, size)
        with torch.no_grad():
            stages = encoder(their_input(image, teacher).float())
        observed = model.observe(teacher.normalise(image))
        comparison.add("features (3)", zip(model.stages.of(observed.maps), stages, strict=True))
        student = model.student.local.net
        fill(student, seed=1)
    mapped = take_weights(theirs, student, RD4AD_NAMES)
    exact = [one.to(theirs["bn"].conv1.weight.dtype) for one in stages]
    values = their_reverse_answers(theirs, exact, test, size)
    if whole:
        with torch.no_grad():
            plain = model.plain(observed, image[:, :, :0, :0])
        comparison.add("map, from the image", [(model.scorer.finish(plain.map_Bhw), values["map"])])
    comparison.each(reverse_answers(student, stages, size), values)
    trained = their_reverse_training(theirs, exact, main, mapped)
    comparison.each(reverse_training(student, stages), trained)
    return values | trained


def compare_small(given: argparse.Namespace, comparison: Comparison) -> Values:
    """The case of ``--golden``: see `small_case`."""
    size = GOLDEN_SIZE[given.paper]
    if given.paper == "rd4ad":
        return compare_reverse(given, comparison, size, False)
    return compare_dinomaly(given, comparison, "dinov2-small", size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=("dinomaly", "dinomaly2", "rd4ad"))
    parser.add_argument("--code", type=Path, required=True, help="checkout of the public code")
    parser.add_argument("--teachers", default="dinov2-small,dinov2-base", help="of Dinomaly")
    parser.add_argument("--size", type=int, default=0, help="input side; 0 takes the paper's")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--golden", type=Path, help="write numbers of their side's small case here")
    given = parser.parse_args()
    comparison = Comparison()
    runs: dict[str, Callable[[], Values]] = {}
    if given.golden:
        runs["small case"] = lambda: compare_small(given, comparison)
    elif given.paper == "rd4ad":
        runs["wide-resnet50-2"] = lambda: compare_reverse(given, comparison, given.size or 256, True)
    else:
        for name in given.teachers.split(","):
            runs[name] = partial(compare_dinomaly, given, comparison, name, given.size or 392)
    for comparison.case, run in runs.items():
        values = run()
    if given.golden:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in probes(values).items())
        given.golden.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(json.dumps({"torch": torch.__version__, "images": given.images, "rows": comparison.rows}))
    return int(comparison.failed)


if __name__ == "__main__":
    sys.exit(main())
