"""Teachers: frozen for life, one contract, the right weights, and words for every way they can be missing."""

import json
import math
import socket
from pathlib import Path

import pytest
import torch
from painting import ring
from safetensors.torch import save_file

from twinspect.data.images import resize_rgb
from twinspect.errors import ConfigError, WeightsError
from twinspect.models import fold
from twinspect.models.fold import FrozenConv, fold_batch_norms, pads_unevenly
from twinspect.models.teachers import Backbone, Teacher, create_teacher, timm
from twinspect.models.weights import DEFAULT_EMBEDDED, EMBEDDED, PREFERRED, SHORT_NAMES, find_weights, read_state

GOLDEN = Path(__file__).parent / "golden" / "teachers.json"
TRAINED = sorted(EMBEDDED)
CNNS = [*TRAINED, "resnet18", "test_efficientnet", "convnext_atto"]
VITS = ["dinov2-small", "dinov2-small-noreg", "dinov3-small", "vit_tiny_patch16_224", "test_vit"]
SMALL = ["test_vit", "test_efficientnet", "efficientnet-lite0"]
_made: dict[str, Teacher] = {}


def teacher(name: str) -> Teacher:
    """A random-weight teacher, built once; nothing can change it, as the tests below show."""
    if name not in _made:
        torch.manual_seed(0)
        _made[name] = create_teacher(name, pretrained=False)
    return _made[name]


def noise(batch: int, side: int) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


# ------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("name", CNNS + VITS)
def test_contract(name: str) -> None:
    one = teacher(name)
    info = one.info
    assert info.vit == (name in VITS)
    assert len(info.channels) == len(info.strides) >= 2
    assert info.default_size % info.multiple == 0
    assert all(info.multiple % stride == 0 for stride in info.strides)
    for side in (4 * info.multiple, 6 * info.multiple):
        features = one.features(noise(2, side))
        assert [tuple(m.shape) for m in features.maps] == [
            (2, c, side // s, side // s) for c, s in zip(info.channels, info.strides, strict=True)
        ]
        assert [tuple(t.shape) for t in features.tokens] == [(2, c) for c in info.token_channels]
        assert all(torch.isfinite(t).all() for t in (*features.maps, *features.tokens))


@pytest.mark.parametrize("name", CNNS + VITS)
def test_batch_equals_single(name: str) -> None:
    one = teacher(name)
    x = noise(3, 4 * one.info.multiple)
    both, alone = one.features(x), one.features(x[1:2])
    for a, b in zip((*both.maps, *both.tokens), (*alone.maps, *alone.tokens), strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-3, atol=1e-3)


def test_vit_tokens_are_the_class_tokens_up_to_the_last_block() -> None:
    one = teacher("dinov2-small")
    x = noise(1, 56)
    last = one.net.forward_intermediates(x, indices=[11], intermediates_only=True, return_prefix_tokens=True)
    torch.testing.assert_close(one.features(x).tokens[-1], last[0][1][:, 0])
    assert one.levels == list(range(2, 10))  # the published choice: blocks 2 to 9


@pytest.mark.parametrize(
    ("name", "prefix", "class_token"),
    [
        ("dinov2-small", 5, True),
        ("test_vit", 1, True),
        ("test_vit2", 1, False),
        ("vit_medium_patch16_gap_240", 0, False),
    ],
)
def test_class_and_register_tokens_stand_in_front_of_the_patches(name: str, prefix: int, class_token: bool) -> None:
    one = teacher(name)
    assert (one.info.prefix_tokens, one.info.class_token) == (prefix, class_token)
    x = noise(2, 4 * one.info.multiple)
    features = one.features(x)
    assert [tuple(p.shape) for p in features.prefix] == [(2, prefix, c) for c in one.info.channels]
    last = one.net.forward_intermediates(x, indices=one.levels[-1:], intermediates_only=True, output_fmt="NLC")[0]
    torch.testing.assert_close(features.maps[-1].flatten(2).transpose(1, 2), last)
    shared = one.token_levels.index(one.levels[-1])
    global_token = features.prefix[-1][:, 0] if class_token else last.mean(1)  # a ViT without one: the mean patch
    torch.testing.assert_close(features.tokens[shared], global_token)


def test_normalise_uses_the_teachers_statistics() -> None:
    one = teacher("efficientnet-lite0")
    pixels = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    expected = torch.tensor([(1 - m) / s for m, s in zip(one.info.mean, one.info.std, strict=True)])
    torch.testing.assert_close(one.normalise(pixels)[0, :, 0, 0], expected)
    torch.testing.assert_close(one.normalise(pixels.float()), one.normalise(pixels))


# ------------------------------------------------------------------------------------- frozen for life


@pytest.mark.parametrize("sides", [(16, 16), (17, 16), (16, 19), (13, 13)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("groups", [1, 6])
def test_same_padding_inside_the_convolution(kernel: int, groups: int, sides: tuple[int, int]) -> None:
    torch.manual_seed(0)
    theirs = timm.layers.Conv2dSame(6, 12, kernel, stride=2, groups=groups, bias=groups == 1)
    assert pads_unevenly(theirs)
    ours, x = FrozenConv(theirs), torch.randn(2, 6, *sides)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert ours(x).shape[-2:] == tuple(-(-side // 2) for side in sides)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_other_convolutions_are_left_alone() -> None:
    same = timm.layers.Conv2dSame
    others = [same(2, 2, 1, stride=2), same(2, 2, 4, stride=2), same(2, 2, 3, stride=3), same(2, 2, 3, stride=(2, 1))]
    others += [same(2, 2, 3, stride=2, dilation=2), same(2, 2, (3, 5), stride=2), torch.nn.Conv2d(2, 2, 3, stride=2)]
    assert not any(pads_unevenly(one) for one in others)


@pytest.mark.parametrize(
    "arch", ["tf_efficientnet_lite0", "tf_mobilenetv3_small_100", "tf_efficientnet_b0", "resnet18"]
)
@pytest.mark.parametrize("sides", [(64, 64), (75, 90)])
def test_taking_in_the_padding_changes_nothing_but_time(arch: str, sides: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = timm.create_model(arch, pretrained=False).eval()
    x = torch.randn(1, 3, *sides)
    with torch.no_grad():
        expected = net.forward_intermediates(x, intermediates_only=True)
        fold_batch_norms(net)
        found = net.forward_intermediates(x, intermediates_only=True)
    assert any(isinstance(one, FrozenConv) and one.same for one in net.modules()) == arch.startswith("tf_")
    assert not any(pads_unevenly(one) for one in net.modules())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "mobilenetv2_100", "tf_mobilenetv3_small_100"])
def test_clipping_within_the_convolution_changes_rounding_at_most(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = create_teacher(arch, pretrained=False)
    clipped = [m for m in one.modules() if isinstance(m, FrozenConv) and m.then is not None]
    assert clipped
    x = noise(1, 96)
    fast = one.features(x)
    monkeypatch.setattr(fold, "_has_clipping", lambda: False)
    for ours, theirs in zip(fast.maps, one.features(x).maps, strict=True):  # equal bits on Intel's processors
        assert float((ours - theirs).abs().max()) <= 2e-6 * float(theirs.abs().max())


@pytest.mark.parametrize("name", [*SMALL, "dinov2-small", "resnet18"])
def test_frozen_for_life(name: str) -> None:
    one = teacher(name)
    x = noise(2, 4 * one.info.multiple)
    before, features = snapshot(one), one.features(x)
    one.train()
    one.requires_grad_(True)
    assert not any(module.training for module in one.modules())
    assert not any(p.requires_grad for p in one.parameters())
    optimiser = torch.optim.SGD(one.parameters(), lr=1.0, momentum=0.9, weight_decay=0.5)
    for _ in range(3):
        head = torch.zeros((), requires_grad=True)
        loss = sum(m.mean() for m in one.features(x).maps) + head
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert_same(before, snapshot(one))
    for a, b in zip(features.maps, one.features(x).maps, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["convnext_atto", "test_efficientnet", "resnet18", "test_vit"])
def test_frozen_against_callers_who_reach_inside(name: str) -> None:
    one = teacher(name)
    x = noise(2, 4 * one.info.multiple)
    before, features = snapshot(one), one.features(x)
    for module in one.net.modules():
        module.train()
    for parameter in one.net.parameters():
        parameter.requires_grad_(True)
    again = one.features(x)
    assert not any(m.requires_grad for m in (*again.maps, *again.tokens))
    assert_same(before, snapshot(one))
    for a, b in zip(features.maps, again.maps, strict=True):
        assert torch.equal(a, b)
    one.requires_grad_(False)


def test_a_parent_in_train_mode_leaves_it_frozen() -> None:
    one = teacher("efficientnet-lite0")
    parent = torch.nn.Sequential(one, torch.nn.BatchNorm1d(3)).train()
    assert parent[1].training
    assert not any(module.training for module in one.modules())


# ---------------------------------------------------------------------------------------------- weights


def golden_input() -> torch.Tensor:
    """A picture that no random generator has a part in."""
    axis = torch.arange(96) / 96
    return torch.stack([torch.sin(axis[:, None] * k * 7 + axis[None] * (11 - k)) for k in (1, 2, 3)])[None]


def golden_values(one: Teacher) -> dict[str, list[float]]:
    """A few numbers per map, by channels and stride, so that another choice of levels moves none."""
    maps = one.features(golden_input()).maps
    keys = zip(one.info.channels, one.info.strides, strict=True)
    return {
        f"{c}x{s}": [float(m.mean()), float(m.std()), *m[0, :5, 1, 2].tolist()]
        for (c, s), m in zip(keys, maps, strict=True)
    }


@pytest.mark.parametrize("name", TRAINED)
def test_embedded_weights_give_the_stored_features(name: str) -> None:
    stored = json.loads(GOLDEN.read_text())[name]
    found = golden_values(create_teacher(name))
    common = sorted(stored.keys() & found.keys())
    assert len(common) >= 2
    for key in common:
        assert found[key] == pytest.approx(stored[key], rel=2e-3, abs=2e-3), key


@pytest.mark.parametrize("name", TRAINED)
def test_embedded_weights_are_matched_kind_by_kind(name: str) -> None:
    """The package's tensors go to ours by order; then every name must end alike (weight, running_var ...)."""
    theirs = read_state(find_weights(name)[0])
    ours = timm.create_model(SHORT_NAMES[name], pretrained=False).state_dict()
    assert [k.rpartition(".")[2] for k in theirs] == [k.rpartition(".")[2] for k in ours]
    assert [v.shape for v in theirs.values()] == [v.shape for v in ours.values()]


def test_embedded_teacher_tells_pictures_apart() -> None:
    """Trained weights, unlike random ones, put two rings nearer to each other than to a cloth."""
    import numpy as np
    from painting import weave

    one = create_teacher("efficientnet-lite0")
    pictures = [make(np.random.default_rng(seed), 128) for make, seed in ((ring, 0), (ring, 1), (weave, 2))]
    batch = torch.from_numpy(np.stack([resize_rgb(p, 128) for p in pictures])).permute(0, 3, 1, 2)
    token = one.features(one.normalise(batch)).tokens[-1]
    near, far = (torch.cosine_similarity(token[0], token[i], dim=0) for i in (1, 2))
    assert near > far + 0.05


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "efficientnet-lite0"])
def test_weights_from_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = timm.create_model(SHORT_NAMES.get(name, name), pretrained=False).state_dict()
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    first, second = create_teacher(name, path), create_teacher(name, str(path))
    assert first.hash() == second.hash() != create_teacher(name, pretrained=False).hash()
    assert first.weights == f"file {path.name}"
    if name == "test_vit":
        assert_same({k: state[k] for k in first.net.state_dict()}, snapshot(first.net))


def meta_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's DINOv2 tensors under the names, and in the shapes, of Meta's original files."""
    out = {"mask_token": torch.zeros(1, state["patch_embed.proj.weight"].shape[0])}
    for name, value in state.items():
        out[name.replace("reg_token", "register_tokens")] = value.clone()
    if "register_tokens" in out:  # Meta adds a position to the class token, timm folds it in
        position = torch.randn_like(out["cls_token"])
        out["pos_embed"] = torch.cat([position, out["pos_embed"]], 1)
        out["cls_token"] = out["cls_token"] - position
    return out


@pytest.mark.parametrize("name", ["dinov2-small", "dinov2-small-noreg"])
def test_metas_original_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    state = timm.create_model(SHORT_NAMES[name], pretrained=False, num_classes=0).state_dict()
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save(meta_names(state), path)
    found = create_teacher(name, path).net.state_dict()
    for key in found:
        torch.testing.assert_close(found[key], state[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dinov2-small", "dinov2-small-noreg"])
def test_a_file_with_another_position_grid_is_resampled(name: str, tmp_path: Path) -> None:
    other = timm.create_model(SHORT_NAMES[name], pretrained=False, num_classes=0, img_size=56)
    path = tmp_path / "w.safetensors"
    save_file(other.state_dict(), path)
    one = create_teacher(name, path)
    assert one.net.pos_embed.shape != other.pos_embed.shape
    assert torch.isfinite(one.features(noise(1, 56)).maps[0]).all()


def test_stored_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINSPECT_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as missing:
        create_teacher("test_vit")
    for way in (
        "twinspect fetch test_vit",
        "--weights FILE",
        str(tmp_path / "weights"),
        "--teacher efficientnet-lite0",
    ):
        assert way in str(missing.value)
    (tmp_path / "weights").mkdir()
    save_file(
        timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "weights" / "test_vit.safetensors"
    )
    assert create_teacher("test_vit").weights == "store test_vit.safetensors"


def test_auto_takes_the_better_teacher_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from twinspect.models.weights import explain_auto, resolve_auto

    monkeypatch.setenv("TWINSPECT_HOME", str(tmp_path))
    assert resolve_auto() == DEFAULT_EMBEDDED == create_teacher("auto").name
    assert f"twinspect fetch {PREFERRED}" in explain_auto(DEFAULT_EMBEDDED)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / f"{PREFERRED}.safetensors").write_bytes(b"x")
    assert resolve_auto() == PREFERRED
    assert str(tmp_path) in explain_auto(PREFERRED)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("body", [b"", b"not weights at all" * 50])
def test_damaged_file(body: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(body)
    with pytest.raises(WeightsError, match=f"w{suffix}: damaged, or not a weights file"):
        create_teacher("test_vit", path)


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cut.safetensors: damaged"):
        create_teacher("test_vit", cut)
    for name in ("test_vit2", "test_efficientnet", "efficientnet-lite0", "dinov2-small"):
        with pytest.raises(WeightsError, match=r"whole\.safetensors"):
            create_teacher(name, whole)
    with pytest.raises(WeightsError, match=r"no such weights file: .*gone\.pth"):
        create_teacher("test_vit", tmp_path / "gone.pth")
    torch.save({"model": 3}, tmp_path / "number.pth")
    with pytest.raises(WeightsError, match="holds no state dict"):
        create_teacher("test_vit", tmp_path / "number.pth")


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "trap.pth"
    path.write_bytes(pickle.dumps({"a": Trap()}))
    with pytest.raises(WeightsError, match="damaged, or not a weights file"):
        create_teacher("test_vit", path)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------ names and offline


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(ConfigError, match="unknown teacher 'efficientnet-light0'. Did you mean 'efficientnet-lite0'"):
        create_teacher("efficientnet-light0")
    with pytest.raises(ConfigError, match="Did you mean 'dinov2-base'"):
        create_teacher("dino-v2-base", pretrained=False)
    with pytest.raises(ConfigError, match="Did you mean .*'resnet18'"):
        create_teacher("resnet_18", pretrained=False)
    with pytest.raises(ConfigError, match="Accepted: auto, dinov2-small, .* or any timm name"):
        create_teacher("", pretrained=False)


def test_a_network_of_one_fixed_size_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="choose another teacher"):
        create_teacher("swin_tiny_patch4_window7_224", pretrained=False)


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_more: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in SMALL:
        create_teacher(name, pretrained=name in EMBEDDED)
    with pytest.raises(WeightsError):
        create_teacher("dinov2-small")


def test_backbone_depth_dial_and_trainability() -> None:
    full, half = Backbone("test_vit"), Backbone("test_vit", depth=0.5)
    assert len(half.net.blocks) < len(full.net.blocks)
    assert all(p.requires_grad for p in half.parameters())
    assert half.features(noise(1, 64)).tokens[0].requires_grad


def test_hash_tells_weights_apart() -> None:
    torch.manual_seed(0)
    first = create_teacher("test_vit", pretrained=False)
    torch.manual_seed(0)
    again = create_teacher("test_vit", pretrained=False)
    assert first.hash() == again.hash()
    assert len(first.hash()) == 16
    with torch.no_grad():
        again.net.cls_token.view(-1)[0] += math.ldexp(1.0, -20)
    assert first.hash() != again.hash()
